"""The learner of a run folder: as it goes on, and with the weights that count."""
import errno
import hashlib
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import NoneType

from fastcore.all import noop

from ..config import TrainConfig
from ..data.loaders import get_dls, stand_in_dls
from ..distributed import from_first, is_first
from ..errors import UserError, one_line
from ..files import check_form, open_plain
from ..training.callbacks import RunLog
from ..training.checkpoints import DAMAGED, SaveBest, SaveLast, fingerprint, load_weights, read_tensors
from ..training.learner import get_learner
from ..training.metrics import best_row
from .run import Run, changed_settings, check_row, last_checkpoint

# what of models/last.pth is relied on, as check_form has it; older runs lack what has a ?
STATE = {
    "epoch": int, "data": dict, "model": dict, "opt": dict, "history": [dict], "best": object,
    "ema?": {"model": dict}, "settings?": dict, "facts?": dict,
}

# ---- to go on ----

def resume(learn, cbs):
    """Set `learn` and `cbs` to the state in models/last.pth; returns the number of epochs done.

    Errors: UserError."""
    # another machine may see no files of this one
    state = from_first(last_state(learn.path) if is_first() else None)
    check_data(learn.path, learn.dls.data, state["data"])
    check_settings(learn.path, next((cb.settings for cb in cbs if isinstance(cb, SaveLast)), {}), state)
    fill(learn.model, state["model"], learn.path)
    learn.create_opt()
    fill(learn.opt, state["opt"], learn.path)
    for cb in cbs:
        if isinstance(cb, RunLog): cb.history = state["history"]
        if isinstance(cb, SaveBest):
            cb.best, cb.sha256 = state["best"], check_best(learn.path, state)
    if hasattr(learn, "ema"):
        if "ema" not in state: raise damaged(learn.path, "it has no ema")
        learn.ema.state = state["ema"]
    learn.precision.scaler_state = state.get("scaler", {})
    return state["epoch"]


def check_data(run, data, known):
    "Raise a UserError where `data` is not what `known`, the fingerprint of the data of `run`, says."
    now = fingerprint(data)
    if any(now.get(k) != v for k, v in known.items()):
        raise UserError(f"{run} was trained on other data: "
                        "its classes, numbers of images or pixels differ.")


def check_settings(run, now, state):
    "Refuse a run whose config.json says other settings, `now`, than models/last.pth was trained with."
    before = state.get("settings", {})          # older runs have none
    listed = changed_settings(before, now, [k for k in before if k in now])
    if listed:
        raise UserError(f"{Run(run).config} was changed: it says {listed}, which is another run. "
                        "Change it back, or start a new run.")


def last_state(run):
    "The dictionary in models/last.pth, checked: see SaveLast for what is in it. Errors: UserError."
    path = last_checkpoint(run)
    try:
        state = read_tensors(path)
        check_state(state)
    except FileNotFoundError as e:
        raise UserError(f"{path} is missing: this run cannot go on, start a new one.") from e
    except OSError as e:
        # torch seeks to before the beginning of a file that was cut off
        if e.errno == errno.EINVAL: raise damaged(run, e) from e
        raise
    except DAMAGED as e: raise damaged(run, e) from e
    return state


def check_state(state):
    "Check a dictionary that came from models/last.pth. Errors: ValueError, TypeError."
    check_form(state, STATE)
    # None where there is no valid set; infinite before the first epoch
    if not isinstance(state["best"], (float, NoneType)): raise TypeError("best is no number")
    if state["epoch"] != len(state["history"]): raise ValueError("epochs and history differ")
    for row in state["history"]: check_row(row)


def fill(target, state, run):
    "Load a part of models/last.pth into a model or an optimizer. Errors: UserError."
    try: target.load_state_dict(state)
    except DAMAGED as e: raise damaged(run, e) from e


def damaged(run, why):
    return UserError(f"{last_checkpoint(run)} is damaged ({one_line(why)}): "
                     "this run cannot go on, start a new one.")


def check_best(run, state):
    """Refuse a run whose models/last.pth says that weights were chosen on valid, if it has none, or others.

    Returns their SHA-256, None where there are none."""
    if not state.get("epoch") or state["best"] is None: return None
    best = last_checkpoint(run).with_name("best.pth")
    if not best.exists():
        raise UserError(f"{best} is missing: the weights that were chosen on valid are lost.")
    with open_plain(best) as f: found = hashlib.file_digest(f, "sha256").hexdigest()
    # older runs have no best_sha256
    if state.get("best_sha256", found) == found or is_ahead(run, state): return found
    raise UserError(f"{best} is damaged or was replaced: its SHA-256 is not that of the weights that were "
                    "chosen on valid.")


def is_ahead(run, state):
    """Whether the run was killed after it had written a better best.pth, before last.pth.

    history.csv is written before both. That epoch begins anew, and then writes best.pth again."""
    with suppress(UserError, TypeError):        # TypeError: of an epoch without valid
        run = Run(run)
        rows = run.history()
        return len(rows) == state["epoch"] + 1 and best_row(rows, run.settings.monitor) is rows[-1]
    return False


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
    try: state = last_state(learn.path)
    except UserError: state = {}        # weights that were chosen on valid, and archived ones, do without it
    check_described(Run(learn.path), state)
    archive = learn.path / "model.safetensors"              # what an archived run has instead of models/
    if (best := models / "best.pth").exists():
        load_weights(learn.model, best)
        check_best(learn.path, state)
    elif not models.exists() and archive.exists(): load_weights(learn.model, archive)
    else: load_last(learn, check_best, state)
    return learn


def check_described(run, state):
    "Refuse a run whose config.json describes it otherwise than models/last.pth. Errors: UserError."
    check_settings(run.path, asdict(run.settings), state)
    facts = state.get("facts", {})              # older runs have none
    changed = [k for k in facts if run.data[k] != facts[k]]
    if changed:
        raise UserError(f"{run.config} was changed: its {', '.join(changed)} differ from those that the run "
                        "was trained with. Change it back, or train the run again.")


def load_last(learn, check=noop, state=None):
    """`learn` with the last weights, after `check(run, state)`. Errors: UserError.

    state: what models/last.pth says, where it has been read."""
    state = state or last_state(learn.path)
    check(learn.path, state)
    average = state.get("ema")              # counts instead of the weights themselves
    fill(learn.model, average["model"] if average else state["model"], learn.path)
    return learn
