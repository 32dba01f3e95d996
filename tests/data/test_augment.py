import random

import numpy as np
import pytest

from msqkd.data import ArraySplit
from msqkd.data.augment import AUGMENTATIONS, cutout, flip, make_augmentations, random_erasing, translate
from msqkd.errors import DataError


def numbered(count: int = 64, size: int = 6) -> np.ndarray:
    """Images whose pixels all differ from each other and from 0."""
    image = np.arange(1, 1 + 2 * size * size, dtype=np.uint8).reshape(1, 2, size, size)
    return np.repeat(image, count, axis=0)


def test_flip_mirrors_about_half_and_leaves_the_rest() -> None:
    images = numbered()
    result = flip(images, np.random.default_rng(0))
    mirrored = (result == images[..., ::-1]).all((1, 2, 3))
    kept = (result == images).all((1, 2, 3))
    assert (mirrored ^ kept).all()
    assert 16 < mirrored.sum() < 48


@pytest.mark.parametrize("border", ["constant", "edge"])
def test_translate_is_the_cut_of_a_padded_image(border: str) -> None:
    images = numbered()
    result = translate(images, np.random.default_rng(1), 2, border)
    assert result.shape == images.shape
    assert result.dtype == np.uint8
    padded = np.pad(images[0], ((0, 0), (2, 2), (2, 2)), mode=border)
    cuts = {(r, c): padded[:, r : r + 6, c : c + 6].tobytes() for r in range(5) for c in range(5)}
    seen = {next(place for place, cut in cuts.items() if cut == image.tobytes()) for image in result}
    assert len(seen) > 15
    assert {row for row, _ in seen} == {column for _, column in seen} == set(range(5))


def test_amount_follows_the_colon() -> None:
    images = np.ones((200, 1, 8, 8), np.float32)
    (crop,) = make_augmentations(["crop:1"], "x")
    result = crop(images, np.random.default_rng(0))
    assert result.dtype == np.float32
    assert (result[:, :, 1:-1, 1:-1] == 1).all()
    assert (result == 0).any()
    (shift,) = make_augmentations(["shift"], "x")
    assert (shift(images, np.random.default_rng(0)) == 1).all()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("flp", "did you mean 'flip'"),
        ("flip:2", "takes no number"),
        ("crop:", "from 1 to 64"),
        ("crop:0", "from 1 to 64"),
        ("crop:-1", "from 1 to 64"),
        ("shift:65", "from 1 to 64"),
        ("random_resized_crop", "unknown"),
        ("cutout:513", "the pixels must be a whole number from 1 to 512"),
        ("random_erasing:1.5", "the part of the images must be a number above 0, and at most 1"),
        ("color_jitter:much", "the part must be a number above 0, and at most 1"),
        ("auto_augment:cifar", "the policy must be one of imagenet, cifar10, svhn; did you mean 'cifar10'"),
        ("rand_augment:31", "the magnitude must be a whole number from 1 to 30"),
        ("trivial_augment:2", "takes no number"),
    ],
)
def test_wrong_names_are_refused(spec: str, said: str) -> None:
    with pytest.raises(DataError, match=said) as error:
        make_augmentations([spec], "digits train")
    assert str(error.value).startswith("digits train: augmentation '")


COLOURS = np.random.default_rng(3).integers(0, 256, (12, 3, 16, 16)).astype(np.uint8)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_every_augmentation_follows_its_generator_alone(name: str) -> None:
    (augment,) = make_augmentations([name], "x")
    before = COLOURS.copy()
    np.random.seed(4)
    expected = (np.random.get_state()[1], random.getstate())
    one, same, other = (augment(COLOURS, np.random.default_rng(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(COLOURS, before)
    assert (one.shape, one.dtype) == (COLOURS.shape, np.uint8)
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    changed = (one != COLOURS).any((1, 2, 3))
    assert changed.sum() >= 3
    alike = augment(np.repeat(COLOURS[:1], 12, 0), np.random.default_rng(0))
    assert len({image.tobytes() for image in alike}) > 1, "each image has its own randomness"
    np.testing.assert_array_equal(np.random.get_state()[1], expected[0])
    assert random.getstate() == expected[1]


def test_cutout_blackens_a_square_cut_off_at_the_border() -> None:
    images = np.ones((300, 2, 9, 7), np.float32)
    black = cutout(images, np.random.default_rng(0), 3) == 0
    assert (black[:, 0] == black[:, 1]).all()
    for image in black[:, 0]:
        rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
        assert image.sum() == len(rows) * len(columns)
        assert len(rows) == 3 or rows[0] == 0 or rows[-1] == 8
        assert len(columns) == 3 or columns[0] == 0 or columns[-1] == 6
    assert {int(image.sum()) for image in black[:, 0]} == {4, 6, 9}
    assert black[:, 0].any(0).all(), "every pixel is reached"


def test_random_erasing_covers_a_rectangle_with_the_mean() -> None:
    images = np.random.default_rng(0).normal(size=(400, 2, 20, 20)).astype(np.float32)
    result = random_erasing(images, np.random.default_rng(0), 0.25)
    covered = (result != images).any(1)
    shares = covered.mean((1, 2))
    assert 60 < (shares > 0).sum() < 140
    assert shares[shares > 0].min() > 0.01
    assert 0.25 < shares.max() < 0.36
    for index in np.flatnonzero(shares)[:20]:
        assert covered[index].sum() == covered[index].any(1).sum() * covered[index].any(0).sum()
        for channel in range(2):
            values = np.unique(result[index, channel][covered[index]])
            np.testing.assert_allclose(values, images[index, channel].mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("images", [np.zeros((2, 1, 8, 8), np.uint8), np.zeros((2, 3, 8, 8), np.float32)])
def test_colour_is_needed_for_some(images: np.ndarray) -> None:
    with pytest.raises(
        DataError, match=r"toy train: augmentation 'rand_augment' is for colour images of 8 bits; these"
    ):
        ArraySplit(images, None, (), augmentations=make_augmentations(["rand_augment"], "x"), name="toy train")


def test_names_of_the_caller_are_skipped() -> None:
    assert make_augmentations(["mine"], "x", others=["mine"]) == []
