"""What each BatchNorm normalizes by, and whether a prediction depends on the other samples of its batch."""

from __future__ import annotations

from typing import Any, Optional

from msqkd.graph.ir import Graph, Node

RUNNING, BATCH, TRAINING = "running", "batch", "training"
"""Sources of the statistics: always the running ones, always those of the batch, or those of the batch in training."""

MOVING = (3, 4)
"""Positions of the moving mean and variance among the inputs of a BatchNorm."""

_IS_TRAINING = 5
_ON_SIZES = ("ScalarAdd", "ScalarSub", "ScalarMul", "ScalarDiv", "ScalarFloorDiv", "ScalarMod", "ScalarCast")
_SHAPED = ("Reshape", "BroadcastTo", "Tile", "StridedSlice", "Slice", "Conv2DTranspose")
_FILLED = ("Zeros", "Ones", "FillV2", "FillScalar")
_MODE = "statistics"  # the attribute that `mark_running` sets


def statistics_of(graph: Graph, node: Node) -> str:
    """Return the source of the statistics of a BatchNorm node: RUNNING, BATCH or TRAINING."""
    if len(node.inputs) > _IS_TRAINING:
        by_batch = bool(graph.const(node.inputs[_IS_TRAINING]))
    else:
        by_batch = bool(node.attrs.get("is_training", False))
    return BATCH if by_batch else str(node.attrs.get(_MODE, TRAINING))


def batch_dependence(graph: Graph) -> Optional[tuple[Node, str]]:
    """Find a node by which the predictions for a sample depend on its batch, in evaluation mode too.

    Returns:
        The node and a clause that says how, or None.
    """
    for node in graph.nodes:
        by_batch = node.op == "BatchNorm" and statistics_of(graph, node) == BATCH
        if by_batch and graph.shape(node.inputs[0])[:1] != (1,):
            return node, "normalizes by the statistics of each batch (use_batch_statistics)"
    counting = _counting(graph)
    return None if counting is None else (counting, "computes with the number of samples in the batch")


def _counting(graph: Graph) -> Optional[Node]:
    """Find the first node that reads the batch size as a number, and not as a size of its result."""
    sizes: set[str] = set()  # the batch size itself
    numbers: set[str] = set()  # and what is computed from it
    for node in graph.nodes:
        if node.op == "Shape" and node.unpack:
            shape = graph.shape(node.inputs[0])
            sizes.update(output for output, size in zip(node.outputs, shape) if size < 0)
        elif not (sizes | numbers).intersection(node.inputs):
            continue
        elif node.op in _ON_SIZES:
            numbers.update(node.outputs)
        elif node.op in _FILLED and not numbers.intersection(node.inputs):
            continue
        elif node.op not in _SHAPED:
            return node
    return None


def mark_running(net: Any, graph: Graph) -> None:
    """Mark the BatchNorm nodes of cells that use the running statistics in training too, in place.

    In evaluation mode the compiler writes them as it writes all others.
    """
    cells = [cell for _, cell in net.cells_and_names() if getattr(cell, "use_batch_statistics", None) is False]
    means = {cell.moving_mean.name for cell in cells if hasattr(cell, "moving_mean")}
    for node in graph.nodes:
        if node.op == "BatchNorm" and node.inputs[MOVING[0]] in means:
            node.attrs = {**node.attrs, _MODE: RUNNING}
