"""The distributions a report shows: those of the layers whose own rounding does most harm, and outliers of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional

from msqkd.analysis.statistics import Distribution

SHOWN = 6
"""So many layers at most have their histograms in a report."""

PERCENTILE = 99.9
"""Of the magnitudes; the largest one is told as a multiple of it."""


def add_outliers(
    layers: Sequence[dict[str, Any]], values: Mapping[str, Distribution], weights: Mapping[str, Distribution]
) -> None:
    """Put ``max_over_percentile``, the largest magnitude over the 99.9 percentile, into the rows of `layer_table`.

    Args:
        layers: the rows; changed in place. None where the percentile is 0.
        values: by the name of the value.
        weights: by the name of the layer.
    """
    for row in layers:
        activation, weight = row["activation"], row["weight"]
        if activation is not None:
            reach = max(abs(activation["observed_min"]), abs(activation["observed_max"]))
            usual = values[row["value"]].percentile(PERCENTILE)
            activation["max_over_percentile"] = max(reach / usual, 1.0) if usual else None
        if weight is not None:
            weight["max_over_percentile"] = weights[row["name"]].over_percentile(PERCENTILE)


def distributions(
    layers: Sequence[Mapping[str, Any]], values: Mapping[str, Distribution], weights: Mapping[str, Distribution]
) -> list[dict[str, Any]]:
    """Histograms of the weights and values of at most 6 layers, in the order of the network.

    These are the one with the most noise built up, and those whose own weight or value loses most to rounding.

    Args:
        layers, values, weights: as for `add_outliers`.

    Returns:
        One item a layer: `layer`, `op`, and `weight` and `activation` (None where it has none) with the `histogram`
        (``lo``, ``hi`` and the ``counts`` of equal bins between them), the `span` that can be represented, the
        `percentile` (99.9, of the magnitudes), and the `count` of numbers.
    """
    built_up = {i: row["sqnr_db"] for i, row in enumerate(layers) if row["sqnr_db"] is not None}
    own = {i: noise for i, row in enumerate(layers) if (noise := own_sqnr(row)) is not None}
    chosen = sorted(built_up, key=lambda i: built_up[i])[:1] + sorted(own, key=lambda i: own[i])
    kept = set(list(dict.fromkeys(chosen))[:SHOWN])
    return [
        {
            "layer": row["name"],
            "op": row["op"],
            "weight": _summary(weights[row["name"]], _weight_span(row["weight"])) if row["weight"] else None,
            "activation": _summary(values[row["value"]], (row["activation"]["lo"], row["activation"]["hi"]))
            if row["activation"]
            else None,
        }
        for i, row in enumerate(layers)
        if i in kept
    ]


def own_sqnr(row: Mapping[str, Any]) -> Optional[float]:
    """The lower of the signal-to-noise ratios that a row's weight and value have by themselves, in dB."""
    parts = [row.get("weight") or {}, row.get("activation") or {}]
    found = [part["sqnr_db"] for part in parts if part.get("sqnr_db") is not None]
    return min(found) if found else None


def _weight_span(weight: Mapping[str, Any]) -> tuple[float, float]:
    reach = (2 ** (weight["bits"] - 1) - 1) * weight["scale_max"]
    return -reach, reach


def _summary(found: Distribution, span: tuple[float, float]) -> dict[str, Any]:
    edges, counts = found.coarse_histogram()
    return {
        "histogram": {"lo": float(edges[0]), "hi": float(edges[-1]), "counts": counts.tolist()},
        "span": list(span),
        "percentile": found.percentile(PERCENTILE),
        "count": found.count,
    }
