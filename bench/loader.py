"""Augmented training images a second that one process feeds: our batches against stock fastai with the same albumentations.

    python -m bench.loader [--data DIR]         # CIFAR-100; SIFAR_DATA or data/ by default

Both read the same array, augment alike and normalise; they take turns, and the medians of 5 rounds count."""
import argparse
import statistics
import time

import numpy as np
from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, IndexSplitter, Normalize, PILImage, Transform

from sifar import TrainConfig, get_dls
from sifar.augment import standard_tfms


class Albumentations(Transform):
    "The usual way to use albumentations in fastai: one Pillow image at a time."
    split_idx = 0

    def __init__(self, tfms):
        super().__init__()
        self.tfms = tfms

    def encodes(self, img: PILImage): return PILImage.create(self.tfms(image=np.array(img))["image"])


def stock_dls(data, bs):
    "What the fastai documentation shows, on the same images."
    mean, std = data.stats()
    block = DataBlock((ImageBlock, CategoryBlock(vocab=data.vocab, sort=False)), get_x=lambda i: data.images[i], get_y=lambda i: data.vocab[data.labels[i]],
                      splitter=IndexSplitter([]), item_tfms=Albumentations(standard_tfms()), batch_tfms=Normalize.from_stats(mean, std, cuda=False))
    return block.dataloaders(data.train.tolist(), bs=bs, num_workers=0, device="cpu")


def images_per_second(dl, n):
    start, seen = time.perf_counter(), 0
    for x, _ in dl:
        seen += len(x)
        if seen >= n: break
    return seen / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=TrainConfig().data)
    cfg = TrainConfig(data=parser.parse_args().data)
    ours = get_dls(cfg)
    stock = stock_dls(ours.data, cfg.bs)
    rounds = [(images_per_second(ours.train, 20_000), images_per_second(stock.train, 2_000)) for _ in range(6)][1:]
    print(f"sifar {statistics.median(o for o, _ in rounds):,.0f} images/s, stock fastai {statistics.median(o for _, o in rounds):,.0f} images/s, "
          f"ratio {statistics.median(a / b for a, b in rounds):.1f}")


if __name__ == "__main__": main()
