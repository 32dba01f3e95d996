"""Which teacher to take: noise, entropy, and the choice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msqkd.analysis.teachers import accuracy_noise, chosen_teacher, remarks, softness, teachers_table, verdict
from msqkd.train.metric import ACCURACY


def one_hot(classes: np.ndarray, count: int = 3) -> np.ndarray:
    return np.eye(count, dtype=np.float32)[classes]


def test_the_noise_is_that_of_the_samples_two_networks_differ_on() -> None:
    labels = np.zeros(1000, np.int32)
    one, other = labels.copy(), labels.copy()
    one[:30], other[30:40] = 1, 2  # 30 only the other knows, 10 only the first
    found = accuracy_noise(one_hot(one), one_hot(other), labels)
    assert found == pytest.approx(200 * np.sqrt(40 - 400 / 1000) / 1000)
    assert accuracy_noise(one_hot(one), one_hot(one), labels) == 0
    # It is the deviation of the difference, over many draws of as many samples.
    rng = np.random.default_rng(0)
    differences = (one == 0).astype(float) - (other == 0)
    means = [100 * differences[rng.integers(0, 1000, 1000)].mean() for _ in range(4000)]
    assert found == pytest.approx(2 * np.std(means), rel=0.05)


@given(st.integers(2, 9), st.floats(0.5, 20))
def test_the_entropy_is_between_that_of_a_label_and_of_a_guess(classes: int, temperature: float) -> None:
    logits = np.random.default_rng(classes).normal(0, 3, (8, classes)).astype(np.float32)
    found = softness(logits, temperature)
    assert 0 <= found < 1
    assert softness(logits, 2 * temperature) > found
    assert softness(np.zeros((4, classes), np.float32), temperature) == pytest.approx(1)
    assert softness(1e4 * np.eye(classes, dtype=np.float32), temperature) == pytest.approx(0, abs=1e-12)


def row(gain: float, noise: float, time: float, **more: Any) -> dict[str, Any]:
    return {"gain": gain, "noise": noise, "time": time, "itself": False, "softness": 0.2, **more}


@pytest.mark.parametrize(("rows", "chosen"), [
    ([row(2.0, 0.4, 5.0), row(1.9, 0.4, 2.0), row(0.9, 0.4, 1.0)], 1),  # the cheaper of two that are alike
    ([row(2.0, 0.4, 5.0), row(1.0, 0.4, 2.0)], 0),
    ([row(0.3, 0.4, 1.0), row(-3.0, 0.5, 1.0)], None),
    ([], None),
])  # fmt: skip
def test_the_cheapest_of_the_best_is_chosen(rows: list[dict[str, Any]], chosen: Any) -> None:
    assert chosen_teacher(rows) == chosen


def test_what_is_said_of_a_teacher() -> None:
    scale = ACCURACY.scale
    assert remarks(row(1.88, 0.4, 3.0), scale, 5.0) == ["answers better by 1.88 points"]
    assert remarks(row(-2.0, 0.4, 3.0), scale, 5.0) == ["answers worse by 2.00 points: it passes its mistakes on"]
    assert remarks(row(0.1, 0.4, 3.0), scale, 5.0) == ["answers no better (+0.10, within the noise of 0.40)"]
    assert "soft labels alone" in remarks(row(0.0, 0.0, 1.0, itself=True), scale, 5.0)[0]
    assert "at the temperature 2, hardly more than labels" in remarks(row(1, 0, 1, softness=0.01), scale, 2.0)[1]


def test_the_table_and_the_sentence() -> None:
    teacher = row(1.88, 0.4, 3.1, place="teacher", what="resnet56", test=90.33, train=99.0, parameters=855770,
                  cost=3.07, remarks=["answers better by 1.88 points"])  # fmt: skip
    student = {"what": "resnet20", "test": 88.45, "train": 97.0, "parameters": 272474, "products": 1}
    result = {"metric": ACCURACY.to_dict(), "student": student, "teachers": [teacher], "chosen": 0}
    assert verdict(result).startswith("teacher (resnet56) is better than the network it teaches")
    assert "No teacher answers better" in verdict({**result, "chosen": None})
    table = teachers_table(result)
    assert table.row_count == 2
    assert list(table.columns[7].cells) == ["", "3.07"]
