"""Softmax of int8 tensors in fixed point, as ``nnacl/int8/softmax_int8.c`` and ``fixed_point.c`` compute it.

The exponential and the reciprocal are those of gemmlowp: a Taylor polynomial on (-1/4, 0] with a barrel of constant
factors above it, and three Newton steps.
"""

from __future__ import annotations

import numpy as np

from msqkd.errors import SimulationError
from msqkd.integer.arithmetic import (
    quantize_multiplier,
    reciprocal,
    rounding_divide_by_pot,
    saturating_left_shift,
    saturating_rounding_doubling_high_mul,
)
from msqkd.integer.kernels.parameters import clip_int8, input_params
from msqkd.integer.registry import Call, kernel

_INPUT_BITS = 5  # integer bits of the scaled difference to the maximum
_SUM_BITS = 12  # integer bits of the sum of exponentials
_INT32_MAX = 2**31 - 1
# exp(-1/4), exp(-1/2), exp(-1), ... exp(-16) with 31 fractional bits
_FACTORS = (1672461947, 1302514674, 790015084, 290630308, 39332535, 720401, 242)


def softmax_axis(call: Call) -> int:
    """The axis of a Softmax step, counted from 0.

    Raises:
        SimulationError: it is not one axis, or one the runtime crashes on: negative, but not -1.
    """
    rank = call.inputs[0].data.ndim
    axes = [int(axis) for axis in call.attrs.get("axis") or (-1,)]
    if len(axes) != 1 or not -1 <= axes[0] < rank:
        raise SimulationError(f"{call.name}: its axis is {axes}; allowed: one of -1 … {rank - 1}")
    return axes[0] % rank


@kernel("Softmax")
def softmax(call: Call) -> list[np.ndarray]:
    """Softmax along one axis; the result has the scale 1/256 and the zero point -128, whatever the output says.

    Raises:
        SimulationError: an axis as `softmax_axis` refuses it; or exponentials that sum up to 512 or more, where the
            runtime's last shift is undefined.
    """
    axis = softmax_axis(call)
    x = np.moveaxis(call.inputs[0].data, axis, -1)
    scale, _ = input_params(call)
    below = x.max(axis=-1, keepdims=True).astype(np.int16) - x  # 0 ... 255
    exponentials = _exponentials(scale, call.name)
    total = rounding_divide_by_pot(exponentials, _SUM_BITS).astype(np.int64)[below].sum(axis=-1, keepdims=True)
    if (total >= 1 << 28).any():
        raise SimulationError(
            f"{call.name}: the exponentials of a softmax over {x.shape[-1]} values sum up to 512 or more; "
            "allowed: less, as the result of the runtime is undefined"
        )
    zeros = 31 - np.floor(np.log2(total)).astype(np.int32)  # leading ones of 32 bits; exact, as the total is below 2^28
    inverse = reciprocal(((total << zeros) - 2**31).astype(np.int32))
    product = saturating_rounding_doubling_high_mul(inverse, exponentials[below])
    shares = rounding_divide_by_pot(product, _SUM_BITS - zeros + 31 - 8)
    return [np.ascontiguousarray(np.moveaxis(clip_int8(shares.astype(np.int64) - 128), -1, axis))]


def _exponentials(scale: float, name: str) -> np.ndarray:
    """exp(-scale · d) for d = 0 … 255, int32 with 31 fractional bits; large scales wrap, as they do in the runtime."""
    real = min(float(np.float32(scale) * np.float32(2 ** (31 - _INPUT_BITS))), 2.0**31 - 1)
    multiplier, exponent = quantize_multiplier(real, name)
    shifted = np.left_shift(-np.arange(256, dtype=np.int32), max(int(exponent), 0), dtype=np.int32)
    return _exp_on_negative(saturating_rounding_doubling_high_mul(shifted, multiplier))


def _exp_on_negative(a: np.ndarray) -> np.ndarray:
    """exp(a) of int32 with 26 fractional bits, a <= 0, as int32 with 31."""
    fraction_bits = 31 - _INPUT_BITS
    quarter = 1 << (fraction_bits - 2)
    modulus = (a & (quarter - 1)) - quarter
    result = _exp_on_interval(saturating_left_shift(modulus, _INPUT_BITS))
    remainder = (modulus - a).astype(np.int32)
    for power, factor in enumerate(_FACTORS, start=-2):
        scaled = saturating_rounding_doubling_high_mul(result, np.array(factor, np.int32))
        result = np.where(remainder & (1 << (fraction_bits + power)), scaled, result)
    return np.where(a == 0, np.int32(_INT32_MAX), result)


def _exp_on_interval(a: np.ndarray) -> np.ndarray:
    """exp(a) on [-1/4, 0), 31 fractional bits: the polynomial of degree 4 around -1/8."""
    high = saturating_rounding_doubling_high_mul
    exp_of_minus_eighth, third = np.array(1895147668, np.int32), np.array(715827883, np.int32)
    x = a + np.int32(1 << 28)
    square = high(x, x)
    cube, fourth = high(square, x), high(square, square)
    tail = high(rounding_divide_by_pot(fourth, 2) + cube, third) + square
    return exp_of_minus_eighth + high(exp_of_minus_eighth, x + rounding_divide_by_pot(tail, 1))
