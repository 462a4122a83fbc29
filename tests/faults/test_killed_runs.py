"""A training run that is killed and interrupted again and again ends as if nothing had happened."""

import csv
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import DIGITS
from test_train import assert_same_run, command

import train
from sifar import UserError
from sifar.runs.start import locked

pytestmark = pytest.mark.slow
LONG = *DIGITS, "--epochs", "60", "--ema", "0.9", "--workers", "2"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    train.main([*LONG, "--runs", str(folder), "--name", "whole"])
    return folder / "digits" / "whole"


def wait_for(there, process):
    "Wait, as closely as possible, until `there()`; False where the process ends before."
    while not there():
        if process.poll() is not None:
            return False
    return True


def strike(run, signum, rng, log, pace):
    "Start or resume `run`, and send it `signum` at some moment; its exit code. pace: seconds an epoch."
    args = (
        ("--resume", run)
        if (run / "models" / "last.pth").exists()
        else (*LONG, "--runs", run.parents[1], "--name", run.name)
    )
    with open(log, "w") as out:
        process = subprocess.Popen(
            command(*args), stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    assert wait_for(
        lambda: "train loss" in log.read_text() and (run / "models" / "last.pth").exists(), process
    ), log.read_text()
    time.sleep(rng.uniform(0, 2 * pace))
    if rng.random() < 0.5:
        name = rng.choice(("models/.last.pth-*.tmp", "models/.best.pth-*.tmp", ".history.csv-*.tmp"))
        end = time.monotonic() + 2 * pace  # not every epoch is the best
        wait_for(lambda: any(run.glob(name)) or time.monotonic() > end, process)
    if signum == signal.SIGINT:
        os.killpg(process.pid, signum)  # as a terminal does: to the workers too
    else:
        process.send_signal(signum)
    code, free = process.wait(), False
    while not free:  # of a process that is forked, as in tests, that which was killed is but the front
        with suppress(UserError), locked(run):
            free = True
    return code


def check_folder(run):
    "The history has each epoch once, and the checkpoint is of its last or next to last; the epochs done."
    lines = (run / "history.csv").read_text().splitlines() if (run / "history.csv").exists() else []
    rows = [int(o["epoch"]) for o in csv.DictReader(lines)]
    epoch = torch.load(run / "models" / "last.pth", weights_only=True)["epoch"]
    assert rows == list(range(1, len(rows) + 1)) and epoch in (len(rows), len(rows) - 1)
    if epoch:
        torch.load(run / "models" / "best.pth", weights_only=True)
    return epoch


@pytest.mark.parametrize(
    "signum, code, times", [(signal.SIGKILL, -9, 40), (signal.SIGTERM, 143, 10), (signal.SIGINT, 130, 10)]
)
def test_a_run_ends_the_same_however_often_it_is_stopped(
    undisturbed, tmp_path, campaign, signum, code, times
):
    rng, run, log, epochs, writing = (
        random.Random(int(signum)),
        tmp_path / "runs" / "digits" / "cut",
        tmp_path / "log",
        [],
        0,
    )
    with (undisturbed / "history.csv").open() as f:
        pace = statistics.median(float(o["seconds"]) for o in csv.DictReader(f))
    for _ in range(times):
        assert strike(run, signum, rng, log, pace) == code, log.read_text()
        writing += bool(list(run.rglob("*.tmp")))
        if signum != signal.SIGKILL:
            assert "Traceback" not in log.read_text() and f"--resume {run}" in log.read_text()
        epochs.append(check_folder(run))
    train.main(["--resume", str(run)])
    assert epochs == sorted(epochs)
    assert_same_run(undisturbed, run)
    assert not list(run.rglob("*.tmp"))
    campaign(
        f"{signal.Signals(signum).name} to a training run, then --resume",
        times,
        times,
        f"{writing} of them left a half-written file under another name",
    )


@pytest.mark.parametrize("seconds", [0, 0.5, 1, 2, 3, 4])
def test_a_run_that_is_killed_as_it_starts_leaves_nothing_that_is_taken_for_a_run(
    tmp_path, campaign, seconds
):
    process = subprocess.Popen(
        command(*LONG, "--runs", tmp_path, "--name", "a"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    time.sleep(seconds)
    process.kill()
    process.wait()
    run = tmp_path / "digits" / "a"
    if (run / "models" / "last.pth").exists():
        check_folder(run)
    else:
        done = subprocess.run(command("--resume", run), capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        done = subprocess.run(
            [sys.executable, "export.py", run],
            cwd=Path(train.__file__).parent,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and done.stderr.count("\n") == 1
    campaign("SIGKILL to a run as it starts", 1, 1)
