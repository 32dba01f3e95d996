"""Weight decay and trained step sizes: it must not reach them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Optional

from mindspore import nn

from msqkd.errors import TrainingError
from msqkd.quant.learned import LearnedScale
from msqkd.train.adamw import AdamW
from msqkd.train.ema import AveragingOptimizer


def decay_groups(network: nn.Cell, weight_decay: float) -> list[dict[str, Any]]:
    """Group the trainable parameters of `network` for an optimizer of MindSpore.

    Step sizes that are trained (LSQ, PACT) are not decayed, all others are.

    Example:
        ``nn.Momentum(msqkd.decay_groups(student, 1e-4), learning_rate, momentum)``
    """
    trainable = network.trainable_params()
    sizes = {id(cell.relative) for cell in _scales(network)}
    groups = [([p for p in trainable if id(p) not in sizes], weight_decay)]
    groups.append(([p for p in trainable if id(p) in sizes], 0.0))
    given: list[dict[str, Any]] = [{"params": held, "weight_decay": share} for held, share in groups if held]
    return [*given, {"order_params": trainable}]


def check_step_sizes(network: nn.Cell, optimizer: Any) -> None:
    """Refuse an optimizer that decays step sizes.

    Decay pulls a step size towards zero, which clips more and more of the values. The share that a recipe gives the
    ends of PACT is meant.

    Raises:
        TrainingError: it does.
    """
    meant = {id(cell.relative): cell.decay for cell in _scales(network)}
    if not meant:
        return
    shares = ((p, share) for p, share in _shares(optimizer) if id(p) in meant and share != 0.0)
    found = [p.name for p, share in shares if share is None or not math.isclose(share, meant[id(p)], rel_tol=1e-6)]
    if found:
        others = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise TrainingError(
            f"the optimizer has weight decay for the trained step size '{found[0]}'{others}, which would shrink it "
            "towards zero; give the optimizer msqkd.decay_groups(network, weight_decay) in place of the parameters"
        )


def _scales(network: nn.Cell) -> list[LearnedScale]:
    return [cell for _, cell in network.cells_and_names() if isinstance(cell, LearnedScale)]


def _shares(optimizer: Any) -> Iterator[tuple[Any, Optional[float]]]:
    """The parameters of an optimizer with the weight decay of each; None where it changes from step to step."""
    if isinstance(optimizer, AveragingOptimizer):
        yield from _shares(optimizer.optimizer)
    elif isinstance(optimizer, AdamW):
        yield from zip(optimizer.parameters, optimizer.shares)
    elif hasattr(optimizer, "param_groups"):  # mindspore.mint.optim and mindspore.experimental.optim
        for group in optimizer.param_groups:
            share = group.get("weight_decay", 0.0)
            yield from ((parameter, _number(share)) for parameter in group["params"])
    elif isinstance(optimizer, nn.Optimizer):
        parameters, decays = optimizer.parameters, optimizer.decay_flags
        given = optimizer.weight_decay if optimizer.is_group else [optimizer.weight_decay] * len(parameters)
        for parameter, share, is_decayed in zip(parameters, given, decays):
            yield parameter, _number(share) if is_decayed else 0.0


def _number(share: Any) -> Optional[float]:
    if isinstance(share, nn.Cell):
        return None
    return float(share.asnumpy() if hasattr(share, "asnumpy") else share)
