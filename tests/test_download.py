import gzip
import hashlib
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from conftest import Mirror, cifar_tar

from sifar import TrainConfig, UserError
from sifar.data import datasets, download
from sifar.data.datasets import load_data


def load(data):
    return load_data(TrainConfig(data=str(data)))


def test_pictures_in_the_data_folder_are_shown_the_way(image_folder, mirrors):
    asked = mirrors((None, ""), (None, ""))
    for folder in (image_folder, image_folder / "train"):
        with pytest.raises(UserError, match=f"--dataset {folder} trains on them"):
            load_data(TrainConfig(data=folder))
    assert not asked, "nothing was downloaded into it"


def test_an_archive_is_downloaded_checked_and_unpacked(mirrors, tmp_path):
    asked = mirrors((None, "good"), (None, "good"))
    assert len(load(tmp_path / "new").images) == 600
    assert len(load(tmp_path / "new").images) == 600
    assert asked == [("/a/x.tar.gz", 0)], "once, from the first mirror"
    assert sorted(o.name for o in (tmp_path / "new").iterdir()) == [
        ".x.tar.gz.lock",
        "cifar-100-python",
        "x.tar.gz",
    ]


@pytest.mark.parametrize(
    "first",
    [
        (b"", 404),
        (b"<html>sign in</html>", "good"),
        (b"x" * 5_000_000, "good"),
        (b"x" * 5_000_000, "no length"),
        (b"<html>", "no length"),
    ],
)
def test_a_bad_mirror_is_followed_by_the_next(mirrors, tmp_path, first):
    asked = mirrors(first, (None, "good"))
    assert len(load(tmp_path).images) == 600
    assert list(dict.fromkeys(o for o, _ in asked)) == ["/a/x.tar.gz", "/b/x.tar.gz"]


def test_a_broken_off_download_goes_on_where_it_stopped(mirrors, tmp_path):
    asked = mirrors((None, "breaks off"), (None, "breaks off"))
    with pytest.raises(UserError, match="broke off after 8000 of"):
        load(tmp_path)
    assert asked == [("/a/x.tar.gz", 0), ("/b/x.tar.gz", 4000)]
    Mirror.files["/a/x.tar.gz"] = (Mirror.files["/a/x.tar.gz"][0], "good")
    assert len(load(tmp_path).images) == 600 and asked[2:] == [("/a/x.tar.gz", 8000)]


def test_a_server_without_ranges_sends_the_whole_file_again(mirrors, tmp_path):
    mirrors((None, "no ranges"), (None, "good"))
    (tmp_path / "x.tar.gz.part").write_bytes(b"z" * 100)
    assert len(load(tmp_path).images) == 600


def test_what_lies_in_the_place_of_a_broken_off_download_is_not_followed(mirrors, tmp_path):
    mirrors((None, "good"), (None, "good"))
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    for name in "link", "pipe":
        (tmp_path / name).mkdir()
    (tmp_path / "link" / "x.tar.gz.part").symlink_to(mine)
    os.mkfifo(tmp_path / "pipe" / "x.tar.gz.part")
    assert len(load(tmp_path / "link").images) == len(load(tmp_path / "pipe").images) == 600
    assert mine.read_text() == "mine"


def test_wrong_bytes_are_never_taken_for_data(mirrors, tmp_path):
    content = bytearray(cifar_tar("cifar100"))
    content[len(content) // 2] ^= 1
    mirrors((bytes(content), "good"), (bytes(content), "good"))
    with pytest.raises(UserError, match="its MD5 differs"):
        load(tmp_path)
    assert not list(tmp_path.glob("[!.]*"))


def test_a_slow_mirror_is_left_for_the_next(mirrors, tmp_path, monkeypatch):
    asked = mirrors((None, "slow"), (None, "good"))
    monkeypatch.setattr(download, "PATIENCE", 0.3)
    assert len(load(tmp_path).images) == 600
    assert [o for o, _ in asked] == ["/a/x.tar.gz", "/b/x.tar.gz"] and asked[1][1] > 0, "what came is kept"


def test_an_archive_that_the_user_has_is_used(mirrors, tmp_path):
    asked = mirrors((b"", 404), (b"", 404))
    (tmp_path / "x.tar.gz").write_bytes(cifar_tar("cifar100")[:-50])
    with pytest.raises(UserError, match="x.tar.gz is damaged or not the official archive"):
        load(tmp_path)
    (tmp_path / "x.tar.gz").write_bytes(cifar_tar("cifar100"))
    assert len(load(tmp_path).images) == 600 and not asked
    assert len(load(tmp_path / "cifar-100-python").images) == 600, (
        "--data may name the extracted folder itself"
    )


def member(name, size=10, **kwargs):
    info = tarfile.TarInfo(name)
    info.size = size
    for k, v in kwargs.items():
        setattr(info, k, v)
    return info


FOLDER = "cifar-100-python"
STRANGE = {
    "a link": member(f"{FOLDER}/train", 0, type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "a hard link": member(f"{FOLDER}/train", 0, type=tarfile.LNKTYPE, linkname="/etc/passwd"),
    "a device": member(f"{FOLDER}/train", 0, type=tarfile.CHRTYPE),
    "a pipe": member(f"{FOLDER}/train", 0, type=tarfile.FIFOTYPE),
    "an absolute path": member("/tmp/sifar-escaped"),
    "a path upwards": member(f"{FOLDER}/../../sifar-escaped"),
    "a path upwards to the data": member(f"{FOLDER}/../train"),
    "a folder in it": member(f"{FOLDER}/more", 0, type=tarfile.DIRTYPE),
    "another folder": member("other/train"),
    "far too much": member(f"{FOLDER}/train", 2_000_000_000),
}


def let_sum_fit(monkeypatch, path):
    "Let sifar take the archive `path` for the official one."
    cifar = datasets.CIFARS["cifar100"]
    monkeypatch.setitem(
        datasets.CIFARS,
        "cifar100",
        replace(cifar, archive=replace(cifar.archive, md5=hashlib.md5(path.read_bytes()).hexdigest())),
    )


@pytest.mark.parametrize("what", STRANGE)
def test_an_archive_with_a_strange_member_is_refused(mirrors, tmp_path, monkeypatch, what):
    mirrors((b"", 404), (b"", 404))
    path = tmp_path / "data" / "x.tar.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(STRANGE[what].tobuf() + bytes(512)))
    let_sum_fit(monkeypatch, path)
    with pytest.raises(UserError, match="is no plain file of|is far larger than") as e:
        load(path.parent)
    assert str(path) in e.value.text and STRANGE[what].name in e.value.text
    assert sorted(o for o in tmp_path.rglob("*") if o.suffix != ".lock") == [path.parent, path]


def test_an_archive_that_lacks_files_is_refused(mirrors, tmp_path, monkeypatch):
    mirrors((b"", 404), (b"", 404))
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(member(f"{FOLDER}/train").tobuf() + bytes(512)))
    let_sum_fit(monkeypatch, tmp_path / "x.tar.gz")
    with pytest.raises(UserError, match="meta, test not found"):
        load(tmp_path)


def test_two_that_start_at_once_download_once(mirrors, tmp_path):
    asked = mirrors((None, "whole"), (None, "whole"))
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(load, [tmp_path / "new"] * 4))
    assert len(asked) == 1 and all(len(o.train) == len(found[0].train) > 0 for o in found)


def test_no_mirror_at_all_is_one_line(mirrors, tmp_path):
    mirrors((b"", 404), (b"", 404))
    with pytest.raises(UserError, match=r"404.*404.*put the archive into") as e:
        load(tmp_path)
    assert "\n" not in e.value.text
