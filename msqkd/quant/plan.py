"""The QuantPlan: the only place that says which value is quantised, how, and by which rule.

Training, calibration, the report and the exporters read it; none of them decides again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Optional

import numpy as np

from msqkd.errors import PlanError
from msqkd.graph.ir import Graph
from msqkd.quant.config import HALF, INT8, NONE
from msqkd.quant.qparams import (
    MAX_BITS,
    SCALE_FLOOR,
    QParams,
    activation_qparams,
    quant_limits,
    weight_clip_ratio,
    weight_qparams,
)
from msqkd.targets import get_target

NO_NEIGHBOUR, FLOAT_INPUT = "no neighbour runs in int8", "its input is computed in float"
BY_NEIGHBOURS = (NO_NEIGHBOUR, FLOAT_INPUT)
"""Why an operation that has an int8 kernel is float where others are."""


@dataclass(frozen=True)
class NodePlan:
    """Where one operation runs.

    Attributes:
        name, op, cell_path, cell_types: as in the graph.
        precision: one of `msqkd.quant.config.PRECISIONS`.
        reason: why, in words.
        rule: the rule that had the last word on the layer's settings.
        fused_into: the node in whose kernel this one is computed, if any.
        form: how the operation is written where that is not its own kernel (``depthwise``, ``hard sigmoid``,
            ``rescaled``).
        avoids: names of the target's defects that this placement avoids.
    """

    name: str
    op: str
    cell_path: str
    cell_types: tuple[str, ...]
    precision: str
    reason: str
    rule: str
    fused_into: Optional[str] = None
    form: Optional[str] = None
    avoids: tuple[str, ...] = ()


@dataclass(frozen=True)
class WeightQuant:
    """How the weight of one node is quantised (symmetric, zero point 0).

    `axis` is the channel axis, or None per tensor; `clip_ratio` the part of max|w| that is kept (array of shape (C,)
    or ()); `index` the input of the node that the weight is. With `learned` the scale is trained; `scale` is the one
    that training found (float32 (C,) or ()), in place of that of the weight.
    """

    node: str
    bits: int
    axis: Optional[int]
    observer: str
    rule: str
    clip_ratio: Any = None
    index: int = 1
    learned: str = NONE
    scale: Any = None

    def divided(self, factor: float) -> WeightQuant:
        """For a weight that is `factor` times smaller."""
        return self if self.scale is None else replace(self, scale=np.float32(self.scale) / np.float32(factor))

    def held_in(self, graph: Graph) -> np.ndarray:
        """The weight itself, in the graph the plan is for."""
        return graph.params[graph.node(self.node).inputs[self.index]].data

    def settled(self, weight: np.ndarray) -> WeightQuant:
        """With the clip ratio that the observer ``mse`` finds for `weight`, where nothing was chosen before."""
        if self.observer != "mse" or self.clip_ratio is not None or self.scale is not None:
            return self
        return replace(self, clip_ratio=weight_clip_ratio(weight, self.bits, self.axis, where=self.node))

    def rounded(self, weight: np.ndarray) -> np.ndarray:
        """`weight` on the grid that fits it, as `settled` chooses."""
        return self.settled(weight).qparams(weight).fake_quantize(weight)

    @property
    def kept_part(self) -> Any:
        """The clip ratio in force: 1 where none was chosen."""
        return 1.0 if self.clip_ratio is None else self.clip_ratio

    def qparams(self, weight: np.ndarray, min_scale: Any = SCALE_FLOOR) -> QParams:
        """Scale and zero point for the current `weight`; `min_scale` as in `weight_qparams`."""
        if self.scale is not None:
            scale = np.maximum(np.asarray(self.scale, np.float32), np.asarray(min_scale, np.float32))
            return QParams(scale, np.zeros(scale.shape), *quant_limits(self.bits, narrow=True), self.axis)
        return weight_qparams(weight, self.bits, self.axis, self.kept_part, min_scale, where=self.node)


@dataclass(frozen=True)
class DynamicQuant:
    """How the first input of one node is quantised at each call: every row, the values along the last axis, by its own
    range, so that no sample's answer depends on the others in its batch.

    Attributes:
        node: whose input it is.
        bits, symmetric, delay, delay_epochs: settings, as in `msqkd.quant.config.QuantConfig`.
        rule: who made them.
    """

    node: str
    bits: int
    symmetric: bool
    delay: int
    rule: str
    delay_epochs: int = 0

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest integer."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1


@dataclass(frozen=True)
class Group:
    """Values that share one scale and zero point, with the settings of the value they all come from.

    Attributes:
        name: of the value they come from.
        bits, symmetric, observer, percentile, delay, delay_epochs, learned: settings, as in
            `msqkd.quant.config.QuantConfig`.
        rule: who made them.
        range: (lo, hi) once it is known.
        fixed: the range is given by the operation, it is neither observed nor trained.
        source: the group whose integers these values have, where their scale is only `factor` times its.
        factor: see `source`; positive.
        scale: the scale that training found, in place of that of the range; of a group that follows another, the
            other's.
    """

    name: str
    bits: int
    symmetric: bool
    observer: str
    percentile: float
    delay: int
    rule: str
    range: Optional[tuple[float, float]] = None
    fixed: bool = False
    source: str = ""
    factor: float = 1.0
    delay_epochs: int = 0
    learned: str = NONE
    scale: Optional[float] = None

    def with_range(self, span: Optional[tuple[float, float]]) -> Group:
        """A copy with another range; a trained scale belongs to the range it came with."""
        same = span is not None and self.range is not None and np.allclose(span, self.range, rtol=2.0**-24, atol=0)
        return replace(self, range=span, scale=self.scale if same else None)

    def qparams(self) -> QParams:
        """Scale and zero point.

        Raises:
            PlanError: the range is not known yet.
        """
        if self.range is None:
            raise PlanError(f"value '{self.name}' has no range yet; calibrate the network or train it past its delay")
        # In float32, as a training cell holds it: a tie in the zero point must not depend on who computes it.
        low, high = (float(np.float32(end / self.factor)) for end in self.range)
        found = activation_qparams(low, high, bits=self.bits, symmetric=self.symmetric, where=self.name)
        if self.scale is not None:
            found = replace(found, scale=np.asarray(self.scale, np.float32))
        return replace(found, scale=found.scale * np.float32(self.factor)) if self.source else found


@dataclass(frozen=True)
class ActivationQuant:
    """One quantised value.

    Attributes:
        value: its name in the graph.
        group: whose parameters it has.
        exact: it is on the grid of its group by itself (a maximum or a reshape of quantised values): nothing to round.
        edges: where the value is computed in float, the (node, input) places that read it in int8; empty: every reader
            does.
    """

    value: str
    group: str
    exact: bool = False
    edges: tuple[tuple[str, int], ...] = ()


@dataclass
class QuantPlan:
    """The decisions for one graph on one target."""

    target: str
    network: str
    nodes: list[NodePlan] = field(default_factory=list)
    weights: dict[str, WeightQuant] = field(default_factory=dict)
    activations: dict[str, ActivationQuant] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    dynamic: dict[str, DynamicQuant] = field(default_factory=dict)

    def node(self, name: str) -> NodePlan:
        """The plan of node `name`."""
        return next(node for node in self.nodes if node.name == name)

    def group_of(self, value: str) -> Group:
        """The group of a quantised value."""
        return self.groups[self.activations[value].group]

    def with_ranges(self, ranges: dict[str, tuple[float, float]]) -> QuantPlan:
        """A copy with the ranges of the named groups set; those that are fixed or follow another's are not taken."""
        groups: dict[str, Group] = {}
        for name, group in self.groups.items():  # a group comes after the one it follows
            if group.source:
                span = groups[group.source].range
                span = (span[0] * group.factor, span[1] * group.factor) if span is not None else None
            else:
                span = group.range if group.fixed else ranges.get(name, group.range)
            groups[name] = group.with_range(span)
        return replace(self, groups=groups)

    def ranges(self) -> dict[str, tuple[float, float]]:
        """The known ranges by group, without those that follow another's."""
        return {n: group.range for n, group in self.groups.items() if group.range is not None and not group.source}

    def with_weight_observers(self, graph: Graph) -> QuantPlan:
        """A copy whose ``mse`` weights have clip ratios: those chosen before, else the best for `graph`."""
        return replace(self, weights={name: q.settled(q.held_in(graph)) for name, q in self.weights.items()})

    def with_scales(self, weights: Mapping[str, Any], groups: Mapping[str, Any]) -> QuantPlan:
        """A copy with trained scales: of weights by node (numbers or lists), and of groups, whose ranges are set
        already."""
        held = {name: replace(self.weights[name], scale=np.asarray(s, np.float32)) for name, s in weights.items()}
        spans = {
            name: replace(group, scale=float(groups[group.source or name]))
            for name, group in self.groups.items()
            if (group.source or name) in groups
        }
        return replace(self, weights={**self.weights, **held}, groups={**self.groups, **spans})

    def scales(self) -> dict[str, dict[str, Any]]:
        """The scales that were trained or chosen, as `with_scales` takes them, in numbers and lists."""
        weights = {n: np.asarray(quant.scale).tolist() for n, quant in self.weights.items() if quant.scale is not None}
        groups = {n: g.scale for n, g in self.groups.items() if g.scale is not None and not g.source}
        return {"weights": weights, "groups": groups}

    def in_steps(self, steps_per_epoch: int) -> QuantPlan:
        """A copy whose delays are all in steps, where an epoch has so many."""

        def steps(item: Any) -> Any:
            return replace(item, delay=item.delay + item.delay_epochs * steps_per_epoch, delay_epochs=0)

        groups = {name: steps(group) for name, group in self.groups.items()}
        return replace(self, groups=groups, dynamic={name: steps(quant) for name, quant in self.dynamic.items()})

    def delays(self) -> list[tuple[int, str]]:
        """The step from which each activation is quantised, and what it is called; delays in epochs do not count."""
        delays = [(group.delay, group.name) for group in self.groups.values()]
        return [*delays, *((quant.delay, f"the input of {quant.node}") for quant in self.dynamic.values())]

    def int8_weights(self) -> dict[str, WeightQuant]:
        """Those of `weights` whose layers compute in int8."""
        stored = self.stored_weights()
        return {name: quant for name, quant in self.weights.items() if name not in stored}

    def stored_weights(self) -> dict[str, WeightQuant]:
        """Those of `weights` that are stored as integers and computed with in float (`msqkd.quant.config.STORING`)."""
        float_nodes = {node.name for node in self.nodes if node.precision != INT8}
        return {name: quant for name, quant in self.weights.items() if name in float_nodes}

    def wide_inputs(self) -> list[DynamicQuant]:
        """Those of `dynamic` whose integers have more than 8 bits, in execution order."""
        return [quant for quant in self.dynamic.values() if quant.bits > MAX_BITS]

    def half_nodes(self) -> list[NodePlan]:
        """The operations that compute in float16, in execution order."""
        return [node for node in self.nodes if node.precision in HALF]

    def int8_share(self) -> float:
        """Share of the operations that run in int8 (0–1); an activation computed in another's kernel counts with it."""
        return sum(node.precision == INT8 for node in self.nodes) / len(self.nodes) if self.nodes else 0.0

    def avoided(self) -> list[dict[str, Any]]:
        """The defects of the target that the plan avoids: name, what, instead, and the nodes concerned."""
        defects = get_target(self.target).defects
        nodes: dict[str, list[str]] = {}
        for node in self.nodes:
            for name in node.avoids:
                nodes.setdefault(name, []).append(node.name)
        return [{**asdict(defects[name]), "nodes": concerned} for name, concerned in nodes.items()]

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-able data with stable keys."""
        weights = []
        for quant in self.weights.values():
            entry = asdict(quant)
            entry["clip_ratio"] = np.asarray(quant.kept_part).tolist()
            entry["scale"] = None if quant.scale is None else np.asarray(quant.scale).tolist()
            weights.append(entry)
        return {
            "target": self.target,
            "network": self.network,
            "int8_share": self.int8_share(),
            "nodes": [asdict(node) for node in self.nodes],
            "weights": weights,
            "activations": [asdict(quant) for quant in self.activations.values()],
            "groups": [asdict(group) for group in self.groups.values()],
            "dynamic": [asdict(quant) for quant in self.dynamic.values()],
            "avoided": [{**entry, "nodes": list(entry["nodes"])} for entry in self.avoided()],
            "warnings": list(self.warnings),
        }
