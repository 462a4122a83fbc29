import json
import os
import re
import shlex
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import COLD

import train
from sifar import TrainConfig, UserError
from sifar.config import PRESETS, parse_sizes
from sifar.runs.arguments import parse_args
from sifar.runs.run import Run

ROOT = Path(__file__).parents[1]


def test_the_default_is_the_standard_recipe():
    cfg = parse_args([])
    assert (cfg.dataset, cfg.arch, cfg.epochs, cfg.bs, cfg.opt, cfg.warmup * cfg.epochs) == (
        "cifar100",
        "resnet18",
        100,
        "auto",
        "sgd",
        5,
    )
    assert cfg.valid_pct == 0.1


def test_a_flag_overrides_its_preset():
    cfg = parse_args(["--preset", "smoke", "--epochs", "3"])
    assert (cfg.arch, cfg.dataset, cfg.epochs) == ("resnet8", "digits", 3)
    assert parse_args(["--preset=smoke"]).arch == "resnet8"


def test_the_commands_in_the_readme_are_understood():
    text = (ROOT / "README.md").read_text() + (ROOT / "bench" / "README.md").read_text()
    commands = re.findall(r"python train\.py ([^`#\n]+)", text)
    assert len(commands) > 3
    for o in commands:
        if not re.search("path/to|--resume|--help", o):
            parse_args(shlex.split(o))


def test_data_comes_from_the_environment(monkeypatch):
    monkeypatch.delenv("SIFAR_DATA", raising=False)
    assert parse_args([]).data == "data"
    monkeypatch.setenv("SIFAR_DATA", "/somewhere")
    assert parse_args([]).data == "/somewhere"
    assert parse_args(["--data", "here"]).data == "here"


@pytest.mark.parametrize(
    "args, words",
    [
        (["--epochs", "0"], "--epochs 0"),
        (["--bs", "1"], "--bs 1"),
        (["--lr", "-1"], "--lr -1.0"),
        (["--lr", "nan"], "--lr nan"),
        (["--wd", "-0.1"], "--wd"),
        (["--valid-pct", "0.9"], "--valid-pct 0.9"),
        (["--warmup", "5"], "--warmup 5.0"),
        (["--seed", "-1"], "--seed"),
        (["--sz", "4"], "--sz 4"),
        (["--workers", "999"], "--workers"),
        (["--name", "a/b"], "--name a/b"),
        (["--sz", "48"], "--sz 48"),
        (["--dataset", "cifar-100"], "did you mean cifar100"),
        (["--dataset", "no/such/folder"], "path of a folder"),
        (["--arch", "resnet-18"], "did you mean resnet18"),
        (["--resume", "nowhere"], "'nowhere' is no run folder"),
        (["--resume="], "'' is no run folder"),
        (["--name", ".."], "--name .."),
        (["--epochs", "ten"], "--epochs: 'ten' should be a whole number"),
        (["--epochz", "3"], "Unknown flag '--epochz': did you mean --epochs?"),
        (["--nonsense", "1"], "Unknown flag '--nonsense'"),
        (["extra"], "Nothing is expected here: extra"),
        (["--epochs"], "--epochs: expected one argument"),
        (["--lr", "high"], "--lr: 'high' should be a number or auto or None"),
        (["--opt", "sdg"], "--opt: 'sdg' should be sgd or muon or adamw"),
        (["--preset", "huge"], "huge"),
        (["--precision", "int4"], "int4"),
        (["--arch", "timm:resnet18x"], "did you mean resnet18"),
        (["--arch", "timm:"], "Unknown timm model ''"),
        (["--sizes", "16x2,big"], "--sizes '16x2,big' is no list of sizes"),
        (["--sizes", ""], "is no list of sizes"),
        (["--sizes", "16,64"], "between 8 and --sz 32"),
        (["--mixup", "-1"], "--mixup"),
        (["--smoothing", "1"], "--smoothing 1.0"),
        (["--mix-prob", "0"], "--mix-prob 0.0"),
        (["--cutmix", "nan"], "--cutmix nan"),
        (["--ema", "1"], "--ema 1.0"),
        (["--clip", "0"], "--clip 0.0"),
        (["--augment", "batch", "--aug", "rand"], "--aug rand takes --augment item"),
        (["--bs", "33", "--mixup", "1"], "--bs 33 has to be even"),
        (["--device", "cpu:1"], "--device cpu:1 is not on this machine"),
    ],
)
def test_a_bad_value_is_one_line_and_exit_code_2(args, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        train.main(args)
    out = capsys.readouterr()
    assert e.value.code == 2 and words in out.err and out.err.count("\n") == 1 and "Traceback" not in out.err


def test_in_python_a_preset_is_that_of_the_command_line(tmp_path):
    for name in PRESETS:
        assert TrainConfig(preset=name) == parse_args(["--preset", name])
    cfg = TrainConfig(preset="fast", epochs=3, runs=tmp_path)
    assert cfg == parse_args(["--preset", "fast", "--epochs", "3", "--runs", str(tmp_path)])
    assert (cfg.opt, cfg.bs, cfg.augment, cfg.epochs) == ("muon", 512, "batch", 3)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"schedule": "step"}, "--schedule 'step' does not fit: it should be cosine or linear."),
        ({"augment": "gpu"}, "--augment 'gpu' does not fit: it should be item or batch."),
        ({"opt": "adam"}, "--opt 'adam' does not fit: it should be sgd or muon or adamw."),
        ({"preset": "quick"}, "--preset 'quick' does not fit: it should be standard or "),
        ({"lr": "0.1"}, "--lr '0.1' does not fit: it should be a number or auto or None."),
        ({"epochs": 3.5}, "--epochs 3.5 does not fit: it should be a whole number."),
        ({"bs": True}, "--bs True does not fit"),
        ({"wd_norm": "no"}, "--wd-norm 'no' does not fit: it should be True or False."),
        ({"dataset": None}, "--dataset None does not fit"),
        ({"sizes": [16, 32]}, "--sizes [16, 32] does not fit"),
        ({"epochs": 0}, "--epochs 0 is out of range"),
        ({"arch": "resnet-18"}, "did you mean resnet18"),
    ],
)
def test_python_is_told_of_a_bad_value_as_the_command_line_is(settings, words):
    with pytest.raises(UserError, match=re.escape(words)):
        TrainConfig(**settings)


def test_sizes():
    assert (
        parse_sizes("16x2,20,32x3") == [16, 16, 20, 32, 32, 32]
        and parse_sizes("32") == [32]
        and parse_sizes("16x1, 24") == [16, 24]
    )


def test_settings_survive_the_run_folder(tmp_path):
    cfg = TrainConfig(dataset="digits", epochs=7, lr=0.3)
    (tmp_path / "config.json").write_text(json.dumps({"settings": asdict(cfg)}))
    assert Run(tmp_path).settings == cfg


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        '{"settings": null}',
        '{"settings": {}, "commands": 5}',
        '{"settings": {}, "commands": ["python \'x"]}',
        *(
            f'{{"settings": {{{o}}}}}'
            for o in (
                '"epochs": "x"',
                '"epochs": 3.5',
                '"opt": "foo"',
                '"bs": true',
                '"seed": null',
                '"device": null',
                '"name": 5',
                '"wd_norm": "x"',
                '"lr": "x"',
            )
        ),
    ],
)
def test_a_damaged_config_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="config.json is damaged"):
        Run(tmp_path)


def test_resuming_refuses_what_would_change_the_result(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"settings": asdict(TrainConfig(dataset="digits", epochs=7))})
    )
    run = ["--resume", str(tmp_path)]
    assert parse_args(run).epochs == 7
    assert parse_args([*run, "--epochs", "9", "--workers", "2"]).epochs == 9
    with pytest.raises(UserError, match=r"--lr 0.5 \(was None\)"):
        parse_args([*run, "--lr", "0.5"])
    with pytest.raises(UserError, match=r"--epochs 3 \(was 7\)"):
        parse_args([*run, "--epochs", "3"])
    with pytest.raises(UserError, match=r"--preset best \(was standard\)"):
        parse_args([*run, "--preset", "best"])


def test_a_flag_may_say_none_and_have_underscores():
    assert parse_args(["--preset", "fast", "--sizes", "None"]).sizes is None
    cfg = parse_args(["--valid_pct=0.2", "--lr", "auto", "--wd", "1", "--name", "a_b"])
    assert (cfg.valid_pct, cfg.lr, cfg.wd, cfg.name) == (0.2, "auto", 1.0, "a_b")


def test_help_shows_the_values_of_a_preset(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--preset", "fast", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "--epochs INT passes over the training images (default: 13)" in out
    assert "--opt sgd|muon|adamw" in out and "--lr FLOAT|auto" in out


def test_any_flag_overrides_its_preset():
    assert (
        parse_args(["--preset", "fast", "--wd-norm"]).wd_norm
        and not parse_args(["--preset", "fast", "--no-wd-norm"]).wd_norm
    )
    assert parse_args([]).wd_norm and not parse_args(["--preset", "best"]).wd_norm


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_a_wrong_flag_is_one_line_in_every_terminal(locale):
    env = {**os.environ, "LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([COLD, ROOT / "train.py", "--epochs", "x"], capture_output=True, text=True, env=env)
    assert (
        done.returncode == 2
        and done.stderr
        == "sifar: --epochs: 'x' should be a whole number (--help lists all settings)\n"
    )


def test_help_is_complete_and_imports_nothing_heavy():
    done = subprocess.run(
        [COLD, "-X", "importtime", ROOT / "train.py", "--help"], capture_output=True, text=True, check=True
    )
    for name in asdict(TrainConfig()):
        assert f"--{name.replace('_', '-')}" in done.stdout
    for heavy in ("torch", "fastai", "albumentations", "timm"):
        assert f" {heavy}\n" not in done.stderr, f"--help imports {heavy}"
