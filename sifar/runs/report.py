"""A finished run in figures and pictures: metrics.json and report.html.

    python -m sifar.report RUN              # writes both anew; training does it at its end"""
import base64
import io
import math
import os
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import harmonic_mean

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from ..cli import Parser, one_line_errors, without_folders
from ..config import is_own
from ..data.datasets import unknown_images
from ..data.splits import SPLITS
from ..data.twins import tested_twins
from ..distributed import gather, is_first
from ..errors import visible
from ..files import write_file
from ..log import RESULT, counted, log, log_to_screen, quiet_imports
from ..plots import bars, curves, matrix, sheet, short
from ..training.metrics import FEW, balanced_accuracy, best_row
from .calibration import (
    KEPT,
    calibration_error,
    fit_confidence,
    fit_temperature,
    reliability,
    unknown_figures,
    with_temperature,
)
from .doubts import doubted
from .run import Run, attempt, column, newest_run, write_metrics

FEW_CLASSES = 30            # so many fit into a matrix that can be read
PAIRS, THUMBNAIL = 20, 64   # pairs of classes that are shown; the side of their pictures in pixels
WORST = 24                  # images that are shown as top losses


class Predictions:
    """What a learner says of one data set: rows of its images, probs (n,c), targs, losses and preds (n,).

    split: train, valid or test."""

    def __init__(self, learn, split):
        ds_idx = ("train", "valid", "test").index(split)            # fastai numbers the data sets of `dls`
        with learn.no_bar(): probs, targs, losses = learn.get_preds(ds_idx, with_loss=True)
        # several processes have a part each
        probs, targs, losses = (np.concatenate(gather(o.numpy())) for o in (probs, targs, losses))
        self.rows = getattr(learn.dls.data, split)
        self.probs = probs.astype(np.float64)
        self.targs, self.losses = targs, losses
        self.preds = self.probs.argmax(1)

    def metrics(self):
        "Loss (label-smoothed), top-1 and top-5 accuracy and expected calibration error as fractions."
        from sklearn.metrics import f1_score  # takes a second
        k, top1, n = min(5, self.probs.shape[1]), (self.preds == self.targs).mean(), len(self.targs)
        best = np.argpartition(-self.probs, k - 1, axis=1)[:, :k]           # (n,k), in no order
        return {
            "loss": float(self.losses.mean()),
            "top1": float(top1),
            "top1_error": standard_error(top1, n),
            "top5": float((best == self.targs[:, None]).any(1).mean()),
            "balanced": balanced_accuracy(self.preds, self.targs),
            "macro_f1": float(f1_score(self.targs, self.preds, average="macro")),
            "ece": calibration_error(self.probs, self.targs),
        }


def standard_error(share, n):
    """That of a share of `n` images, with two right and two wrong ones more: 3 of 3 are not without error.

    Agresti and Coull, https://doi.org/10.1080/00031305.1998.10480550"""
    p = (share * n + 2) / (n + 4)
    return math.sqrt(p * (1 - p) / (n + 4))


def evaluate(learn):
    "The Predictions of the valid and of the test set by name; those that are empty are left out."
    data = learn.dls.data
    return {split: Predictions(learn, split) for split in ("valid", "test") if len(getattr(data, split))}


def write_report(learn, cfg, history, notes=(), chosen=True):
    """Evaluate `learn`, the weights that count: write metrics.json and report.html, and log the results.

    notes: what is wrong with the run, such as that it is not finished; it then gets no metrics.json.
    chosen: whether these weights were chosen, and are not just the last."""
    found = evaluate(learn)
    if not is_first(): return None
    metrics = get_metrics(learn, cfg, history, found, chosen)
    metrics |= confidence_metrics(learn, cfg, found)
    metrics |= label_metrics(learn.dls.data, cfg, found.get("test"))
    # those of one batch say nothing
    if not cfg.dry_run: say_results(cfg, learn, metrics, found)
    run = Run(learn.path)
    # a training may have begun meanwhile that goes on with this run
    if not notes and run.settings.epochs == len(history): write_metrics(learn.path, metrics)
    write_page(run, history, notes, metrics, learn.dls.data, found)
    return metrics


def say_results(cfg, learn, metrics, found):
    "Log the figures of a run, what is odd in them, and where all of it is."
    for split in ("valid", "test"): log_figures(split, metrics[split], metrics["classes"])
    say_unknown(cfg, learn.dls.vocab, found)
    if text := label_text(metrics): log.info("%s", text, extra=RESULT)
    log.info("%s in %s, %.0f images/s; all of it is in %s", counted(metrics["epochs"], "epoch"),
             duration(metrics["seconds"]), metrics["images_per_second"], learn.path)


def log_figures(split, figures, classes):
    if not figures: return log.info("%-5s  no images, so no figures", split, extra=RESULT)
    top1, top5, error, balanced = (
        f"{100 * figures[k]:.2f}" for k in ("top1", "top5", "top1_error", "balanced"))
    parts = [f"{split:<5}", f"top-1 {top1} % (± {error})"]
    if classes > FEW: parts.append(f"top-5 {top5} %")
    # of classes of one size it is top-1 itself
    if balanced != top1: parts.append(f"balanced {balanced} %")
    log.info("%s", "  ".join((*parts, f"loss {figures['loss']:.4f}")), extra=RESULT)


def say_unknown(cfg, vocab, found, most=10):
    "Log the classes of which not one image is recognised, on test or else on valid."
    if not found: return
    split = "test" if "test" in found else "valid"
    n, right = images_and_hits(found[split], len(vocab))
    zero = [f"{vocab[c]} ({counted(n[c], 'image')})" for c in np.flatnonzero((n > 0) & (right == 0))]
    if not zero: return
    more = ", ..." if len(zero) > most else ""
    log.warning("Not one %s image is recognised of: %s%s", split, ", ".join(zero[:most]), more, extra=RESULT)
    help_of = "More images of them may help"
    if cfg.balance == "none": help_of += ", or --balance sampler"
    if cfg.monitor != "balanced": help_of += ", or --monitor balanced"
    log.warning("%s", help_of, extra=RESULT)


def images_and_hits(pred, classes):
    "How many images of each class there are, and how many of them are recognised: two arrays."
    of_class = pred.targs, pred.targs[pred.preds == pred.targs]
    return [np.bincount(o, minlength=classes) for o in of_class]


def get_metrics(learn, cfg, history, found, chosen):
    "The dictionary of metrics.json."
    from fastai.callback.hook import total_params
    data = learn.dls.data
    valid = [row for row in history if chosen and row["top1"] is not None]
    best = best_row(valid, cfg.monitor) if valid else {"epoch": None}
    speeds = [row["images_per_second"] for row in history]
    figures = {split: pred.metrics() for split, pred in found.items()}
    return {
        "dataset": Path(cfg.dataset).name,
        "arch": cfg.arch,
        "classes": learn.dls.c,
        "parameters": total_params(learn.model)[0],
        "valid": figures.get("valid"),
        "test": figures.get("test"),
        "best_epoch": best["epoch"],
        "epochs": len(history),
        "seed": cfg.seed,
        "seconds": round(sum(row["seconds"] for row in history), 1),
        # epochs are of equally many images: the harmonic mean is all images in all the time
        "images_per_second": round(harmonic_mean(speeds), 1) if speeds else 0.0,
        "images": {split: len(getattr(data, split)) for split in SPLITS},
        "images_of_class": {split: data.counts(split).tolist() for split in SPLITS},
    }


def confidence_metrics(learn, cfg, found):
    """What metrics.json says of confidence, fitted on valid, and of images of unknown things.

    Those are told from the images of test, or where there are none of valid; they are as many at most."""
    valid, known = found.get("valid"), found.get("test", found.get("valid"))
    confidence = fit_confidence(valid.probs, valid.targs) if valid else None
    if not known: return {"confidence": confidence, "unknown": None}
    name, images = unknown_images(cfg.dataset)
    # rm_type_tfms: else fastai takes but row numbers
    dl = learn.dls.test_dl(list(images[:len(known.rows)]), rm_type_tfms=0)
    with learn.no_bar(): probs, _ = learn.get_preds(dl=dl)
    figures = unknown_figures(known.probs, probs.numpy().astype(np.float64))
    return {"confidence": confidence, "unknown": {"images": name, **figures}}


def label_metrics(data, cfg, test):
    """What metrics.json says of the images of test, `test` being its Predictions.

    Top-1 of those without a twin in train or valid, and the share of labels that the model doubts."""
    if not test or cfg.dry_run: return {"without_twins": None, "doubted": None}
    twin = tested_twins(data, Path(cfg.data) / "cache")
    right, without = test.preds == test.targs, None
    if twin is not None and not twin.all():
        without = {"top1": float(right[~twin].mean()), "images": int((~twin).sum())}
    return {"without_twins": without, "doubted": float(doubted(test.probs, test.targs)[0].mean())}


def label_text(metrics):
    "What the report says of twins and labels of test; None for older runs and without test."
    without, share = metrics.get("without_twins"), metrics.get("doubted")
    text, n = [], metrics["images"]["test"]
    if without and without["images"] == n: text.append("No test image has a twin in train or valid.")
    elif without:
        text.append(f"{n - without['images']:,} of {n:,} test images have a twin in train or valid; top-1 of "
                    f"the others is {100 * without['top1']:.2f} %.")
    # a model that is mostly wrong is no judge
    if share and metrics["test"] and metrics["test"]["top1"] > 0.5:
        text.append(f"The model doubts the labels of {100 * share:.1f} % of test.")
    return " ".join(text) or None


def duration(seconds): return timedelta(seconds=round(seconds))


# ---- the page: report.html.j2, and what stands in it ----

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


def summary(metrics):
    "The rows of the table of results, and the text below it."
    rows = []
    for split in ("test", "valid"):
        if not (figures := metrics[split]): continue
        ece = 100 * figures["ece"] if "ece" in figures else "-"
        # older runs lack the last three
        others = [100 * figures[k] if k in figures else "-" for k in ("top1_error", "balanced", "macro_f1")]
        top5 = 100 * figures["top5"] if metrics["classes"] > FEW else "-"
        rows.append((split, 100 * figures["top1"], *others, top5, figures["loss"], ece,
                     metrics["images"][split]))
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


def unknown_text(unknown):
    return (f"Of pictures of nothing that it knows ({unknown['images']}), {100 * unknown['pass']:.1f} % pass "
            f"for known where {100 * KEPT:.0f} % of the known ones do; AUROC {unknown['auroc']:.3f}.")


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


# ---- the command ----

def main(args=None):
    parser = Parser("python -m sifar.report", "Evaluate a run again: metrics.json and report.html.")
    parser.add_argument("run", type=Path, nargs="?",
                        help="run folder, by default the one that was finished last")
    with one_line_errors():
        quiet_imports()
        log_to_screen()
        path = parser.parse_args(args).run or newest_run()
        report(Run(path))
        log.info("The report is %s", path / "report.html")


def report(run):
    "Write the report of a run again, with whatever of it can still be read."
    from .load import load_chosen, load_last, new_learner, saved_history  # after quiet_imports
    notes = list[str]()
    sources = [run.history] if run.archived else [partial(saved_history, run.path), run.history]
    history = attempt(notes, *sources) or []
    if len(history) < run.settings.epochs:
        epochs = f"{len(history)} of {counted(run.settings.epochs, 'epoch')}"
        notes.append(f"The run is not finished: {epochs}. This is what there is.")
        log.info("%s", notes[-1])
    learn = attempt(notes, partial(new_learner, run))
    chosen = learn and attempt(notes, partial(load_chosen, learn))
    if chosen or learn and attempt(notes, partial(load_last, learn)):
        write_report(learn, run.settings, history, notes, bool(chosen))
    else: write_page(run, history, notes, attempt(notes, run.metrics))


if __name__ == "__main__": main()
