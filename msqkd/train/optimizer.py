"""Optimisers and learning-rate schedules by the names mindcv users know."""

from __future__ import annotations

import math

from mindspore import nn

from msqkd.recipe import TrainSection as TrainSettings


def learning_rates(settings: TrainSettings, steps_per_epoch: int) -> list[float]:
    """The learning rate of every step: a linear warm-up from 0, then constant, cosine (to `min_lr`) or steps."""
    total = settings.epoch_size * steps_per_epoch
    warmup = round(settings.warmup_epochs * steps_per_epoch)
    rates = []
    for step in range(total):
        if step < warmup:
            rates.append(settings.lr * (step + 1) / warmup)
        elif settings.scheduler == "cosine_decay":
            share = (step - warmup) / max(total - warmup, 1)
            rates.append(settings.min_lr + (settings.lr - settings.min_lr) * 0.5 * (1 + math.cos(math.pi * share)))
        elif settings.scheduler == "step_decay":
            decays = (step // steps_per_epoch) // (settings.decay_epochs or 1)
            rates.append(settings.lr * (settings.decay_rate or 1.0) ** decays)
        else:
            rates.append(settings.lr)
    return rates


def make_optimizer(network: nn.Cell, settings: TrainSettings, steps_per_epoch: int) -> nn.Optimizer:
    """The optimiser over the network's trainable parameters; biases and BatchNorm without weight decay where asked."""
    rates = learning_rates(settings, steps_per_epoch)
    parameters = _groups(network, settings)
    decay = settings.weight_decay
    if settings.opt == "momentum":
        return nn.Momentum(parameters, rates, settings.momentum, decay, use_nesterov=settings.use_nesterov)
    if settings.opt == "sgd":
        return nn.SGD(parameters, rates, settings.momentum, weight_decay=decay, nesterov=settings.use_nesterov)
    if settings.opt == "adamw":
        return nn.AdamWeightDecay(parameters, rates, weight_decay=decay)
    return nn.Adam(parameters, rates, weight_decay=decay)


def _groups(network: nn.Cell, settings: TrainSettings) -> list:
    trainable = network.trainable_params()
    plain = [p for p in trainable if p.ndim <= 1]
    decayed = [p for p in trainable if p.ndim > 1]
    if not settings.filter_bias_and_bn or not plain or not decayed or settings.weight_decay == 0:
        return trainable
    return [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": plain, "weight_decay": 0.0},
        {"order_params": trainable},
    ]
