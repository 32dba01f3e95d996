import numpy as np
import pytest

from msqkd.data.augment import flip, make_augmentations, translate
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
    ],
)
def test_wrong_names_are_refused(spec: str, said: str) -> None:
    with pytest.raises(DataError, match=said) as error:
        make_augmentations([spec], "digits train")
    assert str(error.value).startswith("digits train: augmentation '")


def test_names_of_the_caller_are_skipped() -> None:
    assert make_augmentations(["mine"], "x", others=["mine"]) == []
