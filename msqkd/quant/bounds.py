"""Distances between the outputs of two executions of a network, and the bounds on them.

A file or a device that computes with another arithmetic than the fake-quantized network rounds some values otherwise.
Such roundings spread over a deep network, so the outputs differ although both are right. The bounds therefore accept
outputs that are near those of the fake-quantized network, or else as near to those of the float network as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np

STANDARD_ERRORS = 2
"""A difference of counts within so many standard errors is put down to chance."""

OWN_SHARE = 5.0
"""The share of changed predictions may be that of the fake-quantized network against float, up to so many times
`Bounds.max_changed`."""

_FEW = 2  # changed predictions that say nothing about a share


@dataclass(frozen=True)
class Distance:
    """Distance between the outputs of two executions for the same samples; of several outputs the largest one.

    Attributes:
        samples: number of samples.
        max_abs_diff: largest absolute difference.
        relative_error: root mean square of the difference over that of the reference; infinite where the reference is
            0 and the other is not.
        cosine: mean over the samples of the cosine similarity.
        largest: largest magnitude of the reference.
        changed: samples with another top-1 class; None where the first output is not (N, classes).
    """

    samples: int
    max_abs_diff: float
    relative_error: float
    cosine: float
    largest: float
    changed: Optional[int] = None

    @property
    def sqnr_db(self) -> float:
        """Signal-to-quantization-noise ratio in dB; infinite where the outputs are equal."""
        if self.relative_error == 0:
            return math.inf
        return -20 * math.log10(self.relative_error) if math.isfinite(self.relative_error) else -math.inf

    def to_dict(self) -> dict[str, Optional[float]]:
        """As JSON-able data with stable keys: `max_abs_diff` and, for classes, `agreement` (equal top-1 classes, in
        percent), else `relative_error`, `sqnr_db` and `cosine`. None stands for a value that is not finite."""
        found = {"max_abs_diff": self.max_abs_diff}
        if self.changed is not None:
            found["agreement"] = 100.0 - 100.0 * self.changed / self.samples
        else:
            found.update(relative_error=self.relative_error, sqnr_db=self.sqnr_db, cosine=self.cosine)
        return {key: value if math.isfinite(value) else None for key, value in found.items()}


class DistanceMeter:
    """Measures a `Distance` batch by batch.

    Args:
        classes: whether the first output is logits (N, classes).
    """

    def __init__(self, classes: bool) -> None:
        self.samples = 0
        self.changed: Optional[int] = 0 if classes else None
        self.outputs: list[_OutputMeter] = []

    def add(self, found: Sequence[np.ndarray], reference: Sequence[np.ndarray], samples: int) -> None:
        """Take in the outputs for a number of samples."""
        self.outputs = self.outputs or [_OutputMeter() for _ in reference]
        for meter, one, other in zip(self.outputs, found, reference):
            meter.add(one, other)
        if self.changed is not None:
            one, other = (item[0].reshape(samples, -1).argmax(-1) for item in (found, reference))
            self.changed += int((one != other).sum())
        self.samples += samples

    def result(self) -> Distance:
        """The distance over everything that was added."""
        return Distance(
            self.samples,
            max(meter.max_abs_diff for meter in self.outputs),
            max(meter.relative_error for meter in self.outputs),
            min(meter.cosine for meter in self.outputs),
            max(meter.largest for meter in self.outputs),
            self.changed,
        )


class _OutputMeter:
    """The difference of one output."""

    def __init__(self) -> None:
        self.max_abs_diff = self.largest = 0.0
        self.signal = self.noise = 0.0
        self.rows = 0
        self.cosines = 0.0
        self.whole = np.zeros(3)  # products of the two, and of each with itself

    def add(self, found: np.ndarray, reference: np.ndarray) -> None:
        a, b = (item.astype(np.float64).reshape(len(item), -1) for item in (found, reference))
        if a.shape != b.shape:
            raise ValueError(f"outputs of shapes {found.shape} and {reference.shape} cannot be compared")
        alike = (a == b) | (np.isnan(a) & np.isnan(b))  # infinities of masks too
        with np.errstate(invalid="ignore"):
            error = np.where(alike, 0.0, a - b)
        error = np.where(np.isnan(error), np.inf, np.abs(error))
        self.max_abs_diff = max(self.max_abs_diff, float(error.max(initial=0.0)))
        self.noise += float(np.square(error).sum())
        finite = np.isfinite(a) & np.isfinite(b)
        a, b = np.where(finite, a, 0.0), np.where(finite, b, 0.0)
        self.largest = max(self.largest, float(np.abs(b).max(initial=0.0)))
        self.signal += float(np.square(b).sum())
        products = np.stack([(a * b).sum(-1), (a * a).sum(-1), (b * b).sum(-1)])
        self.whole += products.sum(-1)
        if a.shape[1] > 1:
            self.rows += len(a)
            self.cosines += float(_cosine(products).sum())

    @property
    def relative_error(self) -> float:
        if self.noise == 0:
            return 0.0
        return math.sqrt(self.noise / self.signal) if self.signal > 0 else math.inf

    @property
    def cosine(self) -> float:
        """Over the samples; where a sample has one number only, over all of them together."""
        if math.isinf(self.noise):
            return -1.0
        return self.cosines / self.rows if self.rows else float(_cosine(self.whole[:, None])[0])


def _cosine(products: np.ndarray) -> np.ndarray:
    """Cosine similarities; two vectors of zeros are alike, one of them is like nothing."""
    both, one, other = products
    length = np.sqrt(one * other)
    empty = (one == 0) & (other == 0)
    return np.where(empty, 1.0, np.divide(both, length, out=np.zeros_like(both), where=length > 0))


def distance(found: Sequence[np.ndarray], reference: Sequence[np.ndarray], classes: bool) -> Distance:
    """Measure the distance between all outputs of two executions.

    Args:
        found, reference: the outputs (N, ...), in the same order.
        classes: whether the first output is logits (N, classes).
    """
    meter = DistanceMeter(classes)
    meter.add(found, reference, len(reference[0]))
    return meter.result()


@dataclass(frozen=True)
class Bounds:
    """Largest accepted difference between a network on its device, or in a file, and its fake-quantized form.

    Attributes:
        max_deviation: of the metric; points of top-1 accuracy. Of files the metric is not bounded.
        max_changed: share of samples with another top-1 class, in percent.
        max_relative_error: of the outputs, where these are no classes. Outputs within it need nothing else.
        max_sqnr_loss: dB that the SQNR to float may be below that of the fake-quantized network.
        min_cosine: cosine similarity of the outputs, where these are no classes.
    """

    max_deviation: float = 0.1
    max_changed: float = 2.0
    max_relative_error: float = 0.02
    max_sqnr_loss: float = 3.0
    min_cosine: float = 0.99

    @classmethod
    def of(cls, given: Bounds | float) -> Bounds:
        """Return the bounds themselves, or the defaults with a number as `max_deviation`."""
        return given if isinstance(given, Bounds) else cls(max_deviation=given)

    def excess(self, near: Distance, own: Optional[Distance] = None, away: Optional[Distance] = None) -> list[str]:
        """List what is beyond the bounds, in words; empty where nothing is.

        Args:
            near: from the file or the device to the fake-quantized network.
            own: from the fake-quantized network to float; None where float is no measure.
            away: from the file or the device to float.
        """
        if near.changed is not None:
            return self.changed(near.changed, near.samples, own.changed if own is not None else None)
        found = []
        factor = 10 ** (self.max_sqnr_loss / 10)
        if near.relative_error > self.max_relative_error:
            text = f"relative error {near.relative_error:.3g} (verify.max_relative_error: {self.max_relative_error:g})"
            if own is None or away is None:
                found.append(text)
            elif away.sqnr_db < own.sqnr_db - self.max_sqnr_loss:
                found.append(
                    f"{text} and SQNR to float {away.sqnr_db:.1f} dB, where the fake-quantized network has "
                    f"{own.sqnr_db:.1f} (verify.max_sqnr_loss: {self.max_sqnr_loss:g} dB)"
                )
        as_near = own is not None and away is not None and 1 - away.cosine <= (1 - own.cosine) * factor
        if near.cosine < self.min_cosine and not as_near:
            text = f"cosine similarity {near.cosine:.4f}"
            if own is not None and away is not None:
                text += f", to float {away.cosine:.4f} where the fake-quantized network has {own.cosine:.4f}"
            found.append(f"{text} (verify.min_cosine: {self.min_cosine:g})")
        return found

    def changed(self, count: int, samples: int, own: Optional[int] = None) -> list[str]:
        """List the share of changed predictions where it is beyond the bound.

        A network whose quantization itself changes many predictions has many close calls, so as many are accepted, up
        to `OWN_SHARE` times the bound. The tolerance for chance follows from the bound and not from what was found.

        Args:
            count: samples with another top-1 class than in the fake-quantized network.
            samples: number of samples.
            own: samples with another top-1 class in the fake-quantized network than in float.
        """
        bound = self.max_changed / 100 * samples
        if own is not None:
            bound = max(bound, min(own, OWN_SHARE * bound))
        allowed = max(bound + STANDARD_ERRORS * bound**0.5, _FEW) if bound > 0 else 0.0
        if count <= allowed:
            return []
        return [
            f"{100 * count / samples:.2f} % changed predictions, allowed: {100 * allowed / samples:.2f} % "
            f"(verify.max_changed: {self.max_changed:g})"
        ]
