from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from msqkd.graph.capture import capture
from msqkd.graph.cell import Hooks, to_cell
from msqkd.graph.half import AMP_LEVELS, half_precision
from msqkd.quant.config import QuantConfig
from msqkd.quant.fake_quant import OBSERVE, QUANTIZE
from msqkd.quant.placement import make_plan
from msqkd.quant.qat import deployment_graph, quantize_cell, training_graph

pytestmark = pytest.mark.usefixtures("graph_mode")
X = np.random.default_rng(0).normal(size=(4, 2, 6, 6)).astype(np.float32)


class Net(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn, self.relu = nn.Conv2d(2, 4, 3, has_bias=True), nn.BatchNorm2d(4), nn.ReLU()
        self.second, self.fc = nn.Conv2d(4, 4, 1), nn.Dense(4, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        y = self.relu(self.bn(self.first(x)))
        return self.fc(ops.mean(self.relu(self.second(y)) + y, (2, 3)))


class Gradients(nn.Cell):
    def __init__(self, net: nn.Cell) -> None:
        super().__init__()
        self.net, self.grad = net, ops.GradOperation(get_by_list=True)
        self.weights = ms.ParameterTuple(net.trainable_params())

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.grad(self.net, self.weights)(x)


class Noted(nn.Cell):
    """Passes float32 on and nothing else."""

    def construct(self, x):  # type: ignore[no-untyped-def]
        return ops.matmul(x.reshape(1, -1), ops.ones((x.size, 1), ms.float32)).reshape(()) * 0 + x


@pytest.fixture(scope="module")
def graph() -> Any:
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_seed(0)  # with some weights a sum so near zero that float16 rounds it across changes a gradient
    return capture(Net(), (2, 6, 6))


@pytest.mark.parametrize(
    ("level", "half", "back"),
    [
        ("O0", {}, set()),
        ("O1", {"first": 3, "second": 2, "fc": 3}, {"first", "second", "fc"}),
        # Between second, relu_1 and add nothing is cast, since all of them compute in float16.
        ("O2", {"first": 3, "relu": 1, "second": 1, "fc": 3}, {"first", "add", "fc"}),
        ("O3", {"first": 3, "second": 1, "fc": 2}, {"fc"}),
    ],
)
def test_each_level_casts_what_it_computes_in_float16(
    graph: Any, level: str, half: dict[str, int], back: set[str]
) -> None:
    hooks = half_precision(graph, level, Hooks())
    counts: dict[str, int] = {}
    for name, _ in hooks.arguments:
        counts[name] = counts.get(name, 0) + 1
    assert counts == half
    assert {node.name for node in graph.nodes if node.output in hooks.results} == back


@pytest.mark.parametrize("batchnorm", ["freeze", "live"])
def test_arithmetic_on_weights_stays_float32(graph: Any, batchnorm: str) -> None:
    trained = training_graph(graph, batchnorm)
    hooks = half_precision(trained, "O3", Hooks())
    cast = {name for name, _ in hooks.arguments}
    assert "first" in cast
    assert {"bn.g", "bn.weight"} <= {node.name for node in trained.nodes} - cast
    assert not {trained.node(name).output for name in ("bn.g", "bn.weight")} & set(hooks.results)


@pytest.mark.parametrize("level", AMP_LEVELS)
def test_what_comes_out_is_float32_and_evaluation_is_exact(graph: Any, level: str) -> None:
    plain, cell = to_cell(graph), to_cell(graph, half_precision(graph, level, Hooks()))
    inputs = ms.Tensor(X)
    np.testing.assert_array_equal(cell(inputs).asnumpy(), plain(inputs).asnumpy())
    cell.set_train()
    plain.set_train()
    exact, found = plain(inputs), cell(inputs)
    assert found.dtype == ms.float32
    difference = np.abs(found.asnumpy() - exact.asnumpy()).max()
    assert (difference > 0) == (level != "O0")
    assert difference <= 4e-3 * np.abs(exact.asnumpy()).max()
    for wanted, gradient, weight in zip(Gradients(plain)(inputs), Gradients(cell)(inputs), cell.trainable_params()):
        assert (gradient.dtype, weight.dtype) == (ms.float32, ms.float32)
        largest = np.abs(wanted.asnumpy()).max()  # that of a bias before a BatchNorm is 0 but for rounding
        np.testing.assert_allclose(gradient.asnumpy(), wanted.asnumpy(), atol=2e-2 * largest + 1e-4)


def test_a_product_is_that_of_float16_numbers(graph: Any) -> None:
    cell = to_cell(graph, half_precision(graph, "O1", Hooks(observe=(graph.node("first").output,))))
    cell.set_train()
    found = cell(ms.Tensor(X))[1]
    assert found.dtype == ms.float32
    weight, bias = (graph.params[f"first.{name}"].data.astype(np.float16) for name in ("weight", "bias"))
    padded = np.pad(X.astype(np.float16), ((0, 0), (0, 0), (1, 1), (1, 1))).astype(np.float64)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    product = np.einsum("nchwij,ocij->nohw", windows, weight.astype(np.float64)).astype(np.float16)
    expected = (product + bias.reshape(1, -1, 1, 1)).astype(np.float16)
    assert (found.asnumpy() == found.asnumpy().astype(np.float16)).all()
    np.testing.assert_allclose(found.asnumpy(), expected.astype(np.float32), atol=2e-3)


@pytest.mark.parametrize("level", ["O1", "O3"])
def test_a_quantiser_sees_float32(graph: Any, level: str) -> None:
    """On a value, on an edge and on a weight: `Noted` multiplies with float32, which float16 refuses."""
    first, second = graph.node("first"), graph.node("second")
    noted = Noted()
    edges = {("second", 0): noted, ("second", 1): noted, ("fc", 0): noted}
    hooks = half_precision(graph, level, Hooks({first.output: noted}, edges, (second.output,)))
    assert {("second", 0), ("second", 1), ("fc", 0)} <= set(hooks.arguments)
    assert {first.output, second.output} <= set(hooks.results)
    cell = to_cell(graph, hooks)
    cell.set_train()
    answers, observed = cell(ms.Tensor(X))
    assert (answers.dtype, observed.dtype) == (ms.float32, ms.float32)


def test_a_quantised_cell_keeps_its_state_in_float32(graph: Any) -> None:
    plan = make_plan(deployment_graph(graph), QuantConfig())
    cell = quantize_cell(graph, plan, "live", amp_level="O3")
    exact = quantize_cell(graph, plan, "live")
    for each in (cell, exact):
        each.set_phase(OBSERVE)
        each.set_train()
        each(ms.Tensor(X))
    assert {p.dtype for p in cell.get_parameters()} == {p.dtype for p in exact.get_parameters()}
    ranges = cell.ranges()
    assert ranges.keys() == exact.ranges().keys()
    for name, (low, high) in exact.ranges().items():
        assert ranges[name] == pytest.approx((low, high), rel=5e-3, abs=5e-3)
    # The input's range is not rounded to float16: what watches it sits before every cast.
    assert ranges["x"] == exact.ranges()["x"]
    cell.set_phase(QUANTIZE)
    assert all(float(q.scale.asnumpy()) == q.qparams().scale for q in cell.group_quantizers().values())
    answers = cell(ms.Tensor(X))
    assert answers.dtype == ms.float32
    assert np.isfinite(answers.asnumpy()).all()
