"""A small network, its plan, and ways to break one of its layers."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from msqkd.api import plan_network
from msqkd.data import ArraySplit, Split
from msqkd.graph.ir import Graph
from msqkd.quant.config import QuantConfig, WeightQuantizer
from msqkd.quant.plan import QuantPlan
from msqkd.quant.ptq import calibrate
from msqkd.quant.qat import deployment_graph


class Net(nn.Cell):
    """Three convolutions, a sum, a mean, a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = (
            nn.Conv2d(2, 8, 3, has_bias=True),
            nn.Conv2d(8, 8, 3, has_bias=True),
            nn.Conv2d(8, 8, 3, has_bias=True),
        )
        self.relu = nn.ReLU()
        self.fc = nn.Dense(8, 5)

    def construct(self, x: Any) -> Any:
        x = self.relu(self.stem(x))
        x = self.relu(self.right(self.relu(self.left(x))) + x)
        return self.fc(ops.mean(x, (2, 3)))


class Mixed(nn.Cell):
    """A pool and a product that share scales, a join, an island, products of tokens, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 4, 3, has_bias=True), nn.Conv2d(2, 4, 1)
        self.relu, self.pool, self.average = nn.ReLU(), nn.MaxPool2d(2, 2), nn.AvgPool2d(3, 3)
        self.tokens, self.fc = nn.Dense(9, 6), nn.Dense(48, 3)

    def construct(self, x: Any) -> Any:
        left = self.pool(self.relu(self.one(x))) * 0.5
        joined = ops.cat((left, self.pool(self.two(x))), 1)
        tokens = ops.sin(self.tokens(joined.reshape((-1, 8, 9))))
        return self.fc(tokens.reshape((-1, 48))), self.average(joined)


RNG = np.random.default_rng(1)
X = RNG.normal(size=(24, 2, 6, 6)).astype(np.float32)
LABELS = RNG.integers(0, 5, 24).astype(np.int32)
BATCH = 12


def samples() -> Split:
    return ArraySplit(X, LABELS, [str(i) for i in range(5)], name="noise test")


@cache
def prepared(per_channel: bool = True) -> tuple[Graph, QuantPlan]:
    """The deployment graph, its weights drawn, and its plan with the ranges of `X`."""
    ms.set_seed(5)
    config = QuantConfig(WeightQuantizer(per_channel=per_channel), act_observer="minmax")
    captured, plan = plan_network(Net(), (2, 6, 6), config)
    graph = deployment_graph(captured)
    rng = np.random.default_rng(2)
    for name, parameter in graph.params.items():
        fan = np.prod(parameter.data.shape[1:]) or 1
        spread = np.sqrt(2 / fan) if name.endswith("weight") else 0.05
        spread = 4 * spread if name == "fc.weight" else spread  # logits apart from each other
        parameter.data = rng.normal(0, spread, parameter.data.shape).astype(np.float32)
    return graph, calibrate(graph, plan, [X])


def with_range_cut(plan: QuantPlan, value: str, part: float) -> QuantPlan:
    """The plan with the range of one group a part of what it was."""
    low, high = plan.groups[value].range or (0.0, 0.0)
    return plan.with_ranges({value: (low * part, high * part)})


def with_weight_bits(plan: QuantPlan, node: str, bits: int) -> QuantPlan:
    """The plan with the weight of one node in fewer bits."""
    return replace(plan, weights={**plan.weights, node: replace(plan.weights[node], bits=bits)})


def with_spread_channels(spread: float) -> Graph:
    """The same network with weights that differ by so much: what `left` gives is scaled, and scaled back in `right`."""
    graph = prepared(per_channel=False)[0].copy()
    scales = np.geomspace(1, 1 / spread, 8).astype(np.float32)
    (_, rows, bias, *_), columns = graph.node("left").inputs, graph.node("right").inputs[1]
    for name, factor in ((rows, scales.reshape(-1, 1, 1, 1)), (bias, scales), (columns, 1 / scales.reshape(-1, 1, 1))):
        graph.params[name].data = graph.params[name].data * factor
    return graph
