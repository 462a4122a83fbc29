"""Every setting of a training run, once: for the command line, the run folder and notebooks."""
import difflib
import os
import re
import shutil
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_type_hints

from .errors import UserError

ARCHS = ("resnet8", "resnet10", "resnet18", "resnet18-late", "resnet34", "sprintnet")
HEADS = "resnet18-late", "resnet18"         # what --arch auto chooses from: in doubt the first
DATASETS = ("cifar100", "cifar10", "digits")
INITS = ("cifar100", "timm")
KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "True or False", NoneType: "None"}

# what the presets with Muon have in common
MUON = {
    "valid_pct": 0.0, "aug": "weak", "augment": "batch", "bs": 512, "opt": "muon", "wd_norm": False,
    "schedule": "linear"}
PRESETS: dict[str, dict[str, Any]] = {
    "standard": {},
    "sprint": {
        **MUON, "arch": "sprintnet", "epochs": 13, "sizes": "20x4,24x5,32x4", "smoothing": 0.2,
        "warmup": 0.1},
    "fast": {**MUON, "epochs": 13, "sizes": "16x4,20x4,24x4,28x3,32x3", "smoothing": 0.2},
    "best": {
        **MUON, "epochs": 60, "sizes": "16x12,20x12,24x12,28x12,32x12", "cutmix": 1.0, "mix_prob": 0.5},
    # for few images a class: from the weights of a model that has seen other pictures
    "finetune": {
        "init": "cifar100", "arch": "auto", "epochs": 10, "bs": 16, "warmup": 0.1},
    "smoke": {"dataset": "digits", "arch": "resnet8", "epochs": 30, "bs": 32, "warmup": 0.2},
}


def with_presets(cls):
    "Let what is not given to the dataclass `cls` be that of its preset."
    init = cls.__init__

    @wraps(init)
    def fill_in(self, **given): init(self, **{**PRESETS.get(str(given.get("preset")), {}), **given})
    cls.__init__ = fill_in
    return cls


@with_presets
@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train an image classifier with fastai; the whole run goes into one folder."""
    preset: Literal["standard", "sprint", "fast", "best", "finetune", "smoke"] = "standard"
    "recipe that the other flags override"
    dataset: str = "cifar100"
    "cifar100, cifar10, digits, or path of an image folder, or of a zip or tar file of one"
    labels: str | None = None
    "table (CSV) of the files in the folder and their classes"
    fixes: str | None = None
    "table (CSV) of python -m sifar.check: images to drop or relabel"
    data: str = field(default_factory=lambda: os.environ.get("SIFAR_DATA", "data"))
    "folder of the data sets (or set SIFAR_DATA)"
    valid_pct: float = 0.1
    "share of the training images held out to choose on"
    sz: int = 32
    "side of the images of a folder, pixels"
    fit: Literal["halfway", "crop", "pad", "squash"] = "halfway"
    "how a picture becomes square: cut off, padded with grey, squeezed, or squeezed and cut off halfway"
    sizes: str | None = None
    "sides while training, stretched over the epochs: 16x2,24,32"
    aug: Literal["weak", "light", "standard", "trivial", "rand"] = "standard"
    "crop (weak: a little) and mirror; then Cutout; TrivialAugment or RandAugment"
    mirror: Literal["auto", "on", "off"] = "auto"
    "mirror images too; auto: on, but for digits, and for folders where it is seen to make a difference"
    augment: Literal["item", "batch"] = "item"
    "augment each image, or a whole batch where it trains"
    mixup: float = 0.0
    "alpha of Mixup, 0 for none"
    cutmix: float = 0.0
    "alpha of CutMix, 0 for none"
    mix_prob: float = 1.0
    "share of the batches that --mixup and --cutmix mix"
    arch: str = "resnet18"
    "resnet8, resnet10, resnet18[-late], resnet34, sprintnet, timm:NAME or, with --init, auto: a resnet18"
    init: str | None = None
    "weights to start from: a run, a learner.pkl, cifar100 (the model in results/) or timm"
    freeze: int = 0
    "epochs at first that train the head alone"
    smoothing: float = 0.1
    "share of the target that all classes get alike"
    balance: Literal["none", "weights", "sampler"] = "none"
    "let all classes count alike: by weights in the loss, or by drawing rare ones more often"
    monitor: Literal["accuracy", "balanced", "loss"] = "accuracy"
    "what on valid chooses the epoch; balanced: the mean accuracy of the classes"
    epochs: int = 100
    "passes over the training images"
    sync_bn: bool = False
    "statistics of BatchNorm over all processes of torchrun, on GPUs"
    bs: int | Literal["auto"] = "auto"
    "batch size, images, of all processes together; auto: 128, or what makes 20 steps of a small set"
    opt: Literal["sgd", "muon", "adamw"] = "sgd"
    "SGD with Nesterov momentum, Muon or AdamW"
    lr: float | Literal["auto"] | None = None
    "peak learning rate, else 0.1 (muon 0.06, adamw 0.001; less with --init); auto: lr_find's valley"
    wd: float | None = None
    "weight decay, else 0.0005 (adamw 0.05)"
    wd_norm: bool = True
    "weight decay for norms and biases too"
    clip: float | None = None
    "largest norm of the gradient"
    warmup: float = 0.05
    "share of the epochs with rising lr"
    schedule: Literal["cosine", "linear"] = "cosine"
    "how lr falls to zero after the warm-up"
    ema: float = 0.0
    "decay of averaged weights, such as 0.998; 0 for none"
    seed: int = 42
    "seed of split, weights, order and augmentation"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    "arithmetic of the forward pass"
    device: str = "auto"
    "auto, cpu, cuda, cuda:N or mps"
    workers: int = 0
    "processes that load data beside this one"
    runs: str = "runs"
    "folder of the run folders"
    name: str | None = None
    "name of the run folder, else TIME-ARCH, or TIME-PRESET where --arch is auto"
    resume: str | None = None
    "run folder to go on with"
    dry_run: bool = False
    "one batch through everything, nothing kept"
    seeds: int = 1
    "train as many runs, of seed, seed + 1, ..., and take the mean"
    lr_find: bool = False
    "no training: learning rates to choose from"
    show_batch: bool = False
    "no training: pictures as the model sees them"
    profile: bool = False
    "no training: where the time of a step goes"
    tensorboard: bool = False
    "log for TensorBoard too, in the run folder"
    wandb: bool = False
    "log to Weights & Biases too"

    def __post_init__(self):
        self.check_types()
        # absolute paths, so that the run can be resumed from any folder
        if is_own(self.dataset) and has_pictures(self.dataset):
            object.__setattr__(self, "dataset", str(Path(self.dataset).resolve()))
        for name in ("labels", "fixes"):
            if path := getattr(self, name): object.__setattr__(self, name, str(Path(path).resolve()))
        if self.init not in (None, *INITS): object.__setattr__(self, "init", str(Path(self.init).resolve()))
        self.check_ranges()
        self.check_together()

    def check_types(self):
        "Raise a UserError for a setting of another type; a path becomes its text."
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if isinstance(value, Path): object.__setattr__(self, name, value := str(value))
            if fits(value, hint): continue
            raise UserError(f"{flag(name)} {value!r} does not fit: it should be {known(hint)}.")

    def check_ranges(self):
        "Raise a UserError for a setting that is out of its range."
        inf, lr, name = float("inf"), self.lr, self.name
        rules = (
            ("valid_pct", 0 <= self.valid_pct <= 0.5, "between 0 and 0.5"),
            ("sz", 8 <= self.sz <= 512, "between 8 and 512 pixels"),
            ("epochs", self.epochs >= 1, "at least 1"),
            ("freeze", self.freeze >= 0, "0 or more"),
            ("bs", self.bs == "auto" or self.bs >= 2, "at least 2 images, or auto"),
            ("mixup", 0 <= self.mixup < inf, "0 or more"),
            ("cutmix", 0 <= self.cutmix < inf, "0 or more"),
            ("mix_prob", 0 < self.mix_prob <= 1, "above 0 and at most 1"),
            ("smoothing", 0 <= self.smoothing < 1, "from 0 to below 1"),
            ("lr", lr is None or lr == "auto" or 0 < lr < inf, "above 0, or auto"),
            ("seeds", 1 <= self.seeds <= 100, "between 1 and 100"),
            ("wd", self.wd is None or 0 <= self.wd < inf, "0 or more"),
            ("clip", self.clip is None or 0 < self.clip < inf, "above 0"),
            ("ema", 0 <= self.ema < 1, "from 0 to below 1"),
            ("warmup", 0 <= self.warmup < 1, "a share of the epochs, from 0 to below 1"),
            # fastai's set_seed takes 32 bits
            ("seed", 0 <= self.seed <= 2**32 - self.seeds, "between 0 and 4294967295, as all after it"),
            ("workers", 0 <= self.workers <= 64, "between 0 and 64"),
            ("name", name is None or is_folder_name(name), "a plain folder name, without slashes"),
        )
        for key, ok, rule in rules:
            if ok: continue
            raise UserError(f"{flag(key)} {getattr(self, key)} is out of range: it must be {rule}.")

    def check_together(self):
        "Raise a UserError for settings that do not fit together."
        if not self.arch.startswith("timm:"):
            nearest("architecture", self.arch, (*ARCHS, "auto"), "or timm:NAME")
        if self.sz != 32 and self.dataset in DATASETS:
            raise UserError(f"--sz {self.sz} is for folders of images: {self.dataset} has 32 pixels.")
        if self.labels and not is_own(self.dataset):
            raise UserError(f"--labels is for folders of images: {self.dataset} has labels.")
        if self.sizes is not None and not all(8 <= side <= self.sz for side in parse_sizes(self.sizes)):
            rule = f"each has to be between 8 and --sz {self.sz} pixels"
            raise UserError(f"--sizes {self.sizes} is out of range: {rule}.")
        if self.resume and (self.seeds > 1 or self.lr_find or self.show_batch or self.profile):
            others = "--seeds, --lr-find, --show-batch and --profile"
            raise UserError(f"--resume goes on with one run: leave out {others}.")
        for name, given in ("arch", self.arch == "auto"), ("freeze", self.freeze):
            if not given or self.init: continue
            what = f"{flag(name)} {getattr(self, name)}"
            raise UserError(f"{what} is for weights to start from: give --init too, or another {flag(name)}.")
        if self.init == "timm" and not self.arch.startswith("timm:"):
            what = f"--init timm has weights for timm's models, not for --arch {self.arch}"
            raise UserError(f"{what}: give --arch timm:NAME too.")
        if self.augment == "batch" and self.aug not in ("weak", "light", "standard"):
            known = "--augment batch knows --aug weak, light and standard only"
            raise UserError(f"{known}: --aug {self.aug} takes --augment item.")
        if self.bs != "auto" and self.bs % 2 and (self.mixup or self.cutmix):
            raise UserError(f"--mixup and --cutmix mix pairs of images: --bs {self.bs} has to be even.")


def options(hint):
    """The classes and words in a type: float, "auto" and NoneType in float | Literal["auto"] | None."""
    if not get_args(hint): return [hint]
    return [one for part in get_args(hint) for one in options(part)]


def known(hint): return " or ".join(KINDS.get(one, one) for one in options(hint))


def fits(value, hint):
    "Whether `value` is one of the `options` of a type; whole numbers are numbers too."
    allowed = options(hint)
    # to Python, True is an int
    if isinstance(value, bool): return bool in allowed
    types = [one for one in allowed if isinstance(one, type)]
    if float in types: types.append(int)
    return isinstance(value, tuple(types)) or isinstance(value, str) and value in allowed


def is_folder_name(name):
    "Whether `name` is one folder, and neither . nor .."
    return Path(name).name == name and bool(name.strip("."))


def parse_sizes(text):
    "The image size of each epoch in `text`: 16x2,24,32 is [16, 16, 24, 32]. Errors: UserError."
    sizes = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,4})(?:x([0-9]{1,4}))?", part.strip())
        if not match:
            how = "write SIDE or SIDExEPOCHS with commas between, such as 16x2,24,32"
            raise UserError(f"--sizes {text!r} is no list of sizes: {how}.")
        sizes += [int(match[1])] * int(match[2] or 1)
    if not sizes: raise UserError(f"--sizes {text!r} is no list of sizes: all of it is for 0 epochs.")
    return sizes


# settings without an effect on the weights
FREE_ON_RESUME = (
    "data", "device", "workers", "runs", "resume", "dry_run", "seeds", "lr_find", "show_batch", "profile",
    "tensorboard", "wandb")


def check_dataset(name):
    "Raise a UserError where `name` is no data set; that of an old run need not be there until it is read."
    if has_pictures(name): return
    if Path(name).is_absolute() and not Path(name).exists():
        mend = "name its new place by --dataset, for a run by train.py --resume RUN --dataset"
        raise UserError(f"{name} is not there: {mend}.")
    there = "this file is none of them" if Path(name).is_file() else "there is none of this name"
    also = f"or the path of a folder of images, or of a zip or tar file; {there}"
    nearest("data set", str(name), DATASETS, also, 0.75)


ARCHIVES = tuple(ending for _, endings, _ in shutil.get_unpack_formats() for ending in endings)


def has_pictures(path):
    "Whether there is a folder, or an archive of one, at `path`."
    return Path(path).is_dir() or Path(path).is_file() and path.lower().endswith(ARCHIVES)


def is_own(dataset):
    "Whether a data set is pictures of one's own."
    return dataset not in DATASETS


def flag(name): return f"--{name.replace('_', '-')}"


def nearest(what, name, known, also="", cutoff=0.4):
    "Raise a UserError that proposes the nearest of the `known` names, unless `name` is one of them."
    if name in known: return
    close = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    hint = "no known name is like it"
    if len(known) < 10: hint = f"known are {', '.join(known)}"
    if close: hint = f"did you mean {close[0]}?"
    if also: hint += f" ({also})"
    raise UserError(f"Unknown {what} {name!r}: {hint}")
