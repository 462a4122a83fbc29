"""Run folders, caches, batch and learner files with anything in them: refused in one line, or harmless."""

import io
import json
import os
import pickle
import re
import shutil
import signal
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, py2_dumps, write_cifar
from test_datasets import load
from test_recipe import ODD_TEXTS, ODD_VALUES, good, write  # noqa: F401

import train
from sifar import UserError, load_learner
from sifar.files import write_file
from sifar.runs.load import last_state
from sifar.runs.page import write_page
from sifar.runs.run import Run
from sifar.share.space import model_card

pytestmark = pytest.mark.slow
SCRIPT, STEERING = "<script>alert(1)</script>", "\x1b[2J\x1b]0;x\x07\u202e\r\n"


def megabytes(key):
    return int(Path("/proc/self/status").read_text().split(key)[1].split()[0]) / 1000


class Attacks:
    "Counts what is tried, and how it ends; whatever is neither refused nor harmless is a fault."

    def __init__(self):
        self.tried, self.refused, self.harmless, self.faults = 0, 0, 0, []

    def __call__(self, what, f, harmless=lambda found: False):
        "Try `f`: a UserError refuses it, `harmless` looks at what it gives; 2 s of work and 200 MB at most."
        self.tried += 1
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        start, before = time.process_time(), megabytes("VmRSS:")
        signal.signal(signal.SIGALRM, lambda *_: 1 / 0)
        signal.alarm(60)  # of a pipe that nobody writes into
        try:
            problem = None if harmless(f()) else "taken as good"
            self.harmless += not problem
        except UserError as e:
            problem = None if e.text.isprintable() and len(e.text) < 700 else e.text
            self.refused += not problem
        except Exception as e:
            problem = f"{type(e).__name__}: {e}"[:200]
        finally:
            signal.alarm(0)
        seconds, mb = time.process_time() - start, megabytes("VmHWM:") - before
        if problem or seconds > 2 or mb > 200:
            self.faults.append((what, problem, f"{seconds:.1f} s", f"{mb:.0f} MB"))


@pytest.fixture
def attack(campaign, request):
    attack = Attacks()
    yield attack
    what = request.function.__name__.removeprefix("test_").replace("_", " ")
    survived = attack.tried - len(attack.faults)
    campaign(what, attack.tried, survived, f"{attack.refused} refused, {attack.harmless} harmless")
    assert not attack.faults, "\n".join(map(str, attack.faults))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    "A run of two epochs."
    folder = tmp_path_factory.mktemp("runs")
    train.main([*SMALL, "--epochs", "2", "--runs", str(folder), "--name", "a"])
    return folder / "digits" / "a"


@pytest.fixture
def spoilt(plain, tmp_path):
    return Path(shutil.copytree(plain, tmp_path / "copy"))


ODD = (
    *(None, True, -1, 10**30, 1e300, "", SCRIPT, STEERING, "\ud800", "x" * 10**5, [], {}, [[1]], {"a": 1}),
    *({SCRIPT: SCRIPT}, float("nan")),
)


def places(o, path=()):
    "The paths of keys to all values in dictionaries."
    for k, v in o.items():
        yield (*path, k)
        if isinstance(v, dict):
            yield from places(v, (*path, k))


def changed(o, path, value):
    "A copy of the dictionary with `value` at the end of the path of keys."
    key, *rest = path
    return {**o, key: changed(o[key], rest, value) if rest else value}


def use(run):
    "All that is read of a run folder, as the page that is written of it; its own classes are left out."
    run = Run(run)
    assert run.about and run.fingerprint is not None
    write_page(run, run.history(), ["a note"], run.metrics())
    return (run.path / "report.html").read_text()


def is_plain(page):
    return "<script" not in page and "\x1b" not in page


@pytest.mark.parametrize("name", ["config.json", "metrics.json"])
def test_odd_values_in_the_files_of_a_run(spoilt, attack, name):
    about = json.loads((spoilt / name).read_text())
    for path in places(about):
        for value in ODD:
            (spoilt / name).write_text(json.dumps(changed(about, path, value)))
            attack((name, path, str(value)[:20]), lambda: use(spoilt), is_plain)


def test_odd_text_in_the_files_of_a_run(spoilt, attack):
    texts = (
        *(*ODD_TEXTS, "[" * 10**6, "[[]," * 10**6, "{}" * 10**7, '{"a":1,' * 10**5, "\0" * 10**6),
        *('{"settings": {"epochs": ' + "9" * 10**6 + "}}", '{"settings": NaN}', "\xff\xfe{}", " " * 10**8),
    )
    for name in ("config.json", "metrics.json", "history.csv"):
        before = (spoilt / name).read_bytes()
        for text in texts:
            (spoilt / name).write_text(text, encoding="latin-1" if text.startswith("\xff") else "utf-8")
            attack((name, text[:20]), lambda: use(spoilt))
        (spoilt / name).write_bytes(before)
    lines = (spoilt / "history.csv").read_text().splitlines()
    for column in range(8):
        for value in ("", "nan", "-inf", "1e999", "-1", "9" * 5000, "x", SCRIPT, '"', "1,1", "1_0", STEERING):
            cells = lines[1].split(",")
            cells[column] = value
            (spoilt / "history.csv").write_text("\n".join([lines[0], ",".join(cells), *lines[2:]]))
            attack(("history.csv", column, value[:10]), lambda: use(spoilt), is_plain)


def test_pipes_devices_folders_and_loops_in_place_of_files(spoilt, attack):
    makers = {
        "pipe": os.mkfifo,
        "folder": os.mkdir,
        "zeros": lambda path: os.symlink("/dev/zero", path),
        "loop": lambda path: os.symlink(path, path),
    }
    doors = {
        "config.json": lambda: Run(spoilt),
        "history.csv": lambda: Run(spoilt).history(),
        "metrics.json": lambda: Run(spoilt).metrics(),
        "models/last.pth": lambda: resume(spoilt),
        "models/best.pth": lambda: resume(spoilt),
        "training_log.txt": lambda: resume(spoilt),
        ".lock": lambda: resume(spoilt),
        "models": lambda: resume(spoilt),
        "learner.pkl": lambda: load_learner(spoilt),
    }
    for name, door in doors.items():
        for kind, make in makers.items():
            path = spoilt / name
            if path.exists():
                path.rename(spoilt / "aside")
            if (name, kind) != ("models", "folder"):
                make(path)
                attack((name, kind), door)
                path.rmdir() if kind == "folder" else path.unlink()
            if (spoilt / "aside").exists():
                (spoilt / "aside").rename(path)


def resume(run, *args):
    "As train.py --resume; what it ends with on its one line is a UserError."
    import contextlib

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            train.main(["--resume", str(run), *args])
    except SystemExit as e:
        assert e.code == 2 and said.getvalue().count("\n") == 1, said.getvalue()
        raise UserError(said.getvalue().strip()) from e


def test_changed_settings_and_checkpoints(spoilt, attack):
    about, last = (spoilt / "config.json").read_text(), (spoilt / "models" / "last.pth").read_bytes()
    settings = json.loads(about)["settings"]
    other = {"seed": 1, "lr": 0.2, "bs": 32, "epochs": 1, "aug": "weak", "opt": "adamw", "arch": "resnet10"}
    for k, v in {**other, "smoothing": 0.2, "wd": 0.1, "ema": 0.9, "clip": 1.0, "warmup": 0.5}.items():
        assert settings[k] != v
        (spoilt / "config.json").write_text(json.dumps(changed(json.loads(about), ("settings", k), v)))
        attack(("settings", k), lambda: resume(spoilt))
    (spoilt / "config.json").write_text(about)
    state = last_state(spoilt)
    odd_row = {**state["history"][0], "seconds": float("nan")}
    changes = (
        *({"history": [odd_row] * 2}, {"history": [dict.fromkeys(odd_row, SCRIPT)] * 2}, {"epoch": True}),
        *(
            {"best": "1"},
            {"best": torch.ones(2)},
            {"settings": 5},
            {"settings": {"seed": 1}},
            {"data": {}, "opt": {}},
        ),
        *({"model": {}}, {"model": {"a": torch.zeros(1)}}, {"best_sha256": "0" * 64}, {"epoch": 10**9}),
    )
    for change in changes:
        torch.save({**state, **change}, spoilt / "models" / "last.pth")
        attack(("last.pth", str(change)[:30]), lambda: resume(spoilt))
    (spoilt / "models" / "last.pth").write_bytes(last)
    for name, content in (
        ("another", torch.save),
        ("nothing", lambda _, f: f.write_bytes(b"")),
        ("last", None),
    ):
        best = spoilt / "models" / "best.pth"
        if content is None:
            best.write_bytes(last)
        else:
            content({k: v * 2 for k, v in state["model"].items()}, best)
        attack(("best.pth", name), lambda: resume(spoilt))


def test_links_in_place_of_files_that_are_written(tmp_path, attack):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    names = (
        "report.html",
        "metrics.json",
        "model.json",
        "config.json",
        "history.csv",
        "learner.pkl",
        "a b\n\x1b",
    )
    for name in names:
        for link in (name, f"{name}.tmp", f".{name}.tmp", f".{name}-0123456789abcdef.tmp"):
            (tmp_path / link).symlink_to(mine)
            attack(
                link,
                lambda: write_file(tmp_path / name, "new"),  # noqa: B023
                lambda _: mine.read_text() == "mine" and (tmp_path / name).read_text() == "new",  # noqa: B023
            )
            (tmp_path / link).unlink()


def test_markup_in_model_cards(exported, attack):
    about = json.loads((exported[0] / "model.json").read_text())
    odd = SCRIPT, "[x](javascript:alert(1))", "a\n---\nlicense: x", "\n# h", "`", "{{ 7 * 7 }}", STEERING, "|"

    def is_text(card):
        # code stands behind four spaces, and is shown as it is
        lines = [o for o in card.decode().splitlines() if not o.startswith("    ")]
        body = "\n".join(lines).split("---\n", 2)[2]
        return not re.search(r"(?<!\\)(<script|\]\(java)|\n# h|\x1b", body)

    for value in odd:
        changes = {"dataset": value, "arch": value, "git_commit": value, "commands": [value]}
        changes |= {"classes": [value] * 10, "versions": {value: value}}
        for k, v in changes.items():
            attack((k, value), lambda: model_card({**about, k: v}), is_text)  # noqa: B023


def npz(compress=zipfile.ZIP_STORED, **arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    with zipfile.ZipFile(file) as z:
        members = {name: z.read(name) for name in z.namelist()}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compress) as z:
        for name, content in members.items():
            z.writestr(name, content)
    return file.getvalue()


def test_caches_that_do_not_fit(image_folder, tmp_path, attack):
    want = load(image_folder, data=str(tmp_path))
    kept = next((tmp_path / "cache").glob("*.npz"))
    with np.load(kept) as z:
        have = dict(z)
    x, bad, why = have["images"], np.array([0]), np.array(["x"])
    shapes = x[:-1], x[:0], x[..., :1], x.astype(float), x[0], np.array(["a"]), x[:, :9]
    one_less = {"why": why, "images": x[1:]}
    odd = (
        *({"images": o} for o in shapes),
        *({"bad": bad}, {"bad": bad, "why": why}, {"why": why}, {"bad": -bad - 1, **one_less}),
        *({"bad": bad + 99, **one_less}, {"bad": np.array([0, 0]), "why": np.array(["x"] * 2)}),
        *({"bad": np.array(["0"]), **one_less}, {"key": np.array([have["key"]] * 2)}),
    )
    header = npz(**have)
    at = header.index(b"(72, ")
    contents = [npz(**{**have, **o}) for o in odd]
    contents += [header[:at] + b"(72 " + header[at + 4 :], header[:99], b"", header[:-30], pickle.dumps(have)]
    contents += [npz(zipfile.ZIP_DEFLATED, **{**have, "images": np.zeros((5 * 10**8,), np.uint8)})]
    for i, content in enumerate(contents):
        kept.write_bytes(content)
        attack(
            ("cache", i),
            lambda: load(image_folder, data=str(tmp_path)),
            lambda found: (
                np.array_equal(found.images, want.images) and np.array_equal(found.labels, want.labels)
            ),
        )
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)):
        kept.unlink()
        make(kept)
        attack(make, lambda: load(image_folder, data=str(tmp_path)), lambda found: len(found.images) == 72)
        if kept.is_dir():
            kept.rmdir()
            kept.touch()


def test_batch_files_that_take_memory_or_time(tmp_path, tiny_cifar, attack):
    folder, n = write_cifar(tmp_path, "cifar100"), 10**7
    keys = b"".join(b"\x8a\x0b" + (i * (2**61 - 1)).to_bytes(11, "little") + b"N" for i in range(n // 14))
    bombs = (
        *(b"\x80\x04" + o * n + b"." for o in (b"\x8f", b"]", b"}", b"(", b")", b"N2", b"]q\0")),
        *(b"\x80\x02Nr" + size + b"." for size in (b"\xff\xff\xff\x07", b"\xff\xff\xff\xff")),
        *(
            b"\x80\x04" + op + b"\0\0\0\x40\1\0\0\0"[:m] + b"."
            for op, m in ((b"\x8e", 8), (b"T", 4), (b"X", 4))
        ),
        *(
            b"\x80\x02}(" + keys + b"u.",
            b"L" + b"9" * n + b"L\n.",
            b"\x80\x02" + b"]" * 1000 + b"a" * 999 + b".",
        ),
        *(b"(" * 10**5 + b"t" * 10**5 + b".", b"\0" * n, py2_dumps({b"data": list(range(10**5))})),
    )
    for i, bomb in enumerate(bombs):
        (folder / "train").write_bytes(bomb)
        attack(("batch file", i), lambda: load(data=str(tmp_path)))
    (folder / "train").unlink()
    os.mkfifo(folder / "train")
    attack("pipe", lambda: load(data=str(tmp_path)))


def test_learner_files_with_odd_values(tmp_path, attack, good):  # noqa: F811
    recipe, weights = good
    names = recipe["classes"]
    odd = [(k, v) for k, v, _ in ODD_VALUES]
    odd += [("classes", [*names[:9], o]) for o in ({}, 1.5, True, ["a"], [[0.5] * 9])]
    odd += [("superclasses", o) for o in ([None] * 10, list(range(10)), names[:1], [*names[:9], STEERING])]
    for k, v in odd:
        write(tmp_path / "learner.pkl", {**recipe, k: v}, weights)
        attack((k, str(v)[:30]), lambda: load_learner(tmp_path))
    texts = [*ODD_TEXTS, json.dumps(recipe).replace('"size": 32', '"size": 3' + "2" * 4800)]
    for text in texts:
        write(tmp_path / "learner.pkl", text, weights)
        attack(text[:30], lambda: load_learner(tmp_path))


def test_names_that_are_no_text_or_steer_a_terminal(plain, tmp_path, attack, capsys):
    small = "--dataset", "digits", "--arch", "resnet8", "--bs", "1024", "--epochs", "1", "--sizes", "8"
    for name in (os.fsdecode(b"\xff\xfe"), "\x1b[31mred", "猫 🍎", "a\u202eb", "<b>", "-x"):
        folder = tmp_path / f"runs {name}"

        def shown(_, run=folder / "digits" / name):
            out = capsys.readouterr()
            text = (run / "training_log.txt").read_text()
            lines = [*out.out.splitlines(), *out.err.splitlines(), *text.splitlines()]
            return (run / "report.html").is_file() and all(o.isprintable() for o in lines)

        args = [*small, "--runs", str(folder), f"--name={name}"]
        attack(("name", name), lambda: train.main(args), shown)  # noqa: B023
        attack(("missing", name), lambda: resume(tmp_path / f"none {name}"))  # noqa: B023
