from __future__ import annotations

import math

import numpy as np
import pytest
from mindspore import nn

from msqkd.recipe import TrainSection
from msqkd.train.optimizer import learning_rates, make_optimizer


def test_cosine_goes_from_lr_to_min_lr() -> None:
    rates = learning_rates(TrainSection(epoch_size=4, lr=0.1, min_lr=0.01), 5)
    expected = [0.01 + 0.09 * 0.5 * (1 + math.cos(math.pi * i / 20)) for i in range(20)]
    np.testing.assert_allclose(rates, expected)
    assert rates[0] == 0.1


def test_warm_up_rises_linearly_and_the_schedule_follows() -> None:
    rates = learning_rates(TrainSection(epoch_size=3, lr=0.2, warmup_epochs=0.5, scheduler="cosine_decay"), 8)
    np.testing.assert_allclose(rates[:4], [0.05, 0.1, 0.15, 0.2])
    assert rates[4] == 0.2
    assert all(a > b for a, b in zip(rates[4:], rates[5:]))
    assert len(rates) == 24


def test_a_training_that_is_all_warm_up() -> None:
    assert learning_rates(TrainSection(epoch_size=1, lr=0.4, warmup_epochs=1.0), 4) == pytest.approx(
        [0.1, 0.2, 0.3, 0.4]
    )


def test_constant() -> None:
    assert learning_rates(TrainSection(epoch_size=2, lr=0.3, scheduler="constant"), 3) == [0.3] * 6


def test_steps() -> None:
    rates = learning_rates(
        TrainSection(epoch_size=5, lr=1.0, scheduler="step_decay", decay_epochs=2, decay_rate=0.5), 2
    )
    np.testing.assert_allclose(rates, [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25])


class Net(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dense(2, 2)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.fc(self.bn(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("opt", "kind"), [("momentum", nn.Momentum), ("sgd", nn.SGD), ("adamw", nn.AdamWeightDecay), ("adam", nn.Adam)]
)
def test_every_optimiser_holds_every_trainable_parameter_in_order(opt: str, kind: type) -> None:
    net = Net()
    optimizer = make_optimizer(net, TrainSection(opt=opt, weight_decay=0.01), 3)
    assert type(optimizer) is kind
    assert [id(p) for p in optimizer.parameters] == [id(p) for p in net.trainable_params()]


def decays(optimizer: nn.Optimizer) -> dict[str, float]:
    found = optimizer.weight_decay
    if not isinstance(found, (tuple, list)):
        found = [found] * len(optimizer.parameters)
    return {p.name: float(d) for p, d in zip(optimizer.parameters, found)}


def test_biases_and_batchnorm_are_not_decayed() -> None:
    found = decays(make_optimizer(Net(), TrainSection(weight_decay=0.01), 3))
    expected = {"conv.weight": 0.01, "bn.gamma": 0, "bn.beta": 0, "fc.weight": 0.01, "fc.bias": 0}
    assert found == pytest.approx(expected)


def test_everything_is_decayed_on_request() -> None:
    found = decays(make_optimizer(Net(), TrainSection(weight_decay=0.01, filter_bias_and_bn=False), 3))
    assert list(found.values()) == pytest.approx([0.01] * 5)
