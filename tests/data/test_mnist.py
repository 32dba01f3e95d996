import gzip
import struct

import numpy as np
import pytest

from msqkd.data import load_data
from msqkd.errors import DataError


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write(folder, mark: str = "-", packed: bool = False) -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(0).integers(0, 256, (7, 28, 28), dtype=np.uint8)
    for prefix, count in (("train", 7), ("t10k", 3)):
        for stem, array in (("images", images[:count]), ("labels", np.arange(count))):
            name = f"{prefix}-{stem}{mark}idx{array.ndim}-ubyte"
            content = idx(array)
            (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    return images


@pytest.mark.parametrize(("place", "mark", "packed"), [(".", "-", False), (".", ".", True), ("MNIST/raw", "-", True)])
def test_plain_packed_and_nested(place: str, mark: str, packed: bool, tmp_path) -> None:
    images = write(tmp_path / place, mark, packed)
    bundle = load_data("mnist", str(tmp_path), mean=[0], std=[1])
    assert bundle.describe() == "mnist: 7 training and 3 test images of 1x28x28, 10 classes"
    got, labels = bundle.train.batch(np.array([6, 2]))
    np.testing.assert_array_equal(np.rint(got[:, 0] * 255), images[[6, 2]])
    assert labels.tolist() == [6, 2]


def test_input_shape(tmp_path) -> None:
    write(tmp_path)
    assert load_data("mnist", str(tmp_path), input_shape=(1, 32, 32)).test.batch(np.arange(3))[0].shape == (
        3,
        1,
        32,
        32,
    )


def test_missing_and_damaged(tmp_path) -> None:
    with pytest.raises(DataError, match=r"has none of train-images-idx3-ubyte, train-images-idx3-ubyte\.gz"):
        load_data("mnist", str(tmp_path))
    write(tmp_path)
    file = tmp_path / "t10k-images-idx3-ubyte"
    content = file.read_bytes()
    for damaged, said in (
        (content[:-5], "is damaged: 2347 values, its header says 2352"),
        (b"\0\0", "not an IDX file"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=said):
            load_data("mnist", str(tmp_path))
    file.unlink()
    file.with_suffix(".gz").write_bytes(gzip.compress(content)[:100])
    with pytest.raises(DataError, match=r"gz cannot be read"):
        load_data("mnist", str(tmp_path))
