from __future__ import annotations

from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mindspore import nn

from msqkd.graph.capture import capture
from msqkd.graph.cell import Hooks, to_cell
from msqkd.graph.ir import Graph, Node, TensorType, Value
from msqkd.graph.passes.activations import find_activations

Network = Callable[..., nn.Cell]
X = np.linspace(-6, 6, 48, dtype=np.float32).reshape(2, 3, 8)

SPELLINGS = {
    "x * 0.5 * (1 + ops.erf(x / 1.4142135))": ("GeluExt", {"approximate": "none"}),
    "(1.0 + ops.erf(x * 0.70710678)) * (x / 2)": ("GeluExt", {"approximate": "none"}),
    "0.5 * x * (1 + ops.tanh(0.7978845608 * (x + 0.044715 * x * x * x)))": ("GeLU", {}),
    "x * ops.sigmoid(x)": ("SiLU", {}),
    "x * ops.relu6(x + 3) / 6": ("HSwish", {}),
    "x * (ops.clamp(x + 3.0, 0, 6) / 6.0)": ("HSwish", {}),
    "ops.relu6(x + 3.0) / 6.0": ("HSigmoid", {}),
    "ops.maximum(x, 0.2 * x)": ("LeakyReLU", {"alpha": 0.2}),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_spelling_is_found_and_not_a_bit_changes(network: Network, spelling: str) -> None:
    net = network(f"y = x - 0.5\nx = ops.tanh(y) * 4.0\nreturn {spelling}")
    graph = capture(net, (3, 8))
    before = to_cell(graph)
    assert find_activations(graph) == 1
    graph.check()
    op, attrs = SPELLINGS[spelling]
    found = graph.nodes[-1]
    assert (found.op, found.attrs, len(found.inputs)) == (op, attrs, 1)
    assert [node.op for node in graph.nodes[:-1]] == ["Sub", "Tanh", "Muls"]
    cell = to_cell(graph.copy())
    for mode in (ms.GRAPH_MODE, ms.PYNATIVE_MODE):
        ms.set_context(mode=mode)
        np.testing.assert_array_equal(before(ms.Tensor(X)).asnumpy(), cell(ms.Tensor(X)).asnumpy())


@pytest.mark.parametrize(
    "construct",
    [
        "s = ops.sigmoid(x)\nreturn x * s, s",
        "return x * ops.sigmoid(x * 1.1)",
        "return x * ops.relu6(x + 3) * 0.16",
        "return ops.maximum(x, 1.5 * x)",
        "return ops.maximum(x, 0.1 * x + 0.01)",
    ],
    ids=["read elsewhere", "other argument", "other factor", "slope above one", "offset"],
)
def test_what_is_not_one_stays(network: Network, construct: str) -> None:
    graph = capture(network(construct), (3, 8))
    names = [node.name for node in graph.nodes]
    assert find_activations(graph) == 0
    assert [node.name for node in graph.nodes] == names


def test_the_cell_of_a_layer_gives_its_name() -> None:
    net = nn.SequentialCell(nn.Dense(4, 4), nn.GELU(approximate=False), nn.Dense(4, 4), nn.LeakyReLU(0.1))
    graph = capture(net, (4,))
    assert find_activations(graph) == 2
    assert [(node.name, node.op) for node in graph.nodes if node.op != "Dense"] == [
        ("1", "GeluExt"),
        ("3", "LeakyReLU"),
    ]


def test_a_hook_on_its_input_acts_on_the_whole_function(network: Network) -> None:
    class Double(nn.Cell):
        def construct(self, x: Any) -> Any:
            return x * 2.0

    graph = capture(network("return x * ops.sigmoid(x)"), (3, 8))
    find_activations(graph)
    y = to_cell(graph, Hooks(edges={(graph.nodes[0].name, 0): Double()}))(ms.Tensor(X)).asnumpy()
    np.testing.assert_allclose(y, 2 * X / (1 + np.exp(-2 * X)), rtol=1e-5, atol=1e-6)


@given(st.floats(1e-3, 0.999).map(np.float32))
def test_any_slope_below_one_is_read_to_its_last_digit(alpha: np.float32) -> None:
    graph = Graph("Net")
    kind = TensorType((-1, 4))
    graph.inputs = [graph.add_value(Value("x", "input", kind))]
    for name in ("low", "y"):
        graph.add_value(Value(name, "node", kind))
    slope = graph.add_const(np.array(alpha))
    graph.nodes = [Node("mul", "Mul", ["x", slope], ["low"]), Node("max", "Maximum", ["low", "x"], ["y"])]
    graph.outputs = ["y"]
    assert find_activations(graph) == 1
    assert np.float32(graph.nodes[0].attrs["alpha"]) == alpha
