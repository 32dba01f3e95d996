from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from msqkd.errors import PlanError
from msqkd.quant.qparams import (
    EMPTY_SCALE,
    RANGE_LIMIT,
    SCALE_FLOOR,
    QParams,
    activation_qparams,
    quant_limits,
    weight_clip_ratio,
    weight_qparams,
)

relaxed = settings(deadline=None)  # a busy machine is no failure
BITS = st.integers(2, 8)
ENDS = st.floats(-(2.0**120), 2.0**120, allow_nan=False)
UNIT = hnp.arrays(np.float32, st.integers(1, 64), elements=st.floats(-1, 2, width=32))
WEIGHTS = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=5), elements=st.floats(-100, 100, width=32)
)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[float, float]:
    return tuple(sorted((draw(ENDS), draw(ENDS))))


def squared_error(x: np.ndarray, qparams: QParams) -> float:
    return float(np.mean((qparams.fake_quantize(x).astype(np.float64) - x) ** 2))


@pytest.mark.parametrize(("bits", "full", "narrow"), [(8, (-128, 127), (-127, 127)), (2, (-2, 1), (-1, 1))])
def test_limits(bits, full, narrow):
    assert quant_limits(bits) == full
    assert quant_limits(bits, narrow=True) == narrow


@pytest.mark.parametrize("bits", [1, 9, 0, -8, 4.0, True, "8", None])
def test_limits_refuse_other_bits(bits):
    with pytest.raises(PlanError, match="from 2 to 8"):
        quant_limits(bits)


@relaxed
@given(ranges(), BITS, st.booleans())
def test_activation_parameters_are_well_formed(ends, bits, symmetric):
    q = activation_qparams(*ends, bits, symmetric)
    assert (q.qmin, q.qmax) == quant_limits(bits)
    assert q.scale.dtype == np.float32
    assert q.scale.shape == ()
    assert q.scale >= np.float32(SCALE_FLOOR)
    assert np.isfinite(np.float32(1) / q.scale)
    assert float(q.scale) ** 2 >= np.finfo(np.float32).tiny  # the scale of a bias is a normal number
    assert q.zero_point.dtype == np.int32
    assert q.qmin <= q.zero_point <= q.qmax
    assert q.fake_quantize(np.float32(0)) == 0
    assert q.quantize(np.float32(0)) == q.zero_point
    if symmetric:
        assert q.zero_point == 0


@relaxed
@given(ranges(), BITS, st.booleans(), UNIT)
def test_error_is_at_most_half_a_step_within_the_range(ends, bits, symmetric, unit):
    lo, hi = min(ends[0], 0.0), max(ends[1], 0.0)
    q = activation_qparams(lo, hi, bits, symmetric)
    x = (lo + np.clip(unit, 0, 1).astype(np.float64) * (hi - lo)).astype(np.float32)
    x = np.concatenate([x, np.array([lo, hi], np.float32)])
    assert (np.abs(q.fake_quantize(x).astype(np.float64) - x) <= 0.5001 * float(q.scale)).all()


@relaxed
@given(ranges(), BITS, st.booleans(), UNIT)
def test_fake_quantisation_is_idempotent_monotone_and_bounded(ends, bits, symmetric, unit):
    q = activation_qparams(*ends, bits, symmetric)
    x = np.sort((ends[0] + unit.astype(np.float64) * (ends[1] - ends[0])).astype(np.float32))  # also far outside
    y = q.fake_quantize(x)
    assert np.array_equal(q.fake_quantize(y), y)
    assert (np.diff(y) >= 0).all()
    assert y.min() >= q.lo
    assert y.max() <= q.hi


@relaxed
@given(ranges(), BITS, st.booleans(), UNIT)
def test_fake_quantisation_is_quantise_then_dequantise(ends, bits, symmetric, unit):
    q = activation_qparams(*ends, bits, symmetric)
    x = (unit * np.float32(max(abs(ends[0]), abs(ends[1])))).astype(np.float32)
    integers = q.quantize(x)
    assert integers.dtype == np.int32
    assert integers.min() >= q.qmin
    assert integers.max() <= q.qmax
    again = q.dequantize(integers)
    assert again.dtype == np.float32
    assert np.array_equal(again, q.fake_quantize(x))
    assert not np.signbit(q.fake_quantize(x)[q.fake_quantize(x) == 0]).any()
    assert np.array_equal(q.quantize(again), integers)


def test_known_parameters():
    q = activation_qparams(-1.0, 3.0)
    assert float(q.scale) == pytest.approx(4 / 255)
    assert int(q.zero_point) == -64  # -128 + 63.75
    q = activation_qparams(-1.0, 3.0, symmetric=True)
    assert float(q.scale) == pytest.approx(3 / 127)
    q = weight_qparams(np.array([-3.0, 1.0], np.float32), bits=4)
    assert float(q.scale) == pytest.approx(3 / 7)
    assert (q.qmin, q.qmax) == (-7, 7)


@pytest.mark.parametrize(("lo", "hi", "zero_point"), [(2.0, 5.1, -128), (-5.1, -2.0, 127)])
def test_range_is_widened_to_include_zero(lo, hi, zero_point):
    q = activation_qparams(lo, hi)
    assert float(q.scale) == pytest.approx(0.02)
    assert int(q.zero_point) == zero_point


def test_rounding_is_half_to_even_and_saturates():
    q = QParams(np.float32(1), np.int32(3), -128, 127)
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 1e9, -np.inf], np.float32)
    assert q.quantize(x).tolist() == [3, 5, 5, 3, 1, 127, -128]
    assert q.fake_quantize(x).tolist() == [0, 2, 2, 0, -2, 124, -131]


def test_largest_float_saturates_silently_with_the_smallest_scale():
    q = activation_qparams(0.0, 1e-30)
    assert float(q.scale) == SCALE_FLOOR
    with np.errstate(all="raise"):
        assert q.quantize(np.float32(3e38)) == 127


def test_nan_is_refused_as_integer_and_kept_as_float():
    q = activation_qparams(-1, 1)
    x = np.array([np.nan, 0.5], np.float32)
    with pytest.raises(PlanError, match="1 of 2 values are NaN"):
        q.quantize(x)
    assert np.isnan(q.fake_quantize(x)).tolist() == [True, False]


def test_range_of_nothing_but_zero_has_an_ordinary_scale():
    assert float(activation_qparams(0.0, 0.0).scale) == EMPTY_SCALE
    q = weight_qparams(np.array([[0, 0], [1, -2]], np.float32), axis=0)
    assert q.scale[0] == EMPTY_SCALE
    assert not q.fake_quantize(np.array([[0, 0], [1, -2]], np.float32))[0].any()


@pytest.mark.parametrize(
    ("lo", "hi", "found"),
    [(np.nan, 1, "not finite"), (0, np.inf, "not finite"), (2, 1, "upside down"), (0, RANGE_LIMIT * 2, "too wide")],
)
def test_impossible_ranges_name_the_place(lo, hi, found):
    with pytest.raises(PlanError, match=f"^layer1/relu: .*{found}"):
        activation_qparams(lo, hi, where="layer1/relu")


@relaxed
@given(WEIGHTS, BITS, st.data())
def test_per_channel_is_per_tensor_of_each_channel(w, bits, data):
    axis = data.draw(st.integers(-w.ndim, w.ndim - 1))
    q = weight_qparams(w, bits, axis)
    ratios = weight_clip_ratio(w, bits, axis)
    assert q.scale.shape == q.zero_point.shape == ratios.shape == (w.shape[axis],)
    assert not q.zero_point.any()
    whole = q.fake_quantize(w)
    for c in range(w.shape[axis]):
        channel = np.take(w, c, axis)
        alone = weight_qparams(channel, bits)
        assert alone.scale == q.scale[c]
        assert alone.scale > 0
        assert np.array_equal(np.take(whole, c, axis), alone.fake_quantize(channel))
        assert weight_clip_ratio(channel, bits) == ratios[c]


@relaxed
@given(WEIGHTS, BITS)
def test_weight_error_is_at_most_half_a_step_and_the_largest_is_kept(w, bits):
    q = weight_qparams(w, bits)
    assert (np.abs(q.fake_quantize(w) - w) <= 0.5001 * q.scale).all()
    if np.abs(w).max() >= q.qmax * SCALE_FLOOR:
        assert np.abs(q.quantize(w)).max() == q.qmax


@settings(relaxed, max_examples=25)
@given(st.integers(0, 1000), BITS)
def test_clip_ratio_minimises_the_error(seed, bits):
    w = np.random.default_rng(seed).standard_t(4, size=(3, 40)).astype(np.float32) * np.float32(10.0 ** (seed % 9 - 4))
    ratio = weight_clip_ratio(w, bits)
    assert ratio.dtype == np.float32
    assert ratio.shape == ()
    best = squared_error(w, weight_qparams(w, bits, clip_ratio=ratio))
    others = [squared_error(w, weight_qparams(w, bits, clip_ratio=r)) for r in np.arange(100, 29, -1) / 100]
    assert best <= min(others) * 1.0001


def test_clip_ratio_depends_on_tails():
    rng = np.random.default_rng(0)
    flat, tailed = rng.uniform(-1, 1, 4000), rng.laplace(size=4000)
    ratios = weight_clip_ratio(np.stack([flat, tailed, np.zeros(4000)]).astype(np.float32), 4, axis=0)
    assert ratios[0] > 0.9
    assert ratios[1] < 0.8
    assert ratios[2] == 1


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e30])
def test_extreme_weights(size):
    w = (np.linspace(-1, 1, 9) * size).astype(np.float32)
    q = weight_qparams(w)
    assert np.isfinite(q.scale)
    assert q.scale >= np.float32(SCALE_FLOOR)
    assert 0.3 <= weight_clip_ratio(w, 8) <= 1


def test_minimal_scale():
    w = np.array([[1e-9, 0], [1, 2]], np.float32)
    q = weight_qparams(w, axis=0, min_scale=np.array([1e-4, 1e-4]))
    assert q.scale.tolist() == pytest.approx([1e-4, 2 / 127])


def test_bad_weights_name_the_place():
    w = np.ones((4, 3), np.float32)
    with pytest.raises(PlanError, match=r"^conv1\.weight: the shape \(4, 3\) has no axis 2"):
        weight_qparams(w, axis=2, where="conv1.weight")
    with pytest.raises(PlanError, match=r"conv1: 1 of 12 values are not finite"):
        weight_qparams(np.where(np.arange(12).reshape(4, 3) == 5, np.nan, w), where="conv1")
    with pytest.raises(PlanError, match="holds no values"):
        weight_clip_ratio(np.zeros((0, 3), np.float32), 8, axis=0)
    with pytest.raises(PlanError, match=r"clip ratio 1\.5"):
        weight_qparams(w, clip_ratio=1.5)
    with pytest.raises(PlanError, match=r"a clip ratio of shape \(2,\) does not fit 4 channels"):
        weight_qparams(w, axis=0, clip_ratio=np.array([1.0, 0.5]))
    with pytest.raises(PlanError, match="a minimal scale of shape"):
        weight_qparams(w, axis=0, min_scale=np.ones((4, 1)))
    with pytest.raises(PlanError, match="too large"):
        weight_qparams(w * np.float32(3e38))


def test_parameters_are_checked_and_read_only():
    with pytest.raises(PlanError, match=r"0\.0 is not positive"):
        QParams(np.array([1.0, 0.0]), np.zeros(2), -127, 127, axis=0)
    with pytest.raises(PlanError, match=r"200 is outside \[-128, 127\]"):
        QParams(np.float32(1), np.int32(200), -128, 127)
    with pytest.raises(PlanError, match="needs a single scale"):
        QParams(np.ones(3), np.zeros(3), -128, 127)
    with pytest.raises(PlanError, match="zero_point: the shape"):
        QParams(np.ones(3), np.zeros(2), -128, 127, axis=0)
    q = weight_qparams(np.ones((4, 3), np.float32), axis=0)
    with pytest.raises(ValueError, match="read-only"):
        q.scale[0] = 2
    with pytest.raises(PlanError, match="3 channels along axis 0, but there are 4 scales"):
        q.fake_quantize(np.ones((3, 4)))
