"""The range with the smallest squared quantisation error."""

from __future__ import annotations

import numpy as np

from msqkd.quant.observers.base import register
from msqkd.quant.observers.histogram import Cost, SearchingObserver
from msqkd.quant.qparams import activation_qparams


@register("mse")
class MSEObserver(SearchingObserver):
    """Minimises the expected (x − x̂)², clipping included; both ends are searched, of one-sided values only the far end.

    The error is integrated in closed form over each bin, its values spread evenly, so steps may be narrower than bins.
    Nagel et al. 2021, "A White Paper on Neural Network Quantization" (arXiv 2106.08295); the search is
    `histogram.best_range`.
    """

    def _cost(self, bits: int, symmetric: bool) -> Cost:
        counts = self.nonzero_counts()
        filled = np.flatnonzero(counts)
        density = counts[filled] / self.width
        left = self.edges[filled]
        right = left + self.width

        def cost(lo: float, hi: float) -> float:
            qparams = activation_qparams(lo, hi, bits, symmetric)
            scale, zero_point = float(qparams.scale), int(qparams.zero_point)

            def integral(x: np.ndarray) -> np.ndarray:
                """∫ from 0 to x of the squared error: a step has s³/12, the remainder r of x beyond step k has r³/3."""
                k = np.clip(np.rint(x / scale), qparams.qmin - zero_point, qparams.qmax - zero_point)
                r = x - k * scale
                return k * (scale**3 / 12) + r * r * r / 3

            return float(density @ (integral(right) - integral(left)))

        return cost
