import json
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import SMALL, write_images
from fastai.learner import Callback
from PIL import Image
from test_train import THREE_EPOCHS, assert_same_run, cut, history, run

import export
from sifar import TrainConfig, UserError, get_dls, get_learner
from sifar.data.datasets import ImageData
from sifar.data.loaders import normalized, settled
from sifar.runs.arguments import parse_args
from sifar.runs.report import balanced_error, standard_error
from sifar.training.metrics import balanced_accuracy
from sifar.training.mirror import shipped_model
from sifar.training.models import get_model, stages
from sifar.training.recipe import load_learner
from sifar.training.transfer import fit_head, regression


def weights(learn):
    return {k: v.clone() for k, v in learn.model.state_dict().items()}


ARCHS = "resnet8", "resnet18-late", "sprintnet", "timm:convnext_atto", "timm:deit_tiny_distilled_patch16_224"


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


def test_a_head_for_other_classes_is_fitted_to_them_and_named(image_folder, exported, tmp_path, caplog):
    run, _ = exported
    cfg = TrainConfig(dataset=str(image_folder), data=str(tmp_path), arch="resnet8", init=str(run))
    with caplog.at_level("INFO"):
        learn = get_learner(get_dls(cfg), cfg)
    assert "new are head.2.weight, head.2.bias" in caplog.text
    best = torch.load(run / "models" / "best.pth", weights_only=True)
    assert torch.equal(learn.model.stem[0].weight, best["stem.0.weight"])
    with learn.no_bar():
        assert learn.validate()[1] == 1, "it tells red from blue before anything is trained"
    learn.export(tmp_path / "learner.pkl")
    for cat, dog, other in (("cat", "dog", False), ("b", "a", True)):
        folder = tmp_path / f"of {cat}"
        shutil.copytree(image_folder, folder)
        for split in folder.iterdir():
            (split / "cat").rename(split / cat)
            (split / "dog").rename(split / dog)
        cfg = TrainConfig(
            dataset=str(folder), data=str(tmp_path), arch="resnet8", init=str(tmp_path / "learner.pkl")
        )
        caplog.clear()
        with caplog.at_level("INFO"):
            again = get_learner(get_dls(cfg), cfg)
        assert ("new are head.2.weight, head.2.bias" in caplog.text) == other, (
            "two other classes are not those"
        )
        with again.no_bar():
            assert again.validate()[1] == 1


def test_a_fitted_head_is_half_as_sure_as_the_regression():
    x, y, head = (
        torch.randn(40, 8, generator=torch.Generator().manual_seed(0)),
        torch.arange(40) % 2,
        torch.nn.Linear(8, 2),
    )
    weight, bias = regression(x, y, 2)
    fit_head(head, x, y)
    assert torch.allclose(2 * head.weight, weight) and torch.allclose(2 * head.bias, bias)


def test_from_weights_the_rate_follows_from_the_batch_and_the_number_of_images(exported):
    "Digits has 1,295 training images; an --lr that is given holds, and from nothing the usual one."
    run, _ = exported
    many = (1295 / 1000) ** 0.5
    for given, peak in (
        ({"bs": 16, "init": str(run)}, 0.008 * many),
        ({"bs": 64, "init": str(run), "opt": "muon"}, 0.06 * 0.32 * many),
        ({"bs": 16, "init": str(run), "valid_pct": 0.5}, 0.008),
        ({"bs": 250, "init": str(run)}, 0.1),
        ({"bs": 16, "init": str(run), "lr": 0.3}, 0.3),
    ):
        cfg = TrainConfig(dataset="digits", arch="resnet8", **given)
        lr = get_learner(get_dls(cfg), cfg).lr
        assert (lr.start, lr.stop) == pytest.approx((peak / 10, peak), rel=5e-3) and len(str(lr.stop)) < 8
    cfg = TrainConfig(dataset="digits", arch="resnet8", bs=16)
    assert get_learner(get_dls(cfg), cfg).lr == 0.1


def test_what_cannot_be_started_from_is_one_line(exported, tmp_path):
    run, _ = exported
    (tmp_path / "learner.pkl").write_bytes(b"none")
    for name in "x.pth", "x.safetensors":
        (tmp_path / name).write_bytes(b"none")
    for change, words in (
        ({"arch": "resnet18", "init": str(run)}, "another architecture"),
        ({"init": "nowhere"}, "has no weights"),
        ({"init": str(tmp_path / "learner.pkl")}, "no learner file"),
        ({"init": str(tmp_path / "x.pth")}, "damaged"),
        ({"init": str(tmp_path / "x.safetensors")}, "damaged"),
    ):
        cfg = TrainConfig(dataset="digits", **{"arch": "resnet8", **change})
        with pytest.raises(UserError, match=words):
            get_learner(get_dls(cfg), cfg)
    no_timm = "--arch resnet18: give --arch timm:NAME too"
    few = {"freeze": 2}, {"arch": "auto"}
    for change, words in ({"init": "timm"}, no_timm), *((one, "give --init") for one in few):
        with pytest.raises(UserError, match=words):
            TrainConfig(**change)


@pytest.mark.parametrize("opt", ["sgd", "muon", "adamw"])
def test_a_frozen_epoch_moves_the_head_and_norms_alone_and_later_stages_move_faster(opt, exported):
    run, _ = exported
    few = {"bs": 512, "sizes": "8", "epochs": 2}
    cfg = TrainConfig(dataset="digits", arch="resnet8", opt=opt, init=str(run), freeze=1, **few)
    learn = get_learner(get_dls(cfg), cfg)
    seen = [weights(learn)]
    rates = []

    def look(learn):
        seen.append(weights(learn))
        rates.append([h["lr"] for h in learn.opt.hypers])

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


def test_a_fine_tuned_run_that_is_killed_goes_on_without_the_weights_that_it_started_from(exported, tmp_path):
    origin = tmp_path / "origin"
    shutil.copytree(exported[0], origin)
    tune = *SMALL, "--bs", "256", "--freeze", "2", "--ema", "0.9", "--init", origin, "--runs", tmp_path
    run(*tune, "--name", "whole")
    cut(signal.SIGKILL, *tune, "--name", "killed", until=THREE_EPOCHS)
    shutil.rmtree(origin)
    path = tmp_path / "digits" / "killed"
    assert len(history(path)) < 4
    run("--resume", path)
    assert_same_run(tmp_path / "digits" / "whole", path)
    export.main([str(path)])


def test_a_folder_of_few_pictures_is_fine_tuned_and_its_batches_and_epochs_follow_from_it(
    image_folder, tmp_path, capsys
):
    here = "--dataset", image_folder, "--data", tmp_path, "--runs", tmp_path / "runs"
    run(*here, "--epochs", 1, "--name", "a")
    said = capsys.readouterr().out
    settings = json.loads((tmp_path / "runs" / "pets" / "a" / "config.json").read_text())["settings"]
    assert [settings[k] for k in ("preset", "init", "bs")] == ["finetune", "cifar100", 16]
    assert settings["arch"] == "resnet18-late"
    assert "--preset standard starts from nothing" in said and "Starts from cifar100" in said
    assert "--mirror off" in said and "top-5" not in said.split("time\n")[1], "there are two classes"
    assert "top-5" not in (tmp_path / "runs" / "pets" / "a" / "report.html").read_text()
    assert "± " in said and "has but" not in said, "it starts from a regression: few steps will do"
    for flags, preset in ("", "finetune"), ("--arch resnet8", "standard"), ("--preset fast", "fast"):
        flags = flags.split()
        assert parse_args([str(o) for o in (*here, *flags)]).preset == preset


def place(rng, n):
    "Noise, where the class is where a bright bar is."
    x = rng.integers(0, 120, (3 * n, 32, 32, 3), np.uint8)
    for i in range(3):
        x[i * n : (i + 1) * n, 8:24, 10 * i + 1 : 10 * i + 11] += 70
    return x, np.repeat(range(3), n)


def known(rng, n):
    "Clouds, where the class is what the shipped model takes them for."
    x = torch.from_numpy(rng.normal(128, 60, (1000, 3, 7, 7)))
    x = torch.nn.functional.interpolate(x, (32, 32), mode="bicubic")
    x = (x + torch.from_numpy(rng.normal(0, 20, x.shape))).clamp(0, 255).byte().permute(0, 2, 3, 1)
    stats = [0.507, 0.487, 0.441], [0.267, 0.256, 0.276]
    with torch.no_grad():
        y = shipped_model()(normalized(x, stats)).argmax(1)
    rows = [(y == c).nonzero()[:n, 0] for c in y.bincount().topk(4).indices]
    assert min(map(len, rows)) == n
    return x[torch.cat(rows)].numpy(), np.repeat(range(4), n)


@pytest.mark.parametrize("kind, arch", [(place, "resnet18-late"), (known, "resnet18")])
def test_auto_takes_the_head_that_suits_the_images(kind, arch, tmp_path, capsys):
    for i, (x, y) in enumerate(zip(*kind(np.random.default_rng(0), 20))):
        (tmp_path / "x" / str(y)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(x).save(tmp_path / "x" / str(y) / f"{i}.png")
    here = "--dataset", tmp_path / "x", "--data", tmp_path, "--runs", tmp_path / "runs", "--mirror", "on"
    run(*here, "--epochs", 1, "--name", "r")
    path, said = tmp_path / "runs" / "x" / "r", capsys.readouterr().out
    assert f"--arch {arch}, as" in said and f"{arch}: 11," in said, "it is what is trained"
    assert json.loads((path / "config.json").read_text())["settings"]["arch"] == arch
    run("--resume", path, "--epochs", 2)
    assert "--arch" not in capsys.readouterr().out, "it is as it was"
    export.main([str(path)])
    assert load_learner(path).arch == arch


def test_one_picture_of_each_class_is_enough_to_start(tmp_path):
    for name, color in ("cat", (220, 60, 30)), ("dog", (30, 60, 220)):
        write_images(tmp_path / "x" / name, 1, color)
    cfg = TrainConfig(preset="finetune", dataset=str(tmp_path / "x"), data=str(tmp_path))
    learn = get_learner(get_dls(cfg), cfg)
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())


def test_a_rare_class_is_told_before_anything_is_trained():
    rng = torch.Generator().manual_seed(0)
    y = torch.tensor([0] * 60 + [1] * 6)
    x, other = (torch.randn(66, 200, generator=rng) + y[:, None] for _ in range(2))
    weight, bias = regression(x, y, 2)
    right = (other @ weight.T + bias).argmax(1) == y
    assert right[y == 1].float().mean() >= 0.5 and right[y == 0].float().mean() >= 0.9


def test_architecture_follows_from_the_weights_unless_it_is_given(exported):
    for init in exported[0], exported[0] / "learner.pkl":
        assert parse_args(["--dataset", "digits", "--init", str(init)]).arch == "resnet8"
    assert parse_args(["--init", str(exported[0]), "--arch", "resnet10"]).arch == "resnet10"


@pytest.mark.parametrize("n, bs", [(20, 8), (245, 8), (700, 32), (2562, 128), (50_000, 128)])
def test_an_epoch_has_twenty_steps_where_there_are_images_enough(n, bs):
    rows = np.arange(n)
    data = ImageData(np.zeros((n, 8, 8, 3), np.uint8), rows % 2, ["a", "b"], rows, rows[:0], rows[:0])
    assert settled(TrainConfig(), data).bs == bs
    assert settled(TrainConfig(bs=64), data).bs == 64


@pytest.mark.parametrize("augment, aug", [("item", "light"), ("batch", "light"), ("batch", "weak")])
@pytest.mark.parametrize("mirror", ["on", "off"])
def test_images_are_mirrored_or_not(mirror, augment, aug, tmp_path):
    half = np.zeros((32, 32, 3), np.uint8)
    half[:, :16] = 255
    for name in "ab":
        (tmp_path / "x" / name).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(half).save(tmp_path / "x" / name / f"{i}.png")
    cfg = TrainConfig(
        dataset=str(tmp_path / "x"), data=str(tmp_path), mirror=mirror, augment=augment, aug=aug, bs=16
    )
    x, _ = get_dls(cfg).train.one_batch()
    left = x[:, 0, 8:24, 8:16].mean((1, 2)) > x[:, 0, 8:24, 16:24].mean((1, 2))
    assert left.all() if mirror == "off" else 0 < left.sum() < 16


@pytest.mark.parametrize("kind", ["sides", "colours"])
def test_auto_mirrors_a_folder_unless_mirror_images_are_not_recognised(kind, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for i, name in enumerate(("a", "b")):
        (tmp_path / "x" / name).mkdir(parents=True)
        for j in range(20):
            x = rng.integers(0, 120, (32, 32, 3), dtype=np.uint8)
            if kind == "sides":
                x[8:24, 16 * i + 2 : 16 * i + 14] += 130  # a bright square on the left, or on the right
            else:
                x[8:24, 8:24, i] += 130
            Image.fromarray(x).save(tmp_path / "x" / name / f"{j}.png")
    here = "--dataset", tmp_path / "x", "--data", tmp_path, "--runs", tmp_path / "runs", "--arch", "resnet8"
    run(*here, "--epochs", 1, "--name", "r")
    path, said = tmp_path / "runs" / "x" / "r", capsys.readouterr().out
    off = kind == "sides"
    assert json.loads((path / "config.json").read_text())["settings"]["mirror"] == ("off" if off else "on")
    assert ("--mirror off, as of 32 images" in said) == off and ("Images are mirrored" in said) != off
    run("--resume", path, "--epochs", 2)
    said = capsys.readouterr().out
    assert "--mirror" not in said and "are mirrored" not in said, "it is as it was"


def uneven(tmp_path, **kwargs):
    for name, n, color in ("many", 60, (220, 60, 30)), ("few", 6, (30, 60, 220)):
        write_images(tmp_path / "uneven" / "train" / name, n, color)
    write_images(tmp_path / "uneven" / "test" / "many", 8, (220, 60, 30))
    write_images(tmp_path / "uneven" / "test" / "few", 2, (225, 62, 31))  # never recognised
    return TrainConfig(dataset=str(tmp_path / "uneven"), data=str(tmp_path), arch="resnet8", bs=10, **kwargs)


def test_a_sampler_draws_all_classes_alike_and_weights_count_them_alike(tmp_path):
    few, many = (
        torch.cat([y for _, y in get_dls(uneven(tmp_path, balance=balance)).train]).tolist().count(0)
        for balance in ("none", "sampler")
    )
    assert few <= 6 and 15 <= many <= 45
    cfg = uneven(tmp_path, balance="weights", smoothing=0.0)
    learn = get_learner(get_dls(cfg), cfg)
    pred, targ = torch.tensor([[3.0, 0.0], [3.0, 0.0]]), torch.tensor([0, 1])
    right, wrong = torch.nn.functional.cross_entropy(pred, targ, reduction="none")
    loss = learn.loss_func(pred.to(learn.dls.device), targ.to(learn.dls.device))
    n = np.bincount(learn.dls.data.labels[learn.dls.data.train])
    assert loss.item() == pytest.approx((wrong.item() / n[1] + right.item() / n[0]) / (1 / n[0] + 1 / n[1]))


@pytest.mark.parametrize("monitor, column, sign", [("loss", "valid_loss", -1), ("balanced", "balanced", 1)])
def test_the_epoch_is_chosen_by_what_is_monitored_and_a_class_that_scores_0_is_named(
    tmp_path, capsys, monitor, column, sign
):
    cfg = uneven(tmp_path)
    here = "--dataset", cfg.dataset, "--data", tmp_path, "--runs", tmp_path / "runs", "--arch", "resnet8"
    run(*here, "--epochs", 3, "--monitor", monitor, "--mixup", 0.2, "--balance", "weights", "--name", "a")
    path = tmp_path / "runs" / "uneven" / "a"
    metrics = json.loads((path / "metrics.json").read_text())
    values = [sign * float(row[column]) for row in history(path)]
    assert metrics["best_epoch"] == 1 + values.index(max(values))
    assert metrics["images_of_class"]["test"] == [2, 8]
    page = (path / "report.html").read_text()
    right = dict(re.findall(r"<tr><td>(few|many)</td>.*<td class=n>(\d+\.\d+)</td></tr>", page))
    assert float(right["few"]) / 2 + float(right["many"]) / 2 == pytest.approx(
        100 * metrics["test"]["balanced"], abs=0.01
    )
    assert re.search("<tr><td>few</td><td class=n>5</td><td class=n>1</td><td class=n>2</td>", page)
    said = capsys.readouterr().out
    if metrics["test"]["top1"] == 0.8:
        assert "Not one test image is recognised of: few (2 images)" in said
        assert "More images of them may help" in said and "or --balance" not in said
        assert (", or --monitor balanced" in said) == (monitor == "loss"), "the one that is not in use"


def test_the_balanced_accuracy_is_that_of_scikit_learn():
    from sklearn.metrics import balanced_accuracy_score

    rng = np.random.default_rng(0)
    targs, preds = rng.choice(4, 200, p=[0.7, 0.2, 0.07, 0.03]), rng.choice(4, 200)
    assert balanced_accuracy(preds, targs) == pytest.approx(balanced_accuracy_score(targs, preds))


def test_a_standard_error_is_that_of_so_many_images_and_never_0():
    assert standard_error(0.544, 252) == pytest.approx((0.544 * 0.456 / 252) ** 0.5, rel=0.02)
    assert 0.1 < standard_error(1.0, 3) < 0.3 and standard_error(0.0, 3) == standard_error(1.0, 3)


def test_the_error_of_a_balanced_accuracy_is_what_draws_of_the_images_show():
    rng = np.random.default_rng(0)
    targs = np.repeat([0, 1, 2], (400, 60, 20))
    right = rng.random((2000, len(targs))) < np.array([0.9, 0.6, 0.7])[targs]
    draws = [balanced_accuracy(np.where(row, targs, 3), targs) for row in right]
    told = np.mean([balanced_error(np.where(row, targs, 3), targs) for row in right])
    assert told == pytest.approx(np.std(draws), rel=0.1)


def test_a_card_says_what_a_model_started_from(exported, tmp_path):
    from sifar.share.space import model_card

    about = json.loads((exported[0] / "model.json").read_text())
    assert about["init"] is None and b"started from" not in model_card(about)
    assert b"It started from the weights of cifar100" in model_card({**about, "init": "cifar100"})


def test_of_epochs_that_are_equally_right_the_one_of_the_smallest_loss_counts(image_folder, tmp_path, capsys):
    here = "--dataset", image_folder, "--data", tmp_path, "--runs", tmp_path / "runs", "--arch", "resnet8"
    run(*here, "--epochs", 6, "--bs", 8, "--lr", 0.02, "--name", "a")
    path = tmp_path / "runs" / "pets" / "a"
    best, rows = json.loads((path / "metrics.json").read_text()), history(path)
    tied = [row for row in rows if row["top1"] == max(row["top1"] for row in rows)]
    assert len(tied) > 1 and tied[0] != min(tied, key=lambda row: float(row["valid_loss"]))
    assert best["valid"]["loss"] == pytest.approx(min(float(row["valid_loss"]) for row in tied), rel=1e-3)
    assert rows[best["best_epoch"] - 1] == min(tied, key=lambda row: float(row["valid_loss"]))
    assert "top-1 %  balanced " in capsys.readouterr().out


def test_weights_that_cannot_be_had_are_named_before_a_picture_is_read(image_folder, tmp_path, capsys):
    here = "--dataset", image_folder, "--data", tmp_path, "--runs", tmp_path / "runs"
    with pytest.raises(SystemExit):
        run(*here, "--init", tmp_path / "nowhere")
    assert "nowhere has no weights" in capsys.readouterr().err and not list(tmp_path.glob("cache/*.npz"))


def test_a_run_that_trains_the_head_alone_says_so(image_folder, exported, tmp_path, capsys):
    here = "--dataset", image_folder, "--data", tmp_path, "--runs", tmp_path / "runs", "--init", exported[0]
    run(*here, "--epochs", 1, "--freeze", 2)
    said = capsys.readouterr().out
    assert "the head alone is trained, as --freeze 2 leaves nothing of 1 epoch\n" in said
    assert " 1 epoch in 0:0" in said


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A cache of Hugging Face's hub, which nothing but the cache is known of."
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "hub"


def in_cache(hub, name, tag, **kwargs):
    "Put weights of timm's model `name` into the cache, as those that were fetched; returns them."
    import timm
    from safetensors.torch import save_file

    model, repo = timm.create_model(name, **kwargs), hub / f"models--timm--{name}.{tag}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(model.state_dict(), repo / "snapshots" / ("0" * 40) / "model.safetensors")
    return model.state_dict()


def test_weights_of_timm_are_taken_from_the_cache_and_what_does_not_fit_is_named(hub, caplog):
    known = in_cache(hub, "resnet18", "a1_in1k")
    cfg = TrainConfig(dataset="digits", arch="timm:resnet18", init="timm", bs=32, dry_run=True)
    with caplog.at_level("INFO"):
        now = weights(get_learner(get_dls(cfg), cfg))
    # a stem of 3x3 for small images, a head for ten classes
    assert "Starts from timm; new are conv1.weight, fc.weight, fc.bias" in caplog.text
    new = {"conv1.weight", "fc.weight", "fc.bias"}
    assert {k for k in now if now[k].shape != known[k].shape or not torch.equal(now[k], known[k])} == new


def test_a_transformer_of_timm_keeps_its_positions_on_small_images(hub, caplog):
    in_cache(hub, "test_vit", "r160_in1k")
    cfg = TrainConfig(dataset="digits", arch="timm:test_vit", init="timm")
    with caplog.at_level("INFO"):
        get_learner(get_dls(cfg), cfg)
    assert "new are head.weight, head.bias\n" in caplog.text


def test_weights_of_timm_that_are_nowhere_are_one_line_at_once(hub, tmp_path, capfd):
    with pytest.raises(SystemExit):
        run("--dataset", "digits", "--arch", "timm:resnet18", "--init", "timm", "--runs", tmp_path)
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "http://127.0.0.1:9 is not reached): check the network, or leave" in err
