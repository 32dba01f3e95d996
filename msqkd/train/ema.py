"""An average of the weights, which is steadier than the weights of any one step.

Polyak & Juditsky 1992; as an exponential average with few bits, where weights that lie near a step's edge swing from
one integer to the next and back, see Nagel et al. 2022 (arXiv:2203.11086).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import nn, ops

_averaged = ops.MultitypeFuncGraph("averaged_weight")


@_averaged.register("Tensor", "Tensor", "Tensor")
def _average(share, average, weight):  # type: ignore[no-untyped-def]
    return ops.assign(average, average + (weight - average) * share)


class AveragingOptimizer(nn.Cell):
    """An optimiser that keeps an exponential average of a network's weights beside them.

        average ← d · average + (1 − d) · weight,   d = min(decay, (1 + n) / (10 + n))

    after the n-th update, n = 0, 1, …: an average that has seen little forgets faster. BatchNorm's statistics and
    trained step sizes are averaged too; the ranges of observers are not.

    Args:
        optimizer: makes the updates.
        network: a cell made from a graph, whose weights are averaged.
        decay: above 0 and below 1.
    """

    def __init__(self, optimizer: nn.Optimizer, network: Any, decay: float) -> None:
        super().__init__(auto_prefix=False)
        self.optimizer, self.decay = optimizer, decay
        self.parameters = optimizer.parameters
        own = {id(getattr(network, attribute)) for attribute in network.parameter_names}
        weights = [p for p in network.get_parameters() if p.requires_grad or id(p) in own]
        self.weights = ms.ParameterTuple([p for p in weights if p.dtype == ms.float32])
        self.averages = self.weights.clone(prefix="average", init="same")
        for average in self.averages:
            average.requires_grad = False
        self.updates = ms.Parameter(ms.Tensor(np.float32(0)), name="average.updates", requires_grad=False)
        self.map = ops.HyperMap()

    def construct(self, gradients):  # type: ignore[no-untyped-def]
        """Update the weights, then the averages."""
        done = self.optimizer(gradients)
        number = self.updates + 0.0
        share = 1.0 - ops.minimum(ops.full_like(number, self.decay), (1.0 + number) / (10.0 + number))
        share = ops.depend(share, done)
        done = ops.depend(done, self.map(ops.partial(_averaged, share), self.averages, self.weights))
        return ops.depend(done, ops.assign(self.updates, number + 1.0))

    def take(self) -> None:
        """Give the network the averages for good."""
        for weight, average in zip(self.weights, self.averages):
            weight.set_data(ms.Tensor(average.asnumpy()))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The network has the averages, until it has its weights again."""
        held = [weight.asnumpy().copy() for weight in self.weights]
        self.take()
        try:
            yield
        finally:
            for weight, array in zip(self.weights, held):
                weight.set_data(ms.Tensor(array))
