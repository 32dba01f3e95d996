import io
import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from msqkd.data import load_data
from msqkd.errors import DataError

EOI = b"\xff\xd9"


def blocks(count: int, seed: int) -> tuple:
    """Images of 8x8 blocks of one grey, which JPEG keeps nearly, uint8 (N, 3, 32, 32), and labels."""
    grey = np.random.default_rng(seed).integers(0, 256, (count, 1, 4, 4), dtype=np.uint8)
    return np.kron(grey, np.ones((1, 3, 8, 8), np.uint8)), np.arange(count) % 10


def write_pack(path, images: np.ndarray, labels: np.ndarray) -> dict:
    """The pack format; one header for all because Pillow's default tables do not depend on the image."""
    files = []
    for image in images:
        stream = io.BytesIO()
        Image.fromarray(image.transpose(1, 2, 0)).save(stream, "JPEG", quality=90)
        files.append(stream.getvalue())
    start = files[0].index(b"\xff\xda")
    assert len({file[:start] for file in files}) == 1
    scans = [file[start : -len(EOI)] for file in files]
    arrays = {
        "header": np.frombuffer(files[0][:start], np.uint8),
        "scans": np.frombuffer(b"".join(scans), np.uint8),
        "offsets": np.cumsum([0, *map(len, scans)]).astype(np.uint32),
        "labels": labels.astype(np.uint8),
    }
    np.savez(path, **arrays)
    return arrays


def write_pickles(folder, images: np.ndarray, labels: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    parts = [(f"data_batch_{i + 1}", slice(2 * i, 2 * i + 2)) for i in range(5)] + [("test_batch", slice(0, 3))]
    for name, part in parts:
        batch = {b"data": images[part].reshape(-1, 3072), b"labels": labels[part].tolist(), b"batch_label": b"x"}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))


def write_binaries(folder, images: np.ndarray, labels: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    rows = np.concatenate([labels[:, None].astype(np.uint8), images.reshape(-1, 3072)], axis=1)
    for i in range(5):
        rows[2 * i : 2 * i + 2].tofile(folder / f"data_batch_{i + 1}.bin")
    rows[:3].tofile(folder / "test_batch.bin")


def pixels(split) -> np.ndarray:
    return np.rint(split.batch(np.arange(len(split)))[0] * 255)


def test_pack(tmp_path) -> None:
    (train, labels), (test, test_labels) = blocks(12, 0), blocks(5, 1)
    write_pack(tmp_path / "train.npz", train, labels)
    write_pack(tmp_path / "test.npz", test, test_labels)
    bundle = load_data("cifar10", str(tmp_path), mean=[0], std=[1])
    assert bundle.describe() == "cifar10: 12 training and 5 test images of 3x32x32, 10 classes"
    assert bundle.train.labels.tolist() == labels.tolist()
    assert np.abs(pixels(bundle.train) - train).max() <= 6
    assert np.abs(pixels(bundle.test) - test).max() <= 6


@pytest.mark.parametrize("folder", ["cifar-10-batches-py", "."])
def test_pickles(folder: str, tmp_path) -> None:
    images, labels = blocks(10, 0)
    write_pickles(tmp_path / folder, images, labels)
    bundle = load_data("cifar10", str(tmp_path), mean=[0], std=[1])
    np.testing.assert_array_equal(pixels(bundle.train), images)
    assert bundle.train.labels.tolist() == labels.tolist()
    assert len(bundle.test) == 3


@pytest.mark.parametrize("folder", ["cifar-10-batches-bin", "."])
def test_binaries(folder: str, tmp_path) -> None:
    images, labels = blocks(10, 0)
    write_binaries(tmp_path / folder, images, labels)
    bundle = load_data("cifar10", str(tmp_path), mean=[0], std=[1])
    np.testing.assert_array_equal(pixels(bundle.train), images)
    np.testing.assert_array_equal(pixels(bundle.test), images[:3])
    assert bundle.train.classes[3] == "cat"


def test_default_normalisation(tmp_path) -> None:
    write_binaries(tmp_path, np.full((10, 3, 32, 32), 255, np.uint8), np.zeros(10, int))
    images, _ = load_data("cifar10", str(tmp_path)).train.batch(np.array([0]))
    expected = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    np.testing.assert_allclose(images[0, :, 5, 5], expected, rtol=1e-5)


def test_nothing_there(tmp_path) -> None:
    with pytest.raises(DataError, match=r"holds no CIFAR-10; looked for train.npz, data_batch_1, data_batch_1.bin"):
        load_data("cifar10", str(tmp_path))


def test_incomplete_folder(tmp_path) -> None:
    write_binaries(tmp_path, *blocks(10, 0))
    (tmp_path / "data_batch_4.bin").unlink()
    with pytest.raises(DataError, match=r"lacks data_batch_4\.bin$"):
        load_data("cifar10", str(tmp_path))


def test_a_pickle_that_calls_something_is_refused(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pickles(tmp_path, *blocks(10, 0))
    called = []
    monkeypatch.setattr(sys, "setswitchinterval", called.append)

    class Hostile:
        def __reduce__(self) -> tuple:
            return sys.setswitchinterval, (1,)

    (tmp_path / "data_batch_2").write_bytes(pickle.dumps({b"data": Hostile(), b"labels": []}, protocol=2))
    with pytest.raises(DataError, match=r"data_batch_2 is damaged.*is refused"):
        load_data("cifar10", str(tmp_path))
    assert not called


@pytest.mark.parametrize("keep", [0, 20, 3000])
def test_truncated_pickle(keep: int, tmp_path) -> None:
    write_pickles(tmp_path, *blocks(10, 0))
    file = tmp_path / "test_batch"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(DataError, match="test_batch is damaged or not a CIFAR-10 batch"):
        load_data("cifar10", str(tmp_path))


def test_truncated_binary(tmp_path) -> None:
    write_binaries(tmp_path, *blocks(10, 0))
    (tmp_path / "test_batch.bin").write_bytes(b"\0" * 3072)
    with pytest.raises(DataError, match=r"test_batch\.bin is damaged: 3072 bytes"):
        load_data("cifar10", str(tmp_path))


def test_damaged_pack(tmp_path) -> None:
    images, labels = blocks(4, 0)
    write_pack(tmp_path / "train.npz", images, labels)
    arrays = write_pack(tmp_path / "test.npz", images, labels)
    np.savez(tmp_path / "test.npz", **{**arrays, "header": arrays["header"][:30]})
    with pytest.raises(DataError, match=r"test\.npz: image 0 is damaged"):
        load_data("cifar10", str(tmp_path))
    np.savez(tmp_path / "test.npz", **{**arrays, "offsets": arrays["offsets"] + 1})
    with pytest.raises(DataError, match="its offsets do not fit"):
        load_data("cifar10", str(tmp_path))
    (tmp_path / "test.npz").unlink()
    with pytest.raises(DataError, match=r"lacks test\.npz"):
        load_data("cifar10", str(tmp_path))
