"""The folder of a run: made, described, and removed again where nothing was trained."""
import json
import logging
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

from filelock import FileLock, Timeout

from .config import parse_sizes, read_config, read_settings
from .errors import UserError, explain, name_batch_size
from .files import write_file
from .terminal import command, log, log_to_file

PACKAGES = "torch", "torchvision", "fastai", "albumentations", "timm", "numpy"
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


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

    from .callbacks import fingerprint
    from .optim import lr_and_wd
    data, device, (lr, wd) = learn.dls.data, learn.dls.device, lr_and_wd(cfg)
    precision = str(learn.precision.dtype).removeprefix("torch.") if hasattr(learn, "precision") else "float32"
    commands = read_config(run, lambda about: about.get("commands", [])) if cfg.resume else []
    parameters = sum(o.numel() for o in learn.model.parameters())
    about = {
        "settings": asdict(replace(cfg, resume=None, dry_run=False, seeds=1, precision=SHORT[precision], lr=lr, wd=wd)),
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
