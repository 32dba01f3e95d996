"""``image_folder``: one folder a class, as ImageNet is usually kept."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path

import numpy as np

from msqkd.data.base import DataBundle, Split
from msqkd.data.registry import Request, register
from msqkd.errors import DataError, did_you_mean

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


@register("image_folder")
def read_image_folder(request: Request) -> DataBundle:
    """Images in root/train/<class>/ and root/val/<class>/ (or root/test/<class>/), decoded when they are asked for.

    Classes are the sorted folder names and must be the same in both parts. Samples go round the classes (first image of
    each, second of each, ...), so the first n are a balanced choice. The default input shape is 3x224x224, normalised
    with ImageNet's mean and deviation.
    """
    root = request.folder("a folder with train/<class>/ and val/<class>/ (or test/<class>/)")
    train = root / "train"
    test = next((root / part for part in ("val", "test") if (root / part).is_dir()), None)
    if not train.is_dir() or test is None:
        missing = "train" if not train.is_dir() else "val or test"
        raise DataError(f"data 'image_folder': {root} has no folder {missing}")
    classes, test_classes = _classes(train), _classes(test)
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))[0]
        place, other = (train, test_classes) if odd in classes else (test, classes)
        hint = did_you_mean(odd, other)
        raise DataError(f"{train} and {test} must have the same classes; '{odd}' is only in {place}{hint}")
    return DataBundle(request.name, *(_split(request, *each, classes) for each in (("train", train), ("test", test))))


def _classes(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(f"{folder} has no class folders: the images of a class are expected in {folder}/<class>/")
    return names


def _split(request: Request, part: str, folder: Path, classes: list[str]) -> Split:
    columns = [_images(folder / name) for name in classes]
    order = [(path, label) for row in zip_longest(*columns) for label, path in enumerate(row) if path is not None]
    labels = np.array([label for _, label in order], np.int32)
    return request.encoded(part, [path for path, _ in order], labels, classes)


def _images(folder: Path) -> list[Path]:
    paths = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")
    )
    if not paths:
        raise DataError(f"{folder} holds no image; looked for {', '.join(_SUFFIXES)}")
    return paths
