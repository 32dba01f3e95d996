"""A MobileNet-style network whose channels were put out of balance, before and after `msqkd tune`.

    python bench/imbalance.py [--factor 64] [--max-drop 1.0] [--output DIR] [--json]

The network (depthwise separable convolutions, BatchNorm, ReLU6) is trained on scikit-learn's digits. Then each channel
between two layers is scaled by a number of its own, down to 1/factor, and what reads it by the inverse: the float
network answers as before, but scales of a tensor no longer fit its weights and values.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import nn, ops

from msqkd.analysis.tune_report import verdict
from msqkd.checkpoints import read_checkpoint, save_checkpoint
from msqkd.environment import versions
from msqkd.pipeline.run import run_recipe, train_recipe
from msqkd.pipeline.tune import Goal, tune_recipe
from msqkd.platform import leave_quietly
from msqkd.recipe import make_recipe

CHANNELS, BLOCKS = 24, 3


class Block(nn.Cell):
    """Depthwise and pointwise convolution, each with BatchNorm and ReLU6."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, group=channels)
        self.bn1, self.bn2, self.relu6 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels), nn.ReLU6()
        self.pointwise = nn.Conv2d(channels, channels, 1)

    def construct(self, x):  # type: ignore[no-untyped-def]
        """(N, C, H, W) to the same shape."""
        return self.relu6(self.bn2(self.pointwise(self.relu6(self.bn1(self.depthwise(x))))))


class Mobile(nn.Cell):
    """Classifies images of 1×32×32 into 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn, self.relu6 = nn.Conv2d(1, CHANNELS, 3, 2), nn.BatchNorm2d(CHANNELS), nn.ReLU6()
        self.blocks = nn.SequentialCell(*(Block(CHANNELS) for _ in range(BLOCKS)))
        self.fc = nn.Dense(CHANNELS, 10)

    def construct(self, x):  # type: ignore[no-untyped-def]
        """(N, 1, 32, 32) to logits (N, 10)."""
        return self.fc(ops.mean(self.blocks(self.relu6(self.bn(self.stem(x)))), (2, 3)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--factor", type=float, default=64.0)
    parser.add_argument("--max-drop", type=float, default=1.0)
    parser.add_argument("--output", type=Path, default=Path("runs/imbalance"))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    start = recipe(pretrain={"epoch_size": 20, "batch_size": 64, "lr": 0.05})
    train_recipe(start, args.output / "trained")
    weights = read_checkpoint(str(args.output / "trained" / "float.ckpt"))
    result: dict[str, Any] = {"factor": args.factor, "date": date.today().isoformat(), "versions": versions()}
    for name, factor in (("as trained", 1.0), ("out of balance", args.factor)):
        file = args.output / f"factor{factor:g}.ckpt"
        save_checkpoint(unbalanced(weights, factor), file)
        begun = recipe(checkpoint=str(file))
        found = run_recipe(begun, args.output / f"calibrated{factor:g}", train=False)["accuracy"]
        result[name] = {"float": found["float"], "PTQ, weights per tensor": found["ptq"]}
    tuned = tune_recipe(begun, args.output / "tuned", Goal(args.max_drop, samples=500))
    result["tuned"] = {**tuned["best"], "reached": tuned["reached"], "trials": len(tuned["trials"])}
    print(json.dumps(result, indent=2))
    if not args.json:
        print(verdict(tuned))


def recipe(checkpoint: Any = None, pretrain: Any = None) -> Any:
    """Weights with one scale a tensor, 8 bits."""
    model = {"source": "python", "target": f"{__file__}:Mobile", "input_shape": [1, 32, 32], "checkpoint": checkpoint}
    return make_recipe({
        "apiversion": "msqkd/v1", "name": "imbalance", "model": model, "data": {"name": "digits"},
        "quantization": {"activation": {"delay": 10}},
        "pretrain": pretrain, "calibration": {"samples": 500}, "distillation": None, "compare": [],
        "train": {"epoch_size": 1, "batch_size": 64, "lr": 0.001}, "export": {"formats": ["portable_mindir"]},
    })  # fmt: skip


def unbalanced(weights: dict[str, np.ndarray], factor: float) -> dict[str, np.ndarray]:
    """The weights with every channel that BatchNorm and ReLU6 give scaled by 1 … 1/factor, and what reads it back."""
    result = {name: array.copy() for name, array in weights.items()}
    rng = np.random.default_rng(0)
    norms = ["bn", *(f"blocks.{i}.bn{k}" for i in range(BLOCKS) for k in (1, 2))]
    readers = [f"blocks.{i}.{name}" for i in range(BLOCKS) for name in ("depthwise", "pointwise")] + ["fc"]
    for norm, reader in zip(norms, readers):
        scale = (factor ** -rng.permutation(np.linspace(0, 1, CHANNELS))).astype(np.float32)
        for part in ("gamma", "beta"):
            result[f"{norm}.{part}"] *= scale
        weight = result[f"{reader}.weight"]
        along = (
            scale.reshape(-1, 1, 1, 1)
            if reader.endswith("depthwise")
            else scale.reshape(1, -1, *[1] * (weight.ndim - 2))
        )
        result[f"{reader}.weight"] = weight / along
    return result


if __name__ == "__main__":
    main()
    leave_quietly()
