import csv
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import COLD, DIGITS
from filelock import FileLock
from PIL import Image

import train
from sifar import TrainConfig, UserError
from sifar.data.datasets import load_data
from sifar.data.loaders import make_dls
from sifar.distributed import part
from sifar.runs.load import last_state
from sifar.training.ranks import check_divides

SMALL = *DIGITS, "--augment", "batch", "--precision", "fp32"

STEPS = """
import sys
from pathlib import Path
import torch
from fastai.callback.core import Callback
from sifar import TrainConfig, get_dls, get_learner
from sifar.distributed import gather, is_first
from sifar.training.callbacks import SeedEpochs
from sifar.training.ranks import joined


class FixedNorms(Callback):
    "The statistics of BatchNorm are of a process's own images, and would tell one from two."
    order = 1

    def before_train(self):
        for m in self.model.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                m.eval()


def steps(**settings):
    cfg = TrainConfig(
        dataset="digits", arch="resnet8", bs=64, sizes="16", precision="fp32", device="cpu", seed=3, lr=0.02,
        **settings)
    learn = get_learner(get_dls(cfg), cfg)
    with learn.no_bar(), learn.no_logging():
        learn.fit_warmup_cosine(1, warmup=0, cbs=[SeedEpochs(3), FixedNorms()])
    assert len(learn.recorder.losses) == 20
    # the losses in the log are of the images of all processes
    assert len(set(gather(float(learn.recorder.losses[-1])))) == 1
    assert len(set(gather(float(sum(p.detach().double().sum() for p in learn.model.parameters()))))) == 1
    return learn.model.state_dict(), list(learn.recorder.values[-1])


MUON = {"augment": "batch", "opt": "muon"}
SETTINGS = {"augment": "batch", "aug": "weak"}, {"augment": "item", "ema": 0.9}, MUON


if __name__ == "__main__":
    with joined("cpu"):
        found = [steps(**settings) for settings in SETTINGS]
        steps(augment="batch", cutmix=1.0)
        if is_first():
            torch.save(found, sys.argv[1])
"""

# our sources, and where the libraries lie that are not installed
PACKAGES = f"{os.getcwd()}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"

JOINED = """
import torch
import torch.distributed as dist
from sifar import TrainConfig, get_dls, get_learner
from sifar.training.graphs import CudaGraphs
from sifar.training.ranks import joined

with joined("auto"):
    cfg = TrainConfig(dataset="digits", arch="resnet8", bs=64, augment="batch", device="cuda")
    learn = get_learner(get_dls(cfg), cfg)
    graphs = any(isinstance(o, CudaGraphs) for o in learn.cbs)
    with learn.no_bar(), learn.no_logging():
        learn.fit_warmup_cosine(1, warmup=0)
    print(dist.get_backend(), torch.cuda.current_device(), "graphs" if graphs else "")
"""


def torchrun(*args, n=2, python=COLD):
    "The command line of `n` processes that run `args`."
    start = [python, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    return [*start, "--nproc_per_node", str(n), *map(str, args)]


def forked(*args, **kwargs):
    "Run `n` processes that are forked from the server, torchrun's own one too."
    env = {**os.environ, "PYTHON_EXEC": sys.executable, "PYTHONPATH": PACKAGES}
    words = torchrun(*args, **kwargs, python=sys.executable)
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture
def image_files(tmp_path):
    "A folder with two pictures."
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(2):
        Image.new("RGB", (32, 32), (90 * i, 0, 0)).save(folder / f"{i}.png")
    return folder


def several(monkeypatch, world, rank):
    "As if torchrun had started this process."
    for name, value in {
        "TORCHELASTIC_RUN_ID": "x",
        "WORLD_SIZE": world,
        "RANK": rank,
        "LOCAL_RANK": rank,
    }.items():
        monkeypatch.setenv(name, str(value))


def test_two_processes_take_the_steps_of_one(tmp_path):
    "Weights after 20 steps, by batches and by items, SGD and Muon, and the figures on valid."
    script = tmp_path / "steps.py"
    script.write_text(STEPS)
    done = forked(script, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    here = runpy.run_path(script)
    for settings, (two, others) in zip(here["SETTINGS"], torch.load(tmp_path / "two")):
        one, figures = here["steps"](**settings)
        # Muon takes the directions in which a filter hardly changes for as important as all others
        close = 1e-2 if "opt" in settings else 1e-5
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=0, atol=close)
        assert others == pytest.approx(figures, abs=close)


def test_rows_are_shared_out(monkeypatch):
    parts = []
    for rank in range(3):
        several(monkeypatch, 3, rank)
        parts.append(part(list(range(10))))
    assert sum(parts, []) == list(range(10)) and {len(o) for o in parts} == {3, 4}


def test_batches_that_cannot_be_shared_out_are_one_line(monkeypatch):
    check_divides(TrainConfig(bs=127))
    several(monkeypatch, 4, 1)
    check_divides(TrainConfig(bs=128))
    with pytest.raises(UserError, match="--bs 126 is for all 4 processes .* a multiple of 4"):
        check_divides(TrainConfig(bs=126))
    with pytest.raises(UserError, match="a multiple of 8"):
        check_divides(TrainConfig(bs=132, mixup=0.2))


def test_what_all_processes_have_to_say_is_said_once():
    done = forked("train.py", "--bs", "abc", n=3)
    assert done.returncode and done.stderr.count("--bs: 'abc' should be a whole number or auto") == 1


def test_each_of_many_processes_has_images_of_a_small_set(monkeypatch):
    data = load_data(TrainConfig(dataset="digits"))
    data = replace(data, train=data.train[:160])
    several(monkeypatch, 8, 7)
    for mixup, bs in ((0.0, 8), (0.2, 16)):         # mixup mixes pairs of each process's own images
        dls = make_dls(TrainConfig(dataset="digits", mixup=mixup), data, data.stats())
        assert (dls.train.bs, len(dls.train)) == (bs, 160 // bs)


def test_a_process_has_its_own_part_of_valid_and_test(monkeypatch):
    cfg, seen = TrainConfig(dataset="digits", bs=64), []
    data = load_data(cfg)
    for rank in range(2):
        several(monkeypatch, 2, rank)
        dls = make_dls(cfg, data, data.stats())
        seen.append([len(dl.dataset) for dl in dls.loaders])
    (train_1, *rest_1), (train_2, *rest_2) = seen
    assert train_1 == train_2 and [a + b for a, b in zip(rest_1, rest_2)] == [143, 359]


def predict(exported, folder, table):
    args = "-m", "sifar.predict", exported[0] / "learner.pkl", folder, "--csv", table
    return forked(*args, n=3)


def test_files_are_shared_out_among_more_processes_than_there_are(exported, image_files, tmp_path):
    (image_files / "bad.png").write_text("no image")
    done = predict(exported, image_files, tmp_path / "a.csv")
    assert done.returncode == 0 and (done.stdout + done.stderr).count("Skipped: ") == 1, done.stderr
    rows = (tmp_path / "a.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == [str(image_files / f"{i}.png") for i in range(2)]


def test_files_of_which_none_is_an_image_are_one_line_of_all_processes(exported, tmp_path):
    (tmp_path / "bad.png").write_text("no image")
    done = predict(exported, tmp_path, tmp_path / "a.csv")
    assert done.returncode and done.stderr.count("sifar (") == 1, done.stderr
    assert "None of the 1 files could be read" in done.stderr and not (tmp_path / "a.csv").exists()


def started(folder):
    "A run of two processes with an epoch behind it: its folder, torchrun, and the ids of the two."
    args = *SMALL, "--epochs", "8", "--runs", folder, "--name", "a"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(torchrun("train.py", *args), stdout=log, stderr=log)
    while not (folder / "digits" / "a" / "history.csv").exists():
        assert process.poll() is None, (folder / "log").read_text()
        time.sleep(0.1)
    ranks = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()
    return folder / "digits" / "a", process, list(map(int, ranks))


@pytest.mark.slow
def test_a_run_of_two_processes_is_kept_by_one_survives_a_kill_and_goes_on_alone(tmp_path):
    run, process, ranks = started(tmp_path)
    os.kill(ranks[-1], signal.SIGKILL)
    assert process.wait(timeout=40)
    said = (tmp_path / "log").read_text()
    assert said.count("Another process ended") == 1, said
    assert f"--resume {run}" in said and "Traceback" not in said.partition("Another process ended")[0]
    assert 0 < last_state(run)["epoch"] < 8
    train.main(["--resume", str(run)])
    with (run / "history.csv").open() as f:
        for row in csv.DictReader(f):           # 20 batches, and the time of validation besides
            assert float(row["images_per_second"]) * float(row["seconds"]) >= 20 * 64
    assert json.loads((run / "metrics.json").read_text())["epochs"] == 8


@pytest.mark.slow
def test_processes_whose_torchrun_is_killed_end_too(tmp_path):
    run, process, ranks = started(tmp_path)
    process.kill()
    process.wait()
    with FileLock(run / ".lock", timeout=60):           # that of the training
        assert f"--resume {run}" in (tmp_path / "log").read_text()
    assert 0 < last_state(run)["epoch"] < 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_process_of_torchrun_on_a_gpu_joins_by_nccl_and_trains_by_graphs(tmp_path):
    script = tmp_path / "joined.py"
    script.write_text(JOINED)
    done = subprocess.run(
        torchrun(script, n=1),
        env={**os.environ, "PYTHONPATH": PACKAGES},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-3:] == ["nccl", "0", "graphs"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_one_process_on_a_gpu_has_nobody_to_synchronise_batchnorm_with(tmp_path):
    args = *SMALL, "--epochs", "1", "--device", "cuda", "--sync-bn", "--runs", tmp_path
    done = subprocess.run(torchrun("train.py", *args, n=1), capture_output=True, text=True, timeout=120)
    assert done.returncode and "--sync-bn is for several processes on GPUs" in done.stderr
