"""How many planted twins the check of a data set finds, and how many other pairs.

    python -m bench.twins [--data DIR]          # on CIFAR-100, whose own twins are among the others

Of 3 % of the images a copy is planted: the same pixels, re-encoded as JPEG of quality 40 to 90, resized to
20 to 64 pixels and back, mirrored, cropped by 10 % anywhere. Of each kind there are equally many."""
import argparse
import io
import time

import numpy as np
from PIL import Image

from sifar import TrainConfig
from sifar.data.datasets import load_data
from sifar.data.twins import exact_twins, near_twins

SIDE, SHARE = 32, 0.03
FILTERS = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS


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


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=TrainConfig().data)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args(args)
    rng = np.random.default_rng(o.seed)
    images = load_data(TrainConfig(dataset="cifar100", data=o.data)).images
    images = images[rng.permutation(len(images))[:o.images]]
    n = len(images)
    origins = rng.choice(n, round(SHARE * n), replace=False)
    kinds, make = np.arange(len(origins)) % len(KINDS), list(KINDS.values())
    copies = [np.asarray(make[k](Image.fromarray(images[row]), rng)) for row, k in zip(origins, kinds)]
    before = pairs(images)
    images = np.concatenate((images, copies))
    start = time.monotonic()
    found = pairs(images)
    seconds = time.monotonic() - start
    planted = [(int(row), n + i) for i, row in enumerate(origins)]
    for k, name in enumerate(KINDS):
        hits = [pair in found for pair, kind in zip(planted, kinds) if kind == k]
        print(f"{name:12} {sum(hits)} of {len(hits)} found: {100 * np.mean(hits):.1f} %")
    right = len(found & set(planted))
    print(f"{right} planted pairs, {len(found) - right} others ({len(before)} without the copies); "
          f"{len(images):,} images, {seconds:.0f} s")


if __name__ == "__main__": main()
