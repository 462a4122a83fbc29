"""A folder of one's own pictures as an array, read once and kept."""
import hashlib
import lzma
import os
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ..errors import UserError, one_line, visible
from ..files import open_plain, write_file
from ..log import console, log
from .image import GEOMETRY, explained, formats, open_image, read_image
from .labels import list_labels
from .layout import list_folder, trained_on
from .splits import stratified_split

LONGEST = 300       # seconds of an epoch with the --sz that is proposed
# what shutil raises for archives that are cut off, damaged or encrypted
BROKEN_ARCHIVE = (
    shutil.ReadError, zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError,
    RuntimeError, ValueError)


def read_folder(path, sz, cache, table=None, fit="halfway"):
    """Images, labels, split and class names of a folder of pictures, or of an archive of one.

    It has train/<class>/* and valid/ or test/ like it, or class folders alone; or the CSV file `table` says
    what each picture is. Errors: UserError for one class, an empty class, a class that training lacks, more
    than 10 % unreadable files."""
    path, listed, lines = list_pictures(path, cache, table)
    for line in lines: log.info("%s", line)
    images, bad = read_images(path, [file for *_, file in listed], sz, cache, fit)
    say_skipped(listed, bad)
    if len(bad) > 0.1 * len(listed):
        share = f"{len(bad)} of {len(listed)} files cannot be read as images, more than 10 %"
        i, why = next(iter(bad.items()))
        raise UserError(f"{path}: {share}: mend or remove them. The first: {listed[i][2].name} {why}")
    good = [entry for i, entry in enumerate(listed) if i not in bad]
    vocab = check_readable(path, listed, good)
    index = {c: i for i, c in enumerate(vocab)}
    labels = np.array([index[c] for _, c, _ in good])
    split = np.array([name for name, *_ in good])
    if split[0] == "":          # class folders alone: a fixed stratified tenth is the test set
        test = stratified_split(np.arange(len(good)), labels, 0.1, 0)[1]
        split = np.where(np.isin(np.arange(len(good)), test), "test", "train")
    names = [visible(file.relative_to(path).as_posix()) for *_, file in listed]
    unreadable = {names[i]: why for i, why in bad.items()}
    files = [name for i, name in enumerate(names) if i not in bad]
    side = median_side([file for *_, file in good])
    return images, labels, split, vocab, {"files": files, "unreadable": unreadable, "side": side}


def median_side(files):
    "The median of the shorter sides of some 50 pictures."
    def shorter_side(file):
        with explained(file), open_image(file) as img: return min(img.size)
    return int(np.median([*map(shorter_side, files[::max(1, len(files) // 50)])]))


def larger_size(side, n):
    "The largest --sz up to `side` with which this machine can train on `n` images; None where 32 is."
    import torch  # here, as --help for a folder should be quick
    # a ResNet-18 in bfloat16 on images of 32 pixels, roughly: see README.md
    speed = 20_000 if torch.cuda.is_available() else 100 * (os.cpu_count() or 1)
    def fits(sz): return sz <= side and n * (sz / 32)**2 / speed <= LONGEST
    return max(filter(fits, (64, 96, 128, 224)), default=None)


def list_pictures(path, cache, table=None):
    """The folder `path`, or that of an archive, its pictures as (split or '', class, file), and lines.

    The lines say what is read, and what is not."""
    if path.is_file(): path = unpack(path, cache)
    return path, *(list_labels(path, table) if table else list_folder(path))


def say_skipped(listed, bad, most=20):
    "Log which files were skipped, and why; `bad` has the reasons by their position in `listed`."
    for i, why in list(bad.items())[:most]:
        log.warning("Skipped %s, which %s", str(listed[i][2]).replace("\n", "\\n"), why)
    if len(bad) > most: log.warning("Skipped %d more unreadable files", len(bad) - most)


def check_readable(path, listed, good):
    "The class names, sorted. Errors: UserError for a split or class without a `good` image."
    for split in {split for split, *_ in listed} - {split for split, *_ in good}:
        raise UserError(f"{path}: not one image of {split}/ can be read.")
    vocab, readable = sorted(trained_on(listed)), trained_on(good)
    for c in vocab:
        if c not in readable: raise UserError(f"{path}: class {c!r} has no readable training image.")
    return vocab


def read_images(path, files, sz, cache, fit):
    """The readable ones of `files` at `sz` pixels (n,sz,sz,3) uint8, and of the others {position: reason}.

    Kept in a file below `cache`, which is used as long as the files, their sizes, times and permissions, and
    the formats that can be read, stay the same."""
    key = sha256((GEOMETRY, formats(), fit, [(str(file), *times_and_size(file)) for file in files]))
    # a name may be as long as a system takes
    kept = cache / f"{path.resolve().name[:50]}-{sz}-{sha256(path.resolve())[:12]}.npz"
    if found := read_kept(kept, key, len(files), sz): return found
    try: images = np.empty((len(files), sz, sz, 3), np.uint8)
    except MemoryError as e:
        what = f"{len(files):,} images of --sz {sz} do not fit into the memory of this machine"
        raise UserError(f"{path}: {what}: try a smaller --sz.") from e
    bad = decode_all(files, images, fit)
    if bad:
        # in place: there may be no memory for them twice
        good = [row for row in range(len(files)) if row not in bad]
        for to, row in enumerate(good): images[to] = images[row]
        images = images[:len(good)]
    keep(kept, images=images, bad=np.array(list(bad), int), why=np.array(list(bad.values()), str), key=key)
    return images, bad


def read_kept(path, key, n, sz):
    "What read_images gives of `n` files, from the cache `path`; None where it is missing or does not fit."
    try:
        with open_plain(path) as f, np.load(f) as z:
            # else a small file may unpack to any size
            stored = all(member.compress_type == zipfile.ZIP_STORED for member in z.zip.infolist())
            if not stored or str(z["key"]) != key: return None
            images, bad, why = z["images"], z["bad"].tolist(), z["why"].tolist()
        shaped = images.dtype == np.uint8 and images.shape == (n - len(bad), sz, sz, 3)
        listed = len(set(bad)) == len(why) and all(0 <= i < n for i in bad)
    except Exception: return None       # of a damaged file NumPy raises anything
    return (images, dict(zip(bad, why))) if shaped and listed else None


def sha256(value):
    # the name of a file need not be text
    return hashlib.sha256(str(value).encode(errors="backslashreplace")).hexdigest()


def times_and_size(file):
    "What of a file changes with its content or its permissions."
    stat = file.stat() if file.exists() else file.lstat()       # a link that leads nowhere
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def make_cache(cache):
    "Make the folder `cache`, and say to backups and to us that it is one: https://bford.info/cachedir/"
    cache.mkdir(parents=True, exist_ok=True)
    write_file(cache / "CACHEDIR.TAG", "Signature: 8a477f597d28d172789f06886806bc55\n")


def unpack(path, cache):
    "The folder below `cache` with what is in an archive; it is unpacked once. Errors: UserError."
    folder = cache / f"{path.name[:50]}-{sha256((path.resolve(), times_and_size(path)))[:12]}"
    if folder.is_dir(): return folder
    log.info("Unpacking %s", path)
    make_cache(cache)
    tmp = Path(tempfile.mkdtemp(dir=cache))
    try:
        if path.suffix.lower() == ".zip": unzip(path, tmp)
        # tar: nothing outside of the folder, no devices
        else: shutil.unpack_archive(path, tmp, filter="data")
        move(tmp, folder)
    except BROKEN_ARCHIVE as e:
        raise UserError(f"{path} cannot be unpacked ({one_line(e)}): is all of it there?") from e
    finally: shutil.rmtree(tmp, ignore_errors=True)
    return folder


def unzip(path, folder):
    "Unpack a zip file, of Windows' backslashes too; zipfile puts nothing outside of the folder."
    with zipfile.ZipFile(path) as file:
        for member in file.infolist():
            if member.flag_bits & 1:
                raise UserError(f"{path} has a password: unpack it, and name the folder.")
            member.filename = member.filename.replace("\\", "/")
            file.extract(member, folder)


def move(tmp, folder):
    "Let `tmp` be the folder `folder`, unless another process has just made that."
    try: tmp.rename(folder)
    except OSError:
        if not folder.is_dir(): raise


def keep(path, **arrays):
    "Write `arrays` to the .npz file `path`; where that cannot be, a line says so."
    try:
        make_cache(path.parent)
        write_file(path, lambda f: np.savez(f, **arrays))
    except OSError as e: log.warning("%s is not kept: %s", path, e.strerror)


def decode_all(files, images, fit):
    "Read each of `files` into its row of `images`, in parallel; {position: reason} of what cannot be read."
    from rich.progress import track

    def decode(f, row):
        try: row[:] = read_image(f, len(row), fit)
        except UserError as e: return e.text.removeprefix(f"{f} ")
    with ThreadPoolExecutor() as pool:
        # where there is neither, it would print an empty line; in a notebook it asks for ipywidgets
        hidden = not (console.is_terminal or console.is_jupyter and find_spec("ipywidgets"))
        read = pool.map(decode, files, images)
        reasons = track(read, "Reading images", len(files), transient=True, disable=hidden)
        return {i: why for i, why in enumerate(reasons) if why}
