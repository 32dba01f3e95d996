"""Where the channels of a value lie, and where an operation that only moves values puts them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Optional

import mindspore as ms
import numpy as np

from msqkd.errors import DataError
from msqkd.graph.cell import Hooks, to_cell
from msqkd.graph.ir import Graph, Node
from msqkd.quant.algorithms.stream import Batch
from msqkd.quant.uses import slice_entries

_RESHAPES = ("Reshape", "Squeeze", "ExpandDims")


@dataclass(frozen=True)
class Channels:
    """`count` channels along `axis`, each of them `repeat` neighbouring places (as after a flattening of maps)."""

    axis: int
    count: int
    repeat: int = 1

    def rows(self, array: np.ndarray) -> np.ndarray:
        """A value as (count, everything of that channel)."""
        return np.moveaxis(array, self.axis, 0).reshape(self.count, -1)

    def spread(self, numbers: np.ndarray) -> np.ndarray:
        """Numbers (count,) for every place along the axis."""
        return np.repeat(numbers, self.repeat)

    def gathered(self, numbers: np.ndarray) -> np.ndarray:
        """Numbers of every place along the axis as (count, repeat)."""
        return numbers.reshape(self.count, self.repeat)


def layer_input(graph: Graph, node: Node) -> int:
    """The axis of the input channels of a convolution, or of a dense layer or product."""
    return 1 if node.op == "Conv2D" else len(graph.shape(node.inputs[0])) - 1


def layer_output(graph: Graph, node: Node) -> Channels:
    """The output channels of a convolution or dense layer."""
    axis = 1 if node.op == "Conv2D" else len(graph.shape(node.output)) - 1
    return Channels(axis, graph.shape(node.inputs[1])[0])


def moved(graph: Graph, node: Node, channels: Channels) -> Optional[Channels]:
    """The channels in the result of a reshape, transposition or slice; None where they mix or some are left out, or for
    another operation."""
    if node.op == "Transpose":
        order = graph.const(node.inputs[1])
        rank = len(graph.shape(node.inputs[0]))
        return None if order is None else replace(channels, axis=[int(i) % rank for i in order].index(channels.axis))
    if node.op == "StridedSlice":
        return _sliced(graph, node, channels)
    if node.op not in _RESHAPES:
        return None
    shape, target = graph.shape(node.inputs[0]), graph.shape(node.output)
    behind = shape[channels.axis + 1 :]
    if min(behind, default=1) < 1:
        return None
    places = channels.repeat * prod(behind)  # of one channel, side by side in memory
    for axis in range(len(target)):
        sizes = target[axis:]
        if min(sizes) < 1 or prod(sizes) != channels.count * places or places % prod(sizes[1:]):
            continue
        return Channels(axis, channels.count, places // prod(sizes[1:]))
    return None


def _sliced(graph: Graph, node: Node, channels: Channels) -> Optional[Channels]:
    entries = slice_entries(graph, node)
    if entries is None:
        return None
    axis = channels.axis - sum(single for *_, single in entries[: channels.axis])
    size = channels.count * channels.repeat
    begin, end, step, single = entries[channels.axis] if channels.axis < len(entries) else (None, None, 1, False)
    whole = begin in (None, 0) and (end is None or end >= size) and step == 1 and not single
    return replace(channels, axis=axis) if whole else None


Update = Callable[[str, np.ndarray], None]


def watch(graph: Graph, batches: Iterable[Batch], values: Sequence[str], update: Update) -> None:
    """Call `update` with the name and the array of each of `values` of a float graph, batch by batch.

    Raises:
        DataError: there are no samples.
    """
    cell, outputs = to_cell(graph, Hooks(observe=values)), len(graph.outputs)
    empty = True
    for batch in batches:
        found = cell(*map(ms.Tensor, batch))[outputs:]
        for name, value in zip(values, found):
            update(name, value.asnumpy())
        empty = False
    if empty:
        raise DataError("the calibration set has 0 samples; give at least one batch")


class Moments:
    """Per-channel statistics of one value over all samples, float64 (C,): `low`, `high`, and `mean` and `deviation`."""

    def __init__(self, channels: Channels) -> None:
        self.channels, self.number = channels, 0
        self.low, self.high = np.full(channels.count, np.inf), np.full(channels.count, -np.inf)
        self.mean, self._squares = np.zeros(channels.count), np.zeros(channels.count)

    def update(self, value: np.ndarray) -> None:
        """Take in one batch."""
        rows = self.channels.rows(value)
        self.low, self.high = np.minimum(self.low, rows.min(1)), np.maximum(self.high, rows.max(1))
        # Merged by the means, not by sums of squares: those of a large mean and a small deviation cancel.
        mean, number = rows.mean(1, dtype=np.float64), rows.shape[1]
        squares = np.square(rows - mean[:, None]).sum(1)
        apart, total = mean - self.mean, self.number + number
        self._squares += squares + np.square(apart) * (self.number * number / total)
        self.mean = self.mean + apart * (number / total)
        self.number = total

    @property
    def deviation(self) -> np.ndarray:
        """The standard deviation."""
        return np.sqrt(self._squares / max(self.number, 1))

    @property
    def reach(self) -> np.ndarray:
        """The largest magnitude."""
        return np.maximum(np.abs(self.low), np.abs(self.high))
