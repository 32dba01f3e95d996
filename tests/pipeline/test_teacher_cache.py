"""`distillation.cache` in a run: the same training, said why or why not, and gone when it is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest

from msqkd.checkpoints import read_checkpoint
from msqkd.errors import DataError

Command = Callable[..., tuple[int, str, str]]
Write = Callable[..., Path]

SOURCE = '''
import numpy as np


class Moved:
    """Images a source may change, as far as anybody knows."""

    def __len__(self):
        return 36

    def batch(self, indices, rng):
        images = np.random.default_rng(0).normal(size=(36, 1, 8, 8)).astype(np.float32)
        return images[indices], (np.arange(36) % 3)[indices]


def data():
    return Moved(), Moved()
'''


def section(**keys: Any) -> dict[str, Any]:
    return {"distillation": {"alpha": 0.7, **keys}, "pretrain": {"epoch_size": 1, "batch_size": 12}}


def losses(folder: str) -> list[float]:
    history = json.loads(Path(folder, "state.json").read_text())["stages"]["qat_kd"]["history"]
    return [loss for _, loss in history["loss"]]


TRAIN = {"epoch_size": 2, "batch_size": 12, "lr": 0.01, "log_interval": 1}


def test_the_training_is_the_one_with_a_live_teacher_and_goes_on(
    tiny: Write, msqkd: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from msqkd.distill.cache import TaughtSplit

    live = tiny("live", **section(), train=TRAIN)
    code, _, err = msqkd("train", live, "-o", "live")
    assert code == 0, err
    given: list[Any] = []
    read = TaughtSplit.batch

    def watched(self: TaughtSplit, indices: np.ndarray, rng: Any = None) -> Any:
        given.append(read(self, indices, rng))
        return given[-1]

    monkeypatch.setattr(TaughtSplit, "batch", watched)
    cached = tiny("cached", **section(cache="auto"), train=TRAIN)
    code, _, err = msqkd("train", cached, "-o", "whole")
    assert code == 0, err
    assert "teacher: its answers are kept" in err
    assert len(losses("live")) == len(given) == 12
    np.testing.assert_allclose(losses("whole"), losses("live"), rtol=1e-5)
    whole = list(given)

    def interrupted(self: TaughtSplit, indices: np.ndarray, rng: Any = None) -> Any:
        if len(given) == 3:
            raise KeyboardInterrupt
        return watched(self, indices, rng)

    given.clear()
    monkeypatch.setattr(TaughtSplit, "batch", interrupted)
    assert msqkd("train", cached, "-o", "out")[0] == 130
    answers = Path("out/teacher0.logits.npy")
    assert np.load(answers, mmap_mode="r").shape == (72,)
    answers.write_bytes(answers.read_bytes()[:-1])
    given.clear()
    monkeypatch.setattr(TaughtSplit, "batch", watched)
    code, _, err = msqkd("train", cached, "-o", "out")
    assert code == 0, err
    assert "teacher0.logits.npy is damaged: the checksum of block" in " ".join(err.split())
    assert 9 <= len(given) < 12
    for (inputs, labels), (same_inputs, same_labels) in zip(reversed(given), reversed(whole)):
        for one, other in zip((inputs, *labels), (same_inputs, *same_labels)):
            np.testing.assert_array_equal(one, other)
    assert losses("out") == losses("whole")
    one, other = read_checkpoint("out/qat_kd.ckpt"), read_checkpoint("whole/qat_kd.ckpt")
    assert all(np.array_equal(one[name], other[name]) for name in other)
    assert not list(Path("out").glob("teacher*")), "a cache goes when the last training is done"


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        (
            {**section(cache="auto"), "data": {"name": "arrays", "root": "data.npz", "augment": ["flip"]}},
            "teacher: runs in every step, since arrays train is augmented and every view has an answer of its own",
        ),
        (
            {**section(cache="auto", features=[{"student": "block"}])},
            "teacher: runs in every step, since losses between layers need it there",
        ),
        (
            {"distillation": {"cache": "auto"}, "train": {**TRAIN, "epoch_size": 1}},
            "teacher: runs in every step, since it is asked only once for each sample",
        ),
    ],
)
def test_auto_says_why_not(
    tiny: Write, msqkd: Command, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], text: str
) -> None:
    from msqkd.pipeline import run

    def enough(self: Any) -> None:
        assert not self.objects.teacher_cache.used
        raise DataError("nothing needs to be trained")

    monkeypatch.setattr(run._Run, "float_network", enough)
    _, _, err = msqkd("train", tiny(**{"train": TRAIN, **sections}), "-o", "out")
    assert text in " ".join(err.split())
    assert "nothing needs to be trained" in err


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        (
            {**section(cache="on"), "data": {"name": "arrays", "root": "data.npz", "augment": ["flip"]}},
            "distillation.cache: found 'on', not allowed with data.augment: ['flip']",
        ),
        (
            {**section(cache="on"), "data": {"name": "python", "target": "source.py:data"}},
            "distillation.cache: found 'on', but its samples may change and every view has an answer of its own; use "
            "cache_view: clean, or cache: off",
        ),
        (
            section(cache="on", cache_top_k=3),
            "distillation.cache_top_k: found 3, allowed: less than the classes, 3, of output 0",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused_before_any_training(
    tiny: Write, msqkd: Command, sections: dict[str, Any], text: str
) -> None:
    Path("source.py").write_text(SOURCE)
    code, _, err = msqkd("train", tiny(**sections), "-o", "out")
    assert code == 2, err
    assert text in err
    assert "Traceback" not in err
    assert not list(Path("out").glob("*.ckpt"))


def test_the_clean_view_and_two_teachers_with_few_logits(tiny: Write, msqkd: Command) -> None:
    """The student sees flipped images; each teacher has a file."""
    recipe = tiny(
        distillation={"cache": True, "cache_view": "clean", "cache_top_k": 1, "hard_loss": "none"},
        teacher=[{"source": "self"}, {"source": "self", "weight": 2}],
        data={"name": "arrays", "root": "data.npz", "augment": ["flip"], "eval_batch_size": 15},
        train={**TRAIN, "epoch_size": 1},
        quantization={"activation": {"delay": 0}},
    )
    found: set[str] = set()

    from msqkd.distill.cache import TaughtSplit

    read = TaughtSplit.batch

    def watched(self: TaughtSplit, indices: np.ndarray, rng: Any = None) -> Any:
        found.update(file.name for file in Path("out").glob("teacher*"))
        inputs, labels = read(self, indices, rng)
        assert [array.shape for array in labels[1:]] == [(12, 1, 3)] * 2
        return inputs, labels

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaughtSplit, "batch", watched)
        code, _, err = msqkd("train", recipe, "-o", "out")
    assert code == 0, err
    assert found == {f"teacher{index}.logits.{suffix}" for index in (0, 1) for suffix in ("npy", "json")}
    assert np.isfinite(losses("out")).all()
