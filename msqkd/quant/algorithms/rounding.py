"""Roundings of weights that are trained: a part of a network learns to give, quantised, what it gives in float.

AdaRound (Nagel et al. 2020, arXiv:2004.10568) chooses for each weight between the grid points below and above by a
variable V:

    ŵ = s · clip(⌊w/s⌋ + h(V), −top, top),   h(V) = clip(1.2 σ(V) − 0.1, 0, 1)

and minimises the squared error of the output plus reg · Σ (1 − |2h − 1|^β), which drives h to 0 or 1 as β falls.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Optional, Union

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from msqkd.errors import PlanError
from msqkd.graph.cell import Hooks, to_cell
from msqkd.graph.dropout import CountedDropout
from msqkd.graph.ir import Graph, Node
from msqkd.quant.algorithms.base import INTEGER_STAGE, Method, Work
from msqkd.quant.algorithms.stream import (
    Stream,
    activation_cell,
    dynamic_cell,
    piece_of,
    quantized_places,
    samples_that_fit,
    why_not_alone,
)
from msqkd.quant.config import LSQ
from msqkd.quant.fake_quant import QUANTIZE, FakeQuantActivation, FakeQuantWeight
from msqkd.quant.half import with_half
from msqkd.quant.learned import LearnedScale
from msqkd.quant.plan import QuantPlan, WeightQuant
from msqkd.quant.qparams import QParams, quant_limits

_STRETCH, _SHIFT = 1.2, -0.1
_DECIDED = 100.0
"""A V whose h is exactly 0 or 1."""
_SHARE = 2e-4
"""What the error that the nearest roundings make counts for each weight. With it the regulariser, at the weight 0.01,
leaves V free at first and has all but decided at the end, whatever the number of weights and the size of outputs."""
_FEWEST_HELD_OUT, _MOST_HELD_OUT = 32, 512
"""The samples that are held out of the training to decide whether it helped: an eighth of all, within these bounds. The
lower one gives way where it is more than a quarter of all."""
_SCALE_RATE = 0.1
"""The learning rate of the step sizes of activations, in that of V: they move by shares of themselves."""


@dataclass
class TrainedRounding(Method):
    """Base of the methods that train roundings.

    Attributes:
        iterations: training steps a part; 1 or more.
        batch_size: samples a step; 1 or more, at most all there are.
        lr: of Adam; above 0, up to 1.
        warmup: share of the iterations without the regulariser; 0 to below 1.
        beta: its exponent after the warm-up and at the end, which it falls to evenly; not rising, from 1.
        reg: its weight; 0 or more.
    """

    iterations: int = 1000
    batch_size: int = 32
    lr: float = 1e-2
    warmup: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)
    reg: float = 0.01

    stage: ClassVar[str] = INTEGER_STAGE

    @property
    def dropped(self) -> float:
        """The share of activations that is not quantised in training, 0 to below 1."""
        return 0.0

    def __post_init__(self) -> None:
        ends = tuple(self.beta)
        for key, fine, allowed in (
            ("iterations", self.iterations >= 1, "1 or more"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
            ("lr", 0 < self.lr <= 1, "above 0, up to 1"),
            ("warmup", 0 <= self.warmup < 1, "0 to below 1"),
            ("beta", len(ends) == 2 and ends[0] >= ends[1] >= 1, "two numbers, the first not below the second, from 1"),
            ("reg", self.reg >= 0, "0 or more"),
            ("drop", 0 <= self.dropped < 1, "0 to below 1"),
        ):
            if not fine:
                raise PlanError(f"{self.name}.{key} is {getattr(self, key)}; allowed: {allowed}")

    def pressure(self, step: int) -> tuple[float, float]:
        """The weight of the regulariser and its β at a step: none in the warm-up, then a β that falls evenly."""
        start = self.warmup * self.iterations
        if step < start:
            return 0.0, float(self.beta[0])
        part = (step - start) / max(self.iterations - start, 1)
        return self.reg, self.beta[0] + (self.beta[1] - self.beta[0]) * part


class SoftRounding(nn.Cell):
    """The quantised weight, of ⌊w/s⌋ as float32 like the weight; h says how far to the next grid point it is."""

    def __init__(self, name: str, shape: tuple[int, ...], scale_shape: tuple[int, ...], top: int) -> None:
        super().__init__()
        self.position = ms.Parameter(ms.Tensor(np.zeros(shape, np.float32)), name=f"{name}.position")
        self.scale = ms.Parameter(
            ms.Tensor(np.ones(scale_shape, np.float32)), name=f"{name}.rounding_scale", requires_grad=False
        )
        self.top, self.bottom = float(top), float(-top)

    def construct(self, floor):  # type: ignore[no-untyped-def]
        """The soft weight, or the rounded one where every V says decidedly up or down."""
        return self.scale * ops.minimum(ops.maximum(floor + self.up(), self.bottom), self.top)

    def up(self):  # type: ignore[no-untyped-def]
        """h(V)."""
        return ops.minimum(ops.maximum(ops.sigmoid(self.position) * _STRETCH + _SHIFT, 0.0), 1.0)

    def undecided(self, beta):  # type: ignore[no-untyped-def]
        """Σ (1 − |2h − 1|^β)."""
        return (1.0 - ops.pow(ops.abs(2.0 * self.up() - 1.0), beta)).sum()


class _Dropped(nn.Cell):
    """A quantiser whose work is left undone for a random share of the values in training (QDrop)."""

    def __init__(self, quantizer: FakeQuantActivation, name: str, rate: float) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.mask = _mask(name, rate)

    def construct(self, x):  # type: ignore[no-untyped-def]
        """The value, quantised where it is not dropped."""
        quantized = self.quantizer(x)
        if not self.training:
            return quantized
        call = ops.assign_add(self.mask.calls, 1)
        return ops.select(self.mask.keep(x.shape, call).reshape(x.shape), quantized, x)


def _mask(name: str, rate: float) -> CountedDropout:
    return CountedDropout(name, rate, "element", scale=False)


class _Reconstruction(nn.Cell):
    """The loss of a part of a network: squared error of its outputs, in a unit that is given, and what is undecided.

    In training a random share `drop` of the inputs are those of the float network.
    """

    def __init__(self, body: nn.Cell, roundings: Sequence[SoftRounding], inputs: int, outputs: int, drop: float):
        super().__init__()
        self.body, self.roundings = body, nn.CellList(list(roundings))
        self.inputs, self.outputs = inputs, outputs
        self.drops = drop > 0
        self.masks = nn.CellList([_mask(f"input{index}", drop) for index in range(inputs)] if drop > 0 else [])

    def construct(self, *values):  # type: ignore[no-untyped-def]
        """Inputs as they arrive, outputs as they should be, the unit, reg and β, and the inputs of the float network;
        a scalar."""
        inputs = values[: self.inputs]
        if self.drops and self.training:
            exact = values[self.inputs + self.outputs + 3 :]
            mixed = ()
            for index in range(self.inputs):
                mask, value = self.masks[index], inputs[index]
                call = ops.assign_add(mask.calls, 1)
                mixed = (*mixed, ops.select(mask.keep(value.shape, call).reshape(value.shape), value, exact[index]))
            inputs = mixed
        found = self.body(*inputs)
        if self.outputs == 1:
            found = (found,)
        error = 0.0
        for index in range(self.outputs):
            error = error + ops.square(found[index] - values[self.inputs + index]).mean()
        unit, reg, beta = values[self.inputs + self.outputs : self.inputs + self.outputs + 3]
        undecided = 0.0
        for rounding in self.roundings:
            undecided = undecided + rounding.undecided(beta)
        return error * unit + reg * undecided


@dataclass
class Part:
    """A part of a network whose weights are rounded together.

    Attributes:
        name: how reports call it.
        nodes: its operations, in execution order.
        inputs, outputs: names of the values it reads and gives.
        layers: names of the nodes whose weights are rounded.
    """

    name: str
    nodes: list[Node]
    inputs: list[str]
    outputs: list[str]
    layers: list[str]


def part_of(graph: Graph, name: str, nodes: Sequence[Node], layers: Sequence[str]) -> Part:
    """The part of `graph` that `nodes` are."""
    names = {node.name for node in nodes}
    outputs = [
        value
        for node in nodes
        for value in node.outputs
        if value in graph.outputs or any(reader.name not in names for reader in graph.consumers(value))
    ]
    return Part(name, list(nodes), piece_of(graph, nodes, outputs).inputs, outputs, list(layers))


def roundable(work: Work) -> tuple[list[str], list[str]]:
    """The layers whose roundings can be trained, in execution order; and of the others, in words, why they cannot."""
    layers, told = [], []
    for node in work.graph.nodes:
        quant = work.plan.weights.get(node.name)
        if quant is None:
            continue
        obstacle = why_not_alone(work.graph, node, quant.index)
        if obstacle is None:
            layers.append(node.name)
        else:
            told.append(f"{node.name}: rounded to the nearest, {obstacle}")
    return layers, told


def reconstruct(work: Work, parts: Sequence[Part], training: TrainedRounding, *, whole: bool) -> list[str]:
    """Train the roundings of all parts, one after the other, on what arrives in the quantised network before them.

    The target is what `work.reference` gives. What is trained is written into `work`: of each layer the weights become
    scale · integer, and the plan holds the scale. Trained roundings are taken only where they are better than the
    nearest ones on held-out samples: an eighth of all, 32 to 512 of them but not more than a quarter, drawn by
    `work.seed`. Of fewer than 4 samples none is held out, and those that were trained on decide.

    Args:
        work: the network.
        parts: in execution order.
        training: the settings.
        whole: quantise the activations of a part too, and train their scales.

    Returns:
        What was done, in words.
    """
    graph = work.graph
    work.plan = work.plan.with_weight_observers(graph)
    batches = samples_that_fit(graph, work.samples)
    exact, quantized = Stream(work.reference, batches), Stream(graph, batches, work.plan)
    trained, judged = _held_out(quantized.samples, work.seed)
    trainers: dict[Any, _Trainer] = {}
    told: list[str] = []
    falls: list[float] = []
    for number, part in enumerate(parts):
        work.progress(number, len(parts))
        exact.wanted = {name for later in parts[number:] for name in (*later.inputs, *later.outputs)}
        quantized.wanted = {name for later in parts[number:] for name in later.inputs}
        data = _data(part, exact, quantized, training.dropped > 0, trained, judged)
        if data is None:
            told.append(f"{part.name}: rounded to the nearest, it reads or gives values that are not made of samples")
            continue
        piece = piece_of(graph, part.nodes, part.outputs)
        key = _signature(work, piece, part, whole)
        if key not in trainers:
            trainers[key] = _Trainer(work, piece, part, training, whole)
        before, after = trainers[key].train(work, piece, part, data, number)
        if after < before:
            falls.append(after / before)
        elif before > 0:
            told.append(f"{part.name}: rounded to the nearest, training found nothing better")
        quantized.plan = work.plan
    work.progress(len(parts), len(parts))
    fall = f", which brought the squared error of their outputs to {np.mean(falls):.2f} of what it was" if falls else ""
    on = f"{len(trained)} samples, judged on "
    on += "the same" if np.array_equal(trained, judged) else f"{len(judged)} others"
    return [f"roundings of {len(falls)} of {len(parts)} parts trained on {on}{fall}", *told]


def _held_out(samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The samples to train on, and those to judge by: int64, each in rising order."""
    count = min(max(samples // 8, min(_FEWEST_HELD_OUT, samples // 4)), _MOST_HELD_OUT)
    order = np.random.default_rng(seed).permutation(samples)
    return np.sort(order[count:]), np.sort(order[:count] if count else order)


@dataclass
class _Data:
    """Rows of one part: what arrives, what it is in float, and what is to come out.

    Attributes:
        arriving, exact, target: the arrays, as many rows of each for every sample.
        samples: how many there are.
        trained, judged: the samples to train on, and those to judge by.
    """

    arriving: list[np.ndarray]
    exact: list[np.ndarray]
    target: list[np.ndarray]
    samples: int
    trained: np.ndarray
    judged: np.ndarray

    def batch(self, chosen: np.ndarray) -> tuple[list[Any], list[Any], list[Any]]:
        def rows(arrays: list[np.ndarray]) -> list[Any]:
            return [
                ms.Tensor(_by_sample(array, self.samples)[chosen].reshape(-1, *array.shape[1:])) for array in arrays
            ]

        return rows(self.arriving), rows(self.target), rows(self.exact)


def _by_sample(array: np.ndarray, samples: int) -> np.ndarray:
    return array.reshape(samples, len(array) // samples, *array.shape[1:])


def _data(
    part: Part, exact: Stream, quantized: Stream, drops: bool, trained: np.ndarray, judged: np.ndarray
) -> Optional[_Data]:
    """The rows of a part; None where one of its values is not made of as many rows for each sample."""
    quantized.compute(part.inputs)
    exact.compute([*part.inputs, *part.outputs])

    def joined(stream: Stream, names: Sequence[str]) -> Optional[list[np.ndarray]]:
        found = []
        for name in names:
            values = stream.values(name)
            if not all(isinstance(value, np.ndarray) and value.ndim for value in values):
                return None
            array = np.concatenate(values) if len(values) > 1 else values[0]
            if stream.graph.shape(name)[:1] != (-1,) or len(array) % stream.samples:
                return None
            found.append(array)
        return found

    arriving, target = joined(quantized, part.inputs), joined(exact, part.outputs)
    floats = joined(exact, part.inputs) if drops else []
    if arriving is None or target is None or floats is None:
        return None
    return _Data(arriving, floats, target, quantized.samples, trained, judged)


class _Trainer:
    """Trains the roundings of parts that look alike: one compilation serves them all.

    It is built for the first of them; `train` gives it the numbers of each.
    """

    def __init__(self, work: Work, piece: Graph, part: Part, training: TrainedRounding, whole: bool) -> None:
        self.training, self.whole = training, whole
        self.parameters = list(piece.params)
        self.quantizers: list[FakeQuantActivation] = []
        self.scales: dict[str, LearnedScale] = {}
        self.roundings: list[SoftRounding] = []
        hooks = self._hooks(work, piece, part)
        body = to_cell(piece, hooks)
        self.held = {name: getattr(body, attribute) for attribute, name in body.parameter_names.items()}
        for parameter in body.get_parameters():
            parameter.requires_grad = False
        trained = [rounding.position for rounding in self.roundings]
        steps = [scale.relative for scale in self.scales.values()]
        for parameter in (*trained, *steps):
            parameter.requires_grad = True
        groups: list[dict[str, Any]] = [{"params": trained}]
        if steps:
            groups.append({"params": steps, "lr": training.lr * _SCALE_RATE})
        self.network = _Reconstruction(body, self.roundings, len(piece.inputs), len(piece.outputs), training.dropped)
        optimizer = nn.Adam(groups, learning_rate=training.lr)
        names = {parameter.name for parameter in (*trained, *steps)}
        self.state = [parameter for parameter in optimizer.get_parameters() if parameter.name not in names]
        self.fresh = [parameter.asnumpy().copy() for parameter in self.state]
        self.step = nn.TrainOneStepCell(self.network, optimizer)
        self.masks = [cell for _, cell in self.network.cells_and_names() if isinstance(cell, CountedDropout)]
        for index, mask in enumerate(self.masks):
            mask.seed = ms.Tensor(np.uint32(zlib.crc32(f"{work.seed}/{index}".encode())).view(np.int32))
        for _, cell in self.network.cells_and_names():
            if hasattr(cell, "batchnorm_frozen"):
                cell.batchnorm_frozen = True

    def _hooks(self, work: Work, piece: Graph, part: Part) -> Hooks:
        """Soft roundings, and the quantisers inside the part; without `whole` those of what its layers read alone."""
        plan = work.plan
        values: dict[str, Any] = {}
        edges: dict[tuple[str, int], Any] = {}
        for number, (place, value) in enumerate(_places(work, piece, self.whole).items()):
            cell = activation_cell(work.graph, plan, value)
            root = plan.group_of(value).name
            if isinstance(place, str) and root in trained_groups(work, piece, self.whole):
                if root not in self.scales:
                    self.scales[root] = LearnedScale(root)
                group = replace(plan.group_of(value), learned=LSQ)
                cell = FakeQuantActivation(group, cell.round.non_negative, learned=self.scales[root])
                cell.phase_of_quant = QUANTIZE
            self.quantizers.append(cell)
            if isinstance(place, tuple):
                edges[place] = cell
            else:
                dropped = self.training.dropped > 0
                values[place] = _Dropped(cell, f"value{number}", self.training.dropped) if dropped else cell
        for node in piece.nodes:
            if node.name in plan.dynamic:
                edges[node.name, 0] = dynamic_cell(plan, node.name)
            elif node.name in plan.weights and node.name not in part.layers:
                quant = plan.weights[node.name]
                edges[node.name, quant.index] = FakeQuantWeight(quant, piece.shape(node.inputs[quant.index]))
        for name in part.layers:
            quant = plan.weights[name]
            shape = piece.shape(piece.node(name).inputs[quant.index])
            self.roundings.append(SoftRounding(name, shape, _column(shape, quant.axis), _top(quant)))
            edges[name, quant.index] = self.roundings[-1]
        return with_half(Hooks(values, edges), piece, plan)

    def train(self, work: Work, piece: Graph, part: Part, data: _Data, number: int) -> tuple[float, float]:
        """Train one part, number `number` of the network, and write what is better than before into `work`.

        Returns:
            The mean squared error of its outputs with the nearest roundings, and with those that were trained, on the
            samples that it is judged by.
        """
        grids = [_Grid.of(work.graph, work.plan, name) for name in part.layers]
        self._load(work, piece, grids, number)
        self._place([np.where(grid.nearest, _DECIDED, -_DECIDED) for grid in grids])
        rounded, target = self._judged(data)
        self._place([grid.start for grid in grids])
        own = _error(rounded, self._judged(data)[0])  # without what inputs and activations bring with them
        before = _error(rounded, target)
        if not own > 0:
            return before, before
        weights = sum(rounding.position.size for rounding in self.roundings)
        self._run(data, _SHARE * weights / own, np.random.default_rng([work.seed, number]))
        up = [rounding.position.asnumpy() >= 0 for rounding in self.roundings]
        self._place([np.where(chosen, _DECIDED, -_DECIDED) for chosen in up])
        after = _error(*self._judged(data))
        if after < before:
            self._take(work, piece, part, [grid.integers(chosen) for grid, chosen in zip(grids, up)], grids)
        return before, after

    def _load(self, work: Work, piece: Graph, grids: Sequence[_Grid], number: int) -> None:
        """The numbers of a part in place of those of another that looks the same."""
        for own, name in zip(self.parameters, piece.params):
            self.held[own].set_data(ms.Tensor(piece.params[name].data))
        names = dict(zip(piece.params, self.parameters))
        for grid, rounding in zip(grids, self.roundings):
            self.held[names[grid.parameter]].set_data(ms.Tensor(grid.floor))
            rounding.scale.set_data(ms.Tensor(grid.scale))
        for cell, value in zip(self.quantizers, _places(work, piece, self.whole).values()):
            cell.set_qparams(work.plan.group_of(value).qparams())
        for scale, name in zip(self.scales.values(), trained_groups(work, piece, self.whole)):
            group = work.plan.groups[name]
            scale.relative.set_data(ms.Tensor(np.ones(1, np.float32)))
            scale.start(group.qparams().scale, group.bits)
        for parameter, value in zip(self.state, self.fresh):
            parameter.set_data(ms.Tensor(value))
        for mask in self.masks:
            mask.calls.set_data(ms.Tensor(np.int32(number * self.training.iterations)))

    def _place(self, positions: Sequence[np.ndarray]) -> None:
        for rounding, position in zip(self.roundings, positions):
            rounding.position.set_data(ms.Tensor(position.astype(np.float32)))

    def _judged(self, data: _Data) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """What the part gives with the roundings as they are, for whole batches of the samples that it is judged by,
        and what it is to give."""
        self.network.set_train(False)
        size = min(self.training.batch_size, len(data.judged))
        found, wanted = [], []
        for start in range(0, len(data.judged) // size * size, size):
            arriving, target, _ = data.batch(data.judged[start : start + size])
            outputs = self.network.body(*arriving)
            found.append(outputs if isinstance(outputs, tuple) else (outputs,))
            wanted.append(target)
        return _joined(found), _joined(wanted)

    def _run(self, data: _Data, unit: float, random: np.random.Generator) -> None:
        self.step.set_train(True)
        size = min(self.training.batch_size, len(data.trained))
        for step in range(self.training.iterations):
            arriving, target, exact = data.batch(random.choice(data.trained, size, replace=False))
            self.step(*arriving, *target, *_numbers(unit, *self.training.pressure(step)), *exact)

    def _take(
        self,
        work: Work,
        piece: Graph,
        part: Part,
        integers: Sequence[np.ndarray],
        grids: Sequence[_Grid],
    ) -> None:
        plan = work.plan
        weights = dict(plan.weights)
        for name, whole_numbers, grid in zip(part.layers, integers, grids):
            work.deploy(grid.parameter, grid.qparams.dequantize(whole_numbers))
            weights[name] = replace(weights[name], scale=grid.qparams.scale)
        plan = replace(plan, weights=weights)
        found = dict(zip(trained_groups(work, piece, self.whole), self.scales.values()))
        if found:
            cells = {scale: cell for cell in self.quantizers if cell.is_learned for scale in (cell.learned,)}
            plan = plan.with_ranges({name: _range(cells[scale]) for name, scale in found.items()})
            plan = plan.with_scales({}, {name: scale.value() for name, scale in found.items()})
        work.plan = plan


def _joined(batches: Sequence[Sequence[Any]]) -> list[np.ndarray]:
    """Tensors of several batches, value by value, as one array each."""
    return [np.concatenate([tensor.asnumpy() for tensor in values]) for values in zip(*batches)]


def _error(found: Sequence[np.ndarray], target: Sequence[np.ndarray]) -> float:
    """The mean squared difference, summed over values."""
    return float(sum(np.square(one - other).mean(dtype=np.float64) for one, other in zip(found, target)))


def _range(cell: FakeQuantActivation) -> tuple[float, float]:
    span = cell.range()
    assert span is not None
    return span


@dataclass
class _Grid:
    """The grid of one weight: its parameters, ⌊w/s⌋, whether the nearest is above, and the V to start with."""

    parameter: str
    qparams: QParams
    floor: np.ndarray
    scale: np.ndarray
    nearest: np.ndarray
    start: np.ndarray

    @classmethod
    def of(cls, graph: Graph, plan: QuantPlan, name: str) -> _Grid:
        quant = plan.weights[name]
        parameter = graph.node(name).inputs[quant.index]
        weight = graph.params[parameter].data
        qparams = quant.qparams(weight)
        scale = qparams.scale.reshape(_column(weight.shape, quant.axis))
        steps = np.clip(weight.astype(np.float64) / scale, qparams.qmin, qparams.qmax)
        floor = np.floor(steps)
        share = (steps - floor - _SHIFT) / _STRETCH
        nearest = qparams.quantize(weight) > floor
        return cls(parameter, qparams, floor.astype(np.float32), scale, nearest, np.log(share / (1 - share)))

    def integers(self, up: np.ndarray) -> np.ndarray:
        return np.clip(self.floor + up, self.qparams.qmin, self.qparams.qmax).astype(np.int32)


def trained_groups(work: Work, piece: Graph, whole: bool) -> list[str]:
    """The groups of activations whose scales are trained with a part: their values are all computed in it, and no
    other group follows them."""
    if not whole:
        return []
    plan, places = work.plan, _places(work, piece, whole)
    followed = {group.source for group in plan.groups.values()}
    found = dict.fromkeys(plan.group_of(place).name for place in places if isinstance(place, str))
    return [
        name
        for name in found
        if not plan.groups[name].fixed
        and not plan.groups[name].source
        and name not in followed
        and all(quant.value in places for quant in plan.activations.values() if quant.group == name and not quant.exact)
    ]


def _places(work: Work, piece: Graph, whole: bool) -> dict[Union[str, tuple[str, int]], str]:
    places = quantized_places(work.graph, work.plan, piece)
    return {place: value for place, value in places.items() if whole or isinstance(place, tuple)}


def _signature(work: Work, piece: Graph, part: Part, whole: bool) -> tuple[Any, ...]:
    """What two parts have in common that one compiled training serves: all but numbers and names."""
    numbers: dict[str, int] = {}

    def seen(name: str) -> Any:
        value = piece.values[name]
        if value.kind == "const":
            const = value.const
            return (const.shape, str(const.dtype), const.tobytes()) if isinstance(const, np.ndarray) else repr(const)
        return numbers.setdefault(name, len(numbers)), value.kind, value.type

    nodes = tuple(
        (
            node.op, tuple(map(seen, node.inputs)), tuple(map(seen, node.outputs)), repr(sorted(node.attrs.items())),
            node.functional, node.sequences, node.unpack, id(node.body) if node.body is not None else None,
        )
        for node in piece.nodes
    )  # fmt: skip
    order = {node.name: index for index, node in enumerate(piece.nodes)}
    plan, trained = work.plan, trained_groups(work, piece, whole)

    def place_of(place: Union[str, tuple[str, int]], value: str) -> Any:
        group = plan.group_of(value)
        cell = activation_cell(work.graph, plan, value)
        where = numbers[place] if isinstance(place, str) else (order[place[0]], place[1])
        number = trained.index(group.name) if isinstance(place, str) and group.name in trained else None
        return where, group.bits, group.symmetric, cell.round.non_negative, number

    places = tuple(place_of(place, value) for place, value in _places(work, piece, whole).items())
    weights = tuple(
        (order[name], name in part.layers, quant.bits, quant.axis, quant.index, None if name in part.layers else name)
        for name, quant in plan.weights.items()
        if name in order
    )
    dynamic = tuple((order[name], replace(quant, node="")) for name, quant in plan.dynamic.items() if name in order)
    return nodes, tuple(map(seen, (*piece.inputs, *piece.outputs))), places, weights, dynamic


def _column(shape: tuple[int, ...], axis: Optional[int]) -> tuple[int, ...]:
    return tuple(size if index == axis else 1 for index, size in enumerate(shape))


def _top(quant: WeightQuant) -> int:
    return quant_limits(quant.bits, narrow=True)[1]


def _numbers(*values: float) -> list[Any]:
    return [ms.Tensor(np.float32(value)) for value in values]
