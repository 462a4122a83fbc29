"""Finished runs as rows of a Markdown table, and for those that differ in seed alone, such as NAME-1 and NAME-2, mean and standard deviation.

    python -m bench.table RUN...            # what is not finished is left out
    python -m bench.table --median RUN...   # the folder of the run whose test top-1 is the median"""
import argparse
import csv
import json
import re
import statistics
from pathlib import Path


def read(run):
    "Test top-1 and top-5 in percent, seconds an epoch (median) and minutes of a finished run."
    metrics = json.loads((run / "metrics.json").read_text())
    with (run / "history.csv").open() as f: seconds = statistics.median(float(o["seconds"]) for o in csv.DictReader(f))
    return 100 * metrics["test"]["top1"], 100 * metrics["test"]["top5"], seconds, metrics["seconds"] / 60


def rows(runs):
    "The lines of the table of `runs`, {folder: figures}."
    yield "| run | test top-1, % | test top-5, % | s an epoch | minutes |\n|---|---|---|---|---|"
    for run, figures in runs.items(): yield f"| {run.name} | " + " | ".join(f"{o:.2f}" for o in figures) + " |"
    groups = {}
    for run, figures in runs.items(): groups.setdefault(re.sub(r"-\d+$", "", run.name), []).append(figures)
    for name, found in groups.items():
        if len(found) > 1: yield f"| {name}, n = {len(found)} | " + " | ".join(f"{statistics.mean(o):.2f} ± {statistics.stdev(o):.2f}" for o in zip(*(o[:2] for o in found))) + " | - | - |"          # not all of them had the machine alone


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--median", action="store_true")
    args = parser.parse_args()
    runs = {o: read(o) for o in args.runs if (o / "metrics.json").is_file()}
    if not runs: raise SystemExit("None of these runs is finished.")
    if args.median: print(sorted(runs, key=lambda o: runs[o][0])[(len(runs) - 1) // 2])
    else: print(*rows(runs), sep="\n")


if __name__ == "__main__": main()
