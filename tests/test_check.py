"""The check of a data set: planted twins and odd images are found, and a table of fixes is obeyed."""

import csv
import io
import json
import re

import numpy as np
import pytest
from conftest import on_pictures
from PIL import Image
from sklearn.datasets import load_sample_images
from sklearn.kernel_ridge import KernelRidge

import train
from sifar import TrainConfig
from sifar.data import twins
from sifar.data.datasets import load_data
from sifar.log import counted
from sifar.runs import check, report
from sifar.runs.doubts import RIDGE, WIDTH, by_all_others, doubted, far_from_others, standard, unlike


def tiles(n, side=64):
    "`n` different pictures, cut from two photographs."
    found = [
        Image.fromarray(photo[y : y + side, x : x + side])
        for photo in load_sample_images().images
        for y in range(0, 420 - side, side)
        for x in range(0, 640 - side, side)
    ]
    # not those of the sky, which are of one colour
    return [o for o in found if np.asarray(o.convert("L")).std() > 30][:n]


def cropped(img):
    return img.crop((4, 1, 62, 59))


@pytest.fixture
def pets(tmp_path, monkeypatch):
    "A folder with planted faults, of which each is named by the file."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SIFAR_DATA", str(tmp_path / "data"))
    root = tmp_path / "pets"
    images = tiles(40)
    for i, img in enumerate(images):
        folder = root / ("test" if i % 4 == 0 else "train") / ("cat" if i < 20 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        img.save(folder / f"{i:02}.png")
    cats, dogs = root / "train" / "cat", root / "train" / "dog"
    (cats / "same.png").write_bytes((cats / "01.png").read_bytes())
    Image.open(cats / "03.png").save(cats / "pixels.png", compress_level=1)
    Image.open(root / "test" / "cat" / "00.png").save(cats / "encoded.jpg", quality=60)
    Image.open(cats / "02.png").resize((40, 40)).save(cats / "resized.png")
    Image.open(dogs / "21.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(dogs / "mirrored.png")
    cropped(Image.open(dogs / "22.png")).save(cats / "cropped.png")
    Image.new("RGB", (64, 64), "red").save(dogs / "red.png")
    return root


def run(*args):
    check.main([str(o) for o in args])


def rows_of(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def test_planted_twins_and_odd_images_are_found_and_nothing_else(pets, tmp_path, capsys):
    before = {path: path.read_bytes() for path in pets.rglob("*.*")}
    run(pets, "--html")
    found = {
        (o["finding"], *sorted((o["image"], o["other"])))
        for o in rows_of(tmp_path / "runs" / "pets" / "check" / "check.csv")
    }
    assert found == {
        ("same file", "train/cat/01.png", "train/cat/same.png"),
        ("same pixels", "train/cat/03.png", "train/cat/pixels.png"),
        ("near twin", "test/cat/00.png", "train/cat/encoded.jpg"),
        ("near twin", "train/cat/02.png", "train/cat/resized.png"),
        ("near twin", "train/dog/21.png", "train/dog/mirrored.png"),
        ("near twin", "train/cat/cropped.png", "train/dog/22.png"),
        ("one colour", "", "train/dog/red.png"),
    }
    assert {path: path.read_bytes() for path in pets.rglob("*.*")} == before
    out = capsys.readouterr().out
    assert "near twin: 4 pairs, 1 of two classes; images of test with one in train or valid: 1" in out
    page = (tmp_path / "runs" / "pets" / "check" / "check.html").read_text()
    assert page.count("<img") == 2 * 6 + 1 and "test/cat/00.png" not in page.split("<h2>")[1]


def test_mirror_images_are_no_twins_where_left_and_right_make_the_class(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in "left", "right":
        (tmp_path / "signs" / name).mkdir(parents=True)
    for i, img in enumerate(tiles(40)):
        img.paste("yellow", (0, 16, 20, 48))
        img.save(tmp_path / "signs" / "left" / f"{i}.png")
        img.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "signs" / "right" / f"{i}.png")
    run("signs")
    out = capsys.readouterr().out
    assert "are recognised when mirrored" in out and "near twin" not in out
    assert "Nothing odd was found" in out and "Write drop" not in out
    assert not load_data(TrainConfig(dataset="signs", mirror="off")).mirrored


def test_fixes_are_obeyed_and_recorded_and_an_edited_table_is_kept(pets, tmp_path, capsys):
    run(pets)
    path = tmp_path / "runs" / "pets" / "check" / "check.csv"
    text = path.read_text().splitlines()
    edited = [
        o.replace("keep,", "relabel,cat") if "cropped" in o else o.replace("keep", "drop") for o in text[1:]
    ]
    path.write_text("\n".join([text[0], *edited]))
    plain = load_data(TrainConfig(dataset=str(pets)))
    fixed = load_data(TrainConfig(dataset=str(pets), fixes=str(path)))
    named = dict(zip(plain.names, range(len(plain.names))))
    gone = {*plain.train, *plain.valid, *plain.test} - {*fixed.train, *fixed.valid, *fixed.test}
    dropped = (
        "cat/same.png",
        "cat/pixels.png",
        "cat/encoded.jpg",
        "cat/resized.png",
        "dog/mirrored.png",
        "dog/red.png",
    )
    assert gone == {named[f"train/{name}"] for name in dropped}, "of a twin in test, the one in train goes"
    changed = np.flatnonzero(plain.labels != fixed.labels)
    assert changed.tolist() == [named["train/dog/22.png"]] and fixed.labels[changed[0]] == 0
    with pytest.raises(SystemExit):
        run(pets)
    assert "has been edited" in capsys.readouterr().err

    train.main([str(o) for o in on_pictures(pets, tmp_path)] + ["--fixes", str(path), "--name", "a"])
    folder = tmp_path / "runs" / "pets" / "a"
    about = json.loads((folder / "config.json").read_text())
    assert about["data"]["fixes"] == {"file": "check.csv", "drop": 6, "relabel": 1}
    assert about["settings"]["fixes"] == str(path)
    report.main([str(folder)])
    path.write_text(path.read_text().replace("relabel,cat", "keep,"))
    with pytest.raises(SystemExit):
        train.main(["--resume", str(folder), "--epochs", "2"])
    assert "was trained on other data" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffImage;Action;New_Class\r\ntrain/dog/22.png;Relabel;cat\r\ntrain/cat/02.png;DROP;\r\n",
        "NEW_CLASS\tIMAGE\tACTION\ncat\ttrain/dog/22.png\trelabel\n\n\ttrain/cat/02.png\tdrop\n",
    ],
)
def test_a_table_that_a_spreadsheet_saved_is_obeyed(pets, tmp_path, text):
    path = tmp_path / "fixes.csv"
    path.write_text(text, encoding="utf-8")
    data = load_data(TrainConfig(dataset=str(pets), fixes=str(path)))
    named = dict(zip(data.names, range(len(data.names))))
    assert data.labels[named["train/dog/22.png"]] == data.vocab.index("cat")
    assert named["train/cat/02.png"] not in {*data.train, *data.valid, *data.test}
    assert data.fixes == {"file": "fixes.csv", "drop": 1, "relabel": 1}


ODD_NAMES = (
    "=1+1", "+1", "-1", "@SUM(1)", " =2", "\t=3", "\r4", "\n5", "\u3000＝6", "'=7", "''-8", " blanks ",
    "a,b;c", '"',
)  # fmt: skip


def test_no_cell_of_the_check_is_a_formula_and_its_images_are_found_by_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, classes = tmp_path / "odd", ["=cat", "'-dog "]
    folder.mkdir()
    rows = [["file", "label"]]
    for i, img in enumerate(tiles(2 * len(ODD_NAMES))):
        name = f"{ODD_NAMES[i // 2]}.png" if i % 2 else f"plain {i}.png"
        img.save(folder / name, "png")
        rows.append([name, classes[i // 2 % 2].strip()])
        (folder / f"twin {i}.png").write_bytes((folder / name).read_bytes())
        rows.append([f"twin {i}.png", classes[i // 2 % 2].strip()])
    with open(tmp_path / "labels.csv", "w", newline="") as f:
        csv.writer(f).writerows(rows)
    run(folder, "--labels", tmp_path / "labels.csv")
    path = tmp_path / "runs" / "odd" / "check" / "check.csv"
    found = rows_of(path)
    assert not [cell for row in found for cell in row.values() if re.match(r"\s*[=+\-@＝]|[\t\r\n]", cell)]
    for row in found:
        row.update(action="drop" if row["other"] == "" else "relabel", new_class="'=cat")
    with open(path, "w", newline="") as f:
        table = csv.DictWriter(f, found[0])
        table.writeheader()
        table.writerows(found)
    cfg = TrainConfig(dataset=str(folder), labels=str(tmp_path / "labels.csv"), fixes=str(path))
    data = load_data(cfg)
    assert data.fixes["relabel"] == len(rows) // 2 and set(data.vocab) == {"=cat", "'-dog"}


def test_report_and_start_say_what_has_twins(pets, tmp_path, capsys):
    train.main([str(o) for o in on_pictures(pets, tmp_path)] + ["--name", "a"])
    out = capsys.readouterr().out
    assert "1 of 10 test images have a twin in train or valid; to see them: python -m sifar.check" in out
    folder = tmp_path / "runs" / "pets" / "a"
    metrics = json.loads((folder / "metrics.json").read_text())
    n, top1 = metrics["without_twins"]["images"], metrics["without_twins"]["top1"]
    right = 10 * metrics["test"]["top1"]
    assert n == 9 and round(9 * top1) in (round(right), round(right) - 1)
    page = (folder / "report.html").read_text()
    assert "1 of 10 test images have a twin in train or valid; top-1 of" in page


def test_a_training_on_many_images_does_not_wait_for_near_twins(pets, tmp_path, monkeypatch):
    monkeypatch.setattr(twins, "QUICK", 0)
    data, cache = load_data(TrainConfig(dataset=str(pets))), tmp_path / "cache"
    assert not twins.tested_twins(data, cache, wait=False).any()
    assert twins.tested_twins(data, cache).sum() == 1
    assert twins.tested_twins(data, cache, wait=False).sum() == 1, "once found, it is kept"


def test_swapped_labels_are_doubted_and_few_others():
    "A model is sure of most images, and wrong about a tenth, of which it is not sure."
    rng = np.random.default_rng(0)
    true = rng.integers(0, 3, 600)
    probs = rng.dirichlet(np.ones(3), 600) * 0.3 + 0.7 * np.eye(3)[true]
    swapped, unsure = rng.choice(600, (2, 60), replace=False)
    probs[unsure] = 0.5 * np.eye(3)[(true[unsure] + 1) % 3] + 0.4 * np.eye(3)[true[unsure]] + 0.1 / 3
    labels = true.copy()
    labels[swapped] = (true[swapped] + 1) % 3
    doubt, new, margin = doubted(probs, labels)
    hits = np.isin(np.flatnonzero(doubt), swapped)
    assert hits.sum() >= 0.7 * 60 and hits.mean() >= 0.9
    assert (new[doubt] == true[doubt]).mean() >= 0.9 and margin[doubt].min() > 0.4


def test_swapped_labels_are_told_by_the_features_of_other_images():
    rng = np.random.default_rng(0)
    true = rng.integers(0, 3, 600)
    features = standard(np.eye(8)[true] + rng.normal(0, 0.15, (600, 8)))
    labels, swapped = true.copy(), rng.choice(600, 30, replace=False)
    labels[swapped] = (true[swapped] + 1) % 3
    doubt, new, _ = unlike(features, labels)
    assert doubt[swapped].mean() >= 0.7 and np.isin(np.flatnonzero(doubt), swapped).mean() >= 0.7
    assert (new[swapped] == true[swapped]).mean() >= 0.9


def test_an_image_is_judged_as_if_only_all_others_were_known():
    rng = np.random.default_rng(0)
    x, labels = standard(rng.normal(0, 1, (40, 8))), rng.integers(0, 3, 40)
    of_class = np.eye(3, dtype=np.float32)[labels]
    scores, others = by_all_others(x, of_class), np.arange(40) != 7
    model = KernelRidge(alpha=RIDGE, kernel="rbf", gamma=WIDTH).fit(x[others], of_class[others])
    assert scores[7] == pytest.approx(model.predict(x[7:8])[0], abs=1e-4)


def test_what_is_like_nothing_else_is_far_from_all_others():
    rng = np.random.default_rng(0)
    features = np.eye(8)[rng.integers(0, 3, 300)] + rng.normal(0, 0.1, (300, 8))
    features[7] = np.eye(8)[5]
    far, alike = far_from_others([features[:, :6].astype(np.float32), features[:, 6:].astype(np.float32)])
    assert far[7] and far.sum() < 9 and alike.argmin() == 7


def test_an_image_of_another_thing_is_found(exported, pets, tmp_path):
    run(pets, "--model", exported[0], "--html")
    folder = tmp_path / "runs" / "pets" / "check"
    far = [o["image"] for o in rows_of(folder / "check.csv") if o["finding"] == "far from all others"]
    assert "train/dog/red.png" in far and len(far) <= 3
    assert "far from all others" in (folder / "check.html").read_text()


def test_a_model_of_other_classes_judges_by_what_it_sees(exported, pets, tmp_path, capsys):
    for i in ("05", "06", "07"):
        Image.open(pets / "train" / "cat" / f"{i}.png").rotate(2).save(pets / "train" / "dog" / f"{i}.png")
    run(pets, "--model", exported[0])
    path = tmp_path / "runs" / "pets" / "check" / "check.csv"
    doubts = [o for o in rows_of(path) if o["finding"] == "doubted label"]
    assert doubts and all({o["class"], o["new_class"]} == {"cat", "dog"} for o in doubts)
    assert f"doubted label: {counted(len(doubts), 'image')}" in capsys.readouterr().out


def test_a_model_of_the_same_classes_judges_what_it_has_not_learned(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("digits", "--model", exported[0])
    doubts = rows_of(tmp_path / "runs" / "digits" / "check" / "check.csv")
    doubts = [o for o in doubts if o["finding"] == "doubted label"]
    assert doubts and {o["split"] for o in doubts} == {"test"}


@pytest.mark.parametrize(
    "line, words",
    [
        ("train/cat/77.png,drop,", "line 2: the data set has no image 'train/cat/77.png'"),
        ("train/cat/01.png,relabel", "line 2: Unknown class ''"),
        ("train/cat/01.png,remove,", "line 2: action 'remove' should be one of keep, drop, relabel"),
        ("train/cat/01.png,relabel,dgo", "line 2: Unknown class 'dgo': did you mean dog"),
        ("train/cat/01.png,relabel,dog\ntrain/cat/01.png,relabel,cat", "line 3: .*relabelled otherwise"),
    ],
)
def test_a_wrong_table_ends_in_one_line(pets, tmp_path, capsys, line, words):
    (tmp_path / "fixes.csv").write_text(f"image,action,new_class\n{line}\n")
    with pytest.raises(SystemExit):
        train.main(["--dataset", str(pets), "--fixes", str(tmp_path / "fixes.csv"), "--dry-run"])
    err = capsys.readouterr().err
    assert re.search(words, err) and err.count("\n") == 1


def test_a_file_that_was_cut_off_is_told(pets, tmp_path, capsys):
    buffer = io.BytesIO()
    tiles(1)[0].save(buffer, "JPEG")
    (pets / "train" / "dog" / "half.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    run(pets, "--html")
    assert "1 file cannot be read" in capsys.readouterr().out
    assert "half.jpg" in (tmp_path / "runs" / "pets" / "check" / "check.html").read_text()
