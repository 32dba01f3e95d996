"""What an operation of a graph does, as far as its int8 form depends on it; placement and lowering read it alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple, Optional

import numpy as np

from msqkd.graph.ir import Graph, Node
from msqkd.graph.norms import BATCH, statistics_of
from msqkd.graph.passes.padded_pools import NON_NEGATIVE
from msqkd.targets import limits
from msqkd.targets.limits import Windows

POOL_MODES = {1: "SAME", 2: "VALID"}
"""MindSpore's numbers of the padding modes, as AvgPool takes them."""

_QUOTIENTS = ("Div", "Divs", "RealDiv")


def rescale_factor(graph: Graph, node: Node) -> Optional[float]:
    """What a product or quotient of a computed tensor and a positive number multiplies the tensor by, else None."""
    tensors, others = graph.tensor_inputs(node), [n for n in node.inputs[:2] if graph.values[n].kind == "const"]
    if len(node.inputs) != 2 or len(tensors) != 1 or len(others) != 1:
        return None
    number = np.asarray(graph.const(others[0]))
    if number.ndim or not np.issubdtype(number.dtype, np.number):
        return None
    factor = float(np.float32(number))
    if node.op in _QUOTIENTS:
        if node.inputs[0] != tensors[0] or not factor:
            return None
        factor = 1 / factor
    return factor if 0 < factor < math.inf else None


def is_padded_pointwise(graph: Graph, node: Node) -> bool:
    """Whether `node` is a 1×1 convolution that pads."""
    return graph.shape(node.inputs[1])[2:] == (1, 1) and any(node.attrs["pad_list"])


def conv_windows(graph: Graph, node: Node) -> Optional[Windows]:
    """The windows of a convolution; None where the extents of a map are unknown."""
    plane, output = graph.shape(node.inputs[0])[2:], graph.shape(node.output)[2:]
    if len(plane) != 2 or min(*plane, *output) < 1:
        return None
    kernel, pads = graph.shape(node.inputs[1])[2:], tuple(int(side) for side in node.attrs["pad_list"])
    strides, dilations = (tuple(node.attrs[name][2:]) for name in ("stride", "dilation"))
    found = Windows(kernel, strides, dilations, pads, plane, output)  # type: ignore[arg-type]
    return found.padded_same() if str(node.attrs["pad_mode"]).upper() == "SAME" else found


def pool_windows(graph: Graph, node: Node) -> Optional[Windows]:
    """The windows of a pool; None where the extents of a map are unknown."""
    pool = pooling_of(graph, node)
    plane, output = graph.shape(node.inputs[0])[2:], graph.shape(node.output)[2:]
    if len(plane) != 2 or min(*plane, *output) < 1:
        return None
    found = Windows(pool.kernel, pool.strides, (1, 1), pool.sides, plane, output)  # type: ignore[arg-type]
    return found.padded_same() if pool.mode == "SAME" else found


def by_channel(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether one of two 4-D shapes is the other's with H = W = 1."""
    if len(one) != 4 or len(other) != 4:
        return False
    return one[:2] == other[:2] and (1, 1) in (one[2:], other[2:])


def is_global(graph: Graph, node: Node) -> bool:
    """Whether a mean, or an adaptive pool, is over the known H and W of a 4-D input."""
    shape = graph.shape(node.inputs[0])
    if len(shape) != 4 or min(shape[2:]) < 1:
        return False
    if node.op == "AdaptiveAvgPool2D":
        return graph.shape(node.output)[2:] == (1, 1)
    return axes_of(graph, node, 1) == [2, 3]


def axes_of(graph: Graph, node: Node, index: int) -> list[int]:
    """The axes that input `index` of a reduction or softmax names, counted from 0, in order."""
    rank = len(graph.shape(node.inputs[0]))
    given = graph.const(node.inputs[index])
    given = (given,) if isinstance(given, int) else tuple(range(rank) if given is None or given == () else given)
    return sorted(int(axis) % rank for axis in given)


def is_tanh_gelu(graph: Graph, node: Node) -> bool:
    """Whether a GELU is the one with tanh: as an argument, as an attribute, or by its name."""
    given = graph.const(node.inputs[1]) if len(node.inputs) > 1 else node.attrs.get("approximate")
    default = "tanh" if node.op == "GeLU" else "none"
    return (default if given is None else given) in ("tanh", 1)


class Pooling(NamedTuple):
    """What a pool does along height and width.

    `sides` are the rows above and below and the columns left and right that ``PAD`` adds; `counts_padding` says whether
    an average is over them too.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    mode: str
    sides: tuple[int, ...] = (0, 0, 0, 0)
    ceil: bool = False
    counts_padding: bool = False


def pooling_of(graph: Graph, node: Node) -> Pooling:
    """The windows of MaxPool or AvgPool, which records them as attributes or takes them as arguments."""
    if node.functional:
        kernel, strides, number = (graph.const(name) for name in node.inputs[1:4])
        return Pooling(tuple(kernel), tuple(strides), POOL_MODES[int(number)])
    kernel, strides = tuple(node.attrs["kernel_size"])[-2:], tuple(node.attrs["strides"])[-2:]
    mode = str(node.attrs["pad_mode"]).upper()
    if mode != "PAD":
        return Pooling(kernel, strides, mode)
    sides, ceil = tuple(int(side) for side in node.attrs["pad"]), bool(node.attrs.get("ceil_mode", False))
    if not any(sides) and not ceil:
        return Pooling(kernel, strides, "VALID")
    counts = node.op == "AvgPool" and bool(node.attrs.get("count_include_pad", True)) and any(sides)
    return Pooling(kernel, strides, mode, sides, ceil, counts)


def added_sizes(node: Node, kernel: Sequence[int], sizes: Sequence[int], wanted: Sequence[int]) -> tuple[int, ...]:
    """The rows and columns below and on the right of what the windows of a Conv2DTranspose cover, in its result.

    Args:
        node: records stride, dilation and ``pad_list``, the rows and columns that are cut off.
        kernel, sizes, wanted: height and width of the window, of the input and of the result.
    """
    top, bottom, left, right = node.attrs["pad_list"]
    strides, dilations = node.attrs["stride"][-2:], node.attrs["dilation"][-2:]
    return tuple(
        size - ((rows - 1) * stride + (window - 1) * dilation + 1 - cut)
        for size, rows, window, stride, dilation, cut in zip(
            wanted, sizes, kernel, strides, dilations, (top + bottom, left + right)
        )
    )


SAME_FORM, ZEROS_FORM, STEPS_FORM = "same", "zeros", "steps"
"""How a pool that pads is written by operations that do not, or only by half a window; see `padded_pool_form`."""


def padded_pool_form(graph: Graph, node: Node) -> Optional[str]:
    """The form in which MindIR, whose pools know the modes SAME and VALID alone, holds a pool with padding of its own.

    ``same`` where that mode pads alike; ``zeros`` in front of a maximum over a map without negative numbers; ``steps``
    for a pool at every place and a choice of every so many of its results. None where there is no form.
    """
    pool = pooling_of(graph, node)
    halves = tuple((size - 1) // 2 for size in pool.kernel for _ in range(2))
    centred = all(size % 2 for size in pool.kernel) and pool.sides == halves and not pool.counts_padding
    if centred and pool.strides == (1, 1):
        return SAME_FORM
    source = graph.producer(node.inputs[0])
    if node.op == "MaxPool" and not pool.ceil and source is not None and source.op in NON_NEGATIVE:
        return ZEROS_FORM
    sizes, results = graph.shape(node.inputs[0])[2:], graph.shape(node.output)[2:]
    centres = [-(-size // step) for size, step in zip(sizes, pool.strides)]
    return STEPS_FORM if centred and (not pool.ceil or centres == list(results)) else None


def window_of(graph: Graph, node: Node, over_plane: bool) -> int:
    """The elements an average is over: those of the plane, or of the window of a pool."""
    return prod(graph.shape(node.inputs[0])[2:] if over_plane else pooling_of(graph, node).kernel)


def pads(graph: Graph, node: Node) -> bool:
    """Whether the windows of an average pool reach over the border."""
    return pooling_of(graph, node).mode != "VALID"


def paddings(graph: Graph, node: Node) -> Optional[list[tuple[int, int]]]:
    """What Pad or PadV3 adds before and after every axis, where all of it is zeros and none is cut off; else None."""
    rank = len(graph.shape(node.inputs[0]))
    if node.op == "Pad":
        pairs = [(int(a), int(b)) for a, b in node.attrs.get("paddings", ())]
    else:
        flat = graph.const(node.inputs[1])
        filled = graph.const(node.inputs[2]) if len(node.inputs) > 2 else 0
        zeros = node.attrs.get("mode") == "constant" and filled is not None and not np.any(filled)
        if not zeros or not node.attrs.get("paddings_contiguous", True) or not isinstance(flat, (tuple, np.ndarray)):
            return None
        sizes = [int(size) for size in flat]
        # From the last axis to the first, as many as there are.
        pairs = [(sizes[i], sizes[i + 1]) for i in range(0, len(sizes), 2)][::-1]
        pairs = [(0, 0)] * (rank - len(pairs)) + pairs
    return pairs if len(pairs) == rank and min((min(pair) for pair in pairs), default=-1) >= 0 else None


Entry = tuple[Optional[int], Optional[int], int, bool]
"""Of a slice along one axis: begin, end, step, and whether it picks one element (and drops the axis)."""


def slice_entries(graph: Graph, node: Node) -> Optional[list[Entry]]:
    """Of StridedSlice, one entry an axis it mentions; a begin or end of None is the border, and so is a computed one.

    None for the whole where it adds axes, goes backwards, or its steps or what it picks are computed.
    """
    begins, ends, steps = (_literals(graph, node, item) for item in node.arguments()[1:4])
    begin_mask, end_mask, ellipsis, new_axis, shrink = (int(graph.const(name)) for name in node.inputs[-5:])
    if ellipsis or new_axis:
        return None
    entries: list[Entry] = []
    for axis, (begin, end, step) in enumerate(zip(begins, ends, steps)):
        single, open_begin, open_end = (bool(mask >> axis & 1) for mask in (shrink, begin_mask, end_mask))
        if step is None or step < 1 or (single and begin is None):
            return None
        entries.append((None if open_begin and not single else begin, None if open_end else end, step, single))
    return entries


@dataclass(frozen=True)
class WeightUse:
    """A weight among the inputs of an operation: which input it is, and its axis of output channels or rows; None where
    one scale is all that fits."""

    index: int
    axis: Optional[int]


PRODUCTS = ("MatMul", "MatMulExt", "BatchMatMul")
STORABLE = ("Conv2D", "Conv2DTranspose", "Dense", *PRODUCTS, "Gather", "LSTM")
"""Operations whose weight can be stored as integers and computed with in float."""

_DYNAMIC = ("Dense", *PRODUCTS)


def weight_use(graph: Graph, node: Node) -> Optional[WeightUse]:
    """The weight of `node` that can be stored as integers: a float32 parameter; None where it has none.

    That of an LSTM is read by the Reshape nodes before it.
    """
    use = None
    if node.op in ("Conv2D", "Dense"):
        use = WeightUse(1, 0)
    elif node.op == "Conv2DTranspose":
        use = WeightUse(1, 1)
    elif node.op in PRODUCTS:
        rank, transposed = len(graph.shape(node.inputs[1])), _transpositions(graph, node)[1]
        use = WeightUse(1, int(not transposed) if rank == 2 else None) if rank > 1 else None
    elif node.op == "Gather":
        use = WeightUse(0, 0 if graph.const(node.inputs[2]) == 0 else None)
    elif node.op == "Reshape" and len(graph.shape(node.inputs[0])) > 1 and _feeds_lstm(graph, node):
        use = WeightUse(0, 0)
    if use is None:
        return None
    value = graph.values[node.inputs[use.index]]
    fits = value.kind == "param" and value.type is not None and value.type.dtype == "float32"
    return use if fits and len(graph.shape(value.name)) > 1 else None


def _transpositions(graph: Graph, node: Node) -> tuple[bool, bool]:
    """Whether a product takes its operands with their last two axes swapped."""
    flags = [bool(graph.const(name)) for name in node.inputs[2:4]]
    return (flags[0], flags[1]) if len(flags) == 2 else (False, False)


def _feeds_lstm(graph: Graph, node: Node) -> bool:
    """Whether `node` moves a parameter into the weights of an LSTM, joined with others or not."""
    if graph.values[node.inputs[0]].kind != "param":
        return False
    readers = graph.consumers(node.output)
    readers += [later for reader in readers if reader.op == "Concat" for later in graph.consumers(reader.output)]
    return any(reader.op == "LSTM" for reader in readers)


def dynamic_obstacle(graph: Graph, node: Node) -> Optional[str]:
    """Why the input of an operation with a weight is not quantised at each call, as a clause; None where it can be."""
    if node.op not in _DYNAMIC:
        return f"only dense layers and products with a parameter ({', '.join(_DYNAMIC)}) are dynamic"
    if node.op in PRODUCTS and _transpositions(graph, node)[0]:
        return "its input is transposed, and has no rows to quantise"
    return None


def _literals(graph: Graph, node: Node, item: Any) -> list[Optional[int]]:
    """The numbers of one argument; None for one that is computed."""
    found: list[Optional[int]] = []
    for index in item if isinstance(item, tuple) else (item,):
        value = graph.const(node.inputs[index])
        if isinstance(value, (tuple, list, np.ndarray)):
            found += [int(number) for number in value]
        else:
            found.append(None if value is None else int(value))
    return found


def _slices(graph: Graph, node: Node) -> Optional[str]:
    if 0 in graph.shape(node.output):
        return "nothing is left of its input"
    return None if slice_entries(graph, node) else "it adds axes or goes backwards"


def _pad(graph: Graph, node: Node) -> Optional[str]:
    return None if paddings(graph, node) else "it pads by other values than zeros, or cuts"


def _average(graph: Graph, node: Node) -> Optional[str]:
    if pooling_of(graph, node).counts_padding:
        return "it counts the zeros it pads with"
    windows = pool_windows(graph, node)
    return None if windows is None else limits.average(windows)


def _convolution(graph: Graph, node: Node) -> Optional[str]:
    """In the form in which it is written: a padded 1×1 kernel embedded into zeros, taps that read nothing left out."""
    windows, weight = conv_windows(graph, node), graph.shape(node.inputs[1])
    if windows is None:
        return None
    if is_padded_pointwise(graph, node):
        pads = tuple(side + 1 for side in windows.pads)
        windows = replace(windows, kernel=(3, 3), dilations=(1, 1), pads=pads)  # type: ignore[arg-type]
    group = int(node.attrs.get("group", 1))
    # Where a scale per channel is refused, the weight has one scale.
    return limits.convolution(windows.trimmed(), weight[1] * group, weight[0], group, per_channel=False)


def _gather(graph: Graph, node: Node) -> Optional[str]:
    indices, axis = graph.const(node.inputs[1]), graph.const(node.inputs[2])
    batched = len(node.inputs) > 3 and graph.const(node.inputs[3])
    positions = np.asarray(-1 if indices is None else indices)
    if batched or not isinstance(axis, int) or positions.size == 0 or positions.min() < 0:
        return "its positions are computed, counted from the end, or differ from one item to the next"
    return None


def _product(graph: Graph, node: Node) -> Optional[str]:
    shapes = [graph.shape(name) for name in node.inputs[:2]]
    return None if min(len(shape) for shape in shapes) >= 2 else "one of its operands is a vector"


def _layer_norm(graph: Graph, node: Node) -> Optional[str]:
    if any(graph.values[name].kind != "param" for name in node.inputs[1:3]):
        return "its scale or offset is computed, not a parameter"
    first = {int(graph.const(name)) % len(graph.shape(node.inputs[0])) for name in node.inputs[3:5]}
    return None if first == {len(graph.shape(node.inputs[0])) - 1} else "it is not over the last axis"


def _concat(graph: Graph, node: Node) -> Optional[str]:
    joined = node.inputs[: sum(length for _, length in node.sequences)]
    return None if joined == graph.tensor_inputs(node) else "one of what it joins is a parameter"


def _batch_norm(graph: Graph, node: Node) -> Optional[str]:
    if statistics_of(graph, node) == BATCH or any(graph.values[name].kind != "param" for name in node.inputs[1:5]):
        return "it takes its statistics from the batch"
    return None


OBSTACLES: dict[str, Callable[[Graph, Node], Optional[str]]] = {
    "StridedSlice": _slices,
    "AvgPool": _average,
    "Pad": _pad,
    "PadV3": _pad,
    "Gather": _gather,
    "MatMul": _product,
    "MatMulExt": _product,
    "BatchMatMul": _product,
    "LayerNorm": _layer_norm,
    "BatchNorm": _batch_norm,
    "Concat": _concat,
}
"""By operation, why this use of it has no int8 form, as a clause; None where it has one."""

LIMITS: dict[str, Callable[[Graph, Node], Optional[str]]] = {"Conv2D": _convolution}
"""Likewise, where the kernels are those of `msqkd.targets.limits`."""


def resize_flags(graph: Graph, node: Node) -> tuple[bool, bool]:
    """Of a resize to the nearest neighbour: whether corners are aligned, and whether coordinates are of half pixels."""
    return bool(graph.const(node.inputs[2])), bool(graph.const(node.inputs[3]))
