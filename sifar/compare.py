"""Runs beside each other: a table of the settings that differ and of the results, curves, and the mean of those that differ in seed alone.

    python -m sifar.compare [RUN...]        # by default all runs below runs/"""
import argparse
import json
import statistics
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from .config import FREE_ON_RESUME, read_settings
from .errors import UserError, one_line_errors
from .files import write_file
from .report import read_history
from .terminal import log, log_to_screen, quiet_imports

ASIDE = {*FREE_ON_RESUME, "name", "precision"} - {"preset"}         # settings that make no difference worth a column


def read_run(path):
    "Settings, history and metrics of a run folder, None for metrics that are not there yet. Errors: UserError."
    cfg, history, metrics = asdict(read_settings(path)), read_history(path), Path(path) / "metrics.json"
    try: return {"path": Path(path), "settings": {k: v for k, v in cfg.items() if k not in ASIDE}, "history": history, "metrics": json.loads(metrics.read_text()) if metrics.exists() else None}
    except ValueError as e: raise UserError(f"{metrics} is damaged ({e}): write it anew by python -m sifar.report {path}") from e


def differing(runs):
    "The names of the settings that are not the same in all `runs`."
    return [k for k in runs[0]["settings"] if len({str(o["settings"][k]) for o in runs}) > 1]


def result(run):
    "Best valid and test top-1 in percent and minutes, as text."
    valid = [o["top1"] for o in run["history"] if o["top1"] is not None]
    test = (run["metrics"] or {}).get("test")
    minutes = sum(o["seconds"] for o in run["history"]) / 60
    return f"{100 * max(valid):.2f}" if valid else "-", f"{100 * test['top1']:.2f}" if test else "-" if run["metrics"] else "unfinished", f"{minutes:.1f}"


def table(runs):
    "The lines of a table of `runs`."
    names = differing(runs)
    rows = [("run", *names, "valid, %", "test, %", "minutes")]
    rows += [(o["path"].name, *(str(o["settings"][k]) for k in names), *result(o)) for o in runs]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))) for row in rows]


def means(runs):
    "A line for each group of finished `runs` that differ in seed alone: mean and standard deviation of test top-1."
    def rest(run): return json.dumps({k: v for k, v in run["settings"].items() if k != "seed"})
    lines = []
    for _, found in groupby(sorted((o for o in runs if o["metrics"] and o["metrics"]["test"]), key=rest), key=rest):
        group = list(found)
        if len({o["settings"]["seed"] for o in group}) < 2: continue
        top1 = [100 * o["metrics"]["test"]["top1"] for o in group]
        seeds = ", ".join(str(o["settings"]["seed"]) for o in group)
        lines.append(f"{group[0]['settings']['arch']} on {Path(group[0]['settings']['dataset']).name}: test top-1 {statistics.mean(top1):.2f} ± {statistics.stdev(top1):.2f} % (n = {len(top1)}, seeds {seeds})")
    return lines


def write_curves(runs, path):
    "A PNG of the curves of `runs`: valid top-1, or where none has it the training loss."
    from .plots import curves
    valid = any(o["top1"] is not None for run in runs for o in run["history"])
    key, scale, title, label = ("top1", 100, "Accuracy on valid", "top-1, %") if valid else ("train_loss", 1, "Loss in training, label-smoothed", "loss")
    lines = {run["path"].name: ([o["epoch"] for o in run["history"]], [None if o[key] is None else scale * o[key] for o in run["history"]]) for run in runs}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, curves(lines, title, "epoch", label))


def main(args=None):
    parser = argparse.ArgumentParser(prog="python -m sifar.compare", description="Compare runs: settings that differ, results, curves.")
    parser.add_argument("runs", type=Path, nargs="*", help="run folders, by default all below runs/")
    parser.add_argument("--plot", type=Path, default=Path("compare.png"), help="where the curves go (default: compare.png)")
    with one_line_errors():
        quiet_imports()
        log_to_screen()
        args = parser.parse_args(args)
        paths = args.runs or sorted(o.parent for o in Path("runs").glob("*/*/config.json"))
        runs = []
        for o in paths:
            try: runs.append(read_run(o))
            except UserError as e: log.info("Left out: %s", e.text)
        if not runs: raise UserError("There is no run to compare: name run folders, or train some first.")
        for line in (*table(runs), *means(runs)): log.info("%s", line)
        write_curves(runs, args.plot)
        log.info("The curves are in %s", args.plot)


if __name__ == "__main__": main()
