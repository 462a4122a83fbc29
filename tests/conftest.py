"""Tiny data sets in the official formats, short trainings that several tests look at, quick processes."""

import gzip
import hashlib
import http.server
import io
import os
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

# Before torch is imported: two workers whose torch has two threads each slow each other 20-fold on 2 cores.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
from filelock import FileLock
from forkserver import stand_in
from matplotlib.figure import Figure
from PIL import Image

import export
import train
from sifar.data import datasets, download
from sifar.log import log

COLD = sys.executable  # a Python that starts as it does for users


def pytest_configure(config):
    "But for the tests of GPUs, all is about processors, on every machine."
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # nohup, under which the tests may run, lets programs ignore it
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def shared(tmp_path_factory):
    "The folder of this run of the tests that all its workers see."
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def made_once(tmp_path_factory, name, make):
    "The folder that `make` fills: once, for all workers."
    folder = shared(tmp_path_factory) / name
    with FileLock(f"{folder}.lock"):
        if not (folder / "made").exists():
            make(folder)
            (folder / "made").touch()
    return folder


@pytest.fixture(scope="session", autouse=True)
def python(tmp_path_factory):
    "Processes are forked from a server that has imported all: see forkserver.py. COLD is the real Python."
    folder = shared(tmp_path_factory)
    if not hasattr(os, "pidfd_open") or len(str(folder)) > 90:  # Linux alone; a socket's path has 107 bytes
        yield COLD
        return
    main = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    script = tmp_path_factory.mktemp("bin") / "python"
    words = [COLD, "-IS", Path(__file__).with_name("forkserver.py"), folder / "forkserver", main, script]
    script.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, words))} "$@"\n')
    script.chmod(0o755)
    sys.executable = str(script)
    yield sys.executable
    sys.executable = COLD


@pytest.fixture(autouse=True)
def cold(request, monkeypatch):
    "Campaigns of faults start the real Python: they kill groups of processes, and take their rights away."
    if request.path.parent.name == "faults":
        monkeypatch.setattr(sys, "executable", COLD)


SAVEFIG = Figure.savefig


@pytest.fixture(scope="session", autouse=True)
def no_figures():
    "A white picture stands in for each figure, as those of a report take matplotlib seconds."
    Figure.savefig = stand_in
    yield
    Figure.savefig = SAVEFIG


@pytest.fixture(autouse=True)
def figures(request, monkeypatch):
    "The tests that look at figures draw them."
    if request.node.get_closest_marker("figures"):
        monkeypatch.setattr(Figure, "savefig", SAVEFIG)


# The flags of train.py that tests share: of two that are alike, the last counts.
DIGITS = "--dataset", "digits", "--arch", "resnet8", "--bs", "64", "--warmup", "0.2"
SMALL = *DIGITS, "--epochs", "4", "--sizes", "8x3,16"
SHORT = *DIGITS, "--epochs", "1", "--sizes", "8", "--bs", "512"  # two batches
LONG = *SMALL, "--epochs", "9999"  # a test ends it
SUPERCLASS = [c // 5 for c in range(100)]


def py2_dumps(o):
    "`o` pickled as Python 2 did it: protocol 2, byte strings, arrays by NumPy's old module names."

    def put(o):
        if isinstance(o, bytes):
            return b"T" + struct.pack("<i", len(o)) + o
        if isinstance(o, int):
            return b"J" + struct.pack("<i", o)
        if isinstance(o, list):
            return b"](" + b"".join(map(put, o)) + b"e"
        if isinstance(o, dict):
            return b"}(" + b"".join(put(k) + put(v) for k, v in o.items()) + b"u"
        start = [b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(", put(0), b"t", put(b"b"), b"tR"]
        shape = [put(1), b"(", *map(put, o.shape), b"t"]
        dtype = [b"cnumpy\ndtype\n(", put(o.dtype.str[1:].encode()), put(0), put(1), b"tR("]
        dtype += [put(3), put(b"|"), b"NNN", put(-1), put(-1), put(0), b"tb"]
        return b"".join([*start, b"(", *shape, *dtype, b"\x89", put(o.tobytes()), b"tb"])

    return b"\x80\x02" + put(o) + b"."


def cifar_batch(n, classes, seed=0):
    "A dictionary as in a CIFAR batch file: `n` images, the classes in turn."
    y = [i % classes for i in range(n)]
    x = np.random.default_rng(seed).integers(0, 256, (n, 3072), dtype=np.uint8)
    if classes == 10:
        return {b"data": x, b"labels": y, b"batch_label": b"one"}
    return {b"data": x, b"fine_labels": y, b"coarse_labels": [SUPERCLASS[o] for o in y]}


def cifar_files(name):
    "The files of a tiny `name` archive, unpickled: 400 training and 200 test images, or 100 and 100."
    if name == "cifar10":
        return {
            **{f"data_batch_{i}": cifar_batch(20, 10, i) for i in range(1, 6)},
            "test_batch": cifar_batch(100, 10, 9),
            "batches.meta": {b"label_names": [f"class{i}".encode() for i in range(10)]},
        }
    return {
        "train": cifar_batch(400, 100),
        "test": cifar_batch(200, 100, 1),
        "meta": {
            b"fine_label_names": [f"fine{i:02}".encode() for i in range(100)],
            b"coarse_label_names": [f"coarse{i:02}".encode() for i in range(20)],
        },
    }


def write_cifar(data, name, **changes):
    "Write a tiny `name`, extracted, below the folder `data`; `changes` replace whole files by bytes."
    folder = Path(data) / datasets.CIFARS[name].archive.folder
    folder.mkdir(parents=True)
    for file, d in cifar_files(name).items():
        (folder / file).write_bytes(changes.get(file.replace(".", "_"), py2_dumps(d)))
    return folder


def cifar_tar(name):
    "The bytes of a tiny official archive."
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for file, d in cifar_files(name).items():
            content = py2_dumps(d)
            member = tarfile.TarInfo(f"{datasets.CIFARS[name].archive.folder}/{file}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return gzip.compress(buffer.getvalue(), mtime=0)


@pytest.fixture
def tiny_cifar(monkeypatch):
    "Let sifar expect CIFAR archives of the tiny size."
    monkeypatch.setitem(
        datasets.CIFARS, "cifar100", replace(datasets.CIFARS["cifar100"], n_train=400, n_test=200)
    )
    monkeypatch.setitem(
        datasets.CIFARS, "cifar10", replace(datasets.CIFARS["cifar10"], n_train=100, n_test=100)
    )


class Mirror(http.server.BaseHTTPRequestHandler):
    "Serves `files` {path: (bytes, behaviour)}, `piece` bytes where it breaks off; notes requests in `asked`."

    files, asked, piece = {}, [], 4000

    def do_GET(self):
        content, behaviour = self.files.get(self.path, (b"", 404))
        start = int((self.headers["Range"] or "bytes=0-").split("=")[1].rstrip("-"))
        self.asked.append((self.path, start))
        if isinstance(behaviour, int):
            return self.send_error(behaviour)
        if behaviour == "redirects":
            self.send_response(302)
            self.send_header("Location", self.path)
            return self.end_headers()
        if behaviour == "no ranges":
            start = 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if behaviour != "no length":
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = min(len(content), start + self.piece) if behaviour in ("breaks off", "stalls") else len(content)
        if behaviour == "slow":
            for i in range(start, end, 1000):
                try:
                    self.wfile.write(content[i : i + 1000])
                except OSError:
                    return  # the client has had enough
                time.sleep(0.05)
        else:
            self.wfile.write(content[start:end])
        if behaviour == "stalls":
            time.sleep(3)

    def log_message(self, *args):
        pass


@pytest.fixture
def mirrors(monkeypatch, tiny_cifar):
    "A function that lets sifar know two mirrors which behave as told, and returns what they are asked for."
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    content = cifar_tar("cifar100")

    def set_up(first, second):
        Mirror.files, Mirror.asked = (
            {
                f"/{k}/x.tar.gz": (content if sent is None else sent, behaviour)
                for k, (sent, behaviour) in {"a": first, "b": second}.items()
            },
            [],
        )
        archive = replace(
            download.CIFAR100,
            md5=hashlib.md5(content).hexdigest(),
            size=len(content),
            urls=tuple(f"http://127.0.0.1:{server.server_port}/{o}/x.tar.gz" for o in "ab"),
        )
        monkeypatch.setitem(
            datasets.CIFARS, "cifar100", replace(datasets.CIFARS["cifar100"], archive=archive)
        )
        return Mirror.asked

    yield set_up
    server.shutdown()
    server.server_close()


def write_images(folder, n, color=(200, 30, 60), size=(40, 30), suffix="png"):
    "Write `n` noisy pictures of one colour into `folder`."
    rng = np.random.default_rng(len(str(folder)))
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        x = np.clip(np.array(color) + rng.integers(-20, 20, (size[1], size[0], 3)), 0, 255).astype(np.uint8)
        Image.fromarray(x).save(folder / f"{i:03}.{suffix}")


def on_pictures(folder, tmp_path):
    "The flags of train.py for one epoch on a folder of pictures; the run is below `tmp_path`/runs."
    small = "--arch", "resnet8", "--epochs", 1, "--mirror", "on"        # auto would take a second to look
    return "--dataset", folder, "--data", tmp_path, *small, "--runs", tmp_path / "runs"


@pytest.fixture
def image_folder(tmp_path):
    "train/, valid/ and test/ with two classes each."
    for split, n in (("train", 24), ("valid", 6), ("test", 6)):
        write_images(tmp_path / "pets" / split / "cat", n, (220, 60, 30))
        write_images(tmp_path / "pets" / split / "dog", n, (30, 60, 220))
    return tmp_path / "pets"


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    "The folder of a finished run of 8 epochs on digits."

    def make(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Figure, "savefig", SAVEFIG)  # tests look at its report
            small = "--epochs", "8", "--bs", "64", "--sizes", "16x5,32x3"
            train.main(["--preset", "smoke", *small, "--runs", str(folder), "--name", "a"])

    return made_once(tmp_path_factory, "finished", make) / "digits" / "a"


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    "The folder of a run of 4 epochs that nothing interrupts."

    def make(folder):
        train.main([*SMALL, "--runs", str(folder), "--name", "whole"])

    return made_once(tmp_path_factory, "undisturbed", make) / "digits" / "whole"


@pytest.fixture
def finished(undisturbed, tmp_path):
    "A copy of that run, to be spoilt."
    return Path(shutil.copytree(undisturbed, tmp_path / "copy"))


@pytest.fixture(scope="session")
def exported(run_folder, tmp_path_factory):
    "The run of 8 epochs, exported, and its Space; not to be changed."

    def make(space):
        export.main([str(run_folder), "--weights", "--space", str(space / "space")])

    return run_folder, made_once(tmp_path_factory, "exported", make) / "space"


def built(sources, folder):
    "The wheels of the project in the folder `sources`: one."
    build = [COLD, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=sources, check=True, capture_output=True)
    return list(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "A folder that holds what pip would put into site-packages."
    folder = tmp_path_factory.mktemp("site")
    (wheel,) = built(Path(__file__).parents[1], folder)
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    wheel.unlink()
    return folder


@pytest.fixture
def drawn(monkeypatch):
    "The first axis of each figure that is drawn from here on, by the title of either."
    found = {}

    def save(fig, *args, **kwargs):
        found[fig.get_suptitle() or fig.axes[0].get_title()] = fig.axes[0]
        return SAVEFIG(fig, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", save)
    return found


@pytest.fixture(autouse=True)
def fresh_log():
    "No handler of an earlier test's command stays on the log."
    yield
    log.handlers.clear()
    log.propagate = True


CAMPAIGNS = {}


@pytest.fixture
def campaign():
    "A function that counts the faults of a kind, injected and survived; they are printed at the end."

    def count(what, injected, survived, note=""):
        a, b, notes = CAMPAIGNS.get(what, (0, 0, []))
        CAMPAIGNS[what] = a + injected, b + survived, [*notes, *([note] if note else [])]

    return count


def pytest_terminal_summary(terminalreporter):
    if not CAMPAIGNS:
        return
    terminalreporter.section("faults injected, survived")
    for what, (injected, survived, notes) in CAMPAIGNS.items():
        terminalreporter.line(f"{injected:>6} {survived:>6}  {what}{': ' if notes else ''}{'; '.join(notes)}")
