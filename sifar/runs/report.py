"""A finished run in figures and pictures: metrics.json and report.html.

    python -m sifar.report RUN              # writes both anew; training does it at its end"""
import argparse
import base64
import io
import json
import os
from datetime import timedelta
from functools import partial
from html import escape
from pathlib import Path
from statistics import harmonic_mean

import numpy as np
from PIL import Image

from ..cli import one_line_errors
from ..files import write_file
from ..log import log, log_to_screen, quiet_imports
from .calibration import calibration_error, fit_temperature, reliability, with_temperature
from .load import saved_history
from .run import attempt, read_config, read_history, read_metrics, read_settings

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
        "Loss (label-smoothed), top-1 and top-5 accuracy and expected calibration error as fractions."
        k = min(5, self.probs.shape[1])
        best = np.argpartition(-self.probs, k - 1, axis=1)[:, :k]
        return {"loss": float(self.losses.mean()), "top1": float((self.preds == self.targs).mean()), "top5": float((best == self.targs[:, None]).any(1).mean()),
                "ece": calibration_error(self.probs, self.targs)}


def evaluate(learn):
    "The Predictions of the valid and of the test set by name; those that are empty are left out."
    return {name: Predictions(learn, i) for i, name in ((1, "valid"), (2, "test")) if len(learn.dls[i])}


def write_report(learn, cfg, history, notes=(), chosen=True):
    """Evaluate `learn`, the weights that count; write metrics.json and report.html into its folder and say what came out.

    notes: what is wrong with the run, such as that it is not finished: such a one gets no metrics.json. chosen: not just the last weights."""
    found = evaluate(learn)
    metrics = get_metrics(learn, cfg, history, found, chosen)
    for split in ("valid", "test"):
        if o := metrics[split]: log.info("%-5s  top-1 %.2f %%  top-5 %.2f %%  loss %.4f", split, 100 * o["top1"], 100 * o["top5"], o["loss"])
        else: log.info("%-5s  no images, so no figures", split)
    log.info("%d epochs in %s, %.0f images/s; all of it is in %s", metrics["epochs"], timedelta(seconds=round(metrics["seconds"])),
             metrics["images_per_second"], learn.path)
    if not notes: write_file(learn.path / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    write_file(learn.path / "report.html", page(learn.path, cfg, history, notes, metrics, learn.dls.data, found))
    return metrics


def get_metrics(learn, cfg, history, found, chosen):
    "The dictionary of metrics.json."
    valid = [o for o in history if chosen and o["top1"] is not None]
    return {
        "dataset": Path(cfg.dataset).name, "arch": cfg.arch, "classes": learn.dls.c, "parameters": sum(o.numel() for o in learn.model.parameters()),
        **{o: found[o].metrics() if o in found else None for o in ("valid", "test")},
        "best_epoch": max(valid, key=lambda o: o["top1"])["epoch"] if valid else None, "epochs": len(history), "seed": cfg.seed,
        "seconds": round(sum(o["seconds"] for o in history), 1),
        "images_per_second": round(harmonic_mean([o["images_per_second"] for o in history]), 1) if history else 0.0,       # of all images in all the time
        "images": {o: len(getattr(learn.dls.data, o)) for o in ("train", "valid", "test")},
    }


# ---- the page ----

def page(run, cfg, history, notes=(), metrics=None, data=None, found=None):
    "The text of report.html, with all its pictures in it; without data and Predictions just what metrics and history say."
    title = f"{cfg.arch} on {Path(cfg.dataset).name}"
    parts = [*(f"<p><strong>{escape(without_parents(o, run, cfg.dataset, cfg.data))}</strong></p>" for o in notes), *([summary(metrics)] if metrics else []), *([training(history)] if history else [])]
    if found:
        split = "test" if "test" in found else "valid"
        o = found[split]
        parts += [calibration(found, split), classes(data, o, split), confusion(data, o, split), hardest(data, o, split)]
    elif data: parts.append("<p class=note>Neither validation nor test images: nothing more can be said of the model.</p>")
    parts.append(read_config(run, settings))
    return PAGE.format(title=escape(title), body="\n".join(parts))


def without_parents(text, *paths):
    "`text` with these paths by their last name alone: a page to be shared tells of no folder of this machine."
    known = {o: ("", f"{o.parent}{os.sep}") if o.parent.name else (o.name, str(o)) for path in paths for o in (Path(path), Path(path).resolve())}
    for name, o in sorted(known.values(), key=lambda o: -len(o[1])): text = text.replace(o, name)
    return text


def picture(png): return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="">'


def table(rows, header=()):
    "An HTML table; numbers stand on the right."
    def cell(o, tag): return f"<{tag}{'' if isinstance(o, str) else ' class=n'}>{escape(o if isinstance(o, str) else format(o, '.2f') if isinstance(o, float) else str(o))}</{tag}>"
    return "<table>" + "".join("<tr>" + "".join(cell(o, tag) for o in row) + "</tr>" for tag, part in (("th", [header] if header else []), ("td", rows)) for row in part) + "</table>"


def summary(metrics):
    rows = [(name, 100 * o["top1"], 100 * o["top5"], o["loss"], 100 * o["ece"], metrics["images"][name]) for name in ("test", "valid") if (o := metrics[name])]
    chosen = f"Epoch {metrics['best_epoch']} was chosen on valid" if metrics["best_epoch"] else "These are the weights of the last epoch"
    return (table(rows, ("", "top-1, %", "top-5, %", "loss, label-smoothed", "ECE, %", "images")) +
            f"<p>{chosen}; {metrics['parameters']:,} parameters, {metrics['epochs']} epoch{'' if metrics['epochs'] == 1 else 's'} in {timedelta(seconds=round(metrics['seconds']))}, "
            f"{metrics['images_per_second']:.0f} images/s, seed {metrics['seed']}.</p>")


def training(history):
    from ..plots import curves
    epochs = [o["epoch"] for o in history]
    def column(key, scale=1): return epochs, [None if o[key] is None else scale * o[key] for o in history]
    return "\n".join(("<h2>Training</h2><div class=two>", *map(picture, (
        curves({"train": column("train_loss"), "valid": column("valid_loss")}, "Loss, label-smoothed", "epoch", "loss"),
        *([curves({"top-1": column("top1", 100), "top-5": column("top5", 100)}, "Accuracy on valid", "epoch", "%")] if history[0]["top1"] is not None else []),
        curves({"lr": column("lr")}, "Learning rate at the end of each epoch; momentum stays at 0.9", "epoch", "lr", ylim=(0, None)),
        curves({"seconds": column("seconds")}, "Time of each epoch, with its validation", "epoch", "seconds", ylim=(0, None)))), "</div>"))


def calibration(found, split):
    "Reliability on `split`, before and after a temperature that was fitted on valid, where there is one."
    from ..plots import curves
    o = found[split]
    versions, text = {"as it is": o.probs}, "There is no validation set to fit a temperature on."
    if "valid" in found and (found["valid"].preds == found["valid"].targs).all(): text = "Not one image of valid is mistaken: there is no temperature to fit."
    elif "valid" in found:
        t = fit_temperature(found["valid"].probs, found["valid"].targs)
        versions[f"at temperature {t:.2f}"] = with_temperature(o.probs, t)
        text = f"A temperature of {t:.2f}, fitted on valid, divides the logits" + ("." if split != "valid" else ", and is shown on the images that it was fitted on.")
    lines = {"ideal": ([0, 100], [0, 100])}
    for name, probs in versions.items():
        confidence, accuracy, _ = reliability(probs, o.targs)
        lines[f"{name}: ECE {100 * calibration_error(probs, o.targs):.2f} %"] = 100 * confidence, 100 * accuracy
    return "<h2>Calibration</h2><p>Whether a confidence of 80 % is right 80 times in 100. " + text + "</p>" + picture(curves(lines, f"Reliability on {split}", "confidence, %", "right, %", xlim=(0, 102), ylim=(0, 102)))


def superclasses(data):
    "The names of the superclasses, and for each class the index of its own."
    names, of = np.unique(data.superclasses, return_inverse=True)
    return names.tolist(), of


def classes(data, o, split):
    from ..plots import bars
    right = o.preds == o.targs
    present = [c for c in range(len(data.vocab)) if (o.targs == c).any()]
    parts = ["<h2>Classes</h2>"]
    if data.superclasses:
        names, of = superclasses(data)
        shown = np.unique(of[o.targs])
        parts.append(picture(bars([names[s] for s in shown], [(of[o.preds] == s)[of[o.targs] == s].mean() for s in shown], f"Superclasses, accuracy on {split}", "right, %")))
    parts.append(picture(bars([data.vocab[c] for c in present], [right[o.targs == c].mean() for c in present], f"Classes, accuracy on {split}", "right, %")))
    return "\n".join(parts)


def counts(true, pred, n):
    "The confusion matrix (n,n)."
    return np.bincount(true * n + pred, minlength=n * n).reshape(n, n)


def confusion(data, o, split):
    "The matrix of the superclasses, or of the classes where they are few; and the 20 pairs that are confused most, with a picture of each."
    from ..plots import matrix
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
    buffer, img = io.BytesIO(), Image.fromarray(image)
    img.thumbnail((64, 64))
    img.save(buffer, "PNG")
    return picture(buffer.getvalue())


def hardest(data, o, split, n=24):
    from ..plots import sheet, short
    worst = np.argsort(o.probs[np.arange(len(o.targs)), o.targs], kind="stable")[:n]
    labels = [f"{short(data.vocab[o.targs[i]])}\n{'right' if o.preds[i] == o.targs[i] else 'as ' + short(data.vocab[o.preds[i]], 17)}\n{100 * o.probs[i].max():.0f} %" for i in worst]
    return f"<h2>Top losses</h2><p>The images of {split} whose own class the model finds least likely: what they are, and what they were taken for.</p>" + picture(sheet(data.images[o.rows[worst]], labels, columns=6))


def settings(about):
    from ..cli import without_folders
    own = {k: Path(v).name if k in ("data", "runs", "dataset") else v for k, v in about["settings"].items()}
    return "\n".join(("<h2>Settings</h2>", *(f"<p><code>{escape(without_folders(o))}</code></p>" for o in about.get("commands", [])),
                      table([(k, str(v)) for k, v in own.items() if v is not None and k not in ("resume", "dry_run")]), "<h2>Versions</h2>",
                      table([(k, str(v)) for k, v in {**about.get("versions", {}), "device": about.get("device"), "git commit": about.get("git_commit")}.items()])))


def main(args=None):
    parser = argparse.ArgumentParser(prog="python -m sifar.report", description="Evaluate a run again; write its metrics.json and report.html.")
    parser.add_argument("run", type=Path, nargs="?", help="run folder, by default the one that was finished last")
    with one_line_errors():
        from .run import newest_run
        quiet_imports()
        log_to_screen()
        run = parser.parse_args(args).run or newest_run()
        from .load import load_chosen, load_last, new_learner
        cfg, notes = read_settings(run), list[str]()
        history = attempt(notes, *([partial(saved_history, run)] if (run / "models").exists() else []), partial(read_history, run)) or []
        if len(history) < cfg.epochs:
            notes.append(f"The run is not finished: {len(history)} of {cfg.epochs} epochs. This is what there is.")
            log.info("%s", notes[-1])
        learn = attempt(notes, partial(new_learner, run))
        chosen = learn and attempt(notes, partial(load_chosen, learn))
        if chosen or learn and attempt(notes, partial(load_last, learn)): write_report(learn, cfg, history, notes, bool(chosen))
        else: write_file(run / "report.html", page(run, cfg, history, notes, attempt(notes, partial(read_metrics, run))))
        log.info("The report is %s", run / "report.html")


if __name__ == "__main__": main()
