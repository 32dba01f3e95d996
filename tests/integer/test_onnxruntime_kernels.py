from __future__ import annotations

import importlib.util
import math
import platform
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import plain_integers as plain
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import nn, ops
from plain_integers import call, params

from msqkd.api import create_ptq_network, quantize
from msqkd.errors import SimulationError
from msqkd.exporters.device import lite_program
from msqkd.exporters.onnx import executed_kernels, export_onnx
from msqkd.integer import onnxruntime as kernels
from msqkd.integer.program import ActivationType, PadMode, Program, Step, Tensor, TensorQuant
from msqkd.integer.registry import ONNXRUNTIME, Operand, find_kernel
from msqkd.integer.simulator import Simulator
from msqkd.models.cifar_resnet import resnet20
from msqkd.models.lenet5 import LeNet5
from msqkd.quant.config import QuantConfig

RELU, RELU6 = ActivationType.RELU, ActivationType.RELU6
SCALES = st.floats(2.0**-12, 4.0, width=32)
ZEROS = st.integers(-128, 127)
QUANTS = st.builds(params, SCALES, ZEROS)
SEEDS = st.integers(0, 2**32 - 1)
F32 = np.float32


def int8(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-128, 128, shape).astype(np.int8)


def single(quant: TensorQuant) -> tuple[Any, int]:
    return F32(quant.scale[0]), int(quant.zero_point[0])


def to_float32(value: Fraction) -> Any:
    """The nearest float32, halves to even: of the two neighbours of a first guess the closer one."""
    guess = F32(float(value))
    around = [np.nextafter(guess, F32(-np.inf)), guess, np.nextafter(guess, F32(np.inf))]
    return min(around, key=lambda near: (abs(Fraction(float(near)) - value), int(near.view(np.uint32)) & 1))


def to_even(value: Any) -> int:
    """The nearest integer of a float32, halves to even."""
    return round(Fraction(float(value)))


def requantised(total: int, factor: Any, zero: int, low: int = -128) -> int:
    return plain.clip(to_even(F32(total) * factor) + zero, low)


# -- against the arithmetic written out ---------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40), QUANTS)
def test_quantise_divides_and_rounds_halves_to_even(values: list[float], quant: TensorQuant) -> None:
    scale, zero = single(quant)
    expected = [plain.clip(to_even(to_float32(Fraction(v) / Fraction(float(scale)))) + zero) for v in values]
    found = kernels.cast(call([(np.array(values, F32), None)], quant))[0]
    assert found.dtype == np.int8
    assert found.tolist() == expected


@given(st.integers(-300, 300), st.integers(-6, 6), ZEROS)
def test_quantise_of_ties_is_half_to_even(half: int, power: int, zero: int) -> None:
    value = np.array([half / 2 * 2.0**power], F32)
    expected = plain.clip(round(Fraction(half, 2)) + zero)
    assert kernels.cast(call([(value, None)], params(2.0**power, zero)))[0].tolist() == [expected]


def test_quantise_saturates_infinity_and_takes_nan_for_the_lowest() -> None:
    x = np.array([np.inf, -np.inf, np.nan, 3e38], F32)
    assert kernels.cast(call([(x, None)], params(1e-3, 5)))[0].tolist() == [127, -128, -128, 127]


@given(QUANTS)
def test_dequantise_multiplies_the_distance_to_the_zero_point(quant: TensorQuant) -> None:
    q = np.arange(-128, 128).astype(np.int8)
    scale, zero = single(quant)
    found = kernels.cast(call([(q, quant)], None, "float32"))[0]
    assert found.dtype == np.float32
    assert found.tolist() == [float(F32(int(value) - zero) * scale) for value in q]


@settings(deadline=None, max_examples=40)
@given(SEEDS, QUANTS, QUANTS, st.integers(1, 3), st.sampled_from([1, 2]), st.sampled_from([1, 2, 4]), st.booleans())
def test_convolution_is_an_exact_sum_times_one_float(
    seed: int, x_quant: TensorQuant, y_quant: TensorQuant, size: int, stride: int, group: int, relu: bool
) -> None:
    random = np.random.default_rng(seed)
    x, w = int8(seed, 2, 5, 4, 4), np.maximum(int8(seed + 1, 4, size, size, 4 // group), -127)
    bias = random.integers(-(2**20), 2**20, 4).astype(np.int32)
    w_quant = params(np.exp(random.uniform(-8, 0, 4)).astype(F32))
    (x_scale, x_zero), (y_scale, y_zero) = single(x_quant), single(y_quant)
    bias_quant = TensorQuant(x_quant.scale * w_quant.scale, np.zeros(4), 32)
    attrs = {"kernel_size": (size, size), "stride": (stride, stride), "pad_mode": PadMode.PAD, "group": group}
    operands = [(x, x_quant), (w, w_quant), (bias, bias_quant)]
    attrs |= {"pad_list": (1, 1, 1, 1), "activation_type": int(RELU if relu else ActivationType.NONE)}
    found = kernels.conv2d(call(operands, y_quant, **attrs))[0]
    centred = np.pad(x.astype(int) - x_zero, ((0, 0), (1, 1), (1, 1), (0, 0)))
    part = 4 // group
    for n, i, j, o in np.ndindex(found.shape):
        first = o // part * part
        window = centred[n, i * stride : i * stride + size, j * stride : j * stride + size, first : first + part]
        total = int((window * w[o]).sum()) + int(bias[o])
        factor = x_scale * F32(w_quant.scale[o]) / y_scale
        assert found[n, i, j, o] == requantised(total, factor, y_zero, y_zero if relu else -128)


@settings(deadline=None, max_examples=40)
@given(SEEDS, QUANTS, QUANTS, QUANTS, st.booleans(), st.booleans())
def test_matrix_products_of_computed_operands(
    seed: int, a_quant: TensorQuant, b_quant: TensorQuant, y_quant: TensorQuant, left: bool, right: bool
) -> None:
    a, b = int8(seed, 2, *((5, 3) if left else (3, 5))), int8(seed + 1, 2, *((4, 5) if right else (5, 4)))
    found = kernels.matmul(call([(a, a_quant), (b, b_quant)], y_quant, transpose_a=left, transpose_b=right))[0]
    (a_scale, a_zero), (b_scale, b_zero), (y_scale, y_zero) = map(single, (a_quant, b_quant, y_quant))
    one = (a.swapaxes(1, 2) if left else a).astype(int) - a_zero
    other = (b.swapaxes(1, 2) if right else b).astype(int) - b_zero
    for index, total in np.ndenumerate(one @ other):
        assert found[index] == requantised(int(total), a_scale * b_scale / y_scale, y_zero)


@pytest.mark.parametrize("use_axis", [False, True])
def test_a_full_connection_is_the_product_with_the_transposed_weight(use_axis: bool) -> None:
    x, w, bias = int8(1, 3, 2, 4), int8(2, 5, 8), np.arange(5, dtype=np.int32) * 999
    operands = [(w, params(0.25)), (bias, None)]
    attrs = {"use_axis": use_axis, "axis": 1}
    found = kernels.full_connection(call([(x, params(0.5, 3)), *operands], params(70.0, -7), **attrs))[0]
    flat = [(x.reshape(3, 8), params(0.5, 3)), *operands]
    assert np.array_equal(found, kernels.matmul(call(flat, params(70.0, -7), transpose_b=True))[0])


@settings(deadline=None, max_examples=25)
@given(SEEDS, QUANTS, QUANTS, QUANTS)
def test_a_sum_adds_one_operand_after_the_other_to_the_zero_points(
    seed: int, a_quant: TensorQuant, b_quant: TensorQuant, y_quant: TensorQuant
) -> None:
    a, b = int8(seed, 40), int8(seed + 1, 40)
    (a_scale, a_zero), (b_scale, b_zero), (y_scale, y_zero) = map(single, (a_quant, b_quant, y_quant))
    ratio_a, ratio_b = (Fraction(float(scale / y_scale)) for scale in (a_scale, b_scale))
    second = Fraction(float(to_float32(ratio_b * (b_zero + 128))))
    zeros = F32(y_zero + 128) - to_float32(ratio_a * (a_zero + 128) + second)
    expected = []
    for p, q in zip(a.tolist(), b.tolist()):
        partial = to_float32(ratio_b * (q + 128) + Fraction(float(zeros)))
        total = to_float32(ratio_a * (p + 128) + Fraction(float(partial)))
        expected.append(plain.clip(to_even(total) - 128))
    assert kernels.add(call([(a, a_quant), (b, b_quant)], y_quant))[0].tolist() == expected


@given(SEEDS, QUANTS, QUANTS, QUANTS)
def test_a_product_is_moved_by_the_zero_point_before_it_is_rounded(
    seed: int, a_quant: TensorQuant, b_quant: TensorQuant, y_quant: TensorQuant
) -> None:
    a, b = int8(seed, 2, 3, 3, 4), int8(seed + 1, 2, 1, 1, 4)
    (a_scale, a_zero), (b_scale, b_zero), (y_scale, y_zero) = map(single, (a_quant, b_quant, y_quant))
    found = kernels.multiply(call([(a, a_quant), (b, b_quant)], y_quant))[0]
    for index, value in np.ndenumerate(a):
        product = F32((int(value) - a_zero) * (int(b[index[0], 0, 0, index[3]]) - b_zero))
        moved = product * (a_scale * b_scale / y_scale) + F32(y_zero + 128)
        assert found[index] == plain.clip(to_even(moved) - 128)


@pytest.mark.parametrize("zero", [-128, -20, 127])
def test_relu6_ends_where_the_quantiser_puts_six(zero: int) -> None:
    pairs = np.stack(np.meshgrid(np.arange(-128, 128), np.arange(-128, 128))).astype(np.int8)
    operands, quant = [(pairs[0], params(0.5, 3)), (pairs[1], params(0.25, 7))], params(2 / 17, zero)
    plainly = kernels.add(call(operands, quant))[0]
    found = kernels.add(call(operands, quant, activation_type=RELU6))[0]
    assert np.array_equal(found, np.clip(plainly, zero, min(127, zero + 51)))


@settings(deadline=None, max_examples=30)
@given(SEEDS, QUANTS, SCALES, ZEROS)
def test_an_average_adds_floats_row_by_row(seed: int, x_quant: TensorQuant, ratio: float, y_zero: int) -> None:
    x, y_quant = int8(seed, 1, 5, 4, 2), params(F32(x_quant.scale[0] * ratio), y_zero)
    (x_scale, x_zero), (y_scale, _) = single(x_quant), single(y_quant)
    attrs = {"kernel_size": (3, 2), "strides": (2, 1), "pad": (1, 0, 1, 0), "pad_mode": PadMode.PAD}
    found = kernels.average_pool(call([(x, x_quant)], y_quant, **attrs))[0]
    assert found.shape == (1, 2, 4, 2)
    for _, i, j, c in np.ndindex(found.shape):
        total, count = F32(0), 0
        for row in range(max(2 * i - 1, 0), min(2 * i + 2, 5)):
            for column in range(max(j - 1, 0), min(j + 1, 4)):
                total, count = total + F32(int(x[0, row, column, c]) - x_zero) * x_scale, count + 1
        moved = total / F32(count) / y_scale + F32(y_zero + 128)
        assert found[0, i, j, c] == plain.clip(to_even(moved) - 128)


def depthwise_mean(x: np.ndarray, x_quant: TensorQuant, y_quant: TensorQuant, window: tuple[int, int]) -> np.ndarray:
    weight = np.full((x.shape[3], *window, 1), 127, np.int8)
    w_quant = params(F32(1 / math.prod(window)) / F32(127))
    attrs = {"kernel_size": window, "stride": window, "pad_mode": PadMode.VALID, "group": x.shape[3]}
    return kernels.conv2d(call([(x, x_quant), (weight, w_quant)], y_quant, **attrs))[0]


@given(SEEDS, QUANTS, QUANTS)
def test_a_mean_over_the_plane_is_one_exact_sum(seed: int, x_quant: TensorQuant, y_quant: TensorQuant) -> None:
    x = int8(seed, 2, 4, 3, 5)
    (x_scale, x_zero), (y_scale, y_zero) = single(x_quant), single(y_quant)
    factor = x_scale / (y_scale * F32(12))
    totals = (x.astype(int) - x_zero).sum((1, 2))
    expected = [[requantised(int(total), factor, y_zero) for total in row] for row in totals]
    assert depthwise_mean(x, x_quant, y_quant, (4, 3)).reshape(2, 5).tolist() == expected
    attrs = {"kernel_size": (4, 3), "strides": (1, 1), "pad_mode": PadMode.VALID}
    assert kernels.average_pool(call([(x, x_quant)], y_quant, **attrs))[0].reshape(2, 5).tolist() == expected


@given(SEEDS, QUANTS, QUANTS)
def test_averages_written_as_convolutions_are_averages(seed: int, x_quant: TensorQuant, y_quant: TensorQuant) -> None:
    x = int8(seed, 2, 6, 4, 3)
    attrs = {"kernel_size": (3, 2), "strides": (3, 2), "pad_mode": PadMode.VALID}
    expected = kernels.average_pool(call([(x, x_quant)], y_quant, **attrs))[0]
    assert np.array_equal(depthwise_mean(x, x_quant, y_quant, (3, 2)), expected)


@given(SEEDS, QUANTS, QUANTS)
def test_what_moves_keeps_its_integers_or_goes_by_way_of_float(
    seed: int, given_quant: TensorQuant, wanted: TensorQuant
) -> None:
    x = int8(seed, 2, 3, 2, 4)
    attrs = {"kernel_size": (1, 1), "strides": (1, 1)}
    assert np.array_equal(kernels.max_pool(call([(x, given_quant)], given_quant, **attrs))[0], x)
    (x_scale, x_zero), (y_scale, y_zero) = single(given_quant), single(wanted)
    joined = kernels.concat(call([(x, given_quant), (x, wanted)], wanted, axis=-1))[0]
    assert np.array_equal(joined[..., 4:], x)
    if (x_scale, x_zero) != (y_scale, y_zero):
        for index, value in np.ndenumerate(x):
            steps = to_even(F32(int(value) - x_zero) * x_scale / y_scale)
            assert joined[index] == plain.clip(steps + y_zero)


@given(SEEDS, st.integers(2, 40), st.floats(2.0**-8, 1.0, width=32))
def test_softmax_is_within_a_level_of_the_exact_shares(seed: int, size: int, scale: float) -> None:
    x = int8(seed, 3, size)
    found = kernels.softmax(call([(x, params(scale, 9))], params(1 / 256, -128), axis=(-1,)))[0]
    powers = np.exp((x.astype(np.float64) - x.max(-1, keepdims=True)) * scale)
    shares = np.clip(256 * powers / powers.sum(-1, keepdims=True) - 128, -128, 127)
    assert np.abs(found - shares).max() <= 0.501


def test_the_simulator_casts_as_onnxruntime_does() -> None:
    tensors = [Tensor("x", "float32", (1, 4)), Tensor("y", "int8", (1, 4), quant=params(1.0))]
    step = Step("cast", "QuantDTypeCast", ["x"], ["y"])
    program = Program("net", ["x"], ["y"], [step], {tensor.name: tensor for tensor in tensors})
    x = np.array([[0.5, 1.5, 2.5, -2.5]], F32)
    assert Simulator(program, kind=ONNXRUNTIME).run(x)[0].tolist() == [[0, 2, 2, -2]]
    assert Simulator(program).run(x)[0].tolist() == [[1, 2, 3, -3]]


def test_on_arm64_sums_and_means_are_refused() -> None:
    quant = params(1.0)
    x = int8(0, 1, 2, 2, 1)
    with pytest.raises(SimulationError, match="step: onnxruntime computes a sum on arm64"):
        kernels.add(call([(x, quant), (x, quant)], quant, machine="arm64"))
    attrs = {"kernel_size": (2, 2), "strides": (1, 1)}
    with pytest.raises(SimulationError, match="step: onnxruntime computes a mean on arm64"):
        kernels.average_pool(call([(x, quant)], quant, machine="arm64", **attrs))


def test_a_bilinear_resize_is_refused() -> None:
    resize = find_kernel("Resize", ONNXRUNTIME, "step")
    with pytest.raises(SimulationError, match="step: its method is 0; allowed: 1"):
        resize(call([(int8(0, 1, 2, 2, 1), params(1.0))], params(1.0), method=0))


# -- against onnxruntime ------------------------------------------------------------------------------------------

needs_onnxruntime = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime"))
    or platform.machine() not in ("x86_64", "AMD64"),
    reason="onnxruntime on x86 is not at hand",
)
PAIRS = np.stack(np.meshgrid(np.arange(256), np.arange(256), indexing="ij")).reshape(2, 1, -1).astype(np.uint8)


def executed(op: str, inputs: list[Operand], y_quant: TensorQuant, **attrs: Any) -> np.ndarray:
    """uint8 of onnxruntime for an operation between DequantizeLinear and QuantizeLinear."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    constants, nodes = _parameters("y", y_quant), []
    for index, item in enumerate(inputs):
        assert item.quant is not None
        constants |= _parameters(f"x{index}", item.quant)
        nodes.append(helper.make_node("DequantizeLinear", _read(f"x{index}"), [f"f{index}"]))
    nodes.append(helper.make_node(op, [f"f{index}" for index in range(len(inputs))], ["t"], **attrs))
    nodes.append(helper.make_node("QuantizeLinear", ["t", "y_scale", "y_zero"], ["y"]))
    fed = {f"x{index}": item.data.view(np.uint8) ^ np.uint8(128) for index, item in enumerate(inputs)}
    values = [helper.make_tensor_value_info(name, TensorProto.UINT8, data.shape) for name, data in fed.items()]
    output = helper.make_tensor_value_info("y", TensorProto.UINT8, None)
    initializers = [numpy_helper.from_array(data, name) for name, data in constants.items()]
    graph = helper.make_graph(nodes, "net", values, [output], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, fed)[0]


def _read(name: str) -> list[str]:
    return [name, f"{name}_scale", f"{name}_zero"]


def _parameters(name: str, quant: TensorQuant) -> dict[str, np.ndarray]:
    scale, zero = single(quant)
    return {f"{name}_scale": np.asarray(scale), f"{name}_zero": np.asarray(zero + 128, np.uint8)}


def unsigned(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint8) ^ np.uint8(128)


def random_quants(seed: int, count: int) -> list[TensorQuant]:
    random = np.random.default_rng(seed)
    return [params(F32(np.exp(random.uniform(-5, 0))), int(random.integers(-128, 128))) for _ in range(count)]


@needs_onnxruntime
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("op", "kernel"), [("Add", "AddFusion"), ("Mul", "MulFusion"), ("Sub", "SubFusion")])
def test_all_pairs_of_values(op: str, kernel: str, seed: int) -> None:
    a_quant, b_quant, y_quant = random_quants(seed, 3)
    pairs = (PAIRS ^ np.uint8(128)).view(np.int8)
    operands = [(pairs[0], a_quant), (pairs[1], b_quant)]
    found = find_kernel(kernel, ONNXRUNTIME, "step")(call(operands, y_quant))[0]
    expected = executed(op, [Operand(*item) for item in operands], y_quant)
    assert np.array_equal(unsigned(found), expected)


@needs_onnxruntime
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("op", "activation"),
    [("HardSwish", ActivationType.HSWISH), ("Sigmoid", ActivationType.SIGMOID), ("Tanh", ActivationType.TANH)],
)
def test_all_values_of_an_activation(op: str, activation: int, seed: int) -> None:
    x_quant, y_quant = random_quants(100 + seed, 2)
    x = np.arange(-128, 128).astype(np.int8)[None]
    found = kernels.activation(call([(x, x_quant)], y_quant, activation_type=activation))[0]
    assert np.array_equal(unsigned(found), executed(op, [Operand(x, x_quant)], y_quant))


@needs_onnxruntime
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("window", "strides", "pads"),
    [((3, 2), (2, 1), (1, 0, 1, 1)), ((2, 2), (2, 2), (0,) * 4), ((7, 6), (1, 1), (0,) * 4)],
)
def test_averages(window: tuple[int, int], strides: tuple[int, int], pads: tuple[int, ...], seed: int) -> None:
    (x_quant, y_quant), x = random_quants(200 + seed, 2), int8(seed, 2, 5, 7, 6)
    where = {"kernel_shape": window, "strides": strides, "pads": pads}
    expected = executed("AveragePool", [Operand(x, x_quant)], y_quant, **where)
    top, left, bottom, right = pads
    attrs = {"kernel_size": window, "strides": strides, "pad": (top, bottom, left, right), "pad_mode": PadMode.PAD}
    found = kernels.average_pool(call([(x.transpose(0, 2, 3, 1), x_quant)], y_quant, **attrs))[0]
    assert np.array_equal(unsigned(found.transpose(0, 3, 1, 2)), expected)


@needs_onnxruntime
@pytest.mark.parametrize("seed", range(6))
def test_softmax_as_onnxruntime_has_it(seed: int) -> None:
    (x_quant,), y_quant = random_quants(300 + seed, 1), params(1 / 256, -128)
    x = int8(seed, 16, 3 + 40 * seed)
    found = kernels.softmax(call([(x, x_quant)], y_quant, axis=(-1,)))[0]
    assert np.array_equal(unsigned(found), executed("Softmax", [Operand(x, x_quant)], y_quant, axis=-1))


class Mixture(nn.Cell):
    """Operations of every kind in int8, on (N, 3, 12, 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, stride=2, pad_mode="same", has_bias=True)
        self.deep = nn.Conv2d(16, 16, 3, group=16, pad_mode="pad", padding=1, has_bias=True)
        self.gate, self.swish, self.relu6 = nn.Conv2d(16, 16, 1, has_bias=True), nn.HSwish(), nn.ReLU6()
        self.pool, self.average, self.flatten = nn.MaxPool2d(2, 2), nn.AvgPool2d(2, 2), nn.Flatten()
        self.head, self.tail, self.tanh = nn.Dense(3 * 3 * 32, 12), nn.Dense(16, 12), nn.Tanh()

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.swish(self.first(x))
        y = self.relu6(self.deep(x)) + x
        y = y * self.tanh(self.gate(ops.mean(y, (2, 3), keep_dims=True)))
        y = ops.concat((self.pool(y), self.average(x)), 1)
        return self.head(self.flatten(y)) - self.tail(ops.mean(x, (2, 3)))


class Attention(nn.Cell):
    """A block of a transformer, on (N, 8, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Dense(16, 16) for _ in range(4))
        self.norm, self.softmax, self.gelu = nn.LayerNorm((16,)), nn.Softmax(-1), nn.GELU()
        self.up, self.down, self.head = nn.Dense(16, 32), nn.Dense(32, 16), nn.Dense(16, 5)

    def construct(self, x):  # type: ignore[no-untyped-def]
        scores = ops.matmul(self.norm(self.query(x)), self.key(x).transpose(0, 2, 1)) * 0.25
        x = x + self.out(ops.matmul(self.softmax(scores), self.value(x)))
        x = x + self.down(self.gelu(self.up(x)))
        return self.head(x[:, 0])


class Gated(nn.Cell):
    """A block with squeeze and excitation, and activations that follow no convolution, on (N, 3, 10, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, has_bias=True), nn.Conv2d(16, 8, 1)
        self.narrow, self.wide = nn.Conv2d(16, 4, 1, has_bias=True), nn.Conv2d(4, 16, 1, has_bias=True)
        self.norm, self.gate, self.relu = nn.BatchNorm2d(16), nn.HSigmoid(), nn.ReLU()

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.first(x)
        x = x * self.gate(self.wide(self.relu(self.narrow(ops.mean(x, (2, 3), True)))))
        return ops.mean(self.last(self.relu(self.norm(self.relu(x)))), (2, 3))


NETWORKS = {
    "lenet5": (LeNet5, (1, 32, 32)),
    "resnet20": (resnet20, (3, 32, 32)),
    "mixture": (Mixture, (3, 12, 12)),
    "attention": (Attention, (8, 16)),
    "gated": (Gated, (3, 10, 10)),
}


@cache
def agreement_module() -> Any:
    file = Path(__file__).parents[2] / "bench" / "onnx_agreement.py"
    spec = importlib.util.spec_from_file_location("onnx_agreement", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_onnxruntime
@pytest.mark.usefixtures("graph_mode")
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_integer_of_a_network(name: str, per_channel: bool, tmp_path: Path) -> None:
    make, shape = NETWORKS[name]
    ms.set_seed(3)
    x = np.random.default_rng(4).normal(size=(12, *shape)).astype(np.float32)
    config = QuantConfig(act_observer="minmax").override({"weight.per_channel": per_channel})
    graph, plan = quantize(create_ptq_network(make().set_train(False), config, [x])).sync()
    file, program = export_onnx(graph, plan, tmp_path / "net.onnx"), lite_program(graph, plan)
    counts = agreement_module().differing_values(program, file, x)
    assert {tensor: different for tensor, (different, _) in counts.items() if different} == {}
    computed = sum(step.quantized for step in program.steps)
    assert len(counts) >= computed - 1, "onnxruntime keeps all but a reshaped value under a name that can be told"
    assert "Conv" not in executed_kernels(file)
