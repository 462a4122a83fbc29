"""Learner files loaded so that nothing in them can run: only names that our own exports need, used only as they use them."""
import functools
import hashlib
import io
import json
import pickle
import warnings
import zipfile
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

from .errors import UserError

LIST = Path(__file__).with_name("safe_globals.txt")         # a test makes it anew from fresh exports, and fails where it differs
NEVER = pickle.INST, pickle.OBJ, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEWOBJ_EX, pickle.PERSID       # in no export


class Refused(pickle.UnpicklingError):
    "The file holds what no export of ours holds."


@functools.cache
def allowed(): return frozenset(o for o in LIST.read_text().splitlines() if not o.startswith("#"))


def is_layer(module, name):
    "Whether `name` is a class of layers of torch.nn or timm, in its own module: there are too many to list them."
    if not module.startswith(("torch.nn.modules.", "timm.")): return False
    from torch import nn
    o = getattr(import_module(module), name, None)
    return isinstance(o, type) and issubclass(o, nn.Module) and o.__module__ == module


class SafeUnpickler(pickle._Unpickler):
    """Python's own unpickler, in which each global, call and attribute has to be on the list, and only instances of listed classes are filled.

    Layers of torch.nn and timm need not be listed: they may be filled, but not called. Errors: Refused, before anything was called."""
    dispatch = {k: v for k, v in pickle._Unpickler.dispatch.items() if k not in {o[0] for o in NEVER}}

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.found = {}                     # id -> (name, object) of what find_class gave

    def allow(self, kind, name):
        if f"{kind} {name}" not in allowed(): raise Refused(f"it {kind}s {name}")

    def find_class(self, module, name):
        if "." in name: raise Refused(f"it uses {module} {name}")
        if not is_layer(module, name): self.allow("use", f"{module} {name}")
        o = Path if name in ("PosixPath", "WindowsPath") else super().find_class(module, name)
        self.found[id(o)] = f"{module} {name}", o
        return o

    def name_of(self, o):
        if id(o) not in self.found: raise Refused(f"it uses an object of type {type(o).__name__} as no learner does")
        return self.found[id(o)][0]

    def load_reduce(self):
        func, args = self.stack[-2:]
        self.allow("call", self.name_of(func))
        if func.__name__ == "_rebuild_from_type_v2": self.allow("call", self.name_of(args[0]))         # which this calls in turn
        if func is getattr: self.allow("take", f"{self.name_of(type(args[0]))} {' '.join(map(str, args[1:]))}")
        super().load_reduce()
    dispatch[pickle.REDUCE[0]] = load_reduce

    def load_newobj(self):
        self.name_of(self.stack[-2])
        super().load_newobj()
    dispatch[pickle.NEWOBJ[0]] = load_newobj

    def load_build(self):
        self.name_of(type(self.stack[-2]))
        super().load_build()
    dispatch[pickle.BUILD[0]] = load_build


def load_learner(path, cpu=True, unpickler=SafeUnpickler):
    """fastai's load_learner for the learner.pkl that export.py wrote, at `path` or in the folder `path`; nothing in the file can run.

    Errors: UserError for a file that is missing, damaged, no learner, or not the one that the model.json beside it describes."""
    path = Path(path)
    if path.is_dir(): path = path / "learner.pkl"
    if not path.is_file(): raise UserError(f"{path} is missing: make it with python export.py RUN.")
    content = path.read_bytes()                                 # what is checked is what is loaded
    check_sum(path, content)
    check_zip(path, content)
    from fastai import learner
    module = SimpleNamespace(Unpickler=unpickler, load=lambda f, **k: unpickler(f, **k).load(), __name__="pickle")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="load_learner.*insecure")         # not this unpickler
            learn = learner.load_learner(io.BytesIO(content), cpu, module)
    except Refused as e: raise UserError(f"{path} is not safe to load: {e}, which no learner of ours needs. Nothing in it was run.") from e
    except Exception as e: raise UserError(f"{path} is damaged, or of another version of sifar ({type(e).__name__}: {' '.join(str(e).split())[:100]}): export it again.") from e
    if not isinstance(learn, learner.Learner): raise UserError(f"{path} holds no learner, but a {type(learn).__name__}: make one with python export.py RUN.")
    return learn


def check_sum(path, content):
    "Compare with the SHA-256 in the model.json beside it, where there is one."
    about = path.with_name("model.json")
    if not about.is_file(): return
    try: wanted = json.loads(about.read_text())["sha256"]
    except (ValueError, KeyError, TypeError) as e: raise UserError(f"{about} is damaged: export the run again, or delete it.") from e
    if hashlib.sha256(content).hexdigest() != wanted:
        raise UserError(f"{path} is not the file that {about} describes (its SHA-256 differs): it was altered or belongs to another export.")


def check_zip(path, content):
    "Whether torch.save wrote it: a zip with one pickle, uncompressed, so that it cannot unpack to more than it is."
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as z: files = z.infolist()
    except zipfile.BadZipFile as e: raise UserError(f"{path} is no learner file, or a damaged one: make one with python export.py RUN.") from e
    pickles = [o for o in files if o.filename.endswith(".pkl")]
    if len(pickles) != 1 or not pickles[0].filename.endswith("/data.pkl") or any(o.compress_type for o in files):
        raise UserError(f"{path} is a zip file, but holds no learner: make one with python export.py RUN.")
