"""Settings for networks that are no image classifiers: what follows from them, and what contradicts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from msqkd.errors import RecipeError
from msqkd.recipe import Recipe, dump_recipe, load_recipe, make_recipe

INPUTS = [{"name": "ids", "shape": [8], "dtype": "int32"}, {"name": "mask", "shape": [8], "dtype": "int32"}]


def own(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "apiversion": "msqkd/v1",
        "name": "own",
        "model": {"source": "python", "target": "own.py:Net", "checkpoint": "own.ckpt", "inputs": INPUTS},
        "data": {"name": "python", "target": "own.py:data"},
        "train": {"loss": "own.py:Loss", "loss_args": {"weight": 2}},
        "evaluation": {"metric": "own.py:f1"},
        "distillation": {},
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) and key in values else value
    return values


def test_what_follows_from_a_loss_and_a_metric_of_ones_own() -> None:
    recipe = make_recipe(own())
    assert recipe.distillation is not None
    assert (recipe.distillation.hard_loss, recipe.distillation.outputs) == ("train_loss", [0])
    assert (recipe.evaluation.name, recipe.verify.max_deviation) == ("f1", 0.01)
    assert [tuple(item.shape) for item in recipe.model.inputs] == [(8,), (8,)]
    pretrained = make_recipe(own(model={"checkpoint": None}, pretrain={}))
    assert pretrained.pretrain is not None
    assert (pretrained.pretrain.loss, pretrained.pretrain.loss_args) == ("own.py:Loss", {"weight": 2})
    given = make_recipe(own(verify={"max_deviation": 0.5}, distillation={"hard_loss": "none"}))
    assert (given.verify.max_deviation, given.distillation and given.distillation.hard_loss) == (0.5, "none")
    plain = make_recipe(own(train={"loss": None, "loss_args": None}, evaluation={"metric": None}))
    assert (plain.distillation and plain.distillation.hard_loss, plain.verify.max_deviation) == ("cross_entropy", 0.1)


def test_it_survives_a_round_through_yaml(tmp_path: Path) -> None:
    recipe = make_recipe(own(evaluation={"higher_is_better": False}, model={"outputs": [0]}))
    file = tmp_path / "own.yaml"
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    assert isinstance(recipe, Recipe)
    assert load_recipe(file) == recipe


def test_files_are_found_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "project").mkdir()
    for name in ("own.py", "own.ckpt"):
        (tmp_path / "project" / name).write_text("")
    file = tmp_path / "project" / "own.yaml"
    file.write_text(yaml.safe_dump(own()), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(file)
    beside = str(tmp_path / "project" / "own.py")
    assert (recipe.data.target, recipe.train.loss) == (f"{beside}:data", f"{beside}:Loss")
    assert recipe.evaluation.metric == f"{beside}:f1"


def test_inputs_can_be_changed_for_one_run() -> None:
    recipe = make_recipe(own(), ["model.inputs.1.shape=[16]", "model.inputs.1.dtype=bool"])
    assert (recipe.model.inputs[1].shape, recipe.model.inputs[1].dtype) == ([16], "bool")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"input_shape": [1, 8, 8]}}, "model.inputs: two descriptions of the input, this one"),
        ({"model": {"inputs": [*INPUTS, INPUTS[0]]}}, "model.inputs: the name 'ids' is given twice"),
        ({"model": {"outputs": [0, 0]}}, "model.outputs: '0' given twice"),
        ({"model": {"outputs": []}}, "model.outputs: found [], allowed: a list of numbers of outputs"),
        ({"data": {"target": None}}, "data.target: is missing, required by name: python"),
        ({"data": {"augment": ["flip"]}}, "data.augment: found ['flip'], not allowed with name: python"),
        ({"data": {"name": "digits"}}, "data.target: found 'own.py:data', allowed only with name: python"),
        ({"data": {"name": "mnist", "root": "x", "target": None}}, "model.inputs: found a list, not allowed with"),
        ({"train": {"loss": None}}, "train.loss_args: found a mapping, allowed only beside loss"),
        ({"train": {"label_smoothing": 0.1}}, "train.label_smoothing: found 0.1, not allowed beside loss"),
        ({"train": {"loss": "Loss"}}, "train.loss: found 'Loss', allowed: a text like 'package.module:factory'"),
        ({"train": None, "distillation": {"hard_loss": "train_loss"}}, "found 'train_loss', allowed only with"),
        ({"distillation": {"hard_loss": "none"}, "compare": []}, "train.loss: found 'own.py:Loss', but every"),
        ({"evaluation": {"metric": None, "name": "F1"}}, "evaluation.name: found 'F1', allowed only beside metric"),
        ({"evaluation": {"metric": None, "higher_is_better": False}}, "evaluation.higher_is_better: found false"),
    ],
)  # fmt: skip
def test_contradictions_are_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe(own(**changes))
    assert said in str(caught.value)
