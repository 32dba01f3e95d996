"""Distances between outputs against plain numpy, and which of them are accepted."""

from __future__ import annotations

import math
from typing import Optional

import numpy as np
import pytest

from msqkd.quant.bounds import Bounds, Distance, DistanceMeter, distance

RNG = np.random.default_rng(0)
EXACT = RNG.normal(size=(40, 6, 4)).astype(np.float32)


def noisy(decibel: float, seed: int) -> np.ndarray:
    """`EXACT` with noise of its own, so many dB below it."""
    noise = np.random.default_rng(seed).normal(size=EXACT.shape)
    return (EXACT + noise * np.sqrt(np.square(EXACT).mean()) * 10 ** (-decibel / 20)).astype(np.float32)


def test_a_distance_is_that_of_the_worst_output() -> None:
    other = noisy(20, 1)
    found = distance((EXACT, other), (EXACT, EXACT), classes=False)
    error, exact = other.astype(np.float64) - EXACT, EXACT.astype(np.float64)
    assert found.max_abs_diff == pytest.approx(np.abs(error).max())
    assert found.relative_error == pytest.approx(np.sqrt(np.square(error).mean() / np.square(exact).mean()))
    assert found.sqnr_db == pytest.approx(10 * np.log10(np.square(exact).sum() / np.square(error).sum()))
    rows = zip(other.reshape(40, -1), EXACT.reshape(40, -1))
    assert found.cosine == pytest.approx(np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in rows]))
    assert found.changed is None


@pytest.mark.parametrize("sizes", [[40], [1, 7, 32]])
def test_batches_do_not_matter_to_a_distance(sizes: list[int]) -> None:
    logits, others = EXACT[:, 0], noisy(3, 2)[:, 0]
    meter, start = DistanceMeter(classes=True), 0
    for size in sizes:
        meter.add([others[start : start + size]], [logits[start : start + size]], size)
        start += size
    found = meter.result()
    assert found.changed == int((others.argmax(-1) != logits.argmax(-1)).sum())
    assert 0 < found.changed < 40
    assert found.relative_error == pytest.approx(distance((others,), (logits,), classes=False).relative_error)


def test_equal_outputs_have_no_distance() -> None:
    masked = EXACT.copy()
    masked[0, 0, 0] = -np.inf  # as a mask writes it
    for same in (EXACT, masked, np.zeros_like(EXACT), EXACT > 0, np.arange(40, dtype=np.int64)):
        found = distance((same,), (same,), classes=False)
        assert (found.max_abs_diff, found.relative_error, found.sqnr_db) == (0, 0, math.inf)
        assert found.cosine == pytest.approx(1)
        assert Bounds().excess(found) == []


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_beyond_every_bound(wrong: float) -> None:
    spoilt = EXACT.copy()
    spoilt[3, 2, 1] = wrong
    found = distance((spoilt,), (EXACT,), classes=False)
    assert Bounds(max_sqnr_loss=100.0, min_cosine=0.0).excess(found, distance((EXACT,), (EXACT,), False), found)
    assert found.to_dict()["relative_error"] is None, "JSON holds no infinity"


def judged(found: np.ndarray, fake: np.ndarray, bounds: Optional[Bounds] = None) -> bool:
    """Whether outputs are accepted beside those of the fake-quantized network."""
    near, own, away = (distance((a,), (b,), False) for a, b in ((found, fake), (fake, EXACT), (found, EXACT)))
    return not (bounds or Bounds()).excess(near, own, away)


@pytest.mark.parametrize("decibel", [40, 25, 12])  # of W8A8, of a deep W8A8 network, of W4A4
def test_another_arithmetic_as_near_to_float_is_accepted(decibel: float) -> None:
    fake = noisy(decibel, 3)
    assert judged(fake, fake)
    assert judged(noisy(decibel, 4), fake), "as much noise, other noise"
    assert judged(noisy(decibel - 2, 4), fake)
    assert judged(EXACT, fake), "float itself"
    assert not judged(noisy(decibel - 2, 4), fake, Bounds(max_relative_error=0, max_sqnr_loss=1))


@pytest.mark.parametrize("decibel", [40, 25, 12])
def test_a_plainly_wrong_device_is_not(decibel: float) -> None:
    fake = noisy(decibel, 3)
    assert not judged(noisy(decibel - 6, 4), fake)
    assert not judged(1.5 * fake, fake), "a wrong scale"
    assert not judged(fake[:, ::-1], fake), "channels in another order"
    assert not judged(-fake, fake)
    assert not judged(np.zeros_like(fake), fake)
    dead = fake.copy()
    dead[:, 0] = 0
    assert judged(dead, fake) is (decibel < 10), "one channel of six"


def test_within_the_relative_error_float_is_not_looked_at() -> None:
    assert judged(EXACT * np.float32(1.01), EXACT)
    assert not judged(EXACT * np.float32(1.03), EXACT)
    assert judged(EXACT * np.float32(1.03), EXACT, Bounds(max_relative_error=0.05))


def test_small_rows_count_in_the_cosine() -> None:
    exact = np.random.default_rng(5).normal(size=(100, 8))
    exact[10:] *= 1e-3
    spoilt = exact.copy()
    spoilt[10:] = -spoilt[10:]
    found = distance((spoilt,), (exact,), classes=False)
    assert found.relative_error < 0.02
    assert "cosine similarity" in Bounds().excess(found)[0]
    single = distance((spoilt[:, :1],), (exact[:, :1],), classes=False)  # of one number a sample there is no direction
    assert Bounds().excess(single) == []


@pytest.mark.parametrize(
    ("changed", "samples", "own", "accepted"),
    [
        (400, 1000, 10, False),
        (400, 1000, 600, False),  # however many quantization itself changes
        (75, 10_000, 104, True),  # ResNet-20, W8A8
        (28, 1000, 10, True),  # 2 %, and two standard errors of it
        (29, 1000, 10, False),
        (50, 1000, 60, True),  # many close calls: quantization changes as many
        (120, 1000, 200, True),
        (121, 1000, 200, False),
        (2, 24, 0, True),  # two samples of a few say nothing
        (3, 24, 0, False),
        (24, 24, 24, False),
    ],
)
def test_the_share_of_changed_predictions_is_bounded(changed: int, samples: int, own: int, accepted: bool) -> None:
    assert (Bounds().changed(changed, samples, own) == []) is accepted
    near, to_float = (Distance(samples, 1.0, 1.0, 0.0, 1.0, count) for count in (changed, own))
    assert (Bounds().excess(near, to_float, near) == []) is accepted


def test_a_bound_of_0_accepts_no_changed_prediction() -> None:
    assert Bounds(max_changed=0.0).changed(1, 1000, 500)
    assert Bounds(max_changed=0.0).changed(0, 1000, 500) == []
