from __future__ import annotations

from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from msqkd.errors import CaptureError
from msqkd.graph.capture import capture
from msqkd.graph.cell import Hooks, read_parameters, to_cell
from msqkd.graph.ir import Graph, Node, TensorType, Value
from msqkd.models.lenet5 import LeNet5

MODES = pytest.mark.parametrize("mode", [ms.GRAPH_MODE, ms.PYNATIVE_MODE], ids=["graph", "pynative"])
X = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)


class Scale(nn.Cell):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def construct(self, x: Any) -> Any:
        return x * self.factor


class ScaleParameter(nn.Cell):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = ms.Parameter(ms.Tensor(np.float32(factor)), name="factor")

    def construct(self, x: Any) -> Any:
        return x * self.factor


class Base(nn.Cell):
    """A base class of a generated cell."""

    def greet(self) -> str:
        return "hello"


@pytest.fixture
def graph(network: Callable[..., nn.Cell]) -> Graph:
    """h = tanh(x); (h + x, sigmoid(h))."""
    return capture(network("h = ops.tanh(x)\nreturn h + x, ops.sigmoid(h)"), (4,))


def test_the_source_can_be_read() -> None:
    cell = to_cell(capture(LeNet5(), (1, 32, 32)))
    lines = [line.strip() for line in cell.source.splitlines()]
    assert "class LeNet5(Base):" in lines
    assert "# conv1 (LeNet5/Conv2d)" in lines
    assert lines[lines.index("# relu (LeNet5/ReLU)") + 1] == "relu_relu = self.op_relu(conv1_biasadd)"
    assert sum(line.startswith("#") for line in lines) == len(cell.graph.nodes)
    compile(cell.source, "cell", "exec")


@MODES
def test_a_value_hook_changes_every_reader(graph: Graph, mode: int) -> None:
    ms.set_context(mode=mode)
    h = graph.node("tanh").output
    total, sigmoid = to_cell(graph, Hooks(values={h: Scale(2.0)}))(ms.Tensor(X))
    np.testing.assert_allclose(total.asnumpy(), 2 * np.tanh(X) + X, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(sigmoid.asnumpy(), 1 / (1 + np.exp(-2 * np.tanh(X))), rtol=1e-6)


def test_a_hook_on_an_input(graph: Graph) -> None:
    total, _ = to_cell(graph, Hooks(values={"x": Scale(0.5)}))(ms.Tensor(X))
    np.testing.assert_allclose(total.asnumpy(), np.tanh(X / 2) + X / 2, rtol=1e-6, atol=1e-6)


@MODES
def test_an_edge_hook_changes_one_input(graph: Graph, mode: int) -> None:
    ms.set_context(mode=mode)
    total, sigmoid = to_cell(graph, Hooks(edges={("add", 0): Scale(2.0)}))(ms.Tensor(X))
    np.testing.assert_allclose(total.asnumpy(), 2 * np.tanh(X) + X, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(sigmoid.asnumpy(), 1 / (1 + np.exp(-np.tanh(X))), rtol=1e-6)


@MODES
def test_observed_values_come_after_the_outputs_as_they_were_before_their_hook(graph: Graph, mode: int) -> None:
    ms.set_context(mode=mode)
    h = graph.node("tanh").output
    results = to_cell(graph, Hooks(values={h: Scale(2.0)}, observe=[h, "x"]))(ms.Tensor(X))
    assert len(results) == 4
    np.testing.assert_allclose(results[2].asnumpy(), np.tanh(X), rtol=1e-6)
    np.testing.assert_array_equal(results[3].asnumpy(), X)


def test_the_base_class_is_used(graph: Graph) -> None:
    cell = to_cell(graph, base=Base)
    assert isinstance(cell, Base)
    assert cell.greet() == "hello"
    assert cell.graph is graph
    assert not cell.training


def test_parameters_are_read_back() -> None:
    graph = capture(LeNet5(), (1, 32, 32))
    cell = to_cell(graph)
    for parameter in cell.get_parameters():
        parameter.set_data(ms.ops.ones_like(parameter) * 3)
    read_parameters(cell, graph)
    assert all((held.data == 3).all() for held in graph.params.values())
    np.testing.assert_array_equal(to_cell(graph).conv1_weight.asnumpy(), 3)


def test_a_cell_does_not_share_its_parameters_with_the_graph() -> None:
    graph = capture(LeNet5(), (1, 32, 32))
    before = graph.params["conv1.bias"].data.copy()
    to_cell(graph).conv1_bias.set_data(ms.Tensor(before + 1))
    np.testing.assert_array_equal(graph.params["conv1.bias"].data, before)


def test_a_shared_cell_has_the_arrays_of_the_graph() -> None:
    graph = capture(LeNet5(), (1, 32, 32))
    cell = to_cell(graph, shared=True)
    assert {p.name: p.requires_grad for p in cell.get_parameters()} == {
        name: held.trainable for name, held in graph.params.items()
    }
    assert all(np.shares_memory(p.asnumpy(), graph.params[p.name].data) for p in cell.get_parameters())


def test_names_that_differ_in_punctuation_only_stay_apart() -> None:
    graph = Graph("Net")
    graph.inputs = [graph.add_value(Value("x", "input", TensorType((-1, 4))))]
    for name, value in (("a.b", 2.0), ("a_b", 3.0), ("training", 5.0), ("graph", 7.0)):
        graph.add_param(name, np.full(4, value, np.float32))
    names = ["h.1", "h_1", "self", "op_n"]
    source = "x"
    for index, (param, name) in enumerate(zip(graph.params, names)):
        graph.add_value(Value(name, "node", TensorType((-1, 4))))
        graph.nodes.append(Node(f"n.{index}" if index else "n_1", "Mul" if index else "Add", [source, param], [name]))
        source = name
    graph.nodes.append(Node("last", "Add", ["op_n", "h.1"], [graph.add_value(Value("out", "node"))]))
    graph.outputs = ["out"]
    graph.check()
    cell = to_cell(graph)
    h = X + 2
    np.testing.assert_array_equal(cell(ms.Tensor(X)).asnumpy(), h * 3 * 5 * 7 + h)
    assert {p.name for p in cell.get_parameters()} == set(graph.params)
    assert cell.training is False


def test_hooks_of_nodes_that_differ_in_punctuation_or_script_only_stay_apart() -> None:
    """Every hook has an attribute of its own, which MindSpore takes as the beginning of a parameter's name."""
    graph = Graph("网络")
    graph.inputs = [graph.add_value(Value("输入", "input", TensorType((-1, 4))))]
    names = ["a.b", "a_b", "a_b_1", "__a", "层", "层2"]
    graph.add_param("权重", np.ones(4, np.float32))
    source, factor = "输入", 1.0
    edges, values = {}, {}
    for index, name in enumerate(names):
        graph.add_value(Value(f"h{'.' * index}", "node", TensorType((-1, 4))))
        graph.nodes.append(Node(name, "Mul", [source, "权重"], [f"h{'.' * index}"]))
        source = f"h{'.' * index}"
        edges[name, 1], values[source] = ScaleParameter(index + 2), ScaleParameter(0.5)
        factor *= (index + 2) * 0.5
    graph.outputs = [source]
    graph.check()
    cell = to_cell(graph, Hooks(edges=edges, values=values))
    np.testing.assert_allclose(cell(ms.Tensor(X)).asnumpy(), X * factor, rtol=1e-6)
    assert len({p.name for p in cell.get_parameters()}) == 1 + 2 * len(names)
    assert [n for n, _ in cell.cells_and_names() if n.startswith("quant_a_b")] == [
        "quant_a_b_input1", "quant_a_b_1_input1", "quant_a_b_1_1_input1"
    ]  # fmt: skip


@MODES
def test_literals_python_cannot_spell(network: Callable[..., nn.Cell], mode: int) -> None:
    net = network("return ops.masked_fill(x, x > 0, float('-inf'))")
    cell = to_cell(capture(net, (4,)))
    ms.set_context(mode=mode)
    np.testing.assert_array_equal(cell(ms.Tensor(X)).asnumpy(), net(ms.Tensor(X)).asnumpy())


def test_an_unknown_data_type() -> None:
    graph = Graph("Net")
    graph.inputs = [graph.add_value(Value("x", "input", TensorType((-1, 4))))]
    graph.outputs = [graph.add_value(Value("y", "node"))]
    graph.nodes = [Node("cast", "Cast", ["x", graph.add_const(99)], ["y"])]
    with pytest.raises(CaptureError, match=r"Net: 'cast' casts to a data type msqkd does not know \(number 99\)"):
        to_cell(graph)
