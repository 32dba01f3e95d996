from __future__ import annotations

import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import nn, ops
from mindspore.ops.auto_generate import gen_ops_prim
from transposed import Grown

from msqkd.api import create_ptq_network, quantize
from msqkd.errors import ExportError, MissingDependencyError, PlanError
from msqkd.exporters.onnx import executed_kernels, export_onnx, export_onnx_float, load_onnx
from msqkd.exporters.onnx.qdq import onnx_model
from msqkd.exporters.onnx.runtime import LEVELS, session_settings
from msqkd.exporters.onnx.table import supported
from msqkd.graph.capture import capture
from msqkd.graph.cell import to_cell
from msqkd.graph.ir import Graph, Node, TensorType, Value
from msqkd.models.cifar_resnet import resnet20
from msqkd.models.lenet5 import LeNet5
from msqkd.quant.config import INT8, QuantConfig, Rule
from msqkd.quant.placement import make_plan
from msqkd.quant.plan import ActivationQuant, Group, NodePlan, QuantPlan, WeightQuant
from msqkd.quant.ptq import Observation
from msqkd.quant.qat import QuantCell, deployment_graph, quantize_cell
from msqkd.train.evaluate import agreement
from msqkd.version import __version__

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.usefixtures("graph_mode")


class Mixed(nn.Cell):
    """Float islands between int8 layers, a value read in both, a broadcast product, a pool that pads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 8, 3, stride=2, pad_mode="same", has_bias=True)
        self.deep = nn.Conv2d(8, 8, 3, group=8, pad_mode="pad", padding=1)
        self.narrow = nn.Conv2d(8, 8, 1, pad_mode="valid", has_bias=True)
        self.pool, self.swish, self.relu6 = nn.MaxPool2d(3, 2, pad_mode="same"), nn.HSwish(), nn.ReLU6()
        self.gate, self.flatten, self.head = nn.HSigmoid(), nn.Flatten(), nn.Dense(8, 5)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = ops.sigmoid(self.pool(self.swish(self.conv1(x))))
        y = self.relu6(self.deep(x))
        y = y * self.gate(self.narrow(ops.mean(y, (2, 3), keep_dims=True)))
        y = self.narrow(y) + ops.erf(x)
        return self.head(self.flatten(ops.mean(y, (2, 3), keep_dims=True)))


class Encoder(nn.Cell):
    """A block of a transformer on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm1, self.norm2 = nn.Embedding(11, 8), nn.LayerNorm((8,)), nn.LayerNorm((8,))
        self.position = ms.Parameter(ms.Tensor(np.linspace(-1, 1, 48, dtype=np.float32).reshape(1, 6, 8)), "position")
        self.qkv, self.out, self.wide, self.back = nn.Dense(8, 24), nn.Dense(8, 8), nn.Dense(8, 16), nn.Dense(16, 8)
        self.gelu, self.softmax, self.head = nn.GELU(), nn.Softmax(-1), nn.Dense(8, 3)
        self.product = ops.BatchMatMul(transpose_b=True)

    def construct(self, tokens):  # type: ignore[no-untyped-def]
        x = self.embedding(tokens) + self.position
        batch, length, width = x.shape
        q, k, v = ops.split(self.qkv(self.norm1(x)), width, axis=2)
        q, k, v = (part.reshape(batch, length, 2, 4).transpose(0, 2, 1, 3) for part in (q, k, v))
        y = ops.matmul(self.softmax(self.product(q, k) / 2.0), v).transpose(0, 2, 1, 3).reshape(batch, length, width)
        x = x + self.out(y)
        x = x + self.back(self.gelu(self.wide(self.norm2(x))))
        return self.head(x[:, 0])


class Between(nn.Cell):
    """Layers between two of int8: a convolution behind a pool, a transposed one, then a dense layer and a product."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up = nn.Conv2d(2, 6, 3), nn.Conv2dTranspose(6, 4, 3)
        self.inner = nn.SequentialCell(nn.MaxPool2d(2, 2), nn.Conv2d(6, 6, 3, has_bias=True))
        self.dense, self.narrow, self.head = nn.Dense(36, 8), nn.Dense(8, 8), nn.Dense(8, 3)
        self.weight = ms.Parameter(ms.Tensor(np.zeros((8, 8), np.float32)), "weight")

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = ops.tanh(self.up(ops.tanh(self.inner(self.first(x)))))
        x = ops.tanh(self.dense(x.reshape(-1, 36)))
        return self.head(ops.tanh(ops.matmul(self.narrow(x), self.weight)))


class Pieces(nn.Cell):
    """Views of (N, 6, 4, 8), joined again; sizes that are computed."""

    def construct(self, x):  # type: ignore[no-untyped-def]
        batch, channels = x.shape[0], x.shape[1]
        a = x[:, 1:5:2, ::-1, :-3].reshape(batch, -1)
        b = x[..., 2].reshape(batch, channels * 4 // 1)
        c = x[:, None, 3, -1].reshape(batch, channels + 2)
        d = ops.tile(ops.squeeze(ops.expand_dims(x[:, 0, 0], 2), 2), (1, 2))
        e = ops.unstack(x.reshape(-1, 2, 3, 32), axis=1)[1].transpose(0, 2, 1).reshape(batch, 96)
        f = ops.broadcast_to(ms.Tensor(np.float32([[1.0, 2.0]])), (batch, 2))
        g = ops.broadcast_to(x[:, :1, :1, :1], (-1, 3, 1, 1)).reshape(batch, channels - 3)
        h = ops.gather(x, ms.Tensor([5, 0], ms.int32), 1).reshape(batch, 64)
        i = x.reshape((batch * 2 + 3 - 1) // 2 + batch % 1 - 1, -1)
        return ops.concat((a, b, c, d, e, f, g, h, i), 1)


class Curves(nn.Cell):
    """Operations value by value on (N, 8)."""

    def construct(self, x):  # type: ignore[no-untyped-def]
        positive = ops.abs(x) + 0.1
        curves = (
            ops.clamp(x, -0.5, 0.5), ops.sqrt(positive), ops.exp(-x), ops.log(positive), ops.erf(x), ops.tanh(x),
            ops.elu(x), ops.silu(x), ops.softplus(x), ops.square(x), ops.rsqrt(positive), ops.pow(positive, 1.5),
            ops.gelu(x),
            ops.where(ops.logical_not(x > 0), x, positive), ops.maximum(x, 0.2) / ops.minimum(positive, 2.0),
            ops.log_softmax(x, -1), x - ops.ReduceMax(True)(x, 1), x * ops.ReduceMin(True)(x, 1),
            ops.ReduceSum(True)(x, 1) * x, ops.reciprocal(positive), ops.floor(x * 3), ops.ceil(x * 3),
            ops.cast(ops.logical_or(x > 1, ops.logical_and(x < 0, x >= -1)), ms.float32),
            ops.RealDiv()(x, positive),
            ops.cast(ops.logical_or(x <= 0, ops.equal(x, x)), ms.float32), ops.relu6(x * 9), ops.hardsigmoid(x),
        )  # fmt: skip
        return ops.concat(curves, 1)


class Maps(nn.Cell):
    """Pools, normalisations and products on (N, 4, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.average = nn.BatchNorm2d(4), nn.AvgPool2d(3, 2, pad_mode="same")
        self.layer_norm, self.dense = nn.LayerNorm((4, 4), 2, 2), nn.Dense(4, 3)
        self.product = ops.MatMul(transpose_a=True)
        self.dilated = nn.Conv2d(4, 4, 3, dilation=2, pad_mode="same", group=2)
        self.pad = nn.Pad(((0, 0), (1, 0), (0, 2), (0, 0)))

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.layer_norm(self.norm(self.average(self.dilated(x))))
        flat = self.dense(ops.mean(x, (2, 3)))
        return self.pad(x), ops.mean(x, 1), self.product(flat, -flat), ops.relu(flat) - 2 * flat


class Spelt(nn.Cell):
    """What networks spell out, and pools that pad, on (N, 4, 7, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.leaky, self.gelu = nn.LeakyReLU(0.1), nn.GELU(approximate=False)
        self.largest = nn.MaxPool2d(3, 2, pad_mode="pad", padding=1, ceil_mode=True)
        self.average = nn.AvgPool2d((3, 2), 2, pad_mode="pad", padding=(1, 0))
        self.inner = nn.AvgPool2d(3, 2, pad_mode="pad", padding=1, count_include_pad=False)

    def construct(self, x):  # type: ignore[no-untyped-def]
        curves = (self.leaky(x), self.gelu(x), x * ops.sigmoid(x), ops.relu6(x + 3.0) / 6.0 * x, ops.relu6(x + 3.0) / 6)
        pools = (self.largest(x), self.average(x), self.inner(x), ops.max_pool2d(x, (3, 5), (2, 1), padding=(0, 2)))
        return (*curves, *pools)


class Borders(nn.Cell):
    """Paddings, resizes and normalisations of maps (N, 4, 6, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.reflect, self.prelu = nn.GroupNorm(2, 4), nn.ReflectionPad2d((1, 2, 0, 1)), nn.PReLU(4)
        self.quarters, self.all = nn.AdaptiveAvgPool2d((3, 2)), nn.AdaptiveAvgPool2d(1)
        self.nearest, self.aligned = ops.ResizeNearestNeighbor((9, 12)), ops.ResizeNearestNeighbor((4, 11), True)
        self.centred = gen_ops_prim.ResizeNearestNeighborV2(False, True)

    def construct(self, x):  # type: ignore[no-untyped-def]
        padded = (
            self.reflect(x), ops.pad(x, (1, 2, 0, 1), "constant", 0.5), ops.pad(x, (2, 1, 1, 0), "reflect"),
            ops.pad(x, (1, 0, 2, 1), "replicate"), ops.pad(x, (1, 1, 1, 1)),
        )  # fmt: skip
        resized = (
            self.nearest(x), self.aligned(x), self.centred(x, (9, 5)), ops.interpolate(x, size=(4, 5), mode="nearest"),
            ops.interpolate(x, size=(12, 5), mode="bilinear"),
            ops.interpolate(x, size=(9, 16), mode="bilinear", align_corners=True),
            ops.interpolate(x.permute(0, 3, 1, 2), size=(8, 8), mode="nearest").permute(0, 2, 3, 1),
        )  # fmt: skip
        return (self.norm(x), self.prelu(x), ops.mish(x), self.quarters(x), self.all(x), *padded, *resized)


class Sums(nn.Cell):
    """Sums, norms, extremes and where they are, on (N, 3, 4, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.unit, self.raised = ops.L2Normalize(1, 1e-12), ops.L2Normalize(-1, 25.0)
        self.length, self.size = ops.LpNorm((2, 3), 2, True), ops.LpNorm(-1, 1)
        self.reversed, self.extreme, self.least = ops.CumSum(True, True), ops.ArgMaxWithValue(1, True), ops.Argmin(2)

    def construct(self, x):  # type: ignore[no-untyped-def]
        sums = (ops.sum(x, (1, 3)), ops.sum(x), x.sum(-1, keepdims=True), ops.prod(x, 1), ops.ReduceProd(True)(x, 2))
        norms = (self.unit(x), self.raised(x), self.length(x), self.size(x), ops.std(x, 1), ops.var(x, (2, 3), 0, True))
        runs = (ops.cumsum(x, 1), self.reversed(x, -1))
        extremes = (*ops.max(x, 2), *ops.min(x, 1), *self.extreme(x), ops.argmax(x, -1), self.least(x), *ops.topk(x, 3))
        return (*sums, *norms, *runs, *extremes)


class Choices(nn.Cell):
    """Masks, triangles, rounding and what is moved by them, on (N, 3, 4, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.difference, self.same = ops.SquaredDifference(), ops.Identity()
        self.ones = ms.Tensor([1.0, 0.5], ms.float32)

    def construct(self, x):  # type: ignore[no-untyped-def]
        y = self.same(x * 2.0 + 1.0)
        masked = ops.masked_fill(x, x > 0, -3.0), ops.tril(x), ops.triu(y, 1), x == 0, ops.not_equal(x, ops.abs(x))
        joined = ops.stack((x, y), 1), ops.stack((x, y), -1), ops.addn((x, y, x)), self.difference(x, y)
        whole = ops.floor_divide(y, x), ops.floor_mod(y, x), ops.round(y * 2.0), ops.sign(x), ops.log1p(ops.abs(x))
        curves = ops.sin(x), ops.cos(x), ops.selu(x), ops.softsign(x)
        index = ops.cast(x > 0, ms.int32) * 3 - 1
        hot = ops.one_hot(index, 3, self.ones[0], self.ones[1], 2)
        moved = ops.gather_elements(x, 1, ops.abs(index)), ops.flip(x, (1, -1)), hot
        return (*masked, *joined, *whole, *curves, *moved)


class Promoted(nn.Cell):
    """Operands of different data types, on (N, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.mul, self.div, self.real, self.sub, self.pow = ops.Mul(), ops.Div(), ops.RealDiv(), ops.Sub(), ops.Pow()
        self.less, self.greater, self.equal, self.differ = ops.LessEqual(), ops.Greater(), ops.Equal(), ops.NotEqual()
        self.low, self.high, self.apart, self.rest = (
            ops.Minimum(),
            ops.Maximum(),
            ops.SquaredDifference(),
            ops.FloorMod(),
        )
        self.ints, self.small = ms.Tensor([3, -1, 2, 5], ms.int32), ms.Tensor([1, 2, 3, 4], ms.uint8)
        self.mask, self.half = ms.Tensor([True, False, True, True]), ms.Tensor(0.5)

    def construct(self, x):  # type: ignore[no-untyped-def]
        whole, positive = x.astype(ms.int32), x > 0
        numbers = self.mul(x, 2), self.div(x, 2), self.mul(x, True), ops.maximum(x, 0), self.pow(whole, 2), 2**x
        tensors = (
            x + self.ints, self.sub(self.ints, x), self.real(self.ints, x), x * self.small, x * self.mask,
            x * positive, self.low(x, self.ints), self.high(self.small, x), self.apart(x, self.ints), self.ints**x,
            self.rest(x, self.ints), whole / 2, whole * 2.5, self.mul(positive, self.mask),
        )  # fmt: skip
        chosen = ops.where(positive, x, self.ints), ops.where(self.mask, 0, x), ops.masked_fill(whole, positive, 7)
        masks = (
            self.less(x, self.ints), self.greater(whole, 0.5), self.equal(whole, self.ints),
            self.differ(positive, self.mask), self.greater(positive, self.mask),
        )  # fmt: skip
        whole_numbers = whole // 2, whole % 3, self.rest(whole, self.ints), positive.sum(1), ops.neg(whole)
        roots = ops.sqrt(ops.abs(whole)), ops.clamp(whole, 0, 3), ops.where(self.mask, x, self.half), nn.LogSigmoid()(x)
        return (*numbers, *tensors, *chosen, *masks, *whole_numbers, *roots)


class Filled(nn.Cell):
    """Constants as large as the batch, on (N, 3)."""

    def construct(self, x):  # type: ignore[no-untyped-def]
        batch = x.shape[0]
        rows = ops.zeros((batch, 3), ms.float32), x, ops.ones((batch, 1), ms.float32)
        return ops.concat(rows, 1), ops.concat((ops.zeros_like(x), x, ops.ones_like(x)), 1)


def randomise(net: nn.Cell, seed: int = 0) -> nn.Cell:
    """Parameters, statistics of BatchNorm among them, that a forgotten one would show."""
    random = np.random.default_rng(seed)
    for parameter in net.get_parameters():
        shape = parameter.shape
        positive = parameter.name.endswith(("moving_variance", "gamma"))
        spread = 1 / np.sqrt(max(np.prod(shape[1:]), 1)) if len(shape) > 1 else 0.3
        data = random.uniform(0.5, 1.5, shape) if positive else random.normal(0, spread, shape)
        parameter.set_data(ms.Tensor(data.astype(np.float32)))
    return net.set_train(False)


def images(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(count).normal(size=(count, *shape)).astype(np.float32)


def quantised(
    net: nn.Cell, x: np.ndarray, rules: tuple[Rule, ...] = (), target: str = "lite_arm", **changes: Any
) -> Any:
    config = QuantConfig(act_observer="minmax").override({name.replace("__", "."): v for name, v in changes.items()})
    return quantize(create_ptq_network(net, config, [x], rules=rules, target=target))


CASES = {
    "lenet5": (lambda: LeNet5(), (1, 32, 32), {}),
    "resnet20": (lambda: resnet20(), (3, 32, 32), {"weight__per_channel": True}),
    "mixed": (lambda: Mixed(), (2, 12, 12), {"weight__per_channel": True}),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, QuantCell, np.ndarray]:
    ms.set_context(mode=ms.GRAPH_MODE)
    make, shape, changes = CASES[request.param]
    x = images(48, *shape)
    return request.param, quantised(randomise(make()), x, **changes), x


Case = tuple[str, QuantCell, np.ndarray]


class Model:
    """An ONNX model to look into."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.nodes = {node.name: node for node in model.graph.node}
        assert len(self.nodes) == len(model.graph.node), "every node has a name of its own"
        self.producer = {output: node for node in model.graph.node for output in node.output}
        self.data = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}

    def ops(self) -> list[str]:
        return [node.op_type for node in self.model.graph.node]

    def quantiser(self, name: str) -> tuple[str, np.ndarray, np.ndarray]:
        """What the pair of QuantizeLinear and DequantizeLinear that gives `name` reads: value, scale, zero point."""
        dequantise = self.producer[name]
        quantise = self.producer[dequantise.input[0]]
        assert (quantise.op_type, dequantise.op_type) == ("QuantizeLinear", "DequantizeLinear")
        assert list(quantise.input[1:]) == list(dequantise.input[1:])
        return quantise.input[0], self.data[quantise.input[1]], self.data[quantise.input[2]]

    def weight(self, name: str) -> list[np.ndarray]:
        """The stored integers, scale and zero point (if any) of a dequantised initialiser."""
        dequantise = self.producer[name]
        assert dequantise.op_type == "DequantizeLinear"
        return [self.data[item] for item in dequantise.input]

    def axis(self, name: str) -> int | None:
        attributes = {item.name: item.i for item in self.producer[name].attribute}
        return attributes.get("axis")


def reading(model: Model, node: Node) -> Any:
    """The operation that reads the inputs of a node of the graph."""
    return model.nodes.get(f"{node.name}.GlobalAveragePool", model.nodes[node.name])


@pytest.mark.parametrize("precision", ["float", "weight-only"])
def test_layers_planned_float_are_float_at_every_level_of_optimization(precision: str, tmp_path: Path) -> None:
    net = randomise(Between())
    for parameter in net.get_parameters():
        if parameter.name in ("inner.1.weight", "up.weight", "dense.weight", "weight"):
            data = parameter.asnumpy() * np.linspace(1, 0.01, parameter.shape[0]).reshape(
                -1, *[1] * (parameter.ndim - 1)
            )
            parameter.set_data(ms.Tensor(data.astype(np.float32)))  # one int8 scale per tensor would show
    rules = [Rule("path", path, {"precision": precision}) for path in ("inner", "up", "dense")]
    rules.append(Rule("op", "MatMul", {"precision": precision}))
    x = images(8, 2, 6, 6)
    cell = quantised(net, x, tuple(rules), weight__per_channel=True)
    graph, plan = cell.sync()
    assert {node.precision for node in plan.nodes if node.op in ("Conv2DTranspose", "MatMul")} == {precision}
    expected = cell(ms.Tensor(x)).asnumpy()
    for stored in ("uint8", "int8"):
        file = export_onnx(graph, plan, tmp_path / f"{stored}.onnx", stored)
        for level in LEVELS:
            assert steps_apart(cell, load_onnx(file, level=level)(x), expected).max() < 1.5, (stored, level)


# -- structure ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stored", "offset"), [("uint8", 128), ("int8", 0)])
def test_values_are_quantised_where_the_plan_says_and_nowhere_else(case: Case, stored: str, offset: int) -> None:
    graph, plan = case[1].sync()
    model = Model(onnx_model(graph, plan, stored))
    for node in graph.nodes:
        for index, value in enumerate(node.inputs):
            if graph.values[value].kind not in ("node", "input"):
                continue
            name, activation = reading(model, node).input[index], plan.activations.get(value)
            if activation is None or (activation.edges and (node.name, index) not in activation.edges):
                assert "DequantizeLinear" not in getattr(model.producer.get(name), "op_type", "")
                continue
            source, scale, zero_point = model.quantiser(name)
            qparams = plan.group_of(value).qparams()
            assert (scale.shape, zero_point.shape) == ((), ())
            assert scale == qparams.scale
            assert zero_point == qparams.zero_point + offset
            assert zero_point.dtype == stored
            producer = graph.producer(value)
            assert source == value if producer is None else model.producer[source].name == producer.name
    extra = sum(name.endswith(".GlobalAveragePool") for name in model.nodes)
    assert model.ops().count("QuantizeLinear") == len(plan.activations) + extra


def test_values_of_one_group_read_one_scale(case: Case) -> None:
    graph, plan = case[1].sync()
    model = Model(onnx_model(graph, plan))
    scales = {node.input[1] for node in model.model.graph.node if node.op_type == "QuantizeLinear"}
    assert len(scales) == len(plan.groups)


def test_weights_and_biases_are_integers(case: Case) -> None:
    graph, plan = case[1].sync()
    model = Model(onnx_model(graph, plan))
    for name, quant in plan.weights.items():
        node = graph.node(name)
        weight = graph.params[node.inputs[1]].data
        qparams = quant.qparams(weight)
        stored, scale, zero_point = model.weight(model.nodes[name].input[1])
        gated = any(other.op == "HSigmoid" and other.fused_into == name for other in plan.nodes)  # (y + 3) / 6
        np.testing.assert_array_equal(stored, qparams.quantize(weight))
        np.testing.assert_array_equal(scale, qparams.scale / np.float32(6 if gated else 1))
        assert (stored.dtype, zero_point.dtype, zero_point.any()) == (np.int8, np.int8, False)
        assert model.axis(model.nodes[name].input[1]) == quant.axis
        if len(node.inputs) == 3:
            bias = graph.params[node.inputs[2]].data
            integers, bias_scale = model.weight(model.nodes[name].input[2])
            np.testing.assert_allclose(bias_scale, plan.group_of(node.inputs[0]).qparams().scale * scale, rtol=1e-6)
            expected = (bias + 3) / 6 if gated else bias
            np.testing.assert_allclose(integers * bias_scale, expected, atol=float(bias_scale.max()))
            assert (integers.dtype, model.axis(model.nodes[name].input[2])) == (np.int32, quant.axis)
    quantised_weights = {graph.node(name).inputs[1] for name in plan.weights}
    assert not quantised_weights & set(model.data), "no float copy is stored"


def test_names_batch_and_versions(case: Case) -> None:
    graph, plan = case[1].sync()
    model = onnx_model(graph, plan)
    assert [item.name for item in model.graph.input] == graph.inputs
    assert [item.name for item in model.graph.output] == graph.outputs
    for item, value in zip((*model.graph.input, *model.graph.output), (*graph.inputs, *graph.outputs)):
        sizes = [size.dim_param or size.dim_value for size in item.type.tensor_type.shape.dim]
        assert sizes == ["N", *graph.shape(value)[1:]]
    assert (model.producer_name, model.producer_version) == ("msqkd", __version__)
    assert (model.ir_version, [(item.domain, item.version) for item in model.opset_import]) == (9, [("", 20)])
    assert {node.name for node in graph.nodes} <= {node.name for node in model.graph.node}


def test_a_value_read_in_float_too_is_rounded_for_its_int8_readers_alone() -> None:
    x = images(8, 2, 12, 12)
    graph, plan = quantised(randomise(Mixed()), x).sync()
    value = next(name for name, quant in plan.activations.items() if quant.edges)
    model = Model(onnx_model(graph, plan))
    readers = {(node.name, i) for node in graph.nodes for i, name in enumerate(node.inputs) if name == value}
    edges = set(plan.activations[value].edges)
    assert edges
    assert readers - edges
    for name, index in readers:
        read = reading(model, graph.node(name)).input[index]
        assert (read == value) == ((name, index) not in edges)
    assert model.ops().count("QuantizeLinear") > 0
    assert model.producer[value].name == graph.producer(value).name  # type: ignore[union-attr]


# -- answers --------------------------------------------------------------------------------------------------------


def steps_apart(cell: QuantCell, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How many steps of the output's scale two answers differ by."""
    graph, plan = cell.sync()
    return np.abs(one - other) / plan.group_of(graph.outputs[0]).qparams().scale


@pytest.mark.parametrize("stored", ["uint8", "int8"])
def test_answers_are_those_of_the_quantised_cell(case: Case, tmp_path: Path, stored: str) -> None:
    _, cell, x = case
    answers = load_onnx(export_onnx(*cell.sync(), tmp_path / "net.onnx", stored))(ms.Tensor(x))
    expected = cell(ms.Tensor(x)).asnumpy()
    assert answers.shape == expected.shape
    assert agreement(answers, expected) >= 95
    # The rare value that lies between two steps takes another one, and a step more or less spreads on its way down.
    assert steps_apart(cell, answers, expected).mean() < 1
    assert steps_apart(cell, answers, expected).max() < 6


def test_the_batch_is_open(case: Case, tmp_path: Path) -> None:
    _, cell, x = case
    run = load_onnx(export_onnx(*cell.sync(), tmp_path / "net.onnx"))
    whole = run(x[:6])
    np.testing.assert_array_equal(whole, np.concatenate([run(x[:1]), run(x[1:6])]))


def test_float_file_answers_as_the_network(case: Case, tmp_path: Path) -> None:
    _, cell, x = case
    graph, _ = cell.sync()
    run = load_onnx(export_onnx_float(graph, tmp_path / "float.onnx"))
    np.testing.assert_allclose(run(x), to_cell(graph)(ms.Tensor(x)).asnumpy(), rtol=1e-4, atol=1e-5)


def test_onnxruntime_computes_every_layer_in_int8(case: Case, tmp_path: Path) -> None:
    name, cell, _ = case
    kernels = executed_kernels(export_onnx(*cell.sync(), tmp_path / "net.onnx"))
    assert not {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul"} & set(kernels)
    _, plan = cell.sync()
    layers = kernels.get("QLinearConv", 0) + kernels.get("QGemm", 0)
    assert layers == len(plan.weights)
    if name != "mixed":
        assert kernels["QuantizeLinear"] == kernels["DequantizeLinear"] == 1, "at the borders of the network only"


FORMS = {
    "mixed": (Mixed, (2, 12, 12)),
    "pieces": (Pieces, (6, 4, 8)),
    "curves": (Curves, (8,)),
    "maps": (Maps, (4, 8, 8)),
    "spelt": (Spelt, (4, 7, 10)),
    "borders": (Borders, (4, 6, 8)),
    "grown": (Grown, (4, 5, 3)),
    "sums": (Sums, (3, 4, 5)),
    "choices": (Choices, (3, 4, 5)),
    "filled": (Filled, (3,)),
    "promoted": (Promoted, (4,)),
    "encoder": (Encoder, None),
}


@cache
def captured(name: str) -> tuple[nn.Cell, Graph]:
    make, shape = FORMS[name]
    net = randomise(make())
    return net, deployment_graph(capture(net, ms.Tensor(np.zeros((2, 6), np.int32)) if shape is None else shape))


@pytest.mark.parametrize("name", FORMS)
def test_every_form_answers_as_mindspore(name: str, tmp_path: Path) -> None:
    net, graph = captured(name)
    shape = FORMS[name][1]
    x = np.random.default_rng(3).integers(0, 11, (3, 6)).astype(np.int32) if shape is None else images(3, *shape)
    run = load_onnx(export_onnx_float(graph, tmp_path / "float.onnx"))
    for batch in (x, x[:1]):
        expected, found = net(ms.Tensor(batch)), run(batch)
        pairs = zip(found, expected) if isinstance(expected, tuple) else [(found, expected)]
        for one, other in pairs:
            assert one.dtype == other.asnumpy().dtype
            np.testing.assert_allclose(one, other.asnumpy(), rtol=1e-4, atol=2e-5)


X = np.random.default_rng(7).normal(size=(3, 2, 4)).astype(np.float32)
BY_HAND = {
    "Adds": ([2.5], X + np.float32(2.5)),
    "Divs": ([2.5], X / np.float32(2.5)),
    "ExpandDims": ([-1], X[..., None]),
    "Identity": ([], X),
    "MatMulExt": ([X[0].T], X @ X[0].T),
    "Muls": ([-2.0], X * -2),
    "OnesLike": ([], np.ones_like(X)),
    "PowTensorScalar": ([2.0], X**2),
    "Split": ([2, 2], X[..., :2]),
    "Squeeze": ([()], X),
    "Subs": ([2.5], X - np.float32(2.5)),
    "Tile": ([(1, 2, 1)], np.tile(X, (1, 2, 1))),
    "BroadcastTo": ([(5, -1, -1, 4)], np.broadcast_to(X, (5, 3, 2, 4))),
    "StridedSlice": ([(0, 3, 0), (0, 0, 0), (1, -2, 1), 1, 1, 0, 0, 4], X[:, 3:0:-2, 0]),
    "StridedSlice, ellipsis": ([(0, 0, 1), (0, 0, 2), (1, 1, 1), 0, 0, 1, 2, 4], X[..., None, 1]),
    "Unstack": ([], X[:, 0]),
    "ZerosLike": ([], np.zeros_like(X)),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_forms_that_a_capture_may_replace(case: str, tmp_path: Path) -> None:
    operands, expected = BY_HAND[case]
    graph = Graph("Net")
    graph.inputs = [graph.add_value(Value("x", "input", TensorType((-1, *X.shape[1:]))))]
    node = Node("node", case.split(",")[0], ["x", *(graph.add_const(item) for item in operands)], ["y"])
    if node.op in ("Split", "Unstack"):
        node.outputs, node.attrs = ["y", "z"], {"axis": 1}
    for output in node.outputs:
        graph.add_value(Value(output, "node", TensorType(expected.shape)))
    graph.nodes, graph.outputs = [node], ["y"]
    np.testing.assert_allclose(load_onnx(export_onnx_float(graph, tmp_path / "n.onnx"))(X), expected, rtol=1e-6)


SCALARS = {"ScalarAdd": 5, "ScalarSub": 1, "ScalarMul": 6, "ScalarFloorDiv": 1, "ScalarMod": 1}


@pytest.mark.parametrize("op", SCALARS)
def test_arithmetic_on_sizes(op: str, tmp_path: Path) -> None:
    graph = Graph("Net")
    graph.inputs = [graph.add_value(Value("x", "input", TensorType((-1, *X.shape[1:]))))]
    names = [graph.add_value(Value(name, "node", TensorType((0,), "int64"))) for name in ("batch", "rows", "columns")]
    graph.add_value(Value("size", "node", TensorType((0,), "int64")))
    graph.add_value(Value("flat", "node", TensorType((-1, -1))))
    graph.add_value(Value("y", "node", TensorType((-1, -1))))
    two, rest = graph.add_const(2), graph.add_const(-1)
    graph.nodes = [
        Node("shape", "Shape", ["x"], names, unpack=True),
        Node("arithmetic", op, ["batch", two], ["size"]),
        Node("flatten", "Reshape", ["x", "batch", rest], ["flat"], sequences=((1, 2),)),
        Node("repeat", "Tile", ["flat", "size", "rows"], ["y"], sequences=((1, 2),)),
    ]
    graph.outputs = ["y"]
    found = load_onnx(export_onnx_float(graph, tmp_path / "n.onnx"))(X)
    np.testing.assert_array_equal(found, np.tile(X.reshape(3, 8), (SCALARS[op], 2)))


FILLED = {"Zeros": 0, "Ones": 1}


@pytest.mark.parametrize("op", FILLED)
def test_numbers_in_a_shape_that_holds_the_batch(op: str, tmp_path: Path) -> None:
    graph = Graph("Net")
    graph.inputs = [graph.add_value(Value("x", "input", TensorType((-1, *X.shape[1:]))))]
    names = [graph.add_value(Value(name, "node", TensorType((0,), "int64"))) for name in ("batch", "rows", "columns")]
    graph.outputs = [graph.add_value(Value("y", "node", TensorType((-1, 5), "int32")))]
    graph.nodes = [
        Node("shape", "Shape", ["x"], names, unpack=True),
        Node("filled", op, ["batch", graph.add_const(5), graph.add_const(34)], ["y"], sequences=((0, 2),)),
    ]
    found = load_onnx(export_onnx_float(graph, tmp_path / "n.onnx"))(X)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, np.full((len(X), 5), FILLED[op]))


def test_every_operation_of_the_table_is_tried() -> None:
    in_networks = {node.op for name in FORMS for node in captured(name)[1].nodes}
    by_hand = {case.split(",")[0] for case in BY_HAND} | set(SCALARS) | set(FILLED) | {"Shape", "Reshape"}
    assert set(supported()) <= in_networks | by_hand


def test_an_encoder_in_int8_answers_as_the_quantised_cell(tmp_path: Path) -> None:
    tokens = np.random.default_rng(4).integers(0, 11, (16, 6)).astype(np.int32)
    _, graph = captured("encoder")
    plan = make_plan(graph, QuantConfig(act_observer="minmax"))
    observation = Observation(graph, plan)
    values = observation.cell(ms.Tensor(tokens))[observation.outputs :]
    for group, observer, value in zip(observation.groups, observation.observers, values):
        observer.update(value.asnumpy(), where=group.name)
    cell = quantize_cell(graph, plan.with_ranges(observation.ranges()))
    file = export_onnx(*cell.sync(), tmp_path / "encoder.onnx")
    expected = cell(ms.Tensor(tokens)).asnumpy()
    assert steps_apart(cell, load_onnx(file)(tokens), expected).mean() < 1
    kernels = executed_kernels(file)
    assert (kernels["QGemm"], kernels["QLinearMatMul"], kernels["QLinearSoftmax"]) == (5, 2, 1)


@pytest.mark.parametrize(
    ("target", "changes"),
    [
        ("lite_arm", {"act_symmetric": True}),
        ("lite_arm", {"act_quant_dtype": "int4"}),
        ("lite_arm", {"weight__quant_dtype": "int4", "weight__observer": "mse"}),
        ("ascend", {}),
    ],
    ids=["symmetric", "narrow activations", "narrow clipped weights", "ascend"],
)
def test_other_plans(target: str, changes: dict[str, Any], tmp_path: Path) -> None:
    x = images(24, 2, 12, 12)
    cell = quantised(randomise(Mixed()), x, target=target, **changes)
    file = export_onnx(*cell.sync(), tmp_path / "net.onnx")
    found, expected = load_onnx(file)(x), cell(ms.Tensor(x)).asnumpy()
    spread = np.ptp(expected)
    assert np.abs(found - expected).mean() < 0.02 * spread
    if target == "lite_arm":
        assert not {"Conv", "FusedConv", "Gemm"} & set(executed_kernels(file))


# -- arithmetic on networks of one layer ------------------------------------------------------------------------------


def by_hand(inputs: dict[str, tuple[int, ...]], nodes: list[Node], params: dict[str, np.ndarray]) -> Graph:
    """A graph from its nodes; every computed value is float32 of two dimensions."""
    graph = Graph("Net")
    for name, shape in inputs.items():
        graph.inputs.append(graph.add_value(Value(name, "input", TensorType((-1, *shape)))))
    for name, data in params.items():
        graph.add_param(name, data)
    for node in nodes:
        graph.nodes.append(node)
        for output in node.outputs:
            graph.add_value(Value(output, "node", TensorType((-1, 3))))
    graph.outputs = [nodes[-1].output]
    graph.check()
    return graph


def dense(weight: np.ndarray, bias: np.ndarray, activation: str = "") -> Graph:
    nodes = [Node("fc", "Dense", ["x", "fc.weight", "fc.bias"], ["y"])]
    if activation:
        nodes.append(Node("act", activation, ["y"], ["z"]))
    return by_hand({"x": (weight.shape[1],)}, nodes, {"fc.weight": weight, "fc.bias": bias})


def dense_plan(
    graph: Graph, x: tuple[float, float], y: tuple[float, float], bits: int = 8, symmetric: bool = False, axis: Any = 0
) -> QuantPlan:
    plan = QuantPlan("lite_arm", graph.name)
    for value, span in (("x", x), (graph.outputs[0], y)):
        plan.groups[value] = Group(value, bits, symmetric, "minmax", 100.0, 0, "test", span)
        plan.activations[value] = ActivationQuant(value, value)
    plan.weights["fc"] = WeightQuant("fc", 8, axis, "minmax", "test")
    heads = {"act": "fc"}
    plan.nodes = [NodePlan(n.name, n.op, "", (), INT8, "", "test", heads.get(n.name)) for n in graph.nodes]
    return plan


ends = st.tuples(st.floats(-4, 0), st.floats(0.01, 8))
random = st.integers(0, 2**31).map(np.random.default_rng)


@settings(max_examples=40, deadline=None)
@given(
    source=random, x_span=ends, y_span=ends, bits=st.integers(2, 8), symmetric=st.booleans(),
    activation=st.sampled_from(["", "ReLU", "ReLU6"]), stored=st.sampled_from(["uint8", "int8"]),
    axis=st.sampled_from([0, None]),
)  # fmt: skip
def test_a_layer_of_any_plan_gives_the_integers_of_the_plan(
    source: np.random.Generator, x_span: tuple[float, float],
    y_span: tuple[float, float], bits: int, symmetric: bool, activation: str, stored: str, axis: Any,
) -> None:  # fmt: skip
    weight = source.normal(size=(3, 5)).astype(np.float32)
    bias = source.normal(size=3).astype(np.float32)
    graph = dense(weight, bias, activation)
    plan = dense_plan(graph, x_span, y_span, bits, symmetric, axis)
    x_params, y_params = (plan.groups[name].qparams() for name in ("x", graph.outputs[0]))
    # On the grid, where a division and a product with the reciprocal round alike, and a little beyond its ends.
    x = x_params.dequantize(source.integers(x_params.qmin - 2, x_params.qmax + 3, (16, 5)))
    w_params = plan.weights["fc"].qparams(weight)
    # The bias is an integer too: where outputs have finer steps than products, its rounding moves them.
    unit = np.float64(x_params.scale) * w_params.scale
    y = x_params.fake_quantize(x).astype(np.float64) @ w_params.fake_quantize(weight).T + np.rint(bias / unit) * unit
    y = np.clip(y, 0 if activation else -np.inf, 6 if activation == "ReLU6" else np.inf)
    with tempfile.TemporaryDirectory() as folder:
        file = export_onnx(graph, plan, Path(folder) / "net.onnx", stored)
        found, kernels = load_onnx(file)(x), executed_kernels(file)
    steps = (found - y_params.fake_quantize(y.astype(np.float32))) / y_params.scale
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)
    close_to_a_tie = np.abs(y / y_params.scale % 1 - 0.5) < 1e-2
    assert np.all((np.abs(steps) < 0.5) | (close_to_a_tie & (np.abs(steps) < 1.5)))
    if stored == "uint8":
        assert "QGemm" in kernels, kernels


def test_the_bias_of_a_channel_all_but_dead_survives(tmp_path: Path) -> None:
    weight = np.float32([[1e-12, -1e-12], [1.0, -0.5], [0.0, 0.0]])
    bias = np.float32([0.75, 0.25, -0.5])
    for axis in (0, None):
        graph = dense(weight, bias)
        file = export_onnx(graph, dense_plan(graph, (-1, 1), (-2, 2), axis=axis), tmp_path / "net.onnx")
        np.testing.assert_allclose(load_onnx(file)(np.zeros((1, 2), np.float32))[0], bias, atol=0.01)


def test_inputs_and_repeated_values_may_be_outputs(tmp_path: Path) -> None:
    graph = by_hand({"x": (3,), "t": (3,)}, [Node("add", "Add", ["x", "t"], ["y"])], {"p": np.ones(3, np.float32)})
    graph.outputs = ["y", "x", "y", "p"]
    x, t = images(2, 3), images(2, 3) + 1
    file = export_onnx_float(graph, tmp_path / "net.onnx")
    for found, expected in zip(load_onnx(file)(x, t), (x + t, x, x + t, np.ones(3))):
        np.testing.assert_array_equal(found, expected)


def test_names_that_the_exporter_would_choose_are_left_to_the_network(tmp_path: Path) -> None:
    graph = dense(np.eye(3, dtype=np.float32), np.zeros(3, np.float32))
    taken = np.full(3, 7, np.float32)
    graph.add_param("x.scale", taken)
    graph.nodes.append(Node("add", "Add", ["y", "x.scale"], ["z"]))
    graph.add_value(Value("z", "node", TensorType((-1, 3))))
    plan = dense_plan(graph, (-1, 1), (-1, 1))
    graph.outputs = ["z"]
    found = load_onnx(export_onnx(graph, plan, tmp_path / "net.onnx"))(np.zeros((1, 3), np.float32))
    np.testing.assert_allclose(found[0], taken, atol=0.01)


# -- files ----------------------------------------------------------------------------------------------------------


def test_the_same_network_gives_the_same_bytes(case: Case, tmp_path: Path) -> None:
    one = export_onnx(*case[1].sync(), tmp_path / "a.onnx").read_bytes()
    captured("curves")
    assert export_onnx(*case[1].sync(), tmp_path / "b.onnx").read_bytes() == one


def test_size(case: Case, tmp_path: Path) -> None:
    name, cell, _ = case
    graph, plan = cell.sync()
    small, large = export_onnx(graph, plan, tmp_path / "int8.onnx"), export_onnx_float(graph, tmp_path / "float.onnx")
    if name != "mixed":
        assert small.stat().st_size < 0.3 * large.stat().st_size


def refused(graph: Graph, folder: Path, text: str, error: type[Exception] = ExportError, **options: Any) -> None:
    plan = options.pop("plan", QuantPlan("lite_arm", graph.name))
    with pytest.raises(error) as caught:
        export_onnx(graph, plan, folder / "net.onnx", **options)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(folder.iterdir()) == [], "nothing is left behind"


def test_an_operation_outside_the_table_is_refused(tmp_path: Path) -> None:
    graph = by_hand({"x": (3,)}, [Node("layer1.sort", "Sort", ["x"], ["y"])], {})
    refused(graph, tmp_path, "Net: 'layer1.sort' (Sort) cannot be written as ONNX; docs/formats.md lists what can be; ")
    refused(graph, tmp_path, "; the format portable_mindir holds any operation in any form")


PADDED = {"kernel_size": (1, 1, 2, 2), "strides": (1, 1, 2, 2), "pad_mode": "PAD", "pad": (1, 1, 1, 1)}


@pytest.mark.parametrize(
    ("node", "consts", "text"),
    [
        (Node("norm", "LayerNorm", ["x", "p", "p", "a", "b", "e"], ["y"]), {"a": 1, "b": 0, "e": 1e-5}, "from axis 1"),
        (Node("soft", "Softmax", ["x", "a"], ["y"]), {"a": (0, 1)}, "it goes over the axes (0, 1); allowed: one axis"),
        (Node("soft", "Softmax", ["x", "x"], ["y"]), {}, "argument 1 is computed; allowed: a literal"),
        (Node("soft", "Softmax", ["x"], ["y"]), {}, "argument 1 is missing"),
        (Node("pool", "MaxPool", ["x"], ["y"], functional=False), {}, "its attribute 'kernel_size' is not known"),
        (Node("take", "Gather", ["x", "x", "a", "b"], ["y"]), {"a": 0, "b": 1}, "it has 1 batch dimensions"),
        (Node("add", "Add", ["x", "a"], ["y"]), {"a": "text"}, "input 1 is 'text'; allowed: a tensor or a number"),
        (
            Node("pool", "AvgPool", ["x", "k", "k", "m"], ["y"]),
            {"k": (2, 2), "m": 7},
            "its padding mode is 7; allowed: SAME, VALID",
        ),
        (
            Node("pool", "AvgPool", ["x"], ["y"], {**PADDED, "ceil_mode": True}, functional=False),
            {},
            "it rounds the number of windows up and counts what it pads with",
        ),
        (
            Node("pad", "MirrorPad", ["x", "a"], ["y"], {"mode": "SYMMETRIC"}, functional=False),
            {"a": ((1, 1),)},
            "its mode is SYMMETRIC; allowed: REFLECT",
        ),
        (Node("norm", "LpNorm", ["x"], ["y"], {"p": 3, "axis": 1}), {}, "its power is 3; allowed: 1 and 2"),
        (Node("round", "Round", ["x", "a"], ["y"]), {"a": 2}, "it rounds to 2 decimals; allowed: 0"),
        (Node("prod", "ProdExt", ["x", "a", "b", "c"], ["y"]), {"a": 1, "b": False, "c": 43}, "a data type of its own"),
        (Node("std", "ReduceStd", ["x", "a", "b", "b"], ["y", "z"]), {"a": 0, "b": True}, "whose size is not known"),
    ],
)  # fmt: skip
def test_forms_of_an_operation_that_are_refused(tmp_path: Path, node: Node, consts: dict[str, Any], text: str) -> None:
    graph = Graph("Net")
    graph.inputs = [graph.add_value(Value("x", "input", TensorType((-1, 3))))]
    graph.add_param("p", np.ones(3, np.float32))
    for name, value in consts.items():
        graph.add_value(Value(name, "const", None, value))
    graph.nodes, graph.outputs = [node], ["y"]
    graph.add_value(Value("y", "node", TensorType((-1, 3))))
    refused(graph, tmp_path, text)
    refused(graph, tmp_path, f"Net: '{node.name}' ({node.op}) cannot be written as ONNX: ")


def test_statistics_of_a_normalisation_are_not_given(tmp_path: Path) -> None:
    node = Node("norm", "LayerNorm", ["x", "p", "p", "a", "a", "e"], ["y", "mean", "variance"])
    graph = Graph("Net")
    graph.inputs = [graph.add_value(Value("x", "input", TensorType((-1, 3))))]
    graph.add_param("p", np.ones(3, np.float32))
    for name, value in {"a": 1, "e": 1e-5}.items():
        graph.add_value(Value(name, "const", None, value))
    for output in node.outputs:
        graph.add_value(Value(output, "node", TensorType((-1, 3))))
    graph.nodes, graph.outputs = [node], ["y", "variance"]
    refused(graph, tmp_path, "a result other than the first is read; allowed: the normalised value alone")


def test_other_refusals(tmp_path: Path) -> None:
    graph = dense(np.ones((3, 2), np.float32), np.zeros(3, np.float32))
    plan = dense_plan(graph, (-1, 1), (-1, 1))
    refused(
        graph, tmp_path, "activations are 'uint4'; allowed: uint8, int8; did you mean", plan=plan, activations="uint4"
    )
    unknown = plan.with_ranges({"x": None})  # type: ignore[dict-item]
    refused(graph, tmp_path, "value 'x' has no range yet", PlanError, plan=unknown)
    graph.values["y"] = Value("y", "node", None)
    refused(graph, tmp_path, "its output 'y' is not a tensor; allowed: tensors")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    graph = dense(np.ones((3, 2), np.float32), np.zeros(3, np.float32))
    with pytest.raises(ExportError, match=r"^cannot write .*net.onnx: "):
        export_onnx_float(graph, tmp_path / "file" / "net.onnx")
    assert [child.name for child in tmp_path.iterdir()] == ["file"]


class Constants(nn.Cell):
    """Constants that are computed by an operation ONNX lacks: read in float, and by an int8 product."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Dense(4, 4), nn.Dense(4, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = ops.matmul(self.first(x), ops.eye(4, 4, ms.float32) * 0.7)
        return self.last(x + ops.tanh(ops.eye(4, 4, ms.float32)).sum(0))


@pytest.mark.parametrize("target", ["lite_arm", "ascend"])
def test_constants_of_unknown_operations_are_computed_before(target: str, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    cell = quantize(create_ptq_network(Constants(), QuantConfig(act_observer="minmax"), [x], target=target))
    file = export_onnx(*cell.sync(), tmp_path / "net.onnx")
    expected = cell(ms.Tensor(x)).asnumpy()
    found = np.asarray(load_onnx(file)(x))
    assert np.abs(found - expected).max() <= 0.02 * np.abs(expected).max()


def test_an_earlier_file_survives_a_failed_export(tmp_path: Path) -> None:
    graph = dense(np.ones((3, 2), np.float32), np.zeros(3, np.float32))
    file = export_onnx_float(graph, tmp_path / "net.onnx")
    before = file.read_bytes()
    graph.nodes[0].op = "Sparse"
    with pytest.raises(ExportError):
        export_onnx_float(graph, file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_that_is_not_onnx(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(ExportError, match=r"^onnxruntime cannot load .*net\.onnx: "):
        load_onnx(tmp_path / "net.onnx")


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = dense(np.ones((3, 2), np.float32), np.zeros(3, np.float32))
    file = export_onnx_float(graph, tmp_path / "net.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'msqkd\[onnx\]'$"):
        load_onnx(file)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'msqkd\[onnx\]'$"):
        export_onnx_float(graph, tmp_path / "other.onnx")
    assert list(tmp_path.iterdir()) == [file]


def test_exact_products_are_asked_for_where_the_cpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert "session.x64quantprecision" in session_settings({"avx2", "fma"})
    assert "session.x64quantprecision" not in session_settings({"avx2", "avx512_vnni"})
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert "session.x64quantprecision" not in session_settings({"asimd"})
