"""Random changes of training images, by name: ``flip``, ``crop`` and ``shift``, on whole batches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Callable, Literal

import numpy as np

from msqkd.errors import DataError, did_you_mean

Augmentation = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""(n, C, H, W) and a generator to a changed copy; the type of the pixels stays."""

AUGMENTATIONS: dict[str, str] = {
    "flip": "left and right exchanged, for half of the images",
    "crop": "4 black pixels added on every side, then cut to the size at a random place; crop:N for N pixels",
    "shift": "moved by up to 2 pixels in each direction, the border repeated; shift:N for N pixels",
}
"""Every augmentation of in-memory batches and what it does."""

_DEFAULT_PIXELS = {"crop": 4, "shift": 2}


def make_augmentations(specs: Sequence[str], where: str, others: Sequence[str] = ()) -> list[Augmentation]:
    """The functions named by `specs` (``name`` or ``name:pixels``), in that order.

    `others` are names the caller handles itself: they are skipped. An unknown name, or an amount that is not a whole
    number of 1 to 64 pixels, raises DataError; `where` begins the message.
    """
    return [_make(spec, where, others) for spec in specs if spec not in others]


def _make(spec: str, where: str, others: Sequence[str]) -> Augmentation:
    name, separator, amount = spec.partition(":")
    if name not in AUGMENTATIONS:
        allowed = [*AUGMENTATIONS, *others]
        hint = did_you_mean(name, allowed)
        raise DataError(f"{where}: augmentation '{spec}' is unknown; allowed: {', '.join(allowed)}{hint}")
    if name == "flip":
        if separator:
            raise DataError(f"{where}: augmentation '{spec}': flip takes no number of pixels")
        return flip
    pixels = _DEFAULT_PIXELS[name]
    if separator:
        if not (amount.isascii() and amount.isdigit() and 1 <= int(amount) <= 64):
            raise DataError(f"{where}: augmentation '{spec}': the pixels must be a whole number from 1 to 64")
        pixels = int(amount)
    return partial(translate, pixels=pixels, border="constant" if name == "crop" else "edge")


def flip(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirror each image left to right with probability one half."""
    mirrored = rng.random(len(images)) < 0.5
    return np.where(mirrored[:, None, None, None], images[..., ::-1], images)


def translate(
    images: np.ndarray, rng: np.random.Generator, pixels: int, border: Literal["constant", "edge"]
) -> np.ndarray:
    """Move each image by a random whole number of pixels in [-pixels, pixels] both ways.

    The uncovered border is 0 (`border` ``constant``) or repeats the edge (``edge``).
    """
    count, _, height, width = images.shape
    padded = np.pad(images, ((0, 0), (0, 0), (pixels, pixels), (pixels, pixels)), mode=border)
    cut = (height, width)
    windows = np.lib.stride_tricks.sliding_window_view(padded, cut, axis=(2, 3))  # type: ignore[call-overload]
    rows, columns = rng.integers(0, 2 * pixels + 1, size=(2, count))
    return windows[np.arange(count), :, rows, columns]
