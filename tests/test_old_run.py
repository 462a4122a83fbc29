"""A run folder of an older version is used by this one.

Commit 117ebb0, the last one before the wings, wrote it: train.py --dataset digits --arch resnet8 --bs 128
--epochs 8 --warmup 0.2 --aug light --lr 0.3 --name old. So that it is small, weights and momentum were
rounded to 64ths before each validation, and report.html was left out."""

import json
import tarfile
from pathlib import Path

import pytest
from test_train import history

import export
import train
from sifar import Predictor, get_dls
from sifar.runs import report
from sifar.runs.run import Run

ARCHIVE = Path(__file__).with_name("data") / "run_of_117ebb0.tar.xz"


@pytest.fixture
def old(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path / "old"


def metrics(run):
    return json.loads((run / "metrics.json").read_text())


def test_it_is_reported_with_the_figures_that_it_had(old):
    before = metrics(old)
    report.main([str(old)])
    after = metrics(old)
    for split in ("valid", "test"):
        # what is said besides is younger than the run
        assert {k: after[split][k] for k in before[split]} == pytest.approx(before[split], abs=0.01)
    assert (after["best_epoch"], after["epochs"], after["images"]) == (8, 8, before["images"])
    assert "--lr 0.3 --name old" in (old / "report.html").read_text()


def test_it_is_resumed_for_another_epoch(old):
    before = history(old)
    train.main(["--resume", str(old), "--epochs", "9"])
    rows = history(old)
    # columns that are younger than the run are empty
    assert [{k: v for k, v in row.items() if v} for row in rows[:8]] == before and len(rows) == 9
    # one that began anew would be near 2.3, the logarithm of 10 classes
    assert float(rows[8]["train_loss"]) < 1.9
    assert len(json.loads((old / "config.json").read_text())["commands"]) == 2


def test_it_is_exported_and_predicts_as_well_as_it_said(old):
    export.main([str(old)])
    cfg, predictor = Run(old).settings, Predictor(old)
    data = get_dls(cfg).data
    top = predictor.predict_batch(data.images[data.test], k=1)
    hits = [name == data.vocab[data.labels[i]] for i, ((name, _),) in zip(data.test, top)]
    assert sum(hits) / len(hits) == pytest.approx(metrics(old)["test"]["top1"], abs=0.01)
