"""Reshapes that undo each other."""

from __future__ import annotations

from dataclasses import replace

from msqkd.graph.ir import Graph, Node

_RESHAPES = ("Reshape", "Squeeze", "ExpandDims")


def merge_reshapes(graph: Graph) -> None:
    """Drop a reshape that gives the shape an earlier one had started from, in place.

    BatchNorm sees channels and no plane: it moves in front of a reshape that keeps (batch, channels).
    """
    producers = {output: node for node in graph.nodes for output in node.outputs}
    for node in graph.nodes:
        if node.op == "BatchNorm":
            _normalise_earlier(graph, node, producers)
        if node.op not in _RESHAPES or not _is_known(graph, node.output):
            continue
        source = producers.get(node.inputs[0])
        while source is not None and source.op in _RESHAPES:
            origin = source.inputs[0]
            if graph.shape(origin) == graph.shape(node.output):
                _skip(graph, node, origin)
                break
            source = producers.get(origin)
    graph.prune()


def _is_known(graph: Graph, value: str) -> bool:
    kind = graph.values[value].type
    return kind is not None and kind.shape != () and -1 not in kind.shape[1:]


def _skip(graph: Graph, node: Node, origin: str) -> None:
    """Let the readers of `node` read `origin`; an output of the graph keeps its name, and so its node."""
    graph.replace_value(node.output, origin, outputs=False)


def _normalise_earlier(graph: Graph, norm: Node, producers: dict[str, Node]) -> None:
    shape = graph.shape(norm.inputs[0])
    source, origin = producers.get(norm.inputs[0]), None
    while source is not None and source.op in _RESHAPES and _is_known(graph, source.inputs[0]):
        candidate = graph.shape(source.inputs[0])
        if len(candidate) == len(shape) == 4 and candidate[:2] == shape[:2]:
            origin = source.inputs[0]
        source = producers.get(source.inputs[0])
    readers = graph.consumers(norm.output)
    alone = norm.output not in graph.outputs and all(reader.op == "Reshape" for reader in readers)
    if origin is None or not alone:
        return
    norm.inputs[0] = origin
    kind = graph.values[norm.output].type
    if kind is not None:
        moved = replace(kind, shape=graph.shape(origin))
        graph.values[norm.output] = replace(graph.values[norm.output], type=moved)
