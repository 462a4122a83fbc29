"""Data, model, loss, optimizer, metrics and callbacks put together as a fastai Learner."""
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.training import GradientClip
from fastai.losses import LabelSmoothingCrossEntropy
from fastai.metrics import accuracy, top_k_accuracy
from fastai.torch_core import set_seed
from fastcore.all import noop

from . import schedule  # noqa: F401    gives Learner its fit_warmup_cosine
from .callbacks import EMA, GrowImages, Mix, Precision, RunLog, SaveBest, SaveLast, SeedEpochs, StopOnNaN, StopOnSignal, fingerprint, load_weights
from .config import TrainConfig, parse_sizes, read_config, read_settings
from .cpu import fast_at_bf16, keep_memory
from .dataloaders import get_dls, stand_in_dls
from .errors import UserError, one_line
from .models import check_arch, get_model
from .optim import get_opt
from .recipe import RecipeLearner

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name="auto"):
    "The torch.device for auto, cpu, cuda, cuda:N or mps. Errors: UserError where it is not there."
    there = ["cpu", *(["cuda"] if torch.cuda.is_available() else []), *(["mps"] if torch.backends.mps.is_available() else [])]
    if name == "auto": return torch.device(there[-1])
    try: device = torch.device(name)
    except RuntimeError: device = None
    if device is None or device.type not in there or (device.index or 0) >= (torch.cuda.device_count() if device.type == "cuda" else 1):
        raise UserError(f"--device {name} is not on this machine: there is {', '.join(there)}.")
    return device


def pick_precision(name, device):
    "The torch.dtype of the forward pass: for auto bfloat16 where `device` is fast at it, float16 on older GPUs, else float32."
    if name != "auto": return DTYPES[name]
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if major >= 8 else torch.float16 if major == 7 else torch.float32
    return torch.bfloat16 if device.type == "cpu" and fast_at_bf16() else torch.float32


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


def trackers(learn, cfg):
    "fastai's callbacks for TensorBoard and Weights & Biases, where `cfg` asks for them. Errors: UserError where the package is missing."
    try:
        if cfg.tensorboard: yield tensorboard_callback(learn.path / "tensorboard")
        if cfg.wandb: yield wandb_callback(learn.path, cfg)
    except ImportError as e: raise UserError(f"--{'tensorboard' if 'tensorboard' in str(e) else 'wandb'} needs a package that is not installed: pip install {e.name}") from e


def tensorboard_callback(folder):
    "fastai's TensorBoardCallback, which of the optimizer logs lr alone: torch's have settings that are no numbers."
    from fastai.callback.tensorboard import TensorBoardCallback

    class TensorBoard(TensorBoardCallback):
        def after_batch(self):
            if not self.training: return
            self.writer.add_scalar("train_loss", self.smooth_loss, self.train_iter)
            self.writer.add_scalar("lr", self.opt.hypers[-1]["lr"], self.train_iter)
    return TensorBoard(folder, trace_model=False, log_preds=False)


def wandb_callback(run, cfg):
    "fastai's WandbCallback for the run folder `run`; W&B gets the settings from here, as fastai cannot read those of torch's optimizers."
    import wandb
    from fastai.callback.wandb import WandbCallback

    class Wandb(WandbCallback):
        def before_fit(self):
            self.learn.gather_args = dict
            super().before_fit()
            del self.learn.gather_args
    try: wandb.init(project="sifar", name=run.name, dir=run, config=asdict(cfg), reinit="finish_previous")
    except wandb.Error as e: raise UserError(f"Weights & Biases did not start ({one_line(e, 200)}): run `wandb login`, or set WANDB_MODE=offline.") from e
    return Wandb(log_preds=False, log_model=False)


def resume(learn, cbs):
    "Put `learn` and `cbs` back to where models/last.pth was written; returns the number of epochs done. Errors: UserError."
    with last_state(learn.path) as (path, state):
        check_data(learn.path, learn.dls.data, state["data"])
        learn.model.load_state_dict(state["model"])
        learn.create_opt()
        learn.opt.load_state_dict(state["opt"])
        for cb in cbs:
            if isinstance(cb, RunLog): cb.history = state["history"]
            if isinstance(cb, SaveBest):
                cb.best = float(state["best"])
                check_best(path, state)
        if hasattr(learn, "ema"): learn.ema.state = state["ema"]
        if hasattr(learn, "precision"): learn.precision.scaler_state = state.get("scaler", {})
        return state["epoch"]


def check_data(run, data, known):
    "Raise a UserError where `data` is not what `known`, the fingerprint of the data of `run`, says."
    now = fingerprint(data)
    if any(now[k] != v for k, v in known.items()): raise UserError(f"{run} was trained on other data: its classes, numbers of images or pixels differ.")


@contextmanager
def last_state(run):
    "The path of models/last.pth and what it holds; whatever cannot be read or used of it is a UserError."
    path = Path(run) / "models" / "last.pth"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["epoch"] != len(state["history"]) or any(set(o) != set(RunLog.columns) for o in state["history"]): raise ValueError("epochs and history differ")
        yield path, state
    except FileNotFoundError as e: raise UserError(f"{path} is missing: this run cannot go on, start a new one.") from e
    except (UserError, PermissionError): raise
    except Exception as e: raise UserError(f"{path} is damaged ({one_line(e)}): this run cannot go on, start a new one.") from e


def check_best(path, state):
    "Refuse a run whose last.pth, at `path`, says that weights were chosen on valid, where these are not there."
    best = path.with_name("best.pth")
    if state["epoch"] and state["best"] is not None and not best.exists(): raise UserError(f"{best} is missing: the weights that were chosen on valid are lost.")


def load_safetensors(model, path):
    from safetensors.torch import load_file
    try: model.load_state_dict(load_file(path))
    except PermissionError: raise
    except Exception as e: raise UserError(f"{path} is damaged ({one_line(e)}).") from e


def load_run(run, images=True):
    """The Learner of a finished run folder, or of an archived one, with the weights that its metrics.json speaks of, and its data. Errors: UserError.

    images: without them, noise stands in for the data set, which then need not be there, and all is on the CPU."""
    return load_chosen(new_learner(run, images))


def new_learner(run, images=True):
    "The Learner of a run folder as it was before it was trained. Errors: UserError."
    cfg = replace(read_settings(run), device="auto" if images else "cpu")          # it may have been trained on another machine
    if not Path(cfg.data).exists(): cfg = replace(cfg, data=TrainConfig().data)
    dls = get_dls(cfg) if images else stand_in_dls(cfg, read_config(run, lambda about: about["data"]))
    if images: read_config(run, lambda about: check_data(run, dls.data, about.get("data", {}).get("fingerprint", {})))
    return get_learner(dls, cfg, path=run)


def load_chosen(learn):
    "`learn` with the weights that count: of the epoch that was chosen on valid, or else the last. Errors: UserError."
    models = learn.path / "models"
    if (models / "best.pth").exists(): load_weights(learn, "best")
    elif not models.exists() and (weights := models.with_name("model.safetensors")).exists(): load_safetensors(learn.model, weights)
    else: load_last(learn, check_best)
    return learn


def load_last(learn, check=noop):
    "`learn` with the last weights, after a `check` of where they are and what is beside them. Errors: UserError."
    with last_state(learn.path) as (path, state):
        check(path, state)
        learn.model.load_state_dict(state.get("ema", state)["model"])
    return learn
