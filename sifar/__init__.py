"""sifar trains CIFAR-10 and CIFAR-100 classifiers, and ones on your own small images, with fastai."""
from .config import TrainConfig
from .errors import UserError

__version__ = "0.1.0"
__all__ = ["Predictor", "TrainConfig", "UserError", "get_dls", "get_learner", "load_learner"]
HOMES = {
    "get_dls": "data.loaders",
    "get_learner": "training.learner",
    "Predictor": "share.predictor",
    "load_learner": "training.recipe",
}


def __getattr__(name):
    "Import what needs fastai when it is first used, so that `import sifar` and `--help` stay quick."
    if name not in HOMES: raise AttributeError(f"module 'sifar' has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f".{HOMES[name]}", __name__), name)
