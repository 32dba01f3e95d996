"""An exponential moving average of each batch's minimum and maximum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from msqkd.quant.observers.base import Observer, StateValue, check_number, read_extent, register


@register("ema")
class EMAObserver(Observer):
    """new = momentum · old + (1 − momentum) · batch, for the minimum and the maximum; the first batch sets them.

    `momentum` is in [0, 1]: 0 keeps the last batch only, 1 the first. The range follows a network while it trains, and
    depends on the size and the order of the batches. Jacob et al. 2018, "Quantization and Training of Neural Networks
    for Efficient Integer-Arithmetic-Only Inference" (arXiv 1712.05877).
    """

    def __init__(self, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = check_number("observer 'ema': momentum", momentum, 0, 1)
        self.lo = 0.0
        self.hi = 0.0

    def state(self) -> dict[str, StateValue]:
        """``count``, ``lo`` and ``hi``."""
        return {"count": self.count, "lo": self.lo, "hi": self.hi}

    def _add(self, values: np.ndarray, lo: float, hi: float) -> None:
        keep = self.momentum if self.count else 0.0
        self.lo = keep * self.lo + (1.0 - keep) * lo
        self.hi = keep * self.hi + (1.0 - keep) * hi

    def _range(self, bits: int, symmetric: bool) -> tuple[float, float]:
        return self.lo, self.hi

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.count, self.lo, self.hi = read_extent(state)
