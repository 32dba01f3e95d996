"""Which axis of an output or of a layer's values a loss takes for the classes or channels; no MindSpore."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Optional

from msqkd.errors import PlanError

OVER_CLASSES = ("kl", "cosine")
"""The soft losses that take one axis of an output for the classes."""

BY_CHANNEL = ("mse", "attention")
"""The losses between layers that tell channels from positions."""

LEAST_SAMPLES = {"similarity": 2, "relational": 3}
"""Samples a batch needs at least. One sample is similar to itself alone; two have one distance, which is the mean."""

_TOKENS = 3  # dimensions of an output that has tokens


def class_axis(rank: int, axis: Optional[int] = None) -> int:
    """Return the axis of the classes in an output, counted from 0.

    Args:
        rank: Number of dimensions of the output, the batch included.
        axis: The axis that the user names, negative ones counted from the end. None takes the default: the last axis
            of vectors (N, C) and of tokens (N, T, C), and axis 1 of maps (N, C, H, W) and beyond.
    """
    if axis is None:
        return 1 if rank > _TOKENS else rank - 1
    return axis + rank if axis < 0 else axis


def check_outputs(
    shapes: Mapping[int, Sequence[int]], soft_loss: str, axis: Optional[int] = None, where: str = "DistillLoss"
) -> list[str]:
    """Refuse a soft loss that cannot fit an output, and say which axis it takes for the classes.

    Args:
        shapes: Shape of each output that is taught, by its number, the batch (any number) first.
        soft_loss: ``kl``, ``mse`` or ``cosine``.
        axis: As in `DistillLoss`.
        where: Place of the settings, for messages.

    Returns:
        One sentence for each output.

    Raises:
        PlanError: An output has no such axis, or a single class, which teaches nothing.
    """
    told = []
    for number, shape in shapes.items():
        words = f"({', '.join(['N', *map(str, shape[1:])])})"
        if soft_loss not in OVER_CLASSES:
            told.append(f"output {number} {words}: {soft_loss} of every number")
            continue
        place = class_axis(len(shape), axis)
        if not 1 <= place < len(shape):
            found = f"{where}.axis: found {axis}" if axis is not None else f"{where}.soft_loss: found '{soft_loss}'"
            ends = f"1 to {len(shape) - 1}, or negative" if len(shape) > 1 else "none; use soft_loss: mse"
            raise PlanError(f"{found}, but output {number} has shape {words}; axes of classes there: {ends}")
        if shape[place] == 1:
            raise PlanError(
                f"{where}.soft_loss: found '{soft_loss}', but output {number} of shape {words} has a single class on "
                f"axis {place}, which teaches nothing; use soft_loss: mse, or name another axis with {where}.axis"
            )
        told.append(f"output {number} {words}: {soft_loss} over the {shape[place]} classes on axis {place}")
    return told
