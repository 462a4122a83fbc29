"""Minutes of training until the validation accuracy reaches a target, as a table and a plot.

    python -m bench.time_to_accuracy RUN... [--targets 70 73 75] [--plot docs/time_to_accuracy.png]"""
import argparse
import csv
import itertools
import json
from pathlib import Path


def curve(run):
    """The name of a run, and its minutes and valid top-1 (percent) after each epoch, from its history.csv.

    Only a run with a validation set has them."""
    rows = list(csv.DictReader((run / "history.csv").open()))
    settings = json.loads((run / "config.json").read_text())["settings"]
    if not all(row["top1"] for row in rows):
        raise SystemExit(f"{run} has no validation accuracy: train it with --valid-pct above 0.")
    minutes = list(itertools.accumulate(float(row["seconds"]) / 60 for row in rows))
    top1 = [100 * float(row["top1"]) for row in rows]
    return f"{settings['preset']}, {settings['epochs']} epochs", minutes, top1


def reached(minutes, top1, target):
    "Minutes at the end of the first epoch that reached `target`; None where none did."
    for minute, accuracy in zip(minutes, top1):
        if accuracy >= target: return minute
    return None


def cell(minutes): return "        -" if minutes is None else f"{minutes:>5.1f} min"


def plot(curves, path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, minutes, top1 in curves: ax.plot(minutes, top1, marker="o", markersize=3, label=name)
    ax.set(xlabel="minutes of training", ylabel="valid top-1, %", xlim=(0, None))
    ax.set_title("CIFAR-100, ResNet-18")
    ax.grid(alpha=0.3)
    ax.legend(loc="lower right")
    fig.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--targets", nargs="+", type=float, default=[70, 73, 75])
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    curves = [curve(run) for run in args.runs]
    print("run".ljust(24), *(f"{target:>7g} %" for target in args.targets), "   best")
    for name, minutes, top1 in curves:
        times = [cell(reached(minutes, top1, target)) for target in args.targets]
        print(name.ljust(24), *times, f"{max(top1):>6.2f} %")
    if args.plot: plot(curves, args.plot)


if __name__ == "__main__": main()
