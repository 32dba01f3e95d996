"""BatchNorm next to the convolution or dense layer it follows: folded for deployment, or kept trainable for training.

With g = gamma / sqrt(variance + eps) the deployed layer has weight w·g and bias beta − mean·g (+ bias·g). Three
training forms keep that weight the one that is quantised:

* ``fold``: the layer is trained with the folded weight and bias; BatchNorm is gone.
* ``freeze``: statistics are constants; w, gamma and beta are trained and w·g is what the layer multiplies with.
* ``live``: batch statistics in training. The layer computes with the weight w·g of the running statistics, its output
  is divided by g again and normalised with the batch's statistics (as in the "conv, rescale, normalise" scheme of
  Krishnamoorthi, arXiv:1806.08342, §3.2.2).

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
    """A layer and what follows it: the BatchNorm, between two reshapes where the layer's output is not a map."""

    layer: Node
    norm: Node
    tail: list[Node]  # from the layer's reader to the node that gives the result, the norm among them

    @property
    def statistics(self) -> tuple[str, str, str, str]:
        """Names of gamma, beta, mean and variance."""
        gamma, beta, mean, variance = self.norm.inputs[1:5]
        return gamma, beta, mean, variance


def fold_batchnorm(graph: Graph, mode: str = "fold") -> Graph:
    """A copy of `graph` with every BatchNorm that follows a convolution or dense layer brought to `mode`.

    BatchNorm elsewhere is left as it is.

    Raises:
        ValueError: `mode` is not one of fold, freeze, live.
    """
    if mode not in BATCHNORM_MODES:
        raise ValueError(f"batchnorm mode '{mode}' is not one of {', '.join(BATCHNORM_MODES)}")
    result = graph.copy()
    apply = {"fold": _fold, "freeze": _freeze, "live": _live}[mode]
    # All are found before the first is rewritten, so that every mode finds the same ones.
    for pair in [_match(result, node) for node in result.nodes if node.op == "BatchNorm"]:
        if pair is not None:
            apply(result, pair)
    result.prune()
    result.check()
    return result


def _match(graph: Graph, norm: Node) -> Optional[_Pair]:
    pair = _pair(graph, norm)
    if pair is None or pair.layer.op not in ("Conv2D", "Dense"):
        return None
    chain = [pair.layer, *pair.tail]
    alone = all(graph.consumers(n.output) == [m] and n.output not in graph.outputs for n, m in zip(chain, chain[1:]))
    own = all(graph.values[p].kind == "param" and len(graph.consumers(p)) == 1 for p in pair.layer.inputs[1:])
    known = all(name in graph.params for name in pair.statistics)
    return pair if alone and own and known else None


def _pair(graph: Graph, norm: Node) -> Optional[_Pair]:
    source = graph.producer(norm.inputs[0])
    if source is None or source.op != "Reshape":
        return _Pair(source, norm, [norm]) if source is not None else None
    # nn.BatchNorm1d normalises (N, C) as (N, C, 1, 1)
    layer, readers = graph.producer(source.inputs[0]), graph.consumers(norm.output)
    if layer is None or len(readers) != 1 or readers[0].op != "Reshape":
        return None
    shape = graph.shape(layer.output)
    back = len(shape) == 2 and graph.shape(norm.output) == (*shape, 1, 1) and graph.shape(readers[0].output) == shape
    return _Pair(layer, norm, [source, norm, readers[0]]) if back else None


def _replace_tail(graph: Graph, pair: _Pair) -> None:
    """Let the layer give what the tail gave."""
    pair.layer.outputs = pair.tail[-1].outputs[:1]
    for node in pair.tail:
        graph.nodes.remove(node)


def _epsilon(graph: Graph, norm: Node) -> float:
    return float(graph.const(norm.inputs[6]))


def _column(rank: int) -> tuple[int, ...]:
    return (-1,) + (1,) * (rank - 1)


def _fold(graph: Graph, pair: _Pair) -> None:
    """Fold in the weight's own precision, operation for operation as `_freeze` computes."""
    layer = pair.layer
    gamma, beta, mean, _ = (graph.params[name].data for name in pair.statistics)
    g = gamma * _inverse_deviation(graph, pair)
    weight = graph.params[layer.inputs[1]]
    weight.data = weight.data * g.reshape(_column(weight.data.ndim))
    if len(layer.inputs) == 3:
        old = graph.params[layer.inputs[2]]
        old.data = beta - g * (mean - old.data)
    else:
        layer.inputs.append(graph.add_param(graph.unique_value(bias_name(layer.inputs[1])), beta - g * mean))
    _replace_tail(graph, pair)


def _inverse_deviation(graph: Graph, pair: _Pair) -> np.ndarray:
    """1 / sqrt(variance + eps), rounded once to the precision of the variance."""
    variance = graph.params[pair.statistics[3]].data
    return (1.0 / np.sqrt(variance.astype(np.float64) + _epsilon(graph, pair.norm))).astype(variance.dtype)


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
    gamma, beta, mean, _ = pair.statistics
    emit = _Emit(graph, layer, norm)
    g = emit("Mul", gamma, _inverse_deviation(graph, pair), hint="g")
    rank = len(graph.shape(layer.inputs[1]))
    weight = emit("Mul", layer.inputs[1], emit("Reshape", g, _column(rank), hint="g_column"), hint="weight")
    offset = graph.params[mean].data
    centre = emit("Sub", offset, layer.inputs[2], hint="centre") if len(layer.inputs) == 3 else offset
    bias = emit("Sub", beta, emit("Mul", g, centre, hint="g_mean"), hint="bias")
    layer.inputs = [layer.inputs[0], weight, bias]
    _replace_tail(graph, pair)


def _live(graph: Graph, pair: _Pair) -> None:
    layer, norm = pair.layer, pair.norm
    gamma, _, _, variance = pair.statistics
    emit = _Emit(graph, layer, norm)
    root = emit("Rsqrt", emit("Add", variance, np.float32(_epsilon(graph, norm)).reshape(1), hint="v"), hint="inverse")
    g = emit("Mul", gamma, root, hint="g")
    negative = emit("Less", g, np.zeros(1, np.float32), hint="negative")
    sign = emit("Select", negative, np.array([-1], np.float32), np.array([1], np.float32), hint="sign")
    size = emit("Maximum", emit("Abs", g, hint="size"), np.array([_TINY], np.float32), hint="floor")
    g = emit("Mul", sign, size, hint="g_safe")
    rank = len(graph.shape(layer.inputs[1]))
    weight = emit("Mul", layer.inputs[1], emit("Reshape", g, _column(rank), hint="g_column"), hint="weight")
    bias = layer.inputs[2:]
    layer.inputs = [layer.inputs[0], weight]
    reader = pair.tail[0]
    after = _Emit(graph, reader, norm)
    channels = (1, -1, 1, 1) if layer.op == "Conv2D" else (1, -1)
    rescale = after("Reciprocal", after("Reshape", g, channels, hint="g_row"), hint="rescale")
    raw = after("Mul", layer.output, rescale, hint="raw")
    if bias:
        raw = after("Add", raw, after("Reshape", bias[0], channels, hint="bias_row"), hint="biased")
    reader.inputs[0] = raw
