from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import pytest

from msqkd.train.step import TrainStep

Command = Callable[..., tuple[int, str, str]]
Recipe = Callable[..., Path]

TRAIN = {
    "epoch_size": 2, "batch_size": 6, "accumulate": 2, "opt": "adamw", "lr": 0.01, "amp_level": "O2",
    "scheduler": "multi_step_decay", "milestones": [1], "no_weight_decay": ["fc.*"], "clip_grad": 5.0,
}  # fmt: skip
DATA = {"name": "arrays", "root": "data.npz", "eval_batch_size": 15, "augment": ["crop:1", "cutout:2"]}


def test_train_then_run_in_the_same_folder(
    tiny: Recipe, msqkd: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder = tiny(train=TRAIN, data=DATA), tmp_path / "runs" / "tiny"

    def pressed(self: TrainStep, *inputs: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", pressed)
        code, _, err = msqkd("train", recipe)
    assert code == 130
    assert "everything so far is in runs/tiny: run the same command again to go on" in err

    code, out, err = msqkd("train", recipe, "--json")
    assert code == 0, err
    assert "amp_level: O2 computes in float16, which saves no time on CPU" in " ".join(err.split())
    told = json.loads(out)
    assert set(told["accuracy"]) == set(told["checkpoints"]) == {"float", "qat_kd"}
    names = {child.name for child in folder.iterdir()}
    assert names == {"recipe.yaml", "state.json", "plan.json", "float.ckpt", "qat_kd.ckpt"}
    history = told["training"]["qat_kd"]
    assert [epoch for epoch, _ in history["accuracy"]] == [1, 2]
    assert history["learning_rate"][-1] == [12, pytest.approx(0.001)], "12 steps of 2 batches of 6"
    assert 0 <= history["data_share"] < 1

    def trained_again(self: TrainStep, *inputs: Any) -> Any:
        raise AssertionError("a step of a training that was done")

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", trained_again)
        code, _, err = msqkd("run", recipe)
        assert code == 0, err
        code, out, err = msqkd("train", recipe)
        assert code == 0, err
    report = json.loads((folder / "report.json").read_text())
    assert report["accuracy"]["qat_kd"] == told["accuracy"]["qat_kd"]
    assert report["training"]["qat_kd"] == history
    assert "QAT + distillation" in out
    assert f"go on with: msqkd run {recipe}" in out


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"train": {"batch_size": 12, "no_weight_decay": ["fc.wieght"]}},
            "train.no_weight_decay[0]: 'fc.wieght' matches none of the 6 trainable parameters",
        ),
        (
            {"train": {"batch_size": 12, "accumulate": 7}},
            "arrays train has 72 samples, fewer than one batch of 84; choose a smaller batch_size or accumulate",
        ),
        (
            {"data": {**DATA, "augment": ["color_jitter"]}},
            "arrays train: augmentation 'color_jitter' is for colour images of 8 bits; these have 1 channels of uint8",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is(
    tiny: Recipe, msqkd: Command, tmp_path: Path, sections: dict[str, Any], said: str
) -> None:
    code, _, err = msqkd("train", tiny(**sections), "-o", "out")
    assert code == 2
    assert said in " ".join(err.split())
    assert not (tmp_path / "out" / "float.ckpt").exists()
