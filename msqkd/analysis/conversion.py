"""The vendor's converter's file against our own, as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msqkd.words import of_hundred

_MOST_NAMES = 5


def conversion_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what was compared and what was found, in words, from what `msqkd convert` writes; empty for nothing."""
    if not found.get("compared"):
        return [("file", str(found.get("file") or "none")), ("not compared", str(found.get("reason")))] if found else []
    parameters, runtime = found.get("parameters") or {}, found.get("runtime")
    of, equal = parameters.get("of", 0), parameters.get("equal", 0)
    what = "parameters of markers" if found.get("reference") == "markers" else "int8 nodes with equal parameters"
    rows = [
        (what, f"{equal} of {of}{_names(parameters.get('missing') or [])}"),
        ("nodes in int8", _share(found.get("nodes") or [])),
    ]
    if found.get("our_nodes"):
        rows.append(("nodes in int8, in our file", _share(found["our_nodes"])))
    rows += [
        ("equal outputs, simulated", _outputs(found)),
        ("equal answers", f"{of_hundred(found['agreement'])} %"),
    ]
    at_hand = "not at hand" if found.get("reference") != "markers" else "not compared"
    return [*rows, ("equal outputs, in the vendor's runtime", _outputs(runtime) if runtime else at_hand)]


def _share(nodes: Sequence[Mapping[str, Any]]) -> str:
    floats = [str(node.get("name")) for node in nodes if not node.get("int8")]
    return f"{len(nodes) - len(floats)} of {len(nodes)}{_names(floats, 'float')}"


def _names(names: Sequence[str], what: str = "not equal") -> str:
    if not names:
        return ""
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f" ({what}: {', '.join(names[:_MOST_NAMES])}{more})"


def _outputs(found: Mapping[str, Any]) -> str:
    words = f"{of_hundred(found['equal_outputs'])} % on {found['samples']} samples"
    return f"{words}, largest difference {found['max_difference']:.3g}" if found["max_difference"] else words
