"""Clip ratios of weights that change the outputs of layers least."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Optional

import numpy as np

from msqkd.errors import PlanError
from msqkd.graph.ir import Graph, Node
from msqkd.quant.algorithms.base import INTEGER_STAGE, Method, Work
from msqkd.quant.algorithms.stream import Stream, samples_that_fit, why_not_alone
from msqkd.quant.plan import WeightQuant
from msqkd.quant.qparams import weight_qparams
from msqkd.quant.uses import PRODUCTS, weight_use

_FEWEST_ROWS, _MOST_ROWS = 2**12, 2**16
_PRODUCTS = 2**34
"""The multiplications that Xᵀ X of a layer may cost, unless it has so many inputs that the fewest rows cost more."""


@dataclass
class SequentialMSE(Method):
    """Layer by layer, the part of max|w| at which the layer's output changes least.

    The error of an output channel with weights w, for the inputs X that arrive in the quantised network, is

        ‖X (ŵ − w)‖² = (ŵ − w)ᵀ G (ŵ − w),   G = Xᵀ X

    with a convolution's windows as the rows of X. G is gathered once, each ratio then costs a product of matrices. The
    layers before are quantised with the ratios found for them. Of equal errors the widest range wins; the ratio in
    force before is a candidate too, so that no layer gets worse on the samples. The criterion is that of the output
    reconstruction in Nagel et al. 2021 (arXiv:2106.08295), the search in order that of AIMET's sequential MSE.

    X are up to 65536 rows, in equal parts from all samples, and fewer (4096 at least) the more inputs a channel has.

    Attributes:
        candidates: how many ratios are tried, evenly from `lowest` to 1; 2 to 1000.
        lowest: the smallest of them; above 0, below 1.
    """

    candidates: int = 32
    lowest: float = 0.4

    name: ClassVar[str] = "weight_ranges"
    stage: ClassVar[str] = INTEGER_STAGE

    def __post_init__(self) -> None:
        if not 2 <= self.candidates <= 1000:
            raise PlanError(f"weight_ranges.candidates is {self.candidates}; allowed: 2 to 1000")
        if not 0 < self.lowest < 1:
            raise PlanError(f"weight_ranges.lowest is {self.lowest}; allowed: above 0, below 1")

    def apply(self, work: Work) -> list[str]:
        """Set the clip ratios; float32 (C,) or (), as `msqkd.quant.qparams.weight_qparams` takes them."""
        graph = work.graph
        work.plan = work.plan.with_weight_observers(graph)
        stream = Stream(graph, samples_that_fit(graph, work.samples), work.plan)
        layers = [node for node in graph.nodes if node.name in work.plan.weights]
        told, falls = [], []
        for number, node in enumerate(layers):
            work.progress(number, len(layers))
            quant = work.plan.weights[node.name]
            obstacle = _obstacle(graph, node, quant)
            if obstacle is not None:
                told.append(f"{node.name}: left as it is, {obstacle}")
                continue
            moments = _Moments(graph, node, stream, np.random.default_rng([work.seed, number]))
            ratio, before, after = self._search(work.reference.params[node.inputs[1]].data, quant, moments)
            if before > 0:
                falls.append(after / before)
            work.plan = replace(work.plan, weights={**work.plan.weights, node.name: replace(quant, clip_ratio=ratio)})
            stream.plan = work.plan
        work.progress(len(layers), len(layers))
        fall = f", and their outputs' squared error to {np.mean(falls):.2f} of what it was on average" if falls else ""
        count = len(layers) - len(told)
        return [f"clip ratios of {count} weights searched on {stream.samples} samples{fall}", *told]

    def _search(self, weight: np.ndarray, quant: WeightQuant, moments: _Moments) -> tuple[np.ndarray, float, float]:
        """The best ratios, and the error with those before and with them."""

        def errors(ratio: np.ndarray) -> np.ndarray:
            qparams = weight_qparams(weight, quant.bits, quant.axis, ratio, where=quant.node)
            found = moments.errors(qparams.fake_quantize(weight).astype(np.float64) - weight)
            return found.sum() if quant.axis is None else found

        best = np.asarray(quant.kept_part, np.float32)
        least = before = errors(best)
        best = np.broadcast_to(best, least.shape)
        for ratio in np.linspace(1.0, self.lowest, self.candidates, dtype=np.float32):
            found = errors(ratio)
            better = found < least
            best, least = np.where(better, ratio, best), np.where(better, found, least)
        return best.astype(np.float32), float(before.sum()), float(least.sum())


def _obstacle(graph: Graph, node: Node, quant: WeightQuant) -> Optional[str]:
    if quant.scale is not None:
        return "its scale is fixed already"
    obstacle = why_not_alone(graph, node, quant.index)
    if obstacle is not None:
        return obstacle
    if node.op not in ("Conv2D", "Dense", *PRODUCTS) or len(graph.shape(node.inputs[1])) != (
        4 if node.op == "Conv2D" else 2
    ):
        return f"the error of the output of a {node.op} is not computed from its inputs alone"
    if node.op in PRODUCTS and len(node.inputs) > 2 and graph.const(node.inputs[2]):
        return "its input is transposed"
    return None


class _Moments:
    """Xᵀ X of what a layer's weights are multiplied with, or X itself where that is smaller.

    Weights are seen as (groups, channels of a group, inputs of a channel).
    """

    def __init__(self, graph: Graph, node: Node, stream: Stream, random: np.random.Generator) -> None:
        self.graph, self.node = graph, node
        self.groups = int(node.attrs.get("group", 1)) if node.op == "Conv2D" else 1
        inputs = self._rows_of_weight(graph.params[node.inputs[1]].data).shape[-1]
        rows = min(max(_PRODUCTS // inputs**2, _FEWEST_ROWS), _MOST_ROWS)
        self.is_gram = rows >= inputs
        most = max(rows // stream.samples, 1)
        parts = []
        gram = np.zeros((self.groups, inputs, inputs) if self.is_gram else 0)
        for values in stream.arriving(node, 0):
            part = self._windows(values, most, random) if node.op == "Conv2D" else _chosen(values, most, random)
            if self.is_gram:
                gram += part.transpose(0, 2, 1) @ part
            else:
                parts.append(part)
        self.held = gram if self.is_gram else np.concatenate(parts, axis=1)

    def errors(self, difference: np.ndarray) -> np.ndarray:
        """The squared error that a change of the weight makes in each output channel: float64 (C,)."""
        rows = self._rows_of_weight(difference)
        if self.is_gram:
            return np.einsum("gci,gci->gc", rows @ self.held, rows).reshape(-1)
        return np.square(rows @ self.held.transpose(0, 2, 1)).sum(-1).reshape(-1)

    def _rows_of_weight(self, weight: np.ndarray) -> np.ndarray:
        if self.node.op == "Conv2D":
            return weight.reshape(self.groups, len(weight) // self.groups, -1)
        use = weight_use(self.graph, self.node)
        assert use is not None
        return (weight.T if use.axis == 1 else weight)[None]

    def _windows(self, values: np.ndarray, most: int, random: np.random.Generator) -> np.ndarray:
        """The windows of a convolution at up to `most` places a sample, float64 (groups, rows, inputs)."""
        node, attrs = self.node, self.node.attrs
        kernel, stride, dilation = self.graph.shape(node.inputs[1])[2:], attrs["stride"][-2:], attrs["dilation"][-2:]
        top, bottom, left, right = attrs["pad_list"]
        padded = np.pad(values, ((0, 0), (0, 0), (top, bottom), (left, right)))
        sizes = [
            (size - (window - 1) * step - 1) // jump + 1
            for size, window, step, jump in zip(padded.shape[2:], kernel, dilation, stride)
        ]
        places = np.sort(random.permutation(sizes[0] * sizes[1])[:most])
        down = (places // sizes[1] * stride[0])[:, None] + np.arange(kernel[0]) * dilation[0]
        across = (places % sizes[1] * stride[1])[:, None] + np.arange(kernel[1]) * dilation[1]
        windows = padded[:, :, down[:, :, None], across[:, None, :]]  # (N, C, places, rows, columns)
        samples, channels = values.shape[:2]
        windows = windows.reshape(samples, self.groups, channels // self.groups, len(places), -1)
        rows = windows.transpose(1, 0, 3, 2, 4).reshape(self.groups, samples * len(places), -1)
        return rows.astype(np.float64)


def _chosen(values: np.ndarray, most: int, random: np.random.Generator) -> np.ndarray:
    """Up to `most` rows a sample of the input of a dense layer, (1, rows, inputs) float64."""
    by_sample = values.reshape(len(values), -1, values.shape[-1])
    places = np.sort(random.permutation(by_sample.shape[1])[:most])
    return by_sample[:, places].reshape(1, -1, values.shape[-1]).astype(np.float64)
