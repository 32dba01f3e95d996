"""What a network computes from parameters and sizes alone, once the batch is fixed: constants of the program."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from msqkd.graph.ir import Graph, Node, Value
from msqkd.graph.ops import scalar_type
from msqkd.graph.passes.computed_weights import computed_from_constants, replace_constants
from msqkd.quant.integers import on_grid
from msqkd.quant.plan import WeightQuant

_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "ScalarAdd": operator.add, "ScalarSub": operator.sub, "ScalarMul": operator.mul, "ScalarDiv": operator.truediv,
    "ScalarFloorDiv": operator.floordiv, "ScalarMod": operator.mod,
}  # fmt: skip
_FILLED = {"ZerosLike": 0, "OnesLike": 1}
FROZEN = ("Shape", "ScalarCast", *_ARITHMETIC, *_FILLED, "Zeros", "Ones")
"""Operations that give numbers or constants once the batch is known."""


def freeze(graph: Graph, shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, WeightQuant]) -> None:
    """Replace every size by its number, and what is computed from parameters and literals by a parameter (in place).

    A weight that is stored as integers and read by such a computation is rounded to its grid first.

    Args:
        graph: the network.
        shapes: of every value.
        stored: how the weights of its nodes are quantised, by node.

    Raises:
        CaptureError: a part of the network has a data type msqkd does not know.
    """
    for node in list(graph.nodes):
        if _is_number(graph, node, shapes):
            graph.nodes.remove(node)
    for node in list(graph.nodes):
        _join_literals(graph, node)
        _fill(graph, node, shapes)
    constant = computed_from_constants(graph)
    if constant:
        on_grid(graph, {node.name: stored[node.name] for node in constant if node.name in stored})
        replace_constants(graph, constant)
    graph.prune()


def _is_number(graph: Graph, node: Node, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Replace the numbers that `node` gives, if it gives some that are known now."""
    if node.op == "Shape" and node.unpack:
        numbers: list[Any] = list(shapes[node.inputs[0]])
    elif node.op in _ARITHMETIC and all(graph.values[name].kind == "const" for name in node.inputs):
        numbers = [_ARITHMETIC[node.op](*(graph.const(name) for name in node.inputs))]
    elif node.op == "ScalarCast" and graph.values[node.inputs[0]].kind == "const":
        numbers = [scalar_type(graph, node)(graph.const(node.inputs[0]))]
    else:
        return False
    for output, number in zip(node.outputs, numbers):
        graph.values[output] = Value(output, "const", None, number)
    return True


def _fill(graph: Graph, node: Node, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Replace zeros or ones in the shape of a value that is computed."""
    kind = graph.values[node.output].type
    if node.op in _FILLED and kind is not None:
        graph.add_param(node.output, np.full(shapes[node.output], _FILLED[node.op], kind.dtype), trainable=False)
        graph.nodes.remove(node)


def _join_literals(graph: Graph, node: Node) -> None:
    """A list of literals, such as a shape that was computed in part, is one literal."""
    for start, length in reversed(node.sequences):
        names = node.inputs[start : start + length]
        if length and all(graph.values[name].kind == "const" for name in names):
            joined = graph.add_const(tuple(graph.const(name) for name in names), "numbers")
            node.inputs[start : start + length] = [joined]
            later = ((first - length + 1, count) for first, count in node.sequences if first > start)
            node.sequences = (*(run for run in node.sequences if run[0] < start), *later)
