import csv
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

import app
from sifar import Predictor, TrainConfig, UserError, get_dls, get_learner
from sifar.share.export import some_images, write_learner
from sifar.share.predictor import Answer
from sifar.share.space import model_card

ROOT = Path(__file__).parents[1]
CHROMIUM = next((o for o in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if o), None)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


def test_class_names_of_every_script_are_shown_as_they_are():
    for o in ("बिल्ली", "cafe\u0301", "cat–dog", "🐱"):
        assert app.plain(o) == o
    assert app.plain("_cat_ <b> [x](y) a*b") == r"\_cat\_ \<b\> \[x\]\(y\) a\*b"


class Page:
    "app.py running as its users start it; `log` is what it has printed."

    def __init__(self, folder, *args, cwd=ROOT, python=None):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.folder, self.out = folder, open(folder / "log", "w+")
        env = {
            **os.environ,
            "http_proxy": "http://127.0.0.1:9",
            "GRADIO_TEMP_DIR": str(folder / "uploads"),
            "TMPDIR": str(folder),
        }
        env.pop("SIFAR_MODEL", None)
        self.process = subprocess.Popen(
            [python or sys.executable, "app.py", "--port", str(port), *map(str, args)],
            cwd=cwd,
            env=env,
            stdout=self.out,
            stderr=subprocess.STDOUT,
        )
        for _ in range(600):
            if "Running on local URL" in self.log():
                return
            assert self.process.poll() is None, self.log()
            time.sleep(0.2)
        raise AssertionError(self.log())

    def log(self):
        return (self.folder / "log").read_text()

    def pid(self):
        "That of the process which listens: `process` waits for it, where it is forked from the server."
        port = f":{int(self.url.rpartition(':')[2]):04X}"
        sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
        (inode,) = {o[9] for o in sockets if o[1].endswith(port) and o[3] == "0A"}
        for fd in Path("/proc").glob("[0-9]*/fd/*"):
            with suppress(OSError):
                if os.readlink(fd) == f"socket:[{inode}]":
                    return int(fd.parts[2])

    def memory(self):
        status = Path(f"/proc/{self.pid()}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) // 1024

    def close(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)
        self.out.close()


def connect(url):
    "A client of a page, which waits as long as a busy machine needs."
    return Client(url, verbose=False, httpx_kwargs={"timeout": 120})


@pytest.fixture(scope="module")
def page(exported, tmp_path_factory):
    o = Page(tmp_path_factory.mktemp("app"), "--model", exported[0] / "learner.pkl")
    yield o
    o.close()


@pytest.fixture(scope="module")
def client(page):
    return connect(page.url)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "8 test pictures of digits as files."
    folder, cfg = tmp_path_factory.mktemp("pictures"), TrainConfig(dataset="digits", arch="resnet8")
    for i, o in enumerate(some_images(get_learner(get_dls(cfg), cfg), 8)):
        Image.fromarray(o).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


# ---- the API ----


def test_the_api_gives_what_the_predictor_gives(client, exported, pictures):
    predictor = Predictor(exported[0])
    for o in pictures[:3]:
        got, want = client.predict(handle_file(o), api_name="/predict"), predictor.answer(o).top
        assert got["label"] == want[0][0] and [c["label"] for c in got["confidences"]] == [
            label for label, _ in want
        ]
        np.testing.assert_allclose(
            [c["confidence"] for c in got["confidences"]], [p for _, p in want], atol=1e-5
        )


def test_many_at_once_give_a_table(client, exported, pictures):
    table = client.predict([handle_file(o) for o in pictures], api_name="/predict_batch")
    assert table["headers"] == ["file", "label", "probability", "or else"]
    assert [row[0] for row in table["data"]] == [o.name for o in pictures]
    assert [row[1] for row in table["data"]] == [
        o[0][0] for o in Predictor(exported[0]).predict_batch(pictures, 1)
    ]


def test_only_the_two_named_endpoints_are_public(client):
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == {"/predict", "/predict_batch"}


def test_the_example_of_the_readme_runs(page, exported, tmp_path):
    code = re.search(r"```python\n(from gradio_client .*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    done = subprocess.run(
        [sys.executable, "-c", code.replace("http://127.0.0.1:7860", page.url)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and len(done.stdout.splitlines()) > 3, done.stderr


def test_a_damaged_model_json_is_one_line(exported, tmp_path):
    predictor, whole = Predictor(exported[0]), json.loads((exported[0] / "model.json").read_text())
    for o in (
        {"parameters": "many"},
        {"images": 5},
        {"test": 5},
        {"test": {"top1": "x"}},
        {"photos": 5},
        {"commands": 5},
        {"commands": [1]},
        {"date": 5},
    ):
        (tmp_path / "model.json").write_text(json.dumps({**whole, **o}))
        with pytest.raises(UserError, match="model.json is damaged"):
            app.about(tmp_path / "learner.pkl", predictor)


def test_of_few_classes_no_top5_is_told(exported):
    model = json.loads((exported[0] / "model.json").read_text())
    few = {**model, "classes": model["classes"][:5]}
    told = [app.model_facts(o)["test top-5"] for o in (model, few, {})]
    assert re.fullmatch(r"\d+\.\d\d% ± \d\.\d\d%", told[0]) and told[1:] == [None, None]
    rows = [row for row in model_card(few).decode().splitlines() if row.startswith(("| test", "| valid"))]
    assert len(rows) == 2 and all(row.endswith("| - |") for row in rows)


def test_headlines_say_how_sure_the_model_is_and_names_have_no_underscores():
    top = [("sweet_pepper", 0.612), ("pine_tree", 0.3), ("sea", 0.001)]
    headlines = [app.headline(Answer(top, verdict)) for verdict in ("sure", "unsure", "unknown")]
    assert headlines == ["sweet pepper", "Perhaps: sweet pepper, pine tree", "None that I know"]
    assert app.headline(Answer([("sea", 0.6), ("road", 0.1)], "unsure")) == "Perhaps: sea"
    sure, unsure = (app.shown_row("a.png", (Answer(top, o), None, None)) for o in ("sure", "unsure"))
    assert sure == ["a.png", "sweet pepper", "61%", "pine tree 30%, sea under 1%"]
    assert unsure[1:] == [headlines[1], "", "sweet pepper 61%, pine tree 30%, sea under 1%"]


def test_what_the_model_sees_of_a_photo_is_framed_and_the_rest_is_dimmed():
    photo = Image.new("RGB", (400, 100), "white")
    shown = np.asarray(app.framed(photo, 32))
    # it sees 180 x 90 pixels
    assert shown.shape == (100, 400, 3) and (shown[10:90, 115:285] == 255).all()
    assert (shown[:, :105] < 200).all() and (shown[:, 295:] < 200).all() and (shown[:3] < 200).all()
    assert (shown[50, 110] != 255).any() and app.framed(photo.resize((32, 32)), 32).size == (256, 256)


def save(img, format, **kwargs):
    buffer = io.BytesIO()
    img.save(buffer, format, **kwargs)
    return buffer.getvalue()


WHITE = Image.new("RGB", (40, 40), "white")
GOOD = {
    "moves.gif": save(WHITE, "gif", save_all=True, append_images=[Image.new("RGB", (40, 40))]),
    "cmyk.jpg": save(WHITE.convert("CMYK"), "jpeg"),
    "deep.png": save(Image.fromarray(np.full((40, 40), 65_535, np.uint16)), "png"),
    "see_through.png": save(Image.new("RGBA", (40, 40), (0, 0, 0, 0)), "png"),
    "no_suffix": save(WHITE, "png"),
    "wrong.png": save(WHITE, "jpeg"),
    "wide.png": save(Image.new("RGB", (4000, 40), "white"), "png"),
}
BAD = {
    "corrupt.png": (save(WHITE, "png")[:60], "cannot be read as an image"),
    "=formula.png": (b"no", "is not an image"),
    "empty.png": (b"", "The file is empty"),
    "text.png": (b"hello", "is not an image"),
    "vector.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'></svg>", "is not an image"),
    "dot.png": (save(Image.new("RGB", (1, 1)), "png"), "only 1 x 1 pixels"),
    "long.png": (save(Image.new("1", (20_000, 40)), "png"), "20,000 x 40 pixels"),
    "large.png": (save(Image.new("1", (8000, 8000)), "png"), "8,000 x 8,000"),
    "bomb.png": (save(Image.new("1", (16_000, 16_000)), "png"), "too large"),
}


@pytest.mark.parametrize("name", GOOD)
def test_odd_pictures_are_read_as_what_they_are(client, exported, tmp_path, name):
    (tmp_path / name).write_bytes(GOOD[name])
    got, want = (
        client.predict(handle_file(tmp_path / name), api_name="/predict"),
        Predictor(exported[0]).answer(WHITE).top,
    )
    assert got["label"] == want[0][0] and got["confidences"][0]["confidence"] == pytest.approx(
        want[0][1], abs=0.02
    )


@pytest.mark.parametrize(
    "name", [o if o in ("corrupt.png", "bomb.png") else pytest.param(o, marks=pytest.mark.slow) for o in BAD]
)
def test_what_is_no_good_picture_is_a_message_and_no_traceback(page, client, tmp_path, name):
    content, text = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AppError, match=text):
        client.predict(handle_file(tmp_path / name), api_name="/predict")
    (row,) = client.predict([handle_file(tmp_path / name)], api_name="/predict_batch")["data"]
    assert row[0] == name and text in row[1]
    assert "Traceback" not in page.log()


@pytest.mark.slow
def test_too_many_files_and_none_are_messages(page, client, pictures):
    with pytest.raises(AppError, match="200 files are too many at once: choose at most 100"):
        client.predict([handle_file(pictures[0])] * 200, api_name="/predict_batch")
    assert not client.predict(None, api_name="/predict") and "Traceback" not in page.log()


@pytest.mark.slow
def test_a_file_over_the_cap_is_refused(page, client, tmp_path):
    (tmp_path / "big.png").write_bytes(bytes(21 * 2**20))
    with pytest.raises(Exception, match="20|large|413"):
        client.predict(handle_file(tmp_path / "big.png"), api_name="/predict")
    assert "Traceback" not in page.log()


def ask(url, path):
    return connect(url).predict(handle_file(path), api_name="/predict")["label"]


@pytest.mark.parametrize("n", [8, pytest.param(32, marks=pytest.mark.slow)])
def test_clients_at_once_get_their_answers(page, exported, pictures, n):
    want = [o[0][0] for o in Predictor(exported[0]).predict_batch(pictures, 1)]
    with ThreadPoolExecutor(n) as pool:
        got = list(pool.map(lambda i: ask(page.url, pictures[i % 8]), range(n)))
    assert got == [want[i % 8] for i in range(n)]


@pytest.mark.slow
def test_memory_stays_level_over_2000_requests(page, pictures):
    "By requests as a client of Gradio's makes them, which itself takes more time than the page."

    def ask_often(number):
        with httpx.Client(base_url=f"{page.url}/gradio_api", timeout=120) as http:
            for i in range(13):
                name = pictures[i % 8].name
                (path,) = http.post("/upload", files={"files": (name, pictures[i % 8].read_bytes())}).json()
                asked = http.post("/call/predict", json={"data": [{"path": path, "orig_name": name}]}).json()
                assert "confidences" in http.get(f"/call/predict/{asked['event_id']}").text

    levels = []
    for _ in range(5):
        with ThreadPoolExecutor(32) as pool:
            list(pool.map(ask_often, range(32)))
        levels.append(page.memory())
    print(f"2,080 requests of 32 clients: {levels} MB")
    assert levels[-1] - levels[0] < 60


# ---- which model ----


def test_without_a_model_the_page_says_how_to_make_one(tmp_path):
    folder = tmp_path / "space"
    folder.mkdir()
    shutil.copy(ROOT / "app.py", folder)
    (folder / "sifar").symlink_to(ROOT / "sifar")
    page = Page(folder, cwd=folder)
    try:
        assert "export.py" in str(connect(page.url).config)
    finally:
        page.close()


def test_the_model_beside_the_app_comes_before_the_newest_export_and_that_before_the_published_one(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(app, "HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results/a").mkdir(parents=True)
    (tmp_path / "results/a/learner.pkl").touch()
    assert app.find_model(None) == tmp_path / "results/a/learner.pkl"
    for i, o in enumerate(("runs/a/old", "runs/a/new")):
        (tmp_path / o).mkdir(parents=True)
        (tmp_path / o / "learner.pkl").touch()
        os.utime(tmp_path / o / "learner.pkl", (i, i))
    assert app.find_model(None) == Path("runs/a/new/learner.pkl")
    (tmp_path / "learner.pkl").touch()
    assert app.find_model(None) == tmp_path / "learner.pkl" and app.find_model("x.pkl") == Path("x.pkl")


def test_a_model_that_does_not_load_is_one_line(tmp_path, capsys):
    (tmp_path / "learner.pkl").write_text("no learner")
    for path in (tmp_path / "learner.pkl", tmp_path / "nowhere.pkl"):
        with pytest.raises(SystemExit) as e:
            app.main(["--model", str(path)])
        assert e.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_model_without_a_heat_map_says_so_and_offers_no_choice_of_classes(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    cfg = TrainConfig(dataset="digits", arch="timm:vit_tiny_patch16_224")
    write_learner(get_learner(get_dls(cfg), cfg), tmp_path / "learner.pkl", {})
    shutil.copy(pictures[0], tmp_path)
    file = {"path": str(tmp_path / pictures[0].name)}
    *_, note, row, part, seen, heat, choice = app.Answers(Predictor(tmp_path / "learner.pkl")).show(file)
    assert "cannot be told" in note.value and row.visible and part and seen
    assert not heat.visible and not choice.visible


# ---- a real browser ----


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("no chromium on this machine")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as p:
        o = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield o
        o.close()


@pytest.fixture
def tab(browser, page, request):
    "The page in a tab as large as the test asks for; its console gets no errors, and it asks no other host."
    options = getattr(request, "param", {})
    context = (
        browser.new_context(viewport={"width": 1200, "height": 1100}, **options)
        if "viewport" not in options
        else browser.new_context(**options)
    )
    o, errors, asked = context.new_page(), [], []
    o.set_default_timeout(60_000)
    o.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    o.on("pageerror", lambda e: errors.append(str(e)))
    o.on("request", lambda r: asked.append(r.url))
    o.goto(page.url)
    o.get_by_text("What is in the picture?").wait_for()
    yield o
    shots = ROOT / "build" / "screenshots"
    shots.mkdir(parents=True, exist_ok=True)
    o.screenshot(path=shots / f"{re.sub(r'[^a-z0-9]+', '_', request.node.name)}.png", full_page=True)
    context.close()
    assert errors == [] and "Traceback" not in page.log()
    assert asked and [u for u in asked if not u.startswith((page.url, "data:", "blob:"))] == []


def upload(tab, path):
    tab.locator("input[type=file]").first.set_input_files(path)


def clear(tab):
    tab.get_by_label("Clear").or_(tab.get_by_title("Clear")).or_(
        tab.get_by_label("Remove Image")
    ).first.click()


def test_a_picture_gives_labels_what_the_model_sees_and_why(tab, exported, pictures):
    boxes = "#labels", "#part", "#seen", "#why", "#choice", "#shown", "#table"
    assert [o for o in boxes if tab.locator(o).is_visible()] == [], "no box before the first answer"
    upload(tab, pictures[0])
    answer = Predictor(exported[0]).answer(pictures[0])
    tab.locator("#headline", has_text=app.headline(answer)).wait_for()
    tab.locator("text=/\\d+ ms/").wait_for()
    likely = [p for _, p in answer.top if p >= 0.005]
    rows = tab.locator("[data-testid$=confidence-set], .confidence-set")
    rows.nth(len(likely) - 1).wait_for()
    assert rows.count() == len(likely)
    assert "0%" not in tab.locator("#labels").inner_text().split()
    heat = tab.locator("#why img")
    heat.wait_for()
    before = heat.get_attribute("src")
    assert tab.locator("#seen img").evaluate("o => [o.naturalWidth, o.naturalHeight]") == [256, 256]
    tab.locator("#choice label").nth(1).click()
    tab.wait_for_function("before => document.querySelector('#why img')?.src != before", arg=before)
    assert all(tab.locator(o).is_visible() for o in boxes[:5])
    tab.get_by_role("tab", name="Many").click()
    assert not any(tab.locator(o).is_visible() for o in boxes)


@pytest.fixture(scope="module")
def coloured(exported, tmp_path_factory):
    "The page of a learner that knows a class of the examples, as a Space that stands by itself."
    folder = tmp_path_factory.mktemp("coloured")
    for name in ("app.py", "examples", "sifar"):
        (folder / name).symlink_to(ROOT / name)
    images = [Image.new("RGB", (40, 40), o) for o in ("red", "green")]
    for name, img in zip(("apple", "orange"), images):
        (folder / "data" / name).mkdir(parents=True)
        for i in range(12):
            img.save(folder / "data" / name / f"{i}.png")
    cfg = TrainConfig(dataset=str(folder / "data"), data=str(folder), arch="resnet8")
    write_learner(get_learner(get_dls(cfg), cfg), folder / "learner.pkl", {})
    o = Page(folder, cwd=folder)
    yield o
    o.close()


def test_after_an_example_a_bad_file_is_still_a_message(browser, coloured, tmp_path):
    tab = browser.new_page()
    tab.goto(coloured.url)
    tab.get_by_text("Or try one of these").wait_for()
    tab.locator(".gallery-item, .gallery button").first.click()
    tab.locator("text=/\\d+ ms/").wait_for()
    (tmp_path / "bad.png").write_bytes(b"hello")
    clear(tab)
    upload(tab, tmp_path / "bad.png")
    tab.locator("#headline", has_text="is not an image").wait_for()
    tab.close()
    assert "Traceback" not in coloured.log()


CONTRAST = """selector => {
    const numbers = color => color.match(/[\\d.]+/g).map(Number)
    const light = color => numbers(color).slice(0, 3).map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0)
    const element = document.querySelector(selector)
    let behind = element
    while ((numbers(getComputedStyle(behind).backgroundColor)[3] ?? 1) == 0) behind = behind.parentElement
    const [a, b] = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor].map(light)
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_all_of_the_answer_stands_above_the_examples_and_is_easy_to_read(
    browser, coloured, scheme
):
    phone = browser.new_context(
        viewport={"width": 375, "height": 800}, is_mobile=True, has_touch=True, color_scheme=scheme
    )
    tab = phone.new_page()
    tab.goto(coloured.url)
    tab.locator("#examples button").first.click()
    tab.locator("text=/\\d+ ms/").wait_for()
    for box in ("#why img", "#choice"):
        tab.locator(box).wait_for()
    boxes = "#picture", "#headline", "#labels", "#note", "#part", "#why", "#choice", "#examples"
    tops = [tab.locator(o).bounding_box()["y"] for o in boxes]
    assert tops == sorted(tops)
    # what WCAG asks of text
    for words in ("#note p", "#part label", "#choice span", "#choice .selected"):
        assert tab.evaluate(CONTRAST, words) >= 4.5, words
    phone.close()


def test_a_bad_file_is_a_message_and_the_old_answer_goes(tab, pictures, tmp_path):
    upload(tab, pictures[0])
    tab.locator("text=/\\d+ ms/").wait_for()
    (tmp_path / "bad.png").write_bytes(b"hello")
    clear(tab)
    upload(tab, tmp_path / "bad.png")
    tab.locator("#headline", has_text="is not an image").wait_for()
    assert (
        tab.locator("text=/\\d+ ms/").count()
        == tab.locator("#seen img").count()
        == tab.locator("#why img").count()
        == 0
    )


@pytest.mark.slow
def test_a_new_picture_while_a_slow_one_is_read_gets_its_own_answer(tab, exported, pictures, tmp_path):
    Image.effect_noise((4800, 4800), 50).save(tmp_path / "slow.jpg", quality=30)
    upload(tab, tmp_path / "slow.jpg")
    clear(tab)
    upload(tab, pictures[0])
    want = Predictor(exported[0]).predict(pictures[0], 1)[0][0]
    tab.locator("#choice").get_by_text(want, exact=True).first.wait_for()
    tab.wait_for_timeout(4000)
    assert app.headline(Predictor(exported[0]).answer(pictures[0])) == tab.locator("#headline").inner_text()
    assert tab.locator("#choice input:checked").count() == 1


def test_what_somebody_may_be_loading_is_not_written_anew(tab, page, pictures):
    for _ in range(2):
        upload(tab, pictures[1])
        tab.locator("text=/\\d+ ms/").wait_for()
        tab.locator("#why img").wait_for()
        files = list((page.folder / "uploads").rglob("image.*"))
        marked = [o for o in files if o.read_bytes().endswith(b"mark")]
        for o in files:
            o.write_bytes(o.read_bytes() + b"mark")
        clear(tab)
        tab.locator("#seen img").wait_for(state="detached")
    assert len(files) >= 2 and len(marked) == len(files)


def test_many_pictures_give_a_gallery_and_a_csv_file(tab, pictures, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"hello")
    tab.get_by_role("tab", name="Many").click()
    tab.locator("#files input[type=file]").set_input_files([*pictures, tmp_path / "bad.png"])
    tab.locator("#shown img").nth(7).wait_for()
    tab.get_by_text("is not an image").locator("visible=true").first.wait_for()
    with tab.expect_download() as download:
        tab.get_by_text("Download as CSV").click()
    lines = Path(download.value.path()).read_text("utf-8-sig").splitlines()
    assert (
        len(lines) == 10
        and lines[0].startswith("file,label,probability,or else")
        and lines[1].startswith("0.png,")
    )


SCROLLS = """() => [...document.querySelectorAll("#table *")]
    .filter(o => ["auto", "scroll"].includes(getComputedStyle(o).overflowY))
    .filter(o => o.scrollHeight > o.clientHeight + 1).length"""


@pytest.mark.parametrize(
    "tab", [{"viewport": {"width": 375, "height": 800}, "is_mobile": True}], indirect=True
)
def test_the_table_of_many_pictures_is_as_high_as_its_rows(tab, pictures):
    tab.get_by_role("tab", name="Many").click()
    tab.locator("#files input[type=file]").set_input_files(3 * pictures)
    tab.locator("#table [role=gridcell]", has_text=pictures[-1].name).nth(2).wait_for()
    assert tab.evaluate(SCROLLS) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "tab", [{"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}], indirect=True
)
def test_on_a_phone_nothing_is_wider_than_the_screen(tab, pictures):
    upload(tab, pictures[0])
    tab.locator("text=/\\d+ ms/").wait_for()
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    assert not tab.locator("footer").inner_text().strip(" \n").startswith("·")


@pytest.mark.slow
@pytest.mark.parametrize("tab", [{"color_scheme": "dark"}], indirect=True)
def test_where_the_system_is_dark_the_page_is_dark(tab, pictures):
    upload(tab, pictures[0])
    tab.locator("text=/\\d+ ms/").wait_for()
    assert (
        sum(map(int, re.findall(r"\d+", tab.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]))
        < 200
    )


def test_the_page_tells_about_the_model(tab):
    tab.get_by_role("tab", name="About").click()
    for text in ("78,042", "resnet8", "test top-1", "it knows only these 10 classes"):
        tab.get_by_text(text).first.wait_for()


# ---- abuse: last, as Gradio itself logs what is no request of its own ----


def ask_raw(page, fn_index, data):
    "What an endpoint, public or private, answers to a request that no client of Gradio made."
    body = {"data": data, "fn_index": fn_index, "session_hash": f"stranger{time.monotonic_ns()}"}
    joined = httpx.post(f"{page.url}/gradio_api/queue/join", json=body)
    if joined.status_code != 200:
        return joined.text
    with httpx.stream("GET", f"{page.url}/gradio_api/queue/data", params=body, timeout=60) as r:
        return next(o for o in r.iter_lines() if "process_completed" in o)


SECRETS = [
    str(ROOT / "docs" / "page.png"),
    "https://example.org/cat.png",
    "{uploads}/../../..{root}/docs/page.png",
    *(
        pytest.param(o, marks=pytest.mark.slow)
        for o in ("/etc/passwd", "/dev/zero", "../../../../etc/passwd", "", 5, None)
    ),
]


@pytest.mark.parametrize("path", SECRETS)
def test_nothing_is_read_but_what_was_uploaded(page, pictures, path):
    show, why, show_many, predict, predict_batch = range(5)
    answer = re.compile(
        r'image\.webp|"confidence"|"data":\[\["[^"]*","[^"]*",[0-9]'
    )  # a picture, a label, a row with a probability
    with open(pictures[0], "rb") as f:
        (uploaded,) = httpx.post(f"{page.url}/gradio_api/upload", files={"files": f}).json()
    ask = {
        show: lambda o: [o],
        why: lambda o: [o, "3"],
        show_many: lambda o: [[o]],
        predict: lambda o: [o],
        predict_batch: lambda o: [[o]],
    }
    for i, data in ask.items():
        assert answer.search(ask_raw(page, i, data({"path": uploaded, "meta": {"_type": "gradio.FileData"}})))
    if isinstance(path, str):
        path = path.format(uploads=Path(uploaded).parent, root=ROOT)
    for i, data in ask.items():
        for file in ({"path": path}, path):
            reply = ask_raw(page, i, data(file))
            assert not answer.search(reply), reply


@pytest.mark.slow
def test_the_space_runs_in_a_fresh_environment(exported, browser, pictures, tmp_path):
    space = shutil.copytree(exported[1], tmp_path / "space")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "-r", "requirements.txt"], cwd=space, check=True
    )
    page = Page(tmp_path, cwd=space, python=python)
    try:
        tab = browser.new_page()
        tab.goto(page.url)
        upload(tab, pictures[0])
        tab.locator("text=/\\d+ ms/").wait_for(timeout=60_000)
        assert "Traceback" not in page.log()
    finally:
        page.close()


@pytest.mark.parametrize("begin", ["", " ", "\t", "\r", "\n", "\r\n ", "\u3000", "a,b\r", "a\n"])
def test_no_cell_of_the_csv_file_is_a_formula(begin):
    names = [f"{begin}{sign}1" for sign in "=+-@＝＋－＠"]
    text = app.to_csv([[name, "cat=dog", 0.5, None] for name in names]).decode("utf-8-sig")
    rows = list(csv.reader(io.StringIO(text, newline="")))[1:]
    marked = names if begin[:1] == "a" else [f"'{name}" for name in names]
    assert rows == [[name, "cat=dog", "0.5", ""] for name in marked]


IN_A_NOTEBOOK = """
import os, sys
from pathlib import Path
import app
from gradio_client import Client, handle_file
sys.ps1 = ">>> "                # an interactive session, in which launch() does not block
_, model, picture, *ports = sys.argv
for port in ports: app.main(["--model", model, "--port", port])
for port in ports:
    client = Client(f"http://127.0.0.1:{port}", verbose=False)
    print(client.predict(handle_file(picture), api_name="/predict")["label"])
print(*Path(os.environ["GRADIO_TEMP_DIR"]).parent.glob("sifar-*"))
"""


def test_in_a_notebook_pages_go_on_after_main(exported, pictures, tmp_path):
    with socket.socket() as a, socket.socket() as b:
        for one in (a, b):
            one.bind(("127.0.0.1", 0))
        ports = [str(one.getsockname()[1]) for one in (a, b)]
    code = "-c", IN_A_NOTEBOOK, exported[0], pictures[0], *ports
    uploads = tmp_path / "uploads"
    env = {**os.environ, "GRADIO_TEMP_DIR": str(uploads), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *map(str, code)], env=env, capture_output=True, text=True)
    label = Predictor(exported[0]).predict(pictures[0])[0][0]
    *_, first, second, folders = done.stdout.splitlines()
    assert (first, second) == (label, label), done.stderr
    assert len(folders.split()) == 1 and Path(folders).parent == uploads, "both pages have one"
    assert uploads.exists() and not list(uploads.glob("sifar-*"))


@pytest.mark.parametrize("port", ["taken", "70000", "x"])
def test_a_port_that_cannot_be_had_is_one_line(capsys, port):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as e:
        at = str(taken.getsockname()[1]) if port == "taken" else port
        app.main(["--port", at])
    err = capsys.readouterr().err
    assert e.value.code == 2 and "--port" in err and err.count("\n") == 1
