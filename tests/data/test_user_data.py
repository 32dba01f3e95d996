"""Samples of the user's own: what a factory may give, and what is said of what it may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest

from msqkd.data import DataBundle, InputSpec, TensorSplit, load_data, subset
from msqkd.errors import DataError, ModelError

SPECS = (InputSpec("ids", (4,), "int32"), InputSpec("weight", (), "float32"))
IDS = np.arange(24).reshape(6, 4)
WEIGHT = np.linspace(0, 1, 6)
LABELS = np.arange(6) % 3


class Batches:
    """A source with random augmentation."""

    def __len__(self) -> int:
        return 6

    def batch(self, indices: np.ndarray, rng: Any = None) -> tuple[Any, Any]:
        moved = 0 if rng is None else rng.integers(1, 9)
        return (IDS[indices] + moved, WEIGHT[indices]), LABELS[indices]


class Items:
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return {"weight": WEIGHT[index], "ids": IDS[index]}, LABELS[index]


FORMS: dict[str, Callable[[], Any]] = {
    "pair": lambda: ((IDS, WEIGHT), LABELS),
    "mapping": lambda: {"inputs": {"weight": WEIGHT, "ids": IDS}, "labels": LABELS},
    "batches": Batches,
    "items": Items,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_samples(form: str) -> None:
    split = TensorSplit.of(FORMS[form](), SPECS, "own train")
    (ids, weight), labels = split.batch(np.array([4, 1]))
    np.testing.assert_array_equal(ids, IDS[[4, 1]])
    np.testing.assert_array_equal(weight, WEIGHT[[4, 1]].astype(np.float32))
    assert (ids.dtype, weight.dtype, labels.dtype) == (np.int32, np.float32, np.int32)
    np.testing.assert_array_equal(split.labels, LABELS)
    np.testing.assert_array_equal(subset(split, 2).labels, LABELS[:2])
    assert (len(split), split.describe_samples()) == (6, "samples of ids 4 int32, weight number float32")
    split.check_labels(3)
    with pytest.raises(IndexError, match="asked for"):
        split.batch(np.array([6]))


def test_only_training_is_random() -> None:
    split = TensorSplit.of(Batches(), SPECS, "own")
    plain, moved = (split.batch(np.arange(2), rng)[0][0] for rng in (None, np.random.default_rng(0)))
    np.testing.assert_array_equal(plain, IDS[:2])
    assert (moved > plain).all()


def test_labels_are_read_only_where_they_are_needed() -> None:
    class Counting(Batches):
        read = 0

        def batch(self, indices: np.ndarray, rng: Any = None) -> tuple[Any, Any]:
            Counting.read += len(indices)
            return super().batch(indices, rng)

    split = TensorSplit.of(Counting(), SPECS, "own")
    split.check_labels(3)
    before = Counting.read
    np.testing.assert_array_equal(subset(split, 3).labels, LABELS[:3])
    assert Counting.read == before + 3
    split.check_labels(2)
    with pytest.raises(DataError, match="own: label 2 of sample 5 is outside 0 to 1"):
        split.batch(np.array([4, 5]))


def test_several_labels_and_one_input() -> None:
    split = TensorSplit.of((WEIGHT, (LABELS > 0, IDS.astype(np.float64))), SPECS[1:], "own")
    inputs, (mask, boxes) = split.batch(np.array([3]))
    assert (inputs.dtype, mask.dtype, boxes.dtype) == (np.float32, np.bool_, np.float32)
    with pytest.raises(DataError, match="classes are integers of shape"):
        split.check_labels(3)


def short() -> Any:
    class Short(Batches):
        def batch(self, indices: np.ndarray, rng: Any = None) -> tuple[Any, Any]:
            inputs, labels = super().batch(indices)
            return inputs, labels[1:]

    return Short()


def raising() -> Any:
    class Raising(Batches):
        def batch(self, indices: np.ndarray, rng: Any = None) -> tuple[Any, Any]:
            raise KeyError("image_7.png")

    return Raising()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("a text", "own is a str; allowed: (inputs, labels), a mapping with the keys inputs and labels, or an object"),
        ({"x": IDS, "y": LABELS}, "own: a mapping has the keys x, y; allowed: inputs and labels"),
        (((IDS,), LABELS), "own: a sample has 1 input, the network takes 2 (ids, weight)"),
        (((IDS[:, :3], WEIGHT), LABELS), "input 'ids' is int64 of shape (6, 3); the network takes int32 of shape"),
        (((IDS + 0.5, WEIGHT), LABELS), "input 'ids' is float64 of shape (6, 4); the network takes int32"),
        (((IDS, WEIGHT * np.nan), LABELS), "input 'weight' holds values that are not finite"),
        (((IDS, WEIGHT), LABELS[:5]), "own: its inputs and labels have 6 and 6 and 5 samples; all need"),
        (((IDS, WEIGHT), None), "own has no labels; training and evaluation need them"),
        (((IDS, WEIGHT), np.array(["cat"] * 6)), "own: labels has type <U3; numbers are needed"),
        ({"inputs": {"ids": IDS, "wait": WEIGHT}, "labels": LABELS}, "the network has no input 'wait'; allowed: ids"),
        ({"inputs": {"ids": IDS}, "labels": LABELS}, "own: there is no array for the network's input 'weight'"),
        (short(), "own: of 2 samples asked for, batch() gave 1"),
        (raising(), "own: samples 0, 1 cannot be read: KeyError: 'image_7.png' (at "),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_sentence(data: Any, said: str) -> None:
    with pytest.raises(DataError) as caught:
        TensorSplit.of(data, SPECS, "own")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


OWN = """
import numpy as np


def load(count=6):
    return ((np.ones((count, 2), np.float32), np.zeros(count, int)),) * 2


def broken():
    raise OSError("the disk is gone")


def one():
    return np.zeros(3)
"""


def test_a_factory_of_the_users(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    bundle = load_data("python", target=f"{file}:load", args={"count": 4}, inputs=[InputSpec("x", (2,))])
    assert isinstance(bundle, DataBundle)
    assert bundle.describe() == "load: 4 training and 4 test samples of x 2 float32"
    for target, kind, said in [
        ("broken", ModelError, "data.target: .*broken' could not be made: OSError: the disk is gone"),
        ("one", DataError, "gave a ndarray; allowed: the pair"),
        ("lode", ModelError, "has no 'lode'; did you mean 'load'"),
    ]:
        with pytest.raises(kind, match=said):
            load_data("python", target=f"{file}:{target}")


def test_arrays_of_several_inputs(tmp_path: Path) -> None:
    arrays = {"ids": IDS, "weight": WEIGHT, "labels": LABELS}
    file = tmp_path / "own.npz"
    np.savez(file, **{f"{part}_{key}": value for part in ("train", "test") for key, value in arrays.items()})
    bundle = load_data("arrays", str(file), inputs=SPECS)
    (ids, _), labels = bundle.test.batch(np.array([2]))
    assert (ids.tolist(), labels.tolist()) == ([IDS[2].tolist()], [2])
    np.savez(file, train_ids=IDS)
    with pytest.raises(DataError, match="no array train_weight, train_labels, test_ids, test_weight, test_labels"):
        load_data("arrays", str(file), inputs=SPECS)
