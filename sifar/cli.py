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
    "The TrainConfig of a command line: a preset or a resumed run, then the flags. Errors: UserError."
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
        raise UserError(f"{boxed_text(complaint.getvalue())} (--help lists all settings)") from e


def boxed_text(box):
    "What tyro complains of: the text in its box, up to the rule below which it shows help."
    def is_rule(line): return not line.strip("─-╰╯")
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    return " ".join(takewhile(lambda line: not is_rule(line), dropwhile(is_rule, lines)))


@contextmanager
def one_line_errors():
    """Whatever a user can cause ends in one line on stderr and exit code 2, without a traceback.

    Ctrl-C and SIGTERM end with 130 and 143. Afterwards the signals are handled as before."""
    caught, before = [], {}

    def stop(signum, frame):
        caught.append(signum)
        raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(143)

    def unraisable(about):
        # Python prints and drops what is raised in a finalizer: a signal that came there is raised below
        if not (caught and isinstance(about.exc_value, (KeyboardInterrupt, SystemExit))): hook(about)

    with suppress(ValueError):      # signals can be set in the main thread alone
        for signum in (signal.SIGINT, signal.SIGTERM): before[signum] = signal.signal(signum, stop)
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
    finally:
        sys.unraisablehook = hook
        for signum, handler in before.items(): signal.signal(signum, handler)


def without_folders(command):
    "A command line with the names of files and folders instead of their absolute paths."
    return shlex.join(map(without_folder, shlex.split(command)))


def without_folder(word):
    "A word of a command line, with the last name alone where it, or the value of a --flag=value, is a path."
    name, equals, value = word.partition("=")
    if name.startswith("-") and is_far(value): return f"{name}={PureWindowsPath(value).name}"
    return PureWindowsPath(word).name if is_far(word) else word


def is_far(word):
    "Whether a word leads out of the working directory: an absolute path, one with .., or an address."
    absolute = Path(word).is_absolute() or PureWindowsPath(word).is_absolute()
    return absolute or ".." in Path(word).parts or "://" in word
