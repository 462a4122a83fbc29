"""The official CIFAR archives: read, and checked, as their pickles may hold anything."""
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UserError
from .download import CIFAR10, CIFAR100, Archive, fetch


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


class ArraysOnly(pickle.Unpickler):
    "Reads the batch files, pickles by Python 2: plain objects and NumPy arrays, no other global."
    allowed = {("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}

    def find_class(self, module, name):
        if (module, name) not in self.allowed: raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file does")
        return np._core.multiarray._reconstruct if name == "_reconstruct" else getattr(np, name)      # type: ignore[attr-defined]


def read_pickle(path):
    "The dictionary in a batch file; byte strings stay bytes. Errors: UserError."
    try:
        with open(path, "rb") as f: d = ArraysOnly(f, encoding="bytes").load()
    except FileNotFoundError as e: raise UserError(f"{path} is missing: delete {Path(path).parent} and run again.") from e
    except PermissionError: raise
    except Exception as e: raise UserError(f"{path} cannot be read ({e}): delete {Path(path).parent} and run again.") from e
    if not isinstance(d, dict): raise UserError(f"{path} is no CIFAR batch: it holds a {type(d).__name__}, not a dictionary.")
    return d


def read_batches(cifar, folder, names, n, key):
    "The images (n,32,32,3) and the lists of labels under `key`, and of superclasses, of the batch files `names`, checked."
    images, labels, coarse = [], [], []
    for name in names:
        d, path = read_pickle(folder / name), folder / name
        x, y, m = d.get(b"data"), d.get(key), n // len(names)
        if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.shape != (m, 3072):
            raise UserError(f"{path}: its images should be uint8 of shape ({m}, 3072), but are {getattr(x, 'dtype', type(x).__name__)} {getattr(x, 'shape', '')}.")
        check_labels(path, y, m, cifar.classes)
        if cifar.classes == 100: check_labels(path, d.get(b"coarse_labels"), m, 20)
        images.append(x)
        labels += y
        coarse += d.get(b"coarse_labels", [])
    counts = np.bincount(labels, minlength=cifar.classes)
    if (counts != n // cifar.classes).any():
        c = int(np.argmax(counts != n // cifar.classes))
        raise UserError(f"{folder / names[0]}: class {c} has {counts[c]} images, but should have {n // cifar.classes}.")
    return np.concatenate(images).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels, coarse


def check_labels(path, y, n, classes):
    if not isinstance(y, list) or len(y) != n: raise UserError(f"{path}: it should hold a list of {n} labels, but holds {len(y) if isinstance(y, list) else type(y).__name__}.")
    bad = next((o for o in y if type(o) is not int or not 0 <= o < classes), None)
    if bad is not None: raise UserError(f"{path}: label {bad!r} is out of range (0 to {classes - 1}).")


def class_names(path, key, n):
    "The `n` names under `key` in the file of the class names."
    names = read_pickle(path).get(key)
    if not isinstance(names, list) or len(names) != n or not all(isinstance(o, bytes) for o in names):
        raise UserError(f"{path}: it should hold {n} class names under {key.decode()!r}.")
    return [o.decode(errors="replace") for o in names]


def read_cifar(cifar, data):
    "Images, labels, split and class names of CIFAR-10 or CIFAR-100, and for the latter its superclasses."
    folder = fetch(cifar.archive, data)
    x, y, coarse = read_batches(cifar, folder, cifar.train, cifar.n_train, cifar.label)
    x_test, y_test, _ = read_batches(cifar, folder, cifar.test, cifar.n_test, cifar.label)
    key = b"fine_label_names" if cifar.classes == 100 else b"label_names"
    vocab, extra = class_names(folder / cifar.names, key, cifar.classes), {}
    if cifar.classes == 100:
        of_class = dict(sorted(set(zip(y, coarse))))
        if len(set(zip(y, coarse))) != 100: raise UserError(f"{folder / 'train'}: a class has more than one superclass in coarse_labels.")
        names = class_names(folder / cifar.names, b"coarse_label_names", 20)
        extra["superclasses"] = [names[of_class[c]] for c in range(100)]
    images = np.ascontiguousarray(np.concatenate([x, x_test]))         # the files hold channels first, one pixel after another is quicker
    return images, np.array(y + y_test), np.repeat(("train", "test"), (len(y), len(y_test))), vocab, extra
