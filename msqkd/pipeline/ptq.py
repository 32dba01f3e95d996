"""Quantisation without training: ranges, and what the recipe's methods make of the network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Callable

from msqkd.pipeline.build import ptq_methods
from msqkd.pipeline.objects import Objects
from msqkd.quant.algorithms.methods import Improved, improve


def quantised_without_training(objects: Objects) -> Improved:
    """The calibrated float network, after the methods of its recipe.

    Raises:
        MsqkdError: no samples, or values that are not finite.
    """
    graph, methods = objects.ptq_graph, ptq_methods(objects.recipe)
    if not methods:
        return Improved(graph, objects.calibrate(graph, objects.plan), graph, {})

    @contextmanager
    def watch(name: str) -> Iterator[Callable[[int, int], None]]:
        with objects.reporter.task(name, 100) as task:
            yield lambda done, total: task.update(100 * done // max(total, 1))

    return improve(
        graph, objects.plan, methods, objects.ptq_samples, objects.calibrate, seed=objects.recipe.seed, watch=watch
    )
