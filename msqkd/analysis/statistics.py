"""How the values of a network are distributed: histograms, outliers and channels, in one pass and constant memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Callable, Optional

import mindspore as ms
import numpy as np

from msqkd.data import Arrays, as_tuple
from msqkd.graph.ir import Graph
from msqkd.quant.observers import HistogramObserver, PercentileObserver
from msqkd.quant.plan import QuantPlan
from msqkd.quant.qparams import QParams
from msqkd.quant.uses import weight_use

PERCENTILES = (99.9, 99.99)
"""Of the magnitudes; the largest magnitude is told as a multiple of them."""

OUTLIER_RATIO = 4.0
"""A channel has outliers where its largest magnitude is more than so many times the median of the channels'."""

_BINS = 64  # of the histogram that is kept for people
_POINTS = 8  # a bin of the fine histogram, at which a quantiser is tried


class Distribution:
    """The values of one activation or weight, batch after batch.

    The histogram is that of the calibration's observers (`HistogramObserver`): its bins grow with the range, so one
    pass is enough, and their counts do not depend on how the values came in batches.

    Args:
        axis: of the channels; None takes all values for one channel.
    """

    def __init__(self, axis: Optional[int] = None) -> None:
        self.axis = axis
        self.histogram: HistogramObserver = PercentileObserver()
        self.total = self.energy = 0.0
        self.lows = np.zeros(0, np.float32)
        self.highs = np.zeros(0, np.float32)

    def update(self, x: np.ndarray, where: str = "the observed value") -> None:
        """Take in an array of any shape that has the axis, seen as float32.

        Raises:
            PlanError: a value is not finite; the message begins with `where`.
        """
        x = np.asarray(x, np.float32)
        if not x.size:
            return
        first = self.histogram.count == 0
        self.histogram.update(x, where)
        self.total += float(x.sum(dtype=np.float64))
        flat = x.ravel()
        self.energy += float(np.einsum("i,i->", flat, flat, dtype=np.float64))
        others = None if self.axis is None else tuple(i for i in range(x.ndim) if i != self.axis % x.ndim)
        lows, highs = np.atleast_1d(x.min(axis=others)), np.atleast_1d(x.max(axis=others))
        self.lows = lows if first else np.minimum(self.lows, lows)
        self.highs = highs if first else np.maximum(self.highs, highs)

    @property
    def count(self) -> int:
        """How many values were seen."""
        return self.histogram.count

    @property
    def mean(self) -> float:
        """Of all values; 0 where there are none."""
        return self.total / max(self.count, 1)

    @property
    def power(self) -> float:
        """The mean of the squares."""
        return self.energy / max(self.count, 1)

    @property
    def std(self) -> float:
        """Of all values, as of a whole population."""
        return float(np.sqrt(max(self.power - self.mean**2, 0.0)))

    @property
    def kurtosis(self) -> Optional[float]:
        """E[(x − mean)⁴] / std⁴, 3 for a normal distribution, exact to a bin; None where all values are equal."""
        if not self.std:
            return None
        middles, counts = self._middles()
        fourth = counts @ (middles - self.mean) ** 4 + self.histogram.zeros * self.mean**4
        return float(fourth / self.count / self.std**4)

    @property
    def largest(self) -> float:
        """The largest magnitude."""
        return max(-self.histogram.lo, self.histogram.hi, 0.0)

    def percentile(self, percent: float) -> float:
        """The magnitude that `percent` of the values (zeros too) do not exceed, exact to a bin."""
        middles, counts = self._middles()
        order = np.argsort(np.abs(middles))
        upto = self.histogram.zeros + np.cumsum(counts[order])
        rank = self.count * percent / 100.0
        if rank <= self.histogram.zeros or not upto.size:
            return 0.0
        place = min(int(np.searchsorted(upto, rank)), upto.size - 1)
        return float(min(np.abs(middles[order[place]]) + self.histogram.width / 2, self.largest))

    def over_percentile(self, percent: float) -> Optional[float]:
        """The largest magnitude as a multiple of `percentile`; None where that is 0."""
        part = self.percentile(percent)
        return self.largest / part if part else None

    @property
    def channel_largest(self) -> np.ndarray:
        """The largest magnitude of every channel, float32 (C,)."""
        return np.maximum(np.maximum(-self.lows, self.highs), 0)

    def dead_channels(self) -> list[int]:
        """The channels whose values, several each, are all the same: after a ReLU those that are never above 0."""
        if self.axis is None or self.count <= self.lows.size:
            return []
        return [int(i) for i in np.flatnonzero(self.lows == self.highs)]

    def outlier_channels(self) -> list[int]:
        """The channels that reach more than `OUTLIER_RATIO` times as far as the median one that is not dead."""
        reach = self.channel_largest
        alive = reach[self.lows < self.highs]
        if self.axis is None or not alive.size:
            return []
        return [int(i) for i in np.flatnonzero(reach > OUTLIER_RATIO * np.median(alive))]

    def channel_spread(self) -> Optional[float]:
        """The largest magnitude of the widest channel as a multiple of the narrowest's that is not all 0."""
        reach = self.channel_largest
        reach = reach[reach > 0]
        return float(reach.max() / reach.min()) if self.axis is not None and reach.size else None

    def noise(self, qparams: QParams) -> float:
        """The mean squared error of quantising such values with one scale for all."""
        edges, counts = self._filled()
        inside = (np.arange(_POINTS) + 0.5) / _POINTS * self.histogram.width
        points = edges[:, None] + inside
        error = np.square(points - qparams.fake_quantize(points)).mean(axis=1)
        return float(counts @ error) / max(self.count, 1)

    def share_outside(self, low: float, high: float) -> float:
        """The part of the values (0–1) that lie in bins beyond [low, high]."""
        edges, counts = self._filled()
        outside = (edges >= high) | (edges + self.histogram.width <= low)
        return float(counts[outside].sum()) / max(self.count, 1)

    def coarse_histogram(self) -> tuple[np.ndarray, np.ndarray]:
        """Edges float64 (B + 1,) and counts int64 (B,) of at most 64 bins from the smallest to the largest value."""
        low, high = self.histogram.lo, self.histogram.hi
        if low == high:
            return np.array([low, high]), np.array([self.count])
        edges = np.linspace(low, high, _BINS + 1)
        middles, counts = self._middles()
        place = np.clip(((middles - low) / (high - low) * _BINS).astype(int), 0, _BINS - 1)
        coarse = np.bincount(place, counts, _BINS).astype(np.int64)
        if self.histogram.zeros:
            coarse[min(max(int(-low / (high - low) * _BINS), 0), _BINS - 1)] += self.histogram.zeros
        return edges, coarse

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able data."""
        edges, counts = self.coarse_histogram()
        return {
            "count": self.count,
            "min": self.histogram.lo,
            "max": self.histogram.hi,
            "mean": self.mean,
            "std": self.std,
            "kurtosis": self.kurtosis,
            "zeros": self.histogram.zeros / max(self.count, 1),
            "percentiles": {f"{p:g}": self.percentile(p) for p in PERCENTILES},
            "max_over_percentile": {f"{p:g}": self.over_percentile(p) for p in PERCENTILES},
            "channels": self.lows.size if self.axis is not None else None,
            "dead_channels": self.dead_channels(),
            "outlier_channels": self.outlier_channels(),
            "channel_spread": self.channel_spread(),
            "channel_min": [float(x) for x in self.lows] if self.axis is not None else None,
            "channel_max": [float(x) for x in self.highs] if self.axis is not None else None,
            "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        }

    def _filled(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower edges and counts of the bins that hold values other than 0."""
        counts = self.histogram.nonzero_counts()
        filled = np.flatnonzero(counts)
        return self.histogram.edges[filled], counts[filled]

    def _middles(self) -> tuple[np.ndarray, np.ndarray]:
        edges, counts = self._filled()
        return edges + self.histogram.width / 2, counts


def channel_axis(rank: int) -> Optional[int]:
    """Where an activation has its channels: (N, C), (N, C, H, W), (N, C, D, H, W), else the last of several axes."""
    return 1 if rank in (2, 4, 5) else -1 if rank > 1 else None


def value_statistics(
    network: Callable[..., Sequence[Any]],
    names: Sequence[str],
    batches: Iterable[Arrays],
    progress: Optional[Callable[[int], None]] = None,
) -> dict[str, Distribution]:
    """The distributions of what a network shows, from one pass.

    Args:
        network: gives, for the input Tensors of a batch, a Tensor for every one of `names`.
        names: of the values.
        batches: samples (N, ...), or tuples of arrays for a network with several inputs.
        progress: called with the number of samples done.

    Raises:
        PlanError: a value is not finite.
    """
    found: dict[str, Distribution] = {}
    done = 0
    for batch in batches:
        arrays = as_tuple(batch)
        for name, value in zip(names, network(*map(ms.Tensor, arrays))):
            x = value.asnumpy()
            found.setdefault(name, Distribution(channel_axis(x.ndim))).update(x, where=f"value '{name}'")
        done += len(arrays[0])
        if progress is not None:
            progress(done)
    return found


def weight_statistics(graph: Graph, plan: QuantPlan) -> dict[str, Distribution]:
    """The distribution of every weight the plan quantises, by node; channels are those of the output."""
    found: dict[str, Distribution] = {}
    for name, array in weights_of(graph, plan).items():
        use = weight_use(graph, graph.node(name))
        axis = plan.weights[name].axis if use is None or use.index != plan.weights[name].index else use.axis
        found[name] = Distribution(axis)
        found[name].update(array, where=f"the weight of {name}")
    return found


def weights_of(graph: Graph, plan: QuantPlan) -> Mapping[str, np.ndarray]:
    """The array of every weight the plan quantises, by node."""
    return {name: quant.held_in(graph) for name, quant in plan.weights.items()}
