"""Operations that move values and change none, and arithmetic on sizes.

A size that is computed (the batch, mostly) is an int64 tensor of one element, so that several make a shape by Concat.
"""

from __future__ import annotations

from functools import partial
from math import prod

from msqkd.exporters.onnx.calls import Call
from msqkd.exporters.onnx.table import writes

_SIZES = {"ScalarAdd": "Add", "ScalarSub": "Sub", "ScalarMul": "Mul", "ScalarFloorDiv": "Div", "ScalarMod": "Mod"}


def _arithmetic(onnx_op: str, call: Call) -> None:
    call.emit(onnx_op, *(call.sizes(call.elements(argument)) for argument in (0, 1)))


for _op, _onnx_op in _SIZES.items():
    writes(_op)(partial(_arithmetic, _onnx_op))


@writes("Shape")
def _shape(call: Call) -> None:
    x = call.tensor(0)
    if not call.node.unpack:
        call.emit("Shape", x)
        return
    for axis, output in enumerate(call.outputs):
        call.writer.node("Shape", [x], [output], call.node.name, start=axis, end=axis + 1)


@writes("Reshape")
def _reshape(call: Call) -> None:
    source, target = call.shape(0), call.output_shape()
    keeps_batch = bool(source) and bool(target) and source[0] == target[0] == -1
    if keeps_batch and min(*source[1:], *target[1:], 1) > 0 and prod(source[1:]) == prod(target[1:]):
        call.emit("Reshape", call.tensor(0), call.constant((0, *target[1:])))  # 0: as in the input
    else:
        call.emit("Reshape", call.tensor(0), call.sizes(call.elements(1)))


@writes("Transpose")
def _transpose(call: Call) -> None:
    rank = len(call.shape(0))
    call.emit("Transpose", call.tensor(0), perm=[int(axis) % rank for axis in call.literal(1)])


@writes("ExpandDims")
def _expand_dims(call: Call) -> None:
    call.emit("Unsqueeze", call.tensor(0), call.constant(call.literal(1)))


@writes("Squeeze")
def _squeeze(call: Call) -> None:
    axis = call.literal(1)
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    call.emit("Squeeze", call.tensor(0), *([call.constant(axes)] if axes else []))


@writes("Concat")
def _concat(call: Call) -> None:
    call.emit("Concat", *call.tensors(0), axis=int(call.literal(1)))


@writes("Split")
def _split(call: Call) -> None:
    call.emit("Split", call.tensor(0), axis=int(call.literal(1)), num_outputs=len(call.outputs))


@writes("Unstack")
def _unstack(call: Call) -> None:
    axis, x = int(call.attribute("axis")), call.tensor(0)
    parts = [call.writer.unique(f"{output}.part") for output in call.outputs]
    call.writer.node("Split", [x], parts, f"{call.node.name}.Split", axis=axis, num_outputs=len(parts))
    for part, output in zip(parts, call.outputs):
        call.writer.node("Squeeze", [part, call.constant(axis)], [output], call.node.name)


@writes("Gather")
def _gather(call: Call) -> None:
    batch_dims = call.literal(3)
    if batch_dims:
        raise call.refusal(f"it has {batch_dims} batch dimensions; allowed: none")
    call.emit("Gather", call.tensor(0), call.tensor(1), axis=int(call.literal(2)))


@writes("BroadcastTo")
def _broadcast_to(call: Call) -> None:
    """-1 leaves a dimension as it is, which is what 1 does in ONNX."""
    call.emit("Expand", call.tensor(0), call.sizes([1 if item == -1 else item for item in call.elements(1)]))


@writes("Tile")
def _tile(call: Call) -> None:
    call.emit("Tile", call.tensor(0), call.sizes(call.elements(1)))


@writes("Pad")
def _pad(call: Call) -> None:
    begins, ends = zip(*call.attribute("paddings"))
    call.emit("Pad", call.tensor(0), call.constant((*begins, *ends)))
