"""Random changes of training images, by name, on whole batches; all that is random comes from the generator given."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Callable, Literal

import numpy as np

from msqkd.data.vision import MAGNITUDES, POLICIES, ColourOp, auto_augment, color_jitter, rand_augment, trivial_augment
from msqkd.errors import DataError, did_you_mean

Augmentation = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""(n, C, H, W) and a generator to a changed copy; the type of the pixels stays."""

AUGMENTATIONS: dict[str, str] = {
    "flip": "left and right exchanged, for half of the images",
    "crop": "4 black pixels added on every side, then cut to the size at a random place; crop:N for N pixels",
    "shift": "moved by up to 2 pixels in each direction, the border repeated; shift:N for N pixels",
    "cutout": "a black square of 16 pixels at a random place, cut off at the border; cutout:N for N pixels",
    "random_erasing": "for half of the images a rectangle of 2 to 33 % of the area in the image's mean colour; "
    "random_erasing:P for the part P of the images",
    "color_jitter": "brightness, contrast and saturation changed by up to 40 %; color_jitter:S for the part S",
    "auto_augment": "a learnt policy of changes, that of ImageNet; auto_augment:cifar10 or auto_augment:svhn",
    "rand_augment": "two random changes of magnitude 9 of 31; rand_augment:M for magnitude M",
    "trivial_augment": "one random change of random magnitude",
}
"""Every augmentation of in-memory batches and what it does."""


def make_augmentations(specs: Sequence[str], where: str, others: Sequence[str] = ()) -> list[Augmentation]:
    """The functions named by `specs` (``name`` or ``name:amount``), in that order.

    `others` are names the caller handles itself: they are skipped. An unknown name, or an amount that is not allowed,
    raises DataError; `where` begins the message.
    """
    return [_make(spec, where, others) for spec in specs if spec not in others]


def check_colour(augmentations: Sequence[Augmentation], channels: int, dtype: np.dtype, where: str) -> None:
    """Raise DataError where one of `augmentations` is for colour images and these are not; `where` is their split."""
    for augmentation in augmentations:
        if isinstance(augmentation, ColourOp) and (channels != 3 or dtype != np.uint8):
            raise DataError(
                f"{where}: augmentation '{augmentation.name}' is for colour images of 8 bits; these have "
                f"{channels} channels of {dtype}"
            )


def _make(spec: str, where: str, others: Sequence[str]) -> Augmentation:
    name, separator, amount = spec.partition(":")
    if name not in AUGMENTATIONS:
        allowed = [*AUGMENTATIONS, *others]
        hint = did_you_mean(name, allowed)
        raise DataError(f"{where}: augmentation '{spec}' is unknown; allowed: {', '.join(allowed)}{hint}")
    try:
        return _MAKERS[name](amount if separator else None)
    except ValueError as error:
        raise DataError(f"{where}: augmentation '{spec}': {error}") from None


def _whole(amount: str | None, default: int, what: str, greatest: int) -> int:
    if amount is None:
        return default
    if not (amount.isascii() and amount.isdigit() and 1 <= int(amount) <= greatest):
        raise ValueError(f"{what} must be a whole number from 1 to {greatest}")
    return int(amount)


def _part(amount: str | None, default: float, what: str) -> float:
    try:
        number = default if amount is None else float(amount)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise ValueError(f"{what} must be a number above 0, and at most 1")
    return number


def _without(amount: str | None, made: Callable[[], Augmentation], what: str) -> Augmentation:
    if amount is not None:
        raise ValueError(f"{what} takes no number")
    return made()


def _policy(amount: str | None) -> Augmentation:
    if amount is not None and amount not in POLICIES:
        raise ValueError(f"the policy must be one of {', '.join(POLICIES)}{did_you_mean(amount, POLICIES)}")
    return auto_augment(amount or "imagenet")


_MAKERS: dict[str, Callable[[str | None], Augmentation]] = {
    "flip": lambda amount: _without(amount, lambda: flip, "flip"),
    "crop": lambda amount: partial(translate, pixels=_whole(amount, 4, "the pixels", 64), border="constant"),
    "shift": lambda amount: partial(translate, pixels=_whole(amount, 2, "the pixels", 64), border="edge"),
    "cutout": lambda amount: partial(cutout, pixels=_whole(amount, 16, "the pixels", 512)),
    "random_erasing": lambda amount: partial(random_erasing, probability=_part(amount, 0.5, "the part of the images")),
    "color_jitter": lambda amount: color_jitter(_part(amount, 0.4, "the part")),
    "auto_augment": _policy,
    "rand_augment": lambda amount: rand_augment(_whole(amount, 9, "the magnitude", MAGNITUDES - 1)),
    "trivial_augment": lambda amount: _without(amount, trivial_augment, "trivial_augment"),
}


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


def cutout(images: np.ndarray, rng: np.random.Generator, pixels: int) -> np.ndarray:
    """Blacken a square of `pixels` by `pixels` whose centre is anywhere in the image (DeVries & Taylor, 1708.04552)."""
    count, _, height, width = images.shape
    first = [rng.integers(0, size, count) - pixels // 2 for size in (height, width)]
    inside = _boxes(first, [first[0] + pixels, first[1] + pixels], height, width)
    return np.where(inside[:, None], images.dtype.type(0), images)


def random_erasing(images: np.ndarray, rng: np.random.Generator, probability: float) -> np.ndarray:
    """Cover a rectangle of some images with the image's mean colour (Zhong et al., arXiv:1708.04896, its form RE-M).

    The rectangle has 2 to 33 % of the area, sides in a ratio of 0.3 to 3.3, cut to the image's sides where longer.
    """
    count, _, height, width = images.shape
    erased = rng.random(count) < probability
    area = rng.uniform(0.02, 0.33, count) * height * width
    ratio = np.exp(rng.uniform(np.log(0.3), np.log(3.3), count))
    sides = [
        np.clip(np.round(np.sqrt(side)), 1, limit).astype(int)
        for side, limit in ((area * ratio, height), (area / ratio, width))
    ]
    first = [rng.integers(0, limit - side + 1) for side, limit in zip(sides, (height, width))]
    inside = _boxes(first, [start + side for start, side in zip(first, sides)], height, width)
    mean = images.mean((2, 3), keepdims=True, dtype=np.float64).astype(images.dtype)
    return np.where((inside & erased[:, None, None])[:, None], mean, images)


def _boxes(first: Sequence[np.ndarray], last: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """bool (n, H, W): inside the box from row first[0] and column first[1] to before last."""
    rows, columns = (
        (np.arange(size) >= start[:, None]) & (np.arange(size) < stop[:, None])
        for size, start, stop in zip((height, width), first, last)
    )
    return rows[:, :, None] & columns[:, None, :]
