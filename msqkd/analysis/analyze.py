"""Which layer is wrong, and what to do about it: statistics, sensitivities, diagnoses and outputs of one network."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Optional

import numpy as np

from msqkd.analysis.diagnosis import Diagnosis, diagnose
from msqkd.analysis.layers import decibel, layer_table
from msqkd.analysis.parity import batch_size
from msqkd.analysis.sensitivity import (
    KL,
    Layer,
    Probe,
    Sensitivities,
    SwitchedNetwork,
    loss_kind,
    measured_sensitivity,
    output_loss,
    whole_batches,
)
from msqkd.analysis.statistics import Distribution, value_statistics, weight_statistics
from msqkd.data import Split, as_tuple, subset
from msqkd.errors import PlanError
from msqkd.graph.ir import Graph
from msqkd.progress import Reporter
from msqkd.quant.algorithms.base import Work
from msqkd.quant.algorithms.equalize import Equalize
from msqkd.quant.config import INT8
from msqkd.quant.plan import QuantPlan
from msqkd.quant.ptq import relative_error
from msqkd.train.evaluate import agreement, input_batches, output_arrays
from msqkd.train.metric import ACCURACY, Metric, Outputs

API_VERSION = "msqkd/analysis/v1"
BATCH_SIZE, SENSITIVITY_SAMPLES, SENSITIVITY_SECONDS = 50, 200, 90.0

_BINS = 64  # of the histograms of outputs


@dataclass(frozen=True)
class Analysis:
    """What `analyze` found.

    Attributes:
        network, target: names.
        samples: ``split``, and how many samples were computed: ``statistics`` (outputs too) and ``sensitivity``.
        metric: as `msqkd.train.metric.Metric.to_dict`.
        layers: one row a layer in execution order: `name`, `op`, `value`, `rank` (1 does most harm), `border` (where
            its value crosses between float and int8; None inside), `sqnr_db`, `cosine`, `only_loss`, `only_metric`,
            `float_loss`, `float_metric` (see `msqkd.analysis.sensitivity.Sensitivity`), `cumulative_sqnr_db` (see
            `msqkd.analysis.layers.layer_table`, None where its value has another's scale), `weight` and `activation`
            (settings, ranges and `statistics`; None where it has none).
        sensitivity: what the layers are held against.
        outputs: the outputs with nothing and with everything quantised.
        diagnoses: the bad layers, the worst first.
        seconds: how long it took.
    """

    network: str
    target: str
    samples: dict[str, Any]
    metric: dict[str, Any]
    layers: list[dict[str, Any]]
    sensitivity: Sensitivities
    outputs: dict[str, Any]
    diagnoses: list[Diagnosis]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data with stable keys."""
        found = self.sensitivity
        return {
            "apiversion": API_VERSION,
            "network": self.network,
            "target": self.target,
            "samples": dict(self.samples),
            "seconds": self.seconds,
            "metric": dict(self.metric),
            "loss": found.loss,
            "sensitivity": {
                "samples": found.samples,
                "quantised_loss": found.quantised_loss,
                "float_metric": found.float_metric,
                "quantised_metric": found.quantised_metric,
            },
            "ranking": [row.name for row in found.ranked()],
            "diagnoses": [diagnosis.to_dict() for diagnosis in self.diagnoses],
            "outputs": dict(self.outputs),
            "layers": list(self.layers),
        }


def analyze(
    graph: Graph,
    plan: QuantPlan,
    reference: Graph,
    samples: Split,
    *,
    base: Optional[Graph] = None,
    metric: Metric = ACCURACY,
    batch: int = BATCH_SIZE,
    sensitivity_samples: Optional[int] = None,
    methods: bool = False,
    reporter: Optional[Reporter] = None,
) -> Analysis:
    """Examine a quantised network, layer by layer.

    Three compilations serve everything: the float network, the fake-quantised one, and one whose layers are switched.

    Args:
        graph: the deployment graph with the quantised network's parameters.
        plan: its plan, every range known.
        reference: the deployment graph of the float network (same value names), for the cumulative noise.
        samples: two passes for the statistics and the outputs; with labels where the metric is wanted. What does not
            fill a last batch is left out.
        base: a graph with the same nodes whose parameters a layer has while it is float; `graph` by default. It
            differs where a method has rounded or corrected parameters for quantisation.
        metric: of the outputs. With accuracy, the layers of a classifier are judged by the divergence of its logits;
            those of any other network by the relative error of its outputs.
        batch: samples a batch, at most.
        sensitivity_samples: of `samples`, so many at most are computed twice a layer, and again for the bad ones. None
            takes 200, or fewer where these would take more than 90 seconds.
        methods: methods of post-training quantisation are possible: equalisation is tried as a remedy.
        reporter: where progress is told.

    Raises:
        PlanError: no layer is quantised, a range is not known, or a value is not finite.
        DataError: there are no samples, or the metric gives no finite number.
    """
    begin = time.monotonic()
    reporter = reporter or Reporter(quiet=True)
    network = SwitchedNetwork(graph, plan, base)
    if not network.layers:
        raise PlanError(f"no layer of {graph.name} is quantised: there is nothing to analyse")
    wanted = SENSITIVITY_SAMPLES if sensitivity_samples is None else sensitivity_samples
    size = min(batch_size(graph, batch), len(subset(samples, wanted)))
    samples = whole_batches(samples, size)
    values, exact = _float_pass(network, samples, size, reporter)
    passed = time.monotonic()
    rounded = _quantised_pass(network, samples, size)
    if sensitivity_samples is None:
        once = (time.monotonic() - passed) * (2 * len(network.layers) + 2)  # all samples, every layer
        wanted = min(wanted, int(len(samples) * SENSITIVITY_SECONDS / once))
    few = whole_batches(subset(samples, max(wanted, size)), size)
    kind = loss_kind(graph, metric)
    with reporter.task("layer by layer", (2 * len(network.layers) + 2) * (len(few) // size)) as task:
        found = measured_sensitivity(network, few, size, metric, kind, task.update)
    plain = base or graph
    weights = weight_statistics(plain, network.plan)
    equalised = partial(_equalised, plain, network.plan, few, size) if methods else None
    diagnoses = diagnose(plain, Probe(network, few, size, kind), found, values, weights, equalised)
    table = layer_table(graph, network.plan, reference, input_batches(few, size))
    return Analysis(
        network=graph.name,
        target=plan.target,
        samples={"split": samples.name, "statistics": len(samples), "sensitivity": len(few)},
        metric=metric.to_dict(),
        layers=_rows(graph, network, found, table, values, weights),
        sensitivity=found,
        outputs=_compared(exact, rounded, samples, metric, kind),
        diagnoses=diagnoses,
        seconds=time.monotonic() - begin,
    )


def _float_pass(
    network: SwitchedNetwork, samples: Split, size: int, reporter: Reporter
) -> tuple[dict[str, Distribution], Outputs]:
    """The distributions of all values of the float network, and its outputs."""
    outputs: list[Outputs] = []

    def shown(*inputs: Any) -> Sequence[Any]:
        found, values = network(*inputs)
        outputs.append(tuple(output.asnumpy() for output in found))
        return values

    network.turn(())
    with reporter.task("distributions", len(samples)) as task:
        values = value_statistics(shown, network.values, input_batches(samples, size), task.update)
    return values, tuple(np.concatenate(column) for column in zip(*outputs))


def _quantised_pass(network: SwitchedNetwork, samples: Split, size: int) -> Outputs:
    network.turn(network.names)
    found = output_arrays(lambda *inputs: network(*inputs)[0], samples, size)
    network.turn(())
    return found


def _equalised(graph: Graph, plan: QuantPlan, samples: Split, size: int) -> Graph:
    """The graph with the weights that equalisation gives it; biases are left alone."""

    def batches() -> Iterator[tuple[np.ndarray, ...]]:
        return map(as_tuple, input_batches(samples, size))

    work = Work(graph.copy(), plan, batches)
    Equalize(absorb=False).apply(work)
    return work.graph


def _compared(exact: Outputs, rounded: Outputs, samples: Split, metric: Metric, kind: str) -> dict[str, Any]:
    """The outputs with nothing and with everything quantised, in numbers and histograms."""
    reached = {
        name: None if samples.labels is None else metric(outputs, samples.labels, samples.name)
        for name, outputs in (("float", exact), ("quantised", rounded))
    }
    return {
        "samples": len(samples),
        "metric": reached,
        "loss": output_loss(rounded, exact, kind),
        "relative_error": relative_error(rounded, exact),
        "agreement": agreement(rounded[0], exact[0]) if kind == KL else None,
        "values": [_one_output(one, other) for one, other in zip(exact, rounded)],
    }


def _one_output(exact: np.ndarray, rounded: np.ndarray) -> dict[str, Any]:
    both = {"float": exact.astype(np.float64), "quantised": rounded.astype(np.float64)}
    low, high = min(x.min() for x in both.values()), max(x.max() for x in both.values())
    edges = np.linspace(low, high if high > low else low + 1.0, _BINS + 1)
    difference = both["quantised"] - both["float"]
    return {
        "sqnr_db": decibel(float(np.square(both["float"]).sum()), float(np.square(difference).sum())),
        "max_abs_diff": float(np.abs(difference).max()),
        "mean_diff": float(difference.mean()),
        **{
            name: {"min": x.min(), "max": x.max(), "mean": x.mean(), "std": x.std()}
            for name, x in ((key, both[key]) for key in both)
        },
        "histogram": {
            "edges": edges.tolist(),
            **{name: np.histogram(x, edges)[0].tolist() for name, x in both.items()},
        },
    }


def _rows(
    graph: Graph,
    network: SwitchedNetwork,
    found: Sensitivities,
    table: Sequence[dict[str, Any]],
    values: dict[str, Distribution],
    weights: dict[str, Distribution],
) -> list[dict[str, Any]]:
    by_value = {row["value"]: row for row in table}
    ranks = {row.name: rank for rank, row in enumerate(found.ranked(), start=1)}
    rows = []
    for layer, row in zip(network.layers, found.layers):
        held = by_value.get(layer.value, {})
        weight = next((weights[name].to_dict() for name in layer.weights), None)
        rounded = layer.value in network.plan.activations
        rows.append(
            {
                "name": layer.name,
                "op": layer.op,
                "value": layer.value,
                "rank": ranks[layer.name],
                "border": _border(graph, network.plan, layer.value),
                "sqnr_db": row.sqnr_db,
                "cosine": row.cosine,
                "cumulative_sqnr_db": held.get("sqnr_db"),
                "only_loss": row.only_loss,
                "only_metric": row.only_metric,
                "float_loss": row.float_loss,
                "float_metric": row.float_metric,
                "weight": {**_weight_of(network.plan, layer), **(held.get("weight") or {}), "statistics": weight}
                if weight
                else None,
                "activation": {**_range_of(network.plan, layer.value), "statistics": values[layer.value].to_dict()}
                if rounded
                else None,
            }
        )
    return rows


def _weight_of(plan: QuantPlan, layer: Layer) -> dict[str, Any]:
    quant = plan.weights[layer.weights[0]]
    return {"bits": quant.bits, "per_channel": quant.axis is not None}


def _range_of(plan: QuantPlan, value: str) -> dict[str, Any]:
    group = plan.group_of(value)
    qparams = group.qparams()
    return {
        "lo": float(qparams.lo), "hi": float(qparams.hi), "scale": float(qparams.scale),
        "zero_point": int(qparams.zero_point), "bits": group.bits,
    }  # fmt: skip


def _border(graph: Graph, plan: QuantPlan, value: str) -> Optional[str]:
    """Where a value passes between float and int8: ``input``, ``output``, ``float to int8`` or ``int8 to float``."""
    if value in graph.inputs:
        return "input"
    if value in graph.outputs:
        return "output"
    node = graph.producer(value)
    inside = node is not None and plan.node(node.name).precision == INT8
    readers = [plan.node(reader.name).precision == INT8 for reader in graph.consumers(value)]
    if not inside and any(readers):
        return "float to int8"
    return "int8 to float" if inside and not all(readers) else None
