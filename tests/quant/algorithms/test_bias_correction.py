from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from float_stage import answer, float_work
from mindspore import nn
from networks import copied

from msqkd.errors import PlanError
from msqkd.graph.cell import Hooks, to_cell
from msqkd.graph.ir import Graph
from msqkd.quant.algorithms.adaround import AdaRound
from msqkd.quant.algorithms.base import Method, Work
from msqkd.quant.algorithms.bias_correction import KINDS, BiasCorrection
from msqkd.quant.algorithms.cluster import Cluster
from msqkd.quant.algorithms.reconstruct import Reconstruct
from msqkd.quant.fake_quant import QUANTIZE, FakeQuantWeight
from msqkd.quant.ptq import calibrate
from msqkd.quant.qat import quantize_cell

pytestmark = pytest.mark.usefixtures("pynative_mode")

X = (np.random.default_rng(0).normal(size=(40, 3, 7, 7)) + 1).astype(np.float32)


class Net(nn.Cell):
    """Padding, stride, dilation, groups, and a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu = nn.Conv2d(3, 6, 3, 2, has_bias=True), nn.ReLU()
        self.second = nn.Conv2d(6, 4, (2, 3), pad_mode="pad", padding=(1, 0, 2, 1), dilation=(2, 1), group=2)
        self.flatten, self.fc = nn.Flatten(), nn.Dense(4 * 3 * 5, 5)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.fc(self.flatten(self.relu(self.second(self.relu(self.first(x))))))


LAYERS = ("first", "second", "fc")


def biased_work() -> Work:
    """Weights that are all rounded to the same side."""
    return copied(_biased())


@cache
def _biased() -> Work:
    net = Net()
    random = np.random.default_rng(2)
    for parameter in net.get_parameters():
        if parameter.ndim > 1:
            steps = random.integers(-7, 8, parameter.shape) + 0.45
            steps.reshape(-1)[0] = 7.0  # fixes the scale where there is one a weight
            parameter.set_data(ms.Tensor((np.minimum(steps, 7) / 40).astype(np.float32)))
    work = float_work(net, X, bits=4)
    work.plan = calibrate(work.graph, work.plan, work.samples())
    return work


def means(work: Work) -> dict[str, np.ndarray]:
    """What the layers give in the mean in the quantised network, before it is rounded."""
    values = [work.graph.node(name).output for name in LAYERS]
    cell = quantize_cell(work.graph, work.plan, observe=values)
    cell.set_phase(QUANTIZE)
    return _means(cell(ms.Tensor(X))[1:])


def float_means(work: Work, hooks: Any = None) -> dict[str, np.ndarray]:
    values = [work.reference.node(name).output for name in LAYERS]
    cell = to_cell(work.reference, Hooks(edges=hooks or {}, observe=values))
    return _means(cell(ms.Tensor(X))[1:])


def _means(found: Any) -> dict[str, np.ndarray]:
    arrays = [value.asnumpy().astype(np.float64) for value in found]
    return {name: a.mean(tuple(i for i in range(a.ndim) if i != 1)) for name, a in zip(LAYERS, arrays)}


def test_empirically_every_layer_gives_the_same_mean_as_in_float() -> None:
    work = biased_work()
    exact, before, output = float_means(work), means(work), answer(work.reference, X)
    steps: list[tuple[int, int]] = []
    work.progress = lambda done, total: steps.append((done, total))
    words = BiasCorrection().apply(work)
    after = means(work)
    for name in LAYERS:
        lost = np.abs(before[name] - exact[name]).max()
        assert lost > 0.02
        np.testing.assert_allclose(after[name], exact[name], atol=2e-3 * lost)
    assert words[0].startswith("biases corrected: 3 (empirical, 40 samples, by ")
    assert steps == [(1, 3), (2, 3), (3, 3)]
    np.testing.assert_array_equal(answer(work.reference, X), output)


def test_analytically_a_layer_gives_the_same_mean_for_the_float_input() -> None:
    work = biased_work()
    exact, before = float_means(work), means(work)
    old = {name: work.graph.params[f"{name}.bias"].data for name in LAYERS}
    rounding = {}
    for name in LAYERS:  # each layer's weight alone is rounded
        quant = work.plan.weights[name]
        edge = {(name, 1): FakeQuantWeight(quant, work.graph.params[f"{name}.weight"].data.shape)}
        rounding[name] = float_means(work, edge)[name] - exact[name]
    words = BiasCorrection(kind="analytic").apply(work)
    for name in LAYERS:
        shift = work.graph.params[f"{name}.bias"].data - old[name]
        assert np.abs(shift).max() > 0.02
        np.testing.assert_allclose(shift, -rounding[name], rtol=1e-3, atol=1e-5)
    assert words[0].startswith("biases corrected: 3 (analytic, by ")
    assert np.abs(means(work)["fc"] - exact["fc"]).mean() < np.abs(before["fc"] - exact["fc"]).mean() / 2


def test_the_float_network_to_agree_with_is_the_present_one() -> None:
    """Another method has doubled the channels between two layers."""
    work = biased_work()
    exact = float_means(work)

    def doubled(graph: Graph) -> None:
        for name, factor in (("first.weight", 2), ("first.bias", 2), ("second.weight", 0.5)):
            graph.params[name].data = graph.params[name].data * np.float32(factor)

    work.rewrite(doubled)
    work.plan = calibrate(work.graph, work.plan, work.samples())
    BiasCorrection().apply(work)
    found = means(work)
    np.testing.assert_allclose(found["first"], 2 * exact["first"], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found["fc"], exact["fc"], rtol=1e-3, atol=1e-4)


ROUNDED: dict[str, Callable[[], Method]] = {
    "adaround": lambda: AdaRound(iterations=60, lr=0.1),
    "reconstruct": lambda: Reconstruct(iterations=60, lr=0.1),
    "cluster": lambda: Cluster(5),
}


@cache
def rounded(method: str) -> tuple[Work, dict[str, np.ndarray]]:
    """A network whose weights a method has rounded, and the means of its layers."""
    ms.set_context(mode=ms.GRAPH_MODE)  # dozens of steps
    work = biased_work()
    ROUNDED[method]().apply(work)
    ms.set_context(mode=ms.PYNATIVE_MODE)
    return work, means(work)


@pytest.mark.parametrize("method", ROUNDED)
@pytest.mark.parametrize("kind", KINDS)
def test_behind_a_method_that_rounds_weights_the_float_network_is_the_reference(method: str, kind: str) -> None:
    start = biased_work().graph
    work, before = copied(rounded(method)[0]), rounded(method)[1]
    exact = float_means(biased_work())
    assert any((held.data != start.params[name].data).any() for name, held in work.graph.params.items())
    BiasCorrection(kind).apply(work)
    after = means(work)
    for name in LAYERS if kind == "empirical" else LAYERS[:1]:  # analytic does not see what layers before have changed
        lost = np.abs(before[name] - exact[name]).max()
        left = np.abs(after[name] - exact[name]).max()
        assert lost > 1e-3
        assert left < 0.1 * lost, (name, lost, left)
    for name, held in start.params.items():
        np.testing.assert_array_equal(work.reference.params[name].data, held.data)


def test_corrected_twice_is_corrected_once() -> None:
    work = biased_work()
    BiasCorrection().apply(work)
    once = {name: work.graph.params[f"{name}.bias"].data for name in LAYERS}
    BiasCorrection().apply(work)
    for name in LAYERS:
        np.testing.assert_allclose(work.graph.params[f"{name}.bias"].data, once[name], atol=1e-5)


def test_a_kind_that_is_none() -> None:
    with pytest.raises(PlanError, match=r"^bias_correction.kind is 'emprical'; allowed: .* did you mean 'empirical'"):
        BiasCorrection(kind="emprical")
