"""The methods by name, and their application in a given order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Callable

import numpy as np

from msqkd.errors import PlanError
from msqkd.graph.ir import Graph
from msqkd.quant.algorithms.adaround import AdaRound
from msqkd.quant.algorithms.base import Method, Work
from msqkd.quant.algorithms.bias_correction import BiasCorrection
from msqkd.quant.algorithms.biases import with_biases
from msqkd.quant.algorithms.cluster import Cluster
from msqkd.quant.algorithms.equalize import Equalize
from msqkd.quant.algorithms.order import FLOAT_STAGE, against_order
from msqkd.quant.algorithms.reconstruct import Reconstruct
from msqkd.quant.algorithms.smooth import SmoothQuant
from msqkd.quant.algorithms.split import Split
from msqkd.quant.algorithms.weight_ranges import SequentialMSE
from msqkd.quant.plan import QuantPlan

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (Equalize, SmoothQuant, Split, SequentialMSE, AdaRound, Reconstruct, Cluster, BiasCorrection)
}
"""By the names of `msqkd.quant.algorithms.order.STAGES`."""

Samples = Callable[[], Iterator[tuple[np.ndarray, ...]]]
Watch = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
"""From the name of a method to a context in which it runs: what it gives is told the steps done and how many."""


@dataclass(frozen=True)
class Improved:
    """What methods made of a network.

    Attributes:
        graph: with other weights and biases; exported with `plan`.
        plan: every range known, and the scale of every weight that a method chose.
        reference: the float network that `graph` approximates: rewritten by the methods of the float stage, with
            weights and biases as they were before any was rounded or corrected.
        told: in words, by method.
    """

    graph: Graph
    plan: QuantPlan
    reference: Graph
    told: dict[str, list[str]]


def improve(
    graph: Graph,
    plan: QuantPlan,
    methods: Sequence[Method],
    samples: Samples,
    calibrate: Callable[[Graph, QuantPlan], QuantPlan],
    *,
    seed: int = 0,
    watch: Watch = lambda name: nullcontext(lambda done, total: None),
) -> Improved:
    """Apply methods one after the other to a float network; ranges are measured between the two stages.

    Args:
        graph: the deployment graph of the float network; it is not changed.
        plan: its plan.
        methods: those of the float stage first.
        samples: as in `msqkd.quant.algorithms.base.Work`.
        calibrate: (graph, plan) to the plan with ranges.
        seed: of everything drawn.
        watch: see `Watch`.

    Raises:
        PlanError: the order is not possible.
    """
    against = against_order([method.name for method in methods])
    if against:
        raise PlanError(f"methods: {against}")
    work = Work(with_biases(graph), plan, samples, seed)
    told: dict[str, list[str]] = {}

    def apply(chosen: Sequence[Method]) -> None:
        for method in chosen:
            with watch(method.name) as work.progress:
                told[method.name] = method.apply(work)

    early = [method for method in methods if method.stage == FLOAT_STAGE]
    apply(early)
    work.plan = calibrate(work.graph, work.plan)
    apply([method for method in methods if method not in early])
    return Improved(work.graph, with_fixed_scales(work.graph, work.plan), work.reference, told)


def with_fixed_scales(graph: Graph, plan: QuantPlan) -> QuantPlan:
    """The plan with the scale itself where a method chose a clip ratio: nothing is left to be found out again."""
    weights = dict(plan.weights)
    for name, quant in plan.weights.items():
        if quant.clip_ratio is not None and quant.scale is None:
            scale = quant.qparams(quant.held_in(graph)).scale
            weights[name] = replace(quant, scale=np.asarray(scale), clip_ratio=None)
    return replace(plan, weights=weights)
