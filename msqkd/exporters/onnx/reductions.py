"""Sums, means and extremes along axes, norms made of them, and where the extremes are."""

from __future__ import annotations

import numpy as np

from msqkd.exporters.onnx.calls import Call
from msqkd.exporters.onnx.table import writes


@writes("ReduceMean")
def _mean(call: Call) -> None:
    """A mean over the whole plane is a pool, which int8 runtimes have; any other mean is ReduceMean."""
    rank, axes, keep = len(call.shape(0)), _axes(call), bool(call.literal(2))
    if rank == 4 and axes == [2, 3]:
        if keep:
            call.emit("GlobalAveragePool", call.tensor(0))
            return
        pooled = call.rounded(call.step("GlobalAveragePool", call.tensor(0)))
        call.emit("Squeeze", pooled, call.constant(axes))
        return
    call.emit("ReduceMean", call.tensor(0), call.constant(axes), keepdims=int(keep))


_REDUCED = {
    "ReduceMax": "ReduceMax", "ReduceMin": "ReduceMin", "ReduceProd": "ReduceProd", "ReduceSum": "ReduceSum",
    "ProdExt": "ReduceProd", "SumExt": "ReduceSum",
}  # fmt: skip


@writes(*_REDUCED)
def _reduction(call: Call) -> None:
    if call.node.op.endswith("Ext") and call.literal(3) is not None:
        raise call.refusal("it has a data type of its own; allowed: that of its input")
    onnx_op, axes = _REDUCED[call.node.op], call.constant(_axes(call))
    call.emit(onnx_op, call.operand(0, call.result_dtype()), axes, keepdims=int(bool(call.literal(2))))


def _axes(call: Call) -> list[int]:
    """The axes of a reduction, counted from the front; all of them where none is named."""
    axis, rank = call.literal(1), len(call.shape(0))
    axes = (axis,) if isinstance(axis, int) else tuple(axis or range(rank))
    return sorted(int(a) % rank for a in axes)


@writes("L2Normalize")
def _l2_normalize(call: Call) -> None:
    """x / sqrt(max(sum(x²), epsilon))."""
    x, axes = call.tensor(0), call.constant(call.attribute("axis"))
    square = call.step("ReduceSumSquare", x, axes, keepdims=1)
    raised = call.step("Max", square, call.number(float(call.attribute("epsilon"))))
    call.emit("Div", x, call.step("Sqrt", raised))


@writes("LpNorm")
def _lp_norm(call: Call) -> None:
    power, axes = int(call.attribute("p")), call.constant(call.attribute("axis"))
    if power not in (1, 2):
        raise call.refusal(f"its power is {power}; allowed: 1 and 2")
    call.emit(f"ReduceL{power}", call.tensor(0), axes, keepdims=int(bool(call.attribute("keep_dims"))))


@writes("ReduceStd")
def _deviation(call: Call) -> None:
    """The standard deviation, divided by n or (unbiased) by n - 1, and the mean."""
    sizes, axes, keep = call.shape(0), _axes(call), int(bool(call.literal(3)))
    count = int(np.prod([sizes[axis] for axis in axes]))
    if min(sizes[axis] for axis in axes) < 1:
        raise call.refusal("it goes over an axis whose size is not known")
    unbiased, names = bool(call.literal(2)), call.constant(axes)
    x = call.tensor(0)
    apart = call.step("Sub", x, call.step("ReduceMean", x, names, keepdims=1))
    square = call.step("ReduceSumSquare", apart, names, keepdims=keep)
    variance = call.step("Div", square, call.number(count - unbiased))
    call.writer.node("Sqrt", [variance], call.outputs[:1], call.node.name)
    call.writer.node("ReduceMean", [x, names], call.outputs[1:], f"{call.node.name}.mean", keepdims=keep)


@writes("CumSum")
def _running_sum(call: Call) -> None:
    axis = call.writer.constant(np.asarray(call.literal(1), np.int64), "axis")
    exclusive, reverse = (int(bool(call.literal(argument))) for argument in (2, 3))
    call.emit("CumSum", call.tensor(0), axis, exclusive=exclusive, reverse=reverse)


@writes("Argmax", "Argmin")
def _position(call: Call) -> None:
    kind = call.graph.values[call.node.output].type
    if kind is None or not isinstance(call.literal(1), int):
        raise call.refusal("it goes over no axis, or gives an unknown data type; allowed: one axis")
    onnx_op = {"Argmax": "ArgMax", "Argmin": "ArgMin"}[call.node.op]
    found = call.step(onnx_op, call.tensor(0), axis=call.literal(1), keepdims=0)
    call.emit("Cast", found, to=call.writer.element(kind.dtype))


@writes("ArgMaxWithValue", "ArgMinWithValue")
def _extreme(call: Call) -> None:
    """The position and the value of the extreme along an axis."""
    what, axis, keep = call.node.op[3:6], int(call.literal(1)), int(bool(call.literal(2)))
    x, (position, value) = call.tensor(0), call.outputs
    kind = call.graph.values[call.node.outputs[0]].type
    found = call.step(f"Arg{what}", x, axis=axis, keepdims=keep)
    to = call.writer.element("int64" if kind is None else kind.dtype)
    call.writer.node("Cast", [found], [position], f"{call.node.name}.position", to=to)
    call.writer.node(f"Reduce{what}", [x, call.constant(axis)], [value], call.node.name, keepdims=keep)


@writes("TopK")
def _largest(call: Call) -> None:
    """The largest along the last axis, in order, and their positions."""
    value, position = call.outputs
    kind = call.graph.values[call.node.outputs[1]].type
    found = call.writer.unique(f"{position}.int64")
    call.writer.node("TopK", [call.tensor(0), call.constant(call.literal(1))], [value, found], call.node.name)
    to = call.writer.element("int32" if kind is None else kind.dtype)
    call.writer.node("Cast", [found], [position], f"{call.node.name}.position", to=to)


@writes("OneHot")
def _one_hot(call: Call) -> None:
    """A comparison with 0, 1, 2 ...: ONNX's own operation counts negative positions from the end."""
    depth, axis, rank = int(call.literal(1)), int(call.literal(4)), len(call.output_shape())
    shape = [depth if place == axis % rank else 1 for place in range(rank)]
    places = call.writer.constant(np.arange(depth, dtype=call.dtype(0)).reshape(shape), "places")
    hit = call.step("Equal", call.step("Unsqueeze", call.tensor(0), call.constant(axis)), places)
    call.emit("Where", hit, call.tensor(2), call.tensor(3))
