"""Kernels that move elements about, for operands of any kind; those for int8 that rescale on the way."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from msqkd.errors import SimulationError
from msqkd.integer.arithmetic import fma_float32, round_half_away
from msqkd.integer.kernels.parameters import clip_int8, constant, input_params, output_params, tabulated
from msqkd.integer.kernels.reduce import preshifted_rescale
from msqkd.integer.registry import FLOAT32, Call, kernel
from msqkd.targets import limits

_EPSILON = float(np.finfo(np.float32).eps)
_PAD_MODES = ("constant", "reflect", "symmetric")  # PaddingMode


def _equal_params(call: Call, source: int = 0, target: int = 0) -> bool:
    """Whether an input and an output share their parameters, as far as float32 scales tell them apart."""
    (scale_in, zero_in), (scale_out, zero_out) = input_params(call, source), output_params(call, target)
    return zero_in == zero_out and bool(abs(np.float32(scale_in) - np.float32(scale_out)) <= _EPSILON)


def _affine(call: Call, source: int, target: int, ratio: np.float32, x: np.ndarray) -> np.ndarray:
    """`x` in the parameters of output `target`: ``round(x · ratio − zero_in · ratio) + zero_out``, in float32."""
    (_, zero_in), (_, zero_out) = input_params(call, source), output_params(call, target)
    factor, bias = float(ratio), float(np.float32(-zero_in) * ratio)

    def rescale(q: np.ndarray) -> np.ndarray:
        return clip_int8(round_half_away(fma_float32(q, factor, bias)).astype(np.float64) + zero_out)

    return tabulated(x, rescale)


def _by_reciprocal(call: Call, source: int, x: np.ndarray) -> np.ndarray:
    """`x` in the parameters of the output, the scale of which is divided by as a multiplication by its reciprocal."""
    if _equal_params(call, source):
        return x
    scale_in, scale_out = input_params(call, source)[0], output_params(call)[0]
    return _affine(call, source, 0, np.float32(scale_in) * (np.float32(1) / np.float32(scale_out)), x)


@kernel("Unsqueeze", "ExpandDims")
@kernel("Reshape", "Squeeze", "Unsqueeze", "ExpandDims", kind=FLOAT32)
def reshape(call: Call) -> list[np.ndarray]:
    """The elements in the shape of the output; its first dimension grows with the batch.

    Raises:
        SimulationError: the elements do not fill such a shape.
    """
    x, shape = call.inputs[0].data, call.outputs[0].shape
    rest = math.prod(shape[1:])
    if (not shape and x.size != 1) or rest == 0 or x.size % rest:
        raise SimulationError(f"{call.name}: {x.shape} cannot take the shape {shape}, for any batch")
    return [x.reshape(x.size // rest, *shape[1:]) if shape else x.reshape(())]


@kernel("Reshape", "Squeeze")
def reshape_int8(call: Call) -> list[np.ndarray]:
    """As `reshape`; where the parameters differ the values are rescaled (``reshape_int8.c``, ``squeeze_int8.c``)."""
    return [_by_reciprocal(call, 0, reshape(call)[0])]


@kernel("Transpose")
@kernel("Transpose", kind=FLOAT32)
def transpose(call: Call) -> list[np.ndarray]:
    """The axes in the order of the permutation, operand 1; values are never rescaled.

    Raises:
        SimulationError: it is not a permutation of the axes.
    """
    x, order = call.inputs[0].data, constant(call, 1, "permutation").tolist()
    if sorted(order) != list(range(x.ndim)):
        raise SimulationError(f"{call.name}: its permutation is {order}; allowed: each of 0 … {x.ndim - 1} once")
    return [np.ascontiguousarray(x.transpose(order))]


@kernel("Concat", kind=FLOAT32)
def concat(call: Call) -> list[np.ndarray]:
    """The operands one after another along ``axis``."""
    return [_joined(call, [operand.data for operand in call.inputs])]


@kernel("Concat")
def concat_int8(call: Call) -> list[np.ndarray]:
    """As `concat`, each operand rescaled where its parameters differ from the output's (``concat_int8.c``)."""
    return [_joined(call, [_by_reciprocal(call, i, operand.data) for i, operand in enumerate(call.inputs)])]


def _joined(call: Call, parts: list[np.ndarray]) -> np.ndarray:
    axis = _axis(call, int(call.attrs.get("axis", 0)), parts[0].ndim)
    if call.per_sample and axis:
        batch = max(part.shape[0] for part in parts)
        parts = [np.broadcast_to(part, (batch, *part.shape[1:])) for part in parts]  # a constant is the same for all
    return np.concatenate(parts, axis)


def _axis(call: Call, axis: int, rank: int) -> int:
    """`axis` counted from 0."""
    if not -rank <= axis < rank:
        raise SimulationError(f"{call.name}: its axis is {axis}; allowed: -{rank} … {rank - 1}")
    return axis % rank


@kernel("Split", kind=FLOAT32)
def split(call: Call) -> list[np.ndarray]:
    """Pieces along ``axis`` of the extents ``size_splits`` (-1: the rest), or ``output_num`` equal ones.

    Raises:
        SimulationError: the extents are not those of the axis.
    """
    x, attrs = call.inputs[0].data, call.attrs
    axis = _axis(call, int(attrs.get("axis", 0)), x.ndim)
    size, number = x.shape[axis], int(attrs.get("output_num") or len(call.outputs))
    extents = [int(extent) for extent in attrs.get("size_splits") or [size // number] * number]
    if extents[-1] == -1:
        extents[-1] = size - sum(extents[:-1])
    if sum(extents) != size or len(extents) != number or min(extents) < 0:
        raise SimulationError(f"{call.name}: it splits {size} elements into {extents}; allowed: {number} that sum up")
    return [np.ascontiguousarray(part) for part in np.split(x, np.cumsum(extents)[:-1], axis)]


@kernel("Split")
def split_int8(call: Call) -> list[np.ndarray]:
    """As `split`, each piece rescaled where its parameters differ from the input's (``split_int8.c``)."""
    parts = []
    for index, part in enumerate(split(call)):
        if not _equal_params(call, 0, index):
            scale_in, scale_out = input_params(call)[0], output_params(call, index)[0]
            part = _affine(call, 0, index, np.float32(scale_in) / np.float32(scale_out), part)
        parts.append(part)
    return parts


@kernel("PadFusion", kind=FLOAT32)
def pad(call: Call) -> list[np.ndarray]:
    """The input with elements around it: a constant, or its own ones mirrored at or before the border."""
    return [_padded(call, float(call.attrs.get("constant_value", 0.0)))]


@kernel("PadFusion")
def pad_int8(call: Call) -> list[np.ndarray]:
    """As `pad`, with the constant rounded into the parameters of the input (``pad_int8.cc``); it wraps around int8.

    Raises:
        SimulationError: the output has other parameters than the input, which the runtime refuses, or the input has too
            few dimensions.
    """
    if not _equal_params(call):
        raise SimulationError(f"{call.name}: a pad has other parameters at its output; allowed: those of its input")
    scale, zero = input_params(call)
    value = np.float32(call.attrs.get("constant_value", 0.0)) / np.float32(scale) + np.float32(zero)
    result = _padded(call, np.int64(round_half_away(float(value))).astype(np.int8))
    objection = limits.pad(result.ndim)
    if objection:
        raise SimulationError(f"{call.name}: {objection}")
    return [result]


def _padded(call: Call, value: Any) -> np.ndarray:
    x, widths = call.inputs[0].data, constant(call, 1, "paddings")
    mode = int(call.attrs.get("padding_mode", 0))
    if len(call.inputs) > 2:
        raise SimulationError(f"{call.name}: its value is an operand; allowed: the attribute constant_value")
    if widths.size != 2 * x.ndim or (widths < 0).any() or not 0 <= mode < len(_PAD_MODES):
        raise SimulationError(
            f"{call.name}: its paddings are {widths.tolist()} (mode {mode}); "
            f"allowed: a number before and after each of {x.ndim} axes, and the modes 0, 1 and 2"
        )
    pairs = widths.reshape(-1, 2)
    if mode == 0:
        return np.pad(x, pairs, constant_values=value)
    reach = np.array(x.shape)[:, None] - (1 if _PAD_MODES[mode] == "reflect" else 0)
    if (pairs > reach).any():
        raise SimulationError(f"{call.name}: its paddings {pairs.tolist()} mirror more than the input, {x.shape}, has")
    return np.pad(x, pairs, mode=_PAD_MODES[mode])  # type: ignore[call-overload]


@kernel("SliceFusion", kind=FLOAT32)
def slice_fusion(call: Call) -> list[np.ndarray]:
    """A block of the input: operand 1 says where it begins, operand 2 its extents (-1: to the end), along ``axes``.

    Raises:
        SimulationError: the block leaves the input.
    """
    x, begin, size = call.inputs[0].data, constant(call, 1, "begins"), constant(call, 2, "sizes")
    axes = [_axis(call, int(axis), x.ndim) for axis in call.attrs.get("axes") or range(begin.size)]
    if not len(axes) == begin.size == size.size:
        raise SimulationError(f"{call.name}: {begin.size} begins, {size.size} sizes and {len(axes)} axes do not match")
    part: list[Any] = [slice(None)] * x.ndim
    for axis, first, count in zip(axes, begin.tolist(), size.tolist()):
        end = x.shape[axis] if count == -1 else first + count
        if not 0 <= first < end <= x.shape[axis]:
            raise SimulationError(f"{call.name}: it takes {first} to {end} of the {x.shape[axis]} along axis {axis}")
        if not _whole_batch(call, axis, first, end):
            part[axis] = slice(first, end)
    return [np.ascontiguousarray(x[tuple(part)])]


def _whole_batch(call: Call, axis: int, first: int, end: int) -> bool:
    """Whether a block written for one item covers the batch: then every item's run has its own."""
    return call.per_sample and axis == 0 and (first, end) == (0, 1)


@kernel("SliceFusion")
def slice_int8(call: Call) -> list[np.ndarray]:
    """As `slice_fusion`, rescaled where the parameters differ (``slice_int8.c``)."""
    part = slice_fusion(call)[0]
    if _equal_params(call):
        return [part]
    (scale_in, zero_in), (scale_out, zero_out) = input_params(call), output_params(call)
    ratio = float(np.float32(scale_in) / np.float32(scale_out))
    return [tabulated(part, lambda q: clip_int8(preshifted_rescale(q - zero_in, ratio, call.name) + zero_out))]


@kernel("StridedSlice")
@kernel("StridedSlice", kind=FLOAT32)
def strided_slice(call: Call) -> list[np.ndarray]:
    """``x[begin:end:stride, ...]``: operands 1, 2 and (optionally) 3, with the masks of TensorFlow's operation.

    Bit i of ``begin_mask`` or ``end_mask`` lets entry i begin or end at the border; ``ellipsis_mask``,
    ``new_axis_mask`` and ``shrink_axis_mask`` make it an ellipsis, a new axis or a single element.
    """
    if len(call.inputs) > 4:
        raise SimulationError(f"{call.name}: a strided slice has {len(call.inputs)} inputs; allowed: 3 or 4")
    begin, end = constant(call, 1, "begins"), constant(call, 2, "ends")
    stride = constant(call, 3, "strides") if len(call.inputs) > 3 else np.ones_like(begin)
    if not begin.size == end.size == stride.size or not stride.all():
        raise SimulationError(
            f"{call.name}: {begin.size} begins, {end.size} ends and the strides {stride.tolist()} do not match"
        )
    index: list[Any] = []
    for entry, (first, last, step) in enumerate(zip(begin.tolist(), end.tolist(), stride.tolist())):
        if _bit(call, "ellipsis_mask", entry):
            index.append(Ellipsis)
        elif _bit(call, "new_axis_mask", entry):
            index.append(None)
        elif _bit(call, "shrink_axis_mask", entry):
            index.append(first)
        elif _whole_batch(call, entry, first, last):
            index.append(slice(None))
        else:
            start = None if _bit(call, "begin_mask", entry) else first
            index.append(slice(start, None if _bit(call, "end_mask", entry) else last, step))
    try:
        return [np.ascontiguousarray(call.inputs[0].data[tuple(index)])]
    except IndexError as error:
        raise SimulationError(f"{call.name}: its slice does not fit {call.inputs[0].data.shape}: {error}") from error


def _bit(call: Call, mask: str, entry: int) -> bool:
    return bool(int(call.attrs.get(mask, 0)) >> entry & 1)


@kernel("Gather", kind=FLOAT32)
def gather(call: Call) -> list[np.ndarray]:
    """The elements of operand 0 at the indices of operand 1, along the axis of operand 2 (without it, the first).

    Raises:
        SimulationError: an index is negative or outside the axis.
    """
    x, indices = call.inputs[0].data, call.inputs[1].data
    axis = _axis(call, int(constant(call, 2, "axis")[0]) if len(call.inputs) > 2 else 0, x.ndim)
    if indices.size and not 0 <= indices.min() <= indices.max() < x.shape[axis]:
        raise SimulationError(
            f"{call.name}: it takes the elements {indices.min()} … {indices.max()}; allowed: 0 … {x.shape[axis] - 1}"
        )
    return [np.take(x, indices.astype(np.int64), axis)]


@kernel("Gather")
def gather_int8(call: Call) -> list[np.ndarray]:
    """As `gather`, rescaled by the ratio of the scales in float64 (``gather_int8.c``)."""
    (scale_in, zero_in), (scale_out, zero_out) = input_params(call), output_params(call)
    ratio = scale_in / scale_out
    return [tabulated(gather(call)[0], lambda q: clip_int8(round_half_away(ratio * (q - zero_in)) + zero_out))]
