"""BatchNorm next to the convolution or dense layer it follows: folded for deployment, or kept trainable for training.

With g = gamma / sqrt(variance + eps) the deployed layer has weight w·g and bias beta − mean·g (+ bias·g). Three
training forms keep that weight the one that is quantised:

* ``fold``: the layer is trained with the folded weight and bias; BatchNorm is gone.
* ``freeze``: statistics are constants; w, gamma and beta are trained and w·g is what the layer multiplies with.
* ``live``: batch statistics in training. The layer computes with the weight w·g of the running statistics, its output
  is divided by g again and normalised with the batch's statistics (as in the "conv, rescale, normalise" scheme of
  Krishnamoorthi, arXiv:1806.08342, §3.2.2).

All three keep the names of nodes and of the values between layers, so a plan made on the folded graph fits each.
Several BatchNorms in a row are folded together. One that uses the statistics of its batch in evaluation too is never
folded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np

from msqkd.graph.ir import Graph, Node, TensorType, Value
from msqkd.graph.norms import BATCH, statistics_of

BATCHNORM_MODES = ("fold", "freeze", "live")
_TINY = 1e-6  # smallest |g| a live layer divides by


@dataclass
class _Run:
    """A layer and the BatchNorms behind it.

    Attributes:
        layer: the convolution or dense layer.
        norms: the BatchNorms, in order of execution.
        tail: all nodes from the layer's reader to the last result: `norms`, and the reshapes around them where the
            layer's output is not a map.
    """

    layer: Node
    norms: list[Node] = field(default_factory=list)
    tail: list[Node] = field(default_factory=list)


def fold_batchnorm(graph: Graph, mode: str = "fold") -> Graph:
    """Copy `graph` and bring every BatchNorm that follows a convolution or dense layer to `mode`.

    BatchNorm elsewhere is left as it is.

    Raises:
        ValueError: `mode` is not one of fold, freeze, live.
    """
    if mode not in BATCHNORM_MODES:
        raise ValueError(f"batchnorm mode '{mode}' is not one of {', '.join(BATCHNORM_MODES)}")
    result = graph.copy()
    apply = {"fold": _fold, "freeze": _freeze, "live": _live}[mode]
    # All are found before the first is rewritten, so that every mode finds the same ones.
    for run in [_match(result, node) for node in result.nodes if node.op in ("Conv2D", "Dense")]:
        if run.norms:
            apply(result, run)
    result.prune()
    result.check()
    return result


def _match(graph: Graph, layer: Node) -> _Run:
    """Find the BatchNorms that can be folded into `layer`."""
    run = _Run(layer)
    own = all(graph.values[p].kind == "param" and len(graph.consumers(p)) == 1 for p in layer.inputs[1:])
    while own:
        last = run.tail[-1] if run.tail else layer
        found = _next_norm(graph, last)
        if found is None or not _can_fold(graph, found[0]):
            break
        norm, nodes = found
        run.norms.append(norm)
        run.tail += nodes
    return run


def _can_fold(graph: Graph, norm: Node) -> bool:
    return statistics_of(graph, norm) != BATCH and all(name in graph.params for name in norm.inputs[1:5])


def _next_norm(graph: Graph, before: Node) -> Optional[tuple[Node, list[Node]]]:
    """Return the BatchNorm that is the only reader of `before`, and the nodes from there to its result."""
    reader = _only_reader(graph, before)
    if reader is None or reader.inputs[0] != before.output:
        return None
    if reader.op == "BatchNorm":
        return reader, [reader]
    if reader.op != "Reshape":
        return None
    # nn.BatchNorm1d normalises (N, C) as (N, C, 1, 1)
    shape, norm = graph.shape(before.output), _only_reader(graph, reader)
    back = _only_reader(graph, norm) if norm is not None and norm.op == "BatchNorm" else None
    if norm is None or back is None or back.op != "Reshape" or len(shape) != 2:
        return None
    same = graph.shape(norm.output) == (*shape, 1, 1) and graph.shape(back.output) == shape
    return (norm, [reader, norm, back]) if same else None


def _only_reader(graph: Graph, node: Node) -> Optional[Node]:
    readers = graph.consumers(node.output)
    return readers[0] if len(readers) == 1 and node.output not in graph.outputs else None


def _replace_tail(graph: Graph, run: _Run) -> None:
    """Let the layer give the result of the tail."""
    run.layer.outputs = run.tail[-1].outputs[:1]
    for node in run.tail:
        graph.nodes.remove(node)


def _epsilon(graph: Graph, norm: Node) -> float:
    return float(graph.const(norm.inputs[6]))


def _column(rank: int) -> tuple[int, ...]:
    return (-1,) + (1,) * (rank - 1)


def _fold(graph: Graph, run: _Run) -> None:
    """Fold in the weight's own precision, operation for operation as `_freeze` computes."""
    layer = run.layer
    weight = graph.params[layer.inputs[1]]
    for norm in run.norms:
        gamma, beta, mean = (graph.params[name].data for name in norm.inputs[1:4])
        g = gamma * _inverse_deviation(graph, norm)
        weight.data = weight.data * g.reshape(_column(weight.data.ndim))
        if len(layer.inputs) == 3:
            old = graph.params[layer.inputs[2]]
            old.data = beta - g * (mean - old.data)
        else:
            layer.inputs.append(graph.add_param(graph.unique_value(bias_name(layer.inputs[1])), beta - g * mean))
    _replace_tail(graph, run)


def _inverse_deviation(graph: Graph, norm: Node) -> np.ndarray:
    """1 / sqrt(variance + eps), rounded once to the precision of the variance."""
    variance = graph.params[norm.inputs[4]].data
    return (1.0 / np.sqrt(variance.astype(np.float64) + _epsilon(graph, norm))).astype(variance.dtype)


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


def _freeze(graph: Graph, run: _Run) -> None:
    layer = run.layer
    rank = len(graph.shape(layer.inputs[1]))
    for norm in run.norms:
        gamma, beta, mean = norm.inputs[1:4]
        emit = _Emit(graph, layer, norm)
        g = emit("Mul", gamma, _inverse_deviation(graph, norm), hint="g")
        weight = emit("Mul", layer.inputs[1], emit("Reshape", g, _column(rank), hint="g_column"), hint="weight")
        offset = graph.params[mean].data
        centre = emit("Sub", offset, layer.inputs[2], hint="centre") if len(layer.inputs) == 3 else offset
        bias = emit("Sub", beta, emit("Mul", g, centre, hint="g_mean"), hint="bias")
        layer.inputs = [layer.inputs[0], weight, bias]
    _replace_tail(graph, run)


def _live(graph: Graph, run: _Run) -> None:
    layer = run.layer
    rank = len(graph.shape(layer.inputs[1]))
    emit = _Emit(graph, layer, run.norms[0])
    g = _running_factor(graph, run.norms[0], emit)
    for norm in run.norms[1:]:
        g = emit("Mul", g, _running_factor(graph, norm, _Emit(graph, layer, norm)), hint="g_product")
    negative = emit("Less", g, np.zeros(1, np.float32), hint="negative")
    sign = emit("Select", negative, np.array([-1], np.float32), np.array([1], np.float32), hint="sign")
    size = emit("Maximum", emit("Abs", g, hint="size"), np.array([_TINY], np.float32), hint="floor")
    g = emit("Mul", sign, size, hint="g_safe")
    weight = emit("Mul", layer.inputs[1], emit("Reshape", g, _column(rank), hint="g_column"), hint="weight")
    bias = layer.inputs[2:]
    layer.inputs = [layer.inputs[0], weight]
    reader = run.tail[0]
    after = _Emit(graph, reader, run.norms[0])
    channels = (1, -1, 1, 1) if layer.op == "Conv2D" else (1, -1)
    rescale = after("Reciprocal", after("Reshape", g, channels, hint="g_row"), hint="rescale")
    raw = after("Mul", layer.output, rescale, hint="raw")
    if bias:
        raw = after("Add", raw, after("Reshape", bias[0], channels, hint="bias_row"), hint="biased")
    reader.inputs[0] = raw


def _running_factor(graph: Graph, norm: Node, emit: _Emit) -> str:
    """Return the value gamma / sqrt(moving variance + eps) of a BatchNorm."""
    epsilon = np.float32(_epsilon(graph, norm)).reshape(1)
    root = emit("Rsqrt", emit("Add", norm.inputs[4], epsilon, hint="v"), hint="inverse")
    return emit("Mul", norm.inputs[1], root, hint="g")
