"""Accuracies that count every class alike, however many images it has; and the epoch that is best."""
import numpy as np

from ..distributed import gather

FEW = 5             # classes, of which no top-5 accuracy is told


def balanced_accuracy(preds, targs):
    "The mean of the accuracies of the classes that preds and targs (n,), whole numbers, are about."
    n = np.bincount(targs)
    right = np.bincount(targs[preds == targs], minlength=len(n))
    return float((right[n > 0] / n[n > 0]).mean())


def balanced_over_all(preds, targs):
    "balanced_accuracy of the images of all processes, each of which has a part."
    return balanced_accuracy(*(np.concatenate(gather(o)) for o in (preds, targs)))


def best_row(history, monitor):
    "The row of `history` that is best on valid by --monitor; of equal ones the one of the smallest loss."
    def figures(row):
        if monitor == "loss": return (-row["valid_loss"],)
        balanced = row.get("balanced")
        # runs from before there was a balanced accuracy kept the first of equal ones
        tie = 0 if balanced is None else -row["valid_loss"]
        if monitor == "balanced": return balanced or 0, tie
        return row["top1"], tie
    return max(history, key=figures)
