"""Shapes of every value of a graph for one batch size."""

from __future__ import annotations

from math import prod

from msqkd.errors import ExportError
from msqkd.graph.ir import Graph, Node

Shape = tuple[int, ...]


def concrete_shapes(graph: Graph, batch: int) -> dict[str, Shape]:
    """Every value's shape with the open batch set to `batch`.

    Raises:
        ExportError: a size depends on more than the batch.
    """
    shapes = {value.name: value.type.shape for value in graph.values.values() if value.type is not None}
    for name in graph.inputs:
        shapes[name] = tuple(batch if size < 0 else size for size in shapes[name])
    for node in graph.nodes:
        for output in node.outputs:
            if output in shapes and min(shapes[output], default=0) < 0:
                shapes[output] = _closed(graph, node, shapes[output], shapes)
    return shapes


def _closed(graph: Graph, node: Node, shape: Shape, shapes: dict[str, Shape]) -> Shape:
    """`shape` with its open sizes found from the inputs of `node`."""
    if node.op == "Reshape" and shape.count(-1) == 1:
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
