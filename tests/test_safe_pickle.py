"""Run as a script it prints the list of allowed names: python tests/test_safe_pickle.py > sifar/safe_globals.txt"""
import copyreg
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

if __name__ == "__main__": sys.path.insert(0, str(Path(__file__).parents[1]))

from sifar import Predictor, TrainConfig, UserError, load_learner
from sifar.config import ARCHS
from sifar.safe_pickle import LIST, Inspector, SafeUnpickler
from sifar.terminal import quiet_imports

TIMM = "timm:resnet18", "timm:convnext_atto", "timm:vit_tiny_patch16_224", "timm:efficientnet_b0", "timm:mobilenetv3_small_050", "timm:regnety_002"
NOTE = "# What the learners that export.py writes ask for; made by: python tests/test_safe_pickle.py > sifar/safe_globals.txt\n"


def looked_at_by(inspector): return type("Unpickler", (SafeUnpickler,), {"inspector": inspector})


def needed(folder):
    "The text of safe_globals.txt as fresh exports of every architecture ask for it."
    from sifar import get_dls, get_learner
    seen = set()

    class Recorder(Inspector):
        def allow(self, kind, name): seen.add(f"{kind} {name}")
    for settings in (*({"arch": o, "precision": "fp32"} for o in (*ARCHS, *TIMM)), {"precision": "bf16"},
                     {"precision": "bf16", "opt": "muon", "augment": "batch"}, {"precision": "fp32", "opt": "muon"}, {"precision": "fp16", "opt": "muon"},
                     {"precision": "fp32", "opt": "adamw", "wd_norm": False}):
        cfg = TrainConfig(dataset="digits", **{"arch": "resnet8", **settings})
        learn = get_learner(get_dls(cfg), cfg, path=folder)
        if cfg.arch == "resnet8":
            with learn.no_bar(), learn.no_logging(): learn.fit_warmup_cosine(1, warmup=0.2)
        learn.export("learner.pkl", pickle_module=pickle)
        load_learner(Path(folder) / "learner.pkl", unpickler=looked_at_by(Recorder))
    return NOTE + "".join(f"{o}\n" for o in sorted(seen))


def test_the_list_is_what_fresh_exports_of_every_architecture_need(tmp_path):
    assert LIST.read_text() == needed(tmp_path), "make it anew: python tests/test_safe_pickle.py > sifar/safe_globals.txt"


# ---- hostile files ----

def value(o): return pickle.dumps(o, 2)[2:-1]
def name(module, attr): return f"c{module}\n{attr}\n".encode()
def short(text): return b"\x8c" + bytes([len(text)]) + text.encode()
def dotted(module, attr): return short(module) + short(attr) + b"\x93"
def call(func, *args): return func + b"(" + b"".join(args) + b"tR"
def getattr_of(o, attr): return call(name("builtins", "getattr"), o, value(attr))


INT = name("builtins", "int")


def layer(children, more=b""):
    "A Sequential of the dictionary `children`, with `more` in its state."
    from torch import nn
    state = {k: v for k, v in vars(nn.Sequential()).items() if k != "_modules" and k != "_non_persistent_buffers_set"}
    keys = b"".join(value(k) + (value(v) if isinstance(v, bool | None) else b"}") for k, v in state.items())
    return name("torch.nn.modules.container", "Sequential") + b")\x81}(" + keys + b"X\x08\x00\x00\x00_modules" + children + more + b"ub"


def gadget(mark):
    "A Sequential that writes the file `mark` when it is called."
    partial, rebuild = name("functools", "partial"), name("torch._tensor", "_rebuild_from_type_v2")
    first = call(partial, name("builtins", "getattr"), call(name("pathlib", "PosixPath"), value(mark)), value("write_text"))
    second = call(partial, rebuild) + b"(" + rebuild + b")}(X\x08\x00\x00\x00new_type" + INT + value("args") + value(("text",)) + value("state") + b"NuNtb"
    return layer(b"}(" + value("0") + first + value("1") + second + b"u")


def made(module, cls, **state): return name(module, cls) + b")\x81}(" + b"".join(value(k) + v for k, v in state.items()) + b"ub"


def toucher(mark):
    "What makes the file `mark` when it is called with one argument, of listed parts alone: OptimWrapper calls a callback, which passes the call on to a path."
    callback = made("fastai.callback.core", "TrainEvalCallback", learn=call(name("pathlib", "PosixPath"), value(mark)))
    wrapper = name("fastai.optimizer", "OptimWrapper")
    return call(name("functools", "partial"), wrapper) + b"(" + wrapper + b"(" + value("touch") + callback + b"t" + value({"convert_groups": False}) + b"Ntb"


def loaders(*found): return made("fastai.data.core", "DataLoaders", loaders=b"](" + b"".join(found) + b"e")
def learner_of(dls, model): return made("fastai.learner", "Learner", dls=dls, model=model, cbs=b"]")


def doubled(n):
    "A Sequential of two that are the same Sequential of two, and so on."
    def put(i): return struct.pack("<I", 1000 + i)
    o = layer(b"}") + b"r" + put(0)
    for i in range(n): o = layer(b"}(" + value("0") + o + value("1") + b"j" + put(i) + b"u") + b"r" + put(i + 1)
    return o


def taken_back(o, key):
    "The made object `o`, in whose state `key` is None by the time that the file ends."
    start, memo = o.index(b")\x81}") + 3, struct.pack("<I", 5000)
    return o[:start] + b"r" + memo + o[start:] + b"j" + memo + value(key) + b"Ns0"


def later(mark):
    "Files that use listed names alone to make the file `mark` while they are loaded, afterwards, or when they predict, as (what, opcodes)."
    random, items = call(name("random", "Random")), made("fastai.data.core", "TfmdLists", items=value(["x"]), tfms=toucher(mark))
    yield "a state that runs when it is read", random + items + b"b"
    yield "a state that is asked for its keys", name("fastai.data.core", "DataLoaders") + b")\x81" + made("fastai.learner", "AvgMetric", keys=toucher(mark)) + b"b"
    counted = made("sifar.dataloaders", "ArrayDL", n=value(0), bs=value(1), drop_last=b"\x88", rng=random, before_iter=toucher(mark))
    yield "arguments that run when they are counted", name("fastai.learner", "AvgLoss") + counted + b"\x81"
    asked = made("fastai.data.core", "Datasets", tls=made("fastai.learner", "AvgMetric", attrgot=toucher(mark)))
    yield "a storage that runs when it is asked for its type", b"(" + value("storage") + asked + value("0") + value("cpu") + value(1) + b"tQ"
    yield "a recurrent layer that looks into its weights", made("torch.nn.modules.rnn", "LSTM", _all_weights=items)
    yield "a list that is appended to", made("fastai.learner", "AvgMetric", extend=toucher(mark)) + b"(" + value(1) + b"e"
    metric = made("fastai.learner", "AvgMetric", to=toucher(mark))
    yield "a loader of another kind", learner_of(loaders(metric), layer(b"}"))
    instead = layer(b"}", value("_compiled_call_impl") + toucher(mark))
    yield "what a layer calls in place of its forward", learner_of(loaders(), instead)
    yield "the same, taken back after it was used", learner_of(loaders(), taken_back(instead, "_compiled_call_impl"))


def hostile(mark):
    "Pickles that run something, as (what, opcodes, whether Python's own unpickler lets them make the file `mark`)."
    touch = f"{sys.executable} -c \"open({mark!r}, 'w')\""
    code, line = value(f"open({mark!r}, 'w').close()"), value(touch)
    system, learner = name("os", "system"), name("fastai.learner", "Learner")
    nested = b"\x80\x04" + call(system, line) + b"."
    path = name("pathlib", "Path")
    yield "os.system", call(system, line), True
    yield "posix.system", call(name("posix", "system"), line), True
    yield "nt.system", call(name("nt", "system"), line), False
    yield "eval", call(name("builtins", "eval"), code), True
    yield "exec", call(name("builtins", "exec"), code), True
    yield "exec by its old name", call(name("__builtin__", "exec"), code), False
    yield "open", call(name("builtins", "open"), value(mark), value("w")), True
    yield "__import__", call(getattr_of(call(name("builtins", "__import__"), value("os")), "system"), line), True
    yield "subprocess", call(name("subprocess", "getoutput"), line), True
    yield "Popen", call(name("subprocess", "Popen"), value(["touch", mark])), False
    yield "fastcore.xtras.run", call(name("fastcore.xtras", "run"), line), True
    yield "runpy", call(name("runpy", "_run_code"), code, b"}"), True
    yield "timeit", call(name("timeit", "timeit"), value("1"), code, name("time", "time"), value(1)), False
    yield "pty", call(name("pty", "spawn"), line), False
    yield "importlib", call(name("importlib", "import_module"), value("antigravity")), False
    yield "attrgetter", call(call(name("operator", "attrgetter"), value("system")), name("fastai.learner", "os")), False
    yield "methodcaller", call(call(name("operator", "methodcaller"), value("system"), line), call(name("importlib", "import_module"), value("os"))), True
    yield "a dotted name", call(dotted("fastai.learner", "os.system"), line), False
    yield "a dotted name in a listed module", call(dotted("fastai.learner", "torch.os.system"), line), False
    yield "a chain of getattr from a listed class", call(getattr_of(getattr_of(getattr_of(learner, "fit"), "__globals__"), "get"), value("x")), True
    yield "getattr of a method of a listed class", getattr_of(learner, "load"), True
    yield "a module's attribute", name("fastai.learner", "torch"), True
    yield "a nested pickle", call(name("pickle", "loads"), value(nested)), True
    yield "a nested pickle by its inner name", call(name("_pickle", "loads"), value(nested)), True
    yield "torch.load", call(name("torch", "load"), value("/nowhere")), False
    yield "torch.hub", call(name("torch.hub", "load"), value("a/b"), value("c")), False
    yield "map behind set", call(name("__builtin__", "set"), call(name("builtins", "map"), system, value([touch]))), False
    yield "a listed partial, called", call(call(name("functools", "partial"), name("pathlib", "Path")), value(mark)), True
    yield "a partial of os.system, called", call(call(name("functools", "partial"), system), line), True
    yield "a partial filled by __setstate__", call(call(name("functools", "partial"), path) + b"(" + system + b")}N" + b"tb", line), True
    yield "a memo that is read again as a function", path + b"q\x010" + system + b"q\x010h\x01" + b"0" + call(b"h\x01", line), True
    yield "the extension registry", call(b"\x82\x77", line), True
    yield "the extension registry, two bytes", call(b"\x83\x77\x00", line), True
    yield "INST", b"(" + line + b"ios\nsystem\n", True
    yield "OBJ", b"(" + system + line + b"o", True
    yield "NEWOBJ of a class that is not listed", name("io", "FileIO") + value((mark, "w")) + b"\x81", True
    yield "NEWOBJ_EX", name("io", "FileIO") + value((mark, "w")) + b"}\x92", True
    yield "filling a listed class itself", name("sifar.dataloaders", "ReadLabel") + b"(N" + value({"no_such": 1}) + b"tb", True
    yield "filling a function", name("fastai.metrics", "accuracy") + value({"no_such": 1}) + b"b", True
    yield "calling a class that is only to be filled", call(name("sifar.dataloaders", "ReadImage"), b"N", value(32)), True
    yield "a function of timm", call(name("timm.models", "create_model"), value("resnet18")), True
    yield "what a module of torch.nn imports", name("torch.nn.modules.module", "torch"), True
    yield "calling a layer", call(name("torch.nn.modules.linear", "Identity")), True
    yield "persistent id as text", b"Pos.system\n", False
    yield "persistent id of a function", b"(" + value("storage") + system + value("0") + value("cpu") + value(1) + b"tQ", False
    yield "cloudpickle", call(name("cloudpickle.cloudpickle", "subimport"), value("os")), True
    yield "code objects", name("types", "CodeType"), True
    yield "ctypes", call(name("ctypes", "CDLL"), b"N"), True
    yield "what rebuilds a tensor, given another function", call(name("torch._tensor", "_rebuild_from_type_v2"), path, path, value((mark,)), b"}"), False
    write = gadget(mark)
    again = call(name("torch._tensor", "_rebuild_from_type_v2"), name("torch._tensor", "_rebuild_from_type_v2"), INT, b"(" + write + INT + value((1,)) + b"Nt", b"N")
    yield "what rebuilds a tensor, given itself", again, True
    yield "a __setstate__ that is planted", layer(b"}", b"X\x0c\x00\x00\x00__setstate__" + write) + b"K\x01b", True
    planted = name("sifar.datasets", "ImageData") + b")\x81}X\x03\x00\x00\x00cpu" + call(name("functools", "partial"), write, b"K\x01") + b"sb"
    yield "a method that is planted in a learner", learner + b")\x81}X\x03\x00\x00\x00dls" + planted + b"sb", True
    yield "a forward that is planted in a layer", layer(b"}", b"X\x07\x00\x00\x00forward" + write), True
    yield "a function among layers", write, True
    yield "a module of the working directory", name("timm.nothing", "X"), False
    yield "a tuple so deep that its hash is", b"})" + b"\x85" * 100_000 + b"Ns", True
    yield "a tuple so wide that its hash takes for ever", b"})" + b"2\x86" * 34 + b"Ns", False
    yield "an id so wide that its hash takes for ever", b")" + b"2\x86" * 34 + b"Q", False
    yield "an array of many gigabytes", name("numpy", "ndarray") + b"(\x8a\x05" + (3 * 10**9).to_bytes(5, "little") + b"t\x81", True
    for what, pickled in later(mark): yield what, pickled, False
    yield "attributes that are set one by one, as properties are", name("sifar.dataloaders", "ReadLabel") + b")\x81N" + value({"data": 1}) + b"\x86b", True
    yield "something whose items are set", learner + b")\x81" + value("k") + value(1) + b"s", False
    wide, deep = b")" + b"2\x86" * 40, b")" + b"\x85" * 300_000
    yield "a set of what takes for ever to hash", call(name("__builtin__", "set"), b"]" + wide + b"a"), False
    yield "a set of what is too deep to hash", call(name("__builtin__", "set"), b"]" + deep + b"a"), False
    yield "an enumeration's member of what takes for ever to print", call(name("timm.layers.format", "Format"), b"]" + wide + b"a"), False
    yield "an enumeration's member that is changed", call(name("fastai.callback.fp16", "AMPMode"), value("fp16")) + value({"_value_": "x"}) + b"b", True
    yield "a state of random numbers that is a huge one", call(name("random", "Random")) + value((2, ["%400000000d"], None)) + b"b", False
    yield "layers that stand in two places, thirty times over", learner_of(loaders(), doubled(30)), False
    yield "a layer in itself", learner_of(loaders(), layer(b"}" + value("0") + b"j\xe8\x03\0\0s").replace(b")\x81}", b")\x81r\xe8\x03\0\0}", 1)), False
    yield "hooks that are no dictionary", learner_of(loaders(), layer(b"}", value("_forward_hooks") + toucher(mark))), False
    yield "hooks of a tensor", call(name("torch._utils", "_rebuild_parameter"), b"N", b"\x88", b"}" + value(1) + toucher(mark) + b"s"), False
    yield "a name that writes on the terminal", dotted("os\nall is well\x1b[2J", "system"), False
    yield "a name that is very long", name("os", "x" * 100_000), False
    yield "a file that is removed", call(name("os", "remove"), value(mark)), False


def archive(path, pickled, **files):
    "Write a file as torch.save does, with the opcodes `pickled` as its pickle."
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("learner/data.pkl", b"\x80\x04" + pickled + b".")
        z.writestr("learner/version", "3\n")
        z.writestr("learner/byteorder", sys.byteorder)
        for k, v in files.items(): z.writestr(f"learner/{k}", v)
    return path


class Plain(pickle.Unpickler):
    def persistent_load(self, pid): return pid


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("what", [o for o, *_ in hostile("x")])
def test_nothing_in_a_hostile_file_runs(what, tmp_path):
    mark = tmp_path / "ran"
    _, pickled, works = next(o for o in hostile(str(mark)) if o[0] == what)
    copyreg.add_extension("os", "system", 0x77)
    try:
        if works: Plain(io.BytesIO(b"\x80\x04" + pickled + b".")).load()        # so the file does what it is meant to, where it is let
        mark.unlink(missing_ok=True)
        with pytest.raises(UserError) as e: load_learner(archive(tmp_path / "learner.pkl", pickled))
    finally: copyreg.remove_extension("os", "system", 0x77)
    assert not mark.exists() and str(tmp_path / "learner.pkl") in e.value.text and e.value.text.isprintable() and len(e.value.text) < 500


@pytest.mark.parametrize("what", [o for o, _ in later("x")])
def test_without_the_list_such_a_learner_runs_what_it_brings(what, tmp_path):
    class Unchecked(Inspector):
        def load(self): pass
    mark = tmp_path / "ran"
    file = archive(tmp_path / "learner.pkl", dict(later(str(mark)))[what])
    try: load_learner(file, unpickler=looked_at_by(Unchecked)).model(torch.zeros(1))
    except (UserError, TypeError, AttributeError): pass         # after it has run
    assert mark.exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_most_hostile_files_are_shown_to_work_on_an_unpickler_that_does_not_check(tmp_path):
    mark, ran = tmp_path / "ran", 0
    copyreg.add_extension("os", "system", 0x77)
    for _, pickled, works in hostile(str(mark)):
        if works: Plain(io.BytesIO(b"\x80\x04" + pickled + b".")).load()
        ran += mark.exists()
        mark.unlink(missing_ok=True)
    copyreg.remove_extension("os", "system", 0x77)
    assert ran >= 20


# ---- files that are not what they should be ----

@pytest.fixture
def learner_file(exported, tmp_path):
    "A copy of an exported learner with its model.json."
    for o in ("learner.pkl", "model.json"): shutil.copy(exported[0] / o, tmp_path)
    return tmp_path / "learner.pkl"


def refusal(path):
    with pytest.raises(UserError) as e: load_learner(path)
    assert "\n" not in e.value.text
    return e.value.text


def test_a_learner_loads_from_its_file_and_from_its_folder(learner_file):
    assert list(load_learner(learner_file).dls.vocab) == list(load_learner(learner_file.parent).dls.vocab) == list("0123456789")
    learner_file.with_name("model.json").unlink()
    assert list(load_learner(learner_file).dls.vocab) == list("0123456789")


def test_a_file_that_was_altered_is_refused(learner_file):
    content = bytearray(learner_file.read_bytes())
    content[len(content) // 2] ^= 1
    learner_file.write_bytes(content)
    assert "SHA-256 differs" in refusal(learner_file)
    learner_file.with_name("model.json").write_text("{")
    assert "model.json is damaged" in refusal(learner_file)


@pytest.mark.parametrize("n", [0, 1, 1000, 100_000, -1])
def test_a_truncated_file_is_refused(learner_file, n):
    learner_file.with_name("model.json").unlink()
    learner_file.write_bytes(learner_file.read_bytes()[:n])
    assert "no learner file, or a damaged one" in refusal(learner_file)


@pytest.mark.parametrize("content", [b"hello\n", b"\x80\x04N.", b"\x89PNG\r\n\x1a\n", b"PK\x05\x06" + bytes(18)])
def test_another_kind_of_file_is_refused(tmp_path, content):
    (tmp_path / "learner.pkl").write_bytes(content)
    assert "make one with python export.py" in refusal(tmp_path / "learner.pkl")


def test_what_is_no_learner_is_refused(tmp_path):
    assert "learner.pkl" in refusal(archive(tmp_path / "learner.pkl", b"}"))
    assert "learner.pkl" in refusal(archive(tmp_path / "learner.pkl", value([1, 2])))
    assert "holds no learner" in refusal(archive(tmp_path / "learner.pkl", b"N", **{"constants.pkl": b"N."}))
    assert "not safe to load: it holds no learner" in refusal(archive(tmp_path / "learner.pkl", made("fastai.learner", "Learner", dls=b"N")))
    assert "is missing" in refusal(tmp_path / "nothing.pkl")


@pytest.mark.parametrize("more", ["constants.pkl", "constants.PKL", "constants.pklxxxx", "data.PKL", "data/x", "code/__torch__.py", "../learner/data.pkl"])
def test_a_file_with_more_than_torch_saves_is_refused(tmp_path, more):
    assert "holds no learner" in refusal(archive(tmp_path / "learner.pkl", b"N", **{more: b"N."}))


def test_a_file_that_unpacks_to_more_than_it_is_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "learner.pkl", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("learner/data.pkl", b"\x80\x04N.")
        z.writestr("learner/data/0", bytes(100_000_000))
    assert "holds no learner" in refusal(tmp_path / "learner.pkl")


def test_a_torchscript_archive_behind_another_directory_is_not_reached(tmp_path):
    class Script(torch.nn.Module):
        def forward(self, x): return x
    with warnings.catch_warnings(action="ignore"): torch.jit.save(torch.jit.script(Script()), tmp_path / "a")
    with zipfile.ZipFile(tmp_path / "a") as a, zipfile.ZipFile(tmp_path / "b", "w") as b:
        for o in a.infolist(): b.writestr(zipfile.ZipInfo(o.filename), a.read(o))
    content = (tmp_path / "b").read_bytes()
    end = content.rfind(b"PK\5\6")
    size, offset = struct.unpack("<II", content[end + 12:end + 20])
    real = content[offset:offset + size]
    shown = real.replace(b"constants.pkl", b"constants.pkx").replace(b"debug_pkl", b"debug_pkx")          # Python reads this one, torch the other
    (tmp_path / "learner.pkl").write_bytes(content[:offset] + real + shown + content[end:])
    assert "learner.pkl" in refusal(tmp_path / "learner.pkl")


def test_a_tensor_that_is_larger_than_its_data_is_refused(exported, tmp_path):
    learn = load_learner(exported[0])
    learn.model.head[2].weight = torch.nn.Parameter(torch.zeros(1).expand(10_000, 10_000, 100))
    with warnings.catch_warnings(action="ignore"): torch.save(learn, tmp_path / "learner.pkl", pickle_protocol=2)
    assert "something else than layers and tensors" in refusal(tmp_path / "learner.pkl")


def test_a_method_that_is_planted_in_a_real_learner_is_refused(exported, tmp_path):
    for plant in (lambda m: vars(m).update(forward=m.stem), lambda m: m.register_forward_hook(len), lambda m: m.stem._modules.update({"3": torch.device})):
        learn = load_learner(exported[0])
        plant(learn.model)
        with warnings.catch_warnings(action="ignore"): torch.save(learn, tmp_path / "learner.pkl", pickle_protocol=2)
        assert "not safe to load" in refusal(tmp_path / "learner.pkl")


def test_one_thing_in_the_place_of_many_is_refused(exported, tmp_path):
    "fastai goes through these, and what it goes through would do its work."
    for plant in (lambda dls: vars(dls).update(loaders=dls.loaders[1]), lambda dls: vars(dls.valid.dataset).update(tls=dls.valid.dataset.tls[0]),
                  lambda dls: vars(dls).update(loaders={Path: None}), lambda dls: vars(dls.valid.after_batch).update(fs={torch.device: None})):
        learn = load_learner(exported[0])
        plant(learn.dls)
        with warnings.catch_warnings(action="ignore"): torch.save(learn, tmp_path / "learner.pkl", pickle_protocol=2)
        assert "not safe to load: it holds fast" in refusal(tmp_path / "learner.pkl")


def test_a_learner_that_needs_a_package_which_is_not_here_names_it(exported, tmp_path, monkeypatch):
    with zipfile.ZipFile(exported[0] / "learner.pkl") as old, zipfile.ZipFile(tmp_path / "learner.pkl", "w") as new:
        for o in old.infolist(): new.writestr(o.filename, old.read(o).replace(b"csifar.models\nResNet\n", b"ctimm.models.nothing\nResNet\n"))
    assert "No module named 'timm.models.nothing'" in refusal(tmp_path / "learner.pkl")


@pytest.mark.parametrize("spoil", [lambda o: o.dls.valid.after_batch.fs.clear(), lambda o: vars(o.dls.valid.dataset.tls[0].tfms[0]).pop("sz"), lambda o: vars(o.dls.valid.dataset.tls[0].tfms[0]).update(sz=5000)])
def test_a_learner_that_is_no_classifier_of_images_is_one_line(exported, tmp_path, spoil):
    learn = load_learner(exported[0])
    spoil(learn)
    with warnings.catch_warnings(action="ignore"): torch.save(learn, tmp_path / "learner.pkl", pickle_protocol=2)
    with pytest.raises(UserError, match="is no classifier of images, or a damaged one") as e: Predictor(tmp_path)
    assert "\n" not in e.value.text


@pytest.mark.parametrize("path", [b"pathlib\nWindowsPath", b"pathlib._local\nPosixPath", b"pathlib._local\nWindowsPath"])
def test_a_learner_from_another_system_or_python_loads(exported, tmp_path, path):
    with zipfile.ZipFile(exported[0] / "learner.pkl") as old, zipfile.ZipFile(tmp_path / "learner.pkl", "w") as new:
        for o in old.infolist(): new.writestr(o.filename, old.read(o).replace(b"cpathlib\nPosixPath\n", b"c" + path + b"\n"))
        assert old.read("learner/data.pkl") != new.read("learner/data.pkl")
    assert isinstance(load_learner(tmp_path / "learner.pkl").path, Path)


def test_the_sum_of_the_file_is_in_model_json(exported):
    about = json.loads((exported[0] / "model.json").read_text())
    assert about["sha256"] == hashlib.sha256((exported[0] / "learner.pkl").read_bytes()).hexdigest()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    quiet_imports()
    with tempfile.TemporaryDirectory() as folder:
        with open(os.devnull, "w") as null:
            stdout, sys.stdout = sys.stdout, null
            text = needed(folder)
        sys.stdout = stdout
        print(text, end="")
