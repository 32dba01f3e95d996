"""A bias for every layer that can have one, where methods put what they move or correct."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from msqkd.graph.ir import Graph, Node
from msqkd.graph.passes.fold_batchnorm import bias_name

_LAYERS = ("Conv2D", "Dense")
"""The operations whose third input is a bias; that of a Conv2DTranspose is the shape of its result."""


def with_biases(graph: Graph) -> Graph:
    """A copy of a deployment graph in which every convolution and dense layer has a bias of its own.

    A layer without one gets zeros, float32 (O,), as a parameter beside its weight (``conv1.weight``, ``conv1.bias``). A
    bias that others read too is copied for each layer. The network computes the same values, its nodes and values keep
    their names. Layers whose weight is computed or not float32 stay as they are.
    """
    result = graph.copy()
    for node in layers(result):
        weight = node.inputs[1]
        if len(node.inputs) == 2:
            zeros = np.zeros(result.shape(weight)[0], np.float32)
            node.inputs.append(result.add_param(result.unique_value(bias_name(weight)), zeros))
        elif result.values[node.inputs[2]].kind == "param" and _uses(result, node.inputs[2]) > 1:
            held = result.params[node.inputs[2]]
            name = result.unique_value(f"{node.name}.bias")
            node.inputs[2] = result.add_param(name, held.data.copy(), held.trainable)
    result.check()
    return result


def layers(graph: Graph) -> Iterator[Node]:
    """The convolutions and dense layers of `graph` whose weight is a float32 parameter, in execution order."""
    for node in graph.nodes:
        if node.op not in _LAYERS or graph.values[node.inputs[1]].kind != "param":
            continue
        if graph.params[node.inputs[1]].data.dtype == np.float32:
            yield node


def own(graph: Graph, value: str) -> bool:
    """Whether `value` is a parameter that one place alone reads, so that it may change for that one."""
    return graph.values[value].kind == "param" and _uses(graph, value) == 1


def put(graph: Graph, name: str, data: np.ndarray) -> None:
    """Replace the array of a parameter: float32, of the shape it had."""
    held = graph.params[name]
    held.data = data.astype(np.float32).reshape(held.data.shape)


def _uses(graph: Graph, value: str) -> int:
    return sum(node.inputs.count(value) for node in graph.nodes) + graph.outputs.count(value)
