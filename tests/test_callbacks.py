import math

import pytest
import torch
from fastai.vision.all import Callback, CancelBatchException, CancelFitException

from sifar import TrainConfig, UserError, get_dls, get_learner
from sifar.callbacks import Precision, StopOnNaN
from sifar.learner import pick_device, pick_precision


class Short(Callback):
    "End the fit after two batches; note what the rest of the loop gets from the model."
    order = 20              # after Precision
    def __init__(self): self.dtypes = set()
    def after_pred(self): self.dtypes.add(self.pred.dtype)
    def after_batch(self):
        if self.iter == 1: raise CancelFitException


def learner(**kwargs):
    cfg = TrainConfig(dataset="digits", arch="resnet8", **kwargs)
    return get_learner(get_dls(cfg), cfg)


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_forward_pass_runs_in_the_precision_asked_for(precision, dtype):
    learn, seen, short = learner(precision=precision), set(), Short()
    learn.model.head[2].register_forward_hook(lambda m, x, out: seen.add(out.dtype))
    with learn.no_bar(), learn.no_logging(): learn.fit_warmup_cosine(1, 0.1, 0, cbs=short)
    assert seen == {dtype} and short.dtypes == {torch.float32}
    assert all(o.dtype == torch.float32 for o in learn.model.parameters())
    with learn.no_bar(): preds, _ = learn.get_preds()
    assert preds.dtype == torch.float32


def test_precisions_agree_on_the_loss():
    losses = []
    for precision in ("fp32", "bf16", "fp16"):
        learn = learner(precision=precision)
        with learn.no_bar(), learn.no_logging(): losses.append(learn.validate()[0])
    assert losses == pytest.approx([losses[0]] * 3, rel=0.01)


def test_fp16_scales_the_loss():
    learn, scales = learner(precision="fp16"), []

    class Look(Callback):
        order = 50
        def before_backward(self): scales.append((self.loss_grad / self.loss).item())
        def after_batch(self): raise CancelFitException
    with learn.no_bar(), learn.no_logging(): learn.fit_warmup_cosine(1, 0.1, 0, cbs=Look())
    assert scales == [pytest.approx(65536, rel=1e-3)]


class Break(Callback):
    def __init__(self, e): self.e = e
    def after_pred(self): raise self.e


@pytest.mark.parametrize("e", [CancelBatchException(), RuntimeError("bug"), KeyboardInterrupt()])
def test_autocast_is_off_after_a_batch_that_is_cancelled_or_fails(e):
    learn = learner(precision="bf16")
    try:
        with learn.no_bar(), learn.no_logging(): learn.fit_warmup_cosine(1, 0.1, 0, cbs=[Break(e), Short()])
    except (RuntimeError, KeyboardInterrupt): pass
    assert not torch.is_autocast_enabled("cpu") and (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_a_failing_model_leaves_autocast_off():
    learn = learner(precision="bf16")
    learn.model.head[2].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), learn.no_bar(), learn.no_logging(): learn.fit_warmup_cosine(1, 0.1, 0)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run_before_the_step(bad):
    learn = learner(precision="fp32")

    class Spoil(Callback):
        def after_pred(self):
            if self.iter == 3: self.learn.pred = self.pred * bad
    with pytest.raises(UserError) as e, learn.no_bar(), learn.no_logging(): learn.fit_warmup_cosine(2, 0.1, 0, cbs=[Spoil(), StopOnNaN()])
    assert "epoch 1, batch 4, lr 0.0" in e.value.text and "smaller --lr" in e.value.text
    assert all(torch.isfinite(o).all() for o in learn.model.parameters())


def test_a_device_that_is_not_there_is_named():
    for name in ("tpu", "cuda:99", "gpu"):
        with pytest.raises(UserError, match=f"--device {name} is not on this machine"): pick_device(name)
    assert pick_device("cpu") == torch.device("cpu")


def test_auto_precision_is_bf16_only_where_the_processor_is_fast_at_it():
    able = torch.cpu.get_capabilities()
    fast = bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    assert pick_precision("auto", torch.device("cpu")) == (torch.bfloat16 if fast else torch.float32)
    assert pick_precision("auto", torch.device("mps")) == torch.float32
    assert pick_precision("fp16", torch.device("cpu")) == torch.float16
    assert any(isinstance(o, Precision) for o in learner().cbs) == fast


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_trains_in_every_precision():
    for precision in ("auto", "fp32", "bf16", "fp16"):
        learn = learner(precision=precision, device="cuda")
        with learn.no_bar(), learn.no_logging(): learn.fit_warmup_cosine(2, 0.1, 0)
        assert learn.recorder.values[-1][0] < math.log(10) + 0.3 and next(learn.model.parameters()).is_cuda
