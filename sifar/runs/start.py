"""A run folder while a training has it: made, locked, described, and removed where nothing was trained."""
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock, Timeout

from ..config import TrainConfig, is_own, parse_sizes
from ..data.folder import larger_size
from ..distributed import from_first, is_first, world
from ..errors import UserError, explain, name_batch_size
from ..files import LEFT_OVER, ROOT, identity, remove_left_overs, write_json
from ..log import command, counted, log, log_to_file
from .run import Run, last_checkpoint

try:
    import fcntl
except ImportError:         # on Windows
    fcntl = None            # type: ignore[assignment]

PACKAGES = "torch", "torchvision", "fastai", "albumentations", "timm", "numpy"
# what a run has before its first checkpoint
LEFTOVERS = ".lock", "training_log.txt", "config.json", "lr_find.csv", "plots/lr_find.png"
# what a training writes by name, or into
FILES = ".lock", "training_log.txt"
FOLDERS = "models", "plots", "tensorboard", "wandb"


# ---- its folder ----

def run_path(cfg):
    "RUNS/DATASET/NAME, by default RUNS/DATASET/TIME-ARCH, or TIME-PRESET where --arch is auto."
    what = cfg.preset if cfg.arch == "auto" else cfg.arch.replace(":", "-")
    name = cfg.name or f"{time.strftime('%Y%m%d-%H%M%S')}-{what}"
    return Path(cfg.runs) / Path(cfg.dataset).name / name


def check_free(run):
    """Raise a UserError where the folder `run` is there.

    It may be, if it is of a run that was killed before its first checkpoint."""
    if not run.exists() or (run / ".lock").exists() and only_leftovers(run): return
    go_on = f", or go on with it by --resume {run}" if last_checkpoint(run).exists() else ""
    raise UserError(f"{run} is there already: choose another --name{go_on}.")


def only_leftovers(run):
    files = [path for path in run.rglob("*") if path.is_symlink() or not path.is_dir()]
    return all(str(path.relative_to(run)) in LEFTOVERS or LEFT_OVER.fullmatch(path.name) for path in files)


def new_folder(cfg):
    "Make the folder of a new run. Errors: UserError where a run of that name is there."
    first = run_path(cfg)
    if cfg.name: check_free(first)
    for run in (first, *(first.with_name(f"{first.name}-{i}") for i in range(2, 100))):
        try: run.mkdir(parents=True, exist_ok=bool(cfg.name))
        except FileExistsError: continue            # of one that started in the same second
        except OSError as e: raise UserError(f"{explain(e)} Or name another folder by --runs.") from e
        return run
    raise UserError(f"{first.parent} takes no new run: name one by --name.")


@contextmanager
def open_run(cfg):
    """The run folder that `cfg` asks for, with a training_log.txt that takes the log while it is open.

    Errors: UserError where another process trains in it, or where the memory is used up."""
    if not is_first():                                      # the first of several processes keeps it
        yield Path(from_first(None))
        return
    above = [folder for folder in run_path(cfg).parents[:2] if not folder.exists()]
    run = Path(cfg.resume) if cfg.resume else new_folder(cfg)
    check_own(run)
    known = identity(run)
    with locked(run):
        try:
            # half-written by one that was killed; no other process writes these
            for folder in (run, run / "models", run / "plots"):
                remove_left_overs(folder, lambda name: name in LEFTOVERS or name.endswith((".pth", ".csv")))
            with logged(run, cfg): yield from_first(run)
        finally:
            # nothing of what was trained, and no folder that took the place of this one
            untrained = not cfg.resume and identity(run) == known and only_leftovers(run)
            if untrained:
                shutil.rmtree(run, ignore_errors=True)
                for folder in above:
                    with suppress(OSError): folder.rmdir()          # of other runs, it is not empty


@contextmanager
def logged(run, cfg):
    "Let the training_log.txt of `run` take the log, its start and its error too."
    handler = log_to_file(run / "training_log.txt")
    try:
        say_start(run, cfg)
        with name_batch_size(cfg): yield
    except Exception as e:
        # into the file only: the command itself prints it
        if text := explain(e):
            handler.emit(logging.LogRecord("sifar", logging.ERROR, "", 0, text, None, None))
            # a disk or a process may be well again, other errors would come back
            if not isinstance(e, UserError): say_how_to_go_on(run, cfg)
        raise
    except (KeyboardInterrupt, SystemExit):
        say_how_to_go_on(run, cfg)
        raise
    finally:
        log.removeHandler(handler)
        handler.close()


def say_how_to_go_on(run, cfg):
    if cfg.dry_run or not last_checkpoint(run).exists(): return
    log.info("Stopped. Go on with:")
    log.info("  %s", command("train.py", "--resume", run))


def check_own(run):
    "Raise a UserError where what a training writes into is a link, or something else than it should be."
    kinds = [(FILES, stat.S_ISREG, "plain file"), (FOLDERS, stat.S_ISDIR, "folder")]
    for names, is_right, kind in kinds:
        for path in (run / name for name in names):
            with suppress(FileNotFoundError):
                if is_right(path.lstat().st_mode): continue
                raise UserError(f"{path} should be a {kind} of this run, and is a link or something else: "
                                "move it away.")


@contextmanager
def locked(run):
    """Hold the lock of a run folder; the system frees it however this process ends.

    Errors: UserError where it is taken."""
    # .lock stays when it is released: check_free knows by it what was a run. It may be deleted, so the folder
    # is locked too; Windows deletes no file that is open
    locks: list = []
    if fcntl: locks = [flock(run / ".lock", os.O_RDWR | os.O_CREAT), flock(run)]
    else: locks = [FileLock(run / ".lock", blocking=False)]
    with ExitStack() as held:
        try:
            for lock in locks: held.enter_context(lock)
        except (BlockingIOError, Timeout) as e:
            raise UserError(f"{run} is in use by another training: "
                            "wait for that one, or stop it first.") from e
        yield


@contextmanager
def flock(path, flags=os.O_RDONLY):
    "Hold a lock on a file or folder, in this process alone. Errors: BlockingIOError where it is taken."
    opened = [os.open(path, flags, 0o644)]
    # else workers hold it too, which live for some seconds after a training that was killed
    os.register_at_fork(after_in_child=lambda: [*map(os.close, opened)])
    try:
        try: fcntl.flock(opened[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError: raise
        except OSError: pass                    # as on NFS
        yield
    finally: os.close(opened.pop())


def say_start(run, cfg):
    if not cfg.dry_run: log.info("%s in %s", "Going on" if cfg.resume else "Training", run)
    if not cfg.resume: return say_namesakes(run, cfg)
    before = Run(run).settings.epochs
    if cfg.epochs > before:
        log.info("%d epochs instead of %d: "
                 "from here on learning rate and --sizes follow the longer schedule",
                 cfg.epochs, before)


def say_namesakes(run, cfg):
    "Say where the runs beside `run` are of another folder of the same name."
    others = set()
    for config in run.parent.glob("*/config.json"):
        with suppress(UserError): others.add(Run(config.parent).settings.dataset)
    for other in sorted(others - {cfg.dataset}):
        log.info("Careful: %s also holds runs of %s: --runs keeps them apart", run.parent, other)


# ---- what is said of it ----

def describe_run(run, cfg, learn, args):
    """Write config.json: settings, commands, versions, commit and machine; and log what is trained.

    args: what train.py was given, which in a notebook is not in sys.argv."""
    if not is_first(): return
    earlier = Run(run).about.get("commands", []) if cfg.resume else []
    about = get_about(cfg, learn, [*earlier, shlex.join(["python", "train.py", *args])])
    write_json(Path(run) / "config.json", about)

    from fastai.callback.hook import total_params
    data, (parameters, _) = learn.dls.data, total_params(learn.model)
    images = [f"{len(rows):,}" for rows in (data.train, data.valid, data.test)]
    # of a folder that is said as it is read
    if not is_own(cfg.dataset):
        log.info("%s: %s train, %s valid, %s test images of %d classes",
                 cfg.dataset, *images, len(data.vocab))
    log.info("%s: %s parameters; %s, %s; %s of %d x %d images", cfg.arch, f"{parameters:,}",
             learn.dls.device, about["precision"], counted(cfg.epochs, "epoch"),
             len(learn.dls.train), learn.dls.train.bs)
    if not cfg.resume: say_choices(cfg, learn.dls)
    last = parse_sizes(cfg.sizes)[-1] if cfg.sizes else cfg.sz
    if last < cfg.sz:
        log.info("Careful: the last epochs train on %d pixels, but validation and use see %d: "
                 "better let --sizes end with %d", last, cfg.sz, cfg.sz)


def say_choices(cfg, dls):
    "Log what follows from few images, and what one may want otherwise for a folder."
    steps, left = len(dls.train), dls.train.n - len(dls.train) * dls.train.bs
    if steps < 10 and cfg.bs > 8 and not cfg.init and not cfg.dry_run:
        log.info("Careful: an epoch has but %s: a smaller --bs learns more in each", counted(steps, "step"))
    if left: log.info("Left out of each epoch, as they fill no batch: %s, others each time",
                      counted(left, "image"))
    if cfg.freeze >= cfg.epochs and not cfg.dry_run:
        log.info("Careful: the head alone is trained, as --freeze %d leaves nothing of %s",
                 cfg.freeze, counted(cfg.epochs, "epoch"))
    if cfg.preset == "finetune":
        log.info("For few images a class: --preset finetune; --preset standard starts from nothing")
    large = cfg.sz == TrainConfig.sz and dls.data.side
    larger = larger_size(dls.data.side, len(dls.data.images)) if large else None
    if larger: log.info("Pictures have some %d pixels: --sz %d shows more of them, %d times as slowly",
                        dls.data.side, larger, (larger / 32)**2)


def get_about(cfg, learn, commands):
    "The dictionary of config.json."
    import torch  # here, as train.py --resume RUN --help reads a run folder and should be quick

    from ..training.checkpoints import facts, fingerprint
    from ..training.learner import settle
    from ..training.precision import DTYPES
    data, device, settled = learn.dls.data, learn.dls.device, settle(cfg, learn)
    gpu = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return {
        "settings": asdict(replace(settled, resume=None, dry_run=False, seeds=1)),
        "commands": commands,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "git_commit": git_commit(),
        "device": f"{device}{gpu}",
        "precision": str(DTYPES[settled.precision]).removeprefix("torch."),
        "machine": platform.machine(),
        "processes": world(),
        "data": {**facts(learn.dls), "fixes": data.fixes, "fingerprint": fingerprint(data)},
    }


def git_commit():
    "The commit of this checkout, with -dirty where files of it were changed; None outside of one."
    if not (ROOT / ".git").exists(): return None            # installed, perhaps within another checkout
    # --exclude: no tags, which would take the place of the commit
    describe = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True,
                              check=True)
    except (OSError, subprocess.CalledProcessError): return None
    return done.stdout.strip()
