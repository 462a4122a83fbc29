"""Files: written whole or not at all, and read up to a bound."""
import csv
import io
import json
import math
import os
import re
import secrets
import stat
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from .distributed import is_first
from .errors import UserError, need, one_line

PACKAGE = Path(__file__).parent
# where train.py, export.py, app.py and examples/ are: beside the package, as in a checkout and in a Space,
# or where it is installed in this folder (see pyproject.toml)
SCRIPTS = PACKAGE.with_name("sifar_scripts")
ROOT = SCRIPTS if SCRIPTS.is_dir() else PACKAGE.parent
MAX_TEXT = 2**22        # bytes of a file of settings or figures; Python's objects may take 50 times as much
MAX_TABLE = 2**26       # bytes of a table, a million rows and more
LEFT_OVER = re.compile(r"\.(.+)-[0-9a-f]{16}\.tmp")
# in spreadsheets; marks before it, as it may have one of its own
FORMULA = re.compile(r"'*(\s*[=+\-@＝＋－＠]|[\t\r\n])")
STALE = 3600            # seconds after which what is half written belongs to no process any more


# ---- written ----

def write_file(path, content: bytes | memoryview | str | Callable):
    """Write `content` beside `path`, in a folder that is there, then rename it: `path` is never half written.

    content: or a function that writes it into an open file. Where `path` is a link, the link is replaced, and
    what it leads to stays as it is."""
    if not is_first(): return           # of several processes of a training
    path = Path(path)
    # nobody knows this name before, and x makes a new file only: no link that lies there is followed
    tmp = path.with_name(f".{path.name[:50]}-{secrets.token_hex(8)}.tmp")
    if isinstance(content, str): content = content.encode(errors="backslashreplace")
    try:
        with open(tmp, "xb") as f:
            content(f) if callable(content) else f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise


def remove_left_overs(folder, is_ours):
    """Remove from `folder` what write_file left there when it was killed, and nothing else.

    is_ours: whether no other process may be writing the file of this name; the others go after an hour."""
    for path in folder.glob(".*.tmp"):
        name = LEFT_OVER.fullmatch(path.name)
        if not name: continue
        old = time.time() - path.lstat().st_mtime > STALE
        if old or is_ours(name[1]): path.unlink(missing_ok=True)


def identity(folder):
    "What tells a folder from one that took its name; None where there is none."
    try: found = os.stat(folder)
    except OSError: return None
    return found.st_dev, found.st_ino


# ---- tables ----

def csv_text(rows):
    "The rows of a table as the text of a CSV file; what a spreadsheet would take for a formula is marked."
    text = io.StringIO()
    csv.writer(text).writerows([map(marked, row) for row in rows])
    return text.getvalue()


def marked(value):
    "A value of a table, with a mark of text before it where a spreadsheet would take it for a formula."
    return f"'{value}" if FORMULA.match(str(value)) else value


def unmarked(text):
    "A text as it was before `marked`."
    return text[1:] if text.startswith("'") and FORMULA.match(text) else text


# ---- read ----

def open_plain(path):
    "The file `path`, open to be read. Errors: OSError; UserError for what is no plain file, as a named pipe."
    # else a named pipe waits for somebody to write into it
    at_once = getattr(os, "O_NONBLOCK", 0)
    f = open(path, "rb", opener=lambda name, flags: os.open(name, flags | at_once))
    if stat.S_ISREG(os.fstat(f.fileno()).st_mode): return f
    f.close()
    raise UserError(f"{path} is no plain file")


def read_file(path, most=MAX_TEXT):
    "The bytes of a file, `most` at most. Errors: OSError; UserError for a longer one, or no plain file."
    with open_plain(path) as f: content = f.read(most + 1)
    if len(content) > most: raise UserError(f"{path} has more than {most:,} bytes")
    return content


def read_table(path, **form):
    """The rows of a CSV file, as (number of its line, list of cells); `form` is for the csv module.

    Commas, semicolons or tabs are between the columns. Errors: OSError, UserError."""
    try:
        # utf-8-sig: spreadsheets write a mark at the beginning
        text = io.StringIO(read_file(path, MAX_TABLE).decode("utf-8-sig"), newline="")
        between = max(",;\t", key=text.readline().count)
        text.seek(0)
        reader = csv.reader(text, delimiter=between, **form)
        rows = [(reader.line_num, row) for row in reader if row]
    except FileNotFoundError as e: raise UserError(f"{path} is missing.") from e
    except UnicodeDecodeError as e: raise UserError(f"{path} is not in UTF-8: save it as CSV UTF-8.") from e
    except csv.Error as e: raise UserError(f"{path} is no table (CSV): {e}.") from e
    if not rows: raise UserError(f"{path} is empty.")
    return rows


def read_json(path, most=MAX_TEXT):
    "What a JSON file says. Errors: OSError; UserError, which does not name the file, as parse_json."
    return parse_json(read_file(path, most).decode(errors="replace"), most)


def write_json(path, content):
    "Write a JSON file for people to read: a line for each entry, but one for a whole list of numbers."
    text = json.dumps(content, indent=2) + "\n"
    # no text in JSON has a line break
    text = re.sub(r"\[\n[\d\s,.e+-]+\]", lambda found: "[" + " ".join(found[0][1:-1].split()) + "]", text)
    write_file(path, text)


def parse_json(text, most=MAX_TEXT):
    "What a stranger's JSON says. Errors: UserError, also for a key that is there twice, NaN, long numbers."
    def number(kind, digits):
        if len(digits) > 40: raise ValueError("a number is too long")
        if not math.isfinite(float(digits)): raise ValueError("a number is too large")
        return kind(digits)

    def unique(pairs):
        if len(dict(pairs)) < len(pairs): raise ValueError("a key is there twice")
        return dict(pairs)

    def constant(name): raise ValueError(f"{name} is no number")
    if type(text) is not str or len(text) > most: raise UserError("its JSON is too large, or no text")
    decoder = json.JSONDecoder(object_pairs_hook=unique, parse_constant=constant,
                               parse_int=partial(number, int), parse_float=partial(number, float))
    try: return decoder.decode(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"it holds damaged JSON: {one_line(e)}") from e


def check_form(value, form, name="it"):
    """Raise a TypeError that names what of `value`, which was read from a file, is not of its form.

    A form is {key: form} for a dictionary, where a key with ? at its end may be missing, and what is beside
    these keys is not looked at; {str: form} for one of any keys; [form] for a list; (form, None) where None
    will do; float for a figure of a training, and int for a whole one; else a type."""
    if isinstance(form, tuple):
        if value is not None: check_form(value, form[0], name)
    elif isinstance(form, dict):
        check_form(value, dict, name)
        for key, of_key in form.items():
            names = list(value) if key is str else [key.removesuffix("?")]
            for k in names:
                if k in value: check_form(value[k], of_key, k)
                elif k == key: raise TypeError(f"{k} is missing")
    elif isinstance(form, list):
        check_form(value, list, name)
        for one in value: check_form(one, form[0], f"one of {name}")
    elif not (is_figure(value, form) if form in (int, float) else isinstance(value, form)):
        raise TypeError(f"{name} is {value!r}"[:100])


def is_figure(value, kind):
    "Whether `value` is a number that a training can give, whole where `kind` is int."
    # timedelta takes no more seconds than 10**13; to Python, True is an int
    return type(value) in (kind, int) and 0 <= value <= 1e13


def read_about(path):
    "The model.json beside the learner file `path`, or an empty dictionary. Errors: UserError."
    file = path.with_name("model.json")
    if not file.is_file(): return {}
    try:
        about = read_json(file)
        need(type(about) is dict and type(about.get("sha256")) is str, "it has no SHA-256")
    except UserError as e:
        raise UserError(f"{file} is damaged: export the run again, or delete it.") from e
    return about
