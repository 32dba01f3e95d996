"""Adaptive rounding, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from msqkd.graph.ir import Graph
from msqkd.quant.algorithms.base import INTEGER_STAGE, Method, Work
from msqkd.quant.algorithms.rounding import Part, Training, part_of, reconstruct, roundable
from msqkd.quant.plan import QuantPlan


@dataclass
class AdaRound(Method):
    """Whether each weight is rounded up or down is trained, layer by layer, for what the layer gives.

    Nagel et al. 2020 (arXiv:2004.10568). Of each layer, with the activation function computed in its kernel, the target
    is what it gives in float on float inputs; its input is what arrives in the quantised network, the layers before
    being rounded already (the asymmetric reconstruction of the paper).

    The squared error is counted in units of what the nearest roundings make of it, 0.0002 for each weight, so that
    `reg` weighs the same at any number of bits and size of outputs. Adam moves a V by up to `lr` a step, and it
    has to travel up to 5 to decide for the other side: the default of 0.01 lets it go twice that way in 1000
    iterations, where the paper takes 10000 at a tenth. Fewer iterations need a larger one.

    Attributes:
        iterations: training steps a layer; 1 or more.
        batch_size: samples a step; 1 or more, at most all there are.
        lr: of Adam; above 0, up to 1.
        warmup: share of the iterations without the regulariser; 0 to below 1.
        beta: its exponent after the warm-up and at the end, which it falls to evenly; not rising, from 1.
        reg: its weight; 0 or more.
    """

    iterations: int = 1000
    batch_size: int = 32
    lr: float = 1e-2
    warmup: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)
    reg: float = 0.01

    name: ClassVar[str] = "adaround"
    stage: ClassVar[str] = INTEGER_STAGE

    def __post_init__(self) -> None:
        self._training().check(self.name)

    def _training(self) -> Training:
        return Training(self.iterations, self.batch_size, self.lr, self.warmup, self.beta, self.reg)

    def apply(self, work: Work) -> list[str]:
        """Set the weights of layers to scale · integer (float32), and the scales in the plan."""
        layers, told = roundable(work)
        parts = [layer_part(work.graph, work.plan, name) for name in layers]
        return reconstruct(work, parts, self._training(), whole=False) + told


def layer_part(graph: Graph, plan: QuantPlan, name: str) -> Part:
    """A layer with the activation function computed in its kernel."""
    node = graph.node(name)
    tails = {found.name for found in plan.nodes if found.fused_into == name}
    readers = graph.consumers(node.output)
    fused = [reader for reader in readers if reader.name in tails and len(readers) == 1]
    return part_of(graph, name, [node, *fused], [name])
