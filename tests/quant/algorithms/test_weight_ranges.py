from __future__ import annotations

from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops
from networks import error, images, randomized, work_of

from msqkd.errors import PlanError
from msqkd.quant.algorithms import weight_ranges
from msqkd.quant.algorithms.stream import Stream
from msqkd.quant.algorithms.weight_ranges import SequentialMSE
from msqkd.quant.config import Rule
from msqkd.quant.qparams import weight_qparams

pytestmark = pytest.mark.usefixtures("pynative_mode")


class Net(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, stride=2, pad_mode="same", has_bias=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, pad_mode="pad", group=2, has_bias=True)
        self.relu, self.flatten, self.fc = nn.ReLU(), nn.Flatten(), nn.Dense(4 * 4 * 4, 5)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.fc(self.flatten(self.relu(self.conv2(self.relu(self.conv1(x))))))


X = images(48, 2, 8, 8)


def convolved(x: np.ndarray, w: np.ndarray, bias: np.ndarray, **settings: object) -> np.ndarray:
    conv = nn.Conv2d(x.shape[1], len(w), w.shape[2], has_bias=True, **settings)
    conv.weight.set_data(ms.Tensor(w))
    conv.bias.set_data(ms.Tensor(bias))
    return conv(ms.Tensor(x)).asnumpy()


@pytest.mark.parametrize("per_channel", [True, False])
def test_ratios_are_those_with_the_least_error_of_each_output(per_channel: bool) -> None:
    work = work_of(randomized(Net()), X, per_channel=per_channel)
    layers = {"conv1": {"stride": 2, "pad_mode": "same"}, "conv2": {"pad_mode": "pad", "padding": 1, "group": 2}}
    told = SequentialMSE(candidates=7, lowest=0.4).apply(work)
    assert len(told) == 1
    assert "3 weights searched on 48 samples" in told[0]
    for name, settings in layers.items():
        node, quant = work.graph.node(name), work.plan.weights[name]
        x = np.concatenate(Stream(work.graph, work.samples(), work.plan).arriving(node, 0))
        weight, bias = (work.graph.params[value].data for value in node.inputs[1:])
        exact = convolved(x, weight, bias, **settings)
        errors = []
        for ratio in np.linspace(1, 0.4, 7, dtype=np.float32):
            rounded = weight_qparams(weight, quant.bits, quant.axis, ratio).fake_quantize(weight)
            square = np.square(convolved(x, rounded, bias, **settings) - exact)
            errors.append(square.sum((0, 2, 3)) if quant.axis == 0 else square.sum())
        best = np.linspace(1, 0.4, 7, dtype=np.float32)[np.argmin(errors, axis=0)]
        np.testing.assert_array_equal(quant.clip_ratio, best)
        assert quant.clip_ratio.shape == (() if quant.axis is None else (4,))


def test_outputs_come_closer_than_with_the_widest_range_and_with_the_least_error_of_weights() -> None:
    fresh = images(64, 2, 8, 8, seed=9)
    searched = work_of(randomized(Net()), X)
    widest, closest = error(searched, fresh), error(work_of(randomized(Net()), X, observer="mse"), fresh)
    SequentialMSE().apply(searched)
    assert error(searched, fresh) < 0.7 * widest
    assert error(searched, fresh) < closest


def test_a_ratio_found_before_stays_where_none_of_the_candidates_is_better() -> None:
    work = work_of(randomized(Net()), X)
    SequentialMSE(candidates=61).apply(work)
    before = {name: quant.clip_ratio for name, quant in work.plan.weights.items()}
    SequentialMSE(candidates=2, lowest=0.3).apply(work)
    for name, ratio in before.items():
        np.testing.assert_array_equal(work.plan.weights[name].clip_ratio, ratio)


def test_samples_and_inputs_may_be_more_than_a_matrix_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, few = work_of(randomized(Net()), X), work_of(randomized(Net()), X)
    SequentialMSE(candidates=7).apply(whole)
    monkeypatch.setattr(weight_ranges, "_FEWEST_ROWS", 48)
    monkeypatch.setattr(weight_ranges, "_PRODUCTS", 1)
    SequentialMSE(candidates=7).apply(few)  # one row a sample; of the dense layer fewer than it has inputs
    found, same = few.plan.weights["fc"].clip_ratio, whole.plan.weights["fc"].clip_ratio
    x = np.concatenate(Stream(few.graph, few.samples(), few.plan).arriving(few.graph.node("fc"), 0))
    assert len(x) < x.shape[1]
    assert found.shape == same.shape
    assert error(few, X) < error(work_of(randomized(Net()), X), X)


class Tied(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Dense(6, 6), nn.Dense(6, 6)
        self.second.weight = self.first.weight
        self.up = nn.Conv2dTranspose(1, 2, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.up(self.second(self.first(x)).reshape(-1, 1, 2, 3))


def test_what_is_left_as_it_is_is_told() -> None:
    x = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    work = work_of(randomized(Tied()), x, rules=[Rule("op", "Conv2DTranspose", {"precision": "weight-only"})])
    told = SequentialMSE().apply(work)
    assert told[0].startswith("clip ratios of 0 weights")
    assert any(line.startswith("first: left as it is, another layer has the same weight") for line in told)
    assert any("Conv2DTranspose" in line for line in told)


class Product(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.weight = ms.Parameter(ms.Tensor(np.zeros((6, 4), np.float32)), name="weight")

    def construct(self, x):  # type: ignore[no-untyped-def]
        return ops.matmul(x, self.weight)


def test_the_weight_of_a_product_has_its_channels_along_columns() -> None:
    x = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    work = work_of(randomized(Product()), x, rules=[Rule("op", "MatMul", {"precision": "weight-only"})])
    SequentialMSE(candidates=7).apply(work)
    (quant,) = work.plan.weights.values()
    node = work.graph.node(quant.node)
    x = np.concatenate(Stream(work.graph, work.samples(), work.plan).arriving(node, 0))
    weight = work.graph.params[node.inputs[1]].data
    ratios = np.linspace(1, 0.4, 7, dtype=np.float32)
    rounded = [weight_qparams(weight, quant.bits, quant.axis, ratio).fake_quantize(weight) for ratio in ratios]
    errors = [np.square(x @ (w - weight)).sum(0 if quant.axis is not None else None) for w in rounded]
    np.testing.assert_array_equal(quant.clip_ratio, ratios[np.argmin(errors, axis=0)])


def test_a_scale_that_is_fixed_is_left() -> None:
    work = work_of(randomized(Net()), X)
    work.plan.weights["fc"] = replace(work.plan.weights["fc"], scale=np.full(5, 0.1, np.float32))
    assert "fc: left as it is, its scale is fixed already" in SequentialMSE(candidates=2).apply(work)
    assert work.plan.weights["fc"].clip_ratio is None


@pytest.mark.parametrize("settings", [{"candidates": 1}, {"lowest": 0.0}, {"lowest": 1.0}])
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(PlanError, match=f"weight_ranges.{next(iter(settings))} is .*allowed"):
        SequentialMSE(**settings)  # type: ignore[arg-type]
