"""Slices with steps as they are trained: the CPU kernel of their gradient is right for some forms only.

It writes out of bounds where an axis with a step is followed by one without, and to the wrong places for a step
backwards. A gather with literal positions computes the same, and has a right gradient.
"""

from __future__ import annotations

from typing import Any, Optional

import numpy as np

from msqkd.graph.ir import Graph, Node

Gathers = list[tuple[int, np.ndarray]]
"""(axis, positions int32) of the gathers, one after the other."""


def gathers_of(graph: Graph, node: Node) -> Optional[tuple[Gathers, list[Any]]]:
    """Split a ``StridedSlice`` into gathers along the axes with a step and a slice without steps.

    Returns:
        The gathers, and the arguments begin, end, strides and begin_mask to shrink_mask of the slice behind them; None
        where the slice is trained as it is, or has an argument or a size that is not known.
    """
    if node.sequences or any(graph.values[name].kind != "const" for name in node.inputs[1:9]):
        return None
    begin, end, strides, *masks = (graph.const(name) for name in node.inputs[1:9])
    shape = graph.shape(node.inputs[0])
    _, _, ellipsis, new_axis, shrink = masks
    if new_axis or _is_right(strides, len(shape), ellipsis):
        return None
    begin, end, strides = list(begin), list(end), list(strides)
    skipped = len(shape) - len(strides) + 1 if ellipsis else 1
    found: Gathers = []
    axis = 0
    for place, step in enumerate(strides):
        if ellipsis >> place & 1:
            axis += skipped
            continue
        if step != 1 and not shrink >> place & 1:
            if shape[axis] < 1:
                return None
            first = None if masks[0] >> place & 1 else begin[place]
            last = None if masks[1] >> place & 1 else end[place]
            found.append((axis, np.arange(shape[axis], dtype=np.int32)[first:last:step]))
            begin[place], end[place], strides[place] = 0, len(found[-1][1]), 1
            masks[0] |= 1 << place
            masks[1] |= 1 << place
        axis += 1
    return (found, [tuple(begin), tuple(end), tuple(strides), *masks]) if found else None


def has_gradient(graph: Graph, node: Node) -> bool:
    """Return True if the gradient of a ``StridedSlice`` is right in the cell built from the graph."""
    strides = node.arguments()[3]
    places = (strides,) if isinstance(strides, int) else strides
    literals = [graph.const(node.inputs[place]) for place in places]
    steps = literals[0] if isinstance(strides, int) else tuple(literals)
    if steps is not None and all(step == 1 for step in steps):
        return True
    if node.sequences or None in (steps, *(graph.const(name) for name in node.inputs[1:9])):
        return False
    rank, ellipsis = len(graph.shape(node.inputs[0])), graph.const(node.inputs[6])
    return _is_right(steps, rank, ellipsis) or gathers_of(graph, node) is not None


def _is_right(strides: tuple[int, ...], rank: int, ellipsis: int) -> bool:
    """Return True if the gradient of a slice with these steps is right: none, or only behind all axes without."""
    if all(step == 1 for step in strides):
        return True
    if ellipsis or len(strides) < rank or min(strides) < 0:
        return False
    first = next(index for index, step in enumerate(strides) if step != 1)
    return all(step > 1 for step in strides[first:])
