"""How long each layer takes at each precision: a table that was measured here, or brought along from a device."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msqkd.errors import DataError, did_you_mean
from msqkd.files import PathLike
from msqkd.recipe.text import YamlSyntaxError, parse_yaml

REST = "(rest)"
"""The row of what belongs to no layer that has a choice: told, and in no budget. No layer is called so."""

FLOAT_KEY, INT8_KEY = "float", "8"
KEYS = (FLOAT_KEY, "float16", *(str(bits) for bits in range(2, 9)), "8xfloat16", "8x16")
"""What the precisions of a layer are called in a table: float, float16, the bits of its weight, or 8 bits of its weight
with values in float16 or inputs of 16 bits."""

_OF_SOME = "8x16"  # only dense layers have it


@dataclass(frozen=True)
class LayerTimes:
    """Microseconds a sample.

    Attributes:
        layers: by layer and precision (of `KEYS`); every layer has the same precisions, ``float`` among them, but for
            ``8x16``, which only dense layers can have.
        rest: by precision of the whole network, what belongs to no layer; empty where that is not known.
    """

    layers: dict[str, dict[str, float]]
    rest: dict[str, float] = field(default_factory=dict)

    @property
    def precisions(self) -> list[str]:
        """The precisions there are times of, in the order of `KEYS`."""
        found = {key for times in self.layers.values() for key in times}
        return [key for key in KEYS if key in found]

    def to_dict(self) -> dict[str, dict[str, float]]:
        """The table, as `read_times` reads it."""
        return {**self.layers, **({REST: self.rest} if self.rest else {})}

    @classmethod
    def of(cls, table: Mapping[str, Mapping[str, float]]) -> LayerTimes:
        """What `to_dict` gives, as it was."""
        layers = {name: dict(times) for name, times in table.items() if name != REST}
        return cls(layers, dict(table.get(REST, {})))


def read_times(file: PathLike, layers: Collection[str], others: Collection[str] = ()) -> LayerTimes:
    """Read a table {layer: {precision: microseconds a sample}} from a JSON or YAML file.

    Args:
        file: JSON where it is called so, else YAML.
        layers: which it must have, all of them.
        others: operations of the network without a choice: it may have them, and they are left out.

    Raises:
        DataError: the file cannot be read or is no such table, a layer is unknown, a layer or one of its precisions is
            missing, or a time is no number of 0 or more.
    """
    path = Path(file)
    table = _parsed(path)
    allowed = [*layers, *others, REST]
    for name, times in table.items():
        if name not in allowed:
            raise DataError(
                f"{path}: '{name}' is no layer of the network; allowed: {_listed(layers)}{did_you_mean(name, allowed)}"
            )
        if not isinstance(times, Mapping):
            raise DataError(f"{path}: {name}: found {times!r}, allowed: a mapping of precisions to microseconds")
    found = {name: _row(path, name, table[name]) for name in table}
    chosen = {name: found[name] for name in layers if name in found}
    missing = [name for name in layers if name not in found]
    if missing:
        raise DataError(f"{path}: no times of {_listed(missing)}; allowed: every layer of the network")
    wanted = {key: name for name, times in chosen.items() for key in times} | {FLOAT_KEY: ""}
    for name, times in chosen.items():
        for key in (key for key in KEYS if key in wanted and key not in (*times, _OF_SOME)):
            why = f"as {wanted[key]} has it" if wanted[key] else "which every share of the budget is of"
            raise DataError(f"{path}: {name}: no time at '{key}', {why}")
    return LayerTimes(chosen, found.get(REST, {}))


def _parsed(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DataError(f"{path} cannot be read: {reason}") from error
    try:
        if path.suffix == ".json":
            table = json.loads(text, object_pairs_hook=_without_repetition)
        else:
            parsed = parse_yaml(text)
            if parsed.problems:
                line, problem = parsed.problems[0]
                raise DataError(f"{path}:{line}: {'.'.join(map(str, problem.path))}: {problem.text}")
            table = parsed.value
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: no JSON: {error.msg}") from error
    except YamlSyntaxError as error:
        raise DataError(f"{path}{f':{error.line}' if error.line else ''}: no YAML: {error.text}") from error
    except _RepeatedError as error:
        raise DataError(f"{path}: '{error}' is given twice") from error
    except RecursionError as error:
        raise DataError(f"{path}: nested too deeply; allowed: layers, and in them precisions") from error
    if not isinstance(table, dict) or not table:
        raise DataError(f"{path}: allowed: a mapping of layers to {{precision: microseconds a sample}}")
    return {str(name): times for name, times in table.items()}


class _RepeatedError(Exception):
    """A key of a JSON object that is given twice."""


def _without_repetition(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _RepeatedError(key)
        found[key] = value
    return found


def _row(path: Path, name: str, times: Mapping[Any, Any]) -> dict[str, float]:
    row: dict[str, float] = {}
    for key, value in ((str(key), value) for key, value in times.items()):
        if key not in KEYS:
            raise DataError(
                f"{path}: {name}: '{key}' is no precision; allowed: {_listed(KEYS)}{did_you_mean(key, KEYS)}"
            )
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
        if not good:
            raise DataError(f"{path}: {name}: {key}: found {value!r}, allowed: microseconds, a number of 0 or more")
        row[key] = float(value)
    return row


def _listed(names: Collection[str], most: int = 8) -> str:
    shown = list(names)[:most]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")
