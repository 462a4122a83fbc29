"""Labels that a model doubts, by confident learning: https://arxiv.org/abs/1911.00068

The probabilities have to come from a model that did not learn from these very labels."""
import numpy as np
import torch
from fastcore.all import chunked
from torch import nn

from ..errors import UserError

FOLDS = 3


def doubted(probs, labels):
    """For probs (n,c) and labels (n,): which are doubted, the likelier class, and by how much, each (n,).

    An image counts for a class where it is as likely as for the images with that label on average. Doubted
    is a label where the likeliest of those classes is another."""
    of_own = np.full(probs.shape[1], np.inf)
    for c in np.unique(labels): of_own[c] = probs[labels == c, c].mean()
    counts = np.where(probs >= of_own, probs, -1.0)
    new, rows = counts.argmax(1), np.arange(len(labels))
    margin = probs[rows, new] - probs[rows, labels]
    return (counts.max(1) >= 0) & (new != labels), new, margin


def judge(data, learn):
    """Rows of an ImageData and their probabilities (rows,c) by the learner `learn`, for `doubted`.

    A model of the same classes says them itself, of test: it may have learned all others by heart. Of one
    with other classes the features are taken: a logistic regression on those learns the labels, and says
    them of images that it has not seen. Errors: UserError."""
    if list(learn.dls.vocab) == list(data.vocab):
        if not len(data.test): raise UserError("A model of the same classes judges test alone: it is empty.")
        return data.test, outputs(learn, data.images[data.test])[1]
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    rows = np.sort(np.concatenate((data.train, data.valid, data.test)))
    labels = data.labels[rows]
    if min(np.bincount(labels)) < FOLDS:
        raise UserError(f"The labels cannot be judged: a class has less than {FOLDS} images to learn from.")
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.003, max_iter=200))
    features = outputs(learn, data.images[rows])[0]
    return rows, cross_val_predict(model, features, labels, cv=FOLDS, method="predict_proba")


@torch.inference_mode()
def outputs(learn, images, bs=250):
    "What goes into the last linear layer of a learner, (n,features), and its probabilities (n,c)."
    layers = [o for o in learn.model.modules() if isinstance(o, nn.Linear)]
    if not layers: raise UserError(f"The model {learn.arch} has no linear layer, so it cannot judge labels.")
    features, probs = [], []
    hook = layers[-1].register_forward_pre_hook(lambda _, args: features.append(args[0].cpu().numpy()))
    try:
        for part in chunked(images, bs):
            dl = learn.dls.test_dl(part, rm_type_tfms=0, bs=bs, num_workers=0)
            probs += [learn.model(xb).softmax(1).cpu().numpy() for xb, in dl]
    finally: hook.remove()
    return np.concatenate(features), np.concatenate(probs)
