"""Distillation as a recipe says it: several teachers, losses between layers, schedules, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest

Command = Callable[..., tuple[int, str, str]]
Write = Callable[..., Path]

TEACHERS = '''
from mindspore import nn, ops


class Wide(nn.Cell):
    """Looks at a quarter of the positions, with more channels; gives a second output."""

    def __init__(self, classes=3):
        super().__init__()
        self.first, self.bn, self.relu = nn.Conv2d(1, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU()
        self.second, self.fc = nn.Conv2d(6, 6, 3), nn.Dense(6, classes)

    def construct(self, x):
        y = self.relu(self.second(self.relu(self.bn(self.first(x)))))
        return self.fc(ops.mean(y, (2, 3))), y
'''
WIDE: dict[str, Any] = {"source": "python", "target": "wide.py:Wide", "checkpoint": "wide.ckpt"}
STUDENT: dict[str, Any] = {"source": "python", "target": "nets.py:Tiny", "input_shape": [1, 8, 8]}


@pytest.fixture
def taught(tiny: Write, tmp_path: Path) -> Write:
    """Writes a recipe of a float network with weights, and the files of a teacher."""
    from msqkd.checkpoints import save_checkpoint
    from msqkd.models import build_model

    tiny()
    (tmp_path / "wide.py").write_text(TEACHERS)
    rng = np.random.default_rng(0)
    for target, file in (("nets.py:Tiny", "tiny.ckpt"), ("wide.py:Wide", "wide.ckpt")):
        weights = {p.name: p.asnumpy() for p in build_model("python", target, {}).get_parameters()}
        drawn = {name: rng.normal(0, 0.5, data.shape).astype(np.float32) for name, data in weights.items()}
        positive = {name: np.abs(data) for name, data in drawn.items() if name.endswith(("variance", "gamma"))}
        save_checkpoint({**drawn, **positive}, tmp_path / file)

    def write(**sections: Any) -> Path:
        base: dict[str, Any] = {
            "model": {**STUDENT, "checkpoint": "tiny.ckpt"},
            "pretrain": None,
            "export": {"formats": ["portable_mindir"]},
        }
        return tiny(**{**base, **sections})

    return write


def unlabelled(file: str) -> None:
    np.savez(file, **{key: array for key, array in np.load("data.npz").items() if key != "train_labels"})


def test_a_lesson_without_labels(taught: Write, msqkd: Command, tmp_path: Path) -> None:
    """Two teachers, layers, a schedule and a balance; nothing in the training set says what is right."""
    from msqkd.checkpoints import read_checkpoint

    recipe = taught(
        teacher=[{"source": "self", "weight": 3}, WIDE],
        distillation={
            "hard_loss": "none",
            "temperature": {"schedule": "cosine", "from": 4, "to": 1},
            "features": [
                {"student": "block", "teacher": "second", "of": 1},
                {"student": "block", "loss": "similarity", "weight": 0.5},
                {"student": "stem", "teacher": "first", "of": 1, "loss": "attention"},
            ],
            "balance": "running",
        },
        train={"epoch_size": 1, "batch_size": 12, "lr": 0.01, "log_interval": 1},
        quantization={"activation": {"delay": 0}},
    )
    unlabelled("data.npz")
    code, _, err = msqkd("run", recipe, "-o", "out")
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(found["checkpoints"]) == {"model", "teacher[1]"}
    losses = [loss for _, loss in found["training"]["qat_kd"]["loss"]]
    assert len(losses) == 6
    assert all(np.isfinite(losses))
    trained = read_checkpoint(str(tmp_path / "out" / "qat_kd.ckpt"))
    assert not [name for name in trained if "distill" in name], "adapters are not kept"
    assert np.abs(trained["stem.weight"] - read_checkpoint("tiny.ckpt")["stem.weight"]).max() > 0
    assert found["export"]["portable_mindir"]["max_abs_diff"] <= 1e-4
    assert b"distill" not in (tmp_path / "out" / "tiny_portable.mindir").read_bytes()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no such layer in the student": (
        {"distillation": {"features": [{"student": "blok", "teacher": "block"}]}},
        "distillation.features[0].student: the student, Tiny, has no layer 'blok'; near misses: block",
    ),
    "no such layer in the teacher": (
        {"teacher": WIDE, "distillation": {"features": [{"student": "block", "teacher": "secnd"}]}},
        "distillation.features[0].teacher: the teacher, Wide, has no layer 'secnd'; near misses: second",
    ),
    "layers that cannot be compared": (
        {"teacher": WIDE, "distillation": {"features": [{"student": "fc", "teacher": "second"}]}},
        "distillation.features[0]: (N, 3) in the student, (N, 6, 4, 4) in the teacher; mse compares",
    ),
    "other classes in one of several": (
        {"teacher": [{"source": "self"}, {**WIDE, "args": {"classes": 5}, "checkpoint": "five.ckpt"}]},
        "teacher[1]: its answers have shape (1, 5), the student's (1, 3); they must have the same classes",
    ),
    "no labels for a hard loss": (
        {"distillation": {"features": [{"student": "block"}]}, "data": {"name": "arrays", "root": "unlabelled.npz"}},
        "arrays train has no labels; training and evaluation need them",
    ),
    "no labels for the best teacher": (
        {
            "teacher": [{"source": "self"}, WIDE],
            "distillation": {"hard_loss": "none", "combine": "best"},
            "data": {"name": "arrays", "root": "unlabelled.npz"},
        },
        "arrays train has no labels; training and evaluation need them",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_sentence_before_any_training(taught: Write, msqkd: Command, case: str) -> None:
    from msqkd.checkpoints import read_checkpoint, save_checkpoint

    sections, said = WRONG[case]
    recipe = taught(**sections)
    weights = read_checkpoint("wide.ckpt")
    five = {"fc.weight": np.zeros((5, 6), np.float32), "fc.bias": np.zeros(5, np.float32)}
    save_checkpoint({**weights, **five}, "five.ckpt")
    unlabelled("unlabelled.npz")
    code, _, err = msqkd("run", recipe, "-o", "out")
    assert code == 2, err
    assert "Traceback" not in err
    (text,) = [line for line in err.splitlines() if line.startswith("msqkd: ")]
    assert said in text
    assert not list(Path("out").glob("*.ckpt"))
