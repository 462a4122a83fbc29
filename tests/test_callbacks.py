import functools
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastai.vision.all import (
    Callback,
    CancelBatchException,
    CancelFitException,
    CrossEntropyLossFlat,
    SaveModelCallback,
    set_seed,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sifar import TrainConfig, UserError, get_dls, get_learner, load_learner
from sifar.data.datasets import load_data
from sifar.data.loaders import BatchAugment, make_dls
from sifar.log import progress
from sifar.training import callbacks
from sifar.training.callbacks import RunLog, SeedEpochs, StopOnNaN, StopOnSignal
from sifar.training.checkpoints import SaveLast
from sifar.training.graphs import CudaGraphs
from sifar.training.learner import settle
from sifar.training.precision import pick_device, pick_precision


class Short(Callback):
    "End the fit after two batches; note what the rest of the loop gets from the model."

    order = 20  # after Precision

    def __init__(self):
        self.dtypes = set()

    def after_pred(self):
        self.dtypes.add(self.pred.dtype)

    def after_batch(self):
        if self.iter == 1:
            raise CancelFitException


@functools.cache
def few_digits(valid_pct):
    "160 digits to train on and 32 to choose on, and the statistics of all."
    data = load_data(TrainConfig(dataset="digits", valid_pct=valid_pct))
    return replace(data, train=data.train[:160], valid=data.valid[:32]), data.stats()


def learner(**kwargs):
    "A small model on few digits; an epoch has three batches, unless `bs` says otherwise."
    cfg = TrainConfig(dataset="digits", arch="resnet8", **{"bs": 64, **kwargs})
    return get_learner(make_dls(cfg, *few_digits(cfg.valid_pct)), cfg)


def learner_of_all(**kwargs):
    "The same on all digits."
    cfg = TrainConfig(dataset="digits", arch="resnet8", **kwargs)
    return get_learner(get_dls(cfg), cfg)


FP16 = pytest.param("fp16", torch.float16, marks=pytest.mark.slow)  # which processors are slow at


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), FP16])
def test_the_forward_pass_runs_in_the_precision_asked_for(precision, dtype):
    learn, seen, short = learner(precision=precision), set(), Short()
    learn.model.head[2].register_forward_hook(lambda m, x, out: seen.add(out.dtype))
    with learn.no_bar(), learn.no_logging():
        learn.fit_warmup_cosine(1, 0.1, 0, cbs=short)
    assert seen == {dtype} and short.dtypes == {torch.float32}
    assert all(o.dtype == torch.float32 for o in learn.model.parameters())
    with learn.no_bar():
        preds, _ = learn.get_preds()
    assert preds.dtype == torch.float32


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_precisions_agree_on_the_loss(precision):
    losses = []
    for o in ("fp32", precision):
        learn = learner(precision=o)
        with learn.no_bar(), learn.no_logging():
            losses.append(learn.validate()[0])
    assert losses == pytest.approx([losses[0]] * 2, rel=0.01)


def test_fp16_scales_the_loss():
    learn, scales = learner(precision="fp16", bs=4), []

    class Look(Callback):
        order = 50

        def before_backward(self):
            scales.append((self.loss_grad / self.loss).item())

        def after_batch(self):
            raise CancelFitException

    with learn.no_bar(), learn.no_logging():
        learn.fit_warmup_cosine(1, 0.1, 0, cbs=Look())
    assert scales == [pytest.approx(65536, rel=1e-3)]


class Break(Callback):
    def __init__(self, e):
        self.e = e

    def after_pred(self):
        raise self.e


@pytest.mark.slow
def test_gradients_that_overflow_in_fp16_halve_the_scale_and_move_no_weight():
    learn = learner(precision="fp16", bs=8)
    seen = [(2.0**30, learn.model.head[2].weight.detach().clone())]
    learn.precision.scaler_state = {**torch.amp.GradScaler("cpu").state_dict(), "scale": 2.0**30}

    class Look(Callback):
        order = 100

        def after_batch(self):
            if self.training:
                seen.append((self.scaler.get_scale(), self.model.head[2].weight.detach().clone()))

    with learn.no_bar(), learn.no_logging():
        learn.fit_warmup_cosine(1, 0.1, 0, cbs=[Look(), StopOnNaN()])
    steps = [*zip(seen, seen[1:])]
    halved = [scale == before / 2 for (before, _), (scale, _) in steps]
    assert halved == [torch.equal(weight, before) for (_, before), (_, weight) in steps]
    assert 3 < sum(halved) < len(steps) == 20
    assert all(torch.isfinite(o).all() for o in learn.model.parameters())


@pytest.mark.parametrize("e", [CancelBatchException(), RuntimeError("bug"), KeyboardInterrupt()])
def test_autocast_is_off_after_a_batch_that_is_cancelled_or_fails(e):
    learn = learner(precision="bf16")
    try:
        with learn.no_bar(), learn.no_logging():
            learn.fit_warmup_cosine(1, 0.1, 0, cbs=[Break(e), Short()])
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert (
        not torch.is_autocast_enabled("cpu") and (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    )


def test_a_failing_model_leaves_autocast_off():
    learn = learner(precision="bf16")
    learn.model.head[2].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), learn.no_bar(), learn.no_logging():
        learn.fit_warmup_cosine(1, 0.1, 0)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("bad, every", [(math.nan, 1), (math.inf, 1), (math.nan, 3), (math.inf, 50)])
def test_a_loss_that_is_no_number_ends_the_run(bad, every):
    learn = learner(precision="fp32", bs=32)

    class Spoil(Callback):
        def after_pred(self):
            if self.iter == 3:
                self.learn.pred = self.pred * bad

    with pytest.raises(UserError) as e, learn.no_bar(), learn.no_logging():
        learn.fit_warmup_cosine(2, 0.1, 0, cbs=[Spoil(), StopOnNaN(every)])
    assert "epoch 1, batch 4, lr 0.0" in e.value.text and "smaller --lr" in e.value.text
    assert every > 1 or all(torch.isfinite(o).all() for o in learn.model.parameters())  # else before the step


def test_a_step_does_not_wait_for_a_gpu(monkeypatch, tmp_path):
    "Nothing of a step asks for a number that is on the device; only StopOnNaN does, with the last."
    learn, asked, steps = learner(augment="batch", precision="fp32", bs=16), [], []
    learn.path = tmp_path

    def counted(f):
        return lambda *args, **kwargs: asked.append(f) or f(*args, **kwargs)

    for o in ("item", "cpu", "tolist", "numpy"):
        monkeypatch.setattr(torch.Tensor, o, counted(getattr(torch.Tensor, o)))

    class Watch(Callback):
        order = 1000

        def after_batch(self):
            if self.training:
                steps.append(len(asked))

    with learn.no_bar(), progress() as bar:
        learn.fit_warmup_cosine(1, 0.1, 0, cbs=[StopOnNaN(50), RunLog(bar), Watch()])
    assert len(steps) > 5 and len(set(steps[:-1])) == 1 and asked


def test_one_bar_serves_fit_after_fit(tmp_path):
    learn = learner(precision="fp32", bs=64)
    learn.path = tmp_path
    with learn.no_bar(), progress() as bar:
        for _ in range(2):
            learn.fit_warmup_cosine(1, 0.1, 0, cbs=RunLog(bar))
    assert [task.finished for task in bar.tasks] == [True, True]


def test_batches_and_their_fill_are_where_the_model_is():
    dls = learner(augment="batch").dls
    dls.to(torch.device("meta"))
    assert {o.device.type for o in (*dls.train.read([0, 1]), *dls[2].read([0, 1]))} == {"meta"}
    assert {o.fill.device.type for o in dls.train.after_batch.fs if isinstance(o, BatchAugment)} == {"meta"}


def test_weights_that_are_no_numbers_after_the_last_step_of_an_epoch_reach_no_checkpoint(tmp_path):
    learn = learner(precision="fp32", valid_pct=0.0, bs=32)
    learn.path = tmp_path

    class Spoil(Callback):
        def after_step(self):
            if self.epoch == 1 and self.iter == self.n_iter - 1:
                next(self.model.parameters()).data.fill_(math.nan)

    with (
        pytest.raises(UserError, match="weights became .* in epoch 2, .* smaller --lr"),
        learn.no_bar(),
        progress() as bar,
    ):
        learn.fit_warmup_cosine(3, 0.1, 0, cbs=[Spoil(), StopOnNaN(), RunLog(bar), SaveLast()])
    state = torch.load(tmp_path / "models" / "last.pth", weights_only=True)
    assert state["epoch"] == len(state["history"]) == 1 and all(
        torch.isfinite(o).all() for o in state["model"].values()
    )


def test_a_device_that_is_not_there_is_named():
    for name in ("tpu", "cuda:99", "gpu"):
        with pytest.raises(UserError, match=f"--device {name} is not on this machine"):
            pick_device(name)
    assert pick_device("cpu") == torch.device("cpu")


def test_auto_precision_is_bf16_only_where_the_processor_may_be_fast_at_it():
    flags = Path("/proc/cpuinfo")
    if not flags.exists():
        pytest.skip("which instructions this processor has is known from Linux alone")
    able = "avx512_bf16" in flags.read_text() or "amx_bf16" in flags.read_text()
    found = pick_precision("auto", torch.device("cpu"))
    assert found == torch.float32 or able and found == torch.bfloat16
    assert all(pick_precision("auto", torch.device("cpu")) == found for _ in range(20))
    assert pick_precision("auto", torch.device("mps")) == torch.float32
    assert pick_precision("fp16", torch.device("cpu")) == torch.float16
    short = {torch.float32: "fp32", torch.bfloat16: "bf16"}[found]
    learn = learner()
    assert settle(TrainConfig(dataset="digits"), learn).precision == short


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_trains_in_every_precision():
    for precision in ("auto", "fp32", "bf16", "fp16"):
        learn = learner_of_all(precision=precision, bs=512, device="cuda")
        with learn.no_bar(), learn.no_logging():
            learn.fit_warmup_cosine(2, 0.1, 0)
        assert learn.recorder.values[-1][0] < math.log(10) + 0.3 and next(learn.model.parameters()).is_cuda


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("opt", ["sgd", "muon"])
def test_recorded_steps_are_those_that_a_gpu_takes_kernel_by_kernel(opt):
    "With CUDA graphs and without: losses, BatchNorm's statistics and the epochs' average, at two sizes."

    class Losses(Callback):
        def before_fit(self):
            self.seen = []

        def after_batch(self):
            if self.training:
                self.seen.append(self.loss.item())

    runs = []
    for graphs in (True, False):
        settings = {"precision": "fp32", "device": "cuda", "bs": 128, "augment": "batch", "opt": opt}
        learn = learner_of_all(**settings, sizes="16,32", cutmix=1.0, ema=0.9)
        recorder = [o for o in learn.cbs if isinstance(o, CudaGraphs)]
        assert len(recorder) == 1
        if not graphs:
            learn.remove_cbs(recorder)
        losses = Losses()
        with learn.no_bar(), learn.no_logging():
            learn.fit_warmup_cosine(2, 0.01, 0, cbs=[SeedEpochs(1), losses])
        assert "forward" not in learn.model.__dict__
        runs.append((losses.seen, learn.model.state_dict(), learn.validate()[0]))
    (seen, state, valid), (seen_plain, state_plain, valid_plain) = runs
    assert len(seen) > 10 and seen == pytest.approx(seen_plain, rel=0.02)
    assert valid == pytest.approx(valid_plain, rel=0.02)
    for name in state:
        if opt == "sgd":
            torch.testing.assert_close(state[name], state_plain[name], rtol=0.05, atol=0.02)
        # kernels add up in no fixed order, and Muon makes small differences larger: so each tensor as a whole
        off = torch.linalg.vector_norm((state[name] - state_plain[name]).double())
        size = torch.linalg.vector_norm(state_plain[name].double())
        assert off < 0.05 * size + 0.02 * state[name].numel() ** 0.5, name


class Watch(Callback):
    "Notes the size of each batch after the callbacks before it, and of the epoch that it belongs to."

    order = 30

    def before_fit(self):
        self.seen = []

    def before_batch(self):
        self.seen.append((self.training, self.epoch, self.x.shape[-1]))
        if self.training:
            raise CancelBatchException  # the sizes are all that is asked for


@pytest.mark.parametrize(
    "epochs, sizes",
    [
        (4, [16, 16, 24, 32]),
        (8, [16, 16, 16, 16, 24, 24, 32, 32]),
        (1, [24]),
        (2, [16, 32]),
        (3, [16, 24, 32]),
    ],
)
def test_images_grow_in_training_and_are_whole_in_validation(epochs, sizes):
    learn, watch = learner(sizes="16x2,24,32"), Watch()
    with learn.no_bar(), learn.no_logging():
        learn.fit_warmup_cosine(epochs, 0.1, 0, cbs=watch)
    assert [{s for t, e, s in watch.seen if t and e == i} for i in range(epochs)] == [{o} for o in sizes]
    assert {s for t, _, s in watch.seen if not t} == {32}


def test_shrunk_images_are_the_means_of_their_pixels():
    learn, x = learner(sizes="16"), torch.rand(4, 3, 32, 32)
    grow = learn.grow_images
    learn.epoch, learn.n_epoch, learn.xb, learn.yb = 0, 1, (x,), ()
    grow.before_train()
    grow.before_batch()
    inner = learn.xb[0][:, :, 1:-1, 1:-1]
    want = torch.nn.functional.interpolate(x, (16, 16), mode="bilinear", antialias=True)[:, :, 1:-1, 1:-1]
    assert torch.equal(inner, want) and learn.xb[0].mean() == pytest.approx(x.mean().item(), abs=0.01)


def mixed(**kwargs):
    "A batch as it comes, as a callback mixes it, the targets (n,10) behind the loss, and the learner."
    learn, got = learner(precision="fp32", **kwargs), {}

    class Take(Callback):
        order = -50

        def before_batch(self):
            got["x"], got["y"] = self.x.as_subclass(torch.Tensor).clone(), self.y

    class Look(Callback):
        order = 1  # after Mix

        def after_pred(self):
            got["mixed"] = self.x

        def after_loss(self):
            if not self.training:
                return
            # d loss / d logits = softmax - target
            (grad,) = torch.autograd.grad(self.loss_grad * len(self.pred), self.pred)
            got["targ"] = (self.pred.softmax(1) - grad).detach().as_subclass(torch.Tensor)
            raise CancelFitException

    with learn.no_bar(), learn.no_logging():
        learn.fit_warmup_cosine(1, 0.01, 0, cbs=[Take(), Look()])
    return got, learn


def test_images_a_second_leave_out_the_time_that_a_process_was_suspended(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Pass(Callback):
        "A batch takes a second; in the second one the process is stopped for an hour."

        def after_pred(self):
            now[0] += 1
            if self.iter != 1:
                return
            now[0] += 3600
            os.kill(os.getpid(), signal.SIGCONT)

    learn = learner(bs=64)
    learn.path = tmp_path
    with learn.no_bar():
        learn.fit_warmup_cosine(1, 0.01, 0, cbs=[Pass(), RunLog(progress())])
    assert [row["images_per_second"] for row in learn.history] == [learn.dls.train.bs]


@pytest.mark.parametrize("place", ["before_batch", "after_pred", "after_loss", "after_validate"])
def test_a_fit_that_is_interrupted_gives_back_what_callbacks_changed(place, tmp_path):
    def stop():
        raise KeyboardInterrupt

    learn = learner(mixup=1.0, ema=0.9, precision="bf16")
    learn.path, interrupt = tmp_path, Callback()
    interrupt.order = 1000  # after all others have made their changes
    setattr(interrupt, place, stop)
    before = learn.model, learn.loss_func, learn.logger, learn.recorder.smooth_loss
    handler = signal.getsignal(signal.SIGTERM)
    with learn.no_bar(), pytest.raises(KeyboardInterrupt):
        learn.fit_warmup_cosine(1, 0.01, 0, cbs=[interrupt, RunLog(progress()), StopOnSignal()])
    after = learn.model, learn.loss_func, learn.logger, learn.recorder.smooth_loss
    assert all(a is b for a, b in zip(before, after)) and signal.getsignal(signal.SIGTERM) is handler
    assert "forward" not in vars(learn.model)
    learn.export(tmp_path / "learner.pkl")
    assert load_learner(tmp_path / "learner.pkl").arch == "resnet8"


def test_smoothing_is_the_share_that_all_classes_get_alike():
    dls = get_dls(TrainConfig(dataset="digits", arch="resnet8"))
    losses = [
        get_learner(dls, TrainConfig(dataset="digits", arch="resnet8", smoothing=o)).loss_func
        for o in (0.0, 0.3)
    ]
    pred, targ = torch.randn(8, 10), torch.arange(8)
    none, some = (o(pred, targ) for o in losses)
    assert torch.allclose(none, -pred.log_softmax(1)[range(8), targ].mean())
    assert torch.allclose(some, 0.7 * none - 0.3 * pred.log_softmax(1).mean())


def smoothed(y, n=10, eps=0.1):
    return torch.nn.functional.one_hot(y.as_subclass(torch.Tensor), n) * (1 - eps) + eps / n


def test_mixup_mixes_images_and_targets_alike():
    torch.manual_seed(3)
    got, learn = mixed(mixup=1.0)
    x, y = got["x"], smoothed(got["y"])
    share = ((got["mixed"] - x.flip(0)) * (x - x.flip(0))).sum() / (x - x.flip(0)).square().sum()
    assert torch.allclose(got["mixed"], share * x + (1 - share) * x.flip(0), atol=1e-4)
    assert torch.allclose(got["targ"], share * y + (1 - share) * y.flip(0), atol=1e-4)
    assert type(learn.loss_func).__name__ == "LabelSmoothingCrossEntropy", (
        "also after a fit that was cancelled"
    )


def test_cutmix_pastes_one_rectangle_and_mixes_targets_by_its_area():
    got, _ = mixed(cutmix=1.0)
    x, y = got["x"], smoothed(got["y"])
    pasted = (got["mixed"] == x.flip(0)).all(1) & ~(x == x.flip(0)).all(1)
    kept = (got["mixed"] == x).all(1)
    assert (pasted | kept).all()
    hole = ~kept.all(0)
    ys, xs = torch.nonzero(hole, as_tuple=True)
    share = 1 - (ys.max() - ys.min() + 1) * (xs.max() - xs.min() + 1) / 32**2 if len(ys) else 1.0
    assert torch.allclose(got["targ"], share * y + (1 - share) * y.flip(0), atol=0.02)


def unmixed(**settings):
    "For each training batch of an epoch, whether Mix left it as it was."
    learn, same = learner_of_all(precision="fp32", mixup=1.0, bs=8, **settings), []

    class Take(Callback):
        order = -100

        def before_batch(self):
            self.learn.taken = self.x.clone()

    class Look(Callback):
        order = 100

        def before_batch(self):
            if not self.training:
                return
            same.append(torch.equal(self.x, self.taken))
            raise CancelBatchException  # nothing is to be trained

    set_seed(0)
    with learn.no_bar(), learn.no_logging():
        learn.fit_warmup_cosine(1, 0.01, 0, cbs=[Take(), Look()])
    return torch.tensor(same, dtype=float)


def test_a_share_of_the_batches_is_mixed():
    same = unmixed(mix_prob=0.25)
    assert same.numel() > 100 and 0.65 < same.mean() < 0.85


def test_validation_is_not_mixed():
    plain, mix = learner(precision="fp32"), learner(precision="fp32", mixup=1.0, cutmix=1.0)
    with plain.no_bar(), plain.no_logging(), mix.no_bar(), mix.no_logging():
        assert mix.validate() == plain.validate()
        mix.fit_warmup_cosine(1, 0.01, 0)
        assert mix.recorder.values[-1][1:] == mix.validate()


def test_ema_averages_the_weights_and_is_what_is_validated_and_left():
    learn, steps = learner(precision="fp32", ema=0.9, bs=32), []

    class Note(Callback):
        order = 100

        def after_batch(self):
            if self.training:
                steps.append(self.model.stem[0].weight.detach().clone())

    with learn.no_bar(), learn.no_logging():
        learn.fit_warmup_cosine(2, 0.05, 0, cbs=Note())
        average = steps[0]
        for i, o in enumerate(steps):
            average = average.lerp(o, 1 - min(0.9, 1 - (1 + i) ** (-2 / 3)))  # timm's warm-up
        assert torch.allclose(learn.model.stem[0].weight, average, atol=1e-4)
        assert learn.recorder.values[-1][1:] == learn.validate()


def test_gradients_are_clipped():
    learn, norms = learner(precision="fp32", clip=0.01), []

    class Look(Callback):
        order = 60

        def before_step(self):
            norms.append(torch.stack([p.grad.norm() for p in self.model.parameters()]).norm().item())

    with learn.no_bar(), learn.no_logging():
        learn.fit_warmup_cosine(1, 0.01, 0, cbs=Look())
    assert max(norms) == pytest.approx(0.01, rel=1e-3)


def test_pairs_are_mixed_where_there_are_few_images():
    learn = learner(mixup=0.2, bs=256)
    assert len(learn.dls.train) == 1
    with learn.no_bar(), learn.no_logging():
        learn.fit_warmup_cosine(1, 0.01, 0)


class Interrupt(Callback):
    "Ctrl-C in the first forward pass of training, or of validation."

    order = -40

    def __init__(self, training):
        self.when = training

    def after_pred(self):
        if self.training == self.when:
            raise KeyboardInterrupt


def test_mixing_takes_any_loss_and_goes_on_after_an_interruption():
    learn = learner(mixup=1.0)
    learn.loss_func = CrossEntropyLossFlat()
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(KeyboardInterrupt):
            learn.fit_warmup_cosine(1, 0.01, 0, cbs=Interrupt(training=True))
        learn.fit_warmup_cosine(1, 0.01, 0)
    assert isinstance(learn.loss_func, CrossEntropyLossFlat)


def test_smoothed_labels_of_any_loss_are_kept_when_mixing():
    torch.manual_seed(3)
    learn = learner(precision="fp32", mixup=1.0)
    learn.loss_func = CrossEntropyLossFlat(label_smoothing=0.3)
    with learn.no_bar(), learn.no_logging():
        learn.fit_warmup_cosine(1, 0.01, 0)
    assert learn.mix.targ.min().item() == pytest.approx(0.03)


def test_an_average_goes_together_with_fastai_s_own_choice_of_the_best_and_with_tta(tmp_path):
    learn, kept = learner(precision="fp32", ema=0.9, bs=32), SaveModelCallback(monitor="accuracy")
    learn.path, own = tmp_path, learn.model
    with learn.no_bar(), learn.no_logging():
        learn.fit_warmup_cosine(2, 0.05, 0, cbs=kept)
        best = torch.load(tmp_path / "models" / "model.pth", weights_only=True)
        assert all(torch.equal(v, best[k]) for k, v in learn.model.state_dict().items())
        learn.tta(n=2)
        learn.fit_warmup_cosine(1, 0.05, 0)
    assert learn.model is own and not all(torch.equal(v, best[k]) for k, v in own.state_dict().items())


def test_an_average_is_left_alone_by_lr_find_and_by_an_interruption():
    learn = learner(ema=0.9, bs=32)
    own, before = learn.model, {k: v.clone() for k, v in learn.model.state_dict().items()}
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=20, show_plot=False)
        assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
        with pytest.raises(KeyboardInterrupt):
            learn.fit_warmup_cosine(1, 0.01, 0, cbs=Interrupt(training=False))
        learn.fit_warmup_cosine(1, 0.01, 0)
    assert learn.model is own and learn.recorder.values[-1][1:] == learn.validate()


class Doubles(TorchDispatchMode):
    "Collects the operators that give float64, which Apple's MPS does not have."

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = (o for o in tree_leaves((args, out)) if isinstance(o, torch.Tensor))
        if any(o.dtype == torch.float64 for o in tensors):
            self.found.add(str(func))
        return out


@pytest.mark.parametrize(
    "settings",
    [
        {"opt": "sgd", "mixup": 0.2, "ema": 0.9},
        {"opt": "muon", "cutmix": 1.0, "augment": "batch", "clip": 1.0},
        {"opt": "adamw", "aug": "trivial", "balance": "weights"},
    ],
)
def test_a_training_computes_nothing_in_float64(settings):
    learn, doubles = learner(**settings), Doubles()
    with doubles, learn.no_bar(), learn.no_logging():
        learn.fit_warmup_cosine(1, 0.01, 0)
    assert not doubles.found
    with doubles:
        torch.ones(1).double()
    assert doubles.found
