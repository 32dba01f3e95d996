"""Outlier channel splitting: the input channels with the largest weights are computed twice, and weigh half each.

Zhao et al. 2019, "Improving Neural Network Quantization without Retraining using Outlier Channel Splitting",
arXiv:1901.09504; its quantisation-aware splitting is §3.3.

What writes a channel writes n copies of it, and what reads it weighs each copy with a part of the weight w. The largest
weight, and with it the step s, shrinks. Of n equal parts w/n every one would be rounded alike, so that w had steps of
n · s; the parts here are (w + (j − (n−1)/2) · s) / n, j = 0 … n−1, whose roundings add up to that of w itself:
round(x) = Σ_j round((x + j − (n−1)/2) / n), Hermite's identity. For n = 2 these are the paper's (w ∓ s/2) / 2. (The
paper halves a copy again where it is still the largest; equal parts make it smaller with as many copies.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Optional

import numpy as np

from msqkd.errors import PlanError
from msqkd.graph.ir import Graph, Node
from msqkd.quant.algorithms.base import FLOAT_STAGE, Method, Work
from msqkd.quant.algorithms.biases import own
from msqkd.quant.algorithms.channels import Channels
from msqkd.quant.algorithms.spaces import End, Space, Survey, carried
from msqkd.quant.plan import QuantPlan, WeightQuant
from msqkd.quant.uses import slice_entries

_ELEMENTWISE = frozenset({
    "Abs", "Adds", "Add", "Div", "Divs", "Elu", "GeLU", "GeluExt", "HSigmoid", "HSwish", "LeakyReLU", "Mish", "Mul",
    "Muls", "Neg", "ReLU", "ReLU6", "RealDiv", "SeLU", "SiLU", "Sigmoid", "Softplus", "Sub", "Subs", "Tanh",
})  # fmt: skip
"""What does the same to every number, where all else that it takes is single numbers."""

_PASSES = 4
"""Over the parts of a weight: they depend on its step, and that on the largest part, within 1 / 4 of a level."""


@dataclass
class Split(Method):
    """Outlier channel splitting of weights (arXiv:1901.09504), quantisation-aware.

    It takes the channels that one layer (Conv2D without groups, Dense) writes and such layers alone read, through
    whatever does the same to every channel: activation functions, pools, means, zero paddings, resizes, depthwise
    convolutions (which are copied along), reshapes and transpositions. The outputs of the float network stay as they
    are up to float rounding; the network grows by the channels added.

    Which channels: always the one whose further splitting lowers the squared steps of the readers' weights most (with
    one scale a weight that is the channel with the largest weight, as in the paper; with a scale an output channel the
    one that is the largest in most of them), and as many as gain more than as many of an even split of all channels
    would, which are four times smaller squares for twice the channels. Where the error of the rounded weights does not
    fall in fact, nothing is split.

    Attributes:
        ratio: the share of a layer's input channels that may be added (above 0, up to 1), rounded up.
    """

    name: ClassVar[str] = "split"
    stage: ClassVar[str] = FLOAT_STAGE

    ratio: float = 0.02

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise PlanError(f"split.ratio is {self.ratio}; allowed: above 0, up to 1")

    def apply(self, work: Work) -> list[str]:
        """Split channels of both networks: their parameters, and the shapes of the values between."""
        graph, plan = work.graph, work.plan
        survey = _Survey(graph)
        spaces = survey.spaces()
        copies: dict[int, np.ndarray] = {}
        for done, space in enumerate(spaces, start=1):
            copies[id(space)] = self.copies(graph, plan, space)
            work.progress(done, len(spaces))
        grown = [(space, copies[id(space)]) for space in spaces if copies[id(space)].max() > 1]

        # All that is written before anything that is read: the parts of a weight go by the steps it has in the end.
        def grow(network: Graph) -> None:
            for space, numbers in grown:
                _write_copies(network, survey.values(space), numbers)
            for space, numbers in grown:
                for end in space.readers:
                    _read_copies(network, plan, end, numbers)
            network.check()

        work.rewrite(grow)
        return _told(graph, plan, survey, grown)

    def copies(self, graph: Graph, plan: QuantPlan, space: Space) -> np.ndarray:
        """How many copies there are to be of each channel: int64 (C,), 1 for those that are not split."""
        readers = [end for end in space.readers if end.node.name in plan.weights]
        ones = np.ones(space.count, np.int64)
        if not readers:
            return ones
        peaks = [_peaks(graph, plan, end) for end in readers]
        found = _chosen(peaks, math.ceil(self.ratio * space.count - 1e-9))
        if found.max() == 1:
            return ones
        before, after = ([_error(graph, plan, end, numbers) for end in readers] for numbers in (ones, found))
        parts = [error / was if was else 1 + error for error, was in zip(after, before)]
        return found if np.mean(parts) < 1 else ones


def rounded_in_parts(graph: Graph, plan: QuantPlan, name: str, ratio: float) -> Optional[np.ndarray]:
    """What the network sees of the rounded weight of a layer whose input channels are split: the sum of the parts,
    float32 and shaped like the weight.

    Args:
        graph: the deployment graph, in float.
        plan: its plan, which says how the weight is quantised.
        name: of the layer.
        ratio: as of `Split`.

    Returns:
        None where its channels cannot be split, or nothing is gained by it.
    """
    for space in _Survey(graph).spaces():
        for end in space.readers:
            if end.node.name == name:
                copies = Split(ratio).copies(graph, plan, space)
                return _rounded(graph, plan.weights[name], end, copies) if copies.max() > 1 else None
    return None


def with_parameters(graph: Graph, arrays: Mapping[str, np.ndarray]) -> Graph:
    """A copy of a deployment graph with other parameters, which may be those it has after `Split`.

    Args:
        graph: before any method.
        arrays: by name of the parameter.
    """
    result = graph.copy()
    survey = _Survey(result)
    for space in survey.spaces():
        total = len(arrays[space.writers[0].node.inputs[1]])
        if total != space.count:
            _widen(result, survey.values(space), total)
    for name, data in arrays.items():
        _put(result, name, data)
    return result


# -- where channels can be split ---------------------------------------------------------------------------------------
class _Survey(Survey[Space]):
    """Finds the channels that can be written twice."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph, Space)
        grouped = [node for node in graph.nodes if node.name in self.layers and int(node.attrs.get("group", 1)) > 1]
        self.layers.difference_update(node.name for node in grouped)
        self._depthwise = {node.name for node in grouped if _is_depthwise(graph, node)}
        self.all = self.survey()

    def spaces(self) -> list[Space]:
        """Those that can be split, in execution order of their writers."""
        return [space for space in self.all if space.readers and not self.obstacle(space)]

    @staticmethod
    def obstacle(space: Space) -> str:
        """Why the channels cannot be split, as a clause; empty where they can."""
        return "they are added to others" if space.added else space.closed

    def values(self, space: Space) -> dict[str, Channels]:
        """The values that carry the channels, in execution order."""
        held = {name: self.place(name) for name in self.places}
        return {name: place[1] for name, place in held.items() if place is not None and place[0] is space}

    def through(self, node: Node, space: Space, channels: Channels) -> Optional[Channels]:
        """The channels behind an operation that a copied channel passes as its original does."""
        graph = self.graph
        if node.op == "Conv2D":
            return channels if node.name in self._depthwise else None
        if node.op == "PReLU":
            slope = node.inputs[1]
            size = math.prod(graph.shape(slope))
            each = size == channels.count and channels.repeat == 1 and channels.axis == 1
            return channels if own(graph, slope) and (size == 1 or each) else None
        if node.op in _ELEMENTWISE:
            others = [name for name in node.inputs if name not in graph.tensor_inputs(node)]
            single = all(graph.values[name].kind == "const" and np.ndim(graph.const(name)) == 0 for name in others)
            return channels if single else None
        if node.op == "Reshape" and not isinstance(graph.const(node.inputs[1]), (tuple, list)):
            return None
        if node.op == "StridedSlice":
            entries = slice_entries(graph, node) or []
            if channels.axis < len(entries) and entries[channels.axis][1] is not None:
                return None  # it says where the channels end
        return carried(graph, node, channels)


def _is_depthwise(graph: Graph, node: Node) -> bool:
    shape = graph.shape(node.inputs[1])
    return shape[0] == int(node.attrs["group"]) and shape[1] == 1


# -- which channels ----------------------------------------------------------------------------------------------------
def _blocks(weight: np.ndarray, channels: Channels) -> np.ndarray:
    """A weight as (outputs, channels, everything else)."""
    return weight.reshape(len(weight), channels.count, -1)


def _peaks(graph: Graph, plan: QuantPlan, end: End) -> np.ndarray:
    """The largest weight of every input channel, float64 (scales, C)."""
    peaks = np.abs(_blocks(_weight(graph, end.node), end.channels)).max(2).astype(np.float64)
    return peaks if plan.weights[end.node.name].axis is not None else peaks.max(0, keepdims=True)


def _chosen(peaks: Sequence[np.ndarray], most: int) -> np.ndarray:
    """How many copies there are to be of each channel, `most` more than channels at the most.

    Args:
        peaks: of every reader, (scales, C).
    """
    shared = [held / (np.sqrt(np.square(held.max(1)).sum()) or 1.0) for held in peaks]  # squares of steps add up to 1
    rows = np.concatenate(shared)
    count = rows.shape[1]
    copies = np.ones(count, np.int64)
    lines = np.arange(len(rows))
    found, errors = [copies], [float(np.square(rows.max(1)).sum())]
    now = rows.copy()
    for _ in range(most):
        first = now.argmax(1)
        highest = now[lines, first]
        now[lines, first] = rows[lines, first] / (copies[first] + 1)
        gain = np.bincount(first, np.square(highest) - np.square(now.max(1)), count)
        now[lines, first] = highest
        # Of two that are alike the second one must follow before anything is gained: the larger one begins.
        best = int(np.lexsort((np.bincount(first, np.square(highest), count), gain))[-1])
        copies = copies.copy()
        copies[best] += 1
        now[:, best] = rows[:, best] / copies[best]
        found.append(copies)
        errors.append(float(np.square(now.max(1)).sum()))
    if not errors[0]:
        return found[0]
    # All channels split once: a quarter of the squares for as many channels again.
    cost = np.log(errors) + np.log(4.0) * np.arange(len(errors)) / count
    return found[int(cost.argmin())]


# -- the change itself -------------------------------------------------------------------------------------------------
def _weight(graph: Graph, node: Node) -> np.ndarray:
    return graph.params[node.inputs[1]].data


def _parts(weight: np.ndarray, channels: Channels, copies: np.ndarray, quant: Optional[WeightQuant]) -> np.ndarray:
    """The weight (O, I, ...) for copied channels, float32 (O, I + added, ...); in equal parts without `quant`."""
    origin = np.repeat(np.arange(channels.count), copies)
    number = np.arange(len(origin)) - np.repeat(copies.cumsum() - copies, copies)
    each = copies[origin].reshape(1, -1, 1)
    shift = (number - (copies[origin] - 1) / 2).reshape(1, -1, 1)
    even = _blocks(weight, channels).astype(np.float64)[:, origin] / each
    shape = (len(weight), -1, *weight.shape[2:])
    found: np.ndarray = even.reshape(shape).astype(np.float32)
    for _ in range(_PASSES if quant is not None else 0):
        assert quant is not None
        step = quant.settled(found).qparams(found).scale.astype(np.float64).reshape(-1, 1, 1)
        found = (even + shift * step / each).reshape(shape).astype(np.float32)
    return found


def _rounded(graph: Graph, quant: WeightQuant, end: End, copies: np.ndarray) -> np.ndarray:
    """The sum of the rounded parts of a weight, float32 and shaped like it."""
    weight = _weight(graph, end.node)
    parts = _parts(weight, end.channels, copies, quant)
    rounded = quant.rounded(parts).astype(np.float64)
    blocks = rounded.reshape(len(weight), int(copies.sum()), -1)
    summed: np.ndarray = np.add.reduceat(blocks, copies.cumsum() - copies, axis=1).reshape(weight.shape)
    return summed.astype(np.float32)


def _error(graph: Graph, plan: QuantPlan, end: End, copies: np.ndarray) -> float:
    """The squared error of the weight as the network sees it."""
    rounded = _rounded(graph, plan.weights[end.node.name], end, copies)
    return float(np.square(_weight(graph, end.node).astype(np.float64) - rounded).sum())


def _write_copies(graph: Graph, values: Mapping[str, Channels], copies: np.ndarray) -> None:
    """Let what writes or carries channels write the copies too."""
    origin = np.repeat(np.arange(len(copies)), copies)
    for name in values:
        node = graph.producer(name)
        assert node is not None
        for parameter in graph.param_inputs(node) if node.op in ("Conv2D", "Dense", "PReLU") else []:
            data = graph.params[parameter].data
            if len(data) == len(copies):
                _put(graph, parameter, data[origin])
    _widen(graph, values, len(origin))


def _read_copies(graph: Graph, plan: QuantPlan, end: End, copies: np.ndarray) -> None:
    weight = _weight(graph, end.node)
    _put(graph, end.node.inputs[1], _parts(weight, end.channels, copies, plan.weights.get(end.node.name)))


def _put(graph: Graph, name: str, data: np.ndarray) -> None:
    """Give a parameter another array, of any shape."""
    graph.params[name].data = data
    value = graph.values[name]
    assert value.type is not None
    graph.values[name] = replace(value, type=replace(value.type, shape=data.shape))


def _widen(graph: Graph, values: Mapping[str, Channels], total: int) -> None:
    """Adapt the shapes of values, and what of them operations are told, to `total` channels; no parameters."""
    for name, channels in values.items():
        value, size = graph.values[name], total * channels.repeat
        assert value.type is not None
        shape = list(value.type.shape)
        shape[channels.axis] = size
        graph.values[name] = replace(value, type=replace(value.type, shape=tuple(shape)))
        node = graph.producer(name)
        assert node is not None
        if node.op == "Conv2D":
            grouped = int(node.attrs.get("group", 1)) > 1
            told = ("out_channel", "group", "groups") if grouped else ("out_channel",)
            node.attrs = {key: total if key in told else held for key, held in node.attrs.items()}
        elif node.op == "Reshape":
            wanted = list(graph.const(node.inputs[1]))
            if wanted[channels.axis] != -1:
                wanted[channels.axis] = size
                node.inputs[1] = graph.add_const(tuple(wanted), "shape")


# -- in words ----------------------------------------------------------------------------------------------------------
def _told(graph: Graph, plan: QuantPlan, survey: _Survey, grown: Sequence[tuple[Space, np.ndarray]]) -> list[str]:
    added = {
        end.node.name: f"{end.node.name} {copies.sum() - len(copies)} of {len(copies)}"
        for space, copies in grown
        for end in space.readers
    }
    reasons: dict[str, list[str]] = {}
    for node in graph.nodes:
        if node.op in ("Conv2D", "Dense") and node.name in plan.weights and node.name not in added:
            reasons.setdefault(_reason(graph, survey, node), []).append(node.name)
    left = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
    total = sum(int(copies.sum()) - len(copies) for _, copies in grown)
    told = [f"channels added: {total} ({', '.join(added.values())})" if added else "no channel is split"]
    return [*told, f"input channels not split: {left}"] if left else told


def _reason(graph: Graph, survey: _Survey, node: Node) -> str:
    """Why the input channels of a layer were not split."""
    if node.name not in survey.layers:
        grouped = int(node.attrs.get("group", 1)) > 1
        return "it is a grouped convolution" if grouped else "its weight is not its own alone"
    place = survey.place(node.inputs[0])
    if place is None:
        source = graph.producer(node.inputs[0])
        return f"they come from {source.name} ({source.op})" if source is not None else "they are the network's input"
    return survey.obstacle(place[0]) or "nothing is gained"
