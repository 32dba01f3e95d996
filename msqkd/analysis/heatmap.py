"""The layers of a run against what is measured of them, a colour for every number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Callable, Optional

from msqkd.analysis import plots

STEPS = len(plots.BAD_COLOURS)


@dataclass(frozen=True)
class Measure:
    """A column.

    Attributes:
        title: its head.
        words: what it says, for those who read it the first time.
        value: from the row of a layer (`msqkd.analysis.layers.layer_table`); None where it has none.
        show: a value in words.
        high_is_bad: False where a low value is; None where it is neither.
        span: colours differ only where values do by a part of this at least.
        along: what the colours follow: the value by default, its logarithm for factors.
    """

    title: str
    words: str
    value: Callable[[Mapping[str, Any]], Optional[float]]
    show: Callable[[float], str]
    high_is_bad: Optional[bool]
    span: float
    along: Callable[[float], float] = float


def heat_map(
    layers: Sequence[Mapping[str, Any]],
    parity: Sequence[Mapping[str, Any]] = (),
    analysis: Optional[Mapping[str, Any]] = None,
) -> Optional[dict[str, Any]]:
    """The cells as a template shows them.

    Args:
        layers: the report's rows, in execution order.
        parity: the values the device was compared by (`msqkd.analysis.parity.ValueParity.to_dict`).
        analysis: the report's excerpt of an analysis.

    Returns:
        ``columns`` (``title`` and ``words``) and ``rows``: the layer's ``name`` and its ``cells`` with ``text``,
        ``colour`` (the name of a class, empty without a value) and ``worst``. None where nothing is known.
    """
    names = [row["name"] for row in layers]
    device = {value.get("value"): value["equal"] for value in parity if value.get("equal") is not None}
    sensitivity = {row["name"]: row for row in (analysis or {}).get("layers") or []}
    count = sum((row.get("weight") or {}).get("count") or 0 for row in layers)
    columns = []
    for measure in _measures(device, sensitivity, (analysis or {}).get("loss"), count):
        values = [measure.value(row) for row in layers]
        if any(value is not None for value in values):
            columns.append((measure, _coloured(measure, values)))
    if not columns:
        return None
    return {
        "columns": [{"title": measure.title, "words": measure.words} for measure, _ in columns],
        "rows": [{"name": name, "cells": [cells[i] for _, cells in columns]} for i, name in enumerate(names)],
    }


def _measures(
    device: Mapping[Any, float], sensitivity: Mapping[str, Mapping[str, Any]], loss: Optional[str], count: int
) -> list[Measure]:
    def of(part: str, key: str) -> Callable[[Mapping[str, Any]], Optional[float]]:
        return lambda row: (row.get(part) or {}).get(key)

    def clipped(row: Mapping[str, Any]) -> Optional[float]:
        outside = of("activation", "outside")(row)
        return None if outside is None else 100 * outside

    def different(row: Mapping[str, Any]) -> Optional[float]:
        equal = device.get(row.get("value"))
        return None if equal is None else 100 * (1 - equal)

    def share(row: Mapping[str, Any]) -> Optional[float]:
        own = of("weight", "count")(row)
        return 100 * own / count if own and count else None

    def measured(key: str) -> Callable[[Mapping[str, Any]], Optional[float]]:
        return lambda row: sensitivity.get(row["name"], {}).get(key)

    words = "KL divergence" if loss == "kl" else "relative error"
    losses = [row["only_loss"] for row in sensitivity.values() if row.get("only_loss") is not None]
    most = max(losses, default=0.0) or 1.0
    noise = "signal to quantisation noise, dB"
    return [
        Measure("Weight SQNR", f"{noise}, of the weight rounded alone", of("weight", "sqnr_db"), _decibel, False, 15.0),
        Measure("Value SQNR", f"{noise}, of the values rounded alone",
                of("activation", "sqnr_db"), _decibel, False, 15.0),
        Measure("Built up", f"{noise}, against float, everything before quantised too",
                lambda row: row.get("sqnr_db"), _decibel, False, 15.0),
        Measure("Device ≠", "integers of the device unlike the fake-quantised ones, %", different, _percent, True, 5.0),
        Measure("Clipped", "values beyond the range, %", clipped, _percent, True, 0.2),
        Measure("Weight tail", "largest weight as a multiple of the 99.9 percentile",
                of("weight", "max_over_percentile"), _factor, True, 2.0, _log),
        Measure("Value tail", "largest value as a multiple of the 99.9 percentile",
                of("activation", "max_over_percentile"), _factor, True, 2.0, _log),
        Measure("Loss alone", f"{words} of the outputs with this layer alone quantised", measured("only_loss"),
                plots.number, True, most),
        Measure("Loss without", f"{words} of the outputs with all but this layer quantised", measured("float_loss"),
                plots.number, None, most),
        Measure("Weight bits", "of the weight", of("weight", "bits"), _whole, None, 2.0),
        Measure("Value bits", "of the values", of("activation", "bits"), _whole, None, 2.0),
        Measure("Weights", "share of the quantised weights, %", share, _percent, None, 10.0),
    ]  # fmt: skip


def _coloured(measure: Measure, values: Sequence[Optional[float]]) -> list[dict[str, Any]]:
    known = {i: measure.along(value) for i, value in enumerate(values) if value is not None}
    low, high = min(known.values()), max(known.values())
    span = max(high - low, measure.span)
    harm = {i: ((high - x) if measure.high_is_bad is False else (x - low)) / span for i, x in known.items()}
    order = list(known)
    marked = {order[i] for i in plots.worst([-harm[i] for i in order])} if measure.high_is_bad is not None else set()
    kind = "much" if measure.high_is_bad is None else "bad"
    cells = []
    for i, value in enumerate(values):
        step = min(int(harm[i] * STEPS), STEPS - 1) if value is not None else 0
        cells.append(
            {
                "text": "" if value is None else measure.show(value),
                "colour": f"{kind}{step}" if step else "",
                "worst": i in marked and 3 * step >= 2 * STEPS,
            }
        )
    return cells


def _decibel(value: float) -> str:
    return f"{value:.1f}".replace("-", plots.MINUS)


def _percent(value: float) -> str:
    return "0" if value == 0 else "< 0.01" if value < 0.01 else plots.number(value, 2 if value < 10 else 3)


def _factor(value: float) -> str:
    return f"{value:.1f} ×"


def _whole(value: float) -> str:
    return f"{value:.0f}"


def _log(value: float) -> float:
    return math.log2(max(value, 1.0))
