"""What fastai lacks: precision on every device, runs that can be resumed, Mixup and the like, a log.

Where `before_` changes something of the learner, the matching `after_` and `after_cancel_` give it
back. A RecipeLearner calls `after_cancel_` however a fit ends, fastai's Learner only where it is
cancelled: so `before_` first gives back what an earlier fit may have left."""
import csv
import io
import math
import random
import signal
import time
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.tracker import SaveModelCallback
from fastai.learner import AvgSmoothLoss, Callback, CancelFitException
from fastai.torch_core import set_seed
from fastcore.all import L, noop

from ..distributed import world
from ..errors import UserError
from ..files import write_file
from ..log import RESULT, log
from ..signals import ending_signals, give_back, leave_closed_terminal, listen
from .checkpoints import check_folder
from .metrics import FEW
from .precision import needs_autocast, runs_by_itself, small_convs

WHAT_TO_DO = "start a new run with a smaller --lr. The last checkpoint is good."


class Precision(MixedPrecision):
    """The model's forward pass in `dtype`, by autocast, on any device; float16 with loss scaling.

    fastai's own is for CUDA alone: the rest of it, from the scaled loss to the step, serves any
    device. On a CPU, what is slow in convolutions of small images is a matrix product: see SmallConvs."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype
        self.scaler_state = {}

    def before_fit(self):
        device = self.dls.device.type
        # else gradients are lost: float16 ends at 6e-8, bfloat16 has the range of float32
        self.learn.scaler = torch.amp.GradScaler(device, enabled=self.dtype == torch.float16)
        self.scales = L()
        if self.scaler_state: self.learn.scaler.load_state_dict(self.scaler_state)
        # of float32 it warns on some devices, even if it is not enabled
        self.autocast = torch.autocast(device, self.dtype) if needs_autocast(self.dtype) else nullcontext()
        self.convs = small_convs(self.dls.device, self.dtype)

    def before_batch(self):
        "Wrap just this forward pass, so that no exception can leave autocast switched on."
        unwrap(self.model)
        model, forward = self.model, self.model.forward

        def fast(*args):
            unwrap(model)               # for this pass only
            with self.autocast, self.convs: return forward(*args)
        model.forward = fast

    def after_loss(self):
        "Nothing: fastai's own leaves its autocast here, and ours is left already."

    def after_cancel_batch(self): unwrap(self.model)


def unwrap(model):
    "Take off `model` the forward pass that was put over it: its class has the plain one."
    model.__dict__.pop("forward", None)


class StartAt(Callback):
    "Number the epochs of a fit from `start` to `total`, for the schedule, log and files of a resumed run."
    # before fastai's TrainEvalCallback, which derives the place in the schedule from the epoch
    order = -20

    def __init__(self, start, total):
        self.start, self.total = start, total

    def before_epoch(self):
        # fastai's fit(start_epoch=) calls after_epoch for the epochs that it skips: they would be saved
        # anew, with wrong weights
        self.learn.epoch += self.start
        self.learn.n_epoch = self.total


class SeedEpochs(Callback):
    """Let order, augmentation and dropout of an epoch follow from `seed` and its number.

    So an epoch of a resumed run is the same as in a run that was not interrupted, bit for bit."""
    order = -15

    def __init__(self, seed): self.seed = seed

    def before_epoch(self):
        # seeds near each other share no epoch
        set_seed((self.seed + 1_000_003 * self.epoch) % 2**32)
        self.dls.train.rng = random.Random(f"{self.seed} {self.epoch}")
        # it counts up as it starts; mirroring alternates by it
        self.dls.train.passes = self.epoch - 1


class StopOnNaN(Callback):
    """End the run where the loss is not a number, before it can reach the weights or a checkpoint.

    every: look after so many batches. By default 1 on a CPU, and 50 on a GPU, which has to be
    waited for: there the weights may be spoiled by then, but no checkpoint is."""
    order = 5                   # after Mix, which replaces the loss, before whatever uses it

    def __init__(self, every=None): self.every = every

    def before_train(self): self.seen = []
    def before_validate(self): self.seen = []

    def after_loss(self):
        self.seen.append((self.loss.detach(), f"batch {self.iter + 1}, lr {self.top_lr():.3g}"))
        every = self.every or (50 if runs_by_itself(self.loss.device) else 1)
        if len(self.seen) < every and self.iter + 1 < self.n_iter: return
        losses, places = zip(*self.seen)
        self.seen = []
        # one transfer for all of them
        for loss, place in zip(torch.stack(losses).tolist(), places):
            if math.isfinite(loss): continue
            phase = "" if self.training else "validation "
            where = f"epoch {self.epoch + 1}, {phase}{place}"
            raise UserError(f"The loss became {loss} in {where}: {WHAT_TO_DO}")

    def after_epoch(self):
        "Look at the weights too: no loss has shown yet what the last step did."
        if all(torch.isfinite(v).all() for v in self.model.state_dict().values()): return
        where = f"epoch {self.epoch + 1}, lr {self.top_lr():.3g}"
        raise UserError(f"The weights became infinite or not numbers in {where}: {WHAT_TO_DO}")

    def top_lr(self): return self.opt.hypers[-1]["lr"]


class StopOnSignal(Callback):
    """Ctrl-C, SIGTERM and a closed terminal end the fit after the current batch, and then the program.

    A second Ctrl-C ends it at once."""
    order = -100                # first to listen, before anything is trained that could be lost
    signum = None

    def __init__(self): self.old = {}

    def before_fit(self):
        self.old = listen(ending_signals(), self.note)

    def note(self, signum, frame):
        self.signum = signum
        leave_closed_terminal()
        signal.signal(signum, self.old[signum])

    def after_batch(self):
        if self.signum: raise CancelFitException

    def after_cancel_fit(self): give_back(self.old)

    def after_fit(self):
        self.after_cancel_fit()
        if not self.signum: return
        done = len(self.run_log.history)
        if done == self.n_epoch: log.info("All epochs are done, but not their report.")
        else: log.info("Epoch %d of %d is not done: a resumed run begins it anew.", done + 1, self.n_epoch)
        raise SystemExit(128 + self.signum)     # as a shell reports a program that a signal ended


class Freeze(Callback):
    """Train the head alone in the first `epochs`, and BatchNorms, as fastai does.

    groups: those of the head among the optimizer's groups of parameters; they are the last."""
    run_valid = False

    def __init__(self, epochs, groups=1): self.epochs, self.groups = epochs, groups

    # not by learn.freeze_to, which takes the momentum away
    def before_epoch(self): self.opt.freeze_to(-self.groups if self.epoch < self.epochs else 0)
    def after_cancel_fit(self): self.opt.unfreeze()
    def after_fit(self): self.opt.unfreeze()


class GrowImages(Callback):
    """Train on images of growing size; validation uses the full size.

    sizes: sides in pixels, stretched over the epochs."""
    run_valid = False

    def __init__(self, sizes): self.sizes = sizes

    def before_train(self):
        # the middle of the epoch as a share of all: 4 epochs look up 1/8, 3/8, 5/8, 7/8 of the list
        share = (self.epoch + 0.5) / self.n_epoch
        sz = self.sizes[int(share * len(self.sizes))]
        self.size = (sz, sz)

    def before_batch(self):
        if self.x.shape[2:] == self.size: return
        # (n,3,h,w) -> (n,3,sz,sz)
        x = F.interpolate(self.x, self.size, mode="bilinear", antialias=True)
        # interpolate may lose the format
        self.learn.xb = (x.contiguous(memory_format=torch.channels_last),)


class Mix(Callback):
    """Mix a share `prob` of the batches with themselves in reverse order, by timm's Mixup or CutMix.

    mixup, cutmix: the alpha of each, whose shares are drawn from Beta(alpha, alpha). Where both
    are above 0, one of them is chosen at random. https://arxiv.org/abs/1710.09412
    https://arxiv.org/abs/1905.04899"""
    run_valid = False

    def __init__(self, mixup, cutmix, prob=1.0):
        self.mixup, self.cutmix, self.prob = mixup, cutmix, prob

    def before_fit(self):
        from timm.data import Mixup
        # fastai's loss calls the smoothing eps, torch's label_smoothing
        smoothing = getattr(self.loss_func, "eps", getattr(self.loss_func, "label_smoothing", 0))
        options = {"prob": self.prob, "label_smoothing": smoothing, "num_classes": self.dls.c}
        self.mixer = Mixup(self.mixup, self.cutmix, **options)

    def before_batch(self):
        # plain tensors, as timm knows nothing of fastai's types
        x, y = self.x.as_subclass(torch.Tensor), self.y.as_subclass(torch.Tensor)
        x, self.targ = self.mixer(x, y)         # targ: shares of the classes (n,c), smoothed
        self.learn.xb = (x,)

    def after_loss(self):
        "Put the loss of the mixed classes in the place of the learner's, which stays as it is."
        weight = getattr(self.loss_func, "weight", None)        # of the classes
        self.learn.loss_grad = F.cross_entropy(self.pred, self.targ, weight)
        self.learn.loss = self.loss_grad.clone()


class EMA(Callback):
    """An exponential moving average of the weights, by timm's ModelEmaV3.

    The average is what is validated, kept as best, and left at the end. The decay rises to
    `decay` with the number of steps, so that the average forgets the first weights."""
    # SaveBest saves the average, EMA gives the model back, SaveLast saves both
    order = SaveModelCallback.order + 5

    def __init__(self, decay):
        self.decay = decay
        self.state = None           # of a run that is resumed
        self.own = None             # the model that trains, while the average is validated

    def before_fit(self):
        self.give_back_model()
        # fastai runs lr_find and get_preds as fits too; `run` is True again after the fit
        self.run = not hasattr(self.learn, "lr_finder") and not hasattr(self.learn, "gather_preds")
        if not self.run: return
        from timm.utils import ModelEmaV3
        self.average = ModelEmaV3(self.model, self.decay, use_warmup=True)
        self.steps = 0
        if self.state: self.load(self.state)
        self.state = None

    def after_batch(self):
        if not self.training: return
        self.steps += 1
        self.average.update(self.model, self.steps)

    def before_validate(self):
        if self.own is not None: return         # learn.tta() validates several times in one epoch
        self.own, self.learn.model = self.model, self.average.module

    def after_epoch(self): self.give_back_model()
    def after_cancel_fit(self): self.give_back_model()

    def after_fit(self):
        self.give_back_model()
        # then it loads the best itself
        chosen = any(isinstance(cb, SaveModelCallback) for cb in self.learn.cbs)
        if self.steps and not chosen: self.model.load_state_dict(self.average.module.state_dict())

    def give_back_model(self):
        if self.own is not None: self.learn.model, self.own = self.own, None

    def state_dict(self): return {"steps": self.steps, "model": self.average.module.state_dict()}

    def load(self, state):
        self.steps = state["steps"]
        self.average.module.load_state_dict(state["model"])


class SmoothLoss(AvgSmoothLoss):
    "fastai's smoothed training loss, but it stays on the device: a step need not wait for a GPU."
    val: torch.Tensor

    def accumulate(self, learn):
        self.count += 1
        loss = learn.loss.detach().mean()
        self.val = torch.lerp(loss, self.val.to(loss), self.beta)


class RunLog(Callback):
    """The epochs as a table in the log and in history.csv, and their progress on `bar`, a rich Progress.

    balanced: show the balanced accuracy instead of top-5, as it does anyway of few classes, where nearly all
    are among the five likeliest. history: a dictionary an epoch, with the keys of `columns`; a value is
    None where there is no validation set. After the fit it is `learn.history`."""
    order = 55                  # after fastai's Recorder (50), before what saves (60)
    columns = (
        "epoch", "train_loss", "valid_loss", "top1", "top5", "lr", "seconds", "images_per_second", "balanced")
    header = "epoch  train loss  valid loss   top-1 %  {:>8}        lr  images/s     time"

    def __init__(self, bar, balanced=False):
        self.bar, self.balanced = bar, balanced
        self.history = []
        self.changed = None             # what is given back after the fit

    def before_fit(self):
        continued = [signal.SIGCONT] if hasattr(signal, "SIGCONT") else []      # Windows has none
        handlers = listen(continued, self.note_suspension)
        self.changed = self.learn.logger, self.recorder.smooth_loss, handlers
        self.learn.logger = noop
        # through __dict__, as fastai warns at an assignment
        self.recorder.__dict__["smooth_loss"] = SmoothLoss()
        self.start, self.suspended, self.task = time.perf_counter(), False, None
        self.shown = "balanced" if self.balanced or self.dls.c <= FEW else "top5"
        log.info(self.header.format("balanced" if self.shown == "balanced" else "top-5 %"), extra=RESULT)

    def note_suspension(self, *args): self.suspended = True

    def before_epoch(self):
        if self.task is not None: return
        left = self.n_epoch - self.epoch
        self.task = self.bar.add_task("", total=left * len(self.dls.train))

    def before_train(self):
        self.batch_start, self.images, self.seconds = time.perf_counter(), 0, 0.0
        self.losses = []

    def after_batch(self):
        if not self.training: return
        self.losses.append(self.learn.loss.detach())    # on its device: no step waits for a GPU
        self.bar.update(self.task, advance=1, description=f"epoch {self.epoch + 1}/{self.n_epoch}")
        self.count(len(self.x))

    def count(self, images):
        "Add a batch to what images/s is of, unless the process was suspended in it, for who knows how long."
        start, self.batch_start = self.batch_start, time.perf_counter()
        if not self.suspended:
            self.images += images * world()             # each process has as many
            self.seconds += self.batch_start - start
        self.suspended = False

    def after_train(self):
        self.images_per_second = self.images / max(self.seconds, 1e-9)

    def after_epoch(self):
        loss = torch.stack(self.losses).mean().item()
        # the Recorder's training loss is smoothed over epochs
        _, valid_loss, top1, top5, balanced = self.recorder.values[-1]
        # the checkpoints of an epoch count for the next
        start, self.start = self.start, time.perf_counter()
        lr, seconds = self.opt.hypers[-1]["lr"], self.start - start
        values = self.epoch + 1, loss, valid_loss, top1, top5, lr, seconds, self.images_per_second, balanced
        row = dict(zip(self.columns, values))
        self.history.append(row)
        log.info(line(row, self.shown), extra=RESULT)
        self.write()

    def write(self):
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(self.columns)
        for row in self.history: table.writerow([exact(row.get(k)) for k in self.columns])
        check_folder(self.learn)
        write_file(self.path / "history.csv", text.getvalue())

    def after_cancel_fit(self):
        if not self.changed: return
        self.learn.logger, self.recorder.__dict__["smooth_loss"], handlers = self.changed
        give_back(handlers)
        self.learn.history, self.changed = self.history, None

    def after_fit(self): self.after_cancel_fit()


def line(row, shown):
    "A row of the table in the log, at most 80 columns wide; `shown` is the column behind top-1."
    minutes, seconds = divmod(round(row["seconds"]), 60)
    return "  ".join((
        f"{row['epoch']:>5}",
        cell(row["train_loss"], 10, 4),
        cell(row["valid_loss"], 10, 4),
        cell(row["top1"], 8, 2, 100),
        cell(row[shown], 8, 2, 100),
        f"{row['lr']:>8.5f}",
        f"{row['images_per_second']:>8.0f}",
        f"{minutes:>4}:{seconds:02}"))


def cell(value, width, decimals, scale=1):
    "A number, times `scale`, in `width` characters; a dash where there is none."
    return f"{'-':>{width}}" if value is None else f"{scale * value:{width}.{decimals}f}"


def exact(value):
    "A number for history.csv, or nothing where there is none."
    return "" if value is None else f"{value:.10g}"
