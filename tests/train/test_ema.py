from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from msqkd.graph.capture import capture
from msqkd.graph.cell import to_cell
from msqkd.train.ema import AveragingOptimizer
from msqkd.train.state import History, load_state, save_state
from msqkd.train.step import TrainStep, WithLoss

pytestmark = pytest.mark.usefixtures("graph_mode")

X = np.random.default_rng(0).normal(size=(8, 1, 6, 6)).astype(np.float32)
Y = np.arange(8).astype(np.int32) % 3


class Net(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dense(2, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.fc(ops.mean(self.bn(self.conv(x)), (2, 3)))


def training(decay: float = 0.6) -> tuple[nn.Cell, TrainStep]:
    ms.set_seed(2)
    cell = to_cell(capture(Net(), (1, 6, 6)))
    optimizer = AveragingOptimizer(nn.Momentum(cell.trainable_params(), 0.1, 0.9), cell, decay)
    step = TrainStep(WithLoss(cell, nn.CrossEntropyLoss()), optimizer)
    step.set_train()
    return cell, step


def values(cell: nn.Cell) -> dict[str, np.ndarray]:
    return {p.name: p.asnumpy().copy() for p in cell.get_parameters()}


def test_the_average_is_that_of_the_formula_and_the_training_does_not_see_it() -> None:
    cell, step = training()
    expected = values(cell)
    other = to_cell(cell.graph)
    plain = TrainStep(WithLoss(other, nn.CrossEntropyLoss()), nn.Momentum(other.trainable_params(), 0.1, 0.9))
    plain.set_train()
    for number in range(6):
        step(ms.Tensor(X), ms.Tensor(Y))
        plain(ms.Tensor(X), ms.Tensor(Y))
        decay = min(0.6, (1 + number) / (10 + number))
        now = values(cell)
        expected = {name: decay * expected[name] + (1 - decay) * now[name] for name in now}
    for name, weight in values(other).items():
        np.testing.assert_array_equal(now[name], weight)
    with step.optimizer.in_use():
        averages = values(cell)
    assert any(name.endswith("moving_mean") for name in averages)
    for name, average in averages.items():
        np.testing.assert_allclose(average, expected[name], rtol=1e-5, atol=1e-7, err_msg=name)
        assert not np.array_equal(average, now[name]), f"{name} is not averaged"
        np.testing.assert_array_equal(values(cell)[name], now[name])
    step.optimizer.take()
    np.testing.assert_array_equal(values(cell)[name], averages[name])


def test_a_skipped_step_leaves_the_average_alone() -> None:
    _, step = training()
    step(ms.Tensor(X), ms.Tensor(Y))
    before = [p.asnumpy().copy() for p in step.optimizer.averages if "moving" not in p.name]
    step(ms.Tensor(X * np.float32(np.nan)), ms.Tensor(Y))
    after = [p.asnumpy() for p in step.optimizer.averages if "moving" not in p.name]
    for one, two in zip(before, after):
        np.testing.assert_array_equal(one, two)


def test_a_resumed_average_is_the_same(tmp_path: Path) -> None:
    _, step = training(0.9)
    for _ in range(4):
        step(ms.Tensor(X), ms.Tensor(Y))
    other, part = training(0.9)
    part(ms.Tensor(X), ms.Tensor(Y))
    save_state(part, other, History(), "key", tmp_path / "state.npz")
    other, part = training(0.9)
    load_state(part, other, "key", tmp_path / "state.npz")
    for _ in range(3):
        part(ms.Tensor(X), ms.Tensor(Y))
    for one, two in zip(step.state_parameters(), part.state_parameters()):
        np.testing.assert_array_equal(one.asnumpy(), two.asnumpy(), err_msg=one.name)
