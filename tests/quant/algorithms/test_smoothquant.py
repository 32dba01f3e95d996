from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from float_stage import answer, decibels, float_work, quantized
from mindspore import nn, ops

from msqkd.errors import PlanError
from msqkd.graph.cell import Hooks, to_cell
from msqkd.quant.algorithms.base import Work
from msqkd.quant.algorithms.smooth import SmoothQuant
from msqkd.quant.config import QuantConfig
from msqkd.quant.placement import make_plan

pytestmark = pytest.mark.usefixtures("pynative_mode")

X = np.random.default_rng(0).normal(size=(32, 5, 8)).astype(np.float32)


class Block(nn.Cell):
    """Several readers, through a transposition, a slice and a matrix; and a LayerNorm that an addition reads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last, self.relu = nn.LayerNorm((8,)), nn.LayerNorm((8,)), nn.ReLU()
        self.query, self.key, self.out = nn.Dense(8, 8), nn.Dense(8, 8, has_bias=False), nn.Dense(8, 8)
        self.matrix = ms.Parameter(ms.Tensor(np.zeros((8, 8), np.float32)), name="matrix")

    def construct(self, x):  # type: ignore[no-untyped-def]
        y = self.norm(x)
        q, k = self.query(y), self.key(y.transpose(1, 0, 2)).transpose(1, 0, 2)
        first = ops.matmul(y[:, 0], self.matrix)
        z = self.last(self.relu(q + k))
        return self.out(z) + z, first


def work_of(outlier: float = 1.0) -> Work:
    net = Block()
    random = np.random.default_rng(1)
    for parameter in net.get_parameters():
        if parameter.ndim > 1 or "bias" in parameter.name:
            parameter.set_data(ms.Tensor((random.normal(size=parameter.shape) / 3).astype(np.float32)))
    gamma = random.uniform(0.5, 1.5, 8).astype(np.float32)
    gamma[3] *= outlier
    net.norm.gamma.set_data(ms.Tensor(gamma))
    net.norm.beta.set_data(ms.Tensor(np.float32([0, 1, 0, 2, 0, 0, -1, 0])))
    return float_work(_First(net), X)


class _First(nn.Cell):
    """One value of both outputs."""

    def __init__(self, net: nn.Cell) -> None:
        super().__init__()
        self.net = net

    def construct(self, x):  # type: ignore[no-untyped-def]
        whole, first = self.net(x)
        return whole + first.expand_dims(1)


WEIGHTS = {"net.query.weight": 0, "net.key.weight": 0, "net.matrix": 1}  # the axis of outputs


def test_the_scales_are_those_of_the_formula_and_the_outputs_stay() -> None:
    alpha = 0.8
    work = work_of(20.0)
    graph = work.graph.copy()
    before = answer(graph, X)
    value = graph.node("net.norm").output
    shown = to_cell(graph, Hooks(observe=[value]))(ms.Tensor(X))[1].asnumpy()
    weights = {name: graph.params[name].data for name in WEIGHTS}
    weighed = np.max([np.abs(weights[name]).max(axis) for name, axis in WEIGHTS.items()], axis=0)
    scale = np.abs(shown).max((0, 1)) ** alpha / weighed ** (1 - alpha)
    words = SmoothQuant(alpha).apply(work)
    for name in ("net.norm.gamma", "net.norm.beta"):
        np.testing.assert_allclose(work.graph.params[name].data, graph.params[name].data / scale, rtol=1e-6)
    for name, axis in WEIGHTS.items():
        expected = weights[name] * np.expand_dims(scale, axis)
        np.testing.assert_allclose(work.graph.params[name].data, expected, rtol=1e-6)
    assert work.graph.params["net.out.weight"].data is graph.params["net.out.weight"].data
    np.testing.assert_allclose(answer(work.graph, X), before, atol=1e-5 * np.abs(before).max())
    assert words == [
        f"LayerNorms smoothed: 1 (alpha {alpha:g}, factors up to 1:{scale.max() / scale.min():.3g})",
        "not smoothed: net.last (net.add_1 (Add) reads it)",
    ]


def test_an_outlier_channel_costs_less() -> None:
    work = work_of(60.0)
    exact = answer(work.reference, X)
    plain = decibels(quantized(work, X), exact)
    SmoothQuant().apply(work)
    assert decibels(quantized(work, X), exact) > plain + 5


def test_what_is_not_quantised_or_never_read_stays() -> None:
    work = work_of()
    work.plan = make_plan(work.graph, QuantConfig(precision="float"))
    words = SmoothQuant().apply(work)
    assert words[0] == "no LayerNorm is read by quantised layers with weights alone: nothing to smooth"
    work = work_of()
    for name, axis in WEIGHTS.items():  # nobody weighs channel 2
        data = work.graph.params[name].data.copy()
        data[(slice(None),) * (1 - axis) + (2,)] = 0
        work.graph.params[name].data = data
    exact = answer(work.graph, X)
    gamma = work.graph.params["net.norm.gamma"].data
    SmoothQuant().apply(work)
    np.testing.assert_allclose(answer(work.graph, X), exact, atol=1e-5 * np.abs(exact).max())
    factors = gamma / work.graph.params["net.norm.gamma"].data
    np.testing.assert_allclose(factors[2], np.median(np.delete(factors, 2)), rtol=1e-5)


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_alpha(alpha: float) -> None:
    with pytest.raises(PlanError, match=rf"^smoothquant.alpha is {alpha}; allowed: 0 to 1$"):
        SmoothQuant(alpha)
