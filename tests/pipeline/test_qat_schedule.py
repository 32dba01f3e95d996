"""Recipes whose quantisation is trained or changes with the steps, from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
import yaml

Command = Callable[..., tuple[int, str, str]]
Recipe = Callable[..., Path]

LSQ4 = {"bits": 4, "learned": "lsq"}
WIDE = {"match": {"position": "first"}, "weight": {"bits": 8}, "activation": {"bits": 8}}


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def test_a_network_of_four_bits_with_trained_scales(tiny: Recipe, msqkd: Command, tmp_path: Path) -> None:
    quantization = {
        "weight": {**LSQ4, "per_channel": True},
        "activation": {**LSQ4, "delay_epochs": 1},
        "rules": [WIDE],
        "schedule": {
            "bits": [{"from_epoch": 0, "weight": 8, "activation": 8}, {"from_epoch": 1, "weight": 4, "activation": 4}]
        },
    }
    train = {"epoch_size": 2, "batch_size": 12, "lr": 0.01, "ema": 0.5, "clip_grad": 1.0}
    recipe, folder = tiny(quantization=quantization, distillation=None, train=train), tmp_path / "out"
    code, _, err = msqkd("run", recipe, "-o", folder)
    assert code == 0, err
    result, state = report(folder), json.loads((folder / "state.json").read_text())
    assert result["training"]["qat"]["start_of_activation_quantisation"] == 6
    assert result["calibration"]["kept"] == "trained"
    assert result["accuracy"]["exported"] == result["accuracy"]["qat"]
    scales = state["stages"]["qat"]["scales"]
    exported = {weight["node"]: weight["scale"] for weight in result["plan"]["weights"]}
    assert {name: exported[name] for name in scales["weights"]} == scales["weights"]
    groups = {group["name"]: group for group in result["plan"]["groups"]}
    assert scales["groups"]
    for name, scale in scales["groups"].items():
        assert np.float32(groups[name]["scale"]) == np.float32(scale)
    assert result["export"]["portable_mindir"]["max_abs_diff"] <= 1e-4
    assert result["parity"]["exceeded"] is False


def test_digits_in_four_bits(tmp_path: Path, msqkd: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bits = {"bits": 4, "learned": "lsq"}
    ends = [{**WIDE, "match": {"position": place}} for place in ("first", "last")]
    recipe = {
        "apiversion": "msqkd/v1",
        "name": "digits_w4a4",
        "model": {"name": "lenet5", "args": {"num_classes": 10, "in_channels": 1}, "input_shape": [1, 32, 32]},
        "data": {"name": "digits"},
        "pretrain": {"epoch_size": 4, "batch_size": 64, "lr": 0.05},
        "quantization": {
            "weight": {**bits, "per_channel": True},
            "activation": {**bits, "delay": 0, "observer": "mse"},
            "rules": ends,
        },
        "train": {"epoch_size": 2, "batch_size": 64, "opt": "adamw", "lr": 0.002, "ema": 0.9},
        "compare": [],
        "calibration": {"samples": 200},
        "export": {"formats": ["portable_mindir"]},
    }
    Path("digits.yaml").write_text(yaml.safe_dump(recipe))
    code, _, err = msqkd("run", "digits.yaml", "-o", "out")
    assert code == 0, err
    result = report(Path("out"))
    accuracy = result["accuracy"]
    assert accuracy["qat"] > max(90.0, accuracy["float"] - 3.0)
    assert accuracy["exported"] > accuracy["qat"] - 2.0
    assert sorted({group["bits"] for group in result["plan"]["groups"]}) == [4, 8]
    assert all(group["scale"] is not None for group in result["plan"]["groups"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"schedule": {"progressive": {"interval": 20}}, "activation": {"delay": 1}},
            "changes something at step 40, counted from 0",
        ),
        ({"activation": {"delay_epochs": 7}}, "quantization.activation.delay_epochs: begins at epoch 7"),
    ],
)
def test_a_schedule_longer_than_the_training(
    tiny: Recipe, msqkd: Command, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    code, _, err = msqkd("run", tiny(quantization=settings), "-o", tmp_path / "out")
    assert code == 2
    assert message in err
