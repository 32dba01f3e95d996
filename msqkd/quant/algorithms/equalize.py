"""Cross-layer equalisation: scales moved between layers until their channels need the same step size.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv:1906.04721, §4.1
(equalisation) and §4.2 (high biases absorbed).

A layer's output channel i divided by s_i > 0, and all that reads it multiplied by s_i, is the same network as long as
what lies between is positively homogeneous, f(x / s) = f(x) / s. With r₁ and r₂ the largest weights of the channel on
both sides, s = √(r₁ / r₂) makes them equal, and repeated over the network, all of a chain: one scale a weight then
serves every channel. Of several layers on a side it is the geometric mean of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Optional

import numpy as np

from msqkd.errors import PlanError, did_you_mean
from msqkd.graph.ir import Graph, Node
from msqkd.quant import uses
from msqkd.quant.algorithms.base import FLOAT_STAGE, Method, Work
from msqkd.quant.algorithms.biases import put
from msqkd.quant.algorithms.channels import Channels, Moments, watch
from msqkd.quant.algorithms.spaces import PADS, Space, Survey, carried

SKIP, WITHIN = "skip", "within"
RELU6_MODES = (SKIP, WITHIN)

_RELUS = ("ReLU", "LeakyReLU", "PReLU")
_SCALINGS = ("Mul", "Muls", "Div", "Divs", "RealDiv")
_BOUND = 6.0
_GROWTH = 4.0
"""How far beyond the largest value of a layer's output one channel may be enlarged; its mean, not at all. What is all
bias, as the dead channels of a trained BatchNorm are, would otherwise take the range of the whole value for weights of
no account."""


@dataclass
class Equalize(Method):
    """Cross-layer equalisation with absorption of high biases (arXiv:1906.04721, §4.1–4.2).

    It takes the channels that layers (Conv2D of any grouping, Dense) write and layers alone read, through ReLU,
    LeakyReLU, PReLU, pools, means, zero paddings, resizes, products with a positive number, reshapes and
    transpositions, with as many readers as there are. The outputs of the float network stay as they are up to float
    rounding; those of samples that no calibration sample is like, see `relu6` and `absorb`.

    Attributes:
        iterations: most rounds over the network (1 or more).
        tolerance: it ends when no scale changes by more than this share in a round (above 0, below 1).
        absorb: subtract c = max(0, mean − 3 · deviation) of a channel, over the samples, from its bias, and add what
            it was worth to the biases of its readers. Exact where a value is not below c. Only where no reader pads,
            since zeros at the border would stand for c from then on.
        relu6: ``skip`` leaves channels with a ReLU6 on the way as they are. ``within`` scales those that reach 6 on
            no sample, so far that they reach it on none afterwards: what is clipped is the same on every sample.
        additions: take channels that are added to others too (the residual stream); one scale then serves all layers
            that write or read it. It repairs an imbalance there, and costs where there is none: what a shortcut
            multiplies by is 1 no more.
    """

    name: ClassVar[str] = "equalize"
    stage: ClassVar[str] = FLOAT_STAGE

    iterations: int = 20
    tolerance: float = 1e-3
    absorb: bool = True
    relu6: str = SKIP
    additions: bool = False

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise PlanError(f"equalize.iterations is {self.iterations}; allowed: 1 or more")
        if not 0 < self.tolerance < 1:
            raise PlanError(f"equalize.tolerance is {self.tolerance}; allowed: above 0, below 1")
        if self.relu6 not in RELU6_MODES:
            raise PlanError(
                f"equalize.relu6 is '{self.relu6}'; allowed: {', '.join(RELU6_MODES)}"
                f"{did_you_mean(self.relu6, RELU6_MODES)}"
            )

    def apply(self, work: Work) -> list[str]:
        """Scale the weights and biases of both networks."""
        graph = work.graph
        spaces = [space for space in _Survey(graph).spaces() if self.additions or not space.added]
        taken = [space for space in spaces if self.relu6 == WITHIN or not space.bounded]
        told = []
        if len(taken) < len(spaces):
            names = [space.writers[0].node.name for space in spaces if space not in taken]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            told.append(f"not across the ReLU6 behind {', '.join(names[:3])}{more} (relu6: {WITHIN} may take them)")
        if not taken:
            return ["no channels of a layer are read by layers alone: nothing to equalise", *told]
        _measure(work, graph, taken)
        weights = {end.node.name: _blocks(graph, end.node) for space in taken for end in space.ends}
        change, rounds = np.inf, 0
        while change > self.tolerance and rounds < self.iterations:
            change = max(_scale(space, weights) for space in taken)
            rounds += 1
            work.progress(rounds, self.iterations)
        amounts = [_amount(space) if self.absorb else np.zeros(space.count) for space in taken]
        work.rewrite(lambda network: _write(network, taken, amounts))
        spread = max(float(space.scale.max() / space.scale.min()) for space in taken)
        told.insert(0, f"groups of channels equalised: {len(taken)} (rounds: {rounds}, scales up to 1:{spread:.3g})")
        if change > self.tolerance:
            told.append(f"the scales still changed by {change:.2g} in the last round (iterations: {self.iterations})")
        absorbed = sum(int((amount > 0).sum()) for amount in amounts)
        if absorbed:
            told.append(f"the high biases of {absorbed} channels absorbed")
        return told


@dataclass(eq=False)
class _Space(Space):
    """Channels that have one scale each.

    Attributes:
        bounded: what a ReLU6 on the way reads.
        shifts: a number subtracted from a channel is still subtracted where it is read, as long as nothing is negative.
        scale: s (C,), so far.
        moments: of what each writer gives, before any scaling.
        highest: (C,), the largest value in front of a ReLU6, before any scaling.
    """

    bounded: dict[str, Channels] = field(default_factory=dict)
    shifts: bool = True
    scale: np.ndarray = field(default_factory=lambda: np.ones(1))
    moments: dict[str, Moments] = field(default_factory=dict)
    highest: Optional[np.ndarray] = None

    def merge(self, other: Space) -> None:
        super().merge(other)
        assert isinstance(other, _Space)
        self.bounded.update(other.bounded)


class _Survey(Survey[_Space]):
    """Finds the spaces whose channels can be scaled."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph, lambda count: _Space(count, scale=np.ones(count)))

    def spaces(self) -> list[_Space]:
        """Those that can be scaled, in execution order of their first writers."""
        return [space for space in self.survey() if not space.closed and space.readers]

    def through(self, node: Node, space: _Space, channels: Channels) -> Optional[Channels]:
        """The channels behind an operation that f(x / s) = f(x) / s holds for; None behind any other."""
        graph = self.graph
        if node.op == "PReLU" and graph.values[node.inputs[1]].kind != "param":
            return None
        if node.op in _RELUS:
            return channels
        if node.op == "ReLU6":
            space.bounded[node.inputs[0]] = channels
            return channels
        if node.op in _SCALINGS and uses.rescale_factor(graph, node) is not None:
            space.shifts = False
            return channels
        if node.op in PADS or (node.op == "AvgPool" and uses.pads(graph, node)):
            space.shifts = False
        return carried(graph, node, channels)


def _measure(work: Work, graph: Graph, spaces: Sequence[_Space]) -> None:
    """What the layers give on the samples, before anything is scaled."""
    watched: dict[str, Moments] = {}
    for space in spaces:
        space.moments = {end.node.output: Moments(end.channels) for end in space.writers}
        watched.update(space.moments)
        watched.update({value: Moments(channels) for value, channels in space.bounded.items() if value not in watched})
    watch(graph, work.samples(), list(watched), lambda name, value: watched[name].update(value))
    for space in spaces:
        if space.bounded:
            highs = [watched[value].high for value in space.bounded]
            space.highest = np.max(highs, axis=0)


def _blocks(graph: Graph, node: Node) -> np.ndarray:
    """The weight of a layer as float64 (groups, outputs of a group, inputs of a group, the rest)."""
    weight = graph.params[node.inputs[1]].data
    groups = int(node.attrs.get("group", 1)) if node.op == "Conv2D" else 1
    return weight.astype(np.float64).reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def _rows(blocks: np.ndarray) -> np.ndarray:
    """The largest weight of every output channel."""
    return np.abs(blocks).max((2, 3)).reshape(-1)


def _columns(blocks: np.ndarray) -> np.ndarray:
    """The largest weight of every input channel."""
    return np.abs(blocks).max((1, 3)).reshape(-1)


def _scale(space: _Space, weights: dict[str, np.ndarray]) -> float:
    """Bring both sides of a space to the same ranges, in place; returns by what share a scale changed at most."""
    ahead = [end.channels.gathered(_rows(weights[end.node.name])).max(1) for end in space.writers]
    behind = [end.channels.gathered(_columns(weights[end.node.name])).max(1) for end in space.readers]
    first, second = _middle(ahead), _middle(behind)
    live = (first > 0) & (second > 0)
    if not live.any():
        return 0.0
    factor = np.sqrt(first[live] / second[live])
    wanted = space.scale.copy()
    wanted[live] *= factor
    wanted[~live] *= np.median(factor)  # without weights on one side: it must only keep its place among the others
    wanted = _allowed(space, wanted)
    factor = wanted / space.scale
    _rescale(space, weights, factor)
    space.scale = wanted
    return float(np.abs(factor - 1).max())


def _rescale(space: _Space, weights: dict[str, np.ndarray], factor: np.ndarray) -> None:
    """Divide the channels (C,) of a space by a factor where they are written and multiply them where they are read, in
    place."""
    for end in space.writers:
        blocks = weights[end.node.name]
        blocks /= end.channels.spread(factor).reshape(*blocks.shape[:2], 1, 1)
    for end in space.readers:
        blocks = weights[end.node.name]
        blocks *= end.channels.spread(factor).reshape(blocks.shape[0], 1, blocks.shape[2], 1)


def _middle(ranges: Sequence[np.ndarray]) -> np.ndarray:
    """The geometric mean of the ranges (C,) that layers have for each channel.

    Where a layer has none (zeros, as a shortcut that pads with channels) that of the others stands, each taken beside
    the middle of its own layer, so that layers with large weights do not decide.
    """
    found = np.stack(ranges)
    there = found > 0
    logs = np.log(found, where=there, out=np.zeros_like(found))
    level = logs.sum(1, keepdims=True) / np.maximum(there.sum(1, keepdims=True), 1)
    apart = np.where(there, logs - level, 0.0).sum(0) / np.maximum(there.sum(0), 1)
    return np.where(there.any(0), np.exp(apart + level[there.any(1)].mean()), 0.0) if there.any() else apart


def _allowed(space: _Space, scale: np.ndarray) -> np.ndarray:
    """The scales nearest to those wanted that neither enlarge a channel too far nor change what a ReLU6 clips."""
    reach = np.max([moments.reach for moments in space.moments.values()], axis=0)
    mean = np.max([np.abs(moments.mean) for moments in space.moments.values()], axis=0)
    if reach.max() > 0:
        scale = np.maximum(scale, np.median(scale) * np.maximum(mean, reach / _GROWTH) / reach.max())
    if space.highest is None:
        return scale
    clipped = space.highest >= _BOUND
    least = np.maximum(space.highest, 0.0) / _BOUND
    # All scales times one number are the same to every weight: it is chosen such that fewest are held back.
    if not clipped.any():
        return np.asarray(scale * max(1.0, float((least / scale).max())))
    scale = np.maximum(scale / np.exp(np.log(scale[clipped]).mean()), least)
    return np.where(clipped, 1.0, scale)


def _amount(space: _Space) -> np.ndarray:
    """The part of the scaled biases of a space that its readers can take, (C,), 0 or more."""
    nothing = np.zeros(space.count)
    if len(space.writers) != 1 or not space.shifts or space.added or space.bounded:
        return nothing
    writer, readers = space.writers[0], space.readers
    padded = any(end.node.op == "Conv2D" and any(end.node.attrs["pad_list"]) for end in readers)
    if padded or any(len(end.node.inputs) != 3 for end in (writer, *readers)):
        return nothing
    moments = space.moments[writer.node.output]
    return np.asarray(np.maximum(0.0, moments.mean - 3.0 * moments.deviation) / space.scale)


def _write(graph: Graph, spaces: Sequence[_Space], amounts: Sequence[np.ndarray]) -> None:
    """Scale the channels of spaces in a network, and then move the amounts from writers to readers."""
    weights = {end.node.name: _blocks(graph, end.node) for space in spaces for end in space.ends}
    for space in spaces:
        _rescale(space, weights, space.scale)
        for end in space.writers:
            if len(end.node.inputs) == 3:
                bias = graph.params[end.node.inputs[2]].data
                put(graph, end.node.inputs[2], bias / end.channels.spread(space.scale))
    for name, blocks in weights.items():
        put(graph, graph.node(name).inputs[1], blocks)
    for space, amount in zip(spaces, amounts):
        if amount.any():
            _absorb(graph, space, amount)


def _absorb(graph: Graph, space: _Space, amount: np.ndarray) -> None:
    """Subtract an amount (C,) from the biases of a space, and add its worth to those of the readers."""
    writer = space.writers[0].node
    put(graph, writer.inputs[2], graph.params[writer.inputs[2]].data - amount)
    for end in space.readers:
        blocks = _blocks(graph, end.node)
        worth = blocks.sum(3) * end.channels.spread(amount).reshape(blocks.shape[0], 1, blocks.shape[2])
        put(graph, end.node.inputs[2], graph.params[end.node.inputs[2]].data + worth.sum(2).reshape(-1))
