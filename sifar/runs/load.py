"""The learner of a run folder: as it goes on, and with the weights that count."""
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from fastcore.all import noop

from ..config import TrainConfig
from ..data.loaders import get_dls, stand_in_dls
from ..errors import UserError, one_line
from ..training.callbacks import RunLog, SaveBest, fingerprint, load_weights
from ..training.learner import get_learner
from .run import read_config, read_settings


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


def saved_history(run):
    "The history in models/last.pth. Errors: UserError."

    with last_state(run) as (_, state): return state["history"]
