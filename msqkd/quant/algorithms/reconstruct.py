"""Roundings and step sizes, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Optional

from msqkd.graph.ir import Graph, Node
from msqkd.graph.passes.padded_pools import NON_NEGATIVE
from msqkd.quant.algorithms.adaround import layer_part
from msqkd.quant.algorithms.base import Work
from msqkd.quant.algorithms.rounding import Part, TrainedRounding, part_of, reconstruct, roundable
from msqkd.quant.plan import QuantPlan


@dataclass
class Reconstruct(TrainedRounding):
    """Roundings of all weights of a block are trained together, with the scales of its activations, for what the block
    gives.

    BRECQ (Li et al. 2021, arXiv:2102.05426): a residual block, from where its branches part to the sum they meet in and
    the activation function behind it, is to give what it gives in float. Layers outside a block are blocks of their
    own. In training a share of the activations, drawn anew for each value at each step, is not quantised, and as many
    of the block's inputs are those of the float network (QDrop, Wei et al. 2022, arXiv:2203.05740).

    The scales trained are those of activations whose values are all computed in one block, starting from the observed
    ranges, with the gradient of LSQ (`msqkd.quant.learned`); the others stay.

    Attributes: as of `msqkd.quant.algorithms.rounding.TrainedRounding`, for each block, and
        drop: the share that is not quantised; 0 to below 1.
    """

    drop: float = 0.5

    name: ClassVar[str] = "reconstruct"

    @property
    def dropped(self) -> float:
        """See `drop`."""
        return self.drop

    def apply(self, work: Work) -> list[str]:
        """Set the weights of layers to scale · integer (float32), and scales and ranges in the plan."""
        layers, told = roundable(work)
        parts = blocks(work.graph, work.plan, layers)
        return reconstruct(work, parts, self, whole=True) + told


def blocks(graph: Graph, plan: QuantPlan, layers: list[str]) -> list[Part]:
    """The residual blocks that hold layers, and the other layers each by itself, in execution order.

    Of blocks one of which holds a part of another, the smaller one is taken.
    """
    order = {node.name: index for index, node in enumerate(graph.nodes)}
    network = _Flow(graph)
    found = sorted(network.residual_blocks(plan), key=lambda nodes: (len(nodes), order[nodes[0].name]))
    taken: set[str] = set()
    parts: list[Part] = []
    for nodes in found:
        own = [node.name for node in nodes]
        inside = [name for name in own if name in layers]
        if inside and not taken.intersection(own):
            taken.update(own)
            parts.append(part_of(graph, _name(nodes, inside), nodes, inside))
    parts += [layer_part(graph, plan, name) for name in layers if name not in taken]
    return sorted(parts, key=lambda part: order[part.layers[0]])


def _name(nodes: list[Node], layers: list[str]) -> str:
    """The path of the cell that all layers of a block are in; the first and the last of them where that is the root."""
    paths = [node.name.split(".") for node in nodes if node.name in layers]
    common = []
    for steps in zip(*paths):
        if len(set(steps)) > 1:
            break
        common.append(steps[0])
    return ".".join(common) or (f"{layers[0]} … {layers[-1]}" if len(layers) > 1 else layers[0])


class _Flow:
    """Where what a node reads comes from: which node lies on every way from the network's inputs to it."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.producers = {output: node for node in graph.nodes for output in node.outputs}
        # The last node, or input of the network, through which all that a node computes from has gone; "" for none.
        self.dominator: dict[str, str] = dict.fromkeys(graph.inputs, "")
        self.depth: dict[str, int] = {"": 0, **dict.fromkeys(graph.inputs, 1)}
        for node in graph.nodes:  # one whose inputs do not come from the network's has no entry
            sources = [source for source in self._sources(node) if source in self.dominator]
            if sources:
                common = sources[0]
                for source in sources[1:]:
                    common = self._meeting(common, source)
                self.dominator[node.name] = common
                self.depth[node.name] = self.depth[common] + 1

    def _sources(self, node: Node) -> Iterator[str]:
        for name in self.graph.tensor_inputs(node):
            yield self.producers[name].name if name in self.producers else name

    def _meeting(self, one: str, other: str) -> str:
        while one != other:
            if self.depth[one] < self.depth[other]:
                one, other = other, one
            one = self.dominator[one]
        return one

    def residual_blocks(self, plan: QuantPlan) -> Iterator[list[Node]]:
        """The nodes of every residual block, in execution order."""
        fused = {found.name: found.fused_into for found in plan.nodes}
        for node in self.graph.nodes:
            split = self.dominator.get(node.name, "")
            if node.op != "Add" or len(set(self.graph.tensor_inputs(node))) < 2 or not split:
                continue
            inside = {node.name, *self._between(split, node)}
            tail = self._only_reader(node)
            if tail is not None and (fused.get(tail.name) == node.name or tail.op in NON_NEGATIVE):
                inside.add(tail.name)
            yield [found for found in self.graph.nodes if found.name in inside]

    def _between(self, split: str, node: Node) -> Iterator[str]:
        """Everything `node` is computed from, back to `split`."""
        seen, left = {split}, list(self._sources(node))
        while left:
            name = left.pop()
            if name in seen:
                continue
            seen.add(name)
            yield name
            left += self._sources(self.graph.node(name))

    def _only_reader(self, node: Node) -> Optional[Node]:
        readers = self.graph.consumers(node.output)
        return readers[0] if len(readers) == 1 and node.output not in self.graph.outputs else None
