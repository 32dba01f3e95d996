"""Recipes are YAML 1.2; what YAML 1.1 reads otherwise is refused where it could be misread."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from msqkd.analysis.fragments import as_yaml
from msqkd.errors import RecipeError
from msqkd.recipe import Recipe, dump_recipe, load_recipe, make_recipe
from msqkd.recipe.text import parse_yaml, write_yaml

# Examples of sections 10.2 and 10.3 of the specification of YAML 1.2.2, and what is neither number nor boolean there.
READ = {
    "0": 0, "-0": 0, "+12": 12, "0o14": 12, "0x3A": 58, "-19": -19, "12e03": 12000.0, "-2E+05": -200000.0, "1e-4": 1e-4,
    "0.": 0.0, "-.5": -0.5, ".inf": math.inf, "-.INF": -math.inf, "1.5": 1.5, "true": True, "False": False, "~": None,
    "Null": None, "yes": "yes", "off": "off", "1:30": "1:30", "190:20:30.15": "190:20:30.15", "1_000": "1_000",
    "0b11": "0b11", "+0x1F": "+0x1F", "2001-12-14": "2001-12-14", "=": "=", "text": "text", "08": "08", "010": "010",
}  # fmt: skip


@pytest.mark.parametrize("written", READ)
def test_plain_scalars_are_those_of_yaml_1_2(written: str) -> None:
    found = parse_yaml(written).value
    assert found == READ[written]
    assert type(found) is type(READ[written]) or isinstance(found, str)


@pytest.fixture(params=["file", "override"])
def load(request: pytest.FixtureRequest, minimal: dict[str, Any], tmp_path: Path) -> Any:
    """A recipe with one more setting, written into its file or given with --set."""

    def loaded(key: str, text: str) -> Recipe:
        if request.param == "override":
            return make_recipe(minimal, [f"{key}={text}"])
        path = tmp_path / "r.yaml"
        names = key.split(".")
        lines = ["  " * depth + f"{name}:" for depth, name in enumerate(names)]
        path.write_text(
            yaml.safe_dump({k: v for k, v in minimal.items() if k != names[0]}) + "\n".join(lines) + f" {text}"
        )
        return load_recipe(path)

    return loaded


@pytest.mark.parametrize(
    ("key", "text", "allowed"),
    [
        ("train.epoch_size", "010", "an integer of 1 or more"),
        ("train.epoch_size", "1:30", "an integer of 1 or more"),
        ("train.epoch_size", "1_0", "an integer of 1 or more"),
        ("train.epoch_size", "0b11", "an integer of 1 or more"),
        ("train.lr", "010", "a number above 0"),
        ("train.lr", "1_000.5", "a number above 0"),
        ("quantization.weight.per_channel", "yes", "true or false"),
        ("train.dropout", "On", "true or false"),
        ("train.milestones", "[010]", "an integer of 1 or more"),
    ],
)
def test_what_the_versions_read_differently_is_no_number_and_no_boolean(
    load: Any, key: str, text: str, allowed: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        load(key, text)
    assert f"found '{text.strip('[]')}', allowed: {allowed}; versions 1.1 and 1.2 of YAML" in str(caught.value)


@pytest.mark.parametrize("text", ["!!int 010", "!!int 1_0", "!!int 1:30", "!!float 1:30", "!!float 1_0.5"])
def test_a_tag_makes_no_number_of_it(minimal: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=r"is no number of YAML 1\.2"):
        make_recipe(minimal, [f"train.lr={text}"])


@pytest.mark.parametrize("text", ["yes", "010", "{flag: off}", "[1:30]", "1_000"])
def test_arguments_of_a_factory_are_not_guessed(minimal: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=r"versions 1\.1 and 1\.2 of YAML"):
        make_recipe(minimal, [f"model.args.width={text}"])


def test_what_both_mean_is_taken(load: Any) -> None:
    assert load("train.epoch_size", "0o10").train.epoch_size == 8
    assert load("train.epoch_size", "0x1F").train.epoch_size == 31
    assert load("train.lr", "1e-4").train.lr == 1e-4
    assert load("model", "{name: lenet5, checkpoint: a.ckpt, args: {eps: 1e-5, word: 'yes'}}").model.args == {
        "eps": 1e-5, "word": "yes"
    }  # fmt: skip
    assert load("distillation", "{cache: on}").distillation.cache == "on"
    described = load("description", "010")
    assert described.description == "010"
    assert yaml.safe_load(dump_recipe(described))["description"] == "010"


AWKWARD = ["yes", "No", "on", "off", "y", "010", "0o10", "0x1F", "1:30", "1_000", "1e5", "1e-4", ".5", "~", "null",
           "08", "2024-01-01", "=", "<<", "true", "", " x", "a\u2028b", ".inf", "0b1"]  # fmt: skip


@pytest.mark.parametrize("text", AWKWARD)
def test_texts_are_written_so_that_both_versions_read_them_back(text: str) -> None:
    written = write_yaml({"key": text, "list": [text]})
    assert parse_yaml(written).value == {"key": text, "list": [text]}
    assert yaml.safe_load(written) == {"key": text, "list": [text]}
    assert parse_yaml(as_yaml({"name": text})).value == {"name": text}


def test_a_dumped_recipe_is_the_recipe(minimal: dict[str, Any], tmp_path: Path) -> None:
    args = {f"key{number}": text for number, text in enumerate(AWKWARD)}
    numbers = {"small": 1e-30, "large": 1e22, "int": 10, "flag": True, "list": [1e-4, 0.1, -3]}
    values = {**minimal, "model": {**minimal["model"], "args": {**args, **numbers}}, "description": "0o17"}
    recipe = make_recipe(values)
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    again = load_recipe(path)
    assert again.model.args == recipe.model.args
    assert again == recipe
