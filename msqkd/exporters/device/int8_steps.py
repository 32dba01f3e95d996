"""How each int8 operation of a plan is written for MindSpore Lite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from msqkd.exporters.device.lower import NATIVE, NHWC, Lowering, tensor_quant
from msqkd.exporters.device.moves import concat, reshape, transpose
from msqkd.exporters.device.slices import gather, pad, resize, split, strided_slice
from msqkd.graph.ir import Node
from msqkd.integer.program import ActivationType, Format, PadMode, TensorQuant
from msqkd.quant.integers import int8_weight
from msqkd.quant.uses import axes_of, pooling_of, rescale_factor

INT8 = "int8"
_FUSED = {"ReLU": ActivationType.RELU, "ReLU6": ActivationType.RELU6}
_LONE = {"HSwish": ActivationType.HSWISH, "Tanh": ActivationType.TANH}
_PAD_MODES = {"SAME": PadMode.SAME, "VALID": PadMode.VALID, "PAD": PadMode.PAD}


def _conv(low: Lowering, node: Node) -> None:
    source = low.get(node.inputs[0], INT8, NHWC)
    kernel = low.graph.params[node.inputs[1]].data
    weight, bias, value, activation = _weighted(low, node, source, kernel, (0, 2, 3, 1))
    _, channels, kernel_h, kernel_w = low.graph.shape(node.inputs[1])
    low.emit(
        node,
        "Conv2DFusion",
        [source, weight, *bias],
        {**conv_attrs(node, (kernel_h, kernel_w), channels), "activation_type": activation},
        value=value,
        layout=NHWC,
    )


def conv_attrs(node: Node, kernel: tuple[int, int], channels_per_group: int) -> dict[str, Any]:
    """Attributes of a convolution, from those MindSpore records."""
    mode = _PAD_MODES[str(node.attrs["pad_mode"]).upper()]
    group = int(node.attrs.get("group", 1))
    return {
        "format": Format.NHWC,
        "kernel_size": kernel,
        "stride": tuple(node.attrs["stride"][2:]),
        "dilation": tuple(node.attrs["dilation"][2:]),
        "pad_mode": mode,
        "pad_list": tuple(node.attrs["pad_list"]) if mode == PadMode.PAD else (0, 0, 0, 0),
        "mode": 1,
        "group": group,
        "in_channel": channels_per_group * group,
        "out_channel": int(node.attrs["out_channel"]),
    }


def _dense(low: Lowering, node: Node) -> None:
    source = low.get(node.inputs[0], INT8, NATIVE)
    weight, bias, value, activation = _weighted(low, node, source, low.dense_weight(node), (0, 1))
    attrs = {"transpose_b": True, "activation_type": activation}
    low.emit(node, "MatMulFusion", [source, weight, *bias], attrs, value=value)


def _weighted(
    low: Lowering, node: Node, source: str, kernel: np.ndarray, axes: tuple[int, ...]
) -> tuple[str, list[str], str, ActivationType]:
    """Constants of the weight and bias of `node`; the value its kernel gives, and the activation fused into it."""
    tail = low.tail(node)
    value = tail.output if tail is not None else node.output
    offset = low.graph.params[node.inputs[2]].data if len(node.inputs) == 3 else None
    found = low.program.tensors[source].quant
    assert found is not None
    input_scale, output_scale = float(found.scale[0]), float(low.quant(value).scale[0])
    integers, qparams, bias = int8_weight(low.weights[node.name], kernel, offset, input_scale, output_scale)
    quant = tensor_quant(qparams)
    layout = Format.KHWC if kernel.ndim == 4 else Format.NHWC
    names = [low.constant(node.inputs[1], integers.transpose(axes), quant, layout)]
    if bias is not None:
        bias = np.broadcast_to(bias, integers.shape[:1])
        bias_quant = TensorQuant(input_scale * quant.scale, np.zeros_like(quant.zero_point), 32)
        names.append(low.constant(node.inputs[2], bias, bias_quant))
    activation = _FUSED[tail.op] if tail is not None else ActivationType.NONE
    return names[0], names[1:], value, activation


def _add(low: Lowering, node: Node) -> None:
    tail = low.tail(node)
    attrs = {"activation_type": _FUSED[tail.op] if tail is not None else ActivationType.NONE}
    _binary(low, node, "AddFusion", attrs, tail.output if tail is not None else node.output)


def _sub(low: Lowering, node: Node) -> None:
    _binary(low, node, "SubFusion", {}, node.output)


def _mul(low: Lowering, node: Node) -> None:
    if rescale_factor(low.graph, node) is not None:
        rescale(low, node)
        return
    one, other = node.inputs[:2]
    if np.prod(low.shapes[one]) < np.prod(low.shapes[other]):
        node.inputs[:2] = [other, one]  # the operand that is broadcast comes second
    _binary(low, node, "MulFusion", {}, node.output)


def _binary(low: Lowering, node: Node, op: str, attrs: dict[str, Any], value: str) -> None:
    layout = low.common_layout(node.inputs[:2])
    if len({len(low.shapes[name]) for name in node.inputs[:2]}) > 1:
        layout = NATIVE  # a broadcast by trailing axes
    low.emit(node, op, [low.get(name, INT8, layout) for name in node.inputs[:2]], attrs, value=value, layout=layout)


def rescale(low: Lowering, node: Node) -> None:
    """A product with a number: by the integer 1 in steps of that number, which leaves the integers as they are."""
    value = low.graph.tensor_inputs(node)[0]
    factor, layout = rescale_factor(low.graph, node), low.layout(value)
    quant = TensorQuant(np.array([factor]), np.array([0]))
    number = low.constant(f"{node.output}_factor", np.ones(1, np.int8), quant)
    low.emit(node, "MulFusion", [low.get(value, INT8, layout), number], layout=layout)


def _product(low: Lowering, node: Node) -> None:
    flags = [bool(low.graph.const(name)) for name in node.inputs[2:4]] or [False, False]
    attrs = {"transpose_a": flags[0], "transpose_b": flags[1]}
    low.emit(node, "MatMulFusion", [low.get(name, INT8, NATIVE) for name in node.inputs[:2]], attrs)


def _softmax(low: Lowering, node: Node) -> None:
    value = node.inputs[0]
    layout = low.layout(value)
    axis = low.axis(value, axes_of(low.graph, node, 1)[0], layout)
    low.emit(node, "Softmax", [low.get(value, INT8, layout)], {"axis": (axis,)}, layout=layout)


def _layer_norm(low: Lowering, node: Node) -> None:
    """The factors as int8 with one scale, the offsets as int32 in the product of the scales of input and factors."""
    source = low.get(node.inputs[0], INT8, NATIVE)
    gamma, beta = (low.graph.params[name].data for name in node.inputs[1:3])
    qparams = low.weights[node.name].qparams(gamma)
    factors = low.constant(node.inputs[1], qparams.quantize(gamma).astype(np.int8), tensor_quant(qparams))
    step = float(low.quant(node.inputs[0]).scale[0]) * np.float64(qparams.scale)
    limit = 2**31 - 1
    steps = np.clip(np.rint(beta.astype(np.float64) / step), -limit, limit).astype(np.int32)
    offsets = low.constant(node.inputs[2], steps, TensorQuant(np.array([step]), np.array([0]), 32))
    attrs = {
        "begin_norm_axis": -1, "begin_params_axis": -1, "epsilon": float(low.graph.const(node.inputs[5])),
        "elementwise_affine": True,
    }  # fmt: skip
    low.emit(node, "LayerNormFusion", [source, factors, offsets], attrs)


def _activation(low: Lowering, node: Node) -> None:
    layout = low.layout(node.inputs[0])
    attrs = {"activation_type": _LONE[node.op]}
    low.emit(node, "Activation", [low.get(node.inputs[0], INT8, layout)], attrs, layout=layout)


def _max_pool(low: Lowering, node: Node) -> None:
    low.emit(node, "MaxPoolFusion", [low.get(node.inputs[0], INT8, NHWC)], pool_attrs(low, node), layout=NHWC)


def _average_pool(low: Lowering, node: Node) -> None:
    low.emit(node, "AvgPoolFusion", [low.get(node.inputs[0], INT8, NHWC)], pool_attrs(low, node), layout=NHWC)


def pool_attrs(low: Lowering, node: Node) -> dict[str, Any]:
    """Attributes of a pool.

    Where windows are rounded up it pads as far as they reach: the runtime would begin a window in the padding behind
    the input, which MindSpore does not.
    """
    pool = pooling_of(low.graph, node)
    sides = list(pool.sides)
    for axis in (0, 1) if pool.ceil else ():
        size, count = low.shapes[node.inputs[0]][2 + axis], low.shapes[node.output][2 + axis]
        reach = (count - 1) * pool.strides[axis] + pool.kernel[axis]
        sides[2 * axis + 1] = max(reach - size - sides[2 * axis], 0)
    return {
        "kernel_size": pool.kernel, "strides": pool.strides, "pad": tuple(sides), "pad_mode": _PAD_MODES[pool.mode],
        "round_mode": 0, "format": Format.NHWC,
    }  # fmt: skip


INT8_STEPS: dict[str, Callable[[Lowering, Node], object]] = {
    "Conv2D": _conv,
    "Dense": _dense,
    "Add": _add,
    "Sub": _sub,
    "Mul": _mul,
    "HSwish": _activation,
    "Tanh": _activation,
    "MaxPool": _max_pool,
    "AvgPool": _average_pool,
    "Concat": concat,
    "Reshape": reshape,
    "Squeeze": reshape,
    "ExpandDims": reshape,
    "Transpose": transpose,
    **dict.fromkeys(("Muls", "Div", "Divs", "RealDiv"), rescale),
    **dict.fromkeys(("MatMul", "MatMulExt", "BatchMatMul"), _product),
    "Softmax": _softmax,
    "LayerNorm": _layer_norm,
    "Split": split,
    "Unstack": split,
    "StridedSlice": strided_slice,
    "Gather": gather,
    "Pad": pad,
    "PadV3": pad,
    "ResizeNearestNeighbor": resize,
    "ResizeNearestNeighborV2": resize,
}
"""Writers by operation; one for every int8 operation of the target ``lite_arm``, those that became convolutions
aside."""
