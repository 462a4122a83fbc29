"""Trainings by several settings, one after another in one process: a row of a CSV file as each ends.

    python -m bench.sweep sweep.csv --preset fast --seeds 7 8 -- "" "--ema 0.999" "--cutmix 1 --mix-prob 0.5"

Each quoted text has flags of train.py. The data is read once. What has a row already is left out, so a sweep
that broke off goes on. A tenth of the training images is held out, and the test set is not looked at."""
import argparse
import csv
import io
import itertools
import shlex
import tempfile
import time
from pathlib import Path

from sifar.cli import one_line_errors
from sifar.log import log, log_to_screen
from sifar.runs.arguments import parse_args

COLUMNS = "flags", "seed", "top1", "top5", "loss", "train_loss", "seconds", "images_per_second"


def trained(cfg, data):
    "A Learner that was trained by `cfg` on the ImageData `data`, of which nothing is kept on disk."
    from sifar.data.loaders import make_dls
    from sifar.log import progress
    from sifar.training.callbacks import RunLog, SeedEpochs, StopOnNaN
    from sifar.training.learner import get_learner

    dls = make_dls(cfg, data, data.stats())
    with tempfile.TemporaryDirectory() as path, progress() as bar:
        learn = get_learner(dls, cfg, path=Path(path))
        cbs = [SeedEpochs(cfg.seed), StopOnNaN(), RunLog(bar)]
        with learn.no_bar():
            warmup = cfg.warmup * cfg.epochs
            learn.fit_warmup_cosine(cfg.epochs, warmup=warmup, cbs=cbs, fall=cfg.schedule)
    return learn


def fit(cfg, data):
    "What the last epoch of such a training gave, in percent, and its seconds in all."
    start = time.perf_counter()
    last = trained(cfg, data).history[-1]
    return {"top1": 100 * last["top1"], "top5": 100 * last["top5"], "loss": last["valid_loss"],
            "train_loss": last["train_loss"], "seconds": time.perf_counter() - start,
            "images_per_second": last["images_per_second"]}


def read_rows(path):
    "The rows of a sweep that are there already."
    if not path.exists(): return []
    return list(csv.DictReader(io.StringIO(path.read_text())))


def append_row(path, row, columns):
    "Append the dictionary `row` to a CSV file, with a header where it is new."
    new = not path.exists()
    with path.open("a", newline="") as f:
        writer = csv.DictWriter(f, columns)
        if new: writer.writeheader()
        writer.writerow({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--seeds", type=int, nargs="+", default=[7])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no training after so long")
    parser.add_argument("flags", nargs="+", help="settings of a training, each as one quoted text")
    args = parser.parse_args()
    with one_line_errors(): sweep(args)


def sweep(args):
    "Train by each of the settings that has no row yet; all of them are checked before the first."
    done = {(row["flags"], int(row["seed"])) for row in read_rows(args.csv)}
    todo = []
    for flags, seed in itertools.product(args.flags, args.seeds):
        options = "--preset", args.preset, "--valid-pct", "0.1", *shlex.split(flags), "--seed", str(seed)
        if (flags, seed) not in done: todo.append((flags, parse_args(list(options))))
    log_to_screen()
    from sifar.data.datasets import load_data

    start, data = time.monotonic(), {}
    for flags, cfg in todo:
        if time.monotonic() - start > 60 * args.minutes: return
        log.info("%s, seed %d", flags or "as the preset says", cfg.seed)
        split = cfg.dataset, cfg.seed, cfg.valid_pct
        if split not in data: data[split] = load_data(cfg)
        append_row(args.csv, {"flags": flags, "seed": cfg.seed, **fit(cfg, data[split])}, COLUMNS)


if __name__ == "__main__": main()
