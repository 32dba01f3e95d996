"""BatchNorm next to the convolution or dense layer it follows: folded for deployment, or kept trainable for training.

With g = gamma / sqrt(variance + eps) the deployed layer has weight w·g and bias beta − mean·g (+ bias·g). Three training forms keep that
weight the one that is quantised:

* ``fold``: the layer is trained with the folded weight and bias; BatchNorm is gone.
* ``freeze``: statistics are constants; w, gamma and beta are trained and w·g is what the layer multiplies with.
* ``live``: batch statistics in training. The layer computes with the weight w·g of the running statistics, its output is divided by g again
  and normalised with the batch's statistics (as in the "conv, rescale, normalise" scheme of Krishnamoorthi, arXiv:1806.08342, §3.2.2).

All three keep the names of nodes and of the values between layers, so a plan made on the folded graph fits each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import numpy as np

from msqkd.graph.ir import Graph, Node, TensorType, Value

BATCHNORM_MODES = ("fold", "freeze", "live")
_TINY = 1e-6  # smallest |g| a live layer divides by


@dataclass
class _Pair:
    layer: Node
    norm: Node

    def names(self) -> tuple[str, str, str, str]:
        """gamma, beta, mean, variance."""
        return tuple(self.norm.inputs[1:5])  # type: ignore[return-value]


def fold_batchnorm(graph: Graph, mode: str = "fold") -> Graph:
    """A copy of `graph` with every BatchNorm that follows a convolution or dense layer brought to `mode`.

    BatchNorm elsewhere is left as it is.

    Raises:
        ValueError: `mode` is not one of fold, freeze, live.
    """
    if mode not in BATCHNORM_MODES:
        raise ValueError(f"batchnorm mode '{mode}' is not one of {', '.join(BATCHNORM_MODES)}")
    result = graph.copy()
    for norm in [node for node in result.nodes if node.op == "BatchNorm"]:
        pair = _match(result, norm)
        if pair is not None:
            {"fold": _fold, "freeze": _freeze, "live": _live}[mode](result, pair)
    result.prune()
    result.check()
    return result


def _match(graph: Graph, norm: Node) -> Optional[_Pair]:
    layer = graph.producer(norm.inputs[0])
    if layer is None or layer.op not in ("Conv2D", "Dense"):
        return None
    weight = layer.inputs[1]
    alone = graph.consumers(layer.output) == [norm] and layer.output not in graph.outputs
    own = graph.values[weight].kind == "param" and len(graph.consumers(weight)) == 1
    return _Pair(layer, norm) if alone and own else None


def _epsilon(graph: Graph, norm: Node) -> float:
    return float(graph.const(norm.inputs[6]))


def _column(rank: int) -> tuple[int, ...]:
    return (-1,) + (1,) * (rank - 1)


def _fold(graph: Graph, pair: _Pair) -> None:
    layer, norm = pair.layer, pair.norm
    gamma, beta, mean, variance = (graph.params[name].data.astype(np.float64) for name in pair.names())
    g = gamma / np.sqrt(variance + _epsilon(graph, norm))
    weight = graph.params[layer.inputs[1]]
    dtype = weight.data.dtype
    weight.data = (weight.data * g.reshape(_column(weight.data.ndim))).astype(dtype)
    old = graph.params[layer.inputs[2]].data if len(layer.inputs) == 3 else 0.0
    bias = (beta + (old - mean) * g).astype(dtype)
    if len(layer.inputs) == 3:
        graph.params[layer.inputs[2]].data = bias
    else:
        layer.inputs.append(graph.add_param(bias_name(layer.inputs[1]), bias))
    layer.outputs = list(norm.outputs[:1])
    graph.nodes.remove(norm)


def bias_name(weight: str) -> str:
    """The name of the bias that a folded layer gets: beside its weight."""
    return weight[: -len(".weight")] + ".bias" if weight.endswith(".weight") else weight + ".bias"


class _Emit:
    """Adds small computations on parameters in front of a node."""

    def __init__(self, graph: Graph, before: Node, like: Node) -> None:
        self.graph, self.before, self.like = graph, before, like

    def __call__(self, op: str, *operands: Any, hint: str) -> str:
        graph = self.graph
        inputs = [o if isinstance(o, str) else graph.add_const(o, hint + "_c") for o in operands]
        shapes = [graph.values[name].type for name in inputs if graph.values[name].type is not None]
        kind = max((s for s in shapes if s is not None), key=lambda s: len(s.shape), default=TensorType(()))
        output = graph.add_value(Value(graph.unique_value(f"{_safe(self.like.name)}_{hint}"), "node", kind))
        name = graph.unique_node(f"{self.like.name}.{hint}")
        node = Node(name, op, inputs, [output], cell_path=self.like.cell_path, cell_types=self.like.cell_types)
        graph.nodes.insert(graph.nodes.index(self.before), node)
        return output


def _safe(name: str) -> str:
    return name.replace(".", "_")


def _freeze(graph: Graph, pair: _Pair) -> None:
    layer, norm = pair.layer, pair.norm
    gamma, beta, mean, variance = pair.names()
    emit = _Emit(graph, layer, norm)
    inverse = (1.0 / np.sqrt(graph.params[variance].data.astype(np.float64) + _epsilon(graph, norm))).astype(np.float32)
    g = emit("Mul", gamma, inverse, hint="g")
    rank = len(graph.shape(layer.inputs[1]))
    weight = emit("Mul", layer.inputs[1], emit("Reshape", g, _column(rank), hint="g_column"), hint="weight")
    offset = graph.params[mean].data
    shifted = emit("Mul", g, offset, hint="g_mean") if len(layer.inputs) == 2 else emit("Mul", g, emit("Sub", offset, layer.inputs[2], hint="centre"), hint="g_mean")  # fmt: skip
    bias = emit("Sub", beta, shifted, hint="bias")
    layer.inputs = [layer.inputs[0], weight, bias]
    layer.outputs = list(norm.outputs[:1])
    graph.nodes.remove(norm)


def _live(graph: Graph, pair: _Pair) -> None:
    layer, norm = pair.layer, pair.norm
    gamma, _, _, variance = pair.names()
    emit = _Emit(graph, layer, norm)
    root = emit("Rsqrt", emit("Add", variance, np.float32(_epsilon(graph, norm)).reshape(1), hint="v"), hint="inverse")
    g = emit("Mul", gamma, root, hint="g")
    negative = emit("Less", g, np.zeros(1, np.float32), hint="negative")
    sign = emit("Select", negative, np.float32([-1.0]), np.float32([1.0]), hint="sign")
    g = emit("Mul", sign, emit("Maximum", emit("Abs", g, hint="size"), np.float32([_TINY]), hint="floor"), hint="g_safe")
    rank = len(graph.shape(layer.inputs[1]))
    weight = emit("Mul", layer.inputs[1], emit("Reshape", g, _column(rank), hint="g_column"), hint="weight")
    bias = layer.inputs[2:]
    layer.inputs = [layer.inputs[0], weight]
    after = _Emit(graph, norm, norm)
    channels = (1, -1, 1, 1) if layer.op == "Conv2D" else (1, -1)
    rescale = after("Reciprocal", after("Reshape", g, channels, hint="g_row"), hint="rescale")
    raw = after("Mul", layer.output, rescale, hint="raw")
    if bias:
        raw = after("Add", raw, after("Reshape", bias[0], channels, hint="bias_row"), hint="biased")
    norm.inputs[0] = raw
