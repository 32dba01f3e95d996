"""How operations that stay float are written for MindSpore Lite; what is not here becomes an island."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from msqkd.exporters.device.composed import (
    deviation,
    elu,
    extreme,
    group_norm,
    l2_normalize,
    log_softmax,
    lp_norm,
    prelu,
    reduction,
    running_sum,
    softplus,
)
from msqkd.exporters.device.int8_steps import conv_attrs, pool_attrs
from msqkd.exporters.device.lower import FLOAT, NATIVE, NHWC, Lowering
from msqkd.exporters.device.moves import concat, reshape, transpose
from msqkd.exporters.device.slices import gather, pad, resize, split, strided_slice
from msqkd.exporters.ms.layout import DATA_TYPES
from msqkd.graph.ir import Node
from msqkd.integer.program import ActivationType, Format, PadMode, ReduceMode
from msqkd.quant.integers import on_grid
from msqkd.quant.uses import added_sizes, axes_of, is_global, is_tanh_gelu, pooling_of
from msqkd.targets import limits

_ACTIVATIONS = {
    "ReLU": ActivationType.RELU, "ReLU6": ActivationType.RELU6, "Sigmoid": ActivationType.SIGMOID,
    "Tanh": ActivationType.TANH, "HSwish": ActivationType.HSWISH, "HSigmoid": ActivationType.HSIGMOID,
    "SiLU": ActivationType.SWISH, "GeLU": ActivationType.GELU, "GeluExt": ActivationType.GELU,
    "LeakyReLU": ActivationType.LEAKY_RELU,
}  # fmt: skip
_BINARY = {
    "Add": "AddFusion", "Sub": "SubFusion", "Mul": "MulFusion", "Div": "DivFusion",
    "RealDiv": "DivFusion", "Adds": "AddFusion", "Subs": "SubFusion", "Muls": "MulFusion", "Divs": "DivFusion",
    "Maximum": "Maximum", "Minimum": "Minimum", "SquaredDifference": "SubFusion",
}  # fmt: skip
_UNARY = {"Sqrt": "Sqrt", "Erf": "Erf", "Exp": "ExpFusion", "Abs": "Abs", "Log": "Log"}
_REDUCE = {
    "ReduceMean": ReduceMode.MEAN, "ReduceSum": ReduceMode.SUM,
    "ReduceMax": ReduceMode.MAX, "ReduceMin": ReduceMode.MIN, "ReduceProd": ReduceMode.PROD,
}  # fmt: skip


_CASTABLE = ("float32", "int32", "int64")


def _computed(low: Lowering, name: str) -> bool:
    return low.graph.values[name].kind in ("node", "input")


def _is_float(low: Lowering, name: str) -> bool:
    kind = low.graph.values[name].type
    return kind is not None and kind.dtype == FLOAT


def _dtype(low: Lowering, name: str) -> str:
    kind = low.graph.values[name].type
    return "" if kind is None else kind.dtype


def _as_float(low: Lowering, node: Node, name: str) -> str:
    """A computed value, converted where it holds whole numbers: the runtime's kernels read one type."""
    if _is_float(low, name):
        return name
    value = low.between(name, low.shapes[name], "float", FLOAT)
    _emit_cast(low, node, name, value)
    return value


def _emit_cast(low: Lowering, node: Node, source: str, value: str) -> None:
    """The step that converts `source` to the type of `value`, which the runtime wants as a second operand."""
    layout = low.layout(source)
    kind = low.constant(f"{value}_type", np.array([DATA_TYPES[_dtype(low, value)]], np.int32))
    low.emit(node, "Cast", [low.get(source, FLOAT, layout), kind], value=value, layout=layout)


def _biases(low: Lowering, node: Node) -> list[str]:
    return [low.constant(name, low.graph.params[name].data) for name in node.inputs[2:]]


def _conv(low: Lowering, node: Node) -> bool:
    if any(low.graph.values[name].kind != "param" for name in node.inputs[1:]):
        return False
    kernel = low.graph.params[node.inputs[1]].data
    _, channels, kernel_h, kernel_w = kernel.shape
    inputs = [low.get(node.inputs[0], FLOAT, NHWC), low.stored_weight(node, kernel, (0, 2, 3, 1)), *_biases(low, node)]
    low.emit(node, "Conv2DFusion", inputs, conv_attrs(node, (kernel_h, kernel_w), channels), layout=NHWC)
    return True


def _transposed_conv(low: Lowering, node: Node) -> bool:
    """With a weight (in, H, W, out), and rows and columns added below and on the right up to the size asked for.

    The runtime has no groups but single channels, in a kernel of its own: they are written as one, with weights of 0
    between them. A weight stored as integers is written with the numbers it stands for.
    """
    if node.inputs[1] not in low.graph.params:
        return False
    if node.name in low.weights:
        on_grid(low.graph, {node.name: low.weights[node.name]})
    weight = _in_one_group(low.graph.params[node.inputs[1]].data, int(node.attrs["group"]))
    wanted = low.shapes[node.output]
    spare = limits.transposed_convolution(wanted[1], wanted[2:]) is not None
    if spare:  # a channel of zeros, which is cut off again
        weight = np.pad(weight, ((0, 0), (0, 1), (0, 0), (0, 0)))
    channels, outs, *kernel = weight.shape
    strides, dilations = (tuple(node.attrs[name][2:]) for name in ("stride", "dilation"))
    sides = tuple(node.attrs["pad_list"])
    added = added_sizes(node, kernel, low.shapes[node.inputs[0]][2:], low.shapes[node.output][2:])
    if min(added) < 0 or (channels == outs == 1 and max(dilations) > 1):
        return False
    attrs = {
        "format": Format.NHWC, "kernel_size": tuple(kernel), "stride": strides, "dilation": dilations,
        "pad_mode": PadMode.PAD, "pad_list": sides, "mode": 1, "group": 1, "in_channel": channels, "out_channel": outs,
        "output_paddings": added,
    }  # fmt: skip
    held = low.constant(node.inputs[1], weight.transpose(0, 2, 3, 1), format=Format.KHWC)
    value = low.between(node.output, (wanted[0], outs, *wanted[2:]), "channels") if spare else node.output
    low.emit(
        node, "Conv2dTransposeFusion", [low.get(node.inputs[0], FLOAT, NHWC), held], attrs, value=value, layout=NHWC
    )
    if spare:
        first = low.constant(f"{node.output}_begin", np.zeros(4, np.int32))
        sizes = low.constant(f"{node.output}_size", np.array([-1, -1, -1, 1], np.int32))
        low.emit(node, "SliceFusion", [low.get(value, FLOAT, NHWC), first, sizes], {"axes": (0, 1, 2, 3)}, layout=NHWC)
    return True


def _in_one_group(weight: np.ndarray, groups: int) -> np.ndarray:
    """The weight (in, out / groups, H, W) of a transposed convolution as one (in, out, H, W) with zeros."""
    size, outs = weight.shape[0] // groups, weight.shape[1]
    whole = np.zeros((weight.shape[0], outs * groups, *weight.shape[2:]), weight.dtype)
    for group in range(groups):
        rows = slice(group * size, (group + 1) * size)
        whole[rows, group * outs : (group + 1) * outs] = weight[rows]
    return whole


def _dense(low: Lowering, node: Node) -> bool:
    if any(low.graph.values[name].kind != "param" for name in node.inputs[1:]):
        return False
    inputs = [
        low.get(node.inputs[0], FLOAT, NATIVE),
        low.stored_weight(node, low.dense_weight(node)),
        *_biases(low, node),
    ]
    low.emit(node, "MatMulFusion", inputs, {"transpose_b": True})
    return True


def _product(low: Lowering, node: Node) -> bool:
    """MatMul or BatchMatMul of two computed values, or of one with a parameter."""
    flags = [bool(low.graph.const(name)) for name in node.inputs[2:4]]
    names = [_operand(low, name, NATIVE) for name in node.inputs[:1]]
    if node.name in low.weights:
        names.append(low.stored_weight(node, low.graph.params[node.inputs[1]].data))
    else:
        names.append(_operand(low, node.inputs[1], NATIVE))
    attrs = {"transpose_a": flags[0], "transpose_b": flags[1]} if flags else {}
    low.emit(node, "MatMulFusion", names, attrs)
    return True


def _operand(low: Lowering, name: str, layout: tuple[int, ...], rank: int = 0) -> str:
    """A computed value in `layout`, or a constant that broadcasts against values of `rank` in it."""
    if _computed(low, name):
        return low.get(name, FLOAT, layout)
    value = low.graph.values[name]
    data = np.asarray(low.graph.params[name].data if value.kind == "param" else value.const, np.float32)
    if layout and data.ndim:
        data = data.reshape((1,) * (rank - data.ndim) + data.shape).transpose(layout)
    return low.constant(name, data)


def _binary(low: Lowering, node: Node, value: str = "") -> bool:
    """The result is `value`, by default that of the node."""
    operands = node.inputs[:2]
    if not any(_computed(low, name) for name in operands) or not _is_float(low, node.output):
        return False
    rank = len(low.shapes[node.output])
    computed = [name for name in operands if _computed(low, name)]
    if any(_dtype(low, name) not in _CASTABLE for name in computed):
        return False
    operands = [_as_float(low, node, name) if name in computed else name for name in operands]
    computed = [name for name in operands if _computed(low, name)]
    fits = all(len(low.shapes[name]) == rank for name in computed)
    layout = low.common_layout(computed) if fits else NATIVE
    tensors = [_operand(low, name, layout, rank) for name in operands]
    low.emit(node, _BINARY[node.op], tensors, value=value, layout=layout)
    return True


def _bias_add(low: Lowering, node: Node) -> bool:
    """A bias a channel, which a map has in the last place."""
    value, bias = node.inputs[:2]
    rank = len(low.shapes[value])
    if _computed(low, bias) or rank not in (2, 4):
        return False
    layout = NHWC if rank == 4 else NATIVE
    low.emit(node, "AddFusion", [low.get(value, FLOAT, layout), _operand(low, bias, NATIVE)], layout=layout)
    return True


def _squared_difference(low: Lowering, node: Node) -> bool:
    """The product of a difference with itself."""
    apart = low.between(node.output, low.shapes[node.output], "apart")
    if not _binary(low, node, apart):
        return False
    layout = low.layout(apart)
    low.emit(node, "MulFusion", [low.get(apart, FLOAT)] * 2, layout=layout)
    return True


def _sum(low: Lowering, node: Node) -> bool:
    """One addition after the other."""
    names = node.inputs
    if len(names) < 2 or not all(_computed(low, name) and _is_float(low, name) for name in names):
        return False
    layout, shape = low.common_layout(names), low.shapes[node.output]
    total = names[0]
    for number, name in enumerate(names[1:], 2):
        result = node.output if number == len(names) else low.between(node.output, shape, "sum")
        operands = [low.get(each, FLOAT, layout) for each in (total, name)]
        low.emit(node, "AddFusion", operands, value=result, layout=layout)
        total = result
    return True


def _identity(low: Lowering, node: Node) -> bool:
    """The value itself; an input that is an output too is copied."""
    if node.inputs[0] in low.graph.inputs or not _computed(low, node.inputs[0]):
        return reshape(low, node)
    low.alias(node, low.layout(node.inputs[0]))
    return True


def _with_number(low: Lowering, node: Node, op: str, number: float, first: bool = False) -> bool:
    """A step of the input and a number, which comes first where `first` says so."""
    value = node.inputs[0]
    if not _is_float(low, value):
        return False
    layout = low.layout(value)
    operands = [low.get(value, FLOAT, layout), low.constant(f"{node.output}_number", np.array([number], np.float32))]
    low.emit(node, op, operands[::-1] if first else operands, layout=layout)
    return True


def _negative(low: Lowering, node: Node) -> bool:
    return _with_number(low, node, "MulFusion", -1.0)


def _reciprocal(low: Lowering, node: Node) -> bool:
    return _with_number(low, node, "DivFusion", 1.0, first=True)


def _power(low: Lowering, node: Node) -> bool:
    exponent = 2.0 if node.op == "Square" else low.graph.const(node.inputs[1])
    if exponent is None or np.size(exponent) != 1:
        return False
    return _with_number(low, node, "PowFusion", float(np.reshape(exponent, ())))


def _cast(low: Lowering, node: Node) -> bool:
    kinds = [low.graph.values[name].type for name in (node.inputs[0], node.output)]
    if any(kind is None or kind.dtype not in _CASTABLE for kind in kinds):
        return False
    _emit_cast(low, node, node.inputs[0], node.output)
    return True


def _activation(low: Lowering, node: Node) -> bool:
    attrs: dict[str, Any] = {"activation_type": _ACTIVATIONS[node.op]}
    if "GELU" in node.op.upper():
        attrs["approximate"] = is_tanh_gelu(low.graph, node)
    if node.op == "LeakyReLU":
        attrs["alpha"] = float(node.attrs["alpha"])
    layout = low.layout(node.inputs[0])
    low.emit(node, "Activation", [low.get(node.inputs[0], FLOAT)], attrs, layout=layout)
    return True


def _unary(low: Lowering, node: Node) -> bool:
    layout = low.layout(node.inputs[0])
    low.emit(node, _UNARY[node.op], [low.get(node.inputs[0], FLOAT)], layout=layout)
    return True


def _inverse_root(low: Lowering, node: Node) -> bool:
    """1 / sqrt(x): the runtime's Rsqrt is the estimate of the processor, off by up to 0.2 %."""
    root = low.between(node.output, low.shapes[node.output], "root")
    layout = low.layout(node.inputs[0])
    low.emit(node, "Sqrt", [low.get(node.inputs[0], FLOAT)], value=root, layout=layout)
    one = low.constant(f"{node.output}_one", np.ones(1, np.float32))
    low.emit(node, "DivFusion", [one, low.get(root, FLOAT, layout)], layout=layout)
    return True


def _pool(low: Lowering, node: Node) -> bool:
    if pooling_of(low.graph, node).counts_padding:
        return False
    op = {"MaxPool": "MaxPoolFusion", "AvgPool": "AvgPoolFusion"}[node.op]
    low.emit(node, op, [low.get(node.inputs[0], FLOAT, NHWC)], pool_attrs(low, node), layout=NHWC)
    return True


def _reduce(low: Lowering, node: Node) -> bool:
    value = node.inputs[0]
    if not _is_float(low, value):
        return False
    axes = axes_of(low.graph, node, 1)
    keep = bool(low.graph.const(node.inputs[2]))
    # Without its reduced axes a map has no layout of its own; only over H and W, or C, is what is left in order.
    as_map = low.layout(value) == NHWC and (keep or axes in ([2, 3], [1]))
    layout = NHWC if as_map else NATIVE
    if as_map:
        axes = sorted(NHWC.index(axis) for axis in axes)
    operand, mode = low.get(value, FLOAT, layout), _REDUCE[node.op]
    reduction(low, node, operand, node.output, mode, axes, keep, (layout, layout if keep else NATIVE))
    return True


def _softmax(low: Lowering, node: Node) -> bool:
    value = node.inputs[0]
    axes = axes_of(low.graph, node, 1)
    if len(axes) != 1:
        return False
    layout = low.layout(value)
    attrs = {"axis": (low.axis(value, axes[0], layout),)}
    low.emit(node, "Softmax", [low.get(value, FLOAT, layout)], attrs, layout=layout)
    return True


def _layer_norm(low: Lowering, node: Node) -> bool:
    if len(node.outputs) > 1 and any(low.graph.consumers(name) for name in node.outputs[1:]):
        return False
    begin, params_axis, epsilon = (low.graph.const(name) for name in node.inputs[3:6])
    inputs = [low.get(node.inputs[0], FLOAT, NATIVE), *(_operand(low, name, NATIVE) for name in node.inputs[1:3])]
    attrs = {
        "begin_norm_axis": int(begin), "begin_params_axis": int(params_axis), "epsilon": float(epsilon),
        "elementwise_affine": True,
    }  # fmt: skip
    low.emit(node, "LayerNormFusion", inputs, attrs)
    return True


def _batch_norm(low: Lowering, node: Node) -> bool:
    """A factor and an offset a channel; what follows no layer it could be folded into."""
    if any(name not in low.graph.params for name in node.inputs[1:5]) or len(low.shapes[node.inputs[0]]) != 4:
        return False
    gamma, beta, mean, variance = (low.graph.params[name].data.astype(np.float64) for name in node.inputs[1:5])
    factor = gamma / np.sqrt(variance + float(low.graph.const(node.inputs[6])))
    scaled = low.between(node.output, low.shapes[node.output], "scaled")
    source = low.get(node.inputs[0], FLOAT, NHWC)
    low.emit(node, "MulFusion", [source, low.constant(f"{node.name}.factor", factor.astype(np.float32))],
             value=scaled, layout=NHWC)  # fmt: skip
    offset = low.constant(f"{node.name}.offset", (beta - mean * factor).astype(np.float32))
    low.emit(node, "AddFusion", [low.get(scaled, FLOAT, NHWC), offset], layout=NHWC)
    return True


def _global_mean(low: Lowering, node: Node) -> bool:
    if not is_global(low.graph, node):
        return False
    inputs = [low.get(node.inputs[0], FLOAT, NHWC), low.constant(f"{node.output}_axes", np.array([1, 2], np.int32))]
    attrs = {"mode": ReduceMode.MEAN, "keep_dims": True, "coeff": 1.0}
    low.emit(node, "ReduceFusion", inputs, attrs, layout=NHWC)
    return True


def _stack(low: Lowering, node: Node) -> bool:
    """Concat of the operands with the new axis."""
    axis = int(node.attrs["axis"]) % len(low.shapes[node.output])
    shape = list(low.shapes[node.output])
    shape[axis] = 1
    parts = []
    for name in node.inputs:
        if not _computed(low, name):
            return False
        part = low.between(node.output, shape, "part")
        target = low.constant(f"{part}_shape", np.array(shape, np.int32))
        low.emit(node, "Reshape", [low.get(name, FLOAT, NATIVE), target], value=part)
        parts.append(low.get(part, FLOAT, NATIVE))
    low.emit(node, "Concat", parts, {"axis": axis})
    return True


def _clamp(low: Lowering, node: Node) -> bool:
    """A minimum behind a maximum, as far as there are ends."""
    value, ends = node.inputs[0], [low.graph.const(name) for name in node.inputs[1:3]]
    if not _is_float(low, value) or any(low.graph.values[name].kind != "const" for name in node.inputs[1:3]):
        return False
    steps = [(op, end) for op, end in zip(("Maximum", "Minimum"), ends) if end is not None]
    if not steps:
        return False
    layout = low.layout(value)
    for number, (op, end) in enumerate(steps, 1):
        result = node.output if number == len(steps) else low.between(node.output, low.shapes[node.output], "raised")
        bound = low.constant(f"{result}_end", np.array([end], np.float32))
        low.emit(node, op, [low.get(value, FLOAT, layout), bound], value=result, layout=layout)
        value = result
    return True


def _broadcast(low: Lowering, node: Node) -> bool:
    """A sum with zeros of the shape asked for; the batch is that of the value."""
    value, shape = node.inputs[0], low.shapes[node.output]
    if not _computed(low, value) or not _is_float(low, value) or len(low.shapes[value]) != len(shape):
        return False
    if low.shapes[value][0] != shape[0]:
        return False
    zeros = low.constant(f"{node.output}_zeros", np.zeros((1, *shape[1:]), np.float32))
    low.emit(node, "AddFusion", [low.get(value, FLOAT, NATIVE), zeros])
    return True


def _tile(low: Lowering, node: Node) -> bool:
    """A Concat of the value with itself for every axis along which it is repeated."""
    value = node.inputs[0]
    times = low.graph.const(node.inputs[1]) if len(node.inputs) == 2 else None
    if not isinstance(times, tuple) or not _is_float(low, value) or not _computed(low, value):
        return False
    shape = list(low.shapes[value])
    repeats = [(axis, int(count)) for axis, count in enumerate(times) if count != 1]
    if len(times) != len(shape) or not repeats or min(times) < 1:
        return False
    for number, (axis, count) in enumerate(repeats, 1):
        shape[axis] *= count
        result = node.output if number == len(repeats) else low.between(node.output, shape, "part")
        low.emit(node, "Concat", [low.get(value, FLOAT, NATIVE)] * count, {"axis": axis}, value=result)
        value = result
    return True


FLOAT_STEPS: dict[str, Callable[[Lowering, Node], bool]] = {
    "Conv2D": _conv,
    "Conv2DTranspose": _transposed_conv,
    "Dense": _dense,
    "MatMul": _product,
    "MatMulExt": _product,
    "BatchMatMul": _product,
    **dict.fromkeys(_BINARY, _binary),
    "BiasAdd": _bias_add,
    "SquaredDifference": _squared_difference,
    "AddN": _sum,
    "Identity": _identity,
    **dict.fromkeys(_ACTIVATIONS, _activation),
    **dict.fromkeys(_UNARY, _unary),
    **dict.fromkeys(_REDUCE, _reduce),
    "MaxPool": _pool,
    "AvgPool": _pool,
    "Softmax": _softmax,
    "LayerNorm": _layer_norm,
    "BatchNorm": _batch_norm,
    "GroupNorm": group_norm,
    "L2Normalize": l2_normalize,
    "LpNorm": lp_norm,
    "ReduceStd": deviation,
    "LogSoftmax": log_softmax,
    "CumSum": running_sum,
    "PReLU": prelu,
    "Elu": elu,
    "Softplus": softplus,
    "Mish": softplus,
    "ArgMaxWithValue": extreme,
    "ArgMinWithValue": extreme,
    "AdaptiveAvgPool2D": _global_mean,
    "Rsqrt": _inverse_root,
    "Neg": _negative,
    "Reciprocal": _reciprocal,
    "Pow": _power,
    "PowTensorScalar": _power,
    "Square": _power,
    "ClampScalar": _clamp,
    "BroadcastTo": _broadcast,
    "Tile": _tile,
    "Cast": _cast,
    "Stack": _stack,
    "Pad": pad,
    "PadV3": pad,
    "Split": split,
    "Unstack": split,
    "StridedSlice": strided_slice,
    "Gather": gather,
    "ResizeNearestNeighbor": resize,
    "ResizeNearestNeighborV2": resize,
    "ResizeBilinearV2": resize,
    "Concat": concat,
    "Reshape": reshape,
    "Squeeze": reshape,
    "ExpandDims": reshape,
    "Transpose": transpose,
}
"""Writers by operation; one answers False where this use of the operation has no form."""
