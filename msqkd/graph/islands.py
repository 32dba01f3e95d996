"""Parts of a network cut out of it, to be computed in float by MindSpore between the integer kernels of a runtime."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import mindspore as ms
import numpy as np

from msqkd.graph.cell import to_cell
from msqkd.graph.ir import Graph, Node, Parameter, Value

_CELLS: WeakKeyDictionary[Graph, Any] = WeakKeyDictionary()


def cut(graph: Graph, nodes: Iterable[Node]) -> Graph:
    """`nodes` as a network of their own; parameters are shared with `graph`, nothing is copied.

    Python numbers, such as the sizes that ``Shape`` gives, cannot be handed over between runtimes: what computes one
    that `nodes` read is part of the island too, down to the tensor it comes from.

    Args:
        graph: the network.
        nodes: some of its nodes, in any order; no path between two of them may lead outside.

    Returns:
        A graph whose inputs are the tensors read from outside, in the order they are first read, and whose outputs are
        the tensors that others read or the network returns, in the order they are computed.
    """
    wanted = {node.name for node in nodes}
    inside = _with_numbers(graph, wanted)
    island = Graph(graph.name)
    for node in (node for node in graph.nodes if node.name in inside):
        for name in node.inputs:
            _add_input(island, graph, name)
        for name in node.outputs:
            island.add_value(graph.values[name])
        island.nodes.append(replace(node, inputs=list(node.inputs), outputs=list(node.outputs), attrs=dict(node.attrs)))
    read = set(graph.outputs).union(*(node.inputs for node in graph.nodes if node.name not in inside))
    island.outputs = [
        output
        for node in island.nodes
        if node.name in wanted
        for output in node.outputs
        if output in read and is_tensor(graph, output)
    ]
    island.check()
    return island


def is_tensor(graph: Graph, value: str) -> bool:
    """Whether a computed value is a tensor: the graph records a Python number without a type, or as an empty one."""
    kind = graph.values[value].type
    return kind is not None and kind.shape != (0,)


def run_island(graph: Graph, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The outputs of a graph for `arrays`, one an input; its cell is built at the first call and kept while it lives.

    Raises:
        CaptureError: the graph has a data type msqkd does not know.
    """
    if graph not in _CELLS:
        cell = to_cell(graph, shared=True)
        cell.graph = None  # a cell that held its own key would be kept for good
        _CELLS[graph] = cell
    found = _CELLS[graph](*(ms.Tensor(array) for array in arrays))
    return [tensor.asnumpy() for tensor in (found if isinstance(found, tuple) else (found,))]


def _with_numbers(graph: Graph, wanted: set[str]) -> set[str]:
    """The names `wanted`, and those of the nodes that compute the numbers they read."""
    inside = set(wanted)
    numbers: set[str] = set()
    for node in reversed(graph.nodes):
        if node.name in inside or numbers.intersection(node.outputs):
            inside.add(node.name)
            numbers.update(
                name for name in node.inputs if graph.values[name].kind == "node" and not is_tensor(graph, name)
            )
    return inside


def _add_input(island: Graph, graph: Graph, name: str) -> None:
    """Let the island know a value that one of its nodes reads."""
    value = graph.values[name]
    if name in island.values:
        return
    if value.kind == "param":
        island.params[name] = Parameter(graph.params[name].data, trainable=False)
    elif value.kind != "const":
        value = Value(name, "input", value.type)
        island.inputs.append(name)
    island.add_value(value)
