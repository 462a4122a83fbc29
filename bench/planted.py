"""What the check of a data set finds of faults that were planted: twins, and swapped labels.

    python -m bench.planted [--data DIR]            # twins in CIFAR-100, whose own are among the others
    python -m bench.planted --labels cifar10        # or a folder of it: labels, by the features of --model

Twins: of 3 % of the images a copy is planted: the same pixels, re-encoded as JPEG of quality 40 to 90,
resized to 20 to 64 pixels and back, mirrored, cropped by 10 % anywhere. Of each kind there are equally many.

Labels: 5 % of those of the test images, taken as a set of their own, are swapped for another class at random.
--split train takes as many training images instead, on which what is in sifar/runs/doubts.py was chosen.
Of test images of CIFAR-100, one for each hundred of those, are then counted those far from all others."""
import argparse
import io
import time
from pathlib import Path

import numpy as np
from PIL import Image

from sifar import TrainConfig, load_learner
from sifar.cli import one_line_errors
from sifar.data.datasets import load_data
from sifar.data.twins import exact_twins, near_twins
from sifar.runs.doubts import far_from_others, outputs, standard, unlike

SIDE, SHARE, SWAPPED = 32, 0.03, 0.05
FOREIGN = 2000          # test images of CIFAR-100 that strangers are drawn from
FILTERS = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS
SHIPPED = Path(__file__).parents[1] / "results" / "cifar100-resnet18"


# ---- twins ----

def encoded(img, rng):
    buffer = io.BytesIO()
    img.save(buffer, "JPEG", quality=int(rng.integers(40, 91)))
    return Image.open(buffer)


def resized(img, rng):
    side, how = int(rng.choice([20, 24, 28, 40, 48, 64])), FILTERS[rng.integers(3)]
    return img.resize((side, side), how).resize((SIDE, SIDE), Image.Resampling.BILINEAR)


def cropped(img, rng):
    left, top = rng.uniform(0, 0.1 * SIDE, 2)
    box = left, top, left + 0.9 * SIDE, top + 0.9 * SIDE
    return img.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box)


def mirrored(img, rng): return img.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
def same(img, rng): return img


KINDS = {
    "same pixels": same, "re-encoded": encoded, "resized": resized, "mirrored": mirrored, "cropped": cropped}


def pairs(images):
    "The pairs of rows that are twins, the smaller row first."
    first = exact_twins(images)
    rows = np.flatnonzero(first == np.arange(len(first)))
    found = {(int(of), row) for row, of in enumerate(first) if of != row}
    return found | {(int(a), int(b)) for a, b, _ in near_twins(images, rows, rows)}


def plant_twins(images, n, seed):
    "Print how many of the copies planted among `n` of these images are found, by kind, and other pairs."
    rng = np.random.default_rng(seed)
    images = images[rng.permutation(len(images))[:n]]
    n = len(images)
    origins = rng.choice(n, round(SHARE * n), replace=False)
    kinds, make = np.arange(len(origins)) % len(KINDS), list(KINDS.values())
    copies = [np.asarray(make[k](Image.fromarray(images[row]), rng)) for row, k in zip(origins, kinds)]
    before = pairs(images)
    images = np.concatenate((images, copies))
    start = time.process_time()
    found = pairs(images)
    seconds = time.process_time() - start
    planted = [(int(row), n + i) for i, row in enumerate(origins)]
    for k, name in enumerate(KINDS):
        hits = [pair in found for pair, kind in zip(planted, kinds) if kind == k]
        print(f"{name:12} {sum(hits)} of {len(hits)} found: {100 * np.mean(hits):.1f} %")
    right = len(found & set(planted))
    print(f"{right} planted pairs, {len(found) - right} others ({len(before)} without the copies); "
          f"{len(images):,} images, {seconds:.0f} s of CPU")


# ---- labels ----

def plant_labels(features, own, classes, seed):
    "Print how many of the labels `own` (n,) that were swapped for others are doubted by features (n,f)."
    rng, n = np.random.default_rng(seed), len(own)
    labels, swapped = own.copy(), rng.choice(n, round(SWAPPED * n), replace=False)
    labels[swapped] = (own[swapped] + rng.integers(1, classes, len(swapped))) % classes
    doubt, new, _ = unlike(features, labels)
    bad = labels != own
    named = (new == own)[doubt & bad].mean()
    print(f"seed {seed}: {doubt.sum()} of {n:,} labels doubted; recall {100 * doubt[bad].mean():.1f} %, "
          f"precision {100 * bad[doubt].mean():.1f} %, right class named {100 * named:.0f} %", flush=True)


def plant_strangers(own, foreign, seed):
    "Print how many of images of other things are far from all others; own, foreign: parts of features (n,f)."
    n = len(own[0])
    rows = np.random.default_rng(seed).choice(len(foreign[0]), n // 100, replace=False)
    far, _ = far_from_others([np.concatenate((a, b[rows])) for a, b in zip(own, foreign)])
    print(f"seed {seed}: of {len(rows)} images of other things {100 * far[n:].mean():.0f} % are far from all "
          f"others, of the {n:,} themselves {100 * far[:n].mean():.2f} %", flush=True)


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=TrainConfig().data)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--labels", help="data set whose labels are swapped: cifar10, or a folder")
    parser.add_argument("--model", type=Path, default=SHIPPED, help="learner with other classes")
    parser.add_argument("--split", choices=("test", "train"), default="test")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    o = parser.parse_args(args)
    with one_line_errors():
        data = load_data(TrainConfig(dataset=o.labels or "cifar100", data=o.data, valid_pct=0.0))
        if not o.labels:
            for seed in o.seeds: plant_twins(data.images, o.images, seed)
            return
        rows = data.test
        if o.split == "train":
            rows = np.random.default_rng(123).choice(data.train, len(data.test), replace=False)
        learn, other = load_learner(o.model), load_data(TrainConfig(dataset="cifar100", data=o.data))
        parts, _ = outputs(learn, data.images, rows)
        foreign, _ = outputs(learn, other.images, other.test[:FOREIGN])
        features = standard(*parts)
        for seed in o.seeds:
            plant_labels(features, data.labels[rows], len(data.vocab), seed)
            plant_strangers(parts, foreign, seed)


if __name__ == "__main__": main()
