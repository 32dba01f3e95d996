"""Images that stay encoded (files, or bytes in memory) until a batch asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Optional, Union

import numpy as np

from msqkd.data.augment import Augmentation, check_colour
from msqkd.data.base import ImageSplit, Shape
from msqkd.data.images import encoded_batch
from msqkd.errors import DataError

RANDOM_RESIZED_CROP = "random_resized_crop"
"""The augmentation only these splits have: it cuts from the image as stored, not from its central part."""


class EncodedSplit(ImageSplit):
    """Images decoded with Pillow, in threads, at batch time.

    Without augmentation an image is resized until the network's input is 87.5 % of it and cut in the centre. With
    `random_resized_crop` a random part of 8 to 100 % of the area is resized to the input instead. A damaged image
    raises DataError, naming it, when it is decoded.
    """

    def __init__(
        self,
        sources: Sequence[Union[Path, bytes]],
        labels: Optional[np.ndarray],
        classes: Sequence[str],
        *,
        shape: Shape,
        mean: Sequence[float],
        std: Sequence[float],
        augmentations: Sequence[Augmentation] = (),
        random_crop: bool = False,
        name: str = "data",
    ) -> None:
        """`shape` has 1 (grey) or 3 (RGB) channels."""
        if shape[0] not in (1, 3):
            raise DataError(f"{name}: encoded images have 1 or 3 channels, the input shape has {shape[0]}")
        if labels is not None and len(labels) != len(sources):
            raise DataError(f"{name}: there are {len(sources)} images but {len(labels)} labels")
        check_colour(augmentations, shape[0], np.dtype(np.uint8), name)
        super().__init__(name, labels, classes, shape, mean, std, augmentations)
        self._sources = sources
        self._random_crop = random_crop

    @property
    def augmented(self) -> bool:
        """See `Split.augmented`."""
        return self._random_crop or super().augmented

    def __len__(self) -> int:
        return len(self._sources)

    def _fetch(self, indices: np.ndarray, rng: Optional[np.random.Generator]) -> np.ndarray:
        sources = [self._sources[index] for index in indices]
        names = [
            str(source) if isinstance(source, Path) else f"{self.name}, sample {index}"
            for index, source in zip(indices, sources)
        ]
        return encoded_batch(sources, names, self.shape, rng if self._random_crop else None)
