from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest

from msqkd.files import sha256

Command = Callable[..., tuple[int, str, str]]
Recipe = Callable[..., Path]


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


@pytest.mark.rehearsal
def test_a_run_from_end_to_end(tiny: Recipe, msqkd: Command, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    recipe = tiny(distillation={})
    code, out, err = msqkd("run", recipe, "-o", folder, "--json")
    assert code == 0, err
    result = report(folder)
    assert {
        "apiversion",
        "name",
        "recipe",
        "recipe_sha256",
        "seed",
        "target",
        "versions",
        "data",
        "accuracy",
        "size_bytes",
        "int8_share",
        "sha256",
        "export",
        "parity",
        "calibration",
        "training",
        "layers",
        "plan",
        "warnings",
        "seconds",
        "started",
    } <= set(result)
    accuracy = result["accuracy"]
    assert accuracy["exported"] == accuracy["qat_kd"] or result["calibration"]["kept"] == "calibrated"
    assert (accuracy["qat"], accuracy["float_ft"], accuracy["float_kd"]) == (None, None, None)
    assert result["int8_share"] == 1.0
    assert result["export"]["portable_mindir"]["max_abs_diff"] <= 1e-4
    assert result["export"]["ms"]["differing_values"] == 0
    assert result["export"]["ms"]["compared_values"] > 1000
    assert isinstance(accuracy["integer"], float)
    parity = result["parity"]
    assert (parity["split"], parity["samples"], parity["machine"]) == ("calibration", 24, "arm64")
    assert parity["exceeded"] is False
    assert {value["layer"] for value in parity["values"]} >= {"x", "stem", "block.conv", "fc"}
    assert "What the device computes" in (folder / "report.html").read_text()
    assert [entry[0] for entry in result["training"]["qat_kd"]["accuracy"]] == [1, 2]
    assert result["training"]["qat_kd"]["start_of_activation_quantisation"] == 3
    for file, checksum in result["sha256"].items():
        assert sha256(folder / file) == checksum
    told = json.loads(out)
    assert told["accuracy"] == accuracy
    assert told["parity"] == {key: value for key, value in parity.items() if key != "values"}
    names = {child.name for child in folder.iterdir()}
    assert names == {
        "recipe.yaml",
        "state.json",
        "plan.json",
        "float.ckpt",
        "qat_kd.ckpt",
        "float.mindir",
        "tiny_lite.mindir",
        "tiny_portable.mindir",
        "tiny_ms.ms",
        "report.json",
        "report.html",
    }

    # A finished run is told again, not done again.
    files = (".mindir", ".ckpt", ".ms")
    before = {name: (folder / name).stat().st_mtime_ns for name in names if name.endswith(files)}
    code, out, err = msqkd("run", recipe, "-o", folder)
    assert code == 0
    assert "done before" in err
    assert "exported INT8 file" in out
    assert "on the 24 calibration samples the device reaches" in out
    assert {name: (folder / name).stat().st_mtime_ns for name in before} == before

    # Another recipe in the same folder is refused with what differs; --fresh forgets the first.
    code, _, err = msqkd("run", recipe, "-o", folder, "--set", "train.lr=0.02", "seed=5")
    assert code == 2
    assert "holds a run of another recipe (differs in seed: 0 → 5, train.lr: 0.01 → 0.02)" in err
    assert "--fresh" in err
    (folder / "state.json").write_text("{")
    code, _, err = msqkd("run", recipe, "-o", folder)
    assert (code, "state.json is damaged" in err) == (2, True)
    code, _, err = msqkd("run", recipe, "-o", folder, "--fresh", "--set", "train.lr=0.02")
    assert code == 0, err
    assert "done before" not in err
    assert "lr: 0.02" in report(folder)["recipe"]


def test_live_batchnorm_with_every_comparison(tiny: Recipe, msqkd: Command, tmp_path: Path) -> None:
    quantization = {"batchnorm": "live", "activation": {"delay": 0, "observer": "kl"}, "weight": {"observer": "mse"}}
    recipe = tiny(quantization=quantization, compare=["qat", "float", "float_kd"], train={"batch_size": 12})
    code, _, err = msqkd("run", recipe, "-o", tmp_path / "out")
    assert code == 0, err
    accuracy = report(tmp_path / "out")["accuracy"]
    assert all(isinstance(value, float) for value in accuracy.values())


def test_interrupted_run_goes_on(tiny: Recipe, msqkd: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from msqkd.train.step import TrainStep

    real = TrainStep.__call__

    def pressed(self: TrainStep, *inputs: Any) -> Any:
        if self.steps_done == 4:
            signal.raise_signal(signal.SIGINT)
        return real(self, *inputs)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", pressed)
        code, _, err = msqkd("run", tiny(), "-o", tmp_path / "out")
    assert code == 130
    assert "run the same command again to go on" in err
    assert (tmp_path / "out" / "pretrain.state.npz").exists()
    code, _, err = msqkd("run", tiny(), "-o", tmp_path / "out")
    assert code == 0, err


def started(recipe: Path, folder: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "GLOG_v": "3"}
    command = [sys.executable, "-m", "msqkd", "run", str(recipe), "-o", str(folder)]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, cwd=recipe.parent
    )


@pytest.mark.slow
def test_killed_at_any_point_it_ends_with_the_same_files(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = str(Path(__file__).resolve().parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([repository, os.environ.get("PYTHONPATH", "")]))
    recipe = tiny()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert started(recipe, whole).wait() == 0
    points = ["state.json", "pretrain.state.npz", "float.ckpt", "qat_kd.state.npz", "float.mindir"]
    for point in points:
        process = started(recipe, killed)
        deadline = time.monotonic() + 60
        while not (killed / point).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert started(recipe, killed).wait() == 0
    one, other = report(whole), report(killed)
    assert other["accuracy"] == one["accuracy"]
    assert other["sha256"] == one["sha256"]
    assert not [child for child in killed.iterdir() if child.name.startswith(".")], "nothing half-written is left"


def test_teacher_of_ones_own(tiny: Recipe, msqkd: Command, tmp_path: Path) -> None:
    from msqkd.checkpoints import save_checkpoint
    from msqkd.models import build_model

    net = build_model("python", "nets.py:Tiny", {})
    save_checkpoint({p.name: p.asnumpy() for p in net.get_parameters()}, tmp_path / "teacher.ckpt")
    teacher = {"source": "python", "target": "nets.py:Tiny", "checkpoint": "teacher.ckpt"}
    code, _, err = msqkd("run", tiny(teacher=teacher, pretrain={"batch_size": 12}), "-o", tmp_path / "out")
    assert code == 0, err
    assert np.isfinite(report(tmp_path / "out")["calibration"]["loss"]["trained"])


def test_calibrate_exports_the_float_network_without_training(tiny: Recipe, msqkd: Command, tmp_path: Path) -> None:
    recipe = tiny()
    code, out, err = msqkd("calibrate", recipe, "--output", "ptq")
    assert code == 0, err
    report = json.loads((tmp_path / "ptq" / "report.json").read_text())
    accuracy = report["accuracy"]
    assert accuracy["exported"] == accuracy["ptq"]
    assert accuracy["qat"] is None
    assert accuracy["qat_kd"] is None
    assert report["calibration"] == {"samples": 24, "observer": "percentile"}
    assert report["export"]["portable_mindir"]["max_abs_diff"] <= 1e-4
    assert "PTQ only" in out
    assert "QAT" not in out
    # The folder is a calibration's: a run does not take its export for its own.
    code, _, err = msqkd("run", recipe, "--output", "ptq")
    assert code == 2
    assert "command: 'calibrate' → 'run'" in err


def test_a_training_that_collapses_is_named(tiny: Recipe, msqkd: Command, tmp_path: Path) -> None:
    # A learning rate that throws the weights away without making the loss NaN: nothing may pretend it went well.
    recipe = tiny(
        train={"epoch_size": 2, "batch_size": 12, "lr": 5.0, "opt": "adam"},
        pretrain={"epoch_size": 12, "batch_size": 12},
    )
    code, _, err = msqkd("run", recipe, "--output", "out")
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["accuracy"]["qat_kd"] < report["accuracy"]["ptq"] - 5
    assert any("the training diverged" in warning for warning in report["warnings"])
    assert "the training diverged" in " ".join(err.split())
