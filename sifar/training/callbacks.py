"""What fastai lacks: precision on every device, runs that go on where they broke off, a log, checkpoints."""
import io
import math
import random
import signal
import threading
import time

import torch
import torch.nn.functional as F
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.tracker import SaveModelCallback, TrackerCallback
from fastai.learner import AvgSmoothLoss, Callback, CancelFitException
from fastai.torch_core import set_seed
from fastcore.all import L, noop

from ..errors import UserError, one_line
from ..files import write_file
from ..log import log
from .cpu import small_convs


class Precision(MixedPrecision):
    """The model's forward pass under autocast to `dtype`, on any device; with loss scaling where that is float16.

    On CPUs that multiply bfloat16, convolutions of small images become matrix products: up to twice the speed."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype, self.scaler_state = dtype, {}

    def before_fit(self):
        device = self.dls.device.type
        self.learn.scaler, self.scales = torch.amp.GradScaler(device, enabled=self.dtype == torch.float16), L()
        if self.scaler_state: self.learn.scaler.load_state_dict(self.scaler_state)
        self.autocast = torch.autocast(device, self.dtype)

    def before_batch(self):
        "Wrap just this forward pass, so that no exception can leave autocast switched on."
        self.after_cancel_batch()
        model, forward = self.model, self.model.forward
        def fast(*args):
            model.__dict__.pop("forward", None)
            with self.autocast, small_convs(self.dls.device, self.dtype): return forward(*args)
        model.forward = fast

    def after_cancel_batch(self): self.model.__dict__.pop("forward", None)
    def after_loss(self): pass


class StartAt(Callback):
    "Number the epochs of a fit from `start` to `total`, so that schedule, log and file names go on where a run broke off."
    order = -20                 # before fastai's TrainEvalCallback, which derives the position in the schedule from the epoch

    def __init__(self, start, total):
        self.start, self.total = start, total

    def before_epoch(self):
        self.learn.epoch += self.start
        self.learn.n_epoch = self.total


class SeedEpochs(Callback):
    "Let all random numbers of an epoch follow from `seed` and its number: order, augmentation, dropout."
    order = -15

    def __init__(self, seed): self.seed = seed

    def before_epoch(self):
        set_seed((self.seed + 1_000_003 * self.epoch) % 2**32)
        self.dls.train.rng = random.Random(f"{self.seed} {self.epoch}")
        self.dls.train.passes = self.epoch - 1


class StopOnNaN(Callback):
    """End the run where the loss is not a number, before it can reach the weights or a checkpoint.

    every: it looks after so many batches; by default on a CPU after each, else after 50, as a GPU has to be waited for: weights may be
    spoiled by then, but no checkpoint."""
    order = -9

    def __init__(self, every=None): self.every = every

    def before_train(self): self.seen = []
    before_validate = before_train

    def after_loss(self):
        self.seen.append((self.loss.detach(), f"batch {self.iter + 1}, lr {self.opt.hypers[-1]['lr']:.3g}"))
        every = self.every or (1 if self.loss.device.type == "cpu" else 50)
        if len(self.seen) < every and self.iter + 1 < self.n_iter: return
        losses, places = zip(*self.seen)
        self.seen = []
        for loss, where in zip(torch.stack(losses).tolist(), places):
            if math.isfinite(loss): continue
            where = f"epoch {self.epoch + 1}, {'' if self.training else 'validation '}{where}"
            raise UserError(f"The loss became {loss} in {where}: start a new run with a smaller --lr. The last checkpoint is good.")

    def after_epoch(self):          # what the last step did, no loss may have shown yet
        if all(torch.isfinite(o).all() for o in self.model.state_dict().values()): return
        raise UserError(f"The weights became infinite or no numbers in epoch {self.epoch + 1}, lr {self.opt.hypers[-1]['lr']:.3g}: start a new run with a smaller --lr. The last checkpoint is good.")


class StopOnSignal(Callback):
    "Ctrl-C and SIGTERM end the fit after the current batch, and then the program. A second Ctrl-C ends it at once."
    order, signum = -100, None          # first to listen, before anything is trained that could be lost

    def before_fit(self):
        if threading.current_thread() is threading.main_thread():
            self.old = {o: signal.signal(o, self.note) for o in (signal.SIGINT, signal.SIGTERM)}

    def note(self, signum, frame):
        self.signum = signum
        signal.signal(signum, self.old[signum])

    def after_batch(self):
        if self.signum: raise CancelFitException

    def after_fit(self):
        for k, v in getattr(self, "old", {}).items(): signal.signal(k, v)
        if not self.signum: return
        done = len(self.run_log.history)
        log.info("All epochs are done, but not their report." if done == self.n_epoch else f"Epoch {done + 1} of {self.n_epoch} is not done: a resumed run begins it anew.")
        raise SystemExit(128 + self.signum)


class GrowImages(Callback):
    "Train on images of the size that `sizes`, stretched over the epochs, has for each epoch; validation sees them whole."
    run_valid = False

    def __init__(self, sizes): self.sizes = sizes

    def before_epoch(self):
        sz = self.sizes[int((self.epoch + 0.5) / self.n_epoch * len(self.sizes))]
        self.size = (sz, sz)

    def before_batch(self):
        if self.x.shape[2:] == self.size: return
        x = F.interpolate(self.x, self.size, mode="bilinear", antialias=True)
        self.learn.xb = (x.contiguous(memory_format=torch.channels_last),)


class Mix(Callback):
    """Mix a share `prob` of the batches with themselves in reverse order, by Mixup or CutMix with Beta(alpha, alpha) shares, as timm does;
    where both are given, by one of them at random. https://arxiv.org/abs/1710.09412 https://arxiv.org/abs/1905.04899"""
    run_valid = False

    def __init__(self, mixup, cutmix, prob=1.0): self.mixup, self.cutmix, self.prob, self.smoothed = mixup, cutmix, prob, None

    def before_fit(self):
        from timm.data import Mixup
        self.after_loss()               # where an earlier fit was interrupted before it
        self.mixer = Mixup(self.mixup, self.cutmix, prob=self.prob, label_smoothing=getattr(self.loss_func, "eps", getattr(self.loss_func, "label_smoothing", 0)), num_classes=self.dls.c)

    def before_batch(self):
        x, self.targ = self.mixer(self.x.as_subclass(torch.Tensor), self.y.as_subclass(torch.Tensor))
        self.learn.xb, self.smoothed = (x,), self.loss_func
        self.learn.loss_func = lambda pred, _: F.cross_entropy(pred, self.targ)

    def after_loss(self):
        if self.smoothed: self.learn.loss_func, self.smoothed = self.smoothed, None

    def after_cancel_batch(self): self.after_loss()
    def after_cancel_fit(self): self.after_loss()


class EMA(Callback):
    """An exponential moving average of the weights, by timm's ModelEmaV3; it is what is validated, kept as best, and left at the end.

    The decay rises to `decay` with the number of steps, so that the average forgets the first weights."""
    order = SaveModelCallback.order + 5         # in after_epoch between SaveBest, which saves the average, and SaveLast

    def __init__(self, decay): self.decay, self.state, self.own = decay, None, None

    def before_fit(self):
        self.after_epoch()              # where an earlier fit was interrupted while it validated
        self.run = not hasattr(self.learn, "lr_finder") and not hasattr(self.learn, "gather_preds")        # they are no training
        if not self.run: return
        from timm.utils import ModelEmaV3
        self.average, self.steps = ModelEmaV3(self.model, self.decay, use_warmup=True), 0
        if self.state: self.load(self.state)
        self.state = None

    def after_batch(self):
        if not self.training: return
        self.steps += 1
        self.average.update(self.model, self.steps)

    def before_validate(self):
        if self.own is None: self.own, self.learn.model = self.model, self.average.module       # learn.tta() validates several times

    def after_epoch(self):
        if self.own is not None: self.learn.model, self.own = self.own, None

    def after_fit(self):
        self.after_epoch()
        if self.steps and not any(isinstance(o, SaveModelCallback) for o in self.learn.cbs): self.model.load_state_dict(self.average.module.state_dict())

    def state_dict(self): return {"steps": self.steps, "model": self.average.module.state_dict()}

    def load(self, state):
        self.steps = state["steps"]
        self.average.module.load_state_dict(state["model"])


class SmoothLoss(AvgSmoothLoss):
    "fastai's smoothed loss of the training, which stays on the device: a step need not wait for a GPU."
    val: torch.Tensor

    def accumulate(self, learn):
        self.count += 1
        loss = learn.loss.detach().mean()
        self.val = torch.lerp(loss, self.val.to(loss), self.beta)


class RunLog(Callback):
    """The epochs as a table in the log, as rows in history.csv, and the position in them on `bar`, a rich Progress.

    history: a dictionary an epoch, with the keys of `columns`; None where there is no validation set. Afterwards it is
    `learn.history`."""
    order = 55                  # after fastai's Recorder, before what saves
    columns = "epoch", "train_loss", "valid_loss", "top1", "top5", "lr", "seconds", "images_per_second"
    header = "epoch  train loss  valid loss   top-1 %   top-5 %        lr  images/s     time"

    def __init__(self, bar): self.bar, self.history = bar, []

    def before_fit(self):
        self.old_logger, self.learn.logger = self.learn.logger, noop
        self.old_smooth_loss = self.recorder.smooth_loss
        self.recorder.__dict__["smooth_loss"] = SmoothLoss()           # of the run alone: an exported learner has fastai's. An assignment makes fastai warn
        self.start = time.perf_counter()
        log.info(self.header)

    def before_epoch(self):
        if not self.bar.tasks: self.task = self.bar.add_task("", total=(self.n_epoch - self.epoch) * len(self.dls.train))

    def before_train(self): self.train_start, self.losses = time.perf_counter(), []

    def after_batch(self):
        if not self.training: return
        self.losses.append(self.learn.loss.detach())
        self.bar.update(self.task, advance=1, description=f"epoch {self.epoch + 1}/{self.n_epoch}")

    def after_train(self):
        self.images_per_second = len(self.dls.train) * self.dls.train.bs / (time.perf_counter() - self.train_start)

    def after_epoch(self):
        _, valid_loss, top1, top5 = self.recorder.values[-1]        # the Recorder's train loss is smoothed over epochs
        start, self.start = self.start, time.perf_counter()         # the checkpoints of an epoch count for the next
        values = (self.epoch + 1, torch.stack(self.losses).mean().item(), valid_loss, top1, top5, self.opt.hypers[-1]["lr"], self.start - start, self.images_per_second)
        row = dict(zip(self.columns, values))
        self.history.append(row)
        log.info(self.line(row))
        self.write()

    def line(self, row):
        "A row of the table, at most 80 columns wide."
        def f(key, spec, scale=1): return format("-" if row[key] is None else format(row[key] * scale, spec), f">{spec.split('.')[0]}")
        minutes, seconds = divmod(round(row["seconds"]), 60)
        return (f"{row['epoch']:>5}  {f('train_loss', '10.4f')}  {f('valid_loss', '10.4f')}  {f('top1', '8.2f', 100)}  {f('top5', '8.2f', 100)}"
                f"  {row['lr']:>8.5f}  {row['images_per_second']:>8.0f}  {minutes:>4}:{seconds:02}")

    def write(self):
        lines = [",".join(self.columns), *(",".join("" if row[o] is None else f"{row[o]:.10g}" for o in self.columns) for row in self.history)]
        write_file(self.path / "history.csv", "\n".join(lines) + "\n")

    def after_fit(self):
        self.learn.logger, self.learn.history = self.old_logger, self.history
        self.recorder.__dict__["smooth_loss"] = self.old_smooth_loss


class SaveBest(SaveModelCallback):
    "fastai's SaveModelCallback, saving whole files only, going on from an earlier `best`, and loading it at the end."

    def __init__(self): super().__init__(monitor="accuracy", fname="best", reset_on_fit=False)

    def after_epoch(self):
        TrackerCallback.after_epoch(self)
        if self.new_best: save_weights(self.learn, self.fname)

    def after_fit(self):
        if (self.learn.path / self.learn.model_dir / f"{self.fname}.pth").exists(): load_weights(self.learn, self.fname)


class SaveLast(Callback):
    "Keep all that is needed to go on in models/last.pth, from before the first epoch on, and the weights of every tenth epoch."
    order = SaveModelCallback.order + 10

    def before_fit(self):
        if self.n_epoch: (self.path / "metrics.json").unlink(missing_ok=True)       # of a finished run that goes on: no longer true
        if not self.run_log.history: self.save(0)

    def after_epoch(self):
        self.save(self.epoch + 1)
        if (self.epoch + 1) % 10 == 0: save_weights(self.learn, f"epoch_{self.epoch + 1:03}")

    def save(self, epoch):
        best = self.save_best.best if hasattr(self.learn, "save_best") else None
        state = {"epoch": epoch, "data": fingerprint(self.dls.data), "model": self.model.state_dict(), "opt": self.opt.state_dict(), "best": best, "history": self.run_log.history}
        if hasattr(self.learn, "scaler"): state["scaler"] = self.learn.scaler.state_dict()
        if hasattr(self.learn, "ema"): state["ema"] = self.learn.ema.state_dict()
        save(self.learn.path / self.learn.model_dir / "last.pth", state)


def save(path, state):
    "torch.save to a file that is whole or not there."
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path.parent.mkdir(exist_ok=True)            # models/, but not the run folder, should somebody have removed it
    write_file(path, buffer.getbuffer())


def fingerprint(data):
    "What a resumed run has to find again: the class names, the number of images of each split, and a sum of all their pixels."
    return {"classes": list(data.vocab), "images": [len(o) for o in (data.train, data.valid, data.test)], "checksum": data.checksum}


def load_weights(learn, name):
    "Load models/`name`.pth into `learn`. Errors: UserError where it is damaged."
    path = learn.path / learn.model_dir / f"{name}.pth"
    try: learn.load(name, with_opt=False)
    except PermissionError: raise
    except Exception as e: raise UserError(f"{path} is damaged or missing ({one_line(e)}).") from e


def save_weights(learn, name): save(learn.path / learn.model_dir / f"{name}.pth", learn.model.state_dict())
