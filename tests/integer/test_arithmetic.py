from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import plain_integers as plain
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msqkd.errors import SimulationError
from msqkd.integer.arithmetic import (
    Requantiser,
    activation_bounds,
    fma_float32,
    multiply_by_quantized_multiplier,
    quantize_multiplier,
    reciprocal,
    round_half_away,
    rounding_divide_by_pot,
    saturating_left_shift,
    saturating_rounding_doubling_high_mul,
)
from msqkd.integer.program import ActivationType

EDGES = [0, 1, -1, 2, -2, 2**30, -(2**30), 2**31 - 1, -(2**31), 2**30 + 1, 2**24, -(2**24)]
INT32 = st.one_of(st.sampled_from(EDGES), st.integers(-(2**31), 2**31 - 1), st.integers(-70000, 70000))
MULTIPLIERS = st.one_of(st.sampled_from([2**30, 2**31 - 1, 3 * 2**29, 2**30 + 1]), st.integers(2**30, 2**31 - 1))
INT8 = st.integers(-128, 127)
FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def int32(values: list[int]) -> np.ndarray:
    return np.array(values, np.int32)


@given(st.lists(INT32, min_size=1, max_size=20), INT32)
def test_high_mul_is_the_c_function(values: list[int], factor: int) -> None:
    expected = [plain.high_mul(value, factor) for value in values]
    assert saturating_rounding_doubling_high_mul(int32(values), np.int32(factor)).tolist() == expected


@given(st.lists(INT32, min_size=1, max_size=20), st.integers(0, 31))
def test_division_by_a_power_of_two_is_the_c_function(values: list[int], exponent: int) -> None:
    expected = [plain.divide_by_pot(value, exponent) for value in values]
    assert rounding_divide_by_pot(int32(values), exponent).tolist() == expected


@given(st.lists(INT32, min_size=1, max_size=20), MULTIPLIERS, st.integers(-31, 31), st.booleans())
def test_scaling_is_the_c_function(values: list[int], multiplier: int, exponent: int, halves_up: bool) -> None:
    expected = [plain.scaled(value, multiplier, exponent, halves_up) for value in values]
    found = multiply_by_quantized_multiplier(int32(values), multiplier, exponent, halves_up)
    assert found.dtype == np.int32
    assert found.tolist() == expected


def test_scaling_takes_one_factor_a_channel() -> None:
    x = int32([[1000, 1000, 1000], [-1000, -1000, -1000]])
    multiplier, exponent = quantize_multiplier(np.array([0.5, 0.0015, 3.0]))
    expected = [[plain.scaled(v, m, e) for v, m, e in zip(row, multiplier.tolist(), exponent.tolist())] for row in x]
    assert multiply_by_quantized_multiplier(x, multiplier, exponent).tolist() == expected


@settings(max_examples=300)
@given(
    st.lists(INT32, min_size=1, max_size=30),
    st.lists(st.tuples(MULTIPLIERS, st.integers(-20, 2)), min_size=1, max_size=3),
    INT8,
    st.tuples(INT8, INT8),
    st.booleans(),
    st.sampled_from([np.int32, np.float64]),
)
def test_requantiser_is_scaling_zero_point_and_clip(
    values: list[int],
    factors: list[tuple[int, int]],
    zero_point: int,
    bounds: tuple[int, int],
    halves_up: bool,
    dtype: type,
) -> None:
    low, high = sorted(bounds)
    values = (values * len(factors))[: len(values) // len(factors) * len(factors)] or values[:1] * len(factors)
    sums = np.array(values).reshape(-1, len(factors))
    multiplier, exponent = int32([m for m, _ in factors]), int32([e for _, e in factors])
    found = Requantiser(multiplier, exponent, zero_point, low, high, halves_up)(sums.astype(dtype))
    expected = [
        [
            plain.clip(plain.wrap(plain.scaled(v, m, e, halves_up) + zero_point), low, high)
            for v, (m, e) in zip(row, factors)
        ]
        for row in sums.tolist()
    ]
    assert found.dtype == np.int8
    assert found.tolist() == expected


@pytest.mark.parametrize("exponent", [0, -1, -2, -7, -14, -15])
@pytest.mark.parametrize(("zero_point", "low"), [(-128, -128), (3, -128), (-5, -5)])
@pytest.mark.parametrize("halves_up", [False, True])
def test_requantiser_rounds_every_half_as_the_definition(
    exponent: int, zero_point: int, low: int, halves_up: bool
) -> None:
    # With the multiplier 2^30 every sum is scaled by a power of two: as many halves as there can be.
    reach = 300 << -exponent
    sums = np.unique(np.linspace(-reach, reach, 4001).astype(np.int64))
    apply = Requantiser(np.int32(2**30), np.int32(exponent), zero_point, low, 127, halves_up)
    expected = [plain.clip(plain.scaled(v, 2**30, exponent, halves_up) + zero_point, low) for v in sums.tolist()]
    assert apply(sums.astype(np.float32)).tolist() == expected


def test_requantiser_of_many_blocks_and_channels_that_do_not_divide_them() -> None:
    rng = np.random.default_rng(0)
    sums = rng.integers(-(2**20), 2**20, (7000, 7)).astype(np.float32)
    multiplier, exponent = quantize_multiplier(rng.uniform(1e-5, 1e-3, 7))
    scaled = multiply_by_quantized_multiplier(sums.astype(np.int32), multiplier, exponent)
    assert np.array_equal(Requantiser(multiplier, exponent, 9)(sums), np.clip(scaled + 9, -128, 127))


def test_requantiser_of_nothing() -> None:
    assert Requantiser(np.int32(2**30), np.int32(0), 0)(np.zeros((0, 3), np.float32)).shape == (0, 3)


@given(st.floats(2.0**-32, 2.0**31, exclude_max=True))
def test_multiplier_is_the_nearest_of_31_bits(real: float) -> None:
    multiplier, exponent = plain.multiplier_of(real)
    if exponent > 31:
        with pytest.raises(SimulationError):
            quantize_multiplier(real)
        return
    found = quantize_multiplier(real)
    assert (int(found[0]), int(found[1])) == (multiplier, exponent)


def test_multiplier_that_rounds_up_to_the_next_power_of_two() -> None:
    multiplier, exponent = quantize_multiplier(np.array([1 - 2.0**-40, 0.5, 1.0]))
    assert multiplier.tolist() == [2**30, 2**30, 2**30]
    assert exponent.tolist() == [1, 0, 1]


@pytest.mark.parametrize("real", [0.0, -0.5, math.inf, math.nan, 2.0**-33, 2.0**31])
def test_a_ratio_without_a_multiplier_is_refused(real: float) -> None:
    with pytest.raises(SimulationError, match=r"conv1: the ratio of scales .* cannot be represented"):
        quantize_multiplier(np.array([0.5, real]), "conv1")


@given(st.one_of(FLOAT32, st.integers(-(2**24), 2**24).map(lambda n: n / 2)))
def test_rounding_of_float32_takes_halves_away_from_zero(value: float) -> None:
    magnitude = int(abs(Fraction(value)) + Fraction(1, 2))
    found = round_half_away(np.float32(value))
    assert found.dtype == np.float32
    assert float(found) == math.copysign(magnitude, value)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rounding_next_to_a_half(dtype: type) -> None:
    below = np.nextafter(dtype(0.5), dtype(0))
    large = dtype(2.0) ** (np.finfo(dtype).nmant) - dtype(0.5)
    x = np.array([below, -below, 0.5, -0.5, 1.5, 2.5, large, -large, np.inf, -np.inf], dtype)
    expected = [0, 0, 1, -1, 2, 3, large + dtype(0.5), -(large + dtype(0.5)), np.inf, -np.inf]
    assert round_half_away(x).tolist() == [float(value) for value in expected]


def nearest_float32(exact: Fraction) -> float:
    """The float32 nearest to `exact`, of two the even one."""
    guess = np.float32(float(exact))
    candidates = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    finite = [value for value in candidates if np.isfinite(value)]
    return float(min(finite, key=lambda v: (abs(Fraction(float(v)) - exact), int(v.view(np.uint32)) & 1)))


SMALL = st.floats(-(2.0**60), 2.0**60, width=32)


@settings(max_examples=500)
@given(SMALL, SMALL, SMALL)
def test_fma_rounds_once(a: float, b: float, c: float) -> None:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    assert float(fma_float32(a, b, c)) == nearest_float32(exact)


@given(st.integers(2**23, 2**24 - 1), st.integers(-40, 40), st.integers(1, 22), st.sampled_from([1, -1]))
def test_fma_rounds_once_just_beside_a_half(mantissa: int, exponent: int, bits: int, sign: int) -> None:
    """A sum half an ulp away from a float32 but for 2^-2·bits of that half: float64 cannot tell it from the half."""
    c = math.ldexp(mantissa, exponent)
    half = math.ldexp(sign, exponent - 1)
    a, b = half * (1 + 2.0**-bits), 1 - 2.0**-bits
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    assert float(fma_float32(a, b, c)) == nearest_float32(exact)


def test_fma_broadcasts_and_keeps_infinities() -> None:
    found = fma_float32(np.array([[1.0, np.inf], [3e38, -2.0]], np.float32), np.float32(2), np.float32(1))
    assert found.dtype == np.float32
    assert found.tolist() == [[3.0, np.inf], [np.inf, -3.0]]
    assert fma_float32(2.0, 3.0, 4.0).shape == ()


def test_bounds_of_activations() -> None:
    assert activation_bounds(ActivationType.NONE, 0.1, -5) == (-128, 127)
    assert activation_bounds(ActivationType.RELU, 0.1, -5) == (-5, 127)
    assert activation_bounds(ActivationType.RELU6, 0.1, -5) == (-5, 55)
    assert activation_bounds(ActivationType.RELU6, 0.01, -5) == (-5, 127)


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20))
def test_reciprocal_is_close(values: list[int]) -> None:
    exact = [Fraction(2**62, 2**31 + value) for value in values]
    found = reciprocal(np.array(values, np.int64)).tolist()
    assert all(abs(one - other) < 8 for one, other in zip(found, exact))


def test_left_shift_saturates() -> None:
    x = int32([1, -1, 2**30, -(2**30) - 1])
    assert saturating_left_shift(x, 1).tolist() == [2, -2, 2**31 - 1, -(2**31)]
