"""What the runtime refuses to load or to run, step by step; each rule was seen on the 2.7 CPU runtime.

Shapes and kinds of operands are held to the form the recorded models have, so that a file is either of a form known to
load or not written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Callable, Optional

import numpy as np

from msqkd.exporters.ms import layout
from msqkd.exporters.ms.place import Place, axis_of, listed, quant, same_quant, scale
from msqkd.integer.program import ActivationType, Format, PadMode, ReduceMode, Tensor
from msqkd.targets import limits

CUBIC, NEAREST = 2, 1
"""Resize methods the rules know."""

_FUSED = (ActivationType.NONE, ActivationType.RELU, ActivationType.RELU6)
_ACTIVATIONS = (
    ActivationType.RELU,
    ActivationType.RELU6,
    ActivationType.HSWISH,
    ActivationType.SIGMOID,
    ActivationType.LEAKY_RELU,
    ActivationType.TANH,
)
_WEIGHTED = ("Conv2DFusion", "MatMulFusion", "FullConnection")
_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "ExpandDims", "SliceFusion", "StridedSlice", "Gather")
_INT8_OPS = (
    *_WEIGHTED, "AddFusion", "SubFusion", "MulFusion", "DivFusion", "Activation", "AvgPoolFusion", "MaxPoolFusion",
    "ReduceFusion", "Softmax", "LayerNormFusion", "BatchNorm", "Concat", "Split", "PadFusion", "Resize", *_MOVES,
)  # fmt: skip
"""Primitives whose int8 kernel is known to compute what the simulator computes."""

_ARITY = {
    "Conv2DFusion": (2, 3), "MatMulFusion": (2, 3), "FullConnection": (2, 3), "AddFusion": (2, 2), "SubFusion": (2, 2),
    "MulFusion": (2, 2), "DivFusion": (2, 2), "Activation": (1, 1), "AvgPoolFusion": (1, 1), "MaxPoolFusion": (1, 1),
    "ReduceFusion": (2, 2), "Softmax": (1, 1), "LayerNormFusion": (3, 3), "BatchNorm": (3, 5), "Reshape": (2, 2),
    "Transpose": (2, 2), "PadFusion": (2, 2), "QuantDTypeCast": (1, 1), "Squeeze": (1, 1), "Unsqueeze": (1, 1),
    "ExpandDims": (2, 2), "Gather": (3, 3), "SliceFusion": (3, 3), "Split": (1, 1), "Flatten": (1, 1),
    "Maximum": (2, 2), "Minimum": (2, 2), "Abs": (1, 1), "Log": (1, 1),
}  # fmt: skip
"""The least and the greatest number of inputs."""

_INTEGER_CONSTANTS = {
    "Reshape": (1,), "Transpose": (1,), "ReduceFusion": (1,), "PadFusion": (1,), "ExpandDims": (1,), "Gather": (2,),
    "SliceFusion": (1, 2), "StridedSlice": (1, 2, 3),
}  # fmt: skip
"""Inputs that have to be int32 constants (the shape of a Reshape may be int64)."""

_NOT_INT8 = {
    **_INTEGER_CONSTANTS, **dict.fromkeys(_WEIGHTED, (2,)), "LayerNormFusion": (1, 2), "Gather": (1, 2),
}  # fmt: skip
"""Inputs of an int8 step that may be constants of another kind; the rule of the primitive says which."""

_CASTS = (("float32", "int8"), ("int8", "float32"), ("int8", "int8"))


def check_rules(place: Place) -> None:
    """Refuse a step the runtime would not load or run.

    Raises:
        ExportError: names the layer, what was found and what is allowed.
    """
    _check_arity(place)
    if place.op == "QuantDTypeCast":
        _check_cast(place)
        return
    _check_kinds(place)
    _check_integer_constants(place)
    if place.op in _RULES:
        _RULES[place.op](place)


def _check_arity(place: Place) -> None:
    least, most = _ARITY.get(place.op, (1, len(place.inputs)))
    if not least <= len(place.inputs) <= most:
        allowed = f"{least}" if least == most else f"{least} to {most}"
        place.refuse(f"it has {len(place.inputs)} inputs; allowed: {allowed}")
    if place.op != "Split" and len(place.outputs) != 1:
        place.refuse(f"it has {len(place.outputs)} outputs; allowed: 1")


def _check_cast(place: Place) -> None:
    source, target = place.inputs[0].dtype, place.output.dtype
    if (source, target) not in _CASTS:
        place.refuse(f"it casts {source} to {target}; allowed: {', '.join(f'{a} to {b}' for a, b in _CASTS)}")
    stated = (place.attr("src_t"), place.attr("dst_t"))
    wanted = (layout.DATA_TYPES[source], layout.DATA_TYPES[target])
    if stated != wanted:
        place.refuse(f"src_t and dst_t are {listed(stated)}; for {source} to {target} they are {listed(wanted)}")


def _check_kinds(place: Place) -> None:
    """Int8 steps read and give int8 throughout; float steps read int8 only as a weight dequantised on loading."""
    if place.quantized and place.op not in _INT8_OPS:
        place.refuse(f"the runtime has no int8 kernel to rely on; allowed in int8: {', '.join(_INT8_OPS)}")
    computed = [t for index, t in enumerate(place.inputs) if t.data is None and not _is_position(place, index)]
    for tensor in [*computed, *place.outputs]:
        if (tensor.dtype == "int8") != place.quantized:
            kind = "an int8" if place.quantized else "a float"
            place.refuse(f"{tensor.name!r} is {tensor.dtype}, which {kind} step neither reads nor gives")
    for index, tensor in enumerate(place.inputs):
        if tensor.data is not None:
            _check_constant(place, index, tensor)


def _is_position(place: Place, index: int) -> bool:
    return place.op == "Gather" and index == 1


def _check_constant(place: Place, index: int, tensor: Tensor) -> None:
    if place.quantized and tensor.dtype != "int8" and index not in _NOT_INT8.get(place.op, ()):
        place.refuse(f"its constant {tensor.name!r} is {tensor.dtype}; an int8 step needs int8")
    if tensor.dtype != "int8" or (place.op in _WEIGHTED and index == 1):
        return
    if place.op == "Gather" and index == 0 and not place.quantized:
        _check_rows(place, tensor)
        return
    if not place.quantized:
        place.refuse(f"its constant {tensor.name!r} is int8; in a float step only a weight may be")
    if quant(tensor).per_channel:
        place.refuse(f"{tensor.name!r} has {quant(tensor).scale.size} scales; only weights may have several")


def _check_rows(place: Place, table: Tensor) -> None:
    """An embedding stored as int8: one scale, or one a row where rows are what is taken."""
    count, axis = quant(table).scale.size, axis_of(place, int(place.constant(2)[0]), len(table.shape))
    if count not in (1, table.shape[0]) or (count > 1 and axis):
        place.refuse(
            f"its table has {count} scales and it takes elements along axis {axis}; allowed is 1 or, along axis 0, "
            f"{table.shape[0]}"
        )


def _check_integer_constants(place: Place) -> None:
    for index in _INTEGER_CONSTANTS.get(place.op, ()):
        if index >= len(place.inputs):
            continue
        place.constant(index)
        allowed = ("int32", "int64") if place.op == "Reshape" else ("int32",)
        if place.inputs[index].dtype not in allowed:
            place.refuse(
                f"its input {index} ({place.inputs[index].name!r}) is {place.inputs[index].dtype}; "
                f"allowed: {', '.join(allowed)}"
            )


def _check_fused(place: Place, allowed: Sequence[ActivationType] = _FUSED) -> None:
    kind = place.attr("activation_type")
    if place.quantized and kind == ActivationType.RELU6:
        hold(place, limits.relu6(scale(place.output), int(quant(place.output).zero_point[0])))
    if kind not in [int(a) for a in allowed]:
        names = {int(a): a.name for a in ActivationType}
        place.refuse(
            f"its activation is {names.get(kind, kind)}; allowed {'in int8' if place.quantized else 'here'}: "
            f"{', '.join(a.name for a in allowed)}"
        )


def _check_conv(place: Place) -> None:
    x, weight = place.inputs[0], place.inputs[1]
    place.constant(1)
    if len(x.shape) != 4 or len(place.output.shape) != 4 or len(weight.shape) != 4:
        place.refuse("its input, weight and output have to have 4 dimensions (N, H, W, C) and (O, H, W, I / group)")
    group, channels, outs = place.attr("group"), x.shape[3], place.output.shape[3]
    if group < 1 or channels % group or outs % group:
        place.refuse(f"group is {group}; allowed is a divisor of {channels} input and {outs} output channels")
    wanted = (outs, *place.numbers("kernel_size"), channels // group)
    if tuple(weight.shape) != wanted or weight.format != Format.KHWC or place.attr("format") != Format.NHWC:
        place.refuse(
            f"its weight is {listed(weight.shape)} in {weight.format.name}; allowed is {listed(wanted)} in KHWC, "
            "with the attribute format NHWC"
        )
    for name, size in (("in_channel", channels), ("out_channel", outs)):
        if place.attr(name) != size and (place.attr(name) or not place.quantized):
            place.refuse(f"{name} is {place.attr(name)}; allowed is {size}")
    if place.attr("mode") != 1:
        place.refuse(f"mode is {place.attr('mode')}; allowed is 1, an ordinary convolution")
    _check_geometry(place, ("kernel_size", "stride", "dilation"), "pad_list")
    _check_fused(place)
    _check_bias(place, outs)
    _check_weight_scales(place, outs)
    if place.quantized:
        windows = _windows(place, "kernel_size", "stride", "pad_list", "dilation")
        hold(place, limits.convolution(windows, channels, outs, group, quant(weight).per_channel))


def _windows(place: Place, kernel: str, strides: str, pads: str, dilations: str = "") -> limits.Windows:
    """The windows of a convolution or pool, as the list of limits takes them."""
    plane, output = place.inputs[0].shape[1:3], place.output.shape[1:3]
    steps = place.numbers(dilations) if dilations else (1, 1)
    found = limits.Windows(
        _pair(place.numbers(kernel)), _pair(place.numbers(strides)), _pair(steps), (0, 0, 0, 0), _pair(plane),
        _pair(output),
    )  # fmt: skip
    if place.attr("pad_mode") == PadMode.SAME:
        return found.padded_same()
    top, bottom, left, right = place.numbers(pads) or (0, 0, 0, 0)
    return replace(found, pads=(top, bottom, left, right))


def _pair(numbers: Sequence[int]) -> tuple[int, int]:
    return numbers[0], numbers[1]


def hold(place: Place, objection: Optional[str]) -> None:
    """Refuse a step to which the list of limits has an objection."""
    if objection:
        place.refuse(objection)


def _check_pool(place: Place) -> None:
    if len(place.inputs[0].shape) != 4 or place.attr("format") != Format.NHWC:
        place.refuse("its input has to have 4 dimensions and the format NHWC")
    if not place.attr("global"):
        _check_geometry(place, ("kernel_size", "strides"), "pad")
        if place.op == "AvgPoolFusion":
            hold(place, limits.average(_windows(place, "kernel_size", "strides", "pad")))


def _check_geometry(place: Place, pairs: Sequence[str], pads: str) -> None:
    for name in pairs:
        found = place.numbers(name)
        if len(found) != 2 or min(found) < 1:
            place.refuse(f"{name} is {list(found)}; allowed are two numbers from 1 up")
    mode, padding = place.attr("pad_mode"), place.numbers(pads)
    if mode not in [int(m) for m in PadMode]:
        place.refuse(f"pad_mode is {mode}; allowed: {', '.join(f'{m.value} ({m.name})' for m in PadMode)}")
    if (padding or mode == PadMode.PAD) and (len(padding) != 4 or min(padding) < 0):
        place.refuse(f"{pads} is {list(padding)}; allowed are four numbers from 0 up: above, below, left, right")


def _check_matmul(place: Place) -> None:
    x, weight, output = place.inputs[0], place.inputs[1], place.output
    if min(len(x.shape), len(weight.shape), len(output.shape)) < 2:
        place.refuse("its operands and its output have to have 2 dimensions at least")
    depth = x.shape[-2] if place.attr("transpose_a") else x.shape[-1]
    rows, columns = weight.shape[-2:]
    inner, outs = (columns, rows) if place.attr("transpose_b") else (rows, columns)
    if depth != inner or outs != output.shape[-1]:
        place.refuse(
            f"it multiplies {listed(x.shape)} and {listed(weight.shape)} to {listed(output.shape)}, which do not fit"
        )
    _check_fused(place)
    _check_bias(place, outs)
    _check_weight_scales(place, outs)
    if weight.dtype == "int8" and quant(weight).per_channel and len(weight.shape) != 2:
        place.refuse(f"its weight has {len(weight.shape)} dimensions and a scale for each channel; allowed are 2")


def _check_full_connection(place: Place) -> None:
    x, weight = place.inputs[0], place.inputs[1]
    place.constant(1)
    if not x.shape or len(place.output.shape) != 2:
        place.refuse("its output has to have 2 dimensions and its input one at least")
    outs = place.output.shape[-1]
    wanted = (outs, math.prod(x.shape[1:]))
    if tuple(weight.shape) != wanted:
        place.refuse(f"its weight is {listed(weight.shape)}; allowed is {listed(wanted)}")
    if place.attr("has_bias") != (len(place.inputs) == 3) or not place.attr("use_axis") or place.attr("axis") != 1:
        place.refuse("allowed are use_axis true, axis 1, and has_bias where there is a bias")
    _check_fused(place)
    _check_bias(place, outs)
    _check_weight_scales(place, outs)


def _check_bias(place: Place, outs: int) -> None:
    if len(place.inputs) < 3:
        return
    place.constant(2)
    bias, dtype = place.inputs[2], "int32" if place.quantized else "float32"
    if bias.dtype != dtype or tuple(bias.shape) != (outs,):
        place.refuse(f"its bias is {bias.dtype}{listed(bias.shape)}; allowed is {dtype}{listed((outs,))}")


def _check_weight_scales(place: Place, outs: int) -> None:
    """One scale, or one an output channel; in int8, ratios the runtime can represent."""
    weight = place.inputs[1]
    if weight.dtype != "int8":
        return
    count = quant(weight).scale.size
    if count not in (1, outs):
        place.refuse(f"its weight has {count} scales; allowed is 1 or, for each output channel, {outs}")
    if place.quantized:
        # Multiplied in float32, as the runtime does.
        with np.errstate(over="ignore", under="ignore"):
            product = np.float32(scale(place.inputs[0])) * quant(weight).scale.astype(np.float32)
        ratios = product.astype(np.float64) / np.float64(np.float32(scale(place.output)))
        _check_ratios(place, ratios, "s_x·s_w/s_y")


def _check_ratios(place: Place, ratios: Sequence[float] | np.ndarray, formula: str) -> None:
    for ratio in np.ravel(ratios):
        fraction, exponent = math.frexp(ratio) if math.isfinite(ratio) else (0.0, 0)
        exponent += math.floor(fraction * 2**31 + 0.5) == 2**31
        if fraction <= 0 or not -31 <= exponent <= 30:
            place.refuse(
                f"the requantisation ratio {formula} is {ratio:.4g}; the runtime can represent 2^-32 to 2^30: "
                "the ranges before and after it are too far apart"
            )


def _check_sum(place: Place) -> None:
    if not place.quantized:
        return
    first, second, out = scale(place.inputs[0]), scale(place.inputs[1]), scale(place.output)
    twice = 2 * max(first, second)
    _check_ratios(place, [first / twice, second / twice, twice / (2**20 * out)], "of a sum")


def _check_add(place: Place) -> None:
    _check_fused(place)
    _check_sum(place)


def _check_mul(place: Place) -> None:
    if place.quantized:
        ratio = scale(place.inputs[0]) * scale(place.inputs[1]) / scale(place.output)
        _check_ratios(place, [ratio], "s_0·s_1/s_y")


def _check_activation(place: Place) -> None:
    if not place.quantized:
        return
    _check_fused(place, _ACTIVATIONS)
    if place.attr("activation_type") in (ActivationType.RELU, ActivationType.RELU6):
        _check_ratios(place, [scale(place.inputs[0]) / scale(place.output)], "s_x/s_y")


def _check_softmax(place: Place) -> None:
    axis, rank = place.numbers("axis"), len(place.inputs[0].shape)
    if len(axis) != 1 or not -1 <= axis[0] < rank:
        place.refuse(f"axis is {list(axis)}; allowed is one axis, -1 or 0 to {rank - 1}")


def _check_reduce(place: Place) -> None:
    rank = len(place.inputs[0].shape)
    axes = [axis_of(place, int(axis), rank) for axis in place.constant(1)]
    if not axes or len(set(axes)) != len(axes):
        place.refuse(f"its axes are {axes}; allowed are different axes, one at least")
    if not place.quantized:
        if place.attr("mode") == ReduceMode.MAX:
            hold(place, limits.maximum(rank, axes))
        return
    if place.attr("mode") not in [int(m) for m in ReduceMode]:
        place.refuse(
            f"mode is {place.attr('mode')}; allowed in int8: {', '.join(f'{m.value} ({m.name})' for m in ReduceMode)}"
        )
    _check_ratios(place, [scale(place.inputs[0]) / scale(place.output)], "s_x/s_y")


def _check_layer_norm(place: Place) -> None:
    dtypes = ("int8", "int32") if place.quantized else ("float32", "float32")
    for index, name, dtype in zip((1, 2), ("gamma", "beta"), dtypes):
        place.constant(index)
        if place.inputs[index].dtype != dtype:
            place.refuse(f"its {name} is {place.inputs[index].dtype}; allowed is {dtype}")


def _check_batch_norm(place: Place) -> None:
    dtype = "int8" if place.quantized else "float32"
    for tensor in place.inputs[1:]:
        if tensor.dtype != dtype:
            place.refuse(f"{tensor.name!r} is {tensor.dtype}; allowed is {dtype}")


def _check_concat(place: Place) -> None:
    axis_of(place, place.attr("axis"), len(place.output.shape))
    dtypes = dict.fromkeys(t.dtype for t in [*place.inputs, place.output])
    if len(dtypes) > 1:
        place.refuse(f"it joins {' and '.join(dtypes)}; allowed is one kind")


def _check_split(place: Place) -> None:
    shape = place.inputs[0].shape
    axis = axis_of(place, place.attr("axis"), len(shape))
    if place.attr("output_num") != len(place.outputs):
        place.refuse(f"output_num is {place.attr('output_num')}; it has {len(place.outputs)} outputs")
    sizes = place.numbers("size_splits")
    if sizes and (len(sizes) != len(place.outputs) or sum(sizes) != shape[axis]):
        place.refuse(f"size_splits is {list(sizes)}; allowed are {len(place.outputs)} sizes that sum to {shape[axis]}")


def _check_pad(place: Place) -> None:
    paddings = place.inputs[1]
    wanted = (len(place.inputs[0].shape), 2)
    if tuple(paddings.shape) != wanted or place.constant(1).min(initial=0) < 0:
        place.refuse(f"its paddings are {listed(paddings.shape)}; allowed is {listed(wanted)}, none below 0")
    if not place.quantized:
        return
    if not same_quant(place.inputs[0], place.output):
        place.refuse("its input and output have different quantisation parameters; the runtime needs the same")


def _check_transpose(place: Place) -> None:
    rank = len(place.inputs[0].shape)
    if sorted(int(axis) for axis in place.constant(1)) != list(range(rank)):
        place.refuse(f"its axes are {place.constant(1).tolist()}; allowed is an order of 0 to {rank - 1}")


def _check_resize(place: Place) -> None:
    if place.attr("format") != Format.NHWC:
        place.refuse(f"format is {place.attr('format')}; allowed is {Format.NHWC.value} (NHWC)")
    if not place.quantized:
        return
    if place.attr("method") == CUBIC:
        place.refuse("the method is cubic; allowed in int8: linear, nearest")
    if place.attr("method") == NEAREST and not same_quant(place.inputs[0], place.output):
        place.refuse("its input and output have different quantisation parameters; the runtime needs the same")


_RULES: dict[str, Callable[[Place], None]] = {
    "Conv2DFusion": _check_conv,
    "MatMulFusion": _check_matmul,
    "FullConnection": _check_full_connection,
    "AddFusion": _check_add,
    "SubFusion": _check_sum,
    "MulFusion": _check_mul,
    "Activation": _check_activation,
    "AvgPoolFusion": _check_pool,
    "MaxPoolFusion": _check_pool,
    "Softmax": _check_softmax,
    "ReduceFusion": _check_reduce,
    "LayerNormFusion": _check_layer_norm,
    "BatchNorm": _check_batch_norm,
    "Concat": _check_concat,
    "Split": _check_split,
    "PadFusion": _check_pad,
    "Transpose": _check_transpose,
    "Resize": _check_resize,
}
