"""kill -9 anywhere, the same command again: the run ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest

from msqkd.train.state import read_archive

ROOT = Path(__file__).parents[2]

# Counts what happens, and kills itself at the event given: "name of the event:number".
DRIVER = """
import os, signal, sys
from msqkd import cli, files
from msqkd.distill import step as taught
from msqkd.pipeline import objects, run
from msqkd.train import loop, step

name, _, number = os.environ["DIES_AT"].partition(":")
left = {name: int(number or 0)}

def happens(event):
    if event == name:
        left[event] -= 1
        if left[event] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

def watched(owner, attribute, event, before=True):
    real = getattr(owner, attribute)
    def call(*args, **kwargs):
        if before:
            happens(event)
        result = real(*args, **kwargs)
        if not before:
            happens(event)
        return result
    setattr(owner, attribute, call)

watched(step.TrainStep, "__call__", "step")
watched(taught.DistillTrainOneStepCell, "__call__", "taught")
watched(loop, "save_state", "rotated")  # the older states are moved, the new one is not there
watched(objects, "divergence", "calibration")
watched(run, "export_files", "exported", before=False)
watched(files.os, "replace", "replaced")
loop._SAVE_SECONDS = -1.0  # a state after every step
run._Run._forget_states = lambda self: None
cli.main()
"""


def run_it(folder: Path, recipe: Path, output: str, dies_at: str = "") -> int:
    driver = folder / "driver.py"
    driver.write_text(DRIVER)
    python = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, driver, "run", recipe, "-o", output], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "DIES_AT": dies_at, "PYTHONPATH": python}, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def left_in(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What was found (without times), and the last state of the training: weights, ranges, optimiser."""
    stages = json.loads((folder / "state.json").read_text())["stages"]

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if "seconds" not in k and k != "data_share"}
        return value

    arrays, meta = read_archive(folder / "qat_kd.state.npz")
    return {**timeless(stages), "steps": meta["steps"]}, arrays


@pytest.mark.slow
def test_a_killed_run_ends_equal_to_the_bit(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    recipe = tiny(
        compare=[],
        pretrain={"epoch_size": 2, "batch_size": 12, "lr": 0.05, "log_interval": 1},
        train={
            "epoch_size": 2,
            "batch_size": 12,
            "lr": 0.01,
            "log_interval": 1,
            "opt": "adamw",
            "clip_grad": 1.0,
            "ema": 0.9,
            "accumulate": 2,
        },
        quantization={"weight": {"learned": "lsq"}, "activation": {"delay": 3, "learned": "lsq"}},
        distillation={"alpha": 0.7, "soft_loss": "mse"},
    )
    assert run_it(tmp_path, recipe, "whole") == 0
    rng = np.random.default_rng(20)
    kills = [f"step:{rng.integers(1, 12)}", f"rotated:{rng.integers(1, 5)}", f"taught:{rng.integers(1, 5)}"]
    kills += ["calibration:1", "exported:0"]
    for kill in kills:
        assert run_it(tmp_path, recipe, "killed", kill) == -signal.SIGKILL, kill
    assert run_it(tmp_path, recipe, "killed") == 0
    (expected, expected_state), (found, found_state) = left_in(tmp_path / "whole"), left_in(tmp_path / "killed")
    assert found == expected
    assert found_state.keys() == expected_state.keys()
    for name, array in expected_state.items():
        np.testing.assert_array_equal(found_state[name], array, err_msg=name)
    assert {"float", "qat_kd", "calibration", "export"} <= found.keys()
