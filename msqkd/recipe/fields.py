"""What the sections of a recipe are made of: their base, the kinds of value, defaults that depend on other keys."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterator
from typing import Annotated, Any, Callable, Union

from annotated_types import Ge, Gt, Le
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from msqkd.distill.schedule import SCHEDULES
from msqkd.errors import did_you_mean
from msqkd.recipe.problems import Allowed, Disputed, Problem, listing, refuse, refuse_value, show

_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def path_pattern(pattern: str) -> re.Pattern[str]:
    """The compiled form of a rule's `path`, to be used with ``fullmatch`` on a cell path such as ``layer1.0.conv1``.

    ``re:...`` is a regular expression; anything else is a glob in which ``*`` and ``?`` also match dots, and in which a
    text without wildcards matches itself only. Raises ``re.error`` for a bad regular expression.
    """
    return re.compile(pattern[3:] if pattern.startswith("re:") else fnmatch.translate(pattern))


def _number(value: Any) -> Any:
    """Take ``1e-4`` in quotes, or from a program that reads YAML 1.1, for the number that is meant."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def switch(value: Any) -> Any:
    """Take true and false for on and off, as which YAML 1.1 reads them."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _json_problems(value: Any, path: tuple[Any, ...] = ()) -> Iterator[Problem]:
    """What in a free mapping could not be written to JSON and read back the same."""
    if isinstance(value, dict):
        for key, item in value.items():
            if isinstance(key, str):
                yield from _json_problems(item, (*path, key))
            else:
                yield Problem(path, f"key {show(key)} is not a text; write it in quotes")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _json_problems(item, (*path, index))
    elif isinstance(value, float) and not math.isfinite(value):
        yield Problem(path, f"found {value}, allowed: a finite number")
    elif isinstance(value, Disputed):
        yield Problem(path, f"found {value}{value.hint}")
    elif value is not None and not isinstance(value, (str, bool, int, float)):
        yield Problem(path, f"found {show(value)}, allowed: a text, number, true, false, null, list or mapping")


def _free(value: Any) -> Any:
    if isinstance(value, dict):
        refuse(_json_problems(value))
    return value


def _path(value: str) -> str:
    try:
        path_pattern(value)
    except re.error as error:
        refuse_value(f"found {value!r}, which is not a regular expression: {error}")
    return value


def _scheduled(words: str, fits: Callable[[float], bool]) -> Callable[[Any], Any]:
    """The validator of a number that may change over the training; `words` say which numbers it `fits`."""

    def number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and fits(value)

    def problems(given: dict[Any, Any]) -> Iterator[Problem]:
        keys = ("schedule", "from", "to")
        for key in given:
            if key not in keys:
                yield Problem((), f"unknown key {show(key)}, allowed: {listing(keys)}{did_you_mean(str(key), keys)}")
        kind = given.get("schedule")
        if kind not in SCHEDULES:
            found = "is missing" if kind is None else f"found {show(kind)}"
            hint = did_you_mean(kind, SCHEDULES) if isinstance(kind, str) else ""
            yield Problem(("schedule",), f"{found}, allowed: {listing(SCHEDULES)}{hint}")
        for key in ("from",) if kind == "constant" else ("from", "to"):
            if not number(given.get(key)):
                found = "is missing" if given.get(key) is None else f"found {show(given[key])}"
                yield Problem((key,), f"{found}, allowed: {words}")
        if kind == "constant" and "to" in given:
            yield Problem(("to",), f"found {show(given['to'])}, not allowed with schedule: constant")

    def validate(value: Any) -> Any:
        if isinstance(value, dict):
            given = {key: _number(item) for key, item in value.items() if item is not None}
            refuse(problems(given))
            return {key: item if key == "schedule" else float(item) for key, item in given.items()}
        value = _number(value)
        if not number(value):
            refuse_value(f"found {show(value)}, allowed: {words}, or a mapping {_SCHEDULE_WORDS}")
        return float(value)

    return validate


_SCHEDULE_WORDS = "{schedule: constant, linear or cosine, from: a number, to: a number}"


def distinct(value: list[Any]) -> list[Any]:
    """A list in which nothing comes twice."""
    twice = sorted({item for item in value if value.count(item) > 1})
    if twice:
        refuse_value(f"{listing(map(str, twice), 'and')} given twice")
    return value


Text = Annotated[str, Field(min_length=1), Allowed("a text that is not empty")]
Factory = Annotated[
    str,
    Field(pattern=r"^[^:\s][^:]*:[^\W\d]\w*$"),
    Allowed("a text like 'package.module:factory' or 'folder/file.py:factory'"),
]
PathPattern = Annotated[
    Text, AfterValidator(_path), Allowed("a cell path, a glob such as 'layer1.*' or 're:' and a regular expression")
]
FreeMapping = Annotated[dict[str, Any], BeforeValidator(_free), Allowed("a mapping")]
Number = Annotated[float, BeforeValidator(_number)]
Positive = Annotated[Number, Gt(0)]
NotNegative = Annotated[Number, Ge(0)]
Fraction = Annotated[Number, Ge(0), Le(1)]
Percentile = Annotated[Number, Ge(90), Le(100)]
Count = Annotated[int, Ge(1)]
Shape = Annotated[
    list[Count], Field(min_length=3, max_length=3), Allowed("a list of three integers [channels, height, width]")
]
Outputs = Annotated[
    list[Annotated[int, Ge(0)]],
    Field(min_length=1),
    AfterValidator(distinct),
    Allowed("a list of numbers of outputs, counted from 0, at least one"),
]
Share = Annotated[
    Union[float, dict[str, Any]],
    BeforeValidator(_scheduled("a number from 0 to 1", lambda number: 0 <= number <= 1)),
    Allowed(f"a number from 0 to 1, or a mapping {_SCHEDULE_WORDS}"),
]
Temperature = Annotated[
    Union[float, dict[str, Any]],
    BeforeValidator(_scheduled("a number above 0", lambda number: number > 0)),
    Allowed(f"a number above 0, or a mapping {_SCHEDULE_WORDS}"),
]
Steps = Annotated[int, Ge(0)]


def filled(values: Any, key: str, default: Any, used: bool) -> Any:
    """`values` with `key` at its default when it is `used` but not given; pydantic refuses all but mappings."""
    if used and isinstance(values, dict) and values.get(key) is None:
        return {**values, key: default}
    return values


def filled_below(values: Any, section: str, key: str, default: Any) -> Any:
    """`values` with `key` of `section` at its default, unless that is None or the key is given."""
    inner = value_of(values, section, {}) if isinstance(values, dict) else None
    if default is None or not isinstance(inner, dict):
        return values
    return {**values, section: filled(inner, key, default, True)}


def value_of(values: Any, key: str, default: Any = None) -> Any:
    """The value of `key`, or `default` where it is absent or null."""
    value = values.get(key) if isinstance(values, dict) else None
    return default if value is None else value


class Section(BaseModel):
    """Base of every section: unknown keys refused, null for the default, no conversions between types, read-only."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, values: Any) -> Any:
        """Drop the known keys that are null: everywhere in a recipe, null takes the default."""
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if value is not None or key not in cls.model_fields}

    def _conflicts(self) -> Iterator[Problem]:
        """The settings of this section that contradict each other; a subclass yields its own."""
        yield from ()

    @model_validator(mode="after")
    def _no_conflicts(self) -> Section:
        refuse(self._conflicts())
        return self


def only_with(key: str, value: Any, owner: str, wanted: str) -> Problem:
    """The problem of a key that has a meaning only where `owner` is `wanted`."""
    return Problem((key,), f"found {show(value)}, allowed only with {owner}: {wanted}")
