"""Element-wise arithmetic of two int8 tensors: AddFusion, SubFusion, MulFusion and DivFusion.

A result depends on two int8 values alone, so each kernel computes a table of all 65,536 pairs, in the runtime's
fixed-point arithmetic, and looks the elements up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from msqkd.errors import SimulationError
from msqkd.integer.arithmetic import (
    INT8_MAX,
    INT8_MIN,
    activation_bounds,
    multiply_by_quantized_multiplier,
    quantize_multiplier,
    reciprocal,
    rounding_divide_by_pot,
    saturating_rounding_doubling_high_mul,
)
from msqkd.integer.kernels.matmul import fused_activation
from msqkd.integer.kernels.parameters import input_params, output_params
from msqkd.integer.registry import X86, Call, kernel

_HEADROOM = 20  # bits the operands of a sum are shifted left by
_VECTOR = 16  # elements x86 adds at once
_TABLES = 64  # kept, of 64 KiB each
_VALUES = np.roll(np.arange(INT8_MIN, INT8_MAX + 1, dtype=np.int32), 128)  # int8 values by their bits


@dataclass(frozen=True)
class _Scaling:
    """What a table depends on.

    Attributes:
        zero_points: of the operands and the result.
        factors: a pair (multiplier, exponent) a scaling: of both operands and the sum, or of the product alone.
        bounds: smallest and largest result.
    """

    zero_points: tuple[int, int, int]
    factors: tuple[tuple[int, int], ...]
    bounds: tuple[int, int] = (INT8_MIN, INT8_MAX)

    def centred(self) -> tuple[np.ndarray, np.ndarray]:
        """All values of both operands less their zero points, int32 of shape (256, 1) and (1, 256)."""
        first, second, _ = self.zero_points
        return (_VALUES - np.int32(first))[:, None], (_VALUES - np.int32(second))[None]

    def finish(self, result: np.ndarray) -> np.ndarray:
        """The table, int8 of shape (65536,), for results before the zero point."""
        return np.clip(result.astype(np.int64) + self.zero_points[2], *self.bounds).astype(np.int8).reshape(-1)


def _scaling(
    call: Call, numerators: np.ndarray, denominators: np.ndarray, bounds: tuple[int, int] = (INT8_MIN, INT8_MAX)
) -> _Scaling:
    """Scalings by quotients, which keep the dtype they are given in."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = numerators / denominators
    multipliers, exponents = quantize_multiplier(ratios, call.name)
    zero_points = input_params(call)[1], input_params(call, 1)[1], output_params(call)[1]
    return _Scaling(zero_points, tuple(zip(multipliers.tolist(), exponents.tolist())), bounds)


def _look_up(table: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The results for int8 arrays that broadcast."""
    return table.take(np.left_shift(a.view(np.uint8), 8, dtype=np.uint16) | b.view(np.uint8))


def _times(x: np.ndarray, factor: tuple[int, int]) -> np.ndarray:
    return multiply_by_quantized_multiplier(x, *factor)


@kernel("AddFusion")
def add(call: Call) -> list[np.ndarray]:
    """Sum, with a fused RELU or RELU6 (``add_int8.cc``, ``add_int8.c``).

    An operand that is broadcast is read from its beginning for every block of elements behind the last axis along
    which the shapes differ: right for a scalar or a vector of channels, wrong for one vector an item of a batch.

    Raises:
        SimulationError: neither operand has the shape of the result, or another activation is fused.
    """
    bounds = activation_bounds(fused_activation(call), *output_params(call))
    scaling = _scaling(call, *_sum_ratios(_scales(call)), bounds)
    a, b, run, scalar_first = _add_operands(call)
    plain = _sum_table(scaling)
    whole = run // _VECTOR * _VECTOR
    if call.machine != X86 or not whole:
        return [_look_up(plain, a, b)]
    if scalar_first:
        # AddOptInt8_AVX2 scales the scalar by the factor of the tensor, and the tensor by that of the scalar.
        first, second, last = scaling.factors
        scaling = replace(scaling, factors=(second, first, last))
    vectors = _sum_table_avx2(scaling)
    result = _look_up(vectors, a, b)
    if whole < run and not np.array_equal(plain, vectors):
        result.reshape(-1, run)[:, whole:] = _look_up(plain, a, b).reshape(-1, run)[:, whole:]
    return [result]


def _add_operands(call: Call) -> tuple[np.ndarray, np.ndarray, int, bool]:
    """Operands that numpy broadcasts to what the runtime adds, the elements it adds in one run, and whether the first
    of them is a scalar that it adds to a tensor."""
    a, b, skip = _aligned(call)
    item, shape_a, shape_b = np.broadcast_shapes(a.shape, b.shape)[skip:], a.shape[skip:], b.shape[skip:]
    scalar = math.prod(shape_a) == 1, math.prod(shape_b) == 1
    if shape_a == shape_b or any(scalar):
        return a, b, math.prod(item), scalar[0] and not scalar[1]
    if item not in (shape_a, shape_b):
        raise SimulationError(
            f"{call.name}: the runtime adds {shape_a} and {shape_b} wrongly; allowed: one operand of the result's shape"
        )
    last = max(axis for axis, (m, n) in enumerate(zip(shape_a, shape_b)) if m != n)
    block = item[last + 1 :]

    def beginning(x: np.ndarray) -> np.ndarray:
        lead = x.shape[:skip]
        return x.reshape(*lead, -1)[..., : math.prod(block)].reshape(*lead, *(1,) * (last + 1), *block)

    return (beginning(a), b, math.prod(block), False) if item == shape_b else (a, beginning(b), math.prod(block), False)


def _aligned(call: Call) -> tuple[np.ndarray, np.ndarray, int]:
    """The operands with as many axes, and the number of leading axes that are not part of a run of the program.

    Raises:
        SimulationError: they cannot be broadcast.
    """
    a, b = call.inputs[0].data, call.inputs[1].data
    rank = max(a.ndim, b.ndim)
    a, b = (x.reshape((1,) * (rank - x.ndim) + x.shape) for x in (a, b))
    if any(m != n and 1 not in (m, n) for m, n in zip(a.shape, b.shape)):
        raise SimulationError(f"{call.name}: its operands of {a.shape} and {b.shape} cannot be broadcast")
    return a, b, 1 if call.per_sample and rank else 0


def _sum_ratios(scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numerators and denominators: both operands to a common scale of 20 more bits, and the sum to the result's."""
    widest = 2 * scales[:2].max()
    return np.array([*scales[:2], widest]), np.array([widest, widest, 2.0**_HEADROOM * scales[2]])


@lru_cache(_TABLES)
def _sum_table(scaling: _Scaling, sign: int = 1) -> np.ndarray:
    """``a + sign · b``."""
    x, y = scaling.centred()
    first, second, last = scaling.factors
    return scaling.finish(_times(_times(x << _HEADROOM, first) + sign * _times(y << _HEADROOM, second), last))


@lru_cache(_TABLES)
def _sum_table_avx2(scaling: _Scaling) -> np.ndarray:
    """The same by the vector code of x86, whose shifts round some negative halves the other way."""
    x, y = scaling.centred()
    first, second, last = scaling.factors
    total = _times_avx2(x << _HEADROOM, first) + _times_avx2(y << _HEADROOM, second)
    return scaling.finish(_times_avx2(total, last))


def _times_avx2(x: np.ndarray, factor: tuple[int, int]) -> np.ndarray:
    """`_times` as ``_mm_qrdmulh_epi32`` and ``_mm_rshr_epi32`` have it: truncated, then one less where negative."""
    multiplier, exponent = factor
    nudged = np.left_shift(x, max(exponent, 0)).astype(np.int64) * multiplier + (1 << 30)
    high = np.sign(nudged) * (np.abs(nudged) >> 31)
    shift, negative = max(-exponent, 0), high < 0
    mask = (1 << shift) - 1
    quotient = np.where(negative, ~(np.abs(high) >> shift), high >> shift)
    return (quotient + ((high & mask) - negative > mask >> 1)).astype(np.int32)


@kernel("SubFusion")
def subtract(call: Call) -> list[np.ndarray]:
    """Difference; a fused activation is ignored, as by the runtime (``sub_int8.cc``)."""
    scaling = _scaling(call, *_sum_ratios(_scales(call).astype(np.float32).astype(np.float64)))
    return [_look_up(_sum_table(scaling, sign=-1), *_tiled(call))]


@kernel("MulFusion")
def multiply(call: Call) -> list[np.ndarray]:
    """Product; a fused activation is ignored, as by the runtime (``mul_int8.cc``).

    Of one vector of channels an item, the runtime multiplies the whole batch with that of the first item.
    """
    a, b = _tiled(call)
    if not call.per_sample and a.ndim == 4 and a.shape[0] == b.shape[0] and a.shape[3] == b.shape[3]:
        if a.shape[1:3] == (1, 1) != b.shape[1:3]:
            a = a[:1]
        elif b.shape[1:3] == (1, 1) != a.shape[1:3]:
            b = b[:1]
    scales = _scales(call).astype(np.float32)
    scaling = _scaling(call, scales[:1] * scales[1:2], scales[2:])
    return [_look_up(_product_table(scaling), a, b)]


@lru_cache(_TABLES)
def _product_table(scaling: _Scaling) -> np.ndarray:
    x, y = scaling.centred()
    return scaling.finish(_times(x * y, scaling.factors[0]))


@kernel("DivFusion")
def divide(call: Call) -> list[np.ndarray]:
    """Quotient; a fused activation is ignored, as by the runtime (``div_int8.cc``).

    Raises:
        SimulationError: an element of the divisor is its zero point, or the scales are too far apart.
    """
    a, b = _tiled(call)
    if (b == input_params(call, 1)[1]).any():
        raise SimulationError(f"{call.name}: it divides by 0; allowed: divisors other than their zero point")
    scales = _scales(call).astype(np.float32)
    scaling = _scaling(call, scales[:1], scales[1:2] * scales[2:])
    return [_look_up(_quotient_table(scaling, call.name), a, b)]


@lru_cache(_TABLES)
def _quotient_table(scaling: _Scaling, name: str) -> np.ndarray:
    """Quotients by a fixed-point reciprocal (``div_int8.c``); those by 0 mean nothing."""
    x, y = scaling.centred()
    divisor = np.where(y == 0, 1, y)
    digits = _digits(np.abs(divisor))
    shifted = (np.abs(divisor).astype(np.int64) << (31 - digits)) - 2**31
    inverse = np.sign(divisor) * reciprocal(shifted)
    leading = np.where(x == 0, 31, 30 - _digits(np.maximum(np.abs(x), 1)))
    multiplier, exponent = scaling.factors[0]
    shift = digits + leading - exponent
    if shift.min() < 0:
        raise SimulationError(f"{name}: its scales are too far apart; allowed: quotients below 2^30 output steps")
    quotient = saturating_rounding_doubling_high_mul(x << leading, inverse)
    scaled = saturating_rounding_doubling_high_mul(quotient, multiplier)
    return scaling.finish(np.where(shift > 31, 0, rounding_divide_by_pot(scaled, np.minimum(shift, 31))))


def _digits(x: np.ndarray) -> np.ndarray:
    """The binary digits of positive int32 below 2^24 but the first."""
    return np.frexp(x.astype(np.float32))[1] - 1


def _scales(call: Call) -> np.ndarray:
    """float64: of the operands and the result."""
    return np.array([input_params(call)[0], input_params(call, 1)[0], output_params(call)[0]])


def _tiled(call: Call) -> tuple[np.ndarray, np.ndarray]:
    """The operands of a kernel that repeats what is to be broadcast.

    Raises:
        SimulationError: they cannot be broadcast; or they differ in shape but not in size, which the runtime takes for
            equal shapes.
    """
    a, b, skip = _aligned(call)
    shape_a, shape_b = a.shape[skip:], b.shape[skip:]
    if shape_a != shape_b and math.prod(shape_a) == math.prod(shape_b):
        raise SimulationError(
            f"{call.name}: the runtime does not broadcast {shape_a} and {shape_b}, which are of one size; "
            "allowed: equal shapes, or one operand smaller"
        )
    return a, b
