"""``arrays``: the user's own images, or other samples, in one .npz file."""

from __future__ import annotations

import numpy as np

from msqkd.data.base import DataBundle
from msqkd.data.npz import read_npz
from msqkd.data.registry import Request, register
from msqkd.data.tensors import TensorSplit
from msqkd.errors import DataError

_KEYS = ("train_images", "train_labels", "test_images", "test_labels")


@register("arrays")
def read_arrays(request: Request) -> DataBundle:
    """A .npz file with train_images, train_labels, test_images, test_labels and, if wanted, classes (names).

    Images are uint8 (N, H, W, C), used as p / 255, or float (N, C, H, W), used as they are; both then go through
    mean and std when given. Labels are integers (N,). Without names the classes are 0 to the greatest label. Without
    train_labels the training set has none, which is enough for a training that looks at no labels.

    For a network of other inputs than one image there is an array train_NAME and test_NAME for each of them in place of
    the images, used as it is, and labels are whatever the loss takes.
    """
    if request.inputs:
        return _several(request)
    path = request.file("an .npz file with " + ", ".join(_KEYS))
    optional = ["train_labels", "classes"]
    arrays = read_npz(path, [key for key in _KEYS if key not in optional], optional)
    if "classes" in arrays:
        classes = [str(name) for name in arrays["classes"].ravel()]
    else:
        labels = [arrays[key] for key in arrays if key.endswith("labels")]
        # Labels of another kind than integers are refused with the rest of what a split checks.
        greatest = max((int(held.max()) for held in labels if held.size and held.dtype.kind in "iu"), default=-1)
        classes = [str(label) for label in range(greatest + 1)]
    train, test = (
        request.arrays(
            part, _channels_first(arrays[f"{part}_images"], path.name), arrays.get(f"{part}_labels"), classes
        )
        for part in ("train", "test")
    )
    return DataBundle(request.name, train, test)


def _several(request: Request) -> DataBundle:
    names = [item.name for item in request.inputs]
    keys = {part: [f"{part}_{name}" for name in (*names, "labels")] for part in ("train", "test")}
    needed = [key for part in keys.values() for key in part]
    path = request.file("an .npz file with " + ", ".join(needed))
    arrays = read_npz(path, needed)
    train, test = (
        TensorSplit(
            tuple(arrays[key] for key in keys[part][:-1]),
            arrays[keys[part][-1]],
            request.inputs,
            f"{request.name} {part}",
        )
        for part in ("train", "test")
    )
    return DataBundle(request.name, train, test)


def _channels_first(images: np.ndarray, file: str) -> np.ndarray:
    if images.dtype != np.uint8:
        return images
    if images.ndim != 4 or images.shape[3] > 4:
        raise DataError(f"{file}: uint8 images have shape {images.shape}; (N, H, W, C) with C up to 4 is needed")
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
