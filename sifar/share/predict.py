"""Classify image files and folders of them: python -m sifar.predict MODEL IMAGE..."""
import sys
from itertools import chain
from pathlib import Path

from ..cli import Parser, one_line_errors
from ..distributed import gather, is_first, part, world
from ..errors import UserError
from ..files import csv_text, write_file
from ..log import log, log_to_screen, progress


def predict(cfg):
    check(cfg)
    from .predictor import Predictor
    predictor, files = Predictor(cfg.model, views=cfg.views), list_images(cfg.images)
    # of several processes, each has a part of the files
    parts = gather(list(classify(predictor, part(files), cfg.top_k, say=not cfg.csv)))
    rows = list(chain.from_iterable(parts))
    if not rows:
        if not is_first(): sys.exit(2)
        raise UserError(f"None of the {len(files)} files could be read as an image.")
    if not is_first(): return
    if cfg.csv: write_csv(cfg.csv, rows)
    where = f", all in {cfg.csv}" if cfg.csv else ""
    if cfg.csv or len(rows) < len(files):
        log.info("%d of %d images classified%s", len(rows), len(files), where)


def check(cfg):
    if cfg.top_k < 1: raise UserError(f"--top-k {cfg.top_k} is out of range: it must be at least 1.")
    if world() > 1 and not cfg.csv: raise UserError("Several processes write one table: name it by --csv.")
    if cfg.csv and cfg.csv.is_dir(): raise UserError(f"--csv {cfg.csv} is a folder: name a file.")


def classify(predictor, files, k, say):
    "Yields a row for write_csv for each readable file; logs the others, and where `say` the labels."
    with progress() as bar:
        task = bar.add_task("", total=len(files))
        for file, top in zip(files, predictor.predict_each(files, k)):
            bar.advance(task)
            if isinstance(top, UserError):
                log.warning("Skipped: %s", top.text)
                continue
            labels = "  ".join(f"{label} {100 * p:.1f} %" for label, p in top)
            if say: log.info("%s  %s", file, labels)
            yield [file, *(value for pair in top for value in pair)]


def list_images(paths):
    """The files among `paths`, and those in the folders among them, but hidden ones and notes beside them.

    Errors: UserError."""
    from ..data.layout import Folder
    files: list[Path] = []
    for path in paths:
        if not path.exists(): raise UserError(f"{path} is missing.")
        found = [path] if path.is_file() else Folder(path).all("files")
        if not found: raise UserError(f"{path} holds no files.")
        files += found
    if not files: raise UserError("No images are named: python -m sifar.predict MODEL IMAGE...")
    return files


def write_csv(path, rows):
    "Write rows of file, label, probability, label, probability, ... with a header."
    k = len(rows[0]) // 2
    table = [["file", *(f"{name}_{i}" for i in range(1, k + 1) for name in ("label", "probability"))]]
    for file, *pairs in rows:
        pairs[1::2] = [f"{p:.6f}" for p in pairs[1::2]]
        table.append([file, *pairs])
    path.parent.mkdir(parents=True, exist_ok=True)
    device = path.exists() and not path.is_file()           # such as /dev/stdout, which must stay one
    write = Path.write_bytes if device else write_file
    write(path, csv_text(table).encode(errors="surrogateescape"))        # file names are bytes


def main(args=None):
    parser = Parser("python -m sifar.predict", "Classify image files, and all files in folders of them; "
                    "what is no image is reported and skipped.")
    parser.add_argument("model", type=Path, help="learner.pkl, or the run folder that holds it")
    parser.add_argument("images", type=Path, nargs="*", help="image files and folders of them")
    parser.add_argument("--top-k", type=int, default=5, metavar="INT",
                        help="number of labels for each image (default: 5)")
    parser.add_argument("--views", type=int, default=1, choices=(1, 2, 4),
                        help="views of each picture: 2 and 4 (with mirror images) are better on "
                             "photographs, and take longer (default: 1)")
    parser.add_argument("--csv", type=Path, metavar="FILE",
                        help="file for the labels and probabilities, instead of the terminal")
    with one_line_errors():
        cfg = parser.parse_args(args)
        log_to_screen()
        from ..training.ranks import joined
        with joined("auto"): predict(cfg)


if __name__ == "__main__": main()
