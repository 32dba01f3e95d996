"""What the device computes, told at the end of a run and by `msqkd verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest

from msqkd.analysis import parity
from msqkd.errors import MissingDependencyError
from msqkd.graph.ir import Graph
from msqkd.integer.program import Program
from msqkd.quant.plan import QuantPlan

Command = Callable[..., tuple[int, str, str]]
Recipe = Finished = Callable[..., Path]

WAVES = """
from mindspore import nn, ops


class Waves(nn.Cell):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Dense(4, 3)

    def construct(self, x):
        return self.fc(ops.mean(ops.sin(ops.sin(self.conv(x))), (2, 3)))
"""
LEARNT = {"epoch_size": 12, "batch_size": 12, "lr": 0.05}


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, the device has the classes of the last layer in another order."""
    real = parity.device_program

    def program_of(graph: Graph, plan: QuantPlan) -> tuple[Program, str]:
        program, kind = real(graph, plan)
        (last,) = (step for step in program.steps if step.layer == "fc")
        for name in last.inputs[1:]:
            tensor = program.tensors[name]
            assert tensor.data is not None
            tensor.data = np.roll(tensor.data, 1, axis=0)
        return program, kind

    return lambda: monkeypatch.setattr(parity, "device_program", program_of)


def test_verify_tells_what_the_device_computes(
    finished: Finished, msqkd: Command, broken: Callable[[], None], tmp_path: Path
) -> None:
    folder = finished("calibrate", pretrain=LEARNT)
    recorded = read(folder / "report.json")
    before = {child.name: child.read_bytes() for child in folder.iterdir()}
    code, out, err = msqkd("verify", folder, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result == read(folder / "verify.json")
    assert result["verified"] is True
    found = result["parity"]
    assert (found["split"], found["samples"], found["machine"]) == ("test", 30, "arm64")
    assert found["accuracy"]["integer"] == recorded["accuracy"]["integer"]
    assert found["accuracy"]["fake_quantised"] == recorded["accuracy"]["exported"]
    assert result["export"]["ms"]["differing_values"] == 0
    assert result["sha256"] == recorded["sha256"]
    assert "What the device computes" in (folder / "verify.html").read_text()
    assert {name: (folder / name).read_bytes() for name in before} == before, "nothing else changes"

    # As a table, of some samples, of the other machine, into another folder; from a folder in another place.
    folder = folder.rename(tmp_path / "moved")
    code, out, err = msqkd("verify", folder, "--samples", 7, "--machine", "x86", "--output", tmp_path / "a" / "b")
    assert code == 0, err
    assert "tiny on lite_arm (x86): 7 test samples" in out
    assert "tiny_ms.ms: checksum as exported; 0 of" in out
    assert {child.name for child in (tmp_path / "a" / "b").iterdir()} == {"verify.json", "verify.html"}

    # The network no longer answers as it was trained: the layer is named, and the exit code says so.
    broken()
    code, out, err = msqkd("verify", folder)
    assert code == 1, err
    words = " ".join(out.split())
    assert "warning: on the 30 test samples the device reaches" in words
    assert "they part at fc (Dense)" in words
    assert read(folder / "verify.json")["verified"] is False
    assert read(folder / "verify.json")["parity"]["first_beyond_one"]["layer"] == "fc"

    # Bounds wide enough are the run's own affair; that of the accuracy does not stand for that of the predictions.
    state = read(folder / "state.json")
    for name, code in (("max_deviation", 1), ("max_changed", 0)):
        state["recipe"]["verify"][name] = 100.0
        (folder / "state.json").write_text(json.dumps(state))
        assert msqkd("verify", folder)[0] == code
    assert "changed predictions" not in " ".join(read(folder / "verify.json")["warnings"])


def test_what_verify_refuses(finished: Finished, msqkd: Command, tmp_path: Path) -> None:
    folder = finished("calibrate", pretrain=LEARNT)

    def refused(*arguments: object) -> str:
        code, out, err = msqkd("verify", *arguments)
        assert (code, out) == (2, "")
        assert "Traceback" not in err
        return err

    assert "nowhere is not the folder of a run: there is no such folder" in refused("nowhere")
    assert "machine 'mips' is unknown; allowed: x86, arm64" in refused(folder, "--machine", "mips")
    assert "output folder data.npz cannot be created" in refused(folder, "--output", "data.npz")
    assert "--samples" in refused(folder, "--samples", 0)
    assert not (folder / "verify.json").exists()
    file = folder / "tiny_portable.mindir"
    file.write_bytes(file.read_bytes()[:-1])
    text = refused(folder, "--output", "other")
    assert "tiny_portable.mindir does not match its checksum in state.json" in text
    assert not (tmp_path / "other").exists()


def test_a_run_that_deviates_keeps_its_files_and_fails(
    tiny: Recipe, msqkd: Command, broken: Callable[[], None]
) -> None:
    broken()
    for _ in ("done", "told again"):
        code, out, err = msqkd("calibrate", tiny(pretrain=LEARNT), "-o", "out")
        assert code == 1
        assert "warning: on the 24 calibration samples" in " ".join(err.split())
        assert "they part at fc (Dense)" in " ".join(out.split())
    report = read(Path("out", "report.json"))
    assert report["parity"]["exceeded"] is True
    assert any("they part at fc (Dense)" in warning for warning in report["warnings"])
    assert report["accuracy"]["integer"] < report["accuracy"]["exported"]
    assert Path("out", "tiny_ms.ms").exists()
    assert Path("out", "report.html").exists()


def test_every_format_of_a_target_is_written_and_held_against_the_network(finished: Finished) -> None:
    formats = ["portable_mindir", "ms", "ms_weight", "ms_float"]
    finished("calibrate", pretrain=LEARNT, export={"formats": formats})
    report = read(Path("out", "report.json"))
    assert list(report["export"]) == formats
    assert report["export"]["ms_float"]["max_abs_diff"] < 1e-4
    assert report["export"]["ms_weight"]["max_abs_diff"] < 1e-4
    assert report["size_bytes"]["ms_weight"] < report["size_bytes"]["ms_float"]


@pytest.mark.parametrize("target", ["lite_arm", "ascend"])
def test_onnx_files_are_held_against_the_network(finished: Finished, target: str) -> None:
    pytest.importorskip("onnxruntime")
    finished("calibrate", pretrain=LEARNT, target=target, export={"formats": ["onnx"]})
    report = read(Path("out", "report.json"))
    assert report["export"]["onnx"]["file"] == "tiny_onnx.onnx"
    assert report["export"]["onnx"]["agreement"] >= 99
    assert report["accuracy"]["exported"] == report["export"]["onnx"]["accuracy"]


def test_ascend_has_its_own_files_and_arithmetic(finished: Finished, msqkd: Command) -> None:
    folder = finished("calibrate", pretrain=LEARNT, target="ascend")
    report = read(folder / "report.json")
    assert set(report["sha256"]) == {"float.mindir", "tiny_ascend.mindir", "tiny_portable.mindir"}
    assert report["parity"]["machine"] is None
    assert report["parity"]["exceeded"] is False
    code, out, err = msqkd("verify", folder)
    assert code == 0, err
    assert "tiny on ascend: 30 test samples" in out
    code, _, err = msqkd("verify", folder, "--machine", "x86")
    assert code == 2
    assert "the target ascend has one arithmetic only" in err


def test_onnx_without_its_packages_is_refused_before_the_training(
    tiny: Recipe, msqkd: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from msqkd.exporters.onnx import runtime

    def missing() -> None:
        raise MissingDependencyError("onnxruntime is not installed; pip install 'msqkd[onnx]'")

    monkeypatch.setattr(runtime, "onnxruntime_package", missing)
    code, _, err = msqkd("run", tiny(export={"formats": ["onnx"]}), "-o", "out")
    assert code == 2
    assert "pip install 'msqkd[onnx]'" in err
    assert {child.name for child in Path("out").iterdir()} <= {"state.json", "recipe.yaml"}


def test_a_network_that_cannot_be_a_ms_file_is_refused_before_the_training(tiny: Recipe, msqkd: Command) -> None:
    recipe = tiny(model={"source": "python", "target": "waves.py:Waves", "input_shape": [1, 8, 8]})
    (recipe.parent / "waves.py").write_text(WAVES)
    code, _, err = msqkd("run", recipe, "-o", "out")
    assert code == 2
    assert "export.formats: no .ms file is possible: layer 'sin'" in err
    assert "--set 'export.formats=[lite_mindir, portable_mindir]'" in err
    code, _, err = msqkd("calibrate", recipe, "-o", "out", "--set", "export.formats=[lite_mindir, portable_mindir]")
    assert code == 0, err
    values = {value["layer"]: value for value in read(Path("out", "report.json"))["parity"]["values"]}
    assert values["sin"]["relative_error"] < 0.1


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ("ms_weight", "no .ms file is possible: layer 'sin'"),
        ("ms_float", "no .ms file is possible: layer 'sin'"),
        ("onnx", "no .onnx file is possible: Waves: 'erfinv' (Erfinv) cannot be written as ONNX; "),
    ],
)
def test_every_format_says_before_the_training_what_it_cannot_hold(
    tiny: Recipe, msqkd: Command, form: str, reason: str
) -> None:
    if form == "onnx":
        pytest.importorskip("onnxruntime")
    model = {"source": "python", "target": "waves.py:Waves", "input_shape": [1, 8, 8]}
    recipe = tiny(model=model, export={"formats": ["portable_mindir", form]})
    (recipe.parent / "waves.py").write_text(WAVES.replace("sin", "erfinv") if form == "onnx" else WAVES)
    code, _, err = msqkd("run", recipe, "-o", "out")
    assert code == 2
    assert f"export.formats: {reason}" in err
    assert f"leave {form} out with --set 'export.formats=[portable_mindir]'" in err
    assert {child.name for child in Path("out").iterdir()} <= {"state.json", "recipe.yaml"}
