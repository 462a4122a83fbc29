"""Learner files loaded so that nothing in them can run: only names that our own exports need, used only as they use them."""
import functools
import hashlib
import io
import json
import pickle
import warnings
import zipfile
from collections import OrderedDict
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

from .errors import UserError

LIST = Path(__file__).with_name("safe_globals.txt")         # a test makes it anew from fresh exports, and fails where it differs
NEVER = {o[0] for o in (pickle.INST, pickle.OBJ, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEWOBJ_EX, pickle.PERSID, pickle.DICT, pickle.FROZENSET,
                        pickle.ADDITEMS)}                   # opcodes in no export


class Refused(pickle.UnpicklingError):
    "The file holds what no export of ours holds."


@functools.cache
def allowed(): return frozenset(o for o in LIST.read_text().splitlines() if not o.startswith("#"))


def is_layer(module, name):
    "Whether `name` is a class of layers of torch.nn or timm, in its own module: there are too many to list them."
    if not module.startswith(("torch.nn.modules.", "timm.layers.", "timm.models.")): return False
    from torch import nn
    o = getattr(import_module(module), name, None)
    return isinstance(o, type) and issubclass(o, nn.Module) and o.__module__ == module


def filling(load, at_mark, n, *types):
    "The opcode `load`, which fills the container below the last `n` objects or the last mark, for `types` only: others have methods of their own for it."
    def check_and_load(self):
        stack = self.metastack[-1] if at_mark else self.stack[:-n]
        if not stack or type(stack[-1]) not in types: raise Refused("it fills something else than a list or a dictionary")
        if list not in types:
            for k in self.stack[::2] if at_mark else self.stack[-2:-1]: self.check_key(k)
        load(self)
    return check_and_load


class SafeUnpickler(pickle._Unpickler):
    """Python's own unpickler, in which each global, each call with what is passed to it, and each attribute with what it holds has to be on the list.

    So an object has no method or hook of its own, and none of another kind stands where one of ours should. Layers of torch.nn and timm need
    not be listed, but may not be called, and hold plain values, tensors and layers only. Errors: Refused."""
    dispatch = {k: v for k, v in pickle._Unpickler.dispatch.items() if k not in NEVER}

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.found = {}                     # id -> (name, object) of what find_class gave
        self.made = []
        self.seen = 0
        self.stand_ins = {"__builtin__ getattr": self.getattr, "torch._tensor _rebuild_from_type_v2": rebuild_from_type}

    def allow(self, kind, name):
        if f"{kind} {name}" not in allowed(): raise Refused(f"it {kind}s {name}")

    def find_class(self, module, name):
        full = f"{module} {name}"
        if "." in name: raise Refused(f"it uses {full}")
        if not is_layer(module, name): self.allow("use", full)
        o = self.stand_ins.get(full) or (Path if name in ("PosixPath", "WindowsPath") else super().find_class(module, name))
        self.found[id(o)] = full, o
        return o

    def name_of(self, o):
        if id(o) not in self.found: raise Refused(f"it uses an object of type {type(o).__name__} as no learner does")
        return self.found[id(o)][0]

    def getattr(self, o, name):
        "The few attributes that our exports take of a listed object."
        self.allow("take", f"{self.name_of(type(o))} {name}")
        return getattr(o, name)

    def load_reduce(self):
        func, args = self.stack[-2:]
        self.allow("call", self.name_of(func))
        if type(args) is not tuple: raise Refused("it calls something as no pickle does")
        for o in set(self.parts(args)): self.allow("pass", f"{self.name_of(func)} {o}")
        if func is set and type(args[0]) is not list: raise Refused("it makes a set of something else than a list")
        super().load_reduce()
        if func != self.getattr: self.made.append(self.stack[-1])
    dispatch[pickle.REDUCE[0]] = load_reduce

    def load_newobj(self):
        cls, args = self.stack[-2:]
        name = self.name_of(cls)
        if not is_layer(*name.split()): self.allow("make", name)
        if args: raise Refused(f"it makes {name} with arguments")
        super().load_newobj()
        self.made.append(self.stack[-1])
    dispatch[pickle.NEWOBJ[0]] = load_newobj

    def load_build(self):
        o, state = self.stack[-2:]
        self.name_of(type(o))
        if "__setstate__" in getattr(o, "__dict__", ()): raise Refused("it has a __setstate__ of its own")
        if type(state) is not dict and not hasattr(type(o), "__setstate__"): raise Refused("it sets attributes as no learner does")
        super().load_build()
    dispatch[pickle.BUILD[0]] = load_build

    def check_key(self, k):
        "The key of a dictionary is plain, as a deep one can take for ever, or more stack than there is."
        if not isinstance(k, (str, int, float, type, type(None))): raise Refused(f"it has a dictionary with a key of type {type(k).__name__}")

    dispatch[pickle.SETITEMS[0]] = filling(pickle._Unpickler.load_setitems, True, 0, dict, OrderedDict)
    dispatch[pickle.SETITEM[0]] = filling(pickle._Unpickler.load_setitem, False, 2, dict, OrderedDict)
    dispatch[pickle.APPENDS[0]] = filling(pickle._Unpickler.load_appends, True, 0, list)
    dispatch[pickle.APPEND[0]] = filling(pickle._Unpickler.load_append, False, 1, list)

    def load_binpersid(self):
        pid = self.stack[-1]
        if not (type(pid) is tuple and len(pid) == 5 and all(isinstance(pid[i], str) for i in (0, 2, 3)) and isinstance(pid[4], int)): raise Refused("it has an odd tensor")
        super().load_binpersid()
    dispatch[pickle.BINPERSID[0]] = load_binpersid

    def load(self):
        "The learner in the file, when all that was made on the way is found to be harmless."
        from fastai.learner import DataLoaders, Learner
        from torch import nn
        res = super().load()
        for o in self.made: self.check(o)
        if not (isinstance(res, Learner) and isinstance(res.dls, DataLoaders) and isinstance(res.model, nn.Module)): raise Refused("it holds no learner")
        return res

    def parts(self, o):
        "What a value consists of but for plain values and tensors, with containers opened: names of types, and of functions and classes themselves."
        import torch
        from fastcore.foundation import L
        todo, opened = [o], set()
        while todo:
            o = todo.pop()
            self.seen += 1
            if self.seen > 5_000_000: raise Refused("it is more entangled than any learner")
            if type(o) in (list, tuple, set, dict, OrderedDict, L):
                if id(o) not in opened: todo += o.values() if isinstance(o, dict) else vars(o).values() if type(o) is L else o
                opened.add(id(o))
            elif isinstance(o, (bool, int, float, str, type(None), torch.Tensor)): continue
            elif id(o) in self.found: yield self.found[id(o)][0]
            elif isinstance(o, torch.nn.Module): yield "layer"
            else: yield f"{type(o).__module__} {type(o).__name__}"

    def check(self, o):
        import torch
        if isinstance(o, functools.partial):
            self.allow("wrap", self.name_of(o.func))
            for part in set(self.parts((o.args, o.keywords, o.__dict__))): self.allow("bind", f"{self.name_of(o.func)} {part}")
        if isinstance(o, torch.Tensor) and (o._backward_hooks or getattr(o, "_post_accumulate_grad_hooks", None)): raise Refused("it has hooks on a tensor")
        if isinstance(o, torch.Tensor) and o.numel() * o.element_size() > o.untyped_storage().nbytes(): raise Refused("it has a tensor larger than its data")
        state = getattr(o, "__dict__", {})
        for k in state:
            if callable(getattr(type(o), k, None)) or k == "__setstate__": self.allow("replace", f"{self.name_of(type(o))} {k}")
        layer = isinstance(o, torch.nn.Module)
        for k, v in state.items():
            if layer and k in ("_modules", "_parameters", "_buffers"): continue
            for part in set(self.parts(v)): self.allow("hold", f"{part} in a layer" if layer else f"{self.name_of(type(o))} {k}, {part}")
        if not layer: return
        if any(v for k, v in state.items() if k.endswith("_hooks")): raise Refused("it has hooks on a layer")
        for k, kind in ("_modules", torch.nn.Module), ("_parameters", torch.Tensor), ("_buffers", torch.Tensor):
            if not all(v is None or isinstance(v, kind) for v in state[k].values()): raise Refused("it has something else than layers and tensors in a layer")


def rebuild_from_type(func, new_type, args, state):
    "torch's function of this name, which would call any `func`, for tensors only."
    import torch
    if func is not torch._utils._rebuild_tensor_v2 or not issubclass(new_type, torch.Tensor): raise Refused("it rebuilds a tensor as no learner does")
    return func(*args).as_subclass(new_type)


def load_learner(path, cpu=True, unpickler=SafeUnpickler):
    """fastai's load_learner for the learner.pkl that export.py wrote, at `path` or in the folder `path`; nothing in the file can run.

    Errors: UserError for a file that is missing, damaged, no learner, or not the one that the model.json beside it describes."""
    path = Path(path)
    if path.is_dir(): path = path / "learner.pkl"
    if not path.is_file(): raise UserError(f"{path} is missing: make it with python export.py RUN.")
    content = path.read_bytes()                                 # what is checked is what is loaded
    check_sum(path, content)
    file = rewrite_zip(path, content)
    from fastai import learner
    module = SimpleNamespace(Unpickler=unpickler, __name__="pickle")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="load_learner.*insecure")         # not this unpickler
            return learner.load_learner(file, cpu, module)
    except Refused as e: raise UserError(f"{path} is not safe to load: {e}, which no learner of ours needs. Nothing in it was run.") from e
    except Exception as e:
        why = f"{type(e).__name__}: {' '.join(str(e).split())[:100]}"
        raise UserError(f"{path} is damaged, or of another version of sifar ({why}): export it again.") from e


def check_sum(path, content):
    "Compare with the SHA-256 in the model.json beside it, where there is one."
    about = path.with_name("model.json")
    if not about.is_file(): return
    try: wanted = json.loads(about.read_text())["sha256"]
    except Exception as e: raise UserError(f"{about} is damaged: export the run again, or delete it.") from e
    if hashlib.sha256(content).hexdigest() != wanted:
        raise UserError(f"{path} is not the file that {about} describes (its SHA-256 differs): it was altered or belongs to another export.")


def rewrite_zip(path, content):
    """The zip file that torch.save wrote, written anew: what torch reads is then just what was looked at here.

    It has one pickle, and nothing in it is compressed, so that it cannot unpack to more than it is. Errors: UserError."""
    try:
        file = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
            files = old.infolist()
            if [Path(o.filename).name for o in files if o.filename.endswith(".pkl")] != ["data.pkl"] or any(o.compress_type for o in files):
                raise UserError(f"{path} is a zip file, but holds no learner: make one with python export.py RUN.")
            for o in files: new.writestr(zipfile.ZipInfo(o.filename), old.read(o))
    except UserError: raise
    except Exception as e: raise UserError(f"{path} is no learner file, or a damaged one: make one with python export.py RUN.") from e
    file.seek(0)
    return file
