"""The names of the methods, and in which order they can be applied; needs no MindSpore."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

FLOAT_STAGE, INTEGER_STAGE = "float", "integer"
"""When a method comes: before ranges are measured, since it changes what is computed within, or after."""

STAGES = {
    "equalize": FLOAT_STAGE,
    "smoothquant": FLOAT_STAGE,
    "weight_ranges": INTEGER_STAGE,
    "adaround": INTEGER_STAGE,
    "reconstruct": INTEGER_STAGE,
    "bias_correction": INTEGER_STAGE,
}
"""The stage of every method, by name, in an order in which they can be combined."""

_TRAIN_ROUNDINGS = ("adaround", "reconstruct")


def against_order(methods: Sequence[str]) -> Optional[str]:
    """Why methods cannot be applied in this order, in words, or None."""
    for place, name in enumerate(methods):
        before = [other for other in methods[:place] if STAGES[other] == INTEGER_STAGE]
        if STAGES[name] == FLOAT_STAGE and before:
            return f"'{name}' changes the ranges that '{before[0]}' needs, and comes before it"
        if name == "weight_ranges" and any(other in _TRAIN_ROUNDINGS for other in before):
            return f"'weight_ranges' chooses the scales that '{before[-1]}' rounds with, and comes before it"
    both = [name for name in methods if name in _TRAIN_ROUNDINGS]
    return f"'{both[0]}' and '{both[1]}' train the same roundings; keep one" if len(both) > 1 else None
