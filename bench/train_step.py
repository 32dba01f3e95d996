"""What a training step costs: float, float with folded BatchNorm, QAT, QAT with distillation, and with cached answers.

    python bench/train_step.py [--json] [--batch 128] [--rounds 12] [--teacher resnet56] [--learned]

With --learned also QAT with trained scales (LSQ) of weights and activations, in place of distillation.

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
from msqkd.distill.step import CachedTeachers
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
    parser.add_argument("--learned", action="store_true")
    parser.add_argument("--batchnorm", default="fold", choices=("fold", "freeze", "live"))
    args = parser.parse_args()
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_seed(0)
    rng = np.random.default_rng(0)
    batch = ms.Tensor(rng.standard_normal((args.batch, *SHAPE)).astype(np.float32))
    labels = ms.Tensor(rng.integers(0, 10, args.batch).astype(np.int32))
    answers = ms.Tensor(rng.standard_normal((args.batch, 1, 10)).astype(np.float32))
    steps = make_steps(args.teacher, args.batchnorm, args.learned)
    given = {name: (batch, labels, answers) if name == "qat_kd_cached" else (batch, labels) for name in steps}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for name, step in steps.items():
        step.set_train()
        for _ in range(3):  # compile, pass the delay, compile again
            step(*given[name]).asnumpy()
    for _ in range(args.rounds):
        for name, step in steps.items():
            begin = time.perf_counter()
            step(*given[name]).asnumpy()
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


def make_steps(teacher: str, batchnorm: str, learned: bool) -> dict[str, TrainStep]:
    graph = capture(build_model("msqkd", "resnet20", {}), SHAPE)
    config = QuantConfig(WeightQuantizer(per_channel=True), act_quant_delay=1)
    plan = make_plan(deployment_graph(graph), config)
    loss = nn.CrossEntropyLoss()

    def optimizer(network: nn.Cell) -> nn.Optimizer:
        return nn.Momentum(network.trainable_params(), 1e-4, 0.9)

    plain, folded = to_cell(graph), to_cell(deployment_graph(graph))
    qat, distilled, cached = (quantize_cell(graph, plan, batchnorm) for _ in range(3))
    steps = {
        "float": TrainStep(WithLoss(plain, loss), optimizer(plain)),
        "float_folded": TrainStep(WithLoss(folded, loss), optimizer(folded)),
        "qat": TrainStep(WithLoss(qat, loss), optimizer(qat)),
    }
    if learned:
        config = QuantConfig(WeightQuantizer(per_channel=True, learned="lsq"), act_quant_delay=1, act_learned="lsq")
        lsq = quantize_cell(graph, make_plan(deployment_graph(graph), config), batchnorm, learn=True)
        steps["qat_lsq"] = TrainStep(WithLoss(lsq, loss), optimizer(lsq))
    else:
        steps["qat_kd"] = DistillTrainOneStepCell(
            distilled, build_model("msqkd", teacher, {}), DistillLoss(), optimizer(distilled)
        )
        steps["qat_kd_cached"] = DistillTrainOneStepCell(cached, CachedTeachers(), DistillLoss(), optimizer(cached))
    return steps


if __name__ == "__main__":
    main()
    leave_quietly()
