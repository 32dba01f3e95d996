"""What a recipe may say of teachers and of the loss they give, and what contradicts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from msqkd.errors import RecipeError
from msqkd.recipe import Recipe, dump_recipe, load_recipe, make_recipe

BIG = {"source": "msqkd", "name": "resnet56", "checkpoint": "big.ckpt"}


def recipe(minimal: dict[str, Any], distillation: Any = None, teacher: Any = None, *overrides: str) -> Recipe:
    values = {**minimal, "distillation": distillation or {}}
    return make_recipe({**values, "teacher": teacher} if teacher is not None else values, overrides)


def defaults(minimal: dict[str, Any], distillation: Any, *overrides: str) -> tuple[Any, Any]:
    section = recipe(minimal, distillation, None, *overrides).distillation
    assert section is not None
    return section.alpha, section.temperature


@pytest.mark.parametrize(
    ("distillation", "override", "expected"),
    [
        ({}, "seed=0", (0.3, 5.0)),
        ({}, "quantization.weight.bits=4", (0.7, 2.0)),
        ({}, "quantization.activation.bits=6", (0.5, 3.5)),
        ({}, "quantization={precision: weight-only, weight: {bits: 2}, activation: {bits: 8}}", (0.9, 2.0)),
        ({"hard_loss": "none"}, "quantization.weight.bits=4", (1.0, 2.0)),
        ({"soft_loss": "mse"}, "seed=0", (0.3, None)),
        ({"alpha": 0.1, "temperature": 7}, "quantization.weight.bits=2", (0.1, 7.0)),
    ],
)
def test_the_share_of_the_teacher_follows_the_bits(
    minimal: dict[str, Any], distillation: dict[str, Any], override: str, expected: tuple[Any, Any]
) -> None:
    assert defaults(minimal, distillation, override) == expected


def test_a_low_number_of_bits_wakes_no_warning_by_itself(minimal: dict[str, Any]) -> None:
    assert recipe(minimal, {}, None, "quantization.weight.bits=3").warnings() == []
    high = {"temperature": {"schedule": "linear", "from": 1, "to": 6}}
    (warning,) = recipe(minimal, high, None, "quantization.weight.bits=3").warnings()
    assert warning.startswith("distillation.temperature: 6 above 2")


def test_everything_survives_a_round_through_yaml(minimal: dict[str, Any], tmp_path: Path) -> None:
    made = recipe(
        minimal,
        {
            "alpha": {"schedule": "cosine", "from": 1, "to": 0.25},
            "temperature": {"schedule": "constant", "from": 3},
            "combine": "best",
            "features": [{"student": "conv1", "of": 1}, {"student": "fc1", "teacher": "fc", "loss": "relational"}],
            "balance": "running",
        },
        [{"source": "self"}, BIG],
    )
    assert made.distillation is not None
    assert made.distillation.alpha == {"schedule": "cosine", "from": 1.0, "to": 0.25}
    assert [item.teacher for item in made.distillation.features] == ["conv1", "fc"]
    assert [item.source for item in made.teachers] == ["self", "msqkd"]
    file = tmp_path / "again.yaml"
    file.write_text(dump_recipe(made), encoding="utf-8")
    assert load_recipe(file) == made
    assert load_recipe(file).sha() == made.sha()
    changed = load_recipe(file, ["distillation.alpha.to=0.5", "distillation.features.1.weight=2", "teacher.1.weight=1"])
    assert changed.distillation is not None
    assert changed.distillation.alpha["to"] == 0.5
    assert changed.distillation.features[1].weight == 2


def test_one_teacher_is_one_with_and_without_a_list(minimal: dict[str, Any]) -> None:
    assert recipe(minimal, {}, BIG).teachers == recipe(minimal, {}, [BIG]).teachers
    assert [item.source for item in recipe(minimal, {}).teachers] == ["self"]


def test_files_of_every_teacher_are_found_beside_the_recipe(
    minimal: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("big.ckpt", "other.ckpt"):
        (tmp_path / "sub" / name).write_text("")
    teachers = [BIG, {**BIG, "checkpoint": "other.ckpt"}]
    (tmp_path / "sub" / "it.yaml").write_text(yaml.safe_dump({**minimal, "distillation": {}, "teacher": teachers}))
    monkeypatch.chdir(tmp_path)
    assert [item.checkpoint for item in load_recipe("sub/it.yaml").teachers] == ["sub/big.ckpt", "sub/other.ckpt"]


WRONG: list[tuple[Any, Any, str]] = [
    ({"alpha": 1.5}, None, "distillation.alpha: found 1.5, allowed: a number from 0 to 1, or a mapping {schedule"),
    ({"alpha": True}, None, "distillation.alpha: found true, allowed: a number from 0 to 1"),
    ({"temperature": 0}, None, "distillation.temperature: found 0, allowed: a number above 0, or a mapping"),
    (
        {"alpha": {"schedule": "linear", "from": 0, "to": 1.1}},
        None,
        "distillation.alpha.to: found 1.1, allowed: a number from 0 to 1",
    ),
    (
        {"temperature": {"schedule": "linear", "from": 0, "to": 1}},
        None,
        "distillation.temperature.from: found 0, allowed: a number above 0",
    ),
    ({"alpha": {"schedule": "linear", "from": 0}}, None, "distillation.alpha.to: is missing, allowed: a number from 0"),
    ({"alpha": {"from": 0, "to": 1}}, None, "distillation.alpha.schedule: is missing, allowed: 'constant', 'linear'"),
    (
        {"alpha": {"schedule": "cosin", "from": 0, "to": 1}},
        None,
        "distillation.alpha.schedule: found 'cosin', allowed: 'constant', 'linear' or 'cosine'; did you mean 'cosine'",
    ),
    (
        {"alpha": {"schedule": "constant", "from": 0, "to": 1}},
        None,
        "distillation.alpha.to: found 1, not allowed with schedule: constant",
    ),
    (
        {"alpha": {"schedule": "linear", "from": 0, "to": 1, "too": 1}},
        None,
        "distillation.alpha: unknown key 'too', allowed: 'schedule', 'from' or 'to'; did you mean 'to'",
    ),
    ({"soft_loss": "mse", "temperature": 2}, None, "temperature: found 2.0, allowed only with soft_loss: kl"),
    ({"soft_loss": "cos"}, None, "found 'cos', allowed: 'kl', 'mse' or 'cosine'; did you mean 'cosine'"),
    ({"features": [{"teacher": "conv1"}]}, None, "distillation.features[0].student: is missing, allowed: a text"),
    (
        {"features": [{"student": "conv1", "loss": "atention"}]},
        None,
        "distillation.features[0].loss: found 'atention', allowed: 'mse', 'attention', 'similarity' or 'relational'; "
        "did you mean 'attention'",
    ),
    (
        {"features": [{"student": "conv1", "of": 1}]},
        BIG,
        "distillation.features[0].of: found 1, allowed: 0 to 0, the numbers of the teachers",
    ),
    ({"combine": "best"}, None, "distillation.combine: found 'best', allowed only with several teachers"),
    ({"balance": "running", "alpha": 1}, None, "distillation.balance: found 'running', not allowed where the soft"),
    ({}, {"source": "self", "weight": 2}, "teacher.weight: found 2.0, allowed only with several teachers"),
    ({"combine": "best"}, [BIG, {**BIG, "weight": 2}], "teacher[1].weight: found 2.0, allowed only with combine"),
    ({}, [], "teacher: found [], allowed: a section, or a list of sections, at least one"),
    ({}, "resnet56", "teacher: found 'resnet56', allowed: a section, or a list of sections"),
    ({}, [BIG, {"source": "msqkd", "name": "resnet56"}], "teacher[1].checkpoint: is missing, a teacher must be"),
    ({}, [BIG, {**BIG, "weigth": 2}], "teacher[1].weigth: unknown key 'weigth', allowed in teacher[1]: source, name"),
    ({}, {**BIG, "weigth": 2}, "teacher.weigth: unknown key 'weigth', allowed in teacher: source, name"),
]  # fmt: skip


@pytest.mark.parametrize(("distillation", "teacher", "said"), WRONG)
def test_contradictions_are_named(minimal: dict[str, Any], distillation: Any, teacher: Any, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(minimal, distillation, teacher)
    (line,) = str(caught.value).split("\n")
    assert said in line


def test_the_best_teacher_needs_labels_that_are_classes(minimal: dict[str, Any]) -> None:
    for key in ("train.loss", "evaluation.metric"):
        with pytest.raises(RecipeError, match=f"found 'best', not allowed with {key}: it needs labels that are"):
            recipe(minimal, {"combine": "best"}, [BIG, BIG], f"{key}=own.py:thing")


def test_teachers_without_distillation_are_refused(minimal: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="teacher: not used without distillation"):
        make_recipe({**minimal, "teacher": [BIG, BIG]})


@pytest.mark.parametrize(("loss", "least"), [("similarity", 2), ("relational", 3)])
def test_losses_between_samples_need_several_in_a_batch(minimal: dict[str, Any], loss: str, least: int) -> None:
    values = {**minimal, "distillation": {"features": [{"student": "conv1", "loss": loss}]}}
    too_few = f"train: {{batch_size: {least - 1}, accumulate: 8}}".replace("train: ", "train=")
    with pytest.raises(RecipeError) as caught:
        make_recipe(values, [too_few])
    assert f"distillation.features[0].loss: found '{loss}'" in str(caught.value)
    assert f"at least {least}, but train.batch_size is {least - 1}" in str(caught.value)
    assert make_recipe(values, [f"train.batch_size={least}"]).train.batch_size == least


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("{axis: 0}", "distillation.axis: found 0, the batch"),
        ("{axis: 1, soft_loss: mse, hard_loss: none}", "found 1, allowed only with soft_loss: kl or cosine"),
        ("{axis: 1.5}", "distillation.axis: found 1.5, allowed: an integer"),
        ("{features: [{student: conv1, loss: similarity, axis: 1}]}", "allowed only with loss: mse or attention"),
        ("{features: [{student: conv1, axis: 3}]}", "found 3, allowed: an integer from 1 to 2"),
    ],
)  # fmt: skip
def test_an_axis_without_a_meaning_is_refused(minimal: dict[str, Any], settings: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe(minimal, [f"distillation={settings}"])
    assert words in str(caught.value)


@pytest.mark.parametrize("settings", ["{axis: -1}", "{axis: 2, soft_loss: cosine}", "{axis: 1, soft_loss: mse}"])
def test_an_axis_of_the_classes(minimal: dict[str, Any], settings: str) -> None:
    assert make_recipe(minimal, [f"distillation={settings}"]).distillation.axis is not None  # type: ignore[union-attr]


def test_an_axis_makes_another_recipe(minimal: dict[str, Any]) -> None:
    """Folders of versions without the key are covered by tests/pipeline/test_rundir.py."""
    with_axis = make_recipe({**minimal, "distillation": {"axis": 1}})
    assert with_axis.sha() != make_recipe({**minimal, "distillation": {}}).sha()
