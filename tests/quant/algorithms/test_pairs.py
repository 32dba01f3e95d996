"""Pairs of methods: the second one does not worsen its own objective, whichever came before it.

Objectives are computed on the calibration samples, and may rise by the share that stands beside them:

* `equalize`: the part of the weights' energy that rounding takes, with one scale a weight; 0.
* `smoothquant`: the reach of the widest channel behind a LayerNorm, in that of the middle one; 0.
* `split`: the squared error of the outputs with weights alone quantized; 5 %, since it sees each weight by itself.
* `weight_ranges`: the squared errors that the rounded weights make of what arrives at each layer; 0.
* `adaround`, `reconstruct`: the squared errors of the layers' activations against the float network; 5 %, since they
  are judged on held-out samples.
* `cluster`: the integers that a weight takes; 0.
* `bias_correction`: the errors of the layers' mean outputs against the float network; 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import permutations
from typing import NamedTuple, Optional

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn
from networks import randomized

from msqkd.api import plan_network
from msqkd.graph.ir import Graph
from msqkd.quant.algorithms.adaround import AdaRound
from msqkd.quant.algorithms.base import Method, Work
from msqkd.quant.algorithms.bias_correction import BiasCorrection
from msqkd.quant.algorithms.biases import with_biases
from msqkd.quant.algorithms.cluster import Cluster
from msqkd.quant.algorithms.equalize import Equalize
from msqkd.quant.algorithms.methods import METHODS
from msqkd.quant.algorithms.order import FLOAT_STAGE, STAGES, against_order
from msqkd.quant.algorithms.reconstruct import Reconstruct
from msqkd.quant.algorithms.smooth import SmoothQuant
from msqkd.quant.algorithms.split import Split
from msqkd.quant.algorithms.weight_ranges import SequentialMSE
from msqkd.quant.config import QuantConfig, Rule, WeightQuantizer
from msqkd.quant.plan import QuantPlan
from msqkd.quant.ptq import calibrate
from msqkd.quant.qat import deployment_graph

pytestmark = pytest.mark.usefixtures("graph_mode")


class Net(nn.Cell):
    """Something for every method: channels between layers, a LayerNorm that a layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Dense(10, 10), nn.Dense(10, 10), nn.Dense(10, 10)
        self.relu, self.norm, self.last = nn.ReLU(), nn.LayerNorm((10,)), nn.Dense(10, 10)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.relu(self.three(self.relu(self.two(self.relu(self.one(x))))))
        return self.relu(self.last(self.norm(x)))


RANDOM = np.random.default_rng(0)
X = (RANDOM.normal(size=(256, 10)) @ RANDOM.normal(size=(10, 10)) / 3 + 0.5).astype(np.float32)
LAYERS = ("one", "two", "three", "last")


@pytest.fixture(scope="module")
def begun() -> tuple[Graph, QuantPlan]:
    """A network with channels out of balance and with single large weights."""
    net = randomized(Net(), 4)
    for name, row, column, factor in (("one", 1, slice(None), 5), ("two", 4, 2, 6), ("norm", 3, None, 8)):
        parameter = net.norm.gamma if column is None else getattr(net, name).weight
        data = parameter.asnumpy()
        data[row if column is None else (row, column)] *= factor
        parameter.set_data(ms.Tensor(data))
    config = QuantConfig(weight_quantizer=WeightQuantizer(4, per_channel=False), act_observer="minmax")
    captured, plan = plan_network(net, X.shape[1:], config, [Rule("op", "LayerNorm", {"precision": "float"})])
    return with_biases(deployment_graph(captured)), plan


def samples() -> Iterator[tuple[np.ndarray, ...]]:
    return iter([(X[:128],), (X[128:],)])


# -- objectives --------------------------------------------------------------------------------------------------------
def values(graph: Graph, plan: Optional[QuantPlan]) -> dict[str, np.ndarray]:
    """What a network of dense layers gives, in numpy; with a plan quantized, as each value is read."""
    found: dict[str, np.ndarray] = {graph.inputs[0]: quantized(plan, graph.inputs[0], X.astype(np.float64))}
    for node in graph.nodes:
        x = found[node.inputs[0]]
        held = [graph.params[name].data.astype(np.float64) for name in node.inputs if name in graph.params]
        if node.op == "Dense":
            quant = plan.weights[node.name] if plan is not None else None
            x = x @ (held[0] if quant is None else quant.rounded(quant.held_in(graph)).astype(np.float64)).T + held[1]
        elif node.op == "ReLU":
            x = np.maximum(x, 0)
        else:
            assert node.op == "LayerNorm"
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-7) * held[0] + held[1]
        found[node.output] = quantized(plan, node.output, x)
    return found


def quantized(plan: Optional[QuantPlan], name: str, x: np.ndarray) -> np.ndarray:
    if plan is None or name not in plan.activations:
        return x
    return plan.group_of(name).qparams().fake_quantize(x.astype(np.float32)).astype(np.float64)


def relative(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.square(found.astype(np.float64) - exact).sum() / np.square(exact.astype(np.float64)).sum())


def weights_lost(work: Work) -> float:
    weights = work.plan.weights.values()
    return sum(relative(quant.rounded(quant.held_in(work.graph)), quant.held_in(work.reference)) for quant in weights)


def widest_channel(work: Work) -> float:
    reach = np.abs(values(work.graph, None)[work.graph.node("norm").output]).max(0)
    return float(reach.max() / np.median(reach))


def weight_noise(work: Work) -> float:
    name = work.graph.outputs[0]
    return relative(values(work.graph, replace(work.plan, activations={}))[name], values(work.reference, None)[name])


def layer_noise(work: Work) -> float:
    found, total = values(work.graph, work.plan), 0.0
    for name in LAYERS:
        quant, arriving = work.plan.weights[name], found[work.graph.node(name).inputs[0]]
        exact = arriving @ quant.held_in(work.reference).T
        total += relative(arriving @ quant.rounded(quant.held_in(work.graph)).T, exact)
    return total


def outputs(work: Work) -> list[tuple[np.ndarray, np.ndarray]]:
    """What the layers give in the quantized and in the float network, before their activations."""
    found, exact = values(work.graph, work.plan), values(work.reference, None)
    pairs = []
    for node in map(work.graph.node, LAYERS):
        quant = work.plan.weights[node.name]
        weight = quant.rounded(quant.held_in(work.graph)).astype(np.float64)
        bias = work.graph.params[node.inputs[2]].data
        pairs.append((found[node.inputs[0]] @ weight.T + bias, exact[node.output]))
    return pairs


def layers_lost(work: Work) -> float:
    found, exact = values(work.graph, work.plan), values(work.reference, None)
    ends = [work.graph.consumers(work.graph.node(name).output)[0].output for name in LAYERS]
    return sum(relative(found[end], exact[end]) for end in ends)


def means_lost(work: Work) -> float:
    return sum(float(np.square((found - exact).mean(0)).sum() / exact.var()) for found, exact in outputs(work))


def integers(work: Work) -> float:
    held = ((quant, quant.held_in(work.graph)) for quant in work.plan.weights.values())
    return float(max(np.unique(quant.settled(data).qparams(data).quantize(data)).size for quant, data in held))


class Case(NamedTuple):
    make: Callable[[], Method]
    objective: Callable[[Work], float]
    tolerance: float = 0.0


CASES = {
    "equalize": Case(Equalize, weights_lost),
    "smoothquant": Case(SmoothQuant, widest_channel),
    "split": Case(lambda: Split(ratio=0.2), weight_noise, 0.05),
    "weight_ranges": Case(lambda: SequentialMSE(candidates=8), layer_noise),
    "adaround": Case(lambda: AdaRound(iterations=30, lr=0.1, batch_size=64), layers_lost, 0.05),
    "reconstruct": Case(lambda: Reconstruct(iterations=30, lr=0.1, batch_size=64), layers_lost, 0.05),
    "cluster": Case(lambda: Cluster(6), integers),
    "bias_correction": Case(BiasCorrection, means_lost),
}
FIRST: dict[tuple[str, bool], Work] = {}


def behind(first: str, calibrated: bool, begun: tuple[Graph, QuantPlan]) -> Work:
    """The network that a method has left, as the next one finds it."""
    if (first, calibrated) not in FIRST:
        work = Work(begun[0].copy(), begun[1], samples)
        early = STAGES[first] == FLOAT_STAGE
        if early:
            CASES[first].make().apply(work)
        if calibrated:
            work.plan = calibrate(work.graph, work.plan, samples())
        if not early:
            CASES[first].make().apply(work)
        FIRST[first, calibrated] = work
    left = FIRST[first, calibrated]
    work = Work(left.graph.copy(), left.plan, samples)
    work.reference = left.reference.copy()
    return work


def test_every_method_has_an_objective() -> None:
    assert CASES.keys() == METHODS.keys()


@pytest.mark.parametrize(("first", "second"), [pair for pair in permutations(STAGES, 2) if against_order(pair) is None])
def test_the_second_does_not_worsen_its_own_objective(first: str, second: str, begun: tuple[Graph, QuantPlan]) -> None:
    case = CASES[second]
    work = behind(first, STAGES[second] != FLOAT_STAGE, begun)
    before = case.objective(work)
    case.make().apply(work)
    after = case.objective(work)
    assert after <= before * (1 + case.tolerance) + 1e-9
    # And the float network still is the one it was.
    name = work.graph.outputs[0]
    np.testing.assert_allclose(values(work.reference, None)[name], values(begun[0], None)[name], atol=1e-4)


@pytest.mark.parametrize("method", [name for name in STAGES if name not in ("adaround", "reconstruct")])
def test_alone_each_method_gains_something(method: str, begun: tuple[Graph, QuantPlan]) -> None:
    work = Work(begun[0].copy(), begun[1], samples)
    if STAGES[method] != FLOAT_STAGE:
        work.plan = calibrate(work.graph, work.plan, samples())
    before = CASES[method].objective(work)
    CASES[method].make().apply(work)
    assert CASES[method].objective(work) < 0.97 * before
