"""The report of a run, with what is measured after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from msqkd.analysis.refresh import completed, refresh_report
from msqkd.analysis.report import write_report

RESULT: dict[str, Any] = {
    "name": "net", "recipe_sha256": "ab", "target": "lite_arm",
    "data": {"test": 5000},
    "accuracy": {"float": 93.0, "ptq": 91.0, "qat": None, "exported": 91.0, "integer": None},
    "parity": {"split": "calibration", "machine": "arm64", "samples": 100},
}  # fmt: skip
VERIFIED: dict[str, Any] = {
    "recipe_sha256": "ab",
    "parity": {"split": "test", "machine": "arm64", "samples": 5000, "accuracy": {"integer": 90.5}},
}
BENCH = [{"float32": {"median": 1.0}, "int8": {"median": 2.0}, "speed_up": 0.5, "batch": 1}]
ANALYSIS = {
    "recipe_sha256": "ab",
    "trained": False,
    "loss": "kl",
    "sensitivity": {"samples": 50, "quantised_loss": 0.5},
    "layers": [{"name": "conv", "rank": 1, "only_loss": 0.4, "float_loss": 0.1, "weight": {"statistics": [1] * 1000}}],
    "diagnoses": [
        {"layer": "conv", "op": "Conv2D", "rank": 1, "harm": "much", "causes": ["2 bits"],
         "remedies": [{"text": "8 bits", "yaml": "a: 1\n", "gain_db": 9.0}]}
    ],
}  # fmt: skip


def measured(folder: Path, **files: Any) -> dict[str, Any]:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return completed(RESULT, folder)


def test_what_was_measured_later_is_taken_in_and_advice_follows_from_it(tmp_path: Path) -> None:
    before = completed(RESULT, tmp_path)
    assert (before["latency"], before["analysis"]) == ([], None)
    assert [item["rule"] for item in before["advice"]] == ["analyze", "tune"]
    found = measured(tmp_path, bench=BENCH, analysis=ANALYSIS)
    assert found["latency"] == BENCH
    assert [item["rule"] for item in found["advice"]] == ["remedy", "tune", "latency"]
    assert found["analysis"]["quantised_loss"] == 0.5
    assert found["analysis"]["diagnoses"][0]["remedies"] == [{"text": "8 bits", "yaml": "a: 1\n"}]
    assert len(json.dumps(found["analysis"])) < 500  # an excerpt, without the statistics


@pytest.mark.parametrize("other", [{"recipe_sha256": "cd"}, {"trained": True}, {"layers": None}])
def test_an_analysis_of_another_network_is_left_out(tmp_path: Path, other: dict[str, Any]) -> None:
    assert measured(tmp_path, analysis={**ANALYSIS, **other})["analysis"] is None


def test_the_device_on_the_whole_test_set_is_taken_in(tmp_path: Path) -> None:
    assert measured(tmp_path, verify=VERIFIED)["accuracy"]["integer"] == 90.5
    assert RESULT["accuracy"]["integer"] is None
    for key, value in (("machine", "x86"), ("samples", 500), ("split", "calibration")):
        other = {**VERIFIED, "parity": {**VERIFIED["parity"], key: value}}
        assert measured(tmp_path, verify=other)["accuracy"]["integer"] is None
    assert measured(tmp_path, verify={**VERIFIED, "recipe_sha256": "cd"})["accuracy"]["integer"] is None
    own = {**RESULT, "accuracy": {**RESULT["accuracy"], "integer": 92.0}}
    measured(tmp_path, verify=VERIFIED)
    assert completed(own, tmp_path)["accuracy"]["integer"] == 92.0


def test_a_damaged_file_counts_for_nothing(tmp_path: Path) -> None:
    for name in ("bench", "analysis", "verify"):
        (tmp_path / f"{name}.json").write_text("{")
    assert completed(RESULT, tmp_path)["latency"] == []
    assert measured(tmp_path, bench={"a": 1}, analysis=[])["analysis"] is None


def test_the_report_is_written_again_and_only_where_there_is_one(tmp_path: Path) -> None:
    assert refresh_report(tmp_path) is False
    assert not list(tmp_path.iterdir())
    write_report(RESULT, tmp_path)
    assert 'id="latency"' not in (tmp_path / "report.html").read_text()
    measured(tmp_path, bench=BENCH)
    assert refresh_report(tmp_path) is True
    first = [(tmp_path / f"report.{suffix}").read_bytes() for suffix in ("json", "html")]
    assert b'id="latency"' in first[1]
    assert refresh_report(tmp_path) is True
    assert [(tmp_path / f"report.{suffix}").read_bytes() for suffix in ("json", "html")] == first
    (tmp_path / "bench.json").unlink()
    refresh_report(tmp_path)
    assert 'id="latency"' not in (tmp_path / "report.html").read_text()
