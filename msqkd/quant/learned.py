"""Step sizes that are trained: LSQ (Esser et al. 2020, arXiv:1902.08153) and PACT (Choi et al. 2018, arXiv:1805.06085).

With v = x / s, clipped to [low, high] and rounded, x̂ = s · round(clip(v)). The gradient of x is that of a two-sided
clip; that of the step size s is

    LSQ    ∂x̂/∂s = round(v) − v inside the range, low or high outside; times 1 / √(N · Q)
    PACT   ∂x̂/∂α = 1 above the clip α = s · high, 0 below

where N is the number of weights that share s, or of values an activation has in one sample. Q is the paper's Q_P: for
signed data, a symmetric grid, 2^(b−1) − 1; for unsigned data 2^b − 1, which is the width high − low of every asymmetric
grid: a zero point only adds an offset to unsigned integers (LSQ+, Bhalgat et al. 2020, arXiv:2004.09576), and must not
change how fast s is trained. PACT adds λ · α to the gradient of α, which an optimiser does
(`msqkd.train.optimizer.make_optimizer`).
"""

from __future__ import annotations

from typing import Optional

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from mindspore.ops.operations import _grad_ops

from msqkd.graph.dropout import prod_of
from msqkd.quant.config import PACT
from msqkd.quant.qparams import EMPTY_SCALE, SCALE_FLOOR, quant_limits

LEAST = 2.0**-4
"""The smallest step size of an activation, in units of the one it started with. It started with the range that was
observed. At a sixteenth of it, values near zero still lie inside the range and pass gradients on; far below, none do,
and the network could not recover."""

LEAST_OF_WEIGHTS = 2.0**-6
"""The same for a weight, which starts wider: at 8 bits with about six times the scale of its largest magnitude."""

_MAGIC = np.float32(1.5 * 2**23)


def lsq_start(weight: np.ndarray, bits: int, axis: Optional[int] = None) -> np.ndarray:
    """The step size 2 · mean|w| / √(2^(bits−1) − 1) that LSQ starts a weight with.

    Float32, 0-d or with `axis` of shape (C,); EMPTY_SCALE for a channel of zeros.
    """
    _, top = quant_limits(bits, narrow=True)
    magnitudes = np.abs(np.asarray(weight, np.float32))
    others = None if axis is None else tuple(i for i in range(magnitudes.ndim) if i != axis % magnitudes.ndim)
    start = 2 * magnitudes.mean(axis=others, dtype=np.float64) / np.sqrt(top)
    return np.where(start > 0, np.maximum(start, SCALE_FLOOR), EMPTY_SCALE).astype(np.float32)


class _InUnits(nn.Cell):
    """unit · max(relative, least), whose gradient ds is handed to `relative` as ds / unit.

    At `least` only a gradient that enlarges s is handed on. Any other would let the momentum of an optimiser grow,
    which would hold s there long after its gradient has turned.
    """

    def __init__(self, least: float) -> None:
        super().__init__()
        self.least, self.zero = ms.Tensor(np.float32(least)), ms.Tensor(np.float32(0))
        self.mul, self.div, self.maximum, self.minimum = ops.Mul(), ops.Div(), ops.Maximum(), ops.Minimum()
        self.less_equal, self.select = ops.LessEqual(), ops.Select()

    def construct(self, relative, unit):  # type: ignore[no-untyped-def]
        return self.mul(unit, self.maximum(relative, self.least))

    def bprop(self, relative, unit, out, dout):  # type: ignore[no-untyped-def]
        step = self.div(dout, unit)
        step = self.select(self.less_equal(relative, self.least), self.minimum(step, self.zero), step)
        return step, ops.zeros_like(unit)


class LearnedScale(nn.Cell):
    """A trained step size, one number or one a channel.

    What is trained is r in s = unit · max(r, least), where the unit is what s started with: s is positive whatever an
    optimiser does. The gradient of r is that of s over the unit, so that plain gradient descent moves s as it would
    move s itself, and an optimiser that normalises gradients (Adam) moves it by a share of its size, not by an amount
    that could be many times it. In training, an r below `least` is set to it, so that the next step starts from there.

    Args:
        name: of the parameters, unique in the network.
        channels: how many step sizes; None for one of rank 0.
        decay: the share of s that an optimiser is to add to its gradient (L2 regularisation).
        least: the smallest r.
    """

    def __init__(self, name: str, channels: Optional[int] = None, decay: float = 0.0, least: float = LEAST) -> None:
        super().__init__()
        self.decay, self.least = decay, np.float32(least)
        self.single = channels is None
        ones = np.ones(1 if channels is None else channels, np.float32)  # rank 0 is no shape for a clipped gradient
        self.relative = ms.Parameter(ms.Tensor(ones), name=f"{name}.step")
        self.unit = ms.Parameter(ms.Tensor(ones), name=f"{name}.step_unit", requires_grad=False)
        self.bits = ms.Parameter(ms.Tensor(np.float32(0)), name=f"{name}.step_bits", requires_grad=False)
        self.in_units = _InUnits(least)
        self.floor, self.maximum = ms.Tensor(np.float32(least)), ops.Maximum()

    def construct(self):  # type: ignore[no-untyped-def]
        """The step size, float32 () or (C,)."""
        if self.training:
            ops.assign(self.relative, self.maximum(self.relative, self.floor))
        scale = self.in_units(self.relative, self.unit)
        return scale.reshape(()) if self.single else scale

    def value(self) -> np.ndarray:
        """The step size as an array, as `construct` computes it."""
        scale = self.unit.asnumpy() * np.maximum(self.relative.asnumpy(), self.least)
        return np.asarray(scale.reshape(()) if self.single else scale)

    def started(self) -> int:
        """The bits it was started for; 0 before."""
        return int(self.bits.asnumpy())

    def start(self, scale: np.ndarray, bits: int) -> None:
        """Go on from the step size `scale` for `bits` bits.

        r stays as it is, since an optimiser and an average of weights remember it.
        """
        unit = np.asarray(scale, np.float32).reshape(-1) / np.maximum(self.relative.asnumpy(), self.least)
        self.unit.set_data(ms.Tensor(unit.astype(np.float32)))
        self.bits.set_data(ms.Tensor(np.float32(bits)))

    def stop(self) -> None:
        """Forget that it was started."""
        self.bits.set_data(ms.Tensor(np.float32(0)))


class LearnedRound(nn.Cell):
    """s · round(clip(x / s, low, high)) with the gradient of LSQ or PACT for s.

    Args:
        rule: ``lsq`` or ``pact``.
        non_negative: x is never negative: no lower clip is computed.
        axes: what a step size is shared along; None for one step size of rank 0.
        count: N of the gradient scale; None takes the values x has in one sample.
        symmetric: the grid is that of signed data (Q of the gradient scale).
    """

    def __init__(
        self,
        rule: str,
        non_negative: bool = False,
        axes: Optional[tuple[int, ...]] = None,
        count: Optional[int] = None,
        symmetric: bool = False,
    ) -> None:
        super().__init__()
        self.symmetric = symmetric
        self.is_pact, self.non_negative, self.axes, self.count = rule == PACT, non_negative, axes, count
        self.mul, self.add, self.sub, self.div = ops.Mul(), ops.Add(), ops.Sub(), ops.Div()
        self.div_or_zero = ops.DivNoNan()
        self.minimum, self.maximum, self.rsqrt = ops.Minimum(), ops.Maximum(), ops.Rsqrt()
        self.greater_equal, self.cast = ops.GreaterEqual(), ops.Cast()
        self.sum, self.dot = ops.ReduceSum(keep_dims=True), ops.MatMul()
        self.clip_grad = _grad_ops.ReLU6Grad()
        constants = (_MAGIC, 6.0, 1.0, SCALE_FLOOR)
        self.magic, self.six, self.one, self.floor = (ms.Tensor(np.float32(v)) for v in constants)

    def construct(self, x, scale, low, high):  # type: ignore[no-untyped-def]
        """`x` float32; `scale` broadcasts against it; `low` and `high` of rank 0."""
        steps = self.minimum(self.mul(x, self.div(self.one, scale)), high)
        if not self.non_negative:
            steps = self.maximum(steps, low)
        return self.mul(self.sub(self.add(steps, self.magic), self.magic), scale)

    def bprop(self, x, scale, low, high, out, dout):  # type: ignore[no-untyped-def]
        """Gradients of all operands; those of the limits are 0."""
        levels = self.sub(high, low)
        # The range is mapped to (0, 6); for values that are never negative, the part of it above zero.
        width = self.maximum(self.mul(high, scale), self.floor) if self.non_negative else self.mul(levels, scale)
        slope = self.div(self.six, width)
        slope = ops.depend(slope, dout)  # else x · slope is computed in the forward pass already, and held until here
        position = self.mul(x, slope)
        if not self.non_negative:
            position = self.sub(position, self.div(self.mul(low, self.six), levels))
        dx = self.clip_grad(dout, position)
        if self.is_pact:
            above = self.cast(self.greater_equal(x, self.mul(scale, high)), ms.float32)
            # Over high, so that s = α / high moves as it does where α itself is trained; no α where high is 0.
            step = self.div_or_zero(self._product(dout, above), high)
        else:
            # Inside, out − x = s · (round(v) − v); outside dx is 0 and out = s · low or s · high.
            step = self.div(self.sub(self._product(dout, out), self._product(dx, x)), scale)
            count = prod_of(x.shape[1:]) if self.count is None else self.count
            step = self.mul(step, self.rsqrt(self.mul(high if self.symmetric else levels, float(count))))
        return dx, step, ops.zeros_like(low), ops.zeros_like(high)

    def _product(self, a, b):  # type: ignore[no-untyped-def]
        """The sum of a · b over what shares a step size, of its shape."""
        if self.axes is None:
            return self.dot(a.reshape(1, -1), b.reshape(-1, 1)).reshape(())
        return self.sum(self.mul(a, b), self.axes)
