"""Operations that only move values: the same steps for int8 and float."""

from __future__ import annotations

from math import prod

import numpy as np

from msqkd.exporters.device.lower import FLOAT, NATIVE, NHWC, TO_NCHW, Lowering
from msqkd.graph.ir import Node


def _dtype(low: Lowering, node: Node) -> str:
    return "int8" if low.is_int8(node) else FLOAT


def reshape(low: Lowering, node: Node) -> bool:
    """Reshape, Squeeze or ExpandDims: to the output's shape, whose open size the runtime finds."""
    value, shape = node.inputs[0], low.shapes[node.output]
    if low.graph.values[value].kind not in ("node", "input"):
        return False
    source, sizes = low.shapes[value], low.graph.shape(node.output)
    plain = low.layout(value) == NATIVE or len(source) != 4 or prod(source[2:]) == 1 or source[1] == 1
    if not plain and _flattens_for_dense(low, node):
        low.columns[node.output] = source[1:]
        low.original.discard(node.output)  # its order is not the graph's: nothing to compare it with
        target = np.array([-1, prod(source[1:])], np.int32)
        low.emit(node, "Reshape", [low.get(value, _dtype(low, node)), low.constant(f"{node.output}_shape", target)])
        return True
    tensor = low.get(value, _dtype(low, node), None if plain else NATIVE)
    target = np.array(sizes if sizes.count(-1) <= 1 else shape, np.int32)
    low.emit(node, "Reshape", [tensor, low.constant(f"{node.output}_shape", target)])
    return True


def _flattens_for_dense(low: Lowering, node: Node) -> bool:
    """Whether a map is flattened for dense layers alone: their columns can follow its layout, without a Transpose."""
    value, graph = node.inputs[0], low.graph
    source, shape = low.shapes[value], low.shapes[node.output]
    if len(shape) != 2 or shape[1] != prod(source[1:]) or node.output in graph.outputs:
        return False
    return all(reader.op == "Dense" and reader.inputs[1] in graph.params for reader in graph.consumers(node.output))


def transpose(low: Lowering, node: Node) -> bool:
    """Transpose, joined with the one from the layout the value is held in."""
    value = node.inputs[0]
    perm = tuple(int(axis) % len(low.shapes[value]) for axis in low.graph.const(node.inputs[1]))
    if low.layout(value):
        perm = tuple(TO_NCHW[axis] for axis in perm)
    tensor = low.get(value, _dtype(low, node))
    low.emit(node, "Transpose", [tensor, low.constant(f"{node.output}_perm", np.array(perm, np.int32))])
    return True


def concat(low: Lowering, node: Node) -> bool:
    """Concat; of maps along the axis where the layout has it."""
    values = [name for name in node.inputs if low.graph.values[name].kind in ("node", "input")]
    tensors = sum(length for _, length in node.sequences)
    if len(values) != tensors:
        return False  # a parameter among them
    rank = len(low.shapes[node.output])
    axis = int(low.graph.const(node.inputs[-1])) % rank
    layout = NHWC if any(low.layout(name) for name in values) else NATIVE
    if layout:
        axis = NHWC.index(axis)
    low.emit(
        node, "Concat", [low.get(name, _dtype(low, node), layout) for name in values], {"axis": axis}, layout=layout
    )
    return True
