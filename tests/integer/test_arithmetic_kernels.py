from __future__ import annotations

from fractions import Fraction
from typing import Any, Callable

import numpy as np
import plain_integers as plain
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plain_integers import call, params

from msqkd.errors import SimulationError
from msqkd.integer.kernels.arithmetic_ops import add, divide, multiply, subtract
from msqkd.integer.kernels.cast import cast
from msqkd.integer.program import ActivationType, TensorQuant
from msqkd.integer.registry import Call

RNG = np.random.default_rng(0)
SCALES = st.floats(1e-4, 1.0)
QUANTS = st.builds(params, SCALES, st.integers(-128, 127))


def int8(*shape: int) -> np.ndarray:
    return RNG.integers(-128, 128, shape, dtype=np.int8)


def plain_sum(a: int, b: int, quants: tuple[TensorQuant, ...], sign: int = 1) -> int:
    (s_a, z_a), (s_b, z_b), (s_y, z_y) = ((float(q.scale[0]), int(q.zero_point[0])) for q in quants)
    widest = 2 * max(s_a, s_b)
    first = plain.scaled((a - z_a) << 20, *plain.multiplier_of(s_a / widest))
    second = plain.scaled((b - z_b) << 20, *plain.multiplier_of(s_b / widest))
    return plain.scaled(first + sign * second, *plain.multiplier_of(widest / (2**20 * s_y))) + z_y


PAIRS = int8(80), int8(80)


@settings(max_examples=40, deadline=None)
@given(st.tuples(QUANTS, QUANTS, QUANTS), st.sampled_from([0, ActivationType.RELU, ActivationType.RELU6]))
def test_sums(quants: tuple[TensorQuant, ...], activation: int) -> None:
    a, b = PAIRS
    bounds = plain.bounds(activation, quants[2])
    expected = [plain.clip(plain_sum(int(p), int(q), quants), *bounds) for p, q in zip(a, b)]
    given_call = call([(a, quants[0]), (b, quants[1])], quants[2], machine="arm64", activation_type=activation)
    assert add(given_call)[0].tolist() == expected


@settings(max_examples=40, deadline=None)
@given(st.tuples(QUANTS, QUANTS, QUANTS))
def test_differences_of_float32_scales(quants: tuple[TensorQuant, ...]) -> None:
    a, b = PAIRS
    rounded = tuple(params(q.scale.astype(np.float32), q.zero_point) for q in quants)
    expected = [plain.clip(plain_sum(int(p), int(q), rounded, -1)) for p, q in zip(a, b)]
    given_call = call([(a, quants[0]), (b, quants[1])], quants[2], activation_type=ActivationType.RELU)
    assert subtract(given_call)[0].tolist() == expected


@settings(max_examples=40, deadline=None)
@given(st.tuples(QUANTS, QUANTS, QUANTS))
def test_products(quants: tuple[TensorQuant, ...]) -> None:
    a, b = PAIRS
    (s_a, z_a), (s_b, z_b), (s_y, z_y) = ((np.float32(q.scale[0]), int(q.zero_point[0])) for q in quants)
    factor = plain.multiplier_of(float(s_a * s_b / s_y))
    expected = [plain.clip(plain.scaled((int(p) - z_a) * (int(q) - z_b), *factor) + z_y) for p, q in zip(a, b)]
    given_call = call([(a, quants[0]), (b, quants[1])], quants[2], activation_type=ActivationType.RELU)
    assert multiply(given_call)[0].tolist() == expected


@settings(max_examples=40, deadline=None)
@given(st.tuples(QUANTS, QUANTS, QUANTS))
def test_quotients_are_the_nearest_but_for_halves(quants: tuple[TensorQuant, ...]) -> None:
    a, b = PAIRS[0], PAIRS[1].copy()
    (s_a, z_a), (s_b, z_b), (s_y, z_y) = ((np.float32(q.scale[0]), int(q.zero_point[0])) for q in quants)
    b[b == z_b] = z_b + 1 if z_b < 127 else z_b - 1
    ratio = s_a / (s_b * s_y)
    assume(ratio < 2**20)
    found = divide(call([(a, quants[0]), (b, quants[1])], quants[2]))[0].tolist()
    for p, q, value in zip(a, b, found):
        exact = Fraction(int(p) - z_a, int(q) - z_b) * Fraction(float(ratio))
        near = {plain.clip(plain.nearest(exact * (1 + Fraction(k, 2**26))) + z_y) for k in (-1, 0, 1)}
        assert value in near


def test_quotients_of_zero_and_of_very_different_numbers() -> None:
    a, b = np.array([3, 4, 5, -128, 127], np.int8), np.array([127, 127, -128, 127, -128], np.int8)
    given_call = call([(a, params(0.011, 4)), (b, params(0.0068, -1))], params(0.13, 7))
    assert divide(given_call)[0].tolist() == [7, 7, 7, 7 - 13, 7 - 12]


def test_division_by_the_zero_point_is_refused() -> None:
    given_call = call([(int8(2), params(0.1)), (np.array([3, 4], np.int8), params(0.1, 4))], params(0.1))
    with pytest.raises(SimulationError, match=r"^step: it divides by 0"):
        divide(given_call)


def test_a_quotient_of_scales_too_far_apart_is_refused() -> None:
    given_call = call([(int8(2), params(1.0)), (np.ones(2, np.int8), params(1e-4))], params(1e-4))
    with pytest.raises(SimulationError, match=r"^step: its scales are too far apart"):
        divide(given_call)


def avx2_scaled(x: int, multiplier: int, exponent: int) -> int:
    """The vector code of x86, whose high product truncates, and whose shift gives one less for negative numbers."""
    nudged = plain.wrap(x << max(exponent, 0)) * multiplier + 2**30
    high = plain.truncated(nudged, 2**31)
    right = max(-exponent, 0)
    mask = (1 << right) - 1
    quotient = ~(abs(high) >> right) if high < 0 else high >> right
    return quotient + int((high & mask) - int(high < 0) > mask >> 1)


def vector_sum(a: int, b: int, quants: tuple[TensorQuant, ...], swapped: bool = False) -> int:
    (s_a, z_a), (s_b, z_b), (s_y, z_y) = ((float(q.scale[0]), int(q.zero_point[0])) for q in quants)
    widest = 2 * max(s_a, s_b)
    factors = [plain.multiplier_of(s_a / widest), plain.multiplier_of(s_b / widest)]
    if swapped:
        factors.reverse()
    total = avx2_scaled((a - z_a) << 20, *factors[0]) + avx2_scaled((b - z_b) << 20, *factors[1])
    return plain.clip(avx2_scaled(total, *plain.multiplier_of(widest / (2**20 * s_y))) + z_y)


def test_x86_adds_sixteen_at_a_time_with_other_halves() -> None:
    """Scales of a power of two apart: every odd sum is a half, and the negative ones differ."""
    quants = params(0.25, 3), params(0.25, -4), params(0.5, 0)
    a, b = np.arange(-40, -5, dtype=np.int8), np.full(35, -4, np.int8)
    inputs = [(a, quants[0]), (b, quants[1])]
    every = [plain_sum(int(p), -4, quants) for p in a]
    vectors = [vector_sum(int(p), -4, quants) for p in a]
    assert vectors != every
    assert add(call(inputs, quants[2], machine="arm64"))[0].tolist() == every
    assert add(call(inputs, quants[2]))[0].tolist() == vectors[:32] + every[32:]


def test_x86_confuses_the_factors_of_a_scalar_that_comes_first() -> None:
    quants = params(0.02, 3), params(0.07, -4), params(0.1, 1)
    scalar, tensor = np.array([100], np.int8), int8(19)
    inputs = [(scalar, quants[0]), (tensor, quants[1])]
    every = [plain.clip(plain_sum(100, int(q), quants)) for q in tensor]
    vectors = [vector_sum(100, int(q), quants, swapped=True) for q in tensor]
    assert add(call(inputs, quants[2], machine="arm64"))[0].tolist() == every
    assert add(call(inputs, quants[2]))[0].tolist() == vectors[:16] + every[16:]
    turned = quants[1], quants[0], quants[2]
    back = [vector_sum(int(q), 100, turned) for q in tensor]
    expected = back[:16] + [plain.clip(plain_sum(int(q), 100, turned)) for q in tensor[16:]]
    assert add(call(inputs[::-1], quants[2]))[0].tolist() == expected


def binary(function: Callable[[Call], list[np.ndarray]], a: np.ndarray, b: np.ndarray, **options: Any) -> np.ndarray:
    quants = params(0.031, 5), params(0.017, -9), params(0.2, 2)
    return function(call([(a, quants[0]), (b, quants[1])], quants[2], machine="arm64", **options))[0]


def element_wise(function: Callable[[Call], list[np.ndarray]], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The right answer: both operands repeated beforehand."""
    a, b = np.broadcast_arrays(a, b)
    return binary(function, a.copy(), b.copy())


FULL = (2, 3, 4, 6)


@pytest.mark.parametrize("function", [add, subtract, multiply])
@pytest.mark.parametrize("shape", [FULL, (6,), (1, 1, 1, 6), (1,), (1, 3, 4, 6), (3, 4, 6), (4, 6)])
@pytest.mark.parametrize("per_sample", [False, True])
def test_broadcasting_without_defect(
    function: Callable[[Call], list[np.ndarray]], shape: tuple[int, ...], per_sample: bool
) -> None:
    a, b = int8(*FULL), int8(*shape)
    assert np.array_equal(binary(function, a, b, per_sample=per_sample), element_wise(function, a, b))
    assert np.array_equal(binary(function, b, a, per_sample=per_sample), element_wise(function, b, a))


@pytest.mark.parametrize("function", [add, multiply])
def test_a_vector_an_item_is_right_only_for_runs_of_one_item(function: Callable[[Call], list[np.ndarray]]) -> None:
    a, b = int8(*FULL), int8(2, 1, 1, 6)
    right = element_wise(function, a, b)
    assert np.array_equal(binary(function, a, b, per_sample=True), right)
    wrong = binary(function, a, b)
    assert np.array_equal(wrong, element_wise(function, a, b[:1]))
    assert not np.array_equal(wrong, right)
    assert np.array_equal(binary(function, b, a), element_wise(function, b[:1], a))


@pytest.mark.parametrize("per_sample", [False, True])
def test_differences_of_a_vector_an_item_are_right(per_sample: bool) -> None:
    a, b = int8(*FULL), int8(2, 1, 1, 6)
    assert np.array_equal(binary(subtract, a, b, per_sample=per_sample), element_wise(subtract, a, b))


def test_a_plane_without_channels_is_multiplied_rightly_and_added_wrongly() -> None:
    a, b = int8(*FULL), int8(2, 3, 4, 1)
    assert np.array_equal(binary(multiply, a, b), element_wise(multiply, a, b))
    assert np.array_equal(binary(add, a, b), element_wise(add, a, b.reshape(-1)[:1]))
    assert np.array_equal(binary(add, a, b, per_sample=True), element_wise(add, a, b[:, :1, :1]))


def test_blocks_of_an_operand_added_from_its_beginning() -> None:
    """The shapes differ last along the rows: every plane of rows gets the first row's values."""
    a, b = int8(*FULL), int8(2, 1, 4, 6)
    assert np.array_equal(binary(add, a, b), element_wise(add, a, b[:1]))
    assert np.array_equal(binary(add, a, b, per_sample=True), element_wise(add, a, b))
    channels = int8(1, 3, 1, 6)
    assert np.array_equal(binary(add, a, channels), element_wise(add, a, channels[:, :1]))


def test_batches_fed_to_a_constant_of_one_item() -> None:
    a, b = int8(1, 3, 4, 6), int8(5, 1, 1, 6)
    assert np.array_equal(binary(add, a, b, per_sample=True), element_wise(add, a, b))


@pytest.mark.parametrize(
    ("function", "shapes", "message"),
    [
        (add, ((1, 3, 1, 6), (1, 1, 4, 6)), "wrongly; allowed: one operand of the result's shape"),
        (multiply, ((1, 3, 1, 6), (1, 1, 3, 6)), "does not broadcast"),
        (subtract, ((1, 3, 1, 6), (1, 1, 3, 6)), "does not broadcast"),
        (divide, ((2, 3), (3, 3)), "cannot be broadcast"),
    ],
)
def test_shapes_the_runtime_mistakes_are_refused(
    function: Callable[[Call], list[np.ndarray]], shapes: tuple[tuple[int, ...], ...], message: str
) -> None:
    with pytest.raises(SimulationError, match=r"^step: .*" + message):
        binary(function, int8(*shapes[0]), int8(*shapes[1]))


def test_another_fused_activation_is_refused() -> None:
    with pytest.raises(SimulationError, match=r"^step: its activation_type is 2"):
        binary(add, int8(3), int8(3), activation_type=ActivationType.SIGMOID)


def quantised(x: np.ndarray, quant: TensorQuant, **options: Any) -> np.ndarray:
    return cast(call([(x, None)], quant, **options))[0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=15), SCALES, st.integers(-128, 127))
def test_cast_to_int8_rounds_once_and_then_to_the_nearest(values: list[float], scale: float, zero_point: int) -> None:
    inverse = Fraction(float(np.float32(1) / np.float32(scale)))
    found = quantised(np.array(values, np.float32), params(scale, zero_point), src_t=43, dst_t=32)
    for value, one in zip(values, found.tolist()):
        exact = Fraction(value) * inverse + zero_point
        once = Fraction(float(np.float32(float(exact))))
        assert one == plain.clip(plain.nearest(once))


def test_cast_of_what_leaves_int32_depends_on_the_machine() -> None:
    x = np.array([1e30, -1e30, np.inf, -np.inf, np.nan, 3e38, 2.0**31, 2.0**30] + [0.0] * 8, np.float32)
    quant = params(0.5, 0)
    assert quantised(x, quant)[:8].tolist() == [-128, -128, 127, -128, -128, -128, -128, -128]
    assert quantised(x, quant, machine="arm64")[:8].tolist() == [127, -128, 127, -128, 0, 127, 127, 127]


def test_arm64_rounds_twice_in_what_is_left_over_of_sixteen() -> None:
    quant, value = params(0.03, 100), np.float32(-2.8349998)
    x = np.full((2, 18), value)
    exact = Fraction(float(value)) * Fraction(float(np.float32(1) / np.float32(0.03))) + 100
    assert plain.nearest(exact) == 5  # 5.5 but for 10^-6
    assert quantised(x, quant).tolist() == [[5] * 18] * 2
    assert quantised(x, quant, machine="arm64").reshape(-1).tolist() == [5] * 32 + [6] * 4
    assert quantised(x, quant, machine="arm64", per_sample=True).tolist() == [[5] * 16 + [6] * 2] * 2


def test_cast_to_float_and_between_parameters() -> None:
    q = np.arange(-128, 128, dtype=np.int8)
    real = cast(call([(q, params(0.3, 7))], None, "float32", src_t=32, dst_t=43))[0]
    assert real.dtype == np.float32
    assert np.array_equal(real, (q.astype(np.float32) - 7) * np.float32(0.3))
    there = cast(call([(q, params(0.3, 7))], params(0.6, -3)))[0]
    assert np.array_equal(there, quantised(real, params(0.6, -3)))


@pytest.mark.parametrize(
    ("x", "attrs", "message"),
    [
        (np.zeros(3, np.int8), {"src_t": 43}, r"src_t is 43 and the tensor int8; allowed: 32 \(int8\), 43 \(float32\)"),
        (np.zeros(3, np.float32), {"dst_t": 37}, "dst_t is 37 and the tensor int8"),
        (np.zeros(3, np.int32), {}, "the tensor int32"),
    ],
)
def test_other_casts_are_refused(x: np.ndarray, attrs: dict[str, int], message: str) -> None:
    with pytest.raises(SimulationError, match=r"^step: .*" + message):
        cast(call([(x, params(0.1))], params(0.1), **attrs))


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_casts_without_parameters_are_refused(dtype: str) -> None:
    x = np.zeros(3, np.float32 if dtype == "int8" else np.int8)
    with pytest.raises(SimulationError, match=r"^step: (in|out)put 0 has no quantisation parameters"):
        cast(call([(x, None)], None, dtype))
