"""Data, model, loss, optimizer, metrics and callbacks put together as a fastai Learner."""
from dataclasses import asdict, replace

import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.training import GradientClip
from fastai.torch_core import set_seed

from ..config import FREE_ON_RESUME, HEADS, parse_sizes
from ..data.loaders import get_dls, normalized, settled
from ..distributed import is_first, world
from ..errors import UserError
from . import schedule  # noqa: F401    gives Learner its fit_warmup_cosine
from .callbacks import (
    EMA,
    Freeze,
    GrowImages,
    Mix,
    Precision,
    RunLog,
    SeedEpochs,
    StopOnNaN,
    StopOnSignal,
)
from .checkpoints import SameFolder, SaveBest, SaveLast
from .graphs import CudaGraphs
from .mirror import settle_mirror
from .models import check_arch, get_model
from .optim import get_opt, lr_and_wd, split_and_decay
from .precision import DTYPES, pick_device, pick_precision, prepare
from .ranks import Ranks, check_divides
from .recipe import RecipeLearner
from .trackers import trackers
from .transfer import fitting_weights, settle_arch, start_from


def check_machine(cfg):
    "Raise a UserError for a device, model or weights that cannot be had, before any data is read."
    pick_device(cfg.device)
    if cfg.arch == "auto": cfg = replace(cfg, arch=HEADS[0])       # its body is that of the others
    check_arch(cfg.arch)
    if cfg.init and not cfg.resume: fitting_weights(get_model(cfg.arch, 2, (cfg.sz, *image_sizes(cfg))), cfg)
    check_divides(cfg)
    if cfg.sync_bn and not cfg.resume and (world() == 1 or pick_device(cfg.device).type != "cuda"):
        raise UserError("--sync-bn is for several processes on GPUs, as torchrun starts them.")


def settled_dls(cfg):
    "`cfg` with what auto stands for in --bs, --mirror and --arch, and the DataLoaders that it asks for."
    dls = get_dls(cfg)
    cfg, dls = settle_mirror(settled(cfg, dls.data), dls)
    return settle_arch(cfg, dls), dls


def get_learner(dls, cfg, path=".", start=True):
    """A Learner on `dls` as `cfg` says: model, smoothed loss, optimizer, top-1, top-5 and balanced accuracy.

    Its callbacks are those that change the training. start: with the weights of cfg.init, where there
    is one; otherwise the caller fills in those of a run. Errors: UserError where device, model or weights
    cannot be had, or where cfg.resume would do nothing."""
    if cfg.resume and start:
        how = f"train.main(['--resume', {cfg.resume!r}])"
        raise UserError(f"get_learner does not go on with a run, {how} does: leave resume out.")
    device = pick_device(cfg.device)
    prepare(device)
    if start: cfg = settle_arch(cfg, dls)
    set_seed(cfg.seed)              # the weights follow from it
    model = make_model(dls, cfg).to(device)
    if cfg.init and start: start_from(model, cfg, dls)
    if cfg.sync_bn and world() > 1: model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    dls.to(device)
    dtype = pick_precision(cfg.precision, device)
    weight = torch.from_numpy(dls.data.class_weights()).to(device) if cfg.balance == "weights" else None
    return RecipeLearner(
        dls, model, cfg.arch, cfg.smoothing, weight, path=path,
        **get_opt(cfg, dtype, model, dls),
        cbs=training_callbacks(cfg, device, dtype))


def make_model(dls, cfg):
    "The model that `cfg` names, for the images and classes of `dls`, with fresh weights."
    zero_init = cfg.opt != "muon"  # a filter of zeros has no direction: Muon would turn it by noise
    model = get_model(cfg.arch, dls.c, (cfg.sz, *image_sizes(cfg)), zero_init)
    if hasattr(model, "whitening"): model.whitening.fit(sample_images(dls))
    return model


def image_sizes(cfg): return parse_sizes(cfg.sizes) if cfg.sizes else []


def training_callbacks(cfg, device, dtype):
    "The callbacks that change the training as `cfg` says, in no order: each has its own."
    sizes, cbs = image_sizes(cfg), [Precision(dtype)]
    # convolutions are faster on images that lie in memory as (n,h,w,c)
    if device.type != "mps": cbs.append(ChannelsLast())
    # whether another's model can be recorded, only a try would tell; what processes exchange in it cannot
    plain = not cfg.arch.startswith("timm:") and not cfg.sync_bn
    if device.type == "cuda" and plain: cbs.append(CudaGraphs(dtype))
    if sizes: cbs.append(GrowImages(sizes))
    if cfg.mixup or cfg.cutmix: cbs.append(Mix(cfg.mixup, cfg.cutmix, cfg.mix_prob))
    if cfg.ema: cbs.append(EMA(cfg.ema))
    if cfg.clip: cbs.append(GradientClip(cfg.clip))
    if cfg.freeze: cbs.append(Freeze(cfg.freeze, len(split_and_decay(cfg, 0.0)[1])))
    if world() > 1: cbs.append(Ranks())
    return cbs


def sample_images(dls, n=5000):
    "Up to 2 * `n` training images, evenly from all of them, normalised: (n,3,h,w)."
    rows = dls.data.train
    rows = rows[::max(1, len(rows) // n)]
    return normalized(torch.from_numpy(dls.data.images[rows]), dls.stats)


def run_callbacks(learn, cfg, bar):
    "The callbacks of a training run that is kept in the folder `learn.path`; its progress is on `bar`."
    cbs = [SeedEpochs(cfg.seed), StopOnNaN(), StopOnSignal()]
    of_class = learn.dls.data.counts("train")
    uneven = cfg.balance != "none" or cfg.monitor == "balanced" or of_class.max() > 2 * of_class.min()
    cbs.append(RunLog(bar, uneven))
    if not is_first(): return cbs       # what is kept, one process keeps
    cbs.append(SameFolder())
    # else nothing is chosen: the last weights count
    if len(learn.dls.valid): cbs.append(SaveBest(cfg.monitor))
    return [*cbs, SaveLast(lasting_settings(cfg, learn)), *trackers(learn, cfg)]


def settle(cfg, learn):
    "`cfg` with precision, lr and wd as they were chosen here: a run may go on elsewhere."
    short = next(k for k, v in DTYPES.items() if v == learn.precision.dtype)
    lr, wd = lr_and_wd(cfg, learn.dls)
    return replace(cfg, precision=short, lr=lr, wd=wd)


def lasting_settings(cfg, learn):
    "The settings that are the same in all of a run, wherever its data lie, as a dictionary."
    free = *FREE_ON_RESUME, "preset", "name", "dataset", "labels", "init"
    return {k: v for k, v in asdict(settle(cfg, learn)).items() if k not in free}
