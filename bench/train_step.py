"""What a training step costs: float, float with folded BatchNorm, QAT, QAT with distillation, and with cached answers.

    python bench/train_step.py [--json] [--batch 128] [--rounds 12] [--teacher resnet56] [--learned] [--memory]

With --learned also QAT with trained scales (LSQ) of weights and activations, in place of distillation. With --memory
the largest memory of a process that takes each kind of step and no other, and its ratio to that of the float step.

Times are medians over interleaved rounds in which every step runs once, so that a noisy machine disturbs all of them
alike; read the ratios.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
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
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # as one of the processes of --memory
    args = parser.parse_args()
    result = memory(args) if args.memory else times_of(args)
    result |= {"batch": args.batch, "rounds": args.rounds, "batchnorm": args.batchnorm, "teacher": args.teacher}
    result |= {"date": date.today().isoformat(), "versions": versions()}
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        for key, value in result.items():
            print(f"{key:>22}: {value}")


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """The largest resident memory of a process for each kind of step, in MB, with the interpreter and MindSpore."""
    names = ["float", "qat", "qat_lsq"] if args.learned else ["float", "qat", "qat_kd", "qat_kd_cached"]
    result: dict[str, Any] = {}
    for name in names:
        command = [sys.executable, *sys.argv, "--rounds", "3", "--only", name, "--json"]
        done = subprocess.run([part for part in command if part != "--memory"], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        result[f"{name}_mb"] = json.loads(done.stdout[done.stdout.index("{") :])["peak_mb"]
    return result | {f"{name}_ratio": round(result[f"{name}_mb"] / result["float_mb"], 3) for name in names[1:]}


def times_of(args: argparse.Namespace) -> dict[str, Any]:
    """Median times of the kinds of step, and their ratios to the float step."""
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_seed(0)
    rng = np.random.default_rng(0)
    batch = ms.Tensor(rng.standard_normal((args.batch, *SHAPE)).astype(np.float32))
    labels = ms.Tensor(rng.integers(0, 10, args.batch).astype(np.int32))
    answers = ms.Tensor(rng.standard_normal((args.batch, 1, 10)).astype(np.float32))
    steps = make_steps(args.teacher, args.batchnorm, args.learned)
    if args.only is not None:
        steps = {args.only: steps[args.only]}
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
    if args.only is not None:
        result["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
    # Ratios are taken round by round: what slows a round slows both.
    for name in [name for name in times if name not in ("float", args.only)]:
        result[f"{name}_ratio"] = round(float(np.median(np.divide(times[name], times["float"]))), 3)
    return result


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
