"""Seconds until something happens, beside the import of fastai alone.

    python -m bench.startup --model RUN         # a run folder with a learner.pkl, or one

Each command runs in a process of its own, and they take turns; the medians count."""
import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def python(*args):
    "Seconds of a command line."
    start = time.perf_counter()
    subprocess.run([sys.executable, *args], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - start


def first_prediction(model):
    "Seconds from the start of app.py to the answer of its first request."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    start = time.perf_counter()
    command = [sys.executable, "app.py", "--model", str(model)]
    env = {**os.environ, "GRADIO_SERVER_PORT": str(port)}
    nowhere = subprocess.DEVNULL
    server = subprocess.Popen(command, cwd=ROOT, stdout=nowhere, stderr=nowhere, env=env)
    try:
        while True:
            try: socket.create_connection(("127.0.0.1", port), 1).close()
            except OSError:
                if server.poll() is not None:
                    raise SystemExit(f"app.py --model {model} ended at once") from None
                time.sleep(0.02)
            else: break
        up = time.perf_counter()
        from gradio_client import Client, handle_file  # the client's own import is not the app's time
        client_start = time.perf_counter()
        client = Client(f"http://127.0.0.1:{port}", verbose=False)
        client.predict(handle_file(str(ROOT / "examples" / "apple.png")), api_name="/predict")
        return up - start + time.perf_counter() - client_start
    finally:
        server.terminate()
        server.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    measures = {
        "import fastai.vision.all": lambda: python("-c", "import fastai.vision.all"),
        "import sifar": lambda: python("-c", "import sifar"),
        "train.py --help": lambda: python("train.py", "--help"),
        "app.py, first prediction": lambda: first_prediction(args.model),
    }
    rounds = [{name: f() for name, f in measures.items()} for _ in range(args.rounds + 1)]
    rounds = rounds[1:]                         # the first fills the system's caches
    base = "import fastai.vision.all"
    for name in measures:
        seconds = statistics.median(taken[name] for taken in rounds)
        share = statistics.median(taken[name] / taken[base] for taken in rounds)
        print(f"{name:26} {seconds:6.2f} s   {share:.2f} of fastai's import")


if __name__ == "__main__": main()
