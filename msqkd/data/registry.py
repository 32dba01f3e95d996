"""Datasets by name: `load_data` and what a reader is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Optional, Union

import numpy as np

from msqkd.data.augment import make_augmentations
from msqkd.data.base import ArraySplit, DataBundle, InputSpec, Shape, Split, show_shape, subset
from msqkd.data.encoded import RANDOM_RESIZED_CROP, EncodedSplit
from msqkd.errors import DataError, did_you_mean


@dataclass(frozen=True)
class Request:
    """What the user asked of a dataset; a reader makes its splits through it.

    Attributes:
        name: the dataset's registered name.
        root: where the data is, as given.
        input_shape: (C, H, W) wanted, or None for the data's own.
        augment: names of augmentations of the training split.
        mean, std: of the normalisation, or None for the reader's own.
        inputs: what the network takes where that is not one image; only the readers of plain arrays serve it.
        target, args: of the user's own function (``python``).
    """

    name: str
    root: Optional[str] = None
    input_shape: Optional[Shape] = None
    augment: tuple[str, ...] = ()
    mean: Optional[tuple[float, ...]] = None
    std: Optional[tuple[float, ...]] = None
    inputs: tuple[InputSpec, ...] = ()
    target: Optional[str] = None
    args: Mapping[str, Any] = field(default_factory=dict)

    def folder(self, needed: str) -> Path:
        """The existing folder `root`; DataError, saying what is `needed` in it, when there is none."""
        return self._existing(needed, "folder", Path.is_dir)

    def file(self, needed: str) -> Path:
        """The existing file `root`; DataError, saying what is `needed`, when there is none."""
        return self._existing(needed, "file", Path.is_file)

    def _existing(self, needed: str, kind: str, is_kind: Callable[[Path], bool]) -> Path:
        if self.root is None:
            raise DataError(f"data '{self.name}' needs a root: {needed}")
        path = Path(self.root).expanduser()
        if not is_kind(path):
            found = f"is not a {kind}" if path.exists() else "does not exist"
            raise DataError(f"data '{self.name}': {path} {found}; needed is {needed}")
        return path

    def arrays(
        self,
        part: str,
        images: np.ndarray,
        labels: Optional[np.ndarray],
        classes: Sequence[str],
        *,
        shape: Optional[Shape] = None,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
    ) -> ArraySplit:
        """The `part` (``train`` or ``test``) of images (N, C, H, W); `shape`, `mean`, `std` are the reader's own."""
        where = f"{self.name} {part}"
        return ArraySplit(
            images,
            labels,
            classes,
            shape=self.input_shape or shape,
            mean=mean if self.mean is None else self.mean,
            std=std if self.std is None else self.std,
            augmentations=make_augmentations(self.augment if part == "train" else (), where),
            name=where,
        )

    def encoded(
        self,
        part: str,
        sources: Sequence[Union[Path, bytes]],
        labels: np.ndarray,
        classes: Sequence[str],
        *,
        shape: Shape = (3, 224, 224),
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> EncodedSplit:
        """The `part` from image files or their bytes; the defaults are those of ImageNet networks."""
        where = f"{self.name} {part}"
        shape = self.input_shape or shape
        if shape[0] == 1:
            mean, std = (0.449,), (0.226,)
        augment = self.augment if part == "train" else ()
        return EncodedSplit(
            sources,
            labels,
            classes,
            shape=shape,
            mean=mean if self.mean is None else self.mean,
            std=std if self.std is None else self.std,
            augmentations=make_augmentations(augment, where, others=(RANDOM_RESIZED_CROP,)),
            random_crop=RANDOM_RESIZED_CROP in augment,
            name=where,
        )


Reader = Callable[[Request], DataBundle]
READERS: dict[str, Reader] = {}
"""Every dataset by name."""


def register(name: str) -> Callable[[Reader], Reader]:
    """Decorate a reader to make it known to `load_data` as `name`."""

    def add(reader: Reader) -> Reader:
        READERS[name] = reader
        return reader

    return add


def load_data(
    name: str,
    root: Optional[str] = None,
    *,
    input_shape: Optional[Sequence[int]] = None,
    augment: Sequence[str] = (),
    mean: Optional[Sequence[float]] = None,
    std: Optional[Sequence[float]] = None,
    train_samples: Optional[int] = None,
    test_samples: Optional[int] = None,
    seed: int = 0,
    inputs: Sequence[InputSpec] = (),
    target: Optional[str] = None,
    args: Optional[Mapping[str, Any]] = None,
) -> DataBundle:
    """The dataset `name` (see `READERS`).

    Args:
        name: digits, cifar10, mnist, image_folder, mindrecord, arrays, python, or a name added with `register`.
        root: the folder or file the reader needs; digits takes none.
        input_shape: (C, H, W) of the samples; by default the data's own.
        augment: augmentations of the training split, in order (see `msqkd.data.augment`); image_folder and encoded
            mindrecord images also know random_resized_crop.
        mean: of the normalisation, one value or one a channel, for pixels scaled to [0, 1]; by default the reader's.
        std: likewise.
        train_samples: use only so many training samples, drawn at random without repetition.
        test_samples: likewise for the test samples.
        seed: of those two draws.
        inputs: the network's inputs, in place of `input_shape`, for ``arrays`` and ``python``.
        target, args: for ``python``: the user's function, ``package.module:name`` or ``path/to/file.py:name``, and its
            keyword arguments (see `msqkd.data.python`).

    Raises:
        DataError: an unknown name, missing or damaged data, or options that do not fit the data.
        ModelError: `target` cannot be imported, or fails.
    """
    if name not in READERS:
        hint = did_you_mean(name, READERS)
        raise DataError(f"data '{name}' is unknown; allowed: {', '.join(sorted(READERS))}{hint}")
    request = Request(
        name,
        root,
        None if input_shape is None else _check_shape(input_shape),
        tuple(augment),
        None if mean is None else tuple(mean),
        None if std is None else tuple(std),
        tuple(inputs),
        target,
        dict(args or {}),
    )
    bundle = READERS[name](request)
    for split in (bundle.train, bundle.test):
        if len(split) == 0:
            raise DataError(f"{split.name} is empty")
        if split.classes:
            split.check_labels(len(split.classes))
    return DataBundle(
        bundle.name,
        _draw(bundle.train, train_samples, seed),
        _draw(bundle.test, test_samples, seed),
    )


def _check_shape(shape: Sequence[int]) -> Shape:
    if len(shape) != 3 or not all(isinstance(size, (int, np.integer)) and size >= 1 for size in shape):
        raise DataError(f"input_shape is {show_shape(shape)}; three whole numbers C, H, W of at least 1 are needed")
    channels, height, width = (int(size) for size in shape)
    return channels, height, width


def _draw(split: Split, samples: Optional[int], seed: int) -> Split:
    if samples is None:
        return split
    if not 1 <= samples <= len(split):
        raise DataError(f"{split.name}: {samples} samples were asked for; 1 to {len(split)} are allowed")
    return subset(split, np.sort(np.random.default_rng(seed).permutation(len(split))[:samples]))
