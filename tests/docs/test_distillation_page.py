"""docs/distillation.md: its Python is executed, its recipes are recipes, and its numbers are those of the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import yaml

from msqkd.distill.schedule import default_alpha, default_temperature
from msqkd.recipe import make_recipe

PAGE = (Path(__file__).parents[2] / "docs" / "distillation.md").read_text(encoding="utf-8")


def test_the_example_runs(tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (tmp_path / "page.py").write_text(block, encoding="utf-8")
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("loss") == 4


def test_the_recipes_are_recipes() -> None:
    model = {"name": "resnet20", "checkpoint": "resnet20.ckpt"}
    base = {"apiversion": "msqkd/v1", "name": "page", "model": model, "data": {"name": "digits"}}
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 6
    for block in blocks:
        assert make_recipe({**base, **yaml.safe_load(block)}).distillation is not None


def test_the_defaults_are_those_of_the_code() -> None:
    table = [re.findall(r"[\d.]+", line) for line in PAGE.splitlines() if re.match(r"\| (bits|`alpha`|`temp)", line)]
    bits, alpha, temperature = [[float(number) for number in row] for row in table]
    assert alpha == [default_alpha(int(number)) for number in bits]
    assert temperature == [default_temperature(int(number)) for number in bits]
