"""The axis of the classes in every loss of a distillation, -inf logits and large temperatures, against numpy."""

from __future__ import annotations

from typing import Any, Callable, Optional

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from msqkd.distill.cache import StoredOutput, compress
from msqkd.distill.features import feature_loss
from msqkd.distill.layers import Link
from msqkd.distill.losses import BestTeacher, CrossEntropy, DistillLoss, SoftCosine, SoftKL, SoftMSE
from msqkd.distill.shapes import check_outputs, class_axis
from msqkd.distill.step import DistillTrainOneStepCell
from msqkd.errors import PlanError, TrainingError
from msqkd.quant.ptq import divergence

pytestmark = pytest.mark.usefixtures("graph_mode")

RNG = np.random.default_rng(0)
Arrays = tuple[np.ndarray, np.ndarray]
Computed = Callable[[np.ndarray, np.ndarray, float], tuple[float, np.ndarray]]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl_of(student: np.ndarray, teacher: np.ndarray, temperature: float, axis: int = -1) -> tuple[float, np.ndarray]:
    """The loss and its gradient to the student, in float64."""
    one, other = (np.moveaxis(a.astype(np.float64), axis, -1) / temperature for a in (student, teacher))
    of_student, of_teacher = log_softmax(one), log_softmax(other)
    p, q = np.exp(of_teacher), np.exp(of_student)
    with np.errstate(invalid="ignore"):
        terms = np.where(p > 0, p * (of_teacher - of_student), 0.0).sum(-1)
    gradient = np.moveaxis((q - p) * temperature / terms.size, -1, axis)
    return float(terms.mean() * temperature**2), gradient


def compiled(loss: Any) -> Computed:
    def forward(s, t, number):  # type: ignore[no-untyped-def]
        return loss(s, t, number)

    both = ms.value_and_grad(forward)

    def run(student: np.ndarray, teacher: np.ndarray, temperature: float) -> tuple[float, np.ndarray]:
        arrays = (ms.Tensor(array.astype(np.float32)) for array in (student, teacher))
        value, gradient = both(*arrays, ms.Tensor(temperature, ms.float32))
        return float(value.asnumpy()), gradient.asnumpy()

    return run


LOGITS = (RNG.normal(size=(6, 10)) * 3).astype(np.float32)
OTHER = (RNG.normal(size=(6, 10)) * 3).astype(np.float32)
MASKED = np.arange(10) < 3
PAIRS: dict[str, Arrays] = {
    "far": (LOGITS, OTHER),
    "close": (LOGITS, (LOGITS + 1e-2 * OTHER).astype(np.float32)),
    "wide": (LOGITS * 30, OTHER * 30),
    "masked in both": (np.where(MASKED, -np.inf, LOGITS), np.where(MASKED, -np.inf, OTHER)),
    "masked in the teacher": (LOGITS, np.where(MASKED, -np.inf, OTHER)),
}


def test_kl_and_its_gradient_are_those_of_float64_at_every_temperature() -> None:
    kl = compiled(SoftKL())
    for name, (student, teacher) in PAIRS.items():
        for temperature in (0.5, 5.0, 1e3):
            value, gradient = kl(student, teacher, temperature)
            expected, wanted = kl_of(student, teacher, temperature)
            assert value == pytest.approx(expected, rel=2e-5), (name, temperature)
            assert np.abs(gradient - wanted).max() <= 2e-5 * np.abs(wanted).max(), (name, temperature)
    # Without end it is half the variance of the differences.
    value, _ = kl(LOGITS, OTHER, 1e8)
    assert value == pytest.approx(0.5 * (LOGITS - OTHER).astype(np.float64).var(-1).mean(), rel=1e-4)
    # A student that excludes what its teacher expects is infinitely far.
    value, gradient = kl(np.where(MASKED, -np.inf, LOGITS), OTHER, 2.0)
    assert value == np.inf
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("shape", "given", "axis"),
    [
        ((2, 5, 4, 3), None, 1),
        ((2, 4, 5), None, 2),
        ((2, 4, 3, 5), -1, 3),
    ],
)
def test_kl_and_cosine_are_taken_over_the_classes(shape: tuple[int, ...], given: Optional[int], axis: int) -> None:
    student, teacher = (RNG.normal(size=shape).astype(np.float32) for _ in range(2))
    assert class_axis(len(shape), given) == axis
    value, gradient = compiled(SoftKL(given))(student, teacher, 2.0)
    expected, wanted = kl_of(student, teacher, 2.0, axis)
    assert value == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-7)
    lengths = np.linalg.norm(student, axis=axis) * np.linalg.norm(teacher, axis=axis)
    cosine = (1 - (student * teacher).sum(axis) / lengths).mean()
    found = SoftCosine(given)(ms.Tensor(student), ms.Tensor(teacher), 1.0)
    assert float(found.asnumpy()) == pytest.approx(float(cosine), rel=1e-5)


@pytest.mark.parametrize("loss", [SoftMSE, SoftCosine])
def test_classes_without_logits_in_both_networks_add_nothing(loss: Any) -> None:
    student, teacher = PAIRS["masked in both"]
    value, gradient = compiled(loss())(student, teacher, 1.0)
    kept, _ = compiled(loss())(student[:, 3:], teacher[:, 3:], 1.0)
    assert value == pytest.approx(kept * (0.7 if loss is SoftMSE else 1.0), rel=1e-5)
    assert np.isfinite(gradient).all()
    assert (gradient[:, :3] == 0).all()


@pytest.mark.parametrize("loss", [SoftKL, SoftMSE, SoftCosine])
def test_outputs_of_other_shapes_are_not_broadcast(loss: Any) -> None:
    with pytest.raises(ValueError, match="same shape"):
        loss()(ms.Tensor(LOGITS[:, :1]), ms.Tensor(LOGITS[:, 0]), 1.0)


def cross_entropy(logits: np.ndarray, labels: np.ndarray, axis: int) -> float:
    found = log_softmax(np.moveaxis(logits.astype(np.float64), axis, -1))
    return float(-np.take_along_axis(found, labels[..., None].astype(np.int64), -1).mean())


@pytest.mark.parametrize(
    ("shape", "given", "axis"),
    [((2, 4, 6), None, 2), ((2, 6, 4), None, 1), ((2, 5, 5), -1, 2), ((2, 5, 5), 1, 1), ((2, 6, 3, 4), None, 1)],
)
def test_cross_entropy_is_taken_over_the_axis_that_the_labels_lack(
    shape: tuple[int, ...], given: Optional[int], axis: int
) -> None:
    logits = RNG.normal(size=shape).astype(np.float32)
    labels = RNG.integers(0, shape[axis], np.delete(shape, axis)).astype(np.int32)
    found = CrossEntropy(axis=given)(ms.Tensor(logits), ms.Tensor(labels))
    assert float(found.asnumpy()) == pytest.approx(cross_entropy(logits, labels, axis), rel=1e-5)


def test_cross_entropy_does_not_guess_between_two_axes() -> None:
    with pytest.raises(ValueError, match=r"distillation\.axis"):
        CrossEntropy()(ms.Tensor(np.zeros((2, 5, 5), np.float32)), ms.Tensor(np.zeros((2, 5), np.int32)))


def test_the_best_teacher_of_maps_is_chosen_for_a_whole_sample() -> None:
    teachers = [RNG.normal(size=(1, 3, 2, 2)).astype(np.float32) for _ in range(2)]
    labels = RNG.integers(0, 3, (1, 2, 2)).astype(np.int32)
    losses = [cross_entropy(teacher, labels, 1) for teacher in teachers]
    (found,) = BestTeacher(0, (0,))(tuple(map(ms.Tensor, teachers)), ms.Tensor(labels))
    np.testing.assert_array_equal(found.asnumpy(), teachers[int(np.argmin(losses))])


@pytest.mark.parametrize(
    ("shape", "loss", "axis", "words"),
    [
        ((-1, 1), "kl", None, "single class on axis 1"),
        ((-1, 1, 8, 8), "cosine", None, "single class on axis 1"),
        ((-1,), "kl", None, "none; use soft_loss: mse"),
        ((-1, 5), "kl", 2, "axes of classes there: 1 to 1"),
        ((-1, 5, 4), "cosine", -3, "axes of classes there: 1 to 2"),
    ],
)
def test_a_loss_that_cannot_fit_an_output_is_refused(
    shape: tuple[int, ...], loss: str, axis: Optional[int], words: str
) -> None:
    with pytest.raises(PlanError) as caught:
        check_outputs({0: shape}, loss, axis, "distillation")
    assert words in str(caught.value)
    assert check_outputs({0: shape}, "mse", None)


def test_the_axis_is_said_for_every_output() -> None:
    told = check_outputs({0: (-1, 5, 8, 8), 2: (-1, 7, 9)}, "kl")
    assert told == ["output 0 (N, 5, 8, 8): kl over the 5 classes on axis 1",
                    "output 2 (N, 7, 9): kl over the 9 classes on axis 2"]  # fmt: skip


def test_a_cache_keeps_the_largest_of_the_classes_of_maps() -> None:
    answers = RNG.normal(size=(3, 1, 6, 4, 2)).astype(np.float32)
    output = StoredOutput(0, (1, 6, 4, 2), 2, 1)
    records = np.empty(3, np.dtype(output.fields))
    output.write(records, answers)
    found = output.read(records)
    assert found.shape == answers.shape
    np.testing.assert_array_equal(found.argmax(2), answers.argmax(2))
    kept = np.take_along_axis(found, np.argsort(-answers, 2)[:, :, :2], 2)
    np.testing.assert_array_equal(kept, -np.sort(-answers, 2)[:, :, :2])
    np.testing.assert_allclose(np.exp(found).sum(2), np.exp(answers).sum(2), rtol=1e-5)


def test_classes_without_logits_are_cached() -> None:
    top, classes, rest = compress(np.array([[1.0, -np.inf, 0.5, -np.inf]], np.float32), 2)
    assert top.tolist() == [[1.0, 0.5]]
    assert classes.tolist() == [[0, 2]]
    assert rest.tolist() == [-np.inf]


def test_the_calibration_loss_takes_logits_without_probability_and_no_maps() -> None:
    reference, answers = PAIRS["masked in both"]
    assert divergence(answers, reference) == pytest.approx(kl_of(answers, reference, 1.0)[0])
    with pytest.raises(ValueError, match="classes"):
        divergence(np.zeros((2, 3, 4)), np.zeros((2, 3, 4)))


@pytest.mark.parametrize("name", ["mse", "attention"])
def test_channels_of_one_dimensional_maps_can_be_named(name: str) -> None:
    student, teacher = (RNG.normal(size=(4, 3, 5)).astype(np.float32) for _ in range(2))
    found = feature_loss(name, student.shape, teacher.shape, axis=1)(ms.Tensor(student), ms.Tensor(teacher))
    if name == "mse":
        expected = np.square(student - teacher).mean()
    else:
        maps = [np.square(values).sum(1) for values in (student, teacher)]
        scaled = [values / np.linalg.norm(values, axis=-1, keepdims=True) for values in maps]
        expected = np.square(scaled[0] - scaled[1]).sum(-1).mean()
    assert float(found.asnumpy()) == pytest.approx(float(expected), rel=1e-4)
    with pytest.raises(PlanError, match="axis: found 1"):
        feature_loss("similarity", student.shape, teacher.shape, axis=1)


class Shown(nn.Cell):
    """A dense layer that gives its values behind its logits, as a watched network does."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Dense(4, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        found = self.dense(x)
        return found, found


@pytest.mark.parametrize(("name", "least"), [("similarity", 2), ("relational", 3)])
def test_a_batch_that_is_too_small_for_a_loss_between_samples_is_refused(name: str, least: int) -> None:
    student = Shown()
    loss = DistillLoss("none", features=[Link(feature_loss(name, (-1, 3), (-1, 3)), 1.0, 0)])
    optimizer = nn.Momentum(student.trainable_params(), 0.1, 0.9)
    step = DistillTrainOneStepCell(student, Shown(), loss, optimizer)
    labels = ms.Tensor(np.zeros(least, np.int32))
    x = ms.Tensor(RNG.normal(size=(least, 4)).astype(np.float32))
    with pytest.raises(TrainingError, match=f"at least {least}; found {least - 1}"):
        step(x[1:], labels[1:])
    assert np.isfinite(float(step(x, labels).asnumpy()))
