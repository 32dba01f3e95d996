"""Shapes of every value of a graph for one batch size."""

from __future__ import annotations

from math import prod
from typing import Optional

import mindspore as ms
import numpy as np

from msqkd.graph.cell import Hooks, to_cell
from msqkd.graph.ir import Graph, Node
from msqkd.graph.islands import is_tensor

Shape = tuple[int, ...]


def concrete_shapes(graph: Graph, batch: int) -> dict[str, Shape]:
    """Every value's shape with the open batch set to `batch`.

    Where a size is computed from others in a way not known here, it is found by running the network once.
    """
    shapes = {value.name: value.type.shape for value in graph.values.values() if value.type is not None}
    for name in graph.inputs:
        shapes[name] = tuple(batch if size < 0 else size for size in shapes[name])
    if any(shape.count(-1) > 1 for shape in shapes.values()):
        return {**shapes, **_observed(graph, shapes)}
    producers = {output: node for node in graph.nodes for output in node.outputs}
    for node in graph.nodes:
        for output in node.outputs:
            if output in shapes and min(shapes[output], default=0) < 0:
                closed = _closed(graph, node, shapes[output], shapes, producers)
                if closed is None:
                    return {**shapes, **_observed(graph, shapes)}
                shapes[output] = closed
    return shapes


def _observed(graph: Graph, shapes: dict[str, Shape]) -> dict[str, Shape]:
    """The shapes of what the network computes for inputs of zeros."""
    names = [output for node in graph.nodes for output in node.outputs if is_tensor(graph, output)]
    cell = to_cell(graph, Hooks(observe=names))
    kinds = [graph.values[name].type for name in graph.inputs]
    zeros = [ms.Tensor(np.zeros(shapes[name], kind.dtype)) for name, kind in zip(graph.inputs, kinds) if kind]
    found = cell(*zeros)[len(graph.outputs) :]
    return {name: tuple(tensor.shape) for name, tensor in zip(names, found)}


def _closed(
    graph: Graph, node: Node, shape: Shape, shapes: dict[str, Shape], producers: dict[str, Node]
) -> Optional[Shape]:
    """`shape` with its open size found from what `node` reads, if it can be."""
    if node.op == "Reshape":
        known = -prod(shape)
        size: Optional[int] = prod(shapes[node.inputs[0]]) // known
    elif node.op == "Transpose":
        size = shapes[node.inputs[0]][graph.const(node.inputs[1])[shape.index(-1)]]
    elif node.op == "BroadcastTo":
        size = _asked(node.inputs[1:], shape.index(-1), shapes, producers)
    else:
        size = _size(graph, node, shape.index(-1), shapes)
    return None if size is None else tuple(size if known < 0 else known for known in shape)


def _asked(names: list[str], axis: int, shapes: dict[str, Shape], producers: dict[str, Node]) -> Optional[int]:
    """The size that a list of computed numbers has at `axis`, where it is that of a tensor."""
    source = producers.get(names[axis]) if axis < len(names) else None
    if source is None or source.op != "Shape" or not source.unpack:
        return None
    return shapes[source.inputs[0]][source.outputs.index(names[axis])]


def _size(graph: Graph, node: Node, axis: int, shapes: dict[str, Shape]) -> Optional[int]:
    for name in graph.tensor_inputs(node):
        declared = graph.shape(name)
        if axis < len(declared) and declared[axis] < 0:
            return shapes[name][axis]
    for name in graph.tensor_inputs(node):  # an axis came or went: the batch is the only open size there was
        if graph.shape(name).count(-1) == 1:
            return shapes[name][graph.shape(name).index(-1)]
    return None
