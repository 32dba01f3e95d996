"""Runs MindSpore Lite's `converter_lite`, and compares the file it makes with one of msqkd's own."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np

from msqkd.data import Arrays, as_tuple
from msqkd.deploy.nodes import Agreement, Layer, agreement, layers
from msqkd.deploy.vendor_install import install
from msqkd.deploy.vendor_runtime import (
    TIME_LIMIT,
    convert_command,
    end_of_log,
    ending,
    is_vendor_python,
    run_ms,
    run_vendor,
    vendor_python,
    writing,
)
from msqkd.errors import ExportError, MissingDependencyError, MsqkdError
from msqkd.exporters.converter import command
from msqkd.exporters.ms.read import read_ms
from msqkd.files import PathLike
from msqkd.integer.program import Format, Program
from msqkd.integer.registry import ARM64
from msqkd.integer.simulator import Simulator

PROGRAM = "converter_lite"
_IN_PACKAGE = ("tools/converter/converter", "converter", ".")
_LIBRARIES = ("../lib", "../../../runtime/lib")  # in the package, from the folder of the program
_MACHINES = {40: "arm", 62: "x86_64", 183: "aarch64"}  # e_machine of an ELF file
_FAMILIES = {"arm": "arm", "armv7l": "arm", "armv8l": "arm", "aarch64": "arm", "arm64": "arm", "amd64": "x86_64"}
_MINDSPORE = "/mindspore/lib"


# -- the program -------------------------------------------------------------------------------------------------------
def find_converter(path: PathLike) -> Path:
    """The converter at `path`: the program itself, the unpacked MindSpore Lite package that holds it, a virtual
    environment with the package ``mindspore-lite``, whose interpreter is returned, or the wheel of that package, which
    is set up first.

    Raises:
        MissingDependencyError: it is not there, cannot be executed, or is for another kind of processor.
        ExportError: the wheel cannot be set up.
    """
    given = Path(path).expanduser()
    if given.suffix == ".whl":
        return install(given)
    python = vendor_python(given) if given.is_dir() else None
    if python is not None:
        return python.absolute()  # a link that is followed would leave its environment
    candidates = [given / folder / PROGRAM for folder in _IN_PACKAGE] if given.is_dir() else [given]
    found = next((file for file in candidates if file.is_file()), None)
    if found is None:
        raise MissingDependencyError(
            f"there is no {PROGRAM} at {given}; give the program, or the unpacked package of MindSpore Lite for Linux "
            f"with {_IN_PACKAGE[0]}/{PROGRAM} in it, or a virtual environment with mindspore-lite; "
            "without a converter the .ms file is written all the same"
        )
    if not os.access(found, os.X_OK):
        raise MissingDependencyError(f"{found} is not executable; chmod +x {found}")
    made_for, here = _machine_of(found), platform.machine()
    if made_for is not None and _family(made_for) != _family(here):
        raise MissingDependencyError(f"{found} is a program for {made_for}, and this machine is {here}")
    return found.resolve()


def converter_at_hand() -> Optional[Path]:
    """Return the converter of ``$MSLITE_HOME``, or the one on the PATH; None where there is none."""
    found = vendor_python()
    if found is not None:
        return found.absolute()
    program = shutil.which(PROGRAM)
    return Path(program).resolve() if program else None


def _machine_of(program: Path) -> Optional[str]:
    """The processor an ELF file was made for; None where it is no ELF file, or for one not known here."""
    with open(program, "rb") as stream:
        head = stream.read(20)
    if len(head) < 20 or head[:4] != b"\x7fELF":
        return None
    return _MACHINES.get(int.from_bytes(head[18:20], "little" if head[5] == 1 else "big"))


def _family(machine: str) -> str:
    return _FAMILIES.get(machine.lower(), machine.lower())


def convert(
    converter: Path,
    model: Path,
    output: Path,
    folder: Path,
    config: Optional[Path] = None,
    limit: float = TIME_LIMIT,
) -> Path:
    """Run the converter.

    Args:
        converter: from `find_converter`.
        model: the MindIR.
        output: the converted model, without its suffix.
        folder: where the program is started; paths in `config` are relative to it.
        config: the configuration file; None where nothing is to be quantised but what is marked.
        limit: seconds after which it is ended.

    Returns:
        The ``.ms`` file.

    Raises:
        ExportError: the converter fails, crashes, does not end, or writes no ``.ms`` file; with the end of what it
            printed.
        MissingDependencyError: the system cannot start it.
    """
    files = [file.resolve() if file is not None else None for file in (model, output, config)]
    if converter.name != PROGRAM and is_vendor_python(converter):
        words, environment = convert_command(converter, files[0] or model, files[1] or output, files[2]), None
    else:
        words = command(files[0] or model, files[1] or output, files[2], converter=converter)
        environment = _environment(converter)
    done = run_vendor(words, environment, folder, limit)
    made = output.with_name(f"{output.name}.ms")
    if done.returncode == 0 and made.is_file():
        return made
    made.unlink(missing_ok=True)  # half-written
    what = f"ended with {ending(done.returncode)}" if done.returncode else f"wrote no {made.name}"
    raise ExportError(f"{PROGRAM} {what} for {model.name}{end_of_log(done.stdout)}")


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
class Outputs:
    """Two computations of the same samples: the share of equal values in percent, and the largest difference."""

    samples: int
    equal: float
    max_difference: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data with stable keys."""
        return {"samples": self.samples, "equal_outputs": self.equal, "max_difference": self.max_difference}


_ALL = 100.0


@dataclass(frozen=True)
class Comparison:
    """Two ``.ms`` files of one network.

    Attributes:
        ours, theirs: their nodes, casts between int8 and float aside.
        samples: how many both have computed.
        equal: share of equal output values, in percent.
        max_difference: largest difference of outputs.
        agreement: share of samples with the same top-1 answer, in percent.
        parameters: how the int8 nodes agree.
        runtime: what the vendor's runtime computes of the two; None where it is not at hand.
    """

    ours: tuple[Layer, ...]
    theirs: tuple[Layer, ...]
    samples: int
    equal: float
    max_difference: float
    agreement: float
    parameters: Agreement
    runtime: Optional[Outputs] = None

    @property
    def as_planned(self) -> bool:
        """Whether the two compute the same: int8 operations and their parameters, and the outputs in the runtime."""
        same = self.parameters.same_operations and not self.parameters.missing
        return same and (self.runtime is None or self.runtime.equal == _ALL)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data with stable keys."""
        nodes = {"nodes": self.theirs, "our_nodes": self.ours}
        return {
            "samples": self.samples,
            "equal_outputs": self.equal,
            "max_difference": self.max_difference,
            "agreement": self.agreement,
            "as_planned": self.as_planned,
            "parameters": self.parameters.to_dict(),
            "runtime": None if self.runtime is None else self.runtime.to_dict(),
            **{key: [vars(layer) for layer in layers] for key, layers in nodes.items()},
        }


def compare_ms(ours: Path, theirs: Path, batches: Iterable[Arrays], python: Optional[Path] = None) -> Comparison:
    """Compute two ``.ms`` files of one network on the same samples, as an ARM device would.

    Args:
        ours, theirs: the files, made for batch 1.
        batches: arrays (n, ...), or a tuple of them where the network has several inputs, as the files take them:
            pictures are (n, H, W, C). At least one.
        python: the interpreter of the vendor's package, whose runtime computes the two as well.

    Raises:
        ExportError: a file cannot be read, the two have different inputs or outputs, or the runtime refuses one.
        SimulationError: a node cannot be simulated.
    """
    programs = [read_ms(ours), read_ms(theirs)]
    order = same_order(*programs)
    shapes = [_shapes(programs[0], programs[0].inputs), _shapes(programs[1], [programs[1].inputs[i] for i in order])]
    for number, program in enumerate(programs):
        shapes[number] += _shapes(program, program.outputs)
    if shapes[0] != shapes[1]:
        raise ExportError(f"{theirs.name} has inputs and outputs of shapes {shapes[1]}; those of ours are {shapes[0]}")
    simulators = [Simulator(program, ARM64) for program in programs]
    inputs = [as_tuple(batch) for batch in batches]
    fed = [inputs, [tuple(batch[order.index(place)] for place in range(len(order))) for batch in inputs]]
    found = [[simulator.run(*batch) for batch in part] for simulator, part in zip(simulators, fed)]
    joined = [[np.concatenate(parts) for parts in zip(*batches)] for batches in found]
    simulated = compared(*joined)
    runtime = None
    if python is not None:
        samples = [[np.concatenate(parts)[:, None] for parts in zip(*part)] for part in fed]
        runtime = compared(*(run_ms(python, file, arrays) for file, arrays in zip((ours, theirs), samples)))
    return Comparison(
        layers(programs[0]), layers(programs[1]), simulated.samples, simulated.equal, simulated.max_difference,
        top1_agreement(joined[0][0], joined[1][0]), agreement(*programs), runtime,
    )  # fmt: skip


def same_order(ours: Program, theirs: Program) -> list[int]:
    """Return the place in `theirs` of every input of ours: by name, or the same where the names are others."""
    if sorted(ours.inputs) == sorted(theirs.inputs):
        return [theirs.inputs.index(name) for name in ours.inputs]
    return list(range(len(theirs.inputs)))


def _shapes(program: Program, names: Iterable[str]) -> list[tuple[int, ...]]:
    return [program.tensors[name].shape for name in names]


def compared(ours: list[np.ndarray], theirs: list[np.ndarray]) -> Outputs:
    """Compare the outputs (n, ...) of two computations of the same samples."""
    pairs = [(one.reshape(-1), other.reshape(-1)) for one, other in zip(ours, theirs)]
    equal, values = sum(int((one == other).sum()) for one, other in pairs), sum(one.size for one, _ in pairs)
    largest = max(float(np.abs(one.astype(np.float64) - other).max()) for one, other in pairs)
    return Outputs(len(ours[0]), 100.0 * equal / values, largest)


def top1_agreement(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the share of samples with the same top-1 answer, in percent."""
    answers = [array.reshape(len(array), -1).argmax(-1) for array in (ours, theirs)]
    return 100.0 * float((answers[0] == answers[1]).mean())


# -- both --------------------------------------------------------------------------------------------------------------
def convert_and_compare(
    converter: Path,
    model: Path,
    ours: Path,
    output: Path,
    batches: Iterable[Arrays],
    config: Optional[Path] = None,
    limit: float = TIME_LIMIT,
) -> dict[str, Any]:
    """Convert a MindIR and compare the file with our own ``.ms`` of the same network.

    A converter that fails, and a file that cannot be compared, are answers too: our own file is none the worse.

    Args:
        converter: from `find_converter`.
        model: the MindIR; paths in `config` are relative to its folder.
        ours: our own file.
        output: the converted file, without its suffix; it appears whole or not at all.
        batches: samples as the network takes them: pictures are (n, C, H, W).
        config, limit: as for `convert`.

    Returns:
        ``file`` (None where there is none), ``converter``, and ``compared`` with `Comparison.to_dict` or a ``reason``.
    """
    result: dict[str, Any] = {"file": None, "converter": str(converter), "compared": False}
    try:
        with writing(), tempfile.TemporaryDirectory() as place:
            folder = model.parent if config is not None else Path(place)
            made = convert(converter, model, Path(place) / output.name, folder, config, limit)
            target = output.with_name(made.name)
            shutil.copyfile(made, target)
        result["file"] = target.name
        program = read_ms(ours)
        fed = (tuple(feed(program, batch)) for batch in batches)
        found = compare_ms(ours, target, fed, vendor_python())
    except MsqkdError as error:
        return {**result, "reason": str(error)}
    return {**result, "compared": True, **found.to_dict()}


def feed(program: Program, batch: Arrays) -> Iterable[np.ndarray]:
    """Yield the inputs of a batch in the layout of the file: pictures with the channels last."""
    for name, array in zip(program.inputs, as_tuple(batch)):
        is_picture = array.ndim == 4 and program.tensors[name].format == Format.NHWC
        yield np.ascontiguousarray(array.transpose(0, 2, 3, 1) if is_picture else array)
