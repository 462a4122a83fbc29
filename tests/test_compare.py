import contextlib
import io
import json
import shutil

import pytest
from conftest import SHORT
from PIL import Image

import train
from sifar.plots import curves
from sifar.runs import compare
from sifar.runs.run import Run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Two runs that differ in their seed, and one that differs in its epochs."
    folder = tmp_path_factory.mktemp("runs")
    small = *SHORT, "--runs", str(folder)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train.main([*small, "--epochs", "2", "--seeds", "2", "--seed", "5", "--name", "pair"])
    (folder / "said").write_text(said.getvalue())
    train.main([*small, "--seed", "5", "--name", "short"])
    return folder / "digits"


@pytest.fixture(autouse=True)
def width(monkeypatch):
    "That of a usual terminal, wherever the tests run."
    monkeypatch.setenv("COLUMNS", "80")


def out(capsys, *args):
    capsys.readouterr()
    compare.main([str(o) for o in args])
    return capsys.readouterr().out


def mean_of_pair(runs):
    a, b = (
        100 * json.loads((runs / o / "metrics.json").read_text())["test"]["top1"]
        for o in ("pair-5", "pair-6")
    )
    return f"test top-1 {(a + b) / 2:.2f} ± {abs(a - b) / 2**0.5:.2f} % (n = 2, seeds 5, 6)"


@pytest.mark.figures
def test_the_plot_is_a_picture(runs, tmp_path, capsys):
    out(capsys, runs / "short", "--plot", tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as img:
        assert len(img.convert("RGB").getcolors(2**24)) > 3


def test_seeds_are_runs_of_their_own(runs):
    assert sorted(o.name for o in runs.iterdir()) == ["pair-5", "pair-6", "short"]
    settings = [json.loads((runs / o / "config.json").read_text())["settings"] for o in ("pair-5", "pair-6")]
    assert [o["seed"] for o in settings] == [5, 6] and [o["seeds"] for o in settings] == [1, 1]
    losses = [Run(runs / name).history()[0]["train_loss"] for name in ("pair-5", "pair-6")]
    assert losses[0] != losses[1]
    assert mean_of_pair(runs) in (runs.parent / "said").read_text()


def test_the_table_has_the_settings_that_differ_and_the_results(runs, tmp_path, capsys):
    text = out(capsys, *sorted(runs.iterdir()), "--plot", tmp_path / "c.png")
    lines = [o.split("  ", 1)[1] if o[:2] == "20" else o for o in text.splitlines()]
    header = next(o for o in lines if "valid, %" in o).split()
    assert header[:2] == ["epochs", "seed"] and "arch" not in header
    test = json.loads((runs / "pair-6" / "metrics.json").read_text())["test"]["top1"]
    assert any(f"{100 * test:.2f}" in o and "pair-6" in o for o in lines)


def test_columns_without_room_go_below(runs, tmp_path, capsys):
    other = shutil.copytree(runs / "short", tmp_path / "other")
    about = json.loads((other / "config.json").read_text())
    about["settings"] |= {
        "sizes": "8x10,16x10,24x10,32x10",
        "aug": "trivial",
        "opt": "muon",
        "cutmix": 1.0,
        "mix_prob": 0.5,
        "schedule": "linear",
        "lr": 0.0625,
    }
    (other / "config.json").write_text(json.dumps(about))
    lines = (
        out(capsys, *sorted(runs.iterdir()), other, "--plot", tmp_path / "c.png")
        .split("±")[0]
        .splitlines()[:-1]
    )
    lines = [o.split("  ", 1)[1] if o[:2] == "20" else o for o in lines]
    assert all(len(o) <= compare.console.width for o in lines) and sum("pair-6 " in o for o in lines) > 1
    assert any("8x10,16x10,24x10,32x10" in o for o in lines) and "minutes" in "".join(lines)


def test_runs_that_differ_in_seed_alone_have_a_mean(runs, tmp_path, capsys):
    text = out(capsys, *sorted(runs.iterdir()), "--plot", tmp_path / "c.png")
    assert mean_of_pair(runs) in text and text.count("±") == 1


def test_the_best_valid_and_the_curves_are_those_of_the_runs(runs, tmp_path, capsys, drawn):
    text = out(capsys, *sorted(runs.iterdir()), "--plot", tmp_path / "c.png")
    lines = drawn["Accuracy on valid"].lines
    assert {o.get_label() for o in lines} == {"pair-5", "pair-6", "short"}
    for line in lines:
        rows = Run(runs / line.get_label()).history()
        assert line.get_xydata().tolist() == [[o["epoch"], pytest.approx(100 * o["top1"])] for o in rows]
        assert any(
            line.get_label() in o and f"{100 * max(r['top1'] for r in rows):.2f}" in o
            for o in text.splitlines()
        )


def test_a_run_without_validation_is_compared_by_its_training_loss(runs, tmp_path, capsys, drawn):
    train.main([*SHORT, "--valid-pct", "0", "--runs", str(tmp_path), "--name", "all"])
    run = tmp_path / "digits" / "all"
    assert "no accuracy on valid: all" in out(capsys, run, runs / "short", "--plot", tmp_path / "c.png")
    out(capsys, run, "--plot", tmp_path / "c.png")
    assert drawn["Loss in training, label-smoothed"].lines


def test_what_is_unfinished_or_damaged_does_not_hide_the_rest(runs, tmp_path, capsys, monkeypatch):
    (tmp_path / "runs").mkdir()
    shutil.copytree(runs, tmp_path / "runs" / "digits")
    (tmp_path / "runs" / "digits" / "pair-5" / "metrics.json").unlink()
    (tmp_path / "runs" / "digits" / "pair-6" / "history.csv").write_text("epoch,train_loss\n1,2\n")
    (tmp_path / "runs" / "digits" / "short" / "config.json").write_text('{"settings": {"dataset": null}}')
    monkeypatch.chdir(tmp_path)
    text = out(capsys)
    assert (
        "unfinished" in text and "Left out: " in text and "short" in text.split("Left out")[1].splitlines()[0]
    )
    test = json.loads((tmp_path / "runs" / "digits" / "pair-6" / "metrics.json").read_text())["test"]["top1"]
    assert "pair-6/history.csv cannot be read" in text and f"{100 * test:.2f}" in text
    assert (tmp_path / "compare.png").exists()


@pytest.mark.parametrize("content", ["[1]", "{}", '{"valid": {"a": 1}, "test": null, "seconds": 1}', "{"])
def test_damaged_metrics_are_named_and_the_history_is_used(runs, tmp_path, capsys, content):
    copy = shutil.copytree(runs / "pair-5", tmp_path / "pair-5")
    (copy / "metrics.json").write_text(content)
    text = out(capsys, copy, runs / "pair-6", "--plot", tmp_path / "c.png")
    assert f"{copy / 'metrics.json'} is damaged" in text and "unfinished" in text


def test_runs_of_one_name_are_told_apart_and_count_once(runs, tmp_path, capsys):
    copy = shutil.copytree(runs / "pair-5", tmp_path / "copy" / "pair-5")
    text = out(capsys, runs / "pair-5", copy, runs / "pair-6", "--plot", tmp_path / "c.png")
    assert "digits/pair-5" in text and "copy/pair-5" in text and "(n = 2, seeds 5, 6)" in text


def test_a_run_that_is_named_twice_is_one_row(runs, tmp_path, capsys):
    text = out(
        capsys, runs / "pair-5", f"{runs}/../digits/pair-5", runs / "pair-6", "--plot", tmp_path / "c.png"
    )
    assert text.count("pair-5") == 1 and str(runs) not in text


@pytest.mark.parametrize("n", [20, 100])
def test_the_legend_of_many_runs_names_all_and_covers_no_curve(drawn, n):
    names = [f"_20261126-14{i:04}-resnet18" for i in range(n)]
    curves(dict.fromkeys(names, ([1, 2], [50, 60])), "Many", "epoch", "%")
    legend = drawn["Many"].get_legend()
    assert [o.get_text() for o in legend.get_texts()] == names
    box, page = legend.get_window_extent(), drawn["Many"].figure.bbox
    assert box.x0 >= drawn["Many"].get_window_extent().x1 and box.x1 <= page.x1 and box.y0 >= page.y0


def test_a_run_whose_images_are_gone_can_still_be_compared(runs, tmp_path, capsys):
    copy = shutil.copytree(runs / "pair-5", tmp_path / "a")
    about = json.loads((copy / "config.json").read_text())
    about["settings"]["dataset"] = "/no/such/pets"
    (copy / "config.json").write_text(json.dumps(about))
    assert "pets" in out(capsys, copy, runs / "pair-6", "--plot", tmp_path / "c.png")


def test_nothing_to_compare_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        compare.main([])
    assert e.value.code == 2 and "no run to compare" in capsys.readouterr().err
