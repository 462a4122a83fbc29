"""A model that starts from the weights of another, which learned on other images."""
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fastai.callback.hook import Hooks
from torch import nn

from ..config import HEADS
from ..data.loaders import normalized
from ..distributed import from_first
from ..errors import UserError, one_line
from ..files import ROOT
from ..log import log
from .checkpoints import DAMAGED, read_tensors
from .models import fixed_size, get_model
from .precision import pick_device
from .recipe import load_learner

SHIPPED = ROOT / "results" / "cifar100-resnet18"
# in this order: a run's weights chosen on valid, those of an archived one, its last, what was exported of it
FILES = "models/best.pth", "model.safetensors", "models/last.pth", "learner.pkl"
MOST = 2000                     # training images that a new head is fitted to
PENALTY = 1/300                 # of a head's weights, times inputs and images a class


def start_from(model, cfg, dls):
    """Fill `model` with the weights of cfg.init; what does not fit is new, and is named in the log.

    A linear head that is new, or of other classes, is fitted to the training images of `dls`, the other
    layers stay as they are. Errors: UserError where they cannot be read, or are of another architecture."""
    new, head = fill(model, cfg), model.get_classifier()
    if isinstance(head, nn.Linear) and head.bias is not None:
        name = next(name for name, m in model.named_modules() if m is head)
        x, y = known_inputs(head, model, dls)
        own = {f"{name}.weight", f"{name}.bias"}
        # as many classes need not be the same ones; what follows, all processes do or none
        if own <= {*new} or from_first(told(head.weight.cpu(), head.bias.cpu(), x, y)) < len(y) / 2:
            fit_head(head, x, y)
            new = [k for k in model.state_dict() if k in own or k in new]
    log.info("Starts from %s; new are %s", Path(cfg.init).name, ", ".join(new) or "no layers")


def fit_head(head, x, y):
    """Fit the linear layer `head` to its inputs x (n,f) of images of classes y (n,), by logistic regression.

    The gradients of a random one would spoil the features that are there. https://arxiv.org/abs/2202.10054"""
    # the same in all processes that share a training
    weight, bias = from_first(regression(x, y, head.out_features))
    with torch.no_grad():
        # half as sure of the same classes: of what it is sure of, the layers before it would learn nothing
        head.weight.copy_(weight / 2)
        head.bias.copy_(bias / 2)


def settle_arch(cfg, dls):
    """`cfg` with, where its --arch is auto, the one of HEADS that recognises more training images of `dls`.

    Each head is fitted to others of them than those that it is to recognise. Errors: as `start_from`."""
    if cfg.arch != "auto": return cfg
    right = []
    for arch in HEADS:
        model = get_model(arch, dls.c).to(pick_device(cfg.device))
        fill(model, replace(cfg, arch=arch))
        x, y = known_inputs(model.get_classifier(), model, dls)
        right.append(count_told(x, y, dls.c))
    late, plain = from_first(right)
    arch = HEADS[plain > late]
    log.info("--arch %s, as its head recognises %d of %d images by others, the other head %d",
             arch, max(late, plain), len(y), min(late, plain))
    return replace(cfg, arch=arch)


def count_told(x, y, n_out):
    "How many of x (n,f) are told to be y (n,) by a regression on the two thirds that they are not in."
    third, right = torch.empty_like(y), 0
    third[y.argsort(stable=True)] = torch.arange(len(y)) % 3            # as many of a class in each
    for other in (third == i for i in range(3)):
        weight, bias = regression(x[~other], y[~other], n_out)
        right += told(weight, bias, x[other], y[other])
    return right


def told(weight, bias, x, y):
    "How many of x (n,f) a linear layer tells to be y (n,)."
    return int((F.linear(x, weight, bias).argmax(1) == y).sum())


def known_inputs(head, model, dls):
    "What the layer `head` of `model` gets of up to MOST training images, and their labels: (n,f) and (n,)."
    data = dls.data
    rows = data.train[np.linspace(0, len(data.train) - 1, min(len(data.train), MOST)).astype(int)]
    return inputs_of(head, model, data.images[rows], dls.stats), torch.from_numpy(data.labels[rows])


@torch.no_grad()
def inputs_of(head, model, images, stats):
    "What the layer `head` of `model` gets of images (n,sz,sz,3) uint8: (n,f)."
    seen, training = [], model.training
    model.eval()
    with hook_inputs([head]) as hooks:
        for part in torch.from_numpy(images).split(64):
            model(normalized(part.to(head.weight.device), stats))
            seen.append(hooks.stored[0].float())
    model.train(training)
    return torch.cat(seen)


def hook_inputs(layers):
    "fastai's Hooks, whose `stored` are what these layers got last, on the CPU."
    return Hooks(layers, lambda layer, inputs, output: inputs[0], cpu=True)


def regression(x, y, n_out):
    "Weights (n_out,f) and biases (n_out,) of a logistic regression of y (n,) on x (n,f), standardised in it."
    mean, std, penalty = x.mean(0), x.std(0, correction=0) + 1e-3, PENALTY * x.numel() / n_out
    x = (x - mean) / std
    weight = torch.zeros(n_out, x.shape[1], requires_grad=True)
    bias = torch.zeros(n_out, requires_grad=True)
    opt = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        opt.zero_grad()
        loss = F.cross_entropy(x @ weight.T + bias, y, reduction="sum") + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss
    opt.step(loss)
    weight = weight.detach() / std
    return weight, bias.detach() - weight @ mean


def fill(model, cfg):
    "Give `model` those weights of cfg.init that fit; the names of the others. Errors: as `start_from`."
    own, fit = model.state_dict(), fitting_weights(model, cfg)
    model.load_state_dict({**own, **fit})
    return [k for k in own if k not in fit]


def fitting_weights(model, cfg):
    "Those tensors of cfg.init, by name, that `model` has in the same shape. Errors: as `start_from`."
    own = model.state_dict()
    fit = {k: v for k, v in read_weights(cfg).items() if k in own and v.shape == own[k].shape}
    if len(fit) >= len(own) / 2: return fit
    what = f"--init {cfg.init} has weights of another architecture than --arch {cfg.arch}"
    raise UserError(f"{what}: {len(fit)} of {len(own)} tensors fit. Give the --arch that it has.")


def read_weights(cfg):
    "The tensors of cfg.init by name. Errors: UserError."
    if cfg.init == "timm": return pretrained(cfg.arch.removeprefix("timm:"), cfg.sz)
    path = find_weights(SHIPPED if cfg.init == "cifar100" else Path(cfg.init))
    if path.suffix == ".pkl": return load_learner(path).model.state_dict()
    try:
        state = read_tensors(path)
        if path.name == "last.pth": state = (state.get("ema") or state)["model"]
        return state
    except PermissionError: raise
    except DAMAGED as e: raise UserError(f"{path} is damaged ({one_line(e)}): choose another --init.") from e


def find_weights(path):
    "The file of weights that `path`, a run folder or a file, stands for. Errors: UserError."
    for file in (path, *(path / name for name in FILES)):
        if file.is_file(): return file
    raise UserError(f"--init {path} has no weights: name a run folder, a learner.pkl, cifar100 or timm.")


def pretrained(name, sz):
    """The weights that timm has for its model `name`, for images of `sz` pixels where it takes but one size.

    Errors: UserError where they are neither in the hub's cache nor can be fetched."""
    import timm
    from huggingface_hub import constants
    offline = constants.HF_HUB_OFFLINE
    # else its client tries for a minute; what is in its cache needs no network
    constants.HF_HUB_OFFLINE = offline or not is_reachable(constants.ENDPOINT)
    try: return timm.create_model(name, pretrained=True, **fixed_size(name, (sz,))).state_dict()
    # of many kinds: urllib3's, httpx's and its own
    except Exception as e:
        why = f"{constants.ENDPOINT} is not reached" if constants.HF_HUB_OFFLINE else one_line(e)
        raise UserError(f"timm's weights for {name} cannot be had ({why}): "
                        "check the network, or leave out --init timm.") from e
    finally: constants.HF_HUB_OFFLINE = offline


def is_reachable(address):
    "Whether a server answers at an address, whatever it says."
    from huggingface_hub.utils import get_session
    try: get_session().head(address, timeout=10)
    except Exception: return False              # whatever client the hub has in its version
    return True
