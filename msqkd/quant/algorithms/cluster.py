"""Weight clustering: the integers of a layer take few distinct values, so that an index of few bits tells which.

Han et al. 2016, "Deep Compression", arXiv:1510.00149, §3 (weight sharing by k-means). The codebook of a layer is a
choice of K integers c of its grid; with s the scale of a weight's channel, it is the one with the least

    Σ (w − s · c(w))² = Σ s² · (u − c(w))²,   u = w / s

where c(w) is the entry nearest to u: the error of the float weights w, before any rounding. In one dimension k-means
need not be searched for (Wang & Song 2011, "Ckmeans.1d.dp", The R Journal 3/2): clusters are intervals, and dynamic
programming over their order finds the least error there is. Here the entries are integers, so that the bounds between
clusters are multiples of ½, and sums of s², s² · u and s² · u² over every half step are all that the search reads.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import ClassVar, Optional

import numpy as np

from msqkd.errors import PlanError
from msqkd.graph.ir import Graph
from msqkd.quant.algorithms.base import INTEGER_STAGE, Method, Work
from msqkd.quant.plan import QuantPlan, WeightQuant
from msqkd.quant.qparams import QParams

FEWEST, MOST = 2, 128
"""The clusters that can be asked for: beyond 7 bits an index is no shorter than the integer itself."""


@dataclass
class Cluster(Method):
    """Give the quantised weights of every layer at most `clusters` distinct integers, those with the least squared
    error of the float weights (arXiv:1510.00149).

    Scales stay as they are. The weights become scale · integer, and the plan holds the scale. A layer whose integers
    are no more than `clusters` already is left as it is.

    Attributes:
        clusters: how many integers a layer's weights may take; 2 to 128.
        shared: one codebook for all layers of as many bits, in which every layer counts by the part of its weights'
            energy that is lost; otherwise each layer has its own.
    """

    clusters: int = 16
    shared: bool = False

    name: ClassVar[str] = "cluster"
    stage: ClassVar[str] = INTEGER_STAGE

    def __post_init__(self) -> None:
        if not FEWEST <= self.clusters <= MOST:
            raise PlanError(f"cluster.clusters is {self.clusters}; allowed: {FEWEST} to {MOST}")

    def apply(self, work: Work) -> list[str]:
        """Change the weights of `work.graph` and fix their scales in its plan."""
        work.plan = work.plan.with_weight_observers(work.graph)
        weights, told = _clusterable(work.graph, work.plan, self.clusters)
        if not weights:
            return ["no weight has more integers than clusters: nothing to do", *told]
        fixed, codebooks = dict(work.plan.weights), self._codebooks(weights)
        for number, (weight, codebook) in enumerate(zip(weights, codebooks)):
            integers = nearest(weight.steps, codebook)
            work.deploy(weight.parameter, weight.qparams.dequantize(integers))
            for node in weight.nodes:
                fixed[node] = replace(fixed[node], scale=weight.qparams.scale)
            work.progress(number + 1, len(weights))
        work.plan = replace(work.plan, weights=fixed)
        return [self._summary(work.graph, weights, codebooks), *told]

    def _codebooks(self, weights: list[_Weight]) -> list[np.ndarray]:
        """The codebook of every weight; one array for all of those that share it."""
        if not self.shared:
            return [best_codebook(weight.moments(), self.clusters) for weight in weights]
        sums: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(()))
        for weight in weights:
            sums[weight.bits] = sums[weight.bits] + weight.moments() / weight.energy
        found = {bits: best_codebook(moments, self.clusters) for bits, moments in sums.items()}
        return [found[weight.bits] for weight in weights]

    def _summary(self, graph: Graph, weights: list[_Weight], codebooks: list[np.ndarray]) -> str:
        before = [weight.distinct for weight in weights]
        shares = [
            (weight.error(weight.qparams.fake_quantize(weight.data)), weight.error(graph.params[weight.parameter].data))
            for weight in weights
        ]
        rounded, clustered = np.mean(shares, axis=0)
        numbers = sum(weight.data.size for weight in weights)
        tables = {id(codebook): codebook for codebook in codebooks}
        index = (self.clusters - 1).bit_length()
        bits = index + 8 * sum(codebook.size for codebook in tables.values()) / numbers
        layers = sum(len(weight.nodes) for weight in weights)
        span = f"{min(before)} to {max(before)}" if min(before) < max(before) else f"{max(before)}"
        return (
            f"weights of {layers} layers take at most {self.clusters} integers{self._whose(len(tables))}, before "
            f"{span}; their squared error is {clustered:.2g} of their energy on average ({rounded:.2g} before); with "
            f"indices of {index} bits and codebooks they take {bits:.2f} bits a weight"
        )

    def _whose(self, tables: int) -> str:
        if not self.shared:
            return " each"
        return " in all" if tables == 1 else f" in all of as many bits ({tables} codebooks)"


@dataclass
class _Weight:
    """One parameter and how its readers, the `nodes`, quantise it."""

    parameter: str
    nodes: list[str]
    data: np.ndarray
    bits: int
    qparams: QParams
    distinct: int

    @property
    def scale(self) -> np.ndarray:
        """Float64, broadcast against the weight."""
        shape = [-1 if axis == self.qparams.axis else 1 for axis in range(self.data.ndim)]
        return np.asarray(self.qparams.scale.astype(np.float64).reshape(shape))

    @property
    def steps(self) -> np.ndarray:
        """u, float64."""
        return np.asarray(self.data / self.scale)

    @property
    def energy(self) -> float:
        return float(np.square(self.data, dtype=np.float64).sum())

    def moments(self) -> np.ndarray:
        """As `best_codebook` takes them."""
        return moments_of(self.steps, np.broadcast_to(np.square(self.scale), self.data.shape), self.qparams.qmax)

    def error(self, found: np.ndarray) -> float:
        """The squared error of `found`, as a part of the energy."""
        return float(np.square(found.astype(np.float64) - self.data).sum()) / self.energy


def _clusterable(graph: Graph, plan: QuantPlan, clusters: int) -> tuple[list[_Weight], list[str]]:
    """The weights with more than so many integers, in execution order; and of the others, in words, why they stay."""
    readers: dict[str, list[WeightQuant]] = defaultdict(list)
    for node in graph.nodes:
        if node.name in plan.weights:
            quant = plan.weights[node.name]
            readers[node.inputs[quant.index]].append(quant)
    weights, told = [], []
    for parameter, quants in readers.items():
        data, nodes = graph.params[parameter].data, [quant.node for quant in quants]
        qparams = quants[0].qparams(data)
        distinct = np.unique(qparams.quantize(data)).size
        obstacle = _obstacle(graph, parameter, quants)
        if obstacle is None and distinct <= clusters:
            obstacle = f"its integers are {distinct} already" if distinct > 1 else "all its integers are the same"
        if obstacle is None:
            weights.append(_Weight(parameter, nodes, data, quants[0].bits, qparams, distinct))
        else:
            told.append(f"{', '.join(nodes)}: left as it is, {obstacle}")
    return weights, told


def _obstacle(graph: Graph, parameter: str, quants: list[WeightQuant]) -> Optional[str]:
    places = sum(node.inputs.count(parameter) for node in graph.nodes) + graph.outputs.count(parameter)
    if places > len(quants):
        return "its weight is also read as it is, in float"
    data = graph.params[parameter].data
    first, *others = ((quant.bits, quant.axis, quant.qparams(data).scale.tobytes()) for quant in quants)
    return "they quantise one weight by different scales" if any(other != first for other in others) else None


def moments_of(steps: np.ndarray, weights: np.ndarray, top: int) -> np.ndarray:
    """What the error of any codebook follows from: float64 (3, 4 · top + 2).

    Row by row Σ a, Σ a · u and Σ a · u² over numbers u with the weights a, each of the columns for an interval of u:
    below −top, half a step each up to top, and what is not below top. Arrays of any one shape; `top` 1 or more.
    """
    u, a = steps.reshape(-1), weights.reshape(-1)
    column = np.clip(np.floor(2 * u) + 2 * top, -1, 4 * top).astype(np.int64) + 1
    return np.stack([np.bincount(column, part, 4 * top + 2) for part in (a, a * u, a * u * u)])


def best_codebook(moments: np.ndarray, clusters: int) -> np.ndarray:
    """The integers from −top to top with the least Σ a · (u − c)², c the nearest of them to u: int32 (K,), rising.

    Exact, in O(K · top²): E(k, c), the least error of what lies below c with k entries of which c is the last, is
    min over b < c of E(k − 1, b) + the error between b and c, where what is nearer to b counts with b.

    Args:
        moments: of `moments_of`.
        clusters: K; 2 or more, at most 2 · top + 1.
    """
    integers = (moments.shape[1] - 2) // 2 + 1
    top = integers // 2
    sums = np.cumsum(moments, axis=1)  # up to each of the bounds −top, −top + ½, ..., top, and of everything
    entries = np.arange(-top, top + 1)
    own = 2 * np.arange(integers)  # the bound at which an entry lies

    def error(entry: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        mass, first, second = end - start
        return np.maximum(second - 2 * entry * first + np.square(entry) * mass, 0)

    below = error(entries, np.zeros((3, 1)), sums[:, own])
    above = error(entries, sums[:, own], sums[:, -1:])
    left, right = np.triu_indices(integers, 1)
    middle = left + right
    between = np.full((integers, integers), np.inf)
    between[left, right] = error(entries[left], sums[:, own[left]], sums[:, middle])
    between[left, right] += error(entries[right], sums[:, middle], sums[:, own[right]])
    least, before = below, []
    for _ in range(clusters - 1):
        sides = least[:, None] + between
        before.append(np.argmin(sides, axis=0))
        least = sides.min(axis=0)
    chosen = [int(np.argmin(least + above))]
    for choice in reversed(before):
        chosen.append(int(choice[chosen[-1]]))
    return entries[chosen[::-1]].astype(np.int32)


def nearest(steps: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """The entry of a rising codebook nearest to each of `steps`; int32, of their shape."""
    return np.asarray(codebook[np.searchsorted((codebook[:-1] + codebook[1:]) / 2, steps)])
