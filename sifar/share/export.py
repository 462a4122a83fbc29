"""A run as files to share: learner.pkl with its model.json, model.onnx, model.safetensors."""
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path, PureWindowsPath
from tempfile import TemporaryDirectory

import numpy as np
import torch
from fastai.learner import defaults
from torch import nn

from ..cli import one_line_errors, without_folders
from ..errors import UserError
from ..files import ROOT, STALE, read_about, write_file, write_json
from ..log import command, log
from ..runs.load import load_run
from ..runs.run import Run
from ..training.recipe import get_recipe
from .classifier import get_classifier
from .predictor import Predictor

FACTS = "parameters", "epochs", "seed", "images", "valid", "test", "commands", "versions", "git_commit"
TOLERANCE = 1e-5                # of a probability, between a model and what it was exported to


# ---- learner.pkl ----

def export_run(path):
    """Write the learner.pkl and the model.json of a finished run into its folder; returns its Learner.

    The file takes its name only after a fresh process has loaded it, and has given the learner's own
    probabilities on 64 images. Errors: UserError."""
    run = Run(path)
    metrics = run.metrics()
    if metrics is None:
        go_on = f"go on with it by {command('train.py', '--resume', path)}"
        raise UserError(f"{path} is not finished, it has no metrics.json: {go_on}")
    known = {**run.about, **metrics}
    missing = [k for k in FACTS if k not in known]
    if missing:
        raise UserError(f"{run.config} is damaged: it does not say {', '.join(missing)}. "
                        "Train the run again.")
    learn = load_run(path, images=False)
    more = "confidence", "photos"                       # older runs have no confidence, and few photographs
    about = {k: known[k] for k in (*FACTS, *more) if k in known}
    about = describe(learn, run.settings, about)
    write_learner(learn, run.path / "learner.pkl", about)
    return learn


def write_learner(learn, path, about):
    "Export `learn` to `path`, checked, and `about` with its SHA-256 to the model.json beside it."
    remove_stale(path.parent)
    images, probs = some_probs(learn)
    with TemporaryDirectory(dir=path.parent, prefix=".sifar-export-") as folder:
        tmp = Path(folder).resolve() / path.name
        learn.export(tmp)
        check_probs(path.name, probs, in_fresh_process(tmp, images))
        # in this order a crash leaves files that load: a learner needs no model.json,
        # but refuses that of another
        about = {**about, "sha256": hashlib.sha256(tmp.read_bytes()).hexdigest()}
        path.with_name("model.json").unlink(missing_ok=True)
        os.replace(tmp, path)
    write_json(path.with_name("model.json"), about)
    log_written(path, "a fresh process loaded it, and gave", images)


def log_written(path, how, images):
    log.info("%s is written: %s the same probabilities on %d images (within %g)",
             path, how, len(images), TOLERANCE)


def remove_stale(folder):
    "Remove what exports that were killed left in `folder`."
    for old in folder.glob(".sifar-export-????????"):
        with suppress(FileNotFoundError):                       # another export took it away
            if time.time() - old.stat().st_mtime > STALE: shutil.rmtree(old, ignore_errors=True)


def describe(learn, cfg, about):
    "What model.json says of a run, without the folders of this machine; `about` are its FACTS."
    return {
        **get_recipe(learn),
        "dataset": PureWindowsPath(cfg.dataset).name,           # it splits at both \ and /
        "init": cfg.init and PureWindowsPath(cfg.init).name,    # the weights that it started from
        "mirror": cfg.mirror != "off",                          # whether it has learned from mirror images
        **about,
        "commands": [without_folders(line) for line in about["commands"]],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


# ---- whether it says the same as the learner ----

def some_images(learn, n=64):
    """Up to `n` images (n,sz,sz,3) uint8 of the test set, or where that is empty of the others.

    They are noise where the data set is not at hand."""
    data = learn.dls.data
    rows = next(rows for rows in (data.test, data.valid, data.train) if len(rows))
    return data.images[rows[:n]]


def some_probs(learn):
    "Images, and the probabilities (n,c) that `learn` itself gives them in float32."
    images = some_images(learn)
    # rm_type_tfms: else fastai refuses images that are no row numbers
    dl = learn.dls.test_dl(list(images), rm_type_tfms=0)
    # without our callbacks, such as Precision, which rounds
    ours = [cb for cb in learn.cbs if type(cb) not in defaults.callbacks]
    with learn.removed_cbs(ours), learn.no_bar(): probs, _ = learn.get_preds(dl=dl)
    return images, probs


def in_fresh_process(path, images):
    """The probabilities (n,c) that the learner file `path` gives to images in a fresh process.

    Errors: UserError where it does not load."""
    inputs, outputs = path.with_name("images.npy"), path.with_name("probs.npy")
    np.save(inputs, images)
    code = f"import sys; from {__name__} import save_probs; save_probs(*sys.argv[1:])"
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "",
           "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, path, inputs, outputs],
                          env=env, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip() or "its process was ended"
        raise UserError(f"The exported learner does not load: {said.splitlines()[-1]}")
    return torch.from_numpy(np.load(outputs))


def save_probs(path, images, probs):
    "What the fresh process does."
    with one_line_errors(): np.save(probs, Predictor(path, "cpu").probs(np.load(images)))


def check_probs(name, want, got):
    diff = (want - got).abs().max().item()
    if diff < TOLERANCE: return             # which NaN is not
    raise UserError(f"{name} gives other probabilities than the learner (by {diff:.2g}), "
                    "so it was not kept: "
                    "please report this.")


# ---- other formats ----

def check_onnx():
    "Raise a UserError where a package is missing that write_onnx needs."
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401     torch.onnx needs it
    except ImportError as e:
        raise UserError(f"--onnx needs {e.name}: pip install onnx onnxscript onnxruntime") from e


def write_onnx(learn, path):
    """Write the model to `path` as ONNX, checked: images (n,sz,sz,3) uint8 -> probabilities (n,c).

    Where Grad-CAM needs no gradients of it, maps (n,c,h,w) say where it finds each class: see map_weights.
    Errors: UserError where a package that this needs is missing."""
    check_onnx()
    import onnxruntime
    classifier, sz, _ = get_classifier(learn)
    images, probs = some_probs(learn)
    outputs, weights = ["probabilities"], map_weights(classifier, sz)
    if weights is not None: outputs, classifier = [*outputs, "maps"], WithMaps(classifier, weights).eval()
    # two images to trace with: from one, the exporter takes n for the constant 1
    program = torch.onnx.export(
        classifier, (torch.from_numpy(images[:2]),), dynamo=True, external_data=False, verbose=False,
        input_names=["images"], output_names=outputs,
        dynamic_shapes=({0: torch.export.Dim("n")},))
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    check_probs("model.onnx", probs, torch.from_numpy(session.run(None, {"images": images})[0]))
    write_file(path, content)
    log_written(path, "ONNX Runtime gave", images)


class WithMaps(nn.Module):
    "A Classifier that also gives maps (n,c,h,w): how much each place of the features adds to each class."

    def __init__(self, classifier, weights):
        super().__init__()
        self.classifier = classifier
        self.register_buffer("weights", weights)

    def forward(self, x):
        features = self.classifier.features(x)
        maps = torch.einsum("nkhw,ck->nchw", features, self.weights)
        return self.classifier.model.forward_head(features).softmax(1), maps


def map_weights(classifier, sz):
    """The weights (c,k) that Grad-CAM gives features, where they are the same for every image.

    So they are where a linear layer follows on the mean or the largest of each. Else, and without a grid of
    features, None."""
    with torch.no_grad(): features = classifier.features(torch.zeros(1, sz, sz, 3))
    if features is None: return None

    def weights(features):
        "The mean gradient (c,k) of each class by features (1,k,h,w)."
        return torch.func.jacrev(classifier.model.forward_head)(features)[0, :, 0].mean((2, 3)).detach()
    generator = torch.Generator().manual_seed(0)
    here, there = (weights(torch.randn(features.shape, generator=generator)) for _ in range(2))
    return here if torch.allclose(here, there, atol=1e-6) else None


def write_weights(learn, path):
    "Write the weights to `path` as safetensors, with facts of the model.json beside it as metadata."
    from safetensors.torch import save
    about = read_about(path)
    tensors = {k: v.detach().contiguous().cpu() for k, v in learn.model.state_dict().items()}
    # of text alone
    metadata = {k: json.dumps(about[k]) for k in ("classes", "arch", "size", "mean", "std")}
    write_file(path, save(tensors, metadata))
    log.info("%s is written", path)
