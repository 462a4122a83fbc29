"""Whether probabilities mean what they say: calibration error, and the temperature that lessens it."""
import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import softmax

EPS = 1e-12


def reliability(probs, targs, bins=15):
    """For probs (n,c) and targs (n,): confidence, accuracy and share of all images, as three arrays.

    They have one value for each bin of confidence that holds images."""
    confidence, right = probs.max(1), probs.argmax(1) == targs
    # a confidence of 1 belongs to the last bin
    in_bin = np.minimum((confidence * bins).astype(int), bins - 1)
    n = np.bincount(in_bin, minlength=bins)
    used = n > 0
    mean_confidence = np.bincount(in_bin, confidence, bins)[used] / n[used]
    accuracy = np.bincount(in_bin, right, bins)[used] / n[used]
    return mean_confidence, accuracy, n[used] / len(targs)


def calibration_error(probs, targs, bins=15):
    """The expected calibration error (ECE): how far confidence and accuracy lie apart, on average.

    https://arxiv.org/abs/1706.04599"""
    confidence, accuracy, share = reliability(probs, targs, bins)
    return float((abs(confidence - accuracy) * share).sum())


def with_temperature(probs, t):
    "`probs` (n,c) as if the logits had been divided by `t`."
    # log(probs) are the logits, less one number for each row, which softmax does not see
    return softmax(np.log(probs + EPS) / t, axis=1)


def fit_temperature(probs, targs):
    """The temperature with which `probs` give the labels `targs` the highest likelihood.

    https://arxiv.org/abs/1706.04599"""
    def loss(log_t):
        own = with_temperature(probs, np.exp(log_t))[np.arange(len(targs)), targs]
        return -np.log(own + EPS).mean()
    # searched as a logarithm, which is unbounded where a temperature is positive; from 0.05 to 20
    return float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))
