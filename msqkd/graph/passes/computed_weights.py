"""Weights that a network computes from parameters alone (standardised, normalised, masked) as parameters.

Networks with weight standardisation (Qiao et al., arXiv:1903.10520) or weight normalisation compute the kernel of a
convolution at every call. While it is trained that stays so; what is deployed multiplies with the result.
"""

from __future__ import annotations

from msqkd.graph.ir import Graph, Node
from msqkd.graph.islands import cut, run_island

_LAYERS = ("Conv2D", "Dense", "Conv2DTranspose")
_RANDOM = ("Dropout", "DropoutExt", "RandomUniform", "UniformReal", "StandardNormal")


def computed_from_constants(graph: Graph) -> list[Node]:
    """The nodes that depend on nothing but parameters and literals, in order of execution."""
    known: set[str] = set()
    found = []
    for node in graph.nodes:
        fixed = all(graph.values[name].kind in ("param", "const") or name in known for name in node.inputs)
        if fixed and node.op not in _RANDOM:
            found.append(node)
            known.update(node.outputs)
    return found


def replace_constants(graph: Graph, nodes: list[Node]) -> None:
    """Replace nodes that read parameters and literals alone by parameters, in place."""
    island = cut(graph, nodes)
    for name, array in zip(island.outputs, run_island(island, [])):
        graph.add_param(name, array, trainable=False)
    gone = {node.name for node in nodes}
    graph.nodes = [node for node in graph.nodes if node.name not in gone]


def settle_weights(graph: Graph) -> Graph:
    """A graph in which weights and biases of layers that are computed from parameters alone are parameters.

    They are named ``<layer>.weight`` and ``<layer>.bias``. `graph` itself is returned where there is nothing to do, and
    never changed.
    """
    constants = computed_from_constants(graph)
    known = {output for node in constants for output in node.outputs}
    places = [
        (node.name, index)
        for node in graph.nodes
        if node.op in _LAYERS and node not in constants
        for index in (1, 2)
        if index < len(node.inputs) and node.inputs[index] in known
    ]
    if not places:
        return graph
    result = graph.copy()
    island = cut(result, constants)
    wanted = {result.node(name).inputs[index] for name, index in places}
    island.outputs = [output for output in island.outputs if output in wanted]
    island.prune()
    arrays = dict(zip(island.outputs, run_island(island, [])))
    for name, index in places:
        node = result.node(name)
        part = result.unique_value(f"{name}.{('weight', 'bias')[index - 1]}")
        node.inputs[index] = result.add_param(part, arrays[node.inputs[index]])
    result.prune()
    result.check()
    return result
