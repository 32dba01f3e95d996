"""The order in which a few samples are taken for all."""

from __future__ import annotations

from typing import Any, Optional

import numpy as np
import pytest

from msqkd.data import ArraySplit, Split, TensorSplit, draw, fair_order, subset

SORTED = np.repeat(np.arange(5), 20)
"""Labels as in a file that was written class by class."""


def split_of(labels: Optional[np.ndarray], count: int = 100) -> Split:
    return ArraySplit(np.zeros((count, 1, 2, 2), np.uint8), labels, tuple("abcde"))


@pytest.mark.parametrize("count", [5, 10, 35, 98])
def test_every_first_part_is_balanced(count: int) -> None:
    order = fair_order(split_of(SORTED), 3)
    assert sorted(order) == list(range(100))
    counts = np.bincount(SORTED[order[:count]], minlength=5)
    assert counts.max() - counts.min() <= 1


def test_a_class_with_few_samples_gives_all_of_them() -> None:
    labels = np.repeat([0, 1, 2], [80, 3, 17])
    order = fair_order(split_of(labels), 0)
    assert np.bincount(labels[order[:9]]).tolist() == [3, 3, 3]
    assert np.bincount(labels[order[:43]]).tolist() == [23, 3, 17]


def test_the_seed_decides() -> None:
    orders = [fair_order(split_of(SORTED), seed).tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    inside = [[index for index in order if SORTED[index] == 0] for order in (orders[0], orders[2])]
    assert inside[0] != sorted(inside[0]), "within a class, too, none of the first ones goes first"
    assert inside[0] != inside[1]
    assert [SORTED[index] for index in orders[0][:5]] != [SORTED[index] for index in orders[0][5:10]]


@pytest.mark.parametrize(
    "labels",
    [None, np.linspace(0, 1, 100, dtype=np.float32), np.zeros((100, 4), np.int32), (SORTED, SORTED)],
    ids=["none", "numbers", "several", "two arrays"],
)
def test_without_classes_the_order_is_random(labels: Any) -> None:
    split = split_of(None) if labels is None else TensorSplit(np.zeros((100, 3), np.float32), labels)
    order = fair_order(split, 7)
    assert sorted(order) == list(range(100))
    assert len(np.unique(SORTED[order[:40]])) == 5


class Counted:
    """A source of samples, which tells how many were read."""

    read = 0

    def __len__(self) -> int:
        return 100

    def batch(self, indices: np.ndarray, rng: Any) -> tuple[Any, Any]:
        self.read += len(indices)
        return np.zeros((len(indices), 3), np.float32), SORTED[indices]


def test_no_sample_is_read_for_the_order() -> None:
    source = Counted()
    split = TensorSplit.of(source, (), "own")
    before = source.read
    order = fair_order(split, 0)
    assert source.read == before
    assert len(np.unique(SORTED[order[:40]])) == 5


def test_of_a_part_the_labels_of_the_part_count() -> None:
    part = subset(split_of(SORTED), np.arange(30, 90))
    order = fair_order(part, 0)
    assert np.bincount(SORTED[30:90][order[:12]], minlength=5).tolist() == [0, 3, 3, 3, 3]


def test_a_few_stand_for_all() -> None:
    split = split_of(SORTED)
    few = draw(split, 10, seed=4)
    assert len(few) == 10
    assert np.bincount(few.labels).tolist() == [2, 2, 2, 2, 2]
    assert draw(split, 100) is split
