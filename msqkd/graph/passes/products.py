"""Matrix products of any rank as the products int8 runtimes have: Dense, MatMul and BatchMatMul."""

from __future__ import annotations

from math import prod
from typing import Optional

from msqkd.graph.ir import Graph, Node, TensorType, Value

_GENERAL = ("MatMulExt", "MatmulExt")  # `ops.matmul`, `@` and their twins in mindspore.mint


def products(graph: Graph) -> None:
    """Rewrite the general matrix products and the layers over more than two dimensions, in place.

    A product whose operands broadcast against each other, or whose matrix is computed, stays as it is.
    """
    for node in list(graph.nodes):
        if node.op == "Dense" and node.functional:
            _dense(graph, node)
        elif node.op in _GENERAL and len(node.inputs) == 2:
            _matmul(graph, node)


def _dense(graph: Graph, node: Node) -> None:
    """`mint.nn.Linear` and `ops.dense` as a layer over rows, without a bias that is None."""
    kinds = [graph.values[name].kind for name in node.inputs[1:]]
    if kinds == ["param", "const"] and graph.const(node.inputs[2]) is None:
        node.inputs = node.inputs[:2]
    if len(graph.shape(node.inputs[0])) > 2:
        _over_rows(graph, node)


def _matmul(graph: Graph, node: Node) -> None:
    left, right = (graph.shape(name) for name in node.inputs)
    if min(len(left), len(right)) < 2:
        return
    if len(right) == 2:
        _times_matrix(graph, node)
    elif len(left) == len(right) and left[:-2] == right[:-2]:
        node.op = "BatchMatMul"
        node.inputs += [graph.add_const(False, "transpose") for _ in range(2)]


def _times_matrix(graph: Graph, node: Node) -> None:
    x, matrix = node.inputs
    source = graph.producer(matrix)
    swaps = source is not None and source.op == "Transpose" and tuple(graph.const(source.inputs[1])) == (1, 0)
    weight = source.inputs[0] if source is not None and swaps else matrix
    if graph.values[weight].kind != "param" or (len(graph.shape(x)) > 2 and not _over_rows(graph, node)):
        return
    if swaps:
        node.op, node.inputs = "Dense", [node.inputs[0], weight]
    else:
        node.op = "MatMul"
        node.inputs += [graph.add_const(False, "transpose") for _ in range(2)]


def _over_rows(graph: Graph, node: Node) -> bool:
    """Let `node` multiply rows, between two reshapes; False where too little is known of the shape."""
    source, kind = node.inputs[0], graph.values[node.output].type
    shape = graph.shape(source)
    if kind is None or shape.count(-1) > 1 or shape[-1] < 1 or kind.shape[-1] < 1:
        return False
    rows = -1 if -1 in shape else prod(shape[:-1])
    at = graph.nodes.index(node)
    flat = _reshape(graph, node, source, (rows, shape[-1]), kind.dtype)
    graph.nodes.insert(at, flat)
    node.inputs[0] = flat.output
    result = node.outputs[0]
    narrow = TensorType((rows, kind.shape[-1]), kind.dtype)
    node.outputs = [graph.add_value(Value(graph.unique_value(f"{result}_rows"), "node", narrow))]
    graph.nodes.insert(at + 2, _reshape(graph, node, node.output, kind.shape, kind.dtype, result))
    return True


def _reshape(
    graph: Graph, node: Node, source: str, shape: tuple[int, ...], dtype: str, output: Optional[str] = None
) -> Node:
    if output is None:
        output = graph.add_value(Value(graph.unique_value(f"{source}_rows"), "node", TensorType(shape, dtype)))
    inputs = [source, graph.add_const(shape, "shape")]
    name = graph.unique_node(f"{node.name}.reshape")
    return Node(name, "Reshape", inputs, [output], cell_path=node.cell_path, cell_types=node.cell_types)
