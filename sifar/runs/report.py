"""A finished run in figures and pictures: metrics.json and report.html.

    python -m sifar.report RUN              # writes both anew; training does it at its end"""
import math
from functools import partial
from pathlib import Path
from statistics import harmonic_mean

import numpy as np

from ..cli import Parser, one_line_errors
from ..data.datasets import unknown_images
from ..data.splits import SPLITS
from ..data.twins import tested_twins
from ..distributed import gather, is_first
from ..files import write_json
from ..log import RESULT, counted, log, log_to_screen
from ..training.metrics import FEW, balanced_accuracy, best_row
from .calibration import ENOUGH, calibration_error, fit_confidence, unknown_figures
from .doubts import doubted
from .page import duration, images_and_hits, label_text, write_page
from .run import Run, attempt, newest_run


class Predictions:
    """What a learner says of one data set: rows of its images, probs (n,c), targs, losses and preds (n,).

    split: train, valid or test."""

    def __init__(self, learn, split):
        ds_idx = SPLITS.index(split)            # fastai numbers the data sets of `dls`
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
        k, n = min(5, self.probs.shape[1]), len(self.targs)
        best = np.argpartition(-self.probs, k - 1, axis=1)[:, :k]           # (n,k), in no order
        right = self.preds == self.targs, (best == self.targs[:, None]).any(1)
        top1, top5 = (float(o.mean()) for o in right)
        return {
            "loss": float(self.losses.mean()),
            "top1": top1,
            "top1_error": standard_error(top1, n),
            "top5": top5,
            "top5_error": standard_error(top5, n),
            "balanced": balanced_accuracy(self.preds, self.targs),
            "balanced_error": balanced_error(self.preds, self.targs),
            "macro_f1": float(f1_score(self.targs, self.preds, average="macro")),
            "ece": calibration_error(self.probs, self.targs),
        }


def standard_error(share, n):
    """That of a share of `n` images, with two right and two wrong ones more: 3 of 3 are not without error.

    Agresti and Coull, https://doi.org/10.1080/00031305.1998.10480550"""
    p = (share * n + 2) / (n + 4)
    return math.sqrt(p * (1 - p) / (n + 4))


def balanced_error(preds, targs):
    "The standard error of the balanced accuracy, the mean of those of the classes."
    errors = [standard_error((preds[targs == c] == c).mean(), (targs == c).sum()) for c in np.unique(targs)]
    return math.hypot(*errors) / len(errors)


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
    if not notes and run.settings.epochs == len(history): write_json(learn.path / "metrics.json", metrics)
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
    """What metrics.json says of confidence, fitted on valid, if that has ENOUGH, and of unknown things.

    Those are told from the images of test, or where there are none of valid; they are as many at most."""
    valid, known = found.get("valid"), found.get("test", found.get("valid"))
    enough = valid and len(valid.targs) >= ENOUGH
    confidence = fit_confidence(valid.probs, valid.targs) if enough else None
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
        top1, n = float(right[~twin].mean()), int((~twin).sum())
        without = {"top1": top1, "top1_error": standard_error(top1, n), "images": n}
    return {"without_twins": without, "doubted": float(doubted(test.probs, test.targs)[0].mean())}


# ---- the command ----

def main(args=None):
    parser = Parser("python -m sifar.report", "Evaluate a run again: metrics.json and report.html.")
    parser.add_argument("run", type=Path, nargs="?",
                        help="run folder, by default the one that was finished last")
    with one_line_errors():
        log_to_screen()
        path = parser.parse_args(args).run or newest_run()
        report(Run(path))
        log.info("The report is %s", path / "report.html")


def report(run):
    "Write the report of a run again, with whatever of it can still be read."
    from .load import last_state, load_chosen, load_last, new_learner  # fastai, which takes seconds
    notes = list[str]()
    def saved(): return last_state(run.path)["history"]
    sources = [saved, run.history] if (run.path / "models").exists() else [run.history]
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
