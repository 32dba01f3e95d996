"""``digits``: the 1,797 handwritten digits that come with scikit-learn, real data with nothing to download.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository (1998).
"""

from __future__ import annotations

import numpy as np

from msqkd.data.base import DataBundle
from msqkd.data.registry import Request, register
from msqkd.errors import DataError

_TEST_SHARE = 0.3
_SPLIT_SEED = 20  # fixed: every result on digits must be on the same test images
_GREATEST = 16  # pixels are counts of 0 to 16


@register("digits")
def read_digits(request: Request) -> DataBundle:
    """8x8 grey images of 10 digits, resized to `input_shape` (default 1x32x32); 70 % of each digit are for training.

    The split is the same always. Pixels 0..16 become 0..255.
    """
    if request.root is not None:
        raise DataError("data 'digits' comes with scikit-learn and takes no root")
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.round(data.images * (255 / _GREATEST)).astype(np.uint8)[:, None]
    labels = data.target.astype(np.int32)
    classes = [str(digit) for digit in data.target_names]
    in_test = _test_mask(labels)
    train, test = (
        request.arrays(part, images[mask], labels[mask], classes, shape=(1, 32, 32), mean=(0.305,), std=(0.376,))
        for part, mask in (("train", ~in_test), ("test", in_test))
    )
    return DataBundle(request.name, train, test)


def _test_mask(labels: np.ndarray) -> np.ndarray:
    """Which samples are for testing: `_TEST_SHARE` of each class, bool (N,)."""
    mask = np.zeros(len(labels), bool)
    # RandomState, because numpy promises its stream never to change.
    random = np.random.RandomState(_SPLIT_SEED)
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        mask[members[: round(_TEST_SHARE * len(members))]] = True
    return mask
