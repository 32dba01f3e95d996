"""Resizing of int8 NHWC planes, as ``resize_int8.cc`` and ``nnacl/int8/resize_int8.c`` compute it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from msqkd.errors import SimulationError
from msqkd.integer.kernels.parameters import input_params, output_params, plane_of
from msqkd.integer.registry import ARM64, Call, kernel

LINEAR, NEAREST = 0, 1  # ResizeMethod
ASYMMETRIC, ALIGN_CORNERS, HALF_PIXEL = 0, 1, 2  # CoordinateTransformMode
_FRACTION = 10  # bits


class Between(NamedTuple):
    """For every element along one axis of the output: its two neighbours in the input, and the weight of the second."""

    lower: np.ndarray
    upper: np.ndarray
    weight: np.ndarray


def resize_sizes(call: Call) -> tuple[tuple[int, int], tuple[int, int]]:
    """Extents of the plane: of the input along height and width, then of the output.

    Raises:
        SimulationError: the input is not of four dimensions, or the aspect ratio is to be preserved.
    """
    x = call.inputs[0].data
    if x.ndim != 4 or len(call.outputs[0].shape) != 4:
        raise SimulationError(f"{call.name}: a resize reads (N, H, W, C), found {x.ndim} dimensions")
    if call.attrs.get("preserve_aspect_ratio", False):
        raise SimulationError(f"{call.name}: preserve_aspect_ratio is set; allowed: sizes that are given")
    _, height, width, _ = call.outputs[0].shape
    return plane_of(x), (height, width)


def nearest_indices(size: int, new: int, align_corners: bool) -> np.ndarray:
    """Which element of the input each of `new` elements takes along one axis."""
    position = np.arange(new)
    if align_corners and new > 1:
        return ((size - 1) * position + (new - 1) // 2) // (new - 1)
    return size * position // new


def pick(x: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """``x[:, rows][:, :, columns]`` of an array (N, H, W, C)."""
    return x[:, rows[:, None], columns[None, :]]


@kernel("Resize")
def resize(call: Call) -> list[np.ndarray]:
    """Nearest neighbour or bilinear; HALF_PIXEL is taken for ASYMMETRIC, as by the runtime.

    Bilinear is in 10-bit fixed point where the zero point of the input is 0. Elsewhere it is in float32, truncated
    towards zero: exact on arm64, but the x86 build divides by an approximate reciprocal that differs between
    processors, so that its results may be 1 off. The parameters of the output are not read: they are the input's.

    Raises:
        SimulationError: another method; for the nearest neighbour other parameters at the output, which the runtime
            refuses; or a size for which the runtime reads beyond its input.
    """
    (height, width), (new_height, new_width) = resize_sizes(call)
    x, method = call.inputs[0].data, call.attrs.get("method", LINEAR)
    aligned = call.attrs.get("coordinate_transform_mode", ASYMMETRIC) == ALIGN_CORNERS
    if method == NEAREST:
        if input_params(call) != output_params(call):
            raise SimulationError(f"{call.name}: a resize has other parameters at its output; allowed: the input's")
        rows, columns = nearest_indices(height, new_height, aligned), nearest_indices(width, new_width, aligned)
        return [pick(x, rows, columns)]
    if method != LINEAR:
        raise SimulationError(f"{call.name}: its method is {method}; allowed: 0 (bilinear) and 1 (nearest)")
    if input_params(call)[1] == 0:
        rows_, columns_ = _fixed(height, new_height, aligned, call), _fixed(width, new_width, aligned, call)
        return [_bilinear_fixed(x, rows_, columns_)]
    return [_bilinear_float(call, _real(height, new_height, aligned), _real(width, new_width, aligned))]


def _fixed(size: int, new: int, aligned: bool, call: Call) -> Between:
    one = 1 << _FRACTION
    parts, steps = (size - 1, new - 1) if aligned and new > 1 else (size, new)
    position = np.arange(new) * ((one * parts + steps // 2) // steps)
    lower = position >> _FRACTION
    if lower[-1] >= size:
        raise SimulationError(f"{call.name}: resizing {size} to {new} reads beyond the input; allowed: smaller sizes")
    return Between(lower, np.minimum(lower + 1, size - 1), position - (lower << _FRACTION))


def _bilinear_fixed(x: np.ndarray, rows: Between, columns: Between) -> np.ndarray:
    one = 1 << _FRACTION
    right, down = columns.weight[:, None], rows.weight[:, None, None]
    total = (one - down) * ((one - right) * pick(x, rows.lower, columns.lower).astype(np.int64))
    total += (one - down) * (right * pick(x, rows.lower, columns.upper))
    total += down * ((one - right) * pick(x, rows.upper, columns.lower))
    total += down * (right * pick(x, rows.upper, columns.upper))
    total += 1 << (2 * _FRACTION - 1)
    return (np.sign(total) * (np.abs(total) >> (2 * _FRACTION))).astype(np.int8)


def _real(size: int, new: int, aligned: bool) -> Between:
    ratio = np.float32(size - 1) / np.float32(new - 1) if aligned and new > 1 else np.float32(size) / np.float32(new)
    position = np.arange(new).astype(np.float32) * ratio
    lower = np.floor(position).astype(np.int64)
    return Between(lower, np.minimum(lower + 1, size - 1), position - lower.astype(np.float32))


def _bilinear_float(call: Call, rows: Between, columns: Between) -> np.ndarray:
    x = call.inputs[0].data.astype(np.float32)
    one = np.float32(1)
    right, down = columns.weight[:, None], rows.weight[:, None, None]
    first = (one - right) * (one - down) * pick(x, rows.lower, columns.lower)
    second = down * (one - right) * pick(x, rows.upper, columns.lower)
    third = right * (one - down) * pick(x, rows.lower, columns.upper)
    fourth = right * down * pick(x, rows.upper, columns.upper)
    value = first + second + third + fourth
    if call.machine == ARM64:  # four channels at a time are added in pairs
        paired = x.shape[3] // 4 * 4
        value[..., :paired] = ((first + second) + (fourth + third))[..., :paired]
    return np.trunc(value).astype(np.int8)
