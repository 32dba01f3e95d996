"""The recipes that come with msqkd."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msqkd
from msqkd.recipe.text import YamlSyntaxError, parse_yaml


@dataclass(frozen=True)
class BuiltinRecipe:
    """A recipe that comes with msqkd: its name, file, one-sentence description and measured result."""

    name: str
    path: Path
    description: str
    result: dict[str, Any]


def recipe_folders() -> list[Path]:
    """The folders of built-in recipes that exist: beside the package (a checkout), then in the installed data."""
    beside = Path(msqkd.__file__).resolve().parent.parent / "recipes"
    installed = Path(sys.prefix) / "share" / "msqkd" / "recipes"
    return [folder for folder in (beside, installed) if folder.is_dir()]


def list_builtin() -> list[BuiltinRecipe]:
    """The built-in recipes by name; of two with the same name, the one in the first of `recipe_folders`.

    Files that are not msqkd recipes are passed over: beside an installed package, ``recipes`` may be anybody's folder.
    """
    found: dict[str, BuiltinRecipe] = {}
    for folder in recipe_folders():
        for path in sorted(folder.glob("*.yaml")):
            values = _values(path)
            if path.stem not in found and str(values.get("apiversion")).startswith("msqkd/"):
                result = values.get("result")
                found[path.stem] = BuiltinRecipe(
                    name=path.stem,
                    path=path,
                    description=str(values.get("description", "")),
                    result=result if isinstance(result, dict) else {},
                )
    return [found[name] for name in sorted(found)]


def _values(path: Path) -> dict[Any, Any]:
    """The mapping in a YAML file, empty for a file without one; loading the recipe says what is wrong with it."""
    try:
        values = parse_yaml(path.read_text(encoding="utf-8")).value
    except (OSError, ValueError, YamlSyntaxError):
        return {}
    return values if isinstance(values, dict) else {}
