"""The samples of a calibration stand for the training set, however that is sorted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msqkd.data import Split
from msqkd.pipeline.ranking import ranking_split
from msqkd.pipeline.stages import opened
from msqkd.progress import Reporter
from msqkd.recipe import load_recipe, make_recipe

Write = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("graph_mode")


@pytest.fixture
def by_class(tiny: Write, tmp_path: Path) -> Write:
    """`tiny` with a training set that is sorted by class, the number of each image in its pixels."""
    with np.load(tmp_path / "data.npz") as archive:
        arrays = dict(archive)
    arrays["train_labels"] = np.sort(arrays["train_labels"])
    arrays["train_images"] = np.broadcast_to(np.arange(72, dtype=np.uint8).reshape(-1, 1, 1, 1), (72, 8, 8, 1))
    np.savez(tmp_path / "data.npz", **arrays)
    return tiny


def numbers(split: Split) -> list[int]:
    images, _ = split.batch(np.arange(len(split)))
    return np.rint(np.asarray(images)[:, 0, 0, 0] * 255).astype(int).tolist()


def drawn(file: Path, folder: Path, ranking: int = 30, **changes: Any) -> tuple[list[int], list[int]]:
    """The samples calibrated on, and those that candidates are ranked on."""
    with opened(load_recipe(str(file)), folder, "calibrate", Reporter(quiet=True)) as objects:
        if changes:
            objects = objects.variant(make_recipe({**objects.recipe.to_dict(), **changes}))
        return numbers(objects.calibration), numbers(ranking_split(objects, ranking))


def test_a_sorted_set_is_drawn_from_evenly(by_class: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msqkd.pipeline.objects.random_weights", lambda *arguments: None)  # only samples are looked at
    found, others = drawn(by_class(), tmp_path / "one")
    assert np.bincount(np.array(found) // 24).tolist() == [8, 8, 8]
    assert np.bincount(np.array(others) // 24).tolist() == [10, 10, 10]
    assert not set(found) & set(others)
    # The same when it is opened again, in other batches, for another command's variants, and to the first of them.
    assert drawn(by_class(), tmp_path / "one") == (found, others)
    batches = {"samples": 24, "batch_size": 7}
    assert drawn(by_class(calibration=batches), tmp_path / "two")[0] == found
    assert drawn(by_class(), tmp_path / "one", calibration={**batches, "observer": "minmax"})[0] == found
    assert drawn(by_class(calibration={**batches, "iterations": 3}), tmp_path / "three")[0] == found[:21]
    assert drawn(by_class(seed=1), tmp_path / "four")[0] != found
