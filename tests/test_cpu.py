import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from fastai.learner import Callback, CancelFitException
from torch import nn

from sifar import TrainConfig, get_dls, get_learner
from sifar.training.callbacks import SeedEpochs
from sifar.training.cpu import SmallConvs
from sifar.training.precision import small_convs

SHAPES = [  # inputs, outputs, height, width, kernel, stride, padding
    (5, 7, 2, 2, 3, 1, 1),
    (5, 7, 3, 3, 3, 1, 1),
    (4, 6, 4, 4, 3, 2, 1),
    (4, 6, 5, 5, 3, 1, 1),
    (4, 6, 6, 6, 3, 1, 1),
    (4, 6, 8, 8, 3, 2, 1),
    (4, 6, 4, 4, 1, 2, 0),
    (4, 6, 3, 3, 1, 1, 0),
    (4, 6, 7, 7, 5, 2, 2),
    (3, 4, 4, 4, 3, 1, 0),
    (3, 5, 2, 2, 2, 1, 1),
    (3, 5, 3, 5, 3, 1, 1),
    (3, 5, 1, 1, 3, 1, 1),
    (4, 6, 16, 16, 3, 2, 1),
    (4, 6, 17, 17, 3, 2, 1),
    (4, 6, 8, 8, 1, 2, 0),
    (4, 6, 12, 12, 3, 1, 0),
    (4, 6, 13, 13, 3, 1, 0),
]


@pytest.mark.parametrize("all_passes", [False, True])
@pytest.mark.parametrize("ni, nf, h, w, kernel, stride, padding", SHAPES)
def test_a_small_convolution_and_its_gradients_are_those_of_torch(
        ni, nf, h, w, kernel, stride, padding, all_passes):
    torch.manual_seed(0)
    conv = nn.Conv2d(ni, nf, kernel, stride, padding, bias=False).double()
    x = torch.randn(6, ni, h, w, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    want = conv(x)
    with SmallConvs(torch.float64, all_passes):
        got = conv(x)
    by_stride_and_padding = {(2, 1): 64, (1, 0): 100} if kernel == 3 else {}
    most = 36 if all_passes else by_stride_and_padding.get((stride, padding), 9)
    assert (got.grad_fn.name() == "SmallConvBackward") == (want[0, 0].numel() <= most)
    assert want.grad_fn.name() == "ConvolutionBackward0"
    grad = torch.randn_like(want)
    wants, gots = (torch.autograd.grad(o, [x, conv.weight], grad) for o in (want, got))
    for a, b in zip((want, *wants), (got, *gots)):
        assert torch.allclose(a, b, atol=1e-12)


def test_a_gradient_is_in_memory_as_its_image_is():
    x = torch.randn(2, 8, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    with SmallConvs(torch.bfloat16, False):
        nn.Conv2d(8, 4, 3, 2, 1, bias=False)(x).sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_all_passes_are_products_in_float32_and_with_amx(monkeypatch):
    cpu = torch.device("cpu")
    for has, dtype, every in ("amx_bf16", torch.bfloat16, True), ("avx512_bf16", torch.bfloat16, False), (
            "avx512_bf16", torch.float32, True):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: {has: True}, raising=False)
        assert small_convs(cpu, dtype).all_passes == every


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False),
        nn.Conv2d(4, 4, 3, dilation=2, padding=2, bias=False),
        nn.Conv2d(4, 4, (1, 3), padding=(0, 1), bias=False),
        nn.Conv2d(4, 4, 3, padding="same", bias=False),
    ],
)
def test_other_convolutions_are_left_to_torch(conv):
    x = torch.randn(2, 4, 4, 4)
    with SmallConvs(torch.bfloat16, True):
        assert conv(x).grad_fn.name() == "ConvolutionBackward0" and torch.equal(
            conv(x),
            F.conv2d(
                x,
                *conv.parameters(),
                *([] if conv.bias is not None else [None]),
                conv.stride,
                conv.padding,
                conv.dilation,
                conv.groups,
            ),
        )
    big = torch.randn(2, 4, 7, 7)
    with SmallConvs(torch.bfloat16, True):
        assert nn.Conv2d(4, 4, 3, padding=1, bias=False)(big).grad_fn.name() == "ConvolutionBackward0"


def operators(fn):
    "The names of all that the gradient of a loss goes back through."
    found = {fn}
    for o in (todo := [fn]):
        new = {p for p, _ in o.next_functions if p} - found
        found |= new
        todo += new
    return {o.name() for o in found}


@pytest.mark.parametrize("ni, nf, pixels, kernel, small", [
    (256, 256, 4, 3, True), (256, 512, 2, 3, True), (128, 256, 4, 3, False), (256, 512, 2, 1, False),
    (256, 256, 5, 3, False)])
def test_in_float32_only_many_filters_on_few_pixels_are_products(ni, nf, pixels, kernel, small):
    torch.manual_seed(0)
    conv = nn.Conv2d(ni, nf, kernel, padding=kernel // 2, bias=False)
    x = torch.randn(2, ni, pixels, pixels)
    with SmallConvs(torch.float32, True):
        got = conv(x)
    assert (got.grad_fn.name() == "SmallConvBackward") == small
    torch.testing.assert_close(got, conv(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision, has, close", [
    ("bf16", "amx_bf16", 0.02), ("bf16", "avx512_bf16", 0.02), ("fp32", "amx_bf16", 1e-3)])
def test_a_training_with_them_is_the_same_training(precision, has, close, monkeypatch):
    "With them and as stock fastai trains in float32, or as a processor does that multiplies no bfloat16."
    losses = {}

    class Look(Callback):
        def after_loss(self):
            self.names = operators(self.loss_grad.grad_fn)

        def after_batch(self):
            if self.iter == 2:
                raise CancelFitException

    for able in (False, True):
        able_to = {has: able}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda a=able_to: a, raising=False)
        cfg = TrainConfig(dataset="digits", arch="resnet10", bs=32, sizes="16", precision=precision)
        learn, seen = get_learner(get_dls(cfg), cfg), Look()
        if precision == "fp32" and not able: learn.remove_cb(learn.precision)
        with learn.no_bar(), learn.no_logging():
            learn.fit_warmup_cosine(1, 0.01, 0, cbs=[SeedEpochs(1), seen])
        assert ("SmallConvBackward" in seen.names) == able
        losses[able] = torch.tensor([float(loss) for loss in learn.recorder.losses])
    assert torch.allclose(losses[False], losses[True], rtol=close)


def test_a_learner_makes_torch_ask_for_memory_once():
    "Page faults tell whether freed memory goes back to the system: 20 tensors have 390,625 pages."
    pytest.importorskip("resource")
    code = """import resource, torch
from sifar import TrainConfig, get_dls, get_learner
cfg = TrainConfig(dataset="digits", arch="resnet8")
get_learner(get_dls(cfg), cfg)
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20): torch.ones(20_000_000)
before = faults()
for _ in range(20): torch.ones(20_000_000)
print(faults() - before)"""
    assert (
        int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        < 100_000
    )
