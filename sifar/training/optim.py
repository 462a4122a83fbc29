"""The optimizers: SGD with Nesterov momentum, AdamW, and Muon on the filters of convolutions."""
from itertools import cycle

import torch
from fastai.optimizer import OptimWrapper
from fastai.torch_core import trainable_params

from ..errors import UserError
from .graphs import Recorded
from .models import stages
from .ranks import share_out

DEFAULTS = {                # peak learning rate, weight decay
    "sgd": (0.1, 5e-4),
    "muon": (0.06, 5e-4),
    "adamw": (1e-3, 0.05),
}
SPREAD = 10         # the rate of the head is so many times that of the first stage


def orthogonalize(g, dtype=torch.float32):
    """A matrix (n,m) with the singular vectors of `g`, and singular values near 1; computed in `dtype`.

    Three Newton-Schulz steps x -> (a + b x xT + c (x xT)^2) x, with a, b, c from
    https://kellerjordan.github.io/posts/muon/. Each step changes the singular values alone, by a
    s + b s^3 + c s^5. As it multiplies x by a polynomial of x xT from the left, all three are
    done on this square (n,n), which is small, and the large x is multiplied once, by their
    product."""
    # no singular value is above 1 then, or the steps would diverge
    x = (g / (g.norm() + 1e-7)).to(dtype)
    tall = x.shape[0] > x.shape[1]
    if tall: x = x.T                                # the smaller of the two squares
    square = x @ x.T                                # (n,n)
    one = torch.eye(len(x), dtype=dtype, device=x.device)
    product = one
    for i in range(3):
        step = 3.4445 * one - 4.7750 * square + 2.0315 * square @ square
        product = step @ product if i else step
        # the square of step @ x: all are polynomials of one matrix, so symmetric, and their order is free
        if i < 2: square = step @ square @ step
    x = product @ x                                 # (n,n) @ (n,m)
    if tall: x = x.T
    return x.to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Muon on the first of three groups of parameters, which are filters; SGD with Nesterov on the others.

    Filters (co,ci,h,w) are taken as matrices (co,ci*h*w). A model in stages has three groups for each.

    scales: factors of lr for each group. Filters keep their norm: at each step it is set to the
    root of their number, so that lr alone says how far they turn. torch.optim.Muon takes matrices
    only, and always computes in bfloat16, which is slow on many processors."""

    def __init__(self, params, lr=0.06, momentum=0.9, weight_decay=0,
                 scales=(1, 10 / 3, 5 / 3), dtype=torch.float32):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        n = len(self.param_groups)
        if n % len(scales):
            wanted = f"{len(scales)} groups of parameters, as split_filters makes them, or a multiple"
            raise ValueError(f"Muon takes {wanted}, not {n}.")
        self.scales, self.dtype = scales, dtype
        self.recorded = [Recorded(self.orthogonalize_all) for _ in self.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        for i, (group, scale) in enumerate(zip(self.param_groups, cycle(self.scales))):
            ps = [p for p in group["params"] if p.grad is not None]
            filters = i % len(self.scales) == 0
            if ps: self.step_group(ps, group, scale * group["lr"], self.recorded[i] if filters else None)

    def step_group(self, ps, group, lr, filters):
        "Update the parameters `ps` in place; `filters`: what makes filters orthogonal on a GPU."
        grads = [p.grad for p in ps]
        # weight decay as in torch's SGD: in the gradient. Filters have none, as their norm is set
        if not filters: grads = list(torch._foreach_add(grads, ps, alpha=group["weight_decay"]))
        updates = self.nesterov(ps, grads, group["momentum"])
        if filters:
            norms = torch._foreach_norm(ps)
            torch._foreach_mul_(ps, [len(p) ** 0.5 / (norm + 1e-7) for p, norm in zip(ps, norms)])
            on_gpu = updates[0].device.type == "cuda"
            updates = share_out(updates, filters if on_gpu else self.orthogonalize_all)
        torch._foreach_sub_(ps, updates, alpha=lr)

    def orthogonalize_all(self, filters):
        "Each of `filters` (co,ci,h,w), orthogonal as a matrix (co,ci*h*w)."
        return [orthogonalize(f.flatten(1), self.dtype).view_as(f) for f in filters]

    def nesterov(self, ps, grads, mom):
        """The updates of `ps` with Nesterov momentum.

        A few kernels for all of them, as starting one takes a GPU's host longer than what it
        computes."""
        for p in ps:
            state = self.state[p]
            if "momentum_buffer" not in state: state["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in ps]
        torch._foreach_mul_(buffers, mom)
        torch._foreach_add_(buffers, grads)                             # b = mom b + g
        return torch._foreach_add(grads, buffers, alpha=mom)            # g + mom b: one step ahead


def split_norms(ps):
    "Parameters as two groups: filters and matrices; norms and biases."
    return [[p for p in ps if p.ndim > 1], [p for p in ps if p.ndim < 2]]


def split_filters(ps):
    "Parameters as three groups: filters that Muon turns; other filters and matrices; norms and biases."
    filters, others = [], []
    weights, vectors = split_norms(ps)
    for p in weights:
        # not those on the colours (co,3,h,w), nor the head: Muon is not for inputs and outputs
        if p.ndim == 4 and p.shape[1] > 3: filters.append(p)
        else: others.append(p)
    return [filters, others, vectors]


def lr_and_wd(cfg, dls):
    """Peak learning rate and weight decay that `cfg` asks for, else those of its optimizer.

    Weights to start from would be lost at the full rate: it is less in small batches, and for few images."""
    lr, wd = DEFAULTS[cfg.opt]
    # measured in batches of 16, with 100 to 5,000 images: see bench/README.md
    if cfg.init:
        share = min(1, dls.train.bs / 200 * max(1, len(dls.data.train) / 1000) ** 0.5)
        lr = rounded(share * lr)
    if cfg.lr not in (None, "auto"): lr = cfg.lr    # auto: found later, and set in another cfg
    if cfg.wd is not None: wd = cfg.wd
    return [lr, wd]


def rounded(lr): return float(f"{lr:.3g}")        # a number that a person can type again


def get_opt(cfg, dtype, model, dls):
    """How a Learner optimizes `model` on `dls` as `cfg` says: its opt_func, splitter, lr and wd.

    A model that starts from other weights has groups for each stage, and rates that grow from the first stage
    to the head: lr is a slice, as fastai has it. Muon's matrix products are in `dtype`.
    Errors: UserError where Muon has nothing to turn."""
    lr, wd = lr_and_wd(cfg, dls)
    kinds, wds = split_and_decay(cfg, wd)
    if cfg.opt == "muon" and not kinds(trainable_params(model))[0]:
        why = "--opt muon turns the filters of convolutions, and this architecture has none"
        raise UserError(f"{why}: choose --opt sgd or adamw.")

    def splitter(model):
        parts = stages(model) if cfg.init else [trainable_params(model)]
        return [group for ps in parts for group in kinds(ps)]

    def opt_func(params, lr):
        # torch takes no slice; `fit` sets the rate of each group
        return OptimWrapper(params, lr=lr.stop if isinstance(lr, slice) else lr, **torch_opt(cfg.opt, dtype))

    n = len(splitter(model)) // len(wds)
    return {"opt_func": opt_func, "splitter": splitter, "wd": n * wds,
            "lr": slice(lr / SPREAD, lr) if cfg.init else lr}


def torch_opt(opt, dtype):
    "torch's optimizer and what it is called with, as fastai's OptimWrapper takes them."
    if opt == "muon": return {"opt": Muon, "dtype": dtype}
    if opt == "adamw": return {"opt": torch.optim.AdamW}
    # fastai's own SGD has no Nesterov
    return {"opt": torch.optim.SGD, "momentum": 0.9, "nesterov": True}


def split_and_decay(cfg, wd):
    "The function that splits parameters into groups by their kind, and the weight decay of each."
    norms_wd = wd if cfg.wd_norm else 0.0
    if cfg.opt == "muon": return split_filters, [0.0, wd, norms_wd]
    if cfg.wd_norm: return lambda ps: [ps], [wd]            # one group will do
    return split_norms, [wd, norms_wd]
