from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from msqkd.errors import ExportError, FolderError, RecipeError
from msqkd.exporters import FORMATS
from msqkd.files import sha256
from msqkd.pipeline import lock as locks
from msqkd.pipeline.analyze import analyze_run
from msqkd.pipeline.latency import bench_run, bench_run_layers
from msqkd.pipeline.rundir import RunDirectory, export_name
from msqkd.pipeline.verify import verify_run
from msqkd.progress import Reporter
from msqkd.recipe import load_recipe


def recipe(*changes: str) -> Any:
    return load_recipe("digits_lenet5", changes)


def names(folder: Path) -> set[str]:
    return {child.name for child in folder.iterdir()}


def test_finished_stages_are_remembered(tmp_path: Path) -> None:
    folder = RunDirectory(tmp_path / "deep" / "run", recipe())
    assert not folder.done("float")
    folder.finish("float", {"accuracy": 1.5})
    again = RunDirectory(tmp_path / "deep" / "run", recipe())
    assert again.done("float")
    assert again.result("float") == {"accuracy": 1.5}
    assert names(again.path) == {"state.json", "recipe.yaml"}


def test_a_measured_result_in_the_recipe_does_not_make_it_another(tmp_path: Path) -> None:
    RunDirectory(tmp_path, recipe()).finish("float", {})
    assert RunDirectory(tmp_path, recipe("result.accuracy=90")).done("float")


def test_what_a_killed_run_left_is_removed_and_the_rest_is_not(tmp_path: Path) -> None:
    (tmp_path / ".state.ab12_xyz.json").write_text("{")
    RunDirectory(tmp_path, recipe()).finish("float", {})
    (tmp_path / ".qat_kd.state.ab12_xyz.npz").write_text("half")
    (tmp_path / ".gitignore").write_text("*")
    (tmp_path / "qat.state.npz").write_text("whole")
    RunDirectory(tmp_path, recipe())
    assert names(tmp_path) == {"state.json", "recipe.yaml", ".gitignore", "qat.state.npz"}


def test_a_run_that_has_begun_keeps_its_folder(tmp_path: Path) -> None:
    RunDirectory(tmp_path, recipe())
    (tmp_path / "pretrain.state.npz").write_text("an hour of training")
    with pytest.raises(RecipeError, match="holds a run of another recipe \\(differs in seed: 0 → 1\\)"):
        RunDirectory(tmp_path, recipe("seed=1"))
    assert "pretrain.state.npz" in names(tmp_path)
    RunDirectory(tmp_path, recipe("seed=1"), fresh=True)
    assert names(tmp_path) == {"state.json", "recipe.yaml"}


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"stages": {}}'])
def test_a_damaged_state_can_be_started_over(tmp_path: Path, content: str) -> None:
    RunDirectory(tmp_path, recipe())
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(RecipeError, match=r"state.json is damaged .* start over with --fresh"):
        RunDirectory(tmp_path, recipe())
    RunDirectory(tmp_path, recipe(), fresh=True)
    assert json.loads((tmp_path / "state.json").read_text())["stages"] == {}


def test_everything_a_run_writes_is_its_own(tmp_path: Path) -> None:
    written = [export_name("digits_lenet5", form) for form in FORMATS.values()]
    assert "digits_lenet5_lite.mindir" in written
    assert "digits_lenet5_ms.ms" in written
    assert len(set(written)) == len(FORMATS)
    for name in [*written, "verify.json", "verify.html", "report.html", "float.mindir"]:
        (tmp_path / name).write_text("x")
    RunDirectory(tmp_path, recipe(), fresh=True)
    assert names(tmp_path) == {"state.json", "recipe.yaml"}


def finished(folder: Path) -> RunDirectory:
    run = RunDirectory(folder, recipe())
    (folder / "float.mindir").write_text("float")
    (folder / "digits_lenet5_ms.ms").write_text("int8")
    files = ("float.mindir", "digits_lenet5_ms.ms")
    run.finish("export", {"sha256": {name: sha256(folder / name) for name in files}})
    return run


def test_a_finished_run_is_opened_without_touching_it(tmp_path: Path) -> None:
    finished(tmp_path)
    before = {child: child.stat().st_mtime_ns for child in tmp_path.iterdir()}
    run = RunDirectory.finished(tmp_path)
    assert set(run.check_exports()) == {"float.mindir", "digits_lenet5_ms.ms"}
    assert {child: child.stat().st_mtime_ns for child in tmp_path.iterdir()} == before


def test_what_is_missing_from_a_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="nowhere is not the folder of a run: there is no such folder"):
        RunDirectory.finished(tmp_path / "nowhere")
    with pytest.raises(ExportError, match=r"is not the folder of a run: it holds no state.json"):
        RunDirectory.finished(tmp_path)
    RunDirectory(tmp_path, recipe()).finish("float", {})
    with pytest.raises(ExportError, match=r"not finished: the stage export is missing \(done: float\); run msqkd run"):
        RunDirectory.finished(tmp_path)
    (tmp_path / "state.json").write_text("[]")
    with pytest.raises(RecipeError, match=r"state.json is damaged"):
        RunDirectory.finished(tmp_path)


def test_a_file_that_is_not_the_exported_one_is_found(tmp_path: Path) -> None:
    run = finished(tmp_path)
    (tmp_path / "digits_lenet5_ms.ms").write_text("int9")
    with pytest.raises(ExportError, match=r"digits_lenet5_ms.ms does not match its checksum in state.json"):
        run.check_exports()
    (tmp_path / "digits_lenet5_ms.ms").unlink()
    with pytest.raises(ExportError, match=r"digits_lenet5_ms.ms is missing, though the run exported it"):
        run.check_exports()


def test_a_folder_of_somebody_else_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ExportError, match="holds other files"):
        RunDirectory(tmp_path, recipe())
    assert names(tmp_path) == {"thesis.txt"}


def test_fresh_never_deletes_what_is_not_a_runs(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    for fresh in (False, True, True):
        with pytest.raises(ExportError, match=r"holds other files \(thesis.txt\)"):
            RunDirectory(tmp_path, recipe(), fresh=fresh)
    assert [child.name for child in tmp_path.iterdir()] == ["thesis.txt"]


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    hold = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), fcntl.LOCK_EX); print('x', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, tmp_path], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(ExportError, match=r"another run is at work in .*; wait for its end, or choose another"):
            RunDirectory(tmp_path, recipe())
        other.kill()
    assert names(tmp_path) == set()
    with RunDirectory(tmp_path, recipe()) as folder:  # what a kill leaves is no lock
        folder.finish("float", {})
        assert RunDirectory(tmp_path, recipe()).done("float")
        assert not can_be_locked(tmp_path)
    assert can_be_locked(tmp_path)


@pytest.mark.parametrize("command", [verify_run, analyze_run, bench_run, bench_run_layers])
def test_what_writes_into_a_run_waits_for_no_other_command(tmp_path: Path, command: Any) -> None:
    with finished(tmp_path):
        pass
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    try:
        with pytest.raises(FolderError, match="another run is at work"):
            command(tmp_path, reporter=Reporter(quiet=True))
    finally:
        os.close(other)


@pytest.fixture
def _network_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders cannot be locked, files can: as on NFS."""
    real = fcntl.flock

    def flock(handle: int, how: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EBADF, "Bad file descriptor")
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("_network_folder")
def test_where_folders_cannot_be_locked_a_file_is(tmp_path: Path) -> None:
    with RunDirectory(tmp_path, recipe()) as folder:
        assert folder.unlocked is None
        hold = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        found = subprocess.run([sys.executable, "-c", hold, tmp_path / ".lock"], capture_output=True, text=True)
        assert "BlockingIOError" in found.stderr, "another process finds it locked"
    other = os.open(tmp_path / ".lock", os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(FolderError, match="another run is at work"):
        RunDirectory(tmp_path, recipe())
    os.close(other)
    with RunDirectory(tmp_path, recipe("seed=1"), fresh=True):
        assert names(tmp_path) == {"state.json", "recipe.yaml", ".lock"}, "the file is the run's own"


@pytest.mark.parametrize("missing", ["flock", "locks"])
def test_a_folder_that_cannot_be_locked_is_told(
    tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if missing == "flock":
        monkeypatch.setattr(locks, "fcntl", None)
    else:
        monkeypatch.setattr(fcntl, "flock", flock)
    with RunDirectory(tmp_path, recipe()) as folder:
        assert folder.unlocked is not None
        assert "cannot be locked" in folder.unlocked
    with locks.locked(tmp_path, Reporter()):
        pass
    said = " ".join(capsys.readouterr().err.split())
    assert ("No locks available" if missing == "locks" else "no flock") in said
    assert "let no other msqkd command work in it" in said


def test_a_run_of_an_earlier_version_goes_on_with_new_settings_at_their_defaults(tmp_path: Path) -> None:
    with RunDirectory(tmp_path, recipe()) as folder:
        folder.finish("float", {"accuracy": 1.0})
    state = json.loads((tmp_path / "state.json").read_text())
    for key in ("max_changed", "max_relative_error", "max_sqnr_loss", "min_cosine"):
        del state["recipe"]["verify"][key]
    state["recipe_sha256"] = "0" * 64
    (tmp_path / "state.json").write_text(json.dumps(state))
    with RunDirectory(tmp_path, recipe()) as folder:
        assert folder.done("float")
        assert folder.state["recipe_sha256"] == recipe().sha()
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(RecipeError, match=r"differs in .*verify.max_changed: None → 3.0"):
        RunDirectory(tmp_path, recipe("verify.max_changed=3", "seed=7"))


def test_other_bounds_export_again_and_nothing_else(tmp_path: Path) -> None:
    with RunDirectory(tmp_path, recipe()) as folder:
        folder.finish("float", {"accuracy": 1.0})
        folder.finish("export", {"accuracy": 1.0})
    relaxed = recipe("verify.max_changed=3")
    with RunDirectory(tmp_path, relaxed) as folder:
        assert folder.done("float")
        assert not folder.done("export")
        assert folder.state["recipe"] == relaxed.to_dict()
    with RunDirectory(tmp_path, relaxed) as folder:
        assert folder.state["recipe_sha256"] == relaxed.sha()
    with pytest.raises(RecipeError, match=r"differs in seed"):
        RunDirectory(tmp_path, recipe("verify.max_changed=3", "seed=7"))


def can_be_locked(folder: Path) -> bool:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(handle)


def test_fresh_refuses_a_run_with_strangers_beside_it(tmp_path: Path) -> None:
    RunDirectory(tmp_path, recipe()).finish("float", {})
    (tmp_path / "src").mkdir()
    with pytest.raises(ExportError, match=r"holds other files \(src\)"):
        RunDirectory(tmp_path, recipe(), fresh=True)
    assert RunDirectory(tmp_path, recipe()).done("float")
