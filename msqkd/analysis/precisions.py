"""What each layer would cost, and lose, at each precision: what a search chooses from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Callable, Optional

import numpy as np

from msqkd.analysis.sensitivity import Layer, Probe
from msqkd.graph.ir import Graph
from msqkd.quant.plan import QuantPlan, WeightQuant
from msqkd.quant.search import Choice

FLOAT = "float"
SIZE, BOPS = "size", "bops"
COSTS = {SIZE: "bytes", BOPS: "bit operations a sample"}
"""What a search can have a budget of, and its unit."""

_FLOAT_BITS = 32


def multiplications(graph: Graph, name: str, index: int = 1) -> int:
    """The multiplications a layer with a weight (input `index`) needs for one sample."""
    node = graph.node(name)
    weight = graph.params[node.inputs[index]].data
    if node.op == "Conv2D":
        places = graph.shape(node.output)[2:]
    elif node.op == "Conv2DTranspose":
        places = graph.shape(node.inputs[0])[2:]
    else:
        places = graph.shape(node.output)[1:-1]
    return int(weight.size) * math.prod(max(size, 1) for size in places)


def cost_of(graph: Graph, quant: WeightQuant, bits: Optional[int], act_bits: int, by: str) -> float:
    """What a layer takes of the budget with weights of so many bits; None is float.

    Args:
        graph: the deployment graph.
        quant: of the layer's weight; its scales count 4 bytes each.
        bits: of the weight.
        act_bits: of its input.
        by: ``size``, the bytes of the weight, or ``bops``, multiplications times the bits of both factors (Baskin et
            al. 2021, arXiv:1804.10969).
    """
    weight = quant.held_in(graph)
    if by == BOPS:
        wide, narrow = (_FLOAT_BITS, _FLOAT_BITS) if bits is None else (bits, act_bits)
        return float(multiplications(graph, quant.node, quant.index) * wide * narrow)
    if bits is None:
        return 4.0 * weight.size
    scales = 1 if quant.axis is None else weight.shape[quant.axis]
    return math.ceil(weight.size * bits / 8) + 4.0 * scales


def layer_choices(
    graph: Graph,
    plan: QuantPlan,
    probe: Probe,
    widths: Sequence[int],
    by: str,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, list[Choice]]:
    """By layer, what it would cost and lose at each width of its weight, and in float.

    The loss of a width is that of the network's outputs with this layer alone quantised, its values as the plan says.

    Args:
        graph: the deployment graph, its weights float.
        plan: every range known.
        probe: of a network with this plan.
        widths: bits of weights, 2 to 8.
        by: see `cost_of`.
        progress: called with the number of layers done.
    """
    found: dict[str, list[Choice]] = {}
    layers = [layer for layer in probe.network.layers if layer.weights]
    for done, layer in enumerate(layers, start=1):
        quants = [plan.weights[name] for name in layer.weights]
        bits_in = _bits_in(graph, plan, layer)
        floats = sum(cost_of(graph, quant, None, bits_in, by) for quant in quants)
        choices = [Choice(FLOAT, floats, 0.0)]
        for bits in widths:
            cost = sum(cost_of(graph, quant, bits, bits_in, by) for quant in quants)
            weights = {quant.node: _rounded(graph, quant, bits) for quant in quants}
            loss = max(probe.loss({layer.name}, weights=weights), 0.0)
            choices.append(Choice(f"{bits} bits", cost, loss))
        found[layer.name] = choices
        progress(done)
    return found


def _bits_in(graph: Graph, plan: QuantPlan, layer: Layer) -> int:
    value = graph.node(layer.weights[0]).inputs[0]
    return plan.group_of(value).bits if value in plan.activations else 8


def _rounded(graph: Graph, quant: WeightQuant, bits: int) -> np.ndarray:
    """The weight as it is with so many bits, by the layer's own observer."""
    data = quant.held_in(graph)
    other = replace(quant, bits=bits, clip_ratio=None, scale=None).settled(data)
    return np.asarray(other.qparams(data).fake_quantize(data))
