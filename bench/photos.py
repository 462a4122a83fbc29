"""What a learner is worth on photographs: a folder of them, with a folder for each class.

    python -m bench.photos MODEL FOLDER

Top-1 and top-5 of one view, of two and of four, and of what most do: the square in the middle, bicubic.
Behind them the difference to that in points of top-1, with its standard error: each photograph is its own
pair."""
import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from sifar import Predictor, UserError
from sifar.cli import one_line_errors
from sifar.data.folder import visible_files
from sifar.data.image import VIEWS, read_views, upright_rgb
from sifar.log import quiet_imports


def photos(folder, vocab):
    "The files in the class folders of `folder`, and their labels (n,). Errors: UserError."
    files = visible_files(folder)
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
    args = parser.parse_args(args)
    with one_line_errors():
        quiet_imports()
        predictor = Predictor(args.model)
        files, targs = photos(args.folder, predictor.vocab)
        print("| views | top-1 | top-5 | points |\n|---|---|---|---|")
        probs = predictor.probs([middle(path, predictor.sz) for path in files]).numpy()
        base = say("the square in the middle", probs, targs, None)
        for n in VIEWS:
            predictor.views = n
            probs = predictor.probs_of_views([read_views(path, predictor.sz, n) for path in files]).numpy()
            say(n, probs, targs, base)


if __name__ == "__main__": main()
