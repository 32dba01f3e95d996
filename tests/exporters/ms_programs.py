"""Programs for tests of ``.ms`` files, built step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import numpy as np

from msqkd.integer.program import ActivationType, Format, PadMode, Program, Step, Tensor, TensorQuant

RELU = int(ActivationType.RELU)
SAME, VALID = int(PadMode.SAME), int(PadMode.VALID)


def quant(scale: Any = 0.05, zero_point: Any = -3) -> TensorQuant:
    """Parameters; a list of scales has zero points 0 unless they are given too."""
    if np.ndim(scale) and not np.ndim(zero_point):
        zero_point = np.zeros(np.shape(scale))
    return TensorQuant(scale, zero_point)


class Builder:
    """A program that grows: every method adds and returns the name of what it added."""

    def __init__(self, name: str = "net", seed: int = 0) -> None:
        self.program = Program(name)
        self.rng = np.random.default_rng(seed)

    def input(self, shape: Sequence[int], dtype: str = "float32", params: Optional[TensorQuant] = None) -> str:
        name = f"x{len(self.program.inputs)}"
        self.program.inputs.append(name)
        return self.program.add(Tensor(name, dtype, tuple(shape), quant=params))

    def constant(
        self, data: Any, dtype: str = "int32", params: Optional[TensorQuant] = None, form: Format = Format.NHWC
    ) -> str:
        array = np.asarray(data, dtype)
        return self.program.add(Tensor(f"c{len(self.program.tensors)}", dtype, array.shape, array, params, form))

    def weight(self, shape: Sequence[int], params: Optional[TensorQuant] = None, form: Format = Format.KHWC) -> str:
        """Random int8 values with `params`, or random float32 values without."""
        if params is None:
            return self.constant(self.rng.normal(size=shape), "float32", form=form)
        return self.constant(self.rng.integers(-127, 128, shape), "int8", params, form)

    def step(
        self,
        op: str,
        inputs: Sequence[str],
        shape: Sequence[int],
        attrs: Optional[dict[str, Any]] = None,
        params: Optional[TensorQuant] = None,
        dtype: str = "",
        layer: str = "",
    ) -> str:
        """A step with one output: int8 with `params`, float32 (or `dtype`) without."""
        name = f"s{len(self.program.steps)}"
        dtype = dtype or ("int8" if params else "float32")
        output = self.program.add(Tensor(f"{name}.y", dtype, tuple(shape), quant=params))
        int8 = dtype == "int8" and op != "QuantDTypeCast"
        self.program.steps.append(Step(name, op, list(inputs), [output], attrs or {}, int8, layer))
        return output

    def cast(self, source: str, params: Optional[TensorQuant] = None) -> str:
        """To int8 with `params`, to float32 without."""
        codes = (43, 32) if params else (32, 43)
        attrs = {"src_t": codes[0], "dst_t": codes[1]}
        return self.step("QuantDTypeCast", [source], self.program.tensors[source].shape, attrs, params)

    def conv(
        self,
        source: str,
        outs: int,
        kernel: int = 3,
        stride: int = 1,
        group: int = 1,
        params: Optional[TensorQuant] = None,
        weight: Optional[TensorQuant] = None,
        **attrs: Any,
    ) -> str:
        """A SAME convolution with a bias: int8 with `params`, float with them absent."""
        n, height, width, channels = self.program.tensors[source].shape
        shape = (n, -(-height // stride), -(-width // stride), outs)
        given = {
            "format": 1, "kernel_size": [kernel, kernel], "stride": [stride, stride], "dilation": [1, 1],
            "pad_mode": SAME, "pad_list": [0, 0, 0, 0], "mode": 1, "group": group, "in_channel": channels,
            "out_channel": outs, "activation_type": RELU, **attrs,
        }  # fmt: skip
        values = self.weight((outs, kernel, kernel, channels // group), weight)
        bias = self.constant(self.rng.integers(-900, 900, outs), "int32" if params else "float32")
        return self.step("Conv2DFusion", [source, values, bias], shape, given, params)

    def finish(self, *outputs: str) -> Program:
        self.program.outputs = list(outputs)
        return self.program


def small_net(per_channel: bool = True) -> Program:
    """Casts at both ends; convolutions (one depthwise), an addition, a pool, a Reshape and a dense layer in int8."""
    build = Builder("small")
    x = build.cast(build.input((2, 8, 8, 3)), quant(0.03, 2))
    scales = [quant(np.linspace(0.001, 0.004, n)) if per_channel else quant(0.002, 0) for n in (8, 8, 5)]
    first = build.conv(x, 8, params=quant(0.04, -128), weight=scales[0])
    second = build.conv(first, 8, group=8, params=quant(0.05, 7), weight=scales[1], activation_type=0)
    total = build.step("AddFusion", [first, second], (2, 8, 8, 8), {"activation_type": RELU}, quant(0.06, -128))
    pooled = build.step("MaxPoolFusion", [total], (2, 4, 4, 8), pool(2), quant(0.06, -128))
    flat = build.step("Reshape", [pooled, build.constant([2, 128])], (2, 128), params=quant(0.06, -128))
    weight = build.weight((5, 128), scales[2], Format.NHWC)
    dense = [flat, weight, build.constant(np.arange(5))]
    logits = build.step("MatMulFusion", dense, (2, 5), {"transpose_b": True}, quant(0.2, 11))
    return build.finish(build.cast(logits))


def pool(size: int) -> dict[str, Any]:
    return {
        "kernel_size": [size, size], "strides": [size, size], "pad": [0, 0, 0, 0], "pad_mode": VALID, "round_mode": 0,
        "format": 1,
    }  # fmt: skip


def resnet20(int8: bool, per_channel: bool = False) -> Program:
    """The steps of ResNet-20 for CIFAR with 1×1 shortcuts, in int8 or in float."""
    build = Builder("resnet20")

    def params(zero_point: int = -128) -> Optional[TensorQuant]:
        return quant(float(build.rng.uniform(0.02, 0.2)), zero_point) if int8 else None

    def weights(outs: int) -> Optional[TensorQuant]:
        if not int8:
            return None
        return quant(build.rng.uniform(0.001, 0.01, outs)) if per_channel else quant(0.004, 0)

    def conv(source: str, outs: int, kernel: int = 3, stride: int = 1, **attrs: Any) -> str:
        return build.conv(source, outs, kernel, stride, params=params(), weight=weights(outs), **attrs)

    x = build.input((1, 32, 32, 3))
    x = conv(build.cast(x, quant(0.02, 0)) if int8 else x, 16)
    for width in (16, 32, 64):
        for block in range(3):
            stride = 2 if width > 16 and not block else 1
            y = conv(conv(x, width, stride=stride), width, activation_type=0)
            shortcut = conv(x, width, 1, stride, activation_type=0) if stride == 2 else x
            shape = build.program.tensors[y].shape
            x = build.step("AddFusion", [y, shortcut], shape, {"activation_type": RELU}, params())
    x = build.step("AvgPoolFusion", [x], (1, 1, 1, 64), pool(8), build.program.tensors[x].quant)
    x = conv(x, 10, 1, activation_type=0)
    x = build.step("Reshape", [x, build.constant([1, 10])], (1, 10), params=build.program.tensors[x].quant)
    return build.finish(build.cast(x) if int8 else x)


def every_primitive() -> dict[str, Program]:
    """One small program a primitive: in int8 where the runtime has a kernel to rely on, else in float."""
    q, image, row = quant(), (1, 4, 4, 8), (2, 6)
    unit = {"activation_type": RELU}
    programs: dict[str, Program] = {}

    def add(op: str, shape: Sequence[int], out: Sequence[int], attrs: Any, *others: Any, int8: bool = True) -> None:
        build = Builder(op)
        params = q if int8 else None
        x = build.input(shape, "int8" if int8 else "float32", params)
        more = [build.constant(*o) if isinstance(o, tuple) else build.constant(o) for o in others]
        target = quant(1 / 256, -128) if op == "Softmax" else params
        programs[op] = build.finish(build.step(op, [x, *more], out, attrs, target))

    add("Activation", image, image, {"activation_type": int(ActivationType.HSWISH)})
    add("AvgPoolFusion", image, (1, 2, 2, 8), pool(2))
    add("MaxPoolFusion", image, (1, 2, 2, 8), pool(2))
    add("BatchNorm", row, row, {"epsilon": 1e-3}, *([(np.ones(6), "int8", q)] * 2))
    add("BiasAdd", row, row, {"format": 1}, (np.ones(6), "float32"), int8=False)
    add("Concat", row, (2, 12), {"axis": -1}, (np.ones(row), "int8", q))
    add("Cast", row, row, {}, int8=False)
    for op in ("AddFusion", "SubFusion", "MulFusion"):
        add(op, row, row, {} if op == "MulFusion" else unit if op == "AddFusion" else {}, (np.ones(row), "int8", q))
    add("DivFusion", row, row, unit, (np.ones(row), "float32"), int8=False)
    for op in ("Abs", "Erf", "Log", "Rsqrt", "Sqrt"):
        add(op, row, row, {}, int8=False)
    for op in ("Maximum", "Minimum"):
        add(op, row, row, {}, (np.ones(6), "float32"), int8=False)
    add("ExpFusion", row, row, {"base": 2.0, "shift": 0.5}, int8=False)
    add("PowFusion", row, row, {"scale": 0.25}, (2.0, "float32"), int8=False)
    add("ScaleFusion", row, row, {"axis": 1}, (np.ones(6), "float32"), int8=False)
    add("Flatten", image, (1, 128), {"axis": 2}, int8=False)
    add("Shape", row, (2,), {}, int8=False)
    add("Stack", row, (2, 2, 6), {"axis": 1}, (np.ones(row), "float32"), int8=False)
    add("ExpandDims", row, (2, 6, 1), {}, -1)
    add("Gather", row, (2, 2), {}, [0, 3], 1)
    norm = {"begin_norm_axis": -1, "epsilon": 1e-6, "elementwise_affine": True, "begin_params_axis": -1}
    add("LayerNormFusion", row, row, norm, (np.ones(6), "int8", q), np.arange(6))
    add("PadFusion", row, (3, 8), {"padding_mode": 1}, [[0, 1], [2, 0]])
    add("ReduceFusion", image, (1, 1, 1, 8), {"keep_dims": True, "mode": 1, "coeff": 1.0}, [1, 2])
    add("Reshape", row, (12,), {}, ([12], "int64"))
    resized = {"format": 1, "method": 1, "new_height": 8, "new_width": 8, "nearest_mode": 1}
    add("Resize", image, (1, 8, 8, 8), resized)
    add("SliceFusion", row, (1, 3), {"axes": [0, 1]}, [1, 2], [1, 3])
    add("Softmax", row, row, {"axis": [1]})
    add("Squeeze", (2, 1, 6), row, {"axis": [1]})
    add("Unsqueeze", row, (2, 1, 6), {"axis": [1]})
    add("StridedSlice", row, (2, 3), {"begin_mask": 1, "end_mask": 3}, [0, 0], [2, 6], [1, 2])
    add("Transpose", row, (6, 2), {}, [1, 0])
    dense = {"has_bias": True, "use_axis": True, "axis": 1, "activation_type": RELU}
    add("FullConnection", row, (2, 3), dense, (np.ones((3, 6)), "int8", quant([0.01, 0.02, 0.03])), np.arange(3))
    add("MatMulFusion", row, (2, 3), {"transpose_b": True}, (np.ones((3, 6)), "int8", q), np.arange(3))

    build = Builder("Conv2DFusion")
    x = build.input(image, "int8", q)
    programs["Conv2DFusion"] = build.finish(build.conv(x, 4, 3, 2, params=q, weight=quant([0.1, 0.2, 0.3, 0.4])))
    build = Builder("Conv2dTransposeFusion")
    weight, x = build.weight((8, 2, 2, 4)), build.input(image)
    attrs = {"format": 1, "kernel_size": [2, 2], "stride": [2, 2], "dilation": [1, 1], "output_paddings": [0, 0]}
    programs["Conv2dTransposeFusion"] = build.finish(
        build.step("Conv2dTransposeFusion", [x, weight], (1, 8, 8, 4), {**attrs, "group": 1})
    )
    build = Builder("Split")
    x = build.input(row, "int8", q)
    first = build.step("Split", [x], (2, 4), {"output_num": 2, "size_splits": [4, 2], "axis": 1}, q)
    second = build.program.add(Tensor("second", "int8", (2, 2), quant=quant(0.1, 4)))
    build.program.steps[0].outputs.append(second)
    programs["Split"] = build.finish(first, second)
    build = Builder("QuantDTypeCast")
    programs["QuantDTypeCast"] = build.finish(build.cast(build.input(row), q))
    return programs


def weight_only() -> Program:
    """Float steps whose weights are int8: a convolution (a scale a channel) and a dense layer (one scale)."""
    build = Builder("weight_only")
    x = build.conv(build.input((1, 4, 4, 3)), 6, weight=quant(np.linspace(0.01, 0.02, 6)))
    flat = build.step("Reshape", [x, build.constant([1, 96])], (1, 96))
    weight = build.weight((5, 96), quant(0.01, 0), Format.NHWC)
    bias = build.constant(np.zeros(5), "float32")
    return build.finish(build.step("MatMulFusion", [flat, weight, bias], (1, 5), {"transpose_b": True}))
