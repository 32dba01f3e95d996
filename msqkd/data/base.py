"""What every dataset is to the rest of msqkd: two `Split`s of samples, usually normalised images, read by index."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Optional, Union

import numpy as np

from msqkd.data.augment import Augmentation, check_colour
from msqkd.data.images import fit_images
from msqkd.errors import DataError

UNLABELLED = -1

Shape = tuple[int, int, int]

Arrays = Union[np.ndarray, tuple[np.ndarray, ...]]
"""One array, or several where a network has several inputs, or a sample several labels; axis 0 is the sample."""


class InputSpec(NamedTuple):
    """One input of a network: the argument's name, the shape of one sample, and the numpy name of its type."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    def __str__(self) -> str:
        shape = show_shape(self.shape) or "number"
        return f"{self.name} {shape} {self.dtype}"


def as_tuple(arrays: Arrays) -> tuple[np.ndarray, ...]:
    """`arrays` as a tuple, of one where it is a single array."""
    return arrays if isinstance(arrays, tuple) else (arrays,)


def taken(arrays: Arrays, which: Union[slice, np.ndarray]) -> Arrays:
    """The samples `which` of each of `arrays`."""
    return tuple(array[which] for array in arrays) if isinstance(arrays, tuple) else arrays[which]


def show_shape(shape: Sequence[int]) -> str:
    """A shape as messages print it: ``3x32x32``."""
    return "x".join(str(size) for size in shape)


class Split(ABC):
    """One part (training, test) of a dataset, read by sample index.

    Attributes:
        name: what messages call it, for instance ``cifar10 train``.
        labels: int32 (N,), or None for a split without labels; what the user's own data has for labels (`TensorSplit`).
        classes: the class names; a label is an index into them. Empty where labels are not classes, or not named.
        shape: (C, H, W) of one sample as `batch` returns it; of the first input where there are several.
    """

    name: str
    labels: Optional[Arrays]
    classes: tuple[str, ...]
    shape: tuple[int, ...]

    @abstractmethod
    def __len__(self) -> int:
        """The number of samples."""

    @abstractmethod
    def batch(self, indices: np.ndarray, rng: Optional[np.random.Generator] = None) -> tuple[Arrays, Arrays]:
        """The samples at `indices`: images float32 (n, C, H, W), normalised, and labels int32 (n,).

        A split for a network with several inputs gives a tuple of arrays in place of the images.

        With `rng` the split's augmentations are applied; the result is determined by the state of `rng`.
        Without it nothing is random. A split without labels gives -1 for each.
        An index outside [0, len) raises IndexError.
        """

    @property
    def augmented(self) -> bool:
        """Whether `batch` may give other samples with `rng` than without; assumed where a split does not know."""
        return True

    @property
    def held_labels(self) -> Optional[Arrays]:
        """The labels of every sample where no sample has to be read for them; None where they are not held."""
        return self.labels

    def labels_of(self, indices: np.ndarray) -> Optional[Arrays]:
        """The labels of the samples at `indices`."""
        return None if self.labels is None else taken(self.labels, indices)

    def check_labels(self, num_classes: int) -> None:
        """Raise DataError when labels are not integers from 0 to `num_classes` - 1; without labels all is well."""
        if self.labels is None:
            return
        labels = class_labels(self.labels, self.name)
        outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
        if outside.size:
            raise DataError(
                f"{self.name}: {outside.size} of {len(labels)} labels are outside 0 to {num_classes - 1}, "
                f"the first is {labels[outside[0]]} at sample {outside[0]}"
            )

    def describe_samples(self) -> str:
        """What a sample is, such as ``images of 1x32x32, 10 classes``."""
        return f"images of {show_shape(self.shape)}, {len(self.classes)} classes"


class ImageSplit(Split):
    """A split of images: a subclass fetches raw pixels, this class augments and normalises them.

    Pixels p are normalised as (v - mean) / std with v = p / 255 for uint8 and v = p for float32.
    """

    labels: Optional[np.ndarray]
    shape: Shape

    def __init__(
        self,
        name: str,
        labels: Optional[np.ndarray],
        classes: Sequence[str],
        shape: Shape,
        mean: Sequence[float],
        std: Sequence[float],
        augmentations: Sequence[Augmentation] = (),
    ) -> None:
        """`mean` and `std` have one value, or one a channel; std must be positive."""
        self.name = name
        self.labels = None if labels is None else _as_labels(labels, name)
        self.classes = tuple(classes)
        self.shape = shape
        self._mean = _per_channel(mean, "mean", shape[0], name)
        self._std = _per_channel(std, "std", shape[0], name)
        if (self._std <= 0).any():
            raise DataError(f"{name}: std is {list(std)}; every value must be greater than 0")
        self._augmentations = tuple(augmentations)

    @property
    def augmented(self) -> bool:
        """See `Split.augmented`."""
        return bool(self._augmentations)

    @abstractmethod
    def _fetch(self, indices: np.ndarray, rng: Optional[np.random.Generator]) -> np.ndarray:
        """The raw samples: (n, C, H, W) of `shape`, uint8 or float32, in an array of the caller's own."""

    def batch(self, indices: np.ndarray, rng: Optional[np.random.Generator] = None) -> tuple[np.ndarray, np.ndarray]:
        """See `Split.batch`."""
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"{self.name} has samples 0 to {len(self) - 1}, asked for {indices.tolist()}")
        images = self._fetch(indices, rng)
        if rng is not None:
            for augmentation in self._augmentations:
                images = augmentation(images, rng)
        if self.labels is None:
            labels = np.full(len(indices), UNLABELLED, np.int32)
        else:
            labels = self.labels[indices]
        return self._normalise(images), labels

    def _normalise(self, images: np.ndarray) -> np.ndarray:
        full_scale = 255.0 if images.dtype == np.uint8 else 1.0
        factor = (1.0 / (full_scale * self._std)).astype(np.float32)
        offset = (self._mean / self._std).astype(np.float32)
        result = images.astype(np.float32)
        result *= factor
        result -= offset
        return result


class ArraySplit(ImageSplit):
    """Images held in memory, uint8 or float32 (N, C, H, W), resized and given channels to fit `shape` when fetched."""

    def __init__(
        self,
        images: np.ndarray,
        labels: Optional[np.ndarray],
        classes: Sequence[str],
        *,
        shape: Optional[Shape] = None,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        augmentations: Sequence[Augmentation] = (),
        name: str = "data",
    ) -> None:
        """Hold `images` (not copied when uint8 or float32 already); other float types become float32.

        Raises DataError for an array that is not 4-dimensional or numeric, for values that are not finite,
        labels of another length, and a `shape` whose channels cannot be had from those of the images
        (one channel can be repeated, three cannot become one).
        """
        if images.ndim != 4 or 0 in images.shape[1:]:
            raise DataError(f"{name}: the images have shape {images.shape}, (N, C, H, W) is needed")
        if images.dtype != np.uint8:
            if images.dtype.kind != "f":
                raise DataError(f"{name}: the images are {images.dtype}; uint8 and float32 are allowed")
            images = images.astype(np.float32, copy=False)
            if not np.isfinite(images).all():
                raise DataError(f"{name}: the images hold values that are not finite")
        if labels is not None and len(labels) != len(images):
            raise DataError(f"{name}: there are {len(images)} images but {len(labels)} labels")
        _, channels, height, width = images.shape
        native = (channels, height, width)
        if shape is None:
            shape = native
        elif native[0] not in (1, shape[0]):
            raise DataError(
                f"{name}: the images have {native[0]} channels ({show_shape(native)}) "
                f"and cannot be given the {shape[0]} of the input shape {show_shape(shape)}"
            )
        check_colour(augmentations, shape[0], images.dtype, name)
        super().__init__(name, labels, classes, shape, mean, std, augmentations)
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def _fetch(self, indices: np.ndarray, rng: Optional[np.random.Generator]) -> np.ndarray:
        return fit_images(self._images[indices], self.shape)


class Subset(Split):
    """Some samples of another split, in the given order."""

    def __init__(self, split: Split, indices: np.ndarray) -> None:
        """`indices` (int, (n,)) are samples of `split`."""
        self._split = split
        self._indices = indices
        self.name = split.name
        self.classes = split.classes
        self.shape = split.shape

    @property
    def augmented(self) -> bool:
        """See `Split.augmented`."""
        return self._split.augmented

    @cached_property
    def labels(self) -> Optional[Arrays]:  # type: ignore[override]
        """Those of the samples; where the split does not hold its own, only these samples are read."""
        return self._split.labels_of(self._indices)

    @property
    def held_labels(self) -> Optional[Arrays]:
        """See `Split.held_labels`."""
        held = self._split.held_labels
        return None if held is None else taken(held, self._indices)

    def labels_of(self, indices: np.ndarray) -> Optional[Arrays]:
        """See `Split.labels_of`."""
        return self._split.labels_of(self._indices[indices])

    def describe_samples(self) -> str:
        """See `Split.describe_samples`."""
        return self._split.describe_samples()

    def __len__(self) -> int:
        return len(self._indices)

    def batch(self, indices: np.ndarray, rng: Optional[np.random.Generator] = None) -> tuple[Arrays, Arrays]:
        """See `Split.batch`."""
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"this part of {self.name} has samples 0 to {len(self) - 1}, asked for {indices.tolist()}")
        return self._split.batch(self._indices[indices], rng)


@dataclass(frozen=True)
class DataBundle:
    """A dataset: what is trained on and what is measured on."""

    name: str
    train: Split
    test: Split

    def describe(self) -> str:
        """One line, such as ``digits: 1258 training and 539 test images of 1x32x32, 10 classes``."""
        return f"{self.name}: {len(self.train)} training and {len(self.test)} test {self.train.describe_samples()}"


def class_labels(labels: Arrays, name: str) -> np.ndarray:
    """`labels` as one array of integers (N,); DataError, calling the split `name`, where they are something else."""
    if isinstance(labels, tuple) or labels.ndim != 1 or labels.dtype.kind not in "iu":
        found = " and ".join(f"{array.dtype} of shape {array.shape}" for array in as_tuple(labels))
        raise DataError(f"{name}: labels are {found}; classes are integers of shape (N,)")
    return labels


def subset(split: Split, indices: Union[int, Sequence[int], np.ndarray]) -> Split:
    """The samples at `indices`, or with an integer n the first n of them (all, when there are fewer).

    Raises DataError when nothing would be left, and for an index outside the split.
    """
    if isinstance(indices, (int, np.integer)):
        chosen = np.arange(min(int(indices), len(split)))
    else:
        chosen = np.asarray(indices, dtype=np.int64)
    if chosen.size == 0:
        raise DataError(f"{split.name}: a part of it was asked for that holds no sample")
    if chosen.min() < 0 or chosen.max() >= len(split):
        wrong = chosen[(chosen < 0) | (chosen >= len(split))][0]
        raise DataError(f"{split.name}: there is no sample {wrong}; 0 to {len(split) - 1} are allowed")
    return Subset(split, chosen)


def _as_labels(labels: np.ndarray, name: str) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"{name}: labels are {labels.dtype} of shape {labels.shape}; integers of shape (N,) are needed")
    limits = np.iinfo(np.int32)
    if labels.size and (labels.min() < limits.min or labels.max() > limits.max):
        raise DataError(f"{name}: labels do not fit in 32 bits, the greatest is {labels.max()}")
    return labels.astype(np.int32)


def _per_channel(values: Sequence[float], what: str, channels: int, name: str) -> np.ndarray:
    """`values` as float64 (1 or C, 1, 1)."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) not in (1, channels) or not np.isfinite(array).all():
        raise DataError(
            f"{name}: {what} is {list(values)}; one finite number, or one for each of the {channels} channels"
        )
    return array.reshape(-1, 1, 1)
