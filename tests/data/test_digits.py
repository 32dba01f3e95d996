import numpy as np
import pytest

from msqkd.data import load_data
from msqkd.errors import DataError


def test_sizes_balance_and_split() -> None:
    bundle = load_data("digits")
    assert bundle.train.shape == (1, 32, 32)
    assert len(bundle.train) + len(bundle.test) == 1797
    assert bundle.train.classes == tuple("0123456789")
    share = np.bincount(bundle.test.labels) / (np.bincount(bundle.test.labels) + np.bincount(bundle.train.labels))
    np.testing.assert_allclose(share, 0.3, atol=0.005)
    # The same test images for ever: results are compared across machines and versions.
    assert len(bundle.test) == 539
    assert bundle.test.labels[:12].tolist() == load_data("digits", seed=5).test.labels[:12].tolist()


def test_train_and_test_share_no_sample() -> None:
    bundle = load_data("digits", input_shape=(1, 8, 8))
    train, test = (split.batch(np.arange(len(split)))[0] for split in (bundle.train, bundle.test))
    together = {image.tobytes() for image in train} & {image.tobytes() for image in test}
    assert not together


def test_input_shape_and_normalisation() -> None:
    raw, _ = load_data("digits", input_shape=(1, 8, 8), mean=[0], std=[1]).train.batch(np.arange(20))
    assert raw.min() == 0
    assert raw.max() == 1
    np.testing.assert_allclose(raw * 16, np.rint(raw * 16), atol=0.04)  # the original 17 grey levels
    bundle = load_data("digits", input_shape=(3, 16, 24))
    images, _ = bundle.test.batch(np.arange(4))
    assert images.shape == (4, 3, 16, 24)
    np.testing.assert_array_equal(images[:, 0], images[:, 2])
    everything, _ = load_data("digits", input_shape=(1, 8, 8)).train.batch(np.arange(1258))
    assert abs(everything.mean()) < 0.02
    assert abs(everything.std() - 1) < 0.02


def test_takes_no_root(tmp_path) -> None:
    with pytest.raises(DataError, match="takes no root"):
        load_data("digits", str(tmp_path))
