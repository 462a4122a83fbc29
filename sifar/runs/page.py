"""What the page of a run shows: report.html.j2, and the texts, tables and pictures that stand in it."""
import base64
import io
import os
from datetime import timedelta
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from ..cli import without_folders
from ..config import is_own
from ..data.splits import SPLITS
from ..errors import visible
from ..files import write_file
from ..log import counted
from ..plots import bars, curves, matrix, sheet, short
from ..training.metrics import FEW
from .calibration import KEPT, calibration_error, fit_temperature, reliability, with_temperature
from .run import column

FEW_CLASSES = 30            # so many fit into a matrix that can be read
PAIRS, THUMBNAIL = 20, 64   # pairs of classes that are shown; the side of their pictures in pixels
WORST = 24                  # images that are shown as top losses
# the columns of the table of results
COLUMNS = {
    "top1": "top-1, %", "top1_error": "±", "balanced": "balanced, %", "balanced_error": "±",
    "macro_f1": "macro F1, %", "top5": "top-5, %", "top5_error": "±", "loss": "loss, label-smoothed",
    "ece": "ECE, %"}


def template(name):
    "A template of this folder, in which whatever is put is escaped as text of HTML."
    # undefined: a value that the page lacks is an error, not an empty place
    # the blocks: a line that holds but a {% ... %} leaves none in the page
    env = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True,
                      undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
                      finalize=lambda value: visible(value) if type(value) is str else value)
    env.filters["b64"] = lambda png: base64.b64encode(png).decode()
    return env.get_template(name)


def write_page(run, history, notes=(), metrics=None, data=None, found=None):
    """Write report.html with all its pictures in it into the folder of `run`, a Run.

    Without data and found, the Predictions by split, it has just what metrics and history say."""
    cfg = run.settings
    paths = [run.path, *filter(None, (cfg.dataset, cfg.data, cfg.labels))]
    text = template("report.html.j2").render(
        title=f"{cfg.arch} on {Path(cfg.dataset).name}",
        notes=[without_parents(note, *paths) for note in notes],
        metrics=summary(metrics) if metrics else None,
        curves=training(history, len(run.about.get("data", {}).get("vocab", range(100)))) if history else [],
        no_images=data and not found,
        **sections(data, found),
        **settings(run.about))
    write_file(run.path / "report.html", text.lstrip())             # of the lines that the macros leave


def without_parents(text, *paths):
    "`text` with these paths by their last name alone, as a page to be shared names no folder of ours."
    shorter = {}
    for path in paths:
        for known in (Path(path), Path(path).resolve()):
            if known.parent.name: shorter[f"{known.parent}{os.sep}"] = ""
            else: shorter[str(known)] = known.name          # in / itself, or without any folder
    for folder in sorted(shorter, key=len, reverse=True): text = text.replace(folder, shorter[folder])
    return text


# ---- what was found ----

def summary(metrics):
    "The table of results, its head first, and the text below it."
    columns = [k for k in COLUMNS if metrics["classes"] > FEW or not k.startswith("top5")]
    rows = [["", *(COLUMNS[k] for k in columns), "images"]]
    for split in ("test", "valid"):
        if not (figures := metrics[split]): continue
        rows.append([split, *(shown(figures, k) for k in columns), metrics["images"][split]])
    if metrics["best_epoch"]: chosen = f"Epoch {metrics['best_epoch']} was chosen on valid"
    else: chosen = "These are the weights of the last epoch"
    epochs = counted(metrics["epochs"], "epoch")
    unknown = metrics.get("unknown")                # older runs have none
    text = (f"{chosen}; {metrics['parameters']:,} parameters, {epochs} in {duration(metrics['seconds'])}, "
            f"{metrics['images_per_second']:.0f} images/s, seed {metrics['seed']}.")
    return {
        "rows": rows,
        "text": text,
        "labels": label_text(metrics),
        "unknown": unknown and unknown_text(unknown)}


def shown(figures, k):
    if k not in figures: return "-"             # of an older run
    return figures[k] if k == "loss" else 100 * figures[k]


def unknown_text(unknown):
    return (f"Of pictures of nothing that it knows ({unknown['images']}), {100 * unknown['pass']:.1f} % pass "
            f"for known where {100 * KEPT:.0f} % of the known ones do; AUROC {unknown['auroc']:.3f}.")


def label_text(metrics):
    "What the report says of twins and labels of test; None for older runs and without test."
    without, share = metrics.get("without_twins"), metrics.get("doubted")
    text, n = [], metrics["images"]["test"]
    if without and without["images"] == n: text.append("No test image has a twin in train or valid.")
    elif without:
        # older runs have none
        error = f" (± {100 * without['top1_error']:.2f})" if "top1_error" in without else ""
        text.append(f"{n - without['images']:,} of {n:,} test images have a twin in train or valid; top-1 of "
                    f"the others is {100 * without['top1']:.2f} %{error}.")
    # a model that is mostly wrong is no judge
    if share and metrics["test"] and metrics["test"]["top1"] > 0.5:
        text.append(f"The model doubts the labels of {100 * share:.1f} % of test.")
    return " ".join(text) or None


def duration(seconds): return timedelta(seconds=round(seconds))


def training(history, classes):
    "The PNGs of the curves of a training."
    loss = {"train": column(history, "train_loss"), "valid": column(history, "valid_loss")}
    accuracy = {"top-1": column(history, "top1", 100)}
    if classes > FEW: accuracy["top-5"] = column(history, "top5", 100)
    pngs = [curves(loss, "Loss, label-smoothed", "epoch", "loss")]
    if history[0]["top1"] is not None:
        pngs.append(curves(accuracy, "Accuracy on valid", "epoch", "%"))
    return [
        *pngs,
        curves({"lr": column(history, "lr")},
               "Learning rate at the end of each epoch; momentum stays at 0.9",
               "epoch", "lr", ylim=(0, None)),
        curves({"seconds": column(history, "seconds")}, "Time of each epoch, with its validation",
               "epoch", "seconds", ylim=(0, None)),
    ]


def sections(data, found):
    "What the page says of the model's predictions: on test, or without a test set on valid."
    names = "split", "calibration", "classes", "of_class", "confusion", "hardest", "files"
    if not found: return dict.fromkeys(names)
    split = "test" if "test" in found else "valid"
    pred = found[split]
    return dict(zip(names, (
        split, calibration(found, split), classes(data, pred, split), class_rows(data, pred),
        confusion(data, pred, split), hardest(data, pred), hardest_files(data, pred))))


def calibration(found, split):
    """Reliability on `split`, before and after a temperature that was fitted on valid.

    A text and the PNG of the curves."""
    pred, valid = found[split], found.get("valid")
    lines = {"ideal": ([0, 100], [0, 100]), **reliability_line("as it is", pred.probs, pred.targs)}
    if not valid: text = "There is no validation set to fit a temperature on."
    elif (valid.preds == valid.targs).all():
        text = "Not one image of valid is mistaken: there is no temperature to fit."
    else:
        t = fit_temperature(valid.probs, valid.targs)
        text = f"A temperature of {t:.2f}, fitted on valid, divides the logits"
        text += ", and is shown on the images that it was fitted on." if split == "valid" else "."
        probs = with_temperature(pred.probs, t)
        lines |= reliability_line(f"at temperature {t:.2f}", probs, pred.targs)
    limits = {"xlim": (0, 102), "ylim": (0, 102)}
    curve = curves(lines, f"Reliability on {split}", "confidence, %", "right, %", **limits)
    return {"text": text, "curve": curve}


def reliability_line(name, probs, targs):
    confidence, accuracy, _ = reliability(probs, targs)
    ece = calibration_error(probs, targs)
    return {f"{name}: ECE {100 * ece:.2f} %": (100 * confidence, 100 * accuracy)}


def images_and_hits(pred, classes):
    "How many images of each class there are, and how many of them are recognised: two arrays."
    of_class = pred.targs, pred.targs[pred.preds == pred.targs]
    return [np.bincount(o, minlength=classes) for o in of_class]


def superclasses(data):
    "The names of the superclasses, and for each class the index of its own."
    names, of = np.unique(data.superclasses, return_inverse=True)       # sorted; (classes,) of indices
    return names.tolist(), of


def classes(data, pred, split):
    "The PNGs of the accuracy of each superclass and of each class that `split` has images of."
    pngs = []
    if data.superclasses:
        names, of = superclasses(data)
        title = f"Superclasses, accuracy on {split}"
        pngs.append(accuracy_bars(names, of[pred.targs], of[pred.preds], title))
    return [*pngs, accuracy_bars(data.vocab, pred.targs, pred.preds, f"Classes, accuracy on {split}")]


def class_rows(data, pred):
    "The rows of a table of few classes, the least known first: name, images of each split, right in percent."
    if len(data.vocab) > FEW_CLASSES: return []
    n, right = images_and_hits(pred, len(data.vocab))
    share = 100 * right / np.maximum(n, 1)
    of_split = [data.counts(split).tolist() for split in SPLITS]
    return [(data.vocab[c], *(of[c] for of in of_split), share[c] if n[c] else "-")
            for c in np.argsort(share, kind="stable")]


def accuracy_bars(names, targs, preds, title):
    there = np.unique(targs)            # a class without an image has no accuracy
    accuracy = [(preds[targs == c] == c).mean() for c in there]
    return bars([names[c] for c in there], accuracy, title, "right, %")


def confusion(data, pred, split):
    """The matrix of the superclasses or of few classes as PNG, and the pairs that are mistaken most.

    A pair: the class names true and pred, the number n of its images, and the PNGs of some."""
    n, png = len(data.vocab), None
    if data.superclasses:
        names, of = superclasses(data)
        found = counts(of[pred.targs], of[pred.preds], len(names))
        png = matrix(found, names, f"Superclasses, % of each row, {split}")
    elif n <= FEW_CLASSES:
        png = matrix(counts(pred.targs, pred.preds, n), data.vocab, f"Classes, % of each row, {split}")
    wrong = counts(pred.targs, pred.preds, n)
    np.fill_diagonal(wrong, 0)                          # what is right
    most = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]         # of the flat matrix
    pairs = [get_pair(data, pred, *divmod(int(i), n)) for i in most if wrong.flat[i]]
    return {"matrix": png, "pairs": pairs}


def get_pair(data, pred, c, d):
    "What the page says of the images of class `c` that were taken for class `d`."
    rows = pred.rows[(pred.targs == c) & (pred.preds == d)]
    return {
        "true": data.vocab[c], "pred": data.vocab[d], "n": len(rows),
        "pictures": [thumbnail(data.images[row]) for row in rows[:3]],
        "files": [data.files[row] for row in rows[:3]] if data.files else []}


def counts(true, pred, n):
    "The confusion matrix (n,n)."
    return np.bincount(true * n + pred, minlength=n * n).reshape(n, n)      # a row for each true class


def thumbnail(image):
    "The PNG of an image (h,w,3) uint8, made smaller where it is large."
    buffer, img = io.BytesIO(), Image.fromarray(image)
    img.thumbnail((THUMBNAIL, THUMBNAIL))
    img.save(buffer, "PNG")
    return buffer.getvalue()


def hardest(data, pred):
    "The PNG of the images whose own class the model finds least likely."
    worst = least_likely(pred)
    labels = [hard_label(data.vocab, pred, i) for i in worst]
    return sheet(data.images[pred.rows[worst]], labels, columns=6)


def hardest_files(data, pred):
    "The rows of a table of those images, in their order: file, class, taken for, how sure in percent."
    if not data.files: return []
    def names(classes): return [data.vocab[c] for c in classes]
    worst = least_likely(pred)
    files, sure = [data.files[row] for row in pred.rows[worst]], 100 * pred.probs[worst].max(1)
    return list(zip(files, names(pred.targs[worst]), names(pred.preds[worst]), sure.tolist()))


def least_likely(pred):
    own = pred.probs[np.arange(len(pred.targs)), pred.targs]            # (n,) of each image's own class
    return np.argsort(own, kind="stable")[:WORST]


def hard_label(vocab, pred, i):
    "Three lines below an image: what it is, what it was taken for, and how sure that was."
    right = pred.preds[i] == pred.targs[i]
    taken_for = "right" if right else f"as {short(vocab[pred.preds[i]], 17)}"
    return f"{short(vocab[pred.targs[i]])}\n{taken_for}\n{100 * pred.probs[i].max():.0f} %"


def settings(about):
    "The commands, settings and versions of a run; its paths by their last name alone."
    own = {k: v for k, v in about["settings"].items() if v is not None}
    for k in ("resume", "dry_run"): own.pop(k, None)
    for k in ("data", "runs", "dataset", "labels", "fixes", "init"):
        if k in own: own[k] = Path(own[k]).name
    versions = {**about.get("versions", {}),
                "device": about.get("device"), "git commit": about.get("git_commit"),
                "processes": processes(about)}
    return {
        "pictures": own["dataset"] if is_own(about["settings"]["dataset"]) else None,
        "commands": [without_folders(line) for line in about.get("commands", [])],
        "settings": own,
        "versions": versions,
    }


def processes(about):
    "How many trained together, and of whose images BatchNorm's statistics were."
    n = about.get("processes", 1)
    if n == 1: return 1
    synchronised = about["settings"].get("sync_bn")
    return f"{n}, BatchNorm {'synchronised' if synchronised else 'local to each'}"
