"""What quantisation does to each layer: ranges, scales and the signal-to-noise ratio along the network."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Optional

import mindspore as ms
import numpy as np

from msqkd.data import Arrays, as_tuple
from msqkd.graph.cell import Hooks, to_cell
from msqkd.graph.ir import Graph
from msqkd.quant.fake_quant import QUANTIZE
from msqkd.quant.plan import QuantPlan
from msqkd.quant.qat import quantize_cell


def layer_table(graph: Graph, plan: QuantPlan, reference: Graph, batches: Iterable[Arrays]) -> list[dict[str, Any]]:
    """One row an operation that begins a quantised value or computes in float with a stored weight, in execution order.

    `sqnr_db` is 10·log10(E[x²] / E[(x − x̂)²]) between the value in `reference` (the float network, same value names)
    and in the quantised network, where everything before it is quantised too: it shows how the error builds up.

    Args:
        graph: the deployment graph with the quantised network's parameters.
        plan: its plan, every range known.
        reference: the deployment graph of the float network.
        batches: samples (N, ...), or tuples of arrays for a network with several inputs; a few hundred are enough.
    """
    stored = {graph.node(name).output for name in plan.stored_weights()}
    values = [value.name for value in graph.activations() if value.name in plan.groups or value.name in stored]
    quantized = quantize_cell(graph, plan, observe=values)
    quantized.set_phase(QUANTIZE)
    plain = to_cell(reference, Hooks(observe=values))
    count = len(graph.outputs)
    signal, noise = np.zeros(len(values)), np.zeros(len(values))
    low, high = np.full(len(values), np.inf), np.full(len(values), -np.inf)
    qparams = {name: group.qparams() for name, group in plan.groups.items()}
    for batch in batches:
        tensors = [ms.Tensor(array) for array in as_tuple(batch)]
        pairs = zip(values, plain(*tensors)[count:], quantized(*tensors)[count:])
        for index, (name, exact, raw) in enumerate(pairs):
            x, seen = exact.asnumpy(), raw.asnumpy()
            signal[index] += float(np.square(x, dtype=np.float64).sum())
            rounded = qparams[name].fake_quantize(seen) if name in qparams else seen
            noise[index] += float(np.square(x - rounded, dtype=np.float64).sum())
            low[index], high[index] = min(low[index], seen.min()), max(high[index], seen.max())
    rows = []
    for index, name in enumerate(values):
        owner = owner_of(graph, plan, name)
        rows.append(
            {
                "name": owner or name,
                "op": graph.node(owner).op if owner else "input",
                "value": name,
                "sqnr_db": decibel(signal[index], noise[index]),
                "weight": _weight(graph, plan, owner),
                "activation": _activation(plan, name, low[index], high[index]) if name in plan.groups else None,
            }
        )
    return rows


def owner_of(graph: Graph, plan: QuantPlan, value: str) -> Optional[str]:
    """The node in whose kernel a value is computed; None for an input of the network."""
    node = graph.producer(value)
    if node is None:
        return None
    return plan.node(node.name).fused_into or node.name


def decibel(signal: float, noise: float) -> Optional[float]:
    """10·log10 of the quotient of two energies; None where one of them is 0."""
    return float(10 * np.log10(signal / noise)) if signal > 0 and noise > 0 else None


def _weight(graph: Graph, plan: QuantPlan, owner: Optional[str]) -> Optional[dict[str, Any]]:
    quant = plan.weights.get(owner or "")
    if quant is None:
        return None
    data = quant.held_in(graph)
    scale = np.atleast_1d(quant.qparams(data).scale)
    return {
        "min": float(data.min()), "max": float(data.max()), "bits": quant.bits, "per_channel": quant.axis is not None,
        "scales": int(scale.size), "scale_min": float(scale.min()), "scale_max": float(scale.max()),
    }  # fmt: skip


def _activation(plan: QuantPlan, value: str, low: float, high: float) -> dict[str, Any]:
    group = plan.groups[value]
    qparams = group.qparams()
    return {
        "lo": float(qparams.lo), "hi": float(qparams.hi), "observed_min": float(low), "observed_max": float(high),
        "scale": float(qparams.scale), "zero_point": int(qparams.zero_point), "bits": group.bits,
    }  # fmt: skip
