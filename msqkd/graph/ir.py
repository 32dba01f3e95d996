"""Graph, Node and Value: the one description of a network every other part of msqkd reads.

The graph knows nothing of quantisation and nothing of MindSpore: parameters and constants are numpy arrays and Python
values, operators are named as MindSpore names its primitives (``Conv2D``, ``MatMul``, ``Add`` ...).
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Optional, Union

import numpy as np


@dataclass(frozen=True)
class TensorType:
    """Shape and dtype of a tensor; an unknown dimension (the batch) is -1, the dtype is a numpy name."""

    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class Value:
    """A named edge of the graph.

    `kind` is ``input`` (fed by the caller), ``param`` (a Parameter, by its name), ``const`` (a literal) or ``node``
    (computed).
    """

    name: str
    kind: str
    type: Optional[TensorType] = None
    const: Any = None


@dataclass(eq=False)  # two nodes are never the same one
class Node:
    """One operation.

    Attributes:
        name: unique and readable: the cell path where the cell holds one operation, else the path and the operation.
        op: the primitive's name.
        inputs: names of the values read, in the primitive's order (tensors first, then literal arguments).
        outputs: names of the values computed.
        attrs: primitive attributes, as recorded.
        cell_path: path of the cell the operation belongs to (``layer1.0.conv1``); empty for the root.
        cell_types: class names from the root to that cell.
        functional: whether the primitive takes its attributes as arguments (True) or as attributes (False).
        sequences: (start, length) of the runs of `inputs` that are one argument together, as the tensors of ``Concat``.
        unpack: whether the operation gives a tuple (of one output or more).
        body: for an operation found in a network that spells it out: what was written, as a graph of one input. It is
            what the built cell computes, so that not a bit changes. Passes take it as it is and never change it.
    """

    name: str
    op: str
    inputs: list[str]
    outputs: list[str]
    attrs: dict[str, Any] = field(default_factory=dict)
    cell_path: str = ""
    cell_types: tuple[str, ...] = ()
    functional: bool = True
    sequences: tuple[tuple[int, int], ...] = ()
    unpack: bool = False
    body: Optional[Graph] = None

    @property
    def output(self) -> str:
        """The first (usually the only) output."""
        return self.outputs[0]

    def arguments(self) -> list[Union[int, tuple[int, ...]]]:
        """What the primitive is called with: positions in `inputs`, a tuple of them where an argument is a sequence."""
        runs = dict(self.sequences)
        found: list[Union[int, tuple[int, ...]]] = []
        position = 0
        while position < len(self.inputs) or position in runs:
            length = runs.pop(position, None)
            found.append(position if length is None else tuple(range(position, position + length)))
            position += 1 if length is None else length
        return found


@dataclass
class Parameter:
    """A weight: its array and whether training may change it."""

    data: np.ndarray
    trainable: bool = True


class Graph:
    """A network as a list of nodes in execution order.

    Attributes:
        name: class name of the captured network.
        inputs: names of the input values, in the order of the network's arguments.
        outputs: names of the output values.
        nodes: the operations, each after its producers.
        values: every value by name.
        params: every parameter by its original name.
        deployed: numbers of the outputs that are deployed, where others are trained only; None deploys all.
        settled: True if this is the deployment form: a plan may name its nodes, so that it is rewritten no further.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.inputs: list[str] = []
        self.outputs: list[str] = []
        self.nodes: list[Node] = []
        self.values: dict[str, Value] = {}
        self.params: dict[str, Parameter] = {}
        self.deployed: Optional[tuple[int, ...]] = None
        self.settled = False

    # -- building -------------------------------------------------------------------------------------------------
    def add_value(self, value: Value) -> str:
        """Register `value` and return its name."""
        self.values[value.name] = value
        return value.name

    def add_const(self, const: Any, hint: str = "const") -> str:
        """Register a literal (a number, tuple, string or numpy array) and return its name."""
        name = self.unique_value(hint)
        kind = TensorType(const.shape, str(const.dtype)) if isinstance(const, np.ndarray) else None
        return self.add_value(Value(name, "const", kind, const))

    def add_param(self, name: str, data: np.ndarray, trainable: bool = True) -> str:
        """Register a parameter under its name and return the name of its value."""
        self.params[name] = Parameter(data, trainable)
        return self.add_value(Value(name, "param", TensorType(data.shape, str(data.dtype))))

    def unique_value(self, hint: str) -> str:
        """A value name not in use, built from `hint`."""
        return unique_name(hint, self.values)

    def unique_node(self, hint: str) -> str:
        """A node name not in use, built from `hint`."""
        return unique_name(hint, {node.name for node in self.nodes})

    def insert_after(self, anchor: Optional[Node], nodes: Iterable[Node]) -> None:
        """Insert `nodes` behind `anchor` (at the front when it is None), keeping their order."""
        at = 0 if anchor is None else self.nodes.index(anchor) + 1
        self.nodes[at:at] = list(nodes)

    def replace_value(self, old: str, new: str, *, outputs: bool = True) -> None:
        """Let every reader of value `old` read `new` instead, and the graph's outputs too unless `outputs` is False."""
        for node in self.nodes:
            node.inputs = [new if name == old else name for name in node.inputs]
        if outputs:
            self.outputs = [new if name == old else name for name in self.outputs]

    # -- reading --------------------------------------------------------------------------------------------------
    def producer(self, value: str) -> Optional[Node]:
        """The node that computes `value`, or None for inputs, parameters and literals."""
        return next((node for node in self.nodes if value in node.outputs), None)

    def consumers(self, value: str) -> list[Node]:
        """The nodes that read `value`, in execution order."""
        return [node for node in self.nodes if value in node.inputs]

    def node(self, name: str) -> Node:
        """The node called `name`.

        Raises:
            KeyError: there is none.
        """
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    def const(self, value: str) -> Any:
        """The literal behind a value name."""
        return self.values[value].const

    def shape(self, value: str) -> tuple[int, ...]:
        """The shape of a value (-1 where the batch is unknown); ``()`` for literals that are not tensors."""
        kind = self.values[value].type
        return kind.shape if kind is not None else ()

    def tensor_inputs(self, node: Node) -> list[str]:
        """The inputs of `node` that are activations: computed values and graph inputs, no parameters, no literals."""
        return [name for name in node.inputs if self.values[name].kind in ("node", "input")]

    def param_inputs(self, node: Node) -> list[str]:
        """The inputs of `node` that are parameters."""
        return [name for name in node.inputs if self.values[name].kind == "param"]

    def activations(self) -> Iterator[Value]:
        """The graph's inputs and every computed value, in execution order."""
        for name in self.inputs:
            yield self.values[name]
        for node in self.nodes:
            for output in node.outputs:
                yield self.values[output]

    # -- upkeep ---------------------------------------------------------------------------------------------------
    def copy(self) -> Graph:
        """An independent copy: passes may change it freely (the arrays of parameters are shared until replaced)."""
        twin = Graph(self.name)
        twin.inputs, twin.outputs = list(self.inputs), list(self.outputs)
        twin.nodes = [
            replace(node, inputs=list(node.inputs), outputs=list(node.outputs), attrs=dict(node.attrs))
            for node in self.nodes
        ]
        twin.values = dict(self.values)
        twin.params = {name: replace(param) for name, param in self.params.items()}
        twin.deployed, twin.settled = self.deployed, self.settled
        return twin

    def body_of(self, name: str, run: Sequence[Node], argument: str) -> Graph:
        """The nodes `run` as a graph, in order: from the value `argument`, its input, to the output of the last."""
        body = Graph(name)
        body.inputs = [body.add_value(Value(argument, "input", self.values[argument].type))]
        body.outputs = [run[-1].output]
        for node in run:
            for value in (*node.inputs, *node.outputs):
                if value != argument:
                    body.add_value(self.values[value])
            body.nodes.append(replace(node, inputs=list(node.inputs), outputs=list(node.outputs)))
        return body

    def deployed_part(self) -> Graph:
        """What computes the deployed outputs, as a graph of their own; the graph itself where all are deployed."""
        if self.deployed is None:
            return self
        part = self.copy()
        part.outputs, part.deployed = [self.outputs[index] for index in self.deployed], None
        part.prune()
        return part

    def training_only(self) -> list[Node]:
        """The nodes that no deployed output needs."""
        kept = {node.name for node in self.deployed_part().nodes}
        return [node for node in self.nodes if node.name not in kept]

    def prune(self) -> None:
        """Drop nodes whose outputs nobody reads, and the values and parameters nobody reads any more."""
        needed = set(self.outputs)
        kept: list[Node] = []
        for node in reversed(self.nodes):
            if needed.intersection(node.outputs):
                kept.append(node)
                needed.update(node.inputs)
        self.nodes = kept[::-1]
        live = needed.union(self.inputs, *(node.outputs for node in self.nodes))
        self.values = {name: value for name, value in self.values.items() if name in live}
        self.params = {name: param for name, param in self.params.items() if name in live}

    def check(self) -> None:
        """Raise AssertionError when the graph is not well-formed (a pass went wrong)."""
        known = set(self.inputs) | {v.name for v in self.values.values() if v.kind in ("param", "const")}
        names: set[str] = set()
        for node in self.nodes:
            missing = [name for name in node.inputs if name not in known]
            assert not missing, f"{node.name} reads {missing} before they are computed"
            assert node.name not in names, f"two nodes are called {node.name}"
            names.add(node.name)
            known.update(node.outputs)
        assert set(self.outputs) <= known, "an output is never computed"


def identifier_of(text: str) -> str:
    """`text` as a Python identifier of ASCII letters, which MindSpore allows in the names of cells and parameters.

    Different texts may give the same one: take `unique_name` of the result.
    """
    name = re.sub(r"\W", "_", text, flags=re.ASCII)
    # Inside a class, Python renames what begins with two underscores.
    plain = name and not name[0].isdigit() and not keyword.iskeyword(name) and not name.startswith("__")
    return name if plain else f"v_{name}"


def unique_name(hint: str, taken: Container[str]) -> str:
    """`hint`, or `hint` with the first number that makes it a name not in `taken`."""
    if hint not in taken:
        return hint
    number = 1
    while f"{hint}_{number}" in taken:
        number += 1
    return f"{hint}_{number}"
