from __future__ import annotations

from typing import Any, Callable

import mindspore as ms
import mindspore.dataset as ds
import numpy as np
import pytest
from mindspore import nn, ops
from mindspore.experimental import optim
from mindspore.train import Model

import msqkd
from msqkd.errors import TrainingError
from msqkd.quant.learned import LearnedScale
from msqkd.train.adamw import AdamW
from msqkd.train.ema import AveragingOptimizer

pytestmark = pytest.mark.usefixtures("graph_mode")


class Net(nn.Cell):
    """A dense layer times a trained step size."""

    def __init__(self, decay: float = 0.0) -> None:
        super().__init__()
        self.fc, self.scale = nn.Dense(4, 3), LearnedScale("x", decay=decay)
        self.parameter_names: dict[str, str] = {}  # as a cell made from a graph has them

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.fc(x) * self.scale()


class Falling(nn.Cell):
    """A weight decay that changes from step to step."""

    def construct(self, step):  # type: ignore[no-untyped-def]
        return 0.1 / (1 + ops.cast(step, ms.float32))


X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
Y = np.int32([0, 1, 2, 0, 1, 2])
Maker = Callable[[Any, float], Any]
OPTIMIZERS: dict[str, Maker] = {
    "momentum": lambda given, decay: nn.Momentum(given, 0.1, 0.9, weight_decay=decay),
    "adam with decay": lambda given, decay: nn.AdamWeightDecay(given, 0.1, weight_decay=decay),
    "adamw": lambda given, decay: AdamW(given, 0.1, decay),
    "lars": lambda given, decay: nn.LARS(nn.Momentum(given, 0.1, 0.9, weight_decay=decay)),
}


def step_over(net: Net, optimizer: Any) -> msqkd.TrainStep:
    return msqkd.TrainStep(msqkd.WithLoss(net, nn.CrossEntropyLoss(), 1), optimizer)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_decay_of_a_trained_step_size_is_refused(make: Maker) -> None:
    net = Net()
    with pytest.raises(
        TrainingError, match=r"weight decay for the trained step size 'scale.relative'.*msqkd\.decay_groups"
    ):
        step_over(net, make(net.trainable_params(), 0.1))
    step_over(net, make(net.trainable_params(), 0.0))
    step_over(net, make(msqkd.decay_groups(net, 0.1), 0.2))
    plain = nn.Dense(4, 3)
    step_over(plain, make(plain.trainable_params(), 0.1))


def test_decay_that_changes_and_other_kinds_of_optimizers() -> None:
    net = Net()
    kinds = [
        nn.Momentum(net.trainable_params(), 0.1, 0.9, weight_decay=Falling()),
        nn.Momentum([{"params": net.trainable_params(), "weight_decay": Falling()}], 0.1, 0.9),
        optim.SGD(net.trainable_params(), 0.1, weight_decay=0.1),
        optim.AdamW([{"params": net.trainable_params()}], 0.1, weight_decay=0.1),
        AdamW([{"params": net.trainable_params(), "weight_decay": 0.1}], 0.1),
        AveragingOptimizer(nn.SGD(net.trainable_params(), 0.1, weight_decay=0.1), net, 0.9),
    ]
    for optimizer in kinds:
        with pytest.raises(TrainingError, match="weight decay for the trained step size"):
            step_over(net, optimizer)
    step_over(net, optim.SGD(net.trainable_params(), 0.1))


def test_the_share_that_the_ends_of_pact_have_is_meant() -> None:
    net = Net(decay=0.3)
    groups = [{"params": [net.scale.relative], "weight_decay": 0.3}, {"params": [net.fc.weight], "weight_decay": 0.1}]
    step_over(net, nn.SGD(groups, 0.1))
    groups[0]["weight_decay"] = 0.2
    with pytest.raises(TrainingError, match="weight decay for the trained step size"):
        step_over(net, nn.SGD(groups, 0.1))


def test_groups_decay_everything_else() -> None:
    """As the definition of gradient descent with decay has it."""
    net = Net()
    before = {p.name: p.asnumpy().copy() for p in net.trainable_params()}
    optimizer = nn.SGD(msqkd.decay_groups(net, 0.5), 0.1)
    optimizer(tuple(ops.zeros_like(parameter) for parameter in net.trainable_params()))
    for parameter in net.trainable_params():
        kept = 1.0 if parameter is net.scale.relative else 1 - 0.1 * 0.5
        np.testing.assert_allclose(parameter.asnumpy(), kept * before[parameter.name], rtol=1e-6)


def test_a_training_by_model_is_refused_before_its_first_step() -> None:
    net = Net()
    held = net.fc.weight.asnumpy().copy()
    data = ds.NumpySlicesDataset((X, Y), shuffle=False).batch(3)
    model = Model(net, nn.CrossEntropyLoss(), nn.Momentum(net.trainable_params(), 0.1, 0.9, weight_decay=0.1))
    with pytest.raises(TrainingError, match="weight decay for the trained step size"):
        model.train(1, data, callbacks=[msqkd.ActQuantDelay()], dataset_sink_mode=False)
    np.testing.assert_array_equal(net.fc.weight.asnumpy(), held)
