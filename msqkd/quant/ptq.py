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
from msqkd.graph.cell import Hooks, to_cell
from msqkd.graph.ir import Graph
from msqkd.quant.fake_quant import FakeQuantWeight
from msqkd.quant.half import check_parameters, check_values, watched, with_half
from msqkd.quant.observers import Observer, make_observer
from msqkd.quant.plan import Group, QuantPlan

Batches = Iterable[Any]
Progress = Callable[[int], None]


def batches_of(dataset: Batches, inputs: int = 1) -> Iterator[tuple[np.ndarray, ...]]:
    """The inputs of a dataset, batch by batch, as arrays of shape (N, ...): integers and booleans as they are, others,
    and uint8, as float32.

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
    return data if data.dtype.kind in "iub" and data.dtype != np.uint8 else data.astype(np.float32)


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
        self.plan = plan
        # A fixed range is known, and one that follows another group's is derived from it.
        self.groups = [group for group in plan.groups.values() if not group.fixed and not group.source]
        if observer is not None:
            self.groups = [replace(group, observer=observer, percentile=percentile) for group in self.groups]
        self.observers: list[Observer] = [_observer(group) for group in self.groups]
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
        for group, observer in zip(self.groups, self.observers):
            observer.update(values[self.places[group.name]].asnumpy(), where=f"value '{group.name}'")

    def ranges(self) -> dict[str, tuple[float, float]]:
        """The range of every group.

        Raises:
            PlanError: nothing was observed.
        """
        return {
            group.name: observer.range(group.bits, group.symmetric, where=f"value '{group.name}'")
            for group, observer in zip(self.groups, self.observers)
        }


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
    """The plan with the ranges that observers find on `dataset`.

    Args:
        graph: the deployment graph.
        plan: its plan.
        dataset: unlabelled batches (see `batches_of`); only one is held at a time.
        iterations: stop after this many batches.
        observer, percentile: override the observers of the plan.
        progress: called with the number of batches done.

    Raises:
        DataError: the dataset gives no batch.
        PlanError: a value is not finite.
    """
    observation = Observation(graph, plan, observer, percentile)
    done = 0
    for done, batch in enumerate(islice(batches_of(dataset, len(graph.inputs)), iterations), start=1):
        observation.update(*batch)
        if progress is not None:
            progress(done)
    if done == 0:
        raise DataError("the calibration set has 0 samples; give at least one batch")
    return plan.with_ranges(observation.ranges())


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
