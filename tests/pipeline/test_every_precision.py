"""Whole runs in which no layer computes in int8; `test_run` and `test_precision_recipes` have those with int8."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import pytest

Command = Callable[..., tuple[int, str, str]]
Recipe = Callable[..., Path]

EVERY_LAYER = {"path": "*"}


def general(precision: str) -> dict[str, Any]:
    return {"precision": precision}


def by_rule(precision: str) -> dict[str, Any]:
    return {"rules": [{"match": EVERY_LAYER, "precision": precision}]}


RUNS = [
    ("lite_arm", general("weight-only"), "weight-only", ["portable_mindir", "ms_weight"]),
    ("ascend", general("weight-only"), "weight-only", ["portable_mindir"]),
    ("ascend", by_rule("float16"), "float16", ["portable_mindir"]),
]


@pytest.mark.parametrize(("target", "section", "precision", "formats"), RUNS, ids=[f"{r[0]}-{r[2]}" for r in RUNS])
def test_a_whole_run(
    tiny: Recipe, msqkd: Command, tmp_path: Path,
    target: str, section: dict[str, Any], precision: str, formats: list[str],
) -> None:  # fmt: skip
    recipe = tiny(
        target=target,
        pretrain={"epoch_size": 1, "batch_size": 24, "lr": 0.05},
        quantization={"activation": {"delay": 1}, **section},
        distillation=None,
        train={"epoch_size": 1, "batch_size": 24, "lr": 0.01},
        export={"formats": formats},
    )
    code, _, err = msqkd("run", recipe, "--output", "out")
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["accuracy"]["qat"] is not None
    assert precision in {node["precision"] for node in report["plan"]["nodes"]}
    assert set(formats) <= report["export"].keys()
    assert report["export"]["portable_mindir"]["max_abs_diff"] <= 1e-4


def test_a_network_that_is_planned_float_everywhere_is_refused_before_the_training(
    tiny: Recipe, msqkd: Command, tmp_path: Path
) -> None:
    recipe = tiny(quantization=by_rule("float"), distillation=None)
    code, _, err = msqkd("run", recipe, "--output", "out")
    assert code == 2
    assert "no layer of" in err
    assert "(int8 share 0%)" in err
    assert not (tmp_path / "out" / "float.ckpt").exists()
