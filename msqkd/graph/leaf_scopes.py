"""Cells without parameters get back what they compute.

The compiler parses the code of equal cells once: all GELU cells of a network may be the first one for it. Layers with
parameters do know their place, and an operation lies where the layers around it do.
"""

from __future__ import annotations

from typing import Optional

from msqkd.graph.ir import Graph, Node


def repair_leaves(graph: Graph, types: dict[str, str], containers: set[str]) -> None:
    """Move what a cell seems to compute again and again to the cells of its class that seem to compute nothing.

    Args:
        graph: a graph whose nodes have the paths the compiler wrote.
        types: cell path to class name, in the order in which the cells were made.
        containers: the paths of cells with cells inside.
    """
    leaves = [path for path in types if path not in containers]
    busy = {node.cell_path for node in graph.nodes}
    layers = {node.cell_path for node in graph.nodes if graph.param_inputs(node)}
    idle: dict[str, list[str]] = {}
    for path in leaves:
        if path not in busy:
            idle.setdefault(types[path], []).append(path)
    shared = {path for path in leaves if path in busy and path not in layers and types[path] in idle}
    if shared:
        _Leaves(graph, types, leaves, idle, shared).run()


class _Leaves:
    def __init__(
        self, graph: Graph, types: dict[str, str], leaves: list[str], idle: dict[str, list[str]], shared: set[str]
    ) -> None:
        self.graph, self.types, self.idle, self.shared = graph, types, idle, shared
        self.rank = {path: index for index, path in enumerate(leaves)}
        self.place = {id(node): index for index, node in enumerate(graph.nodes)}
        self.producers = {output: node for node in graph.nodes for output in node.outputs}
        self.readers: dict[str, list[Node]] = {}
        for node in graph.nodes:
            for name in node.inputs:
                self.readers.setdefault(name, []).append(node)
        self.recorded = {id(node): node.cell_path for node in graph.nodes if node.cell_path in shared}

    def run(self) -> None:
        settled: dict[int, str] = {}
        arguments: dict[int, frozenset[str]] = {}  # what the call of a cell reads that an operation belongs to
        opening: dict[str, bool] = {}
        for node in self.graph.nodes:
            recorded = self.recorded.get(id(node))
            if recorded is None:
                continue
            before = next((s for s in self._sources(node) if self.recorded.get(id(s)) == recorded), None)
            outside = frozenset(
                name for name in self.graph.tensor_inputs(node) if id(self.producers.get(name)) not in self.recorded
            )
            if before is not None and outside <= arguments[id(before)]:
                settled[id(node)], arguments[id(node)] = settled[id(before)], arguments[id(before)]
                continue
            forward = opening.setdefault(recorded, self._opens_its_block(node, recorded))
            settled[id(node)] = self._choose(recorded, self._anchor(node, settled, forward), forward)
            arguments[id(node)] = frozenset(self.graph.tensor_inputs(node))
        for node in self.graph.nodes:
            path = settled.get(id(node), node.cell_path)
            if path != node.cell_path:
                node.cell_path, node.cell_types = path, (node.cell_types[0], *self._classes(path))

    def _sources(self, node: Node) -> list[Node]:
        found = [self.producers[name] for name in node.inputs if name in self.producers]
        return sorted(found, key=lambda source: -self.place[id(source)])

    def _opens_its_block(self, node: Node, path: str) -> bool:
        """Whether `node`, which is where the compiler says, comes before the first layer beside it."""
        block = path.rpartition(".")[0] + "."
        beside = (n for n in self.graph.nodes if id(n) not in self.recorded and n.cell_path.startswith(block))
        first = next(beside, None)
        return block != "." and first is not None and self.place[id(node)] < self.place[id(first)]

    def _anchor(self, node: Node, settled: dict[int, str], forward: bool) -> Optional[str]:
        """The path of the nearest cell before or behind `node` whose place is known."""
        found: Optional[Node] = node
        while found is not None:
            if forward:
                readers = (reader for output in found.outputs for reader in self.readers.get(output, ()))
                found = min(readers, key=lambda n: self.place[id(n)], default=None)
            else:
                found = next(iter(self._sources(found)), None)
            if found is not None and id(found) in settled:
                return settled[id(found)]
            if found is not None and id(found) not in self.recorded and found.cell_path in self.rank:
                return found.cell_path
        return None

    def _choose(self, recorded: str, anchor: Optional[str], forward: bool) -> str:
        """The cell of the recorded one's class that lies nearest to `anchor`."""
        if anchor is None:
            return recorded
        near = anchor.split(".")

        def common(path: str) -> int:
            parent = path.split(".")[:-1]
            return next((i for i, (a, b) in enumerate(zip(parent, near)) if a != b), min(len(parent), len(near)))

        candidates = [recorded, *self.idle[self.types[recorded]]]
        depth = max(map(common, candidates))
        nearest = sorted((path for path in candidates if common(path) == depth), key=self.rank.__getitem__)
        if forward:
            return next((path for path in reversed(nearest) if self.rank[path] < self.rank[anchor]), nearest[-1])
        return next(
            (path for path in nearest if self.rank[path] > self.rank[anchor]),
            recorded if recorded in nearest else nearest[0],
        )

    def _classes(self, path: str) -> tuple[str, ...]:
        parts = path.split(".")
        prefixes = (".".join(parts[: i + 1]) for i in range(len(parts)))
        return tuple(self.types[prefix] for prefix in prefixes if prefix in self.types)
