from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from float_stage import Chain, answer, conv, decibels, float_work, quantized
from mindspore import nn

from msqkd.errors import PlanError
from msqkd.graph.cell import Hooks, to_cell
from msqkd.quant.algorithms.adaround import AdaRound
from msqkd.quant.algorithms.base import Work
from msqkd.quant.algorithms.equalize import Equalize
from msqkd.quant.algorithms.methods import improve
from msqkd.quant.algorithms.split import Split, rounded_in_parts, with_parameters
from msqkd.quant.algorithms.weight_ranges import SequentialMSE
from msqkd.quant.config import QuantConfig, WeightQuantizer
from msqkd.quant.placement import make_plan
from msqkd.quant.ptq import calibrate

pytestmark = pytest.mark.usefixtures("pynative_mode")

X = np.random.default_rng(0).normal(size=(32, 3, 8, 8)).astype(np.float32)
ROWS = X.reshape(32, -1)[:, :16].copy()


def filled(net: nn.Cell, seed: int = 0) -> nn.Cell:
    """Uniform weights: none of them is an outlier."""
    random = np.random.default_rng(seed)
    for parameter in net.get_parameters():
        width = 0.2 if parameter.ndim == 1 else np.prod(parameter.shape[1:]) ** -0.5
        parameter.set_data(ms.Tensor((random.uniform(-1.7, 1.7, parameter.shape) * width).astype(np.float32)))
    return net


def outliers(layer: nn.Cell, channels: list[int], repeat: int = 1, factor: float = 12.0) -> None:
    """One weight of each of these input channels becomes `factor` times the largest."""
    weight = layer.weight.asnumpy()
    largest = factor * np.abs(weight).max()
    blocks = weight.reshape(len(weight), -1, repeat * math.prod(weight.shape[2:]))
    for row, channel in enumerate(channels):
        blocks[row, channel, 0] = largest
    layer.weight.set_data(ms.Tensor(blocks.reshape(weight.shape)))


def pair() -> nn.Cell:
    net = filled(Chain(conv(3, 20, 3), nn.ReLU(), conv(20, 6, 3)))
    outliers(net.parts[2], [3, 11])
    return net


def depthwise() -> nn.Cell:
    net = filled(
        Chain(
            conv(3, 20, 3), nn.ReLU6(), conv(20, 20, 3, group=20), nn.HSwish(), nn.MaxPool2d(2, 2), conv(20, 6, 1),
            nn.ReLU(),
        )
    )  # fmt: skip
    outliers(net.parts[5], [3, 11])
    return net


def dense() -> nn.Cell:
    net = filled(Chain(nn.Dense(16, 20), nn.GELU(), nn.Dense(20, 6)))
    outliers(net.parts[2], [3, 11])
    return net


def flattened() -> nn.Cell:
    net = filled(Chain(conv(3, 20, 3), nn.PReLU(20), nn.AvgPool2d(4, 4), nn.Flatten(), nn.Dense(80, 6)))
    outliers(net.parts[4], [3, 11], repeat=4)
    return net


# by name: what makes it, the part with outliers, and the decibels that splitting them must gain
NETWORKS = {
    "pair": (pair, "2", 6),
    "depthwise": (depthwise, "5", 2),
    "dense": (dense, "2", 3),
    "flattened": (flattened, "4", 6),
}


def weight_of(work: Work, part: str) -> np.ndarray:
    data: np.ndarray = work.graph.params[f"parts.{part}.weight"].data
    return data


@pytest.mark.parametrize("name", NETWORKS)
def test_the_float_network_stays_and_the_quantised_one_is_repaired(name: str) -> None:
    make, reader, gain = NETWORKS[name]
    x = ROWS if name == "dense" else X
    work = float_work(make(), x)
    start = work.graph.copy()
    exact, largest = answer(work.graph, x), float(np.abs(weight_of(work, reader)).max())
    broken = decibels(quantized(work, x), exact)
    words = Split(ratio=0.3).apply(work)
    assert words[0] == f"channels added: 6 (parts.{reader} 6 of 20)"
    assert words[1].startswith("input channels not split: parts.0 (they are the network's input)")
    # In four parts each, with an offset of at most half a step: the step of a weight without outliers is 1 / 12.
    assert 0.24 * largest < float(np.abs(weight_of(work, reader)).max()) < 0.27 * largest
    np.testing.assert_allclose(answer(work.graph, x), exact, atol=1e-5 * np.abs(exact).max())
    repaired = decibels(quantized(work, x), exact)
    assert repaired > broken + gain

    # The shapes told are those computed, and the plan made for the network as it was is the one of the grown network.
    names = [node.output for node in work.graph.nodes]
    values = to_cell(work.graph, Hooks(observe=names))(ms.Tensor(x))[1:]
    assert [value.shape[1:] for value in values] == [work.graph.shape(value)[1:] for value in names]
    assert all(held.data.shape == work.graph.shape(key) for key, held in work.graph.params.items())
    config = QuantConfig(
        weight_quantizer=WeightQuantizer(8, per_channel=False, observer="minmax"), act_observer="minmax"
    )
    assert make_plan(work.graph, config) == work.plan

    # From the parameters alone it is made again.
    again = with_parameters(start, {key: held.data for key, held in work.graph.params.items()})
    np.testing.assert_array_equal(answer(again, x), answer(work.graph, x))
    assert [again.shape(value) for value in names] == [work.graph.shape(value) for value in names]
    assert [node.attrs for node in again.nodes] == [node.attrs for node in work.graph.nodes]
    assert start.shape(names[0]) != work.reference.shape(names[0]) == again.shape(names[0])


def test_the_roundings_of_the_parts_add_up_to_that_of_the_weight() -> None:
    work = float_work(pair(), X, bits=4)
    start, before = work.graph.copy(), weight_of(work, "2").astype(np.float64)
    Split(ratio=0.1).apply(work)
    after = weight_of(work, "2").astype(np.float64)
    step = np.abs(after).max() / 7
    assert after.shape == (6, 22, 3, 3)
    low, high = after[:, [3, 12]], after[:, [4, 13]]  # each copy stands behind its channel
    np.testing.assert_allclose(high - low, step / 2, rtol=1e-4)
    np.testing.assert_allclose(low + high, before[:, [3, 11]], atol=1e-6)
    np.testing.assert_array_equal(after[:, :3], before[:, :3])
    rounded = np.rint(low / step) + np.rint(high / step)
    assert (rounded == np.rint(before[:, [3, 11]] / step)).mean() > 0.99
    first = work.graph.params["parts.0.weight"].data
    np.testing.assert_array_equal(first[[3, 12]], first[[4, 13]])
    np.testing.assert_array_equal(
        work.graph.params["parts.0.bias"].data[[3, 12]], start.params["parts.0.bias"].data[[3, 11]]
    )
    # Plain halves would be rounded alike: as in steps of twice the size.
    seen = rounded_in_parts(start, work.plan, "parts.2", ratio=0.1)
    assert seen is not None
    halves = 2 * step * np.rint(before[:, [3, 11]] / 2 / step)
    assert np.square(seen[:, [3, 11]] - before[:, [3, 11]]).sum() < 0.5 * np.square(halves - before[:, [3, 11]]).sum()


def test_a_scale_a_channel() -> None:
    """Splitting is left where every output channel has its maximum elsewhere, and helps where they have it together."""
    plain = float_work(filled(Chain(conv(3, 20, 3), nn.ReLU(), conv(20, 8, 3))), X, per_channel=True, bits=4)
    before = {name: held.data for name, held in plain.graph.params.items()}
    words = Split(ratio=0.1).apply(plain)
    assert words[0] == "no channel is split"
    assert words[1] == "input channels not split: parts.0 (they are the network's input); parts.2 (nothing is gained)"
    assert all(plain.graph.params[name].data is data for name, data in before.items())

    net = filled(Chain(conv(3, 20, 3), nn.ReLU(), conv(20, 8, 3)))
    weight = net.parts[2].weight.asnumpy()
    weight[:, 7] *= 10
    net.parts[2].weight.set_data(ms.Tensor(weight))
    work = float_work(net, X, per_channel=True, bits=4)
    seen = rounded_in_parts(work.graph, work.plan, "parts.2", ratio=0.1)
    assert seen is not None
    rounded = work.plan.weights["parts.2"].qparams(weight).fake_quantize(weight)
    assert np.square(seen - weight).sum() < 0.5 * np.square(rounded - weight).sum()
    exact = answer(work.graph, X)
    broken = decibels(quantized(work, X), exact)
    assert Split(ratio=0.1).apply(work)[0] == "channels added: 2 (parts.2 2 of 20)"
    assert weight_of(work, "2").shape[1] == 22
    np.testing.assert_allclose(answer(work.graph, X), exact, atol=1e-5 * np.abs(exact).max())
    assert decibels(quantized(work, X), exact) > broken + 3


def test_two_readers_and_a_float_one_get_the_same_copies() -> None:
    class Forked(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.relu = conv(3, 10, 3), nn.ReLU()
            self.left, self.right, self.kept = conv(10, 3, 1), conv(10, 3, 3), conv(10, 3, 1)

        def construct(self, x):  # type: ignore[no-untyped-def]
            x = self.relu(self.stem(x))
            return self.left(x) + self.right(x), self.kept(x)

    net = filled(Forked())
    outliers(net.left, [4])
    work = float_work(net, X)
    work.plan = replace(work.plan, weights={k: v for k, v in work.plan.weights.items() if k != "kept"})
    before, kept = to_cell(work.graph)(ms.Tensor(X)), work.graph.params["kept.weight"].data
    words = Split(ratio=0.1).apply(work)
    assert words[0] == "channels added: 1 (left 1 of 10, right 1 of 10, kept 1 of 10)"
    for one, other in zip(before, to_cell(work.graph)(ms.Tensor(X))):
        np.testing.assert_allclose(one.asnumpy(), other.asnumpy(), atol=1e-5)
    found = work.graph.params["kept.weight"].data
    np.testing.assert_array_equal(found[:, 4], found[:, 5])
    np.testing.assert_array_equal(found[:, 4] * 2, kept[:, 4])


class Closed(nn.Cell):
    """Channels that are added, shown, mixed, grouped, or belong to a weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three, self.shown = conv(3, 4, 1), conv(4, 4, 1), conv(4, 4, 1), conv(4, 4, 1)
        self.after, self.mixed, self.grouped = conv(4, 4, 1), conv(4, 4, 1), conv(4, 4, 1, group=2)
        self.last, self.twice, self.softmax = conv(4, 4, 1), conv(4, 4, 1), nn.Softmax(1)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.one(x)
        x = self.three(self.two(x) + x)
        shown = self.shown(x)
        x = self.mixed(self.softmax(self.after(shown)))
        return self.twice(self.twice(self.last(self.grouped(x)))), shown


def test_what_cannot_be_split_is_named() -> None:
    net = filled(Closed())
    outliers(net.shown, [1])
    work = float_work(net, X)
    before = {name: parameter.data for name, parameter in work.graph.params.items()}
    words = Split(ratio=1.0).apply(work)
    assert words[0] == "channels added: 4 (shown 4 of 4)"
    left = words[1][len("input channels not split: ") :].split("; ")
    assert left == [
        "one (they are the network's input)",
        "two, three (they are added to others)",
        "after (they are an output of the network)",
        "mixed (they come from softmax (Softmax))",
        "grouped (it is a grouped convolution)",
        "last (they come from grouped (Conv2D))",
        "twice, twice_1 (its weight is not its own alone)",
    ]
    changed = {name for name, data in before.items() if work.graph.params[name].data is not data}
    assert changed == {"three.weight", "three.bias", "shown.weight"}


def test_behind_equalisation() -> None:
    net = pair()
    work = float_work(net, X)
    exact = answer(work.graph, X)

    def run(*methods: Any) -> float:
        found = improve(
            work.graph, work.plan, methods, work.samples, lambda graph, plan: calibrate(graph, plan, work.samples())
        )
        np.testing.assert_allclose(answer(found.reference, X), exact, atol=1e-4 * np.abs(exact).max())
        held = Work(found.graph, work.plan, work.samples)
        return decibels(quantized(held, X), exact)

    assert run(Equalize(), Split(ratio=0.3)) > run(Equalize())
    with pytest.raises(PlanError) as caught:
        run(Split(), Equalize())
    assert str(caught.value) == (
        "methods: 'equalize' would scale up again what 'split' has made smaller, and comes before it"
    )


def test_methods_of_the_second_stage_round_the_copies() -> None:
    work = float_work(pair(), X, bits=4)
    ms.set_context(mode=ms.GRAPH_MODE)  # a hundred steps
    methods = [Split(ratio=0.1), SequentialMSE(candidates=4), AdaRound(iterations=100, batch_size=16)]
    found = improve(
        work.graph, work.plan, methods, work.samples, lambda graph, plan: calibrate(graph, plan, work.samples())
    )
    weight = found.graph.params["parts.2.weight"].data
    assert weight.shape == found.reference.params["parts.2.weight"].data.shape == (6, 22, 3, 3)
    assert found.told["adaround"][0].startswith("roundings of 2 of 2 parts trained")
    levels = weight / found.plan.weights["parts.2"].scale
    np.testing.assert_allclose(levels, np.rint(levels), atol=1e-4)


@pytest.mark.parametrize("ratio", [0.0, 1.5])
def test_settings(ratio: float) -> None:
    with pytest.raises(PlanError) as caught:
        Split(ratio=ratio)
    assert str(caught.value) == f"split.ratio is {ratio}; allowed: above 0, up to 1"
