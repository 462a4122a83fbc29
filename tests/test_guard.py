"""What strangers try on the page: each attempt ends in a word, without a traceback, and others are served."""

import http.server
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib

import httpx
import numpy as np
import pytest
from conftest import COLD
from PIL import Image
from test_app import ROOT, Page, save

from sifar import UserError
from sifar.share.guard import ROUTES, Budget, client_of, open_picture

JOIN, UPLOAD = "/gradio_api/queue/join", "/gradio_api/upload"
SHOW, WHY, SHOW_MANY, PREDICT, PREDICT_BATCH = range(5)
WHITE = Image.new("RGB", (40, 40), "white")


@pytest.fixture(scope="module")
def hub():
    "A stand-in for Hugging Face; the list of what it was asked for."
    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"[]")

        do_POST = do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server, asked
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def page(exported, tmp_path_factory, hub):
    "The page of an owner who is logged in to Hugging Face."
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "hf").mkdir()
    (folder / "hf" / "token").write_text("hf_secret")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_secret")
        patch.setenv("HF_HOME", str(folder / "hf"))
        # servers of Gradio's that would stand beside the guarded one
        for name in ("SSR_MODE", "MCP_SERVER", "NUM_WORKERS"):
            patch.setenv(f"GRADIO_{name}", "2" if name == "NUM_WORKERS" else "true")
        patch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub[0].server_port}")
        o = Page(folder, "--model", exported[0] / "learner.pkl")
    yield o
    o.close()


@pytest.fixture
def client(page):
    with httpx.Client(base_url=page.url, timeout=60) as o:
        yield o
    assert "Traceback" not in page.log(), page.log()[-3000:]


def upload(client, content=None, name="picture.png"):
    content = save(WHITE, "png") if content is None else content
    (path,) = client.post(UPLOAD, files={"files": (name, content)}).raise_for_status().json()
    return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}


def ask(client, data, fn_index=PREDICT, session=None):
    session = session or f"s{time.monotonic_ns()}"
    joined = client.post(JOIN, json={"data": data, "fn_index": fn_index, "session_hash": session})
    if joined.status_code != 200:
        return joined
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as r:
        return next(o for o in r.iter_lines() if "process_completed" in o)


# ---- routes ----


KNOWN = """
import json, gradio
from gradio.routes import App
def walk(routes, prefix=""):
    for o in routes:
        if hasattr(o, "path"): yield from ((method, prefix + o.path) for method in o.methods)
        else: yield from walk(o.original_router.routes, prefix + o.include_context.prefix)
print(json.dumps(list(walk(App.create_app(gradio.Blocks(analytics_enabled=False)).routes))))
"""


def test_every_route_of_gradio_that_the_page_does_not_need_is_refused(client, hub):
    # in a process of its own, as it leaves event loops open
    known = json.loads(subprocess.check_output([sys.executable, "-W", "ignore", "-c", KNOWN]))
    known = {(method, re.sub("{.*?}", "x", path)) for method, path in known}
    needed = {(method, re.sub("{.*?}", "x", path)) for method, paths in ROUTES.items() for path in paths}
    assert needed < known and ("GET", "/gradio_api/run-history/buckets") in known
    for method, path in (known - needed) | {("DELETE", "/"), ("GET", "/gradio_api/mcp"), ("GET", "/nowhere")}:
        answer = client.request(method, path)
        assert answer.status_code == 404, (method, path)
        assert method == "HEAD" or "nothing there" in answer.text, (method, path)
    assert not hub[1], "Hugging Face was asked"


def test_no_server_stands_beside_the_guarded_one(page, client):
    assert "SSR" not in page.log() and "workers" not in page.log() and "MCP" not in page.log()
    children = subprocess.run(["pgrep", "-P", str(page.pid())], capture_output=True, text=True)
    assert children.stdout == ""


def test_nobody_chooses_by_a_header_who_is_counted(client):
    file = upload(client, noise(3900))
    asked = [
        client.post(
            "/gradio_api/call/predict", json={"data": [file]}, headers={"x-forwarded-for": f"8.8.8.{i}"}
        )
        for i in range(3)
    ]
    assert [o.status_code for o in asked] == [200, 429, 429]


def test_a_client_is_an_address_or_a_network_of_ipv6():
    hosts = "1.2.3.4", "::ffff:1.2.3.4", "2001:db8::1", "2001:db8::2:1", "fe80::1%eth0", "x", ""
    wanted = "1.2.3.4", "1.2.3.4", "2001:db8::/64", "2001:db8::/64", "fe80::/64", "x", ""
    assert tuple(client_of({"client": (host, 1)}) for host in hosts) == wanted
    assert client_of({"client": None}) == ""


def test_no_address_is_fetched_for_a_visitor(client, hub):
    address = f"http://127.0.0.1:{hub[0].server_port}/secret"
    for path in (f"file={address}", f"file/{address}", f"proxy={address}"):
        assert client.get(f"/gradio_api/{path}").status_code == 404
    for data in (
        [{"path": address}],
        [{"path": address, "url": address, "meta": {"_type": "gradio.FileData"}}],
    ):
        assert ask(client, data).status_code == 404
    good = {**upload(client), "url": address}
    assert '"confidence"' in ask(client, [good])
    assert not hub[1]


def test_the_owners_token_is_out_of_reach(tmp_path):
    (tmp_path / "token").write_text("hf_secret")
    code = (
        "import os; from huggingface_hub import get_token; assert get_token() == 'hf_secret'\n"
        "from sifar.share.guard import forget_token; forget_token()\n"
        "assert get_token() is None and 'hf_secret' not in str(os.environ)\n"
        "if os.path.exists('/proc/self/environ'):\n"
        "    seen = open('/proc/self/environ', 'rb').read()\n"
        "    assert b'hf_secret' not in seen and b'HF_HOME=' in seen"
    )
    # all of the places in which it may lie
    places = {"HF_TOKEN": "hf_secret", "HUGGING_FACE_HUB_TOKEN": "hf_secret", "HF_HOME": str(tmp_path)}
    env = {**os.environ, **places}
    done = subprocess.run([COLD, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- questions ----

DEEP = b'{"data":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BODIES = [
    b"",
    b"{",
    b"[]",
    b"5",
    b"null",
    b"{}",
    b'{"data": 5}',
    DEEP,
    b"\xff\xfe",
    b'{"data": [' + b"1" * 5000 + b"]}",
]
DATA = [
    [],
    [1, 2, 3],
    [5],
    ["/etc/passwd"],
    [True],
    [[[]]],
    [{}],
    [{"path": 5}],
    [{"path": None}],
    [{"path": "x\0"}],
    [{"path": "x" * 5000}],
    [{"path": "\ud800"}],
    [{"path": ["x"]}],
    {},
    "x",
    None,
]


def test_malformed_questions_are_refused_with_a_word(client):
    good = upload(client)
    session = {"session_hash": "s"}
    questions = [
        {"data": data, "fn_index": fn, **session} for data in DATA for fn in (PREDICT, PREDICT_BATCH, WHY)
    ]
    questions += [
        {"data": [good], "fn_index": fn, **session} for fn in (99, -1, True, 1.5, "3", None, [3], 10**400)
    ]
    questions += [
        {"data": [good], "fn_index": PREDICT, "session_hash": o} for o in (None, 5, "", "x" * 99, "a/b", [])
    ]
    questions += [{"data": [good, o], "fn_index": WHY, **session} for o in (5, [], {}, "\ud800")]
    bodies = [*BODIES, *(json.dumps(o).encode() for o in questions)]
    for body in bodies:
        for path in (JOIN, "/gradio_api/call/predict", "/gradio_api/call/nothing", "/gradio_api/run/predict"):
            if path == "/gradio_api/call/predict" and b"uploads" in body:
                continue  # a good picture is all that this one needs
            answer = client.post(path, content=body, headers={"content-type": "application/json"})
            assert answer.status_code in (400, 404) and answer.json()["detail"], (
                path,
                body[:200],
                answer.text,
            )
    for path in (
        "queue/data",
        "queue/data?session_hash=x",
        "call/predict/x",
        "upload_progress",
        "file=",
        "file=%00",
    ):
        assert 400 <= client.get(f"/gradio_api/{path}").status_code < 500, path


def test_odd_paths_and_names_are_refused_without_a_traceback(client):
    for path in ("/static/", "/assets/", "/gradio_api/file=", "/gradio_api/call/predict/"):
        for name in ("a" * 256, "\u732b" * 90, "a" * 5000, "%00", "%ff%fe", "..%2f..%2fetc%2fpasswd", "/x"):
            assert client.get(path + name).status_code in (403, 404), (path, name)
    part = b'--b\r\nContent-Disposition: {}\r\n\r\nx\r\n--b--\r\n'
    for kind in ("b" * 300, "b" * 60_000, "\xff"):
        headers = {"content-type": f"multipart/form-data; boundary={kind}".encode("latin-1")}
        assert client.post(UPLOAD, content=part, headers=headers).status_code == 400
    for head in (b"form-data", b'form-data; filename="a"', b"form-data; filename*=x-none''a", b"a" * 10**6):
        headers = {"content-type": "multipart/form-data; boundary=b"}
        answer = client.post(UPLOAD, content=part.replace(b"{}", head), headers=headers)
        assert answer.status_code in (400, 413), head[:50]


def test_the_session_that_was_checked_is_the_one_that_gradio_answers(client):
    question = {"data": [upload(client)], "fn_index": PREDICT}
    for i, query in enumerate(("s{}&session_hash=other", "s{}&session%5Fhash=other", "s{}&x=%ff")):
        assert client.post(JOIN, json={**question, "session_hash": f"s{i}"}).status_code == 200
        with client.stream("GET", f"/gradio_api/queue/data?session_hash={query.format(i)}") as r:
            assert '"confidence"' in next(o for o in r.iter_lines() if "process_completed" in o)
    assert client.post(JOIN, json={**question, "session_hash": "known"}).status_code == 200
    for query in ("known%20", "%6bnown", "other&session_hash=known", "known;x"):
        assert client.get(f"/gradio_api/queue/data?session_hash={query}").status_code == 404


def test_of_too_many_files_no_more_are_looked_for(client):
    files = [upload(client)] * 100 + [{"path": "nowhere"}] * 900
    assert "1000 files are too many at once" in ask(client, [files], PREDICT_BATCH)


def test_no_question_goes_past_the_queue(client):
    body = {"data": [upload(client)], "fn_index": PREDICT, "session_hash": "s"}
    for path in ("run/predict", "api/predict", "run/predict_batch"):
        assert client.post(f"/gradio_api/{path}", json=body).status_code == 404


def test_two_who_fetch_the_answers_of_one_session_leave_no_traceback(page, client):
    question = {"data": [upload(client)], "fn_index": PREDICT, "session_hash": "shared"}
    assert client.post(JOIN, json=question).status_code == 200
    head = b"GET /gradio_api/queue/data?session_hash=shared HTTP/1.1\r\nHost: x\r\n\r\n"
    with begin(page, head) as one, begin(page, head):
        assert one.recv(100).startswith(b"HTTP/1.1 200")
    assert "process_completed" in ask(client, [upload(client)])         # `client` looks into the log


def test_what_gradio_does_with_a_question_is_not_for_visitors(client):
    "Odd names and numbers beside the question change nothing."
    odd = {"trigger_id": 10**30, "event_data": {"a": 1}, "batched": True, "simple_format": 5, "event_id": 7}
    picture = {**upload(client), "size": "x", "is_stream": True, "mime_type": 5}
    body = {"data": [picture], "fn_index": PREDICT, "session_hash": "odd", **odd}
    assert client.post(JOIN, json=body).status_code == 200
    with client.stream("GET", "/gradio_api/queue/data?session_hash=odd") as r:
        assert '"confidence"' in next(o for o in r.iter_lines() if "process_completed" in o)


def test_one_file_is_a_list_of_one_to_predict_batch(client):
    assert "picture.png" in ask(client, [upload(client)], PREDICT_BATCH)


@pytest.mark.parametrize(
    "value", ["bytes=x", "bytes=-", "bytes=5-1", "bytes=9999999-", "bytes=0-1,5-6", "x" * 999]
)
def test_odd_ranges_are_no_matter(client, value):
    path = upload(client)["path"]
    answer = client.get(f"/gradio_api/file={path}", headers={"range": value})
    assert answer.status_code == 200 and answer.content == save(WHITE, "png")


# ---- sizes and times ----


def test_uploads_are_files_only_and_not_too_many_or_too_large(page, client):
    small = ("files", ("a.png", b"x"))
    assert client.post(UPLOAD, files=[small] * 100).status_code == 200
    assert client.post(UPLOAD, files=[small] * 101).status_code == 400
    for field in ({"x": "y"}, {"files": "y"}, {"x": "y" * 2**20}):
        assert client.post(UPLOAD, data=field, files=[small]).status_code == 400
        assert client.post(f"{UPLOAD}?upload_id=x", data=field, files=[small]).status_code == 400
    assert client.post(UPLOAD, files={"files": ("a.png", bytes(21 * 2**20))}).status_code == 413
    assert not list((page.folder / "uploads").rglob("tmp*")), "nothing of them is left"
    for name in ("\0", "..", "a/b", "x" * 5000, "🐱" * 300):
        assert client.post(UPLOAD, files={"files": (name, b"x")}).status_code in (200, 400, 413)
    for headers in (
        {},
        {"content-type": "multipart/form-data"},
        {"content-type": "multipart/form-data; boundary=b"},
    ):
        assert 400 <= client.post(UPLOAD, content=b"x", headers=headers).status_code < 500
    assert (
        client.post(UPLOAD, content=iter([b"x"]), headers={"content-type": "multipart/form-data"}).status_code
        == 411
    )


def begin(page, head):
    host, port = page.url.removeprefix("http://").split(":")
    o = socket.create_connection((host, int(port)))
    try:
        o.sendall(head)
    except OSError:
        o.close()
        raise
    return o


def test_a_body_that_is_said_to_be_large_is_refused_before_it_comes(page):
    for path, size in ((JOIN, 9 * 2**20), (UPLOAD, 20_000 * 2**20)):
        with begin(page, f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode()) as s:
            s.settimeout(10)
            assert b" 413 " in s.recv(1000)


def test_an_upload_that_breaks_off_leaves_nothing(page, client):
    head = (
        b"POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\nContent-Type: "
        b'multipart/form-data; boundary=b\r\n\r\n--b\r\nContent-Disposition: form-data; name="files"; '
        b'filename="a.png"\r\n\r\n' + bytes(5000)
    )

    def begun():
        return set((page.folder / "uploads").rglob("tmp*")) - before

    before = set((page.folder / "uploads").rglob("tmp*"))
    s = begin(page, head)
    wait_for(begun)
    s.close()
    wait_for(lambda: not begun())


def wait_for(f):
    end = time.monotonic() + 60
    while not f() and time.monotonic() < end:
        time.sleep(0.05)
    assert f()


def test_connections_that_wait_go_for_new_ones(page, client):
    heads = [
        b"",
        b"GET / HTTP/1.1\r\nHost: x\r\n",
        b"POST /gradio_api/upload HTTP/1.1\r\nContent-Length: 9\r\nHost: x\r\n\r\n",
    ]
    held = [begin(page, heads[i % 3]) for i in range(700)]
    try:
        assert '"confidence"' in ask(client, [upload(client)])
    finally:
        for s in held:
            s.close()


def test_a_budget_is_used_up_and_comes_back():
    budget = Budget(10, 0.5)
    assert budget.take("a", 8) and not budget.take("a", 8) and budget.take("b", 8)
    assert budget.take("a", 1) and not budget.take("a", 1, share=0.5)
    time.sleep(0.6)
    assert budget.take("a", 8)


# ---- pictures ----


def noise(side, mode="RGB", format="png", **kwargs):
    return save(Image.new(mode, (side, side)), format, **kwargs)


@pytest.mark.parametrize(
    "content",
    [
        noise(4200),
        noise(4200, "F", "tiff", compression="tiff_adobe_deflate"),
        noise(4200, "L", "webp"),
        noise(4200, "L", "jpeg", progressive=True),
        noise(7200, "L", "jpeg"),
        save(WHITE, "jpeg") + b"\xff\xda" * 9999 * 32,
    ],
    ids=["png", "tiff", "webp", "progressive", "jpeg", "scans"],
)
def test_pictures_that_take_too_much_are_refused_before_they_are_decoded(content):
    with pytest.raises(UserError, match="too large"):
        open_picture(content, 32)


def test_a_large_photograph_is_read_small():
    img = open_picture(noise(6000, "L", "jpeg"), 32)
    assert max(img.size) == 750
    np.testing.assert_array_equal(open_picture(save(WHITE, "jpeg"), 32), WHITE)


def test_tiles_that_are_larger_than_their_picture_count():
    def tiff(side):
        tags = {
            256: 40,
            257: 40,
            258: 8,
            259: 8,
            262: 1,
            277: 1,
            322: side,
            323: side,
            324: 200,
            325: len(tile),
        }
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
        return (b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries).ljust(200, b"\0") + tile

    tile = zlib.compress(bytes(48 * 48))
    assert open_picture(tiff(48)).convert("RGB").size == (40, 40)
    with pytest.raises(UserError, match="too large"):
        open_picture(tiff(16_000))


@pytest.mark.parametrize("format", ["ppm", "tga", "pcx", "jpeg2000", "ico"])
def test_pictures_of_rare_formats_are_refused(format):
    with pytest.raises(UserError, match="is not an image that can be read here"):
        open_picture(save(WHITE, format))
