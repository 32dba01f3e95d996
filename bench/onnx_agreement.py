"""How an ONNX QDQ model in onnxruntime agrees with the simulator and with the fake-quantised network.

    python bench/onnx_agreement.py runs/cifar10_resnet20_w8a8 [--samples 2000] [--values 100] [--json]

The network of a finished run (`msqkd run` or `msqkd calibrate`), of the target lite_arm, is written as ONNX anew and
answers the first test images: in onnxruntime with one thread, in the simulator with onnxruntime's arithmetic and with
MindSpore Lite's, and fake-quantised. For the first of them every integer that onnxruntime holds between two kernels is
compared with the simulator's, too.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any, Optional

import numpy as np

from msqkd.analysis.parity import Device, integer_outputs
from msqkd.data import subset
from msqkd.environment import versions
from msqkd.exporters.onnx.qdq import export_onnx
from msqkd.exporters.onnx.runtime import load_onnx, onnxruntime_package, open_session
from msqkd.exporters.onnx.writer import onnx_package
from msqkd.graph.islands import run_island
from msqkd.integer.program import Program, Step
from msqkd.integer.registry import ONNXRUNTIME, X86
from msqkd.integer.simulator import Simulator
from msqkd.pipeline.export import Exported
from msqkd.pipeline.run import reopen
from msqkd.pipeline.rundir import RunDirectory
from msqkd.platform import leave_quietly
from msqkd.progress import Reporter
from msqkd.quant.fake_quant import QUANTIZE
from msqkd.quant.qat import quantize_cell
from msqkd.recipe import make_recipe
from msqkd.train.evaluate import agreement, input_batches, output_arrays
from msqkd.train.metric import accuracy_of

_BATCH = 50
_SIGN = np.uint8(128)  # the file stores int8 as uint8, 128 more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--samples", type=int, default=2000, help="test images that are answered, at most")
    parser.add_argument("--values", type=int, default=100, help="test images whose every integer is compared, at most")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    folder = RunDirectory.finished(args.run)
    reporter = Reporter(quiet=args.json)
    network = reopen(folder, make_recipe(folder.state["recipe"]), reporter)
    with tempfile.TemporaryDirectory() as place:
        file = export_onnx(network.graph, network.plan, Path(place) / "network.onnx")
        rows = answer_rows(network, file, args.samples)
        program = Device(network.graph, network.plan).program
        inputs = next(input_batches(network.test, min(args.values, len(network.test))))
        assert isinstance(inputs, np.ndarray)  # a classifier of images
        counts = differing_values(program, file, inputs)
    different, total = (sum(column) for column in zip(*counts.values()))
    if args.json:
        result = {"answers": rows, "tensors": len(counts), "values": total, "differing_values": different}
        print(json.dumps({**result, "date": date.today().isoformat(), "versions": versions()}, indent=2))
        return
    print("| execution | accuracy % | same class as onnxruntime % | equal logits % |\n|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['accuracy']:.2f} | {row['agreement']:.2f} | {row['equal']:.2f} |")
    print(f"\n{different:,} of {total:,} integers of {len(counts)} tensors differ from the simulator's")


def answer_rows(network: Exported, file: Path, samples: int) -> dict[str, dict[str, float]]:
    """Accuracy, and agreement with onnxruntime, of every execution, in percent."""
    test = subset(network.test, min(samples, len(network.test)))
    assert isinstance(test.labels, np.ndarray)
    run = load_onnx(file, threads=1)
    cell = quantize_cell(network.graph, network.plan)
    cell.set_phase(QUANTIZE)
    lite, same = Device(network.graph, network.plan), Device(network.graph, network.plan)
    same.simulator = Simulator(same.program, X86, run_island, ONNXRUNTIME)
    logits = {
        "onnxruntime": np.concatenate([run(batch) for batch in input_batches(test, _BATCH)]),
        "simulator, onnxruntime's arithmetic": integer_outputs(same, input_batches(test, _BATCH))[0],
        "simulator, MindSpore Lite's arithmetic": integer_outputs(lite, input_batches(test, _BATCH))[0],
        "fake-quantised": output_arrays(cell, test, _BATCH)[0],
    }
    reference = logits["onnxruntime"]
    tolerance = np.abs(reference).max() * 1e-5  # far below a level: fake quantisation multiplies in another order
    return {
        name: {
            "accuracy": accuracy_of(found, test.labels),
            "agreement": agreement(found, reference),
            "equal": 100 * float((np.abs(found - reference) <= tolerance).mean()),
        }
        for name, found in logits.items()
    }


def differing_values(program: Program, file: Path, inputs: np.ndarray) -> dict[str, tuple[int, int]]:
    """For every int8 tensor of `program` that onnxruntime holds too: how many values differ, of how many.

    Args:
        program: of MindSpore Lite, for the network in `file`; of one input.
        file: the network as ONNX QDQ with uint8 activations.
        inputs: of any batch, in the layout of the file.
    """
    held = _integers(file, inputs)
    made_by = {output: step for step in program.steps for output in step.outputs}
    fed = program.tensors[program.inputs[0]]
    given = np.ascontiguousarray(inputs.transpose(np.argsort(fed.perm)) if fed.perm else inputs)
    counts = {}
    for name, data in Simulator(program, X86, run_island, ONNXRUNTIME).trace(given):
        tensor = program.tensors[name]
        found = _same_tensor(held, tensor.value, made_by.get(name))
        if data.dtype != np.int8 or found is None:
            continue
        # What onnxruntime computes in NHWC, as the program does, has the name of the operation.
        in_file_layout = tensor.perm and "quantised" in found
        expected = np.ascontiguousarray(data.transpose(tensor.perm) if in_file_layout else data)
        different = (expected.view(np.uint8) ^ _SIGN).reshape(held[found].shape) != held[found]
        counts[name] = int(different.sum()), different.size
    return counts


def _same_tensor(held: dict[str, np.ndarray], value: str, step: Optional[Step]) -> Optional[str]:
    """The name in onnxruntime of a value of the graph that `step` computes, None where it does not keep it."""
    layer = step.layer if step is not None else ""
    names = (f"{value}.quantised", f"{value}.quantised_1", layer, f"{layer}.GlobalAveragePool")
    return next((name for name in names if name in held), None)


def _integers(file: Path, inputs: np.ndarray) -> dict[str, np.ndarray]:
    """Every uint8 tensor that onnxruntime computes with all its optimisations, by name."""
    onnx = onnx_package()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "executed.onnx"
        open_session(file, threads=1, optimized=place)
        model = onnx.load(str(place))
    outputs = {item.name for item in model.graph.output}
    computed = [name for node in model.graph.node for name in node.output if name]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in computed if n not in outputs)
    return {name: data for name, data in _run_as_is(model, inputs) if data.dtype == np.uint8}


def _run_as_is(model: Any, inputs: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    runtime = onnxruntime_package()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_outputs()]
    return zip(names, session.run(names, {session.get_inputs()[0].name: inputs}))


if __name__ == "__main__":
    main()
    leave_quietly()
