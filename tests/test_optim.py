import pytest
import torch
from torch import nn

from sifar import TrainConfig, get_dls, get_learner
from sifar.training.models import get_model
from sifar.training.optim import Muon, orthogonalize, split_filters, split_norms


@pytest.mark.parametrize("shape", [(20, 60), (60, 20), (24, 24)])
def test_orthogonalizing_keeps_directions_and_evens_their_lengths(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    o = u.T @ orthogonalize(g) @ vt.T
    assert torch.allclose(o, torch.diag(o.diagonal()), atol=1e-4), "the singular vectors stay"
    large = o.diagonal()[s > 0.1 * s[0]]
    assert 0.4 < large.min() and large.max() < 1.3 and s[0] / s[-1] > 2


def test_bfloat16_does_nearly_the_same():
    g = torch.randn(64, 576, generator=torch.Generator().manual_seed(0))
    a, b = orthogonalize(g), orthogonalize(g, torch.bfloat16)
    assert b.dtype == torch.float32 and torch.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.999


def test_one_step_of_muon():
    conv, head = nn.Conv2d(4, 6, 3), nn.Linear(5, 2)
    opt = Muon([{"params": o} for o in ([conv.weight], [head.weight], [head.bias])], lr=0.1, weight_decay=0.5)
    old, head_old, bias_old = (
        conv.weight.detach().clone(),
        head.weight.detach().clone(),
        head.bias.detach().clone(),
    )
    for p in (conv.weight, head.weight, head.bias):
        p.grad = torch.randn_like(p)
    opt.step()
    step = orthogonalize(1.9 * conv.weight.grad.flatten(1)).view_as(old)
    assert torch.allclose(conv.weight, old * 6**0.5 / old.norm() - 0.1 * step, atol=1e-5)
    assert torch.allclose(
        head.weight, head_old - 0.1 * 10 / 3 * 1.9 * (head.weight.grad + 0.5 * head_old), atol=1e-5
    )
    assert torch.allclose(
        head.bias, bias_old - 0.1 * 5 / 3 * 1.9 * (head.bias.grad + 0.5 * bias_old), atol=1e-5
    )


def test_every_parameter_of_resnet18_is_in_one_group():
    model = get_model("resnet18", 100)
    ps = list(model.parameters())
    for groups in (split_filters(ps), split_norms(ps)):
        assert sorted(map(id, sum(groups, []))) == sorted(map(id, model.parameters()))
    filters, others, vectors = split_filters(ps)
    assert (
        len(filters) == 19
        and {tuple(o.shape) for o in others} == {(64, 3, 3, 3), (100, 512)}
        and all(o.ndim == 1 for o in vectors)
    )


@pytest.mark.parametrize(
    "opt, kind, lr, wd",
    [("sgd", "SGD", 0.1, 5e-4), ("muon", "Muon", 0.06, 5e-4), ("adamw", "AdamW", 1e-3, 0.05)],
)
@pytest.mark.parametrize("wd_norm", [False, True])
def test_the_learner_gets_the_optimizer_asked_for(opt, kind, lr, wd, wd_norm):
    for given, (lr, wd) in (({}, (lr, wd)), ({"lr": 0.5, "wd": 0.25}, (0.5, 0.25))):  # noqa: B020
        cfg = TrainConfig(dataset="digits", arch="resnet8", bs=1000, opt=opt, wd_norm=wd_norm, **given)
        learn = get_learner(get_dls(cfg), cfg)
        with learn.no_bar(), learn.no_logging():
            learn.fit(0)  # which makes the optimizer
        assert type(learn.opt.opt).__name__ == kind and learn.lr == lr == learn.opt.hypers[0]["lr"]
        decays = {
            p.ndim < 2: group["weight_decay"]
            for group in learn.opt.opt.param_groups
            for p in group["params"]
            if p.ndim != 4 or p.shape[1] == 3 or opt != "muon"
        }
        assert decays == {True: wd if wd_norm else 0, False: wd}


@pytest.mark.parametrize("opt", ["sgd", "muon", "adamw"])
def test_each_optimizer_learns(opt):
    cfg = TrainConfig(
        dataset="digits", arch="resnet8", bs=32, sizes="8", aug="light", opt=opt, lr={"adamw": 0.01}.get(opt)
    )
    learn = get_learner(get_dls(cfg), cfg)
    with learn.no_bar(), learn.no_logging():
        learn.fit_warmup_cosine(2, warmup=1)
    assert learn.recorder.values[-1][0] < 2, "the loss in training; guessing has 2.3"
