"""What a run folder says, and where runs are: each file is checked as it is read."""
import csv
import os
import shlex
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

from ..config import TrainConfig, flag
from ..errors import UserError, explain, one_line
from ..files import check_form, read_file, read_json
from ..log import command, log

ON_VALID = "valid_loss", "top1", "top5"         # columns of history.csv that are empty without valid

# What the files of a run hold, as check_form has it; older runs lack what has a ?
ABOUT = {
    "settings": {"dataset": str}, "versions?": {str: str}, "commands?": [str],
    "git_commit?": (str, None), "device?": (str, None), "precision?": (str, None), "machine?": (str, None),
    "data?": {"fingerprint?": dict, "vocab?": [str]},
}
DATA = {"vocab": [str], "superclasses": ([str], None), "stats": [[float]]}
ROW = {
    "epoch": int, "train_loss": float, "lr": float, "seconds": float, "images_per_second": float,
    **dict.fromkeys((*ON_VALID, "balanced?"), (float, None)),
}
FIGURES = {
    "top1": float, "top5": float, "loss": float,
    "ece?": float, "top1_error?": float, "top5_error?": float, "balanced?": float, "balanced_error?": float,
    "macro_f1?": float,
}
METRICS = {
    "parameters": int, "epochs": int, "seed": int, "classes": int, "best_epoch": (int, None),
    "seconds": float, "images_per_second": float,
    "images": {"train": int, "valid": int, "test": int}, "valid": (FIGURES, None), "test": (FIGURES, None),
    "confidence?": ({str: float}, None), "unknown?": ({"images": str, "auroc": float, "pass": float}, None),
    "without_twins?": ({"top1": float, "top1_error?": float, "images": int}, None), "doubted?": (float, None),
}


class Run:
    """The run folder `path`: its `settings`, a TrainConfig, `about`, all of config.json, history and metrics.

    Each file is checked as it is read. Errors: UserError, for what is missing or damaged."""

    def __init__(self, path):
        self.path = Path(path)
        if not self.config.is_file():
            raise UserError(f"{str(path)!r} is no run folder: it has no config.json. "
                            "A run folder is one such as runs/cifar100/<time>-resnet18.")
        try:
            self.about = read_json(self.config)
            check_about(self.about)
            # without those that only older versions had
            known = {o.name for o in fields(TrainConfig)} & self.about["settings"].keys()
            self.settings = TrainConfig(**{name: self.about["settings"][name] for name in known})
        except (UserError, OSError, ValueError, KeyError, TypeError) as e: raise self.damaged(e) from e

    @property
    def config(self): return self.path / "config.json"

    def damaged(self, e):
        return UserError(f"{self.config} is damaged ({one_line(e)}): the run cannot be used.")

    @property
    def data(self):
        "What config.json says of the data: vocab, superclasses, stats and fingerprint."
        try:
            check_data_facts(self.about["data"])
        except (ValueError, KeyError, TypeError) as e: raise self.damaged(e) from e
        return self.about["data"]

    @property
    def fingerprint(self):
        "Of the data, {} for a run that is older than fingerprints."
        return self.about.get("data", {}).get("fingerprint", {})

    def history(self):
        "The rows of history.csv as RunLog had them."
        path = self.path / "history.csv"
        try:
            lines = read_file(path).decode().splitlines()
            rows = [parse_row(row) for row in csv.DictReader(lines)]
        except (UserError, OSError, ValueError, TypeError, KeyError, OverflowError, csv.Error) as e:
            raise UserError(f"{path} cannot be read ({one_line(e)}).") from e
        if not rows: raise UserError(f"{path} has no epoch yet: train first.")
        return rows

    def metrics(self):
        "The dictionary of metrics.json, None where there is none yet."
        path = self.path / "metrics.json"
        try:
            metrics = read_json(path)
            check_form(metrics, METRICS)
        except FileNotFoundError: return None
        except (UserError, OSError, ValueError, TypeError, KeyError) as e:
            again = f"write it anew by python -m sifar.report {self.path}"
            raise UserError(f"{path} is damaged ({one_line(e)}): {again}") from e
        return metrics


def changed_settings(before, now, names):
    "Those of the settings `names` that differ, as text; None where none do, or there are just more epochs."
    changed = [k for k in names if now[k] != before[k]]
    if not changed or changed == ["epochs"] and now["epochs"] > before["epochs"]: return None
    return ", ".join(f"{flag(k)} {now[k]} (was {before[k]})" for k in changed)


def check_about(about):
    """Check the dictionary that was read from config.json.

    Errors: ValueError or TypeError, where it has other parts than it should."""
    check_form(about, ABOUT)
    # OSError or ValueError for what is no path
    for folder in (about["settings"]["dataset"], about["settings"].get("data", ".")):
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError): os.lstat(folder)
    # ValueError for a quotation mark that is alone
    for line in about.get("commands", []): shlex.split(line)


def check_data_facts(data):
    "As check_about, for what it says of the data; only a learner without its data set needs that."
    check_form(data, DATA)
    if data["superclasses"] is not None and len(data["superclasses"]) != len(data["vocab"]):
        raise ValueError("superclasses and classes differ in number")
    if list(map(len, data["stats"])) != [3, 3]: raise ValueError("stats are not those of three channels")


def parse_row(text):
    """A row of history.csv as numbers, None for what is empty.

    Errors: ValueError, TypeError, KeyError, OverflowError."""
    row: dict = {k: None if v == "" else float(v) for k, v in text.items()}
    row["epoch"] = int(row["epoch"])            # OverflowError for inf, ValueError for nan
    check_row(row)
    return row


def check_row(row):
    "Check a dictionary of an epoch of the history. Errors: ValueError, TypeError."
    check_form(row, ROW)
    on_valid = {row[k] is None for k in ON_VALID}           # all of them have a value, or none
    if len(on_valid) > 1: raise ValueError("a value is missing")


def column(history, key, scale=1):
    "The epochs, and the values of a column of the history; an epoch without one has None."
    values = [None if row[key] is None else scale * row[key] for row in history]
    return [row["epoch"] for row in history], values


def attempt(notes, *fs):
    """What the first of `fs` gives that raises no error for users; None where all do.

    The errors of those before it are logged and added to `notes`."""
    for f in fs:
        try: return f()
        except (UserError, OSError) as e:
            notes.append(explain(e))
            log.info("%s", notes[-1])


# ---- where runs are ----

def find_runs():
    "The paths of all run folders in runs/, sorted."
    return sorted(config.parent for config in Path("runs").glob("*/*/config.json"))


def newest_run():
    "The path of the run in runs/ that was finished last. Errors: UserError for none."
    # by the history, as a new report of an old run writes its metrics.json anew
    paths = Path("runs").glob("*/*/history.csv")
    done = [path for path in paths if path.with_name("metrics.json").is_file()]
    if not done:
        raise UserError("runs holds no finished run: "
                        f"train one with {command('train.py')}, or name a run folder.")
    return max(done, key=lambda path: path.stat().st_mtime).parent


def last_checkpoint(run): return Path(run) / "models" / "last.pth"
