"""What limits the speed of training on this device: the model alone, then our Learner with each way to feed it, as rows of a Markdown table.

    python -m bench.limits [--data DIR] [--images 51200] [--bs 128 512 1024] [--workers 0 4 8 16]

alone: batches that are on the device already, eager and compiled. Ours: images/s of a fit, and the share of it that waits for data."""
import argparse
import time
from dataclasses import replace
from itertools import islice

import torch

from bench.train import bare, ours
from sifar import TrainConfig
from sifar.terminal import quiet_imports


def best(figures, rounds=3): return max(islice(figures, 1, 1 + rounds))          # after a first round that warms up


def waiting(cfg, n):
    "The share of the time of at most 50 training steps in which the device waits for data."
    from sifar import get_dls
    from sifar.explore import step_times
    parts, _ = step_times(cfg, get_dls(cfg), min(50, n // cfg.bs))
    return parts["data"] / sum(parts.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=TrainConfig().data)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--images", type=int, default=51_200, help="images of a round")
    parser.add_argument("--bs", type=int, nargs="+", default=[128, 512, 1024])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 4, 8, 16])
    args = parser.parse_args()
    quiet_imports()
    print("| | batch | images/s | waits for data, % |\n|---|---|---|---|", flush=True)
    for bs in args.bs:
        cfg = TrainConfig(data=args.data, arch=args.arch, bs=bs, valid_pct=0.0)
        n = min(args.images, 50_000 // bs * bs)
        print(f"| model alone | {bs} | {best(bare(cfg, n)):,.0f} | - |", flush=True)
        start = time.perf_counter()
        compiled = bare(cfg, n, torch.compile)
        next(compiled)
        seconds = time.perf_counter() - start
        print(f"| model alone, compiled in {seconds:.0f} s | {bs} | {max(islice(compiled, 3)):,.0f} | - |", flush=True)
        for name, o in {"augmented as batches": replace(cfg, augment="batch"), **{f"augmented one by one, {w} workers": replace(cfg, workers=w) for w in args.workers}}.items():
            print(f"| {name} | {bs} | {best(ours(o, n)):,.0f} | {100 * waiting(o, n):.1f} |", flush=True)


if __name__ == "__main__": main()
