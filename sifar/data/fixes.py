"""The table that `python -m sifar.check` writes and a person edits: which images to drop or to relabel."""
from collections import Counter
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import numpy as np

from ..config import nearest
from ..errors import UserError
from ..files import csv_text, read_table, unmarked, write_file
from .splits import SPLITS

COLUMNS = "image", "split", "class", "finding", "other", "score", "action", "new_class"
ACTIONS = "keep", "drop", "relabel"


def write_fixes(path, rows):
    "Write the table of `rows`, dictionaries by column, to `path`."
    write_file(path, csv_text([COLUMNS, *([row[name] for name in COLUMNS] for row in rows)]))


def read_fixes(path):
    """The rows of the table `path` in which there is something to do: a list of (line, dictionary by column).

    As spreadsheets save it: with commas, semicolons or tabs, names of columns in any case, others left out.
    Errors: UserError, with the line."""
    (_, head), *rows = read_table(path)
    columns = [name.strip().lower() for name in head]
    lacking = [name for name in ("image", "action", "new_class") if name not in columns]
    if lacking:
        how = "python -m sifar.check DATASET writes such a table"
        raise UserError(f"{path} has no column {lacking[0]}: {how}.")
    found = []
    for line, cells in rows:
        row = dict(zip_longest(columns, map(unmarked, cells[:len(columns)]), fillvalue=""))
        action = row["action"].strip().lower() or "keep"
        if action not in ACTIONS:
            raise UserError(f"{path}, line {line}: action {action!r} should be one of {', '.join(ACTIONS)}.")
        if action != "keep": found.append((line, {**row, "action": action}))
    return found


def apply_fixes(data, path):
    """The ImageData `data` without the images that the table `path` drops, and relabelled as it says.

    Its rows and pixels stay as they are. Errors: UserError for an image or a class that is not there."""
    rows, classes = by_name(data.names), by_name(data.vocab)
    labels, dropped, relabelled = data.labels.copy(), set(), dict[int, int]()
    for line, fix in read_fixes(path):
        where, row = f"{path}, line {line}", number(rows, fix["image"])
        if row is None: raise UserError(f"{where}: the data set has no image {fix['image']!r}.")
        if fix["action"] == "drop":
            dropped.add(row)
            continue
        try: nearest("class", fix["new_class"].strip(), classes)
        except UserError as e: raise UserError(f"{where}: {e.text}") from e
        labels[row] = number(classes, fix["new_class"])
        if relabelled.setdefault(row, labels[row]) != labels[row]:
            raise UserError(f"{where}: {fix['image']!r} was relabelled otherwise above.")
    left = {split: getattr(data, split) for split in SPLITS}
    left = {split: o[~np.isin(o, list(dropped))] for split, o in left.items()}
    done = Counter(drop=len(dropped), relabel=len(relabelled.keys() - dropped))
    fixed = replace(data, labels=labels, fixes={"file": Path(path).name, **done}, **left)
    counts = fixed.counts("train")
    if not counts.all():
        raise UserError(f"{path} leaves no training image of class {data.vocab[counts.argmin()]!r}.")
    return fixed


def by_name(names):
    "The positions of names, which go without blanks around them too: a spreadsheet may take those away."
    return {name.strip(): i for i, name in enumerate(names)} | {name: i for i, name in enumerate(names)}


def number(positions, cell):
    "The position of the name in a cell of a table; None where it is none."
    return positions.get(cell, positions.get(cell.strip()))
