"""Adaptive rounding, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from msqkd.graph.ir import Graph
from msqkd.quant.algorithms.base import Work
from msqkd.quant.algorithms.rounding import Part, TrainedRounding, part_of, reconstruct, roundable
from msqkd.quant.plan import QuantPlan


@dataclass
class AdaRound(TrainedRounding):
    """Whether each weight is rounded up or down is trained, layer by layer, for what the layer gives.

    Nagel et al. 2020 (arXiv:2004.10568). Of each layer, with the activation function computed in its kernel, the target
    is what it gives in float on float inputs; its input is what arrives in the quantised network, the layers before
    being rounded already (the asymmetric reconstruction of the paper).

    The squared error is counted in units of what the nearest roundings make of it, 0.0002 for each weight, so that
    `reg` weighs the same at any number of bits and size of outputs. Adam moves a V by up to `lr` a step, and it
    has to travel up to 5 to decide for the other side: the default of 0.01 lets it go twice that way in 1000
    iterations, where the paper takes 10000 at a tenth. Fewer iterations need a larger one.

    Attributes: as of `msqkd.quant.algorithms.rounding.TrainedRounding`, for each layer.
    """

    name: ClassVar[str] = "adaround"

    def apply(self, work: Work) -> list[str]:
        """Set the weights of layers to scale · integer (float32), and the scales in the plan."""
        layers, told = roundable(work)
        parts = [layer_part(work.graph, work.plan, name) for name in layers]
        return reconstruct(work, parts, self, whole=False) + told


def layer_part(graph: Graph, plan: QuantPlan, name: str) -> Part:
    """A layer with the activation function computed in its kernel."""
    node = graph.node(name)
    tails = {found.name for found in plan.nodes if found.fused_into == name}
    readers = graph.consumers(node.output)
    fused = [reader for reader in readers if reader.name in tails and len(readers) == 1]
    return part_of(graph, name, [node, *fused], [name])
