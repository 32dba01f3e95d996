import numpy as np
import pytest

from msqkd.data.augment import make_augmentations
from msqkd.data.base import ArraySplit, DataBundle, subset
from msqkd.errors import DataError

CLASSES = ("a", "b", "c")


def make(count: int = 9, **options: object) -> ArraySplit:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 3, 4, 5), dtype=np.uint8)
    return ArraySplit(images, np.arange(count) % 3, CLASSES, name="some train", **options)


def test_batch_is_normalised_float32_in_the_asked_order() -> None:
    images = np.arange(2 * 3 * 2 * 2, dtype=np.uint8).reshape(2, 3, 2, 2) * 10
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    split = ArraySplit(images, np.array([5, 7]), ("x",) * 8, mean=mean, std=std)
    got, labels = split.batch(np.array([1, 0, 1]))
    column = np.reshape(mean, (3, 1, 1)), np.reshape(std, (3, 1, 1))
    expected = (images[[1, 0, 1]] / 255 - column[0]) / column[1]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert got.dtype == np.float32
    assert labels.dtype == np.int32
    assert labels.tolist() == [7, 5, 7]


def test_float_images_are_taken_as_they_are() -> None:
    images = np.linspace(-3, 3, 32).reshape(2, 1, 4, 4)
    got, _ = ArraySplit(images, np.zeros(2, int), ("x",)).batch(np.arange(2))
    np.testing.assert_array_equal(got, images.astype(np.float32))


def test_augmentation_needs_rng_and_is_determined_by_it() -> None:
    split = make(augmentations=make_augmentations(["flip", "crop:2"], "x"))
    plain, _ = make().batch(np.arange(9))
    np.testing.assert_array_equal(split.batch(np.arange(9))[0], plain)
    one, two = (split.batch(np.arange(9), np.random.default_rng(3))[0] for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert (one != plain).any()
    assert (split.batch(np.arange(9), np.random.default_rng(4))[0] != one).any()
    np.testing.assert_array_equal(split.batch(np.arange(9))[0], plain)  # the images themselves are unchanged


def test_shape_resizes_and_repeats_one_channel() -> None:
    flat = np.full((2, 1, 4, 4), 77, np.uint8)
    got, _ = ArraySplit(flat, np.zeros(2, int), ("x",), shape=(3, 8, 6)).batch(np.arange(2))
    assert got.shape == (2, 3, 8, 6)
    np.testing.assert_allclose(got, 77 / 255, rtol=1e-6)
    ramp = np.tile(np.array([0, 10, 20, 30], np.float32), (1, 1, 4, 1))
    wide, _ = ArraySplit(ramp, np.zeros(1, int), ("x",), shape=(1, 4, 8)).batch(np.arange(1))
    np.testing.assert_allclose(wide[0, 0, 0], [0, 2.5, 7.5, 12.5, 17.5, 22.5, 27.5, 30])


@pytest.mark.parametrize("index", [-1, 9])
def test_batch_refuses_samples_that_are_not_there(index: int) -> None:
    with pytest.raises(IndexError, match="0 to 8"):
        make().batch(np.array([0, index]))
    with pytest.raises(IndexError, match="0 to 2"):
        subset(make(), 3).batch(np.array([0, 3 if index > 0 else index]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shape": (1, 4, 5)}, "3 channels .* cannot be given the 1"),
        ({"shape": (4, 4, 5)}, "3 channels"),
        ({"mean": (0.5, 0.5)}, "mean is .0.5, 0.5."),
        ({"mean": (float("nan"),)}, "mean is"),
        ({"std": (0.0,)}, "greater than 0"),
        ({"std": (1.0, 1.0, -1.0)}, "greater than 0"),
    ],
)
def test_options_that_do_not_fit(change: dict, said: str) -> None:
    with pytest.raises(DataError, match=f"^some train: .*{said}"):
        make(**change)


@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        (np.zeros((2, 3, 4), np.uint8), np.zeros(2, int), r"\(N, C, H, W\)"),
        (np.zeros((2, 1, 0, 4), np.uint8), np.zeros(2, int), r"\(N, C, H, W\)"),
        (np.zeros((2, 1, 4, 4), np.int32), np.zeros(2, int), "int32"),
        (np.full((2, 1, 4, 4), np.inf), np.zeros(2, int), "not finite"),
        (np.zeros((2, 1, 4, 4), np.uint8), np.zeros(3, int), "2 images but 3 labels"),
        (np.zeros((2, 1, 4, 4), np.uint8), np.zeros(2), "float64"),
        (np.zeros((2, 1, 4, 4), np.uint8), np.zeros((2, 1), int), "shape"),
        (np.zeros((2, 1, 4, 4), np.uint8), np.array([0, 2**40]), "32 bits"),
    ],
)
def test_arrays_that_do_not_fit(images: np.ndarray, labels: np.ndarray, said: str) -> None:
    with pytest.raises(DataError, match=said):
        ArraySplit(images, labels, CLASSES)


def test_unlabelled_split_gives_minus_one() -> None:
    split = ArraySplit(np.zeros((3, 1, 2, 2), np.uint8), None, ())
    assert split.batch(np.arange(2))[1].tolist() == [-1, -1]
    split.check_labels(1)
    assert subset(split, 2).labels is None


def test_check_labels_names_the_first_and_counts() -> None:
    split = ArraySplit(np.zeros((5, 1, 2, 2), np.uint8), np.array([0, 9, 10, -1, 11]), CLASSES, name="mine test")
    with pytest.raises(DataError, match="mine test: 3 of 5 labels are outside 0 to 9, the first is 10 at sample 2"):
        split.check_labels(10)
    make().check_labels(3)


def test_subset() -> None:
    split = make()
    part = subset(split, [4, 0, 8])
    assert (len(part), part.classes, part.shape) == (3, CLASSES, (3, 4, 5))
    assert part.labels.tolist() == [1, 0, 2]
    images, labels = part.batch(np.array([2, 0]))
    expected, _ = split.batch(np.array([8, 4]))
    np.testing.assert_array_equal(images, expected)
    assert labels.tolist() == [2, 1]
    assert subset(part, 2).labels.tolist() == [1, 0]
    assert len(subset(split, 100)) == 9
    assert subset(split, 4).labels.tolist() == [0, 1, 2, 0]


def test_subset_keeps_the_augmentation() -> None:
    split = make(augmentations=make_augmentations(["flip"], "x"))
    part = subset(split, np.arange(5, 9))
    np.testing.assert_array_equal(
        part.batch(np.arange(4), np.random.default_rng(0))[0], split.batch(np.arange(5, 9), np.random.default_rng(0))[0]
    )


def test_nothing_left_is_an_error() -> None:
    empty = ArraySplit(np.zeros((0, 1, 2, 2), np.uint8), np.zeros(0, int), CLASSES)
    for split, n in ((make(), 0), (make(), -3), (empty, 5)):
        with pytest.raises(DataError, match="a part of it was asked for that holds no sample"):
            subset(split, n)
    with pytest.raises(DataError, match="no sample"):
        subset(make(), [])
    with pytest.raises(DataError, match="there is no sample 9; 0 to 8"):
        subset(make(), [0, 9])


def test_describe() -> None:
    bundle = DataBundle("some", make(), make(4))
    assert bundle.describe() == "some: 9 training and 4 test images of 3x4x5, 3 classes"
