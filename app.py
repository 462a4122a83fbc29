#!/usr/bin/env python
"""A page that shows an exported learner to the world: python app.py --model runs/cifar100/RUN/learner.pkl"""
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

HERE = Path(__file__).parent
MAX_FILES, MAX_MB = 100, 20                     # pictures at once; size of an upload
KEPT = 300                                      # seconds that an upload is kept at least; after three times that it is gone
MIN_SIDE, MAX_PIXELS = 4, 50_000_000            # of a picture, looked at before it is decoded
UNSURE = 0.5                                    # below this probability the page says so
NO_MODEL = """# No model yet

Train one and export it, then start this page again:

    python train.py --preset smoke --dataset digits
    python export.py
    python app.py

Or export the CIFAR-100 classifier that comes with sifar: `python export.py results/cifar100-resnet18`.
"""
HEADERS = ["file", "label", "probability", "or else"]
CSS = "#about td:first-child, #about th:first-child {white-space: nowrap} .gradio-container {max-width: 1100px !important; width: 100% !important; margin: auto} .gradio-container main {width: 100%}"


def find_model(named):
    "The learner file to show: as named, else beside this file, else the newest export, else one of results/; None where there is none."
    if named: return Path(named)
    newest_first = sorted(Path().glob("runs/*/*/learner.pkl"), key=lambda o: -o.stat().st_mtime)
    exports = [HERE / "learner.pkl", *newest_first, *HERE.glob("results/*/learner.pkl")]
    return next((o for o in exports if o.is_file()), None)


def show_errors(f):
    "What a user can mend becomes a message, without a traceback in the log."
    @wraps(f)
    def inner(*args):
        try: return f(*args)
        except UserError as e: raise gr.Error(e.text, print_exception=False) from e
    return inner


def read(predictor, file):
    "The picture in an uploaded file, a dictionary as Gradio sends it, as the model sees it. Errors: UserError."
    path = Path(file["path"] if isinstance(file, dict) and isinstance(file.get("path"), str) else "").resolve()
    if not path.is_relative_to(Path(get_upload_folder()).resolve()) or not path.is_file(): raise UserError("That picture is not here, or not any more: upload it again.")
    if not path.stat().st_size: raise UserError("The file is empty.")
    if path.stat().st_size > MAX_MB * 2**20: raise UserError(f"The file is too large: at most {MAX_MB} MB are read.")
    return predictor.read(path.read_bytes(), MIN_SIDE, MAX_PIXELS)


def name_of(file): return file.get("orig_name") or Path(file["path"]).name


def enlarge(img): return img.resize((256, 256), Image.Resampling.NEAREST)


def overlay(img, heat):
    "A heat map (sz,sz) from 0 to 1 over the picture that it explains."
    from matplotlib import colormaps
    smooth = Image.fromarray((255 * heat).astype(np.uint8)).resize((256, 256), Image.Resampling.BICUBIC)
    colours = Image.fromarray((255 * colormaps["inferno"](np.asarray(smooth))[..., :3]).astype(np.uint8))
    return Image.blend(enlarge(img), colours, 0.55)


def plain(text):
    "Text that Markdown shows as it is."
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", str(text))


def sentence(predictor, top, ms):
    "The line below the labels: what it is, how sure, how long it took."
    label, p = top[0]
    kind = f" · superclass *{plain(predictor.superclasses[predictor.vocab.index(label)])}*" if predictor.superclasses else ""
    if p >= UNSURE: return f"**{plain(label)}**{kind} · {ms:.0f} ms"
    return f"⚠️ **Not sure**: the likeliest is {plain(label)}, with {p:.0%}. Perhaps it is something that the model does not know.{kind} · {ms:.0f} ms"


def about(path, predictor):
    "What model.json says of the model, as Markdown."
    file = path.with_name("model.json")
    o = json.loads(file.read_text()) if file.is_file() else {}
    try: return about_text(o, predictor)
    except (ValueError, TypeError, AttributeError, KeyError) as e: raise UserError(f"{file} is damaged ({e}): export the run again, or delete it.") from e


def about_text(o, predictor):
    rows = {"architecture": o.get("arch"), "parameters": o.get("parameters") and f"{o['parameters']:,}", "trained on": o.get("dataset"), "epochs": o.get("epochs"),
            "training images": (o.get("images") or {}).get("train"), **{f"test top-{k}": f"{100 * v:.2f} %" for k in (1, 5) if (v := (o.get("test") or {}).get(f"top{k}"))},
            "commands": ", then ".join(o.get("commands") or []), "date": (o.get("date") or "")[:10]}
    lines = [f"| {k} | {plain(v)} |" for k, v in rows.items() if v]
    return "\n".join([*lines[:1], *(["|---|---|"] if lines else []), *lines[1:], "", ""]) + (
        f"It sees every picture as {predictor.sz} x {predictor.sz} pixels, and **it knows only these {len(predictor.vocab)} classes**: whatever else is in a picture, "
        f"it will call it one of them.\n\n{plain(', '.join(predictor.vocab))}")


def to_csv(rows):
    "The rows of the table as the bytes of a CSV file; what a spreadsheet would take for a formula is marked as text."
    text = io.StringIO()
    csv.writer(text).writerows([[f"'{o}" if str(o).startswith(("=", "+", "-", "@")) else o for o in row] for row in [HEADERS, *rows]])
    return text.getvalue().encode("utf-8-sig", errors="replace")      # the mark makes spreadsheets read it as UTF-8


def build(path):
    "The page for the learner file `path`, or without one how to make one. Errors: UserError."
    if path is None:
        with gr.Blocks(title="sifar", analytics_enabled=False) as page: gr.Markdown(NO_MODEL)
        return page
    from sifar import Predictor
    predictor = Predictor(path)
    path = path / "learner.pkl" if path.is_dir() else path
    k = min(5, len(predictor.vocab))

    @show_errors
    def predict(file): return dict(predictor.predict(read(predictor, file), k)) if file else None

    def show(file):
        "All that is shown of one picture: labels, a sentence, the picture as the model sees it, the choice of classes, the heat map."
        nothing = None, "", None, gr.Radio(choices=[], value=None, visible=False), None
        if not file: return nothing
        try:
            start = time.perf_counter()
            img = read(predictor, file)
            top = predictor.predict(img, k)
            ms = 1000 * (time.perf_counter() - start)
        except UserError as e: return None, f"⚠️ {plain(e.text)}", *nothing[2:]
        return dict(top), sentence(predictor, top, ms), enlarge(img), gr.Radio(choices=[o for o, _ in top], value=top[0][0], visible=True), why_picture(img, top[0][0])

    def why_picture(img, label):
        heat = predictor.heat_map(img, label)
        return None if heat is None else overlay(img, heat)

    @show_errors
    def why(file, label): return why_picture(read(predictor, file), label) if file and label in predictor.vocab else None

    def classify(files):
        "For each file its row of the table, and the picture as the model sees it or None."
        if len(files) > MAX_FILES: raise UserError(f"{len(files)} files are too many at once: choose at most {MAX_FILES}.")
        for file in files:
            try: img = read(predictor, file)
            except UserError as e: yield [name_of(file), e.text, None, None], None
            else:
                (label, p), *others = predictor.predict(img, 3)
                yield [name_of(file), label, round(p, 4), ", ".join(f"{o} {q:.1%}" for o, q in others)], img

    @show_errors
    def predict_batch(files): return [row for row, _ in classify(files or [])]

    def show_many(files):
        "The table, the readable pictures with their labels, and the table as a CSV file."
        try: rows, images = zip(*classify(files)) if files else ((), ())
        except UserError as e:
            gr.Warning(e.text)
            rows, images = (), ()
        shown = [(enlarge(img), f"{row[1]} {row[2]:.0%}") for row, img in zip(rows, images) if img]
        file = to_cache(to_csv(rows), "predictions.csv") if rows else None
        return list(rows) or None, shown, gr.DownloadButton(value=file, interactive=bool(rows))

    examples = [str(o) for o in sorted((HERE / "examples").glob("*.png")) if o.stem in predictor.vocab]
    with gr.Blocks(title="sifar", analytics_enabled=False, delete_cache=(KEPT, 2 * KEPT)) as page:
        gr.Markdown(f"# What is in the picture?\nA small network that knows {len(predictor.vocab)} classes, such as {plain(', '.join(predictor.vocab[:5]))}.")
        with gr.Tab("One"):
            with gr.Row():
                image = gr.Image(label="Picture", sources=["upload", "clipboard", "webcam"], type="filepath", height=320)
                with gr.Column():
                    labels = gr.Label(label="It looks like", num_top_classes=k)
                    note = gr.Markdown(elem_id="note")
            if examples: gr.Examples(examples, image, label="Or try one of these")
            with gr.Row():
                seen = gr.Image(label=f"It sees {predictor.sz} x {predictor.sz} pixels", interactive=False, height=340, buttons=[], elem_id="seen")
                heat = gr.Image(label="Why: where it sees it", interactive=False, height=340, buttons=[], elem_id="why")
            choice = gr.Radio(choices=[], label="Why not another class? Show where it sees ... (Grad-CAM)", elem_id="choice", visible=False)
        with gr.Tab("Many"):
            files = gr.File(label=f"Up to {MAX_FILES} pictures", file_count="multiple", height=160, elem_id="files")
            table = gr.Dataframe(headers=HEADERS, label="Labels and their probabilities", interactive=False, wrap=True, column_widths=["27%", "28%", "17%", "28%"])
            download = gr.DownloadButton("Download as CSV", interactive=False, variant="primary")
            shown = gr.Gallery(label="Pictures", columns=6, fit_columns=False, object_fit="contain", height="auto", elem_id="shown")
        with gr.Tab("About"): gr.Markdown(about(path, predictor), elem_id="about")

        # Gradio must not open what was uploaded, our code does: preprocess=False. One event sets all that belongs together, and the last one wins.
        # All of them share one place in the queue, as a prediction uses all cores.
        common = {"preprocess": False, "concurrency_id": "model", "concurrency_limit": 1}
        private = {**common, "api_visibility": "private", "trigger_mode": "always_last", "show_progress": "minimal"}
        image.change(show, image, [labels, note, seen, choice, heat], **private)
        choice.input(why, [image, choice], heat, **private)
        files.change(show_many, files, [table, shown, download], **private)
        api = gr.Button(visible=False)
        api.click(predict, image, labels, api_name="predict", **common)
        api.click(predict_batch, files, table, api_name="predict_batch", **common)
    return page.queue(max_size=128, status_update_rate=1)           # by default each answer tells all who wait


def to_cache(content, name):
    "The path of a file with these bytes in Gradio's cache. One that is there stays as it is: somebody may be loading it."
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
    "A folder for uploads that goes when the page ends. Until then Gradio deletes those that came whole, and this those that broke off."
    def sweep():
        while True:
            time.sleep(KEPT)
            for o in Path(get_upload_folder()).glob("tmp*"):
                with suppress(OSError):             # it came whole by now, or somebody has it open
                    if o.is_file() and time.time() - o.stat().st_mtime > KEPT: o.unlink()

    above = os.environ.get("GRADIO_TEMP_DIR")
    if above: Path(above).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="sifar-", dir=above, ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        threading.Thread(target=sweep, daemon=True).start()
        yield


async def refuse_url(url, cache_dir):
    "In the place of Gradio's download of an address that a client sends, which is read whole, however long it is."
    raise gr.Error("Send the picture itself, not its address.", print_exception=False)


def main(args=None):
    parser = argparse.ArgumentParser(description="Show an exported learner as a page in the browser.")
    parser.add_argument("--model", default=os.environ.get("SIFAR_MODEL"), help="learner.pkl or its folder (or set SIFAR_MODEL); else one beside app.py, else the newest export, else that of results/")
    with one_line_errors(), upload_folder():
        quiet_imports()
        processing_utils.async_ssrf_protected_download, processing_utils.save_pil_to_cache = refuse_url, picture_to_cache
        os.environ["no_proxy"] = ",".join(filter(None, (os.environ.get("no_proxy", os.environ.get("NO_PROXY")), "localhost", "127.0.0.1")))     # Gradio asks itself whether it is up
        page = build(find_model(parser.parse_args(args).model))
        theme = gr.themes.Soft(primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
        logging.getLogger("uvicorn.error").addFilter(lambda o: not (o.exc_info and isinstance(o.exc_info[1], ClientDisconnect)))      # no traceback for who hangs up
        page.launch(theme=theme, css=CSS, footer_links=["api", "settings"], max_file_size=f"{MAX_MB}mb", show_error=False,
                    state_session_capacity=256)        # of sessions that Gradio remembers, 40 kB each; by default 10,000


if __name__ == "__main__": main()
