"""Runs beside each other: a table of the settings that differ and of the results, curves, and the mean of those that differ in seed alone.

    python -m sifar.compare [RUN...]        # by default all runs below runs/"""
import argparse
import json
import statistics
from dataclasses import asdict
from functools import partial
from itertools import groupby
from pathlib import Path

from ..cli import one_line_errors
from ..config import FREE_ON_RESUME
from ..errors import UserError, explain
from ..files import write_file
from ..log import console, log, log_to_screen, quiet_imports
from .run import attempt, read_config, read_history, read_metrics, read_settings

ASIDE = {*FREE_ON_RESUME, "name"}         # settings that make no difference worth a column


def read_run(path):
    "Settings, history and metrics of a run folder; what cannot be read of the last two is said, and left out. Errors: UserError."
    settings, data = asdict(read_settings(path)), read_config(path, lambda about: about.get("data", {}).get("fingerprint"))
    history, metrics = attempt([], partial(read_history, path)) or [], attempt([], partial(read_metrics, path))
    if not history and not metrics: raise UserError(f"{path} has nothing to compare yet.")
    return {"path": Path(path), "settings": {k: Path(v).name if k == "dataset" else v for k, v in settings.items() if k not in ASIDE}, "data": data, "history": history, "metrics": metrics}


def differing(runs):
    "The names of the settings that are not the same in all `runs`."
    return [k for k in runs[0]["settings"] if len({str(o["settings"][k]) for o in runs}) > 1]


def result(run):
    "Best valid and test top-1 in percent and minutes, as text by its heading."
    metrics = run["metrics"] or {"valid": None, "test": None, "seconds": sum(o["seconds"] for o in run["history"])}
    valid = [o["top1"] for o in (*run["history"], metrics["valid"] or {"top1": None}) if o["top1"] is not None]
    test = f"{100 * metrics['test']['top1']:.2f}" if metrics["test"] else "-" if run["metrics"] else "unfinished"
    return {"valid, %": f"{100 * max(valid):.2f}" if valid else "-", "test, %": test, "minutes": f"{metrics['seconds'] / 60:.1f}"}


def table(runs):
    "The lines of a table of `runs`; columns that have no room in the width of the terminal go below the others."
    import pandas as pd
    rows = {label(o, runs): {**{k: str(o["settings"][k]) for k in differing(runs)}, **result(o)} for o in runs}
    return pd.DataFrame.from_dict(rows, orient="index").to_string(line_width=console.width, max_colwidth=None).splitlines()


def means(runs):
    "A line for each group of finished `runs` that differ in seed alone: mean and standard deviation of test top-1, or where there is no test set of valid."
    def rest(run): return json.dumps([{k: v for k, v in run["settings"].items() if k != "seed"}, run["data"]])
    lines = []
    for _, found in groupby(sorted((o for o in runs if o["metrics"]), key=rest), key=rest):
        group = {o["settings"]["seed"]: o for o in found}           # a copy of a run says nothing more
        split = "test" if all(o["metrics"]["test"] for o in group.values()) else "valid"
        if len(group) < 2 or not all(o["metrics"][split] for o in group.values()): continue
        top1 = [100 * o["metrics"][split]["top1"] for o in group.values()]
        seeds = ", ".join(map(str, group))
        about = next(iter(group.values()))["settings"]
        lines.append(f"{about['arch']} on {about['dataset']}: {split} top-1 {statistics.mean(top1):.2f} ± {statistics.stdev(top1):.2f} % (n = {len(top1)}, seeds {seeds})")
    return lines


def label(run, runs):
    "The name of a run among `runs`, with as many of its folders as tell it apart."
    parts = run["path"].resolve().parts
    for n in range(1, len(parts)):
        if [o["path"].resolve().parts[-n:] for o in runs].count(parts[-n:]) == 1: break
    return "/".join(parts[-n:])


def write_curves(runs, path):
    "A PNG of the curves of `runs`: valid top-1, or where none has it the training loss."
    from ..plots import curves
    valid = any(o["top1"] is not None for run in runs for o in run["history"])
    key, scale, title, unit = ("top1", 100, "Accuracy on valid", "top-1, %") if valid else ("train_loss", 1, "Loss in training, label-smoothed", "loss")
    without = [label(run, runs) for run in runs if all(o[key] is None for o in run["history"])]
    if without: log.info("Not among the curves, as they have no %s: %s", title.lower(), ", ".join(without))
    lines = {label(run, runs): ([o["epoch"] for o in run["history"]], [None if o[key] is None else scale * o[key] for o in run["history"]]) for run in runs}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, curves(lines, title, "epoch", unit))


def main(args=None):
    parser = argparse.ArgumentParser(prog="python -m sifar.compare", description="Compare runs: settings that differ, results, curves.")
    parser.add_argument("runs", type=Path, nargs="*", help="run folders, by default all below runs/")
    parser.add_argument("--plot", type=Path, default=Path("compare.png"), help="where the curves go (default: compare.png)")
    with one_line_errors():
        quiet_imports()
        log_to_screen()
        args = parser.parse_args(args)
        paths = list({o.resolve(): o for o in args.runs}.values()) or sorted(o.parent for o in Path("runs").glob("*/*/config.json"))
        runs = []
        for o in paths:
            try: runs.append(read_run(o))
            except (UserError, OSError) as e: log.info("Left out: %s", explain(e))
        if not runs: raise UserError("There is no run to compare: name run folders, or train some first.")
        for line in (*table(runs), *means(runs)): log.info("%s", line)
        write_curves(runs, args.plot)
        log.info("The curves are in %s", args.plot)


if __name__ == "__main__": main()
