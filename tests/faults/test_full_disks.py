"""Disks that fill up or may not be written: good files stay good, one line says what to do, it goes on."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL, Mirror
from test_download import load
from test_train import assert_same_run, command, history, weights

import export
import train
from sifar import load_learner
from sifar.errors import explain

MOUNT = os.name == "posix" and os.geteuid() == 0 and shutil.which("mount")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not MOUNT, reason="only root may mount a small disk")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    train.main([*SMALL, "--runs", str(folder), "--name", "whole"])
    return folder / "digits" / "whole"


class Disk:
    "A disk in memory of so many kB, that can be made larger, filled up to the last byte, and read only."

    def __init__(self, path, kb):
        self.path = path
        path.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kb}k", "tmpfs", path], check=True)

    def remount(self, options):
        subprocess.run(["mount", "-o", f"remount,{options}", self.path], check=True)

    def fill(self):
        with open(self.path / "ballast", "wb", buffering=0) as f:
            try:
                while f.write(bytes(4096)):
                    pass
            except OSError:
                pass

    def empty(self):
        (self.path / "ballast").unlink()

    def close(self):
        subprocess.run(["umount", "--lazy", self.path], check=True)


@pytest.fixture
def disk(tmp_path):
    "A function that makes a Disk."
    disks = []

    def make(kb):
        disks.append(Disk(tmp_path / f"disk{len(disks)}", kb))
        return disks[-1]

    yield make
    for o in disks:
        o.close()


def refused(args, **kwargs):
    "The line on stderr of a command that has to end with exit code 2."
    done = subprocess.run(args, capture_output=True, text=True, **kwargs)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("sifar: "), (
        done.returncode,
        done.stderr,
    )
    return done.stderr


@pytest.mark.parametrize("kb", [4, 16, 40, 200, 360, 500, 640, 760, 900, 1000, 1100, 1200, 1300])
def test_a_disk_that_fills_up_while_training(undisturbed, disk, tmp_path, campaign, kb):
    small, run = disk(kb), tmp_path / "disk0" / "digits" / "a"
    done = subprocess.run(
        command(*SMALL, "--runs", small.path, "--name", "a"), capture_output=True, text=True
    )
    if done.returncode == 0:
        pytest.fail(f"{kb} kB were enough")
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and "No space left on device" in done.stderr
        and "make room" in done.stderr
    )
    assert not list(small.path.rglob("*.tmp"))
    small.remount("size=20m")
    if (run / "models" / "last.pth").exists():
        assert (
            weights(run)["epoch"] in (len(history(run)), len(history(run)) - 1)
            if (run / "history.csv").exists()
            else weights(run)["epoch"] == 0
        )
        train.main(["--resume", str(run)])
    else:
        train.main([*SMALL, "--runs", str(small.path), "--name", "a"])
    assert_same_run(undisturbed, run)
    campaign("disks that fill up while training", 1, 1)


def test_a_disk_that_fills_up_in_a_line_of_the_log(undisturbed, disk, tmp_path, campaign):
    small = disk(20_000)
    run = shutil.copytree(undisturbed, small.path / "a")
    before = {o: o.read_bytes() for o in run.rglob("*.pth")}
    with open(run / "training_log.txt", "a") as f:
        f.write("." * (-f.tell() % 4096))  # the next byte needs a new page
    small.fill()
    assert "No space left on device" in refused(command("--resume", run, "--epochs", 6))
    assert before == {o: o.read_bytes() for o in run.rglob("*.pth")}
    small.empty()
    train.main(["--resume", str(run), "--epochs", "6"])
    assert len(history(run)) == 6
    campaign("disks that fill up in a line of the log", 1, 1)


@pytest.mark.parametrize("kb", [0, 8, 100, 300, 330, 350])
def test_a_disk_that_fills_up_while_exporting(undisturbed, disk, tmp_path, campaign, kb):
    small = disk(20_000)
    run = shutil.copytree(undisturbed, small.path / "a")
    export.main([str(run)])
    good = (run / "learner.pkl").read_bytes()
    small.fill()
    os.truncate(small.path / "ballast", os.path.getsize(small.path / "ballast") - 1024 * kb)
    refused([sys.executable, "export.py", run], cwd=Path(train.__file__).parent)
    assert (run / "learner.pkl").read_bytes() == good and list(load_learner(run).dls.vocab) == list(
        "0123456789"
    )
    assert {o.name for o in run.iterdir()} == {
        *(o.name for o in undisturbed.iterdir()),
        "learner.pkl",
        "model.json",
    }
    small.empty()
    export.main([str(run)])
    campaign("disks that fill up while exporting", 1, 1)


def test_a_disk_that_fills_up_while_downloading_and_unpacking(mirrors, disk, campaign):
    asked = mirrors((None, "good"), (None, "good"))
    for kb in (4, 200, 600, 1300, 1900, 2400, 3000):
        small = disk(kb)
        with pytest.raises(OSError) as e:
            load(small.path)
        assert "make room" in explain(e.value) and not (small.path / "cifar-100-python").exists()
        got = sum(o.stat().st_size for o in small.path.glob("x.tar.gz*"))
        small.remount("size=20m")
        asked.clear()
        assert len(load(small.path).images) == 600
        assert asked == ([] if got == len(Mirror.files["/a/x.tar.gz"][0]) else [("/a/x.tar.gz", got)]), (
            "it went on where the disk was full"
        )
    campaign("disks that fill up while downloading or unpacking", 7, 7)


def test_disks_and_files_that_may_not_be_written_or_read(undisturbed, disk, tmp_path, campaign):
    small, count = disk(20_000), 0
    run = shutil.copytree(undisturbed, small.path / "a")
    small.remount("ro")
    assert "Read-only file system" in refused(command("--resume", run, "--epochs", 6))
    assert "Read-only file system" in refused(command(*SMALL, "--runs", small.path))
    assert "Read-only file system" in refused(
        [sys.executable, "export.py", run], cwd=Path(train.__file__).parent
    )
    small.remount("rw")
    like_a_user = (
        ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if shutil.which("setpriv") else None
    )
    for path, mode in (
        (
            (run / "models" / "last.pth", 0),
            (run / "config.json", 0),
            (run / "training_log.txt", 0o400),
            (run / "models", 0o500),
            (run, 0o500),
            (run / "models", 0),
        )
        if like_a_user
        else ()
    ):
        old = path.stat().st_mode
        path.chmod(mode)
        assert str(path) in refused([*like_a_user, *map(str, command("--resume", run, "--epochs", 6))])
        path.chmod(old)
        count += 1
    train.main(["--resume", str(run), "--epochs", "6"])
    assert torch.load(run / "models" / "last.pth", weights_only=True)["epoch"] == 6
    campaign("disks and files that may not be read or written", 3 + count, 3 + count)
