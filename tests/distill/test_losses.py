from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from msqkd.distill.losses import DistillLoss, hard_loss
from msqkd.errors import PlanError

RNG = np.random.default_rng(0)
STUDENT, TEACHER = (RNG.normal(0, 3, size=(6, 5)).astype(np.float32) for _ in range(2))
LABELS = RNG.integers(0, 5, 6).astype(np.int32)


@pytest.fixture(autouse=True)
def mode(request: pytest.FixtureRequest) -> Iterator[None]:
    before = ms.get_context("mode")
    ms.set_context(mode=getattr(request, "param", ms.GRAPH_MODE))
    yield
    ms.set_context(mode=before)


BOTH_MODES = pytest.mark.parametrize(
    "mode", [ms.GRAPH_MODE, ms.PYNATIVE_MODE], ids=["graph", "pynative"], indirect=True
)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def cross_entropy(logits: np.ndarray, smoothing: float = 0.0) -> float:
    classes = logits.shape[1]
    target = np.eye(classes)[LABELS] * (1 - smoothing) + smoothing / classes
    return float(-(target * np.log(softmax(logits))).sum(-1).mean())


def soft_kl(student: np.ndarray, teacher: np.ndarray, t: float) -> float:
    p, q = softmax(teacher / t), softmax(student / t)
    return float(t * t * (p * np.log(p / q)).sum(-1).mean())


def value(loss: nn.Cell, student: np.ndarray = STUDENT, teacher: np.ndarray = TEACHER) -> float:
    return float(loss(ms.Tensor(student), ms.Tensor(teacher), ms.Tensor(LABELS)).asnumpy())


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("t", [1.0, 5.0])
def test_share_and_temperature(alpha: float, t: float) -> None:
    expected = (1 - alpha) * cross_entropy(STUDENT) + alpha * soft_kl(STUDENT, TEACHER, t)
    assert value(DistillLoss(alpha=alpha, temperature=t)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("hard", "expected"),
    [
        (None, 0.0),
        ("none", 0.0),
        ("label_smoothing", 0.7 * cross_entropy(STUDENT, 0.1)),
        (hard_loss("label_smoothing", 0.3), 0.7 * cross_entropy(STUDENT, 0.3)),
    ],
)
def test_hard_losses(hard: Any, expected: float) -> None:
    assert value(DistillLoss(hard, alpha=0.3)) == pytest.approx(expected + 0.3 * soft_kl(STUDENT, TEACHER, 5), rel=1e-5)


@BOTH_MODES
def test_mse_of_the_logits_knows_no_temperature() -> None:
    expected = 0.5 * cross_entropy(STUDENT) + 0.5 * float(((STUDENT - TEACHER) ** 2).mean())
    for t in (1.0, 7.0):
        assert value(DistillLoss(soft_loss="mse", alpha=0.5, temperature=t)) == pytest.approx(expected, rel=1e-5)


def test_a_loss_of_ones_own() -> None:
    class Distance(nn.Cell):
        def construct(self, student, teacher, temperature):  # type: ignore[no-untyped-def]
            return (student - teacher).abs().sum() * temperature

    expected = float(np.abs(STUDENT - TEACHER).sum() * 2)
    assert value(DistillLoss(None, Distance(), 1.0, 2.0)) == pytest.approx(expected, rel=1e-5)


def test_a_student_like_its_teacher_pays_nothing() -> None:
    assert value(DistillLoss("none", alpha=1.0), STUDENT, STUDENT) == pytest.approx(0, abs=1e-5)


def test_large_logits_stay_finite() -> None:
    assert np.isfinite(value(DistillLoss(temperature=1.0), STUDENT * 1e4, TEACHER * 1e4))


def test_the_size_of_the_gradient_hardly_depends_on_the_temperature() -> None:
    """The reason for the factor T²."""
    small, near = STUDENT * 0.01, TEACHER * 0.01
    norms = []
    for t in (1.0, 2.0, 8.0):
        loss = DistillLoss("none", alpha=1.0, temperature=t)
        gradient = ms.grad(loss)(ms.Tensor(small), ms.Tensor(near), ms.Tensor(LABELS)).asnumpy()
        norms.append(float(np.linalg.norm(gradient)))
    np.testing.assert_allclose(norms, norms[0], rtol=0.05)


@BOTH_MODES
def test_no_gradient_reaches_the_teachers_answer() -> None:
    gradient = ms.grad(DistillLoss(), grad_position=1)(ms.Tensor(STUDENT), ms.Tensor(TEACHER), ms.Tensor(LABELS))
    assert not gradient.asnumpy().any()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"alpha": 1.1}, "DistillLoss.alpha is 1.1; allowed: 0 to 1"),
        ({"alpha": float("nan")}, "DistillLoss.alpha is nan"),
        ({"temperature": 0}, "DistillLoss.temperature is 0; allowed: above 0"),
        ({"temperature": float("inf")}, "DistillLoss.temperature is inf"),
        ({"soft_loss": "kd"}, "DistillLoss.soft_loss is 'kd'; allowed: kl, mse"),
        ({"hard_loss": "crossentropy"}, "did you mean 'cross_entropy'"),
    ],
)
def test_bad_settings(options: dict[str, Any], text: str) -> None:
    with pytest.raises(PlanError, match=text):
        DistillLoss(**options)


@pytest.mark.parametrize(("name", "smoothing"), [("cross_entropy", 0.0), ("label_smoothing", 0.1)])
def test_hard_loss_by_name(name: str, smoothing: float) -> None:
    loss, logits = hard_loss(name), STUDENT.astype(np.float64)
    assert loss is not None
    told = np.eye(logits.shape[1])[LABELS] * (1 - smoothing) + smoothing / logits.shape[1]
    expected = -(told * (logits - np.log(np.exp(logits).sum(1, keepdims=True)))).sum(1).mean()
    for labels in (LABELS, told.astype(np.float32)):
        found = loss(ms.Tensor(STUDENT), ms.Tensor(labels))
        if labels is LABELS or not smoothing:
            np.testing.assert_allclose(found.asnumpy(), expected, rtol=1e-5)
    assert hard_loss("none") is None


def test_the_cross_entropy_of_a_batch_has_the_same_bits_wherever_it_comes_in_a_training() -> None:
    batches = [ms.Tensor(batch) for batch in np.random.default_rng(1).normal(size=(24, 12, 3)).astype(np.float32)]
    labels = ms.Tensor(np.arange(12, dtype=np.int32) % 3)
    one, other = hard_loss("cross_entropy"), hard_loss("cross_entropy")
    assert one is not None
    assert other is not None
    first = [one(batch, labels).asnumpy().item() for batch in batches]
    assert first == [other(batch, labels).asnumpy().item() for batch in batches[::-1]][::-1]


@BOTH_MODES
def test_several_outputs_share_the_soft_loss_and_the_hard_one_sees_the_first() -> None:
    other = STUDENT[:, ::-1].copy()
    both = tuple(map(ms.Tensor, (STUDENT, other)))
    taught = tuple(map(ms.Tensor, (TEACHER, TEACHER)))
    labels = ms.Tensor(LABELS)
    one, two = (
        float(DistillLoss("none", alpha=1.0)(ms.Tensor(logits), ms.Tensor(TEACHER), labels).asnumpy())
        for logits in (STUDENT, other)
    )
    soft = DistillLoss("none", alpha=1.0, outputs=(0, 1))
    np.testing.assert_allclose(float(soft(both, taught, labels).asnumpy()), (one + two) / 2, rtol=1e-5)
    first = DistillLoss(alpha=0.0)
    np.testing.assert_allclose(
        float(first(both, taught, labels).asnumpy()),
        float(first(ms.Tensor(STUDENT), ms.Tensor(TEACHER), labels).asnumpy()),
        rtol=1e-6,
    )


def test_a_hard_loss_of_ones_own_sees_every_output_and_label() -> None:
    class Both(nn.Cell):
        def construct(self, one, other, labels, weights):  # type: ignore[no-untyped-def]
            return (one * weights).sum() + other.sum() + labels.sum()

    found = DistillLoss(Both(), alpha=0.0)(
        (ms.Tensor(STUDENT), ms.Tensor(TEACHER)), (ms.Tensor(TEACHER), ms.Tensor(TEACHER)), ms.Tensor(LABELS),
        ms.Tensor(np.float32(2)),
    )  # fmt: skip
    np.testing.assert_allclose(float(found.asnumpy()), 2 * STUDENT.sum() + TEACHER.sum() + LABELS.sum(), rtol=1e-4)


@pytest.mark.parametrize("outputs", [(), (-1,)])
def test_outputs_are_numbers_from_0(outputs: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match=r"DistillLoss.outputs is \["):
        DistillLoss(outputs=outputs)
