"""Operations that only move values: the same steps for int8 and float."""

from __future__ import annotations

from math import prod

import numpy as np

from msqkd.exporters.device.lower import FLOAT, NATIVE, NHWC, Lowering, inverse
from msqkd.exporters.device.shapes import Shape
from msqkd.graph.ir import Node

Layout = tuple[int, ...]


def dtype_of(low: Lowering, node: Node) -> str:
    """The type in which `node` reads what it moves."""
    return "int8" if low.is_int8(node) else FLOAT


def reshape(low: Lowering, node: Node) -> bool:
    """Reshape, Squeeze or ExpandDims: to the output's shape, whose open size the runtime finds."""
    value, shape = node.inputs[0], low.shapes[node.output]
    source, sizes = low.shapes[value], low.graph.shape(node.output)
    layout = low.layout(value)
    if layout not in (NATIVE, NHWC) and _reshape_turned(low, node, layout):
        return True
    plain = layout == NHWC and (prod(source[2:]) == 1 or source[1] == 1)
    if layout == NHWC and not plain and _flattens_for_dense(low, node):
        low.columns[node.output] = source[1:]
        low.original.discard(node.output)  # its order is not the graph's: nothing to compare it with
        sizes = (-1, prod(source[1:]))
    elif not plain:
        layout = NATIVE
    tensor = low.get(value, dtype_of(low, node), layout)
    low.emit(node, "Reshape", [tensor, _sizes(low, node.output, sizes if sizes.count(-1) <= 1 else shape)])
    return True


def _sizes(low: Lowering, value: str, sizes: Shape) -> str:
    return low.constant(f"{value}_shape", np.array(sizes, np.int32))


def _reshape_turned(low: Lowering, node: Node, layout: Layout) -> bool:
    """A Reshape that leaves the axes before the batch alone: the batch stays in front of the tensor.

    A value (A, N·k, ...), held as (N·k, A, ...), becomes (A, N, k, ...) by way of (N, k, A, ...).
    """
    value = node.inputs[0]
    source, shape, place = low.shapes[value], low.shapes[node.output], _batch_axis(low, node.output)
    if layout != _turned(place, len(source)) or not place or source[:place] != shape[:place]:
        return False
    rows, batch, before, after = source[place], shape[place], shape[:place], shape[place + 1 :]
    if rows % batch:
        return False
    rest = source[place + 1 :]
    tensor = low.get(value, dtype_of(low, node), layout)
    if rows != batch:
        split = low.between(node.output, (batch, rows // batch, *before, *rest), "rows")
        low.emit(node, "Reshape", [tensor, _sizes(low, split, low.shapes[split])], value=split)
        order = [0, *range(2, 2 + place), 1, *range(2 + place, 2 + place + len(rest))]
        turned = low.between(node.output, [low.shapes[split][axis] for axis in order], "turned")
        perm = low.constant(f"{turned}_perm", np.array(order, np.int32))
        low.emit(node, "Transpose", [low.get(split, dtype_of(low, node)), perm], value=turned)
        tensor = low.get(turned, dtype_of(low, node))
    target = _sizes(low, node.output, (batch, *before, *after))
    low.emit(node, "Reshape", [tensor, target], layout=_turned(place, len(shape)))
    return True


def _batch_axis(low: Lowering, value: str) -> int:
    """Where the graph has the batch: at its only open size."""
    shape = low.graph.shape(value)
    return shape.index(-1) if shape.count(-1) == 1 else 0


def _turned(place: int, rank: int) -> Layout:
    """The layout that brings axis `place` to the front."""
    return (place, *(axis for axis in range(rank) if axis != place)) if place else NATIVE


def _flattens_for_dense(low: Lowering, node: Node) -> bool:
    """Whether a map is flattened for dense layers alone: their columns can follow its layout, without a Transpose."""
    value, graph = node.inputs[0], low.graph
    source, shape = low.shapes[value], low.shapes[node.output]
    if len(shape) != 2 or shape[1] != prod(source[1:]) or node.output in graph.outputs:
        return False
    return all(reader.op == "Dense" and reader.inputs[1] in graph.params for reader in graph.consumers(node.output))


def transpose(low: Lowering, node: Node) -> bool:
    """Transpose, joined with the one from the layout the value is held in; none where the two undo each other."""
    value = node.inputs[0]
    rank = len(low.shapes[value])
    perm = tuple(int(axis) % rank for axis in low.graph.const(node.inputs[1]))
    held = inverse(low.layout(value)) or tuple(range(rank))
    layouts = [_turned(_batch_axis(low, node.output), rank), *([NHWC] if rank == 4 else [])]
    orders = [tuple(held[perm[axis]] for axis in layout or range(rank)) for layout in layouts]
    for layout, order in zip(layouts, orders):
        if order == tuple(range(rank)) and value not in low.graph.inputs:
            low.alias(node, layout)
            return True
    table = low.constant(f"{node.output}_perm", np.array(orders[0], np.int32))
    low.emit(node, "Transpose", [low.get(value, dtype_of(low, node)), table], layout=layouts[0])
    return True


def concat(low: Lowering, node: Node) -> bool:
    """Concat; of maps along the axis where the layout has it."""
    values = node.inputs[: sum(length for _, length in node.sequences)]
    layout = low.common_layout(values)
    axis = low.axis(node.output, int(low.graph.const(node.inputs[-1])), layout)
    tensors = [low.get(name, dtype_of(low, node), layout) for name in values]
    low.emit(node, "Concat", tensors, {"axis": axis}, layout=layout)
    return True
