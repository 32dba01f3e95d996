from __future__ import annotations

import numpy as np
import pytest

from msqkd.errors import DataError
from msqkd.train.metric import ACCURACY, Metric, Scale

LOGITS = np.eye(4, dtype=np.float32)
ERROR = Metric("error", lambda outputs, labels: np.abs(outputs - labels).mean(), higher_is_better=False)


def test_accuracy_is_the_default() -> None:
    assert ACCURACY((LOGITS, LOGITS * 0), np.array([0, 1, 2, 0]), "test") == 75.0
    assert ACCURACY.words(93.2) == "accuracy 93.20 %"
    assert ACCURACY.to_dict() == {"name": "accuracy", "unit": "%", "higher_is_better": True}
    assert (ACCURACY.is_collapse(90.0, 85.5), ACCURACY.is_collapse(90.0, 84.5)) == (False, True)


def test_a_function_gets_arrays_or_tuples_of_them() -> None:
    assert ERROR((LOGITS,), LOGITS + 0.5, "test") == 0.5
    seen = []
    Metric("seen", lambda outputs, labels: seen.append((outputs, labels)) or 1)((LOGITS, LOGITS), (LOGITS,), "test")
    ((outputs, labels),) = seen
    assert (type(outputs), type(labels), len(outputs)) == (tuple, tuple, 2)


def test_an_error_collapses_upwards() -> None:
    assert ERROR.words(0.43123) == "error 0.4312"
    assert Scale.of(ERROR.to_dict()) == Scale("error", "")
    assert (ERROR.is_collapse(1.0, 1.05), ERROR.is_collapse(1.0, 1.2), ERROR.is_collapse(1.0, 0.1)) == (
        False, True, False,
    )  # fmt: skip


def fail(outputs: object, labels: object) -> float:
    raise ValueError("no boxes")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda outputs, labels: float("inf"), "evaluation.metric 'mAP': it is inf on the 4 samples of toy test"),
        (fail, "evaluation.metric 'mAP': it fails on toy test: ValueError: no boxes (at "),
        (lambda outputs, labels: outputs, "it fails on toy test: TypeError: only "),
    ],
)
def test_what_is_no_number_is_one_sentence(function: object, said: str) -> None:
    with pytest.raises(DataError) as caught:
        Metric("mAP", function)((LOGITS,), LOGITS, "toy test")  # type: ignore[arg-type]
    assert said in str(caught.value)
    with pytest.raises(DataError, match="toy test has no labels; accuracy cannot be measured"):
        ACCURACY((LOGITS,), None, "toy test")
