from __future__ import annotations

import numpy as np
import pytest

from msqkd.analysis.statistics import Distribution, channel_axis
from msqkd.errors import PlanError
from msqkd.quant.qparams import activation_qparams

RNG = np.random.default_rng(0)


def streamed(x: np.ndarray, axis: int = 1, parts: int = 4) -> Distribution:
    found = Distribution(axis)
    for part in np.array_split(x, parts):
        found.update(part)
    return found


def test_moments_and_percentiles_are_those_of_all_values_at_once() -> None:
    x = RNG.normal(0.5, 2.0, (64, 5, 6, 6)).astype(np.float32)
    x[3, 2, 1, 1] = 60.0
    found = streamed(x)
    exact = x.astype(np.float64)
    assert found.count == x.size
    assert found.mean == pytest.approx(exact.mean(), rel=1e-6)
    assert found.std == pytest.approx(exact.std(), rel=1e-6)
    assert found.power == pytest.approx(np.square(exact).mean(), rel=1e-6)
    centred = exact - exact.mean()
    assert found.kurtosis == pytest.approx((centred**4).mean() / (centred**2).mean() ** 2, rel=1e-2)
    for percent in (50.0, 99.0, 99.9):
        assert found.percentile(percent) == pytest.approx(np.percentile(np.abs(exact), percent), abs=0.03)
    assert found.over_percentile(99.9) == pytest.approx(60 / np.percentile(np.abs(exact), 99.9), rel=0.02)


def test_zeros_of_a_relu_count_in_the_percentiles() -> None:
    x = np.zeros((100, 10), np.float32)
    x[:, 0] = np.linspace(1, 2, 100)
    found = streamed(x)
    assert found.percentile(89.0) == 0.0
    assert found.percentile(95.0) == pytest.approx(1.5, abs=0.02)
    assert found.to_dict()["zeros"] == pytest.approx(0.9)


def test_dead_channels_and_channels_with_outliers_are_found_by_number() -> None:
    x = RNG.uniform(0, 1, (8, 6, 4, 4)).astype(np.float32)
    x[:, 1] = 0.0
    x[:, 4] = -3.0
    x[5, 2, 0, 0] = 30.0
    found = streamed(x)
    assert found.dead_channels() == [1, 4]
    assert found.outlier_channels() == [2]
    assert found.lows == pytest.approx(x.min((0, 2, 3)))
    assert found.highs == pytest.approx(x.max((0, 2, 3)))


def test_the_spread_of_the_channels_leaves_out_those_of_zeros() -> None:
    w = np.ones((3, 4), np.float32) * np.array([[1.0], [0.0], [0.01]], np.float32)
    found = Distribution(0)
    found.update(w)
    assert found.channel_spread() == pytest.approx(100)
    alone = Distribution(None)
    alone.update(w)
    assert (alone.channel_spread(), alone.dead_channels()) == (None, [])


@pytest.mark.parametrize(("low", "high"), [(-8.0, 8.0), (-1.0, 1.5)])
def test_the_noise_of_a_quantiser_is_read_off_the_histogram(low: float, high: float) -> None:
    x = RNG.normal(0, 1, (100, 4, 8, 8)).astype(np.float32)
    x[0, 0, 0, 0] = 40.0
    qparams = activation_qparams(low, high)
    exact = np.square(x.astype(np.float64) - qparams.fake_quantize(x)).mean()
    assert streamed(x).noise(qparams) == pytest.approx(exact, rel=0.05)


def test_what_lies_outside_a_range_is_a_share() -> None:
    x = np.arange(1000, dtype=np.float32)[:, None]
    assert streamed(x).share_outside(0.0, 899.5) == pytest.approx(0.1, abs=0.002)


def test_the_histogram_for_people_has_few_bins_and_all_values() -> None:
    x = np.maximum(RNG.normal(0, 1, (500, 3)), 0).astype(np.float32)
    edges, counts = streamed(x).coarse_histogram()
    exact, _ = np.histogram(x, edges)
    assert (len(edges), counts.sum()) == (65, x.size)
    assert np.abs(counts - exact).max() <= 0.02 * x.size
    assert counts[0] >= (x == 0).sum()


def test_values_that_are_all_the_same_have_no_shape() -> None:
    found = streamed(np.full((4, 2), 3.0, np.float32), parts=2)
    assert (found.kurtosis, found.std) == (None, 0.0)
    assert found.coarse_histogram()[1].tolist() == [8]


def test_a_value_that_is_not_finite_is_named() -> None:
    with pytest.raises(PlanError, match="value 'conv': 1 of 2"):
        Distribution().update(np.array([1.0, np.nan]), where="value 'conv'")


def test_channels_are_the_second_axis_of_maps_and_the_last_of_tokens() -> None:
    assert [channel_axis(rank) for rank in (1, 2, 3, 4)] == [None, 1, -1, 1]
