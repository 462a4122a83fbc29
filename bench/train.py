"""Images a second of a Learner's fit against two plain PyTorch loops over the same model and batch size.

    python -m bench.train [--data DIR] [--bs 128] [--sizes 16]  # CIFAR-100; SIFAR_DATA or data/ by default

bare: images in memory, normalised, not augmented; precision and memory format as ours, and nothing else.
usual: what most repositories for CIFAR do: Pillow images, torchvision's transforms, DataLoader, float32."""
import argparse
import statistics
import time
from contextlib import nullcontext

import torch
from torch import nn

from bench.race import race, ratio
from sifar import TrainConfig


def ours(cfg, n):
    "Images/s of the standard recipe: augmentation, optimizer, callbacks, precision."
    from fastai.callback.training import ShortEpochCallback

    from sifar import get_dls, get_learner
    from sifar.training.callbacks import StopOnNaN
    learn = get_learner(get_dls(cfg), cfg)
    batches = n // cfg.bs
    with learn.no_bar(), learn.no_logging():
        while True:
            start = time.perf_counter()
            short = ShortEpochCallback((batches - 1) / len(learn.dls.train))        # it stops after the batch
            learn.fit_warmup_cosine(1, warmup=0, cbs=[StopOnNaN(), short])
            wait()
            yield batches * cfg.bs / (time.perf_counter() - start)


def wait():
    "For a GPU, which works on when the program does not."
    if torch.cuda.is_available(): torch.cuda.synchronize()


def bare(cfg, n, compile=lambda o: o):
    "Images/s of forward, loss, backward and step on batches that are in memory."
    from sifar.config import parse_sizes
    from sifar.training.models import get_model
    from sifar.training.precision import needs_autocast, pick_device, pick_precision
    device = pick_device(cfg.device)
    torch.backends.cudnn.benchmark = True               # as our Learner has it
    dtype = pick_precision(cfg.precision, device)
    sz = parse_sizes(cfg.sizes)[0] if cfg.sizes else cfg.sz
    x = torch.randn(n // cfg.bs, cfg.bs, 3, sz, sz, device=device)
    y = torch.randint(100, (n // cfg.bs, cfg.bs), device=device)
    batches = [(xb.contiguous(memory_format=torch.channels_last), yb) for xb, yb in zip(x, y)]
    model = compile(get_model(cfg.arch, 100).to(device, memory_format=torch.channels_last))

    def autocast(): return torch.autocast(device.type, dtype, enabled=needs_autocast(dtype))
    yield from fit(model, batches, cfg, autocast)


def usual(cfg, n):
    "Images/s of the same with torchvision's transforms on Pillow images, one after another, in float32."
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    from sifar.data.datasets import load_data
    from sifar.training.models import get_model
    from sifar.training.precision import pick_device
    device, data = pick_device(cfg.device), load_data(cfg)
    mean, std = data.stats()
    tfms = transforms.Compose([
        transforms.RandomCrop(32, padding=4),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(mean, std),
    ])

    class Images(Dataset):
        def __len__(self): return n

        def __getitem__(self, i):
            row = data.train[i]
            return tfms(Image.fromarray(data.images[row])), int(data.labels[row])

    batches = DataLoader(Images(), cfg.bs, shuffle=True, drop_last=True)
    yield from fit(get_model(cfg.arch, 100).to(device), batches, cfg, nullcontext)


def fit(model, batches, cfg, context):
    device = next(model.parameters()).device
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    loss_func = nn.CrossEntropyLoss(label_smoothing=0.1)
    while True:
        start = time.perf_counter()
        for x, y in batches:
            with context(): loss = loss_func(model(x.to(device)), y.to(device))
            loss.backward()
            opt.step()
            opt.zero_grad()
        wait()
        yield len(batches) * cfg.bs / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=TrainConfig().data)
    parser.add_argument("--bs", type=int, default=128)
    parser.add_argument("--sizes", help="side of the images while training; the usual loop stays at 32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=1280, help="images of each in a round")
    args = parser.parse_args()
    cfg = TrainConfig(dataset="cifar100", data=args.data, bs=args.bs, sizes=args.sizes, valid_pct=0.0)
    n = max(args.images, args.bs)
    racers = {"sifar": (ours, (cfg, n)), "bare": (bare, (cfg, n)), "usual": (usual, (cfg, n))}
    figures = race(racers, args.rounds)
    for name, rates in figures.items():
        times = ratio(figures["sifar"], rates)
        rate = statistics.median(rates)
        print(f"{name:6} {rate:7.0f} images/s   {times:.2f} times as fast is sifar")


if __name__ == "__main__": main()
