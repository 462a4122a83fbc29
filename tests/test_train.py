import csv
import json
import multiprocessing
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COLD, DIGITS, LONG, SHORT, SMALL, on_pictures

import train
from sifar import TrainConfig
from sifar.cli import one_line_errors
from sifar.runs.load import load_run

resource = pytest.importorskip("resource", reason="POSIX limits and signals")
ROOT = Path(__file__).parents[1]
ONE_EPOCH, TWO_EPOCHS, THREE_EPOCHS = (rf"  +{i} +\d\.\d{{4}} " for i in (1, 2, 3))  # rows of the log's table
CUT = """
import os, re, sys
import train
from sifar.log import log
until, signum, *args = sys.argv[1:]
def strike(record):
    if re.search(until, record.getMessage()): os.kill(os.getpid(), int(signum))
    return True
log.addFilter(strike)
train.main(args)
"""


def run(*args):
    train.main([str(o) for o in args])


def command(*args):
    return [sys.executable, "-W", "ignore", "-u", ROOT / "train.py", *map(str, args)]


def start(*args, until=ONE_EPOCH):
    "A run in a process of its own that has logged a line with `until`: at least its first epoch."
    process = subprocess.Popen(command(*args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if re.search(until, line):
            return process
    raise AssertionError(process.stderr.read())


def cut(signum, *args, until=TWO_EPOCHS):
    """A training in a process of its own, which gets a signal in the moment in which it logs `until`.

    Returns its exit code, output and errors."""
    words = sys.executable, "-W", "ignore", "-u", "-c", CUT, until, int(signum), *args
    done = subprocess.run([*map(str, words)], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def weights(path):
    return torch.load(path / "models" / "last.pth", weights_only=True)


def history(path):
    "The rows of history.csv, without what depends on the clock."
    with open(path / "history.csv") as f:
        return [
            {k: v for k, v in o.items() if k not in ("seconds", "images_per_second")}
            for o in csv.DictReader(f)
        ]


def assert_same_run(a, b):
    "Weights, optimizer and history of two run folders are the same, bit for bit."
    u, v = weights(a), weights(b)
    assert u["model"].keys() == v["model"].keys() and all(
        torch.equal(u["model"][k], v["model"][k]) for k in u["model"]
    )
    momenta = [
        [x for o in s["opt"]["state"].values() for x in o.values() if isinstance(x, torch.Tensor)]
        for s in (u, v)
    ]
    assert len(momenta[0]) > 10 and all(torch.equal(x, y) for x, y in zip(*momenta))
    averages = [s.get("ema", {"model": {}})["model"] for s in (u, v)]
    assert averages[0].keys() == averages[1].keys() and all(
        torch.equal(averages[0][k], averages[1][k]) for k in averages[0]
    )
    assert history(a) == history(b) and u["best"] == v["best"]
    results = [
        {k: json.loads((o / "metrics.json").read_text())[k] for k in ("valid", "test")} for o in (a, b)
    ]
    assert results[0] == results[1]


def test_a_run_folder_holds_all_of_the_run(undisturbed):
    assert [str(o.relative_to(undisturbed)) for o in files(undisturbed)] == [
        ".lock",
        "config.json",
        "history.csv",
        "metrics.json",
        "models/best.pth",
        "models/last.pth",
        "report.html",
        "training_log.txt",
    ]
    about = json.loads((undisturbed / "config.json").read_text())
    assert (
        about["settings"]["epochs"] == 4
        and torch.__version__.startswith(about["versions"]["torch"])
        and about["device"] == "cpu"
    )
    rows = history(undisturbed)
    assert [o["epoch"] for o in rows] == ["1", "2", "3", "4"] and float(rows[-1]["lr"]) < 0.001 < float(
        rows[1]["lr"]
    ) < 0.1
    # this process is pytest: what main was given counts, not how the process was started
    assert about["commands"] == [shlex.join(
        ["python", "train.py", *SMALL, "--runs", str(undisturbed.parents[1]), "--name", "whole"])]
    log = (undisturbed / "training_log.txt").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", o) for o in log)
    assert sum(bool(re.match(r".{21} +[1-4] +\d\.\d{4}", o)) for o in log) == 4


def test_metrics_are_those_of_the_best_epoch_and_of_one_look_at_the_test_set(undisturbed):
    metrics, rows = json.loads((undisturbed / "metrics.json").read_text()), history(undisturbed)
    best = max(rows, key=lambda o: float(o["top1"]))
    assert metrics["best_epoch"] == int(best["epoch"]) and metrics["valid"]["top1"] == pytest.approx(
        float(best["top1"])
    )
    assert (
        metrics["epochs"] == 4
        and metrics["parameters"] == 78_042
        and metrics["seconds"] > 0
        and metrics["images_per_second"] > 0
    )
    accuracies = "top1", "top5", "balanced"
    errors = {f"{k}_error" for k in accuracies}
    assert set(metrics["test"]) == {"loss", *accuracies, *errors, "macro_f1", "ece"}
    assert metrics["images"] == {
        "train": 1295,
        "valid": 143,
        "test": 359,
    }
    learn = load_run(undisturbed)
    data = learn.dls.data
    with learn.no_bar():
        probs, _ = learn.get_preds(dl=learn.dls.test_dl(list(data.images[data.test]), rm_type_tfms=0))
    hits = probs.argmax(1).numpy() == data.labels[data.test]
    assert np.mean(hits) == pytest.approx(metrics["test"]["top1"], abs=0.01)


def test_a_worker_that_is_killed_is_one_line_and_the_command_to_go_on(tmp_path, capsys):
    def kill():
        while not (tmp_path / "digits" / "a" / "history.csv").exists():
            time.sleep(0.01)
        while not multiprocessing.active_children():
            time.sleep(0.001)
        multiprocessing.active_children()[0].kill()

    threading.Thread(target=kill, daemon=True).start()
    args = "--sizes", "8", "--bs", "16", "--epochs", "9", "--workers", "1", "--runs", tmp_path, "--name", "a"
    with pytest.raises(SystemExit) as e:
        run(*DIGITS, *args)
    out, err = capsys.readouterr()
    assert e.value.code == 2 and err.count("\n") == 1 and "A process of --workers failed" in err
    assert f"--resume {tmp_path / 'digits' / 'a'}" in out.splitlines()[-1]


def test_the_same_seed_gives_the_same_run_with_and_without_workers(tmp_path):
    for workers in "0", "2":
        run(*SHORT, "--epochs", "2", "--runs", tmp_path, "--name", workers, "--workers", workers)
    assert_same_run(tmp_path / "digits" / "0", tmp_path / "digits" / "2")


def test_the_other_seeds_get_what_was_found_for_the_first():
    cfg = TrainConfig(lr="auto", seeds=3, seed=5, name="s")
    args = ["--lr", "auto", "--seeds", "3", "--seed", "5"]
    line = train.other_seeds(cfg, args, 6, {"lr": 0.05, "arch": "resnet18"})
    assert line.endswith("--lr 0.05 --arch resnet18 --seed 6 --seeds 2 --name s") and "auto" not in line


def test_seeds_whose_names_are_taken_are_refused_before_anything_is_trained(tmp_path, capsys):
    (tmp_path / "digits" / "s-6").mkdir(parents=True)
    with pytest.raises(SystemExit) as e:
        run(*SMALL, "--runs", tmp_path, "--seeds", "2", "--seed", "5", "--name", "s")
    assert (
        e.value.code == 2
        and "s-6 is there already" in capsys.readouterr().err
        and not (tmp_path / "digits" / "s-5").exists()
    )


def test_the_name_of_a_run_that_was_killed_at_once_is_free(tmp_path, capsys):
    left = tmp_path / "digits" / "a"
    left.mkdir(parents=True)
    (left / ".lock").touch()
    again = *SHORT, "--sizes", "16", "--runs", tmp_path, "--name", "a"
    run(*again)
    assert (
        left / "metrics.json"
    ).exists() and "Careful: the last epochs train on 16 pixels" in capsys.readouterr().out
    (left / "models" / "last.pth").unlink()  # it is large, and what was trained is still there
    with pytest.raises(SystemExit) as e:
        run(*again)
    assert (
        e.value.code == 2
        and "is there already" in capsys.readouterr().err
        and (left / "models" / "best.pth").exists()
    )


def test_muon_on_a_model_without_filters_is_one_line(tmp_path, capsys):
    assert "this architecture has none: choose --opt sgd or adamw" in failure(
        capsys, *DIGITS, "--arch", "timm:vit_tiny_patch16_224", "--opt", "muon", "--runs", tmp_path
    )
    assert not list(tmp_path.rglob("config.json"))


def test_a_run_whose_folder_is_removed_ends_in_one_line(tmp_path):
    process = start(*LONG, "--runs", tmp_path, "--name", "a")
    while (tmp_path / "digits").exists():
        shutil.rmtree(tmp_path / "digits", ignore_errors=True)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and re.fullmatch(
        f"sifar: No such file or directory \\({tmp_path}/digits/a/.*\\): check that .*\n", err
    )
    assert not list(tmp_path.iterdir())


def test_every_tenth_epoch_is_kept(tmp_path):
    run(*SHORT, "--bs", "1024", "--epochs", "11", "--valid-pct", "0", "--runs", tmp_path, "--name", "a")
    kept = sorted(o.name for o in (tmp_path / "digits" / "a" / "models").iterdir())
    assert kept == ["epoch_010.pth", "last.pth"]


def test_without_a_validation_split_the_last_weights_count(tmp_path, capsys):
    run(*SHORT, "--runs", tmp_path, "--name", "all", "--valid-pct", "0")
    path = tmp_path / "digits" / "all"
    metrics = json.loads((path / "metrics.json").read_text())
    assert (
        metrics["valid"] is None
        and metrics["best_epoch"] is None
        and 0 < metrics["test"]["top1"] <= 1
        and metrics["images"]["train"] == 1438
    )
    assert not (path / "models" / "best.pth").exists() and history(path)[0]["top1"] == ""
    learn = load_run(path)
    assert all(torch.equal(v, weights(path)["model"][k]) for k, v in learn.model.state_dict().items())


def test_a_folder_end_to_end(image_folder, tmp_path, capsys):
    run(
        "--dataset",
        image_folder,
        "--data",
        tmp_path,
        "--arch",
        "resnet8",
        "--epochs",
        8,
        "--lr",
        0.02,
        "--runs",
        tmp_path / "runs",
        "--name",
        "a",
    )
    metrics = json.loads((tmp_path / "runs" / "pets" / "a" / "metrics.json").read_text())
    assert metrics["test"]["top1"] > 0.9 and metrics["test"]["top5"] == 1
    assert f"export.py {tmp_path / 'runs' / 'pets' / 'a'}" in capsys.readouterr().out


def test_a_dry_run_keeps_nothing_and_a_cold_start_is_quiet(tmp_path):
    "The one training that starts as a user's does: all other processes are forked."
    args = "--dataset", "digits", "--arch", "resnet8", "--bs", "16", "--dry-run"
    done = subprocess.run([COLD, ROOT / "train.py", *args], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and "dry run went through" in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())


def failure(capsys, *args):
    "The line on stderr of a command that ends with exit code 2."
    with pytest.raises(SystemExit) as e:
        run(*args)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1 and err.startswith("sifar: ") and "Traceback" not in err
    return err


def test_a_loss_that_explodes_is_one_line_and_leaves_a_good_checkpoint(tmp_path, capsys):
    err = failure(capsys, *SMALL, "--lr", "1e30", "--precision", "fp32", "--runs", tmp_path, "--name", "a")
    assert re.search(r"loss became (nan|inf) in epoch 1, batch \d+, lr .*smaller --lr", err)
    assert all(torch.isfinite(o).all() for o in weights(tmp_path / "digits" / "a")["model"].values())
    assert "The loss became" in (tmp_path / "digits" / "a" / "training_log.txt").read_text()


def test_a_run_that_never_began_leaves_no_folder(tmp_path, capsys):
    assert "cuda:77 is not on this machine" in failure(
        capsys, *SMALL, "--device", "cuda:77", "--runs", tmp_path
    )
    assert "did you mean resnet18" in failure(
        capsys, *SMALL, "--arch", "timm:resnet18x", "--runs", tmp_path
    )
    assert not list(tmp_path.iterdir())


def files(path):
    return sorted(o for o in path.rglob("*") if o.is_file())


def test_a_folder_without_test_images_has_no_test_figures(image_folder, tmp_path, capsys):
    shutil.rmtree(image_folder / "test")
    run(
        *on_pictures(image_folder, tmp_path),
        "--name",
        "a",
    )
    assert json.loads((tmp_path / "runs" / "pets" / "a" / "metrics.json").read_text())["test"] is None
    assert "test   no images" in capsys.readouterr().out


def test_a_disk_that_takes_no_more_is_one_line_and_the_files_before_stay_good(tmp_path):
    done = subprocess.run(
        command(*SMALL, "--arch", "resnet10", "--bs", "512", "--runs", tmp_path, "--name", "a"),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000_000, 30_000_000)),
    )
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and "make room and run it again, a training with --resume" in done.stderr
    )
    path = tmp_path / "digits" / "a"
    assert weights(path)["epoch"] == 0 and not list(path.rglob("*.tmp"))


def test_a_place_that_takes_no_run_is_one_line_that_names_the_flag(capsys):
    assert "/proc/digits" in (err := failure(capsys, *SMALL, "--runs", "/proc")) and "by --runs" in err


@pytest.mark.slow
def test_too_many_open_files_is_one_line(tmp_path):
    words = ["ulimit -n 32; exec", COLD, ROOT / "train.py", *SHORT, "--workers", "8", "--runs", tmp_path]
    done = subprocess.run(["bash", "-c", " ".join(map(str, words))], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "fewer --workers" in done.stderr and "--resume" in done.stdout


@pytest.mark.slow
def test_a_closed_terminal_ends_a_run_like_a_signal(tmp_path):
    child, terminal = pty.fork()
    if not child:
        os.execv(COLD, [COLD, *map(str, command(*LONG, "--runs", tmp_path, "--name", "a")[1:])])
    seen = b""
    while not re.search(rb"  1  +\d\.\d{4} ", seen):
        seen += os.read(terminal, 10_000)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 129
    path = tmp_path / "digits" / "a"
    assert f"--resume {path}" in (path / "training_log.txt").read_text().splitlines()[-1]


def test_a_hangup_that_nohup_ignores_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with one_line_errors():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_file_gets_no_colours():
    code = "from sifar.log import console; console.print('[red]plain')"
    env = {**os.environ, "FORCE_COLOR": "1", "PYTHONPATH": str(ROOT)}
    assert subprocess.run([COLD, "-c", code], env=env, capture_output=True).stdout == b"plain\n"


def test_out_of_memory_names_the_batch_size_and_a_smaller_one(tmp_path):
    done = subprocess.run(
        command(*DIGITS, "--arch", "resnet34", "--precision", "fp32", "--bs", "1200", "--runs", tmp_path),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (3_000_000_000, 3_000_000_000)),
    )
    assert done.returncode == 2 and done.stderr == "sifar: Out of memory with --bs 1200: try --bs 600.\n"
