"""The range that holds a given percentage of all values."""

from __future__ import annotations

import numpy as np

from msqkd.quant.observers.base import check_number, register
from msqkd.quant.observers.histogram import HistogramObserver


@register("percentile")
class PercentileObserver(HistogramObserver):
    """Leaves out the outermost values, so that `percentile` percent of them (90 to 100) are inside.

    Values of both signs lose half of the rest at each end; values of one sign (after a ReLU) lose all of it at the end
    away from zero. 100 is the minimum and maximum. Zeros count like other values. An end is exact to one histogram bin.
    Wu et al. 2020, "Integer Quantization for Deep Learning Inference: Principles and Empirical Evaluation"
    (arXiv 2004.09602).
    """

    def __init__(self, percentile: float = 99.99) -> None:
        super().__init__()
        self.percentile = check_number("observer 'percentile': percentile", percentile, 90, 100)

    def _range(self, bits: int, symmetric: bool) -> tuple[float, float]:
        tail = self.count * (1.0 - self.percentile / 100.0)
        if self.lo >= 0.0:
            return self.lo, self._value_at(self.count - tail)
        if self.hi <= 0.0:
            return self._value_at(tail), self.hi
        return self._value_at(tail / 2), self._value_at(self.count - tail / 2)

    def _value_at(self, rank: float) -> float:
        """The value with `rank` values below it, taken as spread evenly over their bin."""
        filled = np.flatnonzero(self.counts)
        here = self.counts[filled]
        upto = np.cumsum(here)
        i = min(int(np.searchsorted(upto, rank)), filled.size - 1)
        inside = (rank - (upto[i] - here[i])) / here[i]
        value = self.edges[filled[i]] + inside * self.width
        return float(np.clip(value, self.lo, self.hi))
