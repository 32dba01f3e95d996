"""Random networks through quantization-aware training and every export format, each file compared with its network.

    python bench/random_networks.py --networks 200 --seed 0 [--first 0] [--targets lite_arm ascend] [--json]

Every network is a random sequence of blocks (convolution, BatchNorm, residual sum, concat, pool, squeeze and excite,
attention, shuffle, shared convolution, dead channel, second output, ...). For each target it is trained for a few steps
with random settings (bits, granularity, BatchNorm mode, delay, trained scales), exported in every format of the target,
read back, and compared with the quantized network on one batch.

A network fails if anything but a sentence for the user (MsqkdError) is raised, or if a file differs:

* portable MindIR: by more than 1e-4 of the largest output
* marked MindIR: below 40 dB SQNR; sums of floats in another order may move a value to the next level
* `.ms`: any value of the program in the file differs from the program it was written from
* ONNX: farther from the quantized network than the device simulation is allowed to be (20 dB SQNR)
* Ascend MindIR: cannot be computed without an NPU; written only

The exit code is 1 if a network failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import traceback
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Callable

import numpy as np
from children import measured_apart, print_results

FORMATS = {
    "lite_arm": ("MINDIR", "MINDIR_PORTABLE", "MS", "ONNX"),
    "ascend": ("MINDIR_ASCEND", "MINDIR_PORTABLE", "ONNX"),
}
CONVERSION_DB, ONNX_DB, PORTABLE = 40.0, 20.0, 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="number of the first network")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for ten networks")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    numbers = range(args.first, args.first + args.networks)
    if args.child:
        print_results(numbers, lambda number: measure(args.seed, number, args.targets))
        return
    results: list[dict[str, Any]] = []
    for result in measured_apart(numbers, partial(child_command, args), ended, args.timeout):
        results.append(result)
        if not args.json:
            print(row(result), flush=True)
    report(args, results)


def child_command(args: argparse.Namespace, first: int, count: int) -> list[str]:
    """Return the arguments of a process that measures `count` networks."""
    command = [__file__, "--child", "--seed", str(args.seed), "--first", str(first), "--networks", str(count)]
    return [*command, "--targets", *args.targets]


def ended(number: int, how: str) -> dict[str, Any]:
    """Return the result of a network that ended its process: it counts as failed."""
    return {"network": number, "failed": [how], "refused": []}


def row(result: dict[str, Any]) -> str:
    """Return one line for people."""
    words = [f"{result['network']:4} {' '.join(result.get('blocks', []))}"]
    words += [f"     FAILED {text}" for text in result["failed"]]
    words += [f"     refused {text}" for text in result["refused"]]
    return "\n".join(words)


def report(args: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Print the totals, and end with exit code 1 if a network failed."""
    from msqkd.environment import versions

    failed = [result["network"] for result in results if result["failed"]]
    files = sum(len(result.get("files", [])) for result in results)
    totals = {
        "networks": len(results), "failed": failed, "files": files,
        "refused": sum(len(result["refused"]) for result in results),
        "seed": args.seed, "date": date.today().isoformat(), "versions": versions(),
    }  # fmt: skip
    print(json.dumps({**totals, "results": results}, indent=2) if args.json else json.dumps(totals))
    sys.exit(bool(failed))


# -- one network -------------------------------------------------------------------------------------------------------
def measure(seed: int, number: int, targets: list[str]) -> dict[str, Any]:
    """Build, train, export and compare network `number`; returns what failed and what was refused."""
    import mindspore as ms

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_seed(number)
    found: dict[str, Any] = {"network": number, "failed": [], "refused": [], "files": []}
    for target in targets:
        rng = np.random.default_rng([seed, number])  # the same network for every target
        stage = "build"

        def at(name: str, target: str = target) -> None:
            nonlocal stage
            stage = f"{target}, {name}"

        try:
            found["blocks"] = one_target(rng, target, found, at)
        except Exception as error:
            _note(found, stage, error)
    return found


def _note(found: dict[str, Any], stage: str, error: Exception) -> None:
    from msqkd.errors import MsqkdError

    if isinstance(error, MsqkdError):
        found["refused"].append(f"{stage}: {error}")
    else:
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = str(error).strip().splitlines()
        first, place = text[0][:200] if text else "", f"{Path(last.filename).name}:{last.lineno}"
        found["failed"].append(f"{stage}: {type(error).__name__}: {first} ({place})")


def one_target(rng: np.random.Generator, target: str, found: dict[str, Any], at: Callable[[str], None]) -> list[str]:
    """Take one random network through training and export for `target`; returns the kinds of its blocks."""
    import mindspore as ms
    from mindspore import nn
    from random_blocks import CLASSES, random_network, randomize

    import msqkd

    net, blocks, shape = random_network(rng)
    randomize(net, rng)
    data = [rng.normal(size=(4, *shape)).astype(np.float32) for _ in range(4)]
    labels = rng.integers(0, CLASSES, 4).astype(np.int32)
    config, batchnorm = settings(rng)
    found["settings"] = f"{config} {batchnorm}"
    at("prepare")
    cell = msqkd.prepare_qat(net, shape, config, batchnorm=batchnorm, target=target, calib_dataset=data)
    at("train")
    optimizer = nn.Momentum(cell.trainable_params(), 1e-3, 0.9)
    step = msqkd.TrainStep(first_output_loss(cell), optimizer)
    step.set_train()
    for batch in data[:3]:
        step(ms.Tensor(batch), ms.Tensor(labels))
    cell.set_train(False)
    at("calibrate")
    quantized = msqkd.quantize(msqkd.create_ptq_network(cell, calib_dataset=data))
    expected = arrays(quantized(ms.Tensor(data[0])))
    if not all(np.isfinite(array).all() for array in expected):
        raise ValueError("an output of the quantized network is not finite")
    with tempfile.TemporaryDirectory() as folder:
        for form in FORMATS[target]:
            at(form)
            try:
                file = Path(msqkd.export(quantized, shape, f"{folder}/{form}", form))
                at(f"{form} read back")
                wrong = compare_file(form, file, quantized, data[0], expected)
                found["files"].append(f"{target}/{form}")
                if wrong:
                    found["failed"].append(f"{target}, {form}: {wrong}")
            except Exception as error:
                _note(found, f"{target}, {form}", error)
    return blocks


def settings(rng: np.random.Generator) -> tuple[Any, str]:
    """Return random quantization settings and a BatchNorm mode."""
    import msqkd

    bits = int(rng.choice([8, 8, 8, 4]))
    learned = str(rng.choice(["none", "none", "lsq"]))
    weight = msqkd.WeightQuantizer(
        quant_dtype=f"int{bits}", per_channel=bool(rng.integers(2)), learned=learned,
        observer=str(rng.choice(["minmax", "mse"])),
    )  # fmt: skip
    config = msqkd.QuantConfig(
        weight, act_quant_delay=int(rng.integers(0, 3)), act_observer=str(rng.choice(["ema", "minmax", "percentile"])),
        act_learned="lsq" if learned == "lsq" else "none",
    )  # fmt: skip
    return config, str(rng.choice(["fold", "freeze", "live"]))


def compare_file(form: str, file: Path, quantized: Any, batch: np.ndarray, expected: list[np.ndarray]) -> str:
    """Read a file back, compute one batch, and say what is wrong with it; empty where nothing is."""
    import mindspore as ms

    from msqkd.analysis.parity import differing_values
    from msqkd.exporters.device import lite_program
    from msqkd.exporters.ms.read import read_ms
    from msqkd.exporters.onnx.runtime import load_onnx
    from msqkd.exporters.verify import load_lite, load_portable
    from msqkd.integer.registry import ARM64

    if form == "MINDIR_ASCEND":
        return ""
    if form == "MS":
        graph, plan = quantized.sync()
        differ, total = differing_values(lite_program(graph, plan), read_ms(file), (batch,), ARM64)
        return f"{differ} of {total} values differ" if differ else ""
    load = {"MINDIR": load_lite, "MINDIR_PORTABLE": load_portable, "ONNX": load_onnx}[form]
    got = arrays(load(file)(ms.Tensor(batch)))
    if [array.shape for array in got] != [array.shape for array in expected]:
        return f"shapes {[array.shape for array in got]} instead of {[array.shape for array in expected]}"
    if form == "MINDIR_PORTABLE":
        worst = max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in zip(got, expected))
        return f"largest difference {worst:.3g} of the largest output" if worst > PORTABLE else ""
    least = ONNX_DB if form == "ONNX" else CONVERSION_DB
    ratio = min(sqnr(b, a) for a, b in zip(got, expected))
    return f"SQNR {ratio:.1f} dB, allowed: {least:g} dB or more" if ratio < least else ""


def sqnr(reference: np.ndarray, found: np.ndarray) -> float:
    """Return the signal-to-quantization-noise ratio in dB (200 where nothing differs)."""
    noise = float(np.square(reference.astype(np.float64) - found).sum())
    signal = float(np.square(reference.astype(np.float64)).sum())
    return 200.0 if noise == 0 else 10 * float(np.log10(max(signal, 1e-30) / noise))


def arrays(outputs: Any) -> list[np.ndarray]:
    """Return the outputs of a network as a list of arrays."""
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return [output.asnumpy() if hasattr(output, "asnumpy") else np.asarray(output) for output in outputs]


def first_output_loss(cell: Any) -> Any:
    """Return a cell that computes the cross-entropy of the first output."""
    from mindspore import nn, ops

    class Loss(nn.Cell):
        def __init__(self) -> None:
            super().__init__(auto_prefix=False)
            self.cell = cell

        def construct(self, x: Any, labels: Any) -> Any:
            outputs = self.cell(x)
            logits = outputs[0] if isinstance(outputs, tuple) else outputs
            return ops.cross_entropy(logits, labels)

    return Loss()


if __name__ == "__main__":
    main()
