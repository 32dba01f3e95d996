"""The arithmetic of scale and zero point, for weights and activations of 2 to 8 bits.

    q  = clip(round(x · (1/s)) + z, qmin, qmax)          x̂ = s · (q − z)

Rounding is half to even (``np.rint``), as the tensor operations of a training framework round, so that fake
quantisation in numpy and in the trained network agree. A device rounds half away from zero instead; that belongs to
the integer simulator, not here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Optional, Union

import numpy as np

from msqkd.errors import PlanError

MIN_BITS = 2
MAX_BITS = 8

SCALE_FLOOR = 2.0**-63
"""The smallest scale. Its reciprocal is finite, and the product of two such scales (the scale of a bias) is still a
normal float32, so that no runtime divides by zero or meets a denormal. Ranges it could distort lie below 1e-16."""

EMPTY_SCALE = 2.0**-7
"""The scale of a range that holds nothing but zero, such as a dead channel. Every scale represents it exactly, but only
one of ordinary size keeps the int32 bias that goes with it, b / (s_x · s_w), from overflowing."""

RANGE_LIMIT = 2.0**126
"""The largest magnitude of a range end: the outermost dequantised value still fits in float32."""

CLIP_RATIOS = np.arange(100, 29, -1) / 100.0
"""The candidates of :func:`weight_clip_ratio`, widest first."""


def quant_limits(bits: int, narrow: bool = False) -> tuple[int, int]:
    """The smallest and the largest quantised integer of signed `bits`-bit numbers, 2 <= bits <= 8.

    Activations use the full range [-2^(bits-1), 2^(bits-1)-1]; weights the `narrow` one, which drops the lowest value
    and is therefore symmetric. Raises PlanError for any other `bits`.
    """
    if isinstance(bits, bool) or not isinstance(bits, (int, np.integer)) or not MIN_BITS <= bits <= MAX_BITS:
        raise PlanError(f"bits: {bits!r} is not allowed; allowed is a whole number from {MIN_BITS} to {MAX_BITS}")
    top = 2 ** (int(bits) - 1) - 1
    return (-top if narrow else -top - 1), top


@dataclass(frozen=True, eq=False)
class QParams:
    """How one value is quantised: per tensor (0-d `scale`, no `axis`) or per channel (`scale` (C,), along `axis`).

    `scale` is float32, positive and finite; `zero_point` int32 of the same shape, within [qmin, qmax]. Both are copied
    and read-only. Raises PlanError when they do not fit together.
    """

    scale: np.ndarray
    zero_point: np.ndarray
    qmin: int
    qmax: int
    axis: Optional[int] = None

    def __post_init__(self) -> None:
        scale = np.array(self.scale, dtype=np.float32)
        zero_point = np.array(self.zero_point, dtype=np.int32)
        if scale.ndim != (0 if self.axis is None else 1):
            needed = "a single scale" if self.axis is None else "a list of scales"
            raise PlanError(f"scale: the shape {scale.shape} does not go with axis {self.axis}, which needs {needed}")
        if zero_point.shape != scale.shape:
            raise PlanError(
                f"zero_point: the shape {zero_point.shape} differs from the shape {scale.shape} of the scale"
            )
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            raise PlanError(f"scale: {_first(scale, ~(np.isfinite(scale) & (scale > 0)))} is not positive and finite")
        outside = (zero_point < self.qmin) | (zero_point > self.qmax)
        if outside.any():
            raise PlanError(f"zero_point: {_first(zero_point, outside)} is outside [{self.qmin}, {self.qmax}]")
        for name, array in (("scale", scale), ("zero_point", zero_point)):
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    @property
    def lo(self) -> np.ndarray:
        """The lowest representable value, float32, shaped like `scale`."""
        return self.scale * (self.qmin - self.zero_point).astype(np.float32)

    @property
    def hi(self) -> np.ndarray:
        """The highest representable value, float32, shaped like `scale`."""
        return self.scale * (self.qmax - self.zero_point).astype(np.float32)

    def quantize(self, x: np.ndarray) -> np.ndarray:
        """The integers of `x` (any float array), int32 in [qmin, qmax], shaped like `x`.

        Infinities saturate. Raises PlanError for NaN, which no integer stands for, and for a wrong channel count.
        """
        steps, _, zero_point = self._steps(x)
        if np.isnan(steps).any():
            raise PlanError(f"x: {int(np.isnan(steps).sum())} of {steps.size} values are NaN and cannot be quantised")
        return steps.astype(np.int32) + zero_point

    def dequantize(self, q: np.ndarray) -> np.ndarray:
        """The float32 values of the integers `q`, shaped like `q`. Raises PlanError for a wrong channel count."""
        q = np.asarray(q)
        scale, zero_point = self._shaped(q)
        return np.asarray(scale * (q.astype(np.int32) - zero_point).astype(np.float32))

    def fake_quantize(self, x: np.ndarray) -> np.ndarray:
        """`x` after quantising and dequantising, float32, shaped like `x`; NaN stays NaN."""
        steps, scale, _ = self._steps(x)
        return np.asarray(steps * scale)

    def _steps(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(q − z of `x` in float32, scale, zero point), the last two shaped to broadcast."""
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # a saturating value may pass through inf
            x = np.asarray(x, dtype=np.float32)
            scale, zero_point = self._shaped(x)
            # The reciprocal, because devices and the training graph multiply by it: a division rounds differently.
            steps = np.rint(x * (np.float32(1) / scale))
        low, high = (self.qmin - zero_point).astype(np.float32), (self.qmax - zero_point).astype(np.float32)
        # Adding 0 turns -0 into 0: the two dequantise alike, but only one of them is what the integers give.
        return np.asarray(np.clip(steps, low, high) + np.float32(0)), scale, zero_point

    def _shaped(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scale and zero point with the shape in which they broadcast against `x`."""
        if self.axis is None:
            return self.scale, self.zero_point
        axis = _channel_axis(x, self.axis, "x")
        if x.shape[axis] != self.scale.size:
            raise PlanError(
                f"x: {x.shape[axis]} channels along axis {self.axis}, but there are {self.scale.size} scales"
            )
        shape = [1] * x.ndim
        shape[axis] = -1
        return self.scale.reshape(shape), self.zero_point.reshape(shape)


def activation_qparams(
    lo: float, hi: float, bits: int = 8, symmetric: bool = False, where: str = "activation"
) -> QParams:
    """Per-tensor parameters of an activation whose values lie in [lo, hi].

    The range is widened to include 0, which is then represented exactly. Asymmetric: s = (hi − lo) / (2^bits − 1) and
    z in [qmin, qmax]; symmetric: z = 0 and s = max(|lo|, |hi|) / (2^(bits−1) − 1). A range of nothing but 0 gets
    EMPTY_SCALE. Raises PlanError, beginning with `where`, when an end is not finite, lo > hi, or beyond ±RANGE_LIMIT.
    """
    qmin, qmax = quant_limits(bits)
    lo, hi = float(lo), float(hi)
    if not (math.isfinite(lo) and math.isfinite(hi)):
        raise PlanError(f"{where}: the range [{lo}, {hi}] is not finite")
    if lo > hi:
        raise PlanError(f"{where}: the range [{lo}, {hi}] is upside down; the lower end comes first")
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    if max(-lo, hi) > RANGE_LIMIT:
        raise PlanError(f"{where}: the range [{lo}, {hi}] is too wide; allowed is up to ±{RANGE_LIMIT:.2g}")
    span = max(-lo, hi) / qmax if symmetric else (hi - lo) / (qmax - qmin)
    scale = np.float32(max(span, SCALE_FLOOR) if span else EMPTY_SCALE)
    zero_point = 0 if symmetric else int(np.clip(np.rint(qmin - lo / float(scale)), qmin, qmax))
    return QParams(np.asarray(scale), np.asarray(zero_point), qmin, qmax)


def weight_qparams(
    w: np.ndarray,
    bits: int = 8,
    axis: Optional[int] = None,
    clip_ratio: Union[float, np.ndarray] = 1.0,
    min_scale: Union[float, np.ndarray] = SCALE_FLOOR,
    where: str = "weight",
) -> QParams:
    """Symmetric parameters of a weight, z = 0: s = clip_ratio · max|w| / (2^(bits−1) − 1), at least `min_scale`.

    One scale for the whole of `w` (any shape), or with `axis` one a channel along it. A channel of zeros gets
    EMPTY_SCALE. `clip_ratio` in (0, 1], as from :func:`weight_clip_ratio`, and `min_scale` are numbers or arrays of
    shape (C,); a caller who knows the bias b and the input scale s_x gives min_scale = |b| / (s_x · (2^31 − 1)) to keep
    the int32 bias of a nearly dead channel from overflowing. Raises PlanError, beginning with `where`, for an empty
    weight or one that is not finite, an axis it does not have, or a ratio out of range.
    """
    qmin, qmax = quant_limits(bits, narrow=True)
    ratio, least = np.asarray(clip_ratio, dtype=np.float32), np.asarray(min_scale, dtype=np.float32)
    if not ((ratio > 0) & (ratio <= 1)).all():
        raise PlanError(f"{where}: the clip ratio {_first(ratio, ~((ratio > 0) & (ratio <= 1)))} is not in (0, 1]")
    largest = _channel_max(_channel_rows(w, axis, where), where)
    for name, given in (("clip ratio", ratio), ("minimal scale", least)):
        if given.shape not in ((), largest.shape):
            raise PlanError(f"{where}: a {name} of shape {given.shape} does not fit {largest.size} channels")
    # In float32, operation for operation what a training graph computes, so that both get the same scale.
    clipped = ratio * largest / np.float32(qmax)
    scale = np.where(largest > 0, np.maximum(clipped, np.float32(SCALE_FLOOR)), np.float32(EMPTY_SCALE))
    scale = np.maximum(scale, least)
    if axis is None:
        scale = scale.reshape(())
    return QParams(scale, np.zeros(scale.shape), qmin, qmax, axis)


def weight_clip_ratio(w: np.ndarray, bits: int, axis: Optional[int] = None, where: str = "weight") -> np.ndarray:
    """The part of max|w| at which clipping `w` minimises the mean squared error of the quantised weight.

    float32 in [0.3, 1], 0-d or, with `axis`, of shape (C,); 1 for a channel of zeros. A grid search in steps of 0.01;
    of equal ratios the largest wins (Nagel et al. 2021, "A White Paper on Neural Network Quantization", arXiv
    2106.08295). Raises PlanError as :func:`weight_qparams` does.
    """
    _, qmax = quant_limits(bits, narrow=True)
    rows = _channel_rows(w, axis, where)
    largest = _channel_max(rows, where)
    # In units of the channel's maximum neither tiny nor huge weights leave float32, and one scale serves all channels.
    unit = rows / np.where(largest > 0, largest, np.float32(1))[:, None]
    errors, rounded = np.empty((CLIP_RATIOS.size, len(unit))), np.empty_like(unit)
    for index, ratio in enumerate(CLIP_RATIOS):
        scale = np.float32(ratio / qmax)
        np.multiply(unit, np.float32(1) / scale, out=rounded)
        np.rint(rounded, out=rounded)
        np.clip(rounded, -qmax, qmax, out=rounded)
        rounded *= scale
        rounded -= unit
        np.square(rounded, out=rounded)
        errors[index] = rounded.sum(axis=1, dtype=np.float64)
    best = CLIP_RATIOS[np.argmin(errors, axis=0)].astype(np.float32)
    return best.reshape(()) if axis is None else best


def _channel_rows(w: np.ndarray, axis: Optional[int], where: str) -> np.ndarray:
    """`w` as float32 of shape (channels, values); one row when `axis` is None."""
    with np.errstate(over="ignore"):
        w = np.asarray(w, dtype=np.float32)
    if w.size == 0:
        raise PlanError(f"{where}: it holds no values (shape {w.shape})")
    if axis is None:
        return w.reshape(1, -1)
    return np.moveaxis(w, _channel_axis(w, axis, where), 0).reshape(w.shape[axis], -1)


def _channel_max(rows: np.ndarray, where: str) -> np.ndarray:
    """max|row| of every row, float32 (C,); PlanError unless all are finite and within RANGE_LIMIT."""
    largest = np.maximum(rows.max(axis=1), -rows.min(axis=1))
    if not np.isfinite(largest).all():
        raise PlanError(f"{where}: {int((~np.isfinite(rows)).sum())} of {rows.size} values are not finite")
    if (largest > RANGE_LIMIT).any():
        raise PlanError(f"{where}: the value {largest.max():.3g} is too large; allowed is up to ±{RANGE_LIMIT:.2g}")
    return largest


def _channel_axis(x: np.ndarray, axis: int, where: str) -> int:
    """`axis` counted from the front; PlanError when `x` has no such axis."""
    if not -x.ndim <= axis < x.ndim:
        raise PlanError(f"{where}: the shape {x.shape} has no axis {axis}")
    return axis % x.ndim


def _first(values: np.ndarray, bad: np.ndarray) -> Any:
    """The first of `values` where `bad` is true, as a plain number for a message."""
    return values[bad].flat[0].item()
