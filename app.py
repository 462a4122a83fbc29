#!/usr/bin/env python
"""A page that shows an exported learner: python app.py --model runs/cifar100/RUN/learner.pkl"""
import atexit
import hashlib
import logging
import os
import re
import socket
import sys
import threading
import time
from contextlib import suppress
from functools import cache, wraps
from pathlib import Path
from tempfile import TemporaryDirectory

try:
    import gradio as gr
    import numpy as np
    from gradio import processing_utils
    from gradio.utils import get_upload_folder
    from PIL import Image, ImageDraw
    from starlette.requests import ClientDisconnect
except ImportError as e:
    sys.exit(f"sifar: the page needs a library that is missing ({e}): pip install 'sifar[page]'")

from sifar.cli import Parser, one_line_errors
from sifar.data.image import crop_box, fit_views, read_rgb
from sifar.errors import UserError
from sifar.files import csv_text, read_about, write_file
from sifar.log import command, relative
from sifar.share.guard import MAX_FILES, guarded, open_picture
from sifar.training.metrics import FEW

HERE = Path(__file__).parent
MAX_MB = 20                                     # of an uploaded file
KEPT = 300                                      # seconds that an upload is kept, at most three times that
MIN_SIDE = 4                                    # of a picture, looked at before it is decoded
SHOWN = 640                                     # pixels of the longer side of a photo as it is shown
LEAST = 0.005                                   # a smaller probability would be shown as 0%
NO_MODEL = """# No model yet

Train one and export it, then start this page again:

    {train}
    {export}
    {app}

Or export the CIFAR-100 classifier that comes with sifar: `{shipped}`.
"""
# matplotlib's colours of that name, of which a light Space has none
INFERNO = [(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)]
HEADERS = ["file", "label", "probability", "or else"]
CSS = """
#about td:first-child, #about th:first-child {min-width: 8rem}
#about th, #about td {border-color: var(--border-color-primary)}
.gradio-container {max-width: 1100px !important; width: 100% !important; margin: auto}
.gradio-container main {width: 100%}
#headline h2 {margin: 0; font-size: 1.75rem; line-height: 1.2}
#note p {color: var(--body-text-color-subdued) !important; font-size: .8125rem}
#labels *, #table * {font-family: var(--font)}
#part, #seen, #why {padding-top: 40px}
#part img, #seen img, #why img {width: 100%; height: 100%; object-fit: contain}
#picture img {position: relative; min-width: 240px}
#picture img::after {content: "Your browser cannot show it."; position: absolute; inset: 0;
    padding-top: 120px; text-align: center; background: var(--block-background-fill)}
#examples > .gallery {display: grid; grid-template-columns: repeat(5, 1fr)}
#examples > .gallery * {width: 100%; max-width: none; height: auto; max-height: none}
#examples img {aspect-ratio: 1; object-fit: cover !important}
.icon-button-wrapper:not(:has(button, a)) {display: none}
.grid-wrap {min-height: 0 !important; max-height: none !important}
.caption-label {white-space: normal !important; font-size: .75rem}
footer .divider {display: none}
.label-wrap {text-align: left}
@media (max-width: 640px) {
    #top, #answer {display: contents}
    #picture {flex: none}
    #examples {order: 1}
    .grid-container {grid-template-columns: repeat(2, 1fr) !important}
    #part, #seen {height: 220px !important}
    #part label, #seen label {font-size: .75rem}
    #table * {font-size: .6875rem}
    #table .cell-wrap {padding: 4px !important}
    #table th * {font-size: .5625rem}
    #table .cell-menu-button {display: none}
}
"""
# Soft's own text of labels, buttons and small print is hard to read on what is behind it
CONTRAST = {
    "background_fill_primary": "*neutral_50",           # Soft's own, which `set` forgets
    "block_label_text_color": "*primary_700",
    "block_title_text_color": "*primary_700",
    "block_label_background_fill_dark": "*primary_700",
    "body_text_color_subdued": "*neutral_600",
    "button_primary_background_fill": "*primary_700",
    "button_primary_background_fill_dark": "*primary_700",
    "button_primary_background_fill_hover": "*primary_600",
    "color_accent": "*primary_600",
    "checkbox_label_background_fill_selected": "*primary_700",
    "checkbox_label_background_fill_selected_dark": "*primary_700",
    "link_text_color": "*secondary_700",
}


def find_model(named):
    """The learner file to show: as named; else beside this file, the newest export, or one of results/.

    None where there is none."""
    if named: return Path(named)
    newest_first = sorted(Path().glob("runs/*/*/learner.pkl"), key=lambda path: -path.stat().st_mtime)
    exports = [HERE / "learner.pkl", HERE / "model.onnx", *newest_first, *HERE.glob("results/*/learner.pkl")]
    return next((path for path in exports if path.is_file()), None)


def show_errors(f):
    "What a user can cause becomes a message on the page, without a traceback in the log."
    @wraps(f)
    def inner(*args):
        try: return f(*args)
        except UserError as e: raise gr.Error(e.text, print_exception=False) from e
    return inner


def read(predictor, file):
    """The picture in an uploaded file, a dictionary as Gradio sends it.

    Twice: in its own form, made smaller where it is large, and as the model sees it. Errors: UserError."""
    path, uploads = path_of(file), Path(get_upload_folder()).resolve()
    # a client sends any path that it likes: only what it uploaded is read
    if not path.is_relative_to(uploads) or not path.is_file():
        raise UserError("That picture is not here, or not any more: upload it again.")
    size = path.stat().st_size
    if not size: raise UserError("The file is empty.")
    if size > MAX_MB * 2**20: raise UserError(f"The file is too large: at most {MAX_MB} MB are read.")
    photo = read_rgb(open_picture(path.read_bytes(), predictor.sz), MIN_SIDE)
    seen, = fit_views(photo, predictor.sz, fit=predictor.fit)
    photo.thumbnail((SHOWN, SHOWN))
    return photo, seen


def path_of(file):
    "The path that a client sent; for what is no file the working directory, which is no upload."
    path = file.get("path") if isinstance(file, dict) else None
    return Path(path if isinstance(path, str) else "").resolve()


def name_of(file): return file.get("orig_name") or Path(file["path"]).name


def enlarge(img): return img.resize((256, 256), Image.Resampling.NEAREST)


def framed(photo, sz, fit="halfway"):
    "The photo with a frame around what the model sees of it, and the rest dimmed."
    if photo.size == (sz, sz): return enlarge(photo)            # all of it is seen
    box = tuple(round(side) for side in crop_box(photo.size, fit))
    grey = Image.new("RGB", photo.size, "grey")
    shown = Image.blend(photo, grey, 0.7)
    shown.paste(photo.crop(box), box)
    width = max(1, max(photo.size) // 160)
    ImageDraw.Draw(shown).rectangle(box, outline="#14b8a6", width=width)
    return shown


def overlay(img, heat):
    "A heat map (sz,sz) from 0 to 1 over the picture that it explains."
    smooth = Image.fromarray((255 * heat).astype(np.uint8)).resize((256, 256), Image.Resampling.BICUBIC)
    at = np.linspace(0, 255, len(INFERNO))
    colours = [np.interp(smooth, at, channel) for channel in np.transpose(INFERNO)]         # of (h,w)
    return Image.blend(enlarge(img), Image.fromarray(np.stack(colours, -1).astype(np.uint8)), 0.55)


def plain(text):
    "Text that Markdown shows as it is."
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", str(text))


def words(label): return label.replace("_", " ")


def percent(p):
    "A probability as people read it, in the form that Gradio's labels have."
    return f"{p:.0%}" if p >= LEAST else "under 1%"


def headline(answer):
    "What the page says first: what it is, what it may be, or that it is nothing known."
    label, most = answer.top[0]
    if answer.verdict == "sure": return words(label)
    # a second one that is nearly as likely
    likely = [words(other) for other, p in answer.top[:2] if p >= most / 4]
    return f"Perhaps: {', '.join(likely)}" if answer.verdict == "unsure" else "None that I know"


def small_print(predictor, answer, ms):
    "The line below the labels: what kind of thing it is, what is hardly likely, how long it took."
    label, _ = answer.top[0]
    unlikely = [words(other) for other, p in answer.top if p < LEAST]
    parts = []
    if answer.verdict == "unknown": parts.append("these are the nearest")
    elif answer.verdict == "unsure": parts.append("not sure")
    elif predictor.superclasses: parts.append(words(predictor.superclasses[predictor.vocab.index(label)]))
    if unlikely: parts.append(f"under 1%: {', '.join(unlikely)}")
    return plain(" · ".join([*parts, f"{ms:.0f} ms"]))


def about(path, predictor):
    "What model.json says of the model, and what the model knows, as Markdown. Errors: UserError."
    try: facts = model_facts(read_about(path))
    except (ValueError, TypeError, AttributeError, KeyError) as e:
        file = path.with_name("model.json")
        raise UserError(f"{file} is damaged ({e}): export the run again, or delete it.") from e
    table = [f"| {k} | {plain(v)} |\n" for k, v in facts.items() if v]
    if table: table.insert(1, "|---|---|\n")           # the rule below the first row, which is the head
    return (f"{''.join(table)}\nIt sees every picture as {predictor.sz} x {predictor.sz} pixels, and "
            f"**it knows only these {len(predictor.vocab)} classes**: whatever else is in a picture, "
            "it may say that it knows nothing like it, or call it one of them."
            f"\n\n{plain(', '.join(map(words, predictor.vocab)))}")


def model_facts(saved):
    "The rows of the table, from what is saved in a model.json; what it does not have is empty."
    test, photos = saved.get("test") or {}, saved.get("photos")
    many = len(saved.get("classes") or []) > FEW
    images = (saved.get("images") or {}).get("train")
    return {
        "architecture": saved.get("arch"),
        "parameters": saved.get("parameters") and f"{saved['parameters']:,}",
        "trained on": saved.get("dataset"),
        "from the weights of": saved.get("init"),
        "epochs": saved.get("epochs"),
        "training images": images and f"{images:,}",
        "test top-1": accuracy(test, "top1"),
        "test top-5": accuracy(test, "top5") if many else None,
        "ordinary photographs": photos and f"{photos['top1']:.0%} of {photos['images']} are right, "
                                           f"{photos['top5']:.0%} among the first five",
        "commands": ", then ".join(saved.get("commands") or []),
        "date": (saved.get("date") or "")[:10],
    }


def accuracy(test, k):
    "An accuracy on test with its standard error, which older runs do not have; None without a test set."
    error = test.get(f"{k}_error")
    return test.get(k) and f"{test[k]:.2%}" + (f" ± {error:.2%}" if error else "")


def to_csv(rows):
    "The rows of the table as the bytes of a CSV file."
    # the mark at its beginning makes spreadsheets read it as UTF-8
    return csv_text([HEADERS, *rows]).encode("utf-8-sig", errors="replace")


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
        _, seen = read(self.predictor, file)
        return dict(self.predictor.answer(seen, self.k).top)

    @show_errors
    def predict_batch(self, files):
        "For programs: the rows of the table of many pictures."
        return [row_of(name, outcome) for name, outcome in self.classify(files or [])]

    def show(self, file):
        """All that is shown of one picture.

        Headline, labels, small print; the row of pictures: the part that is seen, as the model sees it, the
        heat map; the choice of classes."""
        nothing = gr.Row(visible=False), None, None, None, gr.Radio(choices=[], value=None, visible=False)
        hidden = gr.Markdown("", visible=False)
        no_labels = gr.Label(None, visible=False)
        if not file: return hidden, no_labels, hidden, *nothing
        try:
            start = time.perf_counter()
            photo, seen = read(self.predictor, file)
            answer = self.predictor.answer(seen, self.k)
            ms = 1000 * (time.perf_counter() - start)
        except UserError as e:
            return gr.Markdown(f"⚠️ {plain(e.text)}", visible=True), no_labels, hidden, *nothing
        heat = self.heat_map(seen, answer.top[0][0])
        mapped, note = heat is not None, small_print(self.predictor, answer, ms)
        if not mapped: note += " · where it sees it cannot be told for this kind of model"
        choices = [(words(label), label) for label, _ in answer.top]
        likely = {words(label): p for label, p in answer.top if p >= LEAST}
        return (gr.Markdown(f"## {plain(headline(answer))}", visible=True),
                gr.Label(likely, visible=True),
                gr.Markdown(note, visible=True),
                gr.Row(visible=True),
                framed(photo, self.predictor.sz, self.predictor.fit), enlarge(seen),
                gr.Image(heat, visible=mapped),
                gr.Radio(choices=choices, value=answer.top[0][0], visible=mapped))

    @show_errors
    def why(self, file, label):
        "The heat map of a picture for the class that was chosen."
        if not file or label not in self.predictor.vocab: return None
        _, seen = read(self.predictor, file)
        return self.heat_map(seen, label)

    def heat_map(self, img, label):
        heat = self.predictor.heat_map(img, label)
        return None if heat is None else overlay(img, heat)

    def classify(self, files):
        """Yields for each file its name, and an Answer, the picture and what the model sees, or a UserError.

        Errors: UserError."""
        if len(files) > MAX_FILES:
            raise UserError(f"{len(files)} files are too many at once: choose at most {MAX_FILES}.")
        for file in files:
            try:
                photo, seen = read(self.predictor, file)
                yield name_of(file), (self.predictor.answer(seen, 3), photo, seen)
            except UserError as e: yield name_of(file), e

    def show_many(self, files):
        "The results, shown or not: the table, the photos, what the model sees, and a CSV file."
        try: found = list(self.classify(files or []))
        except UserError as e:
            gr.Warning(e.text)
            found = []
        photos, seen = [], []
        for _, outcome in found:
            if isinstance(outcome, UserError): continue
            answer, photo, small = outcome
            caption = headline(answer)
            if answer.verdict == "sure": caption += f" {percent(answer.top[0][1])}"
            photos.append((photo, caption))
            seen.append((enlarge(small), caption))
        rows = [shown_row(name, outcome) for name, outcome in found]
        file = to_cache(to_csv([row_of(*one) for one in found]), "predictions.csv") if found else None
        return (gr.Column(visible=bool(found)), rows or None, photos, seen,
                gr.DownloadButton(value=file, interactive=bool(found)))


def row_of(name, outcome):
    "A row of the table for programs: label, probability, and the next two."
    if isinstance(outcome, UserError): return [name, outcome.text, None, None]
    (label, p), *others = outcome[0].top
    return [name, label, round(p, 4), ", ".join(f"{other} {q:.1%}" for other, q in others)]


def shown_row(name, outcome):
    "The same row for people."
    if isinstance(outcome, UserError): return [name, outcome.text, "", ""]
    answer = outcome[0]
    first, *others = [f"{words(label)} {percent(p)}" for label, p in answer.top]
    if answer.verdict != "sure": return [name, headline(answer), "", ", ".join([first, *others])]
    return [name, headline(answer), percent(answer.top[0][1]), ", ".join(others)]


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
        with gr.Blocks(title="sifar", analytics_enabled=False) as page: gr.Markdown(no_model())
        return page
    from sifar import Predictor
    predictor = Predictor(path)
    path = path / "learner.pkl" if path.is_dir() else path
    answers, vocab = Answers(predictor), predictor.vocab
    with gr.Blocks(title="sifar", analytics_enabled=False, delete_cache=(KEPT, 2 * KEPT)) as page:
        gr.Markdown(f"# What is in the picture?\n"
                    f"A small network that knows {len(vocab)} classes, "
                    f"such as {plain(', '.join(map(words, vocab[:5])))}.")
        with gr.Tab("One"): image, labels = one_picture(answers)
        with gr.Tab("Many"): files, table = many_pictures(answers)
        with gr.Tab("About"): gr.Markdown(about(path, predictor), elem_id="about")
        api = gr.Button(visible=False)          # Gradio offers programs only what an event calls
        api.click(answers.predict, image, labels, api_name="predict", **PUBLIC)
        api.click(answers.predict_batch, files, table, api_name="predict_batch", **PUBLIC | MANY)
    # without status_update_rate each answer tells all who wait
    return page.queue(max_size=128, status_update_rate=1)


def no_model():
    "What the page says without a model."
    shipped = relative(HERE / "results" / "cifar100-resnet18")
    return NO_MODEL.format(
        train=command("train.py", "--preset", "smoke"), export=command("export.py"), app=command("app.py"),
        shipped=command("export.py", shipped))


def one_picture(answers):
    "The tab for one picture; returns its picture and its labels."
    predictor = answers.predictor
    shown = {"interactive": False, "height": 300, "min_width": 130, "buttons": []}
    with gr.Row(elem_id="top"):
        image = gr.Image(label="Picture", sources=["upload", "clipboard", "webcam"], type="filepath",
                         height=320, elem_id="picture")
        with gr.Column(elem_id="answer"):
            first = gr.Markdown(visible=False, elem_id="headline")
            labels = gr.Label(show_label=False, show_heading=False, num_top_classes=answers.k,
                              visible=False, elem_id="labels")
            note = gr.Markdown(visible=False, elem_id="note")
            if examples := find_examples(predictor.vocab):
                gr.Examples(examples, image, label="Or try one of these", elem_id="examples")
    with gr.Row(visible=False) as pictures:
        part = gr.Image(label="It looks here", elem_id="part", **shown)
        seen = gr.Image(label=f"{predictor.sz} x {predictor.sz} pixels", elem_id="seen", **shown)
        heat = gr.Image(label="Why: where it sees it", elem_id="why", **shown)
    choice = gr.Radio(choices=[], label="Why not another class? Show where it sees ... (Grad-CAM)",
                      elem_id="choice", visible=False)
    answer = [first, labels, note, pictures, part, seen, heat, choice]
    image.change(answers.show, image, answer, **PRIVATE)
    choice.input(answers.why, [image, choice], heat, **PRIVATE)
    return image, labels


def find_examples(vocab):
    "The pictures to click on of what the model knows."
    pictures = sorted(path for path in (HERE / "examples").iterdir() if path.suffix in (".png", ".jpg"))
    return [str(path) for path in pictures if path.stem in vocab]


def many_pictures(answers):
    "The tab for many pictures; returns its files and its table."
    sz = answers.predictor.sz
    files = gr.File(label=f"Up to {MAX_FILES} pictures", file_count="multiple", height=160,
                    elem_id="files")
    shown = {"columns": 6, "fit_columns": False, "height": "auto", "show_label": False}
    with gr.Column(visible=False) as results:
        photos = gr.Gallery(object_fit="cover", elem_id="shown", **shown)
        with gr.Accordion(f"As the model sees them: {sz} x {sz} pixels", open=False):
            seen = gr.Gallery(object_fit="contain", **shown)
        download = gr.DownloadButton("Download as CSV", interactive=False, variant="primary")
        # as high as all of its rows: the page scrolls, not a box in it
        table = gr.Dataframe(headers=HEADERS, label="Labels and their probabilities", interactive=False,
                             wrap=True, max_height=400 * MAX_FILES, elem_id="table",
                             column_widths=["24%", "25%", "22%", "29%"])
    files.change(answers.show_many, files, [results, table, photos, seen, download], **PRIVATE | MANY)
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


@cache
def make_upload_folder():
    """Make a folder for uploads that goes when the process ends; see also sweep.

    In a notebook a page outlives `main`, and all pages of a process share the folder."""
    above = os.environ.get("GRADIO_TEMP_DIR")
    if above: Path(above).mkdir(parents=True, exist_ok=True)
    folder = TemporaryDirectory(prefix="sifar-", dir=above, ignore_cleanup_errors=True)
    atexit.register(folder.cleanup)
    os.environ["GRADIO_TEMP_DIR"] = folder.name
    threading.Thread(target=sweep, daemon=True).start()


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


def check_port(port):
    "Raise a UserError where no page can listen at `port`: Gradio's own names no flag."
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try: s.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as e:
            raise UserError(f"--port {port} cannot be had ({e}): choose another one, or leave it out.") from e


def main(args=None):
    parser = Parser("app.py", "Show an exported learner as a page in the browser.")
    parser.add_argument("--model", default=os.environ.get("SIFAR_MODEL"),
                        help="learner.pkl, its folder or model.onnx (or set SIFAR_MODEL); "
                             "else one beside app.py, else the newest export, else that of results/")
    parser.add_argument("--port", type=int, help="else the first that is free from 7860 on")
    parser.add_argument("--share", action="store_true",
                        help="open the page to everybody for a while, at an address of gradio.live")
    with one_line_errors("page"):
        cfg = parser.parse_args(args)
        if cfg.port is not None: check_port(cfg.port)
        make_upload_folder()
        prepare_gradio()
        page = build(find_model(cfg.model))
        # fonts of the system: others would be loaded from outside
        fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
        theme = gr.themes.Soft(primary_hue="teal", secondary_hue="teal", **fonts).set(**CONTRAST)
        page.launch(server_port=cfg.port, theme=theme, css=CSS, footer_links=["api"],
                    max_file_size=f"{MAX_MB}mb", show_error=False, **guarded(page, cfg.share),
                    state_session_capacity=256)     # sessions of 40 kB each; by default 10,000


if __name__ == "__main__": main()
