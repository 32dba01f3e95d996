from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from float_stage import Chain, answer, conv, decibels, float_work, quantized
from mindspore import nn

from msqkd.errors import PlanError
from msqkd.graph.cell import Hooks, to_cell
from msqkd.quant.algorithms.equalize import Equalize

pytestmark = pytest.mark.usefixtures("pynative_mode")

X = np.random.default_rng(0).normal(size=(48, 3, 8, 8)).astype(np.float32)


def filled(net: nn.Cell, seed: int = 0, bias: float = 0.2) -> nn.Cell:
    random = np.random.default_rng(seed)
    for parameter in net.get_parameters():
        shape = parameter.shape
        width = bias if len(shape) == 1 else np.prod(shape[1:]) ** -0.5
        parameter.set_data(ms.Tensor((random.normal(size=shape) * width).astype(np.float32)))
    return net


def imbalanced(first: nn.Cell, second: nn.Cell, factor: np.ndarray) -> None:
    """Multiply the channels between two layers, without changing the network."""
    for parameter in (first.weight, first.bias):
        shape = (-1,) + (1,) * (parameter.ndim - 1)
        parameter.set_data(ms.Tensor(parameter.asnumpy() * factor.reshape(shape)))
    weight = second.weight.asnumpy()
    columns = np.repeat(factor, weight.shape[1] // len(factor)) if weight.shape[1] > 1 else factor
    shape = (1, -1) if weight.shape[1] > 1 else (-1, 1)
    second.weight.set_data(ms.Tensor(weight / columns.reshape(*shape, *[1] * (weight.ndim - 2))))


def weight_of(work: Any, index: int) -> np.ndarray:
    data: np.ndarray = work.graph.params[f"parts.{index}.weight"].data
    return data


def test_a_pair_gets_the_scales_of_the_formula_and_the_same_outputs() -> None:
    net = filled(Chain(conv(3, 6, 3), nn.ReLU(), conv(6, 4, 3)))
    imbalanced(net.parts[0], net.parts[2], np.float32([1, 8, 0.25, 3, 1, 0.5]))
    work = float_work(net, X)
    before = answer(work.graph, X)
    first, second = (net.parts[i].weight.asnumpy().astype(np.float64) for i in (0, 2))
    ranges = np.abs(first).max((1, 2, 3)), np.abs(second).max((0, 2, 3))
    scale = np.sqrt(ranges[0] * ranges[1]) / ranges[1]  # s = √(r₁ r₂) / r₂
    (words,) = Equalize().apply(work)
    assert words.startswith("groups of channels equalised: 1 (rounds: 2, scales up to 1:")
    np.testing.assert_allclose(weight_of(work, 0), first / scale.reshape(-1, 1, 1, 1), rtol=1e-6)
    np.testing.assert_allclose(weight_of(work, 2), second * scale.reshape(1, -1, 1, 1), rtol=1e-6)
    bias = net.parts[0].bias.asnumpy()
    np.testing.assert_allclose(work.graph.params["parts.0.bias"].data, bias / scale, rtol=1e-6)
    np.testing.assert_allclose(answer(work.graph, X), before, atol=1e-5 * np.abs(before).max())
    for name, held in work.graph.params.items():
        np.testing.assert_array_equal(work.reference.params[name].data, held.data)


def test_a_chain_over_a_depthwise_layer_gets_the_cube_root_of_its_three_ranges() -> None:
    net = filled(Chain(conv(3, 4, 1), nn.LeakyReLU(0.1), conv(4, 4, 3, group=4), nn.PReLU(4), conv(4, 5, 1)))
    imbalanced(net.parts[0], net.parts[2], np.float32([4, 1, 0.5, 16]))
    work = float_work(net, X)
    before = answer(work.graph, X)
    ranges = [
        np.abs(net.parts[0].weight.asnumpy()).max((1, 2, 3)),
        np.abs(net.parts[2].weight.asnumpy()).max((1, 2, 3)),
    ]
    ranges.append(np.abs(net.parts[4].weight.asnumpy()).max((0, 2, 3)))
    Equalize(tolerance=1e-6, absorb=False).apply(work)
    expected = np.cbrt(ranges[0] * ranges[1] * ranges[2])
    found = [
        np.abs(weight_of(work, index)).max(axes) for index, axes in ((0, (1, 2, 3)), (2, (1, 2, 3)), (4, (0, 2, 3)))
    ]
    for ends in found:
        np.testing.assert_allclose(ends, expected, rtol=1e-5)
    np.testing.assert_allclose(answer(work.graph, X), before, atol=1e-5 * np.abs(before).max())


def test_what_collapses_with_one_scale_a_weight_is_restored() -> None:
    net = filled(
        Chain(
            conv(3, 8, 3), nn.ReLU(), nn.MaxPool2d(3, 2, pad_mode="pad", padding=1), conv(8, 8, 3, group=8), nn.ReLU(),
            conv(8, 6, 1), nn.ReLU(), nn.AvgPool2d(2, 2), nn.Flatten(), nn.Dense(24, 5),
        )
    )  # fmt: skip
    even = float_work(net, X)
    exact = answer(even.graph, X)
    random = np.random.default_rng(5)
    for first, second in ((0, 3), (3, 5), (5, 9)):
        channels = net.parts[first].weight.shape[0]
        imbalanced(net.parts[first], net.parts[second], np.exp2(random.integers(-7, 8, channels)).astype(np.float32))
    work = float_work(net, X)
    collapsed = decibels(quantized(work, X), exact)
    Equalize().apply(work)
    assert decibels(answer(work.graph, X), exact) > 90
    restored = decibels(quantized(work, X), exact)
    assert collapsed < 12
    assert restored > max(25, decibels(quantized(even, X), exact) - 2)
    dense, last = weight_of(work, 9), weight_of(work, 5)
    np.testing.assert_allclose(np.abs(dense).reshape(5, 6, 4).max((0, 2)), np.abs(last).max((1, 2, 3)), rtol=5e-3)


@pytest.mark.parametrize("high", [False, True])
def test_relu6(high: bool) -> None:
    """Channel 0 is far from 6 or beyond it, and is the one whose weights are too large."""
    net = filled(Chain(conv(3, 4, 3), nn.ReLU6(), conv(4, 4, 1)))
    factor = np.float32([6 if high else 2, 0.03, 0.1, 0.2])
    for parameter in (net.parts[0].weight, net.parts[0].bias):
        parameter.set_data(ms.Tensor(parameter.asnumpy() * factor.reshape((-1,) + (1,) * (parameter.ndim - 1))))
    work = float_work(net, X)
    before = answer(work.graph, X)
    words = Equalize().apply(work)
    assert words == [
        "no channels of a layer are read by layers alone: nothing to equalise",
        "not across the ReLU6 behind parts.0 (relu6: within may take them)",
    ]
    np.testing.assert_array_equal(answer(work.graph, X), before)

    Equalize(relu6="within").apply(work)
    np.testing.assert_allclose(answer(work.graph, X), before, atol=1e-5 * np.abs(before).max())
    first, second = np.abs(weight_of(work, 0)).max((1, 2, 3)), np.abs(weight_of(work, 2)).max((0, 2, 3))
    ratio = first / second
    old = np.abs(net.parts[0].weight.asnumpy()).max((1, 2, 3))
    if high:
        assert first[0] == old[0]
        assert np.ptp(np.log(ratio)) < np.ptp(np.log(old))
        shown = answer(_front(work), X)
        assert shown[:, 0].max() == 6
        assert shown[:, 1:].max() < 6.00001
    else:
        np.testing.assert_allclose(ratio, ratio[0], rtol=5e-3)


def _front(work: Any) -> Any:
    """The network up to its ReLU6."""
    graph = work.graph.copy()
    graph.outputs = [next(node for node in graph.nodes if node.op == "ReLU6").output]
    graph.prune()
    return graph


def test_high_biases_are_absorbed_where_the_readers_do_not_pad() -> None:
    net = filled(Chain(conv(3, 4, 3), nn.ReLU(), conv(4, 4, 2, pad_mode="valid"), nn.ReLU(), conv(4, 2, 3)))
    net.parts[0].bias.set_data(ms.Tensor(np.float32([20, 0, -3, 9])))
    net.parts[2].bias.set_data(ms.Tensor(np.float32([30, 30, 30, 30])))
    work = float_work(net, X)
    before = answer(work.graph, X)
    kept = float_work(net, X)
    Equalize(absorb=False).apply(kept)
    words = Equalize().apply(work)
    assert words[1] == "the high biases of 2 channels absorbed"
    value = kept.graph.node("parts.0").output
    seen = to_cell(kept.graph, Hooks(observe=[value]))(ms.Tensor(X))[1].asnumpy().transpose(1, 0, 2, 3).reshape(4, -1)
    amount = np.maximum(0, seen.mean(1) - 3 * seen.std(1))
    assert ((amount > 0) == [True, False, False, True]).all()
    reduced = kept.graph.params["parts.0.bias"].data - work.graph.params["parts.0.bias"].data
    np.testing.assert_allclose(reduced, amount, rtol=1e-4)
    second = kept.graph.params["parts.2.weight"].data
    grown = work.graph.params["parts.2.bias"].data - kept.graph.params["parts.2.bias"].data
    np.testing.assert_allclose(grown, (second.sum((2, 3)) * amount).sum(1), rtol=1e-3)
    # The next layer pads: its zeros would stand for what was absorbed.
    np.testing.assert_array_equal(work.graph.params["parts.4.bias"].data, kept.graph.params["parts.4.bias"].data)
    assert decibels(answer(work.graph, X), before) > 45
    assert decibels(answer(kept.graph, X), before) > 100


class Forked(nn.Cell):
    """Two readers of one value; channels of groups; a residual addition; a value that is an output too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu = conv(3, 4, 3), nn.ReLU()
        self.left, self.right, self.last = conv(4, 4, 1), conv(4, 4, 3, group=2), conv(4, 2, 1)
        self.shown = conv(2, 2, 1)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.relu(self.stem(x))
        return self.shown(self.last(self.relu(self.left(x) + self.right(x))))


@pytest.mark.parametrize("additions", [False, True])
def test_several_readers_groups_and_additions(additions: bool) -> None:
    net = filled(Forked())
    stem = net.stem.weight.asnumpy()
    stem *= np.float32([30, 1, 1, 0]).reshape(-1, 1, 1, 1)  # channel 3 is dead
    net.stem.weight.set_data(ms.Tensor(stem))
    last = net.last.weight.asnumpy()
    last *= np.float32([1, 50, 1, 1]).reshape(1, -1, 1, 1)
    net.last.weight.set_data(ms.Tensor(last))
    work = float_work(net, X)
    before = answer(work.graph, X)
    words = Equalize(additions=additions, absorb=False, tolerance=1e-6, iterations=100).apply(work)
    assert words[0].startswith(f"groups of channels equalised: {3 if additions else 2} ")
    np.testing.assert_allclose(answer(work.graph, X), before, atol=1e-4 * np.abs(before).max())
    weights = {name: np.abs(work.graph.params[f"{name}.weight"].data) for name in ("stem", "left", "right", "last")}
    right = weights["right"].reshape(2, 2, 2, 9).max((1, 3)).reshape(-1)
    readers = np.sqrt(weights["left"].max((0, 2, 3)) * right)
    np.testing.assert_allclose(weights["stem"].max((1, 2, 3))[:3], readers[:3], rtol=1e-4)
    writers = np.sqrt(weights["left"].max((1, 2, 3)) * weights["right"].max((1, 2, 3)))
    even = np.allclose(writers, weights["last"].max((0, 2, 3)), rtol=1e-4)
    assert even == additions
    assert np.isfinite(weights["stem"]).all()


class Closed(nn.Cell):
    """Channels that are shown, go through a sigmoid, or belong to a weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.twice = conv(3, 3, 3), conv(3, 3, 1), conv(3, 3, 1)
        self.sigmoid = nn.Sigmoid()

    def construct(self, x):  # type: ignore[no-untyped-def]
        shown = self.first(x)
        return self.twice(self.twice(self.sigmoid(self.second(shown)))), shown


def test_channels_that_others_read_stay() -> None:
    work = float_work(filled(Closed()), X)
    before = {name: parameter.data for name, parameter in work.graph.params.items()}
    assert Equalize().apply(work) == ["no channels of a layer are read by layers alone: nothing to equalise"]
    assert all(work.graph.params[name].data is data for name, data in before.items())


def test_a_channel_that_is_all_bias_does_not_take_the_range() -> None:
    net = filled(Chain(conv(3, 4, 3), nn.ReLU(), conv(4, 4, 3)))
    weight, bias = net.parts[0].weight.asnumpy(), net.parts[0].bias.asnumpy()
    weight[2] *= 1e-12
    bias[2] = 1.0
    net.parts[0].weight.set_data(ms.Tensor(weight))
    net.parts[0].bias.set_data(ms.Tensor(bias))
    work = float_work(net, X)
    before = answer(work.graph, X)
    plain = decibels(quantized(work, X), before)
    Equalize().apply(work)
    np.testing.assert_allclose(answer(work.graph, X), before, atol=1e-5 * np.abs(before).max())
    assert decibels(quantized(work, X), before) > plain - 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": 0}, "equalize.iterations is 0; allowed: 1 or more"),
        ({"tolerance": 0.0}, "equalize.tolerance is 0.0; allowed: above 0, below 1"),
        ({"relu6": "with"}, "equalize.relu6 is 'with'; allowed: skip, within; did you mean 'within'?"),
    ],
)
def test_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        Equalize(**settings)
    assert str(caught.value) == message
