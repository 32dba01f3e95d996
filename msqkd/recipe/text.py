"""YAML text to plain values, with the line of every key; everything a reader could misread is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import yaml

from msqkd.recipe.problems import KeyPath, Problem

MAX_NODES = 20_000
MAX_DEPTH = 100
_MERGE, _NULL = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:null"


class YamlText(NamedTuple):
    """What a YAML text holds: its value, the line (from 1) of every key path, and problems with their lines."""

    value: Any
    lines: dict[KeyPath, int]
    problems: list[tuple[int, Problem]]


class YamlSyntaxError(Exception):
    """A text that is not YAML: the line (from 1) where known, and what is wrong."""

    def __init__(self, line: Optional[int], text: str) -> None:
        super().__init__(text)
        self.line = line
        self.text = text


def parse_yaml(text: str) -> YamlText:
    """Read one YAML document by ``yaml.safe_load``.

    Keys given twice and keys with nothing after the colon are returned as problems: the first would be overwritten, the
    second is a half-edited line. Raises `YamlSyntaxError` for a text that is not YAML, holds
    other than plain values, is nested more than `MAX_DEPTH` deep, or unfolds (through aliases) to more than `MAX_NODES`
    nodes.
    """
    try:
        _check_depth(text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        lines: dict[KeyPath, int] = {}
        problems = [] if root is None else list(_walk(root, (), lines))
        return YamlText(yaml.safe_load(text), lines, problems)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = None if mark is None else mark.line + 1
        raise YamlSyntaxError(line, error.problem or str(error.context)) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlSyntaxError(line, f"a character (code {error.character}) that YAML does not allow") from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        # PyYAML lets these escape for a scalar that its own type cannot hold, such as the date 2024-13-45.
        raise YamlSyntaxError(None, f"a value that its type cannot hold ({error})") from error


def _check_depth(text: str) -> None:
    """Refuse deep nesting before anything recurses into it: how deep Python may go, other libraries change."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise YamlSyntaxError(None, "nested too deeply")


def _walk(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int]) -> Iterator[tuple[int, Problem]]:
    """Record the line of `node` and of everything below it, yielding the problems found."""
    if len(path) > MAX_DEPTH:
        raise YamlSyntaxError(None, "nested too deeply")  # an alias to what it is in
    if len(lines) >= MAX_NODES:
        raise YamlSyntaxError(None, f"more than {MAX_NODES} entries once its aliases are unfolded")
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _walk(item, (*path, index), lines)
    elif isinstance(node, yaml.MappingNode):
        yield from _walk_mapping(node, path, lines)


def _walk_mapping(node: yaml.MappingNode, path: KeyPath, lines: dict[KeyPath, int]) -> Iterator[tuple[int, Problem]]:
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag == _MERGE:
            raise YamlSyntaxError(line, "merge keys (<<) are not part of a recipe; write the keys out")
        here = (*path, str(key.value))
        if here in lines:
            yield line, Problem(here, f"given twice, first on line {lines[here]}")
            continue
        if value.tag == _NULL and value.value == "":
            yield line, Problem(here, "nothing after the colon, allowed: a value, null or {}")
        yield from _walk(value, here, lines)
        lines[here] = line
