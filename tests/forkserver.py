"""A Python that starts in 0.05 s instead of 10 s with fastai: it asks a server that has imported all to fork.

The tests start `python train.py` and the like as their users do. conftest.py lets `sys.executable` name a
script that runs this file. What it starts is a process of its own, with its own arguments, folder,
environment, input, output, limits and end. The real Python starts where this cannot stand for it:
with interpreter flags other than -W ignore, -u, -c, -m of MODULES, and in a folder with another sifar in it.

    python forkserver.py ADDRESS MAIN PYTHON ARGS...    what PYTHON, a script, runs: `python ARGS...`
    python forkserver.py --serve ADDRESS MAIN           the server; it ends with the process MAIN
"""

import os
import socket
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LIMITS = "RLIMIT_FSIZE", "RLIMIT_DATA"
FORWARDED = "SIGINT", "SIGTERM", "SIGHUP"
PRELOAD = (
    "fastai.vision.all",
    "timm",
    "albumentations",
    "matplotlib.pyplot",
    "gradio",
    "sifar.training.explore",
    "sifar.runs.report",
    "sifar.runs.compare",
    "sifar.share.export",
    "sifar.share.predict",
    "coverage",
)
MODULES = "sifar.", "torch.distributed.run"
MEASURED = "COVERAGE_PROCESS_CONFIG"  # set by `pytest --cov` for the processes of tests: see pyproject.toml
# variables that a library reads once, as it is imported, and what has imported that one
READ_AT_IMPORT = {"HF_": ("huggingface_hub", "gradio", "gradio_client")}


# ---- the client: imports little, as it starts often ----


def parse(args):
    "The flags of a command line that a forked process understands, else None."
    o, args = {"ignore": False, "unbuffered": False, "kind": "path"}, list(args)
    while args and args[0].startswith("-"):
        flag = args.pop(0)
        if flag == "-u":
            o["unbuffered"] = True
        elif flag == "-W" and args[:1] == ["ignore"]:
            o["ignore"] = bool(args.pop(0))
        elif flag in ("-c", "-m") and args:
            o["kind"] = flag
            break
        else:
            return None
    if not args or (o["kind"] == "-m" and not args[0].startswith(MODULES)):
        return None
    return {**o, "what": args[0], "args": args[1:]}


def has_another_sifar(o):
    "Whether the first folder of sys.path has a sifar that is not ours."
    folder = os.path.dirname(os.path.abspath(o["what"])) if o["kind"] == "path" else os.getcwd()
    path = os.path.join(folder, "sifar")
    return os.path.exists(path) and os.path.realpath(path) != os.path.join(os.path.realpath(ROOT), "sifar")


def connect(address):
    s = socket.socket(socket.AF_UNIX)
    try:
        s.connect(address)
    except OSError:
        s.close()
        return None
    return s


def connect_or_start(address, main):
    "A connection to the server, which the first that needs it starts; None where this process may not."
    import fcntl
    import resource

    if s := connect(address):
        return s
    if any(resource.getrlimit(getattr(resource, o))[0] != resource.RLIM_INFINITY for o in LIMITS):
        return None
    with open(f"{address}.log", "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        if s := connect(address):
            return s
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            *((os.POSIX_SPAWN_OPEN, fd, log.name, os.O_WRONLY | os.O_APPEND, 0) for fd in (1, 2)),
        ]
        command = [sys.executable, __file__, "--serve", address, main]
        env = {k: v for k, v in os.environ.items() if k != MEASURED}  # what it forks is measured, not itself
        pid = os.posix_spawn(command[0], command, env, file_actions=actions, setsid=True)
        while not (s := connect(address)):
            if os.waitpid(pid, os.WNOHANG)[0]:
                sys.exit(f"the fork server ended: see {log.name}")
            time.sleep(0.02)
    return s


def client(address, main, python, args):
    o = parse(args)
    s = None if o is None or has_another_sifar(o) else connect_or_start(address, main)
    if s is None:
        os.execv(sys.executable, [sys.executable, *args])
    import json
    import resource
    import signal

    o |= {
        "cwd": os.getcwd(),
        "env": dict(os.environ),
        "python": python,
        "umask": os.umask(0o22),
        "limits": [resource.getrlimit(getattr(resource, k)) for k in LIMITS],
    }
    signals = {getattr(signal, k) for k in FORWARDED}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # until it is known whom they are for
    socket.send_fds(s, [b"!"], [0, 1, 2])
    s.sendall(json.dumps(o).encode() + b"\n")
    answers = s.makefile()
    pid = int(answers.readline())

    def forward(signum, frame):
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            pass

    for k in signals:
        signal.signal(k, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    code = os.waitstatus_to_exitcode(int(answers.readline()))
    if code >= 0:
        os._exit(code)
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)


# ---- the server ----


def serve(address, main):
    "Fork for each connection. Returns only in such a process, with what it has to run."
    import select
    import signal

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener, watched = socket.socket(socket.AF_UNIX), os.pidfd_open(int(main))
    listener.bind(address)
    listener.listen(64)
    while True:
        ready, *_ = select.select([listener, watched], [], [])
        if watched in ready:
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            os.close(watched)
            return keep(connection)
        connection.close()


def keep(connection):
    "Fork once more; wait for the child's end and report it, or end the child where the client is gone."
    import json
    import select
    import signal

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, fds, *_ = socket.recv_fds(connection, 1, 3)
    with connection.makefile() as f:
        o = json.loads(f.readline())
    pid = os.fork()
    if pid == 0:
        connection.close()
        for i, fd in enumerate(fds):
            os.dup2(fd, i)
        for fd in fds:
            if fd > 2:
                os.close(fd)
        return o
    for fd in fds:
        os.close(fd)
    connection.sendall(b"%d\n" % pid)
    child = os.pidfd_open(pid)
    ready, *_ = select.select([child, connection], [], [])
    if child not in ready:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    try:
        connection.sendall(b"%d\n" % status)
    except OSError:
        pass
    os._exit(0)


def become(o):
    "Make this process what a Python that was started so would be."
    import random
    import resource
    import signal
    import warnings

    os.chdir(o["cwd"])
    os.umask(o["umask"])
    for k, limits in zip(LIMITS, o["limits"]):
        resource.setrlimit(getattr(resource, k), limits)
    forget_stale_modules(o["env"])
    os.environ.clear()
    os.environ.update(o["env"])
    if MEASURED in os.environ:
        sys.modules["coverage"].process_startup()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    unbuffered = o["unbuffered"] or bool(o["env"].get("PYTHONUNBUFFERED"))
    sys.stdin = open(0, closefd=False)
    sys.stdout = open(1, "w", buffering=1 if unbuffered or os.isatty(1) else -1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    if o["ignore"]:
        warnings.simplefilter("ignore")
    first = {"-c": "", "-m": o["cwd"], "path": os.path.dirname(os.path.abspath(o["what"]))}[o["kind"]]
    sys.path[:0] = [first, *filter(None, o["env"].get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = [o["kind"] if o["kind"] != "path" else o["what"], *o["args"]]
    sys.executable = o["python"]  # what this process starts in its turn is forked too
    random.seed()


def forget_stale_modules(env):
    "Let libraries be imported anew whose variables are not those that they were imported with."

    def of(env, prefix):
        return {k: v for k, v in env.items() if k.startswith(prefix)}

    for prefix, libraries in READ_AT_IMPORT.items():
        if of(env, prefix) == of(os.environ, prefix):
            continue
        for name in [name for name in sys.modules if name.split(".")[0] in libraries]:
            del sys.modules[name]


def run(o):
    import runpy

    if o["kind"] == "path":
        runpy.run_path(o["what"], run_name="__main__")
    elif o["kind"] == "-m":
        sys.modules.pop(o["what"], None)  # it is run anew, under another name
        runpy.run_module(o["what"], run_name="__main__", alter_sys=True)
    else:
        from types import ModuleType

        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(o["what"], "<string>", "exec"), main.__dict__)


def end(f, *args):
    "Call `f`, and end as Python does, but without freeing the memory: that takes seconds after a fork."
    import atexit
    import signal
    import threading

    code = 0
    try:
        f(*args)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    except BaseException as e:
        sys.excepthook(type(e), e, e.__traceback__)
        code = -signal.SIGINT if isinstance(e, KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for o in (sys.stdout, sys.stderr):
        o.flush()
    if code < 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 255)


def stand_in(fig, path, *args, **kwargs):
    "A white picture, as what a figure is saved as."
    from PIL import Image

    Image.new("RGB", (640, 480), "white").save(path, "png")


def preload():
    import gc
    import warnings
    from importlib import import_module

    import matplotlib

    matplotlib.use("agg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a test of warnings needs a cold start
        for name in PRELOAD:
            import_module(name)
    matplotlib.figure.Figure.savefig = stand_in
    sys.modules["torch"].set_num_threads(1)
    gc.collect()
    gc.freeze()  # else each collection in a child copies the pages of all modules


if __name__ == "__main__":
    if sys.argv[1] != "--serve":
        client(*sys.argv[1:4], sys.argv[4:])
    sys.path[0] = ROOT
    preload()
    del sys.path[0]
    request = serve(*sys.argv[2:])
    become(request)
    end(run, request)
