"""Learner files loaded so that nothing in them can run: looked at first, as a picture of inert parts, and loaded only if every part is on a list."""
import functools
import hashlib
import io
import json
import math
import pickle
import re
import warnings
import zipfile
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

from .errors import UserError

LIST = Path(__file__).with_name("safe_globals.txt")         # a test makes it anew from fresh exports, and fails where it differs
NEVER = {o[0] for o in (pickle.INST, pickle.OBJ, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEWOBJ_EX, pickle.PERSID, pickle.DICT, pickle.FROZENSET,
                        pickle.ADDITEMS, pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER)}          # opcodes in no export
PLAIN = bool, int, float, str, type(None)
DICT, LIST_OF, PARTIAL = "collections OrderedDict", "fastcore.foundation L", "functools partial"
TENSOR, OF_TYPE, PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._tensor _rebuild_from_type_v2", "torch._utils _rebuild_parameter"
ODD_LAYERS = re.compile(r"torch\.nn\.modules\.(rnn|transformer|lazy|sparse|adaptive|_functions|utils)\b|timm\.models\._features")
ZIP_NAME = re.compile(r"[^/]+/(data\.pkl|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id|data/[0-9]+)")


class Refused(pickle.UnpicklingError):
    "The file holds what no export of ours holds."


@functools.cache
def allowed(): return frozenset(o for o in LIST.read_text().splitlines() if not o.startswith("#"))


def is_layer(module, name):
    "Whether `name` is a class of layers of torch.nn or timm, in its own module: there are too many to list them."
    if not module.startswith(("torch.nn.modules.", "timm.layers.", "timm.models.")) or ODD_LAYERS.match(module): return False
    from torch import nn
    o = getattr(import_module(module), name, None)
    return isinstance(o, type) and issubclass(o, nn.Module) and o.__module__ == module


class Name:
    "A function or class that a pickle names; `o` is it."
    def __init__(self, full, o, layer): self.full, self.o, self.layer = full, o, layer


class Made:
    "What a pickle would make by a call, or of a class: nothing is made. state: what it would be filled with; items: those of an OrderedDict."
    def __init__(self, of, args=None): self.of, self.args, self.state, self.items = of, args, None, {}
    def calls(self, name): return self.args is not None and self.of.full == name


class Storage:
    "The memory of a tensor with `n` numbers."
    def __init__(self, n): self.n = n


class Inspector(pickle._Unpickler):
    """Python's own unpickler, which makes pictures of things instead of them, and then looks at each: every global, every call with what it is
    passed, and every attribute with what it holds has to be on the list.

    So an object has no method or hook of its own, and none of another kind stands where one of ours should. Layers of torch.nn and timm need
    not be listed; they hold plain values, tensors and layers only. Errors: Refused."""
    dispatch = {k: v for k, v in pickle._Unpickler.dispatch.items() if k not in NEVER}

    def __init__(self, content):
        super().__init__(io.BytesIO(content), encoding="utf-8")         # as torch does
        self.names, self.made, self.seen = {}, [], 0

    def allow(self, kind, name):
        if f"{kind} {name}" not in allowed(): raise Refused(f"it {kind}s {name}")

    def need(self, ok, what):
        if not ok: raise Refused(what)

    def find_class(self, module, name):
        if module == "pathlib._local": module = "pathlib"       # of Python 3.13
        if (module, name) == ("pathlib", "WindowsPath"): name = "PosixPath"
        full = f"{module} {name}"
        self.need("." not in name, f"it uses {full}")
        if full not in self.names:
            layer, storage = is_layer(module, name), module in ("torch", "torch.storage") and name.endswith("Storage")
            if not layer and not storage: self.allow("use", full)
            self.names[full] = Name(full, Storage if storage else super().find_class(module, name), layer)
        return self.names[full]

    def make(self, of, args=None):
        self.need(type(of) is Name, "it calls or makes something that it does not name")
        self.made.append(Made(of, args))
        self.stack[-2:] = [self.made[-1]]

    def load_reduce(self):
        self.need(type(self.stack[-1]) is tuple, "it calls something as no pickle does")
        self.make(*self.stack[-2:])
    dispatch[pickle.REDUCE[0]] = load_reduce

    def load_newobj(self):
        self.need(self.stack[-1] == () and type(self.stack[-1]) is tuple, "it makes something with arguments")
        self.make(self.stack[-2])
    dispatch[pickle.NEWOBJ[0]] = load_newobj

    def load_build(self):
        state, o = self.stack.pop(), self.stack[-1]
        self.need(type(o) is Made and o.state is None, "it fills something that it did not make, or twice")
        o.state = state
    dispatch[pickle.BUILD[0]] = load_build

    def load_setitems(self):
        items = self.pop_mark()
        self.set_items(self.stack[-1], items)
    dispatch[pickle.SETITEMS[0]] = load_setitems

    def load_setitem(self):
        items = [self.stack.pop(), self.stack.pop()][::-1]
        self.set_items(self.stack[-1], items)
    dispatch[pickle.SETITEM[0]] = load_setitem

    def set_items(self, o, items):
        found = o.items if type(o) is Made and o.calls(DICT) else o
        self.need(type(found) is dict, "it sets items of something else than a dictionary")
        for k, v in zip(items[::2], items[1::2]):
            self.need(type(k) in (str, int, float, type(None), Name), f"it has a dictionary with a key of type {type(k).__name__}")
            self.need(k not in found, "it sets an item twice")          # the first may have been used by now
            found[k] = v

    def load_appends(self):
        items = self.pop_mark()
        self.need(type(self.stack[-1]) is list, "it appends to something else than a list")
        self.stack[-1].extend(items)
    dispatch[pickle.APPENDS[0]] = load_appends

    def load_append(self):
        item = self.stack.pop()
        self.need(type(self.stack[-1]) is list, "it appends to something else than a list")
        self.stack[-1].append(item)
    dispatch[pickle.APPEND[0]] = load_append

    def load_binpersid(self):
        pid = self.stack[-1]
        self.need(type(pid) is tuple and [type(o) for o in pid] == [str, Name, str, str, int] and pid[1].o is Storage and pid[2].isdigit() and pid[4] >= 0, "it has an odd tensor")
        self.stack[-1] = Storage(pid[4])
    dispatch[pickle.BINPERSID[0]] = load_binpersid

    def load(self):
        "Look at the whole pickle; returns nothing."
        root = super().load()
        for o in self.made: self.check_call(o) if o.args is not None else self.check_object(o)
        state = type(root) is Made and root.of.full == "fastai.learner Learner" and root.state or {}
        model, dls = state.get("model"), state.get("dls")
        self.need(is_made_layer(model) and type(dls) is Made and dls.of.full == "fastai.data.core DataLoaders", "it holds no learner")
        self.need(layers_in(model) < 100_000, "it has more layers than any model")

    def parts(self, o):
        "What a value consists of but for plain values and tensors, each with the kind of container that it is in."
        todo, opened = [(o, "")], set()
        while todo:
            o, where = todo.pop()
            self.seen += 1
            self.need(self.seen < 5_000_000, "it is more entangled than any learner")
            if type(o) in (list, tuple, dict) or type(o) is Made and o.of.full in (DICT, LIST_OF):
                if id(o) not in opened: todo += [(i, f" in {o.of.full.split()[1] if type(o) is Made else type(o).__name__}") for i in contents(o)]
                opened.add(id(o))
            elif type(o) is Name: yield f"{o.full} itself{where}"
            elif type(o) is Storage: yield f"storage{where}"
            elif type(o) is Made and not is_tensor(o): yield ("layer" if is_made_layer(o) else o.of.full) + where
            elif type(o) is not Made and type(o) not in PLAIN: yield type(o).__name__ + where

    def check_parts(self, kind, name, o):
        for part in set(self.parts(o)): self.allow(kind, f"{name} {part}")

    def check_call(self, o):
        name, args, state = o.of.full, o.args, o.state
        self.allow("call", name)
        if name == PARTIAL:
            self.need(type(state) is tuple and len(state) == 4 and len(args) == 1 and type(args[0]) is Name and state[0] is args[0], "it has an odd partial")
            self.allow("wrap", args[0].full)
            return self.check_parts("bind", args[0].full, state[1:])
        self.check_parts("pass", name, args)
        if name in (TENSOR, OF_TYPE, PARAMETER): ok = state is None and is_tensor(o)
        elif name == "__builtin__ getattr":
            ok = state is None and len(args) == 2 and type(args[0]) is Made and type(args[1]) is str
            if ok: self.allow("take", f"{args[0].of.full} {args[1]}")
        elif name == "__builtin__ set": ok = state is None and len(args) == 1 and type(args[0]) is list and all(type(i) in (str, int) for i in args[0])
        elif name in (DICT, "random Random"): ok = args == () and (state is None if name == DICT else is_random_state(state))
        elif name == "inspect Signature": ok = len(args) == 1 and type(args[0]) is tuple and is_fields(state)
        elif name == "inspect Parameter": ok = len(args) == 2 and type(args[0]) is str and is_fields(state)
        else: ok = state is None and all(type(i) in (str, int) for i in args)
        self.need(ok, f"it calls {name} as no learner does")
        if type(state) is dict: self.check_fields(name, state)

    def check_object(self, o):
        name, state = o.of.full, {} if o.state is None else o.state
        if not o.of.layer: self.allow("make", name)
        self.need(is_fields(state), f"it fills {name} as no learner does")
        for k in state:
            if callable(getattr(o.of.o, k, None)) or k.startswith("__") and k != "__signature__": self.allow("replace", f"{name} {k}")
        if is_made_layer(o): self.check_layer(state)
        else: self.check_fields(name, state)

    def check_fields(self, name, state):
        for k, v in state.items(): self.check_parts("hold", f"{name} {k},", v)

    def check_layer(self, state):
        for k, good in ("_modules", is_made_layer), ("_parameters", is_tensor), ("_buffers", is_tensor):
            found = state.get(k)
            self.need(type(found) is dict or type(found) is Made and found.calls(DICT), "it has a layer without its parts")
            self.need(all(v is None or good(v) for v in contents(found)), "it has something else than layers and tensors in a layer")
        for k, v in state.items():
            if k in ("_modules", "_parameters", "_buffers"): continue
            if k.endswith("_hooks"): self.need(v == {} if type(v) is dict else is_empty(v), "it has hooks on a layer")
            else: self.check_parts("hold", "in a layer", v)


def contents(o):
    "What is in a picture of a container, names that are keys too."
    if type(o) is Made: o = o.items if o.calls(DICT) else o.state if type(o.state) is dict else {}
    return [*(k for k in o if type(k) is Name), *o.values()] if type(o) is dict else list(o) if type(o) in (list, tuple) else []


def is_fields(state): return type(state) is dict and all(type(k) is str for k in state)


def is_random_state(state):
    return (type(state) is tuple and len(state) == 3 and state[0] == 3 and type(state[1]) is tuple and len(state[1]) == 625
            and all(type(i) is int for i in state[1]) and type(state[2]) in (float, type(None)))


def is_made_layer(o):
    if type(o) is not Made or o.args is not None: return False
    from torch import nn
    return isinstance(o.of.o, type) and issubclass(o.of.o, nn.Module)


def is_tensor(o):
    "Whether a picture shows a tensor that is no larger than its memory, without hooks."
    if type(o) is not Made or o.args is None: return False
    args, name = o.args, o.of.full
    if name == TENSOR: return is_tensor_args(args)
    if name == OF_TYPE: return len(args) == 4 and all(type(i) is Name for i in args[:2]) and args[0].full == TENSOR and type(args[2]) is tuple and is_tensor_args(args[2])
    return name == PARAMETER and len(args) == 3 and is_tensor(args[0]) and type(args[1]) is bool and is_empty(args[2])


def is_tensor_args(args):
    if len(args) != 6: return False
    storage, offset, size, stride, grad, hooks = args
    sizes = type(size) is tuple and type(stride) is tuple and all(type(i) is int and i >= 0 for i in (*size, *stride))
    return sizes and type(storage) is Storage and type(offset) is int and type(grad) is bool and is_empty(hooks) and math.prod(size) <= storage.n


def is_empty(o): return type(o) is Made and o.calls(DICT) and not o.items


def layers_in(model):
    "How many layers a forward pass meets, those that stand in several places each time. Errors: Refused for one that lies in itself."
    counts: dict[int, int | None] = {}
    path = [(model, False)]
    while path:
        o, inner_known = path.pop()
        if id(o) in counts and not inner_known: continue
        found = [i for i in contents(o.state["_modules"]) if i is not None]
        if inner_known: counts[id(o)] = 1 + sum(counts[id(i)] for i in found)
        else:
            counts[id(o)] = None
            if any(counts.get(id(i), 0) is None for i in found): raise Refused("it has a layer in itself")
            path += [(o, True), *((i, False) for i in found)]
    return counts[id(model)]


class SafeUnpickler(pickle._Unpickler):
    "Python's own unpickler for pickles that an Inspector has looked at. Errors: Refused."
    inspector = Inspector

    def __init__(self, file, **kwargs):
        content = file.read()
        try: self.inspector(content).load()
        except ImportError as e: raise pickle.UnpicklingError(str(e)) from e          # which fastai would swallow
        super().__init__(io.BytesIO(content), **kwargs)

    def find_class(self, module, name): return Path if module in ("pathlib", "pathlib._local") else super().find_class(module, name)


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
    except Exception as e:
        why = "".join(o if o.isprintable() else " " for o in str(e))[:200]          # what the file says itself has no control of the terminal
        if isinstance(e, Refused): raise UserError(f"{path} is not safe to load: {why}, which no learner of ours needs. Nothing in it was run.") from e
        raise UserError(f"{path} is damaged, or of another version of sifar ({type(e).__name__}: {why}): export it again.") from e


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

    It has one pickle and nothing that torch.save does not write, and is not compressed, so that it cannot unpack to more than it is. Errors: UserError."""
    try:
        file = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
            files = {m[1]: o for o in old.infolist() if (m := ZIP_NAME.fullmatch(o.filename))}
            sizes = [o.file_size for o in old.infolist()]
            if "data.pkl" not in files or len(files) < len(sizes) or sum(sizes) > len(content) or any(o.compress_type for o in files.values()):
                raise UserError(f"{path} is a zip file, but holds no learner: make one with python export.py RUN.")
            for k, o in files.items(): new.writestr(zipfile.ZipInfo(f"learner/{k}"), old.read(o))
    except UserError: raise
    except Exception as e: raise UserError(f"{path} is no learner file, or a damaged one: make one with python export.py RUN.") from e
    file.seek(0)
    return file
