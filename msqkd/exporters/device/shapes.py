"""Shapes of every value of a graph for one batch size."""

from __future__ import annotations

from math import prod

import mindspore as ms
import numpy as np

from msqkd.errors import ExportError
from msqkd.exporters.islands import is_tensor
from msqkd.graph.cell import Hooks, to_cell
from msqkd.graph.ir import Graph, Node

Shape = tuple[int, ...]


def concrete_shapes(graph: Graph, batch: int) -> dict[str, Shape]:
    """Every value's shape with the open batch set to `batch`.

    Where a size is computed by the network from others, it is found by running the network once.

    Raises:
        ExportError: a size depends on more than the batch.
    """
    shapes = {value.name: value.type.shape for value in graph.values.values() if value.type is not None}
    for name in graph.inputs:
        shapes[name] = tuple(batch if size < 0 else size for size in shapes[name])
    if any(shape.count(-1) > 1 for shape in shapes.values()):
        return {**shapes, **_observed(graph, shapes)}
    for node in graph.nodes:
        for output in node.outputs:
            if output in shapes and min(shapes[output], default=0) < 0:
                shapes[output] = _closed(graph, node, shapes[output], shapes)
    return shapes


def _observed(graph: Graph, shapes: dict[str, Shape]) -> dict[str, Shape]:
    """The shapes of what the network computes for inputs of zeros."""
    names = [output for node in graph.nodes for output in node.outputs if is_tensor(graph, output)]
    cell = to_cell(graph, Hooks(observe=names))
    kinds = [graph.values[name].type for name in graph.inputs]
    zeros = [ms.Tensor(np.zeros(shapes[name], kind.dtype)) for name, kind in zip(graph.inputs, kinds) if kind]
    found = cell(*zeros)[len(graph.outputs) :]
    return {name: tuple(tensor.shape) for name, tensor in zip(names, found)}


def _closed(graph: Graph, node: Node, shape: Shape, shapes: dict[str, Shape]) -> Shape:
    """`shape` with its open size found from the inputs of `node`."""
    if node.op == "Reshape":
        known = -prod(shape)
        return tuple(prod(shapes[node.inputs[0]]) // known if size < 0 else size for size in shape)
    if node.op == "Transpose":
        source = shapes[node.inputs[0]]
        return tuple(source[axis] for axis in graph.const(node.inputs[1]))
    return tuple(_size(graph, node, axis, size, shapes) for axis, size in enumerate(shape))


def _size(graph: Graph, node: Node, axis: int, size: int, shapes: dict[str, Shape]) -> int:
    if size >= 0:
        return size
    for name in graph.tensor_inputs(node):
        declared = graph.shape(name)
        if axis < len(declared) and declared[axis] < 0:
            return shapes[name][axis]
    for name in graph.tensor_inputs(node):  # an axis came or went: the batch is the only open size there was
        if graph.shape(name).count(-1) == 1:
            return shapes[name][graph.shape(name).index(-1)]
    raise ExportError(f"{node.name} ({node.op}): size {axis} of its output is not known; capture with a fixed batch")
