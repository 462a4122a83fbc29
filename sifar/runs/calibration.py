"""Whether probabilities mean what they say: calibration error, and the temperature that mends it."""
import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import softmax

EPS = 1e-12


def reliability(probs, targs, bins=15):
    "Of each bin of confidence that has images: its mean confidence, its accuracy and its share of all images, as three arrays."
    confidence, right = probs.max(1), probs.argmax(1) == targs
    at = np.minimum((confidence * bins).astype(int), bins - 1)
    n = np.bincount(at, minlength=bins)
    some = n > 0
    mean = [np.bincount(at, o, bins)[some] / n[some] for o in (confidence, right)]
    return *mean, n[some] / len(targs)


def calibration_error(probs, targs, bins=15):
    "The expected calibration error (ECE): how far confidence and accuracy lie apart, on average. https://arxiv.org/abs/1706.04599"
    confidence, accuracy, share = reliability(probs, targs, bins)
    return float((abs(confidence - accuracy) * share).sum())


def with_temperature(probs, t):
    "`probs` (n,c) as if the logits had been divided by `t`."
    return softmax(np.log(probs + EPS) / t, axis=1)


def fit_temperature(probs, targs):
    "The temperature with which `probs` give the labels `targs` the highest likelihood. https://arxiv.org/abs/1706.04599"
    def loss(log_t): return -np.log(with_temperature(probs, np.exp(log_t))[np.arange(len(targs)), targs] + EPS).mean()
    return float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))
