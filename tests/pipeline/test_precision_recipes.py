"""Recipes whose layers store integers and compute in float."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

Command = Callable[..., tuple[int, str, str]]
Recipe = Callable[..., Path]


def rules(*found: tuple[dict[str, str], str]) -> list[dict[str, Any]]:
    return [{"match": match, "precision": precision} for match, precision in found]


def test_a_run_with_every_precision(tiny: Recipe, msqkd: Command, tmp_path: Path) -> None:
    section = {
        "precision": "dynamic",
        "activation": {"delay": 3},
        "rules": [
            {"match": {"type": "Block"}, "precision": "int8"},
            {"match": {"path": "stem"}, "precision": "weight-only", "weight": {"bits": 4, "per_channel": True}},
        ],
    }
    recipe = tiny(quantization=section, distillation=None, export={"formats": ["portable_mindir", "ms", "lite_mindir"]})
    code, out, err = msqkd("run", recipe, "-o", tmp_path / "out")
    assert code == 0, err
    assert "weight-only: stem (Conv2D): weights stored in 4 bits, computed in float" in out + err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    found = {node["name"]: node["precision"] for node in report["plan"]["nodes"]}
    assert (found["stem"], found["block.conv"], found["fc"]) == ("weight-only", "int8", "dynamic")
    assert report["export"]["portable_mindir"]["max_abs_diff"] == 0
    assert report["export"]["ms"]["differing_values"] == 0
    layers = {row["name"]: row for row in report["layers"]}
    assert layers["stem"]["weight"]["bits"] == 4
    assert layers["fc"]["sqnr_db"] > 3
    assert "compute in float with weights stored as integers" in (tmp_path / "out" / "report.html").read_text()


def test_a_run_with_float16_layers_on_an_npu(tiny: Recipe, msqkd: Command, tmp_path: Path) -> None:
    section = {"activation": {"delay": 3}, "rules": rules(({"path": "stem"}, "float16"), ({"path": "fc"}, "float16"))}
    formats = {"formats": ["portable_mindir", "ascend_mindir"]}
    recipe = tiny(target="ascend", quantization=section, distillation=None, export=formats)
    code, _, err = msqkd("run", recipe, "-o", tmp_path / "out")
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    found = {node["name"]: node["precision"] for node in report["plan"]["nodes"]}
    assert (found["stem"], found["block.conv"], found["fc"]) == ("float16", "int8", "float16")
    assert report["export"]["portable_mindir"]["max_abs_diff"] == 0
    assert report["accuracy"]["exported"] == report["accuracy"]["qat"]
    layers = {row["name"]: row for row in report["layers"]}
    assert layers["stem"]["weight"] is None
    assert layers["stem"]["sqnr_db"] > 3  # the training has moved it, too


def test_what_cannot_be_is_told_before_anything_runs(tiny: Recipe, msqkd: Command, tmp_path: Path) -> None:
    cases = [
        (
            {"rules": rules(({"op": "Conv2D"}, "dynamic"))},
            "rule 'rules[0] (op: Conv2D)': stem (Conv2D) cannot have precision 'dynamic': only dense layers",
        ),
        (
            {"precision": "weight-only"},
            "export.formats: lite_mindir carries the parameters of int8 layers, and no layer is int8 here",
        ),
        (
            {"precision": "dynamic", "activation": {"delay": 3, "bits": 16}},
            "export.formats: no .ms file is possible: fc has inputs of 16 bits, which ms does not hold; allowed: ",
        ),
        (
            {"rules": rules(({"path": "fc"}, "float16"))},
            "rule 'rules[0] (path: fc)': fc (Dense) cannot have precision 'float16' on lite_arm: MindSpore",
        ),
        (
            {"precision": "dynamic", "activation": {"delay": 1000}},
            "'the input of fc' would never be quantised",
        ),
    ]
    for section, text in cases:
        formats = ["lite_mindir" if "carries" in text else "ms" if ".ms" in text else "portable_mindir"]
        recipe = tiny(quantization=section, export={"formats": formats})
        code, _, err = msqkd("run", recipe, "-o", tmp_path / "out")
        assert code == 2, err
        (line,) = [line for line in err.splitlines() if line.startswith("msqkd: ")]
        assert text in line
