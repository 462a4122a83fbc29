"""Images a second of two processes with a thread each against one with two threads, by train.py itself.

    python -m bench.many [--rounds 3] [--arch resnet18] [--bs 128]      # on digits, on a CPU

Each in turn trains one epoch, then two: the rate is that of the last one, in which all is warm, and the
seconds of CPU that an image costs are the difference of the two. Not beside other programs: two threads of
one process then wait for each other, and spin."""
import argparse
import csv
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.race import ratio

TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"


def train(start, threads, epochs, args):
    "Images/s of the last epoch of train.py, started by Python with `start`, and its seconds of CPU."
    with tempfile.TemporaryDirectory() as runs:
        flags = "--dataset", "digits", "--arch", args.arch, "--bs", str(args.bs), "--augment", "batch"
        command = [sys.executable, "-W", "ignore", *start, "train.py", *flags, "--epochs", str(epochs),
                   "--precision", "fp32", "--device", "cpu", "--runs", runs, "--name", "a"]
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        before = cpu_seconds()
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
        with (Path(runs) / "digits" / "a" / "history.csv").open() as f: last = list(csv.DictReader(f))[-1]
        return float(last["images_per_second"]), cpu_seconds() - before


def cpu_seconds():
    "Seconds of CPU of all processes that were started here and have ended."
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(start, threads, args):
    "Images/s, and images a second of CPU."
    _, short = train(start, threads, 1, args)
    rate, long = train(start, threads, 2, args)
    return rate, args.bs * (1295 // args.bs) / (long - short)           # digits has 1,295 training images


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--bs", type=int, default=128)
    args = parser.parse_args()
    two, one = [], []
    for _ in range(args.rounds):
        two.append(measure(TORCHRUN, 1, args))
        one.append(measure((), 2, args))
        for name, found in (("2 processes", two), ("1 process", one)):
            print(f"{name}: {found[-1][0]:.0f} images/s, {found[-1][1]:.1f} a second of CPU", flush=True)
    for unit, ours, peer in zip(("images/s", "images a second of CPU"), zip(*two), zip(*one)):
        print(f"{unit}: {ratio(ours, peer):.2f} times, the median of {args.rounds} rounds")


if __name__ == "__main__": main()
