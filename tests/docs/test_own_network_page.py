"""The example of docs/own_network.md runs as it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "own_network.md").read_text(encoding="utf-8")


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from msqkd.deploy.bundle import Wanted, from_run, write_bundle
    from msqkd.errors import ExportError
    from msqkd.pipeline.run import run_recipe
    from msqkd.progress import Reporter
    from msqkd.recipe import load_recipe

    monkeypatch.chdir(tmp_path)
    for name, language in (("own.py", "python"), ("meter.yaml", "yaml")):
        (block,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)
        Path(name).write_text(block, encoding="utf-8")
    recipe = load_recipe("meter.yaml")
    assert recipe.distillation is not None
    assert (recipe.distillation.hard_loss, recipe.verify.max_deviation) == ("train_loss", 0.01)
    run_recipe(recipe, Path("out"), train=False)
    found = json.loads(Path("out/report.json").read_text(encoding="utf-8"))
    assert found["metric"]["name"] == "mean error"
    assert found["accuracy"]["exported"] < 0.5
    assert not found["parity"]["exceeded"]

    # Two inputs are exported for the device; what works on files of samples says that it takes one.
    source = from_run("out", Reporter())
    with pytest.raises(ExportError, match="Meter takes picture, facts; allowed for benchmark: one float32 input"):
        write_bundle(source, "device", Wanted(benchmark=2), Reporter())
    assert not Path("device").exists()
