"""The weights that a run keeps: the best, and all that is needed to go on; written whole, read with care."""
import hashlib
import io
import pickle
import struct
import zlib
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch
from fastai.callback.tracker import SaveModelCallback, TrackerCallback
from fastai.learner import Callback
from safetensors import SafetensorError
from safetensors.torch import load

from ..errors import UserError, one_line
from ..files import identity, open_plain, write_file
from .metrics import best_row

# What readers of weights and load_state_dict raise for files that are cut off, have wrong bytes, or hold
# something else, as the unpickler follows whatever it finds: seen with 5,000 files, changed at random.
DAMAGED = (
    pickle.UnpicklingError, BadZipFile, EOFError, RuntimeError, ValueError, TypeError, LookupError,
    AttributeError, AssertionError, OverflowError, struct.error, SafetensorError)


class SameFolder(Callback):
    "End the run where another folder took the place of its own, before a file goes into that one."
    order = 54                  # before RunLog

    def before_fit(self): self.known = identity(self.path)

    def check(self):
        if identity(self.path) in (None, self.known): return     # of none, the next file says it
        what_to_do = "go on with it by --resume where it is now"
        raise UserError(f"{self.path} is another folder now, this run's was moved: {what_to_do}.")


def check_folder(learn):
    "Where `learn` has SameFolder, let it look."
    if hasattr(learn, "same_folder"): learn.same_folder.check()


class SaveBest(SaveModelCallback):
    """fastai's SaveModelCallback for models/best.pth, the weights that are best on valid.

    It saves whole files only, goes on from the `best` of a resumed run, and loads the file at
    the end."""

    sha256 = None               # of the file

    def __init__(self, monitor="accuracy"):
        self.setting = monitor
        monitor = "valid_loss" if monitor == "loss" else monitor
        super().__init__(monitor=monitor, fname="best", reset_on_fit=False)

    def after_epoch(self):
        TrackerCallback.after_epoch(self)   # SaveModelCallback's own would write the file in place
        history = self.run_log.history
        # new_best would keep the first of equal epochs
        if best_row(history, self.setting) is not history[-1]: return
        self.sha256 = hashlib.sha256(save_weights(self.learn, self.fname)).hexdigest()

    def after_fit(self):
        path = weights_path(self.learn, self.fname)
        if path.exists(): load_weights(self.model, path)


class SaveLast(Callback):
    """Keep all that is needed to go on in models/last.pth, from before the first epoch on.

    The weights of every tenth epoch stay too, as models/epoch_010.pth and so on.
    settings: those that a resumed run has to have too, a dictionary."""
    order = SaveModelCallback.order + 10        # last of all: what it saves is the end of the epoch

    def __init__(self, settings=None): self.settings = settings or {}

    def before_fit(self):
        # of a finished run that goes on: its figures are no longer true
        if self.n_epoch: (self.path / "metrics.json").unlink(missing_ok=True)
        if not self.run_log.history: self.save(0)

    def after_epoch(self):
        done = self.epoch + 1
        self.save(done)
        if done % 10 == 0: save_weights(self.learn, f"epoch_{done:03}")

    def save(self, done):
        state = {
            "epoch": done,
            "data": fingerprint(self.dls.data),
            "facts": facts(self.dls),
            "model": self.model.state_dict(),
            "opt": self.opt.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best": None,
            "history": self.run_log.history,
            "settings": self.settings,
        }
        if hasattr(self.learn, "save_best"):
            state["best"], state["best_sha256"] = self.save_best.best, self.save_best.sha256
        if hasattr(self.learn, "ema"): state["ema"] = self.learn.ema.state_dict()
        save(self.learn, "last", state)


def save(learn, name, state):
    "torch.save to models/`name`.pth, which is whole or not there; returns the file's content."
    buffer, path = io.BytesIO(), weights_path(learn, name)
    torch.save(state, buffer)
    check_folder(learn)
    # models/, but not the run folder, should somebody have removed it
    path.parent.mkdir(exist_ok=True)
    write_file(path, buffer.getbuffer())
    return buffer.getbuffer()


def fingerprint(data):
    "What a resumed run has to find again: class names, number of images of each split, sum of all pixels."
    images = [len(rows) for rows in (data.train, data.valid, data.test)]
    found = {"classes": list(data.vocab), "images": images, "checksum": data.checksum}
    # runs without fixes are resumed by what older versions wrote too
    if data.fixes: found["labels"] = zlib.crc32(data.labels.tobytes())
    return found


def facts(dls):
    "What config.json says of the data for those who have the run without them, a dictionary."
    data, stats = dls.data, [list(o) for o in dls.stats]
    return {"vocab": list(data.vocab), "superclasses": data.superclasses, "stats": stats}


def weights_path(learn, name): return learn.path / learn.model_dir / f"{name}.pth"


def save_weights(learn, name):
    "Save the weights of `learn` as models/`name`.pth; returns the file's content."
    return save(learn, name, learn.model.state_dict())


def read_tensors(path):
    """What torch.save wrote into a file, or safetensors, on the CPU; no code of the file is run.

    Errors: OSError; UserError; those of DAMAGED."""
    with open_plain(path) as f:
        if path.suffix == ".safetensors": return load(f.read())
        members, size = ZipFile(f).infolist(), f.seek(0, 2)
        # torch.save only stores: what is compressed, or there twice, may take any memory
        if any(m.compress_type != ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
            raise ValueError("its parts are larger than the file")
        f.seek(0)
        return torch.load(f, map_location="cpu", weights_only=True)


def load_weights(model, path):
    "Load a file of weights into `model`. Errors: UserError where it is damaged or missing."
    try: model.load_state_dict(read_tensors(path))
    except (PermissionError, torch.OutOfMemoryError): raise         # the file may be good
    except (OSError, *DAMAGED) as e:
        raise UserError(f"{path} is damaged or missing ({one_line(e)}).") from e
