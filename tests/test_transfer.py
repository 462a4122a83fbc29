import shutil
import signal

import pytest
import torch
from test_train import TWO_EPOCHS, assert_same_run, history, run, start

import export
from sifar import TrainConfig, UserError, get_dls, get_learner
from sifar.training.models import get_model, stages


def weights(learn):
    return {k: v.clone() for k, v in learn.model.state_dict().items()}


ARCHS = "resnet8", "resnet18", "sprintnet", "timm:convnext_atto", "timm:deit_tiny_distilled_patch16_224"


@pytest.mark.parametrize("arch", ARCHS)
def test_stages_hold_every_parameter_once_and_end_with_the_head(arch):
    model = get_model(arch, 7)
    groups = stages(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(groups) >= 4 and sorted(map(id, sum(groups, []))) == sorted(map(id, trained))
    assert all(7 in p.shape for p in groups[-1]) and groups[-1]


@pytest.mark.parametrize("form", ["run", "learner.pkl"])
def test_a_learner_starts_from_the_weights_of_a_run_or_of_a_learner_file(exported, form, caplog):
    run, _ = exported
    cfg = TrainConfig(dataset="digits", arch="resnet8", init=str(run if form == "run" else run / form))
    now = weights(get_learner(get_dls(cfg), cfg))
    best = torch.load(run / "models" / "best.pth", weights_only=True)
    assert all(torch.equal(now[k], best[k]) for k in best)


def test_a_head_for_other_classes_starts_anew_and_is_named(image_folder, exported, tmp_path, caplog):
    run, _ = exported
    cfg = TrainConfig(dataset=str(image_folder), data=str(tmp_path), arch="resnet8", init=str(run))
    with caplog.at_level("INFO"):
        learn = get_learner(get_dls(cfg), cfg)
    assert "new are head.2.weight, head.2.bias" in caplog.text
    best = torch.load(run / "models" / "best.pth", weights_only=True)
    assert torch.equal(learn.model.stem[0].weight, best["stem.0.weight"])


def test_what_cannot_be_started_from_is_one_line(exported, tmp_path):
    run, _ = exported
    (tmp_path / "learner.pkl").write_bytes(b"none")
    (tmp_path / "x.pth").write_bytes(b"none")
    for change, words in (
        ({"arch": "resnet18", "init": str(run)}, "another architecture"),
        ({"init": "nowhere"}, "has no weights"),
        ({"init": str(tmp_path / "learner.pkl")}, "no learner file"),
        ({"init": str(tmp_path / "x.pth")}, "damaged"),
    ):
        cfg = TrainConfig(dataset="digits", **{"arch": "resnet8", **change})
        with pytest.raises(UserError, match=words):
            get_learner(get_dls(cfg), cfg)
    for change, words in ({"init": "timm"}, "timm's models"), ({"freeze": 2}, "give --init"):
        with pytest.raises(UserError, match=words):
            TrainConfig(**change)


@pytest.mark.parametrize("opt", ["sgd", "muon", "adamw"])
def test_a_frozen_epoch_moves_the_head_and_norms_alone_and_later_stages_move_faster(opt, exported):
    run, _ = exported
    cfg = TrainConfig(dataset="digits", arch="resnet8", bs=512, opt=opt, init=str(run), freeze=1, epochs=2)
    learn = get_learner(get_dls(cfg), cfg)
    seen = [weights(learn)]
    rates = []

    def look(learn):
        seen.append(weights(learn))
        rates.append([h["lr"] for h in learn.opt.hypers])

    from fastai.learner import Callback

    class Look(Callback):
        def after_epoch(self):
            look(self.learn)

    with learn.no_bar(), learn.no_logging():
        learn.fit_warmup_cosine(2, warmup=0, cbs=Look())
    moved = [{k for k in a if not torch.equal(a[k], b[k])} for a, b in zip(seen, seen[1:])]
    assert {"head.2.weight", "stem.1.weight", "stem.1.running_mean"} <= moved[0]
    assert not any("conv" in k or k == "stem.0.weight" for k in moved[0])
    assert {"stem.0.weight", "blocks.0.conv1.weight", "blocks.2.conv2.weight"} <= moved[1]
    assert rates[0] == sorted(rates[0]) and rates[0][-1] / rates[0][0] == pytest.approx(10)
    assert all(p.requires_grad for p in learn.model.parameters())


TUNE = "--dataset digits --arch resnet8 --bs 64 --epochs 4 --freeze 2 --ema 0.9".split()


def test_a_fine_tuned_run_that_is_killed_goes_on_without_the_weights_that_it_started_from(exported, tmp_path):
    origin = tmp_path / "origin"
    shutil.copytree(exported[0], origin)
    tune = *TUNE, "--init", origin, "--runs", tmp_path
    run(*tune, "--name", "whole")
    process = start(*tune, "--name", "cut", until=TWO_EPOCHS)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    shutil.rmtree(origin)
    cut = tmp_path / "digits" / "cut"
    assert len(history(cut)) < 4
    run("--resume", cut)
    assert_same_run(tmp_path / "digits" / "whole", cut)
    export.main([str(cut)])
