"""The names of the methods, and in which order they can be applied; needs no MindSpore."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

FLOAT_STAGE, INTEGER_STAGE = "float", "integer"
"""When a method comes: before ranges are measured, since it changes what is computed within, or after."""

STAGES = {
    "equalize": FLOAT_STAGE,
    "smoothquant": FLOAT_STAGE,
    "split": FLOAT_STAGE,
    "weight_ranges": INTEGER_STAGE,
    "adaround": INTEGER_STAGE,
    "reconstruct": INTEGER_STAGE,
    "cluster": INTEGER_STAGE,
    "bias_correction": INTEGER_STAGE,
}
"""The stage of every method, by name, in an order in which they can be combined."""

_TRAIN_ROUNDINGS = ("adaround", "reconstruct")
_CLUSTER = "cluster"


def against_order(methods: Sequence[str]) -> Optional[str]:
    """Why methods cannot be applied in this order, in words, or None."""
    for place, name in enumerate(methods):
        before = [other for other in methods[:place] if STAGES[other] == INTEGER_STAGE]
        if STAGES[name] == FLOAT_STAGE and before:
            return f"'{name}' changes the ranges that '{before[0]}' needs, and comes before it"
        if name == "equalize" and "split" in methods[:place]:
            return "'equalize' would scale up again what 'split' has made smaller, and comes before it"
        rounded = [other for other in before if other in (*_TRAIN_ROUNDINGS, _CLUSTER)]
        if name == "weight_ranges" and rounded:
            return f"'weight_ranges' chooses the scales that '{rounded[-1]}' rounds with, and comes before it"
        if name == _CLUSTER and "bias_correction" in before:
            return f"'bias_correction' takes out what '{_CLUSTER}' leaves, and comes after it"
    both = [name for name in methods if name in (*_TRAIN_ROUNDINGS, _CLUSTER)]
    if len(both) < 2:
        return None
    what = "choose the same integers" if _CLUSTER in both else "train the same roundings"
    return f"'{both[0]}' and '{both[1]}' {what}; keep one"
