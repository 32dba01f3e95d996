"""Fake quantisation as trainable cells: x̂ = s · clip(round(x / s), qmin − z, qmax − z).

Built from ordinary operations (MindSpore's own FakeQuant primitives have no CPU or Ascend kernel). Gradients pass
straight through the rounding (Bengio et al., arXiv:1308.3432), inside the range only for activations. The reciprocal
is multiplied (a division by a 0-d tensor is eight times slower on CPU), and rounding is half to even by adding and
subtracting 1.5·2²³, two of the cheapest kernels instead of `Round`.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any, Optional

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from mindspore.ops.operations import _grad_ops

from msqkd import parallel
from msqkd.graph.dropout import CountedDropout
from msqkd.quant.config import NONE
from msqkd.quant.learned import LEAST_OF_WEIGHTS, LearnedRound, LearnedScale, lsq_start
from msqkd.quant.plan import DynamicQuant, Group, WeightQuant
from msqkd.quant.qparams import (
    EMPTY_SCALE,
    SCALE_FLOOR,
    QParams,
    quant_limits,
    weight_clip_ratio,
    weight_qparams,
)

OFF, OBSERVE, QUANTIZE, FOLLOW = "off", "observe", "quantize", "follow"
_MAGIC = np.float32(1.5 * 2**23)
IN_GRAPH_OBSERVERS = ("ema", "minmax")


class _ClippedRound(nn.Cell):
    """Round to the grid and clip; the gradient is that of a two-sided clip (one ReLU6Grad kernel).

    ``slope`` and ``offset`` map the range to (0, 6). For values that are never negative, the clip at zero stands for
    the lower one: nothing is computed for it, and ``slope`` maps the part of the range above zero alone.
    """

    def __init__(self, non_negative: bool) -> None:
        super().__init__()
        self.non_negative = non_negative
        self.mul, self.add, self.sub = ops.Mul(), ops.Add(), ops.Sub()
        self.minimum, self.maximum = ops.Minimum(), ops.Maximum()
        self.clip_grad = _grad_ops.ReLU6Grad()
        self.magic = ms.Tensor(_MAGIC)

    def construct(self, x, inverse, scale, low, high, slope, offset):  # type: ignore[no-untyped-def]
        steps = self.minimum(self.mul(x, inverse), high)
        if not self.non_negative:
            steps = self.maximum(steps, low)
        return self.mul(self.sub(self.add(steps, self.magic), self.magic), scale)

    def bprop(self, x, inverse, scale, low, high, slope, offset, out, dout):  # type: ignore[no-untyped-def]
        slope = ops.depend(slope, dout)  # else it is computed in the forward pass already, and held until here
        position = self.mul(x, slope)
        if not self.non_negative:
            position = self.add(position, offset)
        zero = ops.zeros_like(inverse)
        return self.clip_grad(dout, position), zero, zero, zero, zero, zero, zero


class FakeQuantActivation(nn.Cell):
    """Quantises one activation, or watches its range until then.

    The phase is a Python attribute: ``off`` passes values through, ``observe`` passes them through and updates the
    running range, ``quantize`` quantises with the fixed range, ``follow`` quantises and goes on to update the range in
    training. Changing the phase needs a fresh compilation in GRAPH_MODE (`msqkd.quant.qat.QuantCell.set_step` takes
    care of it).

    Args:
        group: the settings, with the range where it is known.
        non_negative: the value follows a ReLU: no lower clip is computed.
        momentum: share of the old range that is kept at each step by the ``ema`` observer.
        learned: the trained step size, which all values of a group have; the range is then only where it starts.
        head: the quantiser whose range this one has in the phase ``follow``; itself where none is given.
    """

    def __init__(
        self,
        group: Group,
        non_negative: bool = False,
        momentum: float = 0.9,
        learned: Optional[LearnedScale] = None,
        head: Optional[FakeQuantActivation] = None,
    ) -> None:
        super().__init__()
        self.group = group
        self.set_bits(group.bits)
        self.bits_in_force = group.bits
        self.phase_of_quant = OFF
        self.is_learned = learned is not None
        if learned is not None:
            self.learned, self.factor = learned, group.factor
            self.learned_round = LearnedRound(group.learned, non_negative, symmetric=group.symmetric)
        self.non_negative = non_negative
        self.keep = momentum if group.observer == "ema" else 1.0
        self.is_ema = group.observer == "ema"
        self.round = _ClippedRound(non_negative)
        low, high = group.range if group.range is not None else (0.0, 0.0)
        prefix = f"{group.name}.range"
        self.range_min = _state(f"{prefix}_min", low)
        self.range_max = _state(f"{prefix}_max", high)
        self.seen = _state(f"{prefix}_seen", 1.0 if group.range is not None else 0.0)
        # One vector a quantiser would need a slice each step; six 0-d tensors need none.
        self.inverse, self.scale, self.low = (_state(f"{prefix}_{n}", 1.0) for n in ("inverse", "scale", "low"))
        self.high, self.slope, self.offset = (_state(f"{prefix}_{n}", 1.0) for n in ("high", "slope", "offset"))
        self.reduce_min, self.reduce_max = ops.ReduceMin(), ops.ReduceMax()
        self.has_others = parallel.size() > 1
        if self.has_others:
            self.extremes = parallel.Extremes()
        self.is_head = head is None
        if head is not None:
            self.head_min, self.head_max = head.range_min, head.range_max
        if group.range is not None:
            self.refresh()

    def construct(self, x):  # type: ignore[no-untyped-def]
        """The value, quantised or as it is (float32, any shape)."""
        if self.is_learned and self.phase_of_quant == QUANTIZE:
            scale = self.learned()
            if self.factor != 1.0:
                scale = scale * self.factor
            return self.learned_round(x, scale, self.low, self.high)
        if self.phase_of_quant == FOLLOW and self.training:
            if self.is_head:
                self._observe(ops.stop_gradient(x))
            return self._follow(x)
        if self.phase_of_quant == QUANTIZE or self.phase_of_quant == FOLLOW:
            return self.round(x, self.inverse, self.scale, self.low, self.high, self.slope, self.offset)
        if self.phase_of_quant == OBSERVE and self.training:
            self._observe(ops.stop_gradient(x))
        return x

    def _observe(self, x):  # type: ignore[no-untyped-def]
        low, high = self.reduce_min(x), self.reduce_max(x)
        if self.has_others:
            low, high = self.extremes(low, high)
        finite = ops.logical_and(
            ops.isfinite(low), ops.isfinite(high)
        )  # a step that is skipped must not spoil the range
        low, high = ops.select(finite, low, self.range_min), ops.select(finite, high, self.range_max)
        if self.is_ema:
            keep = self.keep * self.seen  # nothing of the initial zero is kept
            low = self.range_min * keep + low * (1.0 - keep)
            high = self.range_max * keep + high * (1.0 - keep)
        else:
            low = ops.minimum(low, self.range_min * self.seen + low * (1.0 - self.seen))
            high = ops.maximum(high, self.range_max * self.seen + high * (1.0 - self.seen))
        ops.assign(self.range_min, low)
        ops.assign(self.range_max, high)
        ops.assign(self.seen, ops.maximum(self.seen, ops.cast(finite, ms.float32)))

    def _follow(self, x):  # type: ignore[no-untyped-def]
        """Quantise with the range as it is now; the arithmetic is that of `msqkd.quant.qparams.activation_qparams`."""
        qmin, qmax = self.limits
        low, high = (self.range_min, self.range_max) if self.is_head else (self.head_min, self.head_max)
        low, high = ops.minimum(low, 0.0), ops.maximum(high, 0.0)
        scale = ops.maximum(-low, high) / float(qmax) if self.group.symmetric else (high - low) / float(qmax - qmin)
        empty = ops.zeros_like(scale) + EMPTY_SCALE
        scale = ops.select(scale > 0, ops.maximum(scale, SCALE_FLOOR), empty)
        zero = ops.zeros_like(scale)
        if not self.group.symmetric:
            zero = ops.minimum(ops.maximum(ops.round(qmin - low / scale), float(qmin)), float(qmax))
        scale = scale * self.group.factor
        low, high = qmin - zero, qmax - zero
        inverse, slope, offset = 1.0 / scale, 6.0 / ((qmax - qmin) * scale), low * (-6.0 / (qmax - qmin))
        if self.non_negative:
            slope = 6.0 / ops.maximum(high * scale, SCALE_FLOOR)
        for parameter, value in (
            (self.inverse, inverse), (self.scale, scale), (self.low, low),
            (self.high, high), (self.slope, slope), (self.offset, offset),
        ):  # fmt: skip
            ops.assign(parameter, value)
        return self.round(x, inverse, scale, low, high, slope, offset)

    def range(self) -> Optional[tuple[float, float]]:
        """The range so far, or None where nothing was seen; that of a trained step size once it is trained."""
        if self.is_learned and self.learned.started():
            scale = float(self.learned.value()) * self.factor
            high = float(self.high.asnumpy())
            return (-high if self.group.symmetric else float(self.low.asnumpy())) * scale, high * scale
        if not float(self.seen.asnumpy()):
            return None
        return float(self.range_min.asnumpy()), float(self.range_max.asnumpy())

    def set_range(self, low: float, high: float) -> None:
        """Set the range and everything derived from it."""
        if self.is_learned:
            self.learned.stop()
        for parameter, value in ((self.range_min, low), (self.range_max, high), (self.seen, 1.0)):
            parameter.set_data(ms.Tensor(np.float32(value)))
        self.refresh()

    def refresh(self) -> None:
        """Derive scale and zero point from the range."""
        self.set_qparams(self.qparams())

    def qparams(self) -> QParams:
        """Scale and zero point of the current range."""
        group = replace(self.group.with_range(self.range()), bits=self.bits)
        if self.is_learned:
            trained = self.learned.started() == self.bits
            group = replace(group, scale=float(self.learned.value()) if trained else None)
        return group.qparams()

    def set_bits(self, bits: int) -> None:
        """Quantise to so many bits from the next `start` on."""
        self.bits, self.limits = bits, quant_limits(bits)

    def start(self, head: FakeQuantActivation) -> None:
        """Quantise from now on with the parameters of `head`: the quantiser of the group or, where step sizes are
        trained, of the group this one follows, if any. It is started before the others."""
        self.bits_in_force = self.bits
        if not self.is_learned:
            self.set_qparams(head.qparams())
        elif head is not self:
            for name in ("low", "high"):
                getattr(self, name).set_data(ms.Tensor(getattr(head, name).asnumpy()))
        elif self.learned.started() != self.bits:
            qparams = self.qparams()
            self.set_qparams(qparams)
            self.learned.start(qparams.scale, self.bits)

    def set_qparams(self, qparams: QParams) -> None:
        """Quantise with these parameters from now on."""
        scale = np.float32(qparams.scale)
        low, high = np.float32(qparams.qmin - qparams.zero_point), np.float32(qparams.qmax - qparams.zero_point)
        width = high * scale if self.non_negative else (high - low) * scale
        slope = np.float32(6.0) / np.maximum(np.float32(width), np.float32(SCALE_FLOOR))
        values = {
            "inverse": np.float32(1) / scale, "scale": scale, "low": low, "high": high,
            "slope": slope, "offset": -low * scale * slope,
        }  # fmt: skip
        for name, value in values.items():
            getattr(self, name).set_data(ms.Tensor(np.float32(value)))


class _StraightThrough(nn.Cell):
    """Returns the second operand; the gradient goes to the first, unchanged."""

    def construct(self, w, quantized):  # type: ignore[no-untyped-def]
        return quantized

    def bprop(self, w, quantized, out, dout):  # type: ignore[no-untyped-def]
        return dout, ops.zeros_like(quantized)


class FakeQuantWeight(nn.Cell):
    """Quantises a weight symmetrically, per tensor or per output channel: with the scale of its current largest
    magnitude, with a given one, or with one that is trained.

    The scale of the largest magnitude follows the weight as it is trained; the gradient passes straight through (the
    largest magnitude is never clipped; with a clip ratio below one what is clipped keeps its gradient too, so that it
    can return). The arithmetic is that of `msqkd.quant.qparams.weight_qparams`, operation for operation.

    With `noise`, each call in training mode quantises another random share of the weight and leaves the rest float, for
    unbiased gradients (Fan et al. 2020, arXiv:2004.07320). Which, follows from the node's name, MindSpore's global seed
    and the number of calls, which is a parameter.

    Args:
        quant: the settings.
        shape: of the weight.
        learn: train the scale, where the settings say so; `start` must be called before the first use.
        noise: the share that is quantised in training, above 0 and below 1; None quantises all.
    """

    def __init__(
        self, quant: WeightQuant, shape: tuple[int, ...], learn: bool = False, noise: Optional[float] = None
    ) -> None:
        super().__init__()
        self.quant, self.bits = quant, 0
        self.phase_of_quant = QUANTIZE
        rank = range(len(shape))
        self.axes = tuple(i for i in rank if i != quant.axis)
        self.column = tuple(-1 if i == quant.axis else 1 for i in rank)
        self.is_learned = learn and quant.learned != NONE
        self.is_given = quant.scale is not None and not self.is_learned
        if self.is_learned:
            channels = None if quant.axis is None else shape[quant.axis]
            self.learned = LearnedScale(f"{quant.node}.weight{quant.index}", channels, least=LEAST_OF_WEIGHTS)
            sharing = prod(shape) // (channels or 1)
            self.learned_round = LearnedRound(
                quant.learned, axes=None if channels is None else self.axes, count=sharing, symmetric=True
            )
        if self.is_given:
            self.given = ms.Tensor(self._shaped(quant.scale))
        self.one, self.magic, self.floor = (ms.Tensor(np.float32(v)) for v in (1.0, _MAGIC, SCALE_FLOOR))
        self.largest = ops.ReduceMax(keep_dims=True)
        self.abs, self.div, self.mul, self.add, self.sub = ops.Abs(), ops.Div(), ops.Mul(), ops.Add(), ops.Sub()
        self.minimum, self.maximum = ops.Minimum(), ops.Maximum()
        self.straight_through = _StraightThrough()
        self.is_noisy = noise is not None
        if noise is not None:
            self.shape = tuple(shape)
            self.noise = CountedDropout(f"{quant.node}.weight{quant.index}.noise", 1.0 - noise, "element")
        self.set_bits(quant.bits)

    def set_bits(self, bits: int) -> bool:
        """Quantise to so many bits; clip ratios are for those of the settings alone. True when a compilation is due."""
        if bits == self.bits:
            return False
        self.bits = bits
        _, top = quant_limits(bits, narrow=True)
        self.top, self.bottom = (ms.Tensor(np.float32(value)) for value in (top, -top))
        ratio = self._shaped(self.quant.kept_part if bits == self.quant.bits else 1.0)
        self.ratio, self.clips = ms.Tensor(ratio), bool((ratio < 1).any())
        return True

    def start(self, weight: np.ndarray) -> None:
        """Start the trained scale for the weight as it is now, unless it is for these bits already."""
        quant = self.quant
        if not self.is_learned or self.learned.started() == self.bits:
            return
        if quant.scale is not None and self.bits == quant.bits:
            scale = np.asarray(quant.scale, np.float32)
        elif quant.observer == "mse":
            ratio = weight_clip_ratio(weight, self.bits, quant.axis, where=quant.node)
            scale = weight_qparams(weight, self.bits, quant.axis, ratio, where=quant.node).scale
        else:
            scale = lsq_start(weight, self.bits, quant.axis)
        self.learned.start(scale, self.bits)

    def construct(self, w):  # type: ignore[no-untyped-def]
        """The quantised weight (float32, the shape of `w`)."""
        if self.phase_of_quant == OFF:
            return w
        if self.is_learned:
            scale = self.learned()
            if len(self.axes) < w.ndim:
                scale = scale.reshape(self.column)
            quantized = self.learned_round(w, scale, self.bottom, self.top)
            return self._noisy(quantized, w)
        fixed = ops.stop_gradient(w)
        if self.is_given:
            scale = self.given
        else:
            largest = self.largest(self.abs(fixed), self.axes)
            if self.clips:
                largest = self.mul(largest, self.ratio)
            scale = self.maximum(self.div(largest, self.top), self.floor)
        steps = self.sub(self.add(self.mul(fixed, self.div(self.one, scale)), self.magic), self.magic)
        if self.clips or self.is_given:
            steps = self.minimum(self.maximum(steps, self.bottom), self.top)
        return self.straight_through(w, self._noisy(self.mul(steps, scale), fixed))

    def _noisy(self, quantized, w):  # type: ignore[no-untyped-def]
        """The quantised values for a random share of the weight, the values as they are for the rest."""
        if not self.is_noisy or not self.training:
            return quantized
        call = ops.assign_add(self.noise.calls, 1)
        chosen = self.noise.keep(self.shape, call).reshape(self.shape)
        return ops.select(chosen, quantized, w)

    def _shaped(self, numbers: Any) -> np.ndarray:
        """Numbers a channel, or one, as they broadcast against the weight."""
        array = np.asarray(numbers, np.float32)
        return array.reshape(self.column) if array.ndim else array


class FakeQuantDynamic(nn.Cell):
    """Quantises every row of its input, the values along the last axis, by the row's own range at each call.

        s = (hi − lo) / (2^bits − 1),   x̂ = s · clip(round(x / s), b, b + 2^bits − 1),   b = round(lo / s)

    where lo ≤ 0 ≤ hi are the ends of the row (symmetric: s = max(−lo, hi) / (2^(bits−1) − 1) and b = −2^(bits−1)). The
    gradient passes straight through. The phase is ``quantize``, or anything else for no rounding.
    """

    def __init__(self, quant: DynamicQuant) -> None:
        super().__init__()
        self.quant = quant
        self.phase_of_quant = OFF
        self.symmetric = quant.symmetric
        bottom, top = quant.limits
        constants = (top if quant.symmetric else top - bottom, bottom, top, top - bottom, 1.0, 0.0)
        self.levels, self.bottom, self.top, self.width, self.one, self.zero = (
            ms.Tensor(np.float32(number)) for number in constants
        )
        self.magic, self.floor = ms.Tensor(_MAGIC), ms.Tensor(np.float32(SCALE_FLOOR))
        self.least, self.largest = ops.ReduceMin(keep_dims=True), ops.ReduceMax(keep_dims=True)
        self.div, self.mul, self.add, self.sub, self.neg = ops.Div(), ops.Mul(), ops.Add(), ops.Sub(), ops.Neg()
        self.minimum, self.maximum = ops.Minimum(), ops.Maximum()
        self.straight_through = _StraightThrough()

    def construct(self, x):  # type: ignore[no-untyped-def]
        """The quantised value (float32, the shape of `x`)."""
        if self.phase_of_quant != QUANTIZE:
            return x
        fixed = ops.stop_gradient(x)
        low = self.minimum(self.least(fixed, -1), self.zero)
        high = self.maximum(self.largest(fixed, -1), self.zero)
        span = self.maximum(self.neg(low), high) if self.symmetric else self.sub(high, low)
        scale = self.maximum(self.div(span, self.levels), self.floor)
        inverse = self.div(self.one, scale)
        bottom, top = self.bottom, self.top
        if not self.symmetric:
            bottom = self._rounded(self.mul(low, inverse))
            top = self.add(bottom, self.width)
        steps = self._rounded(self.mul(fixed, inverse))
        steps = self.minimum(self.maximum(steps, bottom), top)
        return self.straight_through(x, self.mul(steps, scale))

    def _rounded(self, x):  # type: ignore[no-untyped-def]
        return self.sub(self.add(x, self.magic), self.magic)


def _state(name: str, value: float) -> Any:
    return ms.Parameter(ms.Tensor(np.float32(value)), name=name, requires_grad=False)
