"""Statistics of BatchNorm nodes: what each of them normalizes by."""

from __future__ import annotations

from typing import Any

from msqkd.graph.ir import Graph, Node

RUNNING, BATCH, TRAINING = "running", "batch", "training"
"""Sources of the statistics: always the running ones, always those of the batch, or those of the batch in training."""

MOVING = (3, 4)
"""Positions of the moving mean and variance among the inputs of a BatchNorm."""

_IS_TRAINING = 5
_MODE = "statistics"  # the attribute that `mark_running` sets


def statistics_of(graph: Graph, node: Node) -> str:
    """Return the source of the statistics of a BatchNorm node: RUNNING, BATCH or TRAINING."""
    if len(node.inputs) > _IS_TRAINING:
        by_batch = bool(graph.const(node.inputs[_IS_TRAINING]))
    else:
        by_batch = bool(node.attrs.get("is_training", False))
    return BATCH if by_batch else str(node.attrs.get(_MODE, TRAINING))


def depends_on_batch(graph: Graph, node: Node) -> bool:
    """Return True if the result for a sample depends on the other samples of its batch, in evaluation mode too."""
    return node.op == "BatchNorm" and statistics_of(graph, node) == BATCH and graph.shape(node.inputs[0])[:1] != (1,)


def mark_running(net: Any, graph: Graph) -> None:
    """Mark the BatchNorm nodes of cells that use the running statistics in training too, in place.

    In evaluation mode the compiler writes them as it writes all others.
    """
    cells = [cell for _, cell in net.cells_and_names() if getattr(cell, "use_batch_statistics", None) is False]
    means = {cell.moving_mean.name for cell in cells if hasattr(cell, "moving_mean")}
    for node in graph.nodes:
        if node.op == "BatchNorm" and node.inputs[MOVING[0]] in means:
            node.attrs = {**node.attrs, _MODE: RUNNING}
