"""From graph and plan to a device program: layouts, casts, forms, and what the simulator makes of it."""

from __future__ import annotations

from collections.abc import Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from msqkd.exporters.device import FLOAT_FILE, WEIGHT_FILE, lite_program
from msqkd.exporters.ms.check import check_program
from msqkd.graph.capture import capture
from msqkd.graph.cell import to_cell
from msqkd.graph.ir import Graph
from msqkd.graph.islands import run_island
from msqkd.integer.program import ISLAND, Program
from msqkd.integer.simulator import Simulator
from msqkd.quant.config import FLOAT, QuantConfig, Rule, WeightQuantizer
from msqkd.quant.fake_quant import QUANTIZE
from msqkd.quant.placement import make_plan
from msqkd.quant.plan import QuantPlan
from msqkd.quant.ptq import calibrate
from msqkd.quant.qat import deployment_graph, quantize_cell

PER_CHANNEL = QuantConfig(weight_quantizer=WeightQuantizer(per_channel=True))


class Net(nn.Cell):
    """What a network of maps does, and one operation of the caller's choice in its middle."""

    def __init__(self, middle: nn.Cell | None = None) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, has_bias=True)
        self.middle = middle if middle is not None else nn.ReLU()
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, group=8, pad_mode="pad", padding=1)
        self.relu6, self.pool = nn.ReLU6(), nn.MaxPool2d(2, 2, "same")
        self.narrow = nn.Conv2d(8, 8, 1)
        self.dense = nn.Dense(8, 5)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.middle(self.first(x))
        y = self.relu6(self.depthwise(x))
        y = self.pool(y + self.narrow(y))
        return self.dense(ops.mean(y, (2, 3)))


class Flat(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.flat, self.relu = nn.Conv2d(2, 4, 3), nn.Flatten(), nn.ReLU()
        self.one, self.two = nn.Dense(4 * 6 * 5, 7), nn.Dense(7, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.two(self.relu(self.one(self.flat(self.conv(x)))))


def planned(
    net: nn.Cell, shape: tuple[int, ...], config: QuantConfig | None = None, rules: tuple[Rule, ...] = ()
) -> tuple[Graph, QuantPlan, np.ndarray]:
    ms.set_seed(3)
    graph = deployment_graph(capture(net, shape))
    x = np.random.default_rng(4).normal(size=(6, *shape)).astype(np.float32)
    plan = calibrate(graph, make_plan(graph, config, rules), [x], observer="minmax")
    return graph, plan, x


def simulated(program: Program, x: np.ndarray) -> np.ndarray:
    simulator = Simulator(program, run_island=run_island)
    return simulator.run(np.ascontiguousarray(x.transpose(0, 2, 3, 1)))[0]


def fake_quantised(graph: Graph, plan: QuantPlan, x: np.ndarray) -> np.ndarray:
    cell = quantize_cell(graph, plan)
    cell.set_phase(QUANTIZE)
    return cell(ms.Tensor(x)).asnumpy()


def last_scale(graph: Graph, plan: QuantPlan) -> float:
    return float(plan.group_of(graph.outputs[0]).qparams().scale)


@pytest.mark.parametrize("config", [None, PER_CHANNEL], ids=["per_tensor", "per_channel"])
@pytest.mark.parametrize(("net", "shape"), [(Net, (3, 12, 12)), (Flat, (2, 6, 5))])
def test_the_device_answers_as_the_fake_quantised_network(
    net: Callable[[], nn.Cell], shape: tuple[int, ...], config: QuantConfig | None
) -> None:
    graph, plan, x = planned(net(), shape, config)
    program = lite_program(graph, plan)
    assert all(step.quantized or step.op == "QuantDTypeCast" for step in program.steps)
    assert [step.op for step in program.steps].count("QuantDTypeCast") == 2, "one cast at each border"
    found, expected = simulated(program, x), fake_quantised(graph, plan, x)
    assert np.abs(found - expected).max() <= 2.01 * last_scale(graph, plan)
    assert (np.abs(found - expected) < 0.01 * last_scale(graph, plan)).mean() > 0.7


def test_kernels_take_their_activations_and_averages_become_convolutions() -> None:
    graph, plan, _ = planned(Net(), (3, 12, 12))
    program = lite_program(graph, plan)
    kernels = [(step.op, int(step.attrs.get("activation_type", 0))) for step in program.steps if step.quantized]
    assert kernels == [
        ("Conv2DFusion", 1), ("Conv2DFusion", 3), ("Conv2DFusion", 0), ("AddFusion", 0), ("MaxPoolFusion", 0),
        ("Conv2DFusion", 0), ("Reshape", 0), ("MatMulFusion", 0),
    ]  # fmt: skip
    mean = program.steps[6]
    assert mean.attrs["group"] == 8
    weight = program.tensors[mean.inputs[1]]
    assert set(weight.data.ravel()) == {127}
    assert weight.quant.scale[0] == pytest.approx(1 / (127 * 9), rel=1e-6)


def test_a_flattened_map_needs_no_transpose() -> None:
    graph, plan, _ = planned(Flat(), (2, 6, 5))
    assert "Transpose" not in [step.op for step in lite_program(graph, plan).steps]


class Turned(nn.Cell):
    """A square, or a map of as many channels as rows, in another order, which two Reshapes read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.fc, self.other = nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Dense(36, 4), nn.Dense(72, 4)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.relu(self.conv(x)).reshape(-1, 6, 36)
        square = x[:, :, :6].transpose(0, 2, 1).reshape(-1, 36)
        cube = x.reshape(-1, 6, 6, 6).transpose(0, 2, 1, 3).reshape(-1, 3, 72)
        return self.fc(square) + self.other(cube).mean(1)


def test_no_transposition_before_a_reshape_keeps_the_shape() -> None:
    """The runtime would drop it."""
    graph, plan, x = planned(Turned(), (2, 6, 6))
    program = lite_program(graph, plan)
    check_program(program)
    turned = [step for step in program.steps if step.op == "Transpose"]
    assert len(turned) >= 2
    for step in turned:
        before, after = (program.tensors[name].shape for name in (step.inputs[0], step.outputs[0]))
        readers = [other.op for other in program.steps if step.outputs[0] in other.inputs]
        assert before != after or readers != ["Reshape"] or step.inputs[0] in program.inputs
    found, expected = simulated(program, x), fake_quantised(graph, plan, x)
    assert np.abs(found - expected).max() <= 3.01 * last_scale(graph, plan)


def test_a_padded_pointwise_convolution_is_embedded_into_zeros() -> None:
    net = nn.SequentialCell(nn.Conv2d(2, 3, 1, stride=2, pad_mode="pad", padding=(1, 0, 2, 1), has_bias=True))
    graph, plan, x = planned(net, (2, 7, 8))
    assert next(node for node in plan.nodes if node.op == "Conv2D").avoids == ("padded_pointwise",)
    program = lite_program(graph, plan)
    conv = next(step for step in program.steps if step.op == "Conv2DFusion")
    assert (conv.attrs["kernel_size"], conv.attrs["pad_list"]) == ((3, 3), (2, 1, 3, 2))
    found, expected = simulated(program, x), fake_quantised(graph, plan, x)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1.01 * last_scale(graph, plan)


def test_a_large_average_pool_is_a_depthwise_convolution_with_strides() -> None:
    net = nn.SequentialCell(nn.Conv2d(2, 4, 3), nn.AvgPool2d(12, 2), nn.Conv2d(4, 2, 1))
    graph, plan, x = planned(net, (2, 16, 14))
    found, expected = simulated(lite_program(graph, plan), x), fake_quantised(graph, plan, x)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 2.01 * last_scale(graph, plan)


class Gated(nn.Cell):
    """A squeeze-and-excitation block around its input."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.gate = nn.Conv2d(8, 8, 1), nn.HSigmoid()

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.gate(self.squeeze(ops.mean(x, (2, 3), True))) * x


class Wave(nn.Cell):
    def construct(self, x):  # type: ignore[no-untyped-def]
        return ops.sin(x)


@pytest.mark.parametrize(
    ("middle", "island"), [(nn.HSwish(), False), (nn.Sigmoid(), False), (Gated(), False), (Wave(), True)]
)
def test_float_operations_stand_between_casts(middle: nn.Cell, island: bool) -> None:
    graph, plan, x = planned(Net(middle), (3, 12, 12))
    program = lite_program(graph, plan)
    assert any(step.op == ISLAND for step in program.steps) == island
    found, expected = simulated(program, x), fake_quantised(graph, plan, x)
    assert np.abs(found - expected).max() <= 3.01 * last_scale(graph, plan)


def test_a_layer_kept_float_by_rule_is_float_on_the_device() -> None:
    graph, plan, x = planned(Net(), (3, 12, 12), rules=(Rule("path", "narrow", FLOAT),))
    program = lite_program(graph, plan)
    step = next(step for step in program.steps if step.layer == "narrow")
    assert not step.quantized
    assert program.tensors[step.inputs[1]].dtype == "float32"
    found, expected = simulated(program, x), fake_quantised(graph, plan, x)
    assert np.abs(found - expected).max() <= 2.01 * last_scale(graph, plan)


def test_the_float_program_is_the_float_network() -> None:
    for net, shape in ((Net(Gated()), (3, 12, 12)), (Flat(), (2, 6, 5))):
        graph, plan, x = planned(net, shape)
        program = lite_program(graph, plan, kind=FLOAT_FILE)
        assert {tensor.dtype for tensor in program.tensors.values()} <= {"float32", "int32"}
        expected = to_cell(graph)(ms.Tensor(x)).asnumpy()
        np.testing.assert_allclose(simulated(program, x), expected, rtol=1e-4, atol=1e-5)


def test_the_weight_only_program_stores_int8_and_computes_in_float() -> None:
    graph, plan, x = planned(Net(), (3, 12, 12), PER_CHANNEL)
    program = lite_program(graph, plan, kind=WEIGHT_FILE)
    stored = [tensor for tensor in program.tensors.values() if tensor.dtype == "int8"]
    assert len(stored) == len(plan.weights)
    assert not any(step.quantized for step in program.steps)
    weights = graph.copy()
    for name, quant in plan.weights.items():
        param = weights.params[weights.node(name).inputs[1]]
        param.data = quant.qparams(param.data).fake_quantize(param.data)
    expected = to_cell(weights)(ms.Tensor(x)).asnumpy()
    np.testing.assert_allclose(simulated(program, x), expected, rtol=1e-4, atol=1e-5)


def test_one_sample_at_a_time_and_all_at_once_are_the_same() -> None:
    graph, plan, x = planned(Net(Gated()), (3, 12, 12))
    program = lite_program(graph, plan)
    one_by_one = np.concatenate([simulated(program, x[i : i + 1]) for i in range(len(x))])
    assert np.array_equal(simulated(program, x), one_by_one)


def test_tensors_say_which_value_they_hold() -> None:
    graph, plan, x = planned(Net(), (3, 12, 12))
    program = lite_program(graph, plan)
    cell = quantize_cell(graph, plan, observe=list(plan.activations))
    cell.set_phase(QUANTIZE)
    observed = dict(zip(plan.activations, cell(ms.Tensor(x))[1:]))
    shapes = {}
    for name, data in Simulator(program).trace(np.ascontiguousarray(x.transpose(0, 2, 3, 1))):
        tensor = program.tensors[name]
        if tensor.value and tensor.dtype == "int8":
            shapes[tensor.value] = (data.transpose(tensor.perm) if tensor.perm else data).shape
    assert set(shapes) == set(plan.activations)
    assert all(shape == observed[value].shape for value, shape in shapes.items())
