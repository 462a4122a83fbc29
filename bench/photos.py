"""What a learner is worth on photographs: a folder of them, with a folder for each class.

    python -m bench.photos MODEL FOLDER [--unknown FOLDER...] [--fit]

Top-1 and top-5 of one view, of two and of four, and of what most do: the square in the middle, bicubic.
Behind them the difference to that in points of top-1, with its standard error: each photograph is its own
pair. Then how much of the photographs, and of those in the folders of unknown things, the model is sure of
(one view). --fit prints the confidence that these photographs ask for, as it stands in metrics.json."""
import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from sifar import Predictor, UserError
from sifar.cli import one_line_errors
from sifar.data.image import VIEWS, upright_rgb
from sifar.data.layout import Folder
from sifar.runs.calibration import fit_confidence, judge, unknown_figures


def photos(folder, vocab):
    "The files in the class folders of `folder`, and their labels (n,). Errors: UserError."
    files = Folder(folder).all("files")
    if not files: raise UserError(f"{folder} holds no files.")
    unknown = sorted({path.parent.name for path in files} - set(vocab))
    if unknown: raise UserError(f"{folder} has classes that the model lacks: {', '.join(unknown)}.")
    return files, np.array([vocab.index(path.parent.name) for path in files])


def middle(path, sz):
    "The square in the middle of a picture, bicubic."
    with Image.open(path) as img: return ImageOps.fit(upright_rgb(img), (sz, sz), Image.Resampling.BICUBIC)


def say(name, probs, targs, base):
    "Print a row of the table, and return which photographs are right (n,)."
    best = (-probs).argsort(1)[:, :5]
    right = best[:, 0] == targs
    top5 = (best == targs[:, None]).any(1)
    print(f"| {name} | {100 * right.mean():.1f} | {100 * top5.mean():.1f} |", end="")
    if base is None: print(" |")
    else:
        gain = 100 * (right.astype(float) - base)
        print(f" {gain.mean():+.1f} ± {gain.std() / len(gain)**0.5:.1f} |")
    return right


def main(args=None):
    parser = argparse.ArgumentParser(description="What a learner is worth on photographs.")
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--unknown", type=Path, nargs="*", default=[])
    parser.add_argument("--fit", action="store_true")
    args = parser.parse_args(args)
    with one_line_errors():
        predictor = Predictor(args.model)
        files, targs = photos(args.folder, predictor.vocab)
        print("| views | top-1 | top-5 | points |\n|---|---|---|---|")
        probs = predictor.probs([middle(path, predictor.sz) for path in files])
        base = say("the square in the middle", probs, targs, None)
        for n in VIEWS:
            predictor.views = n
            probs = predictor.probs_of_views([predictor.read_views(path) for path in files])
            say(n, probs, targs, base)
        predictor.views = 1
        probs = seen_once(predictor, files)
        if args.fit: print(json.dumps(fit_confidence(probs, targs), indent=2))
        else: say_sure(predictor.confidence, probs, targs, {
            folder.name: seen_once(predictor, Folder(folder).all("files")) for folder in args.unknown})


def seen_once(predictor, files):
    return predictor.probs([predictor.read(path) for path in files])


def say_sure(confidence, probs, targs, unknown):
    "Print how many pictures a model is sure of, and how well their familiarity tells unknown ones."
    right, verdicts = probs.argmax(1) == targs, judge(probs, confidence)
    print("\n| pictures | sure, % | unknown, % | AUROC | pass where 95 % do, % |\n|---|---|---|---|---|")
    for name, some in (("all", right | True), ("right", right), ("wrong", ~right)):
        print(f"| {name} | {percent(verdicts[some], 'sure')} | {percent(verdicts[some], 'unknown')} | | |")
    for name, others in unknown.items():
        verdicts, told = judge(others, confidence), unknown_figures(probs, others)
        print(f"| {name} | {percent(verdicts, 'sure')} | {percent(verdicts, 'unknown')} | "
              f"{told['auroc']:.3f} | {100 * told['pass']:.1f} |")


def percent(verdicts, which): return f"{100 * (verdicts == which).mean():.1f}"


if __name__ == "__main__": main()
