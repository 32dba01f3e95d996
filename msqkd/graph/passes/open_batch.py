"""Two captures of one network, for different batch sizes, to one graph whose batch is open.

Library functions that ask for the size of their input in Python (`ops.interpolate`, `Tensor.var`) do not compile
without a batch size. With one they do, and what differs between two sizes is the batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from msqkd.errors import CaptureError
from msqkd.graph.ir import Graph, Node, TensorType, Value

_COMPUTED_SHAPE = ("Reshape", "BroadcastTo", "Tile")  # operations whose last argument may be computed
_END = 2  # where StridedSlice takes its end


class BatchError(CaptureError):
    """A network that computes something else for another batch size."""


def open_batch(one: Graph, other: Graph) -> Graph:
    """`one` with every dimension that differs in `other` set to -1 (changes and returns `one`).

    A shape argument that holds the batch is -1 there where the operation fills it in, else computed from the size of
    the first input.

    Raises:
        BatchError: the operations differ, or one has the batch size in an argument that cannot be left open.
    """
    if [node.op for node in one.nodes] != [node.op for node in other.nodes]:
        raise BatchError(
            f"{one.name}: it computes something else for another batch size; capture it with a fixed batch"
        )
    batches = one.shape(one.inputs[0])[0], other.shape(other.inputs[0])[0]
    for name, twin_name in zip(one.inputs, other.inputs):
        _open(one, name, other.values[twin_name])
    for node, twin in zip(list(one.nodes), other.nodes):
        for name, twin_name in zip(node.outputs, twin.outputs):
            _open(one, name, other.values[twin_name])
        _open_arguments(one, node, [other.values[name].const for name in twin.inputs], batches)
        if not all(_same(value, twin.attrs.get(key)) for key, value in node.attrs.items()):
            raise _fixed(one, node)
    one.prune()
    return one


def _open(graph: Graph, name: str, twin: Value) -> None:
    value = graph.values[name]
    if value.type is not None and twin.type is not None:
        shape = tuple(size if size == other else -1 for size, other in zip(value.type.shape, twin.type.shape))
        graph.values[name] = replace(value, type=TensorType(shape, value.type.dtype))


def _open_arguments(graph: Graph, node: Node, twins: list[Any], batches: tuple[int, int]) -> None:
    for index, name in enumerate(node.inputs):
        if graph.values[name].kind != "const" or _same(graph.const(name), twins[index]):
            continue
        if node.op == "StridedSlice" and index == _END and _takes_whole_batch(graph, node, batches[0]):
            twins = [graph.const(literal) for literal in node.inputs]
            continue
        if isinstance(twins[index], np.ndarray):
            node.inputs[index] = _open_array(graph, node, name, twins[index], batches)
            continue
        shape = graph.shape(node.output)
        if node.op == "Reshape" and shape.count(-1) == 1:
            node.inputs[index] = graph.add_const(shape, "shape")
            continue
        if node.op not in _COMPUTED_SHAPE or index + 1 != len(node.inputs) or not isinstance(twins[index], tuple):
            raise _fixed(graph, node)
        sizes = [_size(graph, node, *pair, batches) for pair in zip(graph.const(name), twins[index])]
        node.inputs[index:] = sizes
        node.sequences = (*node.sequences, (index, len(sizes)))
        return  # it was the last one


def _takes_whole_batch(graph: Graph, node: Node, batch: int) -> bool:
    """Let a slice that ends where the batch does, in front, say so by its mask."""
    end, *masks = (graph.const(name) for name in node.inputs[_END:])
    _, _, end_mask, ellipsis, new_axis, shrink = masks
    if end[0] != batch or (ellipsis | new_axis | shrink) & 1:
        return False
    node.inputs[_END] = graph.add_const((0, *end[1:]), "end")
    node.inputs[_END + 3] = graph.add_const(end_mask | 1, "end_mask")
    return True


def _open_array(graph: Graph, node: Node, name: str, twin: np.ndarray, batches: tuple[int, int]) -> str:
    """An array of equal samples, as ``zeros((batch, ...))`` gives it: one of them, repeated."""
    array = graph.const(name)
    if not array.ndim:
        return _open_number(graph, node, array, twin, batches)
    row = array[:1]
    repeated = array.shape[1:] == twin.shape[1:] and bool((array == row).all()) and bool((twin == row).all())
    if not repeated:
        raise _fixed(graph, node)
    sizes = [_size(graph, node, *pair, batches) for pair in zip(array.shape, twin.shape)]
    kind = TensorType((-1, *array.shape[1:]), str(array.dtype))
    output = graph.add_value(Value(graph.unique_value(f"{name}_repeated"), "node", kind))
    source = graph.add_const(row.copy(), name)
    label = graph.unique_node(".".join(filter(None, (node.cell_path, "repeat"))))
    repeat = Node(label, "BroadcastTo", [source, *sizes], [output], {}, node.cell_path, node.cell_types)
    repeat.sequences = ((1, len(sizes)),)
    graph.nodes.insert(graph.nodes.index(node), repeat)
    return output


def _open_number(graph: Graph, node: Node, array: np.ndarray, twin: np.ndarray, batches: tuple[int, int]) -> str:
    """Make a tensor without dimensions that holds the batch size, as ``Tensor(x.shape[0])`` does, from that size."""
    size, other = array.item(), twin.item()
    if isinstance(size, bool) or size != int(size) or other != int(other):
        raise _fixed(graph, node)
    kind = TensorType((), str(array.dtype))
    output = graph.add_value(Value(graph.unique_value("batch_tensor"), "node", kind))
    inputs = [_size(graph, node, int(size), int(other), batches), graph.add_const(str(array.dtype), "dtype")]
    label = graph.unique_node(".".join(filter(None, (node.cell_path, "batch_tensor"))))
    graph.nodes.insert(
        graph.nodes.index(node), Node(label, "ScalarToTensor", inputs, [output], {}, node.cell_path, node.cell_types)
    )
    return output


def _size(graph: Graph, node: Node, size: int, twin: int, batches: tuple[int, int]) -> str:
    """The value of one entry of a shape: a literal, or so many times the batch."""
    if size == twin:
        return graph.add_const(size, "size")
    times, rest = divmod(size, batches[0])
    if rest or times * batches[1] != twin:
        raise _fixed(graph, node)
    batch = batch_size(graph)
    if times == 1:
        return batch
    output = graph.add_value(Value(graph.unique_value("batch_times"), "node"))
    product = Node(graph.unique_node("batch_times"), "ScalarMul", [batch, graph.add_const(times, "times")], [output])
    graph.nodes.insert(graph.nodes.index(node), product)
    return output


def batch_size(graph: Graph) -> str:
    """The value of the batch size; what computes it comes first in the graph."""
    source, first = graph.inputs[0], graph.nodes[0]
    if first.op != "Shape" or first.inputs != [source]:
        rank = len(graph.shape(source))
        names = [graph.add_value(Value(graph.unique_value("size"), "node")) for _ in range(rank)]
        shape = Node(graph.unique_node("shape"), "Shape", [source], names, cell_types=(graph.name,), unpack=True)
        graph.nodes.insert(0, shape)
    return graph.nodes[0].outputs[0]


def _same(literal: Any, twin: Any) -> bool:
    if isinstance(literal, np.ndarray):
        return np.array_equal(literal, twin)
    return repr(literal) == repr(twin)


def _fixed(graph: Graph, node: Node) -> BatchError:
    return BatchError(
        f"{graph.name}: '{node.name}' ({node.op}) depends on the batch size; capture the network with a fixed batch"
    )
