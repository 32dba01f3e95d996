"""What a training step costs with one and with two workers on this machine: QAT of ResNet-20.

    python bench/workers.py [--json] [--batch 32] [--rounds 12]

Every worker has one thread and its own `batch` (weak scaling), so that two workers on two cores do twice the
work of one. The ratio of the two times is what the workers cost each other: messages, waiting, and the memory they
share. Needs msrun.
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
    found = {workers: measure(workers, args) for workers in (1, 2)}
    result: dict[str, Any] = {f"step_ms_{workers}": item["step_ms"] for workers, item in found.items()}
    ratio = found[2]["step_ms"] / found[1]["step_ms"]
    result |= {"ratio": round(ratio, 3), "samples_a_second_ratio": round(2 / ratio, 3), "batch": args.batch}
    result |= {"gradient_bytes": found[1]["gradient_bytes"], "rounds": args.rounds, "date": date.today().isoformat()}
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        for key, value in result.items():
            print(f"{key:>22}: {value}")


def measure(workers: int, args: argparse.Namespace) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    folder = str(Path(sys.executable).parent)
    environment["PATH"] = os.pathsep.join([folder, environment.get("PATH", "")])
    with tempfile.TemporaryDirectory() as place:
        command = ["python", __file__, "--batch", args.batch, "--rounds", args.rounds, "--into", Path(place) / "times"]
        if workers > 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            program = shutil.which("msrun", path=environment["PATH"])
            if program is None:
                raise SystemExit("msrun is not installed")
            options = [f"--worker_num={workers}", f"--local_worker_num={workers}", f"--master_port={port}"]
            command = [program, *options, f"--log_dir={place}/log", "--join=True", *command]
        subprocess.run([str(item) for item in command], env=environment, check=True, stdout=subprocess.DEVNULL)
        return dict(json.loads((Path(place) / "times").read_text()))


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
