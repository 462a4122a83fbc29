"""The learner of a run folder: as it goes on, and with the weights that count."""
import errno
from dataclasses import replace
from pathlib import Path
from types import NoneType

import torch
from fastcore.all import noop

from ..config import TrainConfig
from ..data.loaders import get_dls, stand_in_dls
from ..errors import UserError, one_line
from ..training.callbacks import DAMAGED, RunLog, SaveBest, fingerprint, load_weights
from ..training.learner import get_learner
from .run import Run, last_checkpoint

# ---- to go on ----

def resume(learn, cbs):
    """Set `learn` and `cbs` to the state in models/last.pth; returns the number of epochs done.

    Errors: UserError."""
    state = last_state(learn.path)
    check_data(learn.path, learn.dls.data, state["data"])
    fill(learn.model, state["model"], learn.path)
    learn.create_opt()
    fill(learn.opt, state["opt"], learn.path)
    for cb in cbs:
        if isinstance(cb, RunLog): cb.history = state["history"]
        if isinstance(cb, SaveBest):
            cb.best = state["best"]
            check_best(learn.path, state)
    if hasattr(learn, "ema"):
        if "ema" not in state: raise damaged(learn.path, "it has no ema")
        learn.ema.state = state["ema"]
    if hasattr(learn, "precision"): learn.precision.scaler_state = state.get("scaler", {})
    return state["epoch"]


def check_data(run, data, known):
    "Raise a UserError where `data` is not what `known`, the fingerprint of the data of `run`, says."
    now = fingerprint(data)
    if any(now.get(k) != v for k, v in known.items()):
        raise UserError(f"{run} was trained on other data: "
                        "its classes, numbers of images or pixels differ.")


def last_state(run):
    "The dictionary in models/last.pth, checked: see SaveLast for what is in it. Errors: UserError."
    path = last_checkpoint(run)
    # weights_only: no code of the file is run
    try: state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as e:
        raise UserError(f"{path} is missing: this run cannot go on, start a new one.") from e
    except OSError as e:
        # torch seeks to before the beginning of a file that was cut off
        if e.errno == errno.EINVAL: raise damaged(run, e) from e
        raise
    except DAMAGED as e: raise damaged(run, e) from e
    if problem := check_state(state): raise damaged(run, problem)
    return state


def check_state(state):
    "What is wrong with a dictionary that came from models/last.pth; None where nothing is."
    if not isinstance(state, dict): return "it is no dictionary"
    kinds = {"epoch": int, "data": dict, "model": dict, "opt": dict, "history": list}
    for k, kind in kinds.items():
        if not isinstance(state.get(k), kind): return f"{k} is no {kind.__name__}"
    # None where there is no valid set
    if not isinstance(state.get("best", ""), (float, NoneType)): return "best is no number"
    ema = state.get("ema", {"model": {}})                   # there with --ema alone
    if not isinstance(ema, dict) or "model" not in ema: return "its ema has no model"
    if state["epoch"] != len(state["history"]): return "epochs and history differ"
    for row in state["history"]:
        if not isinstance(row, dict) or set(row) != set(RunLog.columns): return "other columns in its history"
    return None


def fill(target, state, run):
    "Load a part of models/last.pth into a model or an optimizer. Errors: UserError."
    try: target.load_state_dict(state)
    except DAMAGED as e: raise damaged(run, e) from e


def damaged(run, why):
    return UserError(f"{last_checkpoint(run)} is damaged ({one_line(why)}): "
                     "this run cannot go on, start a new one.")


def check_best(run, state):
    "Refuse a run whose models/last.pth says that weights were chosen on valid, if these are missing."
    best = last_checkpoint(run).with_name("best.pth")
    if state["epoch"] and state["best"] is not None and not best.exists():
        raise UserError(f"{best} is missing: the weights that were chosen on valid are lost.")


# ---- to be used ----

def load_run(path, images=True):
    """The Learner of a run folder, finished or archived, with its data and the weights that count.

    images: without them, noise stands in for the data set, which may be missing, and all is on the CPU.
    Errors: UserError."""
    return load_chosen(new_learner(Run(path), images))


def new_learner(run, images=True):
    "The Learner of `run`, a Run, as it was before it was trained. Errors: UserError."
    # it may have been trained on another machine: with another device, and its data elsewhere
    cfg = replace(run.settings, device="auto" if images else "cpu")
    if not Path(cfg.data).exists(): cfg = replace(cfg, data=TrainConfig().data)
    dls = get_dls(cfg) if images else stand_in_dls(cfg, run.data)
    if images: check_data(run.path, dls.data, run.fingerprint)
    return get_learner(dls, cfg, path=run.path, start=False)


def load_chosen(learn):
    """`learn` with the weights that metrics.json is about: chosen on valid, or else the last.

    Errors: UserError."""
    models = learn.path / "models"
    archive = learn.path / "model.safetensors"              # what an archived run has instead of models/
    if (models / "best.pth").exists(): load_weights(learn, "best")
    elif not models.exists() and archive.exists(): load_safetensors(learn.model, archive)
    else: load_last(learn, check_best)
    return learn


def load_safetensors(model, path):
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    try: model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as e:
        raise UserError(f"{path} is damaged ({one_line(e)}).") from e


def load_last(learn, check=noop):
    "`learn` with the last weights, after `check(run, state)`. Errors: UserError."
    state = last_state(learn.path)
    check(learn.path, state)
    average = state.get("ema")              # counts instead of the weights themselves
    fill(learn.model, average["model"] if average else state["model"], learn.path)
    return learn


def saved_history(run):
    "The history in models/last.pth of the folder `run`. Errors: UserError."
    return last_state(run)["history"]
