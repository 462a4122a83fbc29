"""Labels that a model doubts, and images that are like no others, by what a model sees in them.

What doubts a label has to come from a model that did not learn from it."""
import numpy as np
import torch
from fastcore.all import chunked
from torch import nn

from ..errors import UserError
from ..training.models import ResNet

PART = 10_000           # images that are judged together, at most: time grows with its square, a matrix too
WIDTH, RIDGE = 0.7, 0.7                 # of the kernel ridge regression
RIVAL, DOUBT = 0.3, -0.15               # how much another class counts, and the limit: by bench/planted.py
NEAREST, FENCE, CHUNK = 5, 2, 500       # of far_from_others; images whose nearest are looked up at once


def doubted(probs, labels):
    """For probs (n,c) and labels (n,): which are doubted, the likelier class, and by how much, each (n,).

    Confident learning: https://arxiv.org/abs/1911.00068
    An image counts for a class where it is as likely as for the images with that label on average. Doubted
    is a label where the likeliest of those classes is another."""
    of_own = np.full(probs.shape[1], np.inf)
    for c in np.unique(labels): of_own[c] = probs[labels == c, c].mean()
    counts = np.where(probs >= of_own, probs, -1.0)
    new, rows = counts.argmax(1), np.arange(len(labels))
    margin = probs[rows, new] - probs[rows, labels]
    return (counts.max(1) >= 0) & (new != labels), new, margin


def judge(data, learn):
    """Rows of an ImageData and what `far_from_others` gives of them; rows and what `doubted` gives of those.

    A model of the same classes judges the labels of test: it may have learned all others by heart. Of one
    with other classes the features are taken, see `unlike`. Errors: UserError."""
    rows = np.sort(np.concatenate((data.train, data.valid, data.test)))
    same = list(learn.dls.vocab) == list(data.vocab)
    if same and not len(data.test):
        raise UserError("A model of the same classes judges test alone: it is empty.")
    if not same and min(np.bincount(data.labels[rows])) < 2:
        raise UserError("The labels cannot be judged: a class has one image, and no other to learn from.")
    features, probs = outputs(learn, data.images, rows)
    far = far_from_others(features)
    if not same: return rows, far, rows, unlike(standard(*features), data.labels[rows])
    test = np.isin(rows, data.test)
    return rows, far, rows[test], doubted(probs[test], data.labels[rows[test]])


def far_from_others(features):
    """Which of n images are far from all others, and the mean cosine to the nearest five of them: each (n,).

    features: parts, each (n,f). Far is what lies two interquartile ranges below the lower quartile (Tukey's
    fence, which lies at 1.5 of them)."""
    x = nn.functional.normalize(torch.from_numpy(np.concatenate(features, axis=1)), dim=1)
    most = min(NEAREST + 1, len(x))             # the nearest of all is the image itself
    alike = torch.cat([(part @ x.T).topk(most).values[:, 1:].mean(1) for part in x.split(CHUNK)]).numpy()
    low, high = np.quantile(alike, (0.25, 0.75))
    return alike < low - FENCE * (high - low), alike


def unlike(features, labels):
    """As `doubted`, for features (n,f): by kernel ridge regression on the labels of other images.

    Doubted is a label whose score lies far below the scores that labels have on average; an image that is
    like many of its own class as well as of another keeps it."""
    of_class = np.eye(labels.max() + 1, dtype=np.float32)[labels]
    scores = np.empty_like(of_class)
    order = np.random.default_rng(0).permutation(len(labels))
    for part in np.array_split(order, -(-len(order) // PART)):
        scores[part] = by_all_others(features[part], of_class[part])
    rows = np.arange(len(labels))
    own = scores[rows, labels]
    scores[rows, labels] = -np.inf
    new = scores.argmax(1)
    score = (own - RIVAL * scores[rows, new]) / max(own.mean(), 1e-3)
    return score < DOUBT, new, -score


def by_all_others(x, y):
    """How much each of features x (n,f) is of each class, by the classes y (n,c) of all others: (n,c).

    That of kernel ridge regressions fitted without just the image itself, in closed form, 5.12 of
    http://gaussianprocess.org/gpml/chapters/RW5.pdf"""
    x, y = torch.from_numpy(x).float(), torch.from_numpy(y)
    k = torch.cdist(x, x).square_().mul_(-WIDTH).exp_()             # (n,n), as the next two
    k.diagonal().add_(RIDGE)
    k = torch.linalg.cholesky(k)
    k = torch.cholesky_inverse(k)
    return (y - k @ y / k.diagonal()[:, None]).numpy()


@torch.inference_mode()
def outputs(learn, images, rows, bs=250):
    """Features of these rows of images by a learner, in parts (n,f), and its probabilities (n,c).

    Features are what goes into the last linear layer, and the mean of an earlier stage of our own models."""
    from ..training.transfer import hook_inputs  # fastai, which takes seconds
    linear = [o for o in learn.model.modules() if isinstance(o, nn.Linear)]
    if not linear: raise UserError(f"The model {learn.arch} has no linear layer, so it cannot judge labels.")
    layers = [linear[-1], *([learn.model.blocks[-2]] if isinstance(learn.model, ResNet) else [])]
    probs, seen = [], []
    with hook_inputs(layers) as hooks:
        for part in chunked(rows, bs):
            xb, = learn.dls.test_dl(images[part], rm_type_tfms=0, bs=bs, num_workers=0).one_batch()
            probs.append(learn.model(xb).softmax(1).cpu().numpy())
            seen.append([x.mean((2, 3)) if x.ndim == 4 else x for x in hooks.stored])
    return [torch.cat(parts).numpy() for parts in zip(*seen)], np.concatenate(probs)


def standard(*parts):
    "Features in parts (n,f) as one, each part with mean 0 and deviation 1, then of length 1 for each image."
    scaled = [(x - x.mean(0)) / (x.std(0) + 1e-3) for x in parts]
    lengths = [np.linalg.norm(x, axis=1, keepdims=True) for x in scaled]
    return np.concatenate([x / np.maximum(length, 1e-6) for x, length in zip(scaled, lengths)], axis=1)
