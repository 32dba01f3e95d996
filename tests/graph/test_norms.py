from __future__ import annotations

from typing import Any, Callable, Optional

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from msqkd.graph.capture import capture
from msqkd.graph.cell import to_cell
from msqkd.graph.norms import BATCH, RUNNING, TRAINING, batch_dependence, statistics_of
from msqkd.graph.passes.batch_statistics import spell_out_statistics
from msqkd.quant.placement import make_plan
from msqkd.quant.qat import deployment_graph

from .conftest import randomize

Network = Callable[..., nn.Cell]
SHAPES = {"1d": (3,), "2d": (3, 4, 5), "3d": (3, 2, 4, 5)}
FUNCTION = """
self.g, self.b = (ms.Parameter(ms.Tensor(np.array(v, np.float32)), name=n) for n, v in
                  (("g", [1, 2, .5]), ("b", [0, 1, 2])))
self.m, self.v = (ms.Parameter(ms.Tensor(np.array(v, np.float32)), name=n, requires_grad=False) for n, v in
                  (("m", [5, 5, 5]), ("v", [2, 2, 2])))
"""


def batch(shape: tuple[int, ...], size: int = 4) -> np.ndarray:
    return (3 * np.random.default_rng(1).normal(size=(size, *shape)) + 2).astype(np.float32)


def normalized(x: np.ndarray, mean: np.ndarray, variance: np.ndarray, norm: nn.Cell) -> np.ndarray:
    column = (1, -1) + (1,) * (x.ndim - 2)
    gamma, beta = norm.gamma.asnumpy().reshape(column), norm.beta.asnumpy().reshape(column)
    return (x - mean.reshape(column)) / np.sqrt(variance.reshape(column) + norm.eps) * gamma + beta


def by_mode(x: np.ndarray, norm: nn.Cell, by_batch: bool) -> np.ndarray:
    """BatchNorm in numpy."""
    axes = tuple(axis for axis in range(x.ndim) if axis != 1)
    if by_batch:
        return normalized(x, x.mean(axes), x.var(axes), norm)
    return normalized(x, norm.moving_mean.asnumpy(), norm.moving_variance.asnumpy(), norm)


@pytest.mark.parametrize("uses", [None, True, False])
@pytest.mark.parametrize("rank", SHAPES)
def test_the_mode_decides(network: Network, rank: str, uses: Optional[bool]) -> None:
    net = network("return self.norm(x)", f"self.norm = nn.BatchNorm{rank}(3, use_batch_statistics={uses})")
    randomize(net)
    norm = net.norm.bn2d if rank == "3d" else net.norm
    x = batch(SHAPES[rank])
    graph = capture(net, SHAPES[rank])
    (node,) = (node for node in graph.nodes if node.op == "BatchNorm")
    assert statistics_of(graph, node) == {None: TRAINING, True: BATCH, False: RUNNING}[uses]
    cell = to_cell(graph)
    moving = [norm.moving_mean.asnumpy(), norm.moving_variance.asnumpy()]
    for training, by_batch in ((False, uses is True), (True, uses is not False)):
        expected = by_mode(x, norm, by_batch)
        cell.set_train(training)
        found = cell(ms.Tensor(x)).asnumpy()
        np.testing.assert_allclose(found, expected, atol=1e-5 * abs(expected).max())
        if not training:  # an evaluation changes no weight
            kept = [cell.parameters_dict()[item.name].asnumpy() for item in (norm.moving_mean, norm.moving_variance)]
            for one, other in zip(kept, moving):
                np.testing.assert_array_equal(one, other)


def test_the_function_by_batch_statistics(network: Network) -> None:
    net = network("return ops.batch_norm(x, self.m, self.v, self.g, self.b, True)", FUNCTION)
    x = batch((3, 4, 5))
    graph = capture(net, (3, 4, 5))
    gamma, beta = (item.asnumpy().reshape(1, 3, 1, 1) for item in (net.g, net.b))
    mean, variance = (item((0, 2, 3), keepdims=True) for item in (x.mean, x.var))
    expected = (x - mean) / np.sqrt(variance + 1e-5) * gamma + beta
    np.testing.assert_allclose(to_cell(graph)(ms.Tensor(x)).asnumpy(), expected, atol=1e-4)


@pytest.mark.parametrize("rank", ["1d", "2d"])
def test_batch_statistics_spelled_out(network: Network, rank: str) -> None:
    net = network("return self.norm(x)", f"self.norm = nn.BatchNorm{rank}(3, use_batch_statistics=True)")
    randomize(net)
    graph = capture(net, SHAPES[rank])
    names = spell_out_statistics(graph)
    assert "norm" in names
    assert all(node.op != "BatchNorm" for node in graph.nodes)
    x = batch(SHAPES[rank])
    expected = by_mode(x, net.norm, True)
    np.testing.assert_allclose(to_cell(graph)(ms.Tensor(x)).asnumpy(), expected, atol=1e-5 * abs(expected).max())


CONV = (
    "self.conv, self.norm, self.fc = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, use_batch_statistics=True), nn.Dense(3, 3)"
)
INSTANCE = """
n, c, h, w = x.shape
zeros, ones = ops.zeros(n * c), ops.ones(n * c)
y = ops.batch_norm(x.reshape(1, n * c, h, w), zeros, ones, ones, zeros, True)
return self.conv(y.reshape(n, c, h, w))
"""


@pytest.mark.parametrize(
    ("construct", "concerned"),
    [
        ("return self.norm(self.conv(x))", "norm"),
        ("return self.conv(x)", None),
        ("return self.conv(x) + ops.arange(x.shape[0]).astype(ms.float32)[:, None, None, None]", "range"),
        ("return self.conv(x) / x.shape[0]", "divs"),
        ("return self.conv(x).reshape(x.shape[0], -1, 2)", None),
        (
            "return self.conv(x) + ops.tile(self.fc.weight.reshape(1, 3, 3, 1), (x.shape[0], 1, 1, 1)).mean(2, True)",
            None,
        ),
        ("return self.conv(x) + ops.zeros((x.shape[0], 3, 1, 1))", None),
    ],
)
def test_what_makes_predictions_depend_on_the_batch(network: Network, construct: str, concerned: Optional[str]) -> None:
    graph = deployment_graph(capture(network(construct, CONV), (3, 4, 4)))
    found: Any = batch_dependence(graph)
    assert (found and found[0].name) == concerned
    warned = [text for text in make_plan(graph).warnings if "depend on its batch" in text]
    assert len(warned) == (concerned is not None)


def test_an_instance_norm_by_a_batch_norm(network: Network) -> None:
    net = network(INSTANCE, CONV)
    randomize(net)
    x = batch((3, 4, 4))
    expected = net.set_train(False)(ms.Tensor(x)).asnumpy()
    found = to_cell(deployment_graph(capture(net, (3, 4, 4))))(ms.Tensor(x)).asnumpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
