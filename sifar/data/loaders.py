"""A data set as fastai DataLoaders: the DataBlock, and a fast path from an array to whole batches."""
import math
import os
import random
import signal
from dataclasses import replace
from multiprocessing import parent_process
from multiprocessing.context import get_spawning_popen
from multiprocessing.queues import Queue
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from threading import Thread

import fastai.vision.data  # noqa: F401    gives show_batch the display of images
import numpy as np
import torch
from fastai.data.all import (
    CategoryBlock,
    DataBlock,
    IntToFloatTensor,
    Normalize,
    TfmdDL,
    Transform,
    TransformBlock,
)
from fastai.torch_core import TensorCategory, TensorImage
from fastai.vision.core import PILImage
from fastcore.all import chunked, first
from PIL import Image
from torch.utils.data import get_worker_info

from ..distributed import part, rank, world
from .datasets import ImageData, load_data
from .image import read_image
from .splits import SPLITS


class ReadImage(Transform):
    "An item as a picture of `sz` pixels: a row of `data`, or any kind of image, made square by `fit`."
    # fastai's predict and test_dl take no other types than these
    input_types = int, np.integer, str, Path, np.ndarray, Image.Image

    def __init__(self, data, sz, fit):
        super().__init__()
        self.data, self.sz, self.fit = data, sz, fit

    def encodes(self, o):
        if isinstance(o, (int, np.integer)): o = self.data.images[o]
        return PILImage(read_image(o, self.sz, self.fit))


class ReadLabel(Transform):
    "The class name of a row of `data`."

    def __init__(self, data):
        super().__init__()
        self.data = data

    def encodes(self, o): return self.data.vocab[self.data.labels[o]]


class Augment(Transform):
    "Albumentations transforms on training images, or None."
    split_idx = 0

    def __init__(self, tfms):
        super().__init__()
        self.tfms = tfms

    def encodes(self, img: PILImage):
        if not self.tfms: return img
        return PILImage.create(self.tfms(image=np.array(img))["image"])


class BatchAugment(Transform):
    """The standard, light or weak augmentation of `augment.get_tfms` for a whole batch, where it is.

    The batch is x (n,c,h,w) uint8. generator: the random numbers come from it, on the CPU, so that every
    device sees the same images."""
    split_idx, order = 0, 5         # on training images, before IntToFloatTensor
    parameters = ("fill",)          # fastai sends it where the batches go

    def __init__(self, mirror, fill, hole=True, weak=False):
        super().__init__()
        self.mirror, self.hole, self.weak = mirror, hole, weak
        self.fill, self.generator = torch.tensor(fill, dtype=torch.uint8), None

    def encodes(self, x: TensorImage): return TensorImage(self.augment(x.as_subclass(torch.Tensor)))

    def augment(self, x):
        "x (n,c,h,w), moved, mirrored and with its hole: each pixel is looked up by its number in the image."
        n, c, h, w = x.shape
        far = 16 if self.weak else 8                    # it moves by up to h // far pixels
        top, left, mirrored, *hole = self.draw(n, h, w, far, x.device)
        y_at, x_at = torch.arange(h, device=x.device), torch.arange(w, device=x.device)
        # where each row and column comes from: (n,h) and (n,w)
        rows, cols = y_at + top - h // far, x_at + left - w // far
        if self.weak: rows, cols = reflect(rows, h), reflect(cols, w)
        if self.mirror: cols = torch.where(mirrored == 1, cols.flip(1), cols)
        seen = outer(within(rows, h), within(cols, w))                          # (n,h,w)
        if hole:
            y, x_hole = y_at - hole[0] + h // 8, x_at - hole[1] + w // 8        # seen from the hole's corner
            seen &= ~outer(within(y, h // 4), within(x_hole, w // 4))
        # pixel number h * w is the fill
        pixels = (rows[:, :, None] * w + cols[:, None, :]).masked_fill_(~seen, h * w).view(n, h * w, 1)
        x = torch.cat((x.permute(0, 2, 3, 1).reshape(n, h * w, c), self.fill.expand(n, 1, c)), 1)
        return x.gather(1, pixels.expand(-1, -1, c)).view(n, h, w, c).permute(0, 3, 1, 2)

    def draw(self, n, h, w, far, device):
        "Random numbers (n,1) of a batch: top, left, mirrored, and where there is a hole its centre."
        highs = [2 * (h // far) + 1, 2 * (w // far) + 1, 2]
        if self.hole: highs += [h, w]
        # for the images of all processes, of which these are a part: the run is the same for any number
        numbers = [torch.randint(high, (n * world(), 1), generator=self.generator) for high in highs]
        own = torch.stack(numbers)[:, rank() * n:(rank() + 1) * n]
        return send(own.contiguous(), device)           # one copy to the device

    def __deepcopy__(self, memo): return self           # torch cannot copy a generator


def by_value(storage):
    "How to pickle the memory of a tensor with all that is in it."
    content = torch.empty(0, dtype=torch.uint8).set_(storage)
    return from_value, (content.numpy(),)


def from_value(content): return torch.from_numpy(content).untyped_storage()


def coins(rows):
    "0 or 1 for each of `rows`, always the same: a multiplicative hash."
    return (np.asarray(rows, np.uint32) * np.uint32(2654435761) >> 16 & 1).astype(np.int64)


def send(x, device):
    "`x` on `device`; neither side waits for the other if that is a GPU."
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def reflect(at, length): return (length - 1) - ((length - 1) - at.abs()).abs()
def within(at, length): return (at >= 0) & (at < length)
def outer(rows, cols): return rows[:, :, None] & cols[:, None, :]


def end_with(process):
    "End this process when that one has ended: of a training that was killed, nobody reads the next batch."
    process.join()
    os._exit(1)


class ArrayDL(TfmdDL):
    """A TfmdDL that reads, augments and collates the rows of an array a whole batch at a time.

    The random numbers of each 16 images follow from the epoch's seed and the first of their rows, so they do
    not depend on the number of workers. chances: of each row to be drawn, instead of each row once.
    alternate: each image is mirrored in every second epoch, half of them first; `passes` counts the epochs.
    https://arxiv.org/abs/2404.00498"""
    alternate, passes, chances = False, -1, None

    def __getstate__(self):
        state = dict(self.__dict__)
        # to a worker that is started anew: no tensor of a GPU may go there
        if get_spawning_popen(): state["after_batch"] = None
        return state

    def wif(self):
        "A worker leaves Ctrl-C to this process, ends when this one does, and sends batches through its pipe."
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # torch's way is shared memory, of which containers have little
        ForkingPickler.register(torch.UntypedStorage, by_value)
        # a batch that cannot be sent would be left out without a word: torch notices a worker that ends
        Queue._on_queue_feeder_error = staticmethod(lambda e, obj: os._exit(1))     # type: ignore
        Thread(target=end_with, args=(parent_process(),), daemon=True).start()

    def __iter__(self):
        seen = 0
        for batch in super().__iter__():
            seen += 1
            yield batch
        if seen != len(self): raise RuntimeError(f"DataLoader worker: {seen} of {len(self)} batches came")

    def before_iter(self):
        super().before_iter()
        self.passes += 1
        self.epoch_seed = self.rng.getrandbits(31)
        for tfm in self.after_batch.fs:
            if isinstance(tfm, BatchAugment): tfm.generator = torch.Generator().manual_seed(self.epoch_seed)

    def shuffle_fn(self, idxs):
        if self.chances: return self.rng.choices(idxs, self.chances, k=len(idxs))
        return super().shuffle_fn(idxs)

    def create_batches(self, samps):
        rows = isinstance(first(self.dataset.items), (int, np.integer))
        if not rows or not self.augments(): return (yield from super().create_batches(samps))
        for idxs in chunked(samps, self.bs, self.drop_last):
            # of a training batch, each process has its part; of valid and test, it has no other items
            if self.dataset.split_idx == 0: idxs = part(idxs)
            yield self.read([self.dataset.items[i] for i in idxs])

    def read(self, rows):
        """The batch of `rows`: x (n,3,sz,sz) uint8, channels last, and y (n,) where there are labels.

        It is on the device, unless a worker makes it."""
        data = self.dataset.tls[0].tfms[0].data
        x = data.images[rows]                                   # (n,sz,sz,3), a copy
        if self.dataset.split_idx == 0:
            if self.alternate: self.mirror(x, rows)
            self.augment(x, rows)
        device = self.device if self.device and not get_worker_info() else torch.device("cpu")
        xb = TensorImage(send(torch.from_numpy(x), device).permute(0, 3, 1, 2))
        if len(self.dataset.tls) == 1: return (xb,)
        return xb, TensorCategory(send(torch.from_numpy(data.labels[rows]), device))

    def mirror(self, x, rows):
        "Mirror in place those of the images x (n,sz,sz,3) whose turn it is in this epoch."
        turned = coins(rows) ^ (self.passes & 1) == 1
        pixels = x.view("V3")[..., 0]           # 3 bytes each, which numpy moves faster than one by one
        pixels[turned] = pixels[turned, :, ::-1]

    def augments(self):
        "The Augment among the item transforms; none where somebody has put others in their place."
        return first(tfm for tfm in self.after_item.fs if isinstance(tfm, Augment))

    def augment(self, x, rows):
        "Augment the images x (n,sz,sz,3) in place, unless that is done to the whole batch."
        tfms = self.augments().tfms
        if not tfms: return
        from .augment import seed_tfms  # takes 2 s, and who loads a learner does not need it
        for i, image in enumerate(x):
            # by 16 images, so that it makes no difference how many processes share a batch
            if i % 16 == 0: seed_tfms(tfms, self.epoch_seed << 32 | int(rows[i]))
            x[i] = tfms(image=image)["image"]


def normalized(x, stats):
    "Images x (n,h,w,3) uint8 as a model gets them, by the mean and deviation in `stats`: (n,3,h,w)."
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in stats)
    return (x.permute(0, 3, 1, 2) / 255 - mean) / std


def get_dls(cfg):
    """DataLoaders with `train`, `valid` and, as `dls[2]`, the test set.

    `dls.data` is the ImageData behind them, `dls.stats` its mean and deviation."""
    data = load_data(cfg)
    cfg = settled(cfg, data)
    if cfg.dry_run: data = replace(data, **{split: getattr(data, split)[:cfg.bs] for split in SPLITS})
    return make_dls(cfg, data, data.stats())


def settled(cfg, data):
    """`cfg` with a batch size where it says auto, which follows from the training images of `data`.

    It is a power of two from 8 to 128, and where there are images enough an epoch has 20 batches."""
    if cfg.bs != "auto": return cfg
    return replace(cfg, bs=min(128, max(8, 2 ** int(math.log2(max(len(data.train), 20) / 20)))))


def stand_in_dls(cfg, about):
    "The DataLoaders of a run without its data set, which `about` describes: noise stands for 64 test images."
    images = np.random.default_rng(0).integers(0, 256, (64, cfg.sz, cfg.sz, 3), dtype=np.uint8)
    rows = np.arange(len(images))
    labels = np.zeros(len(images), np.int64)
    data = ImageData(images, labels, about["vocab"], rows, rows[:0], rows, about["superclasses"])
    return make_dls(cfg, data, about["stats"])


def empty_dls(sz, vocab, superclasses, stats, fit):
    "DataLoaders for prediction alone, without images; all else of them is as `get_dls` makes it."
    rows = np.arange(1)
    data = ImageData(np.zeros((1, sz, sz, 3), np.uint8), rows, vocab, rows, rows[:0], rows[:0], superclasses)
    block = get_block(data, sz, stats, fit)
    dls = block.dataloaders(rows.tolist(), bs=64, num_workers=0, device="cpu").new_empty()
    dls.data, dls.stats = replace(data, images=data.images[:0], labels=rows[:0], train=rows[:0]), stats
    return dls


def get_block(data, sz, stats, fit="halfway", item_tfms=None, batch_tfms=()):
    """The DataBlock of `data` as images of `sz` pixels, by row number; `fit` makes other pictures square.

    item_tfms: albumentations' transforms, batch_tfms: fastai's; both are of the training alone."""
    n = len(data.train)
    return DataBlock(
        blocks=(TransformBlock(batch_tfms=IntToFloatTensor), CategoryBlock(vocab=data.vocab, sort=False)),
        get_x=ReadImage(data, sz, fit), get_y=ReadLabel(data),
        splitter=lambda rows: (list(range(n)), list(range(n, len(rows)))),
        item_tfms=Augment(item_tfms),
        batch_tfms=[Normalize.from_stats(*stats, cuda=False), *batch_tfms],
        dl_type=ArrayDL)


def make_dls(cfg, data, stats):
    # holes and borders have the mean colour, which is zero once normalised
    fill = [round(255 * mean) for mean in stats[0]]
    mirrored = data.mirrored if cfg.mirror == "auto" else cfg.mirror == "on"
    weak = cfg.aug == "weak"                            # whose images are mirrored as they are read
    whole = BatchAugment(mirrored and not weak, fill, hole=cfg.aug == "standard", weak=weak)
    batch_tfms = [whole] if cfg.augment == "batch" else []
    block = get_block(data, cfg.sz, stats, cfg.fit, item_tfms(cfg, mirrored, fill), batch_tfms)
    rows = [*data.train.tolist(), *part(data.valid.tolist())]
    bs = even_batches(len(data.train), settled(cfg, data).bs)
    shares = 2 * world() if cfg.mixup or cfg.cutmix else world()            # timm mixes pairs
    bs = max(bs - bs % shares, shares)
    dls = block.dataloaders(rows, bs=bs, num_workers=cfg.workers, device="cpu")
    dls.loaders.append(dls.test_dl(part(data.test.tolist()), with_labels=True, rm_type_tfms=0))
    dls.train.alternate = mirrored and weak
    dls.train.rng, dls.data, dls.stats = random.Random(cfg.seed), data, stats
    if cfg.balance == "sampler": dls.train.chances = data.class_weights()[data.labels[data.train]].tolist()
    return dls


def even_batches(n, bs):
    """The batch size, at most `bs`, for `n` training images. What fills no batch is left out of an epoch.

    Where that would be more than a twentieth, as in small sets, batches are smaller, so that few are left."""
    bs = min(bs, n)
    if n % bs <= n / 20: return bs
    return max(n // math.ceil(n / bs), 2)


def item_tfms(cfg, mirror, fill):
    "The albumentations transforms of a run; None where batches are augmented as a whole."
    if cfg.augment == "batch": return None
    from .augment import get_tfms
    return get_tfms(cfg.aug, cfg.sz, mirror, fill)
