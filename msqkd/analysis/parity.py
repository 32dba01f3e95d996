"""Does the device compute what training promised? Three executions of one network, compared value by value.

* float: the network with its weights as trained, nothing rounded;
* fake-quantised: what training and calibration saw, rounded half to even in float32;
* integer: the program of the target's runtime, step by step, with its own integer arithmetic.

A value computed in int8 is compared in its least significant bits (LSB): the difference of the device's integer and the
fake-quantised one. One LSB is normal, since the runtime rounds half away from zero, in fixed point and partly twice;
such differences make others behind them, so they grow with depth. What counts is whether the integers stay as close to
float as the fake-quantised values do, and the answers. A value computed in float is compared by its error relative to
the largest magnitude seen. `msqkd.quant.bounds` says which differences of the answers are accepted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any, Callable, Optional, Union

import mindspore as ms
import numpy as np

from msqkd.data import Arrays, as_tuple, taken
from msqkd.errors import DataError, ExportError
from msqkd.exporters.device.shapes import concrete_shapes
from msqkd.graph.cell import Hooks, to_cell
from msqkd.graph.ir import Graph
from msqkd.graph.islands import run_island
from msqkd.graph.norms import batch_dependence
from msqkd.integer import registry
from msqkd.integer.program import Program, Tensor
from msqkd.integer.simulator import Simulator
from msqkd.quant.bounds import STANDARD_ERRORS, Bounds, Distance, DistanceMeter
from msqkd.quant.fake_quant import QUANTIZE
from msqkd.quant.plan import QuantPlan
from msqkd.quant.qat import quantize_cell
from msqkd.quant.qparams import QParams
from msqkd.targets.ascend import ASCEND
from msqkd.train.evaluate import filled
from msqkd.train.metric import ACCURACY, Metric, Outputs

Batch = Union[np.ndarray, Sequence[np.ndarray]]
Progress = Callable[[int], None]

EXECUTIONS = ("float", "fake_quantised", "integer")
PAIRS = {
    "integer_fake_quantised": ("integer", "fake_quantised"),
    "integer_float": ("integer", "float"),
    "fake_quantised_float": ("fake_quantised", "float"),
}
BINS = ("<=-3", "-2", "-1", "0", "1", "2", ">=3")
"""Differences in LSB, integer minus fake-quantised, as the histogram counts them."""

_EDGE = len(BINS) // 2
_BATCH_BYTES = 2**28


def device_program(graph: Graph, plan: QuantPlan) -> tuple[Program, str]:
    """The program the plan's target runs, made for batch 1, and the kind of its integer kernels.

    Raises:
        PlanError: a range is missing.
        ExportError: the target cannot represent a layer.
    """
    if plan.target == ASCEND.name:
        from msqkd.exporters.ascend.program import ascend_program

        return ascend_program(graph, plan), registry.ASCEND
    from msqkd.exporters.device import lite_program

    return lite_program(graph, plan), registry.INT8


class Device:
    """The integer execution of a planned network, in the graph's own layout.

    Args:
        graph, plan: the deployment graph and its plan, every range known.
        machine: ``x86`` or ``arm64``, where the builds of MindSpore Lite differ; Ascend has one arithmetic.

    Raises:
        SimulationError: a step has no kernel, or `machine` is unknown.
        PlanError, ExportError: as `device_program`.
    """

    def __init__(self, graph: Graph, plan: QuantPlan, machine: str = registry.X86) -> None:
        self.program, kind = device_program(graph, plan)
        self.simulator = Simulator(self.program, machine, run_island, kind)

    def trace(self, *inputs: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor by name, as the runtime lays it out; `inputs` are in the graph's layout, of any batch."""
        return self.simulator.trace(*_fed(self.program, inputs))

    def __call__(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """The network's outputs for `inputs`, all in the graph's layout."""
        found = self.simulator.run(*_fed(self.program, inputs))
        return [_native(self.program.tensors[name], data) for name, data in zip(self.program.outputs, found)]


def integer_outputs(device: Device, batches: Iterable[Batch], progress: Optional[Progress] = None) -> Outputs:
    """The outputs of the integer execution for every sample.

    Raises:
        DataError: no batch is given.
    """
    parts: list[list[np.ndarray]] = []
    done = 0
    for batch in batches:
        arrays = _arrays(batch)
        parts.append(device(*arrays))
        done += len(arrays[0])
        if progress is not None:
            progress(done)
    if not parts:
        raise DataError("there are 0 samples to compute; give at least one batch")
    return tuple(np.concatenate(column) for column in zip(*parts))


def differing_values(
    one: Program, other: Program, inputs: Sequence[np.ndarray], machine: str = registry.X86
) -> tuple[int, int]:
    """How many of the values two programs compute differ, and how many there are; tensors are matched by name.

    Args:
        one, other: programs with the same tensors, as one written to a file and read back.
        inputs: in the graph's layout.
        machine: as in `Device`.
    """
    simulators = [Simulator(program, machine, run_island) for program in (one, other)]
    if not simulators[0].takes_batches:
        inputs = [data[:1] for data in inputs]
    fed = _fed(one, inputs)
    traces = (simulator.trace(*fed) for simulator in simulators)
    different = total = 0
    for (name, expected), (found_name, found) in zip(*traces):
        if name != found_name or expected.shape != found.shape:
            different += expected.size
        else:
            different += int((expected != found).sum())
        total += expected.size
    return different, total


def _fed(program: Program, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Arrays in the graph's layout as the program's inputs are laid out."""
    tensors = [program.tensors[name] for name in program.inputs]
    return [
        np.ascontiguousarray(data.transpose(np.argsort(tensor.perm)) if tensor.perm else data)
        for tensor, data in zip(tensors, inputs)
    ]


def _native(tensor: Tensor, data: np.ndarray) -> np.ndarray:
    return data.transpose(tensor.perm) if tensor.perm else data


def _arrays(batch: Batch) -> tuple[np.ndarray, ...]:
    return (batch,) if isinstance(batch, np.ndarray) else tuple(batch)


# -- what is found -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ValueParity:
    """One value of the network in the three executions.

    Attributes:
        value: its name in the graph.
        layer, op: the operation whose result it is (for an activation computed in another's kernel: that one), or
            the value's own name and ``input``.
        scale: the step of a value computed in int8; None for one computed in float.
        count: how many numbers were compared.
        histogram: how often each difference of `BINS` occurred; empty in float.
        max_lsb: the largest difference in steps of `scale`; None in float.
        relative_error: largest difference over largest magnitude, integer and fake-quantised; None in int8.
        sqnr_db: 10·log10(E[x²] / E[(x − y)²]) of x in one execution and y in another, under ``fake_quantised`` and
            ``integer`` (x: float) and ``integer_fake_quantised`` (x: fake-quantised); None where they are equal.
    """

    value: str
    layer: str
    op: str
    scale: Optional[float]
    count: int
    histogram: tuple[int, ...]
    max_lsb: Optional[int]
    relative_error: Optional[float]
    sqnr_db: dict[str, Optional[float]]

    @property
    def equal(self) -> Optional[float]:
        """Share of equal integers (0–1); None for a value computed in float."""
        return self.histogram[_EDGE] / self.count if self.histogram and self.count else None

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data with stable keys."""
        return {
            "layer": self.layer, "op": self.op, "value": self.value, "scale": self.scale, "count": self.count,
            "equal": self.equal, "max_lsb": self.max_lsb, "histogram": dict(zip(BINS, self.histogram)) or None,
            "relative_error": self.relative_error, "sqnr_db": dict(self.sqnr_db),
        }  # fmt: skip


@dataclass(frozen=True)
class Parity:
    """What the comparison of the three executions found.

    Attributes:
        target: the runtime.
        machine: ``x86`` or ``arm64``; None where the target has but one arithmetic.
        samples: how many were computed.
        correct: right answers of each of `EXECUTIONS`; None without labels, and where `metric` is not accuracy.
        agreeing: samples for which two executions name the same class, by a key of `PAIRS`; empty where `metric` is not
            accuracy and the first output is not (N, classes).
        values: in the order the device computes them.
        metric: what the executions are judged by.
        measured: the metric of each of `EXECUTIONS`, where it is not accuracy.
        distances: between the outputs of two executions, by a key of `PAIRS`.
    """

    target: str
    machine: Optional[str]
    samples: int
    correct: Optional[dict[str, int]]
    agreeing: dict[str, int]
    values: tuple[ValueParity, ...]
    metric: Metric = ACCURACY
    measured: Optional[dict[str, float]] = None
    distances: dict[str, Distance] = field(default_factory=dict)

    @property
    def accuracy(self) -> dict[str, Optional[float]]:
        """The metric of each execution, by default top-1 accuracy in percent; None without labels."""
        if self.measured is not None:
            return dict(self.measured)
        return {name: None if self.correct is None else self._percent(self.correct[name]) for name in EXECUTIONS}

    @property
    def agreement(self) -> dict[str, float]:
        """Equal top-1 answers of two executions, in percent."""
        return {pair: self._percent(count) for pair, count in self.agreeing.items()}

    @property
    def deviating_samples(self) -> Optional[int]:
        """How many right answers more or fewer the device gives; without labels, how many other answers; None for
        another metric than accuracy."""
        if self.measured is not None:
            return None
        if self.correct is None:
            return self.changed
        return abs(self.correct["integer"] - self.correct["fake_quantised"])

    @property
    def deviation(self) -> float:
        """The same in points (percent of the samples); for another metric, the difference of its values."""
        if self.measured is not None:
            return abs(self.measured["integer"] - self.measured["fake_quantised"])
        return self._percent(self.deviating_samples or 0)

    @property
    def changed(self) -> int:
        """How many samples the device answers otherwise than the fake-quantised network."""
        return self.samples - self.agreeing["integer_fake_quantised"]

    def exceeds(self, bounds: Union[Bounds, float]) -> bool:
        """Return True if the device is beyond the bounds; a number is the `max_deviation` of otherwise default ones."""
        return bool(self.excess(Bounds.of(bounds)))

    def excess(self, bounds: Bounds) -> list[str]:
        """List what is beyond the bounds, in words: the metric, and the predictions or the outputs themselves.

        For accuracy, changed predictions go either way like tossed coins where the device is right, so that their sum
        has a standard error of at most the square root of their number. Two of them are put down to chance, unless the
        bound is 0. This tolerance grows with the changed predictions, so their share has a bound of its own. Another
        metric than accuracy is bounded in its own unit, without a tolerance, together with the distance of the outputs.
        """
        found = []
        if self._deviates(bounds.max_deviation):
            scale = self.metric.scale
            size = scale.number(self.deviation) + scale.points
            found.append(f"a deviation of {size} (verify.max_deviation: {bounds.max_deviation:g})")
        if self.measured is None:
            own = self.samples - self.agreeing["fake_quantised_float"]
            found += bounds.changed(self.changed, self.samples, own)
        elif self.distances:
            near, away, own_distance = (self.distances[pair] for pair in PAIRS)
            found += bounds.excess(near, own_distance, away)
        return found

    def _deviates(self, bound: float) -> bool:
        if self.deviating_samples is None:
            return self.deviation > bound
        chance = STANDARD_ERRORS * self.changed**0.5 if bound > 0 else 0
        return self.deviation > bound and self.deviating_samples > chance

    def first_beyond(self, lsb: int) -> Optional[ValueParity]:
        """The first value, in execution order, with a difference of more than `lsb` steps."""
        return next((value for value in self.values if (value.max_lsb or 0) > lsb), None)

    def to_dict(self, bounds: Union[Bounds, float]) -> dict[str, Any]:
        """As JSON-able data with stable keys; held against the bounds (see `exceeds`)."""
        bounds = Bounds.of(bounds)
        excess = self.excess(bounds)
        return {
            "target": self.target, "machine": self.machine, "samples": self.samples,
            "metric": self.metric.to_dict(), "accuracy": self.accuracy, "agreement": self.agreement,
            "outputs": {pair: found.to_dict() for pair, found in self.distances.items()},
            "deviation": self.deviation, "deviating_samples": self.deviating_samples,
            "max_deviation": bounds.max_deviation, "bounds": asdict(bounds),
            "exceeded": bool(excess), "excess": excess,
            "first_difference": _place(self.first_beyond(0)), "first_beyond_one": _place(self.first_beyond(1)),
            "values": [value.to_dict() for value in self.values],
        }  # fmt: skip

    def _percent(self, count: int) -> float:
        return 100.0 * count / self.samples


def _place(value: Optional[ValueParity]) -> Optional[dict[str, Any]]:
    if value is None:
        return None
    return {"layer": value.layer, "op": value.op, "value": value.value, "max_lsb": value.max_lsb}


# -- the comparison ----------------------------------------------------------------------------------------------------
def compare_execution(
    graph: Graph,
    plan: QuantPlan,
    batches: Iterable[Batch],
    labels: Optional[Arrays] = None,
    machine: str = registry.X86,
    progress: Optional[Progress] = None,
    metric: Metric = ACCURACY,
) -> Parity:
    """Run a network in float, fake-quantised and in integers, and compare every value that all three compute.

    One batch is in memory at a time; `batch_size` says how many samples that may be.

    Args:
        graph: the deployment graph, with the parameters that are exported.
        plan: its plan, every range known.
        batches: arrays (n, ...), or tuples of them for a network with several inputs. Top-1 answers are those of the
            first output, (n, classes).
        labels: int (N,), for accuracies; what `metric` takes, where one is given.
        machine: ``x86`` or ``arm64``, where the builds of MindSpore Lite differ.
        progress: called with the number of samples done.
        metric: what the executions are judged by, all outputs of every sample in memory where it is not accuracy.

    Raises:
        DataError: no batch is given, labels are fewer than samples, or `metric` gives no finite number.
        SimulationError, PlanError, ExportError: as `Device`.
    """
    return _Comparison(graph, plan, Device(graph, plan, machine), metric).run(batches, labels, machine, progress)


def batch_size(graph: Graph, wanted: int) -> int:
    """How many samples a batch of `compare_execution` may have, at most `wanted`, to hold its values in 256 MiB.

    The device computes with batch 1: so does the comparison where predictions depend on the batch.
    """
    if batch_dependence(graph) is not None:
        return 1
    try:
        shapes = concrete_shapes(graph, 1)
    except ExportError:  # a size that MindSpore alone knows: counted as if it were that of the batch
        shapes = {value: tuple(map(abs, graph.shape(value))) for value in graph.values}
    numbers = sum(prod(shapes[value.name]) for value in graph.activations() if value.type is not None)
    held = 2 * np.dtype(np.float32).itemsize * max(numbers, 1)
    return max(1, min(wanted, _BATCH_BYTES // held))


class _Comparison:
    def __init__(self, graph: Graph, plan: QuantPlan, device: Device, metric: Metric) -> None:
        self.graph, self.plan, self.device, self.metric = graph, plan, device, metric
        self.ranked = metric.is_accuracy or len(graph.shape(graph.outputs[0])) == 2
        self.tallies = {tally.tensor: tally for tally in _tallies(graph, plan, device.program)}
        self.names = [tally.value for tally in self.tallies.values()]
        self.outputs = len(graph.outputs)
        self.plain = to_cell(graph, Hooks(observe=self.names))
        self.fake = quantize_cell(graph, plan, observe=self.names)
        self.fake.set_phase(QUANTIZE)
        self.size = 0
        self.answers: dict[str, list[np.ndarray]] = {name: [] for name in EXECUTIONS}
        self.results: dict[str, list[Outputs]] = {name: [] for name in EXECUTIONS}
        self.meters = {pair: DistanceMeter(classes=False) for pair in PAIRS}

    def run(
        self, batches: Iterable[Batch], labels: Optional[Arrays], machine: str, progress: Optional[Progress]
    ) -> Parity:
        done = 0
        for batch in batches:
            arrays = _arrays(batch)
            rows = len(arrays[0])
            size = rows if self.device.simulator.takes_batches else 1
            for start in range(0, rows, size):
                self._add([array[start : start + size] for array in arrays])
            done += rows
            if progress is not None:
                progress(done)
        if not done:
            raise DataError("there are 0 samples to compare; give at least one batch")
        known = done if labels is None else min(map(len, as_tuple(labels)))
        if known < done:
            raise DataError(f"there are {done} samples and {known} labels; each sample needs one")
        agreeing, correct, measured = {}, None, None
        if self.ranked:
            chosen = {name: np.concatenate(parts) for name, parts in self.answers.items()}
            agreeing = {pair: int((chosen[one] == chosen[other]).sum()) for pair, (one, other) in PAIRS.items()}
        if not self.metric.is_accuracy:
            measured = self._measured(None if labels is None else taken(labels, slice(done)), done)
        elif labels is not None:
            expected = np.asarray(labels[:done])
            correct = {name: int((found == expected).sum()) for name, found in chosen.items()}
        values = tuple(tally.result() for tally in self.tallies.values())
        single = self.plan.target == ASCEND.name
        machine_name = None if single else machine
        return Parity(
            self.plan.target, machine_name, done, correct, agreeing, values, self.metric, measured,
            {pair: meter.result() for pair, meter in self.meters.items()},
        )  # fmt: skip

    def _measured(self, labels: Optional[Arrays], samples: int) -> dict[str, float]:
        found = {}
        for name, parts in self.results.items():
            outputs = tuple(np.concatenate(column) for column in zip(*parts))
            found[name] = self.metric(outputs, labels, f"{samples} samples, {name.replace('_', '-')} execution")
        return found

    def _add(self, arrays: Sequence[np.ndarray]) -> None:
        """Compute one batch three times and count."""
        count = len(arrays[0])
        self.size = max(self.size, count)
        tensors = [ms.Tensor(filled(array, self.size)) for array in arrays]  # one shape needs one compilation
        answers: dict[str, Outputs] = {}
        answers["float"], exact = self._observe(self.plain, tensors, count)
        answers["fake_quantised"], raw = self._observe(self.fake, tensors, count)
        program = self.device.program
        outputs: dict[str, np.ndarray] = {}
        for name, data in self.device.trace(*arrays):
            if name in self.tallies:
                tally = self.tallies[name]
                tally.add(exact.pop(tally.value), raw.pop(tally.value), _native(program.tensors[name], data))
            if name in program.outputs:
                outputs[name] = _native(program.tensors[name], data)
        answers["integer"] = tuple(outputs[name] for name in program.outputs)
        for execution, found in answers.items():
            self._answer(execution, found)
        for pair, (one, other) in PAIRS.items():
            self.meters[pair].add(answers[one], answers[other], count)

    def _observe(self, cell: Any, tensors: Sequence[Any], count: int) -> tuple[Outputs, dict[str, np.ndarray]]:
        """Return the outputs and the observed values."""
        results = cell(*tensors)
        results = results if isinstance(results, tuple) else (results,)
        shown = zip(self.graph.outputs, results[: self.outputs])
        outputs = tuple(self._cut(name, item.asnumpy(), count) for name, item in shown)
        observed = zip(self.names, results[self.outputs :])
        return outputs, {name: self._cut(name, item.asnumpy(), count) for name, item in observed}

    def _cut(self, value: str, data: np.ndarray, count: int) -> np.ndarray:
        """The part of a value that the first `count` samples of a filled-up batch gave."""
        shape = self.graph.shape(value)
        if count == self.size or -1 not in shape:
            return data
        axis = shape.index(-1)
        kept = data.shape[axis] // self.size * count
        return data[(slice(None),) * axis + (slice(kept),)]

    def _answer(self, execution: str, outputs: Sequence[np.ndarray]) -> None:
        if self.ranked:
            self.answers[execution].append(outputs[0].reshape(len(outputs[0]), -1).argmax(-1))
        if not self.metric.is_accuracy:
            self.results[execution].append(tuple(outputs))


def _tallies(graph: Graph, plan: QuantPlan, program: Program) -> list[_Tally]:
    """One for every value of the graph that the program computes in the type the plan gives it, in execution order."""
    fused = {node.name: node.fused_into for node in plan.nodes if node.fused_into}
    producers = {output: node for node in graph.nodes for output in node.outputs}
    nodes = {node.name: node for node in graph.nodes}
    found: dict[str, _Tally] = {}
    for name in [*program.inputs, *(output for step in program.steps for output in step.outputs)]:
        tensor = program.tensors[name]
        value = tensor.value
        quantised = value in plan.activations
        if value in found or tensor.dtype != ("int8" if quantised else "float32"):
            continue
        if value not in producers and not (quantised and value in graph.inputs):
            continue
        layer, op = value, "input"
        if value in producers:
            layer = fused.get(producers[value].name, producers[value].name)
            op = nodes[layer].op
        qparams = plan.group_of(value).qparams() if quantised else None
        found[value] = _Tally(tensor, layer, op, qparams)
    return list(found.values())


class _Tally:
    """Counts one value's differences, batch by batch."""

    def __init__(self, tensor: Tensor, layer: str, op: str, qparams: Optional[QParams]) -> None:
        self.tensor, self.value, self.quant = tensor.name, tensor.value, tensor.quant
        self.layer, self.op, self.qparams = layer, op, qparams
        self.count, self.max_lsb = 0, 0
        self.histogram = np.zeros(len(BINS), np.int64)
        self.largest = self.largest_error = 0.0
        self.energy = dict.fromkeys(("float", "fake_quantised"), 0.0)
        self.noise = dict.fromkeys(("fake_quantised", "integer", "integer_fake_quantised"), 0.0)

    def add(self, exact: np.ndarray, raw: np.ndarray, device: np.ndarray) -> None:
        """Compare the value in float, fake-quantised (before it is rounded itself) and on the device."""
        self.count += device.size
        fake, integer = raw, device
        if self.qparams is not None:
            promised = self.qparams.quantize(raw)
            self._compare(device.astype(np.int32) - promised)
            fake, integer = self.qparams.dequantize(promised), self._dequantised(device)
        else:
            self.largest = max(self.largest, float(np.abs(fake).max(initial=0.0)))
            self.largest_error = max(self.largest_error, float(np.abs(integer - fake).max(initial=0.0)))
        self.energy["float"] += _energy(exact)
        self.energy["fake_quantised"] += _energy(fake)
        self.noise["fake_quantised"] += _energy(exact - fake)
        self.noise["integer"] += _energy(exact - integer)
        self.noise["integer_fake_quantised"] += _energy(fake - integer)

    def _compare(self, lsb: np.ndarray) -> None:
        self.histogram += np.bincount(np.clip(lsb, -_EDGE, _EDGE).ravel() + _EDGE, minlength=len(BINS))
        self.max_lsb = max(self.max_lsb, int(np.abs(lsb).max(initial=0)))

    def _dequantised(self, integers: np.ndarray) -> np.ndarray:
        """What the device's integers stand for, by the parameters its own program has."""
        assert self.quant is not None
        scale, zero_point = np.float32(self.quant.scale[0]), self.quant.zero_point[0]
        return np.asarray((integers.astype(np.int32) - zero_point).astype(np.float32) * scale)

    def result(self) -> ValueParity:
        """What was counted."""
        noise, quantised = self.noise, self.qparams is not None
        sqnr = {
            "fake_quantised": _decibel(self.energy["float"], noise["fake_quantised"]),
            "integer": _decibel(self.energy["float"], noise["integer"]),
            "integer_fake_quantised": _decibel(self.energy["fake_quantised"], noise["integer_fake_quantised"]),
        }
        scale = float(self.qparams.scale) if self.qparams is not None else None
        error = self.largest_error / self.largest if self.largest > 0 else self.largest_error
        return ValueParity(
            value=self.value, layer=self.layer, op=self.op, scale=scale, count=self.count,
            histogram=tuple(self.histogram.tolist()) if quantised else (),
            max_lsb=self.max_lsb if quantised else None, relative_error=None if quantised else error, sqnr_db=sqnr,
        )  # fmt: skip


def _energy(values: np.ndarray) -> float:
    flat = values.astype(np.float64).ravel()
    return float(flat @ flat)


def _decibel(signal: float, noise: float) -> Optional[float]:
    return float(10 * np.log10(signal / noise)) if signal > 0 and noise > 0 else None
