"""What a search shows: `search.json` for programs, `search.html` for people."""

from __future__ import annotations

from collections.abc import Mapping
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
    return (
        f"Within {result['budget']:g} of the float {result['by']}: {counts} take {chosen['share']:.3f} and reach "
        f"{scale.show(chosen['test'])} on the whole test set (float {scale.show(result['float']['test'])})."
    )


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
    header = ["layer", "chosen", *(item["name"] for item in next(iter(result["choices"].values())))]
    rows = [
        [name, chosen["layers"][name], *(plots.number(item["loss"]) for item in choices)]
        for name, choices in result["choices"].items()
    ]
    view = {
        "name": result["name"],
        "facts": f"search · budget {result['budget']:g} of the float {result['by']} ({result['unit']})",
        "verdict": [verdict(result)],
        "tiles": [
            {"value": scale.show(chosen["test"]), "label": f"{scale.name}, chosen", "note": ""},
            {"value": scale.show(result["float"]["test"]), "label": f"{scale.name}, float", "note": ""},
            {"value": f"{chosen['share']:.3f}", "label": f"of the float {result['by']}", "note": ""},
        ],
        "warnings": [],
        "contents": [("front", "Front"), ("layers", "Layers"), ("sets", "Sets"), ("recipe", "Recipe")],
        "charts_of_front": [inline(svg) for svg in charts],
        "header": header,
        "rows": rows,
        "sets": [(name, f"{item['samples']} samples: {item['name']}") for name, item in sets.items()],
        "recipe": result["recipe"],
    }
    return rendered("search.html.j2", view)
