"""Command lines: one parser for all of them, and what a user can cause ends in one line."""
import contextlib
import io
import shlex
import signal
import sys
from contextlib import contextmanager, suppress
from itertools import dropwhile, takewhile
from pathlib import Path, PureWindowsPath

from .config import PRESETS, TrainConfig, check_dataset, flag
from .errors import UserError, explain


def parse_args(args=None):
    "The TrainConfig of a command line: preset or resumed run first, then the flags. Errors: UserError, SystemExit."
    import argparse

    from .runs.run import check_resumable, read_settings
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset", choices=PRESETS, default="standard")
    first.add_argument("--resume")
    try: known, _ = first.parse_known_args(args)
    except argparse.ArgumentError: known = first.parse_args([])       # tyro will say what is wrong
    old = PRESETS[known.preset]() if known.resume is None else read_settings(known.resume)
    cfg = cli(TrainConfig, args, "train.py", default=old)
    check_dataset(cfg.dataset)
    if cfg.resume: check_resumable(old, cfg)
    return cfg


def without_flags(args, *names):
    "The command line `args` without the flags of these settings and their values."
    kept, skip = [], False
    for o in args:
        name = o.split("=")[0].replace("_", "-")
        known = [k for k in names if name == flag(k)]
        if known: skip = "=" not in o and not isinstance(getattr(TrainConfig, known[0]), bool)
        elif skip: skip = False
        else: kept.append(o)
    return kept


def cli(f, args, prog, **kwargs):
    "What `f`, a dataclass or a function, gives for the command line `args`. Errors: UserError, SystemExit."
    import tyro
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(f, args=args, prog=prog, **kwargs)
    except SystemExit as e:
        if e.code != 2: raise
        def rule(line): return not line.strip("─-╰╯")
        lines = [o.strip("│ ") for o in complaint.getvalue().splitlines()[1:]]          # of tyro's box, what stands up to the rule below it
        raise UserError(" ".join(takewhile(lambda o: not rule(o), dropwhile(rule, lines))) + " (--help lists all settings)") from e


@contextmanager
def one_line_errors():
    "Whatever a user can cause ends in one line on stderr and exit code 2, without a traceback; Ctrl-C and SIGTERM with 130 and 143."
    caught = []

    def stop(signum, frame):
        caught.append(signum)
        raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(143)

    def unraisable(o):              # an exception in a finalizer is printed and lost: this one is not, see below
        if not (caught and isinstance(o.exc_value, (KeyboardInterrupt, SystemExit))): hook(o)

    with suppress(ValueError):      # in a thread
        for o in (signal.SIGINT, signal.SIGTERM): signal.signal(o, stop)
    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    try:
        yield
        if caught: stop(caught[-1], None)
    except KeyboardInterrupt:
        print("sifar: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as e:
        text = explain(e)
        if text is None: raise
        print(f"sifar: {text}", file=sys.stderr)
        sys.exit(2)
    finally: sys.unraisablehook = hook


def without_folders(command):
    "A command line with the names of files and folders instead of their absolute paths."
    def short(o):
        flag, _, value = o.partition("=")
        def far(o): return Path(o).is_absolute() or PureWindowsPath(o).is_absolute() or ".." in Path(o).parts or "://" in o
        return f"{flag}={PureWindowsPath(value).name}" if flag.startswith("-") and far(value) else PureWindowsPath(o).name if far(o) else o
    return shlex.join(map(short, shlex.split(command)))
