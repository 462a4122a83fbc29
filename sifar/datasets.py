"""Which data sets there are: read and checked, as one array of images with labels, class names and splits."""
import functools
import hashlib
import io
import os
import pickle
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .config import TrainConfig, check_dataset
from .download import CIFAR10, CIFAR100, Archive, fetch
from .errors import UserError, one_line
from .files import write_file
from .terminal import log

SPLITS = "train", "valid", "test"


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
    mirrored: bool = True                   # whether a mirrored image is one of the same class

    def __deepcopy__(self, memo): return self       # nothing of it is ever changed

    @functools.cached_property
    def checksum(self): return zlib.crc32(np.ascontiguousarray(self.images).data)

    def stats(self):
        "Mean and standard deviation a channel of the training images, for pixels in 0 to 1: two lists of 3."
        counts = np.sum([[np.bincount(o[..., c].ravel(), minlength=256) for c in range(3)]
                         for o in np.array_split(self.images[self.train], 16)], axis=0)
        p, x = counts / counts[0].sum(), np.arange(256) / 255
        mean = p @ x
        return mean.tolist(), np.sqrt(np.maximum(p @ x**2 - mean**2, 1e-12)).tolist()


def load_data(cfg: TrainConfig):
    "The data set that `cfg` names, as ImageData. Errors: UserError for whatever is missing, damaged or out of range."
    check_dataset(cfg.dataset)
    if cfg.dataset == "digits": data = read_digits()
    elif cfg.dataset in CIFARS: data = read_cifar(CIFARS[cfg.dataset], cfg.data)
    else: data = read_folder(Path(cfg.dataset), cfg.sz, Path(cfg.data) / "cache")
    images, labels, split, vocab, extra = data
    train, valid, test = (np.flatnonzero(split == o) for o in SPLITS)
    if not len(valid): train, valid = stratified_split(train, labels, cfg.valid_pct, cfg.seed)
    return ImageData(images, labels, vocab, train, valid, test, **extra)


def stratified_split(rows, labels, pct, seed):
    "`rows` in two: all but about `pct` of each class, and that share (at least one image of each class of two or more)."
    if not pct: return rows, rows[:0]
    rng, held = np.random.default_rng(seed), []
    for c in np.unique(labels[rows]):
        of_class = rng.permutation(rows[labels[rows] == c])
        held.append(of_class[:min(max(1, round(pct * len(of_class))), len(of_class) - 1)])
    valid = np.sort(np.concatenate(held))
    return np.setdiff1d(rows, valid), valid


# ---- CIFAR ----

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


# ---- digits ----

def read_digits():
    "scikit-learn's 1,797 handwritten digits, 8x8 grey, as 32x32 RGB; a fixed stratified fifth of them is the test set."
    from sklearn.datasets import load_digits
    x, y = load_digits(return_X_y=True)
    grey = [Image.fromarray((o.reshape(8, 8) * 255 / 16).astype(np.uint8)) for o in x]
    images = np.stack([np.asarray(o.resize((32, 32), Image.Resampling.BILINEAR).convert("RGB")) for o in grey])
    test = stratified_split(np.arange(len(y)), y, 0.2, 0)[1]
    return images, y, np.where(np.isin(np.arange(len(y)), test), "test", "train"), [str(o) for o in range(10)], {"mirrored": False}


# ---- pictures of any kind ----

MAX_PIXELS, MAX_SIDE = 64_000_000, 16_384        # of a picture that is read; looked at before it is decoded


@functools.cache
def formats():
    "What Pillow can read, but for formats that it hands to another program, and those that hold a picture of another, whose size it does not say before it is decoded."
    Image.init()
    return [o for o in Image.ID if o not in ("EPS", "WMF", "ICO", "CUR", "ICNS", "BLP")]


def read_image(o, sz, min_side=1, max_pixels=MAX_PIXELS):
    """A path, the bytes of an image file, an array or a Pillow image, as a Pillow image of `sz` x `sz` pixels, RGB.

    Errors: UserError for what is no image, is damaged, too small or too large."""
    name = o if isinstance(o, (str, Path)) else "The image"
    warnings.filterwarnings("ignore", module=r"PIL\.")          # odd metadata, and sizes for which the rule below is stricter; catch_warnings is not for threads

    def fit(img):
        if min(img.size) < min_side: raise UserError(f"{name} has only {img.width} x {img.height} pixels.")
        if img.width * img.height > max_pixels or max(img.size) > MAX_SIDE:
            raise UserError(f"{name} is too large: {img.width:,} x {img.height:,} pixels, but at most {max_pixels // 10**6} million, and {MAX_SIDE:,} on a side, are read.")
        return fit_image(img, sz)

    try:
        if isinstance(o, Image.Image): return fit(o)
        if isinstance(o, np.ndarray): return fit(array_image(o))
        if not isinstance(o, (str, Path, bytes)): raise UserError(f"An image is a path, bytes, an array or a Pillow image, not a {type(o).__name__}.")
        with Image.open(io.BytesIO(o) if isinstance(o, bytes) else o, formats=formats()) as img: return fit(img)
    except UserError: raise
    except FileNotFoundError as e: raise UserError(f"{name} is missing.") from e
    except Image.DecompressionBombError as e: raise UserError(f"{name} is too large: at most {max_pixels // 10**6} million pixels are read.") from e
    except UnidentifiedImageError as e: raise UserError(f"{name} is not an image that can be read here, such as JPEG, PNG, WebP, GIF, BMP or TIFF.") from e
    except Exception as e: raise UserError(f"{name} cannot be read as an image: {one_line(e, 200)}") from e


def fit_image(img, sz):
    "Any Pillow image as `sz` x `sz` RGB: upright by EXIF, 16 bits scaled, alpha on white, resized, centre crop."
    img = ImageOps.exif_transpose(img)
    if img.mode.startswith(("I", "F")): img = array_image(np.asarray(img))
    if img.has_transparency_data:
        img = img.convert("RGBA")
        img = Image.alpha_composite(Image.new("RGBA", img.size, "white"), img)
    img = img.convert("RGB")
    return img if img.size == (sz, sz) else ImageOps.fit(img, (sz, sz), Image.Resampling.BICUBIC)


def array_image(x):
    """An array (h,w), (h,w,1), (h,w,3) or (h,w,4) as an 8-bit Pillow image.

    White is 255, for uint16 and for whole numbers above 255 it is 65,535, for floats with nothing above it 1. Errors: UserError."""
    if x.ndim == 3 and x.shape[2] == 1: x = x[..., 0]
    if x.ndim not in (2, 3) or x.ndim == 3 and x.shape[2] not in (3, 4) or not x.size or x.dtype.kind not in "buif":
        raise UserError(f"An array of shape {x.shape} and type {x.dtype} is no image: it should be (h,w), (h,w,3) or (h,w,4), of numbers.")
    if x.dtype == np.uint8: return Image.fromarray(np.ascontiguousarray(x))
    x, kind, deep = np.nan_to_num(x.astype(np.float32)), x.dtype.kind, x.dtype.kind == "u" and x.itemsize == 2
    top = 1 if kind == "b" or kind == "f" and x.max() <= 1 else 65_535 if deep or kind != "f" and x.max() > 255 else 255
    return Image.fromarray((x * (255 / top)).round().clip(0, 255).astype(np.uint8))


# ---- a folder of images ----

def read_folder(path, sz, cache):
    """Images, labels, split and class names of a folder with train/<class>/* and valid/ or test/, or class folders alone.

    Errors: UserError for one class, an empty class, a class that training lacks, more than 10 % unreadable files."""
    listed = list_folder(path)
    images, bad = read_images(path, [f for *_, f in listed], sz, cache)
    for i, why in list(bad.items())[:20]: log.warning("Skipped %s: %s", str(listed[i][2]).replace("\n", "\\n"), why)
    if len(bad) > 20: log.warning("Skipped %d more unreadable files", len(bad) - 20)
    if len(bad) > 0.1 * len(listed):
        raise UserError(f"{path}: {len(bad)} of {len(listed)} files cannot be read as images, more than 10 %: mend or remove them.")
    good = [o for i, o in enumerate(listed) if i not in bad]
    for split in {o for o, *_ in listed} - {o for o, *_ in good}: raise UserError(f"{path}: not one image of {split}/ can be read.")
    vocab = sorted({c for split, c, _ in listed if split in ("", "train")})
    for c in vocab:
        if not any(o[1] == c and o[0] in ("", "train") for o in good): raise UserError(f"{path}: class {c!r} has no readable training image.")
    index = {c: i for i, c in enumerate(vocab)}
    labels, split = np.array([index[c] for _, c, _ in good]), np.array([o for o, *_ in good])
    if split[0] == "":                              # class folders alone: a fixed stratified tenth is the test set
        test = stratified_split(np.arange(len(good)), labels, 0.1, 0)[1]
        split = np.where(np.isin(np.arange(len(good)), test), "test", "train")
    return images, labels, split, vocab, {}


def list_folder(path):
    "The files below `path`: a list of (split or '', class, file). Errors: UserError for wrong classes."
    names = {"train": "train", "training": "train", "valid": "valid", "val": "valid", "validation": "valid", "test": "test", "testing": "test"}
    parts = [(names[o.name.lower()], o) for o in folders(path) if o.name.lower() in names]
    splits = [o for o, _ in parts]
    if parts and (splits.count("train") != 1 or len(set(splits)) < len(splits)):
        raise UserError(f"{path} has {', '.join(o.name + '/' for _, o in parts)}: it needs one train/, and at most one each of valid/ and test/.")
    others = [f"{o.name}/" for o in folders(path) if o.name.lower() not in names]
    if parts and others: raise UserError(f"{path} has {', '.join(others)} beside {parts[0][1].name}/: only train/, valid/ and test/ are read there. Move what is no split away, or rename a class that is called {parts[0][1].name}.")
    listed = []
    for split, root in parts or [("", path)]:
        if parts and not folders(root): raise UserError(f"{root} has no class folders: its images belong into {root}{os.sep}<class>{os.sep}.")
        for c in folders(root):
            files = visible_files(c)
            if not files: raise UserError(f"{c} is an empty class, or may not be read: put images into it, or remove it.")
            listed += [(split, c.name, f) for f in files]
    vocab = {c for split, c, _ in listed if split in ("", "train")}
    if len(vocab) < 2:
        raise UserError(f"{path} has {len(vocab)} class{'' if len(vocab) == 1 else 'es'}, but training needs two or more: put images into train/<class>/, or into <class>/.")
    for split, c, f in listed:
        if c not in vocab: raise UserError(f"{f.parent}: class {c!r} of {split}/ is missing in train/.")
    return listed


NO_IMAGES = "Thumbs.db", "desktop.ini", "__MACOSX"            # what systems leave in folders


def visible_files(path):
    "The files in the folder `path` and below, but for hidden ones and what systems leave there."
    return sorted(o for o in path.rglob("*") if o.is_file() and o.name not in NO_IMAGES and not any(p.startswith(".") for p in o.relative_to(path).parts))


def folders(path):
    "The folders in `path`. Errors: UserError for a name that cannot be written down, and for a link to a folder around it."
    found = sorted(o for o in path.iterdir() if o.is_dir() and not o.name.startswith(".") and o.name not in NO_IMAGES)
    for o in found:
        if not o.name.isprintable(): raise UserError(f"{path} has a folder {o.name!r}, whose name cannot be shown: rename it.")
        if path.resolve().is_relative_to(o.resolve()): raise UserError(f"{o} is a link to a folder that it lies in: remove it.")
    return found


def read_images(path, files, sz, cache):
    """The readable ones of `files` at `sz` pixels (n,sz,sz,3) uint8, and of the others {position: reason}.

    Kept in a file below `cache` that is used as long as the list of files, their sizes, times and permissions stay the same."""
    key = hashlib.sha256(repr([(str(f), f.stat().st_size, f.stat().st_mtime_ns, f.stat().st_ctime_ns) for f in files]).encode()).hexdigest()
    kept = cache / f"{path.resolve().name}-{sz}-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}.npz"
    try:
        with np.load(kept) as z:
            if str(z["key"]) == key: return z["images"], dict(zip(z["bad"].tolist(), z["why"].tolist()))
    except Exception: pass                          # not there, or damaged: made anew
    try: images = np.empty((len(files), sz, sz, 3), np.uint8)
    except MemoryError as e: raise UserError(f"{path}: {len(files):,} images of --sz {sz} do not fit into the memory of this machine: try a smaller --sz.") from e
    bad = decode_all(files, images)
    if bad: images = np.delete(images, list(bad), axis=0)
    buffer = io.BytesIO()
    np.savez(buffer, images=images, bad=np.array(list(bad), int), why=np.array(list(bad.values()), str), key=key)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        write_file(kept, buffer.getbuffer())
    except OSError as e: log.warning("The images are not cached in %s: %s", kept, e.strerror)
    return images, bad


def decode_all(files, images):
    "Read each of `files` into its row of `images`, in parallel, with a progress bar; {position: reason} of those that cannot be read."
    from rich.progress import track

    def decode(f, row):
        try: row[:] = read_image(f, len(row))
        except UserError as e: return e.text.removeprefix(f"{f} ")
    with ThreadPoolExecutor() as pool:
        return {i: o for i, o in enumerate(track(pool.map(decode, files, images), "Reading images", len(files), transient=True)) if o}
