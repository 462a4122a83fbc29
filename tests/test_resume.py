"""Runs that are interrupted, resumed, and resumed from folders that are damaged or in use."""

import json
import os
import signal
import zipfile

import pytest
import torch
from conftest import LONG, SHORT, SMALL, on_pictures
from test_train import ONE_EPOCH, assert_same_run, cut, failure, files, history, run

import export
from sifar import TrainConfig, UserError, get_dls, get_learner


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_an_interrupted_run_goes_on_to_the_same_weights(undisturbed, tmp_path, signum, code):
    ended, out, err = cut(signum, *SMALL, "--runs", tmp_path, "--name", "cut")
    path = tmp_path / "digits" / "cut"
    assert ended == code and "Traceback" not in err
    if signum != signal.SIGKILL:
        assert f"--resume {path}" in out
    assert len(history(path)) in (1, 2) and not (path / "metrics.json").exists()
    run("--resume", path)
    assert_same_run(undisturbed, path)
    assert len(json.loads((path / "config.json").read_text())["commands"]) == 2


def test_a_run_stopped_in_its_first_epoch_can_be_resumed(undisturbed, tmp_path):
    code, *_ = cut(signal.SIGTERM, *SMALL, "--runs", tmp_path, "--name", "cut", until="train loss")
    assert code == 143
    run("--resume", tmp_path / "digits" / "cut")
    assert_same_run(undisturbed, tmp_path / "digits" / "cut")


def test_a_run_stopped_in_its_report_says_how_to_go_on(tmp_path):
    code, out, err = cut(signal.SIGHUP, *SHORT, "--runs", tmp_path, "--name", "cut", until="valid  top-1")
    assert code == 129 and "Traceback" not in err
    assert f"--resume {tmp_path / 'digits' / 'cut'}" in out


def test_seeds_that_are_interrupted_say_how_to_train_the_others(tmp_path):
    seeds = "--seeds", "3", "--seed", "5", "--name", "s"
    code, out, _ = cut(signal.SIGINT, *LONG, *seeds, "--runs", tmp_path, until=ONE_EPOCH)
    assert code == 130 and f"--resume {tmp_path / 'digits' / 's-5'}" in out
    assert "--seed 6 --seeds 2 --name s" in out


MOST = (
    *("--opt", "muon", "--sizes", "8,12,16", "--ema", "0.9", "--augment", "batch", "--aug", "weak"),
    *("--smoothing", "0.2", "--mixup", "0.4", "--cutmix", "1", "--mix-prob", "0.7", "--schedule", "linear"),
)
OTHERS = (
    *("--opt", "adamw", "--no-wd-norm", "--aug", "trivial", "--clip", "1"),
    *("--valid-pct", "0", "--ema", "0.9"),
)


@pytest.mark.parametrize("options", [MOST, OTHERS])
def test_every_option_is_resumed_to_the_same_weights(tmp_path, options):
    options = *SMALL, "--epochs", 3, "--bs", 256, *options, "--runs", tmp_path
    run(*options, "--name", "whole")
    cut(signal.SIGKILL, *options, "--name", "cut")
    assert not (tmp_path / "digits" / "cut" / "metrics.json").exists()
    run("--resume", tmp_path / "digits" / "cut")
    assert_same_run(tmp_path / "digits" / "whole", tmp_path / "digits" / "cut")


def test_more_epochs_go_on_from_a_finished_run(tmp_path, capsys):
    run(*SHORT, "--runs", tmp_path, "--name", "a")
    run("--resume", tmp_path / "digits" / "a", "--epochs", "2")
    assert "2 epochs instead of 1" in capsys.readouterr().out
    assert [o["epoch"] for o in history(tmp_path / "digits" / "a")] == ["1", "2"]
    assert json.loads((tmp_path / "digits" / "a" / "config.json").read_text())["settings"]["epochs"] == 2


def test_a_learner_in_python_does_not_train_anew_what_should_be_resumed(undisturbed):
    cfg = TrainConfig(preset="smoke", resume=undisturbed)
    with pytest.raises(UserError, match=r"train\.main\(\['--resume', '.*whole'\]\) does"):
        get_learner(get_dls(cfg), cfg)


def test_a_name_that_is_taken_is_refused(undisturbed, capsys):
    before = (undisturbed / "history.csv").read_text()
    assert "is there already" in failure(capsys, *SMALL, "--runs", undisturbed.parents[1], "--name", "whole")
    assert (undisturbed / "history.csv").read_text() == before


def test_a_run_without_its_checkpoints_is_refused_and_left_as_it_is(finished, capsys):
    (finished / "models" / "best.pth").rename(finished / "best")
    before = files(finished)
    assert "best.pth is missing" in failure(capsys, "--resume", finished, "--epochs", 9)
    (finished / "models" / "last.pth").unlink()
    assert "last.pth is missing" in failure(capsys, "--resume", finished)
    assert set(before) - set(files(finished)) == {finished / "models" / "last.pth"}
    assert json.loads((finished / "config.json").read_text())["settings"]["epochs"] == 4


def test_a_damaged_best_checkpoint_is_named(finished, capsys):
    path = finished / "models" / "best.pth"
    path.write_bytes(path.read_bytes()[:9000])
    assert f"{path} is damaged" in failure(capsys, "--resume", finished)
    with pytest.raises(SystemExit):
        export.main([str(finished)])
    assert f"{path} is damaged" in capsys.readouterr().err and not (finished / "learner.pkl").exists()


def test_a_run_goes_on_only_on_its_own_data(image_folder, tmp_path, capsys):
    run(
        *on_pictures(image_folder, tmp_path),
        "--name",
        "a",
    )
    path = tmp_path / "runs" / "pets" / "a"
    cat, dog = (image_folder / "train" / o / "000.png" for o in ("cat", "dog"))
    cat.write_bytes(dog.read_bytes())
    assert "was trained on other data" in failure(capsys, "--resume", path), (
        "other pictures in the same files"
    )
    cat.unlink()
    assert "was trained on other data" in failure(capsys, "--resume", path), "a picture less"


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": None},
        {"epoch": 9},
        {"history": 5},
        {"history": []},
        {"history": [{"a": 1}] * 4},
        {"best": "x"},
        {"opt": {}},
    ],
)
def test_a_checkpoint_with_odd_contents_is_named(finished, capsys, change):
    path = finished / "models" / "last.pth"
    torch.save({**torch.load(path, weights_only=True), **change}, path)
    assert f"{path} is damaged" in failure(capsys, "--resume", finished, "--epochs", 5)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_a_damaged_checkpoint_is_named(undisturbed, tmp_path, capsys, content):
    (tmp_path / "r" / "models").mkdir(parents=True)
    (tmp_path / "r" / "config.json").write_bytes((undisturbed / "config.json").read_bytes())
    path = tmp_path / "r" / "models" / "last.pth"
    path.write_bytes(
        (undisturbed / "models" / "last.pth").read_bytes()[:20_000] if content is None else content
    )
    assert f"{path} is damaged" in failure(capsys, "--resume", tmp_path / "r")


def test_a_checkpoint_that_would_unpack_to_more_than_its_file_is_refused(finished, capsys):
    path = finished / "models" / "last.pth"
    with zipfile.ZipFile(path) as z:
        parts = {o: z.read(o) for o in z.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in parts.items():
            z.writestr(name, content + bytes(10**8 if name.endswith("data/0") else 0))
    assert path.stat().st_size < 10**7
    assert f"{path} is damaged" in failure(capsys, "--resume", finished, "--epochs", 5)


def test_a_hostile_checkpoint_runs_nothing(undisturbed, tmp_path, capsys):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    (tmp_path / "r" / "models").mkdir(parents=True)
    (tmp_path / "r" / "config.json").write_bytes((undisturbed / "config.json").read_bytes())
    torch.save({"model": Trap()}, tmp_path / "r" / "models" / "last.pth")
    failure(capsys, "--resume", tmp_path / "r")
    assert not (tmp_path / "sprung").exists()
