import io
import os
import pickle
import random
import subprocess
import sys
import tracemalloc
from collections import Counter
from contextlib import suppress

import numpy as np
import pytest
from conftest import SUPERCLASS, cifar_batch, cifar_files, py2_dumps, write_cifar, write_images
from PIL import Image

from sifar import TrainConfig, UserError
from sifar.data.datasets import ImageData, load_data
from sifar.data.folder import keep
from sifar.data.image import read_image
from sifar.data.splits import stratified_split


def load(dataset="cifar100", **kwargs):
    return load_data(TrainConfig(dataset=str(dataset), **kwargs))


# ---- CIFAR ----


def test_cifar100_is_read_as_it_is(tmp_path, tiny_cifar):
    write_cifar(tmp_path, "cifar100")
    data, batch = load(data=str(tmp_path)), cifar_files("cifar100")["train"]
    assert data.images.shape == (600, 32, 32, 3) and data.images.dtype == np.uint8
    assert (data.images[7].transpose(2, 0, 1).ravel() == batch[b"data"][7]).all()
    assert data.labels[:400].tolist() == batch[b"fine_labels"]
    assert data.vocab[42] == "fine42" and data.superclasses == [f"coarse{o:02}" for o in SUPERCLASS]
    assert (len(data.train), len(data.valid), len(data.test)) == (300, 100, 200)
    assert sorted([*data.train, *data.valid, *data.test]) == list(range(600))
    assert data.test.min() == 400


def test_cifar10_is_read_in_the_order_of_its_batches(tmp_path, tiny_cifar):
    write_cifar(tmp_path, "cifar10")
    data = load("cifar10", data=str(tmp_path))
    assert (data.images[45].transpose(2, 0, 1).ravel() == cifar_batch(20, 10, 3)[b"data"][5]).all()
    assert data.vocab == [f"class{i}" for i in range(10)] and data.superclasses is None


class Hostile:
    def __reduce__(self):
        return os.mkdir, (os.environ["SIFAR_TEST_TRAP"],)


def changed(**kwargs):
    return py2_dumps({**cifar_files("cifar100")["train"], **{k.encode(): v for k, v in kwargs.items()}})


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "cannot be read"),
        (b"<html>not found</html>", "cannot be read"),
        (py2_dumps(cifar_batch(400, 100))[:5000], "cannot be read"),
        (py2_dumps([1, 2]), "holds a list"),
        # sets, of 216 bytes each: 2 GB for 10 MB
        (b"\x80\x04" + b"\x8f" * 10**7 + b".", "far more than images and labels"),
        (changed(data=np.zeros((400, 3000), np.uint8)), r"\(400, 3072\).*\(400, 3000\)"),
        (changed(data=np.zeros((399, 3072), np.uint8)), r"\(399, 3072\)"),
        (changed(data=np.zeros((400, 3072), np.int16)), "int16"),
        (changed(data=[]), "list"),
        (changed(fine_labels=[0] * 399), "list of 400 labels, but holds 399"),
        (changed(fine_labels=[100] * 400), "label 100 is out of range"),
        (changed(fine_labels=[-1] * 400), "label -1"),
        (changed(fine_labels=[7] * 400), "class 0 has 0 images, but should have 4"),
        (changed(coarse_labels=[20] * 400), "label 20 is out of range"),
        (changed(coarse_labels=[i % 3 for i in range(400)]), "more than one superclass"),
    ],
)
def test_a_wrong_batch_file_is_named_with_what_is_wrong(tmp_path, tiny_cifar, content, words):
    folder = write_cifar(tmp_path, "cifar100", train=content)
    with pytest.raises(UserError, match=words) as e:
        load(data=str(tmp_path))
    assert str(folder / "train") in e.value.text


def test_a_batch_file_that_is_cut_off_anywhere_is_named(tmp_path, tiny_cifar):
    folder = write_cifar(tmp_path, "cifar100")
    content = py2_dumps({b"a": 70_000, b"b": [300, 70_000], b"c": b"text", **cifar_batch(4, 100)})
    for size in (*range(0, 90), *range(len(content) - 60, len(content))):
        (folder / "train").write_bytes(content[:size])
        with pytest.raises(UserError, match="train cannot be read"):
            load(data=str(tmp_path))


@pytest.mark.parametrize("protocol", range(6))
def test_a_hostile_batch_file_runs_nothing(tmp_path, tiny_cifar, protocol, monkeypatch):
    monkeypatch.setenv("SIFAR_TEST_TRAP", str(tmp_path / "sprung"))
    write_cifar(tmp_path, "cifar100", train=pickle.dumps({b"data": Hostile()}, protocol=protocol))
    with pytest.raises(UserError, match="which no CIFAR file does"):
        load(data=str(tmp_path))
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pickle.dumps(Hostile()))
    assert (tmp_path / "sprung").exists(), "the trap works where it is not stopped"


def test_a_missing_file_and_wrong_names_are_named(tmp_path, tiny_cifar):
    folder = write_cifar(tmp_path, "cifar100", meta=py2_dumps({b"fine_label_names": [b"a"]}))
    with pytest.raises(UserError, match=r"meta: it should hold 100 class names"):
        load(data=str(tmp_path))
    (folder / "test").unlink()
    with pytest.raises(UserError, match=r"test is missing"):
        load(data=str(tmp_path))


@pytest.mark.skipif(
    "SIFAR_DATA" not in os.environ, reason="SIFAR_DATA names no folder with the real CIFAR-100"
)
def test_the_real_cifar100():
    data = load(valid_pct=0)
    assert np.allclose(
        data.stats(), [[0.50707516, 0.48654887, 0.44091784], [0.26733429, 0.25643846, 0.27615047]], atol=1e-7
    )
    assert set(Counter(data.labels[data.train].tolist()).values()) == {500} and set(
        Counter(data.labels[data.test].tolist()).values()
    ) == {100}
    assert (
        data.vocab[:3] == ["apple", "aquarium_fish", "baby"]
        and data.superclasses[0] == "fruit_and_vegetables"
        and len(set(data.superclasses)) == 20
    )


# ---- splits and statistics ----


def test_the_split_is_stratified_seeded_and_without_overlap():
    labels = np.repeat([0, 1, 2, 3], [100, 50, 5, 1])
    train, valid = stratified_split(np.arange(156), labels, 0.1, 1)
    assert Counter(labels[valid].tolist()) == {0: 10, 1: 5, 2: 1} and sorted([*train, *valid]) == list(
        range(156)
    )
    assert (stratified_split(np.arange(156), labels, 0.1, 1)[1] == valid).all()
    assert (stratified_split(np.arange(156), labels, 0.1, 2)[1] != valid).any()
    assert len(stratified_split(np.arange(156), labels, 0, 1)[1]) == 0


def test_the_test_set_does_not_depend_on_the_seed():
    a, b = load("digits", seed=1), load("digits", seed=2)
    assert (a.test == b.test).all() and (a.valid != b.valid).any()
    assert not set(a.test) & ({*a.train} | {*a.valid})


def test_statistics_are_those_of_the_training_split(image_folder, tmp_path):
    data = load(image_folder, data=str(tmp_path))
    x = data.images[data.train] / 255
    assert np.allclose(data.stats(), [x.mean((0, 1, 2)), x.std((0, 1, 2))], atol=1e-9)


def test_digits_are_there_offline():
    data = load("digits")
    assert data.images.shape == (1797, 32, 32, 3) and data.vocab == list("0123456789") and not data.mirrored
    assert (data.images[..., 0] == data.images[..., 2]).all() and data.images.max() == 255


# ---- a folder of images ----


def test_a_folder_keeps_its_own_splits(image_folder, tmp_path):
    data = load(image_folder, data=str(tmp_path), sz=16)
    assert data.vocab == ["cat", "dog"] and data.images.shape == (72, 16, 16, 3)
    assert (len(data.train), len(data.valid), len(data.test)) == (48, 12, 12)
    cats = data.images[data.train][data.labels[data.train] == 0]
    assert cats[..., 0].mean() > 150 > cats[..., 2].mean(), "cats are the red ones"


def test_train_and_test_alone_hold_out_a_share_of_train(tmp_path):
    for split, n in (("train", 20), ("test", 5)):
        for c in "ab":
            write_images(tmp_path / "set" / split / c, n)
    data = load(tmp_path / "set", data=str(tmp_path), valid_pct=0.2)
    assert (len(data.train), len(data.valid), len(data.test)) == (32, 8, 10)


def test_train_and_valid_alone_have_no_test_set(tmp_path):
    for split in ("train", "val"):
        for c in "ab":
            write_images(tmp_path / "set" / split / c, 5)
    data = load(tmp_path / "set", data=str(tmp_path))
    assert (len(data.train), len(data.valid), len(data.test)) == (10, 10, 0)


def test_class_folders_alone_are_split_in_three(tmp_path):
    for c in "abc":
        write_images(tmp_path / "set" / c / "deeper", 20)
    data = load(tmp_path / "set", data=str(tmp_path))
    assert (len(data.train), len(data.valid), len(data.test)) == (48, 6, 6)
    assert Counter(data.labels[data.test].tolist()) == {0: 2, 1: 2, 2: 2}


def test_unreadable_files_are_listed_and_skipped(image_folder, tmp_path, caplog):
    (image_folder / "train" / "cat" / "broken.png").write_bytes(b"")
    (image_folder / "train" / "dog" / "notes.jpg").write_text("no picture")
    whole = next((image_folder / "test" / "dog").iterdir())
    (image_folder / "test" / "dog" / "cut.png").write_bytes(whole.read_bytes()[:200])
    for _ in range(2):  # read anew, and from the cache
        caplog.clear()
        data = load(image_folder, data=str(tmp_path))
        assert [o in caplog.text for o in ("broken.png", "notes.jpg", "cut.png")] == [
            True
        ] * 3 and caplog.text.count("Skipped") == 3
        assert len(data.images) == 72 and (len(data.train), len(data.test)) == (48, 12)


def test_more_than_a_tenth_unreadable_is_an_error(image_folder, tmp_path):
    for i in range(9):
        (image_folder / "train" / "cat" / f"x{i}.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"9 of 81 files cannot be read"):
        load(image_folder, data=str(tmp_path))


def test_wrong_classes_are_errors(image_folder, tmp_path):
    (image_folder / "train" / "bird").mkdir()
    with pytest.raises(UserError, match="bird is an empty class"):
        load(image_folder, data=str(tmp_path))
    (image_folder / "train" / "bird").rename(image_folder / "test" / "bird")
    write_images(image_folder / "test" / "bird", 1)
    with pytest.raises(UserError, match="'bird' of test/ is missing in train/"):
        load(image_folder, data=str(tmp_path))
    write_images(tmp_path / "one" / "only", 3)
    with pytest.raises(UserError, match="1 class,"):
        load(tmp_path / "one", data=str(tmp_path))
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="0 classes"):
        load(tmp_path / "none", data=str(tmp_path))


def test_a_link_around_itself_an_odd_name_and_a_split_without_images_are_errors(image_folder, tmp_path):
    (image_folder / "train" / "loop").symlink_to("..")
    with pytest.raises(UserError, match="is a link to a folder that it lies in"):
        load(image_folder, data=str(tmp_path))
    (image_folder / "train" / "loop").unlink()
    (image_folder / "train" / "two\nlines").mkdir()
    with pytest.raises(UserError, match="cannot be shown: rename it"):
        load(image_folder, data=str(tmp_path))
    (image_folder / "train" / "two\nlines").rmdir()
    for o in (image_folder / "test").rglob("*.png"):
        o.unlink()
    for o in ("cat", "dog"):
        (image_folder / "test" / o / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="not one image of test/ can be read"):
        load(image_folder, data=str(tmp_path))


def test_hidden_files_and_folders_are_no_images(image_folder, tmp_path):
    write_images(image_folder / "train" / "cat" / ".ipynb_checkpoints", 5)
    (image_folder / "train" / "cat" / ".DS_Store").write_text("no picture")
    write_images(image_folder / "train" / ".cache", 5)
    assert len(load(image_folder, data=str(tmp_path)).images) == 72


def test_capitals_do_not_turn_splits_into_classes(image_folder, tmp_path):
    (image_folder / "train").rename(image_folder / "Train")
    assert load(image_folder, data=str(tmp_path)).vocab == ["cat", "dog"]


def test_a_layout_that_cannot_be_meant_is_named(image_folder, tmp_path):
    (image_folder / "val").mkdir()
    with pytest.raises(UserError, match="test/, train/, val/, valid/: it needs one train/"):
        load(image_folder, data=str(tmp_path))
    (image_folder / "val").rmdir()
    (image_folder / "train").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="has test/, valid/: it needs one train/"):
        load(image_folder, data=str(tmp_path))
    write_images(image_folder / "train", 3)
    with pytest.raises(UserError, match="train has no class folders"):
        load(image_folder, data=str(tmp_path))


def test_the_usual_names_of_splits_are_known(image_folder, tmp_path):
    before = load(image_folder, data=str(tmp_path))
    for old, new in (("train", "training"), ("valid", "Validation"), ("test", "testing")):
        (image_folder / old).rename(image_folder / new)
    data = load(image_folder, data=str(tmp_path))
    assert data.vocab == before.vocab and all(
        len(getattr(data, o)) == len(getattr(before, o)) for o in ("train", "valid", "test")
    )


def test_folders_beside_the_splits_are_not_left_out_in_silence(image_folder, tmp_path):
    write_images(image_folder / "plane", 3)
    with pytest.raises(UserError, match="has plane/ beside test/"):
        load(image_folder, data=str(tmp_path))


def first_train(data):
    return data.images[data.train[0]]


def test_the_cache_is_used_and_follows_the_files(image_folder, tmp_path):
    first = load(image_folder, data=str(tmp_path / "d"))
    (kept,) = (tmp_path / "d" / "cache").glob("*.npz")
    stamp = kept.stat().st_mtime_ns
    assert (
        load(image_folder, data=str(tmp_path / "d")).images == first.images
    ).all() and kept.stat().st_mtime_ns == stamp
    Image.new("RGB", (50, 50), "white").save(image_folder / "train" / "cat" / "000.png")
    assert (first_train(load(image_folder, data=str(tmp_path / "d"))) == 255).all()
    kept.write_bytes(b"damaged")
    assert (first_train(load(image_folder, data=str(tmp_path / "d"))) == 255).all()


@pytest.mark.parametrize("change", [{"images": np.zeros((5, 32, 32, 3), np.uint8)}, {"bad": np.array([99])}])
def test_a_cache_whose_arrays_do_not_fit_is_made_anew(image_folder, tmp_path, change):
    first = load(image_folder, data=str(tmp_path / "d"))
    (kept,) = (tmp_path / "d" / "cache").glob("*.npz")
    with np.load(kept) as z:
        arrays = dict(z)
    np.savez(kept, **{**arrays, **change})
    assert (load(image_folder, data=str(tmp_path / "d")).images == first.images).all()


def test_a_cache_that_cannot_be_written_is_only_a_warning(image_folder, tmp_path):
    (tmp_path / "d").write_text("a file, not a folder")
    assert len(load(image_folder, data=str(tmp_path / "d")).images) == 72


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is limited as Linux does it")
def test_images_that_do_not_fit_into_memory_are_one_line(image_folder, tmp_path):
    code = f"""import resource
from sifar import TrainConfig, UserError
from sifar.data.datasets import ImageData, load_data
from sifar.data.folder import keep
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, 2 * (used + 40 * 2**20,))
try: load_data(TrainConfig(dataset={str(image_folder)!r}, data={str(tmp_path)!r}, sz=512))
except UserError as e: print(e.text)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        done.stdout
        == f"{image_folder}: 72 images of --sz 512 do not fit into the memory of this machine: "
        "try a smaller --sz.\n"
    ), done.stderr


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "I;16"]
)
def test_any_mode_becomes_rgb(mode):
    img = Image.new("L", (50, 20), 200)
    img = (
        Image.fromarray(np.full((20, 50), 200 * 257, np.uint16))
        if mode == "I;16"
        else img.convert("RGB").convert(mode)
        if mode != "I"
        else img.convert("I")
    )
    x = np.asarray(read_image(img, 32))
    assert x.shape == (32, 32, 3) and x.dtype == np.uint8
    if mode in ("L", "RGB", "RGBA", "I", "F", "I;16", "LA", "P"):
        assert abs(int(x[16, 16, 0]) - 200) <= 4


@pytest.mark.parametrize("kind", ["ICO", "ICNS"])
def test_formats_that_hide_the_size_of_a_picture_are_not_read(kind):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, kind)
    with pytest.raises(UserError, match="not an image that can be read here"):
        read_image(buffer.getvalue(), 32)


def test_a_picture_is_upright_cropped_and_on_white():
    img = Image.new("RGB", (90, 30), "red")
    img.paste("blue", (30, 0, 60, 30))
    # of 90 x 30 pixels, 47 x 27 are seen
    assert (np.asarray(read_image(img, 10))[:, 3:7] == [0, 0, 255]).all(), "the middle of a wide picture"
    assert (np.asarray(read_image(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), 8)) == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to see it upright
    img = Image.new("RGB", (32, 32), "black")
    img.paste("white", (0, 0, 32, 16))
    img.getexif().update(exif)
    assert (np.asarray(read_image(img, 32))[:, 20:] == 255).all()


def test_a_damaged_dtype_does_not_end_the_process(tmp_path, tiny_cifar):
    "NumPy 2.4 crashed on some of these files: the state of a dtype went into its C code unseen."
    good = py2_dumps(cifar_files("cifar100")["train"])
    at = good.index(b"cnumpy\ndtype\n")
    folder = write_cifar(tmp_path, "cifar100")
    rng = random.Random(0)
    for _ in range(150):
        content = bytearray(good)
        for _ in range(2):
            content[at + rng.randrange(80)] = rng.choice((0, 255, rng.randrange(256), *b"NJK(}].0tb"))
        (folder / "train").write_bytes(content)
        with suppress(UserError):
            load(data=str(tmp_path))


def test_images_are_kept_and_counted_without_a_second_copy_of_them(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4096, 32, 32, 3), np.uint8)
    rows, none = np.arange(len(images)), np.arange(0)
    data = ImageData(np.concatenate((images, images)), np.zeros(2 * len(rows), int), ["a"], rows, none, none)
    tracemalloc.start()
    keep(tmp_path / "cache" / "a.npz", images=data.images)
    data.stats()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < data.images.nbytes
