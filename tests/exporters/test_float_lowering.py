"""Operations that stay float and are written for MindSpore Lite as several of its own: the answers of MindSpore."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops
from transposed import Grown

from msqkd.exporters.device import FLOAT_FILE, WEIGHT_FILE, lite_program
from msqkd.exporters.lite import export_lite
from msqkd.exporters.ms.check import check_program
from msqkd.graph.capture import capture
from msqkd.graph.cell import Hooks, to_cell
from msqkd.graph.ir import Graph, Node, TensorType, Value
from msqkd.graph.islands import run_island
from msqkd.integer.program import ISLAND, Program
from msqkd.integer.simulator import Simulator
from msqkd.quant.config import QuantConfig, Rule
from msqkd.quant.fake_quant import QUANTIZE
from msqkd.quant.placement import make_plan
from msqkd.quant.plan import QuantPlan
from msqkd.quant.qat import deployment_graph, quantize_cell

pytestmark = pytest.mark.usefixtures("pynative_mode")


class Norms(nn.Cell):
    """Normalisations and norms of maps (N, 4, 5, 3) and of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.groups, self.layer, self.unit = nn.GroupNorm(2, 4), nn.GroupNorm(1, 4), ops.L2Normalize(1, 1e-12)
        self.raised, self.length, self.size = ops.L2Normalize(-1, 25.0), ops.LpNorm((2, 3), 2, True), ops.LpNorm(-1, 1)
        self.flat = ops.LpNorm(1, 2)

    def construct(self, x):  # type: ignore[no-untyped-def]
        y = ops.relu(x)
        norms = self.groups(x), self.layer(y), self.unit(y), self.raised(x), self.length(y), self.size(y), self.flat(y)
        spreads = ops.std(y, 1), ops.var(x, (2, 3), 0, True), ops.std(x, 2, 1, True)
        return (*norms, *spreads, ops.log_softmax(y, 1), ops.log_softmax(x[:, 0, 0], -1))


class Sums(nn.Cell):
    """Running sums, sums of several, differences and constants of a shape, on (N, 4, 5, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.reversed, self.later = ops.CumSum(True, True), ops.CumSum(True, False)
        self.difference, self.bias = ops.SquaredDifference(), ms.Parameter(ms.Tensor([1.0, -2.0, 3.0, 0.5], ms.float32))

    def construct(self, x):  # type: ignore[no-untyped-def]
        y = ops.relu(x)
        sums = ops.cumsum(x, 1), self.reversed(y, -1), self.later(x[:, 0], 1), ops.addn((x, y, x))
        squares = self.difference(x, y), self.difference(y, self.bias[:3])
        return (*sums, *squares, ops.bias_add(y, self.bias), ops.bias_add(x[:, :, 0, 0], self.bias))


class Curves(nn.Cell):
    """Activations that are several steps, and extremes without their places, on (N, 4, 5, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes, self.slope, self.soft = nn.PReLU(4), nn.PReLU(1), ops.Softplus()
        self.extreme = ops.ArgMaxWithValue(1, True)

    def construct(self, x):  # type: ignore[no-untyped-def]
        y = x * 30.0
        curves = self.slopes(x), self.slope(x), ops.elu(y), self.soft(y), ops.mish(x), self.slopes(x[:, :, 0, 0])
        return (*curves, ops.max(x, 2)[0], ops.min(ops.relu(y), 1)[0], self.extreme(ops.relu(x))[1])


def maps(count: int = 2) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(count, 4, 5, 3)).astype(np.float32)


def captured(net: nn.Cell) -> Graph:
    random = np.random.default_rng(5)
    for parameter in net.get_parameters():
        parameter.set_data(ms.Tensor(random.normal(0.2, 0.4, parameter.shape).astype(np.float32)))
    return deployment_graph(capture(net.set_train(False), (4, 5, 3)))


def simulated(program: Program, x: np.ndarray) -> list[np.ndarray]:
    check_program(program)
    assert ISLAND not in [step.op for step in program.steps]
    return Simulator(program, "x86", run_island).run(np.ascontiguousarray(x.transpose(0, 2, 3, 1)))


def answers(cell: nn.Cell, x: np.ndarray) -> list[np.ndarray]:
    found = cell(ms.Tensor(x))
    return [tensor.asnumpy() for tensor in (found if isinstance(found, tuple) else (found,))]


@pytest.mark.parametrize("make", [Norms, Sums, Curves, Grown])
def test_float_files_answer_as_mindspore(make: type[nn.Cell]) -> None:
    graph = captured(make())
    found = simulated(lite_program(graph, QuantPlan("lite_arm", graph.name), 2, FLOAT_FILE), maps())
    wanted = answers(to_cell(graph), maps())
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", ["ZerosLike", "OnesLike"])
def test_numbers_in_the_shape_of_a_value_are_constants(op: str) -> None:
    graph = Graph("Net")
    graph.inputs = [graph.add_value(Value("x", "input", TensorType((-1, 4, 5, 3))))]
    graph.outputs = [graph.add_value(Value("z", "node", TensorType((-1, 4, 5, 3))))]
    graph.add_value(Value("y", "node", TensorType((-1, 4, 5, 3))))
    graph.nodes = [Node("like", op, ["x"], ["y"]), Node("add", "Add", ["x", "y"], ["z"])]
    (found,) = simulated(lite_program(graph, QuantPlan("lite_arm", "Net"), 2, FLOAT_FILE), maps())
    np.testing.assert_array_equal(found, maps() + (op == "OnesLike"))


@pytest.mark.parametrize("ends", [("x", "y"), ("y", "z")])
def test_an_identity_costs_nothing_but_at_the_borders(ends: tuple[str, str]) -> None:
    """An input that is an output too needs a step that gives it."""
    graph = Graph("Net")
    kind = TensorType((-1, 4, 5, 3))
    graph.inputs = [graph.add_value(Value("x", "input", kind))]
    graph.nodes = [Node("same", "Identity", [ends[0]], [ends[1]])]
    if ends[0] == "y":
        graph.nodes.insert(0, Node("abs", "Abs", ["x"], ["y"]))
    for name in ("y", "z"):
        graph.add_value(Value(name, "node", kind))
    graph.outputs = [ends[1]]
    program = lite_program(graph, QuantPlan("lite_arm", "Net"), 2, FLOAT_FILE)
    (found,) = simulated(program, maps())
    np.testing.assert_array_equal(found, maps() if ends[0] == "x" else np.abs(maps()))
    assert [step.op for step in program.steps].count("Reshape") == (ends[0] == "x")


class Mended(nn.Cell):
    """A normalisation between int8 layers, a transposed convolution, and a map of one channel that is normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.up = nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6), nn.Conv2dTranspose(6, 6, 2, 2)
        self.last, self.single, self.tail = nn.Conv2d(6, 1, 1), nn.BatchNorm2d(1), nn.Conv2d(1, 2, 1)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = ops.relu(self.norm(self.first(x)))
        return self.tail(self.single(ops.relu(self.last(self.up(x)))))


def planned(rules: tuple[Rule, ...] = ()) -> tuple[Graph, QuantPlan]:
    graph = captured(Mended())
    plan = make_plan(graph, QuantConfig(act_observer="minmax"), rules)
    names = [group.name for group in plan.groups.values()]
    values = answers(to_cell(graph, Hooks(observe=names)), maps(8))[len(graph.outputs) :]
    return graph, plan.with_ranges({name: (float(v.min()), float(v.max())) for name, v in zip(names, values)})


def test_between_int8_layers(tmp_path) -> None:  # type: ignore[no-untyped-def]
    graph, plan = planned()
    assert {node.op for node in plan.nodes if node.precision == "int8"} >= {"Conv2D", "BatchNorm"}
    (found,) = simulated(lite_program(graph, plan, 2), maps())
    cell = quantize_cell(graph, plan)
    cell.set_phase(QUANTIZE)
    (wanted,) = answers(cell, maps())
    assert np.abs(found - wanted).max() <= 4 * np.abs(wanted).max() / 127
    assert export_lite(graph, plan, tmp_path / "marked.mindir").stat().st_size > 0


def test_stored_weights_of_a_transposed_convolution_are_written_as_they_count() -> None:
    graph, plan = planned((Rule("op", "Conv2DTranspose", {"precision": "weight-only"}),))
    assert "up" in plan.stored_weights()
    (found,) = simulated(lite_program(graph, plan, 2, WEIGHT_FILE), maps())
    rounded = graph.copy()
    for name, quant in plan.with_weight_observers(graph).weights.items():
        data = rounded.params[rounded.node(name).inputs[quant.index]]
        data.data = quant.qparams(data.data).fake_quantize(data.data)
    (wanted,) = answers(to_cell(rounded), maps())
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
