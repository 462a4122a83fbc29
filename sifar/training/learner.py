"""Data, model, loss, optimizer, metrics and callbacks put together as a fastai Learner."""
from functools import partial

import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.training import GradientClip
from fastai.losses import LabelSmoothingCrossEntropy
from fastai.metrics import accuracy, top_k_accuracy
from fastai.torch_core import set_seed

from ..config import parse_sizes
from . import schedule  # noqa: F401    gives Learner its fit_warmup_cosine
from .callbacks import EMA, GrowImages, Mix, Precision, RunLog, SaveBest, SaveLast, SeedEpochs, StopOnNaN, StopOnSignal
from .cpu import keep_memory
from .models import check_arch, get_model
from .optim import get_opt
from .precision import pick_device, pick_precision
from .recipe import RecipeLearner
from .trackers import trackers


def check_machine(cfg):
    "Raise a UserError for a device or an architecture that is not there, before any data is read."
    pick_device(cfg.device)
    check_arch(cfg.arch)


def get_learner(dls, cfg, path="."):
    "A Learner on `dls` as `cfg` says: label smoothing, its optimizer, callbacks that change the training, top-1 and top-5 accuracy."
    device = pick_device(cfg.device)
    if device.type == "cpu": keep_memory()
    else: torch.backends.cudnn.benchmark = True         # batches come in few sizes
    set_seed(cfg.seed)
    sizes = parse_sizes(cfg.sizes) if cfg.sizes else []
    model = get_model(cfg.arch, dls.c, (cfg.sz, *sizes), zero_init=cfg.opt != "muon")      # Muon would turn the filters of such blocks by noise
    if hasattr(model, "whitening"): model.whitening.fit(sample_images(dls))
    model.to(device)
    dls.to(device)
    dtype = pick_precision(cfg.precision, device)
    return RecipeLearner(
        dls, model, cfg.arch, path=path, **get_opt(cfg, dtype),
        loss_func=LabelSmoothingCrossEntropy(eps=cfg.smoothing),
        metrics=[accuracy, partial(top_k_accuracy, k=min(5, dls.c))],
        cbs=[*filter(None, (
            device.type != "mps" and ChannelsLast(),
            dtype != torch.float32 and Precision(dtype),
            sizes and GrowImages(sizes),
            (cfg.mixup or cfg.cutmix) and Mix(cfg.mixup, cfg.cutmix, cfg.mix_prob),
            cfg.ema and EMA(cfg.ema),
            cfg.clip and GradientClip(cfg.clip)))])


def sample_images(dls, n=5000):
    "Up to `n` training images of all classes, normalised: (n,3,h,w)."
    rows = dls.data.train
    x = torch.from_numpy(dls.data.images[rows[::max(1, len(rows) // n)]]).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(o).view(3, 1, 1) for o in dls.stats)
    return (x / 255 - mean) / std


def run_callbacks(learn, cfg, bar):
    "The callbacks of a training run that is kept in the folder `learn.path`; `bar` shows its progress."
    save_best = [SaveBest()] if len(learn.dls.valid) else []            # else nothing is chosen: the last weights count
    return [SeedEpochs(cfg.seed), StopOnNaN(), StopOnSignal(), RunLog(bar), *save_best, SaveLast(), *trackers(learn, cfg)]
