"""Distillation of networks that give maps: the axis of the classes is said, and what cannot fit is refused early."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import pytest
import yaml

Command = Callable[..., tuple[int, str, str]]

OWN = """
import numpy as np
from mindspore import nn


def net(classes=5):
    return nn.SequentialCell(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, classes, 1))


def data(shape=()):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 1, 6, 6)).astype(np.float32)
    y = rng.integers(0, 5, (16, *shape)).astype(np.int32)
    return (x, y), (x, y)


def metric(outputs, labels):
    return float(np.abs(outputs).mean())


if __name__ == "__main__":
    for classes in (1, 5):
        np.savez(f"net{classes}.npz", **{p.name: p.asnumpy() for p in net(classes).get_parameters()})
"""


@pytest.fixture
def maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    exec(compile(OWN, "own.py", "exec"), {"__name__": "__main__"})

    def write(distillation: dict[str, Any], classes: int = 5, labels: tuple[int, ...] = (6, 6)) -> Path:
        recipe = {
            "apiversion": "msqkd/v1",
            "name": "maps",
            "model": {
                "source": "python", "target": "own.py:net", "input_shape": [1, 6, 6], "args": {"classes": classes},
                "checkpoint": f"net{classes}.npz",
            },
            "data": {"name": "python", "target": "own.py:data", "args": {"shape": list(labels)}},
            "quantization": {"activation": {"delay": 1}},
            "distillation": distillation,
            "train": {"epoch_size": 1, "batch_size": 8, "lr": 0.001},
            "evaluation": {"metric": "own.py:metric", "name": "m"},
            "calibration": {"samples": 16, "batch_size": 8},
            "compare": [],
        }  # fmt: skip
        file = tmp_path / "maps.yaml"
        file.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return file

    return write


def test_a_training_says_the_axis_it_takes_and_trains_on_cross_entropy_of_maps(
    maps: Callable[..., Path], msqkd: Command
) -> None:
    recipe = maps({"cache": "on", "cache_top_k": 2})
    code, out, _ = msqkd("plan", recipe)
    assert code == 0
    assert "output 0 (N, 5, 6, 6): kl over the 5 classes on axis 1" in out
    code, out, err = msqkd("train", recipe, "--output", "out", "--json")
    assert code == 0, err
    assert "output 0 (N, 5, 6, 6): kl over the 5 classes on axis 1" in err
    assert json.loads(out)["training"]["qat_kd"]["loss"]


@pytest.mark.parametrize(
    ("distillation", "more", "words"),
    [
        ({"hard_loss": "none"}, {"classes": 1}, "has a single class on axis 1"),
        ({"hard_loss": "none", "axis": 4}, {}, "distillation.axis: found 4"),
        ({"hard_loss": "none", "cache": "on", "cache_top_k": 5}, {}, "found 5, allowed: less than the classes, 5"),
        ({}, {"labels": ()}, "distillation.hard_loss: the cross-entropy of the first output fails"),
        ({"axis": -1}, {"labels": (6, 6)}, "distillation.hard_loss: the cross-entropy of the first output fails"),
    ],
)
def test_what_cannot_fit_is_refused_before_the_training(
    maps: Callable[..., Path], msqkd: Command, tmp_path: Path,
    distillation: dict[str, Any], more: dict[str, Any], words: str,
) -> None:  # fmt: skip
    code, _, err = msqkd("train", maps(distillation, **more), "--output", "out")
    assert code == 2, err
    assert words in err
    assert not (tmp_path / "out" / "float.ckpt").exists()
