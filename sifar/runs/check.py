"""Whether a data set is what it seems: twins, odd images, doubted labels, as a table that a person can edit.

    python -m sifar.check DATASET           # check.csv, for train.py --fixes; with --html check.html too"""
import filecmp
from collections import Counter
from itertools import groupby
from pathlib import Path

import numpy as np

from ..cli import Parser, one_line_errors
from ..config import TrainConfig, is_own
from ..data.fixes import read_fixes, write_fixes
from ..data.splits import SPLITS
from ..distributed import is_first
from ..errors import UserError
from ..files import write_file
from ..log import command, counted, log, log_to_screen
from .page import template, thumbnail

SAME, EXACT, NEAR = "same file", "same pixels", "near twin"
FLAT, DARK, CUT = "one colour", "nearly black", "cut off"
DOUBTED, FAR = "doubted label", "far from all others"
MOST = 100              # findings of a kind that the page shows
GREY = 127, 128         # what decoders fill the lost part of a JPEG file with


def finding(kind, row, score, other=None, new=None):
    "What was found of an image; `other` is the row of its twin, `new` the number of a likelier class."
    return {"kind": kind, "row": int(row), "score": float(score), "other": other, "new": new}


# ---- what is looked for ----

def check(data, folder, learn=None):
    """The findings in an ImageData, the likeliest of each kind first.

    folder: where the files of `data` are; learn: the learner that judges the labels."""
    found = [*twins(data, folder), *odd_images(data.images)]
    return found + doubts(data, learn) if learn else found


def doubts(data, learn):
    "A finding for each image that is like no others for the learner `learn`, and each label that it doubts."
    from .doubts import judge
    rows, (far, alike), judged, (doubt, new, score) = judge(data, learn)
    found = [finding(FAR, rows[i], alike[i]) for i in np.argsort(alike, kind="stable") if far[i]]
    order = [i for i in np.argsort(-score, kind="stable") if doubt[i]]
    return found + [finding(DOUBTED, judged[i], score[i], new=int(new[i])) for i in order]


def twins(data, folder):
    "A finding for each pair of twins: the first image with these pixels, and each like it."
    from ..data.twins import exact_twins, near_twins
    first, held = exact_twins(data.images), np.zeros(len(data.images), bool)
    held[data.test] = True
    same = [(same_pixels(data, row, of, folder), row, of) for row, of in enumerate(first) if of != row]
    found = [pair(kind, row, of, 1, held) for kind, row, of in sorted(same, key=lambda o: o[0] != SAME)]
    rows = np.flatnonzero(first == np.arange(len(first)))           # of equal images one is compared
    near = near_twins(data.images, rows, rows, data.mirrored)
    return found + [pair(NEAR, a, b, score, held) for a, b, score in sorted(near, key=lambda o: -o[2])]


def same_pixels(data, a, b, folder):
    "SAME where the files of two rows with the same pixels have the same bytes too, else EXACT."
    if not data.files: return EXACT
    one, other = (folder / data.files[row] for row in (a, b))
    # a name that is no text is not that of the file
    there = one.is_file() and other.is_file()
    return SAME if there and filecmp.cmp(one, other, shallow=False) else EXACT


def pair(kind, a, b, score, held):
    "The finding of two rows: of the later one, but where just that is of test, which stays, of the other."
    row, other = max(a, b), min(a, b)
    if held[row] and not held[other]: row, other = other, row
    return finding(kind, row, score, other=int(other))


def odd_images(images):
    "A finding for each of images (n,h,w,3) that shows nothing, or whose lower part was lost."
    found = []
    for row, x in enumerate(images):
        lower = x[-(len(x) // 4):]
        if x.std((0, 1)).max() < 2: found.append(finding(FLAT, row, x.std((0, 1)).max()))
        elif x.mean() < 8: found.append(finding(DARK, row, x.mean()))
        elif lower.min() >= GREY[0] and lower.max() <= GREY[1]: found.append(finding(CUT, row, 1))
    return sorted(found, key=lambda o: o["kind"])


# ---- what is said ----

def say_twins(cfg, data):
    "Say, as a training starts, how many images of test have a twin in it, as far as that is known at once."
    from ..data.twins import tested_twins
    if cfg.dry_run or not is_first(): return
    twin = tested_twins(data, Path(cfg.data) / "cache", wait=False)
    if twin is None or not twin.any(): return
    log.info("At least %s of %s test images have a twin in train or valid; "
             "to see them: python -m sifar.check %s", f"{twin.sum():,}", f"{len(twin):,}", cfg.dataset)


def split_names(data):
    "The split of each row, as text: (n,)."
    names = np.full(len(data.images), "", object)
    for split in SPLITS: names[getattr(data, split)] = split
    return names


def counts(data, found):
    "Lines that say how many there are of each kind, and of twins where they lie."
    lines = []
    if data.unreadable: lines.append(f"{counted(len(data.unreadable), 'file')} cannot be read")
    for kind, same in groupby(found, key=lambda o: o["kind"]):
        group = list(same)
        pairs = [(o["row"], o["other"]) for o in group if o["other"] is not None]
        if pairs: lines.append(f"{kind}: {pair_counts(data, pairs)}")
        else: lines.append(f"{kind}: {counted(len(group), 'image')}")
    return lines or ["Nothing odd was found"]


def pair_counts(data, pairs):
    "What is said of pairs of rows, of which the second is in test where just one is."
    test = set(data.test.tolist())
    across = {b for a, b in pairs if b in test and a not in test}
    differ = sum(data.labels[a] != data.labels[b] for a, b in pairs)
    return (f"{counted(len(pairs), 'pair')}, {differ:,} of two classes; "
            f"images of test with one in train or valid: {len(across):,}")


def balance(data):
    "A line on how many images the classes have in training."
    n = data.counts("train")
    sizes = ", ".join(f"{len(getattr(data, split)):,} {split}" for split in SPLITS)
    if n.max() == n.min(): return f"{len(data.vocab)} classes of {n[0]:,} training images each; {sizes}"
    large, small = (f"{data.vocab[c]}: {n[c]:,}" for c in (n.argmax(), n.argmin()))
    times = f"{n.max() / n.min():.1f} times"
    return f"{len(data.vocab)} classes; {sizes}; the largest ({large}) is {times} the smallest ({small})"


def table(data, found):
    "The rows of check.csv: nothing is done until a person writes drop or relabel in place of keep."
    split, vocab = split_names(data), data.vocab
    return [{
        "image": data.names[o["row"]],
        "split": split[o["row"]],
        "class": vocab[data.labels[o["row"]]],
        "finding": o["kind"],
        "other": "" if o["other"] is None else data.names[o["other"]],
        "score": f"{o['score']:.3f}",
        "action": "keep",
        "new_class": "" if o["new"] is None else vocab[o["new"]],
    } for o in found]


def write_check(path, title, data, found, lines):
    "Write check.html: for each kind of finding the counts, and the first of its pictures side by side."
    rows = [{**row, **o} for row, o in zip(table(data, found), found)]
    kinds = {kind: list(group) for kind, group in groupby(rows, key=lambda o: o["kind"])}
    for o in (o for group in kinds.values() for o in group[:MOST]):
        seen = [row for row in (o["row"], o["other"]) if row is not None]
        o["pictures"] = [thumbnail(data.images[row]) for row in seen]
        o["of_other"] = "" if o["other"] is None else data.vocab[data.labels[o["other"]]]
        o["other_image"] = "" if o["other"] is None else data.names[o["other"]]
    shown = {kind: group[:MOST] for kind, group in kinds.items()}
    classes = dict(zip(data.vocab, zip(*(data.counts(split) for split in SPLITS))))
    text = template("check.html.j2").render(
        title=title, lines=lines, kinds=shown, numbers=Counter(o["kind"] for o in found), classes=classes,
        unreadable=data.unreadable)
    write_file(path, text.lstrip())


# ---- the command ----

def main(args=None):
    about = "Look for twins, odd images and wrong labels in a data set; nothing of it is changed."
    parser = Parser("python -m sifar.check", about)
    parser.add_argument("dataset", help="cifar100, cifar10, digits, or a folder of images, as for train.py")
    parser.add_argument("--labels", help="table (CSV) of the files in the folder and their classes")
    parser.add_argument("--model", type=Path, help="learner.pkl, or its folder, that judges the labels too")
    parser.add_argument("--html", action="store_true", help="write a page with the pictures too")
    with one_line_errors():
        log_to_screen()
        o = parser.parse_args(args)
        run(TrainConfig(dataset=o.dataset, labels=o.labels), o.model, o.html)


def run(cfg, model, html):
    "Check the data set of `cfg`, log what was found, and write it into RUNS/DATASET/check."
    from ..data.datasets import load_data
    from ..data.folder import unpack
    from ..training.mirror import look_at_mirrored
    from ..training.recipe import load_learner
    folder = Path(cfg.runs) / Path(cfg.dataset).name / "check"
    path = folder / "check.csv"
    if path.exists() and read_fixes(path):
        raise UserError(f"{path} has been edited: move it away, so that it is not written over.")
    learn = load_learner(model) if model else None
    data = load_data(cfg)
    if is_own(cfg.dataset): data = look_at_mirrored(data, data.stats())
    log.info("Looking at %s images", f"{len(data.images):,}")
    pictures = Path(cfg.dataset)
    if data.files and pictures.is_file(): pictures = unpack(pictures, Path(cfg.data) / "cache")
    found = check(data, pictures, learn)
    lines = [balance(data), *counts(data, found)]
    for line in lines: log.info("%s", line)
    folder.mkdir(parents=True, exist_ok=True)
    write_fixes(path, table(data, found))
    if html: write_check(folder / "check.html", Path(cfg.dataset).name, data, found, lines)
    if not found: return log.info("The counts are in %s", folder)
    labels = ("--labels", cfg.labels) if cfg.labels else ()
    log.info("All of it is in %s. Write drop or relabel in place of keep, then:", folder)
    log.info("  %s", command("train.py", "--dataset", cfg.dataset, *labels, "--fixes", path))


if __name__ == "__main__": main()
