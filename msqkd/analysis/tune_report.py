"""What a tuning shows: `tune.json` for programs, `tune.html` for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msqkd.analysis import plots
from msqkd.analysis.report import inline, rendered, write_pages
from msqkd.analysis.teachers import HEADERS, teachers_rows
from msqkd.files import PathLike
from msqkd.train.metric import Scale

REPORT = "tune"
"""Name of the two files, without their suffixes."""


def write_tuning(result: Mapping[str, Any], folder: PathLike) -> None:
    """Write `tune.json` and `tune.html`, each whole or not at all; `result` is what `tune_recipe` returns."""
    write_pages(result, folder, REPORT, tuning_html)


def verdict(result: Mapping[str, Any]) -> str:
    """What the tuning came to, in a sentence."""
    scale, best = Scale.of(result["metric"]), result["best"]
    lost = f"{scale.number(best['test_drop'])}{scale.points}"
    begin = "The goal is reached" if result["reached"] else "The goal is not reached; the best so far"
    return (
        f"{begin}: '{best['title']}' loses {lost} on the whole test set ({scale.show(best['test_metric'])}, float "
        f"{scale.show(result['float']['test'])}); allowed were {scale.number(result['max_drop'])}."
    )


def tuning_html(result: Mapping[str, Any]) -> str:
    """The page of a tuning: one file that loads nothing."""
    scale, best, sets = Scale.of(result["metric"]), result["best"], result["sets"]
    teachers = result.get("teachers")
    measured = [trial for trial in result["trials"] if trial["drop"] is not None]
    rows = [(_short(i, trial["title"]), max(trial["drop"], 0.0)) for i, trial in enumerate(measured, start=1)]
    counts = ", ".join(f"{sets[name]['samples']} for {name}" for name in ("calibration", "tuning", "evaluation"))
    allowed = f"allowed {scale.number(result['max_drop'])}"
    tiles = [
        {"value": scale.show(best["test_metric"]), "label": f"{scale.name}, best found", "note": best["title"]},
        {"value": scale.show(result["float"]["test"]), "label": f"{scale.name}, float", "note": ""},
        {"value": scale.number(best["test_drop"]), "label": "lost", "note": allowed},
        {"value": str(len(result["trials"])), "label": "trials", "note": ""},
    ]  # fmt: skip
    view = {
        "name": result["name"],
        "facts": f"tuning · {counts} · sets are distinct",
        "verdict": [verdict(result)],
        "tiles": tiles,
        "warnings": [],
        "contents": [
            ("trials", "Trials"),
            *([("teachers", "Teachers")] if teachers else []),
            ("sets", "Sets"),
            ("recipe", "Recipe"),
        ],
        "charts_of_trials": [inline(svg) for svg in plots.losses(rows, "trials", "lost on the tuning set")],
        "trials": [_row(i, trial, scale) for i, trial in enumerate(result["trials"], start=1)],
        "teachers": {"headers": HEADERS, "rows": teachers_rows(teachers), "verdict": teachers["verdict"]}
        if teachers
        else None,
        "sets": [(name, f"{item['samples']} samples: {item['name']}") for name, item in sets.items()],
        "recipe": result["recipe"],
    }
    return rendered("tune.html.j2", view)


def _short(number: int, title: str) -> str:
    """``7. … equalize``: what is new in a trial."""
    *before, last = title.split("; ")
    return f"{number}. {'… ' if before else ''}{last}"


def _row(number: int, trial: Mapping[str, Any], scale: Scale) -> list[str]:
    def shown(key: str) -> str:
        value = trial.get(key)
        return "" if value is None else scale.number(value)

    found = [shown(key) for key in ("metric", "drop", "test_metric", "test_drop")]
    seconds = f"{trial['seconds']:.0f} s" if trial.get("seconds") is not None else ""
    return [str(number), trial["title"], *found, seconds, trial.get("error") or ""]
