"""Matrix products in int8: exact sums by float BLAS, and the kernels of MatMulFusion and FullConnection."""

from __future__ import annotations

import numpy as np

from msqkd.errors import SimulationError
from msqkd.integer.arithmetic import Requantiser, activation_bounds, quantize_multiplier
from msqkd.integer.kernels.parameters import input_params, output_params
from msqkd.integer.program import ActivationType, TensorQuant
from msqkd.integer.registry import Call, kernel

_FUSABLE = (ActivationType.NONE, ActivationType.RELU, ActivationType.RELU6)
EXACT_FLOAT32 = 1 << 24  # below it every sum of integers is exact in float32, in any order
EXACT_INT32 = 1 << 31


class Accumulator:
    """``left @ matrix + bias`` of integers, exactly as int32 holds it, by float32 BLAS.

    The inner dimension is cut where the sum of absolute products could reach 2^24; each piece is exact in float32, and
    the pieces are added in float64.  Where the sum could leave int32 it wraps, as in C.

    Args:
        matrix: integers of shape (..., K, N), at most 256 in absolute value.
        bias: int64 of shape (N,).
        peak: the largest absolute value in what it will be multiplied with, at most 256.
    """

    def __init__(self, matrix: np.ndarray, bias: np.ndarray, peak: int) -> None:
        magnitude = np.abs(matrix)
        self._matrix = matrix.astype(np.float32)
        self._pieces = _exact_pieces(magnitude, peak)
        largest = magnitude.sum(axis=-2, dtype=np.int64).max(initial=0)
        self._bound = peak * int(largest) + int(np.abs(bias).max(initial=0))
        self._bias = bias.astype(np.float32 if self._bound < EXACT_FLOAT32 else np.float64) if bias.any() else None

    def __call__(self, left: np.ndarray) -> np.ndarray:
        """The sums for `left`, float32 integers of shape (..., M, K): float32, float64 or int32 (..., M, N)."""
        first, *others = self._pieces
        total = left[..., first] @ self._matrix[..., first, :]
        if others or self._bound >= EXACT_FLOAT32:
            total = total.astype(np.float64)
        for piece in others:
            total += left[..., piece] @ self._matrix[..., piece, :]
        if self._bias is not None:
            total += self._bias
        return wrap_int32(total) if self._bound >= EXACT_INT32 else total


def wrap_int32(total: np.ndarray) -> np.ndarray:
    """Integers in float64 (below 2^53) as int32 holds them: modulo 2^32."""
    return total.astype(np.int64).astype(np.int32)


def _exact_pieces(magnitude: np.ndarray, peak: int) -> list[slice]:
    """Slices of axis -2 whose sums of `magnitude`, times `peak`, stay below 2^24 in every column; as few as will do."""
    length, count = magnitude.shape[-2], 1
    while True:
        edges = [length * i // count for i in range(count + 1)]
        sums = np.add.reduceat(magnitude, edges[:-1], axis=-2, dtype=np.int64) if magnitude.size else magnitude
        bound = peak * int(sums.max(initial=0))
        if bound < EXACT_FLOAT32 or count >= length:
            return [slice(first, last) for first, last in zip(edges, edges[1:])]
        count = max(count + 1, min(length, count * bound // EXACT_FLOAT32))


def largest_distance(values: np.ndarray, zero_point: int) -> int:
    """The largest ``|value − zero_point|`` in an int8 array (0 if it is empty)."""
    if not values.size:
        return 0
    return max(abs(int(values.max()) - zero_point), abs(int(values.min()) - zero_point))


def weight_quant(call: Call, channels: int) -> TensorQuant:
    """Parameters of the second input.

    Raises:
        SimulationError: it has none, or neither one scale nor one an output channel.
    """
    found = call.inputs[1].quant
    if found is None or found.scale.size not in (1, channels):
        raise SimulationError(
            f"{call.name}: its weight has {0 if found is None else found.scale.size} scales; "
            f"allowed: 1, or {channels}, one an output channel"
        )
    return found


def integer_bias(call: Call, channels: int) -> np.ndarray:
    """The third input as int64 of shape (channels,); zeros where the step has only two.

    Raises:
        SimulationError: it is not int32, or of another length.
    """
    if len(call.inputs) < 3:
        return np.zeros(channels, np.int64)
    bias = call.inputs[2].data
    if bias.dtype != np.int32 or bias.size != channels:
        raise SimulationError(
            f"{call.name}: its bias is {bias.dtype} of {bias.size} elements; allowed: int32 of {channels}"
        )
    return bias.reshape(-1).astype(np.int64)


def fused_activation(call: Call) -> int:
    """The activation the step ends with.

    Raises:
        SimulationError: the runtime cannot fuse it.
    """
    activation = int(call.attrs.get("activation_type", ActivationType.NONE))
    if activation not in _FUSABLE:
        allowed = ", ".join(f"{known.value} ({known.name})" for known in _FUSABLE)
        raise SimulationError(f"{call.name}: its activation_type is {activation}; allowed: {allowed}")
    return activation


def requantiser(call: Call, weight: TensorQuant, halves_up: bool = False) -> Requantiser:
    """What brings sums of products to the parameters of the output, the fused activation included.

    The ratio is ``float32(s_x) · float32(s_w)``, multiplied in float32, over ``float32(s_y)``, divided in float64.

    Raises:
        SimulationError: input or output have one scale a channel, the activation cannot be fused, or a ratio of
            scales cannot be represented.
    """
    (x_scale, _), (y_scale, zero_point) = input_params(call), output_params(call)
    product = np.float32(x_scale) * weight.scale.astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = product.astype(np.float64) / np.float64(np.float32(y_scale))
    low, high = activation_bounds(fused_activation(call), y_scale, zero_point)
    return Requantiser(*quantize_multiplier(ratio, call.name), zero_point, low, high, halves_up)


def exact_product(call: Call, x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, TensorQuant]:
    """The int32 sums of a product of int8 matrices with its bias, and the parameters of the second.

    Raises:
        SimulationError: shapes or parameters that do not fit.
    """
    if x.shape[-1] != w.shape[-2]:
        raise SimulationError(f"{call.name}: it multiplies {x.shape} and {w.shape}, whose inner sizes differ")
    channels = w.shape[-1]
    quant, (_, x_zero) = weight_quant(call, channels), input_params(call)
    matrix = w.astype(np.int16) - quant.zero_point.astype(np.int16)
    sums = Accumulator(matrix, integer_bias(call, channels), largest_distance(x, x_zero))
    return sums(x.astype(np.float32) - np.float32(x_zero)), quant


def matrices(call: Call) -> tuple[np.ndarray, np.ndarray]:
    """The operands of MatMulFusion, transposed as its attributes say."""
    x, w = call.inputs[0].data, call.inputs[1].data
    if call.attrs.get("transpose_a", False):
        x = x.swapaxes(-1, -2)
    if call.attrs.get("transpose_b", False):
        w = w.swapaxes(-1, -2)
    return x, w


def rows(call: Call) -> tuple[np.ndarray, np.ndarray]:
    """The operands of FullConnection: the input as rows, and the transpose of its weight (N, K).

    With ``use_axis`` the axes of the input from ``axis`` on are one of length K, else the input is rows of length K.
    """
    x, w = call.inputs[0].data, call.inputs[1].data
    if call.attrs.get("use_axis", False):
        x = x.reshape(*x.shape[: int(call.attrs.get("axis", 0))], -1)
    elif x.size % w.shape[1] == 0:
        x = x.reshape(-1, w.shape[1])
    return x, w.T


@kernel("MatMulFusion")
def matmul(call: Call) -> list[np.ndarray]:
    """Batched product of int8 matrices, the second constant or computed, and an int32 bias (``matmul_int8.cc``).

    Raises:
        SimulationError: shapes or parameters that do not fit, or another activation than RELU and RELU6.
    """
    sums, quant = exact_product(call, *matrices(call))
    return [requantiser(call, quant)(sums)]


@kernel("FullConnection")
def full_connection(call: Call) -> list[np.ndarray]:
    """Dense layer with a weight of shape (N, K) (``fullconnection_int8.cc``); see `rows`.

    Raises:
        SimulationError: as `matmul`.
    """
    sums, quant = exact_product(call, *rows(call))
    return [requantiser(call, quant)(sums)]
