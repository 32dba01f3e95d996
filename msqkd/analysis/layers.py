"""What quantisation does to each layer: ranges, scales and the signal-to-noise ratio along the network."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import Any, Optional

import mindspore as ms
import numpy as np

from msqkd.analysis.statistics import Distribution
from msqkd.data import Arrays, as_tuple
from msqkd.graph.cell import Hooks, to_cell
from msqkd.graph.ir import Graph
from msqkd.quant.fake_quant import QUANTIZE
from msqkd.quant.plan import QuantPlan
from msqkd.quant.qat import quantize_cell

_KEPT = 1 << 18  # numbers of one value and batch that go into its distribution


def layer_table(
    graph: Graph,
    plan: QuantPlan,
    reference: Graph,
    batches: Iterable[Arrays],
    seen: Optional[dict[str, Distribution]] = None,
) -> list[dict[str, Any]]:
    """One row an operation that begins a quantised value, or computes in float with a stored weight or in float16, in
    execution order.

    `sqnr_db` is 10·log10(E[x²] / E[(x − x̂)²]) between the value in `reference` (the float network, same value names)
    and in the quantised network, where everything before it is quantised too: it shows how the error builds up. Those
    of a ``weight`` and of an ``activation`` are of its own rounding alone; ``outside`` is the share (0–1) of the values
    seen that lie beyond the range by more than half a step.

    Args:
        graph: the deployment graph with the quantised network's parameters.
        plan: its plan, every range known.
        reference: the deployment graph of the float network.
        batches: samples (N, ...), or tuples of arrays for a network with several inputs; a few hundred are enough.
        seen: where given, filled with the distribution of every value as the quantised network sees it before it
            rounds it, by name; of at most 2^18 numbers a batch, evenly taken.
    """
    outside = [*plan.stored_weights(), *(node.name for node in plan.half_nodes())]
    stored = {graph.node(name).output for name in outside}
    values = [value.name for value in graph.activations() if value.name in plan.groups or value.name in stored]
    quantized = quantize_cell(graph, plan, observe=values)
    quantized.set_phase(QUANTIZE)
    plain = to_cell(reference, Hooks(observe=values))
    count = len(graph.outputs)
    signal, noise = np.zeros(len(values)), np.zeros(len(values))
    own = [_Rounding() for _ in values]
    low, high = np.full(len(values), np.inf), np.full(len(values), -np.inf)
    qparams = {name: group.qparams() for name, group in plan.groups.items()}
    for batch in batches:
        tensors = [ms.Tensor(array) for array in as_tuple(batch)]
        pairs = zip(values, plain(*tensors)[count:], quantized(*tensors)[count:])
        for index, (name, exact, raw) in enumerate(pairs):
            x, found = exact.asnumpy(), raw.asnumpy()
            signal[index] += _energy(x)
            rounded = qparams[name].fake_quantize(found) if name in qparams else found
            noise[index] += _energy(x - rounded)
            usual = found[np.isfinite(found)]  # a logarithm of a value that was rounded to 0 is infinite
            low[index] = min(low[index], usual.min(initial=np.inf))
            high[index] = max(high[index], usual.max(initial=-np.inf))
            if name in qparams:
                own[index].add(found, rounded, 0.5 * float(qparams[name].scale))
            if seen is not None:
                # An odd stride, so that every channel has its part.
                part = usual.ravel()[:: ceil(found.size / _KEPT) | 1]
                seen.setdefault(name, Distribution()).update(part, where=f"value '{name}'")
    rows = []
    for index, name in enumerate(values):
        owner = owner_of(graph, plan, name)
        rows.append(
            {
                "name": owner or name,
                "op": graph.node(owner).op if owner else "input",
                "value": name,
                "sqnr_db": decibel(signal[index], noise[index]),
                "weight": _weight(graph, plan, reference, owner),
                "activation": _activation(plan, name, low[index], high[index], own[index])
                if name in plan.groups
                else None,
            }
        )
    return rows


class _Rounding:
    """What rounding a value alone does to it, batch after batch."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0
        self.count = self.beyond = 0

    def add(self, exact: np.ndarray, rounded: np.ndarray, tolerance: float) -> None:
        error = exact - rounded
        self.signal += _energy(exact)
        self.noise += _energy(error)
        self.count += exact.size
        # Within its range a value is rounded by half a step at most.
        self.beyond += int(np.count_nonzero(np.abs(error) > 1.01 * tolerance))

    def to_dict(self) -> dict[str, Any]:
        return {"sqnr_db": decibel(self.signal, self.noise), "outside": self.beyond / max(self.count, 1)}


def _energy(x: np.ndarray) -> float:
    return float(np.square(x, dtype=np.float64).sum())


def owner_of(graph: Graph, plan: QuantPlan, value: str) -> Optional[str]:
    """The node in whose kernel a value is computed; None for an input of the network."""
    node = graph.producer(value)
    if node is None:
        return None
    return plan.node(node.name).fused_into or node.name


def decibel(signal: float, noise: float) -> Optional[float]:
    """10·log10 of the quotient of two energies; None where one of them is 0."""
    return float(10 * np.log10(signal / noise)) if signal > 0 and noise > 0 else None


def _weight(graph: Graph, plan: QuantPlan, reference: Graph, owner: Optional[str]) -> Optional[dict[str, Any]]:
    quant = plan.weights.get(owner or "")
    if quant is None:
        return None
    data = quant.held_in(graph)
    qparams = quant.qparams(data)
    scale = np.atleast_1d(qparams.scale)
    rounded = qparams.fake_quantize(data)
    exact = data
    if np.array_equal(rounded, data):  # a method has rounded it before: what it was is in the float network
        held = reference.params.get(graph.node(quant.node).inputs[quant.index])
        exact = data if held is None or held.data.shape != data.shape else held.data
    return {
        "min": float(data.min()), "max": float(data.max()), "bits": quant.bits, "per_channel": quant.axis is not None,
        "scales": int(scale.size), "scale_min": float(scale.min()), "scale_max": float(scale.max()),
        "sqnr_db": decibel(_energy(exact), _energy(exact - rounded)), "count": int(data.size),
    }  # fmt: skip


def _activation(plan: QuantPlan, value: str, low: float, high: float, own: _Rounding) -> dict[str, Any]:
    group = plan.groups[value]
    qparams = group.qparams()
    return {
        "lo": float(qparams.lo), "hi": float(qparams.hi), "observed_min": float(low), "observed_max": float(high),
        "scale": float(qparams.scale), "zero_point": int(qparams.zero_point), "bits": group.bits, **own.to_dict(),
    }  # fmt: skip
