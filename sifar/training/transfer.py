"""A model that starts from the weights of another, which learned on other images."""
from pathlib import Path

from ..errors import UserError, one_line
from ..files import ROOT
from ..log import log
from .callbacks import DAMAGED, read_tensors
from .models import fixed_size
from .recipe import load_learner

SHIPPED = ROOT / "results" / "cifar100-resnet18"
# in this order: a run's weights chosen on valid, those of an archived one, its last, what was exported of it
FILES = "models/best.pth", "model.safetensors", "models/last.pth", "learner.pkl"


def start_from(model, cfg):
    """Fill `model` with the weights of cfg.init; what does not fit stays as it is, and is named in the log.

    Errors: UserError where they cannot be read, or are of another architecture."""
    own, fit = model.state_dict(), fitting_weights(model, cfg)
    new = [k for k in own if k not in fit]
    model.load_state_dict({**own, **fit})
    log.info("Starts from %s; new are %s", Path(cfg.init).name, ", ".join(new) or "no layers")


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
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
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
