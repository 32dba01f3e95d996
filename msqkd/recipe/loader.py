"""Recipe files and mappings to `Recipe`, and back; whatever is wrong becomes one `RecipeError`, a line per problem."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from msqkd.errors import RecipeError, near_misses
from msqkd.files import PathLike
from msqkd.recipe.builtin import list_builtin
from msqkd.recipe.problems import KeyPath, Problem, dotted, listing, problems_of, shortened, show
from msqkd.recipe.schema import Recipe
from msqkd.recipe.text import YamlSyntaxError, YamlText, parse_yaml, write_yaml

FACTORY_KEYS = (
    ("model", "target"), ("teacher", "target"), ("data", "target"), ("train", "loss"), ("pretrain", "loss"),
    ("evaluation", "metric"),
)  # fmt: skip
"""The keys that name something in a Python file, as ``file.py:name``."""

FILE_KEYS = (
    ("data", "root"),
    ("verify", "converter"),
    *((section, key) for section in ("model", "teacher") for key in ("checkpoint", "name_map", "file")),
    *FACTORY_KEYS,
)
"""The keys that name a file or folder."""


LISTS: tuple[KeyPath, ...] = (
    ("quantization", "rules"), ("quantization", "schedule", "bits"), ("model", "inputs"), ("distillation", "features"),
)  # fmt: skip
"""The lists of sections."""


class Place(NamedTuple):
    """Where a value was given, for messages; places sort as messages do: the file's lines first."""

    order: int
    text: str
    is_override: bool = False


Found = tuple[Place, Problem]


def load_recipe(
    path_or_builtin_name: PathLike, overrides: Sequence[str] = (), *, require_weights: bool = True
) -> Recipe:
    """Read and validate a recipe.

    `path_or_builtin_name` is a YAML file, or the name of a recipe that comes with msqkd (`list_builtin`). Each of
    `overrides` is ``key.path=value`` with the value in YAML, for instance ``train.epoch_size=3`` or
    ``quantization.rules.0.weight.bits=4``; ``key.path=null`` brings the default back. A later one wins.
    A relative file name in the recipe is looked for in the working directory first, then in the recipe's folder.
    Without `require_weights` the model may lack trained weights, which is enough for planning.

    Raises `RecipeError` with all problems found, one a line: ``recipe.yaml:12: train.lr: found -1, allowed: …``.
    """
    path = _find(os.fspath(path_or_builtin_name))
    content = _parse(_read(path), path)
    if not isinstance(content.value, dict):
        found = "an empty file" if content.value is None else show(content.value)
        raise RecipeError(f"{path}:1: found {found}, allowed: a mapping with the keys of a recipe")
    places = {key: Place(line, f"{path}:{line}") for key, line in content.lines.items()}
    problems = [(Place(line, f"{path}:{line}"), problem) for line, problem in content.problems]
    return _build(_unshared(content.value), overrides, places, problems, path.parent, require_weights)


def make_recipe(
    values: Mapping[str, Any], overrides: Sequence[str] = (), folder: PathLike = ".", *, require_weights: bool = True
) -> Recipe:
    """Validate a recipe given as a mapping, for instance the result of `Recipe.to_dict`; otherwise as `load_recipe`.

    `folder` stands for the recipe's folder. `values` is not changed.
    """
    return _build(_unshared(dict(values)), overrides, {(): Place(0, "recipe")}, [], Path(folder), require_weights)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, defaults included and unset keys left out; loading it gives an equal recipe."""
    return write_yaml(recipe.model_dump(exclude_none=True), width=110)


def _find(name: str) -> Path:
    """The file of a recipe given by path or built-in name."""
    path = os.path.expanduser(name)
    if os.path.isfile(path):
        return Path(path)
    builtin = {recipe.name: recipe.path for recipe in list_builtin()}
    if name in builtin:
        return builtin[name]
    if os.path.isdir(path):
        raise RecipeError(f"{name}: found a folder, allowed: a recipe file or the name of a built-in recipe")
    folder, base = os.path.split(path)
    files = {file.stem: str(file) for file in sorted(Path(folder or ".").glob("*.y*ml"))}
    options = {**{key: key for key in builtin}, **files}
    near = [options[key] for key in near_misses(Path(base).stem, options)]
    guess = f"; did you mean {listing(near)}?" if near else ""
    raise RecipeError(f"{name}: neither a recipe file nor the name of a built-in recipe{guess}")


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: found bytes that are not text (byte {error.start}), allowed: UTF-8") from error


def _parse(text: str, path: Path) -> YamlText:
    try:
        return parse_yaml(text)
    except YamlSyntaxError as error:
        place = f"{path}" if error.line is None else f"{path}:{error.line}"
        raise RecipeError(f"{place}: not valid YAML: {error.text}") from error


def _unshared(value: Any) -> Any:
    """A copy in which no container occurs twice: a YAML alias must not carry an override to another section."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def _build(
    values: dict[str, Any],
    overrides: Sequence[str],
    places: dict[KeyPath, Place],
    found: list[Found],
    folder: Path,
    require_weights: bool,
) -> Recipe:
    """The validated recipe of `values` with `overrides`; `found` are the problems already known, `places` changes."""
    last = max(place.order for place in places.values())
    for number, override in enumerate(overrides, start=last + 1):
        place = Place(number, f"--set {shortened(override, 80)}", is_override=True)
        try:
            _override(override, place, values, places)
        except RecipeError as error:
            found.append((place, Problem((), str(error))))
    _resolve_files(values, folder)
    try:
        recipe = Recipe.model_validate(values)
        missing = recipe.missing_weights() if require_weights else None
        if missing is not None:
            found.append((_place_of(missing.path, places), missing))
    except ValidationError as error:
        found += [(_place_of(problem.path, places), problem) for problem in problems_of(error, Recipe)]
    if found:
        raise RecipeError("\n".join(_line(place, problem, places) for place, problem in sorted(found, key=_order)))
    return recipe


def _order(found: Found) -> int:
    return found[0].order


def _line(place: Place, problem: Problem, places: dict[KeyPath, Place]) -> str:
    """One problem as a line; the text of an override already names its key."""
    key = "" if place.is_override and places.get(problem.path) is place else dotted(problem.path)
    line = f"{place.text}: {key}: {problem.text}" if key else f"{place.text}: {problem.text}"
    return " ".join(line.splitlines())


def _place_of(path: KeyPath, places: dict[KeyPath, Place]) -> Place:
    """Where the value at `path`, or the nearest section around it, was given."""
    for end in range(len(path), 0, -1):
        part = path[:end]
        named = (*part[:-1], str(part[-1]))  # a key that YAML reads as a number is recorded as it is written
        if part in places or named in places:
            return places.get(part) or places[named]
    return places[()]


def _override(override: str, place: Place, values: dict[str, Any], places: dict[KeyPath, Place]) -> None:
    """Carry out ``key.path=value`` on `values` and record its place; RecipeError, without the place, if impossible."""
    keys, equals, text = override.partition("=")
    names = keys.strip().split(".")
    if not equals or "" in names:
        raise RecipeError("allowed: key.path=value, for instance train.epoch_size=3")
    try:
        content = parse_yaml(text)
    except YamlSyntaxError as error:
        raise RecipeError(f"the value is not valid YAML: {error.text}") from error
    if not content.lines:
        raise RecipeError("nothing after '=', allowed: a value in YAML (null for the default)")
    for _, problem in content.problems:
        raise RecipeError(f"{dotted(problem.path)}: {problem.text}")

    container: Any = values
    path: KeyPath = ()
    for name in names[:-1]:
        key = _key(container, name, path)
        path = (*path, key)
        if isinstance(container, dict) and container.get(key) is None:
            container[key] = [] if path in LISTS else {}
            places[path] = place
        container = container[key]
    key = _key(container, names[-1], path)
    path = (*path, key)
    for known in [known for known in places if known[: len(path)] == path]:
        del places[known]
    container[key] = content.value
    places[path] = place


def _key(container: Any, name: str, path: KeyPath) -> Any:
    """The key or index that `name` stands for in the `container` found at `path`; RecipeError where it has none."""
    if isinstance(container, list):
        if name.isdecimal() and int(name) < len(container):
            return int(name)
        raise RecipeError(f"{dotted(path)} has {len(container)} entries, counted from 0, and no entry {name}")
    if not isinstance(container, dict):
        raise RecipeError(f"{dotted(path)} is {show(container)}, not a section")
    return name


def _resolve_files(values: dict[str, Any], folder: Path) -> None:
    """Make the file names in `values` usable from the working directory.

    A name found neither there nor in the recipe's folder stays as it is, for the reader of the file to report.
    """
    for section, key in FILE_KEYS:
        held = values.get(section)
        for holder in held if isinstance(held, list) else [held]:
            value = holder.get(key) if isinstance(holder, dict) else None
            if not isinstance(holder, dict) or not isinstance(value, str) or not value:
                continue
            file, factory = _split_target(value) if (section, key) in FACTORY_KEYS else (value, "")
            name = os.path.expanduser(file)
            beside = os.path.join(folder, name)
            found_beside = bool(name) and not os.path.exists(name) and os.path.exists(beside)
            holder[key] = (beside if found_beside else name) + factory


def _split_target(target: str) -> tuple[str, str]:
    """``folder/file.py`` and ``:factory``; the file is empty when the target names a module."""
    file, colon, name = target.rpartition(":")
    return (file, colon + name) if file.endswith(".py") else ("", target)
