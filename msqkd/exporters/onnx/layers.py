"""Convolutions, matrix products, pools and normalisations. All are in NCHW, the layout of MindSpore and of ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from msqkd.exporters.onnx.calls import Call
from msqkd.exporters.onnx.table import writes
from msqkd.quant.uses import POOL_MODES, Pooling, added_sizes, pooling_of


@writes("Conv2D")
def _convolution(call: Call) -> None:
    strides, dilations = (call.attribute(name)[-2:] for name in ("stride", "dilation"))
    kernel = call.shape(1)[-2:]
    mode = str(call.attribute("pad_mode")).upper()
    if mode == "PAD":
        top, bottom, left, right = call.attribute("pad")
        pads = [top, left, bottom, right]
    else:
        pads = _pads(call, mode, kernel, strides, dilations)
    call.emit(
        "Conv",
        *(call.tensor(index) for index in range(len(call.node.inputs))),
        kernel_shape=list(kernel),
        strides=list(strides),
        dilations=list(dilations),
        group=int(call.attribute("group")),
        pads=pads,
    )


def _pads(
    call: Call, mode: str, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int] = (1, 1)
) -> list[int]:
    """Rows and columns added (top, left, bottom, right); with SAME the output has ceil(size / stride) of them."""
    if mode == "VALID":
        return [0, 0, 0, 0]
    if mode != "SAME":
        raise call.refusal(f"its padding mode is {mode}; allowed: PAD, SAME, VALID")
    sizes = call.shape(0)[2:]
    if min(sizes) < 1:
        raise call.refusal("the height and width of its input must be known to pad it")
    totals = [
        max((-(-size // stride) - 1) * stride + (window - 1) * dilation + 1 - size, 0)
        for size, window, stride, dilation in zip(sizes, kernel, strides, dilations)
    ]
    return [total // 2 for total in totals] + [total - total // 2 for total in totals]


@writes("Conv2DTranspose")
def _transposed_convolution(call: Call) -> None:
    """Of the size asked for: rows and columns that the windows do not reach are added below and on the right."""
    strides, dilations = (call.attribute(name)[-2:] for name in ("stride", "dilation"))
    top, bottom, left, right = call.attribute("pad_list")
    kernel, sizes, wanted = call.shape(1)[-2:], call.shape(0)[2:], call.output_shape()[2:]
    if min(*sizes, *wanted) < 1:
        raise call.refusal("the height and width of its input and of its result must be known")
    added = list(added_sizes(call.node, kernel, sizes, wanted))
    most = [stride - 1 for stride in strides]
    if any(not 0 <= more <= limit for more, limit in zip(added, most)):
        raise call.refusal(f"its result has {added} rows and columns more than its windows cover; allowed: 0 to {most}")
    call.emit(
        "ConvTranspose",
        *(call.tensor(index) for index in (0, 1)),
        kernel_shape=list(kernel),
        strides=list(strides),
        dilations=list(dilations),
        group=int(call.attribute("group")),
        pads=[top, left, bottom, right],
        output_padding=added,
    )


@writes("BiasAdd")
def _bias_add(call: Call) -> None:
    """The bias is one of axis 1."""
    bias, planes = call.tensor(1), len(call.shape(0)) - 2
    if planes:
        bias = call.step("Unsqueeze", bias, call.constant(range(1, planes + 1)))
    call.emit("Add", call.tensor(0), bias)


@writes("MaxPool")
def _max_pool(call: Call) -> None:
    call.emit("MaxPool", call.tensor(0), **_windows(call))


@writes("AvgPool")
def _average_pool(call: Call) -> None:
    pool = _pooling(call)
    if pool.ceil and pool.counts_padding:
        raise call.refusal("it rounds the number of windows up and counts what it pads with; allowed: one of the two")
    call.emit("AveragePool", call.tensor(0), count_include_pad=int(pool.counts_padding), **_windows(call))


def _pooling(call: Call) -> Pooling:
    if not call.node.functional:
        for name in ("kernel_size", "strides", "pad_mode"):
            call.attribute(name)
    elif (mode := [call.literal(argument) for argument in (1, 2, 3)][-1]) not in POOL_MODES:
        raise call.refusal(f"its padding mode is {mode}; allowed: {', '.join(POOL_MODES.values())}")
    return pooling_of(call.graph, call.node)


def _windows(call: Call) -> dict[str, Any]:
    """Kernel, strides and padding of a pool, as ONNX's attributes."""
    pool = _pooling(call)
    if pool.mode == "PAD":
        top, bottom, left, right = pool.sides
        pads = [top, left, bottom, right]
    else:
        pads = _pads(call, pool.mode, pool.kernel, pool.strides)
    sizes = {"kernel_shape": list(pool.kernel), "strides": list(pool.strides)}
    return {**sizes, "pads": pads, "ceil_mode": int(pool.ceil)}


@writes("AdaptiveAvgPool2D")
def _adaptive_average(call: Call) -> None:
    sizes, wanted = call.shape(0)[2:], call.output_shape()[2:]
    if wanted == (1, 1):
        call.emit("GlobalAveragePool", call.tensor(0))
        return
    if len(sizes) != 2 or any(size < 1 or size % parts for size, parts in zip(sizes, wanted)):
        raise call.refusal(f"it divides {sizes} into {wanted} parts; allowed: parts of equal size")
    kernel = [size // parts for size, parts in zip(sizes, wanted)]
    call.emit("AveragePool", call.tensor(0), kernel_shape=kernel, strides=kernel)


@writes("Dense")
def _dense(call: Call) -> None:
    x, weight, *bias = (call.tensor(index) for index in range(len(call.node.inputs)))
    if len(call.shape(0)) == 2:
        call.emit("Gemm", x, weight, *bias, transB=1)
        return
    product = (x, call.step("Transpose", weight, perm=[1, 0]))
    if bias:
        call.emit("Add", call.step("MatMul", *product), *bias)
    else:
        call.emit("MatMul", *product)


@writes("MatMul", "BatchMatMul")
def _product(call: Call) -> None:
    operands = [_transposed(call, index, bool(call.literal(index + 2))) for index in (0, 1)]
    call.emit("MatMul", *operands)


@writes("MatMulExt")
def _plain_product(call: Call) -> None:
    call.emit("MatMul", call.tensor(0), call.tensor(1))


def _transposed(call: Call, argument: int, transpose: bool) -> str:
    if not transpose:
        return call.tensor(argument)
    *batch, rows, columns = range(len(call.shape(argument)))
    return call.step("Transpose", call.tensor(argument), perm=[*batch, columns, rows])


@writes("BatchNorm")
def _batch_norm(call: Call) -> None:
    _only_first_result(call)
    call.emit("BatchNormalization", *(call.tensor(index) for index in range(5)), epsilon=float(call.literal(6)))


@writes("LayerNorm")
def _layer_norm(call: Call) -> None:
    _only_first_result(call)
    rank = len(call.shape(0))
    norm_axis, params_axis = (int(call.literal(argument)) % rank for argument in (3, 4))
    if norm_axis != params_axis:
        raise call.refusal(f"it normalises from axis {norm_axis} and scales from axis {params_axis}; allowed: one axis")
    call.emit(
        "LayerNormalization",
        *(call.tensor(index) for index in range(3)),
        axis=norm_axis - rank,
        epsilon=float(call.literal(5)),
    )


@writes("GroupNorm")
def _group_norm(call: Call) -> None:
    """The groups as the channels of an InstanceNormalization: ONNX has one factor a group where MindSpore has channels.

    (N, C, ...) → (N, groups, rest) → normalised → (N, C, ...), with the factors and offsets as (C, 1 ...).
    """
    _only_first_result(call)
    groups, shape = int(call.literal(1)), call.shape(0)
    x = call.tensor(0)
    ones, zeros = (call.writer.constant(np.full(groups, value, np.float32), "group") for value in (1, 0))
    grouped = call.step("Reshape", x, call.constant((0, groups, -1)))
    normal = call.step("InstanceNormalization", grouped, ones, zeros, epsilon=float(call.literal(4)))
    planes = call.constant(range(1, len(shape) - 1))
    factor, offset = (call.step("Unsqueeze", call.tensor(argument), planes) for argument in (2, 3))
    call.emit("Add", call.step("Mul", call.step("Reshape", normal, call.step("Shape", x)), factor), offset)


def _only_first_result(call: Call) -> None:
    """Refuse a node whose statistics are read; drop them otherwise."""
    read: Any = {name for node in call.graph.nodes for name in node.inputs}.union(call.graph.outputs)
    if read.intersection(call.node.outputs[1:]):
        raise call.refusal("a result other than the first is read; allowed: the normalised value alone")
    call.outputs = call.outputs[:1]
