"""A folder of one's own pictures as an array, read once and kept."""
import hashlib
import io
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..errors import UserError
from ..files import write_file
from ..log import log
from .image import read_image
from .splits import stratified_split


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
