from __future__ import annotations

from typing import Any

import pytest

from msqkd.analysis.advice import advise
from msqkd.analysis.collapse import collapse_words
from msqkd.recipe import Recipe, make_recipe


def recipe(*settings: str) -> Recipe:
    values = {
        "apiversion": "msqkd/v1", "name": "r", "model": {"name": "lenet5", "checkpoint": "a.ckpt"},
        "data": {"name": "digits"},
    }  # fmt: skip
    return make_recipe(values, settings)


FELL = {"first_loss": 2.0, "loss": [(10, 0.5)]}
ROSE = {"loss": [(5, 1.0), (10, 80.0)]}


@pytest.mark.parametrize("history", [FELL, ROSE, {}])
@pytest.mark.parametrize("batchnorm", ["fold", "freeze", "live"])
@pytest.mark.parametrize("folds", [True, False])
def test_freezing_is_suggested_where_batchnorm_is_folded(history: dict[str, Any], batchnorm: str, folds: bool) -> None:
    words = collapse_words(history, recipe(f"quantization.batchnorm={batchnorm}"), folds)
    assert ("set quantization.batchnorm: freeze" in words) == (folds and batchnorm == "fold")
    assert "lower train.lr" in words


def test_what_the_recipe_has_is_not_suggested() -> None:
    assert "clip_grad" in collapse_words(ROSE, recipe(), False)
    assert "clip_grad" not in collapse_words(ROSE, recipe("train.clip_grad=1"), False)
    assert "keep_best" in collapse_words(FELL, recipe(), False)
    assert "keep_best" not in collapse_words(FELL, recipe("train.keep_best=true"), False)


def test_a_training_whose_loss_fell_did_not_diverge() -> None:
    assert "diverged" not in collapse_words(FELL, recipe(), True)
    assert "fell from 2 to 0.5" in collapse_words(FELL, recipe(), True)
    assert "diverged" in collapse_words(ROSE, recipe(), True)
    assert "diverged" not in collapse_words({"loss": [(12, 3.0)]}, recipe(), True), "one number shows no direction"


def test_a_layer_that_is_float_is_not_to_be_left_float() -> None:
    place = {"layer": "fc", "op": "Dense", "max_lsb": 3}
    result: dict[str, Any] = {
        "accuracy": {"float": 90.0, "exported": 80.0},
        "parity": {"exceeded": True, "samples": 10, "deviation": 5.0, "max_deviation": 0.1, "first_beyond_one": place},
    }
    for precision, expected in (("int8", True), ("float", False)):
        plan = {"nodes": [{"name": "fc", "op": "Dense", "precision": precision}]}
        assert ("precision: float" in advise({**result, "plan": plan})[0].recipe) == expected
