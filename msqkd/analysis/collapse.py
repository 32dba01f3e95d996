"""What to say of a training that made the network much worse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msqkd.graph.ir import Graph
from msqkd.recipe import Recipe


def has_batchnorm(graph: Graph) -> bool:
    """Return True if a captured network normalises by batch statistics or running ones."""
    return any(node.op == "BatchNorm" for node in graph.nodes)


def collapse_words(history: Mapping[str, Any], recipe: Recipe, folds: bool) -> str:
    """Say what happened in the training and what the recipe can change, as the second half of a sentence.

    Args:
        history: Of the training (`msqkd.train.state.History.to_dict`).
        recipe: Of the run; nothing is suggested that it says already.
        folds: The trained network has a BatchNorm that may be folded.
    """
    losses = [loss for _, loss in history.get("loss") or []]
    if history.get("first_loss") is not None:
        losses.insert(0, history["first_loss"])
    fell = len(losses) > 1 and losses[-1] < losses[0]
    rose = len(losses) > 1 and losses[-1] > losses[0]
    if fell:
        what = f"the loss fell from {losses[0]:.3g} to {losses[-1]:.3g}, but the network got worse on the test set"
    elif rose:
        what = f"the training diverged (its loss rose from {losses[0]:.3g} to {losses[-1]:.3g})"
    else:
        what = "the training made the network worse"
    cures = ["lower train.lr"]
    if recipe.train.clip_grad is None and not fell:
        cures.append("set train.clip_grad")
    if folds and recipe.quantization.batchnorm == "fold":
        cures.append("set quantization.batchnorm: freeze, which takes a larger one than folded weights do")
    if fell and not recipe.train.keep_best:
        cures.append("set train.keep_best: true, which ends with the best epoch")
    *first, last = cures
    return f"{what}; {', '.join(first)}, or {last}" if first else f"{what}; {last}"
