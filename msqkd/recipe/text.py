"""YAML text to plain values, with the line of every key; everything a reader could misread is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import yaml

from msqkd.recipe.problems import Disputed, KeyPath, Problem

MAX_NODES = 20_000
MAX_DEPTH = 100
_MERGE, _NULL = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:null"


_BOOL, _INT, _FLOAT, _DATE = (f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "timestamp"))
_CORE = (
    (_BOOL, r"true|True|TRUE|false|False|FALSE", "tTfF"),
    # A number that begins with 0 is octal in YAML 1.1 and decimal in YAML 1.2, so it is none here.
    (_INT, r"[-+]?(0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        _FLOAT,
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    (_NULL, r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    (_MERGE, r"<<", "<"),
)
"""What a plain scalar is besides a text: tag, pattern, and first characters (YAML 1.2.2, section 10.3.2)."""


def _checked(text: str, *tags: str) -> str:
    """`text`, which a tag such as ``!!int`` may have called a number that it is not in YAML 1.2."""
    if not any(re.fullmatch(pattern, text) for tag, pattern, _ in _CORE if tag in tags):
        raise ValueError(f"{text!r} is no number of YAML 1.2")
    return text


class _Loader(yaml.SafeLoader):
    """A safe loader that reads plain scalars by the core schema of YAML 1.2."""

    def construct_yaml_int(self, node: Any) -> int:
        """Decimal numbers, octal ones that begin with 0o, and hexadecimal ones that begin with 0x."""
        text = _checked(self.construct_scalar(node), _INT)
        sign, digits = (-1, text[1:]) if text[:1] == "-" else (1, text.removeprefix("+"))
        return sign * int(digits, {"0o": 8, "0x": 16}.get(digits[:2], 10))

    def construct_yaml_float(self, node: Any) -> float:
        """Decimal numbers, and .inf and .nan."""
        text = _checked(self.construct_scalar(node), _FLOAT, _INT).lower()
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))

    def construct_text(self, node: Any) -> str:
        """A text, marked where YAML 1.1 reads something else."""
        text: str = self.construct_scalar(node)
        if node.style is None:
            for tag, pattern in yaml.SafeLoader.yaml_implicit_resolvers.get(text[:1], []):
                if tag in (_BOOL, _INT, _FLOAT, _DATE) and pattern.match(text):
                    return Disputed(text)
        return text


_Loader.yaml_implicit_resolvers = {}  # instead of those of YAML 1.1
for _tag, _pattern, _first in _CORE:
    _Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), list(_first))
_Loader.add_constructor(_INT, _Loader.construct_yaml_int)
_Loader.add_constructor(_FLOAT, _Loader.construct_yaml_float)
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_text)


class _Dumper(yaml.SafeDumper):
    """A safe dumper that quotes every text which YAML 1.1 or YAML 1.2 could read as something else."""


for _tag, _pattern, _first in (*_CORE, (_INT, r"[-+]?0[0-9]+", "-+0")):
    _Dumper.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), list(_first))


def write_yaml(value: Any, width: int = 80) -> str:
    """Write plain values as YAML that readers of version 1.1 and of version 1.2 read back the same."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=width, allow_unicode=True)
    if set(text) & set("\x85\u2028\u2029"):  # line breaks that PyYAML writes as they are, but reads back as others
        text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=width)
    return text


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
    """Read one YAML document by the core schema of YAML 1.2.

    Texts that YAML 1.1 takes for something else (``010``, ``1:30``, ``1_000``, ``yes``, a date) are `Disputed`.
    Keys given twice and keys with nothing after the colon are returned as problems: the first would be overwritten, the
    second is a half-edited line. Raises `YamlSyntaxError` for a text that is not YAML, holds
    other than plain values, is nested more than `MAX_DEPTH` deep, or unfolds (through aliases) to more than `MAX_NODES`
    nodes.
    """
    try:
        _check_depth(text)
        root = yaml.compose(text, Loader=_Loader)
        lines: dict[KeyPath, int] = {}
        problems = [] if root is None else list(_walk(root, (), lines))
        return YamlText(yaml.load(text, Loader=_Loader), lines, problems)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = None if mark is None else mark.line + 1
        raise YamlSyntaxError(line, error.problem or str(error.context)) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlSyntaxError(line, f"a character (code {error.character}) that YAML does not allow") from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        # PyYAML lets these escape for a scalar that its own type cannot hold, such as !!int x.
        raise YamlSyntaxError(None, f"a value that its type cannot hold ({error})") from error


def _check_depth(text: str) -> None:
    """Refuse deep nesting before anything recurses into it: how deep Python may go, other libraries change."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
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
