"""Whether probabilities mean what they say: calibration error, temperature, pictures of nothing known."""
import numpy as np

EPS = 1e-12
MANY = 20                   # classes from which on logits are standardised: see `familiarity`
KEPT = 0.95                 # share of the known pictures that are not taken for unknown ones
ENOUGH = 20                 # images to fit that on: of fewer, one in twenty is none
SURE = 5 / 6                # of the pictures of which a model is sure, at least so many are right


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


def calibration_error(probs, targs):
    """The expected calibration error (ECE): how far confidence and accuracy lie apart, on average.

    https://arxiv.org/abs/1706.04599"""
    confidence, accuracy, share = reliability(probs, targs)
    return float((abs(confidence - accuracy) * share).sum())


def with_temperature(probs, t):
    "`probs` (n,c) as if the logits had been divided by `t`."
    # log(probs) are the logits, less one number for each row, which softmax does not see
    powers = (probs + EPS) ** (1 / t)
    return powers / powers.sum(axis=1, keepdims=True)


def fit_temperature(probs, targs):
    """The temperature with which `probs` give the labels `targs` the highest likelihood.

    https://arxiv.org/abs/1706.04599"""
    from scipy.optimize import minimize_scalar  # here, as a light Space has no SciPy

    def loss(log_t):
        own = with_temperature(probs, np.exp(log_t))[np.arange(len(targs)), targs]
        return -np.log(own + EPS).mean()
    # searched as a logarithm, which is unbounded where a temperature is positive; from 0.05 to 20
    return float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))


# ---- whether a picture is of anything known ----

def familiarity(probs):
    """How far the largest logit of each row of `probs` (n,c) lies above their mean, (n,).

    With many classes in standard deviations of the row. See bench/README.md for the others that were
    measured: energy, the largest probability, the entropy."""
    logits = np.log(np.maximum(probs, EPS), dtype=np.float64)           # less one number for each row
    above = logits.max(1) - logits.mean(1)
    return above / logits.std(1).clip(EPS) if logits.shape[1] >= MANY else above


def fit_confidence(probs, targs):
    """What it takes to judge a picture by its probabilities, from known ones: probs (n,c), targs (n,).

    temperature: of the logits. threshold: the familiarity below which a picture is of nothing known; KEPT of
    these lie above. sure: the one from which on SURE of these are right."""
    score, right = familiarity(probs), probs.argmax(1) == targs
    order = np.argsort(-score, kind="stable")
    precise = right[order].cumsum() / np.arange(1, len(score) + 1) >= SURE
    last = np.flatnonzero(precise)[-1] if precise.any() else 0
    threshold = np.quantile(score, 1 - KEPT)
    return {
        # without a mistake every temperature is too high
        "temperature": 1.0 if right.all() else fit_temperature(probs, targs),
        "threshold": float(threshold),
        "sure": float(max(threshold, score[order[last]])),
    }


def judge(probs, confidence):
    "For each row of `probs` (n,c) sure, unsure or unknown, by what `fit_confidence` gave."
    score = familiarity(probs)
    known = np.where(score >= confidence["sure"], "sure", "unsure")
    return np.where(score < confidence["threshold"], "unknown", known)


def unknown_figures(known, unknown):
    "How well the familiarity of probs (n,c) tells `known` from `unknown`: AUROC, and what passes at KEPT."
    from sklearn.metrics import roc_auc_score
    a, b = familiarity(known), familiarity(unknown)
    is_known = np.repeat([1, 0], [len(a), len(b)])
    return {
        "auroc": float(roc_auc_score(is_known, np.concatenate((a, b)))),
        "pass": float((b >= np.quantile(a, 1 - KEPT)).mean()),
    }
