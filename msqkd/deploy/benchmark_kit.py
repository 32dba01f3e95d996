"""A folder to copy to an ARM device: does MindSpore Lite's `benchmark` answer there as the simulator does here?

Formats and options are those of the `benchmark` tool of MindSpore Lite 2.7 (its benchmark_base.cc and
benchmark_unified_api.cc).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from msqkd.deploy.benchmark_scripts import readme, scripts
from msqkd.errors import ExportError
from msqkd.exporters.converter import write_calibration_bins
from msqkd.exporters.ms.read import read_ms
from msqkd.files import PathLike, sha256, write_json, write_text
from msqkd.integer.program import Program
from msqkd.integer.registry import ARM64
from msqkd.integer.simulator import Simulator

API_VERSION = "msqkd/benchmark/v1"
_KIT, _INPUTS, _EXPECTED = "kit.json", "inputs", "expected"
_FLOAT_THRESHOLD = 0.5  # percent, the tool's own default: float kernels may sum in another order


@dataclass(frozen=True)
class Kit:
    """A folder of `write_kit`.

    Attributes:
        folder: where it is.
        model: name of the ``.ms`` file in it.
        samples: names of the samples; ``inputs/NAME.bin`` and ``expected/NAME.txt`` belong to each.
        machine: whose arithmetic was simulated.
        threshold: mean relative error of the outputs, in percent, up to which `benchmark` is content: 0 where every
            node computes in int8.
        sha256: checksums of the model and the inputs, by path in the folder.
    """

    folder: Path
    model: str
    samples: tuple[str, ...]
    machine: str
    threshold: float
    sha256: dict[str, str]

    def input_data(self, program: Program, sample: str) -> np.ndarray:
        """What the device is fed with for a sample, as the first input of `program`."""
        shape = program.tensors[program.inputs[0]].shape
        return np.fromfile(self.folder / _INPUTS / f"{sample}.bin", "<f4").reshape(shape)


def write_kit(model: Path, samples: Any, folder: PathLike) -> Kit:
    """Write what a comparison on the device takes: model, inputs, the simulator's outputs, scripts and a README.

    Args:
        model: an int8 ``.ms`` file for batch 1, with one float32 input.
        samples: float32 (N, ...) in the network's layout: pictures are (N, C, H, W). They are written NHWC.
        folder: where to.

    Raises:
        ExportError: the model cannot be read or has several inputs, the samples do not fit it, or a file cannot be
            written.
    """
    folder = Path(folder)
    program = read_ms(model)
    if len(program.inputs) != 1:
        raise ExportError(f"{model.name} has {len(program.inputs)} inputs; allowed for the benchmark is 1")
    inputs = write_calibration_bins(samples, folder / _INPUTS, "NHWC")
    shutil.copyfile(model, folder / model.name)
    names = tuple(file.stem for file in inputs)
    threshold = 0.0 if _all_int8(program) else _FLOAT_THRESHOLD
    checksums = {str(file.relative_to(folder)): sha256(file) for file in (folder / model.name, *inputs)}
    kit = Kit(folder, model.name, names, ARM64, threshold, checksums)
    simulator = Simulator(program, kit.machine)
    for name in names:
        outputs = simulator.run(kit.input_data(program, name))
        write_text(folder / _EXPECTED / f"{name}.txt", benchmark_data(program.outputs, outputs))
    for script, text in scripts(kit.model, kit.threshold).items():
        write_text(folder / script, text)
        (folder / script).chmod(0o755)
    write_text(folder / "README.txt", readme(kit.model, len(names), kit.threshold))
    write_json(
        folder / _KIT,
        {
            "apiversion": API_VERSION,
            "model": kit.model,
            "samples": list(names),
            "machine": kit.machine,
            "threshold": threshold,
            "sha256": checksums,
        },
    )
    return kit


def read_kit(folder: PathLike) -> Kit:
    """The kit in `folder`, or in ``benchmark`` below it.

    Raises:
        ExportError: there is none, or a file of it was changed.
    """
    place = next((p for p in (Path(folder), Path(folder) / "benchmark") if (p / _KIT).is_file()), None)
    if place is None:
        raise ExportError(f"{folder} holds no {_KIT}; give a folder that tools/export_lite.py --benchmark has written")
    try:
        held = json.loads((place / _KIT).read_text(encoding="utf-8"))
        names, checksums = tuple(map(str, held["samples"])), dict(held["sha256"])
        kit = Kit(place, str(held["model"]), names, str(held["machine"]), float(held["threshold"]), checksums)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{place / _KIT} is damaged ({error!r}); write the folder again") from error
    for name, checksum in kit.sha256.items():
        if not (place / name).is_file() or sha256(place / name) != checksum:
            raise ExportError(f"{place / name} is missing or not the file that was written; write the folder again")
    return kit


def benchmark_data(names: Sequence[str], outputs: Sequence[np.ndarray]) -> str:
    """Outputs as ``--benchmarkDataFile`` takes them: a line ``NAME RANK SIZE…`` and a line of values for each.

    There is no line feed at the end: the tool would take what follows for another output.
    """
    lines = []
    for name, data in zip(names, outputs):
        lines.append(" ".join([name, str(data.ndim), *map(str, data.shape)]))
        lines.append(" ".join(f"{value:.9g}" for value in data.ravel().tolist()))
    return "\n".join(lines)


def _all_int8(program: Program) -> bool:
    return all(step.quantized or step.op == "QuantDTypeCast" for step in program.steps)
