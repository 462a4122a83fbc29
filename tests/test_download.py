import hashlib
import http.server
import tarfile
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from conftest import cifar_tar

from sifar import TrainConfig, UserError, datasets, download
from sifar.datasets import load_data


class Mirror(http.server.BaseHTTPRequestHandler):
    "Serves `files` {path: (bytes, behaviour)} and notes what was asked for in `asked`."
    files, asked = {}, []

    def do_GET(self):
        content, behaviour = self.files.get(self.path, (b"", "missing"))
        start = int((self.headers["Range"] or "bytes=0-").split("=")[1].rstrip("-"))
        self.asked.append((self.path, start))
        if behaviour == "missing": return self.send_error(404)
        if behaviour == "no ranges": start = 0
        self.send_response(206 if start else 200)
        if start: self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if behaviour != "no length": self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = min(len(content), start + 4000) if behaviour == "breaks off" else len(content)
        if behaviour == "slow":
            for i in range(start, end, 1000):
                try: self.wfile.write(content[i:i + 1000])
                except OSError: return              # the client has had enough
                time.sleep(0.05)
        else: self.wfile.write(content[start:end])

    def log_message(self, *args): pass


@pytest.fixture
def mirrors(monkeypatch, tiny_cifar):
    "A function that lets sifar know two mirrors on this machine which behave as told, and returns what they are asked for."
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    content = cifar_tar("cifar100")

    def set_up(first, second):
        Mirror.files, Mirror.asked = {"/a/x.tar.gz": (first[0] or content, first[1]), "/b/x.tar.gz": (second[0] or content, second[1])}, []
        archive = replace(download.CIFAR100, md5=hashlib.md5(content).hexdigest(), size=len(content),
                          urls=tuple(f"http://127.0.0.1:{server.server_port}/{o}/x.tar.gz" for o in "ab"))
        monkeypatch.setitem(datasets.CIFARS, "cifar100", replace(datasets.CIFARS["cifar100"], archive=archive))
        return Mirror.asked
    yield set_up
    server.shutdown()
    server.server_close()


def load(data): return load_data(TrainConfig(data=str(data)))


def test_an_archive_is_downloaded_checked_and_unpacked(mirrors, tmp_path):
    asked = mirrors((None, "good"), (None, "good"))
    assert len(load(tmp_path / "new").images) == 600
    assert len(load(tmp_path / "new").images) == 600
    assert asked == [("/a/x.tar.gz", 0)], "once, from the first mirror"
    assert sorted(o.name for o in (tmp_path / "new").iterdir()) == ["cifar-100-python", "x.tar.gz"]


@pytest.mark.parametrize("first", [(b"", "missing"), (b"<html>sign in</html>", "good"), (b"x" * 5_000_000, "good"), (b"x" * 5_000_000, "no length"), (b"<html>", "no length")])
def test_a_bad_mirror_is_followed_by_the_next(mirrors, tmp_path, first):
    asked = mirrors(first, (None, "good"))
    assert len(load(tmp_path).images) == 600
    assert list(dict.fromkeys(o for o, _ in asked)) == ["/a/x.tar.gz", "/b/x.tar.gz"]


def test_a_broken_off_download_goes_on_where_it_stopped(mirrors, tmp_path):
    asked = mirrors((None, "breaks off"), (None, "breaks off"))
    with pytest.raises(UserError, match="broke off after 8000 of"): load(tmp_path)
    assert asked == [("/a/x.tar.gz", 0), ("/b/x.tar.gz", 4000)]
    Mirror.files["/a/x.tar.gz"] = (Mirror.files["/a/x.tar.gz"][0], "good")
    assert len(load(tmp_path).images) == 600 and asked[2:] == [("/a/x.tar.gz", 8000)]


def test_a_server_without_ranges_sends_the_whole_file_again(mirrors, tmp_path):
    mirrors((None, "no ranges"), (None, "good"))
    (tmp_path / "x.tar.gz.part").write_bytes(b"z" * 100)
    assert len(load(tmp_path).images) == 600


def test_wrong_bytes_are_never_taken_for_data(mirrors, tmp_path):
    content = bytearray(cifar_tar("cifar100"))
    content[len(content) // 2] ^= 1
    mirrors((bytes(content), "good"), (bytes(content), "good"))
    with pytest.raises(UserError, match="its MD5 differs"): load(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_slow_mirror_is_left_for_the_next(mirrors, tmp_path, monkeypatch):
    asked = mirrors((None, "slow"), (None, "good"))
    monkeypatch.setattr(download, "PATIENCE", 0.3)
    assert len(load(tmp_path).images) == 600
    assert [o for o, _ in asked] == ["/a/x.tar.gz", "/b/x.tar.gz"] and asked[1][1] > 0, "what came is kept"


def test_an_archive_that_the_user_has_is_used(mirrors, tmp_path):
    asked = mirrors((b"", "missing"), (b"", "missing"))
    (tmp_path / "x.tar.gz").write_bytes(cifar_tar("cifar100")[:-50])
    with pytest.raises(UserError, match="x.tar.gz is damaged or not the official archive"): load(tmp_path)
    (tmp_path / "x.tar.gz").write_bytes(cifar_tar("cifar100"))
    assert len(load(tmp_path).images) == 600 and not asked
    assert len(load(tmp_path / "cifar-100-python").images) == 600, "--data may name the extracted folder itself"


def test_an_archive_with_a_link_is_refused(mirrors, tmp_path, monkeypatch):
    mirrors((b"", "missing"), (b"", "missing"))
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        member = tarfile.TarInfo("cifar-100-python/train")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    cifar = datasets.CIFARS["cifar100"]
    md5 = hashlib.md5((tmp_path / "x.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setitem(datasets.CIFARS, "cifar100", replace(cifar, archive=replace(cifar.archive, md5=md5)))
    with pytest.raises(UserError, match="is no plain file"): load(tmp_path)
    assert [o.name for o in tmp_path.iterdir()] == ["x.tar.gz"]


def test_no_mirror_at_all_is_one_line(mirrors, tmp_path):
    mirrors((b"", "missing"), (b"", "missing"))
    with pytest.raises(UserError, match=r"404.*404.*put the archive into") as e: load(tmp_path)
    assert "\n" not in e.value.text


def test_the_published_sums():
    assert download.CIFAR100.md5 == "eb9058c3a382ffc7106e4002c42a8d85" and download.CIFAR10.md5 == "c58f30108f718f92721af3b95e74349a"
    for o in (download.CIFAR100, download.CIFAR10): assert o.urls[0].startswith("https://www.cs.toronto.edu/~kriz/") and len(o.urls) > 1
    assert np.array([o.size for o in (download.CIFAR100, download.CIFAR10)]).min() > 160e6
