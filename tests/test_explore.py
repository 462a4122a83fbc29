import contextlib
import csv
import io
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import DIGITS, SAVEFIG, SHORT, write_cifar
from matplotlib.figure import Figure
from PIL import Image

import train
from sifar import TrainConfig, get_dls, get_learner
from sifar.cli import without_flags
from sifar.files import ROOT
from sifar.runs.arguments import parse_args
from sifar.training.explore import SUGGESTIONS, find_lr, profile, shown, step_times

QUICK = *DIGITS, "--sizes", "8"


def digits(**kwargs):
    return TrainConfig(dataset="digits", **{"arch": "resnet8", "bs": 64, **kwargs})


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16", "opt": "muon", "ema": 0.9, "mixup": 0.2, "bs": 16, "sizes": "8,32"},
        *(
            pytest.param(o, marks=pytest.mark.slow)
            for o in (
                {"opt": "adamw", "sizes": "16,32"},
                {"valid_pct": 0.0, "precision": "fp16", "sizes": "8"},
                {"arch": "timm:mobilenetv3_small_050", "sizes": None},
            )
        ),
    ],
)
def test_lr_find_has_four_suggestions_for_images_of_one_size(settings):
    cfg = digits(**settings)
    found, lrs, losses = find_lr(cfg, get_dls(cfg))
    if settings["sizes"] == "8,32":
        small = digits(**settings | {"sizes": "8"})
        assert find_lr(small, get_dls(small)) == (found, lrs, losses), "that of the first epoch"
    assert (
        tuple(found) == SUGGESTIONS
        and all(1e-7 <= o <= 10 for o in found.values())
        and len(lrs) == len(losses) > 20
    )


def test_lr_find_works_where_an_epoch_is_one_batch(image_folder, tmp_path):
    cfg = TrainConfig(dataset=str(image_folder), data=str(tmp_path), arch="resnet8", sz=8, bs=128)
    assert len(get_dls(cfg).train) == 1 and set(find_lr(cfg, get_dls(cfg))[0]) == set(SUGGESTIONS)


@pytest.fixture(scope="module")
def looked(tmp_path_factory):
    "The folder of runs in which --lr-find has looked, and what it said."
    runs = tmp_path_factory.mktemp("looked")
    with contextlib.redirect_stdout(io.StringIO()) as said, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", SAVEFIG)
        train.main([*QUICK, "--lr-find", "--epochs", "3", "--lr=0.7", "--runs", str(runs)])
    return runs, said.getvalue()


def suggested(out):
    line = out.split("suggests")[1].splitlines()[0]
    return {k: float(v) for k, v in re.findall(r"(valley|steep|slide|minimum) ([\d.e-]+)", line)}


def test_the_command_saves_curve_and_plot_and_says_how_to_train(looked):
    runs, out = looked
    folder, suggestions = runs / "digits" / "explore", suggested(out)
    assert set(suggestions) == set(SUGGESTIONS)
    cfg = parse_args(shlex.split(out.split("train.py", 1)[1].splitlines()[0]))
    assert cfg.lr == suggestions["valley"] and cfg.epochs == 3 and not cfg.lr_find and cfg.bs == 64
    with (folder / "lr_find.csv").open() as f:
        lrs = [float(o["lr"]) for o in csv.DictReader(f)]
    assert len(lrs) > 20 and lrs == sorted(lrs) and lrs[0] < 1e-6
    with Image.open(folder / "plots" / "lr_find.png") as img:
        assert len(img.convert("RGB").getcolors(2**24)) > 3
    assert not list(runs.rglob("config.json")), "no run was trained"


def test_lr_auto_trains_with_the_valley_as_if_nothing_had_been_looked_for(looked, tmp_path):
    train.main([*QUICK, "--lr", "auto", "--epochs", "1", "--runs", str(tmp_path), "--name", "a"])
    run = tmp_path / "digits" / "a"
    lr = json.loads((run / "config.json").read_text())["settings"]["lr"]
    assert lr == pytest.approx(suggested(looked[1])["valley"], rel=0.05), (
        "the same each time, in one epoch as in three"
    )
    assert (run / "plots" / "lr_find.png").exists() and parse_args(["--resume", str(run)]).lr == lr
    train.main([*QUICK, "--lr", str(lr), "--epochs", "1", "--runs", str(tmp_path), "--name", "b"])
    a, b = (
        torch.load(tmp_path / "digits" / o / "models" / "last.pth", weights_only=True)["model"] for o in "ab"
    )
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("augment", ["item", "batch"])
def test_what_is_shown_is_what_the_model_sees(tmp_path, tiny_cifar, augment):
    write_cifar(tmp_path, "cifar100")
    cfg = TrainConfig(data=str(tmp_path), augment=augment, arch="resnet8")
    dls = get_dls(cfg)
    images, labels = shown(dls.train, [7] * 16, get_learner(dls, cfg))
    original, pad = dls.data.images[dls.data.train[7]].astype(int), 4
    assert (
        images.shape == (16, 32, 32, 3)
        and images.dtype == np.uint8
        and set(labels) == {dls.vocab[dls.data.labels[dls.data.train[7]]]}
    )
    assert len({o.tobytes() for o in images}) == 16
    padded = np.pad(original, ((pad, pad), (pad, pad), (0, 0)), constant_values=-1)
    crops = [
        padded[y : y + 32, x : x + 32][:, ::step] for y in range(9) for x in range(9) for step in (1, -1)
    ]
    for o in images:
        assert min(np.median(abs(o.astype(int) - c)) for c in crops) <= 1, "each is a crop of the image"


def test_small_and_mixed_images_are_shown_as_such(tmp_path, tiny_cifar):
    write_cifar(tmp_path, "cifar100")
    cfg = TrainConfig(data=str(tmp_path), arch="resnet8", sizes="16,32", mixup=1.0, mix_prob=0.1)
    dls = get_dls(cfg)
    images, labels = shown(dls.train, list(range(8)), get_learner(dls, cfg), 2)
    assert images.shape == (8, 16, 16, 3)
    shares = [[float(o.split(" % ")[0]) for o in label.split("\n")] for label in labels]
    assert (
        all(len(o) == 2 and sum(o) == pytest.approx(100, abs=1.1) for o in shares) and labels[0] != labels[7]
    )


def test_the_sheet_has_every_class_under_its_name(image_folder, tmp_path, drawn):
    train.main(
        [
            "--dataset",
            str(image_folder),
            "--data",
            str(tmp_path),
            "--show-batch",
            "--runs",
            str(tmp_path / "runs"),
            "--arch",
            "resnet8",
        ]
    )
    pairs = [(img, text) for ax in drawn.values() for img, text in zip(ax.images, ax.texts, strict=True)]
    assert {text.get_text() for _, text in pairs} == {"cat", "dog"} and len(pairs) == 32 + 16
    for img, text in pairs:
        red, _, blue = img.get_array().mean((0, 1))
        assert (text.get_text() == "cat") == (red > blue)
        left, right, bottom, top = img.get_extent()
        x, y = text.get_position()
        assert left < x < right and top - 0.1 < y < top < bottom, "the label stands right above"


def test_two_classes_that_are_mixed_have_both_their_shares(image_folder, tmp_path):
    cfg = TrainConfig(dataset=str(image_folder), data=str(tmp_path), arch="resnet8", mixup=1.0)
    dls = get_dls(cfg)
    for label in shown(dls.train, [0, 1, 46, 47], get_learner(dls, cfg))[1]:
        shares = {name: float(p) for p, name in (o.split(" % ") for o in label.split("\n"))}
        assert set(shares) == {"cat", "dog"} and sum(shares.values()) == pytest.approx(100, abs=1.1)


@pytest.mark.figures
def test_the_sheets(tmp_path):
    options = "--aug", "rand", "--cutmix", "1", "--sizes", "16,32", "--valid-pct", "0"
    train.main([*QUICK, "--show-batch", *options, "--runs", str(tmp_path)])
    plots = tmp_path / "digits" / "explore" / "plots"
    assert sorted(o.name for o in plots.iterdir()) == ["batch.png", "one_image.png"]
    with Image.open(plots / "batch.png") as img:
        assert img.size[0] > 800


def test_the_profile_has_shares_that_make_a_whole(capfd):
    cfg = digits()
    lines = list(profile(cfg, get_dls(cfg)))
    shares = {k: float(v) for k, v in (re.match(r"  (\w+) +([\d.]+) %", o).groups() for o in lines[1:6])}
    assert list(shares) == ["data", "forward", "backward", "optimizer", "other"] and sum(
        shares.values()
    ) == pytest.approx(100, abs=0.3)
    assert shares["forward"] > 5 and shares["backward"] > 5 and "images/s" in lines[0] and len(lines) == 10
    assert any("% of all operators: convolution_backward" in o for o in lines[6:])
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard", "torch's profiler is not heard, and what comes after it is"


def test_steps_are_counted_and_validation_is_not():
    cfg = digits(valid_pct=0.5)
    parts, events = step_times(cfg, get_dls(cfg), 3)
    assert min(parts.values()) > 0 and events["forward"].count == events["optimizer"].count == 3


def test_names_in_any_script_make_no_noise(recwarn):
    from sifar.plots import sheet

    assert (
        sheet([np.zeros((8, 8, 3), np.uint8)], ["\u732b \U0001f408"]).startswith(b"\x89PNG")
        and not recwarn.list
    )


def test_looking_is_no_resuming(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"settings": asdict(digits())}))
    for flag in (["--lr-find"], ["--profile"], ["--show-batch"], ["--seeds", "2"]):
        with pytest.raises(SystemExit) as e:
            train.main(["--resume", str(tmp_path), *flag])
        assert e.value.code == 2 and "--resume goes on with one run" in capsys.readouterr().err


def test_flags_are_taken_out_with_their_values():
    args = ["--lr-find", "--lr_find", "--lr", "0.1", "--epochs", "3", "--lr=4", "--arch", "resnet8", "--lr"]
    assert without_flags(args, "lr_find", "lr") == ["--epochs", "3", "--arch", "resnet8"]


@pytest.mark.slow
def test_tensorboard_gets_the_run(tmp_path):
    pytest.importorskip("tensorboard")
    train.main([*SHORT, "--tensorboard", "--runs", str(tmp_path), "--name", "a"])
    (file,) = (tmp_path / "digits" / "a" / "tensorboard").glob("events*")
    assert b"train_loss" in file.read_bytes()


def train_with_wandb(tmp_path, *args, **env):
    "A process of its own, as wandb reads its settings once and wraps what is printed."
    env = {
        **os.environ,
        "WANDB_SILENT": "true",
        "WANDB_API_KEY": "",
        "NETRC": str(tmp_path / "none"),
        "WANDB_CONFIG_DIR": str(tmp_path),
        **env,
    }
    args = [*SHORT, "--opt", "muon", "--wandb", "--runs", str(tmp_path), *args]
    return subprocess.run(
        [sys.executable, "train.py", *args], env=env, cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.slow
def test_wandb_gets_the_runs_and_their_settings(tmp_path):
    done = train_with_wandb(tmp_path, "--seeds", "2", "--name", "a", WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    for run in ("a-42", "a-43"):
        (file,) = (tmp_path / "digits" / run).glob("wandb/offline-run-*/run-*.wandb")
        content = file.read_bytes()
        assert all(o in content for o in (b"train_loss", b"accuracy", b"mix_prob", run.encode())), run


@pytest.mark.slow
def test_wandb_without_a_key_is_one_line(tmp_path):
    done = train_with_wandb(tmp_path, WANDB_MODE="online")
    assert done.returncode == 2 and "`wandb login`" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_one_line(name, tmp_path, capsys, monkeypatch):
    for o in [
        o
        for o in sys.modules
        if o.split(".")[0] == name or f"callback.{name}" in o or o.startswith("torch.utils.tensorboard")
    ]:
        monkeypatch.delitem(sys.modules, o)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as e:
        train.main([*SHORT, f"--{name}", "--runs", str(tmp_path)])
    err = capsys.readouterr().err
    assert e.value.code == 2 and f"--{name} needs" in err and err.count("\n") == 1
