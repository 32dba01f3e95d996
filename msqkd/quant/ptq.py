"""Calibration (post-training quantisation): ranges of activations from unlabelled samples, one batch in memory at a
time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Callable, Optional

import mindspore as ms
import numpy as np

from msqkd.errors import DataError
from msqkd.graph.batches import check_shapes
from msqkd.graph.cell import Hooks, to_cell
from msqkd.graph.ir import Graph
from msqkd.quant.fake_quant import FakeQuantWeight
from msqkd.quant.half import check_parameters, check_values, watched, with_half
from msqkd.quant.observers import Magnitudes, Observer, make_observer
from msqkd.quant.plan import Group, QuantPlan

_MOST, _WIDE = 0.999, 100.0
"""A range more than so many times as wide as this share of its values leaves them about two integers on each side."""

CALIBRATION_OBSERVER = "percentile"
"""What ranges are measured with where nothing else is asked for: every batch counts alike. A moving average suits
training, where it has many steps."""

Batches = Iterable[Any]
Progress = Callable[[int], None]


def samples_of(dataset: Batches, graph: Graph) -> Iterator[tuple[np.ndarray, ...]]:
    """The batches of `batches_of`, as the inputs of `graph` take them.

    Raises:
        DataError: an item has fewer arrays than the network has inputs, or one is of another kind (float, integer,
            boolean) than the input: a recipe refuses such data too.
    """
    kinds = [graph.values[name].type for name in graph.inputs]
    wanted = [kind.dtype if kind is not None else "float32" for kind in kinds]
    for batch in batches_of(dataset, len(wanted)):
        yield tuple(map(_fitted, batch, wanted, graph.inputs))


def _fitted(array: np.ndarray, wanted: str, name: str) -> np.ndarray:
    kinds = {"f": "f", "b": "b"}.get(np.dtype(wanted).kind, "iu")
    if array.dtype.kind not in kinds:
        cure = "convert the samples as for inference"
        if array.dtype == np.uint8:
            cure += ", for instance to float32 (image / 255 - mean) / std"
        raise DataError(
            f"calibration set: the array for input '{name}' is {array.dtype}, the network takes {wanted}; {cure}"
        )
    return array.astype(wanted, copy=False)


def batches_of(dataset: Batches, inputs: int = 1) -> Iterator[tuple[np.ndarray, ...]]:
    """The inputs of a dataset, batch by batch, as arrays of shape (N, ...): floating types as float32, others as they
    are.

    Args:
        dataset: a MindSpore dataset, or an iterable of arrays, Tensors, or tuples, lists or dictionaries that begin
            with the inputs.
        inputs: how many inputs the network has; what an item has beyond them is not read.

    Raises:
        DataError: an item has fewer.
    """
    source: Any = dataset
    if hasattr(dataset, "create_tuple_iterator"):
        source = dataset.create_tuple_iterator(num_epochs=1, output_numpy=True)
    for item in source:
        if isinstance(item, Mapping):
            item = tuple(item.values())
        columns = item[:inputs] if isinstance(item, (tuple, list)) else (item,)
        if len(columns) < inputs:
            raise DataError(
                f"an item of the calibration set has {len(columns)} arrays; the network has {inputs} inputs"
            )
        yield tuple(_input(column) for column in columns)


def _input(column: Any) -> np.ndarray:
    data = np.asarray(column.asnumpy() if isinstance(column, ms.Tensor) else column)
    return data if data.dtype.kind in "iub" else data.astype(np.float32)


def in_random_order(batches: Sequence[tuple[np.ndarray, ...]], seed: int) -> list[tuple[np.ndarray, ...]]:
    """Return the samples of all batches in a random order, in batches of the same sizes.

    Args:
        batches: arrays (N, ...) a batch, one for each input, of the same shapes but for N; one batch or more.
        seed: of the order.
    """
    sizes = [len(batch[0]) for batch in batches]
    order = np.random.default_rng(seed).permutation(sum(sizes))
    ends = np.cumsum(sizes)[:-1]
    columns = [np.split(np.concatenate(column)[order], ends) for column in zip(*batches)]
    return list(zip(*columns))


class Observation:
    """A network that shows the values a plan quantises, while their observers watch.

    Args:
        graph: the deployment graph, with its current parameters.
        plan: whose groups are observed (each at the value its name says) and whose weights are quantised.
        observer, percentile: one observer for every group, instead of each group's own.

    Raises:
        PlanError: float16 cannot hold a parameter of a layer that computes in it.
    """

    def __init__(
        self, graph: Graph, plan: QuantPlan, observer: Optional[str] = None, percentile: float = 99.99
    ) -> None:
        self.graph, self.plan = graph, plan
        # A fixed range is known, and one that follows another group's is derived from it.
        self.groups = [group for group in plan.groups.values() if not group.fixed and not group.source]
        if observer is not None:
            self.groups = [replace(group, observer=observer, percentile=percentile) for group in self.groups]
        self.observers: list[Observer] = [_observer(group) for group in self.groups]
        self.magnitudes = [Magnitudes() for _ in self.groups]
        edges = {
            (name, quant.index): FakeQuantWeight(quant, graph.shape(graph.node(name).inputs[quant.index]))
            for name, quant in plan.with_weight_observers(graph).weights.items()
        }
        check_parameters(graph, plan)
        self.half = watched(graph, plan)
        observed = dict.fromkeys([*(group.name for group in self.groups), *self.half])
        self.places = {name: place for place, name in enumerate(observed)}
        self.cell = to_cell(graph, with_half(Hooks(edges=edges, observe=list(observed)), graph, plan))
        self.outputs = len(graph.outputs)

    def update(self, *batch: np.ndarray) -> None:
        """Observe one batch, an array (N, ...) for each input of the network.

        Raises:
            PlanError: a value is not finite, or one of a float16 layer is beyond what that can hold.
        """
        values = self.cell(*map(ms.Tensor, batch))[self.outputs :] if self.places else ()
        for name, layer in self.half.items():
            check_values(layer, name, values[self.places[name]].asnumpy(), self.plan)
        for group, observer, magnitudes in zip(self.groups, self.observers, self.magnitudes):
            value = values[self.places[group.name]].asnumpy()
            observer.update(value, where=f"value '{group.name}'")
            magnitudes.update(value)

    def ranges(self) -> dict[str, tuple[float, float]]:
        """The range of every group.

        Raises:
            PlanError: nothing was observed.
        """
        return {
            group.name: observer.range(group.bits, group.symmetric, where=f"value '{group.name}'")
            for group, observer in zip(self.groups, self.observers)
        }

    def warnings(self, ranges: Mapping[str, tuple[float, float]]) -> list[str]:
        """Name the values whose range is so wide that nearly all of their numbers fall on a few integers."""
        found = []
        for group, magnitudes in zip(self.groups, self.magnitudes):
            name, (low, high) = group.name, ranges[group.name]
            reach, most = max(-low, high), magnitudes.quantile(_MOST)
            if most > 0 and reach > _WIDE * most:
                node = self.graph.producer(name)
                what = f"the result of {node.name} ({node.op})" if node is not None else f"the input '{name}'"
                layers = f"{node.name} and what reads it" if node is not None else "what reads it"
                found.append(
                    f"{what}: its range is [{low:.4g}, {high:.4g}], but {_MOST:.1%} of its values lie within "
                    f"±{most:.3g}, on a few integers; leave outliers out (calibration.observer percentile with a lower "
                    f"percentile), or keep {layers} in float (a rule with precision float)"
                )
        return found


def _observer(group: Group) -> Observer:
    options = {"percentile": group.percentile} if group.observer == "percentile" else {}
    return make_observer(group.observer, **options)


def calibrate(
    graph: Graph,
    plan: QuantPlan,
    dataset: Batches,
    *,
    iterations: Optional[int] = None,
    observer: Optional[str] = None,
    percentile: float = 99.99,
    progress: Optional[Progress] = None,
) -> QuantPlan:
    """The plan with the ranges that observers find on `dataset`, and a warning for each that is far too wide.

    Args:
        graph: the deployment graph.
        plan: its plan.
        dataset: unlabelled batches (see `samples_of`); only one is held at a time.
        iterations: stop after this many batches.
        observer, percentile: override the observers of the plan.
        progress: called with the number of batches done.

    Raises:
        DataError: the dataset gives no batch, or one the network does not take.
        PlanError: a value is not finite.
    """
    observation = Observation(graph, plan, observer, percentile)
    done = 0
    for done, batch in enumerate(islice(samples_of(dataset, graph), iterations), start=1):
        check_shapes(graph, batch, f"batch {done} of the calibration set")
        observation.update(*batch)
        if progress is not None:
            progress(done)
    if done == 0:
        raise DataError("the calibration set has 0 samples; give at least one batch")
    ranges = observation.ranges()
    warnings = dict.fromkeys([*plan.warnings, *observation.warnings(ranges)])
    return replace(plan.with_ranges(ranges), warnings=list(warnings))


def keep_trained(plan: QuantPlan, calibrated: QuantPlan) -> QuantPlan:
    """The calibrated plan with the ranges and scales of `plan` where those were trained: the weights have grown
    together with them, and they are not measured anew.

    Args:
        plan: of the trained network.
        calibrated: the same with the ranges that observers have found.
    """
    trained = {name: span for name, span in plan.ranges().items() if plan.groups[name].scale is not None}
    return replace(plan.with_ranges({**calibrated.ranges(), **trained}), warnings=calibrated.warnings)


def relative_error(answers: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> float:
    """Root mean square of the difference over that of the reference, the mean of all outputs; the calibration loss of
    networks whose outputs are not logits."""
    return float(np.mean([_relative_error(one, other) for one, other in zip(answers, reference)]))


def _relative_error(answers: np.ndarray, reference: np.ndarray) -> float:
    exact = reference.astype(np.float64)
    noise, signal = (float(np.square(array).mean()) for array in (answers - exact, exact))
    return float(np.sqrt(noise / signal)) if signal > 0 else float(noise > 0)


def divergence(answers: np.ndarray, reference: np.ndarray) -> float:
    """Mean KL(softmax(reference) ‖ softmax(answers)) of logits (N, classes), the calibration loss of classifiers.

    A class whose logit is −inf in the reference adds nothing.

    Raises:
        ValueError: The outputs are not logits of shape (N, classes).
    """
    if reference.ndim != 2 or answers.shape != reference.shape:
        raise ValueError(f"logits (N, classes) are needed, found {answers.shape} and {reference.shape}")
    wanted, found = _log_softmax(reference), _log_softmax(answers)
    possible = wanted > -np.inf
    difference = np.where(possible, wanted, 0.0) - np.where(possible, found, 0.0)
    return float((np.exp(wanted) * difference).sum(-1).mean())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
