"""Operations value by value, and activation functions."""

from __future__ import annotations

from functools import partial

import numpy as np

from msqkd.exporters.onnx.calls import Call
from msqkd.exporters.onnx.table import writes
from msqkd.quant.uses import is_tanh_gelu

_UNARY = {
    "Abs": "Abs", "Ceil": "Ceil", "Cos": "Cos", "Erf": "Erf", "Exp": "Exp", "Floor": "Floor", "HSwish": "HardSwish",
    "Identity": "Identity", "Log": "Log", "LogicalNot": "Not", "Mish": "Mish", "Neg": "Neg", "Reciprocal": "Reciprocal",
    "ReLU": "Relu", "SeLU": "Selu", "Sigmoid": "Sigmoid", "Sign": "Sign", "Sin": "Sin", "Softplus": "Softplus",
    "Softsign": "Softsign", "Sqrt": "Sqrt", "Tanh": "Tanh",
}  # fmt: skip
_BINARY = {
    "Add": "Add", "Adds": "Add", "Div": "Div", "Divs": "Div", "EqScalar": "Equal", "Equal": "Equal",
    "Greater": "Greater", "GreaterEqual": "GreaterOrEqual", "Less": "Less", "LessEqual": "LessOrEqual",
    "LogicalAnd": "And", "LogicalOr": "Or", "Maximum": "Max", "Minimum": "Min", "Mul": "Mul", "Muls": "Mul",
    "Pow": "Pow", "PowTensorScalar": "Pow", "RealDiv": "Div", "Sub": "Sub", "Subs": "Sub",
}  # fmt: skip


_COMPARISONS = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
_LOGIC = ("And", "Not", "Or")
_NUMBERS = ("int32", "int64", "float16", "float32", "float64")
"""The dtypes ONNX's arithmetic has kernels for in onnxruntime; others are computed in int32."""


def _unary(onnx_op: str, call: Call) -> None:
    call.emit(onnx_op, call.operand(0, "bool" if onnx_op in _LOGIC else call.result_dtype()))


def _binary(onnx_op: str, call: Call) -> None:
    if onnx_op in _LOGIC:
        call.emit(onnx_op, *(call.operand(argument, "bool") for argument in (0, 1)))
    elif onnx_op in _COMPARISONS:
        call.emit(onnx_op, *_promoted(call))
    else:
        _arithmetic(onnx_op, call)


def _promoted(call: Call) -> list[str]:
    """The operands of a comparison, in the dtype that MindSpore promotes them to."""
    dtype = call.common_dtype(0, 1)
    return [call.operand(argument, dtype if dtype in _NUMBERS else "int32") for argument in (0, 1)]


def _arithmetic(onnx_op: str, call: Call) -> None:
    """In the dtype of the result; where ONNX has no arithmetic of that, in int32 and converted."""
    dtype = call.result_dtype()
    operands = [call.operand(argument, dtype if dtype in _NUMBERS else "int32") for argument in (0, 1)]
    if dtype in _NUMBERS:
        call.emit(onnx_op, *operands)
    else:
        call.emit("Cast", call.step(onnx_op, *operands), to=call.writer.element(dtype))


for _op, _onnx_op in _UNARY.items():
    writes(_op)(partial(_unary, _onnx_op))
for _op, _onnx_op in _BINARY.items():
    writes(_op)(partial(_binary, _onnx_op))


@writes("ReLU6")
def _relu6(call: Call) -> None:
    call.emit("Clip", call.tensor(0), call.number(0), call.number(6))


@writes("ClampScalar")
def _clamp(call: Call) -> None:
    low, high = (call.literal(argument) for argument in (1, 2))
    dtype = call.result_dtype()
    ends = ["" if end is None else call.writer.constant(np.asarray(end, dtype), "number") for end in (low, high)]
    call.emit("Clip", call.operand(0, dtype), *ends)


@writes("HSigmoid")
def _hsigmoid(call: Call) -> None:
    call.emit("HardSigmoid", call.tensor(0), alpha=1.0 / 6.0, beta=0.5)


@writes("SiLU")
def _silu(call: Call) -> None:
    x = call.tensor(0)
    call.emit("Mul", x, call.step("Sigmoid", x))


@writes("GeLU", "GeluExt")
def _gelu(call: Call) -> None:
    """Exact or the approximation by tanh (Hendrycks and Gimpel, arXiv:1606.08415)."""
    call.emit("Gelu", call.tensor(0), approximate="tanh" if is_tanh_gelu(call.graph, call.node) else "none")


@writes("LeakyReLU")
def _leaky_relu(call: Call) -> None:
    call.emit("LeakyRelu", call.tensor(0), alpha=float(call.attribute("alpha")))


@writes("PReLU")
def _prelu(call: Call) -> None:
    """One slope, or one a channel: ONNX broadcasts along the last axes."""
    slope, planes = call.tensor(1), len(call.shape(0)) - 2
    if call.shape(1) != (1,) and planes > 0:
        slope = call.step("Unsqueeze", slope, call.constant(range(1, planes + 1)))
    call.emit("PRelu", call.tensor(0), slope)


@writes("Elu")
def _elu(call: Call) -> None:
    call.emit("Elu", call.tensor(0), alpha=float(call.literal(1)))


@writes("Square")
def _square(call: Call) -> None:
    x = call.tensor(0)
    call.emit("Mul", x, x)


@writes("SquaredDifference")
def _squared_difference(call: Call) -> None:
    apart = call.step("Sub", *(call.operand(argument, call.result_dtype()) for argument in (0, 1)))
    call.emit("Mul", apart, apart)


@writes("NotEqual")
def _not_equal(call: Call) -> None:
    call.emit("Not", call.step("Equal", *_promoted(call)))


@writes("AddN")
def _sum(call: Call) -> None:
    call.emit("Sum", *call.tensors(0))


@writes("FloorDiv")
def _floor_division(call: Call) -> None:
    dtype = call.result_dtype()
    operands = [call.operand(argument, dtype) for argument in (0, 1)]
    if dtype.startswith("float"):
        call.emit("Floor", call.step("Div", *operands))
    else:
        call.emit("Div", call.step("Sub", operands[0], call.step("Mod", *operands)), operands[1])


@writes("FloorMod")
def _floor_rest(call: Call) -> None:
    """What a division rounded down leaves, which has the sign of the divisor."""
    dtype = call.result_dtype()
    operands = [call.operand(argument, dtype) for argument in (0, 1)]
    if dtype.startswith("float"):
        whole = call.step("Mul", call.step("Floor", call.step("Div", *operands)), operands[1])
        call.emit("Sub", operands[0], whole)
    else:
        call.emit("Mod", *operands)


@writes("Round")
def _round(call: Call) -> None:
    """Half to even, in both."""
    if len(call.node.inputs) > 1 and call.literal(1) != 0:
        raise call.refusal(f"it rounds to {call.literal(1)} decimals; allowed: 0")
    call.emit("Round", call.tensor(0))


@writes("Log1p")
def _log_of_more(call: Call) -> None:
    call.emit("Log", call.step("Add", call.tensor(0), call.number(1)))


@writes("Rsqrt")
def _rsqrt(call: Call) -> None:
    call.emit("Reciprocal", call.step("Sqrt", call.tensor(0)))


@writes("Select")
def _select(call: Call) -> None:
    call.emit("Where", call.operand(0, "bool"), *(call.operand(part, call.result_dtype()) for part in (1, 2)))


@writes("MaskedFill")
def _masked_fill(call: Call) -> None:
    call.emit("Where", call.operand(1, "bool"), *(call.operand(part, call.result_dtype()) for part in (2, 0)))


@writes("Cast")
def _cast(call: Call) -> None:
    call.emit("Cast", call.tensor(0), to=call.writer.element(call.result_dtype()))


@writes("Softmax", "LogSoftmax")
def _softmax(call: Call) -> None:
    axis = call.literal(1)
    axes = axis if isinstance(axis, tuple) else (axis,)
    if len(axes) != 1:
        raise call.refusal(f"it goes over the axes {axes}; allowed: one axis")
    call.emit(call.node.op, call.tensor(0), axis=int(axes[0]))
