"""Quantisation-aware training: a plan put into a trainable cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mindspore import nn

from msqkd.errors import PlanError
from msqkd.graph.cell import Hooks, read_parameters, to_cell
from msqkd.graph.ir import Graph
from msqkd.graph.passes.computed_weights import settle_weights
from msqkd.graph.passes.fold_batchnorm import fold_batchnorm
from msqkd.graph.passes.padded_pools import NON_NEGATIVE
from msqkd.graph.passes.patterns import find_patterns
from msqkd.graph.passes.restore_dropout import DropoutPlace, restore_dropout
from msqkd.graph.passes.shortcut_to_conv import shortcut_to_conv
from msqkd.quant.fake_quant import (
    IN_GRAPH_OBSERVERS,
    OBSERVE,
    OFF,
    QUANTIZE,
    FakeQuantActivation,
    FakeQuantDynamic,
    FakeQuantWeight,
)
from msqkd.quant.plan import Group, QuantPlan


def deployment_graph(graph: Graph) -> Graph:
    """The form that is planned, calibrated and exported: BatchNorm folded, what the network spells out as one node.

    It is a part of the training form "fold": what is trained only goes last, so that a plan fits both. Weights that are
    computed from parameters are parameters here.
    """
    return _deployed(training_graph(graph, "fold"))


def _deployed(folded: Graph) -> Graph:
    return settle_weights(folded.deployed_part())


def training_graph(graph: Graph, batchnorm: str) -> Graph:
    """The form of a captured graph that is trained, with BatchNorm in mode fold, freeze or live.

    Patterns come first: the folding of BatchNorm then meets the same neighbours in every mode, and what it computes on
    parameters is never taken for one.
    """
    result = graph.copy()
    find_patterns(result)
    shortcut_to_conv(result)
    return fold_batchnorm(result, batchnorm)


def with_dropout(graph: Graph, places: Sequence[DropoutPlace]) -> Graph:
    """A copy of a training form of a graph that drops values at `places` in training mode.

    Raises:
        PlanError: a place is inside what this form has joined.
    """
    result = graph.copy()
    missing = restore_dropout(result, places)
    if missing:
        raise PlanError(
            f"{graph.name}: the dropout '{missing[0].path}' has no place in the network that is trained, where the "
            "layer before it and the BatchNorm behind it are one; train it without dropout"
        )
    return result


class QuantCell(nn.Cell):
    """Base of the generated quantised cell; `quantize_cell` builds it.

    Attributes:
        source_graph: a copy of the captured graph, whose parameters `sync` brings up to date.
        plan: the plan it was built from, with the ranges it started with.
        batchnorm: fold, freeze or live.
        folded_graph: in mode fold, the graph the cell was built from, without dropout.
    """

    source_graph: Graph
    plan: QuantPlan
    batchnorm: str
    folded_graph: Graph

    def setup(
        self,
        source: Graph,
        plan: QuantPlan,
        batchnorm: str,
        quantizers: Mapping[str, FakeQuantActivation],
        trained: Graph,
        dynamic: Mapping[str, FakeQuantDynamic],
    ) -> None:
        """Attach what the generated class does not know of."""
        self.source_graph, self.plan, self.batchnorm = source, plan, batchnorm
        self.folded_graph = trained
        self.quantizers, self.dynamic_quantizers = dict(quantizers), dict(dynamic)

    def group_quantizers(self) -> dict[str, FakeQuantActivation]:
        """The quantiser that holds each group's range."""
        return {name: cell for name, cell in self.quantizers.items() if name in self.plan.groups}

    def set_step(self, step: int) -> bool:
        """Bring every quantiser to its phase at training step `step` (0-based); True when a compilation is due.

        A quantiser observes before its delay is over and quantises from then on.

        Raises:
            PlanError: a quantiser is due whose range nobody has seen.
        """
        phases = {n: QUANTIZE if step >= q.group.delay else OBSERVE for n, q in self.quantizers.items()}
        dynamic = {n: QUANTIZE if step >= q.quant.delay else OFF for n, q in self.dynamic_quantizers.items()}
        return self._set_phases(phases, dynamic)

    def set_phase(self, phase: str) -> bool:
        """Bring every quantiser to one phase: ``off``, ``observe`` or ``quantize``; True when one changed."""
        return self._set_phases(dict.fromkeys(self.quantizers, phase), dict.fromkeys(self.dynamic_quantizers, phase))

    def _set_phases(self, phases: Mapping[str, str], dynamic: Mapping[str, str]) -> bool:
        groups = self.group_quantizers()
        changed = False
        for name, cell in self.dynamic_quantizers.items():
            changed |= (cell.phase_of_quant == QUANTIZE) != (dynamic[name] == QUANTIZE)
            cell.phase_of_quant = dynamic[name]
        for name, quantizer in self.quantizers.items():
            phase = phases[name]
            if phase == OBSERVE and (quantizer.group.observer not in IN_GRAPH_OBSERVERS or name not in groups):
                phase = OFF  # its range came from calibration, or comes from its group
            if phase == quantizer.phase_of_quant:
                continue
            if phase == QUANTIZE:
                quantizer.set_qparams(groups[quantizer.group.name].qparams())
            quantizer.phase_of_quant = phase
            changed = True
        if changed:
            self.compile_cache.clear()
        return changed

    def ranges(self) -> dict[str, tuple[float, float]]:
        """The range of every group that has one."""
        found = {name: cell.range() for name, cell in self.group_quantizers().items()}
        return {name: span for name, span in found.items() if span is not None}

    def set_ranges(self, ranges: Mapping[str, tuple[float, float]]) -> None:
        """Set the ranges of the named groups."""
        for name, (low, high) in ranges.items():
            self.quantizers[name].set_range(low, high)
        for quantizer in self.quantizers.values():
            if quantizer.phase_of_quant == QUANTIZE:
                quantizer.set_qparams(self.quantizers[quantizer.group.name].qparams())

    def sync(self) -> tuple[Graph, QuantPlan]:
        """The captured graph with the trained parameters, and the plan with the current ranges."""
        if self.batchnorm == "fold":
            read_parameters(self, self.folded_graph)
            deployed = _deployed(self.folded_graph)
        else:
            read_parameters(self, self.source_graph)
            deployed = deployment_graph(self.source_graph)
        plan = self.plan.with_ranges(self.ranges())
        return deployed, plan


def quantize_cell(
    source: Graph,
    plan: QuantPlan,
    batchnorm: str = "fold",
    *,
    observe: Sequence[str] = (),
    dropout: Sequence[DropoutPlace] = (),
) -> QuantCell:
    """Build the trainable fake-quantised cell of a captured graph.

    Args:
        source: the captured graph (before folding).
        plan: the plan of its deployment graph.
        batchnorm: fold, freeze or live.
        observe: values returned beside the outputs, as they are before they are quantised themselves.
        dropout: where the cell drops values in training mode; what `find_dropout` found in the original network.

    Returns:
        A cell in evaluation mode, its quantisers in the phase of step 0; off where one that is due has no range yet.

    Raises:
        PlanError: as `with_dropout`.
    """
    graph = training_graph(source, batchnorm)
    plan = plan.with_weight_observers(deployment_graph(source))
    producers = {output: node for node in graph.nodes for output in node.outputs}
    quantizers: dict[str, FakeQuantActivation] = {}
    hooks = Hooks(values={}, edges={}, observe=observe)
    for value, quant in plan.activations.items():
        if quant.exact:
            continue
        node = producers.get(value)
        cell = FakeQuantActivation(plan.groups[quant.group], non_negative=node is not None and node.op in NON_NEGATIVE)
        quantizers[value] = cell
        if quant.edges:
            hooks.edges.update(dict.fromkeys(quant.edges, cell))  # type: ignore[attr-defined]
        else:
            hooks.values[value] = cell  # type: ignore[index]
    for name, weight in plan.weights.items():
        node = graph.node(name)
        shape = graph.shape(node.inputs[weight.index])
        hooks.edges[(name, weight.index)] = FakeQuantWeight(weight, shape)  # type: ignore[index]
    dynamic = {name: FakeQuantDynamic(quant) for name, quant in plan.dynamic.items()}
    hooks.edges.update({(name, 0): quantizer for name, quantizer in dynamic.items()})  # type: ignore[attr-defined]
    cell = to_cell(with_dropout(graph, dropout), hooks, base=QuantCell)
    cell.setup(source.copy(), plan, batchnorm, quantizers, graph, dynamic)
    if all(group.range is not None for group in plan.groups.values() if group.delay == 0):
        cell.set_step(0)
    return cell


def needed_before_training(plan: QuantPlan) -> list[Group]:
    """The groups without a range that need one before the first step: they are quantised from there on, or have an
    observer that cannot watch while training."""
    return [
        group
        for group in plan.groups.values()
        if group.range is None and (group.delay == 0 or group.observer not in IN_GRAPH_OBSERVERS)
    ]


def advance(cell: nn.Cell, step: int) -> bool:
    """Bring every QuantCell inside `cell` to its phase at `step`.

    Where one changed, every compilation that holds it is forgotten, so that the next call of `cell` sees it; returns
    whether one did.
    """
    changed = [part.set_step(step) for _, part in cell.cells_and_names() if isinstance(part, QuantCell)]
    if any(changed):
        forget_compilations(cell)
    return any(changed)


def forget_compilations(cell: nn.Cell) -> None:
    """Let `cell` and every cell in it be compiled anew at their next call."""
    for _, part in cell.cells_and_names():
        part.compile_cache.clear()
