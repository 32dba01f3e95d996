"""What the workers of test_parallel.py do; the test does the same alone, with the batch of both."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Optional

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from msqkd import parallel
from msqkd.api import plan_network
from msqkd.data import ArraySplit
from msqkd.distill.balance import RunningBalance
from msqkd.graph.capture import capture
from msqkd.graph.cell import to_cell
from msqkd.graph.dropout import CountedDropout
from msqkd.platform import leave_quietly
from msqkd.progress import Reporter
from msqkd.quant.config import QuantConfig
from msqkd.quant.qat import quantize_cell
from msqkd.quant.schedule import QatSchedule
from msqkd.recipe import TrainSection
from msqkd.train.ema import AveragingOptimizer
from msqkd.train.loop import Training, fit
from msqkd.train.optimizer import make_optimizer
from msqkd.train.step import TrainStep, WithLoss

BATCH, SPOILT, SAMPLES = 3, 17, 26
ROWS = np.arange(24, dtype=np.float32).reshape(4, 6) + 1


class Net(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.fc = nn.Dense(4, 2)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.fc(ops.mean(self.relu(self.bn(self.conv(x))), (2, 3)))


class Split(ArraySplit):
    """One sample is spoilt whenever it is trained on."""

    def batch(self, indices: np.ndarray, rng: Optional[np.random.Generator] = None) -> tuple[np.ndarray, np.ndarray]:
        images, labels = super().batch(indices)
        if rng is not None:
            images[indices == SPOILT] = np.nan
        return images, labels


def split() -> Split:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(SAMPLES, 1, 6, 6)).astype(np.float32)
    return Split(images, (images.mean((1, 2, 3)) > 0).astype(np.int32), ("no", "yes"), name="toy train")


def quantised(folder: Path, batch: int, schedule: QatSchedule) -> dict[str, np.ndarray]:
    """All that is left of a quantised training in which BatchNorm is folded."""
    ms.set_seed(7)
    settings = TrainSection(epoch_size=3, batch_size=batch, accumulate=1, lr=0.05, log_interval=1)
    graph, plan = plan_network(Net(), (1, 6, 6), QuantConfig(act_quant_delay=5))
    network = quantize_cell(graph, plan, schedule=schedule, learn=True)
    return trained(folder, network, settings)


def floating(folder: Path, batch: int) -> dict[str, np.ndarray]:
    """The same of a float training with a live BatchNorm, in two parts a step."""
    ms.set_seed(parallel.rank())  # worker 0's weights are the ones
    settings = TrainSection(epoch_size=1, batch_size=batch // 3, accumulate=3, lr=0.05, ema=0.9)
    return trained(folder, to_cell(capture(Net(), (1, 6, 6))), settings)


def trained(folder: Path, network: Any, settings: TrainSection) -> dict[str, np.ndarray]:
    optimizer = make_optimizer(network, settings, 4)
    if settings.ema is not None:
        optimizer = AveragingOptimizer(optimizer, network, settings.ema)
    step = TrainStep(WithLoss(network, nn.CrossEntropyLoss()), optimizer, accumulate=settings.accumulate)
    made = Training("toy", "key", network, step, settings, split(), split(), 3, folder / "toy.state.npz", 5)
    history = fit(made, Reporter(quiet=True))
    found = {p.name: p.asnumpy() for p in step.get_parameters()}
    told = {"loss": history.loss, "accuracy": history.accuracy, "skipped": [history.skipped_steps]}
    return {**found, **{f"history/{key}": np.array(value) for key, value in told.items()}}


class Dropping(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = CountedDropout("drop", 0.5, "element")

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.dropout(x)


def parts(rows: np.ndarray) -> dict[str, np.ndarray]:
    """What cells that look at a whole batch do with this worker's rows of it."""
    ms.set_seed(7)
    balance, dropping = RunningBalance(2), Dropping()
    for cell in (balance, dropping):
        cell.set_train()
    balance(ms.Tensor(rows.mean()), ms.Tensor(rows[:, 0].mean()))
    return {"balance": balance.sizes.asnumpy(), "dropout": parallel.gather_rows(dropping(ms.Tensor(rows)).asnumpy())}


FOLLOWED = QatSchedule(freeze_ranges=10)


def main() -> None:
    parallel.join()
    ms.set_context(mode=ms.GRAPH_MODE)
    folder = Path(sys.argv[1])
    rank = parallel.rank()
    first = rank == 0
    exchanged = {
        "gathered": np.array(parallel.gathered(rank * 10)),
        "rows": parallel.gather_rows(np.array([[rank, 1.5], [rank, -0.25]])),
        "any": np.array([parallel.any_worker(False), parallel.any_worker(rank == 1)]),
        "said": np.array(parallel.from_first({"number": 5, "text": "é" * 2000} if first else None)["text"]),
    }
    results = {
        "exchanged": exchanged,
        "parts": parts(ROWS[rank * 2 : rank * 2 + 2]),
        "quantised": quantised(folder, BATCH, FOLLOWED),
        "floating": floating(folder / "floating", BATCH),
    }
    arrays = {f"{kind}/{name}": array for kind, held in results.items() for name, array in held.items()}
    np.savez(folder / f"worker{rank}.npz", **arrays)


if __name__ == "__main__":
    main()
    leave_quietly()
