"""What a search shows: `search.json` for programs, `search.html` for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msqkd.analysis import plots
from msqkd.analysis.report import inline, rendered, write_pages
from msqkd.files import PathLike
from msqkd.train.metric import Scale

REPORT = "search"
"""Name of the two files, without their suffixes."""


def write_search(result: Mapping[str, Any], folder: PathLike) -> None:
    """Write `search.json` and `search.html`, each whole or not at all; `result` is what `search_recipe` returns."""
    write_pages(result, folder, REPORT, search_html)


def verdict(result: Mapping[str, Any]) -> str:
    """What was found, in a sentence."""
    scale, chosen = Scale.of(result["metric"]), result["chosen"]
    counts = ", ".join(f"{count} in {name}" for name, count in sorted(chosen["counts"].items()))
    found = (
        f"Within {result['budget']:g} of the float {result['by']}: {counts} take {chosen['share']:.3f} and reach "
        f"{scale.show(chosen['test'])} on the whole test set (float {scale.show(result['float']['test'])})."
    )
    return f"{found} {_rest(result)}".strip()


def _rest(result: Mapping[str, Any]) -> str:
    """Where times come from, and what they leave out, in a sentence or two; empty for other budgets."""
    if result["times"] is None:
        return ""
    source, rest = result["times"]["source"], result["times"]["rest"]
    text = f"Times: {source}."
    if rest:
        parts = " and ".join(f"{value:.1f} µs in {_network(key)}" for key, value in rest.items())
        text += f" What belongs to none of these layers takes {parts}, and is in no budget."
    return text


def _rows(result: Mapping[str, Any], names: Sequence[str], tell: Callable[[Mapping[str, Any]], str]) -> list[list[str]]:
    """A row a layer: its name, what was chosen, and what `tell` says of each precision it can have."""
    rows = []
    for layer, choices in result["choices"].items():
        told = {item["name"]: tell(item) for item in choices}
        rows.append([layer, result["chosen"]["layers"][layer], *(told.get(name, "") for name in names)])
    return rows


def _network(key: str) -> str:
    return f"the {key} network" if not key[:1].isdigit() else f"the one of {key} bits"


def _cost(value: float, unit: str) -> str:
    """A cost as it is told: microseconds with a fraction, else whole numbers in groups of three."""
    return f"{value:.1f} µs" if unit.startswith("microseconds") else f"{value:,.0f}"


def search_html(result: Mapping[str, Any]) -> str:
    """The page of a search: one file that loads nothing."""
    scale, chosen, sets = Scale.of(result["metric"]), result["chosen"], result["sets"]
    whole = result["float"]["cost"]
    points = [(point["share"], point["metric"]) for point in result["points"]]
    front = [(item["cost"] / whole, item["loss"]) for item in result["front"]]
    mark = chosen["share"]
    charts = [
        plots.front(points, f"share of the float {result['by']}", scale.header, mark, "points"),
        plots.front(front, f"share of the float {result['by']}", "sum of the layers' losses", mark, "front"),
    ]
    names = list(dict.fromkeys(item["name"] for choices in result["choices"].values() for item in choices))
    rows = _rows(result, names, lambda item: plots.number(item["loss"]))
    costs = _rows(result, names, lambda item: _cost(item["cost"], result["unit"]))
    view = {
        "name": result["name"],
        "facts": f"search · budget {result['budget']:g} of the float {result['by']} ({result['unit']})",
        "verdict": [verdict(result)],
        "tiles": [
            {"value": scale.show(chosen["test"]), "label": f"{scale.name}, chosen", "note": ""},
            {"value": scale.show(result["float"]["test"]), "label": f"{scale.name}, float", "note": ""},
            {
                "value": f"{chosen['share']:.3f}",
                "label": f"of the float {result['by']}",
                "note": f"{_cost(chosen['cost'], result['unit'])} of {_cost(whole, result['unit'])}",
            },
        ],
        "warnings": [],
        "contents": [("front", "Front"), ("layers", "Layers"), ("sets", "Sets"), ("recipe", "Recipe")],
        "charts_of_front": [inline(svg) for svg in charts],
        "header": ["layer", "chosen", *names],
        "rows": rows,
        "costs": costs,
        "unit": result["unit"],
        "sets": [(name, f"{item['samples']} samples: {item['name']}") for name, item in sets.items()],
        "recipe": result["recipe"],
    }
    return rendered("search.html.j2", view)
