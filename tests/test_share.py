import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
import yaml
from conftest import COLD, SHORT, write_cifar
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import SaveModelCallback
from fastai.data.all import IntToFloatTensor, Transform
from fastai.torch_core import TensorImage
from fastcore.all import first
from PIL import Image
from safetensors.torch import load_file

import export
import train
from bench.archive import archive
from sifar import Predictor, TrainConfig, UserError, get_dls, get_learner, load_learner
from sifar.data.datasets import load_data
from sifar.runs.arguments import parse_args
from sifar.runs.load import load_run
from sifar.runs.run import Run
from sifar.share.classifier import get_classifier
from sifar.share.export import map_weights, write_learner
from sifar.share.predict import main as predict
from sifar.share.space import model_card, write_space

ROOT = Path(__file__).parents[1]


def failure(capsys, f, *args):
    "The line that a command writes to stderr as it ends with exit code 2."
    with pytest.raises(SystemExit) as e:
        f([str(o) for o in args])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1
    return err


def copied(run, folder):
    "A copy of a run as it was before it was exported."
    return Path(shutil.copytree(run, folder, ignore=shutil.ignore_patterns("learner.pkl", "model.*")))


def tensors_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- learner.pkl and model.json ----


def test_an_export_says_what_it_is(exported):
    about, metrics = (json.loads((exported[0] / o).read_text()) for o in ("model.json", "metrics.json"))
    assert (
        about["classes"] == list("0123456789")
        and about["superclasses"] is None
        and about["size"] == 32
        and len(about["mean"]) == len(about["std"]) == 3
    )
    assert (
        about["arch"] == "resnet8"
        and about["parameters"] == 78_042
        and about["epochs"] == 8
        and about["dataset"] == "digits"
    )
    assert (
        about["test"] == metrics["test"]
        and about["valid"] == metrics["valid"]
        and about["images"] == metrics["images"]
    )
    assert (
        len(about["commands"]) == 1
        and torch.__version__.startswith(about["versions"]["torch"])
        and re.match(r"\d{4}-\d\d-\d\dT", about["date"])
    )


def test_nothing_that_is_exported_tells_of_this_machines_folders(exported):
    run, space = exported
    for path in (run / "model.json", run / "learner.pkl", space / "README.md"):
        assert not re.search(
            rf"{re.escape(str(run.parents[1]))}|{re.escape(str(Path.home()))}/".encode(), path.read_bytes()
        ), path


def test_the_exported_learner_is_the_run(exported):
    with torch.no_grad():
        assert tensors_equal(
            load_learner(exported[0]).model.state_dict(), load_run(exported[0]).model.state_dict()
        )


def test_the_average_of_the_weights_is_what_is_exported(tmp_path):
    train.main([*SHORT, "--valid-pct", "0", "--ema", "0.99", "--runs", str(tmp_path), "--name", "a"])
    export.main([str(run := tmp_path / "digits" / "a")])
    state, got = (
        torch.load(run / "models" / "last.pth", weights_only=True),
        load_learner(run).model.state_dict(),
    )
    assert tensors_equal(got, state["ema"]["model"]) and not tensors_equal(got, state["model"])


@pytest.mark.slow
@pytest.mark.skipif(
    "SIFAR_DATA" not in os.environ, reason="SIFAR_DATA names no folder with the real CIFAR-100"
)
def test_the_published_classifier_is_as_good_as_its_record_says(tmp_path):
    run = shutil.copytree(ROOT / "results" / "cifar100-resnet18", tmp_path / "run")
    export.main([str(run)])
    data = load_data(TrainConfig())
    best = Predictor(run).predict_batch(list(data.images[data.test]), 1)
    top1 = np.mean([label == data.vocab[y] for ((label, _),), y in zip(best, data.labels[data.test])])
    assert top1 == pytest.approx(json.loads((run / "metrics.json").read_text())["test"]["top1"], abs=0.001)


def test_the_command_of_the_published_classifier_is_its_recipe_though_the_preset_has_changed():
    run = Run(ROOT / "results" / "cifar100-resnet18")
    _, _, *args = shlex.split(*run.about["commands"])
    now, then = vars(parse_args(args)), vars(run.settings)
    # these are settled as a training starts
    settled = "bs", "lr", "wd", "precision", "mirror", "data"
    assert [k for k in then if now[k] != then[k] and k not in settled] == []


def test_a_run_is_exported_without_its_data_set(tmp_path, tiny_cifar):
    write_cifar(tmp_path, "cifar100")
    train.main(
        [
            "--data",
            str(tmp_path),
            "--arch",
            "resnet8",
            "--epochs",
            "1",
            "--sizes",
            "8",
            "--runs",
            str(tmp_path / "runs"),
            "--name",
            "a",
        ]
    )
    run = tmp_path / "runs" / "cifar100" / "a"
    learn = load_run(run)
    image = learn.dls.data.images[0]
    with learn.no_bar():
        want = learn.predict(image)[2].max()
    shutil.rmtree(tmp_path / "cifar-100-python")
    export.main([str(run)])
    about = json.loads((run / "model.json").read_text())
    assert (
        about["classes"] == learn.dls.vocab
        and about["superclasses"] == learn.dls.data.superclasses
        and about["mean"] == pytest.approx(learn.dls.stats[0])
    )
    assert Predictor(run).predict(image, 1)[0][1] == pytest.approx(want.item(), abs=0.01)


def test_an_archived_run_is_half_as_large_and_exports_to_the_same_classifier(run_folder, tmp_path):
    archive(run_folder, tmp_path)
    assert [str(o.relative_to(tmp_path)) for o in sorted(tmp_path.iterdir())] == [
        "config.json",
        "history.csv",
        "metrics.json",
        "model.safetensors",
    ]
    assert (tmp_path / "model.safetensors").stat().st_size < 0.6 * (
        run_folder / "models" / "best.pth"
    ).stat().st_size
    assert str(run_folder.parents[1]) not in (tmp_path / "config.json").read_text()
    export.main([str(tmp_path)])
    learn = load_run(run_folder)
    data, predictor = learn.dls.data, Predictor(tmp_path)
    hits = [
        name == data.vocab[data.labels[i]]
        for i, ((name, _),) in zip(data.test, predictor.predict_batch(data.images[data.test], k=1))
    ]
    assert sum(hits) / len(hits) == pytest.approx(
        json.loads((tmp_path / "metrics.json").read_text())["test"]["top1"], abs=0.01
    )
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        load_run(tmp_path)


def test_nothing_but_the_named_files_is_left(exported):
    left = {o.name for o in exported[0].iterdir()}
    assert left == {
        ".lock",
        "config.json",
        "history.csv",
        "metrics.json",
        "models",
        "report.html",
        "training_log.txt",
        "learner.pkl",
        "model.json",
        "model.safetensors",
    }


def test_callbacks_that_log_and_save_are_no_hindrance_and_stay_with_the_learner(tmp_path):
    cfg = TrainConfig(dataset="digits", arch="resnet8", precision="bf16", bs=512, sizes="8")
    learn = get_learner(get_dls(cfg), cfg, path=tmp_path)
    learn.add_cbs([CSVLogger(), SaveModelCallback()])
    with learn.no_bar(), learn.no_logging():
        learn.fit_warmup_cosine(1, warmup=0.2)
    types = {type(o) for o in learn.cbs}
    write_learner(learn, tmp_path / "learner.pkl", {"classes": list(learn.dls.vocab)})
    assert (
        {type(o) for o in learn.cbs} == types > {CSVLogger, SaveModelCallback}
        and learn.path == tmp_path
        and len(learn.dls.train_ds)
        and learn.opt is not None
    )
    assert {type(o).__name__ for o in load_learner(tmp_path).cbs} <= {
        "TrainEvalCallback",
        "Recorder",
        "CastToTensor",
        "ProgressCallback",
    }


class Brighter(Transform):
    def encodes(self, x: TensorImage):
        return x * 1.1


@pytest.mark.parametrize(
    "change",
    [
        lambda dl: dl.after_batch.add(Brighter()),
        lambda dl: setattr(
            first(o for o in dl.after_batch.fs if isinstance(o, IntToFloatTensor)), "div", 100.0
        ),
    ],
)
def test_a_learner_that_sees_its_pictures_in_another_way_is_not_exported(run_folder, tmp_path, change):
    learn = load_run(run_folder)
    change(learn.dls.valid)
    with pytest.raises(UserError, match="cannot be exported: its data has other transforms"):
        write_learner(learn, tmp_path / "learner.pkl", {})
    assert not list(tmp_path.iterdir())


def test_an_export_that_gives_other_probabilities_is_not_kept(run_folder, tmp_path):
    learn = load_run(run_folder)
    learn.model.register_forward_hook(lambda module, args, out: 2 * out)  # which no file can hold
    with pytest.raises(UserError, match="learner.pkl gives other probabilities"):
        write_learner(learn, tmp_path / "learner.pkl", {})
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_not_finished_or_damaged_is_one_line(run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "runs holds no finished run" in failure(capsys, export.main)
    assert "'nowhere' is no run folder" in failure(capsys, export.main, "nowhere")
    run = copied(run_folder, tmp_path / "runs" / "digits" / "copy")
    (run / "metrics.json").rename(run / "metrics")
    assert (
        f"train.py --resume {run}"
        in failure(capsys, export.main, run)
    )
    (run / "metrics.json").write_text("{")
    assert "metrics.json is damaged" in failure(capsys, export.main)
    (run / "config.json").write_text("{")
    assert "config.json is damaged" in failure(capsys, export.main, run)
    assert "Unknown flag '--onxx': did you mean --onnx?" in failure(capsys, export.main, "--onxx")
    assert not (run / "learner.pkl").exists()


def test_the_newest_finished_run_is_the_default(run_folder, tmp_path, monkeypatch, capsys):
    for name in ("old", "new"):
        copied(run_folder, tmp_path / "runs" / "digits" / name)
    os.utime(tmp_path / "runs" / "digits" / "old" / "history.csv", (1, 1))
    os.utime(tmp_path / "runs" / "digits" / "new" / "metrics.json", (1, 1))  # the old one got a new report
    monkeypatch.chdir(tmp_path)
    export.main([])
    assert (tmp_path / "runs" / "digits" / "new" / "learner.pkl").exists() and not (
        tmp_path / "runs" / "digits" / "old" / "learner.pkl"
    ).exists()
    out = capsys.readouterr().out
    assert (
        "a fresh process loaded it, and gave the same probabilities on 64 images" in out
        and "app.py --model runs/digits/new/learner.pkl" in out
    )


# ---- other formats ----


@pytest.fixture(scope="module")
def onnx_file(run_folder, tmp_path_factory):
    pytest.importorskip("onnxruntime")
    run = shutil.copytree(run_folder, tmp_path_factory.mktemp("onnx") / "run")
    export.main([str(run), "--onnx"])
    assert {o.name for o in run.iterdir()} >= {"learner.pkl", "model.json", "model.onnx"}
    assert not list(run.glob(".export-*")) and not list(run.glob("*.tmp"))
    return run / "model.onnx"


def test_onnx_takes_images_and_gives_probabilities(exported, onnx_file):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(onnx_file)
    x = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
    for n in (1, 7):
        np.testing.assert_allclose(
            session.run(None, {"images": x[:n]})[0], Predictor(exported[0]).probs(x[:n]), atol=1e-5
        )


def test_the_lines_of_the_readme_give_the_onnx_model_what_the_predictor_sees(
    exported, onnx_file, tmp_path, monkeypatch
):
    img = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 100, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[274] = 6  # it lies on its side
    img.resize((400, 192)).save(tmp_path / "picture.jpg", exif=exif)
    monkeypatch.chdir(tmp_path)
    shutil.copy(onnx_file, tmp_path)
    code = re.search(r"```python\n(import numpy .*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    found = {}
    exec(code, found)
    seen = np.asarray(Predictor(exported[0]).read("picture.jpg"))
    np.testing.assert_array_equal(found["img"], seen)
    np.testing.assert_allclose(found["probabilities"], Predictor(exported[0]).probs(seen[None]), atol=1e-5)


@pytest.fixture(scope="module")
def light(onnx_file, tmp_path_factory):
    "A Space of that run that computes by ONNX Runtime, written where the other kind was before."
    space = tmp_path_factory.mktemp("light") / "space"
    write_space(onnx_file.parent, space)
    write_space(onnx_file.parent, space, light=True)
    return space


def test_a_light_space_gives_the_same_answers_and_heat_maps(exported, light):
    a, b = Predictor(exported[0]), Predictor(light / "model.onnx")
    images = load_run(exported[0]).dls.data.images[:20]
    np.testing.assert_allclose(a.probs(images), b.probs(images), atol=1e-5)
    for x in images[:5]:
        one, other = a.answer(x), b.answer(x)
        assert one.verdict == other.verdict and dict(one.top) == pytest.approx(dict(other.top), abs=1e-4)
        np.testing.assert_allclose(a.heat_map(x, "3"), b.heat_map(x, "3"), atol=1e-4)


def test_the_page_of_a_light_space_imports_neither_torch_nor_fastai(light):
    assert not (light / "learner.pkl").exists() and "torch" not in (light / "requirements.txt").read_text()
    assert "model.onnx" in (light / "README.md").read_text()
    code = (
        "import sys, app; app.build(app.find_model(None)); "
        "print([o for o in ('torch', 'fastai', 'fastcore', 'matplotlib', 'scipy') if o in sys.modules])"
    )
    done = subprocess.run([COLD, "-c", code], cwd=light, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


@pytest.mark.parametrize("name", ["model.onnx", "model.json"])
def test_a_light_space_that_is_damaged_is_one_line(light, tmp_path, name):
    for file in ("model.onnx", "model.json"):
        shutil.copy(light / file, tmp_path)
    about = json.loads((light / "model.json").read_text())
    for content in (b"", b"no", json.dumps({**about, "classes": ["a"]}).encode(), None):
        (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=r"model\.(onnx|json)"):
            Predictor(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "change",
    [
        {"classes": "0123456789"},
        {"classes": list(range(10))},
        {"classes": [*"012345678", "\x1b[2J"]},
        {"classes": ["0"] * 10},
        {"superclasses": ["odd"]},
        {"superclasses": [None] * 10},
        {"size": True},
        {"size": 10**6},
        {"fit": ["crop"]},
    ],
    ids=str,
)
def test_a_light_space_with_odd_classes_or_sizes_is_one_line(light, tmp_path, change):
    about = json.loads((light / "model.json").read_text())
    shutil.copy(light / "model.onnx", tmp_path)
    (tmp_path / "model.json").write_text(json.dumps({**about, **change}))
    with pytest.raises(UserError, match="are no model: its (class|superclasses|image size|fit)"):
        Predictor(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "arch, there", [("resnet18-late", True), ("sprintnet", True), ("timm:vit_tiny_patch16_224", False)]
)
def test_heat_maps_are_in_the_onnx_model_of_a_grid_that_is_pooled(arch, there):
    cfg = TrainConfig(dataset="digits", arch=arch)
    assert (map_weights(*get_classifier(get_learner(get_dls(cfg), cfg))[:2]) is not None) == there


def test_light_without_a_space_is_one_line(exported, capsys):
    assert "--light is a kind of Space" in failure(capsys, export.main, exported[0], "--light")


def test_weights_are_those_of_the_run(exported):
    assert tensors_equal(
        load_file(exported[0] / "model.safetensors"), load_run(exported[0]).model.state_dict()
    )


def test_a_missing_package_is_named(run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    copy = shutil.copytree(run_folder, tmp_path / "copy")
    for o in ("learner.pkl", "model.json"):
        (copy / o).unlink(missing_ok=True)
    assert "pip install onnx onnxscript onnxruntime" in failure(capsys, export.main, copy, "--onnx")
    assert not (copy / "learner.pkl").exists(), "it fails before the export"


# ---- python -m sifar.predict ----


@pytest.fixture(scope="module")
def digits(exported, tmp_path_factory):
    "A folder with 70 test pictures as files, an unreadable one and a hidden one; and their array."
    folder = tmp_path_factory.mktemp("digits")
    data = load_run(exported[0]).dls.data
    for i, o in enumerate(data.images[data.test[:70]]):
        Image.fromarray(o).save(folder / f"{i:02}.png")
    (folder / "broken.png").write_bytes(b"nothing")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "a.png").write_bytes(b"nothing")
    return folder, data.images[data.test[:70]]


def test_predict_writes_a_table_of_a_folder(exported, digits, tmp_path, capsys):
    folder, x = digits
    predict([str(exported[0]), "--csv", str(tmp_path / "out.csv"), str(folder), "--top-k", "2"])
    with open(tmp_path / "out.csv") as f:
        rows = list(csv.DictReader(f))
    probs = Predictor(exported[0]).probs(x)
    assert [o["file"] for o in rows] == [str(folder / f"{i:02}.png") for i in range(70)] and list(
        rows[0]
    ) == ["file", "label_1", "probability_1", "label_2", "probability_2"]
    assert [o["label_1"] for o in rows] == [str(o) for o in probs.argmax(1).tolist()]
    np.testing.assert_allclose([float(o["probability_1"]) for o in rows], probs.max(1), atol=2e-6)
    out = capsys.readouterr().out
    assert (
        f"Skipped: {folder / 'broken.png'} is not an image" in out
        and "70 of 71 images classified" in out
        and ".hidden" not in out
    )


def test_a_table_goes_to_a_device_that_stays_one(exported, digits, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True)
    predict([str(o) for o in (exported[0], digits[0] / "00.png", "--csv", tmp_path / "pipe")])
    assert reader.communicate()[0].startswith("file,label_1,") and (tmp_path / "pipe").is_fifo()


def test_predict_prints_a_line_an_image(exported, digits, capsys):
    predict(
        [
            str(exported[0] / "learner.pkl"),
            str(digits[0] / "00.png"),
            str(digits[0] / "01.png"),
            "--top-k",
            "1",
        ]
    )
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2 and re.search(r"00\.png  \d \d+\.\d %$", out[0])


def test_predict_looks_at_more_views_of_a_picture(exported, tmp_path, capsys):
    Image.linear_gradient("L").rotate(90).crop((0, 0, 256, 128)).save(tmp_path / "a.png")
    said = []
    for views in ("1", "2", "4"):
        predict([str(exported[0]), str(tmp_path / "a.png"), "--views", views])
        said.append(capsys.readouterr().out.split("a.png")[1])
    one, two, four = said
    assert one != two == four, "of digits there are no mirror images"
    assert "--views" in failure(capsys, predict, exported[0], tmp_path / "a.png", "--views", "3")


def test_what_predict_cannot_do_is_one_line(exported, digits, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for args, text in (
        (("nowhere", "a.png"), "is missing: make it with python export.py"),
        ((exported[0], "a.png"), "a.png is missing"),
        ((exported[0], tmp_path / "empty"), "holds no files"),
        ((exported[0], digits[0] / "broken.png"), "None of the 1 files"),
        ((exported[0],), "No images are named"),
        ((exported[0], digits[0], "--csv", tmp_path / "empty"), "empty is a folder: name a file"),
        ((exported[0], digits[0], "--top-k", "0"), "--top-k 0 is out of range"),
    ):
        assert text in failure(capsys, predict, *args)


# ---- a Space ----


def test_a_space_is_complete(exported):
    run, space = exported
    assert {o.name for o in space.iterdir()} == {
        "app.py",
        "sifar",
        "examples",
        "learner.pkl",
        "model.json",
        "requirements.txt",
        "README.md",
        ".gitattributes",
        "LICENSE",
    }
    assert (space / "learner.pkl").read_bytes() == (run / "learner.pkl").read_bytes()
    lines = (space / "requirements.txt").read_text().split()
    assert all(re.fullmatch(r"[a-z]+==[\d.]+", o) for o in lines) and not any(
        o.startswith(("albumentations", "timm")) for o in lines
    )
    head, card = (space / "README.md").read_text().split("---\n")[1:3]
    front = yaml.safe_load(head)
    assert (
        front["sdk"] == "gradio"
        and f"gradio=={front['sdk_version']}" in lines
        and front["app_file"] == "app.py"
        and front["license"] == "apache-2.0"
    )
    metrics = json.loads((run / "metrics.json").read_text())
    assert (
        f"{100 * metrics['test']['top1']:.2f} %" in card
        and json.loads((run / "model.json").read_text())["commands"][0] in card
    )
    assert (
        "*.pkl filter=lfs" in (space / ".gitattributes").read_text()
        and len(list((space / "examples").glob("*.*g"))) > 8
    )


def test_a_space_that_was_broken_off_can_be_written_again(exported, tmp_path, monkeypatch):
    def broken_off(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr("sifar.share.space.requirements", broken_off)
    with pytest.raises(OSError):
        write_space(exported[0], tmp_path / "space")
    monkeypatch.undo()
    write_space(exported[0], tmp_path / "space")
    assert {o.name for o in (tmp_path / "space").iterdir()} == {o.name for o in exported[1].iterdir()}


def test_a_space_predicts_by_itself_without_what_only_training_needs(exported, tmp_path):
    space = shutil.copytree(exported[1], tmp_path / "space", ignore=shutil.ignore_patterns("__pycache__"))
    code = "\n".join(
        (
            "import sys",
            "for o in ('albumentations', 'timm', 'onnxruntime'): sys.modules[o] = None",
            "import app",
            "page = app.build(app.find_model(None))",
            "assert sorted(page.config)",
        )
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=space, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_no_link_in_a_space_is_followed(exported, tmp_path):
    space = shutil.copytree(exported[1], tmp_path / "space")
    mine = shutil.copytree(space / "examples", tmp_path / "mine")
    (mine / "apple.png").write_bytes(b"mine")
    for name in ("examples", "sifar"):
        shutil.rmtree(space / name)
        (space / name).symlink_to(mine)
        with pytest.raises(UserError, match=f"{name} is a link"):
            write_space(exported[0], space)
        assert (mine / "apple.png").read_bytes() == b"mine" and not (mine / "__init__.py").exists()
        (space / name).unlink()


def test_a_folder_with_something_else_is_not_overwritten(exported, tmp_path, capsys):
    (tmp_path / "thesis.doc").write_text("years of work")
    assert "holds something else than a Space" in failure(
        capsys, export.main, exported[0], "--space", tmp_path
    )
    assert [o.name for o in tmp_path.iterdir()] == ["thesis.doc"]


def test_the_folder_of_a_run_or_of_something_else_is_no_space(exported, tmp_path):
    for path in (exported[0], tmp_path):
        (tmp_path / "learner.pkl").write_bytes(b"mine")
        with pytest.raises(UserError, match="something else than a Space"):
            write_space(exported[0], path)


def test_a_run_is_exported_without_its_gpu_and_folder_and_its_space_has_a_readable_head(run_folder, tmp_path):
    run = copied(run_folder, tmp_path / "run")
    about = json.loads((run / "config.json").read_text())
    about["settings"] |= {"device": "cuda:7", "dataset": str(tmp_path / "moved")}
    about["commands"] = ["python train.py --runs=/home/me/runs --data /home/me/data --epochs 3"]
    (run / "config.json").write_text(json.dumps(about))
    export.main([str(run)])
    model = json.loads((run / "model.json").read_text())
    assert model["dataset"] == "moved"
    assert model["commands"] == ["python train.py --runs=runs --data data --epochs 3"]
    for name in (
        "a: b #c\n- d",
        "🍎 fruit",
        "a\x85b\x7f\u2028c",
        "{{ 7 * 7 }}",
    ):  # an earlier Space may be written again
        (run / "model.json").write_text(json.dumps({**model, "dataset": name}))
        write_space(run, tmp_path / "space")
        head = (tmp_path / "space" / "README.md").read_text().split("---\n")[1]
        assert yaml.safe_load(head)["title"] == f"sifar {name}"
        assert "🍎" not in name or 'title: "sifar 🍎 fruit"' in head


def test_names_are_text_on_the_card_and_not_markup(exported):
    model = json.loads((exported[0] / "model.json").read_text())
    card = model_card(
        {
            **model,
            "dataset": "*a*\n# b",
            "classes": ["<b>", "[x](y)", "_x_", "aquarium_fish", "{{ 7 * 7 }}"],
            "commands": ["python *.py <x>"],
        }
    ).decode()
    assert r"on \*a\* \# b" in card and "    python *.py <x>" in card
    assert r"Classes: \<b\>, \[x\](y), \_x\_, aquarium_fish, {{ 7 \* 7 }}." in card


def test_damaged_facts_are_one_line(run_folder, tmp_path, capsys):
    run = copied(run_folder, tmp_path / "run")
    for name in ("config.json", "metrics.json"):
        good = (run / name).read_text()
        (run / name).write_text(
            json.dumps({k: v for k, v in json.loads(good).items() if k not in ("commands", "parameters")})
        )
        assert "is damaged" in failure(capsys, export.main, run)
        (run / name).write_text(good)


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_export_that_is_stopped_leaves_the_earlier_one(exported, tmp_path, signum, code):
    run = shutil.copytree(exported[0], tmp_path / "run")
    before = (run / "learner.pkl").read_bytes()
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "export.py", run],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(600):
        if list(run.glob(".sifar-export-*/images.npy")):
            break
        time.sleep(0.1)
    process.send_signal(signum)
    _, err = process.communicate()
    assert process.returncode == code and "Traceback" not in err
    assert (
        (run / "learner.pkl").read_bytes() == before
        and load_learner(run)
        and not list(run.glob(".sifar-export-*"))
    )


class Hub(BaseHTTPRequestHandler):
    "The calls of Hugging Face's API that an upload needs; what came is in `server.calls`, `server.stored`."

    protocol_version = "HTTP/1.1"

    def answer(self):
        body = self.read()
        self.server.calls.append((self.path, self.headers.get("authorization")))
        status, reply = self.reply(body)
        content = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def reply(self, body):
        "The status and what is said to a request with this body."
        here = f"http://127.0.0.1:{self.server.server_port}"
        space = f"{here}/spaces/someone/demo"
        if self.path == "/api/repos/create":
            status = self.server.status
            return status, {"url": space} if status == 200 else {"error": "no"}
        if self.path == "/api/spaces/someone/demo":
            return 404, {"error": "not found"}
        if "preupload" in self.path:
            paths = [o["path"] for o in json.loads(body)["files"]]
            modes = ["lfs" if o.endswith((".pkl", ".png")) else "regular" for o in paths]
            files = zip(paths, modes)
            return 200, {"files": [{"path": a, "uploadMode": b, "shouldIgnore": False} for a, b in files]}
        if self.path.endswith("objects/batch"):
            objects = json.loads(body)["objects"]
            objects = [{**o, "actions": {"upload": {"href": f"{here}/lfs/{o['oid']}"}}} for o in objects]
            return 200, {"transfer": "basic", "objects": objects}
        if self.path.startswith("/lfs/"):
            self.server.stored[self.path] = body
        if "/commit/" in self.path:
            self.server.stored["commit"] = [json.loads(o) for o in body.splitlines()]
            oid = 40 * "0"
            return 200, {"commitUrl": f"{space}/commit/{oid}", "commitOid": oid, "success": True}
        return 200, {}

    do_GET = do_POST = do_PUT = answer

    def read(self):
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        body = b""
        while n := int(self.rfile.readline(), 16):
            body, _ = body + self.rfile.read(n), self.rfile.readline()
        self.rfile.readline()
        return body

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.calls, server.stored, server.status = [], {}, 200
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def push(run, port, token="hf_secret", name="someone/demo"):
    env = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(run / "nowhere"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_TOKEN": token,
    }
    code = (
        "from sifar.cli import one_line_errors\nfrom sifar.share.space import push_space\n"
        "from sifar.log import log_to_screen\nlog_to_screen()\n"
        f"with one_line_errors(): push_space({str(run)!r}, {name!r})"
    )
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=env, cwd=ROOT, capture_output=True, text=True
    )


def test_push_uploads_the_space(exported, hub):
    done = push(exported[0], hub.server_port)
    assert done.returncode == 0 and "/spaces/someone/demo is on line" in done.stdout.replace("\n", " "), (
        done.stderr
    )
    assert (exported[0] / "learner.pkl").read_bytes() in hub.stored.values()
    names = {o["value"]["path"] for o in hub.stored["commit"] if o["key"] in ("file", "lfsFile")}
    assert {
        "app.py",
        "learner.pkl",
        "model.json",
        "README.md",
        "requirements.txt",
        ".gitattributes",
        "sifar/share/predictor.py",
        "sifar/training/recipe.py",
        "sifar/runs/report.html.j2",
        "sifar/share/card.md.j2",
        "examples/apple.png",
    } <= names
    assert {o for path, o in hub.calls if path.startswith("/api/spaces")} == {
        "Bearer hf_secret"
    } and "hf_secret" not in done.stdout + done.stderr


@pytest.mark.parametrize("status", [401, 500])
def test_a_refused_push_is_one_line_without_the_token(exported, hub, status):
    hub.status = status
    done = push(exported[0], hub.server_port)
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and str(status) in done.stderr
        and "hf_secret" not in done.stdout + done.stderr
    )


def test_a_push_without_a_network_a_token_or_a_name_is_one_line(exported):
    for kwargs, text in (
        ({}, "Connection refused"),
        ({"token": ""}, "run hf auth login, or set HF_TOKEN"),
        ({"name": "demo"}, "it should be USER/NAME"),
        ({"name": "a/b c"}, "a/b c"),
    ):
        done = push(exported[0], 9, **kwargs)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and text in done.stderr, done.stderr


def test_commands_keep_no_folder_of_a_machine():
    from sifar.cli import without_folders

    command = (
        "python /home/alice/train.py --runs ../../home/alice/r --data=../alice/x file:///home/alice/f "
        r"'C:\Users\alice\c' --dataset pets/small --lr 0.1"
    )
    assert without_folders(command) == "python train.py --runs r --data=x f c --dataset pets/small --lr 0.1"
    assert without_folders("train.py --runs=/home/alice/lr=0.1 /home/alice=x/b") == "train.py --runs=lr=0.1 b"
