import io

import numpy as np
import pytest
from mindspore.mindrecord import FileWriter
from PIL import Image

from msqkd.data import load_data
from msqkd.errors import DataError


def write(path, images: list, labels: list, schema: dict, image: str = "image") -> None:
    writer = FileWriter(str(path), shard_num=1)
    writer.add_schema({image: schema, "label": {"type": "int32"}}, "test")
    writer.write_raw_data([{image: i, "label": label} for i, label in zip(images, labels)])
    writer.commit()


def encoded(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (10, 12), (value, 0, 255)).save(stream, "PNG")
    return stream.getvalue()


def test_encoded_images(tmp_path) -> None:
    for part, count in (("train", 5), ("test", 2)):
        write(tmp_path / f"{part}.mindrecord", [encoded(9 * i) for i in range(count)], range(count), {"type": "bytes"})
    bundle = load_data("mindrecord", str(tmp_path), input_shape=(3, 8, 8), mean=[0], std=[1])
    assert bundle.describe() == "mindrecord: 5 training and 2 test images of 3x8x8, 5 classes"
    order = np.argsort(bundle.train.labels)
    images, labels = bundle.train.batch(order)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(images[:, :, 4, 4] * 255, [(9 * i, 0, 255) for i in range(5)], atol=1e-3)


def test_arrays(tmp_path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3)).astype(np.int32)
    for part in ("train", "test"):
        write(tmp_path / f"{part}.mindrecord", list(pictures), [0, 1, 2], {"type": "int32", "shape": [4, 5, 3]})
    split = load_data("mindrecord", str(tmp_path), mean=[0], std=[1]).test
    assert split.shape == (3, 4, 5)
    images, _ = split.batch(np.argsort(split.labels))
    np.testing.assert_array_equal(np.rint(images * 255), pictures.transpose(0, 3, 1, 2))


def test_array_values_outside_uint8(tmp_path) -> None:
    for part in ("train", "test"):
        pictures = [np.full((2, 2, 1), 300, np.int32)]
        write(tmp_path / f"{part}.mindrecord", pictures, [0], {"type": "int32", "shape": [2, 2, 1]})
    with pytest.raises(DataError, match="from 0 to 255; found int32 from 300"):
        load_data("mindrecord", str(tmp_path))


def test_damaged_image_is_named(tmp_path) -> None:
    for part in ("train", "test"):
        write(tmp_path / f"{part}.mindrecord", [encoded(1)[:30]], [0], {"type": "bytes"})
    split = load_data("mindrecord", str(tmp_path)).test
    with pytest.raises(DataError, match="mindrecord test, sample 0: the image is damaged"):
        split.batch(np.array([0]))


def test_missing_damaged_and_other_columns(tmp_path) -> None:
    with pytest.raises(DataError, match=r"train\.mindrecord does not exist"):
        load_data("mindrecord", str(tmp_path))
    (tmp_path / "train.mindrecord").write_bytes(b"junk" * 50)
    with pytest.raises(DataError, match=r"train\.mindrecord cannot be read as a MindRecord file"):
        load_data("mindrecord", str(tmp_path))
    (tmp_path / "train.mindrecord").unlink()
    write(tmp_path / "train.mindrecord", [encoded(1)], [0], {"type": "bytes"}, image="images")
    with pytest.raises(DataError, match=r"no column 'image'; found .*did you mean 'images'"):
        load_data("mindrecord", str(tmp_path))
