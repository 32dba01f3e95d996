from __future__ import annotations

import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from msqkd.errors import PlanError
from msqkd.quant.observers import OBSERVERS, HistogramObserver, Observer, make_observer
from msqkd.quant.observers.histogram import BINS
from msqkd.quant.qparams import activation_qparams

NAMES = ["minmax", "ema", "percentile", "kl", "mse"]
HISTOGRAMS = ["percentile", "kl", "mse"]
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)
BATCHES = st.lists(hnp.arrays(np.float32, st.integers(1, 20), elements=FLOATS), min_size=1, max_size=6)


def observed(name: str, *batches: np.ndarray, **options: float) -> Observer:
    observer = make_observer(name, **options)
    for batch in batches:
        observer.update(batch)
    return observer


def normal(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def squared_error(x: np.ndarray, ends: tuple[float, float], bits: int = 8, symmetric: bool = False) -> float:
    y = activation_qparams(*ends, bits, symmetric).fake_quantize(x)
    return float(np.mean((y.astype(np.float64) - x) ** 2))


# --- every observer -------------------------------------------------------------------------------------------------


def test_registry():
    assert sorted(OBSERVERS) == sorted(NAMES)
    assert all(make_observer(name).name == name for name in NAMES)


def test_unknown_names_and_options_are_refused():
    with pytest.raises(PlanError, match=r"'percentil' is unknown; allowed are ema, .*did you mean 'percentile'\?"):
        make_observer("percentil")
    with pytest.raises(
        PlanError, match=r"observer 'ema': no option 'momentun'; it has momentum; did you mean 'momentum'"
    ):
        make_observer("ema", momentun=0.5)
    with pytest.raises(PlanError, match="observer 'kl': no option 'percentile'; it has none"):
        make_observer("kl", percentile=99)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("percentile", "percentile", 89.9),
        ("percentile", "percentile", 100.1),
        ("percentile", "percentile", "99"),
        ("ema", "momentum", -0.1),
        ("ema", "momentum", True),
        ("ema", "momentum", float("nan")),
    ],
)
def test_option_values_are_checked(name, option, value):
    with pytest.raises(PlanError, match=f"observer '{name}': {option}: .* is not allowed; allowed is a number from"):
        make_observer(name, **{option: value})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_values_that_are_not_finite_are_refused_whole(name, bad):
    observer = observed(name, np.array([1.0, 2.0]))
    before = json.dumps(observer.state(), default=np.ndarray.tolist)
    with pytest.raises(PlanError, match=r"^conv1 output: 1 of 3 values are not finite"):
        observer.update(np.array([5.0, bad, -1.0]), where="conv1 output")
    assert json.dumps(observer.state(), default=np.ndarray.tolist) == before


@pytest.mark.parametrize("name", NAMES)
def test_nothing_seen(name):
    observer = observed(name, np.zeros((0, 3), np.float32))
    with pytest.raises(PlanError, match=f"^relu: the '{name}' observer has seen no values"):
        observer.range(8, False, where="relu")


@pytest.mark.parametrize("name", NAMES)
def test_bits_are_checked(name):
    with pytest.raises(PlanError, match="bits: 16"):
        observed(name, np.ones(3)).range(16, False)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12, deadline=None)
@given(batches=BATCHES, bits=st.integers(2, 8), symmetric=st.booleans())
def test_range_is_within_what_was_seen(name, batches, bits, symmetric):
    lo, hi = observed(name, *batches).range(bits, symmetric)
    everything = np.concatenate(batches)
    assert type(lo) is type(hi) is float
    assert everything.min() <= lo <= hi <= everything.max()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, 3.0, -2.5, 1e-30, -1e30, 1e-45])
def test_all_values_equal(name, value):
    x = np.full((4, 5), value, np.float32)
    assert observed(name, x, x).range(8, False) == (float(x[0, 0]), float(x[0, 0]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("power", [-60, 100])
def test_ranges_scale_with_the_values(name, power):
    x = normal(20000)
    factor = np.float32(2.0**power)
    lo, hi = observed(name, x).range(8, False)
    assert observed(name, x * factor).range(8, False) == pytest.approx((lo * factor, hi * factor), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1e-36, 1e30])
def test_extreme_magnitudes(name, scale):
    x = normal(10000) * np.float32(scale)
    lo, hi = observed(name, x).range(8, True)
    assert x.min() <= lo < 0 < hi <= x.max()


@pytest.mark.parametrize("name", NAMES)
def test_shape_layout_and_dtype_do_not_matter(name):
    x = normal(6 * 7 * 8).reshape(6, 7, 8)
    expected = observed(name, x.ravel()).range(4, False)
    for same in (x, x.transpose(2, 0, 1), np.asfortranarray(x), x.astype(np.float64)):
        assert observed(name, same).range(4, False) == expected


@pytest.mark.parametrize("name", NAMES)
def test_state_round_trip(name):
    x = normal(9000)
    observer = observed(name, x[:5000], np.maximum(x[5000:7000], 0))
    buffer = io.BytesIO()
    np.savez(buffer, **observer.state())
    buffer.seek(0)
    as_json = json.loads(json.dumps(observer.state(), default=np.ndarray.tolist))
    for state in (observer.state(), np.load(buffer), as_json):
        copy = make_observer(name)
        copy.load_state(state)
        copy.update(x[7000:])
        assert copy.count == 9000
        assert copy.range(4, False) == observed(name, x[:5000], np.maximum(x[5000:7000], 0), x[7000:]).range(4, False)


@pytest.mark.parametrize("name", NAMES)
def test_empty_state_round_trip_and_independence(name):
    empty, other = make_observer(name), make_observer(name)
    other.load_state(empty.state())
    other.update(np.array([1.0, 2.0]))
    assert empty.count == 0
    kept = other.state()
    other.update(np.array([-8.0]))
    fresh = make_observer(name)
    fresh.load_state(kept)
    assert fresh.range(8, False) == (1, 2)


def test_damaged_states_are_refused():
    state = observed("kl", normal(100)).state()
    for change, found in [
        ({"lo": float("nan")}, "damaged: the range is"),
        ({"count": 99}, "contradict"),
        ({"exponent": 3}, "contradict"),
        ({"zeros": 1000}, "contradict"),
        ({"counts": np.zeros((2, 2), np.int64)}, "counts has shape"),
        ({"hi": "wide"}, "damaged"),
        ({"extra": 1}, "unknown entry 'extra'"),
    ]:
        with pytest.raises(PlanError, match=found):
            make_observer("kl").load_state({**state, **change})
    with pytest.raises(PlanError, match="lacks 'zeros'"):
        make_observer("kl").load_state({"count": 1, "lo": 0, "hi": 1})


# --- minmax and ema -------------------------------------------------------------------------------------------------


def test_minmax():
    assert observed("minmax", np.array([1.0, 2.0]), np.array([-3.0]), np.array([0.5])).range(8, False) == (-3, 2)


def test_ema():
    batches = np.array([[-1.0, 1.0], [-2.0, 4.0], [0.0, 0.0]])
    assert observed("ema", batches[0], momentum=0.75).range(8, False) == (-1, 1)
    assert observed("ema", *batches[:2], momentum=0.75).range(8, False) == pytest.approx((-1.25, 1.75))
    assert observed("ema", *batches, momentum=0.75).range(8, False) == pytest.approx((-0.9375, 1.3125))
    assert observed("ema", *batches, momentum=0.0).range(8, False) == (0, 0)


# --- the histogram --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HISTOGRAMS)
@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_batches_do_not_matter(name, shift):
    x = normal(1000) + np.float32(shift)
    x[::7] = 0
    whole, parts = observed(name, x), observed(name, *x.reshape(100, 10))
    reverse = observed(name, *x.reshape(50, 20)[::-1])
    for bits, symmetric in ((8, False), (4, True)):
        assert whole.range(bits, symmetric) == parts.range(bits, symmetric) == reverse.range(bits, symmetric)


@settings(max_examples=30, deadline=None)
@given(batches=BATCHES)
def test_histogram_counts_are_exact(batches):
    histogram = observed("mse", *batches)
    assert isinstance(histogram, HistogramObserver)
    everything = np.concatenate(batches)
    edges = histogram.edges
    assert 1 <= histogram.counts.size <= BINS
    assert edges[0] <= 0 <= edges[-1]
    assert edges[0] <= everything.min()
    assert everything.max() < edges[-1]
    assert (histogram.lo, histogram.hi) == (everything.min(), everything.max())
    assert histogram.zeros == np.sum(everything == 0)
    # A value so far below one bin that float32 flushes it to 0 may count on the other side of 0.
    visible = everything[np.abs(everything) > histogram.width * 1e-30]
    if visible.size == everything.size:
        below = np.searchsorted(np.sort(everything), edges, side="left")
        assert np.array_equal(histogram.counts, np.diff(below))
    assert histogram.counts.sum() == everything.size


def test_growing_range_keeps_every_count():
    x = np.concatenate([normal(100) * np.float32(10.0**power) for power in range(-12, 25, 3)])
    histogram = observed("mse", *x.reshape(-1, 100))
    assert histogram.counts.sum() == x.size
    assert np.array_equal(histogram.counts, observed("mse", x).counts)
    assert histogram.counts.size > BINS // 4  # the resolution follows the range


def test_long_arrays_are_binned_in_pieces():
    x = normal(200_001)
    counts = observed("mse", x).counts
    histogram = observed("mse", x)
    assert np.array_equal(counts, np.histogram(x, bins=histogram.edges)[0])


# --- percentile -----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(batches=BATCHES)
def test_percentile_100_is_minmax(batches):
    percentile = observed("percentile", *batches, percentile=100)
    assert percentile.range(8, False) == observed("minmax", *batches).range(8, False)


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 99.99])
def test_percentile_agrees_with_sorting(percentile):
    x = normal(50000)
    observer = observed("percentile", x, percentile=percentile)
    tail = 100 - percentile
    for bound, wanted in zip(observer.range(8, False), (tail / 200, 1 - tail / 200)):
        below, upto = np.mean(x < bound - observer.width), np.mean(x < bound + observer.width)
        assert below - 1e-9 <= wanted <= upto + 1e-9


def test_percentile_takes_the_whole_tail_from_one_sided_values():
    x = np.abs(normal(50000)) + np.float32(0.5)
    lo, hi = observed("percentile", x, percentile=99).range(8, False)
    assert lo == x.min()
    assert hi == pytest.approx(np.percentile(x, 99), abs=0.003)
    assert observed("percentile", -x, percentile=99).range(8, False) == pytest.approx((-hi, -lo), abs=0.001)


@pytest.mark.parametrize(("shift", "percentile"), [(0.0, 99.0), (1.5, 99.0), (-0.7, 90.0), (0.3, 100.0)])
def test_percentile_of_a_symmetric_quantiser_is_that_of_the_magnitudes(shift, percentile):
    """`percentile` percent of the values lie within the range as it is quantised, whatever their signs."""
    x = np.random.default_rng(2).normal(shift, 1.0, 50_000).astype(np.float32)
    lo, hi = observed("percentile", x, percentile=percentile).range(8, True)
    t = np.percentile(np.abs(x), percentile)
    assert max(-lo, hi) == pytest.approx(t, abs=0.002)
    assert (lo, hi) == pytest.approx((max(x.min(), -t), min(x.max(), t)), abs=0.002)
    assert np.mean(np.abs(x) <= max(-lo, hi)) == pytest.approx(percentile / 100, abs=1e-3)


def test_percentile_counts_zeros():
    x = np.concatenate([np.zeros(9000), np.arange(1, 1001)]).astype(np.float32)
    assert observed("percentile", x, percentile=95).range(8, False)[1] == pytest.approx(500, abs=2)


# --- kl and mse -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spiked() -> np.ndarray:
    """A Gaussian in which 1 value in 100,000 lies at 50 sigma, on either side."""
    x = normal(400_000)
    x[::200_000], x[100_000::200_000] = 50, -50
    return x


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("one_sided", [False, True])
def test_kl_clips_rare_outliers(spiked, symmetric, one_sided):
    x = np.maximum(spiked, 0) if one_sided else spiked
    lo, hi = observed("kl", x).range(8, symmetric)
    assert 3 < hi < 10
    assert lo == 0 if one_sided else -10 < lo < -3
    bulk = x[np.abs(x) < 40]
    assert squared_error(bulk, (lo, hi), 8, symmetric) < 0.25 * squared_error(bulk, (x.min(), x.max()), 8, symmetric)


@pytest.mark.parametrize("outlier", [20.0, 50.0, 300.0, 1000.0])
@pytest.mark.parametrize("bits", [4, 8])
def test_kl_does_not_degenerate(outlier, bits):
    x = normal(300_000)
    x[::100_000] = outlier
    lo, hi = observed("kl", x).range(bits, False)
    assert 2.5 < -lo < 5.5
    assert 2.5 < hi < 6.5


@pytest.mark.parametrize("name", ["kl", "mse"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_outliers_do_not_cost_a_low_bit_range_its_precision(spiked, name, symmetric):
    ends = observed(name, spiked).range(4, symmetric)
    assert 2 < -ends[0] < 5
    assert 2 < ends[1] < 5
    assert squared_error(spiked, ends, 4, symmetric) < 0.1 * squared_error(spiked, (-50, 50), 4, symmetric)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_beats_every_other_observer(spiked, bits, symmetric):
    laplace = np.random.default_rng(1).laplace(size=50_000).astype(np.float32)
    for x in (spiked, laplace, np.maximum(laplace, 0), -np.abs(laplace), laplace / (1 + np.exp(-laplace))):
        best = squared_error(x, observed("mse", x).range(bits, symmetric), bits, symmetric)
        for other in ("minmax", "percentile", "kl"):
            assert best <= 1.01 * squared_error(x, observed(other, x).range(bits, symmetric), bits, symmetric)


@pytest.mark.parametrize(("bits", "threshold"), [(2, 1.57), (3, 2.09), (4, 2.55)])
def test_mse_finds_the_optimal_clipping_of_a_gaussian(bits, threshold):
    x = normal(400_000)
    lo, hi = observed("mse", x).range(bits, False)
    step = (hi - lo) / (2**bits - 1)
    grid = np.linspace(0.5, 4.5, 81)
    best = grid[np.argmin([squared_error(x, (-t, t), bits) for t in grid])]
    assert squared_error(x, (lo, hi), bits) <= 1.005 * squared_error(x, (-best, best), bits)
    assert abs(hi - threshold) < step
    assert abs(-lo - threshold) < step


def test_mse_cost_is_the_measured_error():
    x = np.concatenate([normal(200_000), np.zeros(50_000, np.float32)])
    observer = observed("mse", x)
    for bits, symmetric in ((8, False), (8, True), (3, False)):
        cost = observer._cost(bits, symmetric)
        for lo, hi in ((-5.0, 5.0), (-1.0, 3.0), (-0.1, 2.0), (-4.0, 0.0)):
            measured = squared_error(x, (lo, hi), bits, symmetric) * x.size
            assert cost(lo, hi) == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("name", ["kl", "mse"])
@pytest.mark.parametrize(("lo", "hi"), [(-1.0, 1.0), (0.0, 1.0), (-0.3, 2.0), (1.0, 3.0)])
def test_uniform_values_keep_their_range(name, lo, hi):
    x = np.random.default_rng(0).uniform(lo, hi, 60_000).astype(np.float32)
    for symmetric in (False, True):
        found = observed(name, x).range(8, symmetric)
        assert found == pytest.approx((lo, hi), abs=0.03 * (hi - lo))


@pytest.mark.parametrize("name", ["kl", "mse"])
def test_short_negative_side_survives(name):
    x = normal(200_000) * 3
    x = x / (1 + np.exp(-x))  # SiLU: a long positive tail, nothing below -0.28
    lo, hi = observed(name, x).range(8, False)
    assert lo < -0.2
    assert hi > 9


@pytest.mark.parametrize("name", ["kl", "mse"])
def test_discrete_values_keep_their_range(name):
    x = np.random.default_rng(0).integers(0, 17, 50_000).astype(np.float32)
    lo, hi = observed(name, x).range(8, False)
    assert lo == 0
    assert hi > 15.5


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_kl_with_few_values_is_minmax(bits):
    for seed in range(10):
        x = normal(1000, seed)
        assert observed("kl", x).range(bits, False) == (x.min(), x.max())
