"""Augmented, normalised training images a second from one process: ours, stock fastai, torchvision.

    python -m bench.loader [--data DIR]         # CIFAR-100; SIFAR_DATA or data/ by default

All read the same array and augment alike. (torchvision has no Cutout of one fixed size: RandomErasing takes
its place.)"""
import argparse
import statistics
import time

from bench.race import race, ratio
from sifar import TrainConfig


def rate(dl, n):
    "Images/s of `dl`, in rounds of `n` images."
    while True:
        start, seen = time.perf_counter(), 0
        while seen < n:
            for x, _ in dl:
                seen += len(x)
                if seen >= n: break
        yield seen / (time.perf_counter() - start)


def ours(cfg, n):
    from sifar import get_dls
    yield from rate(get_dls(cfg).train, n)


def stock_fastai(cfg, n):
    "What the fastai documentation shows, on the same images: one Pillow image at a time."
    import numpy as np
    from fastai.vision.all import (
        CategoryBlock,
        DataBlock,
        ImageBlock,
        IndexSplitter,
        Normalize,
        PILImage,
        Transform,
    )

    from sifar.data.augment import get_tfms
    from sifar.data.datasets import load_data

    class Albumentations(Transform):
        split_idx = 0

        def __init__(self, tfms):
            super().__init__()
            self.tfms = tfms

        def encodes(self, img: PILImage):
            return PILImage.create(self.tfms(image=np.array(img))["image"])

    data = load_data(cfg)
    mean, std = data.stats()
    block = DataBlock(
        (ImageBlock, CategoryBlock(vocab=data.vocab, sort=False)),
        get_x=lambda i: data.images[i],
        get_y=lambda i: data.vocab[data.labels[i]],
        splitter=IndexSplitter([]),
        item_tfms=Albumentations(get_tfms()),
        batch_tfms=Normalize.from_stats(mean, std, cuda=False))
    dls = block.dataloaders(data.train.tolist(), bs=cfg.bs, num_workers=0, device="cpu")
    yield from rate(dls.train, n)


def torchvision_v2(cfg, n):
    "torchvision's v2 transforms on tensors, in torch's DataLoader."
    import torch
    from torch.utils.data import DataLoader, Dataset
    from torchvision.transforms import v2

    from sifar.data.datasets import load_data
    data = load_data(cfg)
    mean, std = data.stats()
    images = torch.from_numpy(data.images).permute(0, 3, 1, 2).contiguous()
    tfms = v2.Compose([
        v2.RandomCrop(32, padding=4),
        v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean, std),
        v2.RandomErasing(p=1, scale=(1 / 16, 1 / 16), ratio=(1, 1)),         # 8x8 of 32x32 pixels
    ])

    class Images(Dataset):
        def __len__(self): return len(data.train)

        def __getitem__(self, i):
            row = data.train[i]
            return tfms(images[row]), int(data.labels[row])

    yield from rate(DataLoader(Images(), cfg.bs, shuffle=True, drop_last=True), n)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=TrainConfig().data)
    cfg = TrainConfig(data=parser.parse_args().data)
    batch = TrainConfig(data=cfg.data, bs=512, augment="batch")
    figures = race({
        "sifar, items": (ours, (cfg, 20_000)),
        "sifar, batches": (ours, (batch, 100_000)),
        "stock fastai": (stock_fastai, (cfg, 3_000)),
        "torchvision v2": (torchvision_v2, (cfg, 5_000)),
    })
    for name, rates in figures.items():
        text = f"{name:15} {statistics.median(rates):8,.0f} images/s"
        if not name.startswith("sifar"):
            for way in ("items", "batches"):
                text += f"   {ratio(figures[f'sifar, {way}'], rates):5.1f} times as fast are {way}"
        print(text)


if __name__ == "__main__": main()
