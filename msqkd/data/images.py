"""Pixels: encoded images to arrays, and arrays to the shape a network takes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Optional, Union

import numpy as np

from msqkd.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

RESIZE_RATIO = 0.875
"""The part of the resized image's sides that the central crop of evaluation keeps."""

_CROP_AREA = (0.08, 1.0)
_CROP_ASPECT = (3 / 4, 4 / 3)
_CROP_ATTEMPTS = 10


def fit_images(images: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """`images` (n, c, h, w), uint8 or float32, resized (bilinear, Pillow) and repeated along channels to (n, *shape).

    c must be shape[0], or 1. Without a change of size and channels the array itself is returned.
    """
    count, channels, height, width = images.shape
    if (height, width) != shape[1:]:
        from PIL import Image

        planes = images.reshape(count * channels, height, width)
        size = (shape[2], shape[1])
        resized = np.empty((len(planes), *shape[1:]), images.dtype)
        for index, plane in enumerate(planes):
            resized[index] = Image.fromarray(plane).resize(size, Image.Resampling.BILINEAR)
        images = resized.reshape(count, channels, *shape[1:])
    if channels != shape[0]:
        images = np.repeat(images, shape[0], axis=1)
    return images


def decode_image(source: Union[Path, bytes], name: str, channels: int) -> Image:
    """The encoded image (a file or its bytes) as an 8-bit Pillow image: RGB for 3 channels, grey for 1.

    An unreadable or damaged image, or one with more than 8 bits a channel, raises DataError with its `name`.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.mode[0] in "IF":
                raise DataError(
                    f"{name}: an image with more than 8 bits a channel (mode {image.mode}) is not supported"
                )
            return image.convert("RGB" if channels == 3 else "L")
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{name}: the image no longer exists") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"{name}: the image is damaged or of an unknown kind ({reason})") from error


def evaluation_view(image: Image, shape: tuple[int, int, int]) -> np.ndarray:
    """The central part of `image`, uint8 (C, H, W).

    The image is resized (aspect kept) until H and W are 87.5 % of what they are cut from, then cut in the centre.
    """
    from PIL import Image

    _, height, width = shape
    scale = max(height / RESIZE_RATIO / image.height, width / RESIZE_RATIO / image.width)
    # The maximum keeps rounding from making the resized image smaller than the cut.
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    resized = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return _to_chw(resized.crop((left, top, left + width, top + height)))


def random_resized_crop(image: Image, shape: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    """A random part of `image` resized to (C, H, W), uint8: 8 to 100 % of the area, sides 3:4 to 4:3.

    Source: the training crop of Szegedy et al., Going Deeper with Convolutions (2015), section 6.
    """
    from PIL import Image

    left, top, width, height = _random_box(image.width, image.height, rng)
    part = image.crop((left, top, left + width, top + height))
    return _to_chw(part.resize((shape[2], shape[1]), Image.Resampling.BILINEAR))


def _random_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    for _ in range(_CROP_ATTEMPTS):
        area = width * height * rng.uniform(*_CROP_AREA)
        aspect = float(np.exp(rng.uniform(*np.log(_CROP_ASPECT))))
        box_width, box_height = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 1 <= box_width <= width and 1 <= box_height <= height:
            left, top = rng.integers(0, (width - box_width + 1, height - box_height + 1))
            return int(left), int(top), box_width, box_height
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side, side


def _to_chw(image: Image) -> np.ndarray:
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def encoded_batch(
    sources: list[Union[Path, bytes]],
    names: list[str],
    shape: tuple[int, int, int],
    rng: Optional[np.random.Generator],
) -> np.ndarray:
    """Decode `sources` in threads to uint8 (n, *shape): with `rng` a random resized crop, else the central part."""
    from concurrent.futures import ThreadPoolExecutor
    from os import cpu_count

    images = np.empty((len(sources), *shape), np.uint8)
    # A generator a sample, seeded before the threads start: the result must not depend on which runs first.
    seeds = [None] * len(sources) if rng is None else rng.integers(0, 2**63, size=len(sources)).tolist()

    def decode(index: int) -> None:
        image = decode_image(sources[index], names[index], shape[0])
        seed = seeds[index]
        if seed is None:
            images[index] = evaluation_view(image, shape)
        else:
            images[index] = random_resized_crop(image, shape, np.random.default_rng(seed))

    with ThreadPoolExecutor(max_workers=min(8, cpu_count() or 1)) as pool:
        for _ in pool.map(decode, range(len(sources))):
            pass
    return images
