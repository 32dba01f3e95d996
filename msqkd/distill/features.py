"""Losses between what a layer of the student and a layer of the teacher compute.

Each is a cell of (student's values, teacher's values) that gives a scalar, float32, a mean over the batch, so that its
size does not depend on how large the batch is. Values have the batch first: (N, C, H, W) maps, (N, T, C) tokens or
(N, C) vectors. `feature_loss` makes one for two given shapes, or says why there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from msqkd.distill.shapes import BY_CHANNEL, LEAST_SAMPLES
from msqkd.errors import PlanError, did_you_mean

FEATURE_LOSSES = ("mse", "attention", "similarity", "relational")

_TINY = 1e-12


class FeatureMSE(nn.Cell):
    """Mean squared difference of the values (FitNets, Romero et al., arXiv:1412.6550, §2.2).

    Args:
        adapter: applied to the student's values first, where they have other channels; its parameters are trained.
    """

    def __init__(self, adapter: Optional[nn.Cell] = None) -> None:
        super().__init__()
        self.adapter: Any = adapter if adapter is not None else nn.Identity()

    def construct(self, student, teacher):  # type: ignore[no-untyped-def]
        """Values of the same shape behind the adapter. Returns a scalar."""
        return ops.square(self.adapter(student) - teacher).mean()


class AttentionTransfer(nn.Cell):
    """Squared distance of the attention maps (Zagoruyko & Komodakis, arXiv:1612.03928, §3.1).

    A map is the sum of squares over the channels, scaled to length 1 for each sample; channels may differ.

    Args:
        channels: the axis of the channels, 1 for (N, C, H, W) and 2 for (N, T, C).
    """

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.channels = channels

    def construct(self, student, teacher):  # type: ignore[no-untyped-def]
        """Values with the same positions. Returns a scalar, 0 to 2."""
        return ops.square(self._map(student) - self._map(teacher)).sum(-1).mean()

    def _map(self, values):  # type: ignore[no-untyped-def]
        total = ops.square(values).sum(self.channels).reshape((values.shape[0], -1))
        return total / ops.sqrt(ops.square(total).sum(-1, keepdims=True) + _TINY)


class SimilarityPreserving(nn.Cell):
    """Difference of the similarities between samples (Tung & Mori, arXiv:1907.09682, §3.1).

    The products of all pairs of samples in a batch, each row scaled to length 1; the mean squared difference of the
    two matrices. The shapes of the values may differ.
    """

    least_samples = LEAST_SAMPLES["similarity"]

    def construct(self, student, teacher):  # type: ignore[no-untyped-def]
        """Values of any shape with the batch first. Returns a scalar."""
        return ops.square(self._similarities(student) - self._similarities(teacher)).mean()

    def _similarities(self, values):  # type: ignore[no-untyped-def]
        rows = values.reshape((values.shape[0], -1))
        products = ops.matmul(rows, rows.T)
        return products / ops.sqrt(ops.square(products).sum(-1, keepdims=True) + _TINY)


class Relational(nn.Cell):
    """Distances and angles between the samples of a batch (RKD, Park et al., arXiv:1904.05068, §3.2).

    Distances are divided by their mean over the batch; angles are the cosines at each sample between each two others.
    Both are compared by the Huber loss; the angles count twice, as in the paper, whose weights for the two, 25 and 50,
    this is with a weight of 25. The shapes of the values may differ.
    """

    least_samples = LEAST_SAMPLES["relational"]

    def construct(self, student, teacher):  # type: ignore[no-untyped-def]
        """Values of any shape with the batch first. Returns a scalar."""
        of_student, of_teacher = self._relations(student), self._relations(teacher)
        distance = self._huber(of_student[0] - of_teacher[0])
        return distance + 2.0 * self._huber(of_student[1] - of_teacher[1])

    def _huber(self, difference):  # type: ignore[no-untyped-def]
        size = ops.abs(difference)
        return ops.select(size < 1.0, 0.5 * ops.square(size), size - 0.5).mean()

    def _relations(self, values):  # type: ignore[no-untyped-def]
        """Distances (N, N) over their mean, and cosines (N, N, N) at the second of three samples.

        Both from the products of the samples: their differences, (N, N, values), would not fit into memory.
        """
        count = values.shape[0]
        rows = values.reshape((count, -1))
        rows = rows - ops.stop_gradient(rows.mean(0, keep_dims=True))  # differences stay, and are computed better
        products = ops.matmul(rows, rows.T)
        squares = ops.square(rows).sum(-1)
        other = 1.0 - ops.eye(count, count, ms.float32)
        squared = ops.maximum(squares.reshape((-1, 1)) + squares - 2.0 * products, _TINY)
        distances = ops.sqrt(squared) * other
        cosines = (
            products.expand_dims(1) - products.expand_dims(2) - products.expand_dims(0) + squares.reshape((1, -1, 1))
        )
        inverse = other / ops.sqrt(squared)
        cosines = cosines * inverse.expand_dims(2) * inverse.expand_dims(0)
        mean = distances.sum() / float(max(count * (count - 1), 1))
        return distances / (mean + _TINY), cosines


class _Exchanged(nn.Cell):
    """A loss of tokens (N, T, C) for values (N, C, L), whose channels come first."""

    def __init__(self, loss: nn.Cell) -> None:
        super().__init__()
        self.loss = loss

    def construct(self, student, teacher):  # type: ignore[no-untyped-def]
        return self.loss(ops.swapaxes(student, 1, 2), ops.swapaxes(teacher, 1, 2))


class _Pooled(nn.Cell):
    """A loss of maps that are brought to the same size by averages."""

    def __init__(self, loss: nn.Cell, student: tuple[int, int], teacher: tuple[int, int]) -> None:
        super().__init__()
        self.loss = loss
        self.student, self.teacher = (
            nn.AvgPool2d(size, size) if size != (1, 1) else nn.Identity() for size in (student, teacher)
        )

    def construct(self, student, teacher):  # type: ignore[no-untyped-def]
        return self.loss(self.student(student), self.teacher(teacher))


def feature_loss(
    name: str,
    student: Sequence[int],
    teacher: Sequence[int],
    where: str = "features",
    seed: int = 0,
    axis: Optional[int] = None,
) -> nn.Cell:
    """The loss by name for values of two shapes.

    Args:
        name: ``mse``, ``attention``, ``similarity`` or ``relational``.
        student: shape of the student's values, the batch (any number, -1 where it is open) first.
        teacher: that of the teacher's.
        where: the place in the user's recipe, for messages.
        seed: of the adapter's initial weights.
        axis: Axis of the channels in values of three dimensions, for ``mse`` and ``attention``: 2 of tokens (N, T, C),
            which is the default, or 1 of (N, C, L).

    Returns:
        A cell; of maps that differ in size the larger is averaged. ``mse`` between different channels has an adapter
        ``adapter``, a product of each position's channels with a trained matrix.

    Raises:
        PlanError: an unknown name, or shapes that cannot be compared.
    """
    if name not in FEATURE_LOSSES:
        raise PlanError(
            f"{where}.loss is '{name}'; allowed: {', '.join(FEATURE_LOSSES)}{did_you_mean(name, FEATURE_LOSSES)}"
        )
    if axis is not None and not (name in BY_CHANNEL and len(student) == len(teacher) == 3 and axis in (1, 2)):
        raise PlanError(
            f"{where}.axis: found {axis}, allowed: 1 or 2, for {' and '.join(BY_CHANNEL)} of values of three dimensions"
        )
    if axis == 1:
        turned = [(shape[0], shape[2], shape[1]) for shape in (student, teacher)]
        return _Exchanged(feature_loss(name, turned[0], turned[1], where, seed))
    if name in LEAST_SAMPLES:
        return SimilarityPreserving() if name == "similarity" else Relational()
    shapes = f"{_show(student)} in the student, {_show(teacher)} in the teacher"
    lowest = 2 if name == "mse" else 3
    if len(student) != len(teacher) or not lowest <= len(student) <= 4:
        ranks = "maps (N, C, H, W) or tokens (N, T, C)" + (" or vectors (N, C)" if name == "mse" else "")
        raise PlanError(
            f"{where}: {shapes}; {name} compares {ranks} of both, similarity and relational compare any shapes"
        )
    if len(student) == 3 and student[1] != teacher[1]:
        raise PlanError(f"{where}: {shapes}; {name} needs as many tokens; similarity and relational compare any shapes")
    channels = 1 if len(student) == 4 else len(student) - 1
    loss: nn.Cell
    if name == "mse":
        loss = FeatureMSE(_adapter(student[channels], teacher[channels], len(student), seed))
    else:
        loss = AttentionTransfer(channels)
    if len(student) < 4 or tuple(student[2:]) == tuple(teacher[2:]):
        return loss
    return _Pooled(loss, *_windows(student[2:], teacher[2:], f"{where}: {shapes}"))


def _windows(student: Sequence[int], teacher: Sequence[int], where: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """What both are averaged over so that they have the same size."""
    for one, other in zip(student, teacher):
        if min(one, other) < 1 or max(one, other) % min(one, other):
            raise PlanError(f"{where}; the larger map is averaged, so its sides must be multiples of the smaller one's")
    windows = [(max(one // other, 1), max(other // one, 1)) for one, other in zip(student, teacher)]
    (height, wanted_height), (width, wanted_width) = windows
    return (height, width), (wanted_height, wanted_width)


def _adapter(channels: int, wanted: int, rank: int, seed: int) -> Optional[nn.Cell]:
    """A trained map from the student's channels to the teacher's, which keeps the size of what it is given."""
    if channels == wanted:
        return None
    rng = np.random.default_rng([seed, channels, wanted])
    weight = (rng.standard_normal((wanted, channels)) / np.sqrt(channels)).astype(np.float32)
    if rank == 4:
        return nn.Conv2d(channels, wanted, 1, weight_init=ms.Tensor(weight[:, :, None, None]))
    return nn.Dense(channels, wanted, weight_init=ms.Tensor(weight), has_bias=False)


def _show(shape: Sequence[int]) -> str:
    return f"({', '.join(['N', *map(str, shape[1:])])})"
