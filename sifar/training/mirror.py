"""Whether mirror images of pictures are of the same class: what --mirror auto means for a folder."""
import math
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from ..config import TrainConfig, is_own
from ..data.loaders import make_dls, normalized
from ..distributed import from_first
from ..log import log
from .models import get_model
from .precision import pick_device
from .transfer import read_weights

MOST, LEAST = 500, 20       # training images that are looked at, and below which it is not tried
SURE = 4                    # standard deviations: see bench/mirror.py


def settle_mirror(cfg, dls):
    "`cfg` with --mirror on or off where it is auto, and the DataLoaders that do it."
    if cfg.mirror != "auto" or cfg.resume or cfg.dry_run: return cfg, dls
    data = dls.data
    if is_own(cfg.dataset):
        data = look_at_mirrored(data, dls.stats, cfg.device)
        if data.mirrored:
            log.info("Images are mirrored: --mirror off where left and right differ, as in signs")
    cfg = replace(cfg, mirror="on" if data.mirrored else "off")
    return cfg, make_dls(cfg, data, dls.stats)


def look_at_mirrored(data, stats, device="auto"):
    "`data`, of which it is known by a look whether a mirrored image is one of the same class."
    n, lost, won = from_first(count_mirrored(data, stats, pick_device(device)))
    # where left and right make no difference, as many are lost as won, but for chance
    differ = lost - won > max(SURE * math.sqrt(lost + won), 0.05 * n)
    if differ: log.info("--mirror off, as of %d images %d fewer are recognised when mirrored", n, lost - won)
    return replace(data, mirrored=not differ)


def count_mirrored(data, stats, device):
    """How many training images were looked at, are recognised but not when mirrored, and the reverse.

    By linear classifiers on features of the shipped model, each of which learned the other half of them."""
    from sklearn.linear_model import RidgeClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    rows = data.train[np.argsort(data.labels[data.train], kind="stable")]
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), MOST)).astype(int)]        # of all classes
    y, halves, lost, won = data.labels[rows], [slice(i, None, 2) for i in (0, 1)], 0, 0
    if len(rows) < LEAST or min(len(set(y[half])) for half in halves) < 2: return len(rows), 0, 0
    images, model = data.images[rows], shipped_model().to(device)
    own, mirrored = (features(model, x, stats) for x in (images, images[:, :, ::-1]))
    for seen, other in (halves, halves[::-1]):
        classifier = make_pipeline(StandardScaler(), RidgeClassifier(alpha=1000)).fit(own[seen], y[seen])
        right, also = (classifier.predict(x[other]) == y[other] for x in (own, mirrored))
        lost, won = lost + int((right & ~also).sum()), won + int((also & ~right).sum())
    return len(rows), lost, won


def shipped_model():
    model = get_model("resnet18", 100)
    model.load_state_dict(read_weights(TrainConfig(init="cifar100")))
    return model.eval()


@torch.no_grad()
def features(model, images, stats):
    """What the third stage of a ResNet-18 makes of images (n,sz,sz,3) uint8, for each quarter: (n,1024).

    The last one hardly tells left from right, where a model has learned from mirrored images."""
    device = next(model.parameters()).device
    def see(x):                                                                         # (64,sz,sz,3)
        x = normalized(x.to(device), stats)
        x = F.interpolate(x, (32, 32), mode="bilinear", antialias=True)
        return F.adaptive_avg_pool2d(model.blocks[:6](model.stem(x)), 2).flatten(1).cpu()
    return torch.cat([see(x) for x in torch.from_numpy(images.copy()).split(64)]).numpy()
