"""``mnist``: handwritten digits in the IDX files of LeCun, Cortes and Burges (also Fashion-MNIST and the like)."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from msqkd.data.base import DataBundle
from msqkd.data.registry import Request, register
from msqkd.errors import DataError

_UINT8 = 0x08


@register("mnist")
def read_mnist(request: Request) -> DataBundle:
    """28x28 grey images of 10 classes from a folder with the four IDX files, plain or .gz, resized to `input_shape`.

    The default normalisation has mean 0.1307 and standard deviation 0.3081, those of the training set.
    """
    folder = request.folder("the folder of the IDX files (train-images-idx3-ubyte, ..., each also as .gz)")
    splits = []
    for part, prefix in (("train", "train"), ("test", "t10k")):
        images = _read_idx(_find(folder, f"{prefix}-images", 3), 3)
        labels = _read_idx(_find(folder, f"{prefix}-labels", 1), 1)
        classes = [str(digit) for digit in range(10)]
        splits.append(
            request.arrays(part, images[:, None], labels.astype(np.int32), classes, mean=(0.1307,), std=(0.3081,))
        )
    return DataBundle(request.name, *splits)


def _find(folder: Path, stem: str, dimensions: int) -> Path:
    names = [f"{stem}{mark}idx{dimensions}-ubyte{packed}" for mark in "-." for packed in ("", ".gz")]
    for place in (folder, folder / "MNIST" / "raw"):
        for name in names:
            if (place / name).is_file():
                return place / name
    raise DataError(f"data 'mnist': {folder} has none of {', '.join(names)}")


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """A uint8 array of so many dimensions: magic 0, 0, type, dimensions; big-endian uint32 sizes; the values."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    start = 4 + 4 * dimensions
    if len(content) < start or content[:4] != bytes((0, 0, _UINT8, dimensions)):
        raise DataError(f"{path} is not an IDX file of {dimensions}-dimensional uint8 values")
    sizes = np.frombuffer(content, ">u4", dimensions, 4).astype(np.int64)
    if len(content) - start != sizes.prod():
        raise DataError(f"{path} is damaged: {len(content) - start} values, its header says {sizes.prod()}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(sizes)
