"""What onnxruntime computes on x86 for an exported ONNX QDQ model: float requantisation, rounded half to even.

The operations are named as in a program of MindSpore Lite, which is what is simulated; the arithmetic is that of the
kernels onnxruntime puts in the place of an operation between DequantizeLinear and QuantizeLinear (the files named below
are sources of its version 1.31). Activations lie there as uint8, the program's int8 plus 128: it matters where a zero
point is added in float before the rounding. What onnxruntime has no int8 kernel for, it computes in float32 between the
two.

x86 processors with AVX2 give the same, as long as products are exact (see `msqkd.exporters.onnx.runtime`). On ARM sums
of two tensors and means are in fixed point, and refused here.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Optional

import numpy as np

from msqkd.errors import SimulationError
from msqkd.integer.arithmetic import INT8_MAX, INT8_MIN, fma_float32
from msqkd.integer.kernels import float_ops, pool, resize, shape
from msqkd.integer.kernels.conv import (
    DepthwiseSums,
    GroupedSums,
    Sums,
    chunks,
    conv_window,
    convolution_group,
    padded_input,
)
from msqkd.integer.kernels.matmul import (
    exact_product,
    fused_activation,
    integer_bias,
    largest_distance,
    matrices,
    rows,
    weight_quant,
)
from msqkd.integer.kernels.parameters import input_params, output_params, plane_of, tabulated
from msqkd.integer.kernels.softmax import softmax_axis
from msqkd.integer.program import ActivationType, TensorQuant
from msqkd.integer.registry import FLOAT32, INT8, ONNXRUNTIME, X86, Call, Kernel, Operand, find_kernel, kernel

_UNSIGNED = 128  # what uint8 holds more than int8
_TABLES = 64  # kept, of 64 KiB each
_VALUES = np.arange(256, dtype=np.float32)  # uint8


# -- casts -------------------------------------------------------------------------------------------------------------
def quantise(x: np.ndarray, scale: float, zero_point: int) -> np.ndarray:
    """QuantizeLinear of float32: ``clip(round(x / scale) + zero_point)``, NaN to -128 (``mlas/lib/quantize.cpp``).

    Args:
        x: float32, any shape.
        scale: positive; divided by as float32.
        zero_point: of int8.

    Returns:
        int8, shaped like `x`.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        steps = np.asarray(x, np.float32) / np.float32(scale)
    low, high = np.float32(INT8_MIN - zero_point), np.float32(INT8_MAX - zero_point)
    steps = np.where(np.isnan(steps), low, np.clip(steps, low, high))
    return (np.rint(steps) + np.float32(zero_point)).astype(np.int8)


def dequantise(q: np.ndarray, scale: float, zero_point: int) -> np.ndarray:
    """DequantizeLinear: ``(q − zero_point) · scale``, the product in float32; `q` of any integer dtype."""
    return (q.astype(np.int32) - np.int32(zero_point)).astype(np.float32) * np.float32(scale)


@kernel("QuantDTypeCast", kind=ONNXRUNTIME)
def cast(call: Call) -> list[np.ndarray]:
    """float32 to int8, int8 to float32, or int8 to int8 of other parameters by way of float32.

    Raises:
        SimulationError: other dtypes, or one scale a channel.
    """
    x, target = call.inputs[0].data, call.outputs[0].dtype
    for dtype in (str(x.dtype), target):
        if dtype not in (INT8, FLOAT32):
            raise SimulationError(f"{call.name}: it casts {x.dtype} to {target}; allowed: {INT8} and {FLOAT32}")
    real = x if x.dtype == np.float32 else dequantise(x, *input_params(call))
    return [quantise(real, *output_params(call)) if target == INT8 else real]


# -- sums of products --------------------------------------------------------------------------------------------------
class _Requantiser:
    """int32 sums to int8: ``clip(round(float32(sum) · factor) + zero_point)`` (``MlasRequantizeOutput``).

    The factor is ``s_x · s_w / s_y`` in float32, from the left, one for all or one a channel (channels are last). The
    fused activation is what the quantiser behind it leaves: values are cut at 0 and 6.
    """

    def __init__(self, call: Call, weight_scale: np.ndarray) -> None:
        (x_scale, _), (y_scale, self._zero_point) = input_params(call), output_params(call)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            self._factor = np.float32(x_scale) * weight_scale.astype(np.float32) / np.float32(y_scale)
        low, high = _bounds(fused_activation(call), y_scale, self._zero_point)
        self._low, self._high = np.float32(low - self._zero_point), np.float32(high - self._zero_point)

    def __call__(self, sums: np.ndarray) -> np.ndarray:
        """int8 for integers in the range of int32, of any dtype."""
        steps = np.asarray(sums).astype(np.float32)
        steps *= self._factor
        np.clip(steps, self._low, self._high, out=steps)
        np.rint(steps, out=steps)
        steps += np.float32(self._zero_point)
        return steps.astype(np.int8)


def _bounds(activation: int, scale: float, zero_point: int) -> tuple[int, int]:
    """Smallest and largest int8 value behind a fused activation: those of 0 and 6 as the quantiser rounds them."""
    low = INT8_MIN if activation == ActivationType.NONE else zero_point
    high = INT8_MAX
    if activation == ActivationType.RELU6:
        high = int(quantise(np.asarray(6.0, np.float32), scale, zero_point))
    return low, high


@kernel("Conv2DFusion", kind=ONNXRUNTIME)
def conv2d(call: Call) -> list[np.ndarray]:
    """QLinearConv: int8 (N, H, W, I) with a weight (O, KH, KW, I / group) and an int32 bias of O.

    An average that was written as a depthwise convolution is QLinearGlobalAveragePool or QLinearAveragePool.

    Raises:
        SimulationError: operands that do not fit, or another activation than RELU and RELU6.
    """
    x, w = call.inputs[0].data, call.inputs[1].data
    channels, group = w.shape[0], convolution_group(call)
    place = conv_window(call, plane_of(x), (w.shape[1], w.shape[2]))
    quant, (_, x_zero) = weight_quant(call, channels), input_params(call)
    if _is_average(call, quant, group):
        windows = pool.Windows(place.kernel, place.stride, place.before, place.output)
        return [_average(call, windows)]
    peak, bias = largest_distance(x, x_zero), integer_bias(call, channels)
    weight = w.astype(np.int16) - quant.zero_point.astype(np.int16).reshape(-1, 1, 1, 1)
    sums: Sums
    if group == channels == x.shape[3] > 1:
        sums, elements = DepthwiseSums(place, weight, bias, peak), 4 * channels
    else:
        sums, elements = GroupedSums(place, weight, bias, peak, group), w[0].size + channels
    requantise = _Requantiser(call, quant.scale)
    out = np.empty((x.shape[0], *place.output, channels), np.int8)
    for images, lines in chunks(x.shape[0], place, elements):
        out[images, lines] = requantise(sums(padded_input(x[images], x_zero, place, lines, 0)))
    return [out]


def _is_average(call: Call, quant: TensorQuant, group: int) -> bool:
    """Whether a convolution averages every channel by itself: no bias, no padding, and all weights 1 / window."""
    w = call.inputs[1].data
    window = w[0].size
    if len(call.inputs) > 2 or group != len(w) or window == 1 or quant.per_channel or (w != w.flat[0]).any():
        return False
    share = float(quant.scale[0]) * (int(w.flat[0]) - int(quant.zero_point[0])) * window
    return math.isclose(share, 1.0, rel_tol=1e-6) and fused_activation(call) == ActivationType.NONE


@kernel("MatMulFusion", kind=ONNXRUNTIME)
def matmul(call: Call) -> list[np.ndarray]:
    """QGemm and QLinearMatMul: batched product of int8 matrices, the second constant or computed, and an int32 bias.

    Raises:
        SimulationError: shapes or parameters that do not fit, or another activation than RELU and RELU6.
    """
    sums, quant = exact_product(call, *matrices(call))
    return [_Requantiser(call, quant.scale)(sums)]


@kernel("FullConnection", kind=ONNXRUNTIME)
def full_connection(call: Call) -> list[np.ndarray]:
    """QGemm with a weight of shape (N, K); see `msqkd.integer.kernels.matmul.rows`.

    Raises:
        SimulationError: as `matmul`.
    """
    sums, quant = exact_product(call, *rows(call))
    return [_Requantiser(call, quant.scale)(sums)]


# -- two operands ------------------------------------------------------------------------------------------------------
_Params = tuple[float, int]


@kernel("AddFusion", kind=ONNXRUNTIME)
def add(call: Call) -> list[np.ndarray]:
    """QLinearAdd, with a fused RELU or RELU6 (``qladd_avx2.cpp``).

    Raises:
        SimulationError: another activation is fused, the operands cannot be broadcast, or the machine is not x86.
    """
    _only_x86(call, "sum")
    bounds = _bounds(fused_activation(call), *output_params(call))
    return [_look_up(_sum_table(input_params(call), input_params(call, 1), output_params(call), bounds), call)]


@lru_cache(_TABLES)
def _sum_table(first: _Params, second: _Params, output: _Params, bounds: tuple[int, int]) -> np.ndarray:
    """``b · ratio_b + constant``, then ``a · ratio_a`` more, each rounded once to float32."""
    (scale_a, zero_a), (scale_b, zero_b), (scale_y, zero_y) = first, second, output
    ratio_a, ratio_b = (np.float32(scale) / np.float32(scale_y) for scale in (scale_a, scale_b))
    zeros = fma_float32(ratio_a, zero_a + _UNSIGNED, ratio_b * np.float32(zero_b + _UNSIGNED))
    constant = np.float32(zero_y + _UNSIGNED) - zeros
    return _table(fma_float32(_VALUES[:, None], ratio_a, fma_float32(_VALUES, ratio_b, constant)), bounds)


@kernel("MulFusion", kind=ONNXRUNTIME)
def multiply(call: Call) -> list[np.ndarray]:
    """QLinearMul (``qlmul.cpp``).

    Raises:
        SimulationError: the operands cannot be broadcast.
    """
    return [_look_up(_product_table(input_params(call), input_params(call, 1), output_params(call)), call)]


@lru_cache(_TABLES)
def _product_table(first: _Params, second: _Params, output: _Params) -> np.ndarray:
    """The exact product, scaled and moved by the zero point in float32."""
    (scale_a, zero_a), (scale_b, zero_b), (scale_y, zero_y) = first, second, output
    ratio = np.float32(scale_a) * np.float32(scale_b) / np.float32(scale_y)
    a, b = (_VALUES - np.float32(zero + _UNSIGNED) for zero in (zero_a, zero_b))
    return _table(a[:, None] * b * ratio + np.float32(zero_y + _UNSIGNED), (INT8_MIN, INT8_MAX))


def _table(values: np.ndarray, bounds: tuple[int, int]) -> np.ndarray:
    """int8 (65536,) for uint8 results of (256, 256) pairs of uint8 values, not yet rounded."""
    return np.clip(np.rint(values) - _UNSIGNED, *bounds).astype(np.int8).reshape(-1)


def _look_up(table: np.ndarray, call: Call) -> np.ndarray:
    a, b = (call.inputs[index].data.view(np.uint8) ^ np.uint8(_UNSIGNED) for index in (0, 1))
    return table.take(np.left_shift(a, 8, dtype=np.uint16) | b)


# -- windows -----------------------------------------------------------------------------------------------------------
@kernel("MaxPoolFusion", kind=ONNXRUNTIME)
def max_pool(call: Call) -> list[np.ndarray]:
    """MaxPool of the integers."""
    result = pool.reduce_windows(call.inputs[0].data, pool.pool_windows(call), np.maximum, INT8_MIN, np.int8)
    return [_moved(call, result)]


@kernel("AvgPoolFusion", kind=ONNXRUNTIME)
def average_pool(call: Call) -> list[np.ndarray]:
    """QLinearAveragePool of the elements of each window that lie in the plane.

    Raises:
        SimulationError: a window covers nothing but padding, or it covers the plane and the machine is not x86.
    """
    windows = pool.pool_windows(call)
    if not windows.counts(plane_of(call.inputs[0].data)).all():
        raise SimulationError(f"{call.name}: a window of the average pool lies in the padding alone")
    return [_average(call, windows)]


def _average(call: Call, windows: pool.Windows) -> np.ndarray:
    """``qlinear_pool.cc``: in float32, element by element; over the whole plane as a global pool instead."""
    x = call.inputs[0].data
    plane = plane_of(x)
    if windows.kernel == plane and windows.output == (1, 1) and windows.before == (0, 0):
        return _global_average(call)
    (scale_y, zero_y), count = output_params(call), windows.counts(plane)
    total = _ordered_sum(pool.padded(dequantise(x, *input_params(call)), windows, 0.0), windows)
    steps = total / count.astype(np.float32) / np.float32(scale_y) + np.float32(zero_y + _UNSIGNED)
    return np.clip(np.rint(steps) - _UNSIGNED, INT8_MIN, INT8_MAX).astype(np.int8)


def _ordered_sum(x: np.ndarray, windows: pool.Windows) -> np.ndarray:
    """Sums of the windows of a padded (N, H, W, C), the elements added row by row."""
    total: Optional[np.ndarray] = None
    (rows, columns), (down, right) = windows.output, windows.strides
    for i, j in np.ndindex(windows.kernel):
        part = x[:, i : i + (rows - 1) * down + 1 : down, j : j + (columns - 1) * right + 1 : right]
        total = part.copy() if total is None else np.add(total, part, out=total)
    assert total is not None
    return total


def _global_average(call: Call) -> np.ndarray:
    """QLinearGlobalAveragePool (``qlgavgpool.cpp``): the exact sum, requantised by ``s_x / (s_y · elements)``."""
    _only_x86(call, "mean")
    x = call.inputs[0].data
    (x_scale, x_zero), (y_scale, y_zero) = input_params(call), output_params(call)
    size = x.shape[1] * x.shape[2]
    factor = np.float32(x_scale) / (np.float32(y_scale) * np.float32(size))
    total = x.sum(axis=(1, 2), keepdims=True, dtype=np.int32) - np.int32(x_zero * size)
    steps = np.rint(total.astype(np.float32) * factor) + np.float32(y_zero)
    return np.clip(steps, INT8_MIN, INT8_MAX).astype(np.int8)


def _only_x86(call: Call, what: str) -> None:
    if call.machine != X86:
        raise SimulationError(
            f"{call.name}: onnxruntime computes a {what} on {call.machine} in a fixed point that is not simulated; "
            f"allowed: {X86}"
        )


# -- values that move --------------------------------------------------------------------------------------------------
def _moved(call: Call, values: np.ndarray, source: int = 0, target: int = 0) -> np.ndarray:
    """`values` of an input in the parameters of an output: as they are, or by way of float32."""
    given, wanted = input_params(call, source), output_params(call, target)
    if (np.float32(given[0]), given[1]) == (np.float32(wanted[0]), wanted[1]):
        return values
    return tabulated(values, lambda q: quantise(dequantise(q, *given), *wanted))


def _mover(move: Kernel) -> Kernel:
    """A kernel that moves int8 values as `move` does, whatever their dtype."""

    def run(call: Call) -> list[np.ndarray]:
        return [_moved(call, part, 0, index) for index, part in enumerate(move(call))]

    return run


def _nearest(call: Call) -> list[np.ndarray]:
    method = int(call.attrs.get("method", resize.LINEAR))
    if method != resize.NEAREST:
        raise SimulationError(f"{call.name}: its method is {method}; allowed: {resize.NEAREST} (nearest neighbour)")
    return float_ops.resize(call)


for _ops, _move in (
    (("Reshape", "Squeeze", "Unsqueeze", "ExpandDims"), shape.reshape),
    (("Transpose",), shape.transpose),
    (("Split",), shape.split),
    (("SliceFusion",), shape.slice_fusion),
    (("StridedSlice",), shape.strided_slice),
    (("Gather",), shape.gather),
    (("Resize",), _nearest),
):
    kernel(*_ops, kind=ONNXRUNTIME)(_mover(_move))


@kernel("Concat", kind=ONNXRUNTIME)
def concat(call: Call) -> list[np.ndarray]:
    """QLinearConcat: the operands one after another, each in the parameters of the output."""
    parts = [replace(item, data=_moved(call, item.data, index)) for index, item in enumerate(call.inputs)]
    return shape.concat(replace(call, inputs=parts))


# -- float inside ------------------------------------------------------------------------------------------------------
@kernel("Softmax", kind=ONNXRUNTIME)
def softmax(call: Call) -> list[np.ndarray]:
    """QLinearSoftmax along one axis (``qlinear_softmax.cc``).

    Exponentials come from a table in float32, scaled up as far as their sum cannot overflow, and are added in order.

    Raises:
        SimulationError: its axis is not one of the input's.
    """
    axis = softmax_axis(call)
    x = np.moveaxis(call.inputs[0].data, axis, -1)
    (x_scale, _), (y_scale, y_zero) = input_params(call), output_params(call)
    step = float(np.float32(x_scale))
    reach = max(0.0, math.log(np.finfo(np.float32).max / np.float32(x.shape[-1])) - 5)
    table = np.exp((-np.arange(256) + reach / step) * step).astype(np.float32)  # by the distance to the maximum
    values = table[x.max(axis=-1, keepdims=True).astype(np.int16) - x]
    total = np.add.accumulate(values, axis=-1, dtype=np.float32)[..., -1:]
    shares = np.rint(values * np.floor(np.float32(1) / np.float32(y_scale)) / total)
    result = np.minimum(shares + np.float32(y_zero), INT8_MAX).astype(np.int8)
    return [np.ascontiguousarray(np.moveaxis(result, -1, axis))]


def _between_casts(op: str) -> Kernel:
    """The float32 kernel of `op` between DequantizeLinear and QuantizeLinear."""

    def run(call: Call) -> list[np.ndarray]:
        outputs = [replace(tensor, dtype=FLOAT32, quant=None) for tensor in call.outputs]
        inputs = [_real(item, f"{call.name}: input {index}") for index, item in enumerate(call.inputs)]
        found = find_kernel(op, FLOAT32, call.name)(replace(call, inputs=inputs, outputs=outputs))
        return [quantise(data, *output_params(call, index)) for index, data in enumerate(found)]

    return run


def _real(item: Operand, place: str) -> Operand:
    """An operand in float32; axes, paddings and the like as they are."""
    if item.quant is None or item.data.dtype not in (np.int8, np.int32):
        return item
    if item.quant.per_channel:
        raise SimulationError(f"{place} has {item.quant.scale.size} scales; allowed: one for the tensor")
    return Operand(dequantise(item.data, float(item.quant.scale[0]), int(item.quant.zero_point[0])))


for _op in ("SubFusion", "PadFusion", "LayerNormFusion"):
    kernel(_op, kind=ONNXRUNTIME)(_between_casts(_op))


@kernel("Activation", kind=ONNXRUNTIME)
def activation(call: Call) -> list[np.ndarray]:
    """A function in float32 between the casts, computed once for each of the 256 int8 values."""
    given = input_params(call)

    def function(q: np.ndarray) -> np.ndarray:
        real = replace(call, inputs=[Operand(dequantise(q, *given))])
        return quantise(float_ops.activation(real)[0], *output_params(call))

    return [tabulated(call.inputs[0].data, function)]
