"""Few labels: from scratch, a linear classifier on frozen features, and fine-tuned, on draws of CIFAR-10.

    python -m bench.transfer transfer.csv --dataset cifar10-images [--draws 3] [--test]

A row of the CSV file for each recipe, number of labels a class, and draw; what has a row already is left out,
so a run that broke off goes on. Choices are made without --test: accuracy is then that on 5,000 training
images that no draw takes labels from. With --test it is that on the 10,000 test images, each row once.
Recipes: `scratch`, `frozen`, `finetune`, or flags of train.py as quoted texts, to try others."""
import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from bench.sweep import append_row, read_rows, trained
from sifar.cli import one_line_errors
from sifar.log import log, log_to_screen
from sifar.runs.arguments import parse_args

COLUMNS = "recipe", "labels", "draw", "split", "top1", "minutes", "device"
HELD = 5000         # training images to choose on
RECIPES = {
    "scratch": "--bs 32 --warmup 0.1 --epochs {epochs} --wd 0.001",
    "finetune": "--preset finetune",
}


def draw(data, labels, number, split):
    "The ImageData with so many training images a class, drawn at random; its test set is that of `split`."
    rng = np.random.default_rng(0)
    order = rng.permutation(data.train)
    held, rest = order[:HELD], order[HELD:]
    rest = np.random.default_rng(number).permutation(rest)
    train = [rest[data.labels[rest] == c][:labels] for c in range(len(data.vocab))]
    test = data.test if split == "test" else held
    return replace(data, train=np.sort(np.concatenate(train)), valid=held[:0], test=np.sort(test))


def train(cfg, data):
    "Top-1 in percent on data.test of the last epoch of a training by `cfg`."
    learn = trained(cfg, data)
    with learn.no_bar(): probs, targs = learn.get_preds(2)
    return 100 * (probs.argmax(1) == targs).float().mean().item()


def linear(cfg, data):
    "Top-1 in percent on data.test of a logistic regression on the features of the model that is frozen."
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from sifar.data.loaders import make_dls
    from sifar.training.learner import get_learner
    from sifar.training.transfer import inputs_of

    dls = make_dls(cfg, data, data.stats())
    net = get_learner(dls, cfg).model
    x, x_test = (inputs_of(net.get_classifier(), net, data.images[rows], dls.stats).numpy()
                 for rows in (data.train, data.test))
    # the strength of its regularisation by three-fold validation among the labels
    head = LogisticRegressionCV(Cs=np.logspace(-5, 0, 6), cv=3, max_iter=500, scoring="accuracy")
    model = make_pipeline(StandardScaler(), head)
    model.fit(x, data.labels[data.train])
    return 100 * model.score(x_test, data.labels[data.test])


def measure(recipe, labels, number, split, args, data):
    "A row of the CSV file."
    import torch
    flags = RECIPES.get(recipe, recipe).format(epochs=max(30, 20_000 // (10 * labels)))
    if recipe == "frozen": flags = "--init cifar100"
    # a preset of its own, as what is usual for a folder depends on all of its images
    preset = [] if "--preset" in flags else ["--preset", "standard"]
    given = ["--dataset", args.dataset, "--data", args.data, "--seed", str(number)]
    cfg = parse_args([*given, *preset, *flags.split()])
    drawn = draw(data, labels, number, split)
    start = time.perf_counter()
    top1 = linear(cfg, drawn) if recipe == "frozen" else train(cfg, drawn)
    minutes = (time.perf_counter() - start) / 60
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return dict(zip(COLUMNS, (recipe, labels, number, split, top1, minutes, device)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("--dataset", required=True, help="cifar10, or its pictures as a folder")
    parser.add_argument("--data", default="data")
    parser.add_argument("--labels", type=int, nargs="+", default=[10, 50, 100, 500])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--test", action="store_true")
    parser.add_argument("--recipes", nargs="+", default=["frozen", "finetune", "scratch"])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no training after so long")
    args = parser.parse_args()
    with one_line_errors(): run(args)


def run(args):
    log_to_screen()
    from sifar.data.datasets import load_data

    split = "test" if args.test else "held out"
    rows = [row for row in read_rows(args.csv) if row["split"] == split]
    done = {(row["recipe"], row["labels"], row["draw"]) for row in rows}
    flags = "--preset", "standard", "--valid-pct", "0"
    data = load_data(parse_args(["--dataset", args.dataset, "--data", args.data, *flags]))
    start = time.monotonic()
    for labels in args.labels:
        for number in range(args.draws):
            for recipe in args.recipes:
                if (recipe, str(labels), str(number)) in done: continue
                if time.monotonic() - start > 60 * args.minutes: return
                row = measure(recipe, labels, number, split, args, data)
                append_row(args.csv, row, COLUMNS)
                log.info("%s, %d labels, draw %d: %.2f %% in %.1f minutes",
                         recipe, labels, number, row["top1"], row["minutes"])


if __name__ == "__main__": main()
