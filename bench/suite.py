"""What has to pass before a change lands (ruff, mypy, the tests), and its time beside a small training.

    python -m bench.suite [ARGS OF PYTEST]          # a target of the Makefile: make test"""
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BIN = Path(sys.executable).parent
MOST = 8            # times the training
WORKERS = "-n", "2", "--dist", "loadscope"      # a file stays with one worker: what it trains is trained once


def seconds(*command):
    "Run a command, print it, and return its seconds; end with its exit code where that is not 0."
    print(shlex.join(map(str, command)), flush=True)
    start = time.monotonic()
    code = subprocess.run(command).returncode
    if code: sys.exit(code)
    return time.monotonic() - start


def main(args):
    tests = sum((
        seconds(BIN / "ruff", "check", "."),
        seconds(BIN / "mypy"),
        seconds(sys.executable, "-m", "pytest", *WORKERS, *args)))
    with tempfile.TemporaryDirectory() as runs:
        smoke = seconds(sys.executable, "train.py", "--preset", "smoke", "--runs", runs)
    print(f"ruff, mypy and the tests took {tests:.0f} s: {tests / smoke:.1f} times the {smoke:.0f} s "
          f"of python train.py --preset smoke (mark: at most {MOST})")


if __name__ == "__main__": main(sys.argv[1:])
