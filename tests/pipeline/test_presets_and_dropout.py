from __future__ import annotations

import json
import signal
from itertools import count
from pathlib import Path
from typing import Any, Callable

import pytest

Recipe = Callable[..., Path]
Command = Callable[..., tuple[int, str, str]]

NETS = """
from mindspore import nn, ops


class Dropping(nn.Cell):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.drop, self.fc = nn.Dropout(p=0.3), nn.Dense(4, 3)

    def construct(self, x):
        x = self.relu(self.bn(self.conv(x)))
        return self.fc(self.drop(ops.mean(x, (2, 3))))
"""


@pytest.fixture
def dropping(tiny: Recipe, tmp_path: Path) -> Recipe:
    (tmp_path / "dropping.py").write_text(NETS)

    def write(name: str, **sections: Any) -> Path:
        model = {"source": "python", "target": "dropping.py:Dropping", "input_shape": [1, 8, 8]}
        return tiny(name, model=model, **sections)

    return write


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


@pytest.mark.slow
def test_a_training_with_dropout_is_interrupted_and_ends_the_same(
    dropping: Recipe, msqkd: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from msqkd.train.step import TrainStep

    train = {"epoch_size": 1, "batch_size": 12, "lr": 0.01, "dropout": True}
    recipe = dropping(
        "dropping", train=train, pretrain=train, distillation=None, export={"formats": ["portable_mindir"]}
    )
    assert msqkd("run", recipe, "-o", tmp_path / "whole")[0] == 0
    real = TrainStep.__call__
    for call in (3, 7):  # within the float training, and within the quantised one
        calls = count(1)

        def pressed(self: TrainStep, *inputs: Any) -> Any:
            if next(calls) == call:  # noqa: B023
                signal.raise_signal(signal.SIGINT)
            return real(self, *inputs)

        with monkeypatch.context() as patch:
            patch.setattr(TrainStep, "__call__", pressed)
            assert msqkd("run", recipe, "-o", tmp_path / "parts")[0] == 130
    assert (tmp_path / "parts" / "qat.state.npz").exists()
    code, _, err = msqkd("run", recipe, "-o", tmp_path / "parts")
    assert code == 0, err
    assert result(tmp_path / "parts")["sha256"] == result(tmp_path / "whole")["sha256"]


def test_dropout_of_a_network_without_any_is_refused_at_once(tiny: Recipe, msqkd: Command, tmp_path: Path) -> None:
    code, _, err = msqkd("run", tiny(train={"batch_size": 12, "dropout": True}), "-o", tmp_path / "out")
    assert code == 2
    assert "Tiny: dropout is asked for, and no cell of it drops anything" in err


def test_a_preset_gives_defaults_and_rules(dropping: Recipe, msqkd: Command, tmp_path: Path) -> None:
    def plan(name: str, **quantization: Any) -> dict[str, Any]:
        code, out, err = msqkd("plan", dropping(name, quantization=quantization), "--json")
        assert code == 0, err
        found: dict[str, Any] = json.loads(out)
        return found

    without, mobile = plan("without"), plan("mobile", preset="mobile")
    assert {(w["axis"], w["observer"]) for w in without["weights"]} == {(None, "minmax")}
    assert {(w["axis"], w["observer"]) for w in mobile["weights"]} == {(0, "mse")}
    own = plan("own", preset="mobile", weight={"per_channel": False})
    assert {(w["axis"], w["observer"]) for w in own["weights"]} == {(None, "mse")}
    transformer = plan("transformer", preset="transformer")
    layers = {node["name"]: (node["precision"], node["rule"]) for node in transformer["nodes"]}
    assert layers["fc"] == ("float", "preset transformer, position last")
    rule = {"match": {"position": "last"}, "precision": "int8"}
    back = plan("back", preset="transformer", rules=[rule])
    layers = {node["name"]: (node["precision"], node["rule"]) for node in back["nodes"]}
    assert layers["conv"] == ("float", "preset transformer, position first")
    assert layers["fc"] == ("int8", "rules[0] (position: last)")


def test_a_preset_nobody_knows(dropping: Recipe, msqkd: Command) -> None:
    code, _, err = msqkd("plan", dropping("odd", quantization={"preset": "transfromer"}))
    assert code == 2
    assert "quantization.preset: found 'transfromer'" in err
    assert "did you mean 'transformer'?" in err
