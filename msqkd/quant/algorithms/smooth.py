"""SmoothQuant: outlier channels of a LayerNorm moved into the weights of the layers that read it.

Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
arXiv:2211.10438, §4.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Optional

import numpy as np

from msqkd.errors import PlanError
from msqkd.graph.ir import Graph, Node
from msqkd.quant import uses
from msqkd.quant.algorithms.base import FLOAT_STAGE, Method, Work
from msqkd.quant.algorithms.biases import own, put
from msqkd.quant.algorithms.channels import Channels, Moments, layer_input, moved, watch

_LEAST = 1e-5
"""The smallest factor: what a channel of all but zeros is enlarged by stays finite."""


@dataclass
class SmoothQuant(Method):
    """Divide channel j of a LayerNorm by s_j = max|x_j|^α / max|w_j|^(1−α), and multiply its readers' weights by it.

    x are the samples at the LayerNorm's result and w_j what every reader multiplies channel j by, so that activation
    and weights share the difficulty. The divisor is put into gamma and beta: no operation is added, and the outputs of
    the float network stay as they are up to float rounding. A LayerNorm is taken where everything that reads it,
    through reshapes, transpositions and slices, is a dense layer or a product with a matrix of its own, and one of them
    at least is quantised. A channel that is zero on every sample, or that nobody weighs, gets the factor of the middle
    one.

    Attributes:
        alpha: how much of the range goes into the weights, 0 to 1: 0 makes the weights' columns even, 1 the channels.
    """

    name: ClassVar[str] = "smoothquant"
    stage: ClassVar[str] = FLOAT_STAGE

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise PlanError(f"smoothquant.alpha is {self.alpha}; allowed: 0 to 1")

    def apply(self, work: Work) -> list[str]:
        """Scale gamma and beta (C,) and the weights in both networks."""
        graph = work.graph
        taken: list[tuple[Node, list[tuple[Node, Channels]]]] = []
        left = []
        for norm in [node for node in graph.nodes if node.op == "LayerNorm"]:
            readers: list[tuple[Node, Channels]] = []
            reason = _own_obstacle(graph, norm) or _follow(graph, norm.output, _last(graph, norm), readers)
            if reason:
                left.append(f"{norm.name} ({reason})")
            elif any(node.name in work.plan.weights for node, _ in readers):
                taken.append((norm, readers))
        told = [f"not smoothed: {', '.join(left)}"] if left else []
        if not taken:
            return ["no LayerNorm is read by quantised layers with weights alone: nothing to smooth", *told]
        moments = {norm.output: Moments(_last(graph, norm)) for norm, _ in taken}
        watch(graph, work.samples(), list(moments), lambda name, value: moments[name].update(value))
        most = 1.0
        for done, (norm, readers) in enumerate(taken, start=1):
            scale = self._scale(graph, moments[norm.output].reach, readers)
            work.rewrite(partial(_write, norm=norm, readers=readers, scale=scale))
            most = max(most, float(scale.max() / scale.min()))
            work.progress(done, len(taken))
        return [f"LayerNorms smoothed: {len(taken)} (alpha {self.alpha:g}, factors up to 1:{most:.3g})", *told]

    def _scale(self, graph: Graph, reach: np.ndarray, readers: list[tuple[Node, Channels]]) -> np.ndarray:
        weighed = np.zeros(len(reach))
        for node, channels in readers:
            weight = np.abs(graph.params[node.inputs[1]].data.astype(np.float64))
            rows = np.moveaxis(weight, _input_axis(graph, node), 0)
            weighed = np.maximum(weighed, channels.gathered(rows.max(1)).max(1))
        live = (reach > 0) & (weighed > 0)
        if not live.any():
            return np.ones(len(reach))
        scale = np.ones(len(reach))
        scale[live] = np.maximum(reach[live] ** self.alpha / weighed[live] ** (1 - self.alpha), _LEAST)
        scale[~live] = np.median(scale[live])
        return scale


def _write(graph: Graph, norm: Node, readers: list[tuple[Node, Channels]], scale: np.ndarray) -> None:
    """Divide the channels of a LayerNorm by a scale (C,) in a network, and multiply its readers' weights by it."""
    for name in norm.inputs[1:3]:
        put(graph, name, graph.params[name].data / scale)
    for node, channels in readers:
        weight = graph.params[node.inputs[1]].data
        put(graph, node.inputs[1], weight * channels.spread(scale).reshape(_column(graph, node)))


def _last(graph: Graph, norm: Node) -> Channels:
    shape = graph.shape(norm.output)
    return Channels(len(shape) - 1, shape[-1])


def _own_obstacle(graph: Graph, norm: Node) -> Optional[str]:
    obstacle = uses.OBSTACLES["LayerNorm"](graph, norm)
    if obstacle is None and not all(own(graph, name) for name in norm.inputs[1:3]):
        obstacle = "another one has the same gamma or beta"
    return obstacle


def _follow(graph: Graph, value: str, channels: Channels, readers: list[tuple[Node, Channels]]) -> Optional[str]:
    """Collect the layers that read a value; returns why one of its readers is none, as a clause."""
    if value in graph.outputs:
        return "its result is an output"
    for node in graph.consumers(value):
        if _is_reader(graph, node, value, channels):
            if not own(graph, node.inputs[1]):
                return f"another layer has the weight of {node.name}"
            readers.append((node, channels))
            continue
        behind = moved(graph, node, channels)
        if behind is None:
            return f"{node.name} ({node.op}) reads it"
        reason = _follow(graph, node.output, behind, readers)
        if reason:
            return reason
    return None


def _is_reader(graph: Graph, node: Node, value: str, channels: Channels) -> bool:
    if node.op not in ("Dense", *uses.PRODUCTS) or node.inputs[0] != value or channels.axis != layer_input(graph, node):
        return False
    if node.op != "Dense" and any(graph.const(name) for name in node.inputs[2:3]):
        return False
    use = uses.weight_use(graph, node)
    return use is not None and len(graph.shape(node.inputs[1])) == 2


def _input_axis(graph: Graph, node: Node) -> int:
    """The axis of a matrix (two dimensions) along which its input channels are."""
    use = uses.weight_use(graph, node)
    assert use is not None
    assert use.axis is not None
    return 1 - use.axis


def _column(graph: Graph, node: Node) -> tuple[int, ...]:
    return (-1, 1) if _input_axis(graph, node) == 0 else (1, -1)
