"""What a user reads while a command runs: the terminal, and the same lines with their times in a file."""
import logging
import os
import shlex
import shutil
import sys
import warnings

from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(highlight=False)
log = logging.getLogger("sifar")
TIMED = logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S")


def log_to_screen():
    "Show the log on the terminal, or where there is none as lines with their times."
    if console.is_terminal: handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False, highlighter=NullHighlighter())
    else:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(TIMED)
    log.setLevel(logging.INFO)
    log.handlers[:] = [handler]
    log.propagate = False


def progress():
    "A progress bar with the time left, to be used as a context; nothing where there is no terminal."
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def command(script, *args):
    "The command line that runs `script` with this very Python, for the user to copy."
    python = "python" if shutil.which("python") == sys.executable else os.path.relpath(sys.executable)
    return shlex.join([python, script, *map(str, args)])


def quiet_imports():
    "Silence two warnings that fastai's own imports give, and no others."
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*[Pp]andas.*", module="fastai.*")


def log_to_file(path):
    "Append the log to the file `path`; a line that cannot be written is an error."
    def fail(record): raise
    handler = logging.FileHandler(path)
    handler.setFormatter(TIMED)
    handler.handleError = fail
    log.addHandler(handler)
    return handler
