"""Float operations that MindSpore Lite computes as several of its own: normalisations, norms, curves, running sums."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Optional

import numpy as np

from msqkd.exporters.device.lower import FLOAT, NATIVE, Lowering
from msqkd.graph.ir import Node
from msqkd.integer.program import ActivationType, ReduceMode
from msqkd.quant.uses import axes_of
from msqkd.targets import limits

Layout = tuple[int, ...]
_EXP = {"base": -1.0, "scale": 1.0, "shift": 0.0}
_TANH = ActivationType.TANH


class _Steps:
    """The steps of one node, all in one layout; their operands and results are tensors of the program.

    Args:
        low, node: as they are called.
        layout: that in which everything is held.
    """

    def __init__(self, low: Lowering, node: Node, layout: Layout = NATIVE) -> None:
        self.low, self.node, self.layout = low, node, layout

    def source(self) -> str:
        """The first input of the node."""
        return self.low.get(self.node.inputs[0], FLOAT, self.layout)

    def constant(self, hint: str, data: Any) -> str:
        """A constant of float32."""
        return self.low.constant(f"{self.node.output}_{hint}", np.atleast_1d(np.asarray(data, np.float32)))

    def step(
        self, op: str, operands: Sequence[str], shape: Sequence[int], attrs: Optional[dict[str, Any]] = None
    ) -> str:
        """A step on the way; `shape` is that of its result in the graph's own layout."""
        value = self.low.between(self.node.output, shape, "part")
        self.low.emit(self.node, op, operands, attrs, value=value, layout=self.layout)
        return self.low.get(value, FLOAT, self.layout)

    def last(self, op: str, operands: Sequence[str], attrs: Optional[dict[str, Any]] = None) -> None:
        """The step that gives the result of the node."""
        self.low.emit(self.node, op, operands, attrs, layout=self.layout)

    def reduced(self, mode: ReduceMode, axes: Sequence[int], keep: bool = True) -> tuple[str, dict[str, Any]]:
        """The axes (of the graph's own layout) of a reduction as a constant, and its attributes."""
        name = self.low.constant(f"{self.node.output}_axes", np.array(self.held(axes), np.int32))
        return name, {"mode": mode, "keep_dims": keep, "coeff": 1.0}

    def held(self, axes: Sequence[int]) -> list[int]:
        """Where the layout has axes of the graph's own layout, in order."""
        order = list(self.layout or range(len(self.low.shapes[self.node.inputs[0]])))
        return sorted(order.index(axis) for axis in axes)

    def reduce(self, mode: ReduceMode, operand: str, axes: Sequence[int]) -> str:
        """A reduction that keeps its axes."""
        value = self.low.between(self.node.output, _without(self.low.shapes[self.node.inputs[0]], axes), "part")
        places = self.held(axes)
        reduction(self.low, self.node, operand, value, mode, places, True, (self.layout, self.layout))
        return self.low.get(value, FLOAT, self.layout)


def reduction(
    low: Lowering, node: Node, operand: str, value: str, mode: ReduceMode, axes: Sequence[int], keep: bool,
    layouts: tuple[Layout, Layout],
) -> None:  # fmt: skip
    """A float reduction of the tensor `operand` that gives `value`.

    A maximum is the negative of the minimum of the negative, unless it is over the last axis alone: the runtime's
    begins with the smallest positive number, and gives that where all values are negative.

    Args:
        low, node: as in `msqkd.exporters.device.float_steps`.
        operand, value: the tensor that is reduced, and the value the step gives.
        mode, axes, keep: of the reduction; the axes are those of the tensor.
        layouts: of the operand and of the result.
    """
    shape = low.program.tensors[operand].shape
    before, after = layouts
    turns = mode == ReduceMode.MAX and limits.maximum(len(shape), axes) is not None
    names = low.constant(f"{value}_axes", np.array(axes, np.int32))
    attrs = {"mode": ReduceMode.MIN if turns else mode, "keep_dims": keep, "coeff": 1.0}
    if not turns:
        low.emit(node, "ReduceFusion", [operand, names], attrs, value=value, layout=after)
        return
    minus = low.constant(f"{value}_minus", np.full(1, -1, np.float32))
    own = tuple(shape[before.index(axis)] for axis in range(len(shape))) if before else shape
    turned, least = low.between(value, own, "turned"), low.between(value, low.shapes[value], "least")
    low.emit(node, "MulFusion", [operand, minus], value=turned, layout=before)
    low.emit(node, "ReduceFusion", [low.get(turned, FLOAT, before), names], attrs, value=least, layout=after)
    low.emit(node, "MulFusion", [low.get(least, FLOAT, after), minus], value=value, layout=after)


def _without(shape: Sequence[int], axes: Sequence[int]) -> list[int]:
    """`shape` with the size 1 at `axes`."""
    return [1 if axis in axes else size for axis, size in enumerate(shape)]


def _fits(low: Lowering, node: Node) -> bool:
    """Whether a node reads a computed float value and nobody reads a result of it but the first."""
    used = any(low.graph.consumers(name) or name in low.graph.outputs for name in node.outputs[1:])
    return _is_computed(low, node) and not used


def _is_computed(low: Lowering, node: Node) -> bool:
    value = low.graph.values[node.inputs[0]]
    return value.kind in ("node", "input") and value.type is not None and value.type.dtype == FLOAT


def group_norm(low: Lowering, node: Node) -> bool:
    """(N, C, ...) as (N, groups, rest): less its mean, over the root of its variance, times a factor a channel."""
    if not _fits(low, node) or any(name not in low.graph.params for name in node.inputs[2:4]):
        return False
    value, groups, epsilon = node.inputs[0], int(low.graph.const(node.inputs[1])), low.graph.const(node.inputs[4])
    batch, channels, *plane = low.shapes[value]
    size = prod(plane) * channels // groups
    steps = _Steps(low, node)
    x = _reshaped(steps, steps.source(), (batch, groups, size))
    axis = low.constant(f"{node.output}_axes", np.array([2], np.int32))
    mean = {"mode": ReduceMode.MEAN, "keep_dims": True, "coeff": 1.0}
    one = (batch, groups, 1)
    x = steps.step("SubFusion", [x, steps.step("ReduceFusion", [x, axis], one, mean)], (batch, groups, size))
    square = steps.step("MulFusion", [x, x], (batch, groups, size))
    variance = steps.step("ReduceFusion", [square, axis], one, mean)
    root = steps.step("Sqrt", [steps.step("AddFusion", [variance, steps.constant("epsilon", epsilon)], one)], one)
    x = _reshaped(steps, steps.step("DivFusion", [x, root], (batch, groups, size)), (batch, channels, *plane))
    rows = [low.graph.params[name].data.reshape(1, channels, *(1 for _ in plane)) for name in node.inputs[2:4]]
    x = steps.step("MulFusion", [x, steps.constant("factor", rows[0])], (batch, channels, *plane))
    steps.last("AddFusion", [x, steps.constant("offset", rows[1])])
    return True


def _reshaped(steps: _Steps, operand: str, shape: Sequence[int]) -> str:
    """A Reshape that leaves the batch open."""
    target = steps.low.constant(f"{steps.node.output}_shape", np.array([-1, *shape[1:]], np.int32))
    return steps.step("Reshape", [operand, target], shape)


def l2_normalize(low: Lowering, node: Node) -> bool:
    """x / sqrt(max(sum(x²), epsilon))."""
    if not _fits(low, node):
        return False
    shape = low.shapes[node.inputs[0]]
    axes = [int(axis) % len(shape) for axis in node.attrs["axis"]]
    one = _without(shape, axes)
    steps = _Steps(low, node, low.layout(node.inputs[0]))
    x = steps.source()
    total = steps.reduce(ReduceMode.SUM, steps.step("MulFusion", [x, x], shape), axes)
    raised = steps.step("Maximum", [total, steps.constant("epsilon", node.attrs["epsilon"])], one)
    steps.last("DivFusion", [x, steps.step("Sqrt", [raised], one)])
    return True


def lp_norm(low: Lowering, node: Node) -> bool:
    """The sum of the absolute values, or the root of the sum of the squares."""
    if not _fits(low, node) or node.attrs["p"] not in (1, 2):
        return False
    shape, keep = low.shapes[node.inputs[0]], bool(node.attrs["keep_dims"])
    given = node.attrs["axis"]
    axes = [int(axis) % len(shape) for axis in (given if isinstance(given, (list, tuple)) else [given])]
    steps = _Steps(low, node, low.layout(node.inputs[0]) if keep else NATIVE)
    x = steps.source()
    held, attrs = steps.reduced(ReduceMode.SUM, axes, keep)
    if node.attrs["p"] == 1:
        steps.last("ReduceFusion", [steps.step("Abs", [x], shape), held], attrs)
    else:
        square = steps.step("MulFusion", [x, x], shape)
        steps.last("Sqrt", [steps.step("ReduceFusion", [square, held], low.shapes[node.output], attrs)])
    return True


def deviation(low: Lowering, node: Node) -> bool:
    """The standard deviation, divided by n or (unbiased) by n - 1; the mean beside it must be read by nobody."""
    if not _fits(low, node):
        return False
    shape, axes = low.shapes[node.inputs[0]], axes_of(low.graph, node, 1)
    unbiased, keep = (bool(low.graph.const(name)) for name in node.inputs[2:4])
    count = prod(shape[axis] for axis in axes)
    if count == 1 or 0 in axes:
        return False
    steps = _Steps(low, node, low.layout(node.inputs[0]) if keep else NATIVE)
    x = steps.source()
    x = steps.step("SubFusion", [x, steps.reduce(ReduceMode.MEAN, x, axes)], shape)
    held, attrs = steps.reduced(ReduceMode.MEAN, axes, keep)
    result = low.shapes[node.output]
    variance = steps.step("ReduceFusion", [steps.step("MulFusion", [x, x], shape), held], result, attrs)
    if unbiased:
        variance = steps.step("MulFusion", [variance, steps.constant("share", count / (count - 1))], result)
    steps.last("Sqrt", [variance])
    return True


def log_softmax(low: Lowering, node: Node) -> bool:
    """x - max - log(sum(exp(x - max)))."""
    axes = axes_of(low.graph, node, 1)
    if not _fits(low, node) or len(axes) != 1:
        return False
    shape = low.shapes[node.inputs[0]]
    one = _without(shape, axes)
    steps = _Steps(low, node, low.layout(node.inputs[0]))
    x = steps.source()
    x = steps.step("SubFusion", [x, steps.reduce(ReduceMode.MAX, x, axes)], shape)
    power = steps.step("ExpFusion", [x], shape, _EXP)
    steps.last("SubFusion", [x, steps.step("Log", [steps.reduce(ReduceMode.SUM, power, axes)], one)])
    return True


def running_sum(low: Lowering, node: Node) -> bool:
    """A product with a triangle of ones, along the last axis of the layout chosen for it."""
    shape = low.shapes[node.inputs[0]]
    axis, exclusive, reverse = (low.graph.const(name) for name in node.inputs[1:4])
    axis = int(axis) % len(shape)
    if not _fits(low, node) or axis == 0:
        return False
    others = [place for place in range(len(shape)) if place != axis]
    steps = _Steps(low, node, NATIVE if axis == len(shape) - 1 else (*others, axis))
    triangle = np.triu(np.ones((shape[axis], shape[axis])), int(bool(exclusive)))
    ones = steps.constant("ones", triangle.T if reverse else triangle)
    steps.last("MatMulFusion", [steps.source(), ones])
    return True


def prelu(low: Lowering, node: Node) -> bool:
    """max(x, 0) + slope · min(x, 0), with one slope, or one a channel."""
    if not _fits(low, node) or node.inputs[1] not in low.graph.params:
        return False
    shape = low.shapes[node.inputs[0]]
    steps = _Steps(low, node)
    slope = low.graph.params[node.inputs[1]].data
    if slope.size > 1:
        slope = slope.reshape(1, -1, *(1 for _ in shape[2:]))
    x, zero = steps.source(), steps.constant("zero", 0)
    below = steps.step("MulFusion", [steps.step("Minimum", [x, zero], shape), steps.constant("slope", slope)], shape)
    steps.last("AddFusion", [steps.step("Maximum", [x, zero], shape), below])
    return True


def elu(low: Lowering, node: Node) -> bool:
    """max(x, 0) + alpha · (exp(min(x, 0)) - 1)."""
    if not _fits(low, node):
        return False
    shape = low.shapes[node.inputs[0]]
    steps = _Steps(low, node, low.layout(node.inputs[0]))
    x, zero = steps.source(), steps.constant("zero", 0)
    power = steps.step("ExpFusion", [steps.step("Minimum", [x, zero], shape)], shape, _EXP)
    below = steps.step("AddFusion", [power, steps.constant("one", -1)], shape)
    scaled = steps.step("MulFusion", [below, steps.constant("alpha", low.graph.const(node.inputs[1]))], shape)
    steps.last("AddFusion", [steps.step("Maximum", [x, zero], shape), scaled])
    return True


def softplus(low: Lowering, node: Node) -> bool:
    """max(x, 0) + log(1 + exp(-|x|)), which does not overflow; Mish is x times the tanh of it."""
    if not _fits(low, node):
        return False
    shape = low.shapes[node.inputs[0]]
    steps = _Steps(low, node, low.layout(node.inputs[0]))
    x = steps.source()
    away = steps.step("MulFusion", [steps.step("Abs", [x], shape), steps.constant("minus", -1)], shape)
    power = steps.step("ExpFusion", [away], shape, _EXP)
    log = steps.step("Log", [steps.step("AddFusion", [power, steps.constant("one", 1)], shape)], shape)
    parts = [steps.step("Maximum", [x, steps.constant("zero", 0)], shape), log]
    if node.op == "Softplus":
        steps.last("AddFusion", parts)
        return True
    curve = steps.step("Activation", [steps.step("AddFusion", parts, shape)], shape, {"activation_type": _TANH})
    steps.last("MulFusion", [x, curve])
    return True


def extreme(low: Lowering, node: Node) -> bool:
    """The largest or smallest value along an axis; the position beside it must be read by nobody."""
    position, value = node.outputs
    if low.graph.consumers(position) or position in low.graph.outputs or not _is_computed(low, node):
        return False
    mode = ReduceMode.MAX if node.op == "ArgMaxWithValue" else ReduceMode.MIN
    keep = bool(low.graph.const(node.inputs[2]))
    steps = _Steps(low, node, low.layout(node.inputs[0]) if keep else NATIVE)
    axes = steps.held(axes_of(low.graph, node, 1))
    reduction(low, node, steps.source(), value, mode, axes, keep, (steps.layout, steps.layout))
    return True
