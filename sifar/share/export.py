"""A run as files to share: learner.pkl and the model.json that describes it, model.onnx, model.safetensors."""
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

from ..cli import one_line_errors, without_folders
from ..errors import UserError
from ..files import ROOT, write_file
from ..log import log
from ..runs.load import load_run
from ..runs.run import read_settings
from .predictor import Predictor, get_classifier

KEPT_FACTS = "parameters", "epochs", "seed", "images", "valid", "test", "commands", "versions", "git_commit"
TOLERANCE = 1e-5                                                                        # of a probability, between a model and what it was exported to


def export_run(run):
    """Write the learner.pkl and the model.json of a finished run into its folder; returns its Learner.

    The file takes its name only after a fresh process has loaded it, and given the learner's probabilities on 64 images. Errors: UserError."""
    cfg = read_settings(run)
    if not (run / "metrics.json").is_file(): raise UserError(f"{run} is not finished, it has no metrics.json: go on with it by python train.py --resume {run}")
    try:
        about = json.loads((run / "config.json").read_text())
        about.update(json.loads((run / "metrics.json").read_text()))
        about = {k: about[k] for k in KEPT_FACTS}
    except (ValueError, KeyError, TypeError) as e: raise UserError(f"config.json or metrics.json in {run} is damaged ({e!r}): train the run again.") from e
    learn = load_run(run, images=False)
    write_learner(learn, run / "learner.pkl", describe(learn, cfg, about))
    return learn


def write_learner(learn, path, about):
    "Export `learn` to `path`, checked, and the dictionary `about` with its SHA-256 to the model.json beside it."
    for old in path.parent.glob(".export-*"):                   # of an export that was killed
        with suppress(FileNotFoundError):                       # another export took it away
            if time.time() - old.stat().st_mtime > 3600: shutil.rmtree(old, ignore_errors=True)
    images, probs = some_probs(learn)
    with TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        tmp = Path(folder).resolve() / path.name
        learn.export(tmp)
        check_probs(path.name, probs, in_fresh_process(tmp, images))
        path.with_name("model.json").unlink(missing_ok=True)                    # a crash between these lines leaves files that load
        os.replace(tmp, path)
    write_file(path.with_name("model.json"), json.dumps({**about, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}, indent=2) + "\n")
    log.info("%s is written: a fresh process loaded it, and gave the same probabilities on %d images (within %g)", path, len(images), TOLERANCE)


def some_images(learn, n=64):
    "Up to `n` images (n,sz,sz,3) uint8 of the test set, or where that is empty of the others; noise where the data set is not at hand."
    data = learn.dls.data
    rows = next(o for o in (data.test, data.valid, data.train) if len(o))
    return data.images[rows[:n]]


def some_probs(learn):
    "Images, and the probabilities (n,c) that `learn` itself gives them in float32, by fastai's get_preds."
    images = some_images(learn)
    with learn.removed_cbs([o for o in learn.cbs if type(o) not in defaults.callbacks]), learn.no_bar(): return images, learn.get_preds(dl=learn.dls.test_dl(list(images), rm_type_tfms=0))[0]


def in_fresh_process(path, images):
    "The probabilities that the learner file `path` gives to images in another process, which leaves nothing of this one behind. Errors: UserError."
    np.save(path.with_name("images.npy"), images)
    code = f"import sys; from {__name__} import save_probs; save_probs(*sys.argv[1:])"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, path, path.with_name("images.npy"), path.with_name("probs.npy")],
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}, capture_output=True, text=True)
    if done.returncode: raise UserError(f"The exported learner does not load: {(done.stderr.strip() or 'its process was ended').splitlines()[-1]}")
    return torch.from_numpy(np.load(path.with_name("probs.npy")))


def save_probs(path, images, probs):
    with one_line_errors(): np.save(probs, Predictor(path, "cpu").probs(np.load(images)).numpy())


def check_probs(name, want, got):
    diff = (want - got).abs().max().item()
    if not diff < TOLERANCE: raise UserError(f"{name} gives other probabilities than the learner (by {diff:.2g}), so it was not kept: please report this.")


def describe(learn, cfg, about):
    "What model.json says of a run, without anything that tells of this machine's folders; `about` are its facts."
    classifier, sz = get_classifier(learn)
    return {
        "classes": list(learn.dls.vocab), "superclasses": learn.dls.data.superclasses,
        "size": sz, "mean": classifier.mean.flatten().tolist(), "std": classifier.std.flatten().tolist(),
        "dataset": PureWindowsPath(cfg.dataset).name, "arch": cfg.arch, **about, "commands": [without_folders(o) for o in about["commands"]],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_onnx(learn, path):
    """Write the model to `path` as ONNX: images (n,sz,sz,3) uint8 -> probabilities (n,c), checked with ONNX Runtime.

    Errors: UserError where a package that this needs is missing."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401     torch.onnx needs it
    except ImportError as e: raise UserError(f"--onnx needs {e.name}: pip install onnx onnxscript onnxruntime") from e
    classifier, _ = get_classifier(learn)
    images, probs = some_probs(learn)
    x = torch.from_numpy(images)
    program = torch.onnx.export(classifier, (x[:2],), dynamo=True, external_data=False, verbose=False, input_names=["images"],
                                output_names=["probabilities"], dynamic_shapes=({0: torch.export.Dim("n")},))
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    check_probs("model.onnx", probs, torch.from_numpy(session.run(None, {"images": images})[0]))
    write_file(path, content)
    log.info("%s is written: ONNX Runtime gave the same probabilities on %d images (within %g)", path, len(images), TOLERANCE)


def write_weights(learn, path):
    "Write the weights to `path` as safetensors, with what the model.json beside it says of them as metadata."
    from safetensors.torch import save
    about = json.loads(path.with_name("model.json").read_text())
    tensors = {k: v.detach().contiguous().cpu() for k, v in learn.model.state_dict().items()}
    write_file(path, save(tensors, {k: json.dumps(about[k]) for k in ("classes", "arch", "size", "mean", "std")}))
    log.info("%s is written", path)
