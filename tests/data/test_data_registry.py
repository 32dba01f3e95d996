import numpy as np
import pytest

from msqkd.data import READERS, DataBundle, Request, load_data, register
from msqkd.errors import DataError


@pytest.fixture
def tens():
    """A dataset whose pixel is the sample's number."""

    @register("tens")
    def read(request: Request) -> DataBundle:
        parts = []
        for part, count in (("train", 40), ("test", 10)):
            images = np.arange(count, dtype=np.uint8).repeat(4).reshape(count, 1, 2, 2)
            parts.append(request.arrays(part, images, np.arange(count) % 10, [str(i) for i in range(10)]))
        return DataBundle(request.name, *parts)

    yield read
    del READERS["tens"]


def test_unknown_name() -> None:
    with pytest.raises(DataError, match=r"data 'cifar' is unknown; allowed: arrays, cifar10.*did you mean 'cifar10'"):
        load_data("cifar")


def test_registered_reader_is_used_and_train_alone_is_augmented(tens: object) -> None:
    bundle = load_data("tens", augment=["shift:1"], mean=[0.5], std=[0.25], input_shape=[1, 4, 4])
    assert bundle.describe() == "tens: 40 training and 10 test images of 1x4x4, 10 classes"
    images, _ = bundle.test.batch(np.arange(10), np.random.default_rng(0))
    np.testing.assert_allclose(images[:, 0, 0, 0], (np.arange(10) / 255 - 0.5) / 0.25, rtol=1e-5)


def test_samples_are_drawn_by_seed(tens: object) -> None:
    def numbers(seed: int) -> list:
        train = load_data("tens", train_samples=7, test_samples=3, seed=seed).train
        return np.rint(train.batch(np.arange(len(train)))[0][:, 0, 0, 0] * 255).astype(int).tolist()

    assert len(set(numbers(0))) == 7
    assert numbers(0) == numbers(0) != numbers(1)
    with pytest.raises(DataError, match="tens test: 11 samples were asked for; 1 to 10"):
        load_data("tens", test_samples=11)
    with pytest.raises(DataError, match="0 samples"):
        load_data("tens", train_samples=0)


@pytest.mark.parametrize("shape", [(3, 32), (0, 32, 32), (1, 2.5, 2)])
def test_input_shape_must_be_three_sizes(tens: object, shape: tuple) -> None:
    with pytest.raises(DataError, match="input_shape is"):
        load_data("tens", input_shape=shape)


@pytest.mark.parametrize("name", ["cifar10", "mnist", "image_folder", "mindrecord", "arrays"])
def test_a_root_is_needed_and_must_exist(name: str, tmp_path) -> None:
    with pytest.raises(DataError, match=f"data '{name}' needs a root: "):
        load_data(name)
    with pytest.raises(DataError, match=f"data '{name}': .*nowhere does not exist"):
        load_data(name, str(tmp_path / "nowhere"))


def test_empty_and_mislabelled_data_are_refused() -> None:
    @register("wrong")
    def read(request: Request) -> DataBundle:
        images = np.zeros((2, 1, 2, 2), np.uint8)
        good = request.arrays("train", images, np.zeros(2, int), ["a"])
        return DataBundle("wrong", good, request.arrays("test", images[:count], labels[:count], ["a"]))

    try:
        labels, count = np.array([0, 4]), 2
        with pytest.raises(DataError, match="wrong test: 1 of 2 labels are outside 0 to 0, the first is 4"):
            load_data("wrong")
        count = 0
        with pytest.raises(DataError, match="wrong test is empty"):
            load_data("wrong")
    finally:
        del READERS["wrong"]
