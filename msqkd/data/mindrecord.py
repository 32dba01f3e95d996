"""``mindrecord``: MindSpore's own record files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from msqkd.data.base import DataBundle, ImageSplit
from msqkd.data.registry import Request, register
from msqkd.errors import DataError, did_you_mean

_COLUMNS = ("image", "label")


@register("mindrecord")
def read_mindrecord(request: Request) -> DataBundle:
    """root/train.mindrecord and root/test.mindrecord, with columns ``image`` and ``label`` (an integer).

    An image is the bytes of an encoded file (JPEG, PNG, ...; kept so and decoded when asked for, default input shape
    3x224x224, ImageNet's normalisation) or an array (H, W, C) of values 0 to 255, the same shape in all rows. Classes
    are named 0 to the greatest label.
    """
    folder = request.folder("a folder with train.mindrecord and test.mindrecord")
    rows = {part: _read(folder / f"{part}.mindrecord") for part in ("train", "test")}
    greatest = max(int(labels.max()) for _, labels in rows.values())
    classes = [str(label) for label in range(greatest + 1)]
    return DataBundle(request.name, *(_split(request, part, *rows[part], classes) for part in ("train", "test")))


def _read(path: Path) -> tuple[list[Any], np.ndarray]:
    """All images, bytes or arrays, and the labels."""
    from mindspore.mindrecord import FileReader

    if not path.is_file():
        raise DataError(f"data 'mindrecord': {path} does not exist")
    try:
        reader = FileReader(str(path))
        columns = list(reader.schema())
        for column in _COLUMNS:
            if column not in columns:
                hint = did_you_mean(column, columns)
                raise DataError(f"{path} has no column '{column}'; found {', '.join(columns)}{hint}")
        rows = [(row["image"], row["label"]) for row in reader.get_next()]
        reader.close()
    except DataError:
        raise
    except Exception as error:  # MindSpore raises RuntimeError and its own MRM errors
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"{path} cannot be read as a MindRecord file ({reason})") from error
    if not rows:
        raise DataError(f"{path} is empty")
    return [image for image, _ in rows], np.array([label for _, label in rows]).reshape(len(rows))


def _split(request: Request, part: str, images: list[Any], labels: np.ndarray, classes: list[str]) -> ImageSplit:
    if all(isinstance(image, bytes) for image in images):
        return request.encoded(part, images, labels, classes)
    where = f"{request.name} {part}"
    shapes = {image.shape for image in images if isinstance(image, np.ndarray)}
    shape = next(iter(shapes))
    if len(shapes) > 1 or len(shape) != 3 or any(isinstance(image, bytes) for image in images):
        found = ", ".join(sorted(str(shape) for shape in shapes))
        raise DataError(f"{where}: images must all be encoded bytes or arrays of one shape (H, W, C); found {found}")
    stacked = np.stack(images)
    if stacked.dtype.kind not in "iu" or stacked.min() < 0 or stacked.max() > 255:
        raise DataError(
            f"{where}: image arrays must be whole numbers from 0 to 255; found {stacked.dtype} "
            f"from {stacked.min()} to {stacked.max()}"
        )
    pixels = np.ascontiguousarray(stacked.astype(np.uint8).transpose(0, 3, 1, 2))
    return request.arrays(part, pixels, labels, classes)
