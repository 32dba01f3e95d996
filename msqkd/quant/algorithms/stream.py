"""The values of a network on calibration samples, computed piece by piece: what methods that go from layer to layer
read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any, Callable, Optional, Union

import mindspore as ms
import numpy as np

from msqkd.errors import DataError
from msqkd.graph.cell import Hooks, to_cell
from msqkd.graph.ir import Graph, Node
from msqkd.graph.passes.padded_pools import NON_NEGATIVE
from msqkd.quant.fake_quant import QUANTIZE, FakeQuantActivation, FakeQuantDynamic, FakeQuantWeight
from msqkd.quant.half import with_half
from msqkd.quant.plan import QuantPlan

Batch = tuple[np.ndarray, ...]

MEMORY = 2**30
"""The bytes that the values held of one network at a time may take."""


def samples_that_fit(graph: Graph, samples: Callable[[], Iterator[Batch]], memory: int = MEMORY) -> list[Batch]:
    """The first calibration batches: as many samples as a `Stream` of `graph` holds in `memory` bytes.

    Raises:
        DataError: there are none.
    """
    most = max(memory // _bytes_of_sample(graph), 1)
    held: list[Batch] = []
    count = 0
    for batch in samples():
        rows = min(len(batch[0]), most - count)
        held.append(tuple(array[:rows] for array in batch))
        count += rows
        if count == most:
            break
    if not count:
        raise DataError("the calibration set has 0 samples; give at least one batch")
    return held


def _bytes_of_sample(graph: Graph) -> int:
    """What the values that are needed at a time take for one sample, at most."""

    def size(name: str) -> int:
        return 4 * prod(abs(n) for n in graph.shape(name))

    last = {name: index for index, node in enumerate(graph.nodes) for name in graph.tensor_inputs(node)}
    held = sum(size(name) for name in graph.inputs)
    most = held
    for index, node in enumerate(graph.nodes):
        held += sum(size(name) for name in node.outputs)
        most = max(most, held)
        held -= sum(size(name) for name in set(graph.tensor_inputs(node)) if last[name] == index)
        held -= sum(size(name) for name in node.outputs if name not in last)
    return max(most, 1)


def piece_of(graph: Graph, nodes: Sequence[Node], outputs: Sequence[str]) -> Graph:
    """`nodes`, in execution order, as a graph of their own: its inputs are the values they read from elsewhere."""
    piece = Graph(graph.name)
    made = {output for node in nodes for output in node.outputs}
    for node in nodes:
        for name in (*node.inputs, *node.outputs):
            value = graph.values[name]
            if value.kind == "param":
                piece.params[name] = replace(graph.params[name])
            elif name not in made and value.kind in ("node", "input"):
                value = replace(value, kind="input")
                if name not in piece.inputs:
                    piece.inputs.append(name)
            piece.add_value(value)
        piece.nodes.append(replace(node, inputs=list(node.inputs), outputs=list(node.outputs)))
    piece.outputs = list(outputs)
    return piece


def activation_cell(graph: Graph, plan: QuantPlan, value: str) -> FakeQuantActivation:
    """What quantises a value as the plan says; its range is known."""
    node = graph.producer(value)
    group = plan.group_of(value)
    cell = FakeQuantActivation(group, non_negative=node is not None and node.op in NON_NEGATIVE)
    cell.set_qparams(group.qparams())
    cell.phase_of_quant = QUANTIZE
    return cell


def quantized_places(graph: Graph, plan: QuantPlan, piece: Graph) -> dict[Union[str, tuple[str, int]], str]:
    """Where a piece of `graph` quantises by fixed ranges, and which value: names of values that it computes, and of its
    inputs those that are quantised for some readers alone, as (node, input). In execution order."""
    edges = {place: value for value, quant in plan.activations.items() if not quant.exact for place in quant.edges}
    places: dict[Union[str, tuple[str, int]], str] = {}
    for node in piece.nodes:
        for index in range(len(node.inputs)):
            if (node.name, index) in edges:
                places[node.name, index] = edges[node.name, index]
        for output in node.outputs:
            quant = plan.activations.get(output)
            if quant is not None and not quant.exact and not quant.edges:
                places[output] = output
    return places


def dynamic_cell(plan: QuantPlan, name: str) -> FakeQuantDynamic:
    """What quantises the first input of a dynamic node at each call."""
    cell = FakeQuantDynamic(plan.dynamic[name])
    cell.phase_of_quant = QUANTIZE
    return cell


class Stream:
    """The values of a float or quantised network on a list of batches.

    Values are computed when they are asked for, with the parameters and the plan as they are then, and held as long as
    something is to be computed from them: a pass from layer to layer costs as much as one run of the network.

    Args:
        graph: the network; its parameters may change while it goes on.
        batches: what it is fed with.
        plan: how it is quantised; may be replaced while it goes on. None computes in float.

    Attributes:
        wanted: names of values to hold even where nothing is left to compute from them.
    """

    def __init__(self, graph: Graph, batches: Iterable[Batch], plan: Optional[QuantPlan] = None) -> None:
        self.graph, self.plan = graph, plan
        self.wanted: set[str] = set()
        self.left = list(graph.nodes)
        self.held: list[dict[str, Any]] = [dict(zip(graph.inputs, batch)) for batch in batches]
        self.samples = sum(len(values[graph.inputs[0]]) for values in self.held)
        for name in graph.inputs:
            quant = plan.activations.get(name) if plan is not None else None
            if plan is not None and quant is not None and not quant.exact and not quant.edges:
                qparams = plan.group_of(name).qparams()
                for values in self.held:
                    values[name] = qparams.fake_quantize(values[name])

    def values(self, name: str) -> list[Any]:
        """A value, batch by batch, as later layers get it: arrays, or what it is where it is no tensor."""
        self.compute([name])
        return [values[name] for values in self.held]

    def arriving(self, node: Node, index: int) -> list[Any]:
        """Input `index` of a node, batch by batch, as its kernel gets it: quantised where it is at this place alone."""
        values = self.values(node.inputs[index])
        plan = self.plan
        if plan is None:
            return values
        if index == 0 and node.name in plan.dynamic:
            cell = dynamic_cell(plan, node.name)
            return [cell(ms.Tensor(value)).asnumpy() for value in values]
        quant = plan.activations.get(node.inputs[index])
        if quant is None or quant.exact or (node.name, index) not in quant.edges:
            return values
        qparams = plan.groups[quant.group].qparams()
        return [qparams.fake_quantize(value) for value in values]

    def compute(self, names: Sequence[str]) -> None:
        """Compute what of the named values, and of what they come from, is not held yet."""
        asked, run = set(names), []
        for node in reversed(self.left):
            if asked.intersection(node.outputs):
                asked.update(node.inputs)
                run.append(node)
        if run:
            self._run(run[::-1], set(names))

    def _run(self, nodes: list[Node], asked: set[str]) -> None:
        done = {node.name for node in nodes}
        self.left = [node for node in self.left if node.name not in done]
        needed = asked | self.wanted | {name for node in self.left for name in node.inputs}
        outputs = [name for node in nodes for name in node.outputs if name in needed]
        piece = piece_of(self.graph, nodes, outputs)
        cell = to_cell(piece, self._hooks(piece), shared=True)
        for values in self.held:
            found = cell(*(_fed(values[name]) for name in piece.inputs))
            found = found if isinstance(found, tuple) and len(outputs) != 1 else (found,)
            for name in [name for name in values if name not in needed]:
                del values[name]
            values.update((name, _array(value)) for name, value in zip(outputs, found))

    def _hooks(self, piece: Graph) -> Hooks:
        plan = self.plan
        if plan is None:
            return Hooks()
        names = [node.name for node in piece.nodes]
        places = quantized_places(self.graph, plan, piece)
        cells = {place: activation_cell(self.graph, plan, value) for place, value in places.items()}
        edges: dict[tuple[str, int], Any] = {place: cell for place, cell in cells.items() if isinstance(place, tuple)}
        edges.update({(name, 0): dynamic_cell(plan, name) for name in names if name in plan.dynamic})
        weights = {name: plan.weights[name] for name in names if name in plan.weights}
        for name, quant in replace(plan, weights=weights).with_weight_observers(self.graph).weights.items():
            shape = self.graph.shape(self.graph.node(name).inputs[quant.index])
            edges[name, quant.index] = FakeQuantWeight(quant, shape)
        hooks = Hooks({place: cell for place, cell in cells.items() if isinstance(place, str)}, edges)
        return with_half(hooks, piece, plan)


def _fed(value: Any) -> Any:
    return ms.Tensor(value) if isinstance(value, np.ndarray) else value


def _array(value: Any) -> Any:
    return value.asnumpy() if isinstance(value, ms.Tensor) else value


def why_not_alone(graph: Graph, node: Node, index: int) -> Optional[str]:
    """Why the weight of a node is not changed by itself, as a clause; None where it can be."""
    if node.op in ("Gather", "Reshape"):
        return "its result is the weight itself, to which the nearest rounding is the best one"
    if len(graph.consumers(node.inputs[index])) > 1:
        return "another layer has the same weight"
    if index != 1 or node.inputs[0] not in graph.tensor_inputs(node):
        return "it has no input beside its weight"
    return None
