import csv
import io
import json
import re
import shutil
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import on_pictures, write_cifar, write_images
from PIL import Image

import train
from sifar import TrainConfig, UserError, get_dls, get_learner
from sifar.data.datasets import ImageData
from sifar.data.loaders import make_dls
from sifar.plots import bars
from sifar.runs import page, report
from sifar.runs.calibration import (
    calibration_error,
    fit_confidence,
    fit_temperature,
    judge,
    reliability,
    unknown_figures,
    with_temperature,
)
from sifar.runs.load import load_last, load_run, new_learner
from sifar.runs.run import Run
from sifar.training.callbacks import RunLog

SECTIONS = "Training", "Calibration", "Classes", "Confusions", "Top losses", "Settings", "Versions"


def run(*args):
    train.main([str(o) for o in args])


@pytest.fixture
def finished(run_folder, tmp_path):
    "A copy of a finished run, to be spoilt."
    return shutil.copytree(run_folder, tmp_path / "copy")


def pictures(text):
    "The pictures in a page, opened."
    import base64

    return [
        Image.open(io.BytesIO(base64.b64decode(o)))
        for o in re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    ]


def test_training_leaves_a_page_that_needs_nothing_else(run_folder):
    text = (run_folder / "report.html").read_text()
    assert [o for o in SECTIONS if f"<h2>{o}</h2>" in text] == list(SECTIONS)
    assert len(text) < 3_000_000 and not re.search(r'(src|href)="(?!data:)|url\(|@import|<script', text)
    assert len(pictures(text)) > 8 and all(o.size[0] >= 32 for o in pictures(text))
    assert str(run_folder.parents[1]) not in text, "no path of this machine"


def test_the_page_says_how_many_processes_trained_and_whose_images_batchnorm_saw(finished):
    about = json.loads((finished / "config.json").read_text())
    (finished / "config.json").write_text(json.dumps({**about, "processes": 2}))
    report.main([str(finished)])
    assert "2, BatchNorm local to each" in (finished / "report.html").read_text()
    synchronised = {"processes": 2, "settings": {**about["settings"], "sync_bn": True}}
    assert page.settings(synchronised)["versions"]["processes"] == "2, BatchNorm synchronised"


def test_the_figures_are_those_of_fastai(run_folder):
    learn, metrics = load_run(run_folder), json.loads((run_folder / "metrics.json").read_text())
    with learn.no_bar():
        for i, name in ((1, "valid"), (2, "test")):
            assert [metrics[name][o] for o in ("loss", "top1", "top5", "balanced")] == pytest.approx(
                list(learn.validate(i)), abs=1e-4
            )
    o = report.Predictions(learn, "test")
    assert o.metrics() == pytest.approx(metrics["test"], abs=1e-4) and len(o.rows) == len(o.probs) == 359
    text = (run_folder / "report.html").read_text()
    assert metrics["test"]["ece"] == pytest.approx(calibration_error(o.probs, o.targs))
    assert (
        all(f"{100 * metrics['test'][o]:.2f}" in text for o in ("top1", "ece"))
        and f"Epoch {metrics['best_epoch']} was chosen on valid" in text
    )


@pytest.mark.parametrize("classes, spread", [(3, 4), (100, 7)])
def test_of_what_a_model_is_sure_five_in_six_are_right_and_few_known_pictures_are_unknown(classes, spread):
    rng = np.random.default_rng(0)
    targs = rng.integers(0, classes, 4000)
    logits = rng.normal(size=(4000, classes))
    unknown = torch.tensor(rng.normal(size=(4000, classes)) / 2).softmax(1).numpy()
    logits[np.arange(4000), targs] += spread * rng.random(4000)
    probs = torch.tensor(logits).softmax(1).numpy()
    confidence = fit_confidence(probs, targs)
    verdicts, right = judge(probs, confidence), probs.argmax(1) == targs
    assert (verdicts == "unknown").mean() == pytest.approx(0.05, abs=0.001)
    assert right[verdicts == "sure"].mean() == pytest.approx(5 / 6, abs=0.01)
    assert (judge(unknown, confidence) == "sure").mean() < (verdicts == "sure").mean() / 2
    figures = unknown_figures(probs, unknown)
    assert figures["pass"] == pytest.approx((judge(unknown, confidence) != "unknown").mean(), abs=0.002)
    assert 0.6 < figures["auroc"] < 1 and unknown_figures(probs, probs)["auroc"] == pytest.approx(0.5)


def test_metrics_and_page_say_how_well_unknown_images_are_told(run_folder):
    metrics, learn = json.loads((run_folder / "metrics.json").read_text()), load_run(run_folder)
    valid, test = (report.Predictions(learn, split) for split in ("valid", "test"))
    assert metrics["confidence"] == pytest.approx(fit_confidence(valid.probs, valid.targs), abs=1e-3)
    verdicts = judge(test.probs, metrics["confidence"])
    assert (test.preds == test.targs)[verdicts == "sure"].mean() > 0.8
    unknown = metrics["unknown"]
    assert unknown["images"] == "tiles of photographs" and 0 <= unknown["pass"] <= 1
    assert f"AUROC {unknown['auroc']:.3f}" in (run_folder / "report.html").read_text()


def test_the_command_writes_the_same_again(finished, capsys):
    before = json.loads((finished / "metrics.json").read_text())
    for o in ("metrics.json", "report.html"):
        (finished / o).unlink()
    report.main([str(finished)])
    after = json.loads((finished / "metrics.json").read_text())
    for o in ("test", "valid"):
        assert after.pop(o) == pytest.approx(before.pop(o))
    assert after == before
    assert (finished / "report.html").exists() and "report.html" in capsys.readouterr().out


def test_a_run_on_cifar100_has_a_page_also_where_its_data_are_elsewhere(tmp_path, tiny_cifar, monkeypatch):
    write_cifar(tmp_path / "data", "cifar100")
    run("--data", tmp_path / "data", "--arch", "resnet8", "--epochs", 1, "--runs", tmp_path / "runs")
    (path,) = (tmp_path / "runs" / "cifar100").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}-resnet8", path.name)
    assert json.loads((path / "metrics.json").read_text())["classes"] == 100
    text = (path / "report.html").read_text()
    assert "fine" in text and len(text) < 3_000_000 and all(f"<h2>{o}</h2>" in text for o in SECTIONS)
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    monkeypatch.setenv("SIFAR_DATA", str(tmp_path / "elsewhere"))
    report.main([str(path)])
    again = (path / "report.html").read_text()
    assert all(f"<h2>{o}</h2>" in again for o in SECTIONS)


def test_classes_and_superclasses_have_their_own_accuracy_and_confusions(drawn):
    vocab = ["apple", "pear", "cat", "dog", "car", "bus"]
    of = ["fruit", "fruit", "animals", "animals", "vehicles", "vehicles"]
    targs, preds = np.array([0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3]), np.array([0, 1, 0, 1, 2, 3, 2, 0, 0, 0, 0])
    rows = np.arange(11)
    data = ImageData(np.zeros((11, 8, 8, 3), np.uint8), targs, vocab, rows[:0], rows[:0], rows, of)
    o = SimpleNamespace(rows=rows, targs=targs, preds=preds)
    page.classes(data, o, "test")
    pairs = page.confusion(data, o, "test")["pairs"]

    def bars(title):
        return {
            t.get_text(): p.get_width() for t, p in zip(drawn[title].get_yticklabels(), drawn[title].patches)
        }

    assert bars("Superclasses, accuracy on test") == pytest.approx({"fruit": 80, "animals": 100 / 3})
    assert bars("Classes, accuracy on test") == pytest.approx(
        {"apple": 200 / 3, "pear": 50, "cat": 100 / 3, "dog": 0}
    )
    ax = drawn["Superclasses, % of each row, test"]
    assert (
        [t.get_text() for t in ax.get_yticklabels()]
        == [t.get_text() for t in ax.get_xticklabels()]
        == ["animals", "fruit", "vehicles"]
    )
    assert np.allclose(ax.images[0].get_array(), [[100 / 3, 200 / 3, 0], [20, 80, 0], [0, 0, 0]])
    assert [(o["true"], o["pred"], o["n"]) for o in pairs] == [
        ("dog", "apple", 3),
        ("apple", "pear", 1),
        ("pear", "cat", 1),
        ("cat", "apple", 1),
        ("cat", "dog", 1),
    ]
    assert [len(o["pictures"]) for o in pairs] == [3, 1, 1, 1, 1]


@pytest.mark.parametrize("n", [100, 5000])
def test_the_names_of_many_classes_do_not_cover_each_other(drawn, n):
    bars([f"a class with a long name {i}" for i in range(n)], np.linspace(0, 1, n), "Many", "right, %")
    boxes = sorted(
        (o.get_window_extent().y0, o.get_window_extent().y1) for o in drawn["Many"].get_yticklabels()
    )
    assert len(boxes) == min(n, 200) and all(a[1] <= b[0] + 1 for a, b in zip(boxes, boxes[1:]))
    assert {drawn["Many"].patches[i].get_width() for i in (0, -1)} == {0, 100}


@pytest.mark.parametrize(
    "without, note",
    [
        (("valid",), "no validation set to fit a temperature on"),
        (("test",), "fitted on valid, divides"),
        (("test", "valid"), "nothing more can be said"),
    ],
)
def test_runs_without_validation_or_test_images_have_a_page(image_folder, tmp_path, without, note):
    cfg = TrainConfig(dataset=str(image_folder), data=str(tmp_path), arch="resnet8", epochs=1)
    dls = get_dls(cfg)
    data = replace(dls.data, **{o: dls.data.train[:0] for o in without})
    learn = get_learner(make_dls(cfg, data, data.stats()), cfg, path=tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"settings": asdict(cfg)}))
    metrics = report.write_report(
        learn,
        cfg,
        [
            {
                **dict.fromkeys(RunLog.columns, 1.0),
                "epoch": 1,
                **({"top1": None, "top5": None, "valid_loss": None} if "valid" in without else {}),
            }
        ],
    )
    text = (tmp_path / "report.html").read_text()
    assert (
        note in text
        and "<h2>Settings</h2>" in text
        and [metrics[o] is None for o in ("valid", "test")] == [o in without for o in ("valid", "test")]
    )


def test_class_names_are_text_and_not_markup(tmp_path):
    for split in ("train", "test"):
        for name in ("<script>alert(1)</script>".replace("/", "_"), "a & b"):
            write_images(tmp_path / "odd" / split / name, 12)
    run(
        *on_pictures(tmp_path / "odd", tmp_path),
        "--name",
        "a",
    )
    text = (tmp_path / "runs" / "odd" / "a" / "report.html").read_text()
    assert "<script" not in text and "&lt;script" in text


def test_a_page_of_large_images_of_noise_is_small():
    rows, vocab = np.arange(120), [str(i) for i in range(30)]
    data = ImageData(
        np.random.default_rng(0).integers(0, 256, (120, 128, 128, 3), dtype=np.uint8),
        rows % 30,
        vocab,
        rows[:0],
        rows[:0],
        rows,
    )
    o = SimpleNamespace(rows=rows, targs=rows % 30, preds=(rows + 1) % 30, probs=np.full((120, 30), 1 / 30))
    found = page.confusion(data, o, "test")
    pngs = [
        found["matrix"],
        page.hardest(data, o),
        *(png for pair in found["pairs"] for png in pair["pictures"]),
    ]
    assert len(pngs) == 20 * 3 + 2 and sum(map(len, pngs)) < 1_800_000


@pytest.mark.parametrize("data", ["/data", "/somebody/data", "data"])
def test_notes_name_no_folder_above_the_data(data):
    assert (
        page.without_parents(f"{data}/x.tar.gz is damaged (https://example.org/a)", data)
        == "data/x.tar.gz is damaged (https://example.org/a)"
    )


def test_an_unfinished_run_shows_what_there_is_and_stays_unfinished(finished, capsys):
    about = json.loads((finished / "config.json").read_text())
    about["settings"]["epochs"] = 20
    (finished / "config.json").write_text(json.dumps(about))
    (finished / "metrics.json").unlink()
    report.main([str(finished)])
    assert "not finished: 8 of 20 epochs" in capsys.readouterr().out
    assert (
        "not finished: 8 of 20 epochs" in (finished / "report.html").read_text()
        and not (finished / "metrics.json").exists()
    )


CLASSES, LAST, CHOSEN = "<h2>Classes", "These are the weights of the last epoch", "was chosen on valid"


@pytest.mark.parametrize(
    "lost, shown, not_shown",
    [
        (["history.csv"], [CLASSES, CHOSEN], LAST),
        (["last.pth"], [CLASSES, CHOSEN, "last.pth is damaged"], LAST),
        (["best.pth"], [CLASSES, LAST, "best.pth is damaged"], CHOSEN),
        (["last.pth", "history.csv"], [CLASSES, "history.csv has no epoch"], "<h2>Training"),
        (["best.pth", "last.pth"], ["<h2>Training", "<h2>Settings", "top-5, %", CHOSEN], CLASSES),
        (["best.pth", "last.pth", "history.csv"], ["<h2>Settings", "best.pth is damaged"], "<h2>Training"),
    ],
)
def test_what_is_damaged_is_named_and_the_rest_is_shown(finished, lost, shown, not_shown):
    before = (finished / "metrics.json").read_text()
    for o in lost:
        next(finished.rglob(o)).write_bytes(b"\0 nothing of ours")
    report.main([str(finished)])
    text = (finished / "report.html").read_text()
    assert all(o in text for o in shown) and not_shown not in text
    assert lost == ["history.csv"] or (finished / "metrics.json").read_text() == before


def test_without_the_weights_that_were_chosen_others_do_not_take_their_place(finished, capsys):
    (finished / "models" / "best.pth").unlink()
    report.main([str(finished)])
    assert "best.pth is missing: the weights that were chosen on valid are lost" in capsys.readouterr().out
    with pytest.raises(UserError, match="best.pth is missing"):
        load_run(finished)


def test_figures_of_other_data_do_not_take_the_place_of_the_run_s_own(finished, capsys):
    about, metrics = (
        json.loads((finished / "config.json").read_text()),
        (finished / "metrics.json").read_bytes(),
    )
    about["data"]["fingerprint"]["checksum"] += 1
    (finished / "config.json").write_text(json.dumps(about))
    report.main([str(finished)])
    assert (
        "was trained on other data" in capsys.readouterr().out
        and (finished / "metrics.json").read_bytes() == metrics
    )


def test_a_page_tells_of_no_folder_of_this_machine(finished):
    about = json.loads((finished / "config.json").read_text())
    about["commands"] = [f"python {finished}/train.py --runs {finished}/x"]
    about["settings"]["dataset"] = f"{finished}/pets"
    (finished / "config.json").write_text(json.dumps(about))
    (finished / "models" / "last.pth").write_bytes(b"x")
    report.main([str(finished)])
    text = (finished / "report.html").read_text()
    assert "last.pth is damaged" in text and "pets is not there" in text
    assert str(finished.parent) not in text


def test_a_checkpoint_with_a_damaged_history_is_named_and_that_of_the_table_is_shown(finished):
    state = torch.load(finished / "models" / "last.pth", weights_only=True)
    short = [{**dict.fromkeys(RunLog.columns, 1.0)}]
    torch.save({**state, "history": short}, finished / "models" / "last.pth")
    report.main([str(finished)])
    text = (finished / "report.html").read_text()
    assert "last.pth is damaged" in text and "<h2>Training" in text and CLASSES in text


@pytest.mark.parametrize("value", ["nan", "inf", "1e999"])
def test_a_history_with_what_is_no_number_is_named(finished, value):
    (finished / "history.csv").write_text(
        (finished / "history.csv").read_text().replace("\n3,", f"\n{value},")
    )
    with pytest.raises(UserError, match="history.csv cannot be read"):
        Run(finished).history()


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda o: (o / "config.json").write_text("{"), "config.json is damaged"),
        (
            lambda o: (o / "config.json").write_text(
                (o / "config.json").read_text().replace('"versions": {', '"versions": null, "x": {')
            ),
            "config.json is damaged",
        ),
        (lambda o: shutil.rmtree(o), "is no run folder"),
    ],
)
def test_a_damaged_run_is_one_line(finished, capsys, spoil, words):
    spoil(finished)
    with pytest.raises(SystemExit) as e:
        report.main([str(finished)])
    err = capsys.readouterr().err
    assert e.value.code == 2 and words in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "change",
    [
        {"vocab": None},
        {"vocab": [1]},
        {"superclasses": ["a"]},
        {"stats": [[0.5], [0.2]]},
        {"stats": 1},
        {"stats": [["a"] * 3] * 2},
    ],
)
def test_damaged_facts_of_the_data_are_one_line(finished, change):
    about = json.loads((finished / "config.json").read_text())
    about["data"] |= change
    (finished / "config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="config.json is damaged"):
        load_run(finished, images=False)


def test_a_bug_of_ours_is_not_called_a_damaged_file(finished):
    def bug(run, state):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        load_last(new_learner(Run(finished), images=False), bug)


def test_a_run_of_before_calibration_errors_shows_the_figures_that_it_has(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    for o in ("valid", "test"):
        del metrics[o]["ece"]
    (finished / "metrics.json").write_text(json.dumps(metrics))
    for o in ("best.pth", "last.pth"):
        (finished / "models" / o).write_bytes(b"no weights")
    report.main([str(finished)])
    text = (finished / "report.html").read_text()
    assert f"{100 * metrics['test']['top1']:.2f}" in text and "metrics.json is damaged" not in text


def test_history_is_read_as_it_was_written(run_folder):
    rows = Run(run_folder).history()
    with (run_folder / "history.csv").open() as f:
        raw = list(csv.DictReader(f))
    assert [o["epoch"] for o in rows] == list(range(1, 9)) and rows[3]["top1"] == float(raw[3]["top1"])


# ---- calibration ----


def made(n=4000, c=5, temperature=1.0, seed=0):
    "Probabilities, and labels drawn from them; then the probabilities are sharpened by `temperature`."
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (n, c))
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return with_temperature(probs, temperature), np.array([rng.choice(c, p=p) for p in probs])


def test_calibration_error_is_the_mean_gap_of_the_bins():
    probs, targs = made(500)
    confidence, right = probs.max(1), probs.argmax(1) == targs
    gaps = 0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & (confidence < low + 1 / 15)
        if inside.any():
            gaps += abs(confidence[inside].mean() - right[inside].mean()) * inside.mean()
    assert calibration_error(probs, targs) == pytest.approx(gaps, abs=1e-9)
    assert sum(reliability(probs, targs)[2]) == pytest.approx(1)
    certain = np.eye(3)[[0, 1, 2, 0]]
    assert (
        calibration_error(certain, np.array([0, 1, 2, 0])) == 0
        and calibration_error(certain, np.array([1, 2, 0, 1])) == 1
    )


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_temperature_that_was_put_in_is_found_and_mends_the_error(temperature):
    probs, targs = made(temperature=temperature)
    t = fit_temperature(probs, targs)
    assert t == pytest.approx(1 / temperature, rel=0.08)
    assert calibration_error(with_temperature(probs, t), targs) < 0.03
    assert (with_temperature(probs, t).argmax(1) == probs.argmax(1)).all()


def test_the_temperature_is_fitted_on_valid_and_shown_on_test(drawn):
    def found(temperature):
        probs, targs = made(temperature=temperature)
        return SimpleNamespace(probs=probs, targs=targs, preds=probs.argmax(1))

    test = found(1.0)
    text = page.calibration({"valid": found(0.4), "test": test}, "test")["text"]
    assert float(re.search(r"A temperature of ([\d.]+), fitted on valid", text)[1]) == pytest.approx(
        2.5, rel=0.08
    )
    line = next(o for o in drawn["Reliability on test"].lines if o.get_label().startswith("as it is"))
    assert line.get_label() == f"as it is: ECE {100 * calibration_error(test.probs, test.targs):.2f} %"
    assert np.allclose(line.get_xydata().T, [100 * o for o in reliability(test.probs, test.targs)[:2]])
