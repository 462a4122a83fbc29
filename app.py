#!/usr/bin/env python
"""A page that shows an exported learner: python app.py --model runs/cifar100/RUN/learner.pkl"""
import argparse
import csv
import hashlib
import io
import json
import logging
import os
import re
import threading
import time
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory

import gradio as gr
import numpy as np
from gradio import processing_utils
from gradio.utils import get_upload_folder
from PIL import Image
from starlette.requests import ClientDisconnect

from sifar.cli import one_line_errors
from sifar.errors import UserError
from sifar.files import write_file
from sifar.log import quiet_imports
from sifar.share.guard import MAX_FILES, guarded, open_picture

HERE = Path(__file__).parent
MAX_MB = 20                                     # of an uploaded file
KEPT = 300                                      # seconds that an upload is kept, at most three times that
MIN_SIDE = 4                                    # of a picture, looked at before it is decoded
UNSURE = 0.5                                    # below this probability the page says so
NO_MODEL = """# No model yet

Train one and export it, then start this page again:

    python train.py --preset smoke --dataset digits
    python export.py
    python app.py

Or export the CIFAR-100 classifier that comes with sifar: `python export.py results/cifar100-resnet18`.
"""
HEADERS = ["file", "label", "probability", "or else"]
CSS = """
#about td:first-child, #about th:first-child {white-space: nowrap}
.gradio-container {max-width: 1100px !important; width: 100% !important; margin: auto}
.gradio-container main {width: 100%}
"""


def find_model(named):
    """The learner file to show: as named; else beside this file, the newest export, or one of results/.

    None where there is none."""
    if named: return Path(named)
    newest_first = sorted(Path().glob("runs/*/*/learner.pkl"), key=lambda path: -path.stat().st_mtime)
    exports = [HERE / "learner.pkl", *newest_first, *HERE.glob("results/*/learner.pkl")]
    return next((path for path in exports if path.is_file()), None)


def show_errors(f):
    "What a user can cause becomes a message on the page, without a traceback in the log."
    @wraps(f)
    def inner(*args):
        try: return f(*args)
        except UserError as e: raise gr.Error(e.text, print_exception=False) from e
    return inner


def read(predictor, file):
    """The picture in an uploaded file, a dictionary as Gradio sends it, as the model sees it.

    Errors: UserError."""
    path, uploads = path_of(file), Path(get_upload_folder()).resolve()
    # a client sends any path that it likes: only what it uploaded is read
    if not path.is_relative_to(uploads) or not path.is_file():
        raise UserError("That picture is not here, or not any more: upload it again.")
    size = path.stat().st_size
    if not size: raise UserError("The file is empty.")
    if size > MAX_MB * 2**20: raise UserError(f"The file is too large: at most {MAX_MB} MB are read.")
    return predictor.read(open_picture(path.read_bytes(), predictor.sz), MIN_SIDE)


def path_of(file):
    "The path that a client sent; for what is no file the working directory, which is no upload."
    path = file.get("path") if isinstance(file, dict) else None
    return Path(path if isinstance(path, str) else "").resolve()


def name_of(file): return file.get("orig_name") or Path(file["path"]).name


def enlarge(img): return img.resize((256, 256), Image.Resampling.NEAREST)


def overlay(img, heat):
    "A heat map (sz,sz) from 0 to 1 over the picture that it explains."
    from matplotlib import colormaps
    smooth = to_image(heat).resize((256, 256), Image.Resampling.BICUBIC)
    colours = colormaps["inferno"](np.asarray(smooth))[..., :3]         # (h,w,rgba) -> (h,w,rgb)
    return Image.blend(enlarge(img), to_image(colours), 0.55)


def to_image(array): return Image.fromarray((255 * array).astype(np.uint8))


def plain(text):
    "Text that Markdown shows as it is."
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", str(text))


def sentence(predictor, top, ms):
    "The line below the labels: what it is, how sure, how long it took."
    label, p = top[0]
    kind = ""
    if predictor.superclasses:
        kind = f" · superclass *{plain(predictor.superclasses[predictor.vocab.index(label)])}*"
    if p >= UNSURE: return f"**{plain(label)}**{kind} · {ms:.0f} ms"
    return (f"⚠️ **Not sure**: the likeliest is {plain(label)}, with {p:.0%}. "
            f"Perhaps it is something that the model does not know.{kind} · {ms:.0f} ms")


def about(path, predictor):
    "What model.json says of the model, and what the model knows, as Markdown. Errors: UserError."
    file = path.with_name("model.json")
    try:
        facts = model_facts(json.loads(file.read_text())) if file.is_file() else {}
    except (ValueError, TypeError, AttributeError, KeyError) as e:
        raise UserError(f"{file} is damaged ({e}): export the run again, or delete it.") from e
    table = [f"| {k} | {plain(v)} |\n" for k, v in facts.items() if v]
    if table: table.insert(1, "|---|---|\n")           # the rule below the first row, which is the head
    return (f"{''.join(table)}\nIt sees every picture as {predictor.sz} x {predictor.sz} pixels, and "
            f"**it knows only these {len(predictor.vocab)} classes**: whatever else is in a picture, "
            f"it will call it one of them.\n\n{plain(', '.join(predictor.vocab))}")


def model_facts(saved):
    "The rows of the table, from what is saved in a model.json; what it does not have is empty."
    test = saved.get("test") or {}
    return {
        "architecture": saved.get("arch"),
        "parameters": saved.get("parameters") and f"{saved['parameters']:,}",
        "trained on": saved.get("dataset"),
        "epochs": saved.get("epochs"),
        "training images": (saved.get("images") or {}).get("train"),
        "test top-1": test.get("top1") and f"{100 * test['top1']:.2f} %",
        "test top-5": test.get("top5") and f"{100 * test['top5']:.2f} %",
        "commands": ", then ".join(saved.get("commands") or []),
        "date": (saved.get("date") or "")[:10],
    }


def to_csv(rows):
    "The rows of the table as the bytes of a CSV file."
    text = io.StringIO()
    csv.writer(text).writerows([map(no_formula, row) for row in [HEADERS, *rows]])
    # the mark at its beginning makes spreadsheets read it as UTF-8
    return text.getvalue().encode("utf-8-sig", errors="replace")


def no_formula(value):
    "A value of a table, marked as text where a spreadsheet would take it for a formula."
    return f"'{value}" if re.match(r"\s*[=+\-@＝＋－＠]|[\t\r\n]", str(value)) else value


# ---- what the page computes ----

class Answers:
    "The answers of the page to files as Gradio sends them, by the learner that `predictor` holds."

    def __init__(self, predictor):
        self.predictor = predictor
        self.k = min(5, len(predictor.vocab))

    @show_errors
    def predict(self, file):
        "For programs: the labels of a picture with their probabilities."
        if not file: return None
        return dict(self.predictor.predict(read(self.predictor, file), self.k))

    @show_errors
    def predict_batch(self, files):
        "For programs: the rows of the table of many pictures."
        return [row for row, _ in self.classify(files or [])]

    def show(self, file):
        """All that is shown of one picture.

        Labels, a sentence, the picture as the model sees it, the choice of classes, the heat map."""
        no_choice = gr.Radio(choices=[], value=None, visible=False)
        if not file: return None, "", None, no_choice, None
        try:
            start = time.perf_counter()
            img = read(self.predictor, file)
            top = self.predictor.predict(img, self.k)
            ms = 1000 * (time.perf_counter() - start)
        except UserError as e: return None, f"⚠️ {plain(e.text)}", None, no_choice, None
        labels = [label for label, _ in top]
        choice = gr.Radio(choices=labels, value=labels[0], visible=True)
        text = sentence(self.predictor, top, ms)
        return dict(top), text, enlarge(img), choice, self.heat_map(img, labels[0])

    @show_errors
    def why(self, file, label):
        "The heat map of a picture for the class that was chosen."
        if not file or label not in self.predictor.vocab: return None
        return self.heat_map(read(self.predictor, file), label)

    def heat_map(self, img, label):
        heat = self.predictor.heat_map(img, label)
        return None if heat is None else overlay(img, heat)

    def classify(self, files):
        """Yields for each file its row of the table, and the picture as the model sees it or None.

        Errors: UserError."""
        if len(files) > MAX_FILES:
            raise UserError(f"{len(files)} files are too many at once: choose at most {MAX_FILES}.")
        for file in files:
            try: img = read(self.predictor, file)
            except UserError as e:
                yield [name_of(file), e.text, None, None], None
                continue
            (label, p), *others = self.predictor.predict(img, 3)
            or_else = ", ".join(f"{other} {q:.1%}" for other, q in others)
            yield [name_of(file), label, round(p, 4), or_else], img

    def show_many(self, files):
        "The table, the readable pictures with their labels, and the table as a CSV file."
        try: found = list(self.classify(files or []))
        except UserError as e:
            gr.Warning(e.text)
            found = []
        rows = [row for row, _ in found]
        pictures = [(enlarge(img), f"{row[1]} {row[2]:.0%}") for row, img in found if img]
        file = to_cache(to_csv(rows), "predictions.csv") if rows else None
        return rows or None, pictures, gr.DownloadButton(value=file, interactive=bool(rows))


# ---- how it is laid out ----

# Gradio must not open what was uploaded, our code does: preprocess=False.
# All events with one picture share one place in the queue, as a prediction uses all cores; those with many
# share another one, so that nobody with one picture waits for a hundred.
PUBLIC = {"preprocess": False, "concurrency_id": "model", "concurrency_limit": 1}
MANY = {"concurrency_id": "many"}
# One event sets all that belongs together, and the last one wins.
PRIVATE = {**PUBLIC, "api_visibility": "private", "trigger_mode": "always_last",
           "show_progress": "minimal"}


def build(path):
    "The page for the learner file `path`, or without one how to make one. Errors: UserError."
    if path is None:
        with gr.Blocks(title="sifar", analytics_enabled=False) as page: gr.Markdown(NO_MODEL)
        return page
    from sifar import Predictor
    predictor = Predictor(path)
    path = path / "learner.pkl" if path.is_dir() else path
    answers, vocab = Answers(predictor), predictor.vocab
    with gr.Blocks(title="sifar", analytics_enabled=False, delete_cache=(KEPT, 2 * KEPT)) as page:
        gr.Markdown(f"# What is in the picture?\n"
                    f"A small network that knows {len(vocab)} classes, "
                    f"such as {plain(', '.join(vocab[:5]))}.")
        with gr.Tab("One"): image, labels = one_picture(answers)
        with gr.Tab("Many"): files, table = many_pictures(answers)
        with gr.Tab("About"): gr.Markdown(about(path, predictor), elem_id="about")
        api = gr.Button(visible=False)          # Gradio offers programs only what an event calls
        api.click(answers.predict, image, labels, api_name="predict", **PUBLIC)
        api.click(answers.predict_batch, files, table, api_name="predict_batch", **PUBLIC | MANY)
    # without status_update_rate each answer tells all who wait
    return page.queue(max_size=128, status_update_rate=1)


def one_picture(answers):
    "The tab for one picture; returns its picture and its labels."
    predictor = answers.predictor
    with gr.Row():
        image = gr.Image(label="Picture", sources=["upload", "clipboard", "webcam"], type="filepath",
                         height=320)
        with gr.Column():
            labels = gr.Label(label="It looks like", num_top_classes=answers.k)
            note = gr.Markdown(elem_id="note")
    pictures = sorted((HERE / "examples").glob("*.png"))
    examples = [str(path) for path in pictures if path.stem in predictor.vocab]
    if examples: gr.Examples(examples, image, label="Or try one of these")
    with gr.Row():
        shown = {"interactive": False, "height": 340, "buttons": []}
        seen = gr.Image(label=f"It sees {predictor.sz} x {predictor.sz} pixels", elem_id="seen",
                        **shown)
        heat = gr.Image(label="Why: where it sees it", elem_id="why", **shown)
    choice = gr.Radio(choices=[], label="Why not another class? Show where it sees ... (Grad-CAM)",
                      elem_id="choice", visible=False)
    image.change(answers.show, image, [labels, note, seen, choice, heat], **PRIVATE)
    choice.input(answers.why, [image, choice], heat, **PRIVATE)
    return image, labels


def many_pictures(answers):
    "The tab for many pictures; returns its files and its table."
    files = gr.File(label=f"Up to {MAX_FILES} pictures", file_count="multiple", height=160,
                    elem_id="files")
    table = gr.Dataframe(headers=HEADERS, label="Labels and their probabilities", interactive=False,
                         wrap=True, column_widths=["27%", "28%", "17%", "28%"])
    download = gr.DownloadButton("Download as CSV", interactive=False, variant="primary")
    shown = gr.Gallery(label="Pictures", columns=6, fit_columns=False, object_fit="contain",
                       height="auto", elem_id="shown")
    files.change(answers.show_many, files, [table, shown, download], **PRIVATE | MANY)
    return files, table


# ---- the server ----

def to_cache(content, name):
    """The path of a file with these bytes in Gradio's cache.

    One that is there stays as it is: somebody may be loading it."""
    path = Path(get_upload_folder()) / hashlib.sha256(content).hexdigest() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    try: os.utime(path)                 # and is kept for its time again
    except FileNotFoundError: write_file(path, content)
    return str(path)


def picture_to_cache(img, cache_dir, name="image", format="webp"):
    "In the place of Gradio's function, which writes the same picture anew."
    return to_cache(processing_utils.encode_pil_to_bytes(img, format), f"{name}.{format}")


@contextmanager
def upload_folder():
    "A folder for uploads that goes when the page ends; see also sweep."
    above = os.environ.get("GRADIO_TEMP_DIR")
    if above: Path(above).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="sifar-", dir=above, ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        threading.Thread(target=sweep, daemon=True).start()
        yield


def sweep():
    "Delete uploads that broke off, for ever; Gradio deletes those that came whole."
    while True:
        time.sleep(KEPT)
        for path in Path(get_upload_folder()).glob("tmp*"):
            with suppress(OSError):             # it came whole by now, or somebody has it open
                if path.is_file() and time.time() - path.stat().st_mtime > KEPT: path.unlink()


def prepare_gradio():
    "Take away what of Gradio a page for everybody should not have."
    processing_utils.save_pil_to_cache = picture_to_cache
    # Gradio asks itself whether it is up, which no proxy may answer
    direct = os.environ.get("no_proxy", os.environ.get("NO_PROXY")), "localhost", "127.0.0.1"
    os.environ["no_proxy"] = ",".join(filter(None, direct))
    logging.getLogger("uvicorn.error").addFilter(not_hung_up)


def not_hung_up(record):
    "Whether a record of the log is no traceback of somebody who hung up."
    return not (record.exc_info and isinstance(record.exc_info[1], ClientDisconnect))


def main(args=None):
    parser = argparse.ArgumentParser(description="Show an exported learner as a page in the browser.")
    parser.add_argument("--model", default=os.environ.get("SIFAR_MODEL"),
                        help="learner.pkl or its folder (or set SIFAR_MODEL); "
                             "else one beside app.py, else the newest export, else that of results/")
    with one_line_errors(), upload_folder():
        quiet_imports()
        prepare_gradio()
        page = build(find_model(parser.parse_args(args).model))
        # fonts of the system: others would be loaded from outside
        fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
        theme = gr.themes.Soft(primary_hue="teal", **fonts)
        page.launch(theme=theme, css=CSS, footer_links=["api", "settings"],
                    max_file_size=f"{MAX_MB}mb", show_error=False, **guarded(page),
                    state_session_capacity=256)     # sessions of 40 kB each; by default 10,000


if __name__ == "__main__": main()
