"""Stand-alone activations of int8 tensors, each a function of one int8 value."""

from __future__ import annotations

from typing import Union

import numpy as np

from msqkd.errors import SimulationError
from msqkd.integer.arithmetic import (
    fma_float32,
    quantize_multiplier,
    round_half_away,
    rounding_divide_by_pot,
    saturating_rounding_doubling_high_mul,
)
from msqkd.integer.kernels.parameters import clip_int8, input_params, output_params, tabulated
from msqkd.integer.program import ActivationType
from msqkd.integer.registry import ARM64, Call, kernel

_INT16_MIN, _INT16_MAX = -(2**15), 2**15 - 1


@kernel("Activation")
def activation(call: Call) -> list[np.ndarray]:
    """RELU, RELU6, HSWISH, SIGMOID, TANH or LEAKY_RELU.

    Raises:
        SimulationError: another function; the runtime has no int8 kernel for it.
    """
    kind = call.attrs.get("activation_type", ActivationType.NONE)
    function = _FUNCTIONS.get(kind)
    if function is None:
        allowed = ", ".join(f"{known:d} ({known.name})" for known in _FUNCTIONS)
        raise SimulationError(f"{call.name}: its int8 activation is {kind:d}; allowed: {allowed}")
    return [tabulated(call.inputs[0].data, lambda q: function(call, q))]


def _relu(call: Call, q: np.ndarray) -> np.ndarray:
    """``relux_int8.c``; the largest value of a C char is 127 on x86, but 255 on arm64, where the result wraps."""
    return _bounded_relu(call, q, 255 if call.machine == ARM64 else 127)


def _relu6(call: Call, q: np.ndarray) -> np.ndarray:
    """``relux_int8.c``; the upper bound is not limited to int8: where 6 lies outside the range, the result wraps."""
    scale, zero = output_params(call)
    bound = np.float32(6) / np.float32(scale) + np.float32(zero)
    return _bounded_relu(call, q, int(round_half_away(float(bound))))


def _bounded_relu(call: Call, q: np.ndarray, bound: int) -> np.ndarray:
    (scale_in, zero_in), (scale_out, zero_out) = input_params(call), output_params(call)
    ratio = float(np.float32(scale_in) / np.float32(scale_out))
    multiplier, exponent = quantize_multiplier(ratio, call.name)
    # Unlike elsewhere the left shift follows the multiplication.
    high = saturating_rounding_doubling_high_mul((q - zero_in).astype(np.int32), multiplier)
    shifted = np.left_shift(high, max(int(exponent), 0), dtype=np.int32)
    value = rounding_divide_by_pot(shifted, max(-int(exponent), 0)).astype(np.int64) + zero_out
    return np.where(q <= zero_in, zero_out, np.minimum(value, bound))


def _sigmoid(call: Call, q: np.ndarray) -> np.ndarray:
    """``sigmoid_int8.cc``; its table is never filled for the input value 127, which therefore gives 0."""
    (scale_in, zero_in), (scale_out, zero_out) = input_params(call), output_params(call)
    real = np.float32(scale_in) * (q - zero_in).astype(np.float32)
    with np.errstate(over="ignore"):
        exponential = np.exp(-real.astype(np.float64)).astype(np.float32)
    quotient = np.float32(1) / (np.float32(1) + exponential) / np.float32(scale_out)
    return np.where(q == 127, 0, clip_int8(round_half_away(quotient).astype(np.float64) + zero_out))


def _tanh(call: Call, q: np.ndarray) -> np.ndarray:
    """``tanh_int8.c``: a rational function in float32 (a continued fraction of tanh), cut off at ±5."""
    (scale_in, zero_in), (scale_out, zero_out) = input_params(call), output_params(call)
    x = ((q - zero_in) * scale_in).astype(np.float32)
    square = x * x
    # Each step of a polynomial is one fused multiply-add on either machine.
    numerator = fma_float32(fma_float32(square + np.float32(378), square, 17325), square, 135135) * x
    denominator = fma_float32(fma_float32(fma_float32(28, square, 3150), square, 62370), square, 135135)
    value = np.where(np.abs(x) > 5, np.sign(x), numerator / denominator)
    return clip_int8(round_half_away(value.astype(np.float64) / scale_out + zero_out))


def _leaky_relu(call: Call, q: np.ndarray) -> np.ndarray:
    """``leaky_relu_int8.c``; the slope applies to values up to 0, not up to the zero point, and to `q` itself."""
    (scale_in, zero_in), (scale_out, zero_out) = input_params(call), output_params(call)
    scale = np.float32(scale_in) * (np.float32(1) / np.float32(scale_out))
    x = q.astype(np.float32)
    sloped = np.where(q <= 0, x * np.float32(call.attrs.get("alpha", 0.0)), x)
    value = fma_float32(sloped, float(scale), float(np.float32(-zero_in) * scale))
    return clip_int8(round_half_away(value).astype(np.float64) + zero_out)


def _hard_swish(call: Call, q: np.ndarray) -> np.ndarray:
    """``hswish_int8.c``: ``x · relu6(x + 3) / 6`` in 16-bit fixed point.

    Raises:
        SimulationError: the output scale is less than 1/128 of the input's.
    """
    (scale_in, zero_in), (scale_out, zero_out) = input_params(call), output_params(call)
    output, output_exponent = _int16_multiplier(scale_in / 128 / scale_out, call.name)
    relu6, relu6_exponent = _int16_multiplier(scale_in / 128 / (3 / 32768), call.name)
    if output_exponent > 0:
        raise SimulationError(
            f"{call.name}: the scales {scale_in:g} and {scale_out:g} of a hard swish are too far apart; "
            f"allowed: an output scale above {scale_in / 128:g}"
        )
    x = (q - zero_in) * 128
    gate = x
    if relu6_exponent > 0:
        gate = _saturating_left(gate, relu6_exponent - 1)
    gate = _high_int16(gate, relu6)
    if relu6_exponent > 0:
        gate = _saturating_left(gate, 1)
    if relu6_exponent < 0:
        gate = rounding_divide_by_pot(gate, -relu6_exponent)
    gate = (gate.astype(np.int64) + 2**15) >> 1
    product = _high_int16(gate, _high_int16(x, output))
    return clip_int8(rounding_divide_by_pot(product, -output_exponent).astype(np.int64) + zero_out)


def _int16_multiplier(real: float, name: str) -> tuple[int, int]:
    """A multiplier of 15 bits in place of 31, and the exponent; `real` is a float32 for the runtime."""
    multiplier, exponent = quantize_multiplier(float(np.float32(real)), name)
    return min((int(multiplier) + 2**15) >> 16, _INT16_MAX), int(exponent)


def _saturating_left(x: np.ndarray, shift: int) -> np.ndarray:
    return np.clip(x << shift, _INT16_MIN, _INT16_MAX)


def _high_int16(a: np.ndarray, b: Union[np.ndarray, int]) -> np.ndarray:
    """``a · b / 2^15``, nearest, for int16 values: truncation after a nudge away from zero; -2^15 · -2^15 saturates."""
    product = np.multiply(a, b, dtype=np.int64)
    nudged = product + np.where(product >= 0, 2**14, 1 - 2**14)
    return np.minimum(np.sign(nudged) * (np.abs(nudged) >> 15), _INT16_MAX)


_FUNCTIONS = {
    ActivationType.RELU: _relu,
    ActivationType.RELU6: _relu6,
    ActivationType.HSWISH: _hard_swish,
    ActivationType.SIGMOID: _sigmoid,
    ActivationType.TANH: _tanh,
    ActivationType.LEAKY_RELU: _leaky_relu,
}
