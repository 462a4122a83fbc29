"""Command lines: one parser for all of them, and what a user can cause ends in one line."""
import argparse
import os
import re
import shlex
import signal
import sys
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path, PureWindowsPath
from traceback import clear_frames

from .config import DATASETS, TrainConfig, flag, nearest
from .distributed import say
from .errors import UserError, explain
from .libraries import check_libraries
from .signals import ending_signals, give_back, leave_closed_terminal, listen

try:
    from .log import called, check_shown, open_streams, quiet_imports
except ModuleNotFoundError as e:            # rich, which is imported before one_line_errors can listen
    say(explain(e))
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    "An ArgumentParser whose complaints are UserErrors; a mistyped flag is told the nearest one."

    def __init__(self, prog, description, **kwargs):
        super().__init__(prog=called(prog), description=description, allow_abbrev=False, **kwargs)

    def parse_args(self, args=None):                    # type: ignore[override]
        args = [with_hyphens(arg) for arg in (sys.argv[1:] if args is None else args)]
        # plain parse_args takes `MODEL --csv FILE IMAGE` for no image and an argument too many
        given, rest = self.parse_known_intermixed_args(args)
        flags = [name for name in self._option_string_actions if name.startswith("--")]
        for arg in rest:
            name = arg.split("=")[0]
            if name.startswith("-"): nearest("flag", name, flags, "--help lists all settings", 0.7)
        if rest: self.error(f"Nothing is expected here: {' '.join(rest)}")
        return given

    def print_help(self, file=None):
        # argparse's own passes over a disk that is full
        with suppress(BrokenPipeError): print(self.format_help(), end="", file=file, flush=True)

    def error(self, message):
        raise UserError(f"{message.removeprefix('argument ')} (--help lists all settings)")


def with_hyphens(arg):
    "--wd_norm goes as well as --wd-norm."
    return re.sub("^--[^=]+", lambda name: name[0].replace("_", "-"), arg)


@contextmanager
def one_line_errors(extra=None):
    """Whatever a user can cause ends in one line on stderr and exit code 2, without a traceback.

    So do libraries that do not fit, those of `extra` (page, ...) among them. fastai may be imported in it.
    Ctrl-C, SIGTERM and a terminal that is closed end with 130, 143 and 129; signals are given back."""
    caught = []
    def stop(signum, frame):
        caught.append(signum)
        leave_closed_terminal()
        raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(128 + signum)

    def unraisable(about):
        # Python prints and drops what is raised in a finalizer: a signal that came there is raised below
        if caught and isinstance(about.exc_value, (KeyboardInterrupt, SystemExit)): return
        # torch's loader ends like this where not all of its processes could be started
        if "_workers_status" not in str(about.exc_value): hook(about)

    open_streams()
    before = listen(ending_signals(), stop)
    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    try:
        check_libraries(extra)
        quiet_imports()
        yield
        if caught: stop(caught[-1], None)
        check_shown()
        with suppress(BrokenPipeError): sys.stdout.flush()
    except KeyboardInterrupt:
        with suppress(OSError): say("interrupted")
        sys.exit(130)
    except Exception as e:
        text = explain(e)
        if text is None: raise
        with suppress(OSError): say(text)
        clear_frames(e.__traceback__)                   # while unraisable listens
        sys.exit(2)
    finally:
        for stream in (sys.stdout, sys.stderr): let_go(stream)
        sys.unraisablehook = hook
        give_back(before)


def start(module):
    "Run main() of a module, whose imports may lack a library."
    with one_line_errors(): import_module(module).main()


def let_go(stream):
    "Where `stream` takes nothing any more, drop what it holds: else Python ends with 120 and without a word."
    try: stream.flush()
    except OSError: os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def without_flags(args, *names):
    "The command line `args` without the flags of these settings and their values."
    flags = {flag(name): name for name in names}
    kept, skip = [], False
    for arg in args:
        name = flags.get(with_hyphens(arg).split("=")[0])
        if name: skip = "=" not in arg and not isinstance(getattr(TrainConfig, name), bool)
        elif skip: skip = False                 # the value of the flag before it
        else: kept.append(arg)
    return kept


def without_folders(command):
    "A command line with the names of files and folders instead of their absolute paths."
    return shlex.join(map(without_folder, shlex.split(command)))


def without_folder(word):
    "A word of a command line, with the last name alone where it, or the value of a --flag=value, is a path."
    name, equals, value = word.partition("=")
    if name.startswith("-") and is_far(value): return f"{name}={last_name(value)}"
    return last_name(word) if is_far(word) else word


def last_name(path):
    "The last name in a path; a folder that is called like a data set stays a folder."
    name = PureWindowsPath(path).name
    return f"./{name}" if name in DATASETS else name


def is_far(word):
    "Whether a word leads out of the working directory: an absolute path, one with .., or an address."
    absolute = Path(word).is_absolute() or PureWindowsPath(word).is_absolute()
    return absolute or ".." in Path(word).parts or "://" in word
