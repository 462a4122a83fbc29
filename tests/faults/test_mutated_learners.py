"""Hostile learner files by mutation and generation: none runs anything, though Python's own unpickler lets most of them."""
import copyreg
import io
import random
import zipfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_safe_pickle import Plain, archive, call, hostile, layer, name, value

from sifar import UserError, load_learner

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]

WRAPPERS = {
    "a list": lambda p: b"](" + p + b"e", "a dictionary": lambda p: b"}(" + value("k") + p + b"u", "a tuple": lambda p: p + b"\x85",
    "a learner": lambda p: name("fastai.learner", "Learner") + b")\x81}(" + value("dls") + p + b"ub",
    "layers": lambda p: layer(b"}(" + value("0") + p + b"u"), "the state of layers": lambda p: layer(b"}", value("hook") + p),
    "what is dropped": lambda p: p + b"0" + value("fine"), "what is fetched from the memo": lambda p: p + b"q\x050h\x05",
    "a frame": lambda p: b"\x95" + len(p).to_bytes(8, "little") + p, "another protocol": lambda p: b"\x80\x02" + p,
    "arguments": lambda p: call(name("functools", "partial"), name("builtins", "int"), p), "a set": lambda p: b"\x8f(" + p + b"\x90",
    "a tensor's hooks": lambda p: call(name("torch._utils", "_rebuild_tensor_v2"), b"N", b"K\x00", b")", b")", b"\x89", p)}


def test_generated_hostile_files_run_nothing(tmp_path, campaign):
    mark, tried, sprung = tmp_path / "ran", set(), set()
    payloads = list(hostile(str(mark)))

    @settings(max_examples=400, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(payloads), st.lists(st.sampled_from(sorted(WRAPPERS)), min_size=1, max_size=4))
    def check(payload, wrappers):
        _, pickled, works = payload
        for o in wrappers: pickled = WRAPPERS[o](pickled)
        if pickled in tried: return
        tried.add(pickled)
        with pytest.raises(UserError) as e: load_learner(archive(tmp_path / "learner.pkl", pickled))
        assert not mark.exists() and str(tmp_path / "learner.pkl") in e.value.text and "\n" not in e.value.text
        if not works: return
        try: Plain(io.BytesIO(b"\x80\x04" + pickled + b".")).load()
        except Exception: pass                      # what was to run has run by then, or not
        if mark.exists(): sprung.add(pickled)
        mark.unlink(missing_ok=True)

    copyreg.add_extension("os", "system", 0x77)
    try: check()
    finally: copyreg.remove_extension("os", "system", 0x77)
    assert len(tried) >= 100 and len(sprung) >= 50
    campaign("hostile learner files", len(tried), len(tried), f"{len(sprung)} of them run what they carry where nothing checks them")


def test_a_learner_file_with_changed_bytes_loads_or_is_refused(exported, tmp_path, campaign):
    rng, refused = random.Random(0), 0
    with zipfile.ZipFile(exported[0] / "learner.pkl") as z: files = {o: z.read(o) for o in z.namelist()}
    pickled = next(o for o in files if o.endswith("data.pkl"))
    for _ in range(300):
        content = bytearray(files[pickled])
        for _ in range(rng.choice((1, 1, 1, 2, 8))): content[rng.randrange(len(content))] = rng.randrange(256)
        with zipfile.ZipFile(tmp_path / "learner.pkl", "w") as z:
            for k, v in files.items(): z.writestr(k, bytes(content) if k == pickled else v)
        try: load_learner(tmp_path / "learner.pkl")
        except UserError as e:
            refused += 1
            assert str(tmp_path / "learner.pkl") in e.text and "\n" not in e.text
    assert refused > 100
    campaign("learner files with changed bytes", 300, 300, f"{refused} refused, the others load")
