"""Quantisation-aware training: a plan put into a trainable cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Union

import mindspore as ms
import numpy as np
from mindspore import nn

from msqkd.errors import PlanError
from msqkd.graph.batches import check_shapes
from msqkd.graph.cell import Hooks, read_parameters, to_cell
from msqkd.graph.half import half_precision
from msqkd.graph.ir import Graph
from msqkd.graph.passes.computed_weights import settle_weights
from msqkd.graph.passes.fold_batchnorm import fold_batchnorm
from msqkd.graph.passes.padded_pools import NON_NEGATIVE
from msqkd.graph.passes.patterns import find_patterns
from msqkd.graph.passes.restore_dropout import DropoutPlace, restore_dropout
from msqkd.graph.passes.shortcut_to_conv import shortcut_to_conv
from msqkd.quant.config import NONE, PACT
from msqkd.quant.fake_quant import (
    FOLLOW,
    IN_GRAPH_OBSERVERS,
    OBSERVE,
    OFF,
    QUANTIZE,
    FakeQuantActivation,
    FakeQuantDynamic,
    FakeQuantWeight,
)
from msqkd.quant.half import check_parameters, with_half
from msqkd.quant.learned import LearnedScale
from msqkd.quant.plan import Group, QuantPlan
from msqkd.quant.schedule import DIRECT, QatSchedule


def deployment_graph(graph: Graph) -> Graph:
    """The form that is planned, calibrated and exported: BatchNorm folded, what the network spells out as one node.

    It is a part of the training form "fold": what is trained only goes last, so that a plan fits both. Weights that are
    computed from parameters are parameters here. The deployment form of a deployment form is a copy of it: without its
    auxiliary heads a network could be rewritten further, and its plan would not fit any more.
    """
    return _deployed(training_graph(graph, "fold"))


def _deployed(folded: Graph) -> Graph:
    if folded.settled:
        return folded
    result = settle_weights(folded.deployed_part())
    result = result.copy() if result is folded else result
    result.settled = True
    return result


def training_graph(graph: Graph, batchnorm: str) -> Graph:
    """The form of a captured graph that is trained, with BatchNorm in mode fold, freeze or live.

    Patterns come first: the folding of BatchNorm then meets the same neighbours in every mode, and what it computes on
    parameters is never taken for one. A graph in deployment form is only copied.
    """
    result = graph.copy()
    if result.settled:
        return result
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


PHASES = "quantization.phases"
"""The parameter of a QuantCell that says in a checkpoint what is quantised."""

_CODES = (OFF, OBSERVE, QUANTIZE, FOLLOW)  # a quantiser's number is 1 + the place here + 8 · bits
_Quantizer = Union[FakeQuantActivation, FakeQuantDynamic, FakeQuantWeight]


class _Phases(nn.Cell):
    """Holds the phases of a cell as a parameter, so that a checkpoint has them."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.phases = ms.Parameter(ms.Tensor(np.zeros(size, np.int32)), name="phases", requires_grad=False)


class QuantCell(nn.Cell):
    """Base of the generated quantised cell; `quantize_cell` builds it.

    A checkpoint of it says what was quantised when it was saved, and a cell that loads one quantises the same. Where a
    checkpoint of an earlier version does not say so, `set_phase` or `set_step` must, before the cell computes in
    evaluation mode.

    Attributes:
        source_graph: a copy of the captured graph, whose parameters `sync` brings up to date.
        plan: the plan it was built from, with the ranges it started with.
        batchnorm: fold, freeze or live.
        folded_graph: the graph the cell was built from, without dropout.
        schedule: what is in force at which step.
        is_trainable: it was built for training, with the observers of training.
    """

    source_graph: Graph
    plan: QuantPlan
    batchnorm: str
    folded_graph: Graph
    batchnorm_frozen: bool
    quantizers: dict[str, FakeQuantActivation]
    dynamic_quantizers: dict[str, FakeQuantDynamic]
    weight_quantizers: dict[str, FakeQuantWeight]
    schedule: QatSchedule
    starts: dict[str, int]
    quantization: _Phases
    noted_phases: np.ndarray
    is_told: bool
    is_trainable: bool

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Compute the network.

        Raises:
            DataError: an input has other sizes than the example that the network was captured with.
            PlanError: in evaluation mode, the ranges come from a checkpoint that does not say what is quantised.
        """
        check_shapes(self.source_graph, inputs, "the batch")
        self._follow_checkpoint()
        if self.training:
            self.is_told = True  # it observes for itself
        elif not self.is_told:
            self._check_ranges()
        return super().__call__(*inputs, **named)

    def setup(
        self,
        source: Graph,
        plan: QuantPlan,
        batchnorm: str,
        quantizers: Mapping[str, FakeQuantActivation],
        trained: Graph,
        dynamic: Mapping[str, FakeQuantDynamic],
        weights: Mapping[str, FakeQuantWeight],
        schedule: QatSchedule,
    ) -> None:
        """Attach what the generated class does not know of."""
        self.source_graph, self.plan, self.batchnorm = source, plan, batchnorm
        self.folded_graph = trained
        self.quantizers, self.dynamic_quantizers = dict(quantizers), dict(dynamic)
        self.weight_quantizers, self.schedule = dict(weights), schedule
        self.starts = _starts(trained, plan, schedule)
        self.is_told = False
        self.quantization = _Phases(len(self._all_quantizers()) + 1)
        parameter = self.quantization.phases

        def set_data(data: Any, slice_shape: bool = False) -> Any:
            ms.Parameter.set_data(parameter, data, slice_shape)
            self.is_told = True
            self._follow_checkpoint()
            return parameter

        # Whoever loads a checkpoint comes by here; in GRAPH_MODE a cell inside others is not called by Python.
        parameter.set_data = set_data
        self.noted_phases = np.zeros(0, np.int32)
        self._note_phases()

    def _all_quantizers(self) -> list[_Quantizer]:
        return [*self.quantizers.values(), *self.dynamic_quantizers.values(), *self.weight_quantizers.values()]

    def _codes(self) -> np.ndarray:
        """The phases as numbers: one a quantiser, and whether BatchNorm's statistics stand still."""

        def code(quantizer: _Quantizer) -> int:
            bits = quantizer.quant.bits if isinstance(quantizer, FakeQuantDynamic) else quantizer.bits
            return 1 + _CODES.index(quantizer.phase_of_quant) + 8 * bits

        return np.array([*map(code, self._all_quantizers()), 1 + self.batchnorm_frozen], np.int32)

    def _note_phases(self) -> None:
        """Let the parameter say what is in force."""
        codes = self._codes()
        if not np.array_equal(codes, self.noted_phases):
            ms.Parameter.set_data(self.quantization.phases, ms.Tensor(codes))
            self.noted_phases = codes

    def _follow_checkpoint(self) -> None:
        """Bring every quantiser to the phase that the parameter says, where a checkpoint has changed it.

        What belongs to a phase (scales, zero points, trained step sizes) came from the checkpoint too.
        """
        codes = self.quantization.phases.asnumpy()
        if np.array_equal(codes, self.noted_phases):
            return
        self.noted_phases = codes.copy()
        for quantizer, code in zip(self._all_quantizers(), codes.tolist()):
            bits, place = divmod(code - 1, 8)
            quantizer.phase_of_quant = _CODES[place]
            if isinstance(quantizer, (FakeQuantActivation, FakeQuantWeight)):
                quantizer.set_bits(bits)
            if isinstance(quantizer, FakeQuantActivation):
                quantizer.bits_in_force = bits
        self.batchnorm_frozen = bool(codes[-1] == 2)
        self.is_told = True
        forget_compilations(self)

    def _check_ranges(self) -> None:
        """Refuse to compute in float what has ranges from nobody knows where."""
        for name, quantizer in self.group_quantizers().items():
            if quantizer.phase_of_quant in (QUANTIZE, FOLLOW) or quantizer.group.fixed:
                continue
            if quantizer.group.range is None and quantizer.range() is not None:
                raise PlanError(
                    f"value '{name}' has a range that this cell did not find itself, and nothing says whether it is "
                    "quantised: the checkpoint it came from was written by an earlier version of msqkd, or a training "
                    "step of your own did not say which step it is; call set_phase('quantize') on the cell to use "
                    "it as trained, or set_step(n) after n training steps"
                )

    def group_quantizers(self) -> dict[str, FakeQuantActivation]:
        """The quantiser that holds each group's range."""
        return {name: cell for name, cell in self.quantizers.items() if name in self.plan.groups}

    def set_step(self, step: int) -> bool:
        """Bring every quantiser to its phase and its bits at training step `step` (0-based); True when a compilation is
        due.

        An activation is observed before its delay and its part of the schedule have come, and quantised from then on.

        Raises:
            PlanError: a quantiser is due whose range nobody has seen.
        """
        schedule, starts = self.schedule, self.starts
        frozen = schedule.freeze_ranges is None or step >= schedule.freeze_ranges

        def phase(quantizer: FakeQuantActivation) -> str:
            group = quantizer.group
            if step < max(group.delay, starts.get(group.source or group.name, 0)):
                return OBSERVE
            watched = group.observer in IN_GRAPH_OBSERVERS and not group.fixed and not quantizer.is_learned
            return QUANTIZE if frozen or not watched else FOLLOW

        phases = {name: phase(quantizer) for name, quantizer in self.quantizers.items()}
        dynamic = {
            name: QUANTIZE if step >= max(cell.quant.delay, starts.get(name, 0)) else OFF
            for name, cell in self.dynamic_quantizers.items()
        }
        on = {name: step >= starts.get(name, 0) for name in self.weight_quantizers}
        least_weight, least_activation = schedule.bits_at(step)
        for quantizer in self.quantizers.values():
            group = quantizer.group
            quantizer.set_bits(group.bits if group.fixed else max(group.bits, least_activation))
        changed = self._set_weights(on, least_weight) | self._set_phases(phases, dynamic)
        from_step = schedule.freeze_batchnorm
        changed |= self._set_batchnorm(from_step is not None and step >= from_step)
        self._said()
        return changed

    def set_phase(self, phase: str) -> bool:
        """Bring every activation to one phase: ``off``, ``observe`` or ``quantize``, and weights to what is deployed;
        True when something changed."""
        for quantizer in self.quantizers.values():
            quantizer.set_bits(quantizer.group.bits)
        changed = self._set_weights(dict.fromkeys(self.weight_quantizers, True), 0)
        changed |= self._set_phases(
            dict.fromkeys(self.quantizers, phase), dict.fromkeys(self.dynamic_quantizers, phase)
        )
        self._said()
        return changed

    def _said(self) -> None:
        self.is_told = True
        self._note_phases()

    def _set_weights(self, on: Mapping[str, bool], least_bits: int) -> bool:
        """Quantise the weights of the nodes that are `on`, to no fewer bits than given and planned."""
        changed = False
        for name, cell in self.weight_quantizers.items():
            phase = QUANTIZE if on[name] else OFF
            changed |= cell.set_bits(max(cell.quant.bits, least_bits)) | (phase != cell.phase_of_quant)
            cell.phase_of_quant = phase
        if changed:
            self.start_weights()
            self.compile_cache.clear()
        return changed

    def start_weights(self) -> None:
        """Start the trained scales that are due for the weights as they are now."""
        learned = [cell for cell in self.weight_quantizers.values() if cell.is_learned]
        for cell in learned:
            if cell.phase_of_quant == OFF:
                cell.learned.stop()
        due = [cell for cell in learned if cell.phase_of_quant == QUANTIZE and cell.learned.started() != cell.bits]
        graph = self._deployed_now() if due else None
        for cell in due:
            assert graph is not None
            cell.start(cell.quant.held_in(graph))

    def _set_batchnorm(self, frozen: bool) -> bool:
        """Let BatchNorm compute with its running statistics in training too, or not."""
        changed, self.batchnorm_frozen = frozen != self.batchnorm_frozen, frozen
        if changed:
            self.compile_cache.clear()
        return bool(changed)

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
            new_bits = phase in (QUANTIZE, FOLLOW) and quantizer.bits != quantizer.bits_in_force
            if phase == quantizer.phase_of_quant and not new_bits:
                continue
            if phase in (QUANTIZE, FOLLOW):
                quantizer.start(self._head(quantizer))
            quantizer.phase_of_quant = phase
            changed = True
        if changed:
            self.compile_cache.clear()
        return changed

    def _head(self, quantizer: FakeQuantActivation) -> FakeQuantActivation:
        """The quantiser whose parameters this one has."""
        group = quantizer.group
        return self.quantizers[(quantizer.is_learned and group.source) or group.name]

    def ranges(self) -> dict[str, tuple[float, float]]:
        """The range of every group that has one."""
        found = {name: cell.range() for name, cell in self.group_quantizers().items()}
        return {name: span for name, span in found.items() if span is not None}

    def set_ranges(self, ranges: Mapping[str, tuple[float, float]]) -> None:
        """Set the ranges of the named groups."""
        for name, (low, high) in ranges.items():
            self.quantizers[name].set_range(low, high)
        for quantizer in self.quantizers.values():
            if quantizer.phase_of_quant in (QUANTIZE, FOLLOW):
                quantizer.start(self._head(quantizer))

    def scales(self) -> dict[str, dict[str, np.ndarray]]:
        """The trained scales as `QuantPlan.with_scales` takes them: ``weights`` (float32 (C,) or ()) and ``groups``."""
        weights = {name: cell.learned for name, cell in self.weight_quantizers.items() if cell.is_learned}
        groups = {
            name: cell.learned
            for name, cell in self.group_quantizers().items()
            if cell.is_learned and not cell.group.source
        }
        return {
            kind: {name: scale.value() for name, scale in found.items() if scale.started()}
            for kind, found in (("weights", weights), ("groups", groups))
        }

    def sync(self) -> tuple[Graph, QuantPlan]:
        """The captured graph with the trained parameters, and the plan with the current ranges and trained scales."""
        return self._deployed_now(), self.plan.with_ranges(self.ranges()).with_scales(**self.scales())

    def _deployed_now(self) -> Graph:
        if self.batchnorm == "fold":
            read_parameters(self, self.folded_graph)
            return _deployed(self.folded_graph)
        read_parameters(self, self.source_graph)
        return deployment_graph(self.source_graph)


def _starts(graph: Graph, plan: QuantPlan, schedule: QatSchedule) -> dict[str, int]:
    """The step from which nodes and groups are quantised, where not all begin at once; a value begins with the layer
    before it."""
    if schedule.stages == 1:
        return {}
    layers = [node.name for node in graph.nodes if node.name in plan.weights]
    starts: dict[str, int] = {}
    place = 0
    for name in graph.inputs:
        starts[name] = schedule.start_of(0, len(layers))
    for node in graph.nodes:
        if node.name in plan.weights:
            starts[node.name] = schedule.start_of(place, len(layers))
            place += 1
        for output in node.outputs:
            starts[output] = schedule.start_of(max(place - 1, 0), len(layers))
    return starts


def quantize_cell(
    source: Graph,
    plan: QuantPlan,
    batchnorm: str = "fold",
    *,
    observe: Sequence[str] = (),
    dropout: Sequence[DropoutPlace] = (),
    amp_level: str = "O0",
    learn: bool = False,
    schedule: QatSchedule = DIRECT,
) -> QuantCell:
    """Build the trainable fake-quantised cell of a captured graph.

    Args:
        source: the captured graph (before folding).
        plan: the plan of its deployment graph.
        batchnorm: fold, freeze or live.
        observe: values returned beside the outputs, as they are before they are quantised themselves.
        dropout: where the cell drops values in training mode; what `find_dropout` found in the original network.
        amp_level: which operations compute in float16 in training mode (`msqkd.graph.half`); quantisers never do.
        learn: train the step sizes the plan says are learned; else they are what the plan has, or are found as for the
            others.
        schedule: what is in force at which step.

    Returns:
        A cell in evaluation mode, its quantisers in the phase of step 0; off where one that is due has no range yet.

    Raises:
        PlanError: as `with_dropout`; a delay is in epochs (see `QuantPlan.in_steps`); or float16 cannot hold a
            parameter of a layer that computes in it.
    """
    if learn:
        _check_delays(plan)
    graph = training_graph(source, batchnorm)
    deployed = deployment_graph(source)
    check_parameters(deployed, plan)
    plan = plan.with_weight_observers(deployed)
    producers = {output: node for node in graph.nodes for output in node.outputs}
    quantizers: dict[str, FakeQuantActivation] = {}
    scales: dict[str, LearnedScale] = {}
    hooks = Hooks(values={}, edges={}, observe=observe)
    for value, quant in plan.activations.items():
        if quant.exact:
            continue
        node = producers.get(value)
        group = plan.groups[quant.group]
        root = group.source or group.name
        if learn and group.learned != NONE and root not in scales:
            scales[root] = LearnedScale(root, decay=schedule.pact_decay if group.learned == PACT else 0.0)
        follows = schedule.freeze_ranges is not None and value != root
        cell = FakeQuantActivation(
            group,
            non_negative=node is not None and node.op in NON_NEGATIVE,
            learned=scales.get(root),
            head=quantizers[root] if follows else None,
        )
        quantizers[value] = cell
        if quant.edges:
            hooks.edges.update(dict.fromkeys(quant.edges, cell))  # type: ignore[attr-defined]
        else:
            hooks.values[value] = cell  # type: ignore[index]
    weights: dict[str, FakeQuantWeight] = {}
    for name, weight in plan.weights.items():
        node = graph.node(name)
        shape = graph.shape(node.inputs[weight.index])
        weights[name] = FakeQuantWeight(weight, shape, learn, schedule.noise)
        hooks.edges[(name, weight.index)] = weights[name]  # type: ignore[index]
    dynamic = {name: FakeQuantDynamic(quant) for name, quant in plan.dynamic.items()}
    hooks.edges.update({(name, 0): quantizer for name, quantizer in dynamic.items()})  # type: ignore[attr-defined]
    hooks = with_half(hooks, graph, plan, deployed)
    trained = with_dropout(graph, dropout)
    cell = to_cell(trained, half_precision(trained, amp_level, hooks), base=QuantCell)
    cell.setup(source.copy(), plan, batchnorm, quantizers, graph, dynamic, weights, schedule)
    cell.is_trainable = learn
    cell.start_weights()
    if all(group.range is not None for group in plan.groups.values() if group.delay == 0):
        cell.set_step(0)
        cell.is_told = False
    return cell


def _check_delays(plan: QuantPlan) -> None:
    delays = {group.name: group.delay_epochs for group in plan.groups.values()}
    delays.update({quant.node: quant.delay_epochs for quant in plan.dynamic.values()})
    late = next((name for name, epochs in delays.items() if epochs), None)
    if late is not None:
        raise PlanError(
            f"the delay of '{late}' is {delays[late]} epochs, and how many steps those are is not known; give "
            "act_quant_delay in steps, or the plan by plan.in_steps"
        )


def needed_before_training(plan: QuantPlan) -> list[Group]:
    """The groups without a range that need one before the first step: they are quantised from there on, or have an
    observer that cannot watch while training."""
    return [
        group
        for group in plan.groups.values()
        if group.range is None and (group.delay + group.delay_epochs == 0 or group.observer not in IN_GRAPH_OBSERVERS)
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
