from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Callable, Optional

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ms_programs import Builder, every_primitive, pool, quant, resnet20, small_net, weight_only

from msqkd.errors import ExportError
from msqkd.exporters.ms.check import check_program
from msqkd.integer.program import ISLAND, ActivationType, Format, Program, TensorQuant

RELU, SIGMOID, RELU6, LEAKY = (int(ActivationType[name]) for name in ("RELU", "SIGMOID", "RELU6", "LEAKY_RELU"))
Q = quant()
IMAGE = (1, 4, 4, 8)


@pytest.mark.parametrize("program", [small_net(), weight_only(), resnet20(True), resnet20(False)])
def test_programs_free_of_defects(program: Program) -> None:
    check_program(program)


@pytest.mark.parametrize("op", sorted(every_primitive()))
def test_every_primitive_has_an_accepted_form(op: str) -> None:
    program = every_primitive()[op]
    check_program(program, defects=False)


def refused(program: Program, problem: str, defect: bool = False) -> None:
    if defect:
        check_program(program, defects=False)
    with pytest.raises(ExportError, match=problem) as caught:
        check_program(program, defects=defect)
    assert "\n" not in str(caught.value)


def changed(change: Callable[[Program], Any]) -> Program:
    program = small_net()
    change(program)
    return program


def unary(
    op: str,
    shape: Sequence[int],
    out: Sequence[int],
    attrs: Optional[dict[str, Any]] = None,
    *constants: Any,
    x: TensorQuant = Q,
    y: Optional[TensorQuant] = Q,
) -> Program:
    """An int8 step of one input, with int32 constants after it."""
    build = Builder()
    source = build.input(shape, "int8", x)
    others = [build.constant(*c) if isinstance(c, tuple) else build.constant(c) for c in constants]
    return build.finish(build.step(op, [source, *others], out, attrs, y, layer="block.op"))


def binary(op: str, first: Sequence[int], second: Sequence[int], **attrs: Any) -> Program:
    build = Builder()
    inputs = [build.input(shape, "int8", Q) for shape in (first, second)]
    out = np.broadcast_shapes(tuple(first), tuple(second))
    return build.finish(build.step(op, inputs, out, attrs, Q))


def conv(shape: Sequence[int] = IMAGE, outs: int = 8, weight: Any = Q, params: Any = Q, **given: Any) -> Program:
    build = Builder()
    source = build.input(shape, "int8" if params else "float32", params)
    return build.finish(build.conv(source, outs, params=params, weight=weight, **given))


STRUCTURE = {
    "no steps": (lambda p: p.steps.clear(), "the program 'small' has no steps"),
    "no inputs": (lambda p: p.inputs.clear(), "the program 'small' has no inputs"),
    "another key": (lambda p: setattr(p.tensors["c2"], "name", "other"), "'other' is registered as 'c2'"),
    "dtype": (lambda p: setattr(p.tensors["x0"], "dtype", "float16"), "'x0' has dtype float16; allowed: int8, int32,"),
    "negative size": (lambda p: setattr(p.tensors["x0"], "shape", (-1, 3)), r"'x0' has shape \(-1, 3\); allowed are"),
    "values": (
        lambda p: setattr(p.tensors["c3"], "shape", (9,)),
        r"'c3' is int32\(9,\) and its values are int32\(8,\)",
    ),
    "no parameters": (lambda p: setattr(p.tensors["s1.y"], "quant", None), "'s1.y' is int8 and has no quantisation"),
    "unequal lists": (
        lambda p: setattr(p.tensors["c2"], "quant", TensorQuant(np.ones(8), np.zeros(1))),
        r"'c2' has scales of shape \(8,\) and zero points of shape \(1,\)",
    ),
    "scale 0": (lambda p: setattr(p.tensors["s1.y"], "quant", quant(0.0)), "'s1.y' has a scale that is not a positive"),
    "scale too small": (lambda p: setattr(p.tensors["s1.y"], "quant", quant(1e-60)), "that is not a positive float32"),
    "scale not a number": (lambda p: setattr(p.tensors["s1.y"], "quant", quant(np.nan)), "that is not a positive"),
    "zero point": (lambda p: setattr(p.tensors["s1.y"], "quant", quant(0.1, 128)), "'s1.y' has a zero point outside"),
    "activation per channel": (
        lambda p: setattr(p.tensors["s1.y"], "quant", quant([0.1, 0.2])),
        "'s1.y' has 2 scales; the runtime takes one for what is computed",
    ),
    "order": (lambda p: p.steps.insert(0, p.steps.pop(1)), r"step 's1' \(Conv2DFusion\): it reads 's0.y' before it"),
    "unknown input": (lambda p: p.steps[1].inputs.append("z"), "its input 'z' is not a tensor of the program"),
    "twice": (lambda p: p.steps[2].outputs.append("s1.y"), "its output 's1.y' is unknown, an input or constant, or"),
    "step name": (lambda p: setattr(p.steps[2], "name", "s1"), "its name 's1' is empty or used twice"),
    "output": (lambda p: p.outputs.append("x0"), "the output 'x0' of the program is computed by no step"),
    "constant as input": (lambda p: p.inputs.append("c2"), "the input 'c2' of the program is unknown, a constant"),
    "primitive": (
        lambda p: setattr(p.steps[3], "op", "AddFusio"),
        r"step 's3' \(AddFusio\): AddFusio is no primitive of a .ms file; did you mean 'AddFusion'",
    ),
    "attribute": (
        lambda p: p.steps[3].attrs.update(axis=1),
        r"step 's3' \(AddFusion\): there is no attribute axis; allowed: activation_type",
    ),
    "attribute out of range": (
        lambda p: p.steps[3].attrs.update(activation_type=200),
        "activation_type is 200; allowed is a whole number from -128 to 127",
    ),
    "attribute no list": (
        lambda p: p.steps[1].attrs.update(stride=2),
        "stride is 2; allowed is a list of whole numbers",
    ),
    "attribute no bool": (lambda p: p.steps[6].attrs.update(transpose_b=2), "transpose_b is 2; allowed: true, false"),
    "output missing": (lambda p: p.steps[3].outputs.clear(), "it has 2 inputs and 0 outputs"),
}


@pytest.mark.parametrize("case", STRUCTURE)
def test_structure(case: str) -> None:
    change, problem = STRUCTURE[case]
    refused(changed(change), problem)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39, "1"])
def test_float_attribute_no_float32_holds(value: Any) -> None:
    program = unary("Activation", IMAGE, IMAGE, {"activation_type": 12, "alpha": value})
    refused(program, "alpha is .*; allowed is a finite float32")


def test_island_names_what_cannot_be_written() -> None:
    program = small_net()
    step = program.steps[3]
    step.op, step.layer = ISLAND, "blocks.0.act"
    step.attrs = {"graph": SimpleNamespace(nodes=[SimpleNamespace(op=op) for op in ("Erf", "HSwish", "Erf")])}
    refused(program, "^layer 'blocks.0.act': Erf, HSwish cannot be written as .ms; .*; the format portable_mindir ")


def _float_bias(program: Program) -> None:
    bias = program.tensors[program.steps[6].inputs[2]]
    bias.dtype, bias.data = "float32", bias.data.astype(np.float32)


REFUSED = {
    "layer is named": (unary("Softmax", (2, 6), (2, 6), {"axis": [-2]}), r"layer 'block.op' \(Softmax\): axis is"),
    "softmax axis": (unary("Softmax", (2, 6), (2, 6), {"axis": [-2]}), r"axis is \[-2\]; allowed is one axis, -1 or 0"),
    "softmax axes": (unary("Softmax", (2, 6), (2, 6), {"axis": [0, 1]}), r"axis is \[0, 1\]; allowed is one axis"),
    "group per channel": (
        conv(group=2, weight=quant(np.full(8, 0.1))),
        "a scale for each channel and 2 groups; .* quantise the weight per tensor",
    ),
    "depth multiplier per channel": (
        conv(outs=16, group=8, weight=quant(np.full(16, 0.1))),
        "a scale for each channel and 8 groups",
    ),
    "fused activation": (
        conv(activation_type=SIGMOID),
        "its activation is SIGMOID; allowed in int8: NONE, RELU, RELU6",
    ),
    "number of scales": (conv(weight=quant(np.full(5, 0.1))), "its weight has 5 scales; allowed is 1 or, for each"),
    "kernel": (conv(kernel_size=[5, 5]), r"its weight is \(8, 3, 3, 8\) in KHWC; allowed is \(8, 5, 5, 8\) in KHWC"),
    "dilation": (conv(dilation=[0, 1]), r"dilation is \[0, 1\]; allowed are two numbers"),
    "pads": (conv(pad_mode=0, pad_list=[1, 1]), r"pad_list is \[1, 1\]; allowed are four numbers"),
    "pad mode": (conv(pad_mode=7), r"pad_mode is 7; allowed: 0 \(PAD\), 1 \(SAME\), 2 \(VALID\)"),
    "mode": (conv(mode=0), "mode is 0; allowed is 1"),
    "channels": (conv(in_channel=3), "in_channel is 3; allowed is 8"),
    "groups": (conv(group=3), "group is 3; allowed is a divisor of 8 input and 8 output channels"),
    "float weight": (conv(weight=None), "its constant 'c1' is float32; an int8 step needs int8"),
    "float channels unknown": (conv(params=None, weight=None, in_channel=0), "in_channel is 0; allowed is 8"),
    "ratio too large": (conv(params=quant(1e-12), weight=quant(1e12, 0)), r"ratio s_x·s_w/s_y is 1e\+12; the runtime"),
    "ratio too small": (conv(weight=quant([0.1] * 7 + [1e-12])), r"ratio s_x·s_w/s_y is 1e-12; the runtime can"),
    "float bias": (
        changed(_float_bias),
        r"step 's6' \(MatMulFusion\): its bias is float32\(5\); allowed is int32\(5\)",
    ),
    "depth": (
        changed(lambda p: p.steps[6].attrs.update(transpose_b=False)),
        r"it multiplies \(2, 128\) and \(5, 128\) to \(2, 5\), which do not fit",
    ),
    "float step on int8": (
        changed(lambda p: setattr(p.steps[3], "quantized", False)),
        "'s1.y' is int8, which a float step neither reads nor gives",
    ),
    "mixed concat": (
        unary("Concat", (2, 6), (2, 12), {"axis": 1}, (np.ones((2, 6)), "float32")),
        "its constant 'c1' is float32; an int8 step needs int8",
    ),
    "no int8 kernel": (
        unary("Flatten", IMAGE, (1, 128)),
        "the runtime has no int8 kernel to rely on; allowed in int8:",
    ),
    "no int8 activation": (
        unary("Activation", IMAGE, IMAGE, {"activation_type": int(ActivationType.HSIGMOID)}),
        "its activation is HSIGMOID; allowed in int8: RELU, RELU6, HSWISH, SIGMOID, LEAKY_RELU, TANH",
    ),
    "axes int64": (
        unary("ReduceFusion", IMAGE, (1, 8), {}, ([1, 2], "int64")),
        r"its input 1 \('c1'\) is int64; allowed: int32",
    ),
    "axes twice": (unary("ReduceFusion", IMAGE, (1, 8), {}, [1, -3]), r"its axes are \[1, 1\]; allowed are different"),
    "axis": (unary("ReduceFusion", IMAGE, (1, 8), {}, [4]), "axis is 4; allowed is -4 to 3"),
    "reduction": (unary("ReduceFusion", IMAGE, (1, 8), {"mode": 6}, [1]), r"mode is 6; allowed in int8: 0 \(MEAN\)"),
    "computed axes": (
        binary("ReduceFusion", IMAGE, (1, 1, 1, 1)),
        r"its input 1 \('x1'\) is computed; the runtime needs a constant",
    ),
    "inputs": (unary("Reshape", IMAGE, (128,)), "it has 1 inputs; allowed: 2"),
    "padding parameters": (
        unary("PadFusion", (2, 6), (3, 6), {}, [[1, 0], [0, 0]], y=quant(0.1)),
        "its input and output have different quantisation parameters; the runtime needs the same",
    ),
    "paddings": (unary("PadFusion", (2, 6), (3, 6), {}, [1, 0]), r"its paddings are \(2\); allowed is \(2, 2\), none"),
    "nearest parameters": (
        unary("Resize", IMAGE, IMAGE, {"format": 1, "method": 1}, y=quant(0.1)),
        "its input and output have different quantisation parameters",
    ),
    "cubic": (
        unary("Resize", IMAGE, IMAGE, {"format": 1, "method": 2}),
        "the method is cubic; allowed in int8: linear",
    ),
    "float gamma": (
        unary("LayerNormFusion", (2, 6), (2, 6), {}, (np.ones(6), "float32"), np.arange(6)),
        "its gamma is float32; allowed is int8",
    ),
    "no gamma": (unary("LayerNormFusion", (2, 6), (2, 6)), "it has 1 inputs; allowed: 3"),
    "split sizes": (
        unary("Split", (2, 6), (2, 6), {"output_num": 1, "size_splits": [5], "axis": 1}),
        r"size_splits is \[5\]; allowed are 1 sizes that sum to 6",
    ),
    "order of axes": (
        unary("Transpose", (2, 6), (6, 2), {}, [1, 1]),
        r"its axes are \[1, 1\]; allowed is an order of 0",
    ),
    "types of a cast": (changed(lambda p: p.steps[0].attrs.update(src_t=32)), r"src_t and dst_t are \(32, 32\); for"),
    "constant per channel": (
        unary("AddFusion", (2, 6), (2, 6), {}, (np.ones((2, 6)), "int8", quant([0.1] * 6))),
        "'c1' has 6 scales; only weights may have several",
    ),
    "int8 constant of a float step": (
        unary("AddFusion", (2, 6), (2, 6), {}, (np.ones((2, 6)), "int8", Q), y=None),
        "'x0' is int8, which a float step neither reads nor gives",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_runtime_refuses(case: str) -> None:
    program, problem = REFUSED[case]
    refused(program, problem)


MEAN = {"keep_dims": True, "mode": 0}
DEFECTS = {
    "padded 1x1": (conv(kernel=1, pad_mode=0, pad_list=[1, 1, 1, 1]), "pads a 1×1 convolution with the integer 0"),
    "padded VALID": (
        conv(pad_mode=2, pad_list=[1, 0, 0, 0]),
        r"pad_list is \[1, 0, 0, 0\], and the runtime pads by it",
    ),
    "average, parameters": (unary("AvgPoolFusion", IMAGE, (1, 2, 2, 8), pool(2), y=quant(0.1)), "the result wraps"),
    "maximum, parameters": (unary("MaxPoolFusion", IMAGE, (1, 2, 2, 8), pool(2), y=quant(0.1)), "the result wraps"),
    "window": (
        unary("AvgPoolFusion", (1, 12, 12, 8), (1, 1, 1, 8), pool(12)),
        r"the sum of its window \(12, 12\) overflows; allowed are windows of 128 values",
    ),
    "whole window": (
        unary("AvgPoolFusion", (1, 12, 12, 8), (1, 1, 1, 8), {"global": True, "format": 1}),
        r"the sum of its window \(12, 12\) overflows",
    ),
    "pool's activation": (
        unary("MaxPoolFusion", IMAGE, (1, 2, 2, 8), {**pool(2), "activation_type": RELU}),
        "the runtime ignores its activation",
    ),
    "product's activation": (binary("MulFusion", (2, 6), (2, 6), activation_type=RELU), "ignores its activation"),
    "ReLU": (unary("Activation", IMAGE, IMAGE, {"activation_type": RELU}), "a RELU of its own loses the last bit"),
    "sigmoid": (unary("Activation", IMAGE, IMAGE, {"activation_type": SIGMOID}), "SIGMOID gives 0 for the largest"),
    "leaky": (unary("Activation", IMAGE, IMAGE, {"activation_type": LEAKY}), "LEAKY_RELU scales the stored integers"),
    "ReLU6": (
        unary("Activation", IMAGE, IMAGE, {"activation_type": RELU6}, y=quant(0.02, 0)),
        "a RELU6 of its own wraps where its output ends below 6",
    ),
    "mean on arm64": (
        unary("ReduceFusion", (1, 7, 7, 8), (1, 1, 1, 8), MEAN, [1, 2]),
        "the mean over 7×7 positions is wrong on arm64, where their number has to be a multiple of 16",
    ),
    "mean of a batch": (
        unary("ReduceFusion", (2, 4, 4, 6), (2, 1, 1, 6), MEAN, [2, 1]),
        r"for a batch of 2 the mean over a plane reads wrong values unless the channels \(6\) are a multiple of 4",
    ),
    "sum of a batch and vectors": (binary("AddFusion", (2, 4, 4, 8), (2, 1, 1, 8)), r"'x1' of shape \(2, 1, 1, 8\) is"),
    "product of a batch and vectors": (binary("MulFusion", (2, 1, 1, 8), (2, 4, 4, 8)), "is repeated wrongly over"),
    "sum over the last axis": (binary("AddFusion", (1, 4, 4, 8), (1, 4, 4, 1)), "is repeated wrongly over"),
    "division": (binary("DivFusion", (2, 6), (2, 6)), "leaves values unwritten when several threads"),
    "softmax parameters": (
        unary("Softmax", (2, 6), (2, 6), {"axis": [1]}),
        "its output has scale 0.05 and zero point -3; whatever is stated, the runtime gives 1/256 and -128",
    ),
    "transposed parameters": (unary("Transpose", (2, 6), (6, 2), {}, [1, 0], y=quant(0.1)), "it copies values as they"),
    "half pixels": (
        unary("Resize", IMAGE, IMAGE, {"format": 1, "method": 1, "coordinate_transform_mode": 2}),
        "the runtime ignores half-pixel coordinates",
    ),
    "linear resize": (unary("Resize", IMAGE, IMAGE, {"format": 1}), "linear interpolation is rounded towards zero"),
}


@pytest.mark.parametrize("case", DEFECTS)
def test_what_the_runtime_computes_wrongly(case: str) -> None:
    program, problem = DEFECTS[case]
    refused(program, problem, defect=True)


SOUND = {
    "Reshape with other parameters": unary("Reshape", (2, 6), (12,), {}, [12], y=quant(0.1)),
    "stand-alone ReLU6 that ends at 6": unary(
        "Activation", IMAGE, IMAGE, {"activation_type": RELU6}, y=quant(6 / 255, -128)
    ),
    "mean over 8×8": unary("ReduceFusion", (2, 8, 8, 8), (2, 1, 1, 8), MEAN, [1, 2]),
    "mean with negative axes": unary("ReduceFusion", (1, 7, 7, 8), (1, 1, 1, 8), MEAN, [-3, -2]),
    "mean of one row of 6 channels": unary("ReduceFusion", (1, 4, 4, 6), (1, 1, 1, 6), MEAN, [1, 2]),
    "padded 3×3": conv(pad_mode=0, pad_list=[1, 1, 1, 1]),
    "depthwise per channel": conv(group=8, weight=quant(np.full(8, 0.1))),
    "sum with a vector": binary("AddFusion", (2, 4, 4, 8), (8,)),
    "sum with a scalar": binary("AddFusion", (2, 4, 4, 8), (1, 1, 1, 1)),
    "sum of batch 1": binary("AddFusion", (1, 4, 4, 8), (1, 1, 1, 8)),
    "sum with positions": binary("AddFusion", (2, 5, 8), (1, 5, 8)),
    "product of batch 1": binary("MulFusion", (1, 4, 4, 8), (1, 1, 1, 8)),
    "product over the last axis": binary("MulFusion", (2, 4, 4, 8), (2, 4, 4, 1)),
    "difference of a batch and vectors": binary("SubFusion", (2, 4, 4, 8), (2, 1, 1, 8)),
    "linear resize from zero point 0": unary("Resize", IMAGE, IMAGE, {"format": 1}, x=quant(0.1, 0), y=quant(0.1, 0)),
    "pooled twelve by ten": unary("AvgPoolFusion", (1, 12, 10, 8), (1, 1, 1, 8), {"global": True, "format": 1}),
}


@pytest.mark.parametrize("case", SOUND)
def test_forms_that_are_right(case: str) -> None:
    check_program(SOUND[case])


def test_float_steps_may_do_what_int8_may_not() -> None:
    build = Builder()
    x = build.input((2, 7, 7, 6))
    x = build.step("Activation", [x], (2, 7, 7, 6), {"activation_type": SIGMOID})
    x = build.step("ReduceFusion", [x, build.constant([1, 2])], (2, 6), {"mode": 8})
    x = build.step("DivFusion", [x, build.constant(np.ones(6), "float32")], (2, 6), {"activation_type": RELU})
    check_program(build.finish(build.step("Softmax", [x], (2, 6), {"axis": [1]})))


def test_weight_only_constants_in_other_places() -> None:
    build = Builder()
    x = build.input((2, 6))
    program = build.finish(build.step("AddFusion", [x, build.constant(np.ones(6), "int8", Q)], (2, 6)))
    refused(program, "its constant 'c1' is int8; in a float step only a weight may be")
    build = Builder()
    scales = quant(np.full(6, 0.1))
    weight = build.constant(np.ones((5, 6)), "int8", scales, Format.NHWC)
    program = build.finish(build.step("MatMulFusion", [build.input((2, 6)), weight], (2, 5), {"transpose_b": True}))
    refused(program, "its weight has 6 scales; allowed is 1 or, for each output channel, 5")


@settings(deadline=None)
@given(st.floats(1e-15, 1e15))
def test_ratio_is_refused_exactly_where_its_exponent_does_not_fit(weight: float) -> None:
    """The runtime writes it as q·2^(e-31) with 2^30 <= q < 2^31 and shifts by e."""
    program = conv(weight=quant(weight, 0), params=quant(1.0))
    ratio = float(np.float32(weight))
    if 2.0**-32 <= ratio < 2.0**30 * (1 - 2.0**-33):
        check_program(program)
    else:
        refused(program, "the requantisation ratio")
