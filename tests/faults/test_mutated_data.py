"""Mutated archives, batch files and folders: refused with a line that names the file, or read as before."""

import gzip
import hashlib
import io
import os
import random
import shutil
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import cifar_files, cifar_tar, on_pictures, py2_dumps, write_cifar, write_images
from PIL import Image
from test_datasets import load
from test_train import command

from sifar import UserError
from sifar.data import datasets

pytestmark = pytest.mark.slow


class Hostile:
    def __reduce__(self):
        return os.mkdir, (os.environ["SIFAR_TEST_TRAP"],)


def truncated(rng, content):
    return content[: rng.randrange(len(content))]


def flipped(rng, content):
    "One bit changed, but for those of the pixels: nothing in a batch file tells what colour a pixel had."
    pixels = content.find(cifar_files("cifar100")["train"][b"data"].tobytes()[:64])
    while True:
        at = rng.randrange(len(content))
        if not pixels <= at < pixels + 400 * 3072:
            return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]


def reshaped(rng, content):
    d = cifar_files("cifar100")["train"]
    n = rng.choice([0, 1, 399, 401, 800])
    return py2_dumps(
        {
            **d,
            b"data": rng.choice(
                [
                    np.zeros((n, 3072), np.uint8),
                    np.zeros((400, n), np.uint8),
                    np.zeros((400, 3072), rng.choice(["i1", "u2", "f4", "b1"])),
                    np.zeros((n,), np.uint8),
                ]
            ),
        }
    )


def relabelled(rng, content):
    d, key = cifar_files("cifar100")["train"], rng.choice([b"fine_labels", b"coarse_labels"])
    labels = list(d[key])
    labels[rng.randrange(400)] = rng.choice([-1, 100, 255, -(2**31), 2**31 - 1, b"7", [7]])
    return py2_dumps({**d, key: rng.choice([labels, labels[:-1], [*labels, 0], 7, b"labels", []])})


def lacking(rng, content):
    d = cifar_files("cifar100")["train"]
    d.pop(rng.choice([b"data", b"fine_labels", b"coarse_labels"]))
    return py2_dumps(d)


def hostile(rng, content):
    import pickle

    d = cifar_files("cifar100")["train"]
    d[rng.choice([b"data", b"fine_labels", b"more", Hostile])] = rng.choice(
        [Hostile(), [Hostile()], {b"x": Hostile()}]
    )
    d.pop(Hostile, None)
    return pickle.dumps({**d, b"more": Hostile()}, rng.randrange(6))


@pytest.mark.parametrize("mutate", [truncated, flipped, reshaped, relabelled, lacking, hostile])
def test_mutated_batch_files(tmp_path, tiny_cifar, monkeypatch, campaign, mutate):
    rng, folder, refused = random.Random(mutate.__name__), write_cifar(tmp_path, "cifar100"), 0
    monkeypatch.setenv("SIFAR_TEST_TRAP", str(tmp_path / "sprung"))
    good, want = (folder / "train").read_bytes(), load(data=str(tmp_path))
    for _ in range(40):
        (folder / "train").write_bytes(mutate(rng, good))
        try:
            data = load(data=str(tmp_path))
        except UserError as e:
            refused += 1
            assert str(folder / "train") in e.text and "\n" not in e.text
        else:
            assert (
                mutate is flipped
                and np.array_equal(data.images, want.images)
                and np.array_equal(data.labels, want.labels)
                and data.superclasses == want.superclasses
            )
        assert not (tmp_path / "sprung").exists()
    assert refused > 30
    campaign(
        f"batch files {mutate.__name__}",
        40,
        40,
        f"{refused} refused" + (f", {40 - refused} read as they were" if refused < 40 else ""),
    )


@pytest.mark.parametrize(
    "mutate",
    [
        truncated,
        lambda rng, content: (
            content[: (at := rng.randrange(len(content)))]
            + bytes([content[at] ^ 1 << rng.randrange(8)])
            + content[at + 1 :]
        ),
    ],
    ids=["truncated", "flipped"],
)
def test_mutated_archives(mirrors, tmp_path, campaign, mutate):
    mirrors((b"", 404), (b"", 404))
    rng, good = random.Random(1), cifar_tar("cifar100")
    for _ in range(30):
        (tmp_path / "x.tar.gz").write_bytes(mutate(rng, good))
        with pytest.raises(UserError, match="x.tar.gz is damaged or not the official archive"):
            load(data=str(tmp_path))
        assert [o.name for o in tmp_path.glob("[!.]*")] == ["x.tar.gz"]
    campaign("archives truncated or with a bit flipped", 30, 30)


def flipped_header(rng, content):
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        at = rng.choice(tar.getmembers()).offset + rng.randrange(512)
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]


@pytest.mark.parametrize("mutate", [truncated, flipped_header])
def test_mutated_archives_whose_sum_fits(mirrors, tmp_path, monkeypatch, campaign, mutate):
    "The tar file inside is mutated under a checksum that fits: the unpacker has to find it."
    mirrors((b"", 404), (b"", 404))
    rng, good, refused = random.Random(2), gzip.decompress(cifar_tar("cifar100")), 0
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "x.tar.gz").write_bytes(cifar_tar("cifar100"))
    want = load(data=str(tmp_path / "good"))
    for i in range(30):
        data, content = tmp_path / str(i), gzip.compress(mutate(rng, good))
        data.mkdir()
        (data / "x.tar.gz").write_bytes(content)
        cifar = datasets.CIFARS["cifar100"]
        monkeypatch.setitem(
            datasets.CIFARS,
            "cifar100",
            replace(cifar, archive=replace(cifar.archive, md5=hashlib.md5(content).hexdigest())),
        )
        try:
            got = load(data=str(data))
        except UserError as e:
            refused += 1
            assert str(data) in e.text and "\n" not in e.text
        else:
            assert np.array_equal(got.images, want.images) and np.array_equal(got.labels, want.labels)
        assert not list(data.glob("*.tmp"))
    assert refused > 10
    campaign(
        "archives truncated or with a bit flipped, under a checksum that fits", 30, 30, f"{refused} refused"
    )


def test_a_folder_with_files_of_every_kind(tmp_path, image_folder, campaign, caplog):
    cat = image_folder / "train" / "cat"
    write_images(cat, 100)
    good = (cat / "000.png").read_bytes()
    bad = {
        "empty.png": b"",
        "text.png": b"hello",
        "truncated.jpg": good[:200],
        "huge.png": good[:16] + (60_000).to_bytes(4, "big") * 2 + good[24:],
        "page.html": b"<html>",
        "script.sh": f"#!/bin/sh\ntouch '{tmp_path}/sprung'\n".encode(),
    }
    for k, v in bad.items():
        (cat / k).write_bytes(v)
    Image.open(cat / "000.png").save(cat / "really-a.jpg", "png")
    Image.open(cat / "000.png").save(cat / "猫 ünï\u202e code 🐈.png")
    (cat / "link.png").symlink_to(cat / "001.png")
    (cat / "nowhere.png").symlink_to(tmp_path / "nothing")
    (cat / "locked.png").write_bytes(good)
    (cat / "locked.png").chmod(0)
    words = [*map(str, command(*on_pictures(image_folder, tmp_path)))]
    if os.geteuid() == 0 and shutil.which("setpriv"):  # like a user
        words = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *words]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for o in [*(bad.keys() - {"page.html"}), "locked.png"]:
        assert f"Skipped {cat / o}" in done.stdout, (o, done.stdout)
    assert "no pictures (.html): 1" in done.stdout, done.stdout
    for o in ("really-a.jpg", "link.png", "猫"):
        assert f"Skipped {cat / o}" not in done.stdout
    assert "127 train" in done.stdout, done.stdout
    assert not list(Path(tmp_path).rglob("sprung"))
    campaign("odd files in a folder of images", len(bad) + 5, len(bad) + 5)
