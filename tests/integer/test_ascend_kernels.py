from __future__ import annotations

import itertools
import struct
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msqkd.errors import SimulationError
from msqkd.integer.ascend import conv2d, dense, dequant, pack_scale, quant, unpack_scale
from msqkd.integer.registry import Call, Operand

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
SCALES = st.floats(2.0**-14, 65504.0, width=32)
INT32 = st.integers(-(2**31), 2**31 - 1)


def run(kernel: Any, attrs: dict[str, Any], *arrays: Any) -> np.ndarray:
    (result,) = kernel(Call(attrs, [Operand(np.asarray(array)) for array in arrays], name="layer"))
    return result


def quantised(x: Any, scale: float = 1.0, offset: float = 0.0, **attrs: Any) -> list[int]:
    result = run(quant, {"scale": scale, "offset": offset, **attrs}, np.asarray(x, np.float32))
    assert result.dtype == np.int8
    return result.tolist()


def as_float32(x: float) -> float:
    """A float64 rounded to float32; products of two float32 are exact in float64, so this rounds them once."""
    with np.errstate(over="ignore"):
        return float(np.float32(x))


def saturated(x: float) -> int:
    """Half to even, of the exact value."""
    if abs(x) > 1000:
        return 127 if x > 0 else -128
    return max(-128, min(127, round(Fraction(x))))


@given(st.lists(FINITE, min_size=1, max_size=20), SCALES)
def test_quant_is_the_rounded_product(x: list[float], scale: float) -> None:
    assert quantised(x, scale) == [saturated(as_float32(value * scale)) for value in x]


@given(st.lists(st.integers(-255, 255), min_size=20, max_size=40), SCALES)
def test_quant_rounds_the_product_to_float32_before_it_rounds_to_integers(halves: list[int], scale: float) -> None:
    near_ties = np.float32(np.asarray(halves) / 2 / scale).tolist()
    assert quantised(near_ties, scale) == [saturated(as_float32(value * scale)) for value in near_ties]


@given(st.lists(st.integers(-300, 300), min_size=1, max_size=20), st.sampled_from([0.25, 0.5, 1.0, 2.0]))
def test_quant_of_ties_is_half_to_even(halves: list[int], scale: float) -> None:
    x = [half / 2 / scale for half in halves]
    assert quantised(x, scale) == [max(-128, min(127, round(Fraction(half, 2)))) for half in halves]


def test_quant_at_its_ends() -> None:
    assert quantised([0.5, 1.5, 2.5, -0.5, -1.5, -2.5]) == [0, 2, 2, 0, -2, -2]
    assert quantised([np.inf, -np.inf, 3e38, -3e38, 127.5, -128.5, -0.0], 2.0) == [127, -128, 127, -128, 127, -128, 0]
    with pytest.raises(SimulationError, match=r"^layer: 1 of 3 values are NaN$"):
        quantised([0.0, np.nan, 1.0])


def test_quant_attributes() -> None:
    x = [1.2, -1.2, 1.7, -1.7]
    assert quantised(x, round_mode="Floor") == [1, -2, 1, -2]
    assert quantised(x, round_mode="Ceil") == [2, -1, 2, -1]
    assert quantised(x, round_mode="Trunc") == [1, -1, 1, -1]
    assert quantised(x, 2.0, sqrt_mode=True) == [5, -5, 7, -7]
    assert quantised(x, offset=10.0) == [11, 9, 12, 8]
    with pytest.raises(SimulationError, match=r"round_mode is 'Rount'; allowed: Round.*did you mean 'Round'"):
        quantised(x, round_mode="Rount")


def test_quant_reads_float16() -> None:
    x = np.asarray([1.5, -2.5], np.float16)
    assert run(quant, {"scale": 1.0, "offset": 0.0}, x).tolist() == [2, -2]


def plain_convolution(
    x: np.ndarray, w: np.ndarray, bias: Any, stride: Any, dilation: Any, pads: Any, group: int
) -> np.ndarray:
    """By the definition, in Python integers."""
    top, bottom, left, right = pads
    n, _, height, width = x.shape
    out_channels, depth, kh, kw = w.shape
    rows = (height + top + bottom - (kh - 1) * dilation[0] - 1) // stride[0] + 1
    columns = (width + left + right - (kw - 1) * dilation[1] - 1) // stride[1] + 1
    y = np.zeros((n, out_channels, rows, columns), np.int64)
    for b, o, r, c in itertools.product(range(n), range(out_channels), range(rows), range(columns)):
        total = int(bias[o]) if bias is not None else 0
        first = (o // (out_channels // group)) * depth
        for i, a, e in itertools.product(range(depth), range(kh), range(kw)):
            row, column = r * stride[0] + a * dilation[0] - top, c * stride[1] + e * dilation[1] - left
            if 0 <= row < height and 0 <= column < width:
                total += int(x[b, first + i, row, column]) * int(w[o, i, a, e])
        y[b, o, r, c] = total
    return y


SMALL = st.integers(1, 3)


@settings(max_examples=60)
@given(st.data())
def test_convolution_by_its_definition(data: st.DataObject) -> None:
    group, depth, per_group = (data.draw(SMALL) for _ in range(3))
    kernel, stride, dilation = (data.draw(st.tuples(SMALL, SMALL)) for _ in range(3))
    pads = data.draw(st.tuples(*[st.integers(0, 2)] * 4))
    spans = [(size - 1) * step + 1 for size, step in zip(kernel, dilation)]
    height, width = (span + data.draw(st.integers(0, 3)) for span in spans)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    x = rng.integers(-128, 128, (2, group * depth, height, width), np.int8)
    w = rng.integers(-128, 128, (group * per_group, depth, *kernel), np.int8)
    bias = rng.integers(-(2**20), 2**20, group * per_group, np.int32) if data.draw(st.booleans()) else None
    attrs = {"stride": (1, 1, *stride), "dilation": (1, 1, *dilation), "pad_list": pads, "group": group}
    found = run(conv2d, attrs, x, w, *([] if bias is None else [bias]))
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, plain_convolution(x, w, bias, stride, dilation, pads, group))


@pytest.mark.parametrize("depth", [1024, 1041, 5001])
def test_sums_beyond_the_significand_of_float32_are_exact(depth: int) -> None:
    x = np.full((1, depth, 1, 1), 127, np.int8)
    w = np.full((2, depth, 1, 1), 127, np.int8)
    w[1] = -127
    found = run(conv2d, {}, x, w, np.asarray([1, -2], np.int32))
    assert found.ravel().tolist() == [127 * 127 * depth + 1, -127 * 127 * depth - 2]


def test_a_batch_is_computed_in_parts_like_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, w = rng.integers(-128, 128, (5, 4, 6, 6), np.int8), rng.integers(-128, 128, (3, 4, 3, 3), np.int8)
    whole = run(conv2d, {}, x, w)
    monkeypatch.setattr("msqkd.integer.ascend._COLUMNS", 2 * 4 * 16 * 9)
    np.testing.assert_array_equal(run(conv2d, {}, x, w), whole)


@given(st.integers(0, 2**32), st.integers(1, 40))
def test_a_dense_layer_is_a_pointwise_convolution(seed: int, depth: int) -> None:
    rng = np.random.default_rng(seed)
    x, w = rng.integers(-128, 128, (3, depth), np.int8), rng.integers(-128, 128, (4, depth), np.int8)
    bias = rng.integers(-1000, 1000, 4, np.int32)
    found = run(dense, {}, x, w, bias)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, x.astype(np.int64) @ w.T.astype(np.int64) + bias)
    np.testing.assert_array_equal(found, run(conv2d, {}, x[:, :, None, None], w[:, :, None, None], bias)[:, :, 0, 0])


def test_a_sum_that_does_not_fit_is_refused() -> None:
    one = np.ones((1, 1), np.int8)
    assert run(dense, {}, one, -one, np.asarray([-(2**31) + 1], np.int32)).item() == -(2**31)
    with pytest.raises(SimulationError, match=r"^layer: a sum of 2147483648 does not fit 32 bits$"):
        run(dense, {}, one, one, np.asarray([2**31 - 1], np.int32))


@given(st.lists(INT32, min_size=1, max_size=20), st.floats(2.0**-100, 2.0**20, width=32), st.booleans())
def test_dequant_is_a_float32_product(sums: list[int], scale: float, relu: bool) -> None:
    attrs = {"relu_flag": relu, "dtype": "float32"}
    found = run(dequant, attrs, np.asarray([sums], np.int32), pack_scale(np.float32([scale])))
    assert found.dtype == np.float32
    expected = [as_float32(as_float32(total) * scale) for total in sums]
    assert found[0].tolist() == [max(value, 0.0) if relu else value for value in expected]


@given(st.lists(INT32, min_size=1, max_size=20), st.floats(2.0**-40, 1.0, width=32))
def test_dequant_to_float16_rounds_once_more(sums: list[int], scale: float) -> None:
    sums_array, packed = np.asarray([sums], np.int32), pack_scale(np.float32([scale]))
    found = run(dequant, {"dtype": "float16"}, sums_array, packed)
    single = run(dequant, {"dtype": "float32"}, sums_array, packed)
    assert found.dtype == np.float16
    for half, value in zip(found[0].tolist(), single[0].tolist()):
        try:
            assert half == struct.unpack("<e", struct.pack("<e", value))[0]
        except OverflowError:
            assert np.isinf(half)


def test_dequant_scales_by_channel() -> None:
    sums = np.arange(12, dtype=np.int32).reshape(1, 3, 2, 2)
    found = run(dequant, {"dtype": "float32"}, sums, pack_scale(np.float32([1, 0.5, 0.25])))
    np.testing.assert_array_equal(found[0, :, 0, 0], np.float32([0, 2, 2]))
    doubled = run(dequant, {"dtype": "float32", "sqrt_mode": True}, sums, pack_scale(np.float32([2])))
    np.testing.assert_array_equal(doubled, sums * np.float32(4))


def test_dequant_refuses_what_the_contract_does_not_know() -> None:
    sums = np.ones((1, 1), np.int32)
    with pytest.raises(SimulationError, match="bits above the lower 32"):
        run(dequant, {"dtype": "float32"}, sums, np.asarray([1 << 46], np.uint64))
    with pytest.raises(SimulationError, match="dtype is 'float64'; allowed: float32, float16"):
        run(dequant, {"dtype": "float64"}, sums, pack_scale(np.float32([1])))


@given(st.lists(st.floats(width=32, min_value=2.0**-126, allow_infinity=False), min_size=1, max_size=8))
def test_scales_are_the_bits_of_float32(scales: list[float]) -> None:
    packed = pack_scale(np.float32(scales))
    assert packed.dtype == np.uint64
    assert packed.tolist() == [struct.unpack("<I", struct.pack("<f", scale))[0] for scale in scales]
    assert unpack_scale(packed).tolist() == scales
