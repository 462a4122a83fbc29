"""Hostile learner files, mutated and generated: each is refused in one line, or is a classifier."""

import json
import pickle
import pickletools
import random
import time
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_recipe import JSON, QUIETLY, good, header, hostile, text_of, write  # noqa: F401

from sifar import UserError, load_learner
from sifar.errors import is_visible
from sifar.training.recipe import pickle_of

pytestmark = pytest.mark.slow


class Door:
    "Counts the files that load_learner is tried with, and that it refuses; the others must be classifiers."

    def __init__(self, path):
        self.path, self.tried, self.refused, self.slowest = path, 0, 0, 0.0

    def try_it(self):
        "The learner in the file, or None where it is refused."
        self.tried += 1
        start = time.process_time()
        try:
            learn = load_learner(self.path)
        except UserError as e:
            self.refused += 1
            assert str(self.path) in e.text and e.text.isprintable() and len(e.text) < 500
            learn = None
        self.slowest = max(self.slowest, time.process_time() - start)
        if learn:
            x = torch.zeros(1, 3, *[learn.dls.valid.dataset.tls[0].tfms[0].sz] * 2)
            assert learn.model(x).shape == (1, len(learn.dls.vocab))
            assert all(is_visible(o) for o in learn.dls.vocab)
        return learn


@pytest.fixture
def door(tmp_path, campaign, request):
    "A Door whose count joins the table that is printed at the end."
    door = Door(tmp_path / "learner.pkl")
    yield door
    what = request.function.__name__.removeprefix("test_").replace("_", " ")
    note = f"{door.refused} refused, the others load; the slowest took {door.slowest:.1f} s"
    campaign(what, door.tried, door.tried, note)
    assert door.slowest < 2


def changed(content, rng):
    "`content` with some of its bytes changed, removed, doubled or moved."
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        a, b = sorted(rng.randrange(len(content)) for _ in range(2))
        b = min(b, a + rng.choice((1, 4, 40)))
        kind = rng.randrange(5)
        if kind < 2:
            content[a] = rng.randrange(256)
        elif kind == 2:
            content[a] ^= 1 << rng.randrange(8)
        elif kind == 3:
            content[a:b] = content[a:b] * 2
        else:
            del content[a:b]
    return bytes(content)


def test_learner_files_with_changed_bytes(good, door):  # noqa: F811
    rng, content = random.Random(0), write(door.path, *good).read_bytes()
    for _ in range(1000):
        door.path.write_bytes(changed(content, rng))
        door.try_it()


def test_pickles_with_changed_bytes(good, door):  # noqa: F811
    rng, pickled = random.Random(1), pickle_of(text_of(good[0]).encode(), len(good[1]))
    for _ in range(1000):
        write(door.path, *good, changed(pickled, rng))
        door.try_it()


def test_pickles_with_other_opcodes(good, door):  # noqa: F811
    "Every opcode that there is, at every place between two."
    pickled = pickle_of(text_of(good[0]).encode(), len(good[1]))
    for _, _, at in pickletools.genops(pickled):
        for o in pickletools.opcodes:
            write(door.path, *good, pickled[:at] + o.code.encode("latin-1") + pickled[at:])
            assert door.try_it() is None


def test_recipes_with_changed_bytes(good, door):  # noqa: F811
    rng, text = random.Random(2), text_of(good[0]).encode()
    for _ in range(1000):
        write(door.path, *good, pickle_of(changed(text, rng), len(good[1])))
        door.try_it()


def test_headers_with_changed_bytes(good, door):  # noqa: F811
    rng, content = random.Random(3), good[1].numpy().tobytes()
    end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(1000):
        weights = changed(content[:end], rng) + content[end:]
        write(door.path, good[0], torch.frombuffer(bytearray(weights), dtype=torch.uint8))
        door.try_it()


def test_commands_in_any_disguise(good, door, tmp_path):  # noqa: F811
    "None is run; that the payloads would be, where an unpickler reads them, test_recipe.py shows."
    mark = tmp_path / "ran"
    wrappers = (
        lambda o: b"(" + o + b"t",
        lambda o: b"](" + o + b"e",
        lambda o: o + b"q\x500h\x50",
        lambda o: o + b"0N",
        lambda o: b"\x95" + len(o).to_bytes(8, "little") + o,
    )
    for _, pickled in hostile(text_of(good[0]), good[1], mark):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            for wrap in wrappers:
                write(door.path, *good, b"\x80" + bytes([protocol]) + wrap(pickled[2:-1]) + b".")
                assert door.try_it() is None and not mark.exists()


def test_recipes_of_any_values(good, door):  # noqa: F811
    names = st.lists(st.text(max_size=5), min_size=10, max_size=10)
    known = "resnet10", "timm:test_vit", "timm:hrnet_w64", "timm:hf-hub:a/b", "timm:inception_v3"
    archs = st.sampled_from(known) | st.text().map("timm:".__add__)
    numbers = st.lists(st.floats(), min_size=3, max_size=3)

    fields = {
        "classes": names | JSON,
        "superclasses": names | JSON,
        "arch": archs | JSON,
        "size": st.integers(-9, 600) | JSON,
        "mean": numbers | JSON,
        "std": numbers | JSON,
        "format": st.integers(-1, 3) | JSON,
        "more": JSON,
    }

    @settings(QUIETLY, max_examples=1000)
    @given(st.fixed_dictionaries({}, optional=fields))
    def check(changes):
        write(door.path, {**good[0], **changes}, good[1])
        door.try_it()

    check()


def test_weights_of_any_shapes(good, door):  # noqa: F811
    shape = st.lists(st.integers(-1, 2**64), max_size=4)
    offsets = st.lists(st.integers(0, 2**64), min_size=2, max_size=2)
    dtype = st.sampled_from(["F32", "F16", "F64", "I64", "BOOL", "F4", "x"])
    tensor = st.fixed_dictionaries({"dtype": dtype, "shape": shape, "data_offsets": offsets})
    content = good[1].numpy().tobytes()
    end = 8 + int.from_bytes(content[:8], "little")
    tensors = json.loads(content[8:end])
    key = st.sampled_from(sorted(tensors)) | st.text()

    @settings(QUIETLY, max_examples=500)
    @given(st.dictionaries(key, tensor | JSON, max_size=3), st.booleans())
    def check(changes, alone):
        write(door.path, good[0], header(changes if alone else {**tensors, **changes}, content[end:]))
        door.try_it()

    check()


def test_zip_files_with_changed_lists(good, door):  # noqa: F811
    "The list of members at the end of the file, and the heads of members, with any bytes changed."
    rng, content = random.Random(4), write(door.path, *good).read_bytes()
    with zipfile.ZipFile(door.path) as z:
        start, heads = z.start_dir, [o.header_offset for o in z.infolist()]
    for _ in range(1000):
        other = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 4))):
            at = rng.choice((rng.randrange(start, len(content)), rng.choice(heads) + rng.randrange(30)))
            other[at] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        door.path.write_bytes(other)
        door.try_it()
