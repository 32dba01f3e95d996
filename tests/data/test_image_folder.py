import numpy as np
import pytest
from PIL import Image

from msqkd.data import load_data
from msqkd.data.images import random_resized_crop
from msqkd.errors import DataError

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}
PLAIN = {"input_shape": (3, 16, 16), "mean": [0], "std": [1]}


def write(root, train: int = 3, test: str = "val") -> None:
    for part, count in (("train", train), (test, 1)):
        for name, colour in COLOURS.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                size = (20 + 7 * index, 33 - 5 * index)
                Image.new("RGB", size, colour).save(folder / f"{index}.{('png', 'jpg', 'bmp')[index % 3]}")


@pytest.mark.parametrize("test", ["val", "test"])
def test_classes_order_and_colours(test: str, tmp_path) -> None:
    write(tmp_path, test=test)
    (tmp_path / "train" / "red" / "notes.txt").write_text("no image")
    bundle = load_data("image_folder", str(tmp_path), **PLAIN)
    assert bundle.train.classes == ("blue", "green", "red")
    assert bundle.train.labels.tolist() == [0, 1, 2] * 3  # round the classes, so that a prefix is balanced
    images, labels = bundle.train.batch(np.arange(9))
    assert images.shape == (9, 3, 16, 16)
    np.testing.assert_allclose(images.mean((2, 3)), np.eye(3)[2 - labels], atol=0.02)
    assert len(bundle.test) == 3


def test_evaluation_takes_the_centre(tmp_path) -> None:
    write(tmp_path)
    picture = np.zeros((64, 128), np.uint8)
    picture[:, 36:92] = 255  # the central 56 columns: 87.5 % of the shorter side
    picture[:4] = picture[-4:] = 0
    Image.fromarray(picture).save(tmp_path / "val" / "blue" / "0.png")
    images, _ = load_data("image_folder", str(tmp_path), **{**PLAIN, "input_shape": (1, 56, 56)}).test.batch(
        np.array([0])
    )
    np.testing.assert_array_equal(images, 1)


def test_random_crop_is_determined_by_rng_alone(tmp_path) -> None:
    write(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for name in COLOURS:
        Image.fromarray(noise).save(tmp_path / "train" / name / "0.png")
    split = load_data("image_folder", str(tmp_path), augment=["random_resized_crop", "flip"], **PLAIN).train
    one, two, other = (split.batch(np.arange(9), np.random.default_rng(seed))[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()
    assert (one[0] != one[1]).any()  # the same picture, cut differently
    plain, _ = split.batch(np.arange(9))
    np.testing.assert_array_equal(plain[0], plain[1])


def test_random_crop_of_any_shape_of_picture() -> None:
    rng = np.random.default_rng(0)
    for size in ((1, 1), (3, 500), (500, 3), (50, 60)):
        picture = Image.new("RGB", size, (10, 20, 30))
        for _ in range(20):
            result = random_resized_crop(picture, (3, 8, 9), rng)
            assert result.shape == (3, 8, 9)
            np.testing.assert_array_equal(result.reshape(3, -1).T, [[10, 20, 30]] * 72)


def test_other_kinds_of_pictures_become_rgb(tmp_path) -> None:
    write(tmp_path)
    Image.new("P", (20, 20), 3).save(tmp_path / "val" / "blue" / "0.png")
    Image.new("RGBA", (20, 20), (9, 8, 7, 0)).save(tmp_path / "val" / "green" / "0.png")
    images, _ = load_data("image_folder", str(tmp_path), **PLAIN).test.batch(np.arange(3))
    np.testing.assert_allclose(images[1].mean((1, 2)) * 255, [9, 8, 7], atol=1e-3)


def test_damaged_image_is_named(tmp_path) -> None:
    write(tmp_path)
    file = tmp_path / "val" / "green" / "0.png"
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"not an image"):
        file.write_bytes(damaged)
        split = load_data("image_folder", str(tmp_path), **PLAIN).test
        split.batch(np.array([0]))
        with pytest.raises(DataError, match=r"green/0\.png: the image is damaged"):
            split.batch(np.arange(3))
    file.unlink()
    with pytest.raises(DataError, match=r"green/0\.png: the image no longer exists"):
        split.batch(np.arange(3))


def test_sixteen_bits_are_refused(tmp_path) -> None:
    write(tmp_path)
    Image.fromarray(np.full((20, 20), 40000, np.uint16)).save(tmp_path / "val" / "red" / "0.png")
    with pytest.raises(DataError, match=r"red/0\.png: an image with more than 8 bits"):
        load_data("image_folder", str(tmp_path), **PLAIN).test.batch(np.arange(3))


def test_folders_that_do_not_fit(tmp_path) -> None:
    with pytest.raises(DataError, match="has no folder train"):
        load_data("image_folder", str(tmp_path))
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="has no folder val or test"):
        load_data("image_folder", str(tmp_path))
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match=r"train has no class folders"):
        load_data("image_folder", str(tmp_path))
    for part in ("train", "val"):
        (tmp_path / part / "cat").mkdir()
    with pytest.raises(DataError, match=r"train/cat holds no image; looked for \.jpg"):
        load_data("image_folder", str(tmp_path))


def test_classes_must_agree(tmp_path) -> None:
    write(tmp_path)
    (tmp_path / "val" / "red").rename(tmp_path / "val" / "read")
    with pytest.raises(DataError, match=r"'read' is only in .*val; did you mean 'red'"):
        load_data("image_folder", str(tmp_path))


def test_only_one_or_three_channels(tmp_path) -> None:
    write(tmp_path)
    with pytest.raises(DataError, match="1 or 3 channels, the input shape has 4"):
        load_data("image_folder", str(tmp_path), input_shape=(4, 8, 8))
