"""Bring a captured graph to the few forms the rest of msqkd knows.

* Convolution followed by ``BiasAdd`` becomes ``Conv2D(x, weight, bias)``.
* A matrix product with a parameter as ``nn.Dense`` writes it becomes ``Dense(x, weight, bias)``, weight of shape (out, in).
* ``Flatten`` becomes ``Reshape`` (int8 runtimes have no Flatten).
"""

from __future__ import annotations

from math import prod

from msqkd.graph.ir import Graph, Node


def canonicalize(graph: Graph) -> None:
    """Apply every canonical form, in place."""
    for node in graph.nodes:
        if node.op == "MatMul" and _is_dense(graph, node):
            node.op, node.inputs = "Dense", node.inputs[:2]
        elif node.op == "Flatten":
            _flatten_to_reshape(graph, node)
    _merge_biases(graph)
    graph.prune()


def _is_dense(graph: Graph, node: Node) -> bool:
    x, weight, transpose_a, transpose_b = node.inputs[:4]
    is_weight = graph.values[weight].kind == "param" and graph.values[x].kind != "param"
    return is_weight and not graph.const(transpose_a) and bool(graph.const(transpose_b))


def _flatten_to_reshape(graph: Graph, node: Node) -> None:
    sample = graph.shape(node.inputs[0])[1:]
    if all(size > 0 for size in sample):
        node.op, node.attrs = "Reshape", {}
        node.inputs = [node.inputs[0], graph.add_const((-1, prod(sample)), "shape")]


def _merge_biases(graph: Graph) -> None:
    for node in list(graph.nodes):
        if node.op != "BiasAdd" or graph.values[node.inputs[1]].kind != "param":
            continue
        source = graph.producer(node.inputs[0])
        mergeable = source is not None and source.op in ("Conv2D", "Dense") and len(source.inputs) == 2
        if source is None or not mergeable or graph.consumers(source.output) != [node] or source.output in graph.outputs:
            continue
        source.inputs.append(node.inputs[1])
        source.outputs = node.outputs
        graph.nodes.remove(node)
