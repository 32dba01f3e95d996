"""Parts of recipes that are offered to people: mappings with the recipe's own keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from msqkd.recipe.text import write_yaml


def rule_of(name: str, **settings: Any) -> dict[str, Any]:
    """The fragment with a rule for one operation: ``weight``, ``activation`` or ``precision`` as in a recipe."""
    path = re.sub(r"([*?\[])", r"[\1]", name)  # a rule reads them as wildcards
    return {"quantization": {"rules": [{"match": {"path": path}, **settings}]}}


def as_yaml(fragment: Mapping[str, Any]) -> str:
    """The fragment as it is written in a recipe."""
    return write_yaml(dict(fragment))
