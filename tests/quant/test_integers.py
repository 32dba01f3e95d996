from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from msqkd.errors import PlanError
from msqkd.graph.capture import capture
from msqkd.quant.integers import int8_weight, round_biases
from msqkd.quant.placement import make_plan
from msqkd.quant.plan import WeightQuant
from msqkd.quant.ptq import calibrate
from msqkd.quant.qat import deployment_graph

PER_CHANNEL = WeightQuant("conv", 8, 0, "minmax", "default")
PER_TENSOR = WeightQuant("conv", 8, None, "minmax", "default")


@pytest.mark.parametrize("quant", [PER_CHANNEL, PER_TENSOR], ids=["per_channel", "per_tensor"])
def test_integers_stand_for_the_weight_and_the_bias(quant: WeightQuant) -> None:
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(4, 3, 3, 3)).astype(np.float32), rng.normal(size=4).astype(np.float32)
    integers, qparams, steps = int8_weight(quant, weight, bias, 0.02, 0.05)
    assert (integers.dtype, steps.dtype) == (np.int8, np.int32)
    np.testing.assert_allclose(qparams.dequantize(integers), weight, atol=float(qparams.scale.max()) / 2 * 1.001)
    scale = 0.02 * np.float64(qparams.scale)
    assert np.abs(steps * scale - bias).max() <= scale.max() / 2 * 1.001


def test_a_nearly_dead_channel_keeps_its_bias() -> None:
    weight = np.ones((2, 3, 1, 1), np.float32)
    weight[1] = 1e-20
    bias = np.array([0.5, -4.0], np.float32)
    integers, qparams, steps = int8_weight(PER_CHANNEL, weight, bias, 0.02, 0.05)
    assert np.all(integers[1] == 0)
    np.testing.assert_allclose(steps * 0.02 * np.float64(qparams.scale), bias, rtol=1e-6)
    assert np.all(0.02 * np.float64(qparams.scale) / 0.05 >= 2.0**-31)


def test_a_ratio_the_runtime_cannot_represent_is_refused() -> None:
    with pytest.raises(PlanError, match=r"conv: the ratio of scales .* beyond what the runtime can represent"):
        int8_weight(PER_TENSOR, np.full((1, 1, 1, 1), 1e9, np.float32), None, 1e9, 1e-9)


class Net(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu = nn.Conv2d(2, 4, 3, has_bias=True, bias_init="normal"), nn.ReLU()
        self.last = nn.Conv2d(4, 3, 1, has_bias=True, bias_init="normal")

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.last(self.relu(self.first(x)))


def test_rounded_biases_are_whole_steps_and_stay_so() -> None:
    ms.set_seed(1)
    graph = deployment_graph(capture(Net(), (2, 6, 6)))
    x = np.random.default_rng(2).normal(size=(4, 2, 6, 6)).astype(np.float32)
    plan = calibrate(graph, make_plan(graph), [x], observer="minmax")
    rounded = round_biases(graph, plan)
    for name, quant in plan.weights.items():
        node = graph.node(name)
        step = float(plan.group_of(node.inputs[0]).qparams().scale) * float(
            quant.qparams(graph.params[node.inputs[1]].data).scale
        )
        before, after = (g.params[node.inputs[2]].data for g in (graph, rounded))
        assert np.abs(after / step - np.rint(after / step)).max() < 1e-3
        assert 0 < np.abs(after - before).max() <= step / 2 * 1.001
    again = round_biases(rounded, plan)
    for name in ("first.bias", "last.bias"):
        assert np.array_equal(again.params[name].data, rounded.params[name].data)
