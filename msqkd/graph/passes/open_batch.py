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

_TAKE_ANY_SIZE = ("Reshape", "BroadcastTo")  # operations that read -1 as "whatever it is"


def open_batch(one: Graph, other: Graph) -> Graph:
    """`one` with every dimension that differs in `other` set to -1 (changes and returns `one`).

    Raises:
        CaptureError: the operations differ, or one has the batch size in an argument that cannot be left open.
    """
    if [node.op for node in one.nodes] != [node.op for node in other.nodes]:
        raise CaptureError(
            f"{one.name}: it computes something else for another batch size; capture it with a fixed batch"
        )
    for name, twin_name in zip(one.inputs, other.inputs):
        _open(one, name, other.values[twin_name])
    for node, twin in zip(one.nodes, other.nodes):
        for name, twin_name in zip(node.outputs, twin.outputs):
            _open(one, name, other.values[twin_name])
        for index, (name, twin_name) in enumerate(zip(node.inputs, twin.inputs)):
            if one.values[name].kind == "const" and not _same(one.const(name), other.const(twin_name)):
                node.inputs[index] = one.add_const(_open_shape(one, node), "shape")
        if not all(_same(value, twin.attrs.get(key)) for key, value in node.attrs.items()):
            raise _fixed(one, node)
    one.prune()
    return one


def _open(graph: Graph, name: str, twin: Value) -> None:
    value = graph.values[name]
    if value.type is not None and twin.type is not None:
        shape = tuple(size if size == other else -1 for size, other in zip(value.type.shape, twin.type.shape))
        graph.values[name] = replace(value, type=TensorType(shape, value.type.dtype))


def _same(literal: Any, twin: Any) -> bool:
    if isinstance(literal, np.ndarray):
        return np.array_equal(literal, twin)
    return repr(literal) == repr(twin)


def _open_shape(graph: Graph, node: Node) -> tuple[int, ...]:
    """The shape that `node` makes, as its argument."""
    shape = graph.shape(node.output)
    if node.op in _TAKE_ANY_SIZE and shape.count(-1) == 1:
        return shape
    raise _fixed(graph, node)


def _fixed(graph: Graph, node: Node) -> CaptureError:
    return CaptureError(
        f"{graph.name}: '{node.name}' ({node.op}) depends on the batch size; capture the network with a fixed batch"
    )
