"""Operations that take parts of a value: the same steps for int8 and float."""

from __future__ import annotations

from typing import Optional

import numpy as np

from msqkd.exporters.device.lower import FLOAT, NATIVE, NHWC, Lowering
from msqkd.exporters.device.moves import Layout, dtype_of
from msqkd.graph.ir import Node
from msqkd.quant.uses import paddings, resize_flags, slice_entries
from msqkd.targets import limits

_ZEROS = {"padding_mode": 0, "constant_value": 0.0}
_NEAREST, _LINEAR = 1, 0
_ASYMMETRIC, _ALIGN_CORNERS, _HALF_PIXEL = 0, 1, 2


def split(low: Lowering, node: Node) -> bool:
    """Split along an axis, or Unstack, which drops it."""
    value, drops = node.inputs[0], node.op == "Unstack"
    native = int(node.attrs["axis"]) if drops else int(low.graph.const(node.inputs[1]))
    layout = _layout_without(low, value, [native] if drops else [])
    axis = low.axis(value, native, layout)
    native %= len(low.shapes[value])
    parts = node.outputs
    if drops:
        shape = list(low.shapes[value])
        shape[native] = 1
        parts = [low.between(output, shape, "part") for output in node.outputs]
    sizes = tuple(low.shapes[part][native] for part in parts)
    attrs = {"output_num": len(parts), "size_splits": sizes, "axis": axis}
    low.emit(node, "Split", [low.get(value, dtype_of(low, node), layout)], attrs, outputs=parts, layout=layout)
    for part, output in zip(parts, node.outputs):
        if part != output:
            _drop(low, node, part, output, [native], layout)
    return True


def _layout_without(low: Lowering, value: str, dropped: list[int]) -> Layout:
    """The layout a value is held in, if it is one of those in use once `dropped` axes are gone; else the graph's."""
    layout = low.layout(value)
    return layout if _remaining(layout, dropped, len(low.shapes[value])) is not None else NATIVE


def _remaining(layout: Layout, dropped: list[int], rank: int) -> Optional[Layout]:
    """The layout of what is left of a value without some of its axes; None where it would be of no use."""
    kept = [axis for axis in range(rank) if axis not in dropped]
    order = tuple(kept.index(axis) for axis in layout if axis not in dropped)
    if order == tuple(range(len(kept))):
        return NATIVE
    return order if not dropped or order == NHWC or layout != NHWC else None


def _drop(low: Lowering, node: Node, part: str, output: str, dropped: list[int], layout: Layout) -> None:
    """A Reshape without the axes of one element."""
    left = _remaining(layout, dropped, len(low.shapes[part]))
    assert left is not None
    shape = low.shapes[output]
    target = np.array([shape[axis] for axis in left or range(len(shape))], np.int32)
    if len(target) and low.graph.shape(output)[(left or (0,))[0]] < 0:
        target[0] = -1
    tensors = [low.get(part, dtype_of(low, node), layout), low.constant(f"{output}_shape", target)]
    low.emit(node, "Reshape", tensors, value=output, layout=left)


def strided_slice(low: Lowering, node: Node) -> bool:
    """A block, or with steps a grid, of a value; axes of which one element is taken are dropped."""
    entries = slice_entries(low.graph, node)
    if entries is None:
        return False
    value = node.inputs[0]
    shape = low.shapes[value]
    spans = [_span(*entry[:3], size) for entry, size in zip(entries, shape)]
    spans = [(first, first + 1, 1) if entry[3] else span for entry, span in zip(entries, spans) for first in span[:1]]
    spans += [(0, size, 1) for size in shape[len(spans) :]]
    if any(first >= last for first, last, _ in spans):
        return False
    dropped = [axis for axis, entry in enumerate(entries) if entry[3]]
    layout = _layout_without(low, value, dropped)
    size = tuple(-(-(last - first) // step) for first, last, step in spans)
    target = low.between(node.output, size, "part") if dropped else node.output
    _cut(low, node, target, [spans[axis] for axis in layout or range(len(shape))], layout)
    if dropped:
        _drop(low, node, target, node.output, dropped, layout)
    return True


def _span(begin: Optional[int], end: Optional[int], step: int, size: int) -> tuple[int, int, int]:
    first, last, _ = slice(begin, end).indices(size)
    return first, last, step


def _cut(low: Lowering, node: Node, target: str, spans: list[tuple[int, int, int]], layout: Layout) -> None:
    """The step that takes `spans`, in the order of the held axes; an axis taken whole is left open."""
    value = node.inputs[0]
    shape = low.shapes[value]
    sizes = [shape[axis] for axis in layout or range(len(shape))]
    whole = [span == (0, size, 1) for span, size in zip(spans, sizes)]
    tensor = low.get(value, dtype_of(low, node), layout)
    firsts = _numbers(low, target, "begin", [first for first, _, _ in spans])
    if all(step == 1 for _, _, step in spans):
        counts = [-1 if taken else last - first for (first, last, _), taken in zip(spans, whole)]
        inputs = [tensor, firsts, _numbers(low, target, "size", counts)]
        low.emit(node, "SliceFusion", inputs, {"axes": tuple(range(len(spans)))}, value=target, layout=layout)
        return
    lasts = _numbers(low, target, "end", [last for _, last, _ in spans])
    steps = _numbers(low, target, "step", [step for _, _, step in spans])
    mask = sum(1 << axis for axis, taken in enumerate(whole) if taken)
    attrs = {"begin_mask": mask, "end_mask": mask}
    low.emit(node, "StridedSlice", [tensor, firsts, lasts, steps], attrs, value=target, layout=layout)


def _numbers(low: Lowering, value: str, what: str, numbers: list[int]) -> str:
    return low.constant(f"{value}_{what}", np.array(numbers, np.int32))


def gather(low: Lowering, node: Node) -> bool:
    """Elements along one axis of a value or, as an embedding, of a parameter."""
    value, positions, axis = node.inputs[:3]
    axis_given, batched = low.graph.const(axis), len(node.inputs) > 3 and low.graph.const(node.inputs[3])
    if not isinstance(axis_given, int) or batched:
        return False
    indices = np.asarray(low.graph.const(positions)) if low.graph.values[positions].kind == "const" else None
    if indices is not None and (indices.size == 0 or indices.min() < 0):
        return False
    layout = low.layout(value) if indices is not None and indices.ndim == 1 else NATIVE
    if indices is None:
        found = low.get(positions, FLOAT, NATIVE)
    else:
        found = low.constant(f"{node.output}_positions", indices.astype(np.int32))
    where = low.constant(f"{node.output}_axis", np.array([low.axis(value, axis_given, layout)], np.int32))
    if node.name in low.weights:
        source = low.stored_weight(node, low.graph.params[value].data)
    else:
        source = low.get(value, dtype_of(low, node), layout)
    low.emit(node, "Gather", [source, found, where], layout=layout)
    return True


def pad(low: Lowering, node: Node) -> bool:
    """Zeros around a value."""
    pairs = paddings(low.graph, node)
    if pairs is None:
        return False
    if low.is_int8(node) and limits.pad(len(pairs)) is not None:
        _pad_in_more_dimensions(low, node, pairs)
        return True
    layout = low.layout(node.inputs[0])
    table = np.array([pairs[axis] for axis in layout or range(len(pairs))], np.int32)
    inputs = [low.get(node.inputs[0], dtype_of(low, node), layout), low.constant(f"{node.output}_paddings", table)]
    low.emit(node, "PadFusion", inputs, _ZEROS, layout=layout)
    return True


def _pad_in_more_dimensions(low: Lowering, node: Node, pairs: list[tuple[int, int]]) -> None:
    """An int8 Pad of few dimensions with dimensions of size 1 behind the batch, between two Reshapes."""
    added = limits.PAD_RANK - len(pairs)
    source, target = low.shapes[node.inputs[0]], low.shapes[node.output]
    before, after = (low.between(node.output, (*s[:1], *[1] * added, *s[1:]), "spread") for s in (source, target))
    sizes = low.constant(f"{before}_shape", np.array([-1, *low.shapes[before][1:]], np.int32))
    low.emit(node, "Reshape", [low.get(node.inputs[0], dtype_of(low, node), NATIVE), sizes], value=before)
    table = low.constant(f"{node.output}_paddings", np.array([pairs[0], *[(0, 0)] * added, *pairs[1:]], np.int32))
    low.emit(node, "PadFusion", [low.get(before, dtype_of(low, node)), table], _ZEROS, value=after)
    sizes = low.constant(f"{node.output}_shape", np.array([-1, *target[1:]], np.int32))
    low.emit(node, "Reshape", [low.get(after, dtype_of(low, node)), sizes])


def resize(low: Lowering, node: Node) -> bool:
    """A map in another size: the nearest neighbour, or between four."""
    nearest = "Nearest" in node.op
    aligned, half_pixel = resize_flags(low.graph, node)
    if nearest and half_pixel:
        return False
    attrs = {
        "format": 1, "method": _NEAREST if nearest else _LINEAR, "new_height": low.shapes[node.output][2],
        "new_width": low.shapes[node.output][3], "preserve_aspect_ratio": False,
        "coordinate_transform_mode": _ALIGN_CORNERS if aligned else _HALF_PIXEL if half_pixel else _ASYMMETRIC,
    }  # fmt: skip
    low.emit(node, "Resize", [low.get(node.inputs[0], dtype_of(low, node), NHWC)], attrs, layout=NHWC)
    return True
