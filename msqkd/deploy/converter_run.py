"""Runs MindSpore Lite's `converter_lite`, and compares the file it makes with one of msqkd's own."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np

from msqkd.deploy.vendor_runtime import convert_command, is_vendor_python, run_vendor, vendor_python
from msqkd.errors import ExportError, MissingDependencyError
from msqkd.exporters.converter import command
from msqkd.exporters.ms.read import read_ms
from msqkd.files import PathLike
from msqkd.integer.program import Program
from msqkd.integer.registry import ARM64
from msqkd.integer.simulator import Simulator
from msqkd.words import of_hundred

PROGRAM = "converter_lite"
_IN_PACKAGE = ("tools/converter/converter", "converter", ".")
_LIBRARIES = ("../lib", "../../../runtime/lib")  # in the package, from the folder of the program
_MACHINES = {40: "arm", 62: "x86_64", 183: "aarch64"}  # e_machine of an ELF file
_FAMILIES = {"arm": "arm", "armv7l": "arm", "armv8l": "arm", "aarch64": "arm", "arm64": "arm", "amd64": "x86_64"}
_MINDSPORE = "/mindspore/lib"
_LOG_LINES = 12
_CAST = "QuantDTypeCast"


# -- the program -------------------------------------------------------------------------------------------------------
def find_converter(path: PathLike) -> Path:
    """The converter at `path`: the program itself, the unpacked MindSpore Lite package that holds it, or a virtual
    environment with the package ``mindspore-lite``, whose interpreter is returned.

    Raises:
        MissingDependencyError: it is not there, cannot be executed, or is for another kind of processor.
    """
    given = Path(path).expanduser()
    python = vendor_python(given) if given.is_dir() else None
    if python is not None:
        return python.absolute()  # a link that is followed would leave its environment
    candidates = [given / folder / PROGRAM for folder in _IN_PACKAGE] if given.is_dir() else [given]
    found = next((file for file in candidates if file.is_file()), None)
    if found is None:
        raise MissingDependencyError(
            f"there is no {PROGRAM} at {given}; give the program, or the unpacked package of MindSpore Lite for Linux "
            f"with {_IN_PACKAGE[0]}/{PROGRAM} in it, or a virtual environment with mindspore-lite; "
            "without --converter the .ms file is written all the same"
        )
    if not os.access(found, os.X_OK):
        raise MissingDependencyError(f"{found} is not executable; chmod +x {found}")
    made_for, here = _machine_of(found), platform.machine()
    if made_for is not None and _family(made_for) != _family(here):
        raise MissingDependencyError(f"{found} is a program for {made_for}, and this machine is {here}")
    return found.resolve()


def _machine_of(program: Path) -> Optional[str]:
    """The processor an ELF file was made for; None where it is no ELF file, or for one not known here."""
    with open(program, "rb") as stream:
        head = stream.read(20)
    if len(head) < 20 or head[:4] != b"\x7fELF":
        return None
    return _MACHINES.get(int.from_bytes(head[18:20], "little" if head[5] == 1 else "big"))


def _family(machine: str) -> str:
    return _FAMILIES.get(machine.lower(), machine.lower())


def convert(converter: Path, model: Path, output: Path, folder: Path, config: Optional[Path] = None) -> Path:
    """Run the converter.

    Args:
        converter: from `find_converter`.
        model: the MindIR.
        output: the converted model, without its suffix.
        folder: where the program is started; paths in `config` are relative to it.
        config: the configuration file; None where nothing is to be quantised but what is marked.

    Returns:
        The ``.ms`` file.

    Raises:
        ExportError: the converter fails, or writes no ``.ms`` file; with the end of what it printed.
        MissingDependencyError: the system cannot start it.
    """
    files = [file.resolve() if file is not None else None for file in (model, output, config)]
    if converter.name != PROGRAM and is_vendor_python(converter):
        done = run_vendor(convert_command(converter, files[0] or model, files[1] or output, files[2]), folder=folder)
    else:
        words = command(files[0] or model, files[1] or output, files[2], converter=converter)
        done = run_vendor(words, _environment(converter), folder)
    made = output.with_name(f"{output.name}.ms")
    if done.returncode == 0 and made.is_file():
        return made
    what = f"ended with exit code {done.returncode}" if done.returncode else f"wrote no {made.name}"
    lines = [line for line in done.stdout.splitlines() if line.strip()][-_LOG_LINES:]
    log = "; the end of what it printed:\n" + "\n".join(f"  {line}" for line in lines) if lines else " and was silent"
    raise ExportError(f"{PROGRAM} {what} for {model.name}{log}")


def _environment(converter: Path) -> dict[str, str]:
    """The environment with the libraries of the package the converter came in.

    MindSpore's own, which it adds when it is imported, are left out: some have the names of the converter's.
    """
    given = [folder for folder in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if folder]
    folders = [str((converter.parent / folder).resolve()) for folder in _LIBRARIES]
    path = [folder for folder in folders if os.path.isdir(folder)]
    path += [folder for folder in given if _MINDSPORE not in folder]
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(path)}


# -- the comparison ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Layer:
    """A node of a ``.ms`` file: its name, its operation, and whether it computes in int8."""

    name: str
    op: str
    int8: bool


@dataclass(frozen=True)
class Comparison:
    """Two ``.ms`` files of one network.

    Attributes:
        ours, theirs: their nodes, casts between int8 and float aside.
        samples: how many both have computed.
        equal: share of equal output values, in percent.
        max_difference: largest difference of outputs.
        agreement: share of samples with the same top-1 answer, in percent.
    """

    ours: tuple[Layer, ...]
    theirs: tuple[Layer, ...]
    samples: int
    equal: float
    max_difference: float
    agreement: float

    def describe(self) -> str:
        """One line for people."""
        floats = [layer.name for layer in self.theirs if not layer.int8]
        named = f" (float: {', '.join(floats)})" if floats else ""
        return (
            f"int8 in {_share(self.theirs)} of its nodes{named}, {_share(self.ours)} in ours; on {self.samples} "
            f"samples {of_hundred(self.equal)} % of the output values are equal, "
            f"{of_hundred(self.agreement)} % of the answers; largest difference {self.max_difference:.3g}"
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data with stable keys."""
        nodes = {"nodes": self.theirs, "our_nodes": self.ours}
        return {
            "samples": self.samples,
            "equal_outputs": self.equal,
            "max_difference": self.max_difference,
            "agreement": self.agreement,
            **{key: [vars(layer) for layer in layers] for key, layers in nodes.items()},
        }


def _share(layers: tuple[Layer, ...]) -> str:
    return f"{sum(layer.int8 for layer in layers)} of {len(layers)}"


def compare_ms(ours: Path, theirs: Path, batches: Iterable[np.ndarray]) -> Comparison:
    """Compute two ``.ms`` files of one network on the same samples, as an ARM device would.

    Args:
        ours, theirs: the files, made for batch 1.
        batches: arrays (n, ...) float32 as the files take them: pictures are (n, H, W, C). At least one.

    Raises:
        ExportError: a file cannot be read, or the two have different inputs or outputs.
        SimulationError: a node cannot be simulated.
    """
    programs = [read_ms(ours), read_ms(theirs)]
    shapes = [[program.tensors[name].shape for name in (*program.inputs, *program.outputs)] for program in programs]
    if shapes[0] != shapes[1]:
        raise ExportError(f"{theirs.name} has inputs and outputs of shapes {shapes[1]}; those of ours are {shapes[0]}")
    simulators = [Simulator(program, ARM64) for program in programs]
    samples = equal = values = agreeing = 0
    largest = 0.0
    for batch in batches:
        one, other = (simulator.run(batch) for simulator in simulators)
        samples += len(batch)
        agreeing += int((_answers(one[0]) == _answers(other[0])).sum())
        for expected, found in zip(one, other):
            equal += int((expected == found).sum())
            values += expected.size
            largest = max(largest, float(np.abs(expected - found).max()))
    return Comparison(
        _layers(programs[0]), _layers(programs[1]), samples, 100.0 * equal / values, largest, 100.0 * agreeing / samples
    )


def _answers(logits: np.ndarray) -> np.ndarray:
    return logits.reshape(len(logits), -1).argmax(-1)


def _layers(program: Program) -> tuple[Layer, ...]:
    return tuple(Layer(step.name, step.op, step.quantized) for step in program.steps if step.op != _CAST)
