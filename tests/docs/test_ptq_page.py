"""docs/ptq.md: its Python is executed, its recipe is one, and it names every method."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import yaml

from msqkd.quant.algorithms.order import STAGES
from msqkd.recipe import make_recipe

PAGE = (Path(__file__).parents[2] / "docs" / "ptq.md").read_text(encoding="utf-8")


def test_the_example_runs(tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (tmp_path / "page.py").write_text(block, encoding="utf-8")
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "logits: (16, 3)" in done.stdout


def test_the_recipe_is_one() -> None:
    model = {"name": "resnet20", "checkpoint": "resnet20.ckpt"}
    base = {"apiversion": "msqkd/v1", "name": "page", "model": model, "data": {"name": "digits"}}
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    assert make_recipe({**base, **yaml.safe_load(block)}).ptq.methods == ["equalize", "adaround", "bias_correction"]


def test_every_method_has_a_row_in_the_order_of_the_code() -> None:
    assert re.findall(r"^\| `(\w+)` \|", PAGE, re.M) == list(STAGES)
