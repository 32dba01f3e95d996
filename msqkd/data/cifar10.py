"""``cifar10``: 60,000 colour images of 32x32 in 10 classes, in any of three forms.

Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009).
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, Optional

import numpy as np

from msqkd.data.base import DataBundle
from msqkd.data.npz import read_npz
from msqkd.data.registry import Request, register
from msqkd.errors import DataError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_SHAPE = (3, 32, 32)
_VALUES = 3 * 32 * 32
_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))

Part = tuple[np.ndarray, np.ndarray]
"""Images uint8 (N, 3, 32, 32) and labels (N,)."""


@register("cifar10")
def read_cifar10(request: Request) -> DataBundle:
    """CIFAR-10 from a folder holding one of the following, looked for in this order.

    - train.npz and test.npz, images as JPEG with one common header: ``header``, ``scans``, ``offsets`` (n + 1),
      ``labels``; image i is header + scans[offsets[i]:offsets[i + 1]] + FF D9;
    - the Python version (data_batch_1 to 5, test_batch), or the folder cifar-10-batches-py with it;
    - the binary version (data_batch_1.bin to 5, test_batch.bin), or the folder cifar-10-batches-bin with it.

    The default normalisation is mean 0.485, 0.456, 0.406 and deviation 0.229, 0.224, 0.225. Pickles are read with
    everything but numpy arrays refused.
    """
    folder = request.folder("the folder of the CIFAR-10 files")
    forms = ((_find_packs, _read_pack), (_find_pickles, _read_pickle), (_find_binaries, _read_binary))
    found = [(files, read) for find, read in forms for files in [find(folder)] if files is not None]
    if not found:
        raise DataError(
            f"data 'cifar10': {folder} holds no CIFAR-10; looked for train.npz, data_batch_1, data_batch_1.bin "
            "and the folders cifar-10-batches-py, cifar-10-batches-bin"
        )
    files, read = found[0]
    missing = [path.name for paths in files for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"data 'cifar10': {files[0][0].parent} lacks {', '.join(missing)}")
    splits = []
    for part, paths in zip(("train", "test"), files):
        pieces = [read(path) for path in paths]
        images, labels = (np.concatenate(each) for each in zip(*pieces))
        splits.append(
            request.arrays(
                part, images, labels.astype(np.int32), CLASSES, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
            )
        )
    return DataBundle(request.name, *splits)


Files = Optional[tuple[list[Path], list[Path]]]
"""The training and the test files, or None when the first of them is not there."""


def _find_packs(folder: Path) -> Files:
    if not (folder / "train.npz").is_file():
        return None
    return [folder / "train.npz"], [folder / "test.npz"]


def _find_batches(folder: Path, own: str, suffix: str) -> Files:
    for place in (folder, folder / own):
        if (place / f"{_BATCHES[0]}{suffix}").is_file():
            return [place / f"{name}{suffix}" for name in _BATCHES], [place / f"test_batch{suffix}"]
    return None


def _find_pickles(folder: Path) -> Files:
    return _find_batches(folder, "cifar-10-batches-py", "")


def _find_binaries(folder: Path) -> Files:
    return _find_batches(folder, "cifar-10-batches-bin", ".bin")


def _read_pack(path: Path) -> Part:
    from PIL import Image

    arrays = read_npz(path, ["header", "scans", "offsets", "labels"])
    header, scans = arrays["header"].tobytes(), arrays["scans"].tobytes()
    offsets, labels = arrays["offsets"].astype(np.int64), arrays["labels"]
    if len(offsets) != len(labels) + 1 or (np.diff(offsets) < 0).any() or offsets[0] < 0 or offsets[-1] > len(scans):
        raise DataError(f"{path} is damaged: its offsets do not fit {len(labels)} labels and {len(scans)} bytes")
    images = np.empty((len(labels), 32, 32, 3), np.uint8)
    # One after the other: images this small are decoded faster without threads.
    for index in range(len(labels)):
        encoded = header + scans[offsets[index] : offsets[index + 1]] + b"\xff\xd9"
        try:
            images[index] = Image.open(io.BytesIO(encoded), formats=("JPEG",))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise DataError(f"{path}: image {index} is damaged ({reason})") from error
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels


class _ArraysOnly(pickle.Unpickler):
    """Containers, text, numbers and numpy arrays; nothing else a pickle could call."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _empty_array
        if (module, name) == ("_codecs", "encode"):
            return _latin1_bytes
        raise pickle.UnpicklingError(f"{module}.{name} is refused")


def _empty_array(kind: type, shape: tuple[int, ...], code: bytes) -> np.ndarray:
    """The array numpy's pickles start from; its contents follow as state."""
    return np.ndarray(shape, code.decode() if isinstance(code, bytes) else code)


def _latin1_bytes(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes in a pickle of protocol 2."""
    return text.encode(encoding)


def _read_pickle(path: Path) -> Part:
    try:
        with path.open("rb") as stream:
            batch = _ArraysOnly(stream, encoding="bytes").load()
        images, labels = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"])
        if images.dtype != np.uint8 or images.shape != (len(labels), _VALUES):
            raise ValueError(f"data are {images.dtype} {images.shape} with {len(labels)} labels")
    except Exception as error:  # a damaged or hostile pickle can raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"{path} is damaged or not a CIFAR-10 batch ({reason})") from error
    return images.reshape(-1, *_SHAPE), labels


def _read_binary(path: Path) -> Part:
    content = np.fromfile(path, np.uint8)
    if content.size == 0 or content.size % (1 + _VALUES):
        raise DataError(f"{path} is damaged: {content.size} bytes are not a multiple of {1 + _VALUES}")
    rows = content.reshape(-1, 1 + _VALUES)
    return np.ascontiguousarray(rows[:, 1:]).reshape(-1, *_SHAPE), rows[:, 0]
