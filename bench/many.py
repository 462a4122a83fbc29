"""Images a second of two processes with a thread each against one with two threads, by train.py itself.

    python -m bench.many [--rounds 3] [--arch resnet18] [--bs 128]      # on digits, on a CPU

Each is started in turn for two epochs; the rate is that of the second one, in which all is warm."""
import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.race import ratio

TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"


def rate(start, threads, args):
    "Images/s of the second epoch of train.py, started by Python with `start`, with so many threads each."
    with tempfile.TemporaryDirectory() as runs:
        flags = "--dataset", "digits", "--arch", args.arch, "--bs", str(args.bs), "--augment", "batch"
        command = [sys.executable, "-W", "ignore", *start, "train.py", *flags, "--epochs", "2",
                   "--device", "cpu", "--runs", runs, "--name", "a"]
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
        with (Path(runs) / "digits" / "a" / "history.csv").open() as f: last = list(csv.DictReader(f))[-1]
        return float(last["images_per_second"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--bs", type=int, default=128)
    args = parser.parse_args()
    two, one = [], []
    for _ in range(args.rounds):
        two.append(rate(TORCHRUN, 1, args))
        one.append(rate((), 2, args))
        print(f"2 processes {two[-1]:.0f}, 1 process {one[-1]:.0f} images/s", flush=True)
    rates = statistics.median(two), statistics.median(one)
    print(f"median {rates[0]:.0f} and {rates[1]:.0f} images/s: {ratio(two, one):.2f} times")


if __name__ == "__main__": main()
