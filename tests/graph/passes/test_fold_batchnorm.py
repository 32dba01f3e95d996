from __future__ import annotations

from functools import cache
from typing import Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from msqkd.graph.capture import capture
from msqkd.graph.cell import to_cell
from msqkd.graph.ir import Graph
from msqkd.graph.passes.fold_batchnorm import BATCHNORM_MODES, fold_batchnorm
from msqkd.models.cifar_resnet import CifarResNet

from ..conftest import losses, randomize

MODES = pytest.mark.parametrize("mode", BATCHNORM_MODES)
Network = Callable[..., nn.Cell]


def conv_norm(**settings: object) -> Callable[[], nn.Cell]:
    return lambda: nn.SequentialCell(nn.Conv2d(4, 8, 3, **settings), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())


LAYERS: dict[str, tuple[Callable[[], nn.Cell], tuple[int, ...]]] = {
    "conv": (conv_norm(), (4, 5, 5)),
    "conv_with_bias": (conv_norm(has_bias=True), (4, 5, 5)),
    "grouped": (conv_norm(group=2, has_bias=True), (4, 5, 5)),
    "depthwise": (lambda: nn.SequentialCell(nn.Conv2d(4, 4, 3, group=4), nn.BatchNorm2d(4), nn.Flatten()), (4, 5, 5)),
    "multiplier": (conv_norm(group=4), (4, 5, 5)),
    "dense": (lambda: nn.SequentialCell(nn.Dense(6, 8), nn.BatchNorm1d(8), nn.ReLU()), (6,)),
    "two_norms": (
        lambda: nn.SequentialCell(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.Flatten()),
        (4, 5, 5),
    ),
    "dense_without_bias": (lambda: nn.SequentialCell(nn.Dense(6, 8, has_bias=False), nn.BatchNorm1d(8)), (6,)),
}


def ops_of(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def batch(shape: tuple[int, ...], size: int = 4) -> ms.Tensor:
    return ms.Tensor(np.random.default_rng(1).normal(size=(size, *shape)).astype(np.float32))


@cache
def captured(name: str) -> Graph:
    """A layer's graph, or that of the residual network; no test changes it."""
    make, shape = LAYERS.get(name, (lambda: CifarResNet(1), (3, 32, 32)))
    net = make()
    randomize(net)
    return capture(net, shape)


@MODES
@pytest.mark.parametrize("name", LAYERS)
def test_the_outputs_stay_the_same(name: str, mode: str) -> None:
    graph, shape = captured(name), LAYERS[name][1]
    folded = fold_batchnorm(graph, mode)
    assert ("BatchNorm" in ops_of(folded)) == (mode == "live")
    expected = to_cell(graph)(batch(shape)).asnumpy()
    np.testing.assert_allclose(
        to_cell(folded)(batch(shape)).asnumpy(), expected, rtol=1e-5, atol=1e-5 * abs(expected).max()
    )


@MODES
def test_layers_and_the_values_between_them_keep_their_names(mode: str) -> None:
    graph = captured("residual")
    plain, folded = fold_batchnorm(graph), fold_batchnorm(graph, mode)
    kept = {node.name: node for node in folded.nodes}
    for node in plain.nodes:
        assert kept[node.name].op == node.op
        assert kept[node.name].inputs[0] == node.inputs[0]
    assert plain.outputs == folded.outputs
    assert {v.name for v in plain.activations()} <= {v.name for v in folded.activations()}


def test_the_graph_given_is_left_alone() -> None:
    graph = captured("residual")
    source, weight = to_cell(graph).source, graph.params["conv1.weight"].data.copy()
    for mode in BATCHNORM_MODES:
        fold_batchnorm(graph, mode)
    assert to_cell(graph).source == source
    np.testing.assert_array_equal(graph.params["conv1.weight"].data, weight)


@MODES
def test_the_outputs_of_a_residual_network(mode: str) -> None:
    graph = captured("residual")
    x = batch((3, 32, 32), 2)
    expected = to_cell(graph)(x).asnumpy()
    found = to_cell(fold_batchnorm(graph, mode))(x).asnumpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * abs(expected).max())


@pytest.mark.parametrize("mode", [ms.GRAPH_MODE, ms.PYNATIVE_MODE], ids=["graph", "pynative"])
@pytest.mark.parametrize("name", ["conv_with_bias", "depthwise", "dense", "two_norms"])
def test_live_trains_like_the_network(name: str, mode: int) -> None:
    make, shape = LAYERS[name]
    net = make()
    randomize(net)
    live = to_cell(fold_batchnorm(captured(name), "live"))
    x, y = batch(shape), ms.Tensor([0, 1, 2, 3], ms.int32)
    np.testing.assert_allclose(losses(live, x, y, mode), losses(net, x, y, mode), rtol=1e-4)
    mine = live.parameters_dict()
    for parameter in net.get_parameters():
        np.testing.assert_allclose(mine[parameter.name].asnumpy(), parameter.asnumpy(), rtol=1e-3, atol=1e-4)
    moved = [p for p in net.get_parameters() if p.name.endswith("moving_mean")]
    assert moved


@pytest.mark.parametrize("mode", [ms.GRAPH_MODE, ms.PYNATIVE_MODE], ids=["graph", "pynative"])
def test_freeze_trains_gamma_and_beta_but_no_statistics(mode: int) -> None:
    graph, shape = captured("conv_with_bias"), LAYERS["conv_with_bias"][1]
    cell = to_cell(fold_batchnorm(graph, "freeze"))
    assert {p.name for p in cell.get_parameters()} == {"0.weight", "0.bias", "1.gamma", "1.beta"}
    found = losses(cell, batch(shape), ms.Tensor([0, 1, 2, 3], ms.int32), mode)
    assert found[-1] < found[0]
    for parameter in cell.get_parameters():
        assert not np.array_equal(parameter.asnumpy(), graph.params[parameter.name].data), parameter.name


def test_a_channel_with_gamma_zero() -> None:
    net = conv_norm()()
    randomize(net)
    net[1].gamma.set_data(ms.Tensor(np.array([0, -0.5, 1, 2, 0, 1, 1, -1], np.float32)))
    graph = capture(net, (4, 5, 5))
    expected = to_cell(graph)(batch((4, 5, 5))).asnumpy()
    for mode in BATCHNORM_MODES:
        found = to_cell(fold_batchnorm(graph, mode))(batch((4, 5, 5))).asnumpy()
        assert np.isfinite(found).all(), mode
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * abs(expected).max(), err_msg=mode)


CONV = """
self.conv, self.other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
self.norm, self.twin = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
self.by_batch = nn.BatchNorm2d(3, use_batch_statistics=True)
"""


@pytest.mark.parametrize(
    ("construct", "left"),
    [
        ("return self.norm(self.conv(x) + x)", 1),
        ("return self.norm(x)", 1),
        ("y = self.conv(x)\nreturn self.norm(y) + y", 1),
        ("y = self.conv(x)\nreturn self.norm(y), y", 1),
        ("y = self.conv(x)\nreturn self.norm(y) + self.twin(y)", 2),
        ("return self.norm(self.conv(x)) + self.twin(self.conv(x * 2.0))", 2),
        ("return self.norm(self.conv(x)) + self.norm(self.other(x))", 0),
        ("return self.twin(self.norm(self.conv(x)))", 0),
        ("return self.norm(self.twin(self.norm(self.conv(x))))", 0),
        ("y = self.norm(self.conv(x))\nreturn self.twin(y) + y", 1),
        ("return self.twin(self.by_batch(self.norm(self.conv(x))))", 2),
    ],
    ids=[
        "add",
        "input",
        "two_readers",
        "output",
        "two_norms",
        "shared_weight",
        "shared_norm",
        "two_in_a_row",
        "three_in_a_row",
        "read_between",
        "by_batch_between",
    ],
)
def test_what_cannot_be_folded_stays(network: Network, construct: str, left: int) -> None:
    net = network(construct, CONV)
    randomize(net)
    graph = capture(net, (3, 4, 4))
    untouched = ops_of(fold_batchnorm(graph)).count("BatchNorm")
    assert untouched == left
    expected = to_cell(graph)(batch((3, 4, 4)))
    for mode in BATCHNORM_MODES:
        found = to_cell(fold_batchnorm(graph, mode))(batch((3, 4, 4)))
        for one, other in zip(*(r if isinstance(r, tuple) else (r,) for r in (expected, found))):
            np.testing.assert_allclose(other.asnumpy(), one.asnumpy(), rtol=1e-4, atol=1e-5, err_msg=mode)


def test_a_parameter_that_has_the_name_of_the_new_bias_keeps_its_values() -> None:
    class Layer(nn.Cell):
        """Adds a bias of its own behind the BatchNorm."""

        def __init__(self) -> None:
            super().__init__()
            rng = np.random.default_rng(0)
            self.weight = ms.Parameter(ms.Tensor(rng.normal(size=(4, 3, 3, 3)).astype(np.float32)))
            self.bias = ms.Parameter(ms.Tensor(rng.normal(size=(4, 1, 1)).astype(np.float32)))
            self.norm = nn.BatchNorm2d(4)

        def construct(self, x):  # type: ignore[no-untyped-def]
            return self.norm(ops.conv2d(x, self.weight)) + self.bias

    net = nn.SequentialCell(Layer(), nn.ReLU())
    randomize(net)
    net.set_train(False)
    x = ms.Tensor(np.random.default_rng(1).normal(size=(2, 3, 5, 6)).astype(np.float32))
    captured_graph, expected = capture(net, (3, 5, 6)), net(x).asnumpy()
    for mode in BATCHNORM_MODES:
        graph = fold_batchnorm(captured_graph, mode)
        graph.check()
        assert graph.params["0.bias"].data.shape == (4, 1, 1)
        np.testing.assert_allclose(to_cell(graph)(x).asnumpy(), expected, rtol=1e-4, atol=1e-5, err_msg=mode)


def test_an_unknown_mode() -> None:
    with pytest.raises(ValueError, match="batchnorm mode 'frozen' is not one of fold, freeze, live"):
        fold_batchnorm(Graph("Net"), "frozen")
