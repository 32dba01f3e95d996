"""What is wrong with a recipe, in words: the messages shared by the validators, the loader and the reference page."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, Optional, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from msqkd.errors import did_you_mean

KeyPath = tuple[Union[str, int], ...]

ONE, SEVERAL = "<one>", "<several>"
"""The tags of a key that takes a section or a list of them; pydantic puts them into its paths."""


class Disputed(str):
    """A text written without quotes that YAML 1.1 reads as a number, a boolean or a date, and YAML 1.2 does not."""

    @property
    def hint(self) -> str:
        """The end of a sentence that refuses it."""
        return f"; versions 1.1 and 1.2 of YAML read {self} differently: write the value out, or a text in quotes"


@dataclass(frozen=True)
class Allowed:
    """Annotation metadata: the words for what a field accepts, where its type and range do not say it well."""

    text: str


class Problem(NamedTuple):
    """One thing that is wrong: the path of the key (relative to the section that found it) and the sentence."""

    path: KeyPath
    text: str


def refuse(problems: Iterable[Problem]) -> None:
    """Raise, inside a pydantic validator, one error that carries all of `problems`; do nothing when there are none."""
    found = list(problems)
    if found:
        text = "; ".join(f"{dotted(path)}: {text}" if path else text for path, text in found)
        raise PydanticCustomError("msqkd", "{text}", {"text": text, "problems": found})


def refuse_value(text: str) -> NoReturn:
    """Raise, inside a field validator, an error about the value itself."""
    raise PydanticCustomError("msqkd", "{text}", {"text": text, "problems": [Problem((), text)]})


def dotted(path: KeyPath) -> str:
    """The key path as a reader writes it, for instance ``quantization.rules[0].match``."""
    names = (f"[{key}]" if isinstance(key, int) else f".{key}" if key.isprintable() else f".{key!r}" for key in path)
    text = "".join(names)
    return text[1:] if text.startswith(".") else text


def show(value: Any) -> str:
    """A value much as it looks in YAML, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (dict, BaseModel)):
        return "a mapping"
    if isinstance(value, list):
        text = f"[{', '.join(show(item) for item in value[:20])}]"
    elif isinstance(value, (str, float)):
        text = repr(value)
    elif isinstance(value, int):
        text = str(value) if value.bit_length() < 200 else "a huge integer"  # Python refuses to print the hugest
    else:
        text = f"a {type(value).__name__}"
    return shortened(text, 60)


def shortened(text: str, length: int) -> str:
    """`text` in one line of at most `length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 3] + "..."


def listing(options: Iterable[str], conjunction: str = "or") -> str:
    """``'a', 'b' or 'c'``."""
    quoted = [f"'{option}'" for option in options]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} {conjunction} {quoted[-1]}"


def allowed(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """The words for what a field of type `annotation` accepts, for instance ``an integer from 2 to 8``."""
    notes = list(metadata)
    said = [note.text for note in notes if isinstance(note, Allowed)]
    if said:
        return said[-1]  # the outermost, where a type is made from another one
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return allowed(arguments[0], [*arguments[1:], *notes])
    if origin is Union:
        return allowed(next(item for item in arguments if item is not type(None)), notes)
    if origin is Literal:
        return listing(arguments)
    if origin is list:
        return f"a list, each entry {allowed(arguments[0])}"
    if annotation in (int, float):
        return ("an integer" if annotation is int else "a number") + _range(notes)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a section, keys " + ", ".join(annotation.model_fields)
    return {bool: "true or false", str: "a text"}.get(annotation, "a mapping")


def section_of(annotation: Any) -> Optional[type[BaseModel]]:
    """The section (model class) inside `annotation`, looking through Optional, List and Annotated; None without one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) is Literal:
        return None
    found = (section_of(argument) for argument in get_args(annotation))
    return next((item for item in found if item is not None), None)


def problems_of(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """Every problem in pydantic's `error` about `model`, in words, the paths counted from `model`."""
    problems: list[Problem] = []
    for detail in error.errors(include_url=False):
        path = tuple(key for key in detail["loc"] if key not in (ONE, SEVERAL))
        if detail["type"] == "msqkd":
            problems += [Problem((*path, *tail), text) for tail, text in detail["ctx"]["problems"]]
        else:
            problems.append(Problem(path, _sentence(detail, path, model)))
    return problems


def _sentence(detail: ErrorDetails, path: KeyPath, model: type[BaseModel]) -> str:
    kind, value = detail["type"], detail["input"]
    if kind in ("extra_forbidden", "invalid_key"):
        section = section_of(_at(model, path[:-1])[0])
        keys = list(section.model_fields) if section is not None else []
        where = f"in {dotted(path[:-1])}" if path[:-1] else "at the top"
        name = str(path[-1])
        return f"unknown key {show(path[-1])}, allowed {where}: {', '.join(keys)}{did_you_mean(name, keys)}"
    annotation, notes = _at(model, path)
    expected = allowed(annotation, notes)
    if kind == "missing":
        return f"is missing, allowed: {expected}"
    guess = ""
    if kind == "literal_error" and isinstance(value, str):
        guess = did_you_mean(value, re.findall(r"'([^']*)'", expected))
    return f"found {show(value)}, allowed: {expected}{guess}{value.hint if isinstance(value, Disputed) else ''}"


def _at(model: type[BaseModel], path: KeyPath) -> tuple[Any, list[Any]]:
    """The annotation and metadata of the field at `path` below `model`."""
    annotation: Any = model
    notes: list[Any] = []
    for key in path:
        section = section_of(annotation)
        if isinstance(key, int):
            annotation, notes = _item(annotation), []
        elif section is not None and key in section.model_fields:
            annotation, notes = section.model_fields[key].annotation, list(section.model_fields[key].metadata)
    return annotation, notes


def _item(annotation: Any) -> Any:
    """The type of a list's entries, looking through Optional and Annotated."""
    if get_origin(annotation) is list:
        return get_args(annotation)[0]
    inner = [item for item in get_args(annotation) if get_origin(item) is not None]
    return _item(inner[0]) if inner else annotation


def _range(notes: Iterable[Any]) -> str:
    """``from 2 to 8``, ``of 1 or more``, ``above 0``, … from the constraints in a field's metadata."""
    ends = {name: getattr(note, name) for note in notes for name in ("ge", "gt", "le", "lt") if hasattr(note, name)}
    if "ge" in ends and "le" in ends:
        return f" from {ends['ge']} to {ends['le']}"
    words = {"ge": "of {} or more", "gt": "above {}", "le": "at most {}", "lt": "below {}"}
    said = " and ".join(words[name].format(end) for name, end in ends.items())
    return f" {said}" if said else ""
