"""What export does is tried before the training; what can fail only after it fails one format and keeps the rest."""

from __future__ import annotations

import errno
import importlib
import json
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest

from msqkd.analysis import parity
from msqkd.errors import FolderError, PlanError
from msqkd.exporters.verify import load_portable
from msqkd.files import sha256
from msqkd.pipeline import rehearsal
from msqkd.pipeline.rundir import RunDirectory

pytestmark = pytest.mark.rehearsal

Command = Callable[..., tuple[int, str, str]]
Recipe = Callable[..., Path]

SHORT = {"epoch_size": 1, "batch_size": 12, "lr": 0.05}
WRITERS = {
    "lite_mindir": ("msqkd.exporters.lite", "export_lite"),
    "portable_mindir": ("msqkd.exporters.portable", "export_portable"),
    "direct_mindir": ("msqkd.exporters.direct", "export_direct"),
    "ms": ("msqkd.exporters.ms.write", "write_ms"),
    "onnx": ("msqkd.exporters.onnx.qdq", "export_onnx"),
    "ascend_mindir": ("msqkd.exporters.ascend.quantised", "export_ascend"),
}
FULL = OSError(errno.ENOSPC, "No space left on device", "net.ms")
SCRATCH = "msqkd_rehearsal_"


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the writer of a format fail: everywhere, or only in the run's own folder."""

    def patch(form: str, error: Exception, afterwards: bool) -> None:
        module, name = WRITERS[form]
        real = getattr(importlib.import_module(module), name)

        def write(*arguments: Any) -> Path:
            if not afterwards or SCRATCH not in str(arguments[-1]):
                raise error
            return real(*arguments)

        monkeypatch.setattr(f"{module}.{name}", write)

    return patch


def report(folder: str = "out") -> dict[str, Any]:
    return json.loads(Path(folder, "report.json").read_text())


@pytest.mark.parametrize("form", WRITERS)
def test_a_format_that_cannot_be_written_is_refused_before_the_training(
    tiny: Recipe, msqkd: Command, failing: Callable[..., None], form: str
) -> None:
    if form == "onnx":
        pytest.importorskip("onnxruntime")
    target = "ascend" if form == "ascend_mindir" else "lite_arm"
    failing(form, KeyError("conv1"), afterwards=False)
    formats = list(dict.fromkeys(["portable_mindir", form]))
    code, _, err = msqkd("run", tiny(target=target, export={"formats": formats}), "-o", "out")
    assert code == 2, err
    words = " ".join(err.split())
    assert "export.formats: no " in words
    assert "KeyError: 'conv1' (at test_rehearsal.py:" in words
    assert f"leave {form} out with --set 'export.formats=[" in words
    assert {child.name for child in Path("out").iterdir()} <= {"state.json", "recipe.yaml"}


@pytest.mark.parametrize("place", ["float file", "reading", "device", "layers", "report", "disk", "folder"])
def test_so_is_every_other_step(tiny: Recipe, msqkd: Command, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise PlanError("it cannot be done")

    names = {
        "float file": "msqkd.pipeline.export.write_float",
        "reading": "msqkd.exporters.verify.load_portable",
        "device": "msqkd.pipeline.export.compare_execution",
        "layers": "msqkd.pipeline.result.layer_table",
        "report": "msqkd.pipeline.rehearsal.write_report",
    }
    said = "it cannot be done"
    if place in names:
        monkeypatch.setattr(names[place], fail)
    elif place == "disk":
        monkeypatch.setattr(rehearsal.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10_000})())
        said = "MB left, and the run may write"
    else:
        monkeypatch.setattr(rehearsal, "writable_folder", lambda path: (_ for _ in ()).throw(FolderError(said)))
    code, _, err = msqkd("run", tiny(export={"formats": ["portable_mindir"]}), "-o", "out")
    assert code == 2, err
    assert said in " ".join(err.split())
    assert {child.name for child in Path("out").iterdir()} <= {"state.json", "recipe.yaml"}


def test_formats_that_fail_afterwards_keep_the_rest_and_are_tried_again(
    tiny: Recipe, msqkd: Command, failing: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trained range, a full disk, and a fault of msqkd's own."""
    failing("lite_mindir", PlanError("conv1: the trained range is beyond int32"), afterwards=True)
    failing("ms", FULL, afterwards=True)
    formats = ["lite_mindir", "portable_mindir", "ms"]
    recipe = tiny(pretrain=SHORT, export={"formats": formats})
    code, out, err = msqkd("calibrate", recipe, "-o", "out")
    assert code == 1, err
    assert "Traceback" not in err
    words = " ".join(out.split())
    assert "failed: lite_mindir: conv1: the trained range is beyond int32" in words
    assert "failed: ms: net.ms: No space left on device" in words
    found = report()
    assert list(found["export"]) == formats
    assert found["export"]["ms"] == {"file": None, "failed": "net.ms: No space left on device"}
    assert "failed" not in found["export"]["portable_mindir"]
    assert set(found["sha256"]) == {"float.mindir", "tiny_portable.mindir"}
    assert any("lite_mindir failed" in warning for warning in found["warnings"])
    assert "No space left on device" in Path("out", "report.html").read_text()
    assert not any("tiny_ms.ms" in item["text"] for item in found["advice"])
    folder = RunDirectory.finished(Path("out"))
    assert set(folder.check_exports()) == set(found["sha256"])
    code, out, err = msqkd("verify", "out")
    assert code == 0, err
    assert "failed: ms: net.ms: No space left on device" in " ".join(out.split())

    # Once there is room, the same command does what is missing; what was good is not written again.
    monkeypatch.undo()
    monkeypatch.chdir(recipe.parent)
    before = {name: Path("out", name).stat().st_mtime_ns for name in ("tiny_portable.mindir", "float.ckpt")}
    code, out, err = msqkd("calibrate", recipe, "-o", "out", "--json")
    assert code == 0, err
    assert json.loads(out)["failed"] == {}
    found = report()
    assert list(found["export"]) == formats
    assert not any("failed" in entry for entry in found["export"].values())
    assert all(sha256(Path("out", name)) == checksum for name, checksum in found["sha256"].items())
    assert {name: Path("out", name).stat().st_mtime_ns for name in before} == before


LOGS = """
from mindspore import nn, ops


class Logs(nn.Cell):
    def __init__(self):
        super().__init__()
        self.conv, self.last, self.fc = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Dense(4, 3)

    def construct(self, x):
        share = ops.exp(self.conv(x)) / ops.exp(self.conv(x)).sum(1, keepdims=True)
        return self.fc(ops.mean(self.last(ops.log(share)), (2, 3)))
"""


def test_odd_numbers_of_guessed_ranges_refuse_nothing(tiny: Recipe, msqkd: Command, tmp_path: Path) -> None:
    (tmp_path / "logs.py").write_text(LOGS)
    model = {"source": "python", "target": "logs.py:Logs", "input_shape": [1, 8, 8]}
    recipe = tiny(pretrain=SHORT, model=model, export={"formats": ["portable_mindir"]})
    code, _, err = msqkd("calibrate", recipe, "-o", "out")
    assert code in (0, 1), err  # the rehearsal has passed; what is reached is not the question
    assert report()["layers"]


def test_a_report_without_its_layers_is_still_a_report(
    tiny: Recipe, msqkd: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise PlanError("value 'x': 3 of 8 values are not finite")

    monkeypatch.setattr("msqkd.pipeline.run.layer_parts", fail)
    code, _, err = msqkd("calibrate", tiny(pretrain=SHORT, export={"formats": ["ms"]}), "-o", "out")
    assert code == 0, err
    assert any("3 of 8 values are not finite" in warning for warning in report()["warnings"])
    assert "tiny_ms.ms" in Path("out", "report.html").read_text()


def test_a_run_without_any_file_still_has_its_report(
    tiny: Recipe, msqkd: Command, failing: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for form in ("portable_mindir", "ascend_mindir"):
        failing(form, RuntimeError("-----\nthe compiler gave up"), afterwards=True)
    real, calls = parity.compare_execution, []

    def broken(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) > 1:  # the first is that of the rehearsal
            raise OverflowError("a multiplier is beyond int32")
        return real(*arguments)

    monkeypatch.setattr("msqkd.pipeline.export.compare_execution", broken)
    code, out, err = msqkd("calibrate", tiny(target="ascend", pretrain=SHORT), "-o", "out", "--json")
    assert code == 1, err
    failed = json.loads(out)["failed"]
    assert list(failed) == ["ascend_mindir", "portable_mindir", "device"]
    assert failed["portable_mindir"].startswith("RuntimeError: the compiler gave up")
    assert failed["device"].startswith("OverflowError: a multiplier is beyond int32")
    found = report()
    assert found["accuracy"]["exported"] == found["accuracy"]["ptq"]
    assert found["parity"]["exceeded"] is True
    assert any("the device could not be compared" in warning for warning in found["warnings"])
    assert "a multiplier is beyond int32" in Path("out", "report.html").read_text()


def test_a_file_that_answers_otherwise_is_marked_and_kept(
    tiny: Recipe, msqkd: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(path: Path) -> Any:
        cell = load_portable(path)

        def run(*inputs: Any) -> Any:
            answers = cell(*inputs)
            return answers if SCRATCH in str(path) else answers + 0.01  # the classes are the same

        return run

    monkeypatch.setattr("msqkd.exporters.verify.load_portable", other)
    formats = {"formats": ["portable_mindir", "ms"]}
    code, out, err = msqkd("calibrate", tiny(pretrain=SHORT, export=formats), "-o", "out")
    assert code == 1, err
    assert "largest difference 0.01, allowed: 0.0001 (export.verify_tolerance)" in " ".join(out.split())
    entry = report()["export"]["portable_mindir"]
    assert (entry["file"], entry["agreement"]) == ("tiny_portable.mindir", 100.0)
    assert entry["max_abs_diff"] == pytest.approx(0.01, rel=1e-3)
    assert "tiny_portable.mindir" in report()["sha256"], "what was written is kept"


def enlarged(factor: float) -> Callable[[Any], Any]:
    """A loader of ONNX files whose answers have an error; not in the rehearsal."""
    from msqkd.exporters.onnx.runtime import load_onnx

    def load(path: Any) -> Any:
        run = load_onnx(path)
        return run if SCRATCH in str(path) else lambda *inputs: run(*inputs) * np.float32(factor)

    return load


@pytest.mark.parametrize(("bounds", "failed"), [({}, True), ({"max_relative_error": 0.5}, False)])
def test_outputs_that_are_no_classes_are_held_against_the_bounds_of_verify(
    tiny: Recipe,
    msqkd: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bounds: dict[str, float],
    failed: bool,
) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "metrics.py").write_text("def zero(outputs, labels):\n    return 0.0\n")
    monkeypatch.setattr("msqkd.exporters.onnx.runtime.load_onnx", enlarged(1.3))
    recipe = tiny(pretrain=SHORT, evaluation={"metric": "metrics.py:zero"}, verify=bounds, export={"formats": ["onnx"]})
    code, _, err = msqkd("calibrate", recipe, "-o", "out")
    assert code == int(failed), err
    entry = report()["export"]["onnx"]
    assert ("failed" in entry) is failed
    assert set(entry) >= {"relative_error", "sqnr_db", "cosine"}
    assert entry["relative_error"] == pytest.approx(0.3, rel=0.2)
    if failed:
        assert "verify.max_sqnr_loss" in entry["failed"]
