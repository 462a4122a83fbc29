"""Folders of pictures as people have them: read as they are meant, or refused with what would mend it."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import COLD, on_pictures, write_images
from PIL import Image

import export
import train
from sifar import Predictor, TrainConfig, UserError, load_learner
from sifar.data.datasets import load_data
from sifar.data.folder import larger_size, unpack
from sifar.data.image import check_facts, formats, read_image
from sifar.runs import report

PETS = "cat", "dog"
SPLIT = "Train", "test"


def make(root, *folders, n=4):
    "Pictures in each of `folders` below `root`."
    for name in folders:
        write_images(root / name, n, (220, 60, 30) if "cat" in name else (30, 60, 220))
    return root


def load(folder, tmp_path, **kwargs):
    return load_data(TrainConfig(dataset=str(folder), data=str(tmp_path / "data"), **kwargs))


def refusal(folder, tmp_path, **kwargs):
    with pytest.raises(UserError) as e:
        load(folder, tmp_path, **kwargs)
    assert "\n" not in e.value.text
    return e.value.text


def sizes(data):
    return len(data.train), len(data.valid), len(data.test)


def run(*args):
    train.main([str(o) for o in args])


# ---- levels ----


@pytest.mark.parametrize(
    "first, second",
    [
        ("training_set", "test_set"),
        ("Training", "Testing"),
        ("images/train", "images/test"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("asl_alphabet_train", "asl_alphabet_test"),
        ("train_images", "test_images"),
        ("TrainData", "TestData"),
        ("Dataset/pets/TRAIN", "Dataset/pets/TEST"),
    ],
)
def test_splits_are_found_as_they_are_called(tmp_path, first, second):
    make(tmp_path / "pets", *(f"{split}/{c}" for split in (first, second) for c in ("cat", "dog")))
    data = load(tmp_path / "pets", tmp_path, valid_pct=0.25)
    assert data.vocab == ["cat", "dog"] and sizes(data) == (6, 2, 8)


def test_splits_inside_each_class_are_understood(tmp_path):
    make(tmp_path / "pets", *(f"{c}/{split}" for split in ("train", "val") for c in ("cat", "dog")))
    data = load(tmp_path / "pets", tmp_path)
    assert data.vocab == ["cat", "dog"] and sizes(data) == (8, 8, 0)
    cats = data.images[data.train][data.labels[data.train] == 0]
    assert cats[..., 0].mean() > 150 > cats[..., 2].mean(), "cats are the red ones"


def test_a_class_may_be_called_like_a_split(tmp_path):
    make(tmp_path / "things", "steam_train", "test_tube", "car", n=10)
    assert load(tmp_path / "things", tmp_path).vocab == ["car", "steam_train", "test_tube"]


@pytest.mark.parametrize(
    "folders, words",
    [
        (("train_images/cat", "train_images/dog", "test/cat"), "rename train_images/ to train/"),
        (("cat_train", "cat_test", "dog_train", "dog_test"), "rename cat_test/ to test/cat/, cat_train/ to"),
        (("seg_train/cat", "seg_train/dog", "seg_test/cat", "seg_pred"), "seg_pred/ beside .*d/ away.$"),
        (("cat/train", "cat/test", "dog"), "move its images to .*pets/test/cat/"),
        (("cat", "dog", "pets/cat", "pets/dog"), "called like classes beside it .*--dataset .*pets/pets"),
        (("Greek/alpha", "Greek/beta", "Latin/a", "Latin/b", "Latin/c"), "--dataset .*pets/Latin;"),
        (("Dataset/cat", "Dataset/dog", "Examples"), "--dataset .*pets/Dataset;"),
        (("train/cat", "train/dog", "test_set/cat", "train/cat/valid"), "rename test_set/ to test/"),
        (("cat", "dog", "test"), "Move cat/, dog/ into train/, or test/ away, or rename a class .* test.$"),
        (("invalid", "valid"), "rename a class that is called valid.$"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_what_would_mend_it(tmp_path, folders, words):
    text = refusal(make(tmp_path / "pets", *folders), tmp_path)
    assert re.search(words, text), text


@pytest.mark.parametrize("name", ["می\u200cخواهم", "👨\u200d👩\u200d👧", "\xa0new\u3000one", "-rf", "nan"])
def test_names_of_classes_in_any_writing_are_read_and_can_be_exported(tmp_path, name):
    vocab = load(make(tmp_path / "pets", name, "cat"), tmp_path).vocab
    assert vocab == sorted([name, "cat"])
    check_facts({"size": 32, "classes": vocab})


def test_folders_that_are_no_classes_are_named(tmp_path, caplog):
    caplog.set_level("INFO")
    make(tmp_path / "pets", "cat", "dog", "_sample_images", "__pycache__", "@eaDir", n=10)
    (tmp_path / "pets" / "css").mkdir()
    (tmp_path / "pets" / "css" / "page.css").write_text("no picture")
    assert load(tmp_path / "pets", tmp_path).vocab == ["cat", "dog"]
    assert "no classes: _sample_images/, css/" in caplog.text


def test_a_test_set_without_classes_is_left_out_by_name(tmp_path, caplog):
    "As contests have it, and ASL's alphabet: test/test/A_test.jpg."
    caplog.set_level("INFO")
    make(tmp_path / "signs", "signs_train/signs_train/A", "signs_train/signs_train/B", n=10)
    make(tmp_path / "signs", "signs_test/signs_test", n=3)
    (tmp_path / "signs" / "LICENSE").write_text("no picture")
    data = load(tmp_path / "signs", tmp_path)
    assert data.vocab == ["A", "B"] and sizes(data) == (18, 2, 0)
    assert "Not read, as nothing tells the classes of its pictures: signs_test/" in caplog.text
    assert "no class folder" not in caplog.text and "no pictures (): 1" not in caplog.text
    make(tmp_path / "signs", "signs_test/signs_test/A", "signs_test/signs_test/C")
    assert "class 'C' of test/ is missing in train/" in refusal(tmp_path / "signs", tmp_path)


@pytest.mark.parametrize("script", [(), ("--dry-run",), ("--show-batch",)])
def test_every_start_says_classes_counts_and_splits(tmp_path, capsys, script):
    make(tmp_path / "things", *(f"train/c{i:02}" for i in range(12)), "train/c03/more")
    make(tmp_path / "things", *(f"valid/c{i:02}" for i in range(11)), n=1)
    run(*on_pictures(tmp_path / "things", tmp_path), "--bs", 16, *script)
    out = capsys.readouterr().out
    assert "12 classes: c00, c01, c02, c03, c04, ..., c09, c10, c11" in out
    assert "52 train, 11 valid, 0 test; training images of a class: 4 (c00) to 8 (c03)" in out
    assert "No valid image of: c11" in out and "No test image" not in out
    assert "\n\n" not in out, "an empty line"
    assert ("an epoch has but" in out) == (script == ()), "a dry run has one step whatever --bs is"


# ---- what lies in a folder ----


def test_what_sifar_wrote_is_never_data(tmp_path, monkeypatch, capsys):
    home = make(tmp_path / "home", "cat", "dog", n=10)
    small = "--arch", "resnet8", "--epochs", 1
    monkeypatch.chdir(home)
    for _ in range(2):
        run("--dataset", ".", *small)
        run("--dataset", ".", *small[:2], "--show-batch")
    monkeypatch.chdir(tmp_path)
    run("--dataset", home, *small, "--data", home / "data")
    assert capsys.readouterr().out.count("2 classes: cat, dog") == 5
    make(home / "data", "cat", "dog", n=10)
    monkeypatch.chdir(home)
    for _ in range(2):
        run("--dataset", "data", *small)
    assert capsys.readouterr().out.count("16 train, 2 valid, 2 test; ") == 2


def test_links_to_folders_are_followed_and_what_systems_leave_is_not_read(tmp_path):
    make(tmp_path / "pets", "cat", "dog", n=10)
    make(tmp_path, "elsewhere", n=8)
    (tmp_path / "pets" / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    for name in ("@eaDir", "$RECYCLE.BIN", "System Volume Information", ".ipynb_checkpoints"):
        make(tmp_path / "pets" / "dog", name)
    (tmp_path / "pets" / "dog" / "._000.png").write_bytes(b"of a Mac")
    data = load(tmp_path / "pets", tmp_path)
    assert Counter(data.labels.tolist()) == {0: 18, 1: 10}
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "pets")
    assert "is a link to a folder that it lies in" in refusal(tmp_path / "pets", tmp_path)


def test_annotations_are_one_line_and_not_unreadable(tmp_path, caplog):
    caplog.set_level("INFO")
    make(tmp_path / "pets", "images/cat", "images/dog", n=10)
    (tmp_path / "pets" / "labels").mkdir()
    beside = "images/cat/{}.xml", "images/dog/{}.txt", "images/{}.json", "images/{}.MOV", "labels/{}.md"
    for i in range(10):
        for name in beside:
            (tmp_path / "pets" / name.format(i)).write_text("no picture")
    assert len(load(tmp_path / "pets", tmp_path).images) == 20
    assert "no pictures (.json, .mov, .txt, .xml): 40" in caplog.text and "Skipped" not in caplog.text


def test_heic_names_what_to_do(tmp_path):
    make(tmp_path / "pets", "cat", "dog", n=4)
    for i in range(4):
        (tmp_path / "pets" / "cat" / f"{i}.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    text = refusal(tmp_path / "pets", tmp_path)
    assert "4 of 12 files cannot be read" in text and "0.HEIC is HEIC: pip install pillow-heif" in text


@pytest.fixture
def heif(monkeypatch):
    "A function that installs a stand-in for pillow-heif, whose pictures are red."
    for registry in ("ID", "OPEN"):
        monkeypatch.setattr(Image, registry, getattr(Image, registry).copy())

    def read(file, name):
        file.close()
        return Image.new("RGB", (9, 9), "red")

    def register():
        Image.register_open("HEIF", read, lambda head: head[4:12] == b"ftypheic")

    def install():
        monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
        formats.cache_clear()

    yield install
    formats.cache_clear()


def test_heic_is_read_once_pillow_heif_is_installed_though_it_could_not_be_before(tmp_path, heif):
    make(tmp_path / "pets", "cat", "dog", n=8)
    (tmp_path / "pets" / "dog" / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    assert len(load(tmp_path / "pets", tmp_path).images) == 16
    heif()
    data = load(tmp_path / "pets", tmp_path)
    assert (data.images[data.files.index("dog/a.heic")] == [255, 0, 0]).all()


@pytest.mark.skipif(not shutil.which("setpriv"), reason="as root, needs setpriv")
def test_a_class_that_may_not_be_read_is_named(tmp_path):
    make(tmp_path / "pets", "cat", "dog")
    (tmp_path / "pets" / "dog").chmod(0)
    words = [COLD, "-c", "import sys; import sifar.data.layout as o; o.list_folder(o.Path(sys.argv[1]))"]
    if os.geteuid() == 0:  # without the rights that go past those of files
        words = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *words]
    done = subprocess.run([*words, tmp_path / "pets"], capture_output=True, text=True)
    (tmp_path / "pets" / "dog").chmod(0o755)
    assert done.stderr.endswith(f"Permission denied: '{tmp_path}/pets/dog'\n")


def test_a_failed_read_leaves_nothing_behind(tmp_path, capsys):
    make(tmp_path / "pets", "cat")
    with pytest.raises(SystemExit):
        run(*on_pictures(tmp_path / "pets", tmp_path))
    assert "1 class," in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_two_folders_of_one_name_do_not_share_runs_in_silence(tmp_path, capsys):
    for where in ("a", "b"):
        make(tmp_path / where / "pets", "cat", "dog", n=10)
        run(*on_pictures(tmp_path / where / "pets", tmp_path), "--name", where)
    lines = [o for o in capsys.readouterr().out.splitlines() if "also holds runs of" in o]
    assert len(lines) == 1 and str(tmp_path / "a" / "pets") in lines[0]


def test_a_run_goes_on_where_its_folder_was_moved_to(tmp_path, capsys):
    make(tmp_path / "pets", "cat", "dog", n=10)
    run(*on_pictures(tmp_path / "pets", tmp_path), "--name", "a")
    path, new = tmp_path / "runs" / "pets" / "a", tmp_path / "new" / "animals"
    shutil.copytree(tmp_path / "pets", new)
    shutil.rmtree(tmp_path / "pets")
    with pytest.raises(SystemExit):
        run("--resume", path, "--epochs", 2)
    assert "pets is not there: name its new place by --dataset" in capsys.readouterr().err
    report.main([str(path)])
    assert "pets is not there: name its new place by --dataset, for a run by train" in capsys.readouterr().out
    run("--resume", path, "--dataset", new, "--epochs", 2)
    assert json.loads((path / "metrics.json").read_text())["epochs"] == 2
    (path / "metrics.json").unlink()
    report.main([str(path)])
    assert (path / "metrics.json").exists(), "the report finds it"
    make(tmp_path / "other", "cat", "dog", n=11)
    with pytest.raises(SystemExit):
        run("--resume", path, "--dataset", tmp_path / "other")
    assert "was trained on other data" in capsys.readouterr().err


# ---- a table of labels, an archive ----


@pytest.mark.parametrize(
    "rows, expected",
    [
        (["file,label", *(f"{c}/{i:03}.png,{c}" for c in PETS for i in range(10))], (16, 2, 2)),
        (["id;breed", *(f"images/{c}{i};{c}" for c in PETS for i in range(10))], (16, 2, 2)),
        (["width,class id,Image", *(f"32,{c},{c}{i}" for c in PETS for i in range(10))], (16, 2, 2)),
        ([f"{c}{i}.png,{c}" for c in PETS for i in range(10)], (16, 2, 2)),
        (["x,y,Path,ClassId", *(f"{i % 2:03},9,{c}{i},{c}" for c in PETS for i in range(10))], (16, 2, 2)),
        (
            ["name,label,is_valid", *(f"{c}{i},{c},{i > 7}" for c in PETS for i in range(10))],
            (16, 4, 0),
        ),
        (
            ["split,file,x", *(f"{SPLIT[i > 6]},{c}{i},{c}" for c in PETS for i in range(10))],
            (12, 2, 6),
        ),
    ],
)
def test_a_table_says_what_each_picture_is(tmp_path, caplog, rows, expected):
    caplog.set_level("INFO")
    for c in (*PETS, "fish"):
        make(tmp_path / "pets", c, n=10)
        for i in range(10):
            (tmp_path / "pets" / "images").mkdir(exist_ok=True)
            shutil.copy(tmp_path / "pets" / c / f"{i:03}.png", tmp_path / "pets" / "images" / f"{c}{i}.png")
    table = tmp_path / "pets" / "labels.csv"
    table.write_text("\n".join(rows))
    data = load(tmp_path / "pets", tmp_path, labels=str(table))
    assert data.vocab == ["cat", "dog"] and sizes(data) == expected
    cats = data.images[data.labels == 0]
    assert cats[..., 0].mean() > 150 > cats[..., 2].mean(), "cats are the red ones"
    assert "Not read, as the table lacks them: 40" in caplog.text


@pytest.mark.parametrize(
    "rows, words",
    [
        (["file,label", "000,cat", "099.png,dog"], "row 3: there is no picture '099.png'"),
        (["file,label", "000,cat", "001,"], "row 3: '' is no name of a class"),
        (["file,label", "000,cat", "001,dog", "000.png,dog"], "row 4: 000.png is dog here, but cat in row 2"),
        (["file,label", "000,cat", "001"], "row 3 has 1 of 2 columns"),
        (["file,label,split", "000,cat,train", "001,dog,later"], "row 3: split is 'later', but should"),
        (["file,a,b", "000,cat,1", "001,dog,2"], "which column is the class? Call it label; there are: a, b"),
        (["file,label", "x,cat", "y,dog"], "no column (file, label) names pictures in"),
        (["file,label", "000,cat", "001,cat"], "1 class, but training needs two"),
        (["file,label", "000,cat", "002,dog"], "row 3: '002' may be"),
        ([""], "is empty"),
    ],
)
def test_what_is_wrong_in_a_table_is_named_with_its_row(tmp_path, rows, words):
    make(tmp_path / "pets", "", n=3)
    make(tmp_path / "pets", "more", n=3)
    for i in range(2):
        (tmp_path / "pets" / "more" / f"00{i}.png").unlink()
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(rows))
    assert words in refusal(tmp_path / "pets", tmp_path, labels=str(table))


def test_of_pictures_of_one_name_those_to_train_on_are_proposed(tmp_path):
    make(tmp_path / "contest", "test", "train")
    (tmp_path / "contest" / "train.csv").write_text("id,breed\n000,pug\n001,boxer\n")
    text = refusal(tmp_path / "contest", tmp_path, labels=str(tmp_path / "contest" / "train.csv"))
    assert f"name the folder of one as the data set, --dataset {tmp_path / 'contest' / 'train'}," in text


def test_pictures_in_one_folder_beside_a_table_name_the_flag(tmp_path):
    make(tmp_path / "pets", "images")
    (tmp_path / "pets" / "train.csv").write_text("id,label")
    (tmp_path / "pets" / "sample_submission.csv").write_text("id,label")
    assert f"add --labels {tmp_path / 'pets' / 'train.csv'}" in refusal(tmp_path / "pets", tmp_path)
    make(tmp_path / "pets", "train", "test")
    shutil.rmtree(tmp_path / "pets" / "images")
    text = refusal(tmp_path / "pets", tmp_path)
    assert f"train has no class folders: if a table says which is which, add --labels {tmp_path}" in text
    assert "labels.csv is missing" in refusal(tmp_path / "pets", tmp_path, labels="labels.csv")
    with pytest.raises(UserError, match="--labels is for folders of images"):
        TrainConfig(dataset="digits", labels="labels.csv")


@pytest.mark.parametrize("kind", ["zip", "gztar"])
def test_an_archive_is_taken_as_the_folder_in_it(tmp_path, kind, capsys):
    make(tmp_path / "pets", "train/cat", "train/dog", "test/cat", "test/dog", n=10)
    file = shutil.make_archive(str(tmp_path / "pictures"), kind, tmp_path, "pets")
    shutil.rmtree(tmp_path / "pets")
    for _ in range(2):
        run(*on_pictures(file, tmp_path))
    out = capsys.readouterr().out
    assert out.count("18 train, 2 valid, 20 test; ") == 2 and out.count("Unpacking") == 1
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[: len(content) // 2])
    assert "cannot be unpacked" in refusal(file, tmp_path)
    kept = [o.name for o in (tmp_path / "cache").iterdir() if o.is_dir()]
    assert len(kept) == 1, "nothing of the damaged one"


@pytest.mark.parametrize("name", ["pets\\{}\\{}.png", "pets/{}/{}.png", "pets/{}/no..{}.png"])
def test_zip_files_of_windows_and_of_macs_are_read(tmp_path, name):
    picture = tmp_path / "a.png"
    Image.new("RGB", (9, 9)).save(picture)
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as file:
        for c, i in product(PETS, range(3)):
            member = zipfile.ZipInfo("-")
            member.filename = name.format(c, i)  # ZipInfo itself turns backslashes round, on Windows alone
            file.writestr(member, picture.read_bytes())
            file.writestr(f"__MACOSX/pets/{c}/._{i}.png", b"of a Mac")
        file.writestr("../pets/../../out.txt", b"out of it")
    data = load(tmp_path / "pets.zip", tmp_path)
    assert data.vocab == ["cat", "dog"] and len(data.images) == 6
    assert not [*tmp_path.glob("out.txt"), *tmp_path.parent.glob("out.txt")]


def test_a_zip_file_with_a_password_and_archives_in_a_folder_are_told(tmp_path):
    make(tmp_path / "pets", "cat", "dog")
    inner = shutil.make_archive(str(tmp_path / "set" / "pets"), "zip", tmp_path / "pets")
    text = refusal(tmp_path / "set", tmp_path)
    assert "0 classes" in text and f"archives there, such as {inner}, or give --dataset {inner}" in text
    outer = shutil.make_archive(str(tmp_path / "outer"), "zip", tmp_path / "set")
    assert "unpack the archives there, such as" in refusal(outer, tmp_path)
    (tmp_path / "rar").mkdir()
    shutil.copy(inner, tmp_path / "rar" / "pets.rar")
    assert "pets.rar" in (text := refusal(tmp_path / "rar", tmp_path)) and "give --dataset" not in text
    content = bytearray(Path(inner).read_bytes())
    for at in (found.start() for found in re.finditer(rb"PK\x01\x02", content)):
        content[at + 8] |= 1  # the flag of a password
    Path(inner).write_bytes(content)
    assert refusal(inner, tmp_path).endswith("pets.zip has a password: unpack it, and name the folder.")


def test_an_archive_is_unpacked_by_two_at_once_and_may_have_a_long_name(tmp_path):
    for name in ("cat", "dog"):
        write_images(tmp_path / "pets" / name, 3)
    path = Path(shutil.make_archive(tmp_path / ("p" * 251), "zip", tmp_path / "pets"))
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: unpack(path, tmp_path / "cache"), range(8)))
    assert [o.name for o in (tmp_path / "cache").iterdir() if o.is_dir()] == [o.name for o in folders]
    assert len(load_data(TrainConfig(dataset=str(path), data=str(tmp_path))).images) == 6


def test_folders_that_lie_too_deep_are_refused_in_one_line(tmp_path):
    write_images(tmp_path / "cat" / "/".join("x" * 150), 1)
    with pytest.raises(UserError, match="lies deeper than 100 folders"):
        load_data(TrainConfig(dataset=str(tmp_path)))


def test_a_link_that_leads_nowhere_is_skipped_by_name(tmp_path, caplog):
    make(tmp_path / "pets", "cat", "dog", n=10)
    (tmp_path / "pets" / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert len(load(tmp_path / "pets", tmp_path).images) == 20
    assert "gone.png, which is missing" in caplog.text


# ---- the report ----


def test_the_report_names_the_files_that_are_mistaken_and_a_command_that_runs(tmp_path, monkeypatch):
    home = make(tmp_path / "digits", "train/cat", "train/dog", "test/cat", "test/dog", n=10)
    make(tmp_path / "wrong", "cat", n=1)
    (tmp_path / "wrong" / "cat" / "000.png").rename(home / "test" / "dog" / "a cat.png")
    small = "--data", tmp_path, "--arch", "resnet8", "--epochs", 8, "--lr", 0.02, "--bs", 8
    args = "--dataset", home, *small, "--runs", tmp_path / "runs", "--name", "a"
    monkeypatch.setattr("sys.argv", ["/somewhere/train.py", *map(str, args)])
    run(*args)
    text = (tmp_path / "runs" / "digits" / "a" / "report.html").read_text()
    top = text[text.index("<h2>Top losses") :]
    assert re.search(r"<td>test/dog/a cat.png</td>\s*<td>dog</td>\s*<td>cat</td>", top)
    assert top.index("a cat.png") < top.index("000.png"), "the worst is the first"
    confusions = text[text.index("<h2>Confusions") : text.index("<h2>Top losses")]
    assert re.search(r"dog as cat: 1\s*<br><code>test/dog/a cat.png</code>", confusions)
    (command,) = re.findall(r"<code>(python .*)</code></p>", text)
    assert command.startswith("python train.py --dataset ./digits --data ")
    assert "with the path to digits from there" in text and str(tmp_path) not in text


def test_a_report_without_its_table_says_so_and_names_no_folder(tmp_path):
    make(tmp_path / "pets", "cat", "dog", n=10)
    table = tmp_path / "kept" / "labels.csv"
    table.parent.mkdir()
    table.write_text("\n".join(["file,label", *(f"{c}/00{i}.png,{c}" for c in PETS for i in range(10))]))
    run(*on_pictures(tmp_path / "pets", tmp_path), "--labels", table, "--name", "a")
    table.unlink()
    report.main([str(tmp_path / "runs" / "pets" / "a")])
    text = (tmp_path / "runs" / "pets" / "a" / "report.html").read_text()
    assert "<strong>labels.csv is missing.</strong>" in text and str(tmp_path) not in text


# ---- how large, and how a picture becomes square ----


def test_a_larger_size_is_proposed_for_large_pictures_alone(tmp_path, capsys):
    for name, size in (("large", (300, 200)), ("small", (90, 60))):
        for c in PETS:
            write_images(tmp_path / name / c, 10, size=size)
    run(*on_pictures(tmp_path / "small", tmp_path), "--mirror", "auto", "--name", "a")
    run(*on_pictures(tmp_path / "large", tmp_path), "--sz", 48)
    assert larger_size(200, 10**7) is None, "no machine can train it"
    assert "--sz" not in capsys.readouterr().out, "small, or one was given"
    run(*on_pictures(tmp_path / "large", tmp_path), "--dry-run")
    assert "some 200 pixels: --sz 128 shows more of them, 16 times as slowly" in capsys.readouterr().out
    run("--resume", tmp_path / "runs" / "small" / "a", "--epochs", 2)
    assert "--mirror" not in capsys.readouterr().out, "what was chosen is not told again"


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_a_picture_becomes_square_alike_in_training_and_in_use(tmp_path, fit):
    thirds = np.zeros((40, 120, 3), np.uint8)  # red, green and blue, from left to right
    for i in range(3):
        thirds[:, 40 * i : 40 * i + 40, i] = 255
    for c in PETS:
        make(tmp_path / "pets", c, n=10)
        Image.fromarray(thirds).save(tmp_path / "pets" / c / "a.png")
    run(*on_pictures(tmp_path / "pets", tmp_path), "--fit", fit, "--name", "a")
    path = tmp_path / "runs" / "pets" / "a"
    export.main([str(path)])
    data = load(tmp_path / "pets", tmp_path, fit=fit)
    trained, predictor = data.images[data.files.index("cat/a.png")], Predictor(path)
    assert predictor.confidence is None, "two images of valid are too few to say when it is sure"
    assert (np.asarray(predictor.read(thirds)) == trained).all()
    reader = load_learner(path / "learner.pkl").dls.valid.dataset.tls[0].tfms[0]
    assert (np.asarray(reader(thirds)) == trained).all()
    at = {
        "crop": [(16, 1, [0, 255, 0]), (16, 30, [0, 255, 0]), (1, 16, [0, 255, 0])],
        "pad": [(16, 1, [255, 0, 0]), (16, 30, [0, 0, 255]), (1, 16, [127, 127, 127])],
        "squash": [(16, 1, [255, 0, 0]), (16, 30, [0, 0, 255]), (1, 16, [0, 255, 0])],
    }[fit]
    assert [trained[y, x].tolist() for y, x, _ in at] == [colour for *_, colour in at]
    seen = predictor.probs([trained])[0].max()
    assert predictor.predict(thirds, k=1)[0][1] == pytest.approx(seen, abs=1e-6)
    assert json.loads((path / "model.json").read_text())["fit"] == fit


def test_a_long_thin_picture_is_padded(tmp_path):
    x = np.asarray(read_image(np.full((1, 900, 3), 255, np.uint8), 32, fit="pad"))
    assert (x == 255).all((1, 2)).sum() == 1 and (x == 127).all((1, 2)).sum() == 31


def test_trainings_of_several_seeds_say_once_what_they_share(tmp_path, capsys):
    make(tmp_path / "pets", "cat", "dog", n=10)
    (tmp_path / "pets" / "cat" / "notes.txt").write_text("no picture")
    auto = "--mirror", "auto", "--init", "cifar100", "--arch", "auto"
    run(*on_pictures(tmp_path / "pets", tmp_path), *auto, "--seeds", 2, "--name", "a")
    out = capsys.readouterr().out
    shared = "--mirror off", "as its head recognises", "parameters;"
    for words in "2 classes: cat, dog", "no pictures (.txt): 1", *shared:
        assert out.count(words) == 1, words
    for words in "train loss", "test   top-1", "Training in":
        assert out.count(words) == 2, words
    assert out.count("1 epoch of 1 x 16 images") == 1


def test_a_class_beside_others_may_be_called_train(tmp_path):
    names = "bus", "car", "train"
    assert load(make(tmp_path / "flat", *names), tmp_path).vocab == [*names]
    folders = [f"{split}/{name}" for split in ("train", "test") for name in names]
    data = load(make(tmp_path / "split", *folders), tmp_path)
    assert data.vocab == [*names] and sizes(data)[2] == 12
    # one folder of loose pictures beside it is no second class
    text = refusal(make(tmp_path / "loose", "train", "more"), tmp_path)
    assert "rename a class that is called train" in text


def test_many_classes_beside_train_are_refused_in_a_short_line(tmp_path):
    folders = "train/cat", "train/dog", *(f"class{i}" for i in range(99))
    text = refusal(make(tmp_path / "things", *folders), tmp_path)
    assert "class0/, class1/, class10/" in text and len(text) < 400


def test_a_file_that_is_no_archive_is_not_said_to_be_missing(tmp_path):
    (tmp_path / "cats.txt").write_text("cats")
    assert refusal(tmp_path / "cats.txt", tmp_path).endswith("a zip or tar file; this file is none of them)")
