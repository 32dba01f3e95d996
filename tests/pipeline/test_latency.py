from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")


def test_a_finished_run_is_measured(
    tiny: Callable[..., Path], msqkd: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert msqkd("calibrate", tiny(), "--output", folder)[0] == 0
    code, table, _ = msqkd("bench", folder, "--batch", 1, "--batch", 4, "--seconds", 0.1)
    assert code == 0
    assert "| batch |" in table
    results = json.loads((folder / "bench.json").read_text())
    assert [item["batch"] for item in results] == [1, 4]
    assert all(item["float32"]["median"] > 0 for item in results)
    assert any("QLinearConv" in name or "QGemm" in name for name in results[0]["kernels"])
    assert (folder / "bench.md").read_text() == table
    assert json.loads((folder / "report.json").read_text())["latency"] == results
    assert 'id="latency"' in (folder / "report.html").read_text()
    code, table, _ = msqkd("bench", folder, "--layers", "--batch", 2, "--seconds", 0.1)
    assert code == 0
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:7]] == [
        "stem", "block.conv", "fc", "the rest", "all",
    ]  # fmt: skip
    measured = json.loads((folder / "bench_layers.json").read_text())
    assert {tuple(row) for row in measured.values()} == {("float", "8")}
    assert msqkd("bench", folder, "--layers", "--batch", 1, "--batch", 2)[0] == 2
    assert msqkd("calibrate", tiny(), "--output", folder)[0] == 0, "the folder is still the run's"
    assert json.loads((folder / "report.json").read_text())["latency"] == results, "what was measured is kept"


def test_a_folder_without_a_run_is_refused(msqkd: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, _, said = msqkd("bench", tmp_path)
    assert code == 2
    assert len(said.strip().splitlines()) == 1
