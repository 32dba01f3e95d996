from __future__ import annotations

import math
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from msqkd.errors import TrainingError
from msqkd.graph.capture import capture
from msqkd.graph.cell import Hooks, to_cell
from msqkd.recipe import TrainSection
from msqkd.train.adamw import AdamW
from msqkd.train.optimizer import check_decay, learning_rates, make_optimizer


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


def scheduled(scheduler: str, **settings: Any) -> list[float]:
    return learning_rates(TrainSection(epoch_size=5, lr=1.0, scheduler=scheduler, **settings), 2)


def test_milestones_are_epochs() -> None:
    found = scheduled("multi_step_decay", milestones=[1, 4], decay_rate=0.5)
    np.testing.assert_allclose(found, [1, 1, *[0.5] * 6, 0.25, 0.25])


def test_polynomial_goes_from_lr_to_min_lr() -> None:
    found = scheduled("polynomial_decay", power=2.0, min_lr=0.1)
    np.testing.assert_allclose(found, [0.1 + 0.9 * (1 - i / 10) ** 2 for i in range(10)])
    np.testing.assert_allclose(scheduled("polynomial_decay"), [1 - i / 10 for i in range(10)])


def test_exponential_decays_by_its_rate_an_epoch_after_the_warm_up() -> None:
    found = scheduled("exponential_decay", decay_rate=0.25, warmup_epochs=1)
    np.testing.assert_allclose(found, [0.5, 1, *[0.5**i for i in range(8)]])


class Net(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dense(2, 2)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.fc(self.bn(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("opt", "kind"), [("momentum", nn.Momentum), ("sgd", nn.SGD), ("adamw", AdamW), ("adam", nn.Adam)]
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


def test_patterns_choose_what_is_not_decayed() -> None:
    settings = TrainSection(weight_decay=0.01, no_weight_decay=["fc.*"], filter_bias_and_bn=False)
    found = decays(make_optimizer(Net(), settings, 3))
    expected = {"conv.weight": 0.01, "bn.gamma": 0.01, "bn.beta": 0.01, "fc.weight": 0, "fc.bias": 0}
    assert found == pytest.approx(expected)
    everything = TrainSection(weight_decay=0.01, no_weight_decay=["*"])
    assert set(decays(make_optimizer(Net(), everything, 3)).values()) == {0.0}


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    names = [p.name for p in Net().trainable_params()]
    settings = TrainSection(no_weight_decay=["bn.*", "fc.wieght"])
    with pytest.raises(TrainingError) as caught:
        check_decay(settings, names, "train")
    assert str(caught.value).startswith(
        "train.no_weight_decay[1]: 'fc.wieght' matches none of the 5 trainable parameters, which are called like "
        "'conv.weight'; did you mean 'fc.weight' or "
    )


def test_what_a_quantiser_trains_is_not_decayed() -> None:
    class Learned(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.step = ms.Parameter(ms.Tensor(np.ones((2, 1, 1, 1), np.float32)), name="step_size")

        def construct(self, w):  # type: ignore[no-untyped-def]
            return w * self.step

    cell = to_cell(capture(Net(), (1, 4, 4)), Hooks(edges={("conv", 1): Learned()}))
    found = decays(make_optimizer(cell, TrainSection(weight_decay=0.01, filter_bias_and_bn=False), 3))
    assert [decay for name, decay in found.items() if name.startswith("quant_")] == [0.0]
    others = [decay for name, decay in found.items() if not name.startswith("quant_")]
    assert others == pytest.approx([0.01] * 5)


@pytest.mark.parametrize("of_group", [False, True])
def test_adamw_is_that_of_its_paper(graph_mode: None, of_group: bool) -> None:
    """Loshchilov & Hutter, algorithm 2, in float64; also with a rate that a group of parameters names itself."""
    net, rates, share = nn.Dense(3, 2), [0.1, 0.05, 0.2], 0.1
    weight, bias = net.trainable_params()
    groups = [
        {"params": [weight], "weight_decay": share, **({"lr": rates} if of_group else {})},
        {"params": [bias], "weight_decay": 0.0},
        {"order_params": [weight, bias]},
    ]
    optimizer = AdamW(groups, rates, share)
    expected = [p.asnumpy().astype(np.float64) for p in (weight, bias)]
    first, second = [0.0, 0.0], [0.0, 0.0]
    rng = np.random.default_rng(0)
    for number, rate in enumerate(rates, 1):
        gradients = [rng.normal(size=p.shape).astype(np.float32) for p in expected]
        optimizer(tuple(map(ms.Tensor, gradients)))
        for i, (gradient, decay) in enumerate(zip(gradients, (share, 0.0))):
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient.astype(np.float64) ** 2
            mean, square = first[i] / (1 - 0.9**number), second[i] / (1 - 0.999**number)
            expected[i] = expected[i] - rate * decay * expected[i] - rate * mean / (np.sqrt(square) + 1e-8)
    for parameter, wanted in zip((weight, bias), expected):
        np.testing.assert_allclose(parameter.asnumpy(), wanted, rtol=1e-4, atol=5e-6)
