from __future__ import annotations

from pathlib import Path

import pytest

import msqkd
from msqkd.errors import RecipeError
from msqkd.recipe import builtin, list_builtin, load_recipe, recipe_folders

_CIFAR10 = ["model.checkpoint=resnet20.ckpt", "data.root=cifar10"]
NEEDED = {f"cifar10_resnet20_{bits}": _CIFAR10 for bits in ("w8a8", "w4a8", "w4a4", "w4a8_ptq", "w4a4_ptq")}


def test_the_expected_recipes_are_found() -> None:
    names = [recipe.name for recipe in list_builtin()]
    assert names == sorted(names)
    assert {"digits_lenet5", "digits_resnet20", "cifar10_resnet20_w8a8", "mindcv_resnet50_w8a8_cluster"} <= set(names)


@pytest.mark.parametrize("name", [recipe.name for recipe in list_builtin()])
def test_every_recipe_loads_and_describes_itself(name: str) -> None:
    (entry,) = (recipe for recipe in list_builtin() if recipe.name == name)
    recipe = load_recipe(name, NEEDED.get(name, ()))
    assert recipe.name == name
    assert recipe.description == entry.description != ""
    assert recipe.result == entry.result
    assert recipe.warnings() == []
    header = entry.path.read_text(encoding="utf-8").split("apiversion:")[0]
    assert f"msqkd run {name}" in header or f"msqkd calibrate {name}" in header
    assert "Measured:" in header


def test_a_recipe_without_its_weights_says_how_to_give_them() -> None:
    with pytest.raises(RecipeError, match=r"--set model\.checkpoint=FILE"):
        load_recipe("cifar10_resnet20_w8a8")


def test_folders_beside_the_package_and_in_the_installed_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site, prefix = tmp_path / "site", tmp_path / "prefix"
    shared = prefix / "share" / "msqkd" / "recipes"
    monkeypatch.setattr(msqkd, "__file__", str(site / "msqkd" / "__init__.py"))
    monkeypatch.setattr(builtin.sys, "prefix", str(prefix))
    assert recipe_folders() == []
    assert list_builtin() == []

    (site / "recipes").mkdir(parents=True)
    shared.mkdir(parents=True)
    assert recipe_folders() == [site / "recipes", shared]
    (site / "recipes" / "both.yaml").write_text("apiversion: msqkd/v1\ndescription: beside\n")
    (site / "recipes" / "pancakes.yaml").write_text("flour: 200 g\n")
    (site / "recipes" / "broken.yaml").write_text("a: [\n")
    (site / "recipes" / "binary.yaml").write_bytes(b"\xff\xff")
    (shared / "both.yaml").write_text("apiversion: msqkd/v1\ndescription: installed\n")
    (shared / "other.yaml").write_text("apiversion: msqkd/v1\nresult: {accuracy: 0.9}\n")
    assert [(recipe.name, recipe.description, recipe.result) for recipe in list_builtin()] == [
        ("both", "beside", {}),
        ("other", "", {"accuracy": 0.9}),
    ]
