"""What a training step costs with one and with two workers on this machine: QAT of ResNet-20.

    python bench/workers.py [--json] [--batch 32] [--rounds 12]

Every worker has one thread and its own `batch` (weak scaling), so that two workers on two cores do twice the work of
one. Two processes that know nothing of each other are timed as well: what they lose to each other is the machine's
(MindSpore has threads of its own beside those of OMP_NUM_THREADS), and what workers lose beyond that are messages and
waiting. Needs msrun.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)  # as a worker
    args = parser.parse_args()
    if args.into is not None:
        work(args)
        return
    (one,), apart, (two,) = measure(1, 1, args), measure(2, 1, args), measure(1, 2, args)
    alone, talking = one["step_ms"], two["step_ms"]
    strangers = sum(item["step_ms"] for item in apart) / 2
    result: dict[str, Any] = {
        "step_ms_one_worker": alone,
        "step_ms_two_processes": round(strangers, 1),
        "step_ms_two_workers": talking,
        "two_workers_to_one": round(talking / alone, 3),
        "two_workers_to_two_processes": round(talking / strangers, 3),
        "batch": args.batch,
        "gradient_bytes": one["gradient_bytes"],
        "rounds": args.rounds,
        "date": date.today().isoformat(),
    }
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        for key, value in result.items():
            print(f"{key:>22}: {value}")


def measure(groups: int, workers: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """What the first worker of every group found; the groups run at the same time."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    folder = str(Path(sys.executable).parent)
    environment["PATH"] = os.pathsep.join([folder, environment.get("PATH", "")])
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place) / f"times{group}" for group in range(groups)]
        running = []
        for file in files:
            command = ["python", __file__, "--batch", args.batch, "--rounds", args.rounds, "--into", file]
            if workers > 1:
                command = [*launcher(workers, f"{file}.log", environment["PATH"]), *command]
            text = [str(item) for item in command]
            running.append(subprocess.Popen(text, env=environment, stdout=subprocess.DEVNULL))
        if any(process.wait() for process in running):
            raise SystemExit("a worker failed")
        return [dict(json.loads(file.read_text())) for file in files]


def launcher(workers: int, logs: str, path: str) -> list[Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = shutil.which("msrun", path=path)
    if program is None:
        raise SystemExit("msrun is not installed")
    options = [f"--worker_num={workers}", f"--local_worker_num={workers}", f"--master_port={port}"]
    return [program, *options, f"--log_dir={logs}", "--join=True"]


def work(args: argparse.Namespace) -> None:
    import mindspore as ms
    import numpy as np
    from mindspore import nn

    from msqkd import QuantConfig, TrainStep, WithLoss, parallel
    from msqkd.graph.capture import capture
    from msqkd.models import build_model
    from msqkd.platform import leave_quietly
    from msqkd.quant.placement import make_plan
    from msqkd.quant.qat import deployment_graph, quantize_cell

    parallel.join()
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_seed(0)
    graph = capture(build_model("msqkd", "resnet20", {}), (3, 32, 32))
    network = quantize_cell(graph, make_plan(deployment_graph(graph), QuantConfig(act_quant_delay=1)))
    trained = network.trainable_params()
    step = TrainStep(WithLoss(network, nn.CrossEntropyLoss()), nn.Momentum(trained, 1e-4, 0.9))
    rng = np.random.default_rng(parallel.rank())
    batch = ms.Tensor(rng.standard_normal((args.batch, 3, 32, 32)).astype(np.float32))
    labels = ms.Tensor(rng.integers(0, 10, args.batch).astype(np.int32))
    step.set_train()
    for _ in range(3):  # compile, pass the delay, compile again
        step(batch, labels).asnumpy()
    times = []
    for _ in range(args.rounds):
        begin = time.perf_counter()
        step(batch, labels).asnumpy()
        times.append(time.perf_counter() - begin)
    if parallel.is_first():
        size = sum(4 * int(parameter.size) for parameter in trained)
        args.into.write_text(json.dumps({"step_ms": round(float(np.median(times)) * 1e3, 1), "gradient_bytes": size}))
    leave_quietly()


if __name__ == "__main__":
    main()
