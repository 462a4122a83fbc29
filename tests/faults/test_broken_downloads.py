"""Servers that break off, lie, loop and stall, killed extractions: the archive comes, or one clear line."""

import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import Mirror, cifar_files, cifar_tar
from test_download import load

from sifar import UserError
from sifar.data import download

pytestmark = pytest.mark.slow


def right(data):
    return np.array_equal(
        data.images[:400].transpose(0, 3, 1, 2).reshape(400, 3072), cifar_files("cifar100")["train"][b"data"]
    )


def test_a_server_that_breaks_off_at_every_tenth(mirrors, tmp_path, campaign):
    size = len(cifar_tar("cifar100"))
    for tenth in range(1, 11):
        asked = mirrors((None, "breaks off"), (b"", 404))
        Mirror.piece, data = tenth * size // 10 - 1, tmp_path / str(tenth)
        tries = 0
        while not (data / "cifar-100-python").exists():
            tries += 1
            if tries * Mirror.piece >= size:
                assert right(load(data))
            else:
                with pytest.raises(UserError, match="broke off after"):
                    load(data)
        starts = [start for path, start in asked if path.startswith("/a")]
        assert starts == [i * Mirror.piece for i in range(tries)], "each time it went on where it broke off"
        campaign("downloads broken off, each gone on with to the end", tries - 1, tries - 1)


CONTENT = cifar_tar("cifar100")
FLIPPED = CONTENT[:5000] + bytes([CONTENT[5000] ^ 1]) + CONTENT[5001:]
BAD = {
    "404": (b"", 404),
    "403": (b"", 403),
    "500": (b"", 500),
    "503": (b"", 503),
    "a page instead of the file": (b"<html>sign in</html>", "good"),
    "a page without its length": (b"<html>sign in</html>", "no length"),
    "wrong bytes": (FLIPPED, "good"),
    "wrong bytes, no ranges": (FLIPPED, "no ranges"),
    "too short": (CONTENT[:-1], "good"),
    "too short, without its length": (CONTENT[:-1], "no length"),
    "too long": (CONTENT + b"x", "good"),
    "too long, without its length": (CONTENT + b"x", "no length"),
    "nothing": (b"", "good"),
    "redirects to itself": (CONTENT, "redirects"),
    "stalls": (CONTENT, "stalls"),
    "breaks off": (CONTENT, "breaks off"),
}


@pytest.mark.parametrize("first", BAD)
def test_bad_servers_in_pairs(mirrors, tmp_path, monkeypatch, campaign, first):
    monkeypatch.setattr(download, "STALLED", 1)
    Mirror.piece = 4000
    for second in BAD:
        data = tmp_path / second
        mirrors(BAD[first], BAD[second])
        try:
            assert right(load(data)), "the second had just what the first left out"
        except UserError as e:
            assert e.text.count("http://") >= 2 and "\n" not in e.text
            assert not (data / "cifar-100-python").exists() and not (data / "x.tar.gz").exists()
        mirrors(BAD[first], (None, "good"))
        assert right(load(data)), "the next mirror has it"
        campaign("pairs of bad servers refused, then the file from a good one", 1, 1)


KILLED = """
import sys; sys.path[:0] = {path!r}
from dataclasses import replace
import hashlib
from sifar import TrainConfig
from sifar.data import datasets
content = open({archive!r}, "rb").read()
cifar = datasets.CIFARS["cifar100"]
md5, urls = hashlib.md5(content).hexdigest(), ("http://127.0.0.1:9/x.tar.gz",)
tiny = replace(cifar.archive, md5=md5, size=len(content), urls=urls)
datasets.CIFARS["cifar100"] = replace(cifar, n_train=400, n_test=200, archive=tiny)
print("ready", flush=True)
datasets.load_data(TrainConfig(data={data!r}))
print("done", flush=True)
"""


def test_an_extraction_that_is_killed_is_never_taken_for_data(mirrors, tmp_path, campaign):
    mirrors((b"", 404), (b"", 404))
    rng, parts = random.Random(0), 0
    for i in range(20):
        data = tmp_path / str(i)
        data.mkdir()
        (data / "x.tar.gz").write_bytes(CONTENT)
        code = KILLED.format(path=sys.path, archive=str(data / "x.tar.gz"), data=str(data))
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        process.stdout.readline()
        while i % 2 and process.poll() is None and not list(data.glob("*.tmp")):
            pass  # half of them while it unpacks
        end = time.monotonic() + rng.uniform(0, 0.01 if i % 2 else 0.06)
        while time.monotonic() < end:
            pass
        process.kill()
        process.communicate()
        parts += bool(list(data.glob("*.tmp")))
        if (data / "cifar-100-python").exists():
            assert sorted(o.name for o in (data / "cifar-100-python").iterdir()) == ["meta", "test", "train"]
        assert right(load(data))
    assert parts > 3
    campaign("extractions that were killed", 20, 20, f"{parts} in the middle")
