"""The runtime's arithmetic in Python's own integers, as its C sources define it: slow, and obvious."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Optional

import numpy as np

from msqkd.integer.program import Tensor, TensorQuant
from msqkd.integer.registry import Call, Operand

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


def wrap(value: int) -> int:
    """What an int32 holds of `value`."""
    return (value + 2**31) % 2**32 - 2**31


def truncated(numerator: int, denominator: int) -> int:
    """C's integer division, for a positive denominator."""
    return numerator // denominator if numerator >= 0 else -(-numerator // denominator)


def high_mul(a: int, b: int) -> int:
    if a == INT32_MIN and b == INT32_MIN:
        return INT32_MAX
    product = a * b
    return truncated(product + (2**30 if product >= 0 else 1 - 2**30), 2**31)


def divide_by_pot(x: int, exponent: int) -> int:
    mask = (1 << exponent) - 1
    return (x >> exponent) + int((x & mask) > (mask >> 1) + int(x < 0))


def scaled(x: int, multiplier: int, exponent: int, halves_up: bool = False) -> int:
    high = high_mul(wrap(x << max(exponent, 0)), multiplier)
    right = max(-exponent, 0)
    if halves_up and right:
        return (high + (1 << (right - 1))) >> right
    return divide_by_pot(high, right)


def multiplier_of(real: float) -> tuple[int, int]:
    """Of a positive number: 31 bits, rounded half up, and the exponent."""
    exact = Fraction(float(real))
    exponent = 0
    while exact >= 1:
        exact, exponent = exact / 2, exponent + 1
    while exact < Fraction(1, 2):
        exact, exponent = exact * 2, exponent - 1
    multiplier = int(exact * 2**31 + Fraction(1, 2))
    return (2**30, exponent + 1) if multiplier == 2**31 else (multiplier, exponent)


def nearest(value: Fraction) -> int:
    """Halves away from zero."""
    magnitude = int(abs(value) + Fraction(1, 2))
    return magnitude if value >= 0 else -magnitude


def bounds(activation: int, quant: TensorQuant) -> tuple[int, int]:
    """Of a fused activation: 1 is RELU, 3 RELU6."""
    zero = int(quant.zero_point[0])
    six = nearest(Fraction(float(np.float32(6) / np.float32(quant.scale[0]) + np.float32(zero))))
    return zero if activation else -128, min(127, six) if activation == 3 else 127


def clip(value: int, low: int = -128, high: int = 127) -> int:
    return max(low, min(high, value))


def params(scale: Any, zero_point: Any = 0) -> TensorQuant:
    scale = np.atleast_1d(scale)
    return TensorQuant(scale, np.broadcast_to(zero_point, scale.shape))


def call(
    inputs: list[tuple[np.ndarray, Optional[TensorQuant]]],
    output: Optional[TensorQuant],
    dtype: str = "int8",
    machine: str = "x86",
    per_sample: bool = False,
    **attrs: Any,
) -> Call:
    """A call whose output's shape is nobody's business."""
    operands = [Operand(*given) for given in inputs]
    return Call(attrs, operands, [Tensor("y", dtype, (), quant=output)], machine, per_sample, "step")
