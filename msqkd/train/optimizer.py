"""Optimisers and learning-rate schedules by the names mindcv users know."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Callable

from mindspore import nn

from msqkd.errors import TrainingError, did_you_mean
from msqkd.quant.learned import LearnedScale
from msqkd.recipe import TrainSection as TrainSettings
from msqkd.recipe import path_pattern
from msqkd.train.adamw import AdamW


def learning_rates(settings: TrainSettings, steps_per_epoch: int) -> list[float]:
    """The learning rate of every step: a linear warm-up from 0, then the schedule.

    Steps and milestones fall on whole epochs of the training; the other schedules fall from the end of the warm-up to
    the end of the training, step by step.
    """
    total = settings.epoch_size * steps_per_epoch
    warmup = round(settings.warmup_epochs * steps_per_epoch)
    factor = _SCHEDULES[settings.scheduler]
    rates = []
    for step in range(total):
        if step < warmup:
            rates.append(settings.lr * (step + 1) / warmup)
        else:
            share = (step - warmup) / max(total - warmup, 1)
            epochs = (step - warmup) / steps_per_epoch
            rates.append(factor(settings, share, step // steps_per_epoch, epochs))
    return rates


def _constant(settings: TrainSettings, share: float, epoch: int, epochs: float) -> float:
    return settings.lr


def _cosine(settings: TrainSettings, share: float, epoch: int, epochs: float) -> float:
    return settings.min_lr + (settings.lr - settings.min_lr) * 0.5 * (1 + math.cos(math.pi * share))


def _polynomial(settings: TrainSettings, share: float, epoch: int, epochs: float) -> float:
    return settings.min_lr + (settings.lr - settings.min_lr) * (1 - share) ** (settings.power or 1.0)


def _step(settings: TrainSettings, share: float, epoch: int, epochs: float) -> float:
    return settings.lr * (settings.decay_rate or 1.0) ** (epoch // (settings.decay_epochs or 1))


def _multi_step(settings: TrainSettings, share: float, epoch: int, epochs: float) -> float:
    return settings.lr * (settings.decay_rate or 1.0) ** sum(epoch >= border for border in settings.milestones)


def _exponential(settings: TrainSettings, share: float, epoch: int, epochs: float) -> float:
    return settings.lr * (settings.decay_rate or 1.0) ** epochs


_SCHEDULES: dict[str, Callable[[TrainSettings, float, int, float], float]] = {
    "constant": _constant,
    "cosine_decay": _cosine,
    "polynomial_decay": _polynomial,
    "step_decay": _step,
    "multi_step_decay": _multi_step,
    "exponential_decay": _exponential,
}
"""Every schedule: (settings, share of the training done, epoch, epochs since the warm-up) to the rate."""


def make_optimizer(network: nn.Cell, settings: TrainSettings, steps_per_epoch: int) -> nn.Optimizer:
    """The optimiser over the network's trainable parameters.

    What a quantiser trains is never decayed, except by its own share (the ends of PACT); neither are biases and
    BatchNorm, and what `no_weight_decay` names, where the settings say so (`check_decay` finds out whether there is
    any).
    """
    rates = learning_rates(settings, steps_per_epoch)
    parameters = _groups(network, settings)
    decay = settings.weight_decay
    if settings.opt == "momentum" and not settings.use_nesterov:
        return nn.Momentum(parameters, rates, settings.momentum, decay)
    if settings.opt in ("momentum", "sgd"):  # on a CPU nn.Momentum computes without Nesterov's form; nn.SGD has it
        return nn.SGD(parameters, rates, settings.momentum, weight_decay=decay, nesterov=settings.use_nesterov)
    if settings.opt == "adamw":
        return AdamW(parameters, rates, decay)
    return nn.Adam(parameters, rates, weight_decay=decay)


def _groups(network: nn.Cell, settings: TrainSettings) -> list[Any]:
    trainable = network.trainable_params()
    spared = _of_quantizers(network) | _named(trainable, settings.no_weight_decay)
    plain = [p for p in trainable if id(p) in spared or (settings.filter_bias_and_bn and p.ndim <= 1)]
    own = _own_decays(network)
    plain = [p for p in plain if id(p) not in own]
    chosen = {id(p) for p in plain} | set(own)
    decayed = [p for p in trainable if id(p) not in chosen]
    if not own and (settings.weight_decay == 0 or not plain):
        return trainable
    groups = [(decayed, settings.weight_decay), (plain, 0.0)]
    groups += [([p for p in trainable if own.get(id(p)) == share], share) for share in sorted(set(own.values()))]
    given = [{"params": members, "weight_decay": share} for members, share in groups if members]
    return [*given, {"order_params": trainable}]


def _own_decays(network: nn.Cell) -> dict[int, float]:
    """Identities of the trained step sizes that are regularised, each with its share."""
    scales = [cell for _, cell in network.cells_and_names() if isinstance(cell, LearnedScale)]
    return {id(cell.relative): cell.decay for cell in scales if cell.decay}


def _of_quantizers(network: nn.Cell) -> set[int]:
    """Identities of the parameters that generated cells hold beside the network's own: what their quantisers have."""
    made = [cell for _, cell in network.cells_and_names() if hasattr(cell, "parameter_names")]
    own = {id(getattr(cell, attribute)) for cell in made for attribute in cell.parameter_names}
    return {id(parameter) for cell in made for parameter in cell.get_parameters()} - own


def check_decay(settings: TrainSettings, names: Sequence[str], where: str) -> None:
    """Refuse a pattern of `no_weight_decay` that matches none of `names`, the network's trainable parameters.

    Raises:
        TrainingError: there is one; `where` is the section's key.
    """
    for index, pattern in enumerate(settings.no_weight_decay):
        matches = path_pattern(pattern)
        if not any(matches.fullmatch(name) for name in names):
            hint = did_you_mean(pattern, names)
            raise TrainingError(
                f"{where}.no_weight_decay[{index}]: '{pattern}' matches none of the {len(names)} trainable parameters, "
                f"which are called like '{names[0]}'{hint}"
            )


def _named(trainable: Sequence[Any], patterns: Sequence[str]) -> set[int]:
    compiled = [path_pattern(pattern) for pattern in patterns]
    return {id(p) for p in trainable if any(pattern.fullmatch(p.name) for pattern in compiled)}
