#!/usr/bin/env python
"""A page that shows an exported learner to the world: python app.py --model runs/cifar100/RUN/learner.pkl"""
import argparse
import io
import json
import os
import time
from functools import wraps
from pathlib import Path

import gradio as gr
import numpy as np
from gradio.processing_utils import save_bytes_to_cache
from PIL import Image

from sifar.errors import UserError, one_line_errors
from sifar.terminal import quiet_imports

HERE = Path(__file__).parent
MAX_FILES, MAX_MB, MIN_SIDE = 100, 20, 4        # pictures at once, size of an upload, pixels
UNSURE = 0.5                                    # below this probability the page says so
NO_MODEL = """# No model yet

Train one and export it, then start this page again:

    python train.py --preset smoke --dataset digits
    python export.py
    python app.py
"""
CSS = ".gradio-container {max-width: 1100px !important; width: 100% !important; margin: auto} .gradio-container main {width: 100%}"


def find_model(named):
    "The learner file to show: as named, else beside this file, else the newest export; None where there is none."
    if named: return Path(named)
    exports = [HERE / "learner.pkl", *sorted(HERE.glob("runs/*/*/learner.pkl"), key=lambda o: -o.stat().st_mtime)]
    return next((o for o in exports if o.is_file()), None)


def show_errors(f):
    "What a user can mend becomes a message in the page, without a traceback in the log."
    @wraps(f)
    def inner(*args):
        try: return f(*args)
        except UserError as e: raise gr.Error(e.text, title="That did not work", print_exception=False) from e
    return inner


def read(predictor, file):
    "The picture in an uploaded file, as the model sees it. Errors: UserError."
    content = Path(file).read_bytes()
    if not content: raise UserError("The file is empty.")
    if len(content) > MAX_MB * 2**20: raise UserError(f"The file is too large: at most {MAX_MB} MB are read.")
    seen, (width, height) = predictor.read(content), Image.open(io.BytesIO(content)).size
    if min(width, height) < MIN_SIDE: raise UserError(f"The picture has only {width} x {height} pixels: there is nothing to see in it.")
    return seen


def enlarge(img): return img.resize((256, 256), Image.Resampling.NEAREST)


def overlay(img, heat):
    "A heat map (sz,sz) from 0 to 1 over the picture that it explains."
    from matplotlib import colormaps
    smooth = Image.fromarray((255 * heat).astype(np.uint8)).resize((256, 256), Image.Resampling.BICUBIC)
    colours = Image.fromarray((255 * colormaps["inferno"](np.asarray(smooth))[..., :3]).astype(np.uint8))
    return Image.blend(enlarge(img), colours, 0.55)


def sentence(predictor, top, ms):
    "The line below the labels: what it is, how sure, how long it took."
    label, p = top[0]
    kind = f" · superclass *{predictor.superclasses[predictor.vocab.index(label)]}*" if predictor.superclasses else ""
    if p >= UNSURE: return f"**{label}**{kind} · {ms:.0f} ms"
    return f"⚠️ **Not sure**: the likeliest is {label}, with {p:.0%}. Perhaps it is something that the model does not know.{kind} · {ms:.0f} ms"


def about(path, predictor):
    "What model.json says of the model, as Markdown."
    file = path.with_name("model.json")
    o = json.loads(file.read_text()) if file.is_file() else {}
    rows = {"architecture": o.get("arch"), "parameters": f"{o['parameters']:,}" if o else None,
            "trained on": f"{o['dataset']}, {o['images']['train']:,} images, {o['epochs']} epochs" if o else None,
            **({f"test {k}": f"{100 * o['test'][v]:.2f} %" for k, v in (("top-1", "top1"), ("top-5", "top5"))} if o.get("test") else {}),
            "command": " then ".join(f"`{c}`" for c in o.get("commands", [])), "date": o.get("date", "")[:10]}
    table = "\n".join(f"| {k} | {v} |" for k, v in rows.items() if v)
    return (f"| model | {path.parent.name} |\n|---|---|\n{table}\n\n" if table else "") + (
        f"It sees every picture as {predictor.sz} x {predictor.sz} pixels, and **it knows only these {len(predictor.vocab)} classes**: whatever else is in a picture, "
        f"it will call it one of them.\n\n{', '.join(predictor.vocab)}")


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

    @show_errors
    def look(file):
        "What goes with the labels: a sentence, the picture as the model sees it, and why it is the likeliest class."
        if not file: return None, None, gr.Radio(choices=[], value=None), None
        start = time.perf_counter()
        img = read(predictor, file)
        top = predictor.predict(img, k)
        ms = 1000 * (time.perf_counter() - start)
        return sentence(predictor, top, ms), enlarge(img), gr.Radio(choices=[label for label, _ in top], value=top[0][0]), why_picture(img, top[0][0])

    def why_picture(img, label):
        heat = predictor.heat_map(img, label)
        return None if heat is None else overlay(img, heat)

    @show_errors
    def why(file, label): return why_picture(read(predictor, file), label) if file and label else None

    @show_errors
    def predict_batch(files):
        if not files: return None
        if len(files) > MAX_FILES: raise UserError(f"{len(files)} files are too many at once: choose at most {MAX_FILES}.")
        rows = []
        for file in files:
            name = Path(file).name
            try: top = predictor.predict(read(predictor, file), 3)
            except UserError as e: rows.append([name, e.text, None, *[None] * 4])
            else: rows.append([name, *(v for label, p in top for v in (label, round(p, 4))), *[None] * (6 - 2 * len(top))])
        return rows

    @show_errors
    def gallery(files, table):
        "The readable pictures with their labels, and the table as a CSV file."
        if not files: return None, gr.DownloadButton(interactive=False)
        shown = [(enlarge(read(predictor, f)), f"{label} {p:.0%}") for f, (_, label, p, *_) in zip(files, table.itertuples(index=False)) if p == p and p is not None]
        content = table.to_csv(index=False).encode()
        return shown, gr.DownloadButton(value=save_bytes_to_cache(content, "predictions.csv", download.GRADIO_CACHE), interactive=True)

    examples = [str(o) for o in sorted((HERE / "examples").glob("*.png")) if o.stem in predictor.vocab]
    with gr.Blocks(title="sifar", analytics_enabled=False, delete_cache=(300, 600)) as page:
        gr.Markdown(f"# What is in the picture?\nA small network that knows {len(predictor.vocab)} classes, such as {', '.join(predictor.vocab[:5])}.")
        with gr.Tab("One picture"):
            with gr.Row():
                with gr.Column():
                    image = gr.Image(label="Picture", sources=["upload", "clipboard", "webcam"], type="filepath", height=320)
                    image.preprocess = lambda file: file.path if file else None         # our code, not Gradio's, opens what comes
                    if examples: gr.Examples(examples, image, label="Or try one of these")
                with gr.Column():
                    labels = gr.Label(label="It looks like", num_top_classes=k)
                    note = gr.Markdown()
            with gr.Row():
                seen = gr.Image(label=f"What it sees: {predictor.sz} x {predictor.sz} pixels", interactive=False, height=340, buttons=[], elem_id="seen")
                heat = gr.Image(label="Why: where it sees it (Grad-CAM)", interactive=False, height=340, buttons=[], elem_id="why")
            choice = gr.Radio(choices=[], label="Why not another class? Show where it sees ...", elem_id="choice")
        with gr.Tab("Many at once"):
            files = gr.File(label=f"Up to {MAX_FILES} pictures", file_count="multiple", height=160, elem_id="files")
            table = gr.Dataframe(headers=["file", *(f"{o} {i}" for i in (1, 2, 3) for o in ("label", "p"))], label="Labels and their probabilities", interactive=False,
                                 wrap=True, column_widths=["22%", "26%", "9%", "15%", "9%", "15%", "9%"])
            download = gr.DownloadButton("Download as CSV", interactive=False)
            shown = gr.Gallery(label="Pictures", columns=6, object_fit="contain", height="auto", elem_id="shown")
        with gr.Tab("About the model"): gr.Markdown(about(path, predictor))

        private, details = {"api_visibility": "private", "show_progress": "hidden"}, [note, seen, choice, heat]
        first = image.change(predict, image, labels, api_name="predict", show_progress="minimal")
        first.success(look, image, details, **private)
        first.failure(lambda: (None, None, None, gr.Radio(choices=[], value=None), None), None, [labels, *details], **private)
        choice.input(why, [image, choice], heat, **private)
        files.change(predict_batch, files, table, api_name="predict_batch").success(gallery, [files, table], [shown, download], **private)
    return page.queue(max_size=128, default_concurrency_limit=2)


def main(args=None):
    parser = argparse.ArgumentParser(description="Show an exported learner as a page in the browser.")
    parser.add_argument("--model", default=os.environ.get("SIFAR_MODEL"), help="learner.pkl or its folder (or set SIFAR_MODEL); else one beside app.py, else the newest export")
    with one_line_errors():
        quiet_imports()
        page = build(find_model(parser.parse_args(args).model))
        theme = gr.themes.Soft(primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
        page.launch(theme=theme, css=CSS, footer_links=["api"], max_file_size=f"{MAX_MB}mb", show_error=False)


if __name__ == "__main__": main()
