"""The range whose quantised distribution diverges least from the observed one."""

from __future__ import annotations

import math

import numpy as np

from msqkd.quant.observers.base import register
from msqkd.quant.observers.histogram import Cost, SearchingObserver
from msqkd.quant.qparams import activation_qparams

BINS_PER_LEVEL = 8
"""Bins in each rounding cell of a candidate range, so 2048 over the range at 8 bits."""

MIN_BINS = 512
"""Bins over a range at few bits, whose cells are wide: one that swallows the whole bulk must not look lossless."""

MIN_PER_BIN = 4
"""Values within a range for each of its bins, so 8192 at 8 bits; with fewer, chance badly clips ordinary samples."""

SMOOTHING = 1e-4
"""Part of Q that is spread over all bins, because KL(P‖Q) is infinite where P has values and Q has none."""


@register("kl")
class KLObserver(SearchingObserver):
    """Entropy calibration: the candidate range with the smallest Kullback-Leibler divergence KL(P‖Q).

    P is the histogram within the range, the values outside added to its edge bins. Q is the same without those: merged
    into the 2^bits rounding cells of the quantiser, each cell's sum spread evenly over those of its bins that are not
    empty in P. A narrow range loses by what it clips, a wide one by the detail that its cells merge.

    Every candidate is seen in bins of its own, several to a cell: none is lossless for want of bins, and clipping
    always shows. Values that are exactly 0 are left out: every range holds them. What the divergence owes to the
    scatter of finite counts is subtracted, or it would favour ranges so wide that few cells are filled. A range with
    fewer than MIN_PER_BIN values to a bin is not considered; when all are such, the range is minimum and maximum.

    Migacz 2017, "8-bit Inference with TensorRT" (GTC 2017), for the principle; Miller 1955, "Note on the Bias of
    Information Estimates", for the scatter. The search over both ends is `histogram.best_range`.
    """

    def _cost(self, bits: int, symmetric: bool) -> Cost:
        levels = 2**bits
        bins = max(BINS_PER_LEVEL * levels, MIN_BINS)
        edges, width = self.edges, self.width
        below = np.concatenate(([0.0], np.cumsum(self.nonzero_counts(), dtype=np.float64)))
        total = below[-1]
        offsets = np.arange(bins + 1) * (levels / bins) - 0.5

        def cost(lo: float, hi: float) -> float:
            qparams = activation_qparams(lo, hi, bits, symmetric)
            scale = float(qparams.scale)
            bounds = (offsets + (qparams.qmin - int(qparams.zero_point))) * scale
            bins_per_count = min(scale * levels / (bins * width), 1.0)  # below 1, bins share the count of one
            if bins_per_count == 1.0:
                # Bounds on edges of the histogram keep the counts whole: a value that repeats stays one peak.
                bounds = np.floor(bounds / width + 0.5) * width
            upto = np.interp(bounds, edges, below)
            kept = np.diff(upto)
            inside = upto[-1] - upto[0]
            if inside < MIN_PER_BIN * bins:
                return math.inf
            p = kept.copy()
            p[0] += upto[0]
            p[-1] += total - upto[-1]
            filled = p > 0
            room = np.where(filled, np.diff(bounds), 0.0).reshape(levels, -1)
            cell_room = np.maximum(room.sum(axis=1), np.finfo(np.float64).tiny)
            cell_mass = kept.reshape(levels, -1).sum(axis=1)
            spread = ((cell_mass / cell_room)[:, None] * room).ravel()[filled]
            q = (1.0 - SMOOTHING) / inside * spread + SMOOTHING / bins
            p = p[filled] / total
            # Even where the density is flat, k counts scatter about their mean and add (k − 1) / 2 to total · KL, as a
            # chi-square statistic does; but nothing when every count is 1.
            k = np.maximum(filled.reshape(levels, -1).sum(axis=1) * bins_per_count, 1.0)
            scatter = (k - 1.0) * np.maximum(1.0 - k / np.maximum(cell_mass, 1.0), 0.0) / 2
            return float(p @ np.log(p / q) - scatter.sum() / total)

        return cost
