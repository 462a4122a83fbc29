"""A learner file is a recipe, which is JSON, and weights, which are safetensors: written by learn.export(), read without an unpickler.

A stranger may have written it, so all of it is checked here: the form of the file, then the recipe, then whether the weights are just
those of the model that the recipe names. Only then is that model made."""
import copy
import hashlib
import io
import json
import pickle
import re
import struct
import threading
import zipfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from fastai.data.transforms import Normalize
from fastai.learner import Learner
from fastai.losses import LabelSmoothingCrossEntropy
from fastai.metrics import accuracy, top_k_accuracy
from fastai.torch_core import rank_distrib
from fastcore.all import first
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch.nn.modules.module import register_module_parameter_registration_hook

from .dataloaders import ReadImage, empty_dls
from .errors import UserError
from .files import write_file
from .models import get_model

FORMAT = 1                              # of the recipe; a change that older versions cannot read makes it 2
FIELDS = {"format", "arch", "size", "classes", "superclasses", "mean", "std"}
MAX_JSON = 2**20                        # bytes; Python's objects for it may take 50 times as much
MAX_CLASSES, MAX_NAME = 100_000, 255
DTYPES = {torch.float32: "F32", torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL"}        # as safetensors calls them

MEMBERS = {"data.pkl", "data/0", "byteorder", "version", ".data/serialization_id"}      # what torch.save writes
SINCE_TORCH_2_7 = {".format_version", ".storage_alignment"}
OLD = b"\x80\x02cfastai.learner\nLearner\n"                                             # so begins a file of sifar 0.1
BEFORE_TEXT = b"\x80\x02c%b\nrestore\nq\0X" % __name__.encode()


class RecipeLearner(Learner):
    "fastai's Learner for the model `arch`; what `export` writes of it is the recipe to make it again, and its weights."

    def __init__(self, dls, model, arch, **kwargs):
        super().__init__(dls, model, **kwargs)
        self.arch = arch

    def __reduce_ex__(self, protocol): return restore, take_apart(self)

    def __deepcopy__(self, memo):
        "A copy of all that it has, its data too: not what a file would hold."
        new = memo[id(self)] = object.__new__(type(self))
        vars(new).update(copy.deepcopy(self.__getstate__(), memo))
        return new

    def export(self, fname="export.pkl", pickle_module=pickle, pickle_protocol=2):
        """As fastai's export, but the file is whole or not there, and the learner stays as it is.

        Errors: UserError where the model or its data are not what the recipe would make again."""
        if rank_distrib(): return               # of several processes the first writes
        if pickle_protocol != 2: raise UserError(f"export writes pickle_protocol=2, fastai's default, not {pickle_protocol}: leave it out.")
        file = io.BytesIO()
        torch.save(self, file, pickle_module, pickle_protocol)
        write_file(self.path / fname, file.getbuffer())


def need(ok, what):
    "Raise a UserError that says `what` is wrong, unless `ok`."
    if not ok: raise UserError(what)


# ---- from a learner ----

def take_apart(learn):
    "The recipe of `learn`, JSON text, and its weights, a safetensors file as a uint8 tensor. Errors: UserError for what was changed by hand."
    try:
        recipe = get_recipe(learn)
        check_recipe(recipe)
        check_view(learn, recipe)
        wanted = plan(recipe)
        need(repr(learn.model) == repr(wanted), f"its model is not the {recipe['arch']} that its settings make: it was changed by hand")
        state = {k: v.detach().cpu().contiguous().clone() for k, v in learn.model.state_dict().items()}        # clone: nothing is shared
        need(shapes(state) == shapes(wanted.state_dict()), f"its weights are not those of a {recipe['arch']}: they were changed by hand")
    except UserError as e: raise UserError(f"This learner cannot be exported: {e.text}. (torch.save(learn.model.state_dict(), FILE) keeps the weights alone.)") from e
    return json.dumps(recipe), torch.frombuffer(bytearray(save(state)), dtype=torch.uint8)


def get_recipe(learn):
    "What it takes to make `learn` again but its weights, as a dictionary of plain values."
    dl = learn.dls.valid
    reader = first(o for o in getattr(dl.dataset, "tls", [[]])[0].tfms if isinstance(o, ReadImage))
    normalize = first(o for o in dl.after_batch.fs if isinstance(o, Normalize))
    need(reader and normalize, "its data is not of get_dls")
    return {"format": FORMAT, "arch": learn.arch, "size": reader.sz, "classes": list(learn.dls.vocab), "superclasses": reader.data.superclasses,
            "mean": normalize.mean.flatten().tolist(), "std": normalize.std.flatten().tolist()}


def check_view(learn, recipe):
    "Raise a UserError where the model of `learn` sees something else of a picture than the recipe says: other transforms stand in its data."
    sz = recipe["size"]
    image = np.random.default_rng(0).integers(0, 256, (sz, sz, 3), dtype=np.uint8)
    x, = learn.dls.test_dl([image], rm_type_tfms=0, num_workers=0).one_batch()
    mean, std = (torch.tensor(recipe[o]).view(3, 1, 1) for o in ("mean", "std"))
    want = (torch.from_numpy(image).permute(2, 0, 1) / 255 - mean) / std
    same = x.shape == (1, 3, sz, sz) and torch.allclose(x[0].cpu().as_subclass(torch.Tensor), want, atol=1e-4)
    need(same, "its data has other transforms than get_dls gives it")


# ---- to a learner ----

def restore(text, weights):
    "The learner that `take_apart` took apart; pickle calls it, with whatever a stranger's file holds. Errors: UserError."
    try: return build(text, weights)
    except UserError as e: raise UserError(f"The learner file is refused: {e.text}.") from e


def build(text, weights):
    recipe = read_json(text)
    check_recipe(recipe)
    tensors = read_weights(weights, recipe)
    arch, sz, vocab = recipe["arch"], recipe["size"], recipe["classes"]
    model = get_model(arch, len(vocab), (sz,)).to(weights.device)
    model.load_state_dict(tensors)
    dls = empty_dls(sz, vocab, recipe["superclasses"], (recipe["mean"], recipe["std"])).to(weights.device)
    return RecipeLearner(dls, model.eval(), arch, loss_func=LabelSmoothingCrossEntropy(eps=0.1),
                         metrics=[accuracy, partial(top_k_accuracy, k=min(5, len(vocab)))])


def read_json(text, most=MAX_JSON):
    "What a JSON text of a stranger says. Errors: UserError, also for duplicate keys and for numbers that no recipe needs."
    def number(kind, digits):
        if len(digits) > 40: raise ValueError("a number is too long")
        return kind(digits)

    def unique(pairs):
        if len(dict(pairs)) < len(pairs): raise ValueError("a key is there twice")
        return dict(pairs)

    def constant(name): raise ValueError(f"{name} is no number")
    need(type(text) is str and len(text) <= most, "its JSON is too large, or no text")
    try: return json.loads(text, object_pairs_hook=unique, parse_constant=constant, parse_int=partial(number, int), parse_float=partial(number, float))
    except (ValueError, RecursionError) as e: raise UserError("it holds damaged JSON") from e


def check_recipe(recipe):
    "Raise a UserError unless every field of `recipe` is of its type and within its bounds."
    need(type(recipe) is dict, "its recipe is none")
    form = recipe.get("format")
    need(not (type(form) is int and form > FORMAT), "it is of a newer version of sifar: update sifar")
    need(type(form) is int and form == FORMAT and recipe.keys() == FIELDS, "its recipe has other fields than a recipe has")
    arch, sz, vocab, superclasses = (recipe[o] for o in ("arch", "size", "classes", "superclasses"))
    need(type(arch) is str and re.fullmatch(r"(timm:)?[A-Za-z0-9_.-]{1,100}", arch), "its architecture has no name of one")
    need(type(sz) is int and 8 <= sz <= 512, "its image size is not from 8 to 512 pixels")
    need(are_names(vocab) and len(set(vocab)) == len(vocab), "its class names are no list of different names, in plain characters")
    need(superclasses is None or are_names(superclasses) and len(superclasses) == len(vocab), "its superclasses are no list of a name for each class")
    for key, low in ("mean", 0), ("std", 1e-6):
        o = recipe[key]
        need(type(o) is list and len(o) == 3 and all(type(v) is float and low <= v <= 1 for v in o), f"its {key} is not three numbers from {low} to 1")


def are_names(o):
    "Whether `o` is a list of short texts without line breaks, controls or marks that turn the direction of writing."
    if type(o) is not list or not 1 <= len(o) <= MAX_CLASSES: return False
    return all(type(v) is str and 1 <= len(v) <= MAX_NAME and v.isprintable() for v in o)


def plan(recipe):
    "The model of a recipe on the device meta: it has shapes, but takes no memory. Errors: UserError."
    n, sz = len(recipe["classes"]), recipe["size"]
    with torch.device("meta"):
        model = get_model(recipe["arch"], n, (sz,)).eval()
        y = model(torch.zeros(2, 3, sz, sz))
    need(isinstance(y, torch.Tensor) and y.shape == (2, n), f"{recipe['arch']} is no classifier")
    return model


def shapes(state):
    "What a safetensors header says of tensors by name, but where they lie."
    return {k: (DTYPES.get(v.dtype), list(v.shape)) for k, v in state.items()}


def read_weights(weights, recipe):
    "The tensors of a safetensors file, a uint8 tensor, by name. Errors: UserError unless they are just those of the model, before they take memory."
    ok = isinstance(weights, torch.Tensor) and weights.dtype == torch.uint8 and weights.ndim == 1
    need(ok, "its weights are no safetensors file")
    content = weights.cpu().numpy().tobytes()
    size = int.from_bytes(content[:8], "little")
    need(size <= min(MAX_JSON, len(content) - 8), "its weights are no safetensors file")
    header = read_json(content[8:8 + size].decode(errors="replace"))
    need(type(header) is dict and all(type(o) is dict for o in header.values()), "its weights are no safetensors file")
    with limit_parameters(2 * len(header), len(content) // 2): wanted = shapes(plan(recipe).state_dict())
    found = {k: (o.get("dtype"), o.get("shape")) for k, o in header.items()}
    need(found == wanted, "its weights are not those of the architecture that it names")
    try: return load(content)
    except SafetensorError as e: raise UserError("its weights are damaged") from e


@contextmanager
def limit_parameters(tensors, numbers):
    """Let no model be made, in this thread, that has more parameters than this, or far more layers: a UserError ends that early.

    Even without memory, the layers of a large model take seconds. Some models make layers that they then replace."""
    left, thread = [tensors + 50, numbers + 1_000_000], threading.get_ident()

    def count(module, name, parameter):
        if parameter is None or threading.get_ident() != thread: return
        left[:] = left[0] - 1, left[1] - parameter.numel()
        need(min(left) >= 0, "its weights are not those of the architecture that it names, which has more")
    handle = register_module_parameter_registration_hook(count)
    try: yield
    finally: handle.remove()


# ---- files ----

def load_learner(path):
    """The learner that is exported to the file `path`, or to learner.pkl in the folder `path`; no unpickler reads it.

    Errors: UserError for a file that is missing, damaged, no learner, or not the one that the model.json beside it describes."""
    path = Path(path)
    if path.is_dir(): path = path / "learner.pkl"
    need(path.is_file(), f"{path} is missing: make it with python export.py RUN.")
    content = path.read_bytes()                                 # what is checked is what is loaded
    about = read_about(path)
    need(about.get("sha256") in (None, hashlib.sha256(content).hexdigest()),
         f"{path} is not the file that {path.with_name('model.json')} describes (its SHA-256 differs): it was altered or belongs to another export.")
    try:
        learn = build(*read_file(content))
        check_about(about, learn)
        return learn
    except UserError as e: raise UserError(f"{path} is refused: {e.text}. Make it with python export.py RUN, or learn.export().") from e


def read_about(path):
    "The model.json beside the learner file `path` as a dictionary, which is empty where there is none. Errors: UserError."
    file = path.with_name("model.json")
    if not file.is_file(): return {}
    try:
        with open(file, encoding="utf-8") as f: about = read_json(f.read(2 * MAX_JSON + 1), 2 * MAX_JSON)        # it is indented, and says more
        need(type(about) is dict and type(about.get("sha256")) is str, "it has no SHA-256")
    except (UserError, UnicodeDecodeError) as e: raise UserError(f"{file} is damaged: export the run again, or delete it.") from e
    return about


def check_about(about, learn):
    "Raise a UserError where a model.json says something else of a learner than is so."
    known = {**get_recipe(learn), "parameters": sum(o.numel() for o in learn.model.parameters())}
    wrong = [k for k, v in known.items() if about.get(k, v) != v]
    need(not wrong, f"the model.json beside it contradicts its {', '.join(wrong)}")


def read_file(content):
    "The JSON text and the uint8 tensor in the bytes of a learner file. Errors: UserError for whatever is not exactly what `export` writes."
    pickled, stored = read_zip(content)
    start = len(BEFORE_TEXT) + 4
    end = start + int.from_bytes(pickled[start - 4:start], "little")
    text = pickled[start:end]
    need(stored and text.isascii() and pickled == pickle_of(text, len(stored)), "its pickle is not of the one form that a learner file has")
    return text.decode(), torch.frombuffer(bytearray(stored), dtype=torch.uint8)


def read_zip(content):
    "The pickle and the storage in a zip file as torch.save writes it. Errors: UserError."
    need(content.count(b"PK\1\2") <= 100, "it is no learner file")         # so begins a member in the list, of which zipfile makes an object
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as z:
            found = z.infolist()
            stored = all(o.compress_type == zipfile.ZIP_STORED and o.file_size == o.compress_size for o in found)
            need(stored and sum(o.file_size for o in found) <= len(content), "it unpacks to more than it is")
            members = {o.filename.partition("/")[2]: o for o in found}
            if "data.pkl" in members:
                with z.open(members["data.pkl"]) as f:
                    need(f.read(len(OLD)) != OLD, "it is of sifar 0.1, whose files are not read any more: export it anew from its run folder")
            need(members.keys() - SINCE_TORCH_2_7 == MEMBERS and len(members) == len(found), "it is no learner file")
            small = {k: o.file_size for k, o in members.items() if k not in ("data.pkl", "data/0")}
            need(max(small.values()) <= 100 and members["data.pkl"].file_size <= MAX_JSON + 1000, "it is no learner file")
            return z.read(members["data.pkl"]), z.read(members["data/0"])
    except (zipfile.BadZipFile, struct.error, ValueError, OverflowError, EOFError, OSError, NotImplementedError, RuntimeError) as e:
        raise UserError("it is no learner file, or a damaged one") from e


def pickle_of(text, n):
    "The pickle that torch.save writes of (restore, (text, a uint8 tensor of n bytes)), protocol 2, opcode by opcode."
    size = pickle.dumps(n, 2)[2:-1]                         # the number alone: its opcode depends on how large it is
    return b"".join((
        BEFORE_TEXT, len(text).to_bytes(4, "little"), text, b"q\1",
        b"ctorch._utils\n_rebuild_tensor_v2\nq\2(",
        b"(X\7\0\0\0storageq\3ctorch\nByteStorage\nq\4X\1\0\0\x000q\5X\3\0\0\0cpuq\6", size, b"tq\7Q",
        b"K\0", size, b"\x85q\x08K\1\x85q\t\x89",           # offset, shape, stride, requires_grad
        b"ccollections\nOrderedDict\nq\n)Rq\x0b",           # hooks
        b"tq\x0cRq\r\x86q\x0eRq\x0f."))
