import numpy as np
import pytest

from msqkd.data import load_data
from msqkd.errors import DataError


def save(path, **change: object) -> str:
    rng = np.random.default_rng(0)
    arrays = {
        "train_images": rng.integers(0, 256, (6, 4, 5, 3), dtype=np.uint8),
        "train_labels": np.array([0, 1, 2, 0, 1, 2]),
        "test_images": rng.integers(0, 256, (2, 4, 5, 3), dtype=np.uint8),
        "test_labels": np.array([2, 3]),
        **change,
    }
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return str(path)


def test_uint8_are_channels_last(tmp_path) -> None:
    file = save(tmp_path / "mine.npz")
    bundle = load_data("arrays", file)
    assert bundle.train.shape == (3, 4, 5)
    assert bundle.train.classes == ("0", "1", "2", "3")
    images, labels = bundle.train.batch(np.array([4]))
    np.testing.assert_allclose(images[0], np.load(file)["train_images"][4].transpose(2, 0, 1) / 255, rtol=1e-6)
    assert labels.tolist() == [1]


def test_float_are_channels_first_and_names_are_read(tmp_path) -> None:
    rng = np.random.default_rng(1)
    train, test = rng.normal(size=(6, 2, 4, 4)), rng.normal(size=(2, 2, 4, 4)).astype(np.float32)
    file = save(tmp_path / "f.npz", train_images=train, test_images=test, classes=np.array(["p", "q", "r", "s"]))
    bundle = load_data("arrays", file)
    assert bundle.test.classes == ("p", "q", "r", "s")
    np.testing.assert_array_equal(bundle.train.batch(np.arange(6))[0], train.astype(np.float32))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"test_labels": None}, "no array test_labels; found "),
        ({"test_labels": np.array([0])}, "2 images but 1 labels"),
        ({"test_labels": np.array([0, -1])}, "outside 0 to 2, the first is -1 at sample 1"),
        ({"train_images": np.zeros((6, 3, 32, 32), np.uint8)}, r"\(N, H, W, C\)"),
        ({"train_labels": np.array([{}] * 6, object)}, "plain arrays"),
        ({"classes": np.array(["only"])}, "outside 0 to 0"),
    ],
)
def test_what_does_not_fit(change: dict, said: str, tmp_path) -> None:
    with pytest.raises(DataError, match=said):
        load_data("arrays", save(tmp_path / "x.npz", **change))


def test_damaged_file(tmp_path) -> None:
    file = tmp_path / "x.npz"
    save(file)
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], b"junk", b""):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"x\.npz is damaged"):
            load_data("arrays", str(file))
