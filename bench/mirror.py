"""Whether --mirror auto tells sets where left and right make a difference from those where they do not.

    python -m bench.mirror [DRAWS]          # a Markdown table; CIFAR-100 has to be in SIFAR_DATA"""
import math
import sys
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from sifar import TrainConfig
from sifar.data.datasets import load_data
from sifar.training.mirror import count_mirrored

FONT = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
KINDS = {
    "arrows to left and right, 50 each": (["←", "→"], 50),
    "arrows of four ways, 50 each": (["←", "→", "↑", "↓"], 50),
    "b, d, p and q, 50 each": (list("bdpq"), 50),
    "digits in print, 30 each": (list("0123456789"), 30),
    "O, X, I, A and H, 50 each": (list("OXIAH"), 50)}


def drawn(rng, text):
    "A picture (32,32,3) uint8 of a sign, in colours, sizes, places, angles and sharpness of all kinds."
    while True:
        paper, ink = (tuple(map(int, rng.integers(0, 256, 3))) for _ in range(2))
        if sum(abs(a - b) for a, b in zip(paper, ink)) > 250: break
    img = Image.new("RGB", (96, 96), paper)
    font, at = ImageFont.truetype(FONT, rng.integers(46, 80)), tuple(48 + rng.uniform(-8, 8, 2))
    ImageDraw.Draw(img).text(at, text, ink, font, "mm")
    img = img.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC, fillcolor=paper)
    img = img.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.2))).resize((32, 32))
    return np.clip(np.asarray(img) + rng.normal(0, 6, (32, 32, 3)), 0, 255).astype(np.uint8)


def signs(rng, texts, n):
    images = [drawn(rng, text) for text in texts for _ in range(n)]
    return np.stack(images), np.repeat(np.arange(len(texts)), n)


def some(rng, data, classes, n):
    "`n` test images each of so many classes, drawn anew; the shipped model has seen those of train."
    of = rng.choice(len(data.vocab), classes, replace=False)
    rows = [rng.choice(data.test[data.labels[data.test] == c], n, replace=False) for c in of]
    return data.images[np.concatenate(rows)], np.repeat(np.arange(classes), n)


def main(draws=5):
    photos, digits = (load_data(TrainConfig(dataset=name)) for name in ("cifar100", "digits"))
    kinds = {name: lambda rng, kind=kind: signs(rng, *kind) for name, kind in KINDS.items()}
    kinds["digits by hand, 30 each"] = lambda rng: some(rng, digits, 10, 30)
    for classes, n in (2, 25), (2, 100), (4, 20), (10, 50), (50, 10):
        name = f"{classes} classes of CIFAR-100, {n} each"
        kinds[name] = lambda rng, classes=classes, n=n: some(rng, photos, classes, n)
    print("| images | fewer recognised as mirror images, % | standard deviations |\n|---|---|---|")
    for name, make in kinds.items():
        shares, sds = [], []
        for seed in range(int(draws)):
            images, labels = make(np.random.default_rng(seed))
            data = SimpleNamespace(images=images, labels=labels, train=np.arange(len(labels)))
            stats = [f(images.reshape(-1, 3) / 255, axis=0).astype(np.float32) for f in (np.mean, np.std)]
            n, lost, won = count_mirrored(data, stats, torch.device("cpu"))
            shares.append(100 * (lost - won) / n)
            sds.append((lost - won) / math.sqrt(max(lost + won, 1)))
        print(f"| {name} | {min(shares):.0f} to {max(shares):.0f} | {min(sds):.1f} to {max(sds):.1f} |")


if __name__ == "__main__": main(*sys.argv[1:])
