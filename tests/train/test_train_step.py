from __future__ import annotations

from typing import Any, Optional

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from msqkd.errors import TrainingError
from msqkd.train.step import LossScale, TrainStep, WithLoss

pytestmark = pytest.mark.usefixtures("graph_mode")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 5)).astype(np.float32)
Y = RNG.normal(size=(12, 3)).astype(np.float32)


class Net(nn.Cell):
    def __init__(self, half: bool = False, factor: float = 1.0) -> None:
        super().__init__()
        rng = np.random.default_rng(1)
        self.weight = ms.Parameter(ms.Tensor(rng.normal(size=(5, 3)).astype(np.float32)), name="weight")
        self.half, self.factor = half, factor

    def construct(self, x):  # type: ignore[no-untyped-def]
        weight = self.weight
        if self.half:
            x, weight = ops.cast(x, ms.float16), ops.cast(weight, ms.float16)
        return ops.cast(ops.matmul(x, weight), ms.float32) * self.factor


def made(net: nn.Cell, clip: Optional[float] = None, **options: Any) -> TrainStep:
    step = TrainStep(WithLoss(net, nn.MSELoss()), nn.Momentum(net.trainable_params(), 0.1, 0.9), clip, **options)
    step.set_train()
    return step


def ran(step: TrainStep, steps: int = 3, x: np.ndarray = X) -> list[float]:
    return [float(step(ms.Tensor(x), ms.Tensor(Y)).asnumpy()) for _ in range(steps)]


@pytest.mark.parametrize(("clip", "scale"), [(None, LossScale()), (0.05, LossScale(64.0, True))])
def test_a_batch_in_parts_is_the_whole_batch(clip: Optional[float], scale: LossScale) -> None:
    whole, parts = Net(), Net()
    expected = ran(made(whole, clip))
    found = ran(made(parts, clip, accumulate=4, loss_scale=scale))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(parts.weight.asnumpy(), whole.weight.asnumpy(), rtol=1e-6)
    assert not np.allclose(whole.weight.asnumpy(), Net().weight.asnumpy())


def test_a_part_that_is_not_finite_spoils_its_batch_alone() -> None:
    net = Net()
    step = made(net, accumulate=3)
    bad = X.copy()
    bad[5] = np.inf
    before = net.weight.asnumpy().copy()
    (loss,) = ran(step, 1, bad)
    assert np.isnan(loss)
    np.testing.assert_array_equal(net.weight.asnumpy(), before)
    sound = Net()
    assert ran(step, 2) == pytest.approx(ran(made(sound), 2), rel=1e-6)
    np.testing.assert_allclose(net.weight.asnumpy(), sound.weight.asnumpy(), rtol=1e-6)


def test_a_batch_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(TrainingError, match="a batch of 12 samples cannot be cut into 5 equal parts"):
        ran(made(Net(), accumulate=5), 1)


def test_small_gradients_survive_float16_when_scaled() -> None:
    found = {}
    for name, half, scale in (("plain", True, 1.0), ("scaled", True, 2.0**16), ("exact", False, 1.0)):
        net = Net(half, 1e-7)
        net.weight.set_data(ms.Tensor(np.zeros((5, 3), np.float32)))
        ran(made(net, loss_scale=LossScale(scale)), 1)
        found[name] = net.weight.asnumpy()
    assert (found["plain"] == 0).all(), "the gradients, about 1e-8, are 0 in float16"
    assert (found["exact"] != 0).all()
    np.testing.assert_allclose(found["scaled"], found["exact"], rtol=1e-2)


def test_a_dynamic_scale_skips_overflows_and_grows_again() -> None:
    net = Net(half=True)
    step = made(net, loss_scale=LossScale(2.0**20, True, window=3))
    before = net.weight.asnumpy().copy()
    losses = ran(step, 1)
    assert np.isfinite(losses).all()
    assert (step.overflow_steps(), float(step.loss_scale.asnumpy())) == (1, 2.0**19)
    np.testing.assert_array_equal(net.weight.asnumpy(), before)
    scales = []
    for _ in range(12):
        ran(step, 1)
        scales.append(float(step.loss_scale.asnumpy()))
    skipped = step.overflow_steps()
    assert skipped > 1
    lowest = scales.index(min(scales))
    # Three sound steps at each scale before the next; the first of them is the one the counter begins with.
    assert [scale / min(scales) for scale in scales[lowest : lowest + 5]] == [1, 1, 1, 2, 2]
    assert np.isfinite(net.weight.asnumpy()).all()
    assert not np.array_equal(net.weight.asnumpy(), before)
    assert step.steps_done == 13
    assert {p.name for p in step.state_parameters()} >= {"train_step.loss_scale", "train_step.overflows"}


def test_what_no_scale_can_mend_is_nan() -> None:
    net = Net(half=True)
    step = made(net, loss_scale=LossScale(4.0, True))
    losses = ran(step, 4, X * np.float32(np.nan))
    assert np.isnan(losses).all()
    assert (step.overflow_steps(), float(step.loss_scale.asnumpy())) == (2, 1.0)
