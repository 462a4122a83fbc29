"""The learning-rate schedule: linear warm-up, then cosine or linear to zero, set for each batch."""
import numpy as np
from fastai.callback.schedule import ParamScheduler, SchedCos, SchedLin, combine_scheds
from fastai.learner import Learner
from fastcore.all import L, patch

from .callbacks import StartAt

FALLS = {"cosine": SchedCos, "linear": SchedLin}


def warmup_cosine(lr, warmup, fall="cosine"):
    """lr as a function of the position 0..1 in training.

    It rises linearly from 0 to `lr` over the share `warmup`, then goes down to 0 by `fall`."""
    down = FALLS[fall](lr, 0)
    if not warmup: return down
    if warmup >= 1:
        what_to_do = "pass fit_warmup_cosine a smaller warmup, or more epochs"
        raise ValueError(f"the warm-up takes {warmup:.3g} of the epochs: {what_to_do}")
    return combine_scheds([warmup, 1 - warmup], [SchedLin(0, lr), down])


@patch
def fit_warmup_cosine(self: Learner,
    n_epoch,                # epochs in all
    lr=None,                # peak learning rate, default the learner's
    warmup=5,               # epochs of linear warm-up, may be a fraction
    start_epoch=0,          # epochs done already, by a run that is resumed
    cbs=None,               # further callbacks for this fit
    fall="cosine",          # how it falls after the warm-up: cosine or linear
):
    "Fit for `n_epoch` epochs; the learning rate rises for `warmup` of them, then falls to zero."
    if self.opt is None: self.create_opt()
    self.opt.set_hyper("lr", self.lr if lr is None else lr)     # of a slice each group gets its own
    peaks = np.array([hyper["lr"] for hyper in self.opt.hypers])
    rates = warmup_cosine(peaks, warmup / n_epoch, fall)
    # leaves momentum alone; plain numbers, as they go into checkpoints
    sched = ParamScheduler({"lr": lambda pos: rates(pos).tolist()})
    self.fit(n_epoch - start_epoch, lr, cbs=[sched, StartAt(start_epoch, n_epoch), *L(cbs)])
