"""A streaming histogram in constant memory, and the search for the range that some cost likes best."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Callable

import numpy as np

from msqkd.quant.observers.base import Observer, StateValue, read_extent

BINS = 1 << 14
"""The most bins. With outliers at 32 times the bulk, the bulk still has more bins than an int8 grid has levels."""

MIN_EXPONENT = -120
"""The narrowest bin is 2^-120 wide; its reciprocal is a float32."""

CHUNK = 1 << 16
"""Values binned at a time: few enough for the temporaries to stay in the cache."""

Cost = Callable[[float, float], float]


class HistogramObserver(Observer):
    """Counts values in bins [i·w, (i+1)·w) whose width w is a power of two, i any integer.

    w is the narrowest with which at most BINS bins cover 0 and the observed minimum and maximum. When that range grows,
    w doubles and neighbours merge: every count stays exact, and the histogram depends on the values seen, not on how
    they came in batches. Zero is always an edge. The exact minimum, maximum and number of zeros are kept too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lo = 0.0
        self.hi = 0.0
        self.zeros = 0
        self._exponent = MIN_EXPONENT
        self._start = 0
        self._counts = np.zeros(1, dtype=np.int64)

    @property
    def width(self) -> float:
        """The width of a bin."""
        return math.ldexp(1.0, self._exponent)

    @property
    def counts(self) -> np.ndarray:
        """How many values each bin holds, int64 (n,), 1 <= n <= BINS."""
        return self._counts

    @property
    def edges(self) -> np.ndarray:
        """The edges of the bins, float64 (n + 1,)."""
        return (self._start + np.arange(self._counts.size + 1)) * self.width

    def nonzero_counts(self) -> np.ndarray:
        """`counts` without the values that are exactly 0: no range harms those, and a ReLU makes many."""
        counts = self._counts.copy()
        counts[-self._start] -= self.zeros  # the bin that begins at 0
        return counts

    def state(self) -> dict[str, StateValue]:
        """``count``, ``lo``, ``hi``, ``zeros``, ``exponent`` of the width, ``start`` (the first i), ``counts``."""
        return {
            "count": self.count,
            "lo": self.lo,
            "hi": self.hi,
            "zeros": self.zeros,
            "exponent": self._exponent,
            "start": self._start,
            "counts": self._counts.copy(),
        }

    def _add(self, values: np.ndarray, lo: float, hi: float) -> None:
        self.lo = min(self.lo, lo) if self.count else lo
        self.hi = max(self.hi, hi) if self.count else hi
        self._make_room()
        self.zeros += values.size - int(np.count_nonzero(values))
        per_width = np.float32(math.ldexp(1.0, -self._exponent))
        for begin in range(0, values.size, CHUNK):
            # Scaling by a power of two is exact, short of underflow to 0, and so is subtracting a whole number.
            scaled = values[begin : begin + CHUNK] * per_width
            np.floor(scaled, out=scaled)
            scaled -= np.float32(self._start)
            self._counts += np.bincount(scaled.astype(np.intp), minlength=self._counts.size)

    def _make_room(self) -> None:
        """Widen and move the bins so that they reach from min(lo, 0) to max(hi, 0)."""
        lo, hi = min(self.lo, 0.0), max(self.hi, 0.0)
        exponent = _narrowest(lo, hi)
        start, end = (math.floor(math.ldexp(x, -exponent)) for x in (lo, hi))
        if (exponent, start, end - start + 1) == (self._exponent, self._start, self._counts.size):
            return
        # 2^63 widths and more need no more than 62 shifts: the few bins there are have long merged into two.
        shift = min(exponent - self._exponent, 62)
        index = (self._start + np.arange(self._counts.size)) >> shift
        counts = np.zeros(end - start + 1, dtype=np.int64)
        np.add.at(counts, index - start, self._counts)
        self._exponent, self._start, self._counts = exponent, start, counts

    def _restore(self, state: Mapping[str, Any]) -> None:
        count, lo, hi = read_extent(state)
        zeros, exponent, start = int(state["zeros"]), int(state["exponent"]), int(state["start"])
        counts = np.array(state["counts"])
        if counts.ndim != 1 or not 1 <= counts.size <= BINS or counts.dtype.kind not in "iu":
            raise ValueError(f"counts has shape {counts.shape} and dtype {counts.dtype}")
        low, high = min(lo, 0.0), max(hi, 0.0)
        fits = (exponent, start, counts.size - 1 + start) == (
            _narrowest(low, high),
            math.floor(math.ldexp(low, -exponent)),
            math.floor(math.ldexp(high, -exponent)),
        )
        if not fits or counts.min() < 0 or counts.sum() != count or not 0 <= zeros <= counts[-start]:
            raise ValueError("its entries contradict each other")
        self.count, self.lo, self.hi = count, lo, hi
        self.zeros, self._exponent, self._start, self._counts = zeros, exponent, start, counts.astype(np.int64)


class SearchingObserver(HistogramObserver):
    """A histogram observer whose range is the one of lowest cost."""

    def _range(self, bits: int, symmetric: bool) -> tuple[float, float]:
        # With values in one or two bins there is no distribution to weigh.
        if np.count_nonzero(self.nonzero_counts()) <= 2:
            return self.lo, self.hi
        cost = self._cost(bits, symmetric)
        lo, hi = best_range(cost, min(self.lo, 0.0), max(self.hi, 0.0), symmetric)
        return float(np.clip(lo, self.lo, self.hi)), float(np.clip(hi, self.lo, self.hi))

    @abstractmethod
    def _cost(self, bits: int, symmetric: bool) -> Cost:
        """A function of (lo, hi), lo <= 0 <= hi, that says what is lost by quantising to this range."""


def best_range(cost: Cost, lo: float, hi: float, symmetric: bool) -> tuple[float, float]:
    """The range of lowest cost within [lo, hi], lo <= 0 <= hi, lo < hi; of equal ones the widest.

    First one threshold t cuts both ends, (max(lo, −t), min(hi, t)), which leaves alone an end that is short already.
    If the range reaches to both sides of 0 and need not be symmetric, the upper end and the lower end are then improved
    in turn, each over the whole of its side, until neither gains.
    """

    def cut(t: float) -> tuple[float, float]:
        return (-t, t) if symmetric else (max(lo, -t), min(hi, t))

    t, lowest = _best_threshold(lambda t: cost(*cut(t)), max(-lo, hi))
    low, high = max(lo, -t), min(hi, t)
    if symmetric or lo == 0.0 or hi == 0.0:
        return low, high

    def upper(t: float) -> float:
        return cost(low, t)

    def lower(t: float) -> float:
        return cost(-t, high)

    while True:
        before = lowest
        high, lowest = _improved(upper, hi, high, lowest)
        depth, lowest = _improved(lower, -lo, -low, lowest)
        low = -depth
        if not before - lowest > 1e-3 * abs(before):  # also when both are infinite
            return low, high


def _improved(cost: Callable[[float], float], top: float, t: float, lowest: float) -> tuple[float, float]:
    """The best threshold up to `top` and its cost, or (t, lowest) when it is not better than that."""
    candidate, value = _best_threshold(cost, top)
    return (candidate, value) if value < lowest else (t, lowest)


def _best_threshold(cost: Callable[[float], float], top: float) -> tuple[float, float]:
    """The threshold in (0, top] of lowest cost, and the cost.

    Thresholds are tried at ratios and not at distances, 8 an octave over 12 octaves and then 64 an octave around the
    best, so that a bulk of values far below its outliers is searched as finely as any other.
    """
    coarse = top * 2.0 ** (-np.arange(8 * 12 + 1) / 8)
    values = [cost(float(t)) for t in coarse]
    best = int(np.argmin(values))
    fine = np.minimum(coarse[best] * 2.0 ** (np.arange(7, -8, -1) / 64), top)
    fine_values = [cost(float(t)) for t in fine]
    finest = int(np.argmin(fine_values))
    if fine_values[finest] < values[best]:
        return float(fine[finest]), fine_values[finest]
    return float(coarse[best]), values[best]


def _narrowest(lo: float, hi: float) -> int:
    """The exponent of the narrowest bins that cover [lo, hi], lo <= 0 <= hi, with at most BINS of them."""
    if lo == hi:
        return MIN_EXPONENT
    exponent = max(math.frexp((hi - lo) / BINS)[1] - 1, MIN_EXPONENT)
    while math.floor(math.ldexp(hi, -exponent)) - math.floor(math.ldexp(lo, -exponent)) >= BINS:
        exponent += 1
    return exponent
