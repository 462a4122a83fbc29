"""What one looks at before a training: learning rates, augmented images, and where the time goes."""
import tempfile
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

from ..errors import UserError
from ..files import write_file
from ..log import log, silent_stderr
from .callbacks import GrowImages, Mix, SeedEpochs, StopOnNaN
from .learner import get_learner

SUGGESTIONS = "valley", "steep", "slide", "minimum"


def find_lr(cfg, dls):
    """What fastai's lr_find says of a new learner for `cfg`: {suggestion: lr}, and the lrs and smoothed losses behind it.

    No other learner on `dls` is touched. Errors: UserError where the losses say nothing."""
    with tempfile.TemporaryDirectory() as path:
        learn = get_learner(dls, cfg, path=Path(path))
        learn.add_cb(SeedEpochs(cfg.seed))
        if hasattr(learn, "grow_images"): learn.grow_images.sizes = learn.grow_images.sizes[:1]         # a curve is of one size: that of the first epoch
        try:
            with learn.no_bar(): found = learn.lr_find(suggest_funcs=[getattr(SuggestionMethod, o.title()) for o in SUGGESTIONS], show_plot=False)
        except (ValueError, IndexError) as e:
            raise UserError(f"lr_find has no suggestion, as the loss broke off at once ({e}): try --precision fp32 or a larger --bs.") from e
    return {k: float(v) for k, v in zip(SUGGESTIONS, found)}, [float(o) for o in learn.recorder.lrs], [float(o) for o in learn.recorder.losses]


def write_lr_find(cfg, dls, folder):
    "Run find_lr; write plots/lr_find.png and lr_find.csv into `folder`. Returns the suggestions."
    found, lrs, losses = find_lr(cfg, dls)
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    write_file(folder / "lr_find.csv", "lr,loss\n" + "".join(f"{a:.6g},{b:.6g}\n" for a, b in zip(lrs, losses)))
    from ..plots import COLOURS, figure
    low, start = np.nanmin(losses), np.nanmedian(losses[:10])       # what comes after the minimum rises out of the picture
    room = max(start - low, 0.01 * start)
    with figure(title=f"lr_find: {cfg.arch} on {Path(cfg.dataset).name}, {cfg.opt}", xlabel="learning rate", ylabel="loss, smoothed", xscale="log", ylim=(low - 0.1 * room, start + 0.3 * room)) as (ax, png):
        ax.plot(lrs, losses, color=COLOURS[-1])
        for (name, lr), colour, marker, size in zip(found.items(), COLOURS, "osD^", (14, 11, 8, 5)):       # in one another where they coincide
            ax.plot(lr, losses[int(np.argmin(np.abs(np.log(lrs) - np.log(lr))))], marker, color=colour, markersize=size, label=f"{name} {lr:.2g}")
        ax.legend()
    write_file(folder / "plots" / "lr_find.png", png[0])
    return found


def auto_lr(cfg, dls, folder):
    "The valley that lr_find suggests; its curve goes into `folder`."
    lr = float(f"{write_lr_find(cfg, dls, folder)['valley']:.3g}")
    log.info("lr %g is the valley that lr_find suggests", lr)
    return lr


def write_batches(cfg, dls, folder):
    "Sheets of what the model sees in the first epoch: plots/batch.png, 32 images, and plots/one_image.png, the first of them 16 times."
    from ..plots import sheet
    learn = get_learner(dls, cfg)
    n = len(dls.train.dataset)
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    for name, idxs, title in (("batch", np.linspace(0, n - 1, min(n - n % 2, 32)).astype(int).tolist(), "Training images as the model sees them"),
                              ("one_image", [0] * 16, "One training image, augmented 16 times")):
        images, labels = shown(dls.train, idxs, learn, cfg.epochs)
        write_file(folder / "plots" / f"{name}.png", sheet(images, labels, title))


def shown(dl, idxs, learn, n_epoch=1):
    "The training images number `idxs` of `dl` as `learn` sees them in the first of `n_epoch` epochs, as uint8, and their labels; where some are mixed, all are."
    dl.before_iter()
    learn.xb, learn.yb = ([o] for o in dl.after_batch(to_device(dl.read([dl.items[i] for i in idxs]), dl.device)))
    learn.training, learn.epoch, learn.n_epoch = True, 0, n_epoch
    shares = F.one_hot(learn.yb[0].as_subclass(torch.Tensor), learn.dls.c).float()
    cbs = [o for o in learn.cbs.sorted("order") if isinstance(o, (GrowImages, Mix))]
    for o in cbs:
        if isinstance(o, Mix): o.prob = 1.0
    for event in ("before_fit", "before_epoch", "before_batch"):
        for o in cbs: o(event)
    if hasattr(learn, "mix"):
        eps = learn.mix.smoothed.eps
        shares = (learn.mix.targ - eps / learn.dls.c) / (1 - eps)
    for o in cbs: o("after_cancel_batch")           # gives back the loss function
    x = dl.after_batch.decode((TensorImage(learn.xb[0]), learn.yb[0]))[0]
    return np.clip(x.cpu().permute(0, 2, 3, 1).numpy().round(), 0, 255).astype(np.uint8), [mixed_label(o, learn.dls.vocab) for o in shares]


def mixed_label(shares, vocab):
    "The class, or two of them with their shares."
    from ..plots import short
    parts = [(p, short(vocab[i])) for p, i in zip(*(o.tolist() for o in shares.topk(2))) if p > 0.005]
    return parts[0][1] if len(parts) == 1 else "\n".join(f"{100 * p:.0f} % {o}" for p, o in parts)


class Phases(Callback):
    "Marks the parts of a training step for torch's profiler; a device that runs by itself is waited for."
    order = 1000
    names = "data", "forward", "backward", "optimizer", "other"
    part = None

    def enter(self, name):
        if self.dls.device.type != "cpu": torch.accelerator.synchronize(self.dls.device)
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
    "Microseconds that `steps` training steps spend in each of their parts, and what torch's profiler saw on the side of the CPU, by its name."
    learn, cbs = get_learner(dls, cfg), [ShortEpochCallback((steps - 1) / len(dls.train)), StopOnNaN(), Phases()]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if dls.device.type == "cuda" else [])]
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=cbs)                                                   # warms up
        with silent_stderr(), torch.profiler.profile(activities=activities) as prof: learn.fit(1, cbs=cbs)
    events = {o.key: o for o in prof.key_averages() if o.device_type == DeviceType.CPU}
    return {k: events[k].cpu_time_total if k in events else 0.0 for k in Phases.names}, events          # no optimizer where all of fp16 overflows


def profile(cfg, dls, steps=8):
    "Ten lines that say where the time of a training step goes: the shares of its parts, and the four operators that take most."
    n = min(steps, len(dls.train))
    parts, events = step_times(cfg, dls, n)
    total = sum(parts.values())
    yield f"{total / n / 1000:.0f} ms a step of {dls.train.bs} images, {1e6 * n * dls.train.bs / total:.0f} images/s, under torch's profiler"
    for k, v in parts.items(): yield f"  {k:<10} {100 * v / total:5.1f} %"
    seen = {k.removeprefix("aten::"): o for k, o in events.items() if k.startswith("aten::")}
    operators = {k: o.self_device_time_total for k, o in seen.items()}
    if not sum(operators.values()): operators = {k: o.self_cpu_time_total for k, o in seen.items()}             # of a CPU, or a GPU that tells nothing
    for k in sorted(operators, key=operators.__getitem__, reverse=True)[:4]: yield f"  {100 * operators[k] / sum(operators.values()):5.1f} % of all operators: {k}"


def explore(cfg, dls, folder):
    "Do what `cfg` asks for of --show-batch, --lr-find and --profile; pictures go into `folder`. Returns the suggestions of lr_find, or None."
    if cfg.show_batch:
        write_batches(cfg, dls, folder)
        log.info("%s and one_image.png show what the model sees in training", folder / "plots" / "batch.png")
    if cfg.profile:
        for line in profile(cfg, dls): log.info("%s", line)
    if cfg.lr_find:
        found = write_lr_find(cfg, dls, folder)
        log.info("%s  and the curve in %s", folder / "plots" / "lr_find.png", folder / "lr_find.csv")
        log.info("lr_find suggests " + ", ".join(f"{k} {v:.2g}" for k, v in found.items()))
        return found
