"""Mixed precision: which operations of a graph compute in float16 while it is trained.

Parameters stay float32 and are cast where they are read (Micikevicius et al., arXiv:1710.03740, section 3.1), and so do
quantisers, ranges, BatchNorm statistics, outputs and what is observed. In evaluation mode everything is float32.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from msqkd.graph.cell import Hooks
from msqkd.graph.ir import Graph, Node

AMP_LEVELS = ("O0", "O1", "O2", "O3")

PRODUCTS = frozenset({
    "BatchMatMul", "BatchMatMulExt", "Conv2D", "Conv2DBackpropInput", "Conv2DExt", "Conv2DTranspose", "Dense", "MatMul",
    "MatMulExt",
})  # fmt: skip
"""Level O1: what most of the time goes into."""

FOLLOWING = frozenset({
    "Add", "AddExt", "AvgPool", "BiasAdd", "Concat", "ExpandDims", "Flatten", "GeLU", "HSigmoid", "HSwish",
    "InplaceAddExt", "MaxPool", "Maximum", "Minimum", "Mul", "Muls", "Neg", "PReLU", "ReLU", "ReLU6", "Reshape", "SiLU",
    "Sigmoid", "Split", "Squeeze", "StridedSlice", "Sub", "Tanh", "Tile", "Transpose",
})  # fmt: skip
"""Level O2: also what is computed element by element, or only moved."""

NORMALISING = frozenset({"BatchNorm", "LayerNorm", "ReduceMean", "Softmax"})
"""Level O3: also sums over many values, whose float16 results are coarse."""

HALF_OPS = PRODUCTS | FOLLOWING | (NORMALISING - {"BatchNorm"})
"""What computes in float16 throughout, parameters and all."""

_LEVELS: dict[str, Set[str]] = {
    "O0": frozenset(), "O1": PRODUCTS, "O2": PRODUCTS | FOLLOWING, "O3": PRODUCTS | FOLLOWING | NORMALISING,
}  # fmt: skip


class _Cast(nn.Cell):
    """To `dtype`, in training mode only."""

    def __init__(self, dtype: Any) -> None:
        super().__init__()
        self.dtype, self.cast = dtype, ops.Cast()

    def construct(self, x):  # type: ignore[no-untyped-def]
        """The value as `dtype`, or as it is (any shape)."""
        return self.cast(x, self.dtype) if self.training else x


def half_precision(graph: Graph, level: str, hooks: Hooks) -> Hooks:
    """`hooks` with the casts that make operations of `graph` compute in float16 in training mode.

    An operation that takes part gets every float32 input in float16; its result is float32 again, except between two
    operations that both take part and have no quantiser between them. What is computed from parameters alone, as a
    weight with its BatchNorm factor, takes no part.

    Args:
        graph: what the cell is built from.
        level: one of `AMP_LEVELS`; O0 casts nothing.
        hooks: of the quantisers, which see float32.
    """
    own = set(hooks.results)  # made by what is in float16 anyway
    fed = set(graph.inputs)  # what depends on the inputs: arithmetic on parameters alone stays float32
    chosen: dict[str, list[int]] = {}
    for node in graph.nodes:
        if fed.intersection(node.inputs):
            fed.update(node.outputs)
            if not own.intersection(node.outputs) and _takes_part(graph, node, _LEVELS[level]):
                chosen[node.name] = float_inputs(graph, node)
    if not chosen:
        return hooks
    made = {output for node in graph.nodes if node.name in chosen for output in node.outputs if is_float(graph, output)}
    kept = made - set(hooks.values) - set(hooks.observe) - set(graph.outputs)
    for node in graph.nodes:
        for index, name in enumerate(node.inputs):
            if index not in chosen.get(node.name, ()) or (node.name, index) in hooks.edges:
                kept.discard(name)
    to_half, to_float = _Cast(ms.float16), _Cast(ms.float32)
    arguments = {
        (node.name, index): to_half
        for node in graph.nodes
        for index in chosen.get(node.name, ())
        if node.inputs[index] not in kept
    }
    results = {**hooks.results, **dict.fromkeys(made - kept, to_float)}
    return replace(hooks, arguments={**hooks.arguments, **arguments}, results=results)


def _takes_part(graph: Graph, node: Node, level: Set[str]) -> bool:
    known = all(graph.values[name].kind != "node" or graph.values[name].type is not None for name in node.inputs)
    return node.op in level and node.body is None and known and bool(float_inputs(graph, node))


def float_inputs(graph: Graph, node: Node) -> list[int]:
    """Positions of the float32 inputs of an operation; scale, offset and statistics of BatchNorm do not count."""
    last = 1 if node.op == "BatchNorm" else len(node.inputs)
    return [index for index, name in enumerate(node.inputs[:last]) if is_float(graph, name)]


def is_float(graph: Graph, name: str) -> bool:
    """Whether a value, parameter or constant is a float32 tensor."""
    value = graph.values[name]
    if value.kind == "param":
        return graph.params[name].data.dtype == np.float32
    if value.kind == "const":
        return isinstance(value.const, np.ndarray) and value.const.dtype == np.float32
    return value.type is not None and value.type.dtype == "float32"
