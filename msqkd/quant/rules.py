"""Which settings a layer gets: default < operation < cell type < path (and first/last); within a level the later rule
wins."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

from msqkd.errors import PlanError, near_misses
from msqkd.graph.ir import Graph, Node
from msqkd.quant.config import QuantConfig, Rule

_LEVEL = {"op": 0, "type": 1, "path": 2, "position": 2}
WEIGHTED_OPS = ("Conv2D", "Dense")


class RuleBook:
    """The default settings and the rules, bound to a graph.

    Raises:
        PlanError: a rule matches nothing (with near misses), or is of an unknown kind.
    """

    def __init__(self, graph: Graph, default: QuantConfig, rules: Sequence[Rule] = ()) -> None:
        self.default, self.rules = default, list(rules)
        weighted = [node for node in graph.nodes if node.op in WEIGHTED_OPS and node.attrs.get("role") is None]
        self._ends = {"first": weighted[:1], "last": weighted[-1:]}
        self._matches: dict[str, list[Rule]] = {node.name: [] for node in graph.nodes}
        ordered = sorted(rules, key=lambda rule: _LEVEL.get(rule.kind, 0))
        for rule in ordered:
            hits = [node for node in graph.nodes if self._match(rule, node)]
            if not hits:
                raise PlanError(_no_match(graph, rule))
            for node in hits:
                self._matches[node.name].append(rule)

    def _match(self, rule: Rule, node: Node) -> bool:
        if rule.kind == "path":
            return any(_fits(rule.pattern, path) for path in _paths(node))
        if rule.kind == "type":
            return rule.pattern in node.cell_types
        if rule.kind == "op":
            return node.op == rule.pattern
        if rule.kind == "position":
            return node in self._ends.get(rule.pattern, [])
        raise PlanError(f"rule '{rule}' is of kind '{rule.kind}'; allowed: {', '.join(_LEVEL)}")

    def author(self, node: Node, *prefixes: str) -> str:
        """The rule that set the last setting of `node` whose name begins with one of `prefixes` (``act_``)."""
        found = [rule for rule in self._matches[node.name] if any(key.startswith(prefixes) for key in rule.changes)]
        return str(found[-1]) if found else "default"

    def matched(self, rule: Rule) -> list[str]:
        """The names of the nodes `rule` is for, in execution order."""
        return [name for name, rules in self._matches.items() if any(other is rule for other in rules)]

    def settings(self, node: Node) -> tuple[QuantConfig, str]:
        """The settings of `node`, and the rule that had the last word (``default`` where none spoke)."""
        config = self.default
        for rule in self._matches[node.name]:
            config = config.override(rule.changes)
        rules = self._matches[node.name]
        return config, str(rules[-1]) if rules else "default"


def _paths(node: Node) -> list[str]:
    """The node's own name, its cell and every cell around it."""
    parts = node.cell_path.split(".") if node.cell_path else []
    return [node.name] + [".".join(parts[: i + 1]) for i in range(len(parts))]


def _fits(pattern: str, path: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], path) is not None
        except re.error as error:
            raise PlanError(f"rule path '{pattern}' is not a regular expression: {error}") from error
    return fnmatch.fnmatchcase(path, pattern)


def _no_match(graph: Graph, rule: Rule) -> str:
    if rule.kind == "path":
        options = sorted({path for node in graph.nodes for path in _paths(node)})
    elif rule.kind == "type":
        options = sorted({kind for node in graph.nodes for kind in node.cell_types})
    elif rule.kind == "op":
        options = sorted({node.op for node in graph.nodes})
    else:
        options = ["first", "last"]
    close = near_misses(rule.pattern, options, limit=5) or options[:5]
    return f"rule '{rule}' matches nothing in {graph.name}; near misses: {', '.join(close)}"
