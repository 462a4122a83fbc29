"""A folder of one's own pictures as an array, read once and kept."""
import hashlib
import io
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..errors import UserError
from ..files import write_file
from ..log import log
from .image import GEOMETRY, read_image
from .splits import stratified_split


def read_folder(path, sz, cache):
    """Images, labels, split and class names of a folder of pictures.

    It has train/<class>/* and valid/ or test/ like it, or class folders alone. Errors: UserError for one
    class, an empty class, a class that training lacks, more than 10 % unreadable files."""
    listed = list_folder(path)
    images, bad = read_images(path, [file for *_, file in listed], sz, cache)
    say_skipped(listed, bad)
    if len(bad) > 0.1 * len(listed):
        share = f"{len(bad)} of {len(listed)} files cannot be read as images, more than 10 %"
        raise UserError(f"{path}: {share}: mend or remove them.")
    good = [entry for i, entry in enumerate(listed) if i not in bad]
    vocab = check_readable(path, listed, good)
    index = {c: i for i, c in enumerate(vocab)}
    labels = np.array([index[c] for _, c, _ in good])
    split = np.array([name for name, *_ in good])
    if split[0] == "":          # class folders alone: a fixed stratified tenth is the test set
        test = stratified_split(np.arange(len(good)), labels, 0.1, 0)[1]
        split = np.where(np.isin(np.arange(len(good)), test), "test", "train")
    return images, labels, split, vocab, {}


def say_skipped(listed, bad, most=20):
    "Log which files were skipped, and why; `bad` has the reasons by their position in `listed`."
    for i, why in list(bad.items())[:most]:
        log.warning("Skipped %s: %s", str(listed[i][2]).replace("\n", "\\n"), why)
    if len(bad) > most: log.warning("Skipped %d more unreadable files", len(bad) - most)


def trained_on(listed):
    "The classes of the training images; without folders of splits all images are."
    return {c for split, c, _ in listed if split in ("", "train")}


def check_readable(path, listed, good):
    "The class names, sorted. Errors: UserError for a split or class without a `good` image."
    for split in {split for split, *_ in listed} - {split for split, *_ in good}:
        raise UserError(f"{path}: not one image of {split}/ can be read.")
    vocab, readable = sorted(trained_on(listed)), trained_on(good)
    for c in vocab:
        if c not in readable: raise UserError(f"{path}: class {c!r} has no readable training image.")
    return vocab


def list_folder(path):
    "The files below `path`: a list of (split or '', class, file). Errors: UserError for wrong classes."
    listed = []
    parts = split_folders(path)
    for split, root in parts or [("", path)]:
        if parts and not folders(root):
            where = f"{root}{os.sep}<class>{os.sep}"
            raise UserError(f"{root} has no class folders: its images belong into {where}.")
        for c in folders(root):
            files = visible_files(c)
            if not files:
                why = "is an empty class, or may not be read"
                raise UserError(f"{c} {why}: put images into it, or remove it.")
            listed += [(split, c.name, file) for file in files]
    vocab = trained_on(listed)
    if len(vocab) < 2:
        few = "1 class" if vocab else "0 classes"
        where = "put images into train/<class>/, or into <class>/"
        raise UserError(f"{path} has {few}, but training needs two or more: {where}.")
    for split, c, file in listed:
        if c not in vocab: raise UserError(f"{file.parent}: class {c!r} of {split}/ is missing in train/.")
    return listed


SPLIT_NAMES = {
    "train": "train", "training": "train", "valid": "valid", "val": "valid", "validation": "valid",
    "test": "test", "testing": "test"}


def split_folders(path):
    "The folders of splits in `path` as a list of (split, folder). Errors: UserError where they are unclear."
    parts, others = [], []
    for folder in folders(path):
        split = SPLIT_NAMES.get(folder.name.lower())
        if split: parts.append((split, folder))
        else: others.append(f"{folder.name}/")
    splits = [split for split, _ in parts]
    if parts and (splits.count("train") != 1 or len(set(splits)) < len(splits)):
        found = ", ".join(f"{folder.name}/" for _, folder in parts)
        raise UserError(f"{path} has {found}: it needs one train/, and at most one each of valid/ and test/.")
    if parts and others:
        name = parts[0][1].name
        raise UserError(
            f"{path} has {', '.join(others)} beside {name}/: only train/, valid/ and test/ are read there. "
            f"Move what is no split away, or rename a class that is called {name}.")
    return parts


# what systems leave in folders
NO_IMAGES = "Thumbs.db", "desktop.ini", "__MACOSX"


def visible_files(path):
    "The files in the folder `path` and below, but for hidden ones and what systems leave there."
    def is_visible(file):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        return file.is_file() and file.name not in NO_IMAGES and not hidden
    return sorted(filter(is_visible, path.rglob("*")))


def folders(path):
    "The folders in `path`. Errors: UserError for a name that cannot be shown, a link to a folder around it."
    def is_class(folder):
        return folder.is_dir() and not folder.name.startswith(".") and folder.name not in NO_IMAGES
    found = sorted(filter(is_class, path.iterdir()))
    for folder in found:
        if not folder.name.isprintable():
            raise UserError(f"{path} has a folder {folder.name!r}, whose name cannot be shown: rename it.")
        if path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{folder} is a link to a folder that it lies in: remove it.")
    return found


def read_images(path, files, sz, cache):
    """The readable ones of `files` at `sz` pixels (n,sz,sz,3) uint8, and of the others {position: reason}.

    Kept in a file below `cache`, which is used as long as the files, their sizes, times and permissions stay
    the same."""
    key = sha256((GEOMETRY, [(str(file), *times_and_size(file)) for file in files]))
    kept = cache / f"{path.resolve().name}-{sz}-{sha256(path.resolve())[:12]}.npz"
    try:
        with np.load(kept) as z:
            if str(z["key"]) == key: return z["images"], dict(zip(z["bad"].tolist(), z["why"].tolist()))
    except Exception: pass      # not there, or damaged, for which NumPy raises anything: it is made anew
    try: images = np.empty((len(files), sz, sz, 3), np.uint8)
    except MemoryError as e:
        what = f"{len(files):,} images of --sz {sz} do not fit into the memory of this machine"
        raise UserError(f"{path}: {what}: try a smaller --sz.") from e
    bad = decode_all(files, images)
    if bad: images = np.delete(images, list(bad), axis=0)
    keep(kept, images=images, bad=np.array(list(bad), int), why=np.array(list(bad.values()), str), key=key)
    return images, bad


def sha256(value): return hashlib.sha256(str(value).encode()).hexdigest()


def times_and_size(file):
    "What of a file changes with its content or its permissions."
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def keep(path, **arrays):
    "Write `arrays` to the .npz file `path`; where that cannot be, a line says so."
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, buffer.getbuffer())
    except OSError as e: log.warning("The images are not cached in %s: %s", path, e.strerror)


def decode_all(files, images):
    "Read each of `files` into its row of `images`, in parallel; {position: reason} of what cannot be read."
    from rich.progress import track

    def decode(f, row):
        try: row[:] = read_image(f, len(row))
        except UserError as e: return e.text.removeprefix(f"{f} ")
    with ThreadPoolExecutor() as pool:
        reasons = track(pool.map(decode, files, images), "Reading images", len(files), transient=True)
        return {i: why for i, why in enumerate(reasons) if why}
