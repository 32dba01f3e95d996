"""What docs/training.md shows and lists is so."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from msqkd.data.augment import AUGMENTATIONS
from msqkd.data.encoded import RANDOM_RESIZED_CROP
from msqkd.recipe import TrainSection

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")


def rows(title: str) -> list[str]:
    """The names in the first column of the table under a heading."""
    (part,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.S | re.M)
    cells = [line.split("|")[1] for line in part.partition("|---|")[2].splitlines() if line.startswith("| `")]
    return [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]


def test_the_settings_are_a_section_of_a_recipe() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    section = TrainSection(**{**yaml.safe_load(block)["train"], "min_lr": 1e-5})
    assert (section.samples_a_step, section.loss_scale) == (256, "dynamic")


@pytest.mark.parametrize(
    ("title", "names"),
    [
        ("Optimisers", get_args(TrainSection.model_fields["opt"].annotation)),
        ("Schedules", get_args(TrainSection.model_fields["scheduler"].annotation)),
        ("Float16", get_args(TrainSection.model_fields["amp_level"].annotation)),
        ("Augmentations", (*AUGMENTATIONS, RANDOM_RESIZED_CROP)),
    ],
)
def test_every_name_is_listed(title: str, names: tuple[str, ...]) -> None:
    assert sorted(rows(title)) == sorted(names)


def test_the_example_with_model_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (tmp_path / "training_page.py").write_text(block, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("training_page")
    assert "steps done: 8" in capsys.readouterr().out
    assert (tmp_path / "qat.state").exists()
