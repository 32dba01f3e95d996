"""Operations that move values and change none, and arithmetic on sizes.

A size that is computed (the batch, mostly) is an int64 tensor of one element, so that several make a shape by Concat.
"""

from __future__ import annotations

from functools import partial
from math import prod

import numpy as np

from msqkd.exporters.onnx.calls import Call
from msqkd.exporters.onnx.slices import FAR
from msqkd.exporters.onnx.table import writes
from msqkd.quant.uses import resize_flags

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


@writes("Stack")
def _stack(call: Call) -> None:
    axis = int(call.attribute("axis"))
    parts = [call.step("Unsqueeze", part, call.constant(axis)) for part in call.tensors(0)]
    call.emit("Concat", *parts, axis=axis)


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


@writes("GatherD")
def _gather_elements(call: Call) -> None:
    call.emit("GatherElements", call.tensor(0), call.tensor(2), axis=int(call.literal(1)))


@writes("ReverseV2")
def _reverse(call: Call) -> None:
    axes = call.literal(1)
    axes = (axes,) if isinstance(axes, int) else axes
    starts, ends, steps = (call.constant([value] * len(axes)) for value in (-1, -FAR, -1))
    call.emit("Slice", call.tensor(0), starts, ends, call.constant(axes), steps)


@writes("Tril", "Triu")
def _triangle(call: Call) -> None:
    """The diagonal is an attribute of one, and an operand of the other."""
    upper = call.node.op == "Triu"
    diagonal = int(call.literal(1) if len(call.node.arguments()) > 1 else call.attribute("diagonal"))
    place = call.writer.constant(np.asarray(diagonal, np.int64), "diagonal")
    call.emit("Trilu", call.tensor(0), place, upper=int(upper))


_FILLED = {"Zeros": 0, "ZerosLike": 0, "Ones": 1, "OnesLike": 1}


@writes(*_FILLED)
def _filled(call: Call) -> None:
    """One number in a shape that is given, or that of a tensor."""
    sizes = call.step("Shape", call.tensor(0)) if call.node.op.endswith("Like") else call.sizes(call.elements(0))
    value = call.writer.constant(np.asarray(_FILLED[call.node.op], call.result_dtype()), "number")
    call.emit("Expand", value, sizes)


@writes("BroadcastTo")
def _broadcast_to(call: Call) -> None:
    """-1 leaves a dimension as it is, which is what 1 does in ONNX."""
    call.emit("Expand", call.tensor(0), call.sizes([1 if item == -1 else item for item in call.elements(1)]))


@writes("Tile")
def _tile(call: Call) -> None:
    call.emit("Tile", call.tensor(0), call.sizes(call.elements(1)))


_PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "edge", "circular": "wrap"}


@writes("Pad", "MirrorPad")
def _pad(call: Call) -> None:
    """MirrorPad takes the amounts as a tensor, row by axis; Pad has them as an attribute."""
    mirrored = call.node.op == "MirrorPad"
    if mirrored and call.attribute("mode") != "REFLECT":
        raise call.refusal(f"its mode is {call.attribute('mode')}; allowed: REFLECT")
    begins, ends = zip(*(np.asarray(call.literal(1)).tolist() if mirrored else call.attribute("paddings")))
    call.emit("Pad", call.tensor(0), call.constant((*begins, *ends)), mode="reflect" if mirrored else "constant")


@writes("PadV3")
def _pad_v3(call: Call) -> None:
    """Amounts in pairs, from the last axis backwards, for as many axes as there are pairs."""
    mode, rank = str(call.attribute("mode")), len(call.shape(0))
    if mode not in _PAD_MODES or not call.node.attrs.get("paddings_contiguous", True):
        raise call.refusal(f"its mode is {mode}; allowed: {', '.join(_PAD_MODES)}, with contiguous pairs")
    flat = [int(amount) for amount in np.asarray(call.literal(1)).reshape(-1)]
    missing = [0] * (rank - len(flat) // 2)
    pads = (*missing, *flat[::2][::-1], *missing, *flat[1::2][::-1])
    filling = call.literal(2) if mode == "constant" and len(call.node.inputs) > 2 else None
    value = [] if filling is None else [call.number(float(np.reshape(filling, ())))]
    call.emit("Pad", call.tensor(0), call.constant(pads), *value, mode=_PAD_MODES[mode])


_RESIZED = {"ResizeNearestNeighbor": "nearest", "ResizeNearestNeighborV2": "nearest", "ResizeBilinearV2": "linear"}


@writes(*_RESIZED)
def _resize(call: Call) -> None:
    """To the size of the result; of a neighbour halfway, MindSpore takes the later one."""
    mode, sizes = _RESIZED[call.node.op], call.output_shape()[2:]
    if len(sizes) != 2 or min(sizes) < 1:
        raise call.refusal("the height and width of its result are not known")
    aligned, half_pixel = resize_flags(call.graph, call.node)
    coordinates = "align_corners" if aligned else "half_pixel" if half_pixel else "asymmetric"
    rounding = (
        {} if mode == "linear" else {"nearest_mode": "floor" if coordinates == "asymmetric" else "round_prefer_ceil"}
    )
    attrs = {"mode": mode, "coordinate_transformation_mode": coordinates, **rounding}
    # All four sizes: where a Transpose follows, onnxruntime 1.31 breaks a Resize that names its axes.
    whole = call.step("Concat", call.step("Shape", call.tensor(0), start=0, end=2), call.constant(sizes), axis=0)
    call.emit("Resize", call.tensor(0), "", "", whole, **attrs)
