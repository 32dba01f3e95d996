"""Quantisation-aware training: a plan put into a trainable cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mindspore import nn

from msqkd.graph.cell import Hooks, read_parameters, to_cell
from msqkd.graph.ir import Graph
from msqkd.graph.passes.fold_batchnorm import fold_batchnorm
from msqkd.graph.passes.shortcut_to_conv import shortcut_to_conv
from msqkd.quant.fake_quant import IN_GRAPH_OBSERVERS, OBSERVE, OFF, QUANTIZE, FakeQuantActivation, FakeQuantWeight
from msqkd.quant.plan import QuantPlan

_NON_NEGATIVE = ("ReLU", "ReLU6", "Sigmoid")


def deployment_graph(graph: Graph) -> Graph:
    """The form that is planned, calibrated and exported: BatchNorm folded, shortcuts as convolutions."""
    return training_graph(graph, "fold")


def training_graph(graph: Graph, batchnorm: str) -> Graph:
    """The form of a captured graph that is trained, with BatchNorm in mode fold, freeze or live."""
    result = graph.copy()
    shortcut_to_conv(result)
    return fold_batchnorm(result, batchnorm)


class QuantCell(nn.Cell):
    """Base of the generated quantised cell; `quantize_cell` builds it.

    Attributes:
        source_graph: a copy of the captured graph, whose parameters `sync` brings up to date.
        plan: the plan it was built from, with the ranges it started with.
        batchnorm: fold, freeze or live.
    """

    source_graph: Graph
    plan: QuantPlan
    batchnorm: str

    def setup(
        self, source: Graph, plan: QuantPlan, batchnorm: str, quantizers: Mapping[str, FakeQuantActivation]
    ) -> None:
        """Attach what the generated class does not know of."""
        self.source_graph, self.plan, self.batchnorm = source, plan, batchnorm
        self.quantizers = dict(quantizers)

    def group_quantizers(self) -> dict[str, FakeQuantActivation]:
        """The quantiser that holds each group's range."""
        return {name: cell for name, cell in self.quantizers.items() if name in self.plan.groups}

    def set_step(self, step: int) -> bool:
        """Bring every quantiser to its phase at training step `step` (0-based); True when a compilation is due.

        A quantiser observes before its delay is over and quantises from then on.

        Raises:
            PlanError: a quantiser is due whose range nobody has seen.
        """
        return self._set_phases({n: QUANTIZE if step >= q.group.delay else OBSERVE for n, q in self.quantizers.items()})

    def set_phase(self, phase: str) -> bool:
        """Bring every quantiser to one phase: ``off``, ``observe`` or ``quantize``; True when one changed."""
        return self._set_phases(dict.fromkeys(self.quantizers, phase))

    def _set_phases(self, phases: Mapping[str, str]) -> bool:
        groups = self.group_quantizers()
        changed = False
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
            read_parameters(self, self.graph)
            deployed = self.graph
        else:
            read_parameters(self, self.source_graph)
            deployed = deployment_graph(self.source_graph)
        plan = self.plan.with_ranges(self.ranges())
        return deployed, plan


def quantize_cell(source: Graph, plan: QuantPlan, batchnorm: str = "fold", *, observe: Sequence[str] = ()) -> QuantCell:
    """Build the trainable fake-quantised cell of a captured graph.

    Args:
        source: the captured graph (before folding).
        plan: the plan of its deployment graph.
        batchnorm: fold, freeze or live.
        observe: values returned beside the outputs, as they are before they are quantised themselves.

    Returns:
        A cell in evaluation mode, its quantisers in the phase of step 0; off where one that is due has no range yet.
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
        cell = FakeQuantActivation(plan.groups[quant.group], non_negative=node is not None and node.op in _NON_NEGATIVE)
        quantizers[value] = cell
        if quant.edges:
            hooks.edges.update(dict.fromkeys(quant.edges, cell))  # type: ignore[attr-defined]
        else:
            hooks.values[value] = cell  # type: ignore[index]
    for name, weight in plan.weights.items():
        node = graph.node(name)
        hooks.edges[(name, 1)] = FakeQuantWeight(weight, graph.shape(node.inputs[1]))  # type: ignore[index]
    cell = to_cell(graph, hooks, base=QuantCell)
    cell.setup(source.copy(), plan, batchnorm, quantizers)
    if all(group.range is not None for group in plan.groups.values() if group.delay == 0):
        cell.set_step(0)
    return cell


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
