from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import yaml

from msqkd.recipe import make_recipe
from msqkd.recipe.docs import schema_markdown

PAGE = Path(__file__).parents[2] / "docs" / "recipe.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == schema_markdown(), "run: python -m msqkd.recipe.docs > docs/recipe.md"


def test_the_example_of_the_page_is_a_recipe() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", schema_markdown(), flags=re.DOTALL)
    assert make_recipe(yaml.safe_load(example)).model.name == "lenet5"


def test_every_row_is_complete() -> None:
    rows = [line for line in schema_markdown().splitlines() if line.startswith("| `")]
    assert len(rows) > 70
    for row in rows:
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
        assert len(cells) == 4
        assert all(cells), row


def test_the_values_of_a_key_are_listed() -> None:
    page = schema_markdown()
    assert "| `bits` | an integer from 2 to 8 | `8` |" in page
    assert "| `opt` | `momentum`, `sgd`, `adamw` or `adam` | `momentum` |" in page
    assert "## quantization.rules[].match" in page


def test_reading_recipes_does_not_import_mindspore() -> None:
    code = "import sys, msqkd.recipe, msqkd.recipe.docs; msqkd.recipe.list_builtin(); print('mindspore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
