"""A table that says what each picture of a folder is: a CSV file, as Kaggle and others have them."""
import os
import re
from pathlib import Path

from ..errors import UserError, is_visible
from ..files import read_table
from .layout import SPLIT_WORDS, Folder, check_classes, split_of

# names of columns in small letters, without signs between the words; the likeliest first
LABELS = "label", "class", "classname", "category", "target", "species", "breed", "labels", "classid"
SPLITS = "split", "isvalid", "set", "subset"
IS_VALID = {"true": "valid", "1": "valid", "false": "train", "0": "train"}


def list_labels(path, table):
    """The pictures of the folder `path` that `table`, a CSV file, names: what `list_folder` gives.

    Their paths are relative to the folder or to the table, or names alone, with or without extension.
    Errors: UserError, with the row."""
    folder, rows = Folder(path), read_table(table, skipinitialspace=True)
    find = finder(folder, table.parent)
    file_at, label_at, split_at, names = columns(path, table, rows, find)
    if find(rows[0][1][file_at]): names = [f"number {i + 1}" for i in range(len(names))]    # it has no header
    else: rows = rows[1:]
    listed, seen = [], dict[Path, tuple]()
    for line, row in rows:
        where = f"{table}, row {line}"
        if len(row) < len(names): raise UserError(f"{where} has {len(row)} of {len(names)} columns.")
        file, label = find_one(find, row[file_at], path, where), row[label_at].strip()
        if not label or not is_visible(label): raise UserError(f"{where}: {label!r} is no name of a class.")
        split = "" if split_at is None else read_split(names[split_at], row[split_at], where)
        before, first = seen.setdefault(file, ((split, label), line))
        if before != (split, label):
            here, there = (" ".join(said).strip() for said in ((split, label), before))
            raise UserError(f"{where}: {row[file_at]} is {here} here, but {there} in row {first}.")
        if first == line: listed.append((split, label, file))
    check_classes(folder, listed)
    lines = [f"{table}: files from column {names[file_at]}, classes from column {names[label_at]}"]
    rest = len(folder.all("files")) - len(listed)
    if rest: lines.append(f"Not read, as the table lacks them: {rest}")
    return listed, lines


def find_one(find, cell, path, where):
    "The picture that a cell names. Errors: UserError for none, and for more."
    found = find(cell)
    if not found: raise UserError(f"{where}: there is no picture {cell!r} in {path}.")
    if len(found) == 1: return found[0]
    # a contest has pictures of the same names to train and to test on
    meant = next((o.parent for o in found if split_of(o.parent.name)[0] == "train"), found[0].parent)
    mend = f"name the folder of one as the data set, --dataset {meant}, or write more of the path"
    raise UserError(f"{where}: {cell!r} may be {found[0]} or {found[1]}: {mend}.")


def finder(folder, beside):
    "A function that gives the pictures in a Folder that a cell may mean: mostly one; `beside`: of the table."
    exact, loose = dict[str, list](), dict[str, list]()
    for file in folder.all("files"):
        paths = {Path(os.path.relpath(file, base)) for base in (folder.path, beside)}
        for o in paths: exact.setdefault(o.as_posix().strip(), []).append(file)
        names = {o.with_suffix("").as_posix() for o in paths} | {file.name, file.stem}
        for name in names: loose.setdefault(name.strip(), []).append(file)

    def find(cell):
        name = os.path.normpath(cell.strip().replace("\\", "/"))
        return exact.get(name) or loose.get(name) or []
    return find


def columns(path, table, rows, find):
    "The indices of the columns of files, labels and splits (or None), and all names. Errors: UserError."
    names = [name.strip() for name in rows[0][1]]
    plain = [re.sub("[^a-z]", "", name.lower()) for name in names]
    sample = [row for _, row in rows[:100] if len(row) == len(names)]
    # how many pictures it names: a column of numbers may name a few too
    hits = [len({file for row in sample for file in find(row[i])[:1]}) for i in range(len(names))]
    if not any(hits):
        raise UserError(f"{table}: no column ({', '.join(names)}) names pictures in {path}.")
    file_at = hits.index(max(hits))
    split_at = next((i for name in SPLITS for i, o in enumerate(plain) if o == name), None)
    others = [i for i in range(len(names)) if i not in (file_at, split_at)]
    named = [i for name in LABELS for i in others if plain[i] == name]
    if not named and len(others) != 1:
        found = ", ".join(names[i] for i in others) or "none"
        raise UserError(f"{table}: which column is the class? Call it label; there are: {found}.")
    return file_at, (named or others)[0], split_at, names


def read_split(column, cell, where):
    "The split that a cell says: a word, or whether it is of valid. Errors: UserError."
    words = IS_VALID if "valid" in column.lower() else SPLIT_WORDS
    split = words.get(cell.strip().lower())
    if not split: raise UserError(f"{where}: {column} is {cell!r}, but should be one of {', '.join(words)}.")
    return split
