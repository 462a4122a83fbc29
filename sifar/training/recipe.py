"""A learner file is a recipe (JSON) and weights (safetensors), which no unpickler has to read.

A stranger may have written it, so all of it is checked here: the form of the file, then the
recipe, then whether the weights are just those of the model that the recipe names. Only then is
that model made."""
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
from fastai.metrics import AccumMetric, accuracy, top_k_accuracy
from fastai.torch_core import rank_distrib
from fastcore.all import first, noop
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..data.image import check_facts
from ..data.loaders import ReadImage, empty_dls, normalized
from ..errors import UserError, need
from ..files import parse_json, read_about, write_file
from .metrics import balanced_over_all
from .models import get_model

FORMAT = 2  # of the recipe; 1 where it says no fit, as older versions know none
FIELDS = {"format", "arch", "size", "classes", "superclasses", "mean", "std"}
MAX_JSON = 2**20                        # bytes; Python's objects for it may take 50 times as much
MAX_FILE = 2**33                        # bytes
# the types of weights and their names in safetensors
DTYPES = {torch.float32: "F32", torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL"}

MEMBERS = {"data.pkl", "data/0", "byteorder", "version", ".data/serialization_id"}  # by torch.save
SINCE_TORCH_2_7 = {".format_version", ".storage_alignment"}
OLD = b"\x80\x02cfastai.learner\nLearner\n"            # so begins the pickle of sifar 0.1
BEFORE_TEXT = b"\x80\x02c%b\nrestore\nq\0X" % __name__.encode()

# what zipfile makes of damaged files (RuntimeError: of encrypted ones)
DAMAGED = (
    zipfile.BadZipFile, struct.error, ValueError, OverflowError, EOFError, OSError, RuntimeError)


class RecipeLearner(Learner):
    """fastai's Learner of the model `arch`, which is exported as a recipe to make it again, and weights.

    Its loss is smoothed, and its metrics are top-1, top-5 and balanced accuracy."""

    def __init__(self, dls, model, arch, smoothing=0.1, weight=None, **kwargs):
        loss_func = LabelSmoothingCrossEntropy(eps=smoothing, weight=weight)
        balanced = AccumMetric(balanced_over_all, name="balanced", dim_argmax=-1, to_np=True)
        metrics = [accuracy, partial(top_k_accuracy, k=min(5, dls.c)), balanced]
        super().__init__(dls, model, loss_func=loss_func, metrics=metrics, **kwargs)
        self.arch = arch

    def _with_events(self, f, event_type, ex, final=noop):
        "As fastai's, but whatever ends a fit, Ctrl-C too, callbacks can give back what they changed."
        try: super()._with_events(f, event_type, ex, final)
        except BaseException:
            self(f"after_cancel_{event_type}")
            raise

    # of all that pickle would store of a learner, it stores a call: restore(text, weights)
    def __reduce_ex__(self, protocol): return restore, take_apart(self)

    def __deepcopy__(self, memo):
        "A copy of all that it has, its data too: not what a file would hold."
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new

    def show_results(self, *args, **kwargs):
        # gives it the display of images, and takes seconds
        import fastai.vision.learner  # noqa: F401
        super().show_results(*args, **kwargs)

    def export(self, fname="export.pkl", pickle_module=pickle, pickle_protocol=2):
        """As fastai's export, but the file is whole or not there, and the learner stays as it is.

        Errors: UserError where the model or its data are not what the recipe would make again."""
        if rank_distrib(): return               # of several processes the first writes
        need(pickle_protocol == 2, f"export writes pickle_protocol=2, not {pickle_protocol}: leave it out.")
        file = io.BytesIO()
        torch.save(self, file, pickle_module, pickle_protocol)
        write_file(self.path / fname, file.getbuffer())


# ---- from a learner ----

def take_apart(learn):
    """The recipe of `learn` as JSON text, and its weights: a safetensors file as a uint8 tensor.

    Errors: UserError where the recipe would not make this learner again, as something was changed
    by hand."""
    try:
        recipe = get_recipe(learn)
        check_recipe(recipe)
        check_view(learn, recipe)
        weights = get_weights(learn.model, recipe)
    except UserError as e:
        instead = "torch.save(learn.model.state_dict(), FILE) keeps the weights alone"
        raise UserError(f"This learner cannot be exported: {e.text}. ({instead}.)") from e
    return json.dumps(recipe), weights


def get_recipe(learn):
    "What it takes to make `learn` again but its weights, as a dictionary of plain values."
    dl = learn.dls.valid
    # dl.dataset: fastai's Datasets, whose lists are of images and of labels
    tfms = dl.dataset.tls[0].tfms if hasattr(dl.dataset, "tls") else []
    reader = first(tfm for tfm in tfms if isinstance(tfm, ReadImage))
    normalize = first(tfm for tfm in dl.after_batch.fs if isinstance(tfm, Normalize))
    need(reader and normalize, "its data is not of get_dls")
    return {
        "format": 1,
        "arch": learn.arch,
        "size": reader.sz,
        "classes": list(learn.dls.vocab),
        "superclasses": reader.data.superclasses,
        "mean": normalize.mean.flatten().tolist(),
        "std": normalize.std.flatten().tolist(),
        **({} if reader.fit == "halfway" else {"format": FORMAT, "fit": reader.fit}),
    }


def get_weights(model, recipe):
    "The state of `model` as a safetensors file. Errors: UserError where it is not that of the recipe."
    wanted, arch = plan(recipe), recipe["arch"]
    # the text of a model has all layers and their settings, but for example no hooks
    same = repr(model) == repr(wanted)
    need(same, f"its model is not the {arch} of its settings: it was changed by hand")
    # safetensors takes no two tensors with one memory, which some models of timm have
    state = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    same = shapes(state) == shapes(wanted.state_dict())
    need(same, f"its weights are not those of a {arch}: they were changed by hand")
    return torch.frombuffer(bytearray(save(state)), dtype=torch.uint8)


def check_view(learn, recipe):
    "Raise a UserError where `learn` does more to a picture, or less, than the recipe says."
    sz = recipe["size"]
    image = np.random.default_rng(0).integers(0, 256, (sz, sz, 3), dtype=np.uint8)
    x, = learn.dls.test_dl([image], rm_type_tfms=0, num_workers=0).one_batch()
    want = normalized(torch.from_numpy(image[None]), (recipe["mean"], recipe["std"]))
    got = x.cpu().as_subclass(torch.Tensor)
    same = got.shape == want.shape and torch.allclose(got, want, atol=1e-4)
    need(same, "its data has other transforms than get_dls gives it")


# ---- to a learner ----

def restore(text, weights):
    "The learner that `take_apart` took apart; unpicklers call it, with anything. Errors: UserError."
    try: return build(text, weights)
    except UserError as e: raise UserError(f"The learner file is refused: {e.text}.") from e


def build(text, weights):
    recipe = parse_json(text, MAX_JSON)
    check_recipe(recipe)
    tensors = read_weights(weights, recipe)
    arch, sz, vocab = recipe["arch"], recipe["size"], recipe["classes"]
    model = get_model(arch, len(vocab), (sz,)).to(weights.device)
    model.load_state_dict(tensors)
    stats = recipe["mean"], recipe["std"]
    dls = empty_dls(sz, vocab, recipe["superclasses"], stats, recipe.get("fit", "halfway")).to(weights.device)
    return RecipeLearner(dls, model.eval(), arch)


def check_recipe(recipe):
    "Raise a UserError unless every field of `recipe` is of its type and within its bounds."
    need(type(recipe) is dict, "its recipe is none")
    form = recipe.get("format")
    need(type(form) is int, "its recipe says no format")
    need(form <= FORMAT, "it is of a newer version of sifar: update sifar")
    fields = {1: FIELDS, FORMAT: FIELDS | {"fit"}}.get(form)
    need(recipe.keys() == fields, "its recipe has other fields than a recipe has")
    arch = recipe["arch"]
    named = type(arch) is str and re.fullmatch(r"(timm:)?[A-Za-z0-9_.-]{1,100}", arch)
    need(named, "its architecture has no name of one")  # whether it is known, get_model says
    check_facts(recipe)
    # get_dls gives images of one colour a deviation of 1e-6, which is a little less in float32
    for key, low in ("mean", 0), ("std", 1e-7):
        values = recipe[key]
        three = type(values) is list and [type(v) for v in values] == [float] * 3
        fit = three and all(low <= v <= 1 for v in values)
        need(fit, f"its {key} is not three numbers from {low} to 1")


def plan(recipe):
    "The model of a recipe on the device meta: it has shapes, but takes no memory."
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
    """The tensors of a safetensors file, a uint8 tensor, by name.

    Errors: UserError, before they take memory, unless they are just those of the recipe's model."""
    ok = isinstance(weights, torch.Tensor) and weights.dtype == torch.uint8 and weights.ndim == 1
    need(ok, "its weights are no safetensors file")
    content = weights.cpu().numpy().tobytes()
    # safetensors: 8 bytes that give the length of a JSON header, the header, then the numbers
    size = int.from_bytes(content[:8], "little")
    need(size <= min(MAX_JSON, len(content) - 8), "its weights are no safetensors file")
    header = parse_json(content[8:8 + size].decode(errors="replace"), MAX_JSON)
    ok = type(header) is dict and all(type(v) is dict for v in header.values())
    need(ok, "its weights are no safetensors file")
    with limit_parameters(2 * len(header), len(content) // 2): model = plan(recipe)
    wanted = shapes(model.state_dict())
    found = {k: (o.get("dtype"), o.get("shape")) for k, o in header.items()}
    need(found == wanted, "its weights are not those of the architecture that it names")
    try: return load(content)
    except SafetensorError as e: raise UserError("its weights are damaged") from e


@contextmanager
def limit_parameters(tensors, numbers):
    """Let no model be made, in this thread, with far more parameters than this: a UserError ends it early.

    Even without memory the layers of a large model take seconds, so a small file must not ask
    for them."""
    thread = threading.get_ident()
    left = [tensors + 50, numbers + 1_000_000]  # room for models that make layers and replace them

    def count(module, name, parameter):
        if parameter is None or threading.get_ident() != thread: return
        left[:] = left[0] - 1, left[1] - parameter.numel()
        need(min(left) >= 0, "its weights are not those of the architecture that it names, which has more")
    handle = register_module_parameter_registration_hook(count)
    try: yield
    finally: handle.remove()


# ---- files ----

def load_learner(path):
    """The learner that was exported to the file `path`, or to learner.pkl in the folder `path`.

    Errors: UserError where it is missing, damaged, no learner, or not that of the model.json
    beside it."""
    path = Path(path)
    if path.is_dir(): path = path / "learner.pkl"
    need(path.is_file(), f"{path} is missing: make it with python export.py RUN.")
    need(path.stat().st_size <= MAX_FILE, f"{path} is larger than any learner.")
    content = path.read_bytes()                 # what is checked is what is loaded
    about = read_about(path)
    try:
        same = about.get("sha256") in (None, hashlib.sha256(content).hexdigest())
        need(same, "it is not the file that its model.json describes (the SHA-256 differs), or was altered")
        learn = build(*read_file(content))
        check_about(about, learn)
        return learn
    except UserError as e:
        how = "Make it anew with python export.py RUN, or learn.export()"
        raise UserError(f"{path} is refused: {e.text}. {how}.") from e


def check_about(about, learn):
    "Raise a UserError where a model.json says something else of a learner than is so."
    known = {**get_recipe(learn), "parameters": sum(p.numel() for p in learn.model.parameters())}
    wrong = [k for k, v in known.items() if about.get(k, v) != v]
    need(not wrong, f"the model.json beside it contradicts its {', '.join(wrong)}")


def read_file(content):
    """The JSON text and the uint8 tensor in the bytes of a learner file.

    Errors: UserError for whatever is not exactly the form that `export` writes."""
    pickled, stored = read_zip(content)
    # opcode X: 4 bytes that give the length of a text, then the text
    start = len(BEFORE_TEXT) + 4
    end = start + int.from_bytes(pickled[start - 4:start], "little")
    text = pickled[start:end]
    exact = stored and text.isascii() and pickled == pickle_of(text, len(stored))
    need(exact, "its pickle is not of the one form that a learner file has")
    return text.decode(), torch.frombuffer(bytearray(stored), dtype=torch.uint8)


def read_zip(content):
    "The pickle and the storage in a zip file as torch.save writes it. Errors: UserError."
    # zipfile makes an object of each
    need(content.count(b"PK\1\2") <= 10_000, "it is no learner file")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as z:
            members = list_members(z.infolist(), len(content))
            with z.open(members["data.pkl"]) as f: old = f.read(len(OLD)) == OLD
            need(not old, "it is of sifar 0.1, whose files are not read any more")
            need(members.keys() - SINCE_TORCH_2_7 == MEMBERS, "it is no learner file")
            pickled, stored = members.pop("data.pkl"), members.pop("data/0")
            short = all(member.file_size <= 100 for member in members.values())
            need(short and pickled.file_size <= MAX_JSON + 1000, "it is no learner file")
            return z.read(pickled), z.read(stored)
    except DAMAGED as e: raise UserError("it is no learner file, or a damaged one") from e


def list_members(found, size):
    """The members of a zip file of so many bytes, by their name in its folder.

    Errors: UserError for compressed ones, which could unpack to any size, and for a file without
    a pickle."""
    members = {member.filename.partition("/")[2]: member for member in found}
    need(len(members) == len(found) and "data.pkl" in members, "it is no learner file")
    stored = all(member.compress_type == zipfile.ZIP_STORED for member in found)
    plain = stored and all(member.file_size == member.compress_size for member in found)
    need(plain and sum(member.file_size for member in found) <= size, "it unpacks to more than it is")
    return members


def pickle_of(text, n):
    "The pickle that torch.save writes of a learner with this recipe, bytes, and `n` bytes of weights."
    size = pickle.dumps(n, 2)[2:-1]     # the number alone; its opcode depends on its size
    return b"".join((
        BEFORE_TEXT, len(text).to_bytes(4, "little"), text, b"q\1",
        b"ctorch._utils\n_rebuild_tensor_v2\nq\2(",
        b"(X\7\0\0\0storageq\3ctorch\nByteStorage\nq\4X\1\0\0\x000q\5X\3\0\0\0cpuq\6", size, b"tq\7Q",
        b"K\0", size, b"\x85q\x08K\1\x85q\t\x89",           # offset, shape, stride, requires_grad
        b"ccollections\nOrderedDict\nq\n)Rq\x0b",           # hooks
        b"tq\x0cRq\r\x86q\x0eRq\x0f."))
