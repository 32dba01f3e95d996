"""Every loss between features against its formula in numpy, in double precision."""

from __future__ import annotations

from collections.abc import Sequence

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from msqkd.distill.features import FEATURE_LOSSES, feature_loss
from msqkd.errors import PlanError

pytestmark = pytest.mark.usefixtures("graph_mode")

RNG = np.random.default_rng(0)
SAMPLES = 5


def values(*shape: int) -> np.ndarray:
    return RNG.normal(0.5, 2, (SAMPLES, *shape)).astype(np.float32)


def computed(name: str, student: np.ndarray, teacher: np.ndarray) -> tuple[float, nn.Cell]:
    loss = feature_loss(name, (-1, *student.shape[1:]), (-1, *teacher.shape[1:]), seed=3)
    return float(loss(ms.Tensor(student), ms.Tensor(teacher)).asnumpy()), loss


def similarity(rows: np.ndarray) -> np.ndarray:
    rows = rows.reshape(len(rows), -1).astype(np.float64)
    products = np.array([[one @ other for other in rows] for one in rows])
    return products / np.sqrt((products**2).sum(1))[:, None]


def relations(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances over their mean, and the cosines of the angles at j between i and k; 0 where two are the same."""
    rows = rows.reshape(len(rows), -1).astype(np.float64)
    count = len(rows)
    distances = np.array([[np.linalg.norm(one - other) for other in rows] for one in rows])
    cosines = np.zeros((count, count, count))
    for i in range(count):
        for j in range(count):
            for k in range(count):
                if j not in (i, k):
                    one, other = rows[i] - rows[j], rows[k] - rows[j]
                    cosines[i, j, k] = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    return distances / distances[distances > 0].mean(), cosines


def huber(one: np.ndarray, other: np.ndarray) -> float:
    size = np.abs(one - other)
    return float(np.where(size < 1, size**2 / 2, size - 0.5).mean())


def attention(maps: np.ndarray, channels: int) -> np.ndarray:
    rows = (maps.astype(np.float64) ** 2).sum(channels).reshape(len(maps), -1)
    return rows / np.linalg.norm(rows, axis=1)[:, None]


@pytest.mark.parametrize("shape", [(4, 3, 2), (6, 4), (7,)])
def test_mse(shape: tuple[int, ...]) -> None:
    student, teacher = values(*shape), values(*shape)
    found, loss = computed("mse", student, teacher)
    assert found == pytest.approx(float(((student - teacher).astype(np.float64) ** 2).mean()), rel=1e-5)
    assert not list(loss.get_parameters()), "equal channels need no adapter"


@pytest.mark.parametrize("shapes", [((4, 3, 2), (6, 3, 2)), ((6, 4), (6, 3)), ((7,), (2,))])
def test_mse_between_other_channels_has_an_adapter(shapes: Sequence[Sequence[int]]) -> None:
    student, teacher = values(*shapes[0]), values(*shapes[1])
    found, loss = computed("mse", student, teacher)
    (weight,) = loss.trainable_params()
    matrix = weight.asnumpy().reshape(weight.shape[:2]).astype(np.float64)
    axis = 1 if student.ndim == 4 else student.ndim - 1
    adapted = np.moveaxis(np.moveaxis(student.astype(np.float64), axis, -1) @ matrix.T, -1, axis)
    assert found == pytest.approx(float(((adapted - teacher) ** 2).mean()), rel=1e-5)
    again = computed("mse", student, teacher)[1]
    np.testing.assert_array_equal(again.trainable_params()[0].asnumpy(), weight.asnumpy(), "the seed says it all")


@pytest.mark.parametrize(("shapes", "axis"), [(((4, 3, 2), (6, 3, 2)), 1), (((6, 4), (6, 3)), 2)])
def test_attention(shapes: Sequence[Sequence[int]], axis: int) -> None:
    student, teacher = values(*shapes[0]), values(*shapes[1])
    distance = ((attention(student, axis) - attention(teacher, axis)) ** 2).sum(1).mean()
    assert computed("attention", student, teacher)[0] == pytest.approx(float(distance), rel=1e-4)


def test_similarity_of_other_shapes() -> None:
    student, teacher = values(4, 3, 2), values(7)
    expected = float(((similarity(student) - similarity(teacher)) ** 2).sum() / SAMPLES**2)
    assert computed("similarity", student, teacher)[0] == pytest.approx(expected, rel=1e-4)


def test_relations_of_other_shapes() -> None:
    student, teacher = values(4, 3, 2), values(7) + 30  # far from 0: what counts is the distance between samples
    (one, angles), (other, wanted) = relations(student), relations(teacher)
    expected = huber(one, other) + 2 * huber(angles, wanted)
    assert computed("relational", student, teacher)[0] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["mse", "attention"])
def test_the_larger_map_is_averaged(name: str) -> None:
    large = values(3, 4, 6)
    small = large.astype(np.float64).reshape(SAMPLES, 3, 2, 2, 2, 3).mean((3, 5)).astype(np.float32)
    for student, teacher in ((large, small), (small, large)):
        assert computed(name, student, teacher)[0] == pytest.approx(0, abs=1e-6)
    assert computed(name, large, 2 * small + 1)[0] > 1e-3


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_gradients_are_finite_and_fall_to_the_teacher(name: str) -> None:
    """Two samples that are the same have no distance and no angle; a dead layer is all zeros."""
    teacher = values(3, 2, 2)
    student = teacher + 0.3 * values(3, 2, 2)
    loss = feature_loss(name, student.shape, teacher.shape)
    gradient = ms.value_and_grad(loss)
    before, slope = gradient(ms.Tensor(student), ms.Tensor(teacher))
    step = slope.asnumpy()
    after = loss(ms.Tensor(student - 0.05 * step / np.abs(step).max()), ms.Tensor(teacher))
    assert float(after.asnumpy()) < float(before.asnumpy())
    doubled = np.repeat(student[:1], SAMPLES, 0)
    for odd in (doubled, np.zeros_like(student)):
        value, slope = gradient(ms.Tensor(odd), ms.Tensor(teacher))
        assert np.isfinite(value.asnumpy())
        assert np.isfinite(slope.asnumpy()).all()


@pytest.mark.parametrize(
    ("name", "student", "teacher", "said"),
    [
        ("msee", (-1, 3), (-1, 3), "features.loss is 'msee'; allowed: mse, attention, similarity, relational; did you"),
        ("mse", (-1, 3, 4, 4), (-1, 3), r"\(N, 3, 4, 4\) in the student, \(N, 3\) in the teacher; mse compares maps"),
        ("attention", (-1, 3), (-1, 3), r"attention compares maps \(N, C, H, W\) or tokens \(N, T, C\) of both"),
        ("mse", (-1, 3, 4), (-1, 5, 4), "mse needs as many tokens"),
        ("mse", (-1, 3, 4, 4), (-1, 3, 3, 2), "its sides must be multiples of the smaller one's"),
    ],
)
def test_shapes_that_cannot_be_compared(name: str, student: Sequence[int], teacher: Sequence[int], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        feature_loss(name, student, teacher)
