"""What limits the speed of training on this device, as rows of a Markdown table.

    python -m bench.limits [--data DIR] [--images 51200] [--bs 128 512 1024] [--workers 0 4 8 16]

First the model alone, on batches that are on the device already: eager, compiled, as CUDA graphs, both.
Then our Learner with each way to feed it: images/s of a fit, and how much of its time it would save if its
batches were on the device already."""
import argparse
import time
from dataclasses import replace
from functools import partial
from itertools import islice

import torch

from bench.train import bare, ours, wait
from sifar import TrainConfig
from sifar.errors import one_line
from sifar.log import quiet_imports


def best(figures, rounds=3):
    return max(islice(figures, 1, 1 + rounds))          # after a first round that warms up


def fed(cfg, n):
    "Images/s of the same Learner whose batches are all one that is on the device already."
    from sifar import get_dls, get_learner
    from sifar.training.callbacks import StopOnNaN
    dls = get_dls(cfg)
    learn = get_learner(dls, cfg)
    dls.loaders[0] = [dls.one_batch()] * (n // cfg.bs)
    with learn.no_bar(), learn.no_logging():
        while True:
            start = time.perf_counter()
            learn.fit_warmup_cosine(1, warmup=0, cbs=StopOnNaN())
            wait()
            yield n / (time.perf_counter() - start)


def compiled(cfg, n):
    "The middle of the row of the compiled model; where there is no compiler for it, the reason."
    start = time.perf_counter()
    try:
        figures = bare(cfg, n, partial(torch.compile, dynamic=False))
        next(figures)
        seconds, rate = time.perf_counter() - start, max(islice(figures, 3))
    # whatever a compiler, its cache or its driver raises: the reason is what this row is to say
    except Exception as e: return f"compiled | {cfg.bs} | {one_line(e)}"
    return f"compiled in {seconds - n / rate:.0f} s | {cfg.bs} | {rate:,.0f}"


def graphed(cfg, n, compile=lambda o: o):
    "The middle of the row of the model whose passes are recorded as CUDA graphs, or why there is none."
    def record(model):
        x = torch.randn(cfg.bs, 3, cfg.sz, cfg.sz, device="cuda")
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return torch.cuda.make_graphed_callables(compile(model), (x,))
    try: return f"| {cfg.bs} | {best(bare(cfg, n, record)):,.0f}"
    # no CUDA above all: the other rows are worth having without this one
    except Exception as e: return f"| {cfg.bs} | {one_line(e)}"


def row(name, cfg, n, most):
    "The row of our Learner by `cfg`, which could do `most` images/s; where it fails, the reason."
    try: rate = best(ours(cfg, n))
    # too little memory for the workers, above all: the other rows are worth having without this one
    except Exception as e: return f"| {name} | {cfg.bs} | {one_line(e)} | - |"
    return f"| {name} | {cfg.bs} | {rate:,.0f} | {100 * max(0, 1 - rate / most):.1f} |"


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
        print(f"| model alone, {compiled(cfg, n)} | - |", flush=True)
        print(f"| model alone, as CUDA graphs {graphed(cfg, n)} | - |", flush=True)
        both = graphed(cfg, n, partial(torch.compile, dynamic=False))
        print(f"| model alone, compiled and as CUDA graphs {both} | - |", flush=True)
        most = best(fed(replace(cfg, augment="batch"), n))
        print(f"| our Learner, fed with one batch | {bs} | {most:,.0f} | 0 |", flush=True)
        print(row("augmented as batches", replace(cfg, augment="batch"), n, most), flush=True)
        for w in args.workers:
            name = f"augmented one by one, {w} workers"
            print(row(name, replace(cfg, workers=w), n, most), flush=True)


if __name__ == "__main__": main()
