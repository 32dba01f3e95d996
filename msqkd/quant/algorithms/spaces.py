"""Channels that layers write and layers read, and what lies between them: where what is written and what is read can be
changed together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Callable, Generic, Optional, TypeVar

from msqkd.graph.ir import Graph, Node
from msqkd.quant import uses
from msqkd.quant.algorithms.biases import layers, own
from msqkd.quant.algorithms.channels import Channels, layer_input, layer_output, moved

POOLS = ("MaxPool", "AvgPool", "AdaptiveAvgPool2D")
RESIZES = (
    "ResizeNearestNeighbor", "ResizeNearestNeighborV2", "ResizeBilinear", "ResizeBilinearV2", "UpsampleBilinear2D",
)  # fmt: skip
PADS = ("Pad", "PadV3")


@dataclass(frozen=True)
class End:
    """A layer that writes or reads channels, and where they are in its output or input."""

    node: Node
    channels: Channels


@dataclass(eq=False)
class Space:
    """Channels of the values between layers that write and layers that read them.

    Attributes:
        count: of channels.
        writers, readers: the layers.
        closed: what else reads or writes them, as a clause; empty where nothing does.
        added: they are sums.
        merged_into: the space that it became part of.
    """

    count: int
    writers: list[End] = field(default_factory=list)
    readers: list[End] = field(default_factory=list)
    closed: str = ""
    added: bool = False
    merged_into: Optional[Space] = None

    @property
    def ends(self) -> list[End]:
        """The layers on both sides."""
        return [*self.writers, *self.readers]

    def merge(self, other: Space) -> None:
        """Make the channels of `other`, which are added to these, the same."""
        self.writers += other.writers
        self.readers += other.readers
        self.closed = self.closed or other.closed
        other.merged_into = self


S = TypeVar("S", bound=Space)


class Survey(ABC, Generic[S]):
    """The spaces of a graph, found on the way through its operations.

    Args:
        graph: the graph; every layer (Conv2D of any grouping, Dense) with parameters of its own is an end.
        make: makes a space of so many channels.

    Attributes:
        layers: names of the nodes that are ends.
        places: by value, the space whose channels it carries, and where they are (see `place`).
    """

    def __init__(self, graph: Graph, make: Callable[[int], S]) -> None:
        self.graph, self._make = graph, make
        self.layers = {
            node.name for node in layers(graph) if all(own(graph, parameter) for parameter in node.inputs[1:])
        }
        self.found: list[S] = []
        self.places: dict[str, tuple[S, Channels]] = {}

    @abstractmethod
    def through(self, node: Node, space: S, channels: Channels) -> Optional[Channels]:
        """The channels behind an operation of one tensor that reads them; None where they do not pass it."""

    def survey(self) -> list[S]:
        """Every space, closed ones too, in execution order of their first writers."""
        for node in self.graph.nodes:
            self._visit(node)
        for name in self.graph.outputs:
            self._close(name, "they are an output of the network")
        return [space for space in self.found if space.merged_into is None]

    def place(self, value: str) -> Optional[tuple[S, Channels]]:
        """The space whose channels a value carries, and where."""
        found = self.places.get(value)
        return None if found is None else (_final(found[0]), found[1])

    def _visit(self, node: Node) -> None:
        if node.name in self.layers:
            self._layer(node)
            return
        if node.op in ("Add", "Sub") and self._added(node):
            return
        tensors = self.graph.tensor_inputs(node)
        place = self.place(tensors[0]) if len(tensors) == len(node.outputs) == 1 else None
        channels = self.through(node, *place) if place is not None else None
        if place is not None and channels is not None:
            self.places[node.output] = (place[0], channels)
            return
        for name in tensors:
            self._close(name, _obstacle(node))

    def _layer(self, node: Node) -> None:
        place = self.place(node.inputs[0])
        if place is not None:
            space, channels = place
            if channels.axis == layer_input(self.graph, node):
                space.readers.append(End(node, channels))
            else:
                self._close(node.inputs[0], f"{node.name} reads them along another axis")
        channels = layer_output(self.graph, node)
        space = self._make(channels.count)
        space.writers.append(End(node, channels))
        self.found.append(space)
        self.places[node.output] = (space, channels)

    def _added(self, node: Node) -> bool:
        """Whether `node` joins two spaces to one."""
        one, other = (self.place(name) for name in node.inputs[:2])
        same = len({self.graph.shape(name) for name in node.inputs[:2]}) == 1
        if one is None or other is None or one[1] != other[1] or not same:
            return False
        space, second = one[0], other[0]
        if second is not space:
            space.merge(second)
        space.added = True
        self.places[node.output] = (space, one[1])
        return True

    def _close(self, value: str, why: str) -> None:
        place = self.place(value)
        if place is not None:
            place[0].closed = place[0].closed or why


def _final(space: S) -> S:
    while space.merged_into is not None:
        space = space.merged_into  # type: ignore[assignment]
    return space


def _obstacle(node: Node) -> str:
    if node.op in ("Conv2D", "Dense"):
        grouped = int(node.attrs.get("group", 1)) > 1
        return f"{node.name} is a grouped convolution" if grouped else f"the weight of {node.name} is not its own alone"
    if node.op in ("Add", "Sub"):
        return f"they are added to others by {node.name}"
    return f"{node.name} ({node.op}) reads them"


def carried(graph: Graph, node: Node, channels: Channels) -> Optional[Channels]:
    """The channels behind an operation that does the same to every channel (a pool, resize, mean or zero padding of
    maps) or only moves values (see `moved`); None behind any other, and where they mix."""
    if node.op in (*POOLS, *RESIZES):
        return channels if channels.axis == 1 and len(graph.shape(node.inputs[0])) == 4 else None
    if node.op == "ReduceMean":
        return _reduced(graph, node, channels)
    if node.op in PADS:
        added = uses.paddings(graph, node)
        return channels if added is not None and added[channels.axis] == (0, 0) else None
    return moved(graph, node, channels)


def _reduced(graph: Graph, node: Node, channels: Channels) -> Optional[Channels]:
    axes = uses.axes_of(graph, node, 1)
    if channels.axis in axes:
        return None
    kept = bool(graph.const(node.inputs[2]))
    before = 0 if kept else sum(axis < channels.axis for axis in axes)
    return Channels(channels.axis - before, channels.count, channels.repeat)
