from __future__ import annotations

from typing import Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from msqkd.graph.capture import capture
from msqkd.graph.cell import to_cell
from msqkd.graph.ir import Graph
from msqkd.models.lenet5 import LeNet5

Network = Callable[..., nn.Cell]


def ops_of(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def test_biases_belong_to_their_layers_and_flatten_is_a_reshape() -> None:
    graph = capture(LeNet5(), (1, 32, 32))
    convolution, dense, reshape = graph.node("conv1"), graph.node("fc1"), graph.node("flatten")
    assert (convolution.op, convolution.inputs[1:]) == ("Conv2D", ["conv1.weight", "conv1.bias"])
    assert (dense.op, dense.inputs[1:]) == ("Dense", ["fc1.weight", "fc1.bias"])
    assert (reshape.op, graph.const(reshape.inputs[1])) == ("Reshape", (-1, 400))
    assert not {"BiasAdd", "MatMul", "Flatten"}.intersection(ops_of(graph))


def test_a_bias_of_its_own_stays(network: Network) -> None:
    # the convolution's output is needed without the bias, too
    net = network(
        "y = self.conv(x)\nreturn ops.bias_add(y, self.bias) * y",
        "self.conv = nn.Conv2d(3, 3, 1)\nself.bias = ms.Parameter(np.ones(3, np.float32))",
    )
    assert "BiasAdd" in ops_of(capture(net, (3, 4, 4)))


def test_arguments_that_were_words_are_words_again(network: Network) -> None:
    net = network("return ms.mint.div(x, 0.3, rounding_mode='floor') - ms.mint.div(x, x + 2.0, rounding_mode='trunc')")
    graph, x = capture(net, (4,)), ms.Tensor(np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4))
    np.testing.assert_array_equal(to_cell(graph)(x).asnumpy(), net(x).asnumpy())
    for kind in ("none", "tanh"):
        graph = capture(network(f"return ms.mint.nn.functional.gelu(x, approximate='{kind}')"), (4,))
        assert graph.const(graph.nodes[0].inputs[1]) == kind


def test_products_of_activations_are_no_layers(network: Network) -> None:
    net = network("return ops.matmul(x, x.swapaxes(-1, -2))")
    assert "Dense" not in ops_of(capture(net, (3, 4)))


@pytest.mark.parametrize(
    ("expression", "op"),
    [
        ("ms.mint.add(x, x)", "Add"),
        ("ms.mint.sub(x, x)", "Sub"),
        ("x < 0.5", "Less"),
        ("x // 2.0", "FloorDiv"),
        ("x % 3.0", "FloorMod"),
    ],
)
def test_special_forms_become_plain_ones(network: Network, expression: str, op: str) -> None:
    assert ops_of(capture(network(f"return {expression}"), (4,))) == [op]


@pytest.mark.parametrize(
    ("expression", "op"),
    [
        ("mint.mean(x, dim=(2, 3))", "ReduceMean"),
        ("mint.mean(x, dim=-1, keepdim=True)", "ReduceMean"),
        ("mint.sum(x, dim=1)", "ReduceSum"),
        ("mint.sum(x, dim=1, dtype=ms.float64)", "SumExt"),
    ],
)
def test_reductions_of_mint_are_the_ordinary_ones(network: Network, expression: str, op: str) -> None:
    net = network(f"return {expression}")
    graph = capture(net, (3, 4, 4))
    assert ops_of(graph) == [op]
    x = ms.Tensor(np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32))
    np.testing.assert_array_equal(to_cell(graph)(x).asnumpy(), net(x).asnumpy())


def test_an_addition_with_a_factor_stays(network: Network) -> None:
    assert ops_of(capture(network("return ms.mint.add(x, x, alpha=2)"), (4,))) == ["AddExt"]


@pytest.mark.parametrize(
    ("expression", "shape"),
    [
        ("x.reshape(x.shape[0], -1)", (-1, 24)),
        ("x.reshape(x.shape[0], 4, -1)", (-1, 4, 6)),
        ("x.reshape(x.shape[0], 6, 4)", (-1, 6, 4)),
        ("x.reshape(x.shape[0], x.shape[1] * x.shape[2], -1)", (-1, 6, 4)),
    ],
)
def test_a_shape_with_the_batch_size_is_a_literal(network: Network, expression: str, shape: tuple[int, ...]) -> None:
    graph = capture(network(f"return {expression}"), ms.Tensor(np.zeros((1, 2, 3, 4), np.float32)))
    assert ops_of(graph) == ["Reshape"]
    assert graph.const(graph.nodes[0].inputs[1]) == shape
    assert graph.shape(graph.outputs[0]) == shape
