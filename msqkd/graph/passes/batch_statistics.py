"""BatchNorm by the statistics of its batch as ordinary operations: runtimes have it with running statistics only."""

from __future__ import annotations

from typing import Any

import numpy as np

from msqkd.graph.ir import Graph, Node, TensorType, Value
from msqkd.graph.norms import BATCH, statistics_of


def spell_out_statistics(graph: Graph) -> list[str]:
    """Replace each BatchNorm that uses batch statistics by means, differences and products, in place.

    Returns:
        The names of the new nodes. The last one of each BatchNorm has its name.
    """
    names: list[str] = []
    for node in [node for node in graph.nodes if node.op == "BatchNorm" and statistics_of(graph, node) == BATCH]:
        names += _spell_out(graph, node)
    graph.prune()
    graph.check()
    return names


def _spell_out(graph: Graph, norm: Node) -> list[str]:
    source, gamma, beta = norm.inputs[:3]
    kind = graph.values[norm.output].type
    assert kind is not None
    rank, channels = len(kind.shape), kind.shape[1]
    axes = tuple(axis for axis in range(rank) if axis != 1)
    row = TensorType((1, channels) + (1,) * (rank - 2), kind.dtype)
    nodes: list[Node] = []

    def step(op: str, operands: list[Any], type_: TensorType) -> str:
        inputs = [item if isinstance(item, str) else graph.add_const(item) for item in operands]
        output = graph.add_value(Value(graph.unique_value(f"{norm.output}_part"), "node", type_))
        name = graph.unique_node(f"{norm.name}.{op.lower()}")
        nodes.append(Node(name, op, inputs, [output], {}, norm.cell_path, norm.cell_types))
        graph.nodes.insert(graph.nodes.index(norm), nodes[-1])
        return output

    def as_row(value: str) -> str:
        if graph.values[value].kind == "param":
            return graph.add_const(graph.params[value].data.reshape(row.shape), value)
        return step("Reshape", [value, row.shape], row)

    apart = step("Sub", [source, step("ReduceMean", [source, axes, True], row)], kind)
    variance = step("ReduceMean", [step("Mul", [apart, apart], kind), axes, True], row)
    epsilon = np.asarray([graph.const(norm.inputs[6])], np.float32).reshape((1,) * rank)
    factor = step("Mul", [step("Rsqrt", [step("Add", [variance, epsilon], row)], row), as_row(gamma)], row)
    step("Add", [step("Mul", [apart, factor], kind), as_row(beta)], kind)
    graph.nodes.remove(norm)
    nodes[-1].name, nodes[-1].outputs = norm.name, norm.outputs[:1]
    return [node.name for node in nodes]
