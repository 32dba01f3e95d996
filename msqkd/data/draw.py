"""The order in which samples are taken where a few have to stand for all, as in calibration."""

from __future__ import annotations

import numpy as np

from msqkd.data.base import Split, subset


def fair_order(split: Split, seed: int) -> np.ndarray:
    """Return all sample indices in a random order of which every first part is balanced over the classes.

    Samples go round the classes, each class in a random order of its own. A class that has no sample left is passed
    over. Labels are classes if they are integers of shape (N,) that the split holds (see `Split.held_labels`);
    otherwise the order is plainly random. It depends on nothing but the labels, their number, and `seed`.

    Args:
        split: the samples.
        seed: of the order.

    Returns:
        A permutation, int64 (N,).
    """
    order = np.random.default_rng(seed).permutation(len(split))
    labels = split.held_labels
    if not isinstance(labels, np.ndarray) or labels.ndim != 1 or labels.dtype.kind not in "iu":
        return order
    _, classes, sizes = np.unique(labels[order], return_inverse=True, return_counts=True)
    by_class = np.argsort(classes, kind="stable")
    turns = np.empty(len(order), np.int64)
    turns[by_class] = np.concatenate([np.arange(size) for size in sizes])
    return order[np.argsort(turns, kind="stable")]


def draw(split: Split, count: int, seed: int = 0) -> Split:
    """Return `count` samples that stand for the whole split, balanced over the classes (see `fair_order`).

    Args:
        split: the samples.
        count: number of samples, at least 1. The split itself is returned if it has no more.
        seed: of the draw.
    """
    return split if count >= len(split) else subset(split, fair_order(split, seed)[:count])
