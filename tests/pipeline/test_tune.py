"""`msqkd tune`: cures are tried until the goal is reached; an interrupted tuning ends with the same recipe."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Callable
from unittest.mock import Mock

import pytest

from msqkd.errors import DataError, FolderError, MissingDependencyError
from msqkd.pipeline import tune
from msqkd.progress import Reporter
from msqkd.recipe import Recipe, load_recipe

Write, Command = Callable[..., Path], Callable[..., tuple[int, str, str]]
METRICS = """
import numpy as np


def likelihood(outputs, labels):
    shifted = outputs - outputs.max(-1, keepdims=True)
    return float((shifted[np.arange(len(labels)), labels] - np.log(np.exp(shifted).sum(-1))).mean())


def nothing(outputs, labels):
    return float("nan")


def wrong(outputs, labels):
    return float((outputs.argmax(-1) != labels).mean())
"""


def few_bits(tiny: Write, **sections: Any) -> Path:
    bits = {"weight": {"bits": 2}, "activation": {"bits": 4, "delay": 3}}
    sections = {
        "quantization": bits, "calibration": {"samples": 24, "batch_size": 12},
        "export": {"formats": ["portable_mindir"]}, **sections,
    }  # fmt: skip
    return tiny("few_bits", **sections)


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two methods, and one count of layers."""
    monkeypatch.setattr(tune, "_METHODS", (("weight_ranges", {}), ("bias_correction", {})))
    monkeypatch.setattr(tune, "_OBSERVERS", tune._OBSERVERS[-1:])
    monkeypatch.setattr(tune, "_FLOAT_LAYERS", (1, 2))


@pytest.fixture
def recipe(tiny: Write, tmp_path: Path) -> Recipe:
    (tmp_path / "metrics.py").write_text(METRICS)
    return load_recipe(str(few_bits(tiny, evaluation={"metric": "metrics.py:likelihood"})))


@pytest.mark.usefixtures("cheap", "graph_mode")
def test_cures_are_tried_and_the_recipe_gives_the_best_again(recipe: Recipe, msqkd: Command, tmp_path: Path) -> None:
    goal = tune.Goal(max_drop=-1e9)  # never reached: the training comes last
    result = tune.tune_recipe(recipe, tmp_path / "whole", goal, Reporter(quiet=True))
    assert not result["reached"]
    titles = [trial["title"] for trial in result["trials"]]
    assert titles[:2] == ["as the recipe says", "observer minmax"]
    assert sum("float: " in title for title in titles[:-1]) == 2
    assert [trial["trains"] for trial in result["trials"]] == [False] * 7 + [True]
    assert titles[-1].endswith("; training")
    assert result["trials"][-1]["test_metric"] is not None
    assert [row["place"] for row in result["teachers"]["teachers"]] == ["teacher"]  # looked at before the training
    assert result["best"]["drop"] == min(trial["drop"] for trial in result["trials"])
    assert {name: item["samples"] for name, item in result["sets"].items()} == {
        "calibration": 24, "tuning": 48, "evaluation": 30,
    }  # fmt: skip
    page = (tmp_path / "whole" / "tune.html").read_text()
    assert all(title in page for title in [*titles, result["teachers"]["verdict"]])
    # The recipe gives what was confirmed.
    trained = result["best"]["trains"]
    code, _, err = msqkd("run" if trained else "calibrate", "whole/tuned.yaml", "-o", "again")
    assert code == 0, err
    report = json.loads((tmp_path / "again" / "report.json").read_text())
    assert report["accuracy"]["exported" if trained else "ptq"] == result["best"]["test_metric"]


@pytest.mark.slow
@pytest.mark.usefixtures("cheap", "graph_mode")
def test_an_interrupted_tuning_ends_with_the_same_recipe(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goal = tune.Goal(max_drop=-1e9)
    result = tune.tune_recipe(recipe, tmp_path / "whole", goal, Reporter(quiet=True))
    real, left = tune._Tuning._try, [3]

    def interrupted(self: Any, *arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(tune._Tuning, "_try", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tune.tune_recipe(recipe, tmp_path / "stopped", goal, Reporter(quiet=True))
    again = tune.tune_recipe(recipe, tmp_path / "stopped", goal, Reporter(quiet=True))
    assert again["recipe"] == result["recipe"]
    assert [trial["drop"] for trial in again["trials"]] == [trial["drop"] for trial in result["trials"]]


def test_a_goal_that_is_reached_at_once_ends_it(tiny: Write, msqkd: Command, tmp_path: Path) -> None:
    code, out, err = msqkd("tune", tiny(), "-o", "easy", "--max-drop", "100", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["reached"]
    assert [trial["title"] for trial in result["trials"]] == ["as the recipe says"]


@pytest.mark.parametrize(("evaluation", "text"), [
    ({"metric": "metrics.py:nothing"}, "evaluation.metric 'nothing': it is nan on the 30 samples"),
    ({"metric": "metrics.py:wrong"}, "set evaluation.higher_is_better: false, or mend the metric"),
])  # fmt: skip
def test_a_metric_that_tells_nothing_is_refused(
    tiny: Write, msqkd: Command, tmp_path: Path, evaluation: dict[str, Any], text: str
) -> None:
    (tmp_path / "metrics.py").write_text(METRICS)
    code, _, err = msqkd("tune", tiny(evaluation=evaluation), "-o", "out")
    assert code == 2
    assert text in " ".join(err.split())


def test_nothing_left_to_rank_trials_on(tiny: Write, msqkd: Command) -> None:
    code, _, err = msqkd("tune", tiny(calibration={"samples": 72, "batch_size": 12}), "-o", "out")
    assert code == 2
    assert "has 72 samples, and calibration takes 72: none is left to rank candidates on" in " ".join(err.split())


@pytest.mark.usefixtures("cheap", "graph_mode")
def test_a_trial_that_mindspore_cannot_compute_is_passed_over(
    tiny: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tune._Tuning._measured

    def failing(self: Any, recipe: Any, split: Any) -> float:
        if recipe.ptq.methods == ["weight_ranges"]:
            raise RuntimeError("-----\nUnsupported op [Sort] on CPU\n")
        return real(self, recipe, split)

    monkeypatch.setattr(tune._Tuning, "_measured", failing)
    goal = tune.Goal(max_drop=-1e9, trials=4)
    result = tune.tune_recipe(load_recipe(str(few_bits(tiny))), tmp_path / "out", goal, Reporter(quiet=True))
    failed = result["trials"][3]
    assert failed["title"].endswith("weight_ranges")
    assert failed["error"] == "MindSpore: RuntimeError: Unsupported op [Sort] on CPU"
    assert failed["drop"] is None
    assert result["best"]["title"] != failed["title"]
    assert failed["error"] in (tmp_path / "out" / "tune.html").read_text()


@pytest.mark.usefixtures("cheap", "graph_mode")
def test_an_error_that_is_not_about_the_settings_ends_a_tuning(
    tiny: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(str(few_bits(tiny, pretrain={"epoch_size": 1, "batch_size": 24, "lr": 0.05})))
    for error in (
        RuntimeError("memory isn't enough and alloc failed"),
        FolderError("another run is at work"),
        DataError("no labels"),
        MissingDependencyError("pip install"),
        OSError(28, "No space left on device"),
    ):
        monkeypatch.setattr(tune._Tuning, "_measured", Mock(side_effect=error))
        with pytest.raises(type(error), match=re.escape(str(error))):
            tune.tune_recipe(recipe, tmp_path / "out", tune.Goal(max_drop=0.0, trials=1), Reporter(quiet=True))
        state = json.loads((tmp_path / "out" / "state.json").read_text())
        assert not any(name.startswith("trial") for name in state["stages"]), "it is tried again the next time"


@pytest.mark.usefixtures("cheap", "graph_mode")
def test_minutes_count_over_all_starts(tiny: Write, tmp_path: Path) -> None:
    recipe = load_recipe(str(few_bits(tiny)))
    counts = []
    for minutes in (0.0, 1e-9, 1e6):
        goal = tune.Goal(max_drop=-1e9, trials=2, minutes=minutes)
        result = tune.tune_recipe(recipe, tmp_path / "out", goal, Reporter(quiet=True))
        counts.append(len(result["trials"]))
    assert counts == [1, 1, 2]
