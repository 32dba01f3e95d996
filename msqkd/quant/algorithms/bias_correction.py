"""Bias correction: the mean error that rounding leaves in a layer's output, taken out of its bias.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv:1906.04721, §4.2
(analytic) and appendix D (empirical); Nagel et al. 2021, arXiv:2106.08295, §4.2.

A layer is linear, so the mean of its output follows from the mean of what its windows hold: E[y] = W · E[x] + b. No
layer has to be run for it; E[x] is taken for every place of the window, zeros of the padding included.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from msqkd.errors import PlanError, did_you_mean
from msqkd.graph.ir import Graph, Node
from msqkd.quant.algorithms.base import INTEGER_STAGE, Method, Work
from msqkd.quant.algorithms.biases import layers, own
from msqkd.quant.algorithms.channels import watch
from msqkd.quant.algorithms.stream import Stream, samples_that_fit
from msqkd.quant.plan import QuantPlan

EMPIRICAL, ANALYTIC = "empirical", "analytic"
KINDS = (EMPIRICAL, ANALYTIC)


@dataclass
class BiasCorrection(Method):
    """Add to every bias what the layer's output has lost in the mean (arXiv:1906.04721).

    The network to agree with is `work.reference`: other methods may have rounded the weights of `work.graph` already.

    Attributes:
        kind: ``empirical`` goes through the quantised network in execution order: b + W · E[x] − Ŵ · E[x̂], with x̂
            what arrives there when all layers before are quantised and corrected. It takes as many of the first samples
            as fit into memory (`samples_that_fit`). ``analytic`` takes out what the weight's own rounding makes of the
            float input, b − (Ŵ − W) · E[x], with E[x] from all samples where the paper derives it from BatchNorm.
    """

    name: ClassVar[str] = "bias_correction"
    stage: ClassVar[str] = INTEGER_STAGE

    kind: str = EMPIRICAL

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PlanError(
                f"bias_correction.kind is '{self.kind}'; allowed: {', '.join(KINDS)}{did_you_mean(self.kind, KINDS)}"
            )

    def apply(self, work: Work) -> list[str]:
        """Change the biases of `work.graph`, float32 (O,)."""
        graph, plan = work.graph, work.plan.with_weight_observers(work.graph)
        nodes = [node for node in layers(graph) if node.name in plan.weights and len(node.inputs) == 3]
        shared = [node.name for node in nodes if not own(graph, node.inputs[2])]
        nodes = [node for node in nodes if node.name not in shared]
        if not nodes:
            return ["no quantised layer has a bias of its own: nothing to correct"]
        correct = _empirically if self.kind == EMPIRICAL else _analytically
        shifts, how = correct(work, plan, nodes)
        first = max(shifts, key=lambda name: shifts[name])
        told = [f"biases corrected: {len(nodes)} ({how}, by {shifts[first]:.2g} at most, in {first})"]
        if shared:
            told.append(f"not corrected, since others have the same bias: {', '.join(shared)}")
        return told


def _empirically(work: Work, plan: QuantPlan, nodes: list[Node]) -> tuple[dict[str, float], str]:
    """Returns the largest change by layer, and how they were found."""
    graph, float_graph = work.graph, work.reference
    batches = samples_that_fit(graph, work.samples)
    exact = _mean_inputs(float_graph, batches, nodes)
    stream = Stream(graph, batches, plan)
    shifts = {}
    for done, node in enumerate(nodes, start=1):
        arriving = _Mean()
        for array in stream.arriving(node, 0):
            arriving.update(array)
        weight = graph.params[node.inputs[1]].data
        wanted = _mean_output(graph, node, float_graph.params[node.inputs[1]].data, exact[node.inputs[0]])
        found = _mean_output(graph, node, _rounded(plan, node, weight), arriving)
        shifts[node.name] = _shift(work, node, wanted - found)
        work.progress(done, len(nodes))
    return shifts, f"{EMPIRICAL}, {stream.samples} samples"


def _analytically(work: Work, plan: QuantPlan, nodes: list[Node]) -> tuple[dict[str, float], str]:
    graph, float_graph = work.graph, work.reference
    means = _mean_inputs(float_graph, work.samples(), nodes)
    shifts = {}
    for node in nodes:
        rounded = _rounded(plan, node, graph.params[node.inputs[1]].data)
        change = rounded.astype(np.float64) - float_graph.params[node.inputs[1]].data
        shifts[node.name] = _shift(work, node, -_mean_output(graph, node, change, means[node.inputs[0]]))
    return shifts, ANALYTIC


class _Mean:
    """The mean of a value (N, ...) over samples, float64 (...)."""

    def __init__(self) -> None:
        self.total, self.number = np.zeros(()), 0

    def update(self, array: np.ndarray) -> None:
        self.total = self.total + array.sum(0, dtype=np.float64)
        self.number += len(array)

    def value(self) -> np.ndarray:
        return self.total / self.number


def _mean_inputs(graph: Graph, batches: Iterable[tuple[np.ndarray, ...]], nodes: list[Node]) -> dict[str, _Mean]:
    """What the layers read in the float network."""
    means = {node.inputs[0]: _Mean() for node in nodes}
    watch(graph, batches, list(means), lambda name, array: means[name].update(array))
    return means


def _rounded(plan: QuantPlan, node: Node, weight: np.ndarray) -> np.ndarray:
    return plan.weights[node.name].qparams(weight).fake_quantize(weight)


def _mean_output(graph: Graph, node: Node, weight: np.ndarray, mean: _Mean) -> np.ndarray:
    """The mean of the output over samples and positions, without the bias: float64 (O,)."""
    held = mean.value()
    if node.op == "Dense":
        return np.asarray(weight.astype(np.float64) @ held)
    windows = _mean_windows(node, held, graph.shape(node.output)[2:], weight.shape[2:])
    groups = int(node.attrs.get("group", 1))
    rows = weight.astype(np.float64).reshape(groups, weight.shape[0] // groups, -1)
    return np.einsum("goi,gi->go", rows, windows.reshape(groups, -1)).reshape(-1)


def _mean_windows(node: Node, mean: np.ndarray, results: tuple[int, ...], kernel: tuple[int, ...]) -> np.ndarray:
    """The mean over positions of every place of a window, (C, rows, columns), from the mean map (C, H, W)."""
    top, bottom, left, right = node.attrs["pad_list"]
    strides, dilations = node.attrs["stride"][-2:], node.attrs["dilation"][-2:]
    padded = np.pad(mean, ((0, 0), (top, bottom), (left, right)))
    found = np.empty((*kernel, len(mean)))
    for place in np.ndindex(*kernel):
        rows, columns = (
            slice(at * gap, at * gap + (count - 1) * step + 1, step)
            for at, gap, count, step in zip(place, dilations, results, strides)
        )
        found[place] = padded[:, rows, columns].mean((1, 2))
    return np.moveaxis(found, -1, 0)


def _shift(work: Work, node: Node, amount: np.ndarray) -> float:
    """Make the bias of a layer the float one plus an amount (O,); returns the largest amount."""
    name = node.inputs[2]
    work.deploy(name, work.reference.params[name].data + amount)
    return float(np.abs(amount).max())
