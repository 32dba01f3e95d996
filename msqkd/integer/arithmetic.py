"""Fixed-point arithmetic of the runtime's int8 kernels, over whole arrays.

The runtime scales an int32 by a real number written as ``multiplier · 2^(exponent − 31)``: a multiplication that keeps
the high half, rounded, then a rounding shift (Jacob et al., 2018, arXiv 1712.05877; ``nnacl/int8/fixed_point.c`` and
``quantize.c`` of MindSpore Lite).  The functions give what those C functions give for every int32.
"""

from __future__ import annotations

from typing import Union

import numpy as np

from msqkd.errors import SimulationError
from msqkd.integer.program import ActivationType
from msqkd.targets import limits

INT8_MIN, INT8_MAX = -128, 127
_MAX_SHIFT = 31  # a shift of a 32-bit integer by more is undefined in C
_MAX_EXACT_SHIFT = 14  # see Requantiser._by_float64
_BLOCK = 16384  # elements whose buffers stay in a core's second-level cache

ArrayOrFloat = Union[np.ndarray, np.floating, float]
ArrayOrInt = Union[np.ndarray, int]


def quantize_multiplier(real: ArrayOrFloat, name: str = "requantisation") -> tuple[np.ndarray, np.ndarray]:
    """Write positive numbers as ``multiplier · 2^(exponent − 31)``.

    Args:
        real: float64, any shape.
        name: what the message calls the place.

    Returns:
        int32 multipliers in [2^30, 2^31) and int32 exponents in [-31, 31], shaped like `real`.

    Raises:
        SimulationError: a number is not positive, or needs another exponent.
    """
    real = np.asarray(real, np.float64)
    fraction, exponent = np.frexp(real)
    multiplier = np.floor(np.ldexp(fraction, 31) + 0.5)  # exact: the sum has 33 significant bits at most
    carried = multiplier == 2.0**31
    multiplier = np.where(carried, 2.0**30, multiplier)
    exponent = exponent + carried
    usable = (real > 0) & np.isfinite(real) & (np.abs(exponent) <= _MAX_SHIFT)
    if not usable.all():
        raise SimulationError(
            f"{name}: the ratio of scales {real[~usable].flat[0]:g} cannot be represented by the runtime; "
            f"allowed: from 2^-{_MAX_SHIFT + 1} to 2^{_MAX_SHIFT}"
        )
    return multiplier.astype(np.int32), exponent.astype(np.int32)


def saturating_rounding_doubling_high_mul(a: np.ndarray, q: ArrayOrInt) -> np.ndarray:
    """``a · q / 2^31``, nearest, halves upwards, for int32 that broadcast; −2^31 · −2^31 gives 2^31 − 1.

    The C function adds a nudge that depends on the sign and truncates; for every product that is this floor.
    """
    product = np.multiply(a, q, dtype=np.int64)
    product += 1 << 30
    product >>= 31
    np.minimum(product, 2**31 - 1, out=product)
    return product.astype(np.int32)


def rounding_divide_by_pot(x: np.ndarray, exponent: ArrayOrInt) -> np.ndarray:
    """``x / 2^exponent``, nearest, halves away from zero; int32 array, exponents 0 … 31 that broadcast."""
    x = np.asarray(x, np.int32)
    mask = ((np.int64(1) << np.asarray(exponent, np.int64)) - 1).astype(np.int32)
    threshold = (mask >> 1) + (x < 0)
    return (x >> np.asarray(exponent, np.int32)) + ((x & mask) > threshold)


def multiply_by_quantized_multiplier(
    x: np.ndarray, multiplier: ArrayOrInt, exponent: ArrayOrInt, halves_up: bool = False
) -> np.ndarray:
    """Scale int32 by ``multiplier · 2^(exponent − 31)`` as the runtime does.

    A positive exponent shifts `x` left first, where it wraps as int32 does in C; then the high product is taken; then
    a negative exponent divides, rounding a second time.  Both roundings are one floor here: with
    ``p = x · multiplier`` and ``r = −exponent > 0`` the result is
    ``(p + 2^30 + 2^(30+r) − [p < −2^30] · 2^31) >> (31 + r)``, because floors nest.

    Args:
        x: int32, any shape.
        multiplier, exponent: as `quantize_multiplier` gives them; they broadcast along the last axis.
        halves_up: the second rounding takes halves upwards, not away from zero: without the ``[p < −2^30]`` term.

    Returns:
        int32.
    """
    exponent = np.asarray(exponent, np.int64)
    left, right = np.maximum(exponent, 0), np.maximum(-exponent, 0)
    shifted = np.left_shift(np.asarray(x, np.int32), left.astype(np.int32))
    product = np.multiply(shifted, multiplier, dtype=np.int64)
    half = np.where(right > 0, np.int64(1) << (30 + right), 0)
    if not halves_up:
        half = half - (product < -(1 << 30)) * np.where(right > 0, np.int64(1) << 31, 0)
    product += half + (1 << 30)
    product >>= 31 + right
    return product.astype(np.int32)


class Requantiser:
    """``clip(multiply_by_quantized_multiplier(sums) + zero_point, low, high)`` as int8, in few passes.

    Args:
        multiplier, exponent: of shape () or (1,), or one a channel.
        zero_point, low, high: in [-128, 127].
        halves_up: as in `multiply_by_quantized_multiplier`.
    """

    def __init__(
        self,
        multiplier: np.ndarray,
        exponent: np.ndarray,
        zero_point: int,
        low: int = INT8_MIN,
        high: int = INT8_MAX,
        halves_up: bool = False,
    ) -> None:
        multiplier, exponent = np.atleast_1d(multiplier), np.atleast_1d(exponent)
        self._zero_point, self._low, self._high = int(zero_point), int(low), int(high)
        # Where the clipping hides every negative result, it does not matter how negative halves are rounded.
        self._halves_up = bool(halves_up or low >= zero_point)
        self._exact_in_float = bool(((exponent < 0) & (exponent >= -_MAX_EXACT_SHIFT)).all())
        # Constants repeated over a block make every pass one long loop, however few the channels.
        repeats = max(1, _BLOCK // multiplier.size)
        self._multiplier, self._exponent = np.tile(multiplier, repeats), np.tile(exponent, repeats)
        if self._exact_in_float:
            self._factor = np.ldexp(self._multiplier.astype(np.float64), self._exponent - 31)
            self._tie = np.ldexp(0.5, self._exponent)

    def __call__(self, sums: np.ndarray) -> np.ndarray:
        """int8 for `sums`: integers in the range of int32, of any integer or float dtype, channels last."""
        flat, block = np.ascontiguousarray(sums).reshape(-1), self._multiplier.size
        out = np.empty(flat.size, np.int8)
        apply = self._by_float64 if self._exact_in_float else self._by_integers
        for start in range(0, flat.size, block):
            apply(flat[start : start + block], out[start : start + block])
        return out.reshape(np.shape(sums))

    def _by_integers(self, piece: np.ndarray, out: np.ndarray) -> None:
        """Any exponents: the definition, in 64-bit integers; the sum with the zero point wraps as in C."""
        factors = self._multiplier[: piece.size], self._exponent[: piece.size]
        scaled = multiply_by_quantized_multiplier(piece.astype(np.int32), *factors, self._halves_up)
        scaled += np.int32(self._zero_point)
        np.clip(scaled, self._low, self._high, out=scaled)
        out[:] = scaled

    def _by_float64(self, piece: np.ndarray, out: np.ndarray) -> None:
        """Exponents −14 … −1: the same value by float64, exactly.

        With r = −exponent the result before the zero point is ``floor(v + 1/2 + d)``, where ``v = x · multiplier /
        2^(31+r)`` and d is 2^-(r+1), negative for negative x unless halves go up: the formula of
        `multiply_by_quantized_multiplier` over 2^(31+r).  Every term is a multiple of 2^-45, so what is below 2^8 fits
        the 53 bits of a float64 and is exact; what is larger is rounded, monotonically, to no less than 2^8, and
        clipped either way.
        """
        v, tie = piece * self._factor[: piece.size], self._tie[: piece.size]
        v += tie if self._halves_up else np.copysign(tie, v)
        # Counted from -128 the values kept are not negative, so that the conversion's truncation is the floor.
        v += 0.5 + self._zero_point - INT8_MIN
        np.minimum(v, self._high - INT8_MIN, out=v)
        np.maximum(v, self._low - INT8_MIN, out=v)
        unsigned = out.view(np.uint8)
        np.copyto(unsigned, v, casting="unsafe")
        unsigned ^= 0x80


def saturating_left_shift(x: np.ndarray, shift: int) -> np.ndarray:
    """``x · 2^shift`` of int32, clipped to int32."""
    return np.clip(np.asarray(x, np.int64) << shift, -(2**31), 2**31 - 1).astype(np.int32)


def reciprocal(a: np.ndarray) -> np.ndarray:
    """``1 / (1 + a)`` for a in [0, 1), both int32 that count 2^-31: three Newton steps (gemmlowp's fixedpoint.h)."""
    high = saturating_rounding_doubling_high_mul
    half = ((a.astype(np.int64) + 2**31) >> 1).astype(np.int32)  # (1 + a) / 2
    x = np.int32(1515870810) + high(half, -1010580540)  # 48/17 − 32/17 · half, counting 2^-29
    for _ in range(3):
        x = x + saturating_left_shift(high(x, np.int32(1 << 29) - high(half, x)), 2)
    return saturating_left_shift(x, 1)


def round_half_away(x: ArrayOrFloat) -> np.ndarray:
    """Nearest integer of float32 or float64, halves away from zero, in the same dtype (``round`` of C)."""
    x = np.asarray(x)
    # Half an ulp short of 1/2, so that the value below 1/2 stays below 1; 1/2 itself is rounded to even, to 1.
    almost_half = np.nextafter(x.dtype.type(0.5), x.dtype.type(0))
    return np.trunc(x + np.copysign(almost_half, x))


def activation_bounds(activation: int, scale: float, zero_point: int) -> tuple[int, int]:
    """Smallest and largest int8 value a fused activation lets through.

    Args:
        activation: an `ActivationType`: NONE, RELU or RELU6.
        scale, zero_point: of the output; the arithmetic is float32.

    Raises:
        SimulationError: the upper bound of a RELU6 leaves 32 bits.
    """
    low, high = INT8_MIN, INT8_MAX
    if activation in (ActivationType.RELU, ActivationType.RELU6):
        low = max(low, int(zero_point))
    if activation == ActivationType.RELU6:
        objection = limits.relu6(scale, zero_point)
        if objection:
            raise SimulationError(f"RELU6: {objection}")
        six = np.float32(6) / np.float32(scale) + np.float32(zero_point)
        high = int(min(float(high), float(round_half_away(six))))
    return low, high


def fma_float32(a: ArrayOrFloat, b: ArrayOrFloat, c: ArrayOrFloat) -> np.ndarray:
    """``a · b + c`` of float32, broadcast, with a single rounding to float32, as a fused multiply-add gives it.

    The product of two float32 is exact in float64; the sum is rounded to odd there, which makes the second rounding,
    to float32, right (Boldo and Melquiond, 2008, doi 10.1109/TC.2007.70819).
    """
    with np.errstate(over="ignore", invalid="ignore"):
        product = np.multiply(np.float32(a), np.float32(b), dtype=np.float64)
        addend = np.asarray(np.float32(c), np.float64)
        total = np.atleast_1d(product + addend)
        # What the sum lost, exactly (Knuth's two-sum).
        back = total - addend
        lost = (addend - (total - back)) + (product - back)
        bits = total.view(np.int64)
        even = np.isfinite(total) & (lost != 0) & (bits & 1 == 0)
        bits[even] += np.where((lost > 0) == (total > 0), 1, -1)[even]
        return total.astype(np.float32).reshape(np.broadcast_shapes(product.shape, addend.shape))
