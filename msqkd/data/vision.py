"""Augmentations of colour images by `mindspore.dataset`: one image at a time, each with a seed of its own."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Callable

import numpy as np

MAGNITUDES = 31
"""How many steps a magnitude of `rand_augment` has."""

POLICIES = {"imagenet": "IMAGENET", "cifar10": "CIFAR10", "svhn": "SVHN"}
"""The policies of `auto_augment` and what MindSpore calls them."""


class ColourOp:
    """An operation of `mindspore.dataset.vision` on uint8 images (n, 3, H, W).

    These operations take their randomness from one seed of the whole process; it is set for each image to a number from
    the generator, and everything is left as it was.
    """

    def __init__(self, name: str, make: Callable[[Any], Any]) -> None:
        """`make` gives the operation from the module; it is called at the first batch."""
        self.name, self._make = name, make
        self._operation: Any = None

    def __call__(self, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A changed copy of `images`."""
        from mindspore.dataset import config, vision

        if self._operation is None:
            self._operation = self._make(vision)
        result = np.empty_like(images)
        with _as_before():
            for index, seed in enumerate(rng.integers(0, 2**32, len(images)).tolist()):
                config.set_seed(seed)
                changed = self._operation(np.ascontiguousarray(images[index].transpose(1, 2, 0)))
                result[index] = changed.transpose(2, 0, 1)
        return result


@contextmanager
def _as_before() -> Iterator[None]:
    """Setting the seed of `mindspore.dataset` seeds Python's and numpy's global generators too: bring all back."""
    from mindspore.dataset import config

    seed, python, numpy = config.get_seed(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        config.set_seed(seed)
        random.setstate(python)
        np.random.set_state(numpy)


def color_jitter(strength: float) -> ColourOp:
    """Brightness, contrast and saturation each multiplied by a factor from 1 - strength to 1 + strength."""
    return ColourOp("color_jitter", lambda vision: vision.RandomColorAdjust(strength, strength, strength))


def auto_augment(policy: str) -> ColourOp:
    """A policy learnt for one dataset, a key of `POLICIES` (Cubuk et al., arXiv:1805.09501)."""
    return ColourOp(
        "auto_augment", lambda vision: vision.AutoAugment(getattr(vision.AutoAugmentPolicy, POLICIES[policy]))
    )


def rand_augment(magnitude: int) -> ColourOp:
    """Two operations drawn at random, of one magnitude below `MAGNITUDES` (Cubuk et al., arXiv:1909.13719)."""
    return ColourOp("rand_augment", lambda vision: vision.RandAugment(2, magnitude, MAGNITUDES))


def trivial_augment() -> ColourOp:
    """One operation and its magnitude drawn at random (Müller & Hutter, arXiv:2103.10158)."""
    return ColourOp("trivial_augment", lambda vision: vision.TrivialAugmentWide())
