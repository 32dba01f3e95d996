"""The integers of the layers an Ascend NPU computes in int8, made from a network and its plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import numpy as np

from msqkd.errors import ExportError
from msqkd.graph.ir import Graph, Node
from msqkd.integer.ascend import pack_scale
from msqkd.quant.integers import bias_steps, int8_grids
from msqkd.quant.plan import QuantPlan
from msqkd.quant.qparams import QParams
from msqkd.targets.ascend import ASCEND

_INT32_MAX = 2**31 - 1
_LARGEST_INPUT = 128


@dataclass(frozen=True, eq=False)
class AscendLayer:
    """One convolution or dense layer as ``Quant``, ``Conv2D`` and ``Dequant`` compute it.

    Attributes:
        node: its name in the graph.
        source: the value it reads, float.
        result: the value it gives, float: the node's own, or that of the ReLU computed with it.
        relu: the name of that ReLU; empty where there is none.
        input_scale: step of the quantised input, float32; its zero point is 0.
        weight: int8, in [-127, 127], shaped as in the graph.
        weight_scale: its step, float32 of shape (1,) or (Cout,).
        bias: int32 of shape (Cout,), in steps of `scale`; None where the layer has none.
    """

    node: str
    source: str
    result: str
    relu: str
    input_scale: np.float32
    weight: np.ndarray
    weight_scale: np.ndarray
    bias: Optional[np.ndarray]

    @property
    def scale(self) -> np.ndarray:
        """What a step of the sum is worth: input scale times weight scale, float32 of shape (1,) or (Cout,)."""
        return np.asarray(self.input_scale * self.weight_scale)

    @property
    def quant_scale(self) -> float:
        """The ``scale`` of ``Quant``: the float32 reciprocal of the step, by which training multiplies too."""
        return float(np.float32(1) / self.input_scale)

    @property
    def deq_scale(self) -> np.ndarray:
        """The second input of ``Dequant``: uint64 of shape (1,) or (Cout,)."""
        return pack_scale(self.scale)


def ascend_layers(graph: Graph, plan: QuantPlan) -> dict[str, AscendLayer]:
    """The int8 layers of a deployment graph by node name, in execution order.

    Raises:
        PlanError: a range is missing.
        ExportError: the plan is for another target, or a layer has something the NPU cannot represent: a zero point
            other than 0, or a sum beyond 32 bits.
    """
    if plan.target != ASCEND.name:
        raise ExportError(f"the plan is made for the target '{plan.target}'; allowed: '{ASCEND.name}'")
    relus = {node.fused_into: graph.node(node.name) for node in plan.nodes if node.fused_into}
    grids = int8_grids(graph, plan, requantised=False)
    return {
        node.name: _layer(graph, plan, node, grids[node.name], relus.get(node.name))
        for node in graph.nodes
        if node.name in grids
    }


def _layer(graph: Graph, plan: QuantPlan, node: Node, qparams: QParams, relu: Optional[Node]) -> AscendLayer:
    source = node.inputs[0]
    input_scale = _input_scale(plan, node, source)
    floats = graph.params[node.inputs[1]].data
    weight, weight_scale = qparams.quantize(floats).astype(np.int8), np.atleast_1d(qparams.scale)
    bias = bias_steps(graph.params[node.inputs[2]].data, float(input_scale), qparams) if len(node.inputs) > 2 else None
    _check_sums(node.name, weight, bias)
    result, name = (relu.output, relu.name) if relu is not None else (node.output, "")
    return AscendLayer(node.name, source, result, name, input_scale, weight, weight_scale, bias)


def _input_scale(plan: QuantPlan, node: Node, source: str) -> np.float32:
    qparams = plan.group_of(source).qparams()
    if qparams.zero_point:
        raise ExportError(
            f"{node.name}: its input '{source}' has zero point {int(qparams.zero_point)}; Ascend pads with 0 and takes "
            "symmetric activations only (leave act_symmetric to the target, or set it to true)"
        )
    return np.float32(qparams.scale)


def _check_sums(name: str, weight: np.ndarray, bias: Optional[np.ndarray]) -> None:
    """No input may drive a channel's sum out of 32 bits."""
    largest = _LARGEST_INPUT * np.abs(weight.reshape(len(weight), -1).astype(np.int64)).sum(axis=1)
    if bias is not None:
        largest = largest + np.abs(bias.astype(np.int64))
    if largest.max() > _INT32_MAX:
        raise ExportError(
            f"{name}: the integer sum of channel {int(largest.argmax())} can reach {int(largest.max())}; allowed are "
            f"{_INT32_MAX} (keep the layer float by a rule)"
        )
