"""What each layer would cost, and lose, at each precision: what a search chooses from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Optional

import numpy as np

from msqkd.analysis.layer_times import FLOAT_KEY
from msqkd.analysis.sensitivity import Probe
from msqkd.graph.ir import Graph
from msqkd.quant.config import DYNAMIC, FLOAT16, FLOAT_PRECISION, INT8, WEIGHT_ONLY_FLOAT16, WIDE_BITS
from msqkd.quant.plan import QuantPlan, WeightQuant
from msqkd.quant.qparams import MAX_BITS

FLOAT = "float"
SIZE, BOPS, LATENCY = "size", "bops", "latency"
COSTS = {SIZE: "bytes", BOPS: "bit operations a sample", LATENCY: "microseconds a sample"}
"""What a search can have a budget of, and its unit."""

AS_PLANNED = ""
"""The kind of a precision that differs from the recipe's in the bits of the weight alone."""

_FLOAT_BITS, _HALF_BITS = 32, 16


@dataclass(frozen=True)
class Precision:
    """What a layer may be computed at.

    Attributes:
        name: for people.
        key: in a table of times (`msqkd.analysis.layer_times.KEYS`).
        bits: of the weight; None where it is no integer.
        settings: of the recipe's rule that asks for it, beside the bits.
        value_bits: of the layer's input; None for those the plan says.
    """

    name: str
    key: str
    bits: Optional[int] = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    value_bits: Optional[int] = None

    @property
    def kind(self) -> str:
        """What it is a variant of: `AS_PLANNED`, or the ``precision`` of its rule."""
        return str(self.settings.get("precision", AS_PLANNED))


IN_FLOAT = Precision(FLOAT, FLOAT_KEY, settings={"precision": FLOAT_PRECISION}, value_bits=_FLOAT_BITS)
IN_HALF = Precision("float16", "float16", settings={"precision": FLOAT16}, value_bits=_HALF_BITS)
STORED_HALF = Precision(
    "8 bits, float16 values", "8xfloat16", 8, {"precision": WEIGHT_ONLY_FLOAT16}, value_bits=_HALF_BITS
)
STORED_WIDE = Precision(
    "8 bits, 16-bit inputs", "8x16", 8, {"precision": DYNAMIC, "activation": {"bits": WIDE_BITS}}, value_bits=WIDE_BITS
)
"""For dense layers and products, whose inputs have rows."""


def with_bits(bits: int) -> Precision:
    """The recipe's own precision, with so many bits of the weight."""
    return Precision(f"{bits} bits", str(bits), bits)


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


def cost_of(graph: Graph, quant: WeightQuant, precision: Precision, act_bits: int, by: str) -> float:
    """What a layer takes of the budget at a precision.

    Args:
        graph: the deployment graph.
        quant: of the layer's weight; its scales count 4 bytes each.
        precision: see `Precision`.
        act_bits: of its input, as the plan says.
        by: ``size``, the bytes of the weight, or ``bops``, multiplications times the bits of both factors (Baskin et
            al. 2021, arXiv:1804.10969).
    """
    weight = quant.held_in(graph)
    held = precision.bits or precision.value_bits or _FLOAT_BITS
    if by == BOPS:
        return float(multiplications(graph, quant.node, quant.index) * held * (precision.value_bits or act_bits))
    scales = 1 if quant.axis is None else weight.shape[quant.axis]
    return math.ceil(weight.size * held / 8) + (4.0 * scales if precision.bits else 0.0)


def layer_cost(graph: Graph, plan: QuantPlan, name: str, precision: Precision, by: str) -> float:
    """What the layer called `name` takes; see `cost_of`."""
    value = graph.node(name).inputs[0]
    bits_in = plan.group_of(value).bits if value in plan.activations else MAX_BITS
    bits_in = plan.dynamic[name].bits if name in plan.dynamic else bits_in
    return cost_of(graph, plan.weights[name], precision, bits_in, by)


def layer_losses(
    graph: Graph,
    plan: QuantPlan,
    probe: Probe,
    names: Sequence[str],
    precisions: Sequence[Precision],
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, dict[str, float]]:
    """By layer and name of the precision, what the network's outputs lose when that layer alone has it.

    An input of the network, or a value computed in float that has no layer with a weight to be counted to, is quantised
    with each layer that reads it in int8.

    Args:
        graph: the deployment graph, its weights float.
        plan: every range known.
        probe: of a network with this plan, in which the layers have the kind of the precisions.
        names: of the layers.
        precisions: all of one kind.
        progress: called with the number of layers done.
    """
    found: dict[str, dict[str, float]] = {}
    for done, name in enumerate(names, start=1):
        found[name], on = {}, _with_inputs(graph, plan, probe, name)
        for precision in precisions:
            bits, quant = precision.bits, plan.weights.get(name)
            weights = {name: _rounded(graph, quant, bits)} if bits is not None and quant is not None else {}
            found[name][precision.name] = max(probe.loss(on, weights=weights), 0.0)
        progress(done)
    return found


def _with_inputs(graph: Graph, plan: QuantPlan, probe: Probe, name: str) -> set[str]:
    """A layer, and what else is switched so that its inputs are quantised where none but their readers want them so."""

    def is_read(value: str) -> bool:
        edges = [node for node, _ in plan.activations[value].edges]
        return name in (edges or [node.name for node in graph.consumers(value)])

    return {name} | {
        layer.name
        for layer in probe.network.layers
        if layer.values
        and not (layer.weights or layer.half)
        and (layer.op == "input" or plan.node(layer.name).precision != INT8)
        and all(map(is_read, layer.values))
    }


def _rounded(graph: Graph, quant: WeightQuant, bits: int) -> np.ndarray:
    """The weight as it is with so many bits, by the layer's own observer."""
    return replace(quant, bits=bits, clip_ratio=None, scale=None).rounded(quant.held_in(graph))
