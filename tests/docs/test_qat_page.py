"""The recipe fragments of docs/qat.md are ones a recipe can have, and its Python is right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from mindspore import nn

from msqkd import QuantConfig, WeightQuantizer, prepare_qat
from msqkd.recipe import make_recipe

PAGE = (Path(__file__).parents[2] / "docs" / "qat.md").read_text(encoding="utf-8")
FRAGMENTS = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)


@pytest.mark.parametrize("fragment", FRAGMENTS)
def test_a_fragment_is_part_of_a_recipe(fragment: str) -> None:
    whole = {
        "apiversion": "msqkd/v1",
        "name": "page",
        "model": {"name": "lenet5", "checkpoint": "a.ckpt"},
        "data": {"name": "digits"},
    }
    assert make_recipe({**whole, **yaml.safe_load(fragment)}).name == "page"


def test_the_python_of_the_page() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    names = {"QuantConfig": QuantConfig, "WeightQuantizer": WeightQuantizer, "prepare_qat": prepare_qat}
    names["net"] = nn.SequentialCell(nn.Conv2d(3, 2, 3), nn.ReLU())
    exec(block, names)
    assert any(parameter.name.endswith(".learned.relative") for parameter in names["cell"].trainable_params())
