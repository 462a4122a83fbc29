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
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file does")
        # NumPy has moved it since those files were made
        if name == "_reconstruct": return np._core.multiarray._reconstruct      # type: ignore[attr-defined]
        return getattr(np, name)


def read_pickle(path):
    "The dictionary in a batch file; byte strings stay bytes. Errors: UserError."
    again = f"delete {Path(path).parent} and run again"
    try:
        with open(path, "rb") as f: d = ArraysOnly(f, encoding="bytes").load()
    except FileNotFoundError as e:
        raise UserError(f"{path} is missing: {again}.") from e
    except PermissionError: raise
    # a damaged pickle calls NumPy's functions with anything, which then raise anything
    except Exception as e:
        raise UserError(f"{path} cannot be read ({e}): {again}.") from e
    if not isinstance(d, dict):
        raise UserError(f"{path} is no CIFAR batch: it holds a {type(d).__name__}, not a dictionary.")
    return d


def read_batches(cifar, folder, names, n, key):
    "The images (n,32,32,3), labels (under `key`) and superclasses in the batch files `names`, checked."
    images, labels, coarse = [], [], []
    m = n // len(names)                 # images of a file
    for name in names:
        d, path = read_pickle(folder / name), folder / name
        x, y = d.get(b"data"), d.get(key)
        check_images(path, x, m)
        check_labels(path, y, m, cifar.classes)
        if cifar.classes == 100: check_labels(path, d.get(b"coarse_labels"), m, 20)
        images.append(x)
        labels += y
        coarse += d.get(b"coarse_labels", [])
    counts = np.bincount(labels, minlength=cifar.classes)
    if (counts != n // cifar.classes).any():
        c, each = int(np.argmax(counts != n // cifar.classes)), n // cifar.classes
        raise UserError(f"{folder / names[0]}: class {c} has {counts[c]} images, but should have {each}.")
    # a row of a file has all of red, then green, then blue: (n,3072) -> (n,32,32,3)
    return np.concatenate(images).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels, coarse


def check_images(path, x, n):
    if isinstance(x, np.ndarray) and x.dtype == np.uint8 and x.shape == (n, 3072): return
    found = f"{getattr(x, 'dtype', type(x).__name__)} {getattr(x, 'shape', '')}"
    raise UserError(f"{path}: its images should be uint8 of shape ({n}, 3072), but are {found}.")


def check_labels(path, y, n, classes):
    if not isinstance(y, list) or len(y) != n:
        found = len(y) if isinstance(y, list) else type(y).__name__
        raise UserError(f"{path}: it should hold a list of {n} labels, but holds {found}.")
    for label in y:
        # not isinstance: True is an int, too
        if type(label) is int and 0 <= label < classes: continue
        raise UserError(f"{path}: label {label!r} is out of range (0 to {classes - 1}).")


def class_names(path, key, n):
    "The `n` names under `key` in the file of the class names."
    names = read_pickle(path).get(key)
    if not isinstance(names, list) or len(names) != n or not all(isinstance(name, bytes) for name in names):
        raise UserError(f"{path}: it should hold {n} class names under {key.decode()!r}.")
    return [name.decode(errors="replace") for name in names]


def read_cifar(cifar, data):
    "Images, labels, split and class names of CIFAR-10 or CIFAR-100, and for the latter its superclasses."
    folder = fetch(cifar.archive, data)
    x, y, coarse = read_batches(cifar, folder, cifar.train, cifar.n_train, cifar.label)
    x_test, y_test, _ = read_batches(cifar, folder, cifar.test, cifar.n_test, cifar.label)
    key = b"fine_label_names" if cifar.classes == 100 else b"label_names"
    vocab, extra = class_names(folder / cifar.names, key, cifar.classes), {}
    if cifar.classes == 100:
        pairs = set(zip(y, coarse))
        if len(pairs) != 100:
            raise UserError(f"{folder / 'train'}: a class has more than one superclass in coarse_labels.")
        of_class = dict(pairs)
        names = class_names(folder / cifar.names, b"coarse_label_names", 20)
        extra["superclasses"] = [names[of_class[c]] for c in range(100)]
    # one pixel after another, where the files have channels first: batches are gathered faster
    images = np.ascontiguousarray(np.concatenate([x, x_test]))
    split = np.repeat(("train", "test"), (len(y), len(y_test)))
    return images, np.array(y + y_test), split, vocab, extra
