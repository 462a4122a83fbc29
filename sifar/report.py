"""A finished run in figures and pictures: metrics.json and report.html.

    python -m sifar.report RUN              # writes both anew; training does it at its end"""
import argparse
import base64
import csv
import io
import json
from dataclasses import asdict
from datetime import timedelta
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from .calibration import calibration_error, fit_temperature, reliability, with_temperature
from .config import read_config, read_settings
from .errors import UserError, one_line_errors
from .files import write_file
from .terminal import log, log_to_screen, quiet_imports

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222}}
img {{max-width: 100%; display: block; margin: .5rem 0}}
table {{border-collapse: collapse; margin: .5rem 0}} td, th {{padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top}}
td.n, th.n {{text-align: right}} code {{overflow-wrap: anywhere}} h2 {{margin-top: 2.5rem; border-top: 1px solid #ddd; padding-top: 1rem}}
.two {{display: flex; flex-wrap: wrap}} .two img {{width: 49%}}
.pair {{display: inline-block; margin: .3rem .8rem .3rem 0; vertical-align: top; width: 13rem; font-size: 13px}} .pair img {{display: inline; width: 48px; image-rendering: pixelated}}
.note {{color: #666}}
</style>
<h1>{title}</h1>
{body}
</html>
"""


class Predictions:
    "What a learner says of one of its data sets: rows of the images, probs (n,c), targs (n,), losses (n,); metrics of all of them."

    def __init__(self, learn, ds_idx):
        with learn.no_bar(): probs, targs, losses = learn.get_preds(ds_idx, with_loss=True)
        self.rows = (learn.dls.data.train, learn.dls.data.valid, learn.dls.data.test)[ds_idx]
        self.probs, self.targs, self.losses = probs.numpy().astype(np.float64), targs.numpy(), losses.numpy()
        self.preds = self.probs.argmax(1)

    def metrics(self):
        "Loss (label-smoothed), top-1 and top-5 accuracy as fractions."
        k = min(5, self.probs.shape[1])
        best = np.argpartition(-self.probs, k - 1, axis=1)[:, :k]
        return {"loss": float(self.losses.mean()), "top1": float((self.preds == self.targs).mean()), "top5": float((best == self.targs[:, None]).any(1).mean())}


def evaluate(learn):
    "The Predictions of the valid and of the test set by name; those that are empty are left out."
    return {name: Predictions(learn, i) for i, name in ((1, "valid"), (2, "test")) if len(learn.dls[i])}


def write_report(learn, cfg, history):
    """Evaluate `learn`, the weights that count; write metrics.json and report.html into its folder and say what came out.

    A run that is not finished gets no metrics.json, by which others know that it is."""
    found = evaluate(learn)
    metrics = get_metrics(learn, cfg, history, found)
    if len(history) == cfg.epochs: write_file(learn.path / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    for split in ("valid", "test"):
        if o := metrics[split]: log.info("%-5s  top-1 %.2f %%  top-5 %.2f %%  loss %.4f", split, 100 * o["top1"], 100 * o["top5"], o["loss"])
        else: log.info("%-5s  no images, so no figures", split)
    log.info("%d epochs in %s, %.0f images/s; all of it is in %s", metrics["epochs"], timedelta(seconds=round(metrics["seconds"])),
             metrics["images_per_second"], learn.path)
    write_file(learn.path / "report.html", page(learn, cfg, history, found, metrics))
    return metrics


def get_metrics(learn, cfg, history, found):
    "The dictionary of metrics.json. The valid figures are those of the epoch that was chosen on them."
    valid = [o for o in history if o["top1"] is not None]
    best = max(valid, key=lambda o: o["top1"]) if valid else None
    return {
        "dataset": cfg.dataset, "arch": cfg.arch, "classes": learn.dls.c, "parameters": sum(o.numel() for o in learn.model.parameters()),
        "valid": {"loss": best["valid_loss"], "top1": best["top1"], "top5": best["top5"]} if best else None,
        "test": found["test"].metrics() if "test" in found else None,
        "best_epoch": best["epoch"] if best else None, "epochs": len(history), "seed": cfg.seed,
        "seconds": round(sum(o["seconds"] for o in history), 1),
        "images_per_second": round(sum(o["images_per_second"] for o in history) / len(history), 1),
        "images": {o: len(getattr(learn.dls.data, o)) for o in ("train", "valid", "test")},
    }


# ---- the page ----

def page(learn, cfg, history, found, metrics):
    "The text of report.html, with all its pictures in it."
    about = read_config(learn.path, dict)
    title = f"{cfg.arch} on {Path(cfg.dataset).name}"
    split = "test" if "test" in found else "valid" if "valid" in found else None
    parts = [summary(metrics), training(history)]
    if split:
        data, o = learn.dls.data, found[split]
        parts += [calibration(found, split), classes(data, o, split), confusion(data, o, split), hardest(data, o, split)]
    else: parts.append("<p class=note>Neither validation nor test images: nothing more can be said of the model.</p>")
    parts.append(settings(cfg, about))
    return PAGE.format(title=escape(title), body="\n".join(parts))


def picture(png): return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="">'


def table(rows, header=()):
    "An HTML table; numbers stand on the right."
    def cell(o, tag): return f"<{tag}{'' if isinstance(o, str) else ' class=n'}>{escape(o if isinstance(o, str) else format(o, '.2f') if isinstance(o, float) else str(o))}</{tag}>"
    return "<table>" + "".join("<tr>" + "".join(cell(o, tag) for o in row) + "</tr>" for tag, part in (("th", [header] if header else []), ("td", rows)) for row in part) + "</table>"


def summary(metrics):
    rows = [(name, 100 * o["top1"], 100 * o["top5"], o["loss"], metrics["images"][name]) for name in ("test", "valid") if (o := metrics[name])]
    chosen = f"Epoch {metrics['best_epoch']} was chosen on valid" if metrics["best_epoch"] else "Nothing was chosen: the last epoch counts"
    return (table(rows, ("", "top-1, %", "top-5, %", "loss, label-smoothed", "images")) +
            f"<p>{chosen}; {metrics['parameters']:,} parameters, {metrics['epochs']} epochs in {timedelta(seconds=round(metrics['seconds']))}, "
            f"{metrics['images_per_second']:.0f} images/s, seed {metrics['seed']}.</p>")


def training(history):
    from .plots import curves
    epochs = [o["epoch"] for o in history]
    def column(key, scale=1): return epochs, [None if o[key] is None else scale * o[key] for o in history]
    return "\n".join(("<h2>Training</h2><div class=two>", *map(picture, (
        curves({"train": column("train_loss"), "valid": column("valid_loss")}, "Loss, label-smoothed", "epoch", "loss"),
        *([curves({"top-1": column("top1", 100), "top-5": column("top5", 100)}, "Accuracy on valid", "epoch", "%")] if history[0]["top1"] is not None else []),
        curves({"lr": column("lr")}, "Learning rate at the end of each epoch; momentum stays as it is", "epoch", "lr", ylim=(0, None)),
        curves({"seconds": column("seconds")}, "Time of each epoch, with its validation", "epoch", "seconds", ylim=(0, None)))), "</div>"))


def calibration(found, split):
    "Reliability on `split`, before and after a temperature that was fitted on valid, where there is one."
    from .plots import curves
    o = found[split]
    versions, text = {"as it is": o.probs}, "There is no validation set to fit a temperature on."
    if "valid" in found:
        t = fit_temperature(found["valid"].probs, found["valid"].targs)
        versions[f"at temperature {t:.2f}"] = with_temperature(o.probs, t)
        text = f"A temperature of {t:.2f}, fitted on valid, divides the logits" + ("." if split != "valid" else ", and is shown on the images that it was fitted on.")
    lines = {"ideal": ([0, 100], [0, 100])}
    for name, probs in versions.items():
        confidence, accuracy, _ = reliability(probs, o.targs)
        lines[f"{name}: ECE {100 * calibration_error(probs, o.targs):.2f} %"] = 100 * confidence, 100 * accuracy
    return "<h2>Calibration</h2><p>Whether a confidence of 80 % is right 80 times in 100. " + text + "</p>" + picture(curves(lines, f"Reliability on {split}", "confidence, %", "right, %", xlim=(0, 100), ylim=(0, 100)))


def superclasses(data):
    "The names of the superclasses, and for each class the index of its own."
    names, of = np.unique(data.superclasses, return_inverse=True)
    return names.tolist(), of


def classes(data, o, split):
    from .plots import bars
    right = o.preds == o.targs
    present = [c for c in range(len(data.vocab)) if (o.targs == c).any()]
    parts = ["<h2>Classes</h2>"]
    if data.superclasses:
        names, of = superclasses(data)
        parts.append(picture(bars(names, [right[of[o.targs] == s].mean() for s in range(len(names))], f"Superclasses, accuracy on {split}", "right, %")))
    parts.append(picture(bars([data.vocab[c] for c in present], [right[o.targs == c].mean() for c in present], f"Classes, accuracy on {split}", "right, %")))
    return "\n".join(parts)


def counts(true, pred, n):
    "The confusion matrix (n,n)."
    return np.bincount(true * n + pred, minlength=n * n).reshape(n, n)


def confusion(data, o, split):
    "The matrix of the superclasses, or of the classes where they are few; and the 20 pairs that are confused most, with a picture of each."
    from .plots import matrix
    n, parts = len(data.vocab), ["<h2>Confusions</h2>"]
    if data.superclasses:
        names, of = superclasses(data)
        parts.append(picture(matrix(counts(of[o.targs], of[o.preds], len(names)), names, f"Superclasses, % of each row, {split}")))
    elif n <= 30: parts.append(picture(matrix(counts(o.targs, o.preds, n), data.vocab, f"Classes, % of each row, {split}")))
    wrong = counts(o.targs, o.preds, n)
    np.fill_diagonal(wrong, 0)
    pairs = [(c, d) for c, d in (divmod(int(i), n) for i in np.argsort(-wrong, axis=None, kind="stable")[:20]) if wrong[c, d]]
    if not pairs: return "\n".join((*parts, "<p>Not one image is mistaken.</p>"))
    parts.append("<p>The pairs that are mistaken most, each with images of the first that were taken for the second.</p>")
    for c, d in pairs:
        rows = o.rows[(o.targs == c) & (o.preds == d)][:3]
        parts.append(f"<div class=pair>{''.join(thumbnail(data.images[i]) for i in rows)}<br>{escape(data.vocab[c])} as {escape(data.vocab[d])}: {wrong[c, d]}</div>")
    return "\n".join(parts)


def thumbnail(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return picture(buffer.getvalue())


def hardest(data, o, split, n=24):
    from .plots import sheet
    worst = np.argsort(-o.losses, kind="stable")[:n]
    labels = [f"{data.vocab[o.targs[i]]}\nas {data.vocab[o.preds[i]]}, {100 * o.probs[i].max():.0f} %" for i in worst]
    return f"<h2>Top losses</h2><p>The images of {split} that the model is most wrong about: what they are, and what they were taken for.</p>" + picture(sheet(data.images[o.rows[worst]], labels, columns=6))


def settings(cfg, about):
    from .share import without_folders
    own = {**asdict(cfg), "data": Path(cfg.data).name, "runs": Path(cfg.runs).name, "dataset": Path(cfg.dataset).name}
    return "\n".join(("<h2>Settings</h2>", *(f"<p><code>{escape(without_folders(o))}</code></p>" for o in about.get("commands", [])),
                      table([(k, str(v)) for k, v in own.items() if v is not None and k not in ("resume", "dry_run")]), "<h2>Versions</h2>",
                      table([(k, str(v)) for k, v in {**about.get("versions", {}), "device": about.get("device"), "git commit": about.get("git_commit")}.items()])))


def read_history(run):
    "The rows of history.csv as RunLog had them. Errors: UserError."
    path = Path(run) / "history.csv"
    try:
        with path.open() as f: rows: list[dict] = [{k: None if v == "" else float(v) for k, v in o.items()} for o in csv.DictReader(f)]
        for o in rows: o["epoch"] = int(o["epoch"])
    except (OSError, ValueError, TypeError, KeyError) as e: raise UserError(f"{path} cannot be read ({e}): without it there is no report.") from e
    if not rows: raise UserError(f"{path} has no epoch yet: train first.")
    return rows


def main(args=None):
    parser = argparse.ArgumentParser(prog="python -m sifar.report", description="Evaluate a run again; write its metrics.json and report.html.")
    parser.add_argument("run", type=Path, nargs="?", help="run folder, by default the one that was finished last")
    with one_line_errors():
        from .runs import newest_run
        quiet_imports()
        log_to_screen()
        run = parser.parse_args(args).run or newest_run()
        from .learner import load_run
        cfg, history = read_settings(run), read_history(run)
        if len(history) < cfg.epochs: log.info("The run is not finished: %d of %d epochs. This is what there is.", len(history), cfg.epochs)
        write_report(load_run(run), cfg, history)
        log.info("The report is %s", run / "report.html")


if __name__ == "__main__": main()
