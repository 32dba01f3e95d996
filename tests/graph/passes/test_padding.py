from __future__ import annotations

from typing import Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from msqkd.graph.capture import capture
from msqkd.graph.cell import to_cell
from msqkd.graph.ir import Graph
from msqkd.graph.passes.padded_pools import find_padded_pools
from msqkd.graph.passes.padding import fold_padding
from msqkd.graph.passes.patterns import find_patterns

Network = Callable[..., nn.Cell]
X = np.random.default_rng(0).normal(size=(2, 3, 10, 12)).astype(np.float32)


def compare(net: nn.Cell, graph: Graph, tolerance: float = 0.0) -> None:
    graph.check()
    expected, found = net(ms.Tensor(X)).asnumpy(), to_cell(graph)(ms.Tensor(X)).asnumpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("pad_mode", ["valid", "pad"])
@pytest.mark.parametrize("pad", ["nn.Pad(((0, 0), (0, 0), (1, 2), (0, 3)))", "nn.ZeroPad2d((0, 3, 1, 2))"])
def test_a_convolution_takes_the_padding_in(network: Network, pad: str, pad_mode: str) -> None:
    more = ", padding=(1, 0, 2, 1)" if pad_mode == "pad" else ""
    net = network(
        "return self.conv(self.pad(x))",
        f"self.pad = {pad}\nself.conv = nn.Conv2d(3, 4, 3, 2, pad_mode='{pad_mode}'{more})",
    )
    graph = capture(net, X.shape[1:])
    fold_padding(graph)
    assert [node.op for node in graph.nodes] == ["Conv2D"]
    assert graph.nodes[0].attrs["pad"] == ((2, 2, 2, 4) if pad_mode == "pad" else (1, 2, 0, 3))
    compare(net, graph, 1e-5)


@pytest.mark.parametrize(
    "layers",
    [
        "self.pad = nn.ConstantPad2d(1, 0.5)\nself.conv = nn.Conv2d(3, 4, 3, pad_mode='valid')",
        "self.pad = nn.ReflectionPad2d(1)\nself.conv = nn.Conv2d(3, 4, 3, pad_mode='valid')",
        "self.pad = nn.Pad(((0, 0), (1, 0), (0, 0), (0, 0)))\nself.conv = nn.Conv2d(4, 4, 3, pad_mode='valid')",
        "self.pad = nn.ZeroPad2d(1)\nself.conv = nn.Conv2d(3, 4, 3, pad_mode='same')",
    ],
    ids=["a number", "reflection", "channels", "same"],
)
def test_other_paddings_stay(network: Network, layers: str) -> None:
    graph = capture(network("return self.conv(self.pad(x))", layers), X.shape[1:])
    operations = [node.op for node in graph.nodes]
    fold_padding(graph)
    assert [node.op for node in graph.nodes] == operations


@pytest.mark.parametrize(
    ("layer", "op"),
    [
        ("nn.MaxPool2d(3, 2, pad_mode='pad', padding=1)", "MaxPool"),
        ("nn.MaxPool2d((3, 2), 2, pad_mode='pad', padding=(1, 0), ceil_mode=True)", "MaxPool"),
        ("nn.AvgPool2d(3, 2, pad_mode='pad', padding=1, count_include_pad=False)", "AvgPool"),
    ],
)
def test_a_pooling_with_padding_is_one_node(network: Network, layer: str, op: str) -> None:
    net = network("return self.pool(x)", f"self.pool = {layer}")
    graph = capture(net, X.shape[1:])
    assert find_padded_pools(graph) == 1
    (pool,) = graph.nodes
    assert (pool.name, pool.op, pool.attrs["pad_mode"], pool.inputs) == ("pool", op, "PAD", ["x"])
    assert pool.attrs["ceil_mode"] == ("ceil_mode" in layer)
    assert pool.attrs["pad"] == ((1, 1, 0, 0) if "(1, 0)" in layer else (1, 1, 1, 1))
    compare(net, graph)


def test_a_maximum_whose_places_nobody_asks_for(network: Network) -> None:
    net = network("return ops.max_pool2d(x, (3, 5), (2, 1), padding=(0, 2))")
    graph = capture(net, X.shape[1:])
    assert find_padded_pools(graph) == 1
    (pool,) = graph.nodes
    assert (pool.op, pool.outputs, pool.attrs["pad"]) == ("MaxPool", graph.outputs, (0, 0, 2, 2))
    compare(net, graph)
    asked = network("y, i = ops.max_pool2d(x, 3, 2, padding=1, return_indices=True)\nreturn y + i.astype(ms.float32)")
    assert find_padded_pools(capture(asked, X.shape[1:])) == 0


@pytest.mark.parametrize("options", ["3, 2, padding=1", "2, 2, padding=1, ceil_mode=True", "3, 1, padding=(1, 0)"])
def test_an_average_that_counts_its_zeros_is_a_padding_and_an_average(network: Network, options: str) -> None:
    net = network("return self.pool(x)", f"self.pool = nn.AvgPool2d({options}, pad_mode='pad')")
    graph = capture(net, X.shape[1:])
    assert find_padded_pools(graph) == 1
    assert [(node.name, node.op, node.cell_path) for node in graph.nodes] == [
        ("pool.pad", "Pad", "pool"),
        ("pool", "AvgPool", "pool"),
    ]
    compare(net, graph)


def test_pools_of_one_value(network: Network) -> None:
    layers = (
        "self.one = nn.AvgPool2d(3, 2, pad_mode='pad', padding=1)\n"
        "self.two = nn.AvgPool2d(5, 2, pad_mode='pad', padding=2)\n"
        "self.three = nn.MaxPool2d(3, 2, pad_mode='pad', padding=1)"
    )
    net = network("return self.one(x) + self.two(x) + self.three(x)", layers)
    graph = capture(net, X.shape[1:])
    assert find_padded_pools(graph) == 3
    assert [node.name for node in graph.nodes] == ["one.pad", "one", "two.pad", "two", "add", "three", "add_1"]
    compare(net, graph)


def test_an_average_over_windows_beyond_its_zeros_stays_one_node(network: Network) -> None:
    layer = "self.pool = nn.AvgPool2d(3, 2, pad_mode='pad', padding=1, ceil_mode=True)"
    net = network("return self.pool(x)", layer)
    graph = capture(net, X.shape[1:])
    find_padded_pools(graph)
    assert [(node.op, node.attrs["count_include_pad"]) for node in graph.nodes] == [("AvgPool", True)]
    compare(net, graph)


def test_zeros_around_a_map_without_negative_numbers(network: Network) -> None:
    layers = "self.pad = nn.ZeroPad2d(1)\nself.pool = nn.MaxPool2d(3, 2)"
    net = network("return self.pool(self.pad(ops.relu(x)))", layers)
    graph = capture(net, X.shape[1:])
    find_patterns(graph)
    assert [node.op for node in graph.nodes] == ["ReLU", "MaxPool"]
    assert graph.nodes[1].attrs["pad"] == (1, 1, 1, 1)
    compare(net, graph)
    signed = capture(network("return self.pool(self.pad(x))", layers), X.shape[1:])
    assert find_padded_pools(signed) == 0


def test_zeros_that_fill_a_whole_window_stay(network: Network) -> None:
    layers = "self.pad = nn.ZeroPad2d(2)\nself.pool = nn.MaxPool2d(2, 2)"
    graph = capture(network("return self.pool(self.pad(ops.relu(x)))", layers), X.shape[1:])
    assert find_padded_pools(graph) == 0
