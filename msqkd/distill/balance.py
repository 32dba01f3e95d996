"""Bringing the terms of a loss to one size."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from msqkd import parallel

BALANCES = ("none", "running")

_MEMORY = 100  # steps the mean looks back
_LIMIT = 100.0
_TINY = 1e-30


class RunningBalance(nn.Cell):
    """Factors that bring every term of a loss to the mean size of the first.

    Losses of different kinds differ in size by orders of magnitude, so that a weight says little about a term's share.
    Here a term is divided by its running mean (the loss ratio of Groenendijk et al., arXiv:2009.01717, §3.1) and
    multiplied by that of the first term: weights become shares, and the learning rate keeps its meaning. The mean is
    that of all steps so far, then an exponential one over `_MEMORY` steps. A factor is at least 0.01 and at most 100:
    a student that begins as its teacher has terms of nearly 0.

    The means are updated in training mode only; they are parameters without a gradient, to be saved with the
    optimiser's state. A step whose terms are not all finite leaves them as they are.

    Args:
        terms: how many terms there are.
    """

    def __init__(self, terms: int) -> None:
        super().__init__()
        self.sizes = ms.Parameter(ms.Tensor(np.zeros(terms, np.float32)), "sizes", requires_grad=False)
        self.count = ms.Parameter(ms.Tensor(np.float32(0)), "count", requires_grad=False)
        self.most = ms.Tensor(np.float32(_MEMORY - 1))
        self.has_others = parallel.size() > 1
        if self.has_others:
            self.mean = parallel.Mean()

    def construct(self, *terms):  # type: ignore[no-untyped-def]
        """Scalars float32 to a Tensor (terms,) of factors, the first of which is 1."""
        sizes = self.sizes
        if self.training:
            now = ops.abs(ops.stop_gradient(ops.stack(terms)))
            if self.has_others:
                now = self.mean(now)
            finite = ops.isfinite(now.sum())
            known = ops.minimum(self.count, self.most)
            sizes = ops.select(finite, (self.sizes * known + now) / (known + 1.0), self.sizes)
            count = ops.select(finite, self.count + 1.0, self.count)
            sizes = ops.depend(sizes, ops.assign(self.sizes, sizes))
            sizes = ops.depend(sizes, ops.assign(self.count, count))
        factors = (sizes[0] + _TINY) / (sizes + _TINY)
        return ops.stop_gradient(ops.clamp(factors, 1.0 / _LIMIT, _LIMIT))
