"""The range that holds a given percentage of all values."""

from __future__ import annotations

import numpy as np

from msqkd.quant.observers.base import check_number, register
from msqkd.quant.observers.histogram import HistogramObserver


@register("percentile")
class PercentileObserver(HistogramObserver):
    """Leaves out the outermost values, so that `percentile` percent of them (90 to 100) are inside.

    Values of both signs lose half of the rest at each end; values of one sign (after a ReLU) lose all of it at the end
    away from zero. A symmetric quantiser is as wide as its farther end, so magnitudes count there: `percentile` percent
    of the values lie within ±t, where the range ends. 100 is the minimum and maximum. Zeros count like other values. An
    end is exact to one histogram bin.
    Wu et al. 2020, "Integer Quantization for Deep Learning Inference: Principles and Empirical Evaluation"
    (arXiv 2004.09602).
    """

    def __init__(self, percentile: float = 99.99) -> None:
        super().__init__()
        self.percentile = check_number("observer 'percentile': percentile", percentile, 90, 100)

    def _range(self, bits: int, symmetric: bool) -> tuple[float, float]:
        tail = self.count * (1.0 - self.percentile / 100.0)
        if tail == 0.0:
            return self.lo, self.hi  # exactly: a value may be too small beside the others for its own bin
        if self.lo >= 0.0:
            return self.lo, self._value_at(self.count - tail)
        if self.hi <= 0.0:
            return self._value_at(tail), self.hi
        if symmetric:
            t = self._magnitude_at(self.count - tail)
            return max(self.lo, -t), min(self.hi, t)
        return self._value_at(tail / 2), self._value_at(self.count - tail / 2)

    def _magnitude_at(self, rank: float) -> float:
        """The t for which `rank` values lie in [-t, t]."""
        below = -self._start  # the bins of negative values; zero is an edge
        parts = (self.counts[below:], self.counts[:below][::-1])
        magnitudes = np.zeros(max(part.size for part in parts), np.int64)
        for part in parts:
            magnitudes[: part.size] += part
        return _at_rank(magnitudes, rank) * self.width

    def _value_at(self, rank: float) -> float:
        """The value with `rank` values below it."""
        value = (self._start + _at_rank(self.counts, rank)) * self.width
        return float(np.clip(value, self.lo, self.hi))


def _at_rank(counts: np.ndarray, rank: float) -> float:
    """Where `rank` values lie below, in bins from the first, with those of a bin spread evenly over it."""
    filled = np.flatnonzero(counts)
    here = counts[filled]
    upto = np.cumsum(here)
    i = min(int(np.searchsorted(upto, rank)), filled.size - 1)
    return float(filled[i] + (rank - (upto[i] - here[i])) / here[i])
