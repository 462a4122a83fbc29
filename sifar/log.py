"""What a user reads while a command runs: the terminal, and the same lines with their times in a file."""
import logging
import os
import shlex
import shutil
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .distributed import is_first
from .errors import UserError, one_line, visible
from .files import ROOT, SCRIPTS

# rich believes FORCE_COLOR even where the terminal is a file; Python has no stdout where it is closed
on_terminal = sys.stdout is not None and sys.stdout.isatty()
console = Console(highlight=False, emoji=False, force_terminal=None if on_terminal else False)
log = logging.getLogger("sifar")
RESULT = {"result": True}       # log.info(..., extra=RESULT) is shown each time: see say_once
unwritten: list[str] = []       # why lines are missing on the screen, where somebody is to be told


class Visible(logging.Formatter):
    "Lines without what a terminal would obey: names of files and classes may hold anything."

    def formatMessage(self, record):
        record.message = visible(record.message)
        return super().formatMessage(record)


TIMED = Visible("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S")


class Screen(logging.Handler):
    "The log on the terminal, above a progress bar where there is one."

    def emit(self, record):
        try: console.print(self.format(record), soft_wrap=True, markup=False)
        except OSError: self.handleError(record)


def log_to_screen():
    "Show the log on the terminal, or where there is none as lines with their times."
    # file names need not be text that the terminal can show
    if hasattr(sys.stdout, "reconfigure"): sys.stdout.reconfigure(errors="backslashreplace")
    # of several processes the first says what all have to say
    log.setLevel(logging.INFO if is_first() else logging.WARNING)
    handler = Screen() if console.is_terminal else logging.StreamHandler(sys.stdout)
    handler.setFormatter(Visible() if console.is_terminal else TIMED)
    handler.handleError = note_unwritten
    log.handlers[:] = [handler]
    log.propagate = False


def note_unwritten(record):
    "Go on where a line cannot be shown: a run has it in its log file."
    # of a pipe as in `train.py | head` nobody reads any more
    if not isinstance(error := sys.exception(), BrokenPipeError): unwritten.append(one_line(error))


def check_shown():
    "Raise a UserError where lines could not be shown, as where the screen is a file on a full disk."
    if not unwritten: return
    why = unwritten[0]
    unwritten.clear()
    raise UserError(f"Not all lines could be shown ({why}): a run has them in its training_log.txt.")


def open_streams():
    "Let streams that are closed lead to nowhere: else the next files that are opened take their places."
    for fd in range(3):
        try: os.fstat(fd)
        except OSError: os.open(os.devnull, os.O_RDWR)
    for fd, name in enumerate(("stdout", "stderr"), 1):
        if getattr(sys, name) is None: setattr(sys, name, open(fd, "w", closefd=False))


def say_once():
    "Show each line but once from here on, as trainings of several seeds begin alike; and RESULTs again."
    shown = set[str]()
    def is_new(record):
        seen, text = len(shown), record.getMessage()
        shown.add(text)
        return len(shown) > seen or hasattr(record, "result")
    for handler in log.handlers: handler.addFilter(is_new)


def progress():
    "A progress bar with the time left, to be used as a context; nothing where there is no terminal."
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    shown = console.is_terminal and is_first()
    return Progress(*columns, console=console, transient=True, disable=not shown)


def command(script, *args):
    "The command line that runs `script` with this very Python, or as it is installed, for the user to copy."
    python = "python" if shutil.which("python") == sys.executable else relative(sys.executable)
    start = [called(script)] if ROOT == SCRIPTS else [python, relative(ROOT / script)]
    quote = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return quote([*start, *map(str, args)])


def called(script):
    "What a user types for `script`: its name, or where sifar is installed sifar-train and the like."
    installed = ROOT == SCRIPTS and script.endswith(".py")          # python -m sifar.predict stays as it is
    return f"sifar-{Path(script).stem}" if installed else script


def counted(n, noun): return f"{n:,} {noun}{'' if n == 1 else 's'}"


def relative(path):
    "`path` as seen from the working directory, unless it lies far away."
    near = Path(path).is_relative_to(Path.cwd())
    return str(Path(path).relative_to(Path.cwd()) if near else path)


def quiet_imports():
    "Silence two warnings that fastai's own imports give, and no others."
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*[Pp]andas.*", module="fastai.*")
    # where workers are started anew, they import fastai before any code of ours
    rules, rule = os.environ.get("PYTHONWARNINGS", ""), "ignore:`torch.jit.script`:FutureWarning"
    # a notebook may call several commands
    if rule not in rules: os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (rules, rule)))


@contextmanager
def silent_stderr():
    "Drop what is written to standard error meanwhile."
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere: os.dup2(nowhere.fileno(), 2)
    try: yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def log_to_file(path):
    "Append the log to the file `path`; a line that cannot be written is an error."
    def fail(record): raise
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(TIMED)
    handler.handleError = fail
    log.addHandler(handler)
    return handler
