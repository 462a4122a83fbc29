"""Runs beside each other: settings that differ, results, curves, and the mean over seeds.

    python -m sifar.compare [RUN...]        # by default all runs below runs/"""
import json
import statistics
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from ..cli import Parser, one_line_errors
from ..config import FREE_ON_RESUME
from ..errors import UserError, explain
from ..files import write_file
from ..log import console, log, log_to_screen
from .run import Run, attempt, column, find_runs

ASIDE = {*FREE_ON_RESUME, "name"}         # settings that make no difference worth a column


def read_run(path):
    """What is compared of a run folder: path, settings, data (the fingerprint), history and metrics.

    Where history or metrics cannot be read, this is logged, and they are empty. Errors: UserError."""
    run = Run(path)
    history, metrics = attempt([], run.history) or [], attempt([], run.metrics)
    if not history and not metrics: raise UserError(f"{path} has nothing to compare yet.")
    settings = {k: v for k, v in asdict(run.settings).items() if k not in ASIDE}
    settings["dataset"] = Path(settings["dataset"]).name
    return {"path": run.path, "settings": settings, "data": run.fingerprint,
            "history": history, "metrics": metrics}


def read_runs(paths):
    "read_run of each path; those that cannot be read are logged and left out."
    runs = []
    for path in paths:
        try: runs.append(read_run(path))
        except (UserError, OSError) as e: log.info("Left out: %s", explain(e))
    return runs


# ---- the table ----

def table(runs):
    """The lines of a table of `runs`, with the settings that are not the same in all of them.

    Columns for which the terminal is too narrow go below the others."""
    import pandas as pd  # here, as the means of train.py --seeds do without it
    keys = [k for k in runs[0]["settings"] if len({str(run["settings"][k]) for run in runs}) > 1]
    rows = {}
    for run in runs: rows[label(run, runs)] = {k: str(run["settings"][k]) for k in keys} | result(run)
    frame = pd.DataFrame.from_dict(rows, orient="index")
    return frame.to_string(line_width=console.width, max_colwidth=None).splitlines()


def result(run):
    "Best valid and test top-1 in percent and minutes, as text by its heading."
    history, metrics = run["history"], run["metrics"]
    if not metrics: test, seconds = "unfinished", sum(row["seconds"] for row in history)
    else: test, seconds = percent(metrics["test"]), metrics["seconds"]
    valid = [row for row in history if row["top1"] is not None]
    if metrics and metrics["valid"]: valid.append(metrics["valid"])
    best = max(valid, key=lambda row: row["top1"], default=None)
    return {"valid, %": percent(best), "test, %": test, "minutes": f"{seconds / 60:.1f}"}


def percent(figures): return f"{100 * figures['top1']:.2f}" if figures else "-"


def label(run, runs):
    "The name of a run among `runs`, with as many of its folders as tell it apart."
    parts = run["path"].resolve().parts
    for n in range(1, len(parts)):
        ends = [other["path"].resolve().parts[-n:] for other in runs]
        if ends.count(parts[-n:]) == 1: break
    return "/".join(parts[-n:])


# ---- the mean over seeds ----

def means(runs):
    "A line for each group of finished `runs` that differ in seed alone: see mean_line."
    def rest(run):
        "All but the seed, as text, which can be sorted."
        settings = {k: v for k, v in run["settings"].items() if k != "seed"}
        return json.dumps([settings, run["data"]])
    # groupby puts neighbours together, so they are sorted by the same key
    finished = sorted((run for run in runs if run["metrics"]), key=rest)
    lines = [mean_line(list(group)) for _, group in groupby(finished, key=rest)]
    return [line for line in lines if line]


def mean_line(runs):
    """Mean and standard deviation of the test top-1 of `runs`, or without a test set of valid.

    None where they have no two seeds, or no figures."""
    # a copy of a run counts once
    by_seed = {run["settings"]["seed"]: run["metrics"] for run in runs}
    metrics = list(by_seed.values())
    split = "test" if all(found["test"] for found in metrics) else "valid"
    if len(metrics) < 2 or not all(found[split] for found in metrics): return None
    top1 = [100 * found[split]["top1"] for found in metrics]
    settings, seeds = runs[0]["settings"], ", ".join(map(str, by_seed))
    return (f"{settings['arch']} on {settings['dataset']}: {split} "
            f"top-1 {statistics.mean(top1):.2f} ± {statistics.stdev(top1):.2f} % "
            f"(n = {len(top1)}, seeds {seeds})")


# ---- the curves ----

def write_curves(runs, path):
    "A PNG of the curves of `runs`: valid top-1, or where none has it the training loss."
    from ..plots import curves
    valid = any(row["top1"] is not None for run in runs for row in run["history"])
    if valid: key, scale, title, unit = "top1", 100, "Accuracy on valid", "top-1, %"
    else: key, scale, title, unit = "train_loss", 1, "Loss in training, label-smoothed", "loss"
    without = [label(run, runs) for run in runs if all(row[key] is None for row in run["history"])]
    if without:
        log.info("Not among the curves, as they have no %s: %s", title.lower(), ", ".join(without))
    lines = {label(run, runs): column(run["history"], key, scale) for run in runs}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, curves(lines, title, "epoch", unit))


# ---- the command ----

def main(args=None):
    parser = Parser("python -m sifar.compare", "Compare runs: settings that differ, results, curves.")
    parser.add_argument("runs", type=Path, nargs="*", help="run folders, by default all below runs/")
    parser.add_argument("--plot", type=Path, default=Path("compare.png"),
                        help="where the curves go (default: compare.png)")
    with one_line_errors():
        log_to_screen()
        args = parser.parse_args(args)
        named = {path.resolve(): path for path in args.runs}        # a run that is named twice is one
        runs = read_runs(list(named.values()) or find_runs())
        if not runs:
            raise UserError("There is no run to compare: name run folders, or train some first.")
        for line in (*table(runs), *means(runs)): log.info("%s", line)
        write_curves(runs, args.plot)
        log.info("The curves are in %s", args.plot)


if __name__ == "__main__": main()
