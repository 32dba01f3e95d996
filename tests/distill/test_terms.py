"""What a distillation loss is made of beside one teacher's answer: several teachers, schedules, features, balance."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from msqkd.distill.balance import RunningBalance
from msqkd.distill.features import FeatureMSE
from msqkd.distill.layers import Link
from msqkd.distill.losses import DistillLoss
from msqkd.distill.schedule import Schedule
from msqkd.errors import PlanError

pytestmark = pytest.mark.usefixtures("graph_mode")

RNG = np.random.default_rng(1)
STUDENT, ONE, OTHER = (RNG.normal(0, 3, (6, 5)).astype(np.float32) for _ in range(3))
LABELS = RNG.integers(0, 5, 6).astype(np.int32)


def logs(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def cross_entropy(logits: np.ndarray) -> np.ndarray:
    return -logs(logits)[np.arange(len(logits)), LABELS]


def kl(student: np.ndarray, teacher: np.ndarray, t: float) -> np.ndarray:
    p, q = logs(teacher / t), logs(student / t)
    return t * t * (np.exp(p) * (p - q)).sum(-1)


def value(loss: nn.Cell, student: Any, teacher: Any) -> float:
    def tensors(item: Any) -> Any:
        return tuple(map(tensors, item)) if isinstance(item, tuple) else ms.Tensor(item)

    return float(loss(tensors(student), tensors(teacher), ms.Tensor(LABELS)).asnumpy())


def test_cosine() -> None:
    lengths = np.linalg.norm(STUDENT, axis=1) * np.linalg.norm(ONE, axis=1)
    expected = float((1 - (STUDENT * ONE).sum(1) / lengths).mean())
    assert value(DistillLoss("none", "cosine", 1.0), STUDENT, ONE) == pytest.approx(expected, rel=1e-5)
    assert value(DistillLoss("none", "cosine", 1.0), 7 * ONE, ONE) == pytest.approx(0, abs=1e-6)
    assert value(DistillLoss("none", "cosine", 1.0), 0 * ONE, ONE) == pytest.approx(1, abs=1e-6)


def test_several_teachers_by_weight() -> None:
    loss = DistillLoss(alpha=0.4, temperature=2.0, weights=[3.0, 1.0])
    soft = 0.75 * kl(STUDENT, ONE, 2.0).mean() + 0.25 * kl(STUDENT, OTHER, 2.0).mean()
    expected = 0.6 * cross_entropy(STUDENT).mean() + 0.4 * soft
    assert value(loss, STUDENT, (ONE, OTHER)) == pytest.approx(expected, rel=1e-5)


def test_the_best_teacher_of_each_sample() -> None:
    better = cross_entropy(OTHER) < cross_entropy(ONE)
    assert 0 < better.sum() < 6, "each is the better one somewhere"
    expected = np.where(better, kl(STUDENT, OTHER, 2.0), kl(STUDENT, ONE, 2.0)).mean()
    loss = DistillLoss("none", alpha=1.0, temperature=2.0, weights=[1.0, 1.0], combine="best")
    assert value(loss, STUDENT, (ONE, OTHER)) == pytest.approx(expected, rel=1e-5)
    # Of two outputs the first one wanted decides for both.
    side = RNG.normal(0, 1, (2, 6, 3)).astype(np.float32)
    both = DistillLoss("none", "mse", 1.0, outputs=(1, 0), weights=[1.0, 1.0], combine="best")
    chosen = np.where(better[:, None], side[1], side[0])
    second = ((STUDENT - np.where(better[:, None], OTHER, ONE)) ** 2).mean()
    found = value(both, (side[0], STUDENT), ((side[0], ONE), (side[1], OTHER)))
    assert found == pytest.approx((((side[0] - chosen) ** 2).mean() + second) / 2, rel=1e-5)


def test_scheduled_numbers_follow_the_step_without_a_compilation() -> None:
    loss = DistillLoss(alpha=Schedule("linear", 1.0, 0.2, 5), temperature=Schedule("linear", 4.0, 2.0, 5))
    for step, (alpha, t) in enumerate(zip([1.0, 0.8, 0.6, 0.4, 0.2], [4.0, 3.5, 3.0, 2.5, 2.0])):
        loss.set_step(step)
        expected = (1 - alpha) * cross_entropy(STUDENT).mean() + alpha * kl(STUDENT, ONE, t).mean()
        assert value(loss, STUDENT, ONE) == pytest.approx(expected, rel=1e-5)
        assert len(loss.compile_cache) == 1
    assert {p.name: p.requires_grad for p in loss.get_parameters()} == {
        "distill.alpha": False,
        "distill.temperature": False,
    }


def test_features_are_the_last_values_of_a_network() -> None:
    seen, first, second = (RNG.normal(0, 1, (6, 4)).astype(np.float32) for _ in range(3))
    links = [Link(FeatureMSE(), 2.0, 1), Link(FeatureMSE(), 0.5, 0), Link(FeatureMSE(), 3.0, 1)]
    loss = DistillLoss(alpha=1.0, temperature=3.0, weights=[1.0, 1.0], features=links)
    expected = (kl(STUDENT, ONE, 3.0).mean() + kl(STUDENT, OTHER, 3.0).mean()) / 2
    expected += 2.0 * ((seen - first) ** 2).mean() + 0.5 * ((first - seen) ** 2).mean() + 3.0 * (second**2).mean()
    student = (STUDENT, seen, first, second)
    found = value(loss, student, ((ONE, seen), (OTHER, first, np.zeros_like(second))))
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_a_hard_loss_of_ones_own_does_not_see_the_features() -> None:
    class Two(nn.Cell):
        def construct(self, one, other, labels):  # type: ignore[no-untyped-def]
            return (one - other).mean() + labels.sum()

    loss = DistillLoss(Two(), alpha=0.0, features=[Link(FeatureMSE(), 1.0, 0)])
    found = value(loss, (STUDENT, ONE, OTHER), (STUDENT, ONE, OTHER))
    assert found == pytest.approx(float((STUDENT - ONE).mean() + LABELS.sum()), rel=1e-4)


def test_terms_are_brought_to_the_mean_size_of_the_first() -> None:
    terms = RNG.uniform(0.5, 2, (130, 3)) * np.array([1.0, 1e-1, 30.0])
    balance = RunningBalance(3)
    balance.set_train()
    mean, factors = np.zeros(3), np.zeros(3)
    for count, row in enumerate(terms):
        held = min(count, 99)
        mean = (mean * held + row) / (held + 1)
        factors = balance(*(ms.Tensor(np.float32(number)) for number in row)).asnumpy()
        if count in (0, 5, 129):
            np.testing.assert_allclose(factors, mean[0] / mean, rtol=1e-4)
    balance.set_train(False)
    again = balance(*(ms.Tensor(np.float32(9)) for _ in range(3))).asnumpy()
    np.testing.assert_array_equal(again, factors, "nothing is learned in evaluation")


def test_a_balance_survives_nothing_and_nan() -> None:
    balance = RunningBalance(2)
    balance.set_train()

    def step(one: float, other: float) -> list[float]:
        return balance(ms.Tensor(np.float32(one)), ms.Tensor(np.float32(other))).asnumpy().tolist()

    assert step(1.0, 0.0) == [1.0, 100.0]
    held = balance.sizes.asnumpy().copy()
    assert step(float("nan"), 1.0) == [1.0, 100.0]
    np.testing.assert_array_equal(balance.sizes.asnumpy(), held)
    assert step(1.0, 4.0) == [1.0, 0.5]


def test_a_balanced_loss() -> None:
    loss = DistillLoss(alpha=0.25, temperature=1.0, balance="running")
    loss.set_train()
    hard, soft = cross_entropy(STUDENT).mean(), kl(STUDENT, ONE, 1.0).mean()
    assert value(loss, STUDENT, ONE) == pytest.approx(hard, rel=1e-5), "both terms have the size of the first"
    other = kl(STUDENT, OTHER, 1.0).mean()
    expected = 0.75 * hard + 0.25 * other * hard / ((soft + other) / 2)
    assert value(loss, STUDENT, OTHER) == pytest.approx(expected, rel=1e-5)
    assert DistillLoss("none", alpha=1.0, balance="running").balance is None, "one term alone has nothing to balance"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alpha": Schedule("linear", 0.5, 1.5, 3)}, "DistillLoss.alpha is scheduled from 0.5 to 1.5; allowed: 0 to 1"),
        ({"temperature": Schedule("cosine", 0.0, 2.0, 3)}, "DistillLoss.temperature is scheduled from 0.0 to 2.0"),
        ({"soft_loss": "cosin"}, "did you mean 'cosine'"),
        ({"balance": "runing"}, "DistillLoss.balance is 'runing'; allowed: none, running; did you mean 'running'"),
        ({"combine": "worst"}, "DistillLoss.combine is 'worst'; allowed: weighted, best"),
        ({"weights": []}, "DistillLoss.weights is"),
        ({"weights": [1, 0]}, "allowed: a number above 0 for each teacher"),
        ({"features": [Link(FeatureMSE(), 1.0, 1)]}, "DistillLoss.features: teacher 1 of 1, counted from 0"),
    ],
)
def test_bad_settings(options: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        DistillLoss(**options)
