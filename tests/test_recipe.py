"""Learner files: what a plain export writes, for us and for stock fastai, and what a stranger may write."""

import copy
import hashlib
import io
import json
import os
import pickle
import pickletools
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
import torch
from conftest import COLD, write_cifar
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import SaveModelCallback
from fastai.data.all import Transform
from fastai.learner import Learner
from fastai.torch_core import TensorImage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from sifar import Predictor, TrainConfig, UserError, get_dls, get_learner, load_learner
from sifar.share.classifier import get_classifier
from sifar.share.export import describe, some_images
from sifar.training.recipe import FIELDS, MAX_JSON, build, pickle_of, restore, take_apart

ROOT = Path(__file__).parents[1]
FOUR_NAMES = {
    "sifar.training.recipe restore",
    "torch._utils _rebuild_tensor_v2",
    "torch ByteStorage",
    "collections OrderedDict",
}


def new_learner(path=".", **changes):
    "A learner of digits that trains on one batch an epoch."
    usual = {"dataset": "digits", "arch": "resnet8", "bs": 32, "precision": "fp32", "dry_run": True}
    cfg = TrainConfig(**{**usual, **changes})
    return get_learner(get_dls(cfg), cfg, path=path)


def run_code(code, cwd, python=None):
    "The lines that Python code prints in a process of its own."
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [python or sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def as_weights(content):
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def assert_close(got, want):
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


def probs_of(learn, images):
    with learn.no_bar():
        return learn.get_preds(dl=learn.dls.test_dl(list(images), rm_type_tfms=0))[0]


# ---- plain exports ----


def fitted(learn):
    with learn.no_bar(), learn.no_logging():
        learn.fit_warmup_cosine(1, warmup=0.2)
    return learn


def searched(learn):
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=30, show_plot=False)
    return learn


def watched(learn):
    learn.add_cbs([CSVLogger(), SaveModelCallback()])
    return fitted(learn)


def interrupted(learn):
    "Broken off in a forward pass, with the loss that Mixup puts in the place of the learner's."
    hook = learn.model.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        fitted(learn)
    hook.remove()
    return learn


CASES = {  # what a notebook does before learn.export()
    "nothing": (lambda o: o, {}),
    "a fit": (fitted, {}),
    "bfloat16": (fitted, {"precision": "bf16"}),
    "an average of the weights": (fitted, {"ema": 0.9}),
    "Mixup and CutMix": (fitted, {"mixup": 0.2, "cutmix": 1.0}),
    "Mixup that was interrupted": (interrupted, {"mixup": 0.2}),
    "growing images": (fitted, {"sizes": "16,32"}),
    "batches augmented, Muon": (fitted, {"augment": "batch", "opt": "muon", "clip": 1.0}),
    "lr_find": (searched, {}),
    "callbacks with open files": (watched, {}),
    "a model of timm": (fitted, {"arch": "timm:mobilenetv3_small_050"}),
    "a model of timm for one size": (fitted, {"arch": "timm:test_vit"}),
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """A folder with a file for each case; 8 images; their probabilities in each case.

    The files are by learn.export(), those called `fastai-...` by fastai's own function with cloudpickle."""
    folder, want = tmp_path_factory.mktemp("exports"), {}
    for name, (prepare, changes) in CASES.items():
        learn = prepare(new_learner(folder, **changes))
        images = some_images(learn, 8)
        with torch.inference_mode():
            want[name] = get_classifier(learn)[0](torch.from_numpy(images))
        state = vars(learn).copy()
        learn.export(f"{name}.pkl")
        assert all(v is vars(learn)[k] for k, v in state.items()), "the learner is as it was"
        if name in ("nothing", "a fit"):
            Learner.export(learn, f"fastai-{name}.pkl")
    np.save(folder / "images.npy", images)
    return folder, images, want


@pytest.fixture(scope="module")
def in_stock_fastai(exports):
    "The probabilities and the first label from each file, in a fresh process that knows fastai alone."
    code = """import json, sys
from pathlib import Path
import numpy as np
from fastai.vision.all import load_learner
images, out = np.load("images.npy"), {}
assert "sifar" not in sys.modules
for path in Path().glob("*.pkl"):
    learn = load_learner(path)
    with learn.no_bar():
        probs = learn.get_preds(dl=learn.dls.test_dl(list(images), rm_type_tfms=0))[0]
        out[path.stem] = probs.tolist(), learn.predict(images[0])[0]
print(json.dumps(out))"""
    return json.loads(run_code(code, exports[0], COLD)[-1])


@pytest.mark.parametrize("name", CASES)
def test_a_plain_export_predicts_the_same_here_and_in_stock_fastai(name, exports, in_stock_fastai):
    folder, images, want = exports
    learn = load_learner(folder / f"{name}.pkl")
    got, (stock, label) = probs_of(learn, images), in_stock_fastai[name]
    assert_close(got, want[name])
    assert_close(torch.tensor(stock), want[name])
    with learn.no_bar():
        mine = learn.predict(images[0])[0]
    assert mine == label == learn.dls.vocab[want[name][0].argmax()]


@pytest.mark.parametrize("name", ["nothing", "a fit"])
def test_fastais_own_export_writes_the_same_file(name, exports, in_stock_fastai):
    "It pickles by cloudpickle, and empties the learner's data before."
    folder, images, want = exports
    assert_close(probs_of(load_learner(folder / f"fastai-{name}.pkl"), images), want[name])
    assert in_stock_fastai[f"fastai-{name}"] == in_stock_fastai[name]


def test_every_file_has_four_names_and_the_same_opcodes(exports):
    seen = set()
    for path in exports[0].glob("*.pkl"):
        with zipfile.ZipFile(path) as z:
            pickled = z.read(next(o for o in z.namelist() if o.endswith("/data.pkl")))
        opcodes = list(pickletools.genops(pickled))
        assert {arg for o, arg, _ in opcodes if o.name == "GLOBAL"} == FOUR_NAMES
        seen.add(tuple(o.name for o, *_ in opcodes))
    assert len(seen) == 1 and len(seen.pop()) == 43 and len(list(exports[0].glob("*.pkl"))) == len(CASES) + 2


@pytest.mark.parametrize("n", [0, 255, 256, 65_535, 65_536, 2**31 - 1, 2**31, 2**40])
@pytest.mark.parametrize("module", [pickle, cloudpickle])
def test_the_form_of_the_pickle_is_what_torch_writes_of_any_size(n, module):
    class Taken:
        def __reduce_ex__(self, protocol):
            return restore, ('{"text": 1}', Like())

    class Like:
        "A tensor of n bytes, but for the bytes."

        def __reduce_ex__(self, protocol):
            func, (_, *args) = torch.empty(0, dtype=torch.uint8).__reduce_ex__(2)
            args[1], args[2] = (n,), (1,)
            return func, (Stored(), *args)

    class Stored:
        pass

    class Pickler(module.Pickler):
        def persistent_id(self, o):
            return ("storage", torch.ByteStorage, "0", "cpu", n) if isinstance(o, Stored) else None

    file = io.BytesIO()
    Pickler(file, protocol=2).dump(Taken())
    assert file.getvalue() == pickle_of(b'{"text": 1}', n)


def test_a_learner_that_was_loaded_is_exported_again_and_trains(exports, tmp_path):
    folder, images, want = exports
    learn = load_learner(folder / "a fit.pkl")
    learn.path = tmp_path
    learn.export("again.pkl")
    assert_close(probs_of(load_learner(tmp_path / "again.pkl"), images), want["a fit"])
    learn.dls = new_learner().dls
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    assert len(learn.recorder.values) == 1


def test_a_copy_of_a_learner_has_its_data():
    learn = new_learner()
    other = copy.deepcopy(learn)
    assert len(other.dls.train_ds) == len(learn.dls.train_ds) == 32
    assert other.model is not learn.model and other.arch == "resnet8"


def test_superclasses_names_and_sizes_come_along(tmp_path, tiny_cifar, image_folder):
    write_cifar(tmp_path, "cifar100")
    for changes in {"dataset": "cifar100"}, {"dataset": str(image_folder), "sz": 48}:
        learn = new_learner(tmp_path, data=str(tmp_path), **changes)
        learn.export("learner.pkl")
        predictor = Predictor(tmp_path)
        assert predictor.vocab == list(learn.dls.vocab) and predictor.sz == changes.get("sz", 32)
        assert predictor.superclasses == learn.dls.data.superclasses


# ---- what is not exported ----


class Brighter(Transform):
    def encodes(self, x: TensorImage):
        return x * 1.1


def set_model(f):
    def change(learn):
        learn.model = f(learn.model)

    return change


@pytest.mark.parametrize(
    "change, words",
    [
        (set_model(lambda m: nn.Sequential(m, nn.Identity())), "its model is not the resnet8"),
        (lambda o: setattr(o.model.blocks[0], "relu", nn.GELU()), "its model is not the resnet8"),
        (lambda o: setattr(o.model.stem[0], "stride", (2, 2)), "its model is not the resnet8"),
        (lambda o: setattr(o.model.head, "2", nn.Linear(64, 9)), "its model is not the resnet8"),
        (set_model(lambda m: m.half()), "its weights are not those of a resnet8"),
        (lambda o: o.model.register_buffer("more", torch.zeros(1)), "its weights are not those of a resnet8"),
        (lambda o: setattr(o, "arch", "resnet10"), "its model is not the resnet10"),
        (lambda o: o.dls.valid.after_batch.add(Brighter()), "its data has other transforms"),
        (lambda o: o.dls.valid.dataset.tls[0].tfms.fs.clear(), "its data is not of get_dls"),
        (lambda o: o.dls.valid.after_batch.fs.clear(), "its data is not of get_dls"),
    ],
)
def test_what_was_changed_by_hand_is_refused_and_nothing_is_lost(change, words, tmp_path):
    learn = new_learner(tmp_path)
    learn.export("learner.pkl")
    before = (tmp_path / "learner.pkl").read_bytes()
    change(learn)
    state = vars(learn).copy()
    with pytest.raises(UserError, match=words) as e:
        learn.export("learner.pkl")
    assert "\n" not in e.value.text and all(v is vars(learn)[k] for k, v in state.items())
    assert [o.name for o in tmp_path.iterdir()] == ["learner.pkl"]
    assert (tmp_path / "learner.pkl").read_bytes() == before


def test_class_names_that_cannot_be_shown_are_refused_at_the_export(tmp_path):
    learn = new_learner(tmp_path)
    learn.dls.vocab[3] = "3\n\x1b[2J"
    with pytest.raises(UserError, match="This learner cannot be exported: its class names"):
        learn.export()


# ---- what a stranger may write ----


@pytest.fixture(scope="module")
def good():
    "The recipe (dictionary) and the weights (uint8) of a learner."
    text, weights = take_apart(new_learner())
    return json.loads(text), weights


def text_of(recipe):
    return recipe if isinstance(recipe, str) else json.dumps(recipe)


def write(path, recipe, weights, pickled=None, names=(), compress=zipfile.ZIP_STORED, **members):
    """A learner file as torch.save writes it, but for what is told; returns its path.

    names: of more members, which are empty; members: what is in these instead, None leaves them out."""
    stored = bytes(weights.numpy().data)
    files = {
        "data.pkl": pickled or pickle_of(text_of(recipe).encode(), len(stored)),
        ".format_version": b"1",
        ".storage_alignment": b"64",
        "byteorder": b"little",
        "data/0": stored,
        "version": b"3\n",
        ".data/serialization_id": b"0" * 40,
    }
    files |= {k.replace("data_0", "data/0").replace("_pkl", ".pkl"): v for k, v in members.items()}
    with zipfile.ZipFile(path, "w", compress) as z, warnings.catch_warnings(action="ignore"):
        for k, v in [*files.items(), *((o, b"") for o in names)]:
            if v is not None:
                z.writestr(k if k.startswith("/") else f"learner/{k}", v)
    return path


def refusal(path, load=load_learner):
    with pytest.raises(UserError) as e:
        load(path)
    assert e.value.text.isprintable() and len(e.value.text) < 500 and str(path) in e.value.text
    return e.value.text


def refused(folder, *args, **kwargs):
    return refusal(write(folder / "learner.pkl", *args, **kwargs))


NAMES = list("0123456789")
ODD_RECIPES = {
    "format": (3, "newer version"),
    "format ": (1, "other fields"),
    "arch": ("resnet9", "did you mean"),
    "classes": (NAMES[:9], "not those of the architecture"),
    "superclasses": (NAMES[:9], "superclasses"),
    "mean": ([0.5, 0.5], "mean"),
    "std": ([0.5, 0.5, 0.0], "std"),
    "size": (4800, "image size"),
}

NO_FORMATS = 0, True, 1.0, "1", None, [1]
NO_ARCHS = (
    None,
    3,
    ["resnet8"],
    "",
    "a" * 101,
    "resnet8\n",
    "../resnet8",
    "timm:",
    "timm:hf-hub:someone/model",
    "hf-hub:a/b",
    "timm:local-dir:/tmp/model",
    "timm:hf_hub:x",
    "timm:/etc/passwd",
    "os.system",
)
NO_SIZES = None, True, 32.0, "32", 7, 513, -32, 10**30, [32]
NO_NAMES = (
    9,
    None,
    ["9"],
    "8",
    "",
    "a\nb",
    "a\rb",
    "\x1b[2J",
    "\0",
    "a\u2028b",
    "\x85",
    "a\u202eb",
    "a\u2066b",
    "a\u200fb",
    "\ud800",
    "x" * 256,
    "x" * 10**6,
)
NO_SUPERCLASSES = False, [], "0123456789", NAMES * 2, [*NAMES[:9], 9], [*NAMES[:9], "a\nb"], {"0": "1"}
NO_STATS = (
    None,
    0.5,
    [0.5] * 4,
    [0.5, 0.5, 1],
    [0.5, 0.5, "0.5"],
    [0.5, 0.5, None],
    [0.5, 0.5, -1.0],
    [0.5, 0.5, 1.5],
    [True, 0.5, 0.5],
)
ODD_VALUES = [
    ("fit", "crop", "other fields"),  # format 1 has none
    *(("format", o, "its recipe") for o in NO_FORMATS),
    *(("arch", o, "architecture") for o in NO_ARCHS),
    *(("arch", o, "Unknown timm model") for o in ("timm:no_such_model", "timm:resnet18.a1_in1k")),
    ("arch", "timm:test_vit2", "not those of the architecture"),
    ("arch", "timm:inception_v4", "cannot take images of 32x32"),
    *(("size", o, "image size") for o in NO_SIZES),
    *(("classes", o, "class names") for o in (None, "0123456789", [], {})),
    *(("classes", [*NAMES[:9], o], "class names") for o in NO_NAMES),
    *(("superclasses", o, "superclasses") for o in NO_SUPERCLASSES),
    *((k, o, k) for k in ("mean", "std") for o in NO_STATS),
]
ODD_TEXTS = [
    "",
    "{",
    "[]",
    "null",
    "1",
    '"recipe"',
    "[" * 100_000,
    '{"a":' * 100_000,
    "NaN",
    '{"format": 1e999}',
    "9" * 5000,
    "1" * 50,
    "\ufeff{}",
    "{}{}",
]


@pytest.mark.parametrize("key, value, words", ODD_VALUES, ids=repr)
def test_a_recipe_with_an_odd_value_is_refused(key, value, words, good, tmp_path):
    assert words in refused(tmp_path, {**good[0], key: value}, good[1])


@pytest.mark.parametrize("key", ODD_RECIPES)
def test_a_recipe_that_contradicts_itself_or_its_weights_is_refused(key, good, tmp_path):
    value, words = ODD_RECIPES[key]
    assert words in refused(tmp_path, {**good[0], key: value}, good[1])
    missing = {k: v for k, v in good[0].items() if k != key.strip()}
    assert "its recipe" in refused(tmp_path, missing, good[1])


@pytest.mark.parametrize("fit", [None, 1, "", "Crop", ["crop"], {}])
def test_a_recipe_with_an_odd_fit_is_refused(fit, good, tmp_path):
    assert "its fit is not one" in refused(tmp_path, {**good[0], "format": 2, "fit": fit}, good[1])


@pytest.mark.parametrize("text", ODD_TEXTS, ids=lambda o: o[:20])
def test_what_is_no_recipe_is_refused(text, good, tmp_path):
    refused(tmp_path, text, good[1])


@pytest.mark.parametrize(
    "old, new",
    [
        ('"size": 32', '"size": 32, "size": 32'),
        ('"size": 32', '"size": 3' + "2" * 4800),
        ('"size": 32', '"size": 32e0'),
        ("null", "NaN"),
        ('"mean": [0.3', '"mean": [Infinity, 0.3'),
    ],
)
def test_json_that_two_readers_would_read_as_two_things_is_refused(old, new, good, tmp_path):
    text = json.dumps(good[0])
    assert old in text
    refused(tmp_path, text.replace(old, new, 1), good[1])


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", "**bold** [a](b)", "=1+1", "猫 🍎 گربه", " a b ", "\\x1b"]
)
def test_names_of_any_script_and_markup_are_text(name, good, tmp_path):
    write(tmp_path / "learner.pkl", {**good[0], "classes": [*NAMES[:9], name]}, good[1])
    assert Predictor(tmp_path).vocab[9] == name


def test_restore_itself_refuses_what_load_learner_refuses(good):
    "It is what pickle calls where stock fastai loads the file."
    text, weights = json.dumps(good[0]), good[1]
    odd_texts, odd_weights = ("{}", text.encode(), None, good[0]), (weights.float(), weights[None], [1], None)
    for args in [*((o, weights) for o in odd_texts), *((text, o) for o in odd_weights)]:
        with pytest.raises(UserError, match="The learner file is refused: it"):
            restore(*args)
    assert restore(text, weights).dls.vocab == NAMES


# ---- weights ----


def header(tensors, data=b"", length=None):
    "The weights with a header of these `tensors`, a dictionary or text, which claims `length` bytes."
    text = tensors if isinstance(tensors, str) else json.dumps(tensors)
    content = text.encode(errors="surrogateescape")
    return as_weights((len(content) if length is None else length).to_bytes(8, "little") + content + data)


def other_state(change):
    "A function that gives the weights of a good learner after a change of their dictionary."

    def make():
        state = new_learner().model.state_dict()
        change(state)
        return as_weights(save({k: v.contiguous().clone() for k, v in state.items()}))

    return make


BIAS = "head.2.bias"
ODD_WEIGHTS = {
    "one byte": lambda: as_weights(b"\0"),
    "seven bytes": lambda: as_weights(bytes(7)),
    "noise": lambda: as_weights(b"\xff" * 1000),
    "a header longer than the file": lambda: header("{}", length=1000),
    "a header of 2**63 bytes": lambda: header("{}", length=2**63),
    "no tensors": lambda: header({}),
    "a list": lambda: header([]),
    "a tensor that is none": lambda: header({"a": 1}),
    "text that is no JSON": lambda: header("{"),
    "bytes that are no text": lambda: header('"\udcff"'),
    "one less": other_state(lambda o: o.pop(BIAS)),
    "one more": other_state(lambda o: o.update(more=torch.zeros(1))),
    "another name": other_state(lambda o: o.update({"Bias": o.pop(BIAS)})),
    "another shape": other_state(lambda o: o.update({BIAS: torch.zeros(1, 10)})),
    "half": other_state(lambda o: o.update({BIAS: torch.zeros(10).half()})),
    "double": other_state(lambda o: o.update({BIAS: torch.zeros(10).double()})),
}


@pytest.mark.parametrize("what", ODD_WEIGHTS)
def test_weights_that_are_not_those_of_the_architecture_are_refused(what, good, tmp_path):
    text = refused(tmp_path, good[0], ODD_WEIGHTS[what]())
    assert "its weights" in text or "JSON" in text


@pytest.mark.parametrize(
    "change",
    [
        lambda o: o[BIAS].update(shape=[10**12]),
        lambda o: o[BIAS].update(data_offsets=[0, 40]),
        lambda o: o[BIAS].update(data_offsets=[0, 2**62]),
        lambda o: o[BIAS].update(data_offsets=None),
        lambda o: o[BIAS].update(dtype="F16"),
        lambda o: o.update(__metadata__={"a": "b"}),
    ],
)
def test_a_header_that_claims_something_else_than_there_is_is_refused(change, good, tmp_path):
    content = bytes(good[1].numpy().data)
    end = 8 + int.from_bytes(content[:8], "little")
    tensors = json.loads(content[8:end])
    change(tensors)
    assert "its weights" in refused(tmp_path, good[0], header(tensors, content[end:]))


@pytest.mark.parametrize("cut", [1, 4, 1000])
def test_weights_that_are_longer_or_shorter_are_refused(cut, good, tmp_path):
    for weights in good[1][:-cut], torch.cat((good[1], torch.zeros(cut, dtype=torch.uint8))):
        assert "its weights are damaged" in refused(tmp_path, good[0], weights)


# ---- pickles ----


class Call:
    def __init__(self, func, *args):
        self.func, self.args = func, args

    def __reduce__(self):
        return self.func, self.args


def saved(o):
    "The pickle that torch.save writes of something."
    file = io.BytesIO()
    torch.save(o, file, pickle_protocol=2)
    with zipfile.ZipFile(file) as z:
        return z.read("archive/data.pkl")


def hostile(text, weights, mark):
    "Pickles that make the file `mark` where an unpickler reads them, by name."
    run = Call(os.system, f"touch '{mark}'")
    whole = saved(Call(restore, text, weights))
    yield "a command alone", saved(run)
    yield "a command in the place of the recipe", saved(Call(restore, run, weights))
    yield "a command in the place of the weights", saved(Call(restore, text, run))
    yield "a command beside them", saved(Call(restore, text, weights, run))
    yield "a command before them", pickle.dumps(run, 2)[:-1] + b"0" + whole[2:]
    yield "a command after them", whole[:-1] + b"0" + pickle.dumps(run, 2)[2:]
    bare = pickle.dumps(run, 2)[2:-1]
    yield "a command among the hooks", whole.replace(b"ccollections\nOrderedDict\nq\n)R", bare)
    yield "a command in the place of the storage", whole.replace(b"ctorch\nByteStorage\n", bare)
    yield "eval", saved(Call(restore, Call(eval, f"open({str(mark)!r}, 'w').close()"), weights))


@pytest.mark.parametrize("i", range(9))
def test_nothing_that_a_pickle_brings_is_run(i, good, tmp_path):
    class Unchecked(pickle.Unpickler):
        def persistent_load(self, pid):
            stored = good[1].untyped_storage()
            return torch.storage.TypedStorage(wrap_storage=stored, dtype=torch.uint8, _internal=True)

    mark = tmp_path / "ran"
    what, pickled = list(hostile(json.dumps(good[0]), good[1], mark))[i]
    try:
        Unchecked(io.BytesIO(pickled)).load()
    except (TypeError, UserError, pickle.UnpicklingError, AttributeError):
        pass  # after it has run
    assert mark.exists(), what
    mark.unlink()
    assert "its pickle is not of the one form" in refused(tmp_path, good[0], good[1], pickled)
    assert not mark.exists()


def test_a_pickle_with_any_opcode_more_less_or_changed_is_refused(good, tmp_path):
    text, weights = json.dumps(good[0]), good[1]
    pickled = pickle_of(text.encode(), len(weights))
    starts = [o[2] for o in pickletools.genops(pickled)] + [len(pickled)]
    for a, b in zip(starts, starts[1:]):
        it = pickled[a:b]
        for middle in (b"", 2 * it, b"N", b"N0" + it, bytes([it[0] ^ 1]) + it[1:]):
            other = pickled[:a] + middle + pickled[b:]
            assert "one form" in refused(tmp_path, good[0], weights, other)


@pytest.mark.parametrize("protocol", [0, 1, 3, 4, 5])
def test_another_protocol_is_refused_at_the_export_and_at_the_door(protocol, good, tmp_path):
    learn = new_learner(tmp_path)
    with pytest.raises(UserError, match="pickle_protocol=2"):
        learn.export(pickle_protocol=protocol)
    with warnings.catch_warnings(action="ignore"):
        torch.save(learn, tmp_path / "learner.pkl", pickle_protocol=protocol)
    assert "one form" in refusal(tmp_path / "learner.pkl")


def test_claims_of_the_pickle_that_are_not_so_are_refused(good, tmp_path):
    assert "one form" in refused(tmp_path, good[0], torch.zeros(0, dtype=torch.uint8))
    text, n = json.dumps(good[0]).encode(), len(good[1])
    good_one = pickle_of(text, n)
    too_long = good_one.replace(len(text).to_bytes(4, "little"), b"\xff\xff\xff\xff")
    sizes = [pickle_of(text, o) for o in (n + 1, n - 1, 0, 2**40)]
    for pickled in (*sizes, too_long, good_one + b"N.", b".", b"\x80\x02N.", pickle_of("é".encode(), n)):
        assert "one form" in refused(tmp_path, good[0], good[1], pickled)


# ---- zip files ----


@pytest.mark.parametrize(
    "more",
    [
        "constants.pkl",
        "data.PKL",
        "data/1",
        "data/x",
        "code/__torch__.py",
        "../learner/data.pkl",
        "data.pkl",
        "data/0",
        "/data.pkl",
        "",
    ],
)
def test_a_file_with_other_members_is_refused(more, good, tmp_path):
    assert "no learner file" in refused(tmp_path, *good, names=[more])


@pytest.mark.parametrize("name", ["data_pkl", "data_0", "version", "byteorder"])
def test_a_file_without_a_member_or_with_a_long_one_is_refused(name, good, tmp_path):
    assert "no learner file" in refused(tmp_path, *good, **{name: None})
    if name in ("version", "byteorder"):
        assert "no learner file" in refused(tmp_path, *good, **{name: bytes(101)})


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compressed_file_is_refused(method, good, tmp_path):
    assert "unpacks to more than it is" in refused(tmp_path, *good, compress=method)


def test_a_file_of_torch_2_6_loads(good, tmp_path):
    "It has no `.format_version` and no `.storage_alignment`."
    path = write(tmp_path / "learner.pkl", *good, **{".format_version": None, ".storage_alignment": None})
    assert load_learner(path).dls.vocab == NAMES


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello\n",
        b"\x80\x04N.",
        b"\x89PNG\r\n\x1a\n",
        b"PK\x05\x06" + bytes(18),
        b"PK\x05\x06" + b"\xff" * 18,
    ],
)
def test_another_kind_of_file_is_refused(content, tmp_path):
    (tmp_path / "learner.pkl").write_bytes(content)
    assert "Make it anew with python export.py" in refusal(tmp_path / "learner.pkl")


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_refused(share, exports, tmp_path):
    content = (exports[0] / "a fit.pkl").read_bytes()
    (tmp_path / "learner.pkl").write_bytes(content[: int(share * len(content))])
    assert "or a damaged one" in refusal(tmp_path / "learner.pkl")


@pytest.mark.parametrize("module", [pickle, cloudpickle])
def test_a_file_of_sifar_0_1_is_refused_with_what_to_do(module, tmp_path):
    "It was the pickle of a fastai Learner."
    learn = new_learner()
    plain = Learner(learn.dls, learn.model, loss_func=learn.loss_func, path=tmp_path)
    with warnings.catch_warnings(action="ignore"):
        plain.export("learner.pkl", pickle_module=module)
    text = refusal(tmp_path / "learner.pkl")
    assert "is of sifar 0.1" in text and "Make it anew with python export.py RUN" in text


# ---- model.json ----


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    "A folder with a learner.pkl and the model.json of all that it may say."
    folder, learn = tmp_path_factory.mktemp("described"), new_learner()
    learn.path = folder
    learn.export("learner.pkl")
    facts = {"parameters": 78_042, "commands": []}
    about = describe(learn, TrainConfig(dataset="digits", arch="resnet8"), facts)
    about["sha256"] = hashlib.sha256((folder / "learner.pkl").read_bytes()).hexdigest()
    (folder / "model.json").write_text(json.dumps(about))
    return folder


@pytest.fixture
def learner_file(described, tmp_path):
    "A copy of them."
    for o in ("learner.pkl", "model.json"):
        shutil.copy(described / o, tmp_path)
    return tmp_path / "learner.pkl"


def test_a_learner_loads_from_its_file_and_from_its_folder(learner_file):
    assert load_learner(learner_file).dls.vocab == load_learner(learner_file.parent).dls.vocab == NAMES
    learner_file.with_name("model.json").unlink()
    assert load_learner(str(learner_file)).dls.vocab == NAMES
    assert "is missing: make it with" in refusal(learner_file.with_name("nothing.pkl"))


def test_a_file_that_was_altered_is_refused(learner_file):
    content = bytearray(learner_file.read_bytes())
    content[len(content) // 2] ^= 1
    learner_file.write_bytes(content)
    assert "SHA-256 differs" in refusal(learner_file)


@pytest.mark.parametrize(
    "key, value",
    [
        ("classes", NAMES[::-1]),
        ("classes", None),
        ("superclasses", NAMES),
        ("size", 64),
        ("size", "32"),
        ("mean", [0.5] * 3),
        ("std", [0.5] * 3),
        ("arch", "resnet18"),
        ("parameters", 1),
    ],
)
def test_a_model_json_that_contradicts_is_refused(key, value, learner_file):
    file = learner_file.with_name("model.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    assert f"model.json beside it contradicts its {key}" in refusal(learner_file)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"sha256": null}',
        '{"sha256": ["a"]}',
        "[" * 100_000,
        "NaN",
        '{"sha256": "a", "sha256": "b"}',
        "\udcff",
        " " * 5_000_000,
    ],
)
def test_a_model_json_that_is_damaged_is_refused(text, learner_file):
    learner_file.with_name("model.json").write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=r"model.json is damaged: export the run again, or delete it\.$"):
        load_learner(learner_file)


# ---- what it costs ----


def heavy(good):
    "Files that take long, or much memory, where nothing limits that, as (what, arguments of `write`)."
    recipe, weights = good
    many, n = [str(i) for i in range(100_000)], MAX_JSON
    yield "a good one", (recipe, weights), {}
    yield "many lists in JSON", ("[" + "[]," * (n // 3 - 9) + "[]]", weights), {}
    yield "deep lists in JSON", ("[" * n, weights), {}
    yield "a long number in JSON", ('{"size": ' + "9" * (n - 20) + "}", weights), {}
    yield "a long fraction in JSON", ('{"size": 0.' + "9" * (n - 20) + "}", weights), {}
    yield "a long name", ({**recipe, "classes": ["x" * (n - 500)]}, weights), {}
    yield "many classes", ({**recipe, "classes": many}, weights), {}
    wide = {**recipe, "arch": "resnet34", "size": 512, "classes": many}
    yield "many classes of a wide model", (wide, weights), {}
    yield "too many classes", ({**recipe, "classes": [*many, *(f"x{o}" for o in many)]}, weights), {}
    yield "many tensors", (recipe, header("{" + ",".join(f'"{i}":{{}}' for i in range(n // 12)) + "}")), {}
    yield "more JSON than is read", ("[" * 20 * n, weights), {}
    yield "a model of a billion parameters", ({**recipe, "arch": "timm:vit_giant_patch14_224"}, weights), {}
    yield "a model of a thousand layers", ({**recipe, "arch": "timm:hrnet_w64"}, weights), {}
    packed = {"compress": zipfile.ZIP_DEFLATED, "data_pkl": bytes(300_000_000)}
    yield "a pickle of 300 MB in 300 kB", (recipe, weights), packed
    yield "zeros", (recipe, torch.zeros(20_000_000, dtype=torch.uint8)), {}


def many_members(n):
    "A zip file that lists one empty member n times."
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as z:
        z.writestr("a/data.pkl", b"")
    content = file.getvalue()
    start, end = content.index(b"PK\1\2"), content.index(b"PK\5\6")
    listed = content[start:end] * n
    last = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65_535, 65_535, len(listed), start, 0)
    return content[:start] + listed + last


def test_a_hostile_file_takes_little_time_and_memory(good, tmp_path):
    "At most 2 s and 200 MB more than a good file, as a process of its own measures it."
    whats = [what for what, *_ in heavy(good)] + ["500,000 members"]
    for i, (_, args, kwargs) in enumerate(heavy(good)):
        write(tmp_path / f"{i:02}.pkl", *args, **kwargs)
    (tmp_path / f"{len(whats) - 1}.pkl").write_bytes(many_members(500_000))
    code = """import json, time
from pathlib import Path
from sifar import UserError, load_learner
def megabytes(key): return int(Path("/proc/self/status").read_text().split(key)[1].split()[0]) / 1000
load_learner("00.pkl")
for path in sorted(Path().glob("*.pkl")):
    Path("/proc/self/clear_refs").write_text("5")            # the peak begins anew
    start, before, out = time.process_time(), megabytes("VmRSS:"), "loads"
    try: load_learner(path)
    except UserError as e: out = e.text
    print(json.dumps([out, time.process_time() - start, megabytes("VmHWM:") - before]))"""
    for what, line in zip(whats, run_code(code, tmp_path), strict=True):
        out, seconds, mb = json.loads(line)
        print(f"{what}: {seconds:.2f} s, {mb:.0f} MB: {out[:110]}")
        assert (out == "loads") == (what == "a good one"), (what, out)
        assert seconds < 2 and mb < 200, (what, seconds, mb)


# ---- by chance ----

QUIETLY = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
JSON = st.recursive(PLAIN, lambda o: st.lists(o) | st.dictionaries(st.text(), o), max_leaves=6)


@settings(QUIETLY, max_examples=150)
@given(data=st.data())
def test_a_file_with_changed_bytes_is_the_same_or_refused(data, exports, tmp_path_factory):
    content = bytearray((exports[0] / "a fit.pkl").read_bytes())
    last = len(content) - 1
    places = st.integers(0, 2000) | st.integers(last - 1500, last) | st.integers(0, last)
    changes = st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4)
    for at, byte in data.draw(changes):
        content[at] = byte
    path = tmp_path_factory.getbasetemp() / "learner.pkl"
    path.write_bytes(content)
    try:
        got = probs_of(load_learner(path), exports[1])
    except UserError as e:
        assert str(path) in e.text and e.text.isprintable()
    else:
        assert_close(got, exports[2]["a fit"])


@settings(QUIETLY, max_examples=150)
@given(key=st.sampled_from([*sorted(FIELDS), "more"]), value=JSON)
def test_a_recipe_with_anything_in_it_is_a_classifier_or_refused(key, value, good):
    try:
        learn = build(json.dumps({**good[0], key: value}), good[1])
    except UserError as e:
        assert e.text.isprintable()
    else:
        assert learn.dls.c == 10 and len(set(learn.dls.vocab)) == 10


def test_a_zip_file_whose_list_lies_is_refused(good, tmp_path):
    "Each of the sizes and places in the list and at the end of it, set to others."
    content = write(tmp_path / "learner.pkl", *good).read_bytes()
    first, end = content.index(b"PK\1\2"), content.index(b"PK\5\6")
    for at in (first + 20, first + 24, first + 42, end + 12, end + 16):
        for value in (0, 1, 2**31, 2**32 - 1):
            changed = content[:at] + struct.pack("<I", value) + content[at + 4 :]
            if changed == content:
                continue
            (tmp_path / "learner.pkl").write_bytes(changed)
            refusal(tmp_path / "learner.pkl")
