"""The optimizers of a Learner: SGD with Nesterov momentum, AdamW, and Muon on the filters of convolutions."""
from functools import partial

import torch
from fastai.optimizer import OptimWrapper
from fastai.torch_core import trainable_params

from ..errors import UserError

DEFAULTS = {"sgd": (0.1, 5e-4), "muon": (0.06, 5e-4), "adamw": (1e-3, 0.05)}      # peak learning rate, weight decay


def orthogonalize(g, dtype=torch.float32):
    """A matrix (n,m) with the singular vectors of `g` and singular values near 1, computed in `dtype`.

    Three Newton-Schulz steps, all of them on the smaller of the two squares of `g`. https://kellerjordan.github.io/posts/muon/"""
    x = (g / (g.norm() + 1e-7)).to(dtype)
    tall = x.shape[0] > x.shape[1]
    if tall: x = x.T
    square = x @ x.T
    product = one = torch.eye(len(x), dtype=dtype, device=x.device)
    for i in range(3):
        step = 3.4445 * one - 4.7750 * square + 2.0315 * square @ square
        product = step @ product if i else step
        if i < 2: square = step @ square @ step
    x = product @ x
    return (x.T if tall else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Muon on the first group, filters (o,i,h,w) taken as matrices (o,i*h*w); SGD on the others, at `scales` times the lr of the first.

    Filters keep their norm: at each step it is set to the root of their number, so that lr alone says how far they turn.
    torch.optim.Muon takes matrices only, and always computes in bfloat16, which is slow on many processors."""

    def __init__(self, params, lr=0.06, momentum=0.9, weight_decay=0, scales=(1, 10 / 3, 5 / 3), dtype=torch.float32):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        if len(self.param_groups) != len(scales): raise ValueError(f"Muon takes {len(scales)} groups of parameters, as split_filters makes them, not {len(self.param_groups)}.")
        self.scales, self.dtype = scales, dtype

    @torch.no_grad()
    def step(self, closure=None):
        for i, (group, scale) in enumerate(zip(self.param_groups, self.scales)):
            ps = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in ps]
            if not ps: continue
            if i: grads = list(torch._foreach_add(grads, ps, alpha=group["weight_decay"]))
            updates = self.nesterov(ps, grads, group["momentum"])
            if i == 0:
                roots = [len(p) ** 0.5 / (norm + 1e-7) for p, norm in zip(ps, torch._foreach_norm(ps))]
                torch._foreach_mul_(ps, roots)
                updates = [orthogonalize(o.flatten(1), self.dtype).view_as(o) for o in updates]
            torch._foreach_sub_(ps, updates, alpha=scale * group["lr"])

    def nesterov(self, ps, grads, mom):
        "The updates of `ps`: all of them by a few kernels, as starting one takes a GPU's host longer than what it computes."
        for p in ps:
            if "momentum_buffer" not in self.state[p]: self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in ps]
        torch._foreach_mul_(buffers, mom)
        torch._foreach_add_(buffers, grads)
        return torch._foreach_add(grads, buffers, alpha=mom)


def split_norms(model):
    "The parameters as two groups: filters and matrices; norms and biases."
    ps = trainable_params(model)
    return [[p for p in ps if p.ndim > 1], [p for p in ps if p.ndim < 2]]


def split_filters(model):
    "The parameters as three groups: filters but those on the image itself; other matrices; norms and biases."
    weights, vectors = split_norms(model)
    def is_filter(p): return p.ndim == 4 and p.shape[1] > 3
    filters = [p for p in weights if is_filter(p)]
    if not filters: raise UserError("--opt muon turns the filters of convolutions, and this architecture has none: choose --opt sgd or adamw.")
    return [filters, [p for p in weights if not is_filter(p)], vectors]


def lr_and_wd(cfg):
    "Peak learning rate and weight decay that `cfg` asks for, else those of its optimizer."
    return [default if o in (None, "auto") else o for o, default in zip((cfg.lr, cfg.wd), DEFAULTS[cfg.opt])]


def get_opt(cfg, dtype):
    "How a Learner optimizes as `cfg` says: its opt_func, splitter, lr and wd. Muon's matrix products are in `dtype`."
    lr, wd = lr_and_wd(cfg)
    norms_wd = wd if cfg.wd_norm else 0.0
    if cfg.opt == "muon": opt, splitter, wd = {"opt": Muon, "dtype": dtype}, split_filters, [0.0, wd, norms_wd]
    else:
        opt = {"opt": torch.optim.SGD, "momentum": 0.9, "nesterov": True} if cfg.opt == "sgd" else {"opt": torch.optim.AdamW}
        splitter, wd = (trainable_params, wd) if cfg.wd_norm else (split_norms, [wd, norms_wd])
    return {"opt_func": partial(OptimWrapper, **opt), "splitter": splitter, "lr": lr, "wd": wd}
