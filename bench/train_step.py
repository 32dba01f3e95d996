"""What a training step costs: float, float with folded BatchNorm, QAT, and QAT with distillation.

    python bench/train_step.py [--json] [--batch 128] [--rounds 12] [--teacher resnet56]

Times are medians over interleaved rounds in which every step runs once, so that a noisy machine disturbs all of them
alike; read the ratios.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import date
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import nn

from msqkd import DistillLoss, DistillTrainOneStepCell, QuantConfig, TrainStep, WeightQuantizer, WithLoss
from msqkd.environment import versions
from msqkd.graph.capture import capture
from msqkd.graph.cell import to_cell
from msqkd.models import build_model
from msqkd.platform import leave_quietly
from msqkd.quant.placement import make_plan
from msqkd.quant.qat import deployment_graph, quantize_cell

SHAPE = (3, 32, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--teacher", default="resnet56")
    parser.add_argument("--batchnorm", default="fold", choices=("fold", "freeze", "live"))
    args = parser.parse_args()
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_seed(0)
    rng = np.random.default_rng(0)
    batch = ms.Tensor(rng.standard_normal((args.batch, *SHAPE)).astype(np.float32))
    labels = ms.Tensor(rng.integers(0, 10, args.batch).astype(np.int32))
    steps = make_steps(args.teacher, args.batchnorm)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step.set_train()
        for _ in range(3):  # compile, pass the delay, compile again
            step(batch, labels).asnumpy()
    for _ in range(args.rounds):
        for name, step in steps.items():
            begin = time.perf_counter()
            step(batch, labels).asnumpy()
            times[name].append(time.perf_counter() - begin)
    result: dict[str, Any] = {f"{name}_ms": round(float(np.median(values)) * 1e3, 1) for name, values in times.items()}
    # Ratios are taken round by round: what slows a round slows both.
    for name in steps:
        if name != "float":
            result[f"{name}_ratio"] = round(float(np.median(np.divide(times[name], times["float"]))), 3)
    result |= {"batch": args.batch, "rounds": args.rounds, "batchnorm": args.batchnorm, "teacher": args.teacher}
    result |= {"date": date.today().isoformat(), "versions": versions()}
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        for key, value in result.items():
            print(f"{key:>22}: {value}")


def make_steps(teacher: str, batchnorm: str) -> dict[str, TrainStep]:
    graph = capture(build_model("msqkd", "resnet20", {}), SHAPE)
    config = QuantConfig(WeightQuantizer(per_channel=True), act_quant_delay=1)
    plan = make_plan(deployment_graph(graph), config)
    loss = nn.CrossEntropyLoss()

    def optimizer(network: nn.Cell) -> nn.Optimizer:
        return nn.Momentum(network.trainable_params(), 1e-4, 0.9)

    plain, folded = to_cell(graph), to_cell(deployment_graph(graph))
    qat, distilled = (quantize_cell(graph, plan, batchnorm) for _ in range(2))
    return {
        "float": TrainStep(WithLoss(plain, loss), optimizer(plain)),
        "float_folded": TrainStep(WithLoss(folded, loss), optimizer(folded)),
        "qat": TrainStep(WithLoss(qat, loss), optimizer(qat)),
        "qat_kd": DistillTrainOneStepCell(
            distilled, build_model("msqkd", teacher, {}), DistillLoss(), optimizer(distilled)
        ),
    }


if __name__ == "__main__":
    main()
    leave_quietly()
