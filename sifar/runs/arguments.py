"""The command line of train.py: flags over a preset, or over the settings of a run that goes on."""
import argparse
import ast
import inspect
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import get_type_hints

from ..cli import Parser
from ..config import (
    FREE_ON_RESUME,
    HEADS,
    INITS,
    TrainConfig,
    check_dataset,
    flag,
    has_pictures,
    is_own,
    known,
    options,
)
from ..data.folder import list_pictures
from ..data.layout import trained_on
from ..errors import UserError
from .run import Run, changed_settings

FEW = 500           # training images a class below which a folder is fine-tuned


def parse_args(args=None):
    "The TrainConfig of a command line: a preset or a resumed run, then the flags. Errors: UserError."
    first, _ = settings_parser(TrainConfig(), add_help=False).parse_known_args(args)
    old = Run(first.resume).settings if "resume" in first else first_settings(first)
    cfg = replace(old, **vars(settings_parser(old).parse_args(args)))
    check_dataset(cfg.dataset)
    if cfg.resume: check_resumable(old, cfg)
    return cfg


def check_resumable(old, new):
    "Refuse to resume with settings that would change the result; more epochs are allowed."
    before, now = asdict(old), asdict(new)
    # a folder may have been moved, with its table: what is in it is compared later
    moved = ("dataset", "labels") if is_own(old.dataset) and is_own(new.dataset) else ()
    listed = changed_settings(before, now, [k for k in now if k not in (*FREE_ON_RESUME, *moved)])
    if listed:
        raise UserError(f"Cannot resume {new.resume} with other settings: {listed}. "
                        "Only more --epochs go; leave the others out or start a new run.")


def first_settings(given):
    "The TrainConfig that the flags `given` change: that of a preset, with the --arch of --init."
    cfg = TrainConfig(preset=getattr(given, "preset", None) or usual_preset(given))
    if "arch" in given or getattr(given, "init", None) in (None, *INITS): return cfg
    init = Path(given.init)
    if (init / "config.json").is_file(): return replace(cfg, arch=Run(init).settings.arch)
    if init.suffix != ".pkl": return cfg
    from ..training.recipe import load_learner  # takes seconds
    return replace(cfg, arch=load_learner(init).arch)


def usual_preset(given):
    "finetune for pictures of one's own with few images a class, else standard."
    own = is_own(getattr(given, "dataset", "cifar100")) and has_pictures(given.dataset)
    # the weights are those of one architecture
    fits = getattr(given, "arch", "auto") in ("auto", *HEADS)
    if not own or not fits and "init" not in given: return "standard"
    table = Path(given.labels) if "labels" in given else None
    cache = Path(getattr(given, "data", TrainConfig().data)) / "cache"
    _, listed, _ = list_pictures(Path(given.dataset), cache, table)
    n = sum(split in ("", "train") for split, *_ in listed)
    return "finetune" if n < FEW * len(trained_on(listed)) else "standard"


def settings_parser(values, add_help=True):
    """A Parser with a flag for each setting; its --help shows those of `values`, a TrainConfig.

    A flag that is not given is left out of what it gives, so that another value can hold."""
    usage = "%(prog)s [-h] [OPTIONS]"
    parser = Parser("train.py", TrainConfig.__doc__, usage=usage, add_help=add_help)
    texts = setting_texts()
    for name, hint in get_type_hints(TrainConfig).items():
        text, value = texts[name], getattr(values, name)
        if value is not None: text += f" (default: {value})"
        kwargs = {"type": partial(read_value, hint=hint), "metavar": metavar(hint)}
        if hint is bool: kwargs = {"action": argparse.BooleanOptionalAction}
        # argparse fills in names behind a percent sign
        parser.add_argument(
            flag(name), dest=name, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **kwargs)
    return parser


def setting_texts():
    "The text below each field of TrainConfig: Python forgets it, so it is read from the source."
    body = ast.parse(inspect.getsource(TrainConfig)).body[0].body       # type: ignore[attr-defined]
    return {
        field.target.id: ast.literal_eval(text.value) for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)}


def read_value(text, hint):
    "A word of the command line as a value of the type `hint`. Errors: ArgumentTypeError."
    allowed = options(hint)
    if text in allowed: return text
    if text == "None" and NoneType in allowed: return None
    for kind in allowed:
        if kind in (int, float, str):
            with suppress(ValueError): return kind(text)
    raise argparse.ArgumentTypeError(f"{text!r} should be {known(hint)}")


def metavar(hint):
    "How --help names the values of the type `hint`: INT, FLOAT|auto, sgd|muon|adamw."
    allowed = [one for one in options(hint) if one is not NoneType]
    return "|".join(one if isinstance(one, str) else one.__name__.upper() for one in allowed)
