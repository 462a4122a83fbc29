"""What one looks at before a training: learning rates, augmented images, and where the time goes."""
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fastai.callback.schedule import SuggestionMethod
from fastai.callback.training import ShortEpochCallback
from fastai.learner import Callback, CancelValidException
from fastai.torch_core import TensorImage, to_device
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

from ..distributed import from_first
from ..errors import UserError
from ..files import write_file
from ..log import log, silent_stderr
from .callbacks import GrowImages, Mix, SeedEpochs, StopOnNaN
from .learner import get_learner
from .optim import rounded
from .precision import wait

SUGGESTIONS = "valley", "steep", "slide", "minimum"


# ---- learning rates ----

def find_lr(cfg, dls):
    """What fastai's lr_find says of a new learner for `cfg`: {suggestion: lr}, then lrs and smoothed losses.

    No other learner on `dls` is touched. Errors: UserError where the losses say nothing."""
    functions = [getattr(SuggestionMethod, name.title()) for name in SUGGESTIONS]
    with tempfile.TemporaryDirectory() as path:     # lr_find keeps the weights in a file meanwhile
        learn = get_learner(dls, cfg, path=Path(path))
        learn.add_cb(SeedEpochs(cfg.seed))
        # a curve is of one size: that of the first epoch
        if hasattr(learn, "grow_images"): learn.grow_images.sizes = learn.grow_images.sizes[:1]
        try:
            with learn.no_bar(): found = learn.lr_find(suggest_funcs=functions, show_plot=False)
        except (ValueError, IndexError) as e:   # fastai looks for a minimum in an empty list
            why = f"lr_find has no suggestion, as the loss broke off at once ({e})"
            raise UserError(f"{why}: try --precision fp32 or a larger --bs.") from e
    suggestions = {name: float(lr) for name, lr in zip(SUGGESTIONS, found)}
    lrs, losses = map(float, learn.recorder.lrs), map(float, learn.recorder.losses)
    return suggestions, list(lrs), list(losses)


def write_lr_find(cfg, dls, folder):
    "Run find_lr; write plots/lr_find.png and lr_find.csv into `folder`. Returns the suggestions."
    found, lrs, losses = from_first(find_lr(cfg, dls))
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    rows = [f"{lr:.6g},{loss:.6g}\n" for lr, loss in zip(lrs, losses)]
    write_file(folder / "lr_find.csv", "lr,loss\n" + "".join(rows))
    title = f"lr_find: {cfg.arch} on {Path(cfg.dataset).name}, {cfg.opt}"
    write_file(folder / "plots" / "lr_find.png", draw_lr_find(found, lrs, losses, title))
    return found


def draw_lr_find(found, lrs, losses, title):
    "A PNG of the losses against the learning rates, with the suggestions `found` on the curve."
    from ..plots import COLOURS, figure
    low, start = np.nanmin(losses), np.nanmedian(losses[:10])
    room = max(start - low, 0.01 * start)
    # what comes after the minimum rises out of the picture
    ylim = low - 0.1 * room, start + 0.3 * room
    axis = {"xlabel": "learning rate", "ylabel": "loss, smoothed", "xscale": "log", "ylim": ylim}
    with figure(title=title, **axis) as (ax, png):
        ax.plot(lrs, losses, color=COLOURS[-1])
        # marks of falling size, which lie in one another where they coincide
        for (name, lr), colour, marker, size in zip(found.items(), COLOURS, "osD^", (14, 11, 8, 5)):
            nearest = int(np.argmin(np.abs(np.log(lrs) - np.log(lr))))
            look = {"color": colour, "markersize": size, "label": f"{name} {lr:.2g}"}
            ax.plot(lr, losses[nearest], marker, **look)
        ax.legend()
    return png[0]


def settle_lr(cfg, dls, folder):
    "`cfg` with the valley that lr_find suggests where its --lr is auto; the curve goes into `folder`."
    if cfg.lr != "auto": return cfg
    lr = rounded(write_lr_find(cfg, dls, folder)["valley"])
    log.info("lr %g is the valley that lr_find suggests", lr)
    return replace(cfg, lr=lr)


# ---- images ----

def write_batches(cfg, dls, folder):
    """Sheets of what the model sees in the first epoch.

    plots/batch.png has 32 images from all of the training images, plots/one_image.png the first
    of them 16 times."""
    n = len(dls.train.dataset)
    some = np.linspace(0, n - 1, min(n - n % 2, 32))        # an even number, as Mix takes pairs
    learn = get_learner(dls, cfg)
    (folder / "plots").mkdir(parents=True, exist_ok=True)

    def write(name, idxs, title):
        from ..plots import sheet
        images, labels = shown(dls.train, idxs, learn, cfg.epochs)
        write_file(folder / "plots" / f"{name}.png", sheet(images, labels, title))
    write("batch", some.astype(int).tolist(), "Training images as the model sees them")
    write("one_image", [0] * 16, "One training image, augmented 16 times")


def shown(dl, idxs, learn, n_epoch=1):
    """The training images number `idxs` of `dl` as `learn` sees them, and their labels.

    They are uint8 (n,h,w,3), as in the first of `n_epoch` epochs. Where some batches are mixed, these are."""
    dl.before_iter()
    batch = to_device(dl.read([dl.items[i] for i in idxs]), dl.device)
    x, y = dl.after_batch(batch)
    learn.xb, learn.yb = [x], [y]
    learn.training, learn.epoch, learn.n_epoch = True, 0, n_epoch
    shares = run_batch_callbacks(learn)
    x, _ = dl.after_batch.decode((TensorImage(learn.xb[0]), learn.yb[0]))   # (n,3,h,w), 0..255
    images = np.clip(x.cpu().permute(0, 2, 3, 1).numpy().round(), 0, 255).astype(np.uint8)
    return images, [mixed_label(row, learn.dls.vocab) for row in shares]


def run_batch_callbacks(learn):
    """Let the callbacks that change a batch change that of `learn`.

    Returns the shares of the classes in each image (n,c)."""
    cbs = [cb for cb in learn.cbs.sorted("order") if isinstance(cb, (GrowImages, Mix))]
    if hasattr(learn, "mix"): learn.mix.prob = 1.0
    for event in ("before_fit", "before_train", "before_batch"):
        for cb in cbs: cb(event)
    if hasattr(learn, "mix"):
        # without the smoothing: targ = (1 - eps) * share + eps / c
        eps, c = learn.loss_func.eps, learn.dls.c
        shares = (learn.mix.targ - eps / c) / (1 - eps)
    else: shares = F.one_hot(learn.yb[0].as_subclass(torch.Tensor), learn.dls.c).float()
    return shares


def mixed_label(shares, vocab):
    "The class that has all of an image, or the two that share it, with their shares."
    from ..plots import short
    largest, idxs = shares.topk(2)
    parts = [(p, short(vocab[i])) for p, i in zip(largest.tolist(), idxs.tolist()) if p > 0.005]
    if len(parts) == 1: return parts[0][1]
    return "\n".join(f"{100 * p:.0f} % {name}" for p, name in parts)


# ---- time ----

class Phases(Callback):
    "Marks the parts of a training step for torch's profiler, and waits for the device after each."
    order = 1000    # after all others, so that their work counts for the part that it belongs to
    names = "data", "forward", "backward", "optimizer", "other"
    part = None

    def enter(self, name):
        wait(self.dls.device)
        if self.part: self.part.__exit__(None, None, None)
        self.part = name and record_function(name).__enter__()

    def before_train(self): self.enter("data")
    def before_batch(self): self.enter("forward")
    def after_loss(self): self.enter("other")
    def before_backward(self): self.enter("backward")
    def after_backward(self): self.enter("other")
    def before_step(self): self.enter("optimizer")
    def after_step(self): self.enter("other")
    def after_batch(self): self.enter("data")
    def after_train(self): self.enter(None)
    def before_validate(self): raise CancelValidException


def step_times(cfg, dls, steps):
    """Microseconds that `steps` training steps spend in each of their parts, by name.

    Then what torch's profiler saw on the side of the CPU, by its name."""
    learn = get_learner(dls, cfg)
    # it stops once this share of an epoch is exceeded, after the batch
    short = ShortEpochCallback((steps - 1) / len(dls.train))
    cbs = [short, StopOnNaN(), Phases()]
    activities = [ProfilerActivity.CPU]
    if dls.device.type == "cuda": activities.append(ProfilerActivity.CUDA)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=cbs)                       # warms up
        with silent_stderr(), torch.profiler.profile(activities=activities) as prof:
            learn.fit(1, cbs=cbs)
    seen = [event for event in prof.key_averages() if event.device_type == DeviceType.CPU]
    events = {event.key: event for event in seen}
    times = dict.fromkeys(Phases.names, 0.0)    # there is no optimizer where all of fp16 overflows
    for name in times.keys() & events.keys(): times[name] = events[name].cpu_time_total
    return times, events


def profile(cfg, dls, steps=8):
    """Ten lines that say where the time of a training step goes.

    They give the shares of its parts, and the four operators that take most."""
    n = min(steps, len(dls.train))
    parts, events = step_times(cfg, dls, n)
    total = sum(parts.values())
    rate = 1e6 * n * dls.train.bs / total
    step = f"{total / n / 1000:.0f} ms a step of {dls.train.bs} images"
    yield f"{step}, {rate:.0f} images/s, under torch's profiler"
    for name, time in parts.items(): yield f"  {name:<10} {100 * time / total:5.1f} %"
    operators = operator_times(events)
    all_of_them = sum(operators.values())
    for name in sorted(operators, key=operators.__getitem__, reverse=True)[:4]:
        yield f"  {100 * operators[name] / all_of_them:5.1f} % of all operators: {name}"


def operator_times(events):
    """The time that each of torch's operators takes without those that it calls, by name.

    It is that on the GPU, where there is one, else on the CPU."""
    aten = [key for key in events if key.startswith("aten::")]
    seen = {key.removeprefix("aten::"): events[key] for key in aten}
    times = {name: event.self_device_time_total for name, event in seen.items()}
    if sum(times.values()): return times
    # or a GPU that tells nothing
    return {name: event.self_cpu_time_total for name, event in seen.items()}


# ---- all of it ----

def explore(cfg, dls, folder):
    """Do what `cfg` asks for of --show-batch, --lr-find and --profile; pictures go into `folder`.

    Returns the suggestions of lr_find, or None."""
    if cfg.show_batch:
        write_batches(cfg, dls, folder)
        sheet = folder / "plots" / "batch.png"
        log.info("%s and one_image.png show what the model sees in training", sheet)
    if cfg.profile:
        for line in profile(cfg, dls): log.info("%s", line)
    if not cfg.lr_find: return None
    found = write_lr_find(cfg, dls, folder)
    log.info("%s  and the curve in %s", folder / "plots" / "lr_find.png", folder / "lr_find.csv")
    log.info("lr_find suggests " + ", ".join(f"{name} {lr:.2g}" for name, lr in found.items()))
    return found
