"""The official CIFAR archives: read, and checked, as their pickles may hold anything."""
import io
import pickle
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UserError, one_line
from ..files import read_file
from .download import CIFAR10, CIFAR100, Archive, fetch

MAX_BATCH = 2**28                       # bytes; the largest, CIFAR-100's train, has 155 million


@dataclass(frozen=True)
class Cifar:
    "How the files of a CIFAR archive are laid out."
    archive: Archive
    train: tuple            # batch files
    test: tuple
    names: str              # file of the class names
    label: bytes            # key of the labels in a batch file
    classes: int
    n_train: int = 50_000
    n_test: int = 10_000


CIFARS = {
    "cifar100": Cifar(CIFAR100, ("train",), ("test",), "meta", b"fine_labels", 100),
    "cifar10": Cifar(CIFAR10, CIFAR10.files[:5], ("test_batch",), "batches.meta", b"labels", 10),
}


class Part:
    """What stands for NumPy's arrays and dtypes while a batch file is read.

    A pickle calls numpy._reconstruct or dtype, then __setstate__. NumPy's own trust the state that
    they get: a damaged one can end the process. This one keeps it, and `to_array` looks at it."""

    def __init__(self, *args): self.args = args
    def __setstate__(self, state): self.state = state

    def to_array(self):
        "The array that is meant. Errors: ValueError, TypeError, LookupError, AttributeError."
        _, shape, dtype, fortran, content = self.state
        name = dtype.args[0]
        name = name.decode() if isinstance(name, bytes) else name
        # Python 2 writes such as (b"u1", 0, 1). The byte order is in the dtype's state: one byte
        # has none, and no other array passes the check.
        if not re.fullmatch("[biuf][1248]", name): raise ValueError(f"an array of {name!r}")
        return np.frombuffer(content, name).reshape(shape, order="F" if fortran else "C")


# opcodes of numbers of any length, of which a million may have one hash: a dictionary of them takes hours
LONG_NUMBERS = *pickle.LONG, *pickle.LONG1, *pickle.LONG4


class Pieces(io.BytesIO):
    """A pickle's bytes, in as many pieces as are plausible: an opcode and its argument take one each.

    A list takes one byte of a pickle and 64 of memory. An image takes 3,072 bytes and some 8 pieces."""

    def __init__(self, content):
        super().__init__(content)
        self.left = 2000 + len(content) // 150

    def read(self, n=-1):
        self.left -= 1
        if self.left < 0: raise pickle.UnpicklingError("it holds far more than images and labels")
        return super().read(n)

    def readline(self, n=-1):
        line = super().readline(n)
        if len(line) > 12 and line.strip(b"-\n").isdigit():
            raise pickle.UnpicklingError("a number is too long")
        return line


# Python's own unpickler: the one in C makes room for as many objects as a pickle claims to hold
class ArraysOnly(pickle._Unpickler):
    "Reads the batch files, pickles by Python 2: plain objects and NumPy arrays, no other global."
    allowed = {("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}
    dispatch = {k: v for k, v in pickle._Unpickler.dispatch.items() if k not in LONG_NUMBERS}

    def find_class(self, module, name):
        if (module, name) in self.allowed: return Part
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file does")


# What the unpickler and Part raise for damaged files; no other code of ours runs where it is caught.
DAMAGE = (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError,
          OverflowError, MemoryError, RecursionError, ImportError, struct.error)


def read_pickle(path):
    "The dictionary in a batch file; byte strings stay bytes. Errors: UserError."
    again = f"delete {Path(path).parent} and run again."
    try: content = read_file(path, MAX_BATCH)
    except FileNotFoundError as e: raise UserError(f"{path} is missing: {again}") from e
    try:
        d = ArraysOnly(Pieces(content), encoding="bytes").load()
        part = d.get(b"data") if isinstance(d, dict) else None
        if isinstance(part, Part): d[b"data"] = part.to_array()
    except DAMAGE as e:
        raise UserError(f"{path} cannot be read ({one_line(e, 200)}): {again}") from e
    if not isinstance(d, dict):
        raise UserError(f"{path} is no CIFAR batch: it holds a {type(d).__name__}, not a dictionary.")
    return d


def read_batches(cifar, folder, names, n, key):
    """The images (n,32,32,3) of the batch files `names`, checked, with their labels and superclasses.

    Two lists of n, the labels under `key` in the files; no superclasses in CIFAR-10. Errors: UserError."""
    images, labels, coarse = [], [], []
    for name in names:
        path, m = folder / name, n // len(names)
        d = read_pickle(path)
        check_images(path, d.get(b"data"), m)
        check_labels(path, d.get(key), m, cifar.classes)
        if cifar.classes == 100: check_labels(path, d.get(b"coarse_labels"), m, 20)
        images.append(d[b"data"])
        labels += d[key]
        coarse += d.get(b"coarse_labels", [])
    counts, each = np.bincount(labels, minlength=cifar.classes), n // cifar.classes
    if (counts != each).any():
        c = int(np.argmax(counts != each))
        raise UserError(f"{folder / names[0]}: class {c} has {counts[c]} images, "
                        f"but should have {each}.")
    # A row of 3072 is a picture (c,h,w): all red pixels, then the green, then the blue.
    x = np.concatenate(images).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)         # (n,h,w,c)
    return x, labels, coarse


def check_images(path, x, n):
    "Raise a UserError unless x are the pixels of `n` images."
    if isinstance(x, np.ndarray) and x.dtype == np.uint8 and x.shape == (n, 3072): return
    found = f"{x.dtype} {x.shape}" if isinstance(x, np.ndarray) else type(x).__name__
    raise UserError(f"{path}: its images should be uint8 of shape ({n}, 3072), but are {found}.")


def check_labels(path, y, n, classes):
    "Raise a UserError unless y are `n` labels of so many classes."
    if not isinstance(y, list) or len(y) != n:
        found = len(y) if isinstance(y, list) else type(y).__name__
        raise UserError(f"{path}: it should hold a list of {n} labels, but holds {found}.")
    for label in y:
        if type(label) is not int or not 0 <= label < classes:  # True is an int, but no label
            raise UserError(f"{path}: label {label!r} is out of range (0 to {classes - 1}).")


def class_names(path, key, n):
    "The `n` names under `key` in the file of the class names."
    names = read_pickle(path).get(key)
    if not isinstance(names, list) or list(map(type, names)) != n * [bytes]:
        raise UserError(f"{path}: it should hold {n} class names under {key.decode()!r}.")
    return [name.decode(errors="replace") for name in names]


def read_cifar(cifar, data):
    "Images, labels, split and class names of CIFAR-10 or CIFAR-100; for the latter superclasses too."
    folder = fetch(cifar.archive, data)
    x, y, coarse = read_batches(cifar, folder, cifar.train, cifar.n_train, cifar.label)
    x_test, y_test, _ = read_batches(cifar, folder, cifar.test, cifar.n_test, cifar.label)
    key = b"fine_label_names" if cifar.classes == 100 else b"label_names"
    vocab = class_names(folder / cifar.names, key, cifar.classes)
    extra = {"superclasses": superclasses(cifar, folder, y, coarse)} if cifar.classes == 100 else {}
    # a copy in the order (n,h,w,c): one pixel after another is quicker to augment
    images = np.ascontiguousarray(np.concatenate([x, x_test]))
    split = np.repeat(("train", "test"), (len(y), len(y_test)))
    return images, np.array(y + y_test), split, vocab, extra


def superclasses(cifar, folder, y, coarse):
    "For each class of CIFAR-100 the name of its superclass; no file says it, the labels do."
    pairs = set(zip(y, coarse))
    if len(pairs) != 100:
        raise UserError(f"{folder / 'train'}: a class has more than one superclass in coarse_labels.")
    of_class, names = dict(pairs), class_names(folder / cifar.names, b"coarse_label_names", 20)
    return [names[of_class[c]] for c in range(100)]
