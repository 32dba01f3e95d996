"""`distillation.cache` and what goes with it: what is filled in, and what contradicts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from msqkd.errors import RecipeError
from msqkd.recipe import dump_recipe, load_recipe, make_recipe


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{}", ("off", None)),
        ("{cache: off}", ("off", None)),
        ("{cache: auto}", ("auto", "same")),
        ("{cache: on, cache_view: clean}", ("on", "clean")),
    ],
)
def test_on_and_off_are_words(minimal: dict[str, Any], tmp_path: Path, written: str, expected: Any) -> None:
    """YAML 1.1 takes them for true and false."""
    made = make_recipe(minimal, [f"distillation={written}"])
    assert made.distillation is not None
    assert (made.distillation.cache, made.distillation.cache_view) == expected
    file = tmp_path / "again.yaml"
    file.write_text(dump_recipe(made), encoding="utf-8")
    assert load_recipe(file) == made


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("{cache: never}", "distillation.cache: found 'never', allowed: 'off', 'auto' or 'on'"),
        ("{cache_view: clean}", "distillation.cache_view: found 'clean', allowed only with cache: on or cache: auto"),
        ("{cache_top_k: 5}", "distillation.cache_top_k: found 5, allowed only with cache: on or cache: auto"),
        ("{cache: on, cache_top_k: 0}", "distillation.cache_top_k: found 0, allowed: an integer of 1 or more"),
        (
            "{cache: on, cache_top_k: 5, soft_loss: mse}",
            "distillation.cache_top_k: found 5, allowed only with soft_loss: kl",
        ),
        (
            "{cache: on, features: [{student: conv1}]}",
            "distillation.cache: found 'on', not allowed with features, which watch the teacher's layers in every step",
        ),
    ],
)
def test_what_contradicts_a_cache(minimal: dict[str, Any], written: str, text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe(minimal, [f"distillation={written}"])
    assert text in str(caught.value)


def test_augmented_samples_have_no_answer_of_their_own(minimal: dict[str, Any]) -> None:
    augmented = {**minimal, "data": {**minimal["data"], "augment": ["shift"]}}
    with pytest.raises(RecipeError, match=r"cache: found 'on', not allowed with data\.augment: \['shift'\]"):
        make_recipe(augmented, ["distillation={cache: on}"])
    for allowed in ("{cache: auto}", "{cache: on, cache_view: clean}"):
        assert make_recipe(augmented, [f"distillation={allowed}"]).distillation is not None
