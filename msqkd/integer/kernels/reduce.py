"""Reductions of int8 tensors, as ``nnacl/int8/reduce_int8.c`` computes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from msqkd.errors import SimulationError
from msqkd.integer.arithmetic import (
    multiply_by_quantized_multiplier,
    quantize_multiplier,
    rounding_divide_by_pot,
    saturating_rounding_doubling_high_mul,
)
from msqkd.integer.kernels.parameters import clip_int8, constant, input_params, output_params
from msqkd.integer.program import ReduceMode
from msqkd.integer.registry import ARM64, Call, kernel

_NAMES = {ReduceMode.MEAN: "mean", ReduceMode.MAX: "max", ReduceMode.MIN: "min", ReduceMode.SUM: "sum"}
_PRESHIFT = 20


class UndefinedResultError(SimulationError):
    """The runtime reads memory that is not the tensor's: its result is not defined."""


def reduction(call: Call) -> tuple[int, list[int]]:
    """What is reduced how: the mode (a `ReduceMode`, if the file is right), and the axes as the file gives them.

    Raises:
        SimulationError: the axes are missing, empty or outside the input, or the step asks for what the simulator
            does not compute (``reduce_to_end``, a coefficient).
    """
    attrs, rank = call.attrs, call.inputs[0].data.ndim
    axes = constant(call, 1, "axes").tolist()
    if not axes or not all(-rank <= axis < rank for axis in axes):
        raise SimulationError(f"{call.name}: its axes are {axes}; allowed: some of -{rank} … {rank - 1}")
    if attrs.get("reduce_to_end", False):
        raise SimulationError(f"{call.name}: reduce_to_end is set; allowed: all axes listed")
    if attrs.get("coeff", 0.0) not in (0.0, 1.0):
        raise SimulationError(f"{call.name}: its coefficient is {attrs['coeff']:g}; allowed: 1")
    return attrs.get("mode", ReduceMode.MEAN), axes


def without(x: np.ndarray, call: Call, axes: Sequence[int]) -> np.ndarray:
    """`x`, whose reduced axes have extent 1, with those axes removed unless they are to be kept."""
    return x if call.attrs.get("keep_dims", False) else np.squeeze(x, tuple({axis % x.ndim for axis in axes}))


@kernel("ReduceFusion")
def reduce(call: Call) -> list[np.ndarray]:
    """Mean, maximum, minimum or sum over axes.

    A mean over axes 1 and 2 of four, written as such, goes another way than any other reduction (also than the same
    axes counted from the end), with other roundings.

    Raises:
        SimulationError: another mode, or axes as `reduction` refuses them.
        UndefinedResultError: see `_plane_mean`.
    """
    mode, axes = reduction(call)
    x = call.inputs[0].data
    if mode not in _NAMES:
        raise SimulationError(
            f"{call.name}: its int8 reduction is {mode:d}; allowed: "
            + ", ".join(f"{known:d} ({name})" for known, name in _NAMES.items())
        )
    if mode == ReduceMode.MEAN and x.ndim == 4 and axes == [3, 0]:
        raise UndefinedResultError(f"{call.name}: the runtime takes the axes [3, 0] for [1, 2]; allowed: [0, 3]")
    plane = mode == ReduceMode.MEAN and x.ndim == 4 and sorted(axes) == [1, 2]
    result = _plane_mean(call) if plane else _axis_by_axis(call, mode, axes)
    return [without(clip_int8(result), call, axes)]


def _plane_mean(call: Call) -> np.ndarray:
    """Mean over height and width: the plain sum scaled once, then a bias that is truncated to a whole number.

    Raises:
        UndefinedResultError: on arm64 the plane is not a multiple of 16; or, for several items in one run, the
            channels are not one of 4.
    """
    x = call.inputs[0].data
    batch, height, width, channels = x.shape
    plane = height * width
    if call.machine == ARM64 and plane % 16:
        raise UndefinedResultError(
            f"{call.name}: on arm64 the mean of a {height}x{width} plane is undefined; "
            "allowed: planes of a multiple of 16 elements"
        )
    if batch > 1 and channels % 4 and not call.per_sample:
        raise UndefinedResultError(
            f"{call.name}: the mean of {channels} channels is undefined for a batch of {batch}; "
            "allowed: batch 1, or a multiple of 4 channels"
        )
    (scale_in, zero_in), (scale_out, zero_out) = input_params(call), output_params(call)
    multiplier = quantize_multiplier(scale_in / (scale_out * plane), call.name)
    bias = int(zero_out - zero_in * scale_in / scale_out)
    total = x.sum(axis=(1, 2), keepdims=True, dtype=np.int32)
    return multiply_by_quantized_multiplier(total, *multiplier).astype(np.int64) + bias


def _axis_by_axis(call: Call, mode: int, axes: Sequence[int]) -> np.ndarray:
    """One axis after another, in int32 and the scale of the input; the output's scale comes last."""
    (scale_in, zero_in), (scale_out, zero_out) = input_params(call), output_params(call)
    x = call.inputs[0].data.astype(np.int32) - np.int32(zero_in)
    for axis in axes:
        if mode == ReduceMode.MEAN:
            multiplier = quantize_multiplier(1.0 / x.shape[axis], call.name)
            x = multiply_by_quantized_multiplier(x.sum(axis, keepdims=True, dtype=np.int32), *multiplier)
        elif mode == ReduceMode.SUM:
            x = x.sum(axis, keepdims=True, dtype=np.int32)
        else:
            x = (x.max if mode == ReduceMode.MAX else x.min)(axis, keepdims=True)
    if mode == ReduceMode.MIN:
        return preshifted_rescale(x, scale_in / scale_out, call.name) + zero_out
    multiplier = quantize_multiplier(scale_in / scale_out, call.name)
    return multiply_by_quantized_multiplier(x, *multiplier).astype(np.int64) + zero_out


def preshifted_rescale(x: np.ndarray, ratio: float, name: str) -> np.ndarray:
    """`x` · `ratio` as some kernels compute it: 20 bits to the left first, which are taken back at the end.

    Args:
        x: integers; the shifted ones wrap as int32.
        ratio: of the scales.
        name: what the message calls the step.

    Returns:
        int64.

    Raises:
        SimulationError: the ratio needs a shift that the runtime cannot make.
    """
    multiplier, exponent = quantize_multiplier(ratio, name)
    left, right = max(int(exponent), 0) + _PRESHIFT, max(-int(exponent), 0) + _PRESHIFT
    if max(left, right) > 31:
        raise SimulationError(f"{name}: the ratio of scales {ratio:g} is out of range; allowed: 2^-12 to 2^11")
    shifted = (np.asarray(x, np.int64) << left).astype(np.int32)
    high = saturating_rounding_doubling_high_mul(shifted, multiplier)
    return rounding_divide_by_pot(high, right).astype(np.int64)
