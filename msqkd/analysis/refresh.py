"""The report of a run with what was measured after it: latencies (`msqkd bench`), the layers (`msqkd analyze`), the
device on the test set (`msqkd verify`), and what the vendor's converter makes of it (`msqkd convert`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from msqkd.analysis.advice import advise
from msqkd.analysis.report import write_report
from msqkd.files import PathLike

REPORT, BENCH, ANALYSIS, VERIFY = "report.json", "bench.json", "analysis.json", "verify.json"
CONVERT = "convert.json"

_LAYER = ("name", "rank", "sqnr_db", "only_loss", "float_loss")
_DIAGNOSIS = ("layer", "op", "rank", "harm", "causes")
_REMEDY = ("text", "yaml")


def completed(result: Mapping[str, Any], folder: PathLike) -> dict[str, Any]:
    """A run's result with `latency` (what ``bench.json`` in `folder` holds), `analysis` (the parts of ``analysis.json``
    that the page shows), `converter` (what ``convert.json`` holds) and the `advice` that follows from all of it. Where
    the run has left the device out, as it does on large test sets, `accuracy` has what ``verify.json`` says of the
    whole set.

    What is of another recipe, or of another network of the run than the exported one, is left out; a file that is
    missing or no JSON counts for nothing.
    """
    latency, analysis, verified, converted = (_read(Path(folder) / name) for name in (BENCH, ANALYSIS, VERIFY, CONVERT))
    accuracy = dict(result.get("accuracy") or {})
    if accuracy.get("integer") is None and isinstance(verified, dict):
        accuracy["integer"] = _on_the_test_set(verified, result)
    whole = {
        **result,
        "accuracy": accuracy,
        "latency": [item for item in latency if isinstance(item, dict)] if isinstance(latency, list) else [],
        "analysis": _excerpt(analysis) if isinstance(analysis, dict) and _is_of(analysis, result) else None,
        "converter": converted
        if isinstance(converted, dict) and _is_converted(converted, result)
        else result.get("converter"),
    }
    return {**whole, "advice": [item.to_dict() for item in advise(whole)]}


def refresh_report(folder: PathLike) -> bool:
    """Write the report of a finished run again, from its ``report.json`` and what was measured since; each of the two
    files whole or not at all.

    Returns:
        Whether there is a report. Where there is none, as for a run that is not finished, nothing is written.
    """
    held = _read(Path(folder) / REPORT)
    if not isinstance(held, dict):
        return False
    write_report(completed(held, folder), folder)
    return True


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _is_of(analysis: Mapping[str, Any], result: Mapping[str, Any]) -> bool:
    """Whether an analysis is of the network that the run exported."""
    trained = any((result.get("accuracy") or {}).get(name) is not None for name in ("qat", "qat_kd"))
    same = analysis.get("recipe_sha256") == result.get("recipe_sha256")
    return same and analysis.get("trained") == trained and isinstance(analysis.get("layers"), list)


def _is_converted(converted: Mapping[str, Any], result: Mapping[str, Any]) -> bool:
    """Whether a conversion is of the marked MindIR that the run exported."""
    marked = (result.get("export") or {}).get("lite_mindir") or {}
    checksum = (result.get("sha256") or {}).get(marked.get("file"))
    same = converted.get("recipe_sha256") == result.get("recipe_sha256")
    return same and checksum in (None, converted.get("marked_sha256"))


def _on_the_test_set(verified: Mapping[str, Any], result: Mapping[str, Any]) -> Optional[float]:
    """What the device of the run reaches on its whole test set, if that is what was verified."""
    parity, own = verified.get("parity") or {}, result.get("parity") or {}
    same = verified.get("recipe_sha256") == result.get("recipe_sha256") and parity.get("machine") == own.get("machine")
    whole = parity.get("split") == "test" and parity.get("samples") == (result.get("data") or {}).get("test")
    reached: Optional[float] = (parity.get("accuracy") or {}).get("integer")
    return reached if same and whole else None


def _excerpt(analysis: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "loss": analysis.get("loss"),
        "samples": (analysis.get("sensitivity") or {}).get("samples"),
        "quantised_loss": (analysis.get("sensitivity") or {}).get("quantised_loss"),
        "layers": [_part(row, _LAYER) for row in analysis["layers"]],
        "diagnoses": [
            {
                **_part(item, _DIAGNOSIS),
                "remedies": [_part(remedy, _REMEDY) for remedy in item.get("remedies") or []],
            }
            for item in analysis.get("diagnoses") or []
        ],
    }


def _part(row: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Optional[Any]]:
    return {key: row.get(key) for key in keys}
