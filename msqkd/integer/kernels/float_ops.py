"""The float32 kernels: the layers of a mixed file that are not quantised, and float32 files.

They compute what the primitives mean, on NHWC arrays, with numpy; not the last bit of what the runtime's float kernels
give.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Callable

import numpy as np
from numpy.polynomial import chebyshev

from msqkd.errors import SimulationError
from msqkd.integer.kernels.norm import normalised_axes
from msqkd.integer.kernels.parameters import plane_of
from msqkd.integer.kernels.pool import Windows, four, padded, pair, place_windows, pool_windows, reduce_windows
from msqkd.integer.kernels.reduce import reduction, without
from msqkd.integer.kernels.resize import (
    ALIGN_CORNERS,
    ASYMMETRIC,
    HALF_PIXEL,
    LINEAR,
    NEAREST,
    Between,
    nearest_indices,
    pick,
    resize_sizes,
)
from msqkd.integer.kernels.softmax import softmax_axis
from msqkd.integer.program import ActivationType, PadMode, ReduceMode
from msqkd.integer.registry import FLOAT32, Call, kernel

_CHUNK_BYTES = 64 << 20
_ERF_END = 4.0  # beyond it erf is 1 to 1.6e-8
# erf(x) / x as a polynomial in x², which is smooth; interpolated on [0, 4].
_ERF_DOMAIN = (0.0, _ERF_END**2)
_ERF = chebyshev.Chebyshev.interpolate(
    lambda square: np.array([math.erf(math.sqrt(u)) / math.sqrt(u) for u in square]), 24, domain=_ERF_DOMAIN
)


def erf(x: np.ndarray) -> np.ndarray:
    """The error function of an array of any shape, float64, to 2e-8."""
    clipped = np.clip(np.asarray(x, np.float64), -_ERF_END, _ERF_END)
    return clipped * _ERF(clipped * clipped)


def _gelu(x: np.ndarray, attrs: Mapping[str, Any]) -> np.ndarray:
    if attrs.get("approximate", False):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def _sigmoid(x: np.ndarray, attrs: Mapping[str, Any]) -> np.ndarray:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def _hard_sigmoid(x: np.ndarray, attrs: Mapping[str, Any]) -> np.ndarray:
    return np.clip(x + 3, 0, 6) / 6


_ACTIVATIONS: dict[ActivationType, Callable[[np.ndarray, Mapping[str, Any]], np.ndarray]] = {
    ActivationType.NONE: lambda x, attrs: x,
    ActivationType.RELU: lambda x, attrs: np.maximum(x, 0),
    ActivationType.RELU6: lambda x, attrs: np.clip(x, 0, 6),
    ActivationType.SIGMOID: _sigmoid,
    ActivationType.LEAKY_RELU: lambda x, attrs: np.where(x > 0, x, x * attrs.get("alpha", 0.0)),
    ActivationType.TANH: lambda x, attrs: np.tanh(x),
    ActivationType.HSWISH: lambda x, attrs: x * _hard_sigmoid(x, attrs),
    ActivationType.HSIGMOID: _hard_sigmoid,
    ActivationType.SWISH: lambda x, attrs: x * _sigmoid(x, attrs),
    ActivationType.GELU: _gelu,
}


def _activated(call: Call, x: np.ndarray) -> list[np.ndarray]:
    """The fused activation of `call`, or none, as the only output."""
    kind = call.attrs.get("activation_type", ActivationType.NONE)
    function = _ACTIVATIONS.get(kind)
    if function is None:
        allowed = ", ".join(f"{known:d} ({known.name})" for known in _ACTIVATIONS)
        raise SimulationError(f"{call.name}: its activation is {kind:d}; allowed: {allowed}")
    return [function(x, call.attrs).astype(np.float32, copy=False)]


@kernel("Activation", kind=FLOAT32)
def activation(call: Call) -> list[np.ndarray]:
    """Any `ActivationType`; ``alpha`` is the slope of LEAKY_RELU, ``approximate`` takes GELU's form with tanh."""
    return _activated(call, call.inputs[0].data)


def _biased(call: Call, x: np.ndarray) -> list[np.ndarray]:
    """Operand 2, if there is one, added; then the fused activation."""
    return _activated(call, x + call.inputs[2].data if len(call.inputs) > 2 else x)


@kernel("Conv2DFusion", kind=FLOAT32)
def convolution(call: Call) -> list[np.ndarray]:
    """Convolution of (N, H, W, C) with weights (O, kernel height, kernel width, C / group)."""
    attrs, x, weight = call.attrs, call.inputs[0].data, call.inputs[1].data
    group = int(attrs.get("group") or 1)
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[3] * group != x.shape[3] or weight.shape[0] % group:
        raise SimulationError(f"{call.name}: weights {weight.shape} in {group} groups do not fit the input {x.shape}")
    rows, columns = plane_of(weight)
    dilation = pair(call, "dilation", (1, 1))
    extent = ((rows - 1) * dilation[0] + 1, (columns - 1) * dilation[1] + 1)
    strides, pads = pair(call, "stride", (1, 1)), four(call, "pad_list")
    windows = place_windows(plane_of(x), extent, strides, pads, attrs.get("pad_mode", PadMode.PAD))
    x = padded(x, windows, 0)
    if group == x.shape[3] == weight.shape[0]:
        return _biased(call, _depthwise(x, weight, windows, dilation))
    parts = [
        _grouped(part, kernels, windows, dilation)
        for part, kernels in zip(np.split(x, group, axis=3), np.split(weight, group))
    ]
    return _biased(call, np.concatenate(parts, axis=3) if group > 1 else parts[0])


def _shifted(x: np.ndarray, windows: Windows, row: int, column: int) -> np.ndarray:
    """The element at (row, column) of every window: a view (N, output height, output width, C)."""
    (height, width), (down, right) = windows.output, windows.strides
    return x[:, row : row + (height - 1) * down + 1 : down, column : column + (width - 1) * right + 1 : right]


def _depthwise(x: np.ndarray, weight: np.ndarray, windows: Windows, dilation: tuple[int, int]) -> np.ndarray:
    total = np.zeros((x.shape[0], *windows.output, x.shape[3]), np.float32)
    for row in range(weight.shape[1]):
        for column in range(weight.shape[2]):
            total += _shifted(x, windows, row * dilation[0], column * dilation[1]) * weight[:, row, column, 0]
    return total


def _grouped(x: np.ndarray, weight: np.ndarray, windows: Windows, dilation: tuple[int, int]) -> np.ndarray:
    """One matrix product a chunk; the rows of its left side are the windows, unrolled."""
    outputs, rows, columns, channels = weight.shape
    (height, width), matrix = windows.output, weight.reshape(outputs, -1).T
    item, row, column, channel = x.strides
    (down, right), (below, beside) = windows.strides, dilation
    unrolled = np.lib.stride_tricks.as_strided(
        x,
        (x.shape[0], height, width, rows, columns, channels),
        (item, row * down, column * right, row * below, column * beside, channel),
        writeable=False,
    )
    result = np.empty((x.shape[0], height, width, outputs), np.float32)
    for chunk in _chunks(x.shape[0], height, matrix.shape[0] * width * 4):
        left = unrolled[chunk].reshape(-1, matrix.shape[0])
        result[chunk] = (left @ matrix).reshape(result[chunk].shape)
    return result


def _chunks(items: int, rows: int, row_bytes: int) -> Iterator[tuple[slice, slice]]:
    """Items and rows that can be unrolled at once."""
    together = max(_CHUNK_BYTES // row_bytes, 1)
    if together >= rows:
        step = together // rows
        yield from ((slice(first, first + step), slice(None)) for first in range(0, items, step))
        return
    for item in range(items):
        yield from ((slice(item, item + 1), slice(first, first + together)) for first in range(0, rows, together))


@kernel("Conv2dTransposeFusion", kind=FLOAT32)
def transposed_convolution(call: Call) -> list[np.ndarray]:
    """Transposed convolution of (N, H, W, C) with weights (C, kernel height, kernel width, O), in one group.

    What ``pad_list`` (above, below, left, right) names is cut off; ``output_paddings`` adds below and on the right.
    """
    attrs, x, weight = call.attrs, call.inputs[0].data, call.inputs[1].data
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[0] != x.shape[3] or int(attrs.get("group") or 1) != 1:
        raise SimulationError(f"{call.name}: weights {weight.shape} do not fit the input {x.shape} in one group")
    (down, right), (below, beside) = pair(call, "stride", (1, 1)), pair(call, "dilation", (1, 1))
    (height, width), (rows, columns) = plane_of(x), plane_of(weight)
    top, bottom, left, far = four(call, "pad_list")
    more = attrs.get("output_paddings") or (0, 0)
    full = ((height - 1) * down + (rows - 1) * below + 1, (width - 1) * right + (columns - 1) * beside + 1)
    total = np.zeros((x.shape[0], full[0] + more[0], full[1] + more[1], weight.shape[3]), np.float32)
    for row in range(rows):
        for column in range(columns):
            first, begin = row * below, column * beside
            lines = slice(first, first + (height - 1) * down + 1, down)
            places = slice(begin, begin + (width - 1) * right + 1, right)
            total[:, lines, places] += x @ weight[:, row, column]
    end = (full[0] + more[0] - bottom, full[1] + more[1] - far)
    return _biased(call, total[:, top : end[0], left : end[1]])


@kernel("MatMulFusion", kind=FLOAT32)
def matrix_product(call: Call) -> list[np.ndarray]:
    """``a @ b``, either of them with its last two axes swapped if ``transpose_a`` or ``transpose_b`` is set."""
    left, right = call.inputs[0].data, call.inputs[1].data
    left = np.swapaxes(left, -1, -2) if call.attrs.get("transpose_a", False) else left
    right = np.swapaxes(right, -1, -2) if call.attrs.get("transpose_b", False) else right
    return _biased(call, np.matmul(left, right))


@kernel("FullConnection", kind=FLOAT32)
def full_connection(call: Call) -> list[np.ndarray]:
    """``x @ weight.T`` with the axes of x from ``axis`` on (1 unless ``use_axis``) taken as one."""
    x, attrs = call.inputs[0].data, call.attrs
    axis = int(attrs.get("axis", 1)) if attrs.get("use_axis", False) else 1
    return _biased(call, x.reshape(*x.shape[:axis], -1) @ call.inputs[1].data.T)


def _binary(op: str, function: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
    @kernel(op, kind=FLOAT32)
    def apply(call: Call) -> list[np.ndarray]:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return _activated(call, function(call.inputs[0].data, call.inputs[1].data))


_binary("AddFusion", np.add)
_binary("SubFusion", np.subtract)
_binary("MulFusion", np.multiply)
_binary("DivFusion", np.divide)
_binary("Maximum", np.maximum)
_binary("Minimum", np.minimum)


def _unary(op: str, function: Callable[[np.ndarray], np.ndarray]) -> None:
    @kernel(op, kind=FLOAT32)
    def apply(call: Call) -> list[np.ndarray]:
        with np.errstate(divide="ignore", invalid="ignore"):
            return [function(call.inputs[0].data).astype(np.float32)]


_unary("Sqrt", np.sqrt)
_unary("Rsqrt", lambda x: 1 / np.sqrt(x))
_unary("Erf", erf)
_unary("Abs", np.abs)
_unary("Log", np.log)


@kernel("ExpFusion", kind=FLOAT32)
def exponential(call: Call) -> list[np.ndarray]:
    """``base ** (scale · x + shift)``; the base is e where the attribute is -1."""
    base = float(call.attrs.get("base", -1.0))
    power = call.attrs.get("scale", 1.0) * call.inputs[0].data + call.attrs.get("shift", 0.0)
    with np.errstate(over="ignore"):
        return [np.exp(power if base == -1 else power * math.log(base)).astype(np.float32)]


@kernel("PowFusion", kind=FLOAT32)
def power(call: Call) -> list[np.ndarray]:
    """``(scale · x + shift) ** exponent``; the exponent is operand 1."""
    base = call.attrs.get("scale", 1.0) * call.inputs[0].data + call.attrs.get("shift", 0.0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return [np.power(base, call.inputs[1].data).astype(np.float32)]


@kernel("Cast", kind=FLOAT32)
def cast(call: Call) -> list[np.ndarray]:
    """The values in the dtype of the output."""
    return [call.inputs[0].data.astype(call.outputs[0].dtype)]


@kernel("MaxPoolFusion", kind=FLOAT32)
def max_pool(call: Call) -> list[np.ndarray]:
    """Maximum of the windows."""
    return _activated(call, reduce_windows(call.inputs[0].data, pool_windows(call), np.maximum, -np.inf, np.float32))


@kernel("AvgPoolFusion", kind=FLOAT32)
def average_pool(call: Call) -> list[np.ndarray]:
    """Average of the elements of each window that lie in the plane."""
    x, windows = call.inputs[0].data, pool_windows(call)
    total = reduce_windows(x, windows, np.add, 0, np.float32)
    return _activated(call, total / windows.counts(plane_of(x)).astype(np.float32))


_REDUCTIONS: dict[ReduceMode, Callable[..., np.ndarray]] = {
    ReduceMode.MEAN: np.mean,
    ReduceMode.MAX: np.max,
    ReduceMode.MIN: np.min,
    ReduceMode.PROD: np.prod,
    ReduceMode.SUM: np.sum,
    ReduceMode.SUM_SQUARE: lambda x, axis, keepdims: np.sum(x * x, axis, keepdims=keepdims),
}


@kernel("ReduceFusion", kind=FLOAT32)
def reduce(call: Call) -> list[np.ndarray]:
    """Any `ReduceMode` over the axes of operand 1."""
    mode, axes = reduction(call)
    if mode not in _REDUCTIONS:
        raise SimulationError(f"{call.name}: its reduction is {mode:d}; allowed: 0 … {max(_REDUCTIONS):d}")
    x = call.inputs[0].data
    distinct = tuple({axis % x.ndim for axis in axes})
    return [without(_REDUCTIONS[ReduceMode(mode)](x, axis=distinct, keepdims=True), call, axes)]


@kernel("Softmax", kind=FLOAT32)
def softmax(call: Call) -> list[np.ndarray]:
    """Softmax along one axis."""
    axis = softmax_axis(call)
    x = call.inputs[0].data
    exponentials = np.exp(x - x.max(axis=axis, keepdims=True))
    return [exponentials / exponentials.sum(axis=axis, keepdims=True)]


@kernel("LayerNormFusion", kind=FLOAT32)
def layer_norm(call: Call) -> list[np.ndarray]:
    """Normalisation over the axes from ``begin_norm_axis`` on; operands 1 and 2 are scale and offset."""
    axes = normalised_axes(call)
    x, gamma, beta = (operand.data for operand in call.inputs)
    shape = x.shape[axes[0] :]
    centred = x - x.mean(axis=axes, keepdims=True)
    variance = np.square(centred).mean(axis=axes, keepdims=True)
    normal = centred / np.sqrt(variance + np.float32(call.attrs.get("epsilon", 1e-5)))
    return [normal * gamma.reshape(shape) + beta.reshape(shape)]


@kernel("Resize", kind=FLOAT32)
def resize(call: Call) -> list[np.ndarray]:
    """Bilinear with any transform of coordinates, or nearest neighbour with ASYMMETRIC or ALIGN_CORNERS.

    Raises:
        SimulationError: another method or transform.
    """
    (height, width), (new_height, new_width) = resize_sizes(call)
    x, method = call.inputs[0].data, call.attrs.get("method", LINEAR)
    transform = call.attrs.get("coordinate_transform_mode", ASYMMETRIC)
    aligned = transform == ALIGN_CORNERS
    if method == NEAREST and transform != HALF_PIXEL:
        return [pick(x, nearest_indices(height, new_height, aligned), nearest_indices(width, new_width, aligned))]
    if method != LINEAR:
        raise SimulationError(
            f"{call.name}: its method is {method} with the coordinates {transform}; "
            "allowed: 0 (bilinear) with 0, 1 and 2, 1 (nearest) with 0 and 1"
        )
    rows, columns = _between(height, new_height, transform), _between(width, new_width, transform)
    right, down = columns.weight[:, None], rows.weight[:, None, None]
    above = pick(x, rows.lower, columns.lower) * (1 - right) + pick(x, rows.lower, columns.upper) * right
    below = pick(x, rows.upper, columns.lower) * (1 - right) + pick(x, rows.upper, columns.upper) * right
    return [above * (1 - down) + below * down]


def _between(size: int, new: int, transform: int) -> Between:
    if transform == ALIGN_CORNERS and new > 1:
        position = np.arange(new) * (size - 1) / (new - 1)
    elif transform == HALF_PIXEL:
        position = np.clip((np.arange(new) + 0.5) * size / new - 0.5, 0, size - 1)
    else:
        position = np.arange(new) * size / new
    lower = position.astype(np.int64)
    return Between(lower, np.minimum(lower + 1, size - 1), (position - lower).astype(np.float32))
