"""The page under attacks of one visitor, one kind after the other: another one is answered in time."""

import random
import socket
import threading
import time
from contextlib import ExitStack, suppress
from functools import cache

import httpx
import numpy as np
import pytest
from conftest import COLD
from PIL import Image
from test_app import Page, save
from test_app_under_load import ask
from test_guard import PREDICT, PREDICT_BATCH, UPLOAD, begin, upload

# an attack that is cut off ends as it likes
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
SECONDS, IN_TIME, MOST_MEMORY = 20, 5, 2000  # of an attack; seconds for an answer; MB
JOIN, JSON = "/gradio_api/queue/join", {"content-type": "application/json"}
UPLOAD_HEAD = (
    "POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    "Content-Length: {}\r\n\r\n"
)
PART = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'


def smooth(side):
    return np.tile(np.linspace(0, 255, side) // 16, (side, 1))


MAKE = {
    "TIFF of 50 million floats": lambda: save(
        Image.fromarray(smooth(7070).astype(np.float32)), "tiff", compression="tiff_adobe_deflate"
    ),
    "TIFF of 16 million floats": lambda: save(
        Image.fromarray(smooth(4000).astype(np.float32)), "tiff", compression="tiff_adobe_deflate"
    ),
    "16-bit PNG": lambda: save(Image.fromarray((smooth(4000) * 257).astype(np.uint16)), "png"),
    "progressive JPEG": lambda: save(
        Image.effect_noise((4000, 4000), 60).convert("RGB"), "jpeg", progressive=True, subsampling=0
    ),
    "photograph": lambda: save(Image.effect_noise((4000, 3000), 20).convert("RGB"), "jpeg", quality=85),
    "WebP": lambda: save(Image.effect_noise((4000, 4000), 20), "webp", method=0),
}


@cache
def picture(name):
    return MAKE[name]()


# ---- the attacks: each goes on until `stop` is set, and counts what it sent ----


class Attack:
    def __init__(self, page, rng):
        self.page, self.rng, self.sent, self.stop = page, rng, 0, threading.Event()
        self.client = httpx.Client(base_url=page.url, timeout=60, limits=httpx.Limits(max_connections=500))

    def post(self, path, **kwargs):
        self.sent += 1
        with suppress(httpx.HTTPError):  # it was cut off
            return self.client.post(path, **kwargs)

    def join(self, data, fn, session=None):
        session = session or f"s{self.rng.getrandbits(60)}"
        return self.post(JOIN, json={"data": data, "fn_index": fn, "session_hash": session})

    def pictures(self, *names):
        contents = [picture(name) for name in names]
        return [upload(self.client, content) for content in contents]


def large_pictures(o, *names):
    files = o.pictures(*names)
    while not o.stop.is_set():
        for file in files:
            for _ in range(4):
                o.join([file], PREDICT)
                o.post("/gradio_api/run/predict", json={"data": [file], "fn_index": PREDICT})


def refused_pictures(o):
    large_pictures(o, "TIFF of 50 million floats")


def slow_pictures(o):
    large_pictures(o, "TIFF of 16 million floats", "16-bit PNG", "progressive JPEG", "WebP")


def photographs(o):
    large_pictures(o, "photograph")


def joins(o, sessions=None):
    file = upload(o.client)
    while not o.stop.is_set():
        threads = [
            threading.Thread(target=o.join, args=([file], PREDICT, sessions and f"s{i % sessions}"))
            for i in range(150)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def joins_of_one_session(o):
    joins(o, 1)


def a_picture_a_hundred_times(o):
    files = o.pictures("photograph", "16-bit PNG")
    while not o.stop.is_set():
        for file in files:
            o.join([[file] * 100], PREDICT_BATCH)
            o.join([[file] * 1000], PREDICT_BATCH)


def half_open(o):
    heads = [b"", b"GET / HTTP/1.1\r\nHost: x\r\n", UPLOAD_HEAD.format(1000).encode()]
    with ExitStack() as held:
        for i in range(1200):
            held.enter_context(begin(o.page, heads[i % 3]))
            o.sent += 1
        while not o.stop.wait(0.05):
            with suppress(OSError):
                held.enter_context(begin(o.page, o.rng.choice(heads)))
                o.sent += 1


def drop_by_drop(o):
    "Heads and bodies, a byte at a time."
    with ExitStack() as held:
        begun = [held.enter_context(begin(o.page, b"GET / HTTP/1.1\r\nX: ")) for _ in range(200)]
        begun += [
            held.enter_context(begin(o.page, UPLOAD_HEAD.format(10**6).encode() + PART)) for _ in range(100)
        ]
        o.sent = 300
        while not o.stop.wait(0.5):
            for s in begun:
                with suppress(OSError):
                    s.send(b"x")


def readers_that_do_not_read(o):
    with ExitStack() as held:
        for _ in range(400):
            s = held.enter_context(begin(o.page, 20 * b"GET /config HTTP/1.1\r\nHost: x\r\n\r\n"))
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            o.sent += 20
            if o.stop.is_set():
                return
        o.stop.wait()


def streams(o):
    "Answers that nobody fetches, and many who wait for one that does not come."
    with ExitStack() as held:
        file = upload(o.client)
        while not o.stop.is_set():
            o.join([file], PREDICT, "one")
            for path in ("queue/data?session_hash=one", "upload_progress?upload_id=x", "heartbeat/one"):
                head = f"GET /gradio_api/{path} HTTP/1.1\r\nHost: x\r\n\r\n"
                with suppress(OSError):
                    held.enter_context(begin(o.page, head.encode()))
                    o.sent += 1


def large_json(o):
    body = b'{"data": [' + b"{}," * 3_000_000 + b"{}]}"
    deep = b'{"data": ' + b"[" * 250_000 + b"]" * 250_000 + b"}"
    wide = b'{"data": [' + b"{}," * 170_000 + b'{}], "fn_index": 3}'
    while not o.stop.is_set():
        for content in (body, deep, wide):
            o.post(JOIN, content=content, headers=JSON)


def large_fields(o):
    while not o.stop.is_set():
        o.post(UPLOAD, data={"x": "y" * 150_000_000}, files={"files": ("a.png", b"x")})


def a_thousand_files(o):
    sent, file = 0, PART + bytes(20 * 2**20) + b"\r\n"
    for size in (1000 * len(file), 20 * len(file)):
        with suppress(OSError), begin(o.page, UPLOAD_HEAD.format(size).encode()) as s:
            o.sent += 1
            while sent < size and not o.stop.is_set():
                s.sendall(file)
                sent += len(file)
    while not o.stop.is_set():
        o.post(UPLOAD, files=[("files", (f"{i}.png", bytes(2**20))) for i in range(100)])


def new_uploads(o):
    while not o.stop.is_set():
        o.post(UPLOAD, files={"files": ("a.png", o.rng.randbytes(19 * 2**20))})


def no_http(o):
    while not o.stop.is_set():
        with suppress(OSError), begin(o.page, o.rng.randbytes(o.rng.randrange(1, 100_000))) as s:
            o.sent += 1
            s.settimeout(1)
            s.recv(1000)


# how many of its kind go on at once
ATTACKS = {
    refused_pictures: 4, slow_pictures: 4, photographs: 4, joins: 1, joins_of_one_session: 1,
    a_picture_a_hundred_times: 4, half_open: 1, drop_by_drop: 1, readers_that_do_not_read: 1, streams: 1,
    large_json: 4, large_fields: 2, a_thousand_files: 4, new_uploads: 4, no_http: 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def page(exported, tmp_path_factory):
    for name in MAKE:
        picture(name)
    o = Page(tmp_path_factory.mktemp("hostile"), "--model", exported[0] / "learner.pkl", python=COLD)
    yield o
    o.close()


def visit(page, address, end, waits):
    "Ask for a picture again and again, as another visitor with an address of its own."
    transport = httpx.HTTPTransport(local_address=address)
    with httpx.Client(base_url=page.url, timeout=60, transport=transport) as client:
        content, i = save(Image.effect_noise((32, 32), 90), "png"), 0
        while time.monotonic() < end or not i:
            start, i = time.monotonic(), i + 1
            try:
                good = ask(client, content) is not None
            except (httpx.HTTPError, AssertionError) as e:
                good = e
            waits.append((time.monotonic() - start, good))
            time.sleep(0.2)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda f: f.__name__)
def test_another_visitor_is_answered(page, campaign, attack):
    attacks = []
    try:
        attacks += [Attack(page, random.Random(i)) for i in range(ATTACKS[attack])]
        threads = [threading.Thread(target=attack, args=(o,), daemon=True) for o in attacks]
        for thread in threads:
            thread.start()
        time.sleep(2)
        waits, near, most, end = [], [], page.memory(), time.monotonic() + SECONDS
        visits = [
            threading.Thread(target=visit, args=(page, address, end, found))
            for address, found in (("127.0.0.2", waits), ("127.0.0.1", near))
        ]
        for thread in visits:
            thread.start()
        while any(thread.is_alive() for thread in visits):
            most = max(most, page.memory())
            time.sleep(0.1)
        for o in attacks:
            o.stop.set()
        slowest, slowest_near = max(waits)[0], max(near)[0]
        sent = sum(o.sent for o in attacks)
        line = (
            f"{attack.__name__}: {sent} requests; {len(waits)} answers, the slowest in {slowest:.2f} s, "
            f"from the same address {len(near)} in {slowest_near:.2f} s, memory {most} MB"
        )
        print(line, [o for o in near if o[1] is not True][:3])
        assert all(good is True for _, good in waits), waits
        assert sent and slowest < IN_TIME and most < MOST_MEMORY, line
        assert "Traceback" not in page.log(), page.log()[-3000:]
        for thread in threads:
            thread.join(60)
        campaign("requests of a hostile visitor, while others are answered", sent, sent, line)
    finally:
        for o in attacks:
            o.stop.set()
