"""Every optimiser, with and without weight decay, against numpy in float64, step by step of the schedule."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from msqkd.recipe import TrainSection
from msqkd.train.ema import AveragingOptimizer
from msqkd.train.optimizer import learning_rates, make_optimizer
from msqkd.train.step import LossScale, TrainStep

pytestmark = pytest.mark.usefixtures("graph_mode")

STEPS = 4
X = np.random.default_rng(0).normal(size=(STEPS, 4, 3)).astype(np.float32)


class Squares(nn.Cell):
    """The mean square of a dense layer's outputs."""

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(1)
        self.weight = ms.Parameter(ms.Tensor(rng.normal(size=(2, 3)).astype(np.float32)), name="weight")
        self.bias = ms.Parameter(ms.Tensor(rng.normal(size=2).astype(np.float32)), name="bias")

    def construct(self, x):  # type: ignore[no-untyped-def]
        return ops.square(ops.matmul(x, self.weight.T) + self.bias).mean()


class Reference:
    """The same network and the update rules of the papers, in float64."""

    def __init__(self, settings: TrainSection, decays: tuple[float, float]) -> None:
        start = Squares()
        self.values = [p.asnumpy().astype(np.float64) for p in (start.weight, start.bias)]
        self.settings, self.decays = settings, decays
        self.first: list[Any] = [0.0, 0.0]
        self.second: list[Any] = [0.0, 0.0]
        self.updates = 0

    def gradients(self, x: np.ndarray) -> list[np.ndarray]:
        weight, bias = self.values
        error = 2 * (x @ weight.T + bias) / (len(x) * len(bias))
        found = [error.T @ x, error.sum(0)]
        if self.settings.clip_grad is not None:
            norm = np.sqrt(sum(np.square(gradient).sum() for gradient in found))
            found = [gradient * min(1.0, self.settings.clip_grad / norm) for gradient in found]
        return found

    def update(self, x: np.ndarray, rate: float) -> None:
        self.updates += 1
        for i, gradient in enumerate(self.gradients(x.astype(np.float64))):
            self.values[i] = self.values[i] - rate * self._direction(i, gradient)

    def _direction(self, i: int, gradient: np.ndarray) -> np.ndarray:
        settings, decayed = self.settings, self.decays[i] * self.values[i]
        if settings.opt in ("momentum", "sgd"):
            gradient = gradient + decayed
            assert settings.momentum is not None
            self.first[i] = settings.momentum * self.first[i] + gradient
            return gradient + settings.momentum * self.first[i] if settings.use_nesterov else self.first[i]
        if settings.opt == "adam":
            gradient = gradient + decayed
        self.first[i] = 0.9 * self.first[i] + 0.1 * gradient
        self.second[i] = 0.999 * self.second[i] + 0.001 * gradient**2
        mean, square = self.first[i] / (1 - 0.9**self.updates), self.second[i] / (1 - 0.999**self.updates)
        direction = mean / (np.sqrt(square) + 1e-8)
        return direction + decayed if settings.opt == "adamw" else direction


SETTINGS = [
    *({"opt": opt, "weight_decay": decay} for opt in ("momentum", "sgd", "adamw", "adam") for decay in (0.0, 0.1)),
    {"opt": "adamw", "weight_decay": 0.0, "clip_grad": 0.5, "scheduler": "step_decay", "decay_epochs": 1},
    {"opt": "adamw", "weight_decay": 0.1, "filter_bias_and_bn": False, "scheduler": "constant"},
    {"opt": "adamw", "weight_decay": 0.1, "no_weight_decay": ["*"], "warmup_epochs": 2},
    {"opt": "adamw", "weight_decay": 0.0, "accumulate": 2},
    {"opt": "adam", "weight_decay": 0.0, "accumulate": 2, "scheduler": "exponential_decay"},
    {"opt": "adamw", "weight_decay": 0.0, "amp_level": "O1", "loss_scale": "dynamic"},
    {"opt": "sgd", "weight_decay": 0.1, "use_nesterov": True, "scheduler": "polynomial_decay"},
    {"opt": "momentum", "weight_decay": 0.0, "use_nesterov": True, "amp_level": "O1", "loss_scale": 128.0},
]


def made(network: Squares, settings: TrainSection) -> TrainStep:
    optimizer = make_optimizer(network, settings, 1)
    scale = LossScale.of(settings.loss_scale)
    return TrainStep(network, optimizer, settings.clip_grad, settings.accumulate, scale)


@pytest.mark.parametrize("given", SETTINGS, ids=lambda given: "-".join(f"{v}" for v in given.values()))
def test_every_step_has_the_rate_of_the_schedule_and_the_decay_of_the_settings(given: dict[str, Any]) -> None:
    settings = TrainSection(epoch_size=STEPS, lr=0.1, **given)
    rates = learning_rates(settings, 1)
    assert len(set(rates)) > 1 or settings.scheduler == "constant", "a rate that is read late must show"
    network = Squares()
    step = made(network, settings)
    decay = settings.weight_decay
    spared = "*" in settings.no_weight_decay
    reference = Reference(settings, (0.0 if spared else decay, 0.0 if settings.filter_bias_and_bn else decay))
    for x, rate in zip(X, rates):
        step(ms.Tensor(x))
        reference.update(x, rate)
    for parameter, expected in zip((network.weight, network.bias), reference.values):
        np.testing.assert_allclose(parameter.asnumpy(), expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("given", [{"opt": "momentum"}, {"opt": "adamw", "accumulate": 2}, {"opt": "adam", "ema": 0.5}])
def test_the_schedule_goes_on_at_a_step_that_is_skipped(given: dict[str, Any]) -> None:
    settings = TrainSection(epoch_size=STEPS, lr=0.1, weight_decay=0.0, **given)
    network = Squares()
    step = made(network, settings)
    if settings.ema is not None:
        network.parameter_names = {}
        averaging = AveragingOptimizer(make_optimizer(network, settings, 1), network, settings.ema)
        step = TrainStep(network, averaging, None, settings.accumulate)
    reference = Reference(settings, (0.0, 0.0))
    for number, (x, rate) in enumerate(zip(X, learning_rates(settings, 1))):
        skipped = number == 1
        loss = float(step(ms.Tensor(x * np.float32(np.nan) if skipped else x)).asnumpy())
        assert np.isnan(loss) == skipped
        if not skipped:
            reference.update(x, rate)
    np.testing.assert_allclose(network.weight.asnumpy(), reference.values[0], rtol=2e-4, atol=2e-5)


def test_the_schedule_goes_on_at_an_overflow_of_the_loss_scale() -> None:
    settings = TrainSection(epoch_size=STEPS, lr=0.01, weight_decay=0.0, amp_level="O1", loss_scale="dynamic")
    network = Squares()
    step = made(network, settings)
    step.loss_scale.set_data(
        ms.Tensor(np.float32(2.0**124))
    )  # too large for these gradients, and halved at each overflow
    reference = Reference(settings, (0.0, 0.0))
    applied = []
    for x, rate in zip(X[[0, 0, 0, 0]] * np.float32(8.0), learning_rates(settings, 1)):
        before = step.overflow_steps()
        step(ms.Tensor(x))
        applied.append(step.overflow_steps() == before)
        if applied[-1]:
            reference.update(x, rate)
    assert not applied[0]
    assert applied[-1]
    np.testing.assert_allclose(network.weight.asnumpy(), reference.values[0], rtol=2e-4, atol=2e-5)
