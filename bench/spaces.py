"""A Space with PyTorch beside a light one: what they take to install, to start, and for a picture.

    python -m bench.spaces RUN DIR      # RUN has a learner.pkl; DIR is new, and 7 GB go into it

Writes both Spaces of a run, and an environment for each by its requirements.txt. Then both pages run at
once, on one thread each, and are asked in turns for the examples. Seconds are those of processors, which
other work on the machine changes little (Linux alone tells them)."""
import argparse
import os
import re
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

from gradio_client import Client, handle_file

ROOT = Path(__file__).parents[1]
ROUNDS = 6
TICKS = os.sysconf("SC_CLK_TCK")                # of /proc/PID/stat in a second


def run(*command):
    "Seconds that a command and its children kept processors busy."
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def gigabytes(folder):
    return sum(path.lstat().st_blocks for path in folder.rglob("*")) * 512 / 1e9


class Space:
    "A Space of `run` in `folder`, its environment and, once started, its page."

    def __init__(self, run_folder, folder, *flags):
        self.folder, environment = folder / "space", folder / "environment"
        self.python = environment / "bin" / "python"
        run(sys.executable, "export.py", run_folder, "--space", self.folder, *flags)
        run(sys.executable, "-m", "venv", environment)
        empty = gigabytes(environment)
        needs = self.folder / "requirements.txt"
        self.install = run(self.python, "-m", "pip", "install", "--no-cache-dir", "--quiet", "-r", needs)
        self.size = gigabytes(environment) - empty

    def start(self, picture):
        "Start the page, and wait for its first answer."
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "GRADIO_SERVER_PORT": str(port)}
        log = open(self.folder.with_name("log"), "w+")
        streams = {"stdout": log, "stderr": subprocess.STDOUT}
        self.page = subprocess.Popen([self.python, "app.py"], cwd=self.folder, env=env, **streams)
        while "Running on" not in Path(log.name).read_text():
            if self.page.poll() is not None: raise SystemExit(f"the page ended: see {log.name}")
            time.sleep(0.5)
        self.client = Client(f"http://127.0.0.1:{port}", verbose=False)
        self.first = self.ask(picture)

    def ask(self, picture):
        "Have a picture classified; returns the processor seconds of the page since its start."
        self.client.predict(handle_file(str(picture)), api_name="/predict")
        fields = Path(f"/proc/{self.page.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS              # in user and in system mode

    def memory(self):
        "MB that the page has in memory."
        status = Path(f"/proc/{self.page.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1000


def measure(spaces, pictures):
    "Ask both pages in turns, and print the table."
    for space in spaces: space.start(pictures[0])
    for picture in pictures * ROUNDS: busy = [space.ask(picture) for space in spaces]
    n = len(pictures) * ROUNDS
    print("| | PyTorch with CUDA | `--light` | ratio |\n|---|---|---|---|")
    say("processor seconds to install its requirements", [space.install for space in spaces], ".0f")
    say("GB of them on disk", [space.size for space in spaces], ".2f")
    say("processor seconds to the first answer", [space.first for space in spaces], ".1f")
    say(f"MB of memory after {n} more", [space.memory() for space in spaces], ".0f")
    taken = [last - space.first for last, space in zip(busy, spaces)]
    say("processor ms a picture", [1000 * seconds / n for seconds in taken], ".1f")


def say(what, pair, form):
    a, b = pair
    print(f"| {what} | {a:{form}} | {b:{form}} | {a / b:.1f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    folder = args.folder.resolve()
    spaces = [Space(args.run, folder / "full"), Space(args.run, folder / "light", "--light")]
    try: measure(spaces, sorted((ROOT / "examples").glob("*.*g")))
    finally:
        for space in spaces: space.page.terminate()


if __name__ == "__main__": main()
