"""What stands between the page and strangers: few routes, small requests, a share for every client.

`guarded` puts it before Gradio, and `open_picture` before a decoder."""
import asyncio
import ctypes
import ipaddress
import json
import os
import re
import time
from collections import Counter
from contextlib import AsyncExitStack
from functools import lru_cache, partial
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from weakref import WeakValueDictionary

import anyio
import uvicorn
from gradio import components, http_server, route_utils
from gradio.utils import get_upload_folder
from huggingface_hub import constants
from PIL import Image
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.routing import compile_path
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..data.image import check_size, explained, formats
from ..errors import UserError

# What a browser asks for that shows the page, and gradio_client for a prediction: seen by watching both.
# Other routes of Gradio act with the owner's token, fetch from addresses, keep files, or tell of visitors.
UPLOAD, FILE, DATA = "/gradio_api/upload", "/gradio_api/file={path:path}", "/gradio_api/queue/data"
JOIN, CALL, RUN = "/gradio_api/queue/join", "/gradio_api/call/{name}", "/gradio_api/run/{name}"
ANSWER, PROGRESS = "/gradio_api/call/{name}/{event}", "/gradio_api/upload_progress"
ROUTES = {
    "GET": ("/", "/config", "/theme.css", "/favicon.ico", "/static/{path:path}", "/assets/{path:path}",
            "/gradio_api/info", "/gradio_api/startup-events", FILE, DATA, ANSWER, PROGRESS),
    "HEAD": ("/",),
    "POST": (UPLOAD, JOIN, CALL, RUN),
}
WHOLE_PAGE = "/", "/config", "/gradio_api/info"
PATTERNS = {method: {path: compile_path(path)[0] for path in paths} for method, paths in ROUTES.items()}

MAX_FILES = 100                 # of an upload
MAX_UPLOAD, MAX_QUESTION = 500 * 2**20, 512 * 2**10         # bytes of a request
PATIENCE = 20                   # seconds of waiting for a head, for a question, for more of an upload
SHORT, LONG = 60, 600           # seconds that a request may take; an upload or a stream of answers
CONNECTIONS = 512               # open at once; the oldest one goes for a new one
WAITING = 4                     # questions of a client in the queue; more wait at the door

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")     # of pictures, whose decoders are compiled
MAX_PIXELS = 50_000_000         # of a picture whose decoder skips most of them: see pixels_to_decode
MAX_DECODED = 16_000_000        # of a picture: some 0.8 s, 400 MB
LIGHT = 4_000_000               # pixels to decode for a question, of which a client may have as many as wait


class Budget:
    "What each client may use: `most` at once, which comes back evenly within `seconds`."

    def __init__(self, most, seconds): self.most, self.seconds, self.used = most, seconds, {}

    def take(self, client, n, share=1):
        "Whether `client` may use `n` more without being above a `share` of all; if so, that is counted."
        now = time.monotonic()
        used, then = self.used.pop(client, (0, now))
        used = max(0, used - (now - then) * self.most / self.seconds)
        allowed = used + n <= share * self.most
        if allowed: used += n
        self.used[client] = used, now
        if len(self.used) > 10_000: del self.used[next(iter(self.used))]        # whose use is longest ago
        return allowed


def guarded(page, share=False):
    "What `page.launch` takes so that strangers reach no more of Gradio than `page` needs."
    forget_token()
    route_utils.GradioMultiPartParser = OnlyFiles                       # type: ignore[misc]
    # start_server makes its uvicorn.Config from this name; h11 alone limits the size of a head
    config = partial(uvicorn.Config, http=Connection, ws="none")
    http_server.uvicorn = SimpleNamespace(Config=config)                # type: ignore[assignment]
    # from whom uvicorn believes a header that names the visitor; anybody else would choose who he is
    proxies = "127.0.0.1" if share else ""
    if os.environ.get("SPACE_ID"): proxies = "127.0.0.1,10.0.0.0/8,172.16.0.0/12,192.168.0.0/16"
    os.environ.setdefault("FORWARDED_ALLOW_IPS", proxies)
    # the others are servers of Gradio's beside this one, which ask no Guard
    return {"app_kwargs": {"middleware": [Middleware(Guard, page=page)]},
            "ssr_mode": False, "num_workers": 0, "mcp_server": False, "share": share}


def forget_token():
    "Put the owner's token of Hugging Face out of the reach of this process: no visitor acts with it."
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        blank(name)
        os.environ.pop(name, None)
    constants.HF_TOKEN_PATH = constants.HF_STORED_TOKENS_PATH = os.devnull
    constants.HF_HUB_DISABLE_IMPLICIT_TOKEN = True


def blank(name):
    "Overwrite a variable of the environment, which /proc/PID/environ shows also after it is removed."
    if os.name != "posix": return
    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_void_p
    if at := libc.getenv(name.encode()): ctypes.memset(at, 0, len(ctypes.string_at(at)))


# ---- connections: heads that do not end ----

class Connection(H11Protocol):
    "A connection that goes where its client does not end a head in time, or where a new one needs its place."
    opened: dict = {}           # as an ordered set

    def connection_made(self, transport):
        super().connection_made(transport)
        self.opened[self] = None
        self.await_head()
        if len(self.opened) > CONNECTIONS: self.make_room()

    def make_room(self):
        "Close a connection of the client that has the most: its oldest that waits for it, else its oldest."
        (host, _), = Counter(o.host for o in self.opened).most_common(1)
        its = [o for o in self.opened if o.host == host]
        oldest = next((o for o in its if o.awaits_client()), its[0])
        oldest.transport.abort()
        self.opened.pop(oldest)

    @property
    def host(self): return self.client[0] if self.client else ""

    def awaits_client(self): return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def await_head(self): self.timer = self.loop.call_later(PATIENCE, self.transport.abort)

    def data_received(self, data):
        super().data_received(data)
        if self.cycle and not self.cycle.response_complete: self.timer.cancel()

    def on_response_complete(self):
        self.timer.cancel()
        self.await_head()
        super().on_response_complete()

    def connection_lost(self, exc):
        self.timer.cancel()
        self.opened.pop(self, None)
        super().connection_lost(exc)


# ---- requests ----

class Guard:
    "ASGI middleware: lets through to `app` what `page` needs, checked, and refuses all else with a word."

    def __init__(self, app, page):
        self.app, self.page = app, page
        self.doors: WeakValueDictionary[tuple, asyncio.Lock] = WeakValueDictionary()
        # bytes in 15 minutes, which is the longest that an upload is kept; work of single pictures, of many
        self.bytes, self.all_bytes = Budget(2**30, 900), Budget(2**32, 900)
        self.work_on_one, self.all_work_on_one = Budget(24e6, 20), Budget(48e6, 20)
        self.work_on_many, self.all_work_on_many = Budget(300e6, 60), Budget(600e6, 60)

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan": return await self.app(scope, receive, send)
        begun = False

        async def begin(message):
            nonlocal begun
            begun = True
            await send(message)
        try:
            path, values = find_route(scope)
            seconds = LONG if path in (UPLOAD, DATA, ANSWER, PROGRESS) else SHORT
            async with asyncio.timeout(seconds), AsyncExitStack() as turn:
                receive = await self.check(path, values, scope, receive, turn)
                await self.app(scope, receive, begin)
        except HTTPException as e: problem = e
        except TimeoutError: problem = HTTPException(408, "That took too long.")
        else: return
        if begun: return                            # uvicorn closes the connection
        answer = JSONResponse({"detail": problem.detail}, problem.status_code, {"connection": "close"})
        await answer(scope, receive, send)

    async def check(self, path, values, scope, receive, turn):
        """A `receive` for what may be let through.

        turn: an exit stack, that of a question is left once it is in the queue. Errors: HTTPException."""
        # Gradio answers odd ranges with a traceback, and the page asks for none
        scope["headers"] = [(k, v) for k, v in scope["headers"] if k != b"range"]
        if path == UPLOAD: return self.upload(scope, receive)
        # large answers: those of a client one after the other, so that others come between
        if path in WHOLE_PAGE: await self.door(client_of(scope), "page", turn)
        if path in (JOIN, CALL, RUN): return await self.question(path, values, scope, receive, turn)
        if path == FILE: uploaded(values["path"])
        if path in (DATA, ANSWER):
            # two at once over one session end in a traceback of Gradio's
            await self.door(self.session(path, values, scope), "answers", turn)
            session = self.session(path, values, scope)     # which may have ended meanwhile
            # Gradio would take the last of several
            if path == DATA: scope["query_string"] = f"session_hash={session}".encode()
        return receive

    def session(self, path, values, scope):
        "The session whose answers are asked for. Errors: HTTPException where there is none."
        queue = self.page._queue
        if path == ANSWER:
            for session, events in queue.pending_event_ids_session.items():
                if values["event"] in events: return session
            raise HTTPException(404, "There is no such question, or its answer was fetched.")
        found = re.search(rb"(?:^|&)session_hash=([\w-]+)(?:&|$)", scope["query_string"])
        if not found or found[1].decode() not in queue.pending_messages_per_session:
            raise HTTPException(404, "Nothing was asked in this session.")
        return found[1].decode()

    def upload(self, scope, receive):
        "A `receive` for an upload, which ends where the client is too slow or over its budget."
        size, client = body_size(scope, MAX_UPLOAD), client_of(scope)
        # its boundary has at most 70 characters, and is searched for in all that comes
        if len(Headers(scope=scope).get("content-type", "")) > 200: raise HTTPException(400, "No such type.")
        # large uploads leave room for small ones
        share = 1 if size < 2 * 2**20 else 0.5

        async def more():
            # Gradio deletes what it has of the files at this exception alone
            try:
                async with asyncio.timeout(PATIENCE): message = await receive()
            except TimeoutError: raise MultiPartException("The upload is too slow.") from None
            if message["type"] == "http.disconnect": raise MultiPartException("The upload broke off.")
            n = len(message.get("body", b""))
            if not (self.bytes.take(client, n, share) and self.all_bytes.take("all", n, share)):
                raise MultiPartException("That is over the maximum allowed size for some minutes.")
            return message
        return more

    async def question(self, path, values, scope, receive, turn):
        "A `receive` for a question with nothing in it that Gradio need not know, once it is its turn."
        try: asked = json.loads(await read_body(scope, receive))
        except (ValueError, RecursionError): raise HTTPException(400, "This is not JSON.") from None
        if not isinstance(asked, dict): raise HTTPException(400, "A question is a JSON object.")
        fn = self.function(path, values, asked.get("fn_index"))
        question = {"data": check_data(fn, asked.get("data"))}
        if path != CALL:
            session = asked.get("session_hash")
            if not isinstance(session, str) or not re.fullmatch(r"[\w-]{1,64}", session):
                raise HTTPException(400, "session_hash should be letters and digits, at most 64.")
            question.update(fn_index=fn._id, session_hash=session)
        try: body = json.dumps(question, ensure_ascii=False).encode()
        except UnicodeEncodeError: raise HTTPException(400, "This is not Unicode.") from None
        await self.wait_for_turn(fn, question["data"], client_of(scope), turn)
        return replay(body, receive)

    def function(self, path, values, number):
        "The function of the page that is asked, by name or number. Errors: HTTPException."
        for fn in self.page.fns.values():
            if path == CALL: asked = fn.api_visibility == "public" and fn.api_name == values["name"]
            else: asked = type(number) is int and fn._id == number
            # RUN is for what has no queue, and goes past it
            if asked and bool(fn.queue) == (path != RUN): return fn
        raise HTTPException(404, "The page has no such function.")

    async def wait_for_turn(self, fn, data, client, turn):
        "Return when the client has a place in the queue. Errors: HTTPException for more work than its share."
        work = await anyio.to_thread.run_sync(work_of, data)
        mine, everybody = self.work_on_one, self.all_work_on_one
        if any(isinstance(block, components.File) for block in fn.inputs):
            mine, everybody = self.work_on_many, self.all_work_on_many
        if work > LIGHT and not (mine.take(client, work) and everybody.take("all", work)):
            raise HTTPException(429, "These pictures are too much work at once: "
                                     "send fewer or smaller ones, or wait a minute.")
        # the questions of a client go into the queue one after the other
        await self.door(client, "queue", turn)
        while self.waiting(client) >= WAITING: await asyncio.sleep(0.02)

    async def door(self, client, name, turn):
        "Wait until no other request of the client is in this door, which is held as long as `turn`."
        await turn.enter_async_context(self.doors.setdefault((client, name), asyncio.Lock()))

    def waiting(self, client):
        "How many questions of the client are in Gradio's queue, those that are being answered included."
        queue = self.page._queue
        queues = [o.queue for o in queue.event_queue_per_concurrency_id.values()]
        events = [event for o in (*queues, *queue.active_jobs) if o for event in o]
        return sum(client_of(event.request.scope) == client for event in events)


class OnlyFiles(route_utils.GradioMultiPartParser):
    "In the place of Gradio's parser of uploads, which takes a thousand files, and fields of any size."

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "max_files": MAX_FILES, "max_fields": 0})


def find_route(scope):
    "Which of ROUTES a request takes, and the values in its path. Errors: HTTPException."
    # no system has a longer name of a file, and asking for one is an error
    longest = max(len(name.encode(errors="replace")) for name in scope["path"].split("/"))
    for path, pattern in PATTERNS.get(scope["method"], {}).items():
        found = pattern.match(scope["path"])
        if found and longest <= 255: return path, found.groupdict()
    raise HTTPException(404, "The page has nothing there.")


def client_of(scope):
    "Who asks: an address, of IPv6 the network, which is what a client has."
    host = (scope.get("client") or ("",))[0]
    try: address = ipaddress.ip_address(host)
    except ValueError: return host
    if address.version == 4: return host
    # IPv4, at a socket for both
    if address.ipv4_mapped: return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((host.partition("%")[0], 64), strict=False))


def body_size(scope, most):
    "How many bytes the body of a request has. Errors: HTTPException where that is not said, or too much."
    size = Headers(scope=scope).get("content-length")
    if size is None: raise HTTPException(411, "Say how long it is: Content-Length is missing.")
    if int(size) > most: raise HTTPException(413, f"That is too large: at most {most // 2**10:,} kB.")
    return int(size)


async def read_body(scope, receive):
    body_size(scope, MAX_QUESTION)
    body, more = b"", True
    async with asyncio.timeout(PATIENCE):
        while more:
            message = await receive()
            if message["type"] == "http.disconnect": raise HTTPException(400, "The request broke off.")
            body, more = body + message.get("body", b""), message.get("more_body", False)
    return body


def replay(body, receive):
    "A `receive` that gives a body that has been read, and then what comes."
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def inner(): return messages.pop() if messages else await receive()
    return inner


# ---- questions ----

def check_data(fn, data):
    "The values that a function of the page is given. Errors: HTTPException."
    if not isinstance(data, list) or len(data) != len(fn.inputs):
        raise HTTPException(400, f"data should be a list of {len(fn.inputs)}.")
    return [check_value(block, value) for block, value in zip(fn.inputs, data)]


def check_value(block, value):
    if value is None: return None
    if isinstance(block, components.Image): return check_picture(value)
    if isinstance(block, components.File):
        files = value if isinstance(value, list) else [value]
        # of too many, which the page refuses in a word, no more are looked for
        checked = [check_picture(file) for file in files[:MAX_FILES]]
        return checked + checked[:1] * max(0, len(files) - MAX_FILES)
    if isinstance(block, components.Radio) and isinstance(value, str): return value
    if isinstance(block, components.Dataset) and type(value) is int and 0 <= value < len(block.samples):
        return value
    raise HTTPException(400, f"{json.dumps(value)[:50]} is no value for {block.label}.")


def check_picture(file):
    "A picture as Gradio sends it, with its path and its name alone. Errors: HTTPException."
    if not isinstance(file, dict): raise HTTPException(400, "A picture is an object with an upload's path.")
    path, name = uploaded(file.get("path")), file.get("orig_name")
    name = name[:200] if isinstance(name, str) else Path(path).name
    return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}


def uploaded(path):
    "`path`, where it is that of an upload, or of a file that the page made. Errors: HTTPException."
    try:
        inside = Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve())
        if inside and Path(path).is_file(): return path
    except (TypeError, ValueError, OSError): pass           # no path, or none that can be
    raise HTTPException(404, "That picture was not uploaded, or is not here any more: upload it again.")


# ---- pictures: what they cost is known before they are decoded ----

def work_of(data):
    "The work of decoding the pictures in a question, in pixels."
    files = [file for value in data for file in (value if isinstance(value, list) else [value])]
    paths = [file["path"] for file in files if isinstance(file, dict)]
    work = {path: picture_work(path) for path in set(paths)}
    return sum(work[path] for path in paths)


@lru_cache(1000)               # the name of the folder of an upload is a hash of its content
def picture_work(path):
    "The work of a picture: its pixels, and half of its bytes, which are read, hashed and unpacked."
    try:
        content = Path(path).read_bytes()
        return pixels_to_decode(open_picture(content), content) + len(content) / 2
    except (UserError, OSError): return 0           # it is not decoded


def open_picture(content, sz=None):
    """The bytes of an image file as a Pillow image that is not decoded yet.

    sz: the decoder of JPEG need not give many more pixels than `sz` x `sz` are made of.
    Errors: UserError for what is no image, or takes too much time or memory to decode."""
    with explained("The file", MAX_PIXELS):
        known = [name for name in FORMATS if name in formats()]         # older Pillows have no AVIF
        img = Image.open(BytesIO(content), formats=known)
        check_size(img, "The image", 1, MAX_PIXELS)
        if pixels_to_decode(img, content) > MAX_DECODED:
            size = f"{img.width:,} x {img.height:,} pixels as {img.format}"
            most = f"at most {MAX_DECODED // 10**6} million are read, of common JPEG {MAX_PIXELS // 10**6}"
            raise UserError(f"The image is too large: {size}, but {most}.")
        if sz: img.draft(None, (4 * sz, 4 * sz))
        return img


def pixels_to_decode(img, content):
    "How many pixels' time and memory it takes to decode a picture."
    n = img.width * img.height
    if img.format == "TIFF": return max(n, img.tag_v2.get(TILEWIDTH, 0) * img.tag_v2.get(TILELENGTH, 0))
    if img.format == "BMP" and img.tile[0].codec_name == "bmp_rle": return 20 * n       # in Python
    if img.format not in ("JPEG", "MPO"): return n
    # each scan goes over the whole picture; a thumbnail in it has one too
    scans = content.count(b"\xff\xda")
    draft = scans <= 8 and not img.info.get("progressive")
    return n // 16 if draft else n * max(1, scans // 16)
