"""Which data sets there are, as one array of images with labels, class names and splits."""
import functools
import zlib
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image

from ..config import TrainConfig, check_dataset, is_own
from ..distributed import machine_first
from ..log import log
from .cifar import CIFARS, read_cifar
from .fixes import apply_fixes
from .folder import read_folder
from .splits import SPLITS, stratified_split


@dataclass(frozen=True)
class ImageData:
    "A data set in memory; `train`, `valid` and `test` are row numbers into `images` and `labels`."
    images: np.ndarray                      # (n, sz, sz, 3) uint8
    labels: np.ndarray                      # (n,) int64, indices into vocab
    vocab: list                             # class names
    train: np.ndarray
    valid: np.ndarray                       # what choices are made on; may be empty
    test: np.ndarray                        # evaluated once, at the end; may be empty
    superclasses: list | None = None        # for each class the name of its superclass
    files: list | None = None               # for each image its path in a folder of pictures
    mirrored: bool = True                   # whether a mirrored image is one of the same class
    names: list = field(default_factory=list)           # its path, or where there is none train/0
    unreadable: dict = field(default_factory=dict)      # why by the path of the file
    side: int = 0                           # the shorter one of half of the pictures in a folder, or more
    fixes: dict = field(default_factory=dict)           # what a table of fixes has changed

    def __deepcopy__(self, memo): return self       # nothing of it is ever changed

    @functools.cached_property
    def checksum(self): return zlib.crc32(np.ascontiguousarray(self.images).data)

    def counts(self, split):
        "The number of images of each class in train, valid or test."
        return np.bincount(self.labels[getattr(self, split)], minlength=len(self.vocab))

    def class_weights(self):
        "A weight for each class, so that all count alike in training; an image has 1 on average. float32."
        n = self.counts("train")
        return (n.sum() / (len(self.vocab) * np.maximum(n, 1))).astype(np.float32)

    def stats(self):
        "Mean and standard deviation a channel of the training images, for pixels in 0 to 1: two lists of 3."
        # counts (3,256) of each value, some images at a time: exact, and in little memory
        counts = np.zeros((3, 256), np.int64)
        for rows in np.array_split(self.train, 1 + len(self.train) // 1000):
            images = self.images[rows]
            counts += [np.bincount(images[..., c].ravel(), minlength=256) for c in range(3)]
        p, x = counts / counts[0].sum(), np.arange(256) / 255
        mean = p @ x
        return mean.tolist(), np.sqrt(np.maximum(p @ x**2 - mean**2, 1e-12)).tolist()


def load_data(cfg: TrainConfig):
    "The data set that `cfg` names, as ImageData. Errors: UserError for what is missing or damaged."
    check_dataset(cfg.dataset)
    with machine_first(): images, labels, split, vocab, extra = read_data(cfg)
    train, valid, test = (np.flatnonzero(split == o) for o in SPLITS)
    if not len(valid): train, valid = stratified_split(train, labels, cfg.valid_pct, cfg.seed)
    names = extra.get("files") or numbered(split)
    if cfg.mirror != "auto": extra = {**extra, "mirrored": cfg.mirror == "on"}
    data = ImageData(images, labels, vocab, train, valid, test, names=names, **extra)
    if cfg.fixes: data = apply_fixes(data, cfg.fixes)
    if is_own(cfg.dataset): say_classes(data)
    return data


def read_data(cfg):
    "Images, labels, splits, class names and further facts of the data set that `cfg` names."
    if cfg.dataset == "digits": return read_digits()
    if cfg.dataset in CIFARS: return read_cifar(CIFARS[cfg.dataset], cfg.data)
    table = Path(cfg.labels) if cfg.labels else None
    return read_folder(Path(cfg.dataset), cfg.sz, Path(cfg.data) / "cache", table, cfg.fit)


def numbered(split):
    "Names for images without files, by their split (n,): train/0, train/1, ..., test/0, ..."
    numbers = {name: count() for name in SPLITS}
    return [f"{name}/{next(numbers[name])}" for name in split.tolist()]


def say_classes(data, most=10):
    "Log the classes of a folder, how many pictures they have, and which have none to choose or to test on."
    names = data.vocab if len(data.vocab) <= most else [*data.vocab[:5], "...", *data.vocab[-3:]]
    counts = {split: data.counts(split) for split in SPLITS}
    few, many = (data.vocab[c] for c in (counts["train"].argmin(), counts["train"].argmax()))
    least, most_of = counts["train"].min(), counts["train"].max()
    of_class = f"{least} ({few}) to {most_of} ({many})" if least < most_of else f"{least} in each"
    log.info("%d classes: %s", len(data.vocab), ", ".join(names))
    log.info("%s; training images of a class: %s",
             ", ".join(f"{n.sum():,} {split}" for split, n in counts.items()), of_class)
    for split in ("valid", "test"):
        without = [c for c, n in zip(data.vocab, counts[split]) if not n]
        if not without or not counts[split].any(): continue
        more = ", ..." if len(without) > most else ""
        log.warning("No %s image of: %s%s", split, ", ".join(without[:most]), more)


def unknown_images(dataset):
    "A name, and small images (n,32,32,3) of things that `dataset` does not have: digits, or for those tiles."
    if dataset != "digits": return "digits", read_digits()[0][:360]
    from sklearn.datasets import load_sample_images
    photos = np.stack(load_sample_images().images)[:, :416]                 # (2,416,640,3)
    tiles = photos.reshape(2, 13, 32, 20, 32, 3).swapaxes(2, 3)             # (2,13,20,32,32,3)
    return "tiles of photographs", tiles.reshape(-1, 32, 32, 3)[::2]


def read_digits():
    "scikit-learn's 1,797 handwritten digits, 8x8 grey, as 32x32 RGB; a fixed stratified fifth is test."
    images, y = enlarged_digits()
    rows = np.arange(len(y))
    test = stratified_split(rows, y, 0.2, 0)[1]
    split = np.where(np.isin(rows, test), "test", "train")
    return images, y, split, list("0123456789"), {"mirrored": False, "side": 8}


@functools.cache                # for the runs of several seeds
def enlarged_digits():
    "The images (n,32,32,3) uint8 and labels (n,) of the digits."
    from sklearn.datasets import load_digits
    x, y = load_digits(return_X_y=True)
    def enlarge(grey):
        img = Image.fromarray((grey.reshape(8, 8) * 255 / 16).astype(np.uint8))     # they are from 0 to 16
        return np.asarray(img.resize((32, 32), Image.Resampling.BILINEAR).convert("RGB"))
    return np.stack([enlarge(grey) for grey in x]), y
