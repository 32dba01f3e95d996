"""What is wrong with the layers that do most harm, and what to do about it, in words and as parts of a recipe.

Every gain is computed: the other setting is tried on the layer's weight, or on the histogram of its values, and in the
network with that layer alone quantised. Clipping outliers often costs decibels of the layer's own, since they have the
most energy, and gains all the same in the network's answers; so these decide what is offered. A part of a recipe, a
*fragment*, is a mapping with the recipe's own keys; `with_fragment` puts it into a recipe.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Optional

import numpy as np

from msqkd.analysis.fragments import as_yaml, rule_of
from msqkd.analysis.layers import decibel
from msqkd.analysis.sensitivity import KL, RELATIVE_ERROR, Layer, Probe, Sensitivities, Sensitivity
from msqkd.analysis.statistics import OUTLIER_RATIO, Distribution, weights_of
from msqkd.graph.ir import Graph
from msqkd.quant.algorithms.order import against_order
from msqkd.quant.algorithms.split import rounded_in_parts
from msqkd.quant.config import INT8, NONE
from msqkd.quant.observers import MSEObserver, PercentileObserver
from msqkd.quant.plan import Group, WeightQuant
from msqkd.quant.qparams import MAX_BITS
from msqkd.quant.uses import weight_use
from msqkd.targets import get_target

WORTH = 0.8
"""A remedy is offered where it leaves at most this part of what the layer costs on its own."""

LOW_SQNR = 20.0
"""Below so many dB of its own a layer is diagnosed whatever its rank."""

HARM = 0.1
"""A layer is diagnosed where its own loss is this part of the sum of all layers' or more."""

NEGLIGIBLE = {KL: 1e-4, RELATIVE_ERROR: 1e-3}
"""A layer that costs less on its own is not diagnosed."""

MOST = 5
"""So many layers are diagnosed at most, the worst."""

_SPREAD = 8.0  # of the largest weights of channels, from which one scale for all wastes three bits
_FAR = {99.99: 2.0, 99.9: 3.0}  # a range that is more times a percentile is made by few values
_RATIOS = (0.02, 0.1)  # of input channels that splitting may add
_CLIPPED = 1e-3  # part of the values beyond the range that is worth a word


@dataclass(frozen=True)
class Remedy:
    """Something to do.

    Attributes:
        text: in words, with what it gains.
        gain_db: of the layer's own weight or value; None for leaving the layer float.
        loss: what the layer then costs, it alone quantised; None for leaving it float.
        fragment: what to put into the recipe (see `with_fragment`).
    """

    text: str
    gain_db: Optional[float]
    loss: Optional[float]
    fragment: dict[str, Any]

    @property
    def yaml(self) -> str:
        """The fragment as it is written in a recipe."""
        return as_yaml(self.fragment)


@dataclass(frozen=True)
class Diagnosis:
    """One bad layer.

    Attributes:
        layer: its name.
        op: its operation.
        rank: 1 for the worst.
        harm: what it costs, in words.
        causes: what was found, in words; the most telling first.
        remedies: what to do; what helps most first, float last.
    """

    layer: str
    op: str
    rank: int
    harm: str
    causes: tuple[str, ...]
    remedies: tuple[Remedy, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data, the fragments as YAML too."""
        remedies = [{**asdict(remedy), "yaml": remedy.yaml} for remedy in self.remedies]
        return {**asdict(self), "causes": list(self.causes), "remedies": remedies}


def with_fragment(recipe: Mapping[str, Any], fragment: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a recipe, as a mapping, with a fragment put in.

    Rules come behind those there are, methods (`ptq.methods`) in front of them, or where an order allows them first;
    other keys replace those there are.
    """
    result = copy.deepcopy(dict(recipe))
    for key, value in fragment.items():
        held = result.get(key)
        if isinstance(value, Mapping):
            result[key] = with_fragment(held if isinstance(held, Mapping) else {}, value)
        elif isinstance(value, list) and isinstance(held, list):
            added = copy.deepcopy(value)
            result[key] = _with_methods(held, added) if key == "methods" else [*held, *added]
        else:
            result[key] = copy.deepcopy(value)
    return result


def _with_methods(held: list[str], added: list[str]) -> list[str]:
    orders = [[*held[:place], *added, *held[place:]] for place in range(len(held) + 1)]
    return next((methods for methods in orders if against_order(methods) is None), orders[0])


def diagnose(
    graph: Graph,
    probe: Probe,
    found: Sensitivities,
    values: Mapping[str, Distribution],
    weights: Mapping[str, Distribution],
    equalised: Optional[Callable[[], Graph]] = None,
) -> list[Diagnosis]:
    """The bad layers, the worst first; none where no layer stands out.

    A layer is bad where what it costs on its own is not negligible, and either a good part of what all do (`HARM`) or
    due to much noise (`LOW_SQNR`).

    Args:
        graph: the deployment graph whose parameters are float.
        probe: of the network, with which remedies are tried.
        found: what was measured with the same network and samples.
        values: of every group of the plan (see `msqkd.analysis.statistics.value_statistics`).
        weights: of every weight (see `msqkd.analysis.statistics.weight_statistics`).
        equalised: makes `graph` with equalised channels, where the recipe's `ptq.methods` are carried out; called once,
            for a bad layer whose weight has one scale. Without it splitting of channels is not tried either.
    """
    doctor = _Doctor(graph, probe, found, values, weights, equalised)
    by_name = {layer.name: layer for layer in probe.network.layers}
    total = sum(max(row.only_loss, 0.0) for row in found.layers)
    bad = [
        (rank, row)
        for rank, row in enumerate(found.ranked(), start=1)
        if row.only_loss > NEGLIGIBLE[found.loss]
        and (row.only_loss >= HARM * total or (row.sqnr_db or np.inf) < LOW_SQNR)
    ]
    return [doctor.diagnosis(by_name[row.name], row, rank) for rank, row in bad[:MOST]]


class _Doctor:
    def __init__(
        self,
        graph: Graph,
        probe: Probe,
        found: Sensitivities,
        values: Mapping[str, Distribution],
        weights: Mapping[str, Distribution],
        equalised: Optional[Callable[[], Graph]],
    ) -> None:
        self._equalise = equalised
        self.graph, self.probe, self.found, self.values, self.weights = graph, probe, found, values, weights
        self.plan = probe.network.plan
        self.arrays = weights_of(graph, self.plan)
        self.target = get_target(self.plan.target)

    def diagnosis(self, layer: Layer, row: Sensitivity, rank: int) -> Diagnosis:
        causes: list[str] = []
        remedies: list[Remedy] = []
        for name in layer.weights:
            self._weight(name, row, causes, remedies)
        groups = dict.fromkeys(self.plan.activations[value].group for value in layer.values)
        for group in groups:
            self._activation(self.plan.groups[group], row, causes, remedies)
        if not causes:
            noise = "" if row.sqnr_db is None else f" ({row.sqnr_db:.1f} dB)"
            causes.append(f"nothing odd in its numbers: what follows is sensitive to its noise{noise}")
        remedies.sort(key=lambda remedy: remedy.loss or 0.0)
        kept = self._float(layer, row)
        share = row.only_loss / self.found.quantised_loss if self.found.quantised_loss > 0 else 0.0
        part = f", {100 * share:.2g} % of what the whole network does" if share else ""
        noise = "" if row.sqnr_db is None else f"; {row.sqnr_db:.1f} dB of its own"
        harm = f"quantised alone it costs a {self._loss(row.only_loss)}{part}{noise}"
        return Diagnosis(layer.name, layer.op, rank, harm, tuple(causes), (*remedies, *kept))

    def _loss(self, loss: float) -> str:
        return f"{'KL divergence' if self.found.loss == 'kl' else 'relative error'} of {loss:.3g}"

    # -- weights --------------------------------------------------------------------------------------------------
    def _offer(
        self, words: str, gain: float, loss: float, row: Sensitivity, fragment: dict[str, Any], after: str = ""
    ) -> list[Remedy]:
        """The remedy, if it is worth a word."""
        if loss > WORTH * row.only_loss:
            return []
        text = f"{words} ({gain:+.1f} dB there): quantised alone the layer then costs {loss:.3g}, instead of "
        return [Remedy(f"{text}{row.only_loss:.3g}{after}", gain, loss, fragment)]

    def _weight(self, name: str, row: Sensitivity, causes: list[str], remedies: list[Remedy]) -> None:
        quant, stats = self.plan.weights[name], self.weights[name]
        now = self._weight_sqnr(name, quant)
        if now is None:
            return
        dead = stats.dead_channels() if stats.largest else []
        use = weight_use(self.graph, self.graph.node(name))
        plain = replace(quant, scale=None, clip_ratio=None)
        spread = stats.channel_spread()
        channels = use is not None and use.axis is not None and self._takes_channels(name)
        if quant.axis is None and spread is not None and spread >= _SPREAD:
            causes.append(f"the weights of its channels differ by {spread:.0f} ×, and have one scale ({now:.1f} dB)")
        if quant.bits < MAX_BITS:
            causes.append(f"its weight has {quant.bits} bits ({now:.1f} dB)")
        tail = stats.over_percentile(99.9)
        if tail is not None and tail > _FAR[99.9] and quant.observer == "minmax" and quant.scale is None:
            causes.append(f"few weights are large: the largest is {tail:.1f} × the 99.9 percentile")
        if dead:
            causes.append(f"{_channels(dead, stats)} of its weight hold one number: they compute nothing")
        tries: list[tuple[str, dict[str, Any], WeightQuant]] = []
        if quant.axis is None and channels:
            assert use is not None
            tries.append(("a scale per channel", {"per_channel": True}, replace(plain, axis=use.axis)))
        if quant.observer == "minmax" and quant.scale is None:
            tries.append(("the least squared error", {"observer": "mse"}, replace(plain, observer="mse")))
        if quant.bits < MAX_BITS:
            tries.append((f"{MAX_BITS} bits", {"bits": MAX_BITS}, replace(plain, bits=MAX_BITS)))
        for words, change, other in tries:
            gain = (self._weight_sqnr(name, other) or now) - now
            loss = self.probe.loss({row.name}, weights={name: self._rounded(name, other)})
            fragment = rule_of(name, weight=change)
            remedies.extend(self._offer(f"{words} for its weight", gain, loss, row, fragment))
        if quant.axis is None and self._equalised is not None:
            remedies.extend(self._equalisation(name, row, plain, now))
        if self._equalise is not None:
            remedies.extend(self._splitting(name, row, now))

    def _equalisation(self, name: str, row: Sensitivity, quant: WeightQuant, now: float) -> list[Remedy]:
        """What its weight loses where its channels are equalised with those of the layers around it.

        These layers undo each other's scales, so the rounding of the scaled weight, scaled back, is what the network
        sees of it.
        """
        assert self._equalised is not None
        parameter = self.graph.node(name).inputs[quant.index]
        exact, scaled = self.arrays[name], self._equalised.params[parameter].data
        if np.array_equal(exact, scaled):
            return []
        back = np.divide(exact, scaled, out=np.zeros_like(exact), where=scaled != 0)
        rounded = (back * replace(quant, observer="minmax").qparams(scaled).fake_quantize(scaled)).astype(np.float32)
        noise = np.square(exact.astype(np.float64) - rounded).sum()
        gain = (decibel(float(np.square(exact.astype(np.float64)).sum()), float(noise)) or now) - now
        loss = self.probe.loss({row.name}, weights={name: rounded})
        words = "equalisation with the layers around it for its weight"
        return self._offer(words, gain, loss, row, {"ptq": {"methods": ["equalize"]}})

    def _splitting(self, name: str, row: Sensitivity, now: float) -> list[Remedy]:
        """What its weight loses where its input channels with outliers are split, by the least ratio that is worth a
        word."""
        weights = {key: replace(quant, scale=None, clip_ratio=None) for key, quant in self.plan.weights.items()}
        plan = replace(self.plan, weights=weights)
        exact = self.arrays[name].astype(np.float64)
        for ratio in _RATIOS:
            rounded = rounded_in_parts(self.graph, plan, name, ratio)
            if rounded is None:
                continue
            gain = (decibel(float(np.square(exact).sum()), float(np.square(exact - rounded).sum())) or now) - now
            loss = self.probe.loss({row.name}, weights={name: rounded})
            words = f"splitting the input channels with its largest weights (ratio: {ratio:g})"
            fragment = {"ptq": {"methods": ["split"], "split": {"ratio": ratio}}}
            offered = self._offer(words, gain, loss, row, fragment)
            if offered:
                return offered
        return []

    @cached_property
    def _equalised(self) -> Optional[Graph]:
        return None if self._equalise is None else self._equalise()

    def _weight_sqnr(self, name: str, quant: WeightQuant) -> Optional[float]:
        exact = self.arrays[name].astype(np.float64)
        noise = exact - self._rounded(name, quant)
        return decibel(float(np.square(exact).sum()), float(np.square(noise).sum()))

    def _rounded(self, name: str, quant: WeightQuant) -> np.ndarray:
        return quant.rounded(self.arrays[name])

    def _takes_channels(self, name: str) -> bool:
        """Whether the target lets this weight have a scale a channel."""
        node, support = self.graph.node(name), self.target.ops.get(self.graph.node(name).op)
        if self.plan.node(name).precision != INT8:
            return True
        grouped = int(node.attrs.get("group", 1)) if node.op == "Conv2D" else 1
        shape = self.graph.shape(node.inputs[1])
        mixed = grouped > 1 and not (shape[0] == grouped and shape[1] == 1)
        return support is not None and not support.per_tensor and not (self.target.grouped_per_channel and mixed)

    # -- activations ----------------------------------------------------------------------------------------------
    def _activation(self, group: Group, row: Sensitivity, causes: list[str], remedies: list[Remedy]) -> None:
        stats = self.values[group.name]
        now = self._sqnr(group)
        if now is None:
            return
        qparams = group.qparams()
        low, high = float(qparams.lo), float(qparams.hi)
        step = float(qparams.scale)
        outside = stats.share_outside(low - step / 2, high + step / 2)
        seen = f"{stats.histogram.lo:.3g} … {stats.histogram.hi:.3g}"
        if outside >= _CLIPPED:
            causes.append(f"{100 * outside:.2g} % of its values ({seen}) are outside its range {low:.3g} … {high:.3g}")
        odd, dead = stats.outlier_channels(), stats.dead_channels()
        reaches = {percent: max(-low, high) / (stats.percentile(percent) or np.inf) for percent in _FAR}
        far = next((percent for percent, reach in reaches.items() if reach > _FAR[percent]), None)
        if far is not None and outside < _CLIPPED:
            where = f"outliers in {_channels(odd, stats)}" if odd else "outliers"
            causes.append(f"{where}: its range reaches {reaches[far]:.1f} × as far as the {far:g} percentile")
        elif odd:
            causes.append(f"{_channels(odd, stats)} reach more than {OUTLIER_RATIO:g} × as far as the median one")
        if group.bits < MAX_BITS:
            causes.append(f"its values have {group.bits} bits ({now:.1f} dB)")
        one_sided = group.symmetric and stats.histogram.lo >= 0 and not self.target.act_symmetric
        if one_sided:
            causes.append("its values are never negative, but its range is symmetric")
        if dead:
            causes.append(f"{_channels(dead, stats)} of its values never change: they carry nothing")
        if group.fixed:
            return
        reader = self.graph.node(self.ruled_by(group.name))
        if group.learned == NONE and not group.source:
            remedies.extend(self._calibration(group, row, now))
        tries: list[tuple[str, dict[str, Any], Group]] = []
        if group.bits < MAX_BITS:
            tries.append((f"{MAX_BITS} bits", {"bits": MAX_BITS}, replace(group, bits=MAX_BITS, scale=None)))
        if one_sided:
            wide = replace(group, symmetric=False, scale=None)
            tries.append(("an asymmetric range", {"symmetric": False}, wide))
        for words, change, other in tries:
            gain = (self._sqnr(other) or now) - now
            loss = self.probe.loss({row.name}, {group.name: other.qparams()})
            fragment = rule_of(reader.name, activation=change)
            remedies.extend(self._offer(f"{words} for its values", gain, loss, row, fragment))

    def _sqnr(self, group: Group) -> Optional[float]:
        stats = self.values[group.name]
        return decibel(stats.power, stats.noise(group.qparams()))

    def _calibration(self, group: Group, row: Sensitivity, now: float) -> list[Remedy]:
        """The other observer of the calibration that helps this layer most, of those that help the whole network."""
        whole = {words: loss for words, loss in self._whole.items() if loss < self.found.quantised_loss}
        tried = {words: self._calibrated[words][group.name] for words in whole}
        losses = {words: self.probe.loss({row.name}, {group.name: other.qparams()}) for words, other in tried.items()}
        if not losses:
            return []
        best = min(losses, key=lambda words: losses[words])
        gain = (self._sqnr(tried[best]) or now) - now
        observer, _, percent = best.partition(" ")
        settings = {"observer": observer, "percentile": float(percent) if percent else None}
        after = (
            f", and the whole network, for which it is, {whole[best]:.3g}, instead of {self.found.quantised_loss:.3g}"
        )
        return self._offer(f"calibration with {best}", gain, losses[best], row, {"calibration": settings}, after)

    @cached_property
    def _calibrated(self) -> dict[str, Mapping[str, Group]]:
        """By observer, the groups with the range it takes from their histograms."""
        free = [g for g in self.plan.groups.values() if not (g.fixed or g.source) and g.learned == NONE]
        return {
            words: self.plan.with_ranges(
                {group.name: _range(self.values[group.name], words, group) for group in free}
            ).groups
            for words in ("minmax", "percentile 99.99", "percentile 99.9", "mse")
        }

    @cached_property
    def _whole(self) -> dict[str, float]:
        """By observer, what the whole network costs with its ranges."""
        names = self.probe.network.names
        return {
            words: self.probe.loss(names, {name: group.qparams() for name, group in groups.items()})
            for words, groups in self._calibrated.items()
        }

    def ruled_by(self, value: str) -> str:
        """The node whose settings a quantised value has: the one that gives it in int8, else its first int8 reader."""
        node = self.graph.producer(value)
        if node is not None and self.plan.node(node.name).precision == INT8:
            head = self.graph.node(self.plan.node(node.name).fused_into or node.name)
            support = self.target.ops.get(head.op)
            if support is None or not support.float_output:
                return head.name
        return next(
            reader.name
            for reader in self.graph.consumers(value)
            if self.plan.node(reader.name).precision == INT8 and self.plan.node(reader.name).fused_into is None
        )

    # -- float ----------------------------------------------------------------------------------------------------
    def _float(self, layer: Layer, row: Sensitivity) -> list[Remedy]:
        own = bool(layer.weights or layer.half)
        elsewhere = layer.op == "input" or (not own and self.plan.node(layer.name).precision != INT8)
        node = self.graph.node(self.ruled_by(layer.value) if elsewhere else layer.name)
        saved = self.found.quantised_loss - row.float_loss
        if saved <= 0:
            return []
        who = f"'{node.name}' in float" if node.name != layer.name else "float"
        text = f"{who}: the network then costs a {self._loss(row.float_loss)}"
        text += f", instead of {self.found.quantised_loss:.3g}"
        return [Remedy(text, None, None, rule_of(node.name, precision="float"))]


def _range(stats: Distribution, words: str, group: Group) -> tuple[float, float]:
    """The range an observer takes from a histogram; `words` is its name, with the percentile where it has one."""
    name, _, percent = words.partition(" ")
    if name == "minmax":
        return stats.histogram.lo, stats.histogram.hi
    observer = PercentileObserver(float(percent)) if name == "percentile" else MSEObserver()
    observer.load_state(stats.histogram.state())
    return observer.range(group.bits, group.symmetric, where=f"value '{group.name}'")


def _channels(found: Sequence[int], stats: Distribution) -> str:
    """``3 of 64 channels (4, 7, 9)``."""
    listed = ", ".join(map(str, found[:6])) + (" …" if len(found) > 6 else "")
    return f"{len(found)} of {stats.lows.size} channels ({listed})"
