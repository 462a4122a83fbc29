"""How the processes of one training join, and what they tell each other: gradients, figures, weights."""
import os
import signal
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from fastai.learner import Callback
from torch import multiprocessing

from ..distributed import launched, rank, world
from ..errors import UserError
from .precision import pick_device


@contextmanager
def joined(name):
    """All processes of torchrun, joined as one group, by NCCL on the GPUs that `name` means, else by gloo.

    Alone, nothing. An error leaves the group as it is: who waits for the others would wait in vain."""
    if not launched():
        yield
        return
    # on Linux: where torchrun is killed, its processes end too
    multiprocessing._prctl_pr_set_pdeathsig(signal.SIGTERM)     # type: ignore[attr-defined]
    device = pick_device(name)
    if device.type == "cuda": torch.cuda.set_device(device.index or 0)  # one process has no number
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
    # fastai would take these for its own way, which gathers the figures of each batch
    for name in ("WORLD_SIZE", "RANK"): os.environ[f"SIFAR_{name}"] = os.environ.pop(name)
    yield
    dist.barrier()
    dist.destroy_process_group()


def check_divides(cfg):
    "Raise a UserError where batches cannot be shared out equally."
    shares = world()
    if cfg.mixup or cfg.cutmix: shares *= 2                 # of each process's own images, pairs are mixed
    if world() == 1 or cfg.bs == "auto" or cfg.bs % shares == 0: return
    raise UserError(f"--bs {cfg.bs} is for all {world()} processes together, and cannot be shared out: "
                    f"it has to be a multiple of {shares}.")


class Ranks(Callback):
    """Average over all processes what each computes from its rows of a batch, so that they stay one run.

    A wrapper of the model, such as DDP, is not needed: so checkpoints, EMA and CUDA graphs see the plain
    model. All gradients go in one piece."""
    order = 1                       # right after Mix, which replaces the loss: all see the same one

    def after_loss(self):
        if self.training: self.learn.loss = average(self.loss.detach())

    def after_backward(self):
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        flat = average(torch.cat([g.flatten() for g in grads]))
        parts = flat.split([g.numel() for g in grads])
        torch._foreach_copy_(grads, [part.view(g.shape) for part, g in zip(parts, grads)])

    def after_train(self):
        "BatchNorm's statistics are of each process's own images: validation and checkpoints take their mean."
        models = [self.model]
        if hasattr(self.learn, "ema"): models.append(self.learn.ema.average.module)
        for model in models:
            for b in model.buffers():
                if b.is_floating_point(): average(b)

    def after_validate(self):
        # fastai runs get_preds as a validation: who asks for predictions puts them together
        if hasattr(self.learn, "gather_preds"): return
        for metric in (self.recorder.loss, *self.metrics):
            if not hasattr(metric, "total"): continue           # such as balanced, which asks all by itself
            sums = torch.tensor([float(metric.total), float(metric.count)], dtype=torch.float64)
            sums = total(sums.to(self.dls.device) if self.dls.device.type == "cuda" else sums)
            metric.total, metric.count = (v.item() for v in sums)


def total(x):
    "The sum of the tensor `x` over all processes, in place."
    dist.all_reduce(x)
    return x


def average(x): return total(x).div_(world())


def share_weights(model):
    "Give all processes the weights of the first, such as those that were chosen on valid."
    if world() == 1: return
    for v in model.state_dict().values(): dist.broadcast(v, 0)


def share_out(tensors, function):
    """What `function` makes of a list of tensors, a list of the same shapes.

    Each process gives it some of them only, and gets the rest from the others."""
    if world() == 1: return function(tensors)
    made, n = [torch.empty_like(t) for t in tensors], world()
    mine = tensors[rank()::n]
    if mine: torch._foreach_copy_(made[rank()::n], function(mine))
    for i, t in enumerate(made): dist.broadcast(t, i % n)
    return made
