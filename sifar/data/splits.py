"""Stratified splits."""
import numpy as np

SPLITS = "train", "valid", "test"


def stratified_split(rows, labels, pct, seed):
    """`rows` in two: all but about `pct` of each class, and that share.

    It has at least one image of each class of two or more."""
    if not pct: return rows, rows[:0]
    rng, held = np.random.default_rng(seed), []
    for c in np.unique(labels[rows]):
        of_class = rng.permutation(rows[labels[rows] == c])
        held.append(of_class[:min(max(1, round(pct * len(of_class))), len(of_class) - 1)])
    valid = np.sort(np.concatenate(held))
    return np.setdiff1d(rows, valid), valid
