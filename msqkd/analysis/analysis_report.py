"""What an analysis shows: `analysis.json` for programs, `analysis.html` for people, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from rich.table import Table

from msqkd.analysis import plots
from msqkd.analysis.report import inline, plain, rendered, write_pages
from msqkd.analysis.sensitivity import KL
from msqkd.analysis.statistics import OUTLIER_RATIO
from msqkd.files import PathLike
from msqkd.train.metric import Scale
from msqkd.words import of_hundred

REPORT = "analysis"
"""Name of the two files, without their suffixes."""

_COLUMNS = (
    "SQNR, dB", "Built up, dB", "Cosine", "Loss alone", "Loss without", "Metric alone", "Metric without", "Weight",
    "Spread", "Values", "Range", "Seen", "Kurtosis", "Max / 99.9 %", "Dead", "Outliers",
)  # fmt: skip
_TERMINAL_ROWS = 15


def write_analysis(result: Mapping[str, Any], folder: PathLike, name: str = REPORT) -> dict[str, Path]:
    """Write the JSON and the page of an analysis into `folder` (made when needed), each whole or not at all.

    Args:
        result: `msqkd.analysis.analyze.Analysis.to_dict`, and what else is to be kept: ``name`` (of the recipe) is the
            page's heading, ``warnings`` are shown.
        folder: where to write.
        name: of the files, without their suffixes.

    Returns:
        The two paths, under ``json`` and ``html``.
    """
    return write_pages(result, folder, name, analysis_html)


def analysis_html(result: Mapping[str, Any]) -> str:
    """The page for `result` (see `write_analysis`): one file that loads nothing."""
    return rendered("analysis.html.j2", _view(plain(result)))


def analysis_table(result: Mapping[str, Any]) -> Table:
    """The layers that do most harm, at most 15, as a table of `rich`."""
    scale = Scale.of(result["metric"])
    measured = result["sensitivity"]["float_metric"] is not None
    count = len(result["layers"])
    shown = f", the worst {_TERMINAL_ROWS} of {count} layers" if count > _TERMINAL_ROWS else ""
    title = f"{result.get('name') or result['network']} on {result['target']}: {_loss_words(result)}{shown}"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("layer", overflow="fold")
    table.add_column("operation")
    headers = ["SQNR, dB", "built up, dB", "alone quantised", "all but it"]
    for header in headers + [f"{scale.name} alone", f"{scale.name} all but it"] * measured:
        table.add_column(header, justify="right")
    for row in sorted(result["layers"], key=lambda row: row["rank"])[:_TERMINAL_ROWS]:
        cells = [_decibel(row["sqnr_db"]), _decibel(row["cumulative_sqnr_db"])]
        cells += [plots.number(row["only_loss"]), plots.number(row["float_loss"])]
        if measured:
            cells += [scale.number(row["only_metric"]), scale.number(row["float_metric"])]
        table.add_row(str(row["rank"]), row["name"], row["op"], *cells)
    return table


def diagnosis_lines(result: Mapping[str, Any]) -> list[str]:
    """The diagnoses as lines of text: what is wrong with each bad layer, and the remedies that were measured."""
    lines = []
    for item in result["diagnoses"]:
        lines.append(f"{item['rank']}. {item['layer']} ({item['op']}): {item['harm']}")
        lines += [f"   - {cause}" for cause in item["causes"]]
        for remedy in item["remedies"]:
            lines.append(f"   → {remedy['text']}")
            lines += [f"       {line}" for line in remedy["yaml"].splitlines()]
    return lines or ["no layer stands out"]


def _loss_words(result: Mapping[str, Any]) -> str:
    return "KL divergence" if result["loss"] == KL else "relative error"


def _view(result: dict[str, Any]) -> dict[str, Any]:
    layers, found = result["layers"], result["sensitivity"]
    loss, scale = _loss_words(result), Scale.of(result["metric"])
    whole = found["quantised_loss"]
    by_name = {row["name"]: row for row in layers}
    bad = {item["layer"] for item in result["diagnoses"]}
    saved = [(row["name"], max(whole - row["float_loss"], 0.0)) for row in layers]
    noise = [(row["name"], row["sqnr_db"], row["cumulative_sqnr_db"]) for row in layers]
    only = [(row["name"], row["only_loss"]) for row in layers]
    values = enumerate(result["outputs"]["values"])
    return {
        "name": result.get("name") or result["network"],
        "description": result.get("description"),
        "facts": _facts(result),
        "verdict": _verdict(result, loss),
        "tiles": _tiles(result, scale, loss),
        "warnings": result.get("warnings") or [],
        "contents": [(part, part.capitalize()) for part in ("diagnosis", "sensitivity", "noise", "outputs", "layers")],
        "loss": loss,
        "few": found["samples"],
        "quantised_loss": plots.number(whole),
        "diagnoses": [
            {**item, "charts": _charts(by_name[item["layer"]], f"bad{i}")} for i, item in enumerate(result["diagnoses"])
        ],
        "only": [inline(svg) for svg in plots.losses(only, "only", loss)],
        "saved": [inline(svg) for svg in plots.losses(saved, "saved", f"{loss} saved")],
        "noise": [inline(svg) for svg in plots.noise_pairs(noise)],
        "outputs": _outputs(result, scale, loss),
        "histograms": [inline(_output_chart(one["histogram"], f"output{i}")) for i, one in values],
        "columns": _COLUMNS,
        "rows": [{**_row(row, scale), "bad": row["name"] in bad} for row in layers],
        "outlier_ratio": f"{OUTLIER_RATIO:g}",
    }


def _facts(result: dict[str, Any]) -> str:
    samples = result["samples"]
    count = f"{samples['statistics']} samples of {samples['split']}, {samples['sensitivity']} of them layer by layer"
    return f"analysis · target {result['target']} · {count} · took {result['seconds']:.0f} s"


def _verdict(result: dict[str, Any], loss: str) -> list[str]:
    if not result["diagnoses"]:
        whole = plots.number(result["sensitivity"]["quantised_loss"])
        return [f"No layer stands out; everything quantised costs a {loss} of {whole}."]
    first = result["diagnoses"][0]
    sentences = [f"'{first['layer']}' does most harm: {first['causes'][0]}."]
    if first["remedies"]:
        sentences.append(f"First remedy: {first['remedies'][0]['text']}.")
    return sentences


def _tiles(result: dict[str, Any], scale: Scale, loss: str) -> list[dict[str, str]]:
    outputs = result["outputs"]
    reached = outputs["metric"]
    tiles = []
    if reached["quantised"] is not None:
        note = f"nothing quantised: {scale.show(reached['float'])}"
        tiles.append({"value": scale.show(reached["quantised"]), "label": f"{scale.name}, quantised", "note": note})
    tiles.append({"value": plots.number(outputs["loss"]), "label": f"{loss}, everything quantised", "note": ""})
    if outputs["agreement"] is not None:
        tiles.append({"value": f"{of_hundred(outputs['agreement'])} %", "label": "equal answers", "note": ""})
    worst = min(result["layers"], key=lambda row: row["rank"])
    harm = f"{loss} {plots.number(worst['only_loss'])} alone"
    tiles.append({"value": worst["name"], "label": "does most harm", "note": harm})
    return tiles


def _charts(row: dict[str, Any], mark: str) -> list[Any]:
    """The histograms of a layer's values and weight, and their channels, where it has them."""
    found = []
    activation, weight = row["activation"], row["weight"]
    if activation is not None:
        span = (activation["lo"], activation["hi"])
        found += _distribution_charts(activation["statistics"], f"{mark}value", "its values", span)
    if weight is not None:
        found += _distribution_charts(weight["statistics"], f"{mark}weight", "its weight", None)
    return [inline(svg) for svg in found]


def _distribution_charts(
    stats: dict[str, Any], mark: str, title: str, span: Optional[tuple[float, float]]
) -> list[str]:
    histogram = stats["histogram"]
    edges = histogram["edges"]
    if edges[0] == edges[-1]:
        return []
    found = [plots.distribution(edges, [histogram["counts"]], mark, title, span)]
    if stats["channel_min"]:
        name, words = f"{mark}channels", f"{title}, by channel"
        found.append(plots.channels(stats["channel_min"], stats["channel_max"], name, words, span))
    return found


def _output_chart(histogram: dict[str, Any], mark: str) -> str:
    both = [histogram["float"], histogram["quantised"]]
    return plots.distribution(histogram["edges"], both, mark, f"output {mark.removeprefix('output')}")


def _outputs(result: dict[str, Any], scale: Scale, loss: str) -> list[tuple[str, str]]:
    outputs = result["outputs"]
    reached = outputs["metric"]
    rows = [("samples", f"{outputs['samples']}")]
    if reached["float"] is not None:
        both = f"{scale.show(reached['float'])} → {scale.show(reached['quantised'])}"
        rows.append((f"{scale.name}, nothing → everything quantised", both))
    if outputs["agreement"] is not None:
        rows.append(("equal answers", f"{of_hundred(outputs['agreement'])} %"))
        rows.append((loss, plots.number(outputs["loss"])))
    rows.append(("relative error", plots.number(outputs["relative_error"])))
    for i, one in enumerate(outputs["values"]):
        which = f" of output {i}" if len(outputs["values"]) > 1 else ""
        exact, rounded = one["float"], one["quantised"]
        rows.append((f"SQNR{which}", f"{_decibel(one['sqnr_db'])} dB"))
        rows.append((f"largest difference{which}", plots.number(one["max_abs_diff"])))
        for key, words in (("mean", "mean"), ("std", "standard deviation")):
            rows.append((f"{words}{which}", f"{plots.number(exact[key])} → {plots.number(rounded[key])}"))
    return rows


def _row(row: dict[str, Any], scale: Scale) -> dict[str, Any]:
    weight, activation = row["weight"], row["activation"]
    stats = activation["statistics"] if activation else {}
    cells = [
        _decibel(row["sqnr_db"]),
        _decibel(row["cumulative_sqnr_db"]),
        "" if row["cosine"] is None else f"{row['cosine']:.5f}",
        plots.number(row["only_loss"]),
        plots.number(row["float_loss"]),
        "" if row["only_metric"] is None else scale.number(row["only_metric"]),
        "" if row["float_metric"] is None else scale.number(row["float_metric"]),
        _weight_words(weight),
        _number(weight["statistics"]["channel_spread"]) if weight else "",
        f"{activation['bits']} bit" if activation else "",
        f"{plots.number(activation['lo'])} … {plots.number(activation['hi'])}" if activation else "",
        f"{plots.number(stats['min'])} … {plots.number(stats['max'])}" if stats else "",
        _number(stats["kurtosis"]) if stats else "",
        _number(stats["max_over_percentile"]["99.9"]) if stats else "",
        _count(stats, "dead_channels"),
        _count(stats, "outlier_channels"),
    ]
    return {"rank": row["rank"], "name": row["name"], "op": row["op"], "border": row["border"] or "", "cells": cells}


def _weight_words(weight: Optional[dict[str, Any]]) -> str:
    if weight is None:
        return ""
    return f"{weight['bits']} bit, {'per channel' if weight['per_channel'] else 'per tensor'}"


def _count(stats: dict[str, Any], key: str) -> str:
    return f"{len(stats[key])} of {stats['channels']}" if stats and stats["channels"] else ""


def _number(value: Optional[float]) -> str:
    return "" if value is None else plots.number(value)


def _decibel(value: Optional[float]) -> str:
    return "" if value is None else f"{value:.1f}".replace("-", plots.MINUS)
