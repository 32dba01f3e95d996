"""A teacher's answers on disk: the same as the teacher's own, whole or not there, and never those of another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Optional

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from msqkd.data import Split, subset
from msqkd.data.augment import make_augmentations
from msqkd.data.base import ArraySplit
from msqkd.data.encoded import EncodedSplit
from msqkd.data.tensors import TensorSplit
from msqkd.distill.cache import AnswerCache, TaughtSplit, cached_answers, compress, expand
from msqkd.distill.features import FeatureMSE
from msqkd.distill.layers import Link
from msqkd.distill.losses import DistillLoss
from msqkd.distill.step import CachedTeachers, DistillTrainOneStepCell
from msqkd.errors import ModelError, PlanError

pytestmark = pytest.mark.usefixtures("graph_mode")

SAMPLES, CLASSES = 37, 6
RNG = np.random.default_rng(0)
X = RNG.normal(size=(SAMPLES, 5)).astype(np.float32)
Y = RNG.integers(0, CLASSES, SAMPLES).astype(np.int32)


class Net(nn.Cell):
    """Two outputs: one row a sample, and three rows a sample."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = np.random.default_rng(seed)
        weight = rng.normal(size=(CLASSES + 12, 5)).astype(np.float32)
        self.fc = nn.Dense(5, CLASSES, ms.Tensor(weight[:CLASSES]), "zeros")
        self.rows = nn.Dense(5, 12, ms.Tensor(weight[CLASSES:]), "zeros")

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.fc(x), self.rows(x).reshape((-1, 4))


class Counted(TensorSplit):
    """Knows which samples were read in batches of their own."""

    def __init__(self, x: np.ndarray = X) -> None:
        super().__init__(x, Y, name="samples")
        self.read: list[int] = []

    def batch(self, indices: np.ndarray, rng: Optional[np.random.Generator] = None) -> Any:
        if len(indices) == 4:
            self.read += indices.tolist()
        return super().batch(indices, rng)


def logits(net: Net, x: np.ndarray = X) -> np.ndarray:
    return x @ net.fc.weight.asnumpy().T


def made(net: nn.Cell, path: Path, split: Optional[Split] = None, **options: Any) -> tuple[AnswerCache, list[str]]:
    said: list[str] = []
    options = {"batch_size": 4, "say": said.append, **options}
    return cached_answers(net, split or Counted(), path / "t.npy", **options), said


def test_every_sample_has_the_teachers_answers_by_its_number(tmp_path: Path) -> None:
    net, split = Net(1), Counted()
    cache, said = made(net, tmp_path, split, outputs=(1, 0))
    assert (len(cache), said) == (SAMPLES, [])
    indices = np.array([36, 0, 7, 7])
    rows, first = cache.answers(indices)
    assert rows.shape == (4, 3, 4)
    np.testing.assert_allclose(first, logits(net)[indices][:, None], rtol=1e-5, atol=1e-6)
    expected = (X @ net.rows.weight.asnumpy().T).reshape(SAMPLES, 3, 4)
    np.testing.assert_allclose(rows, expected[indices], rtol=1e-5, atol=1e-6)
    assert {file.name for file in tmp_path.iterdir()} == {"t.npy", "t.json"}
    held = np.load(tmp_path / "t.npy", mmap_mode="r")
    assert isinstance(held, np.memmap)
    assert held["output0"].shape == (SAMPLES, 1, CLASSES)

    split.read.clear()
    again, said = made(net, tmp_path, split, outputs=(1, 0))
    assert (said, split.read) == ([], []), "a whole file is used as it is"
    np.testing.assert_array_equal(again.answers(indices)[0], rows)


def test_what_is_interrupted_goes_on_with_its_block(tmp_path: Path) -> None:
    net = Net(1)
    whole = made(net, tmp_path / "whole", top_k=2)[0].answers(np.arange(SAMPLES))[0]

    def interrupt(done: int) -> None:
        if done >= 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(net, tmp_path, top_k=2, progress=interrupt)
    assert not (tmp_path / "t.npy").exists()
    part = tmp_path / "t.npy.part"
    part.write_bytes(part.read_bytes() + b"half a block")  # as a kill leaves it
    split = Counted()
    cache, said = made(net, tmp_path, split, top_k=2)
    assert said == []
    assert min(split.read) == 12
    assert not part.exists()
    np.testing.assert_array_equal(cache.answers(np.arange(SAMPLES))[0], whole)
    assert (tmp_path / "t.npy").read_bytes() == (tmp_path / "whole" / "t.npy").read_bytes()


def test_a_kill_before_the_file_gets_its_name(tmp_path: Path) -> None:
    net, split = Net(1), Counted()
    made(net, tmp_path)
    (tmp_path / "t.npy").rename(tmp_path / "t.npy.part")
    cache, said = made(net, tmp_path, split)
    assert (said, split.read, len(cache)) == ([], [], SAMPLES)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "weights": ({"net": Net(2)}, "holds answers of another teacher"),
    "origin": ({"origin": "another network"}, "holds answers of another teacher"),
    "data": ({"split": Counted(np.where(np.arange(5) == SAMPLES, X, X + 1e-3))}, "holds answers to other data"),
    "one sample": ({"split": Counted(X * (1 + (np.arange(SAMPLES) == 20)[:, None]))}, "holds answers to other data"),
    "top_k": ({"top_k": 3}, "holds answers with another top_k"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_answers_of_something_else_are_not_used(tmp_path: Path, change: str) -> None:
    options, text = CHANGES[change]
    made(Net(1), tmp_path)
    options = {"net": Net(1), "split": Counted(), **options}
    net, split = options.pop("net"), options.pop("split")
    cache, (said,) = made(net, tmp_path, split, **options)
    assert said == f"{tmp_path / 't.npy'} {text}; it is made anew"
    found = cache.answers(np.arange(SAMPLES))[0][:, 0]
    x = split.batch(np.arange(SAMPLES))[0]
    np.testing.assert_allclose(found.max(-1), logits(net, x).max(-1), rtol=1e-5, atol=1e-6)


def damaged(path: Path, how: str) -> None:
    file, about = path / "t.npy", path / "t.json"
    content = bytearray(file.read_bytes())
    if how == "a bit":
        content[-1] ^= 1
    elif how == "the end":
        del content[-5:]
    elif how == "the header":
        content[30] ^= 1
    file.write_bytes(content)
    if how == "no checksums":
        about.unlink()
    elif how == "half the checksums":
        about.write_text(about.read_text()[:200])
    elif how == "one checksum too few":
        held = json.loads(about.read_text())
        about.write_text(json.dumps({**held, "checksums": held["checksums"][:-1]}))


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("a bit", "is damaged: the checksum of block 9 of 10 differs"),
        ("the end", "is damaged: the checksum of block 9 of 10 differs"),
        ("the header", "is damaged: its header is not the one written"),
        ("no checksums", "has no checksums beside it that can be read"),
        ("half the checksums", "has no checksums beside it that can be read"),
        ("one checksum too few", "is damaged: answers are missing"),
    ],
)
def test_damage_is_named_and_made_good(tmp_path: Path, how: str, text: str) -> None:
    net = Net(1)
    before = made(net, tmp_path)[0].answers(np.arange(SAMPLES))[0]
    damaged(tmp_path, how)
    cache, (said,) = made(net, tmp_path)
    assert text in said
    assert said.endswith("; it is made anew")
    np.testing.assert_array_equal(cache.answers(np.arange(SAMPLES))[0], before)
    assert made(net, tmp_path)[1] == []


def test_top_k_keeps_the_largest_and_the_mass_of_the_rest() -> None:
    z = RNG.normal(0, 3, (50, 20)).astype(np.float32)
    found = expand(*compress(z, 4), 20).astype(np.float64)
    p = np.exp(z.astype(np.float64)) / np.exp(z.astype(np.float64)).sum(-1, keepdims=True)
    expected = p.copy()
    for row in expected:
        rest = np.sort(row)[:-4].sum()
        row[row < np.sort(row)[-4]] = rest / 16
    q = np.exp(found) / np.exp(found).sum(-1, keepdims=True)
    np.testing.assert_allclose(q, expected, rtol=1e-4)
    np.testing.assert_array_equal(np.sort(found)[:, -4:], np.sort(z)[:, -4:])


def test_top_k_is_smaller_on_disk_and_gives_logits_back(tmp_path: Path) -> None:
    net = Net(1)
    cache, _ = made(net, tmp_path, top_k=2)
    assert np.load(tmp_path / "t.npy", mmap_mode="r").itemsize == 2 * (4 + 2) + 4
    indices = np.array([5, 3])
    found = cache.answers(indices)[0]
    assert (found.shape, found.dtype) == ((2, 1, CLASSES), np.float32)
    z = logits(net)[indices].astype(np.float64)
    ordered = np.sort(z)
    ordered[:, :-2] = np.log(np.exp(ordered[:, :-2]).mean(-1, keepdims=True))
    np.testing.assert_allclose(np.sort(found[:, 0]), ordered, rtol=1e-4, atol=1e-5)
    with pytest.raises(PlanError, match="top_k is 6; allowed: 1 to 5"):
        made(net, tmp_path / "other", top_k=CLASSES)


def test_an_answer_that_is_no_number_is_refused(tmp_path: Path) -> None:
    net = Net(1)
    net.fc.bias.set_data(ms.Tensor(np.full(CLASSES, np.nan, np.float32)))
    with pytest.raises(ModelError, match="output 0 for sample 0 of samples is not finite"):
        made(net, tmp_path)


def test_which_splits_may_change_their_samples() -> None:
    images = np.zeros((4, 3, 8, 8), np.uint8)
    plain, moved = (
        ArraySplit(images, None, ("a",), augmentations=make_augmentations(names, "x")) for names in ([], ["flip"])
    )
    encoded = {"sources": [b""], "labels": None, "classes": ("a",), "shape": (3, 8, 8), "mean": (0.0,), "std": (1.0,)}
    assert not any(split.augmented for split in (plain, subset(plain, 2), EncodedSplit(**encoded), Counted()))
    cropped = EncodedSplit(**encoded, random_crop=True)
    own = TensorSplit.of([(X[0], Y[0])], (), "nobody knows what it does")
    assert all(split.augmented for split in (moved, subset(moved, 2), cropped, own))


# -- in a step --------------------------------------------------------------------------------------------------------
class Student(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        weight = ms.Tensor(np.random.default_rng(9).normal(size=(CLASSES, 5)).astype(np.float32))
        self.fc = nn.Dense(5, CLASSES, weight, "zeros")

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.fc(x)


class TwoAnswers(Student):
    def construct(self, x):  # type: ignore[no-untyped-def]
        y = self.fc(x)
        return y, ms.ops.tile(y[:, :4], (3, 1)), y * 2.0


def train(student: nn.Cell, teachers: Any, loss: DistillLoss, split: Split, **options: Any) -> list[float]:
    optimizer = nn.Momentum(student.trainable_params(), 0.05, 0.9)
    step = DistillTrainOneStepCell(student, teachers, loss, optimizer, **options)
    step.set_train()
    losses = []
    for start in range(0, 32, 8):
        inputs, labels = split.batch(np.arange(start, start + 8))
        labels = labels if isinstance(labels, tuple) else (labels,)
        losses.append(float(step(*map(ms.Tensor, (inputs, *labels))).asnumpy()))
    return losses


@pytest.mark.parametrize("case", ["top_k", "weighted", "best", "second output, in parts"])
def test_a_training_is_the_one_with_the_teacher(tmp_path: Path, case: str) -> None:
    second = case == "second output, in parts"
    outputs = (1,) if second else (0,)
    several = 2 if case in ("weighted", "best") else None
    nets = [Net(seed) for seed in range(several or 1)]
    student: Any = TwoAnswers if second else Student
    options: dict[str, Any] = {"temperature": 2.0, "alpha": 0.6, "outputs": outputs}
    if several:
        options |= {"weights": [1, 3] if case == "weighted" else [1, 1], "combine": case}
    top_k = CLASSES - 1 if case == "top_k" else None  # the rest is a single class, so nothing is lost
    parts = {"accumulate": 2} if second else {}
    split = Counted()
    caches = [
        made(net, tmp_path / str(index), split, outputs=outputs, top_k=top_k)[0] for index, net in enumerate(nets)
    ]
    taught, cached = TaughtSplit(split, caches), CachedTeachers(several, outputs)
    live, kept = student(), student()
    expected = train(live, nets if several else nets[0], DistillLoss(**options), split, **parts)
    found = train(kept, cached, DistillLoss(**options), taught, **parts)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(kept.fc.weight.asnumpy(), live.fc.weight.asnumpy(), rtol=1e-5, atol=1e-6)
    assert found[0] != found[-1]


def test_losses_between_layers_need_the_teacher() -> None:
    loss = DistillLoss(features=[Link(FeatureMSE(), 1.0, 0)])
    student = Student()
    optimizer = nn.Momentum(student.trainable_params(), 0.1, 0.9)
    with pytest.raises(PlanError, match="features need the teacher"):
        DistillTrainOneStepCell(student, CachedTeachers(), loss, optimizer)
