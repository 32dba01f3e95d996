"""The smallest and the largest value seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from msqkd.quant.observers.base import Observer, StateValue, read_extent, register


@register("minmax")
class MinMaxObserver(Observer):
    """The running minimum and maximum: nothing is clipped, and one outlier widens every step."""

    def __init__(self) -> None:
        super().__init__()
        self.lo = 0.0
        self.hi = 0.0

    def state(self) -> dict[str, StateValue]:
        """``count``, ``lo`` and ``hi``."""
        return {"count": self.count, "lo": self.lo, "hi": self.hi}

    def _add(self, values: np.ndarray, lo: float, hi: float) -> None:
        self.lo = min(self.lo, lo) if self.count else lo
        self.hi = max(self.hi, hi) if self.count else hi

    def _range(self, bits: int, symmetric: bool) -> tuple[float, float]:
        return self.lo, self.hi

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.count, self.lo, self.hi = read_extent(state)
