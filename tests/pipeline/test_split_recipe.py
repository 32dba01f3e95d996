"""Outlier channel splitting in a recipe: every file has the channels, and a run that goes on has the same ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import pytest

from msqkd.checkpoints import read_checkpoint

Command = Callable[..., tuple[int, str, str]]

NET = """
import mindspore as ms
import numpy as np
from mindspore import nn


class Outliers(nn.Cell):
    def __init__(self):
        super().__init__()
        self.stem, self.relu, self.flatten = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten()
        self.depthwise, self.pool = nn.Conv2d(8, 8, 3, group=8), nn.MaxPool2d(4, 4)
        self.conv, self.fc = nn.Conv2d(8, 6, 1), nn.Dense(24, 3)
        random = np.random.default_rng(0)
        for parameter in self.get_parameters():
            shape = parameter.shape
            values = random.uniform(-1, 1, shape) / np.sqrt(np.prod(shape[1:]) or 1)
            if parameter.name == "conv.weight":
                values[1, 5] = 4
            if parameter.name == "fc.weight":
                values[2, 9] = 3
            parameter.set_data(ms.Tensor(values.astype(np.float32)))

    def construct(self, x):
        x = self.relu(self.depthwise(self.relu(self.stem(x))))
        return self.fc(self.flatten(self.pool(self.relu(self.conv(x)))))
"""

SECTIONS: dict[str, Any] = {
    "model": {"source": "python", "target": "outliers.py:Outliers", "input_shape": [1, 8, 8]},
    "pretrain": {"epoch_size": 1, "batch_size": 12, "lr": 1e-3}, "distillation": None, "train": None,
    "quantization": {"weight": {"per_channel": False}},
    "ptq": {"methods": ["split", "bias_correction"], "split": {"ratio": 0.3}},
}  # fmt: skip
WORDS = "channels added: 5 (conv 3 of 8, fc 2 of 6)"
FORMATS = {
    "lite_arm": ["lite_mindir", "portable_mindir", "ms", "onnx"],
    "ascend": ["ascend_mindir", "portable_mindir"],
}


def report(folder: Path) -> Any:
    return json.loads((folder / "report.json").read_text())


def written(tiny: Callable[..., Path], target: str) -> Path:
    recipe = tiny("split", **SECTIONS, target=target, export={"formats": FORMATS[target]})
    (recipe.parent / "outliers.py").write_text(NET)
    return recipe


def test_every_file_has_the_channels_and_a_run_that_goes_on_has_the_same(
    tmp_path: Path, tiny: Callable[..., Path], msqkd: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = written(tiny, "lite_arm")

    def pressed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("msqkd.pipeline.run.export_files", pressed)
        code, _, err = msqkd("calibrate", recipe, "-o", "went_on")
    assert code == 130, err
    assert f"split: {WORDS}" in err
    # The methods are not applied again: what follows has the network from the run's files.
    with monkeypatch.context() as patch:
        patch.setattr("msqkd.quant.algorithms.split.Split.apply", None)
        code, _, err = msqkd("calibrate", recipe, "-o", "went_on")
    assert code == 0, err
    code, _, err = msqkd("calibrate", recipe, "-o", "whole")
    assert code == 0, err
    one, other = report(tmp_path / "whole"), report(tmp_path / "went_on")
    assert len(one["sha256"]) == len(FORMATS["lite_arm"]) + 1
    assert one["sha256"] == other["sha256"]
    assert one["accuracy"] == other["accuracy"]
    assert one["calibration"]["methods"]["split"][0] == WORDS

    before, after = (read_checkpoint(str(tmp_path / "whole" / name)) for name in ("float.ckpt", "ptq.ckpt"))
    shapes = {name: (before[name].shape, after[name].shape) for name in before if ".weight" in name}
    assert shapes == {
        "stem.weight": ((8, 1, 3, 3), (11, 1, 3, 3)),
        "depthwise.weight": ((8, 1, 3, 3), (11, 1, 3, 3)),
        "conv.weight": ((6, 8, 1, 1), (8, 11, 1, 1)),
        "fc.weight": ((3, 24), (3, 32)),
    }
    # Each layer is held against that of the float network, which has the channels too.
    assert min(row["sqnr_db"] for row in one["layers"] if row["sqnr_db"] is not None) > 20
    code, out, err = msqkd("analyze", "went_on", "--samples", "12", "--json")
    assert code == 0, err
    weights = [row["name"] for row in json.loads(out)["layers"] if row["weight"]]
    assert weights == ["stem", "depthwise", "conv", "fc"]


def test_on_an_ascend_too(tiny: Callable[..., Path], msqkd: Command) -> None:
    code, _, err = msqkd("calibrate", written(tiny, "ascend"), "-o", "out")
    assert code == 0, err
    assert f"split: {WORDS}" in err
    code, out, err = msqkd("verify", "out", "--json")
    assert code == 0, err
    assert json.loads(out)["parity"]["exceeded"] is False
