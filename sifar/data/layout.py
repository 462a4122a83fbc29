"""What is what in a folder of pictures: splits, classes, and what belongs to neither.

Two tables of words and one walk over the folder; splits are found on top, or inside each class."""
import os
import re
from collections import Counter
from pathlib import Path

from ..config import has_pictures
from ..errors import UserError, is_visible

SPLIT_WORDS = {
    "train": "train", "training": "train", "valid": "valid", "val": "valid", "validation": "valid",
    "test": "test", "testing": "test"}
# What systems, notebooks and archives leave in folders, in small letters; also whatever begins with a dot.
LEFT = {
    "thumbs.db", "desktop.ini", "__macosx", "__pycache__", "@eadir", "#recycle", "$recycle.bin", "lost+found",
    "system volume information", "cifar-100-python", "cifar-10-batches-py"}
PACKED = {".zip", ".tar", ".tgz", ".gz", ".rar", ".7z"}
# Annotations and other files beside pictures. Anything else is tried: many pictures have odd names.
NOTES = set(
    ".txt .csv .tsv .xml .json .jsonl .yaml .yml .md .html .css .js .py .pyc .ipynb .log .pdf .db .url "
    ".mat .npy .npz .pkl .pth .h5 .doc .docx .xlsx .mov .mp4 .avi .aae license "
    "licence readme".split()) | PACKED
DEEPEST = 100       # folders in each other, links followed
# A folder that holds one of these was written by sifar, or is a cache or a virtual environment.
WRITTEN = {"training_log.txt", "CACHEDIR.TAG", "pyvenv.cfg"}


class Folder:
    """The folder `path` as it is read: `files` that may be pictures, `notes` beside them, `folders`.

    Links are followed. Errors: UserError for a link to a folder around it, OSError."""

    def __init__(self, path, around=()):
        real = path.resolve()
        if real in around: raise UserError(f"{path} is a link to a folder that it lies in: remove it.")
        if len(around) > DEEPEST: raise UserError(f"{path} lies deeper than {DEEPEST} folders: move it up.")
        self.path, self.written = path, False
        self.files, self.notes, self.folders = list[Path](), list[Path](), list[Folder]()
        for entry in sorted(path.iterdir()):
            if entry.name.startswith(".") or entry.name.lower() in LEFT: continue
            if entry.is_dir() and is_written(entry): self.written = True
            elif entry.is_dir(): self.folders.append(Folder(entry, (*around, real)))
            elif (entry.suffix or entry.name).lower() in NOTES: self.notes.append(entry)
            # a link without its target is told as unreadable later; devices and pipes are nothing
            elif entry.is_file() or entry.is_symlink(): self.files.append(entry)

    @property
    def name(self): return self.path.name

    def all(self, kind):
        "The `files` or `notes` here and below, sorted."
        found = [file for folder in self.folders for file in folder.all(kind)]
        return sorted([*getattr(self, kind), *found])

    def is_other(self):
        "Whether it has no pictures, but something else; an empty folder may be a forgotten class."
        if self.files or not all(folder.is_other() for folder in self.folders): return False
        return bool(self.notes or self.folders or self.written)

    def parts(self):
        "The folders in it that may be splits or classes. Errors: UserError for a name that cannot be shown."
        found = [o for o in self.folders if not o.name.startswith("_") and not o.is_other()]
        for o in found:
            if is_visible(o.name): continue
            raise UserError(f"{self.path} has a folder {o.name!r}, whose name cannot be shown: rename it.")
        return found


def is_written(path):
    "Whether a program wrote this folder, and what is in it are no pictures to learn from."
    if path.name == "explore" and (path / "plots").is_dir(): return True        # by --lr-find, --show-batch
    # Path.exists raises an error where the folder may not be read, of a file that is none
    return any(os.path.exists(path / name) for name in WRITTEN)


def list_folder(path):
    """The pictures below `path`, a list of (split or '', class, file), and lines on what is none of them.

    Errors: UserError for wrong classes."""
    root = inner(Folder(path))
    tops, listed = splits(root), list[tuple]()
    # cats/train/, cats/test/, dogs/train/, ... where it is so in all of them
    of_class = {} if tops else {c.name: splits(c) for c in root.parts()}
    if of_class and all(of_class.values()):
        parts = [(split, name, part) for name, found in of_class.items() for split, part in found]
    else:
        tops = labelled(tops)
        levels = [(split, inner(part, split)) for split, part in tops] or [("", root)]
        parts = [(split, c.name, c) for split, level in levels for c in classes(level, split, root)]
    for split, name, part in parts: listed += [(split, name, file) for file in part.all("files")]
    check_classes(root, listed)
    return listed, left(path, root, tops, listed)


def labelled(tops):
    "The splits in `tops`, (split, Folder), that tell classes: the test sets of contests do not."
    levels = [inner(part, split) for split, part in tops]
    known = {c.name for (split, _), level in zip(tops, levels) if split == "train" for c in level.parts()}
    def tells(level): return len(level.parts()) > 1 or any(c.name in known for c in level.parts())
    return [top for top, level in zip(tops, levels)
            if top[0] == "train" or tells(level) or not level.all("files")]


def inner(folder, split=None):
    "Down through folders that hold but one other: archives have those. One with the word of a split ends it."
    while not folder.files and len(parts := folder.parts()) == 1 and parts[0].parts():
        if split_of(parts[0].name)[0] not in (None, split): break
        folder = parts[0]
    return folder


def split_of(name):
    "The split of which a folder's name has a word, and the name without it: seg_train is ('train', 'seg')."
    words = re.findall("[A-Z]?[a-z]+|[A-Z]+|[0-9]+", name)
    found = [word for word in words if word.lower() in SPLIT_WORDS]
    if len(found) != 1: return None, name
    rest = "_".join(word.lower() for word in words if word != found[0])
    return SPLIT_WORDS[found[0].lower()], rest


def splits(folder):
    """The folders of splits in `folder` as a list of (split, Folder); none where there are only others.

    seg_train/ and seg_test/ are splits, as what is left of both names is the same; steam_train/ is a class,
    and so is train/ that holds pictures itself, as those beside it do. Errors: UserError where they are
    unclear."""
    named = [(*split_of(part.name), part) for part in folder.parts()]
    found = [(split, rest, part) for split, rest, part in named if split]
    others = [part for split, _, part in named if not split]
    rests = Counter(rest for _, rest in {(split, rest) for split, rest, _ in found})
    if not found or max(rests.values()) == 1 and "" not in rests and (others or len(found) > 1): return []
    if [split for split, *_ in found] == ["train"] and len(others) > 1 and are_flat(folder.parts()): return []
    counts = Counter(split for split, *_ in found)
    mend, have = renaming(found, len(rests)), named_folders([part for *_, part in found])
    beside, words = named_folders(others), [part.name for _, rest, part in found if not rest]
    rename = f", or rename a class that is called {words[0]}" if words else ""
    if counts["train"] != 1 or len(counts) < len(found) or len(rests) > 1:
        if others and not counts["train"]: mend += f". Move {beside} into train/, or {have} away{rename}"
        raise UserError(
            f"{folder.path} has {have}: it needs one train/, and at most one each of valid/ and test/{mend}.")
    if others:
        raise UserError(
            f"{folder.path} has {beside} beside {have}: only train/, valid/ and test/ are read "
            f"there. Move {beside} away{rename}.")
    return [(split, part) for split, _, part in found]


def are_flat(folders): return all(o.files and not o.parts() for o in folders)


def named_folders(folders, most=5):
    names = [f"{o.name}/" for o in folders[:most]]
    if len(folders) > most: names.append("...")
    return ", ".join(names)


def renaming(found, kinds):
    "How to rename folders such as cats_train/ and cats_test/, or train_images/ and test/."
    def better(split, rest): return f"{split}/{rest}/" if kinds > 1 and rests[rest] > 1 else f"{split}/"
    rests = Counter(rest for _, rest, _ in found)
    moves = [f"{part.name}/ to {better(split, rest)}" for split, rest, part in found if rest]
    return f": rename {', '.join(moves[:4])}" if moves else ""


def classes(folder, split, root):
    "The class folders in `folder`, of which `split` may be ''. Errors: UserError for what is none."
    found = folder.parts()
    if split and not found:
        where = f"its images belong into {folder.path}{os.sep}<class>{os.sep}"
        raise UserError(f"{folder.path} has no class folders: {use_table(root) or where}.")
    for c in found:
        if not c.all("files"):
            raise UserError(f"{c.path} is an empty class: put images into it, or remove it.")
        check_inside(c, folder, {o.name for o in found})
    return found


def check_inside(c, folder, names):
    "Raise a UserError where the class folder `c` in `folder` holds what are classes or splits themselves."
    parts = c.parts()
    listed = named_folders(parts)
    for o in parts:
        split, rest = split_of(o.name)
        if not split or rest: continue
        better = folder.path / split / c.name
        raise UserError(f"{o.path} is a split inside a class: move its images to {better}{os.sep}.")
    if names & {o.name for o in parts}:
        raise UserError(f"{c.path} holds folders that are called like classes beside it ({listed}): "
                        f"remove it, or name it as the data set: --dataset {c.path}.")
    if c.files or len(parts) < 2: return
    # the largest of the folders whose folders may be the classes
    meant = max((o for o in folder.parts() if len(o.parts()) > 1), key=lambda o: len(o.all("files")))
    raise UserError(
        f"{c.path} holds no images, but folders ({listed}), which would all be one class. If those are the "
        f"classes, name the folder around them: --dataset {meant.path}; else move their images up.")


def check_classes(root, listed):
    "Raise a UserError for less than two classes, or one that training lacks."
    vocab, path = trained_on(listed), root.path
    if len(vocab) < 2:
        few = "1 class" if vocab else "0 classes"
        mend = "put images into train/<class>/ or <class>/, or name a table of them by --labels"
        mend = use_table(root) or use_archive(root) or mend
        raise UserError(f"{path} has {few}, but training needs two or more: {mend}.")
    for split, c, file in listed:
        if c not in vocab: raise UserError(f"{file.parent}: class {c!r} of {split}/ is missing in train/.")


def use_table(root):
    "What to do where a table in `root` may say what the pictures are; None without one."
    tables = [file for file in root.all("notes") if file.suffix.lower() == ".csv"]
    # those of a contest that are to be filled in go last
    tables.sort(key=lambda file: bool(re.search("sample|submi|test", file.name.lower())))
    if tables and root.all("files"): return f"if a table says which is which, add --labels {tables[0]}"


def use_archive(root):
    "What to do where archives in `root` have the pictures; None without them, or where there are pictures."
    archives = [file for file in root.all("notes") if file.suffix.lower() in PACKED]
    if not archives or root.all("files"): return None
    read = [file for file in archives if has_pictures(str(file))]
    also = f", or give --dataset {read[0]}" if read else ""
    return f"unpack the archives there, such as {archives[0]}{also}"


def trained_on(listed):
    "The classes of the training images; without folders of splits all images are."
    return {c for split, c, _ in listed if split in ("", "train")}


def left(path, root, tops, listed):
    "Lines that say where the pictures were found, and what of the folder is none of them."
    if root.path != path: yield f"The pictures are read from {root.path}"
    read = [part for _, part in tops] or root.parts()
    levels = [inner(part, split) for split, part in tops]
    beside = [o for o in root.folders if o not in read]
    beside += [o for level in levels for o in level.folders if o not in level.parts()]
    flat = [o for o in beside if tops and split_of(o.name)[0] and o.all("files")]
    if flat: yield f"Not read, as nothing tells the classes of its pictures: {named_folders(flat)}"
    if others := [o for o in beside if o not in flat]:
        yield f"Not read, as they are no classes: {named_folders(others)}"
    loose = len(root.all("files")) - len(listed) - sum(len(o.all("files")) for o in beside)
    if loose: yield f"Not read, as they lie in no class folder below {root.path}: {loose}"
    if notes := root.all("notes"):
        kinds = ", ".join(sorted({(file.suffix or file.name).lower() for file in notes}))
        yield f"Not read, as they are no pictures ({kinds}): {len(notes)}"
