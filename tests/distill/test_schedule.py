from __future__ import annotations

import numpy as np
import pytest

from msqkd.distill.schedule import Schedule, default_alpha, default_temperature
from msqkd.errors import PlanError


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("constant", [0.9, 0.9, 0.9, 0.9, 0.9]),
        ("linear", [0.9, 0.7, 0.5, 0.3, 0.1]),
        ("cosine", 0.1 + 0.8 * np.cos(np.linspace(0, np.pi / 2, 5)) ** 2),  # cos² x = (1 + cos 2x) / 2
    ],
)
def test_every_step_has_its_number_and_the_last_has_the_end(kind: str, found: list[float]) -> None:
    schedule = Schedule(kind, 0.9, 0.1, 5)
    np.testing.assert_allclose([schedule.at(step) for step in range(5)], found, atol=1e-12)
    assert schedule.at(100) == pytest.approx(found[-1])


def test_a_training_of_one_step_begins_at_the_start() -> None:
    assert Schedule("linear", 1.0, 0.0, 1).at(0) == 1.0


def test_wrong_schedules_are_refused() -> None:
    with pytest.raises(PlanError, match="schedule 'cosin' is unknown; allowed: constant, linear, cosine; did you mean"):
        Schedule("cosin", 0.0, 1.0, 5)
    with pytest.raises(PlanError, match="0 steps"):
        Schedule("linear", 0.0, 1.0, 0)


def test_fewer_bits_have_more_of_the_teacher_at_a_lower_temperature() -> None:
    assert [default_alpha(bits) for bits in (8, 6, 4, 2)] == [0.3, 0.5, 0.7, 0.9]
    assert [default_temperature(bits) for bits in (8, 6, 4, 3, 2)] == [5.0, 3.5, 2.0, 2.0, 2.0]
