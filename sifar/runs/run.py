"""A run folder: made, described, read and checked, and removed again where nothing was trained."""
import csv
import json
import logging
import math
import platform
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from types import UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

from filelock import FileLock, Timeout

from ..config import FREE_ON_RESUME, TrainConfig, flag, parse_sizes
from ..errors import UserError, explain, name_batch_size
from ..files import write_file
from ..log import command, log, log_to_file


def read_settings(run):
    "The TrainConfig that `run`, a run folder, was started with. Errors: UserError."
    hints = get_type_hints(TrainConfig)

    def settings(about):
        known = {k: v for k, v in about["settings"].items() if k in hints}
        for k, v in known.items():
            if not fits(v, hints[k]): raise ValueError(f"{k} is {v!r}")
        return TrainConfig(**known)
    return read_config(run, settings)


def fits(value, hint):
    "Whether `value` is of the type that `hint` names: a class, Literal or union; whole numbers are floats too."
    if isinstance(hint, UnionType) or get_origin(hint) is Union: return any(fits(value, o) for o in get_args(hint))
    if get_origin(hint) is Literal: return value in get_args(hint)
    return isinstance(value, (int, float) if hint is float else hint) and (hint is bool or not isinstance(value, bool))


def read_config(run, f):
    "What `f` makes of the dictionary in the config.json of `run`. Errors: UserError."
    path = Path(run) / "config.json"
    if not path.is_file(): raise UserError(f"{str(run)!r} is no run folder: it has no config.json. A run folder is one such as runs/cifar100/<time>-resnet18.")
    try:
        about = json.loads(path.read_text())
        for o in about.get("commands", []): shlex.split(o)
        return f(about)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path} is damaged ({e}): the run cannot be used.") from e


def check_resumable(old, new):
    "Refuse to resume with settings that would change the result; more epochs are allowed."
    changed = [k for k, v in asdict(new).items() if k not in FREE_ON_RESUME and v != asdict(old)[k]]
    if changed == ["epochs"] and new.epochs > old.epochs: return
    if changed:
        listed = ", ".join(f"{flag(k)} {getattr(new, k)} (was {getattr(old, k)})" for k in changed)
        raise UserError(f"Cannot resume {new.resume} with other settings: {listed}. Only more --epochs go; leave the others out or start a new run.")

PACKAGES = "torch", "torchvision", "fastai", "albumentations", "timm", "numpy"


def newest_run(runs="runs"):
    "The run in the folder `runs` that was finished last. Errors: UserError where there is none."
    done = [o for o in Path(runs).glob("*/*/history.csv") if o.with_name("metrics.json").is_file()]         # a new report writes metrics.json anew
    if not done: raise UserError(f"{runs} holds no finished run: train one with python train.py, or name a run folder.")
    return max(done, key=lambda o: o.stat().st_mtime).parent


@contextmanager
def open_run(cfg):
    """The run folder that `cfg` asks for, with a training_log.txt that takes the log while it is open.

    Errors: UserError where another process trains in it, or where the memory is used up."""
    run = Path(cfg.resume) if cfg.resume else new_folder(cfg)
    lock = FileLock(run / ".lock", blocking=False)          # the system lets go of it however this process ends
    try: lock.acquire()
    except Timeout as e: raise UserError(f"{run} is in use by another training: wait for that one, or stop it first.") from e
    for o in run.rglob("*.tmp"): o.unlink()                 # half-written when it was killed
    handler = log_to_file(run / "training_log.txt")
    try:
        log.info("%s in %s", "Going on" if cfg.resume else "Training", run)
        if cfg.resume and cfg.epochs > (old := read_settings(run).epochs):
            log.info("%d epochs instead of %d: from here on learning rate and --sizes follow the longer schedule", cfg.epochs, old)
        with name_batch_size(cfg): yield run
    except Exception as e:
        if text := explain(e): handler.emit(logging.LogRecord("sifar", logging.ERROR, "", 0, text, None, None))
        raise
    except (KeyboardInterrupt, SystemExit):
        if (run / "models" / "last.pth").exists() and not cfg.dry_run:
            log.info("Stopped. Go on with:")
            log.info("  %s", command("train.py", "--resume", run))
        raise
    finally:
        log.removeHandler(handler)
        handler.close()
        lock.release()
        if not cfg.resume and not (run / "models" / "last.pth").exists(): shutil.rmtree(run, ignore_errors=True)


def run_path(cfg):
    "RUNS/DATASET/NAME, by default RUNS/DATASET/TIME-ARCH."
    return Path(cfg.runs) / Path(cfg.dataset).name / (cfg.name or f"{time.strftime('%Y%m%d-%H%M%S')}-{cfg.arch.replace(':', '-')}")


def check_free(run):
    "Raise a UserError where the folder `run` is there, unless it is what a run left that was killed before its first checkpoint."
    leftovers = ".lock", "training_log.txt", "config.json", "lr_find.csv", "lr_find.png"
    if run.exists() and (not (run / ".lock").exists() or any(o.is_file() and o.suffix != ".tmp" and o.name not in leftovers for o in run.rglob("*"))):
        raise UserError(f"{run} is there already: choose another --name" + (f", or go on with it by --resume {run}." if (run / "models" / "last.pth").exists() else "."))


def new_folder(cfg):
    "Make the folder of a new run. Errors: UserError where a run of that name is there."
    first = run_path(cfg)
    if cfg.name: check_free(first)
    for run in (first, *(first.with_name(f"{first.name}-{i}") for i in range(2, 100))):
        with suppress(FileExistsError):
            run.mkdir(parents=True, exist_ok=bool(cfg.name))
            return run
    raise UserError(f"{first.parent} takes no new run: name one by --name.")


def describe_run(run, cfg, learn):
    """Write config.json: all settings, the commands so far, versions, git commit and machine; and say what is trained on what.

    Precision, lr and wd are kept as they were chosen here, so that a run which goes on elsewhere or later stays the same run."""
    import torch

    from ..training.callbacks import fingerprint
    from ..training.optim import lr_and_wd
    from ..training.precision import DTYPES
    data, device, (lr, wd) = learn.dls.data, learn.dls.device, lr_and_wd(cfg)
    dtype = learn.precision.dtype if hasattr(learn, "precision") else torch.float32
    short, precision = next(k for k, v in DTYPES.items() if v == dtype), str(dtype).removeprefix("torch.")
    commands = read_config(run, lambda about: about.get("commands", [])) if cfg.resume else []
    parameters = sum(o.numel() for o in learn.model.parameters())
    about = {
        "settings": asdict(replace(cfg, resume=None, dry_run=False, seeds=1, precision=short, lr=lr, wd=wd)),
        "commands": [*commands, shlex.join(["python", *sys.argv])],
        "versions": {"python": platform.python_version(), **{o: version(o) for o in PACKAGES}},
        "git_commit": git_commit(),
        "device": f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device), "precision": precision, "machine": platform.machine(),
        "data": {"vocab": list(data.vocab), "superclasses": data.superclasses, "stats": learn.dls.stats, "fingerprint": fingerprint(data)},
    }
    write_file(run / "config.json", json.dumps(about, indent=2) + "\n")
    log.info("%s: %s train, %s valid, %s test images of %d classes", cfg.dataset,
             *(f"{len(o):,}" for o in (data.train, data.valid, data.test)), len(data.vocab))
    log.info("%s: %s parameters; %s, %s; batches of %d", cfg.arch, f"{parameters:,}", device, precision, learn.dls.train.bs)
    if cfg.sizes and (most := parse_sizes(cfg.sizes)[-1]) < cfg.sz:
        log.info("Careful: the last epochs train on %d pixels, but validation and use see %d: better let --sizes end with %d", most, cfg.sz, cfg.sz)


def git_commit():
    "The commit of this checkout, with -dirty where files of it were changed; None outside of one."
    try: return subprocess.run(["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError): return None


def read_history(run):
    "The rows of history.csv as RunLog had them. Errors: UserError."
    path = Path(run) / "history.csv"
    try:
        with path.open() as f: rows: list[dict] = [{k: None if v == "" else float(v) for k, v in o.items()} for o in csv.DictReader(f)]
        for o in rows: o.update(epoch=int(o["epoch"]), **{k: float(o[k]) for k in ("train_loss", "lr", "seconds", "images_per_second")}, **{k: o[k] for k in ("valid_loss", "top1", "top5")})
        if not all(v is None or math.isfinite(v) for o in rows for v in o.values()): raise ValueError("a value is no number")
    except (OSError, ValueError, TypeError, KeyError, OverflowError, csv.Error) as e: raise UserError(f"{path} cannot be read ({e}).") from e
    if not rows: raise UserError(f"{path} has no epoch yet: train first.")
    return rows


def read_metrics(run):
    "The dictionary of metrics.json, None where there is none yet. Errors: UserError."
    path = Path(run) / "metrics.json"
    try:
        metrics = json.loads(path.read_text())
        check_metrics(metrics)
        return metrics
    except FileNotFoundError: return None
    except (OSError, ValueError, TypeError, KeyError, OverflowError) as e: raise UserError(f"{path} is damaged ({e}): write it anew by python -m sifar.report {run}") from e


def check_metrics(metrics):
    "Raise a ValueError, TypeError or KeyError where `metrics` has not all that a report says."
    splits = [o for o in (metrics["valid"], metrics["test"]) if o is not None]
    figures = [metrics[k] for k in ("parameters", "epochs", "seconds", "images_per_second", "seed")]
    figures += [o[k] for o in splits for k in ("top1", "top5", "loss", "ece")] + list(metrics["images"].values())
    if metrics["best_epoch"] is not None: figures.append(metrics["best_epoch"])
    if not all(isinstance(o, (int, float)) and math.isfinite(o) for o in figures): raise ValueError("a value is no number")


def attempt(notes, *fs):
    "What the first of `fs` gives that fails by nothing a user can mend, else None; what the ones before it complain of is logged and goes into `notes`."
    for f in fs:
        try: return f()
        except (UserError, OSError) as e:
            notes.append(explain(e))
            log.info("%s", notes[-1])
