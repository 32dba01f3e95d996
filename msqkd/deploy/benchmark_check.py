"""Node outputs that `benchmark` dumped on a device, held against the simulator's."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np

from msqkd.deploy.benchmark_kit import Kit, read_kit
from msqkd.errors import ExportError
from msqkd.exporters.ms.read import read_ms
from msqkd.files import PathLike
from msqkd.integer.simulator import Simulator

# As the tool names a dump: node, output, shape, type and layout; some versions write the suffix twice.
_DUMP = re.compile(
    r"(?P<node>.+)_output_(?P<index>\d+)_shape_(?P<shape>(?:\d+_)*)(?P<dtype>[A-Za-z]+\d*)(?:_(?P<format>[A-Z0-9]+))?"
    r"(?:\.bin)+"
)
_PACKED = re.compile(r"\d")  # NC4HW4 and the like, in which float kernels hold their values
_DTYPES = {"Float32": "<f4", "Int8": "<i1", "Int32": "<i4", "Float16": "<f2", "UInt8": "<u1"}
_RELATIVE, _ABSOLUTE = 1e-5, 1e-8  # of a float value; the tool's own

Key = tuple[str, int]


@dataclass(frozen=True)
class Dump:
    """A dumped output: the file, the size of each axis, and the numpy name of its type."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass
class NodeCheck:
    """An output of a node on the device and in the simulator, over all samples.

    Attributes:
        node: its name.
        dtype: numpy name of the type of the values.
        values: how many were compared.
        differing: how many differ; for float by more than 1e-5 of the value, as `benchmark` counts.
        max_difference: the largest difference.
    """

    node: str
    dtype: str
    values: int = 0
    differing: int = 0
    max_difference: float = 0.0

    def add(self, expected: np.ndarray, found: np.ndarray) -> None:
        """Count the values of one sample, two arrays of the same shape and type."""
        one, other = expected.astype(np.float64), found.astype(np.float64)
        difference = np.abs(one - other)
        allowed = 0.0 if self.dtype == "int8" else _ABSOLUTE + _RELATIVE * np.abs(one)
        self.values += expected.size
        self.differing += int((~(difference <= allowed)).sum())
        self.max_difference = max(self.max_difference, float(np.nan_to_num(difference, nan=np.inf).max(initial=0.0)))


@dataclass(frozen=True)
class DumpCheck:
    """What `check_dump` found.

    Attributes:
        samples: how many had a dump.
        nodes: in the order of execution, those with a dump.
        missing: names of nodes without one, or with one whose channels the runtime has packed by fours.
        unknown: names of dumped nodes that the model does not have; the runtime adds some of its own.
    """

    samples: int
    nodes: tuple[NodeCheck, ...]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]

    @property
    def differing(self) -> int:
        """How many values differ in all."""
        return sum(node.differing for node in self.nodes)

    @property
    def first(self) -> Optional[NodeCheck]:
        """The first node in the order of execution with a differing value."""
        return next((node for node in self.nodes if node.differing), None)


def check_dump(folder: PathLike, dump: PathLike) -> DumpCheck:
    """Compare what a device dumped with the simulator.

    Args:
        folder: from `msqkd.deploy.benchmark_kit.write_kit`.
        dump: a file that `benchmark` dumped, or a folder of them; some folder on the way to a file has the name of its
            sample (``dump/00000/0/conv1_output_0_shape_1_8_8_4_Int8_NHWC.bin``).

    Raises:
        ExportError: no kit, no dump in it, or one that does not belong to the model.
        SimulationError: a node cannot be simulated.
    """
    kit = read_kit(folder)
    program = read_ms(kit.folder / kit.model)
    simulator = Simulator(program, kit.machine)
    places: dict[str, Key] = {
        tensor: (step.name.replace("/", "."), index)
        for step in program.steps
        for index, tensor in enumerate(step.outputs)
    }
    dumps = _by_sample(kit, Path(dump))
    checks: dict[str, NodeCheck] = {}
    for sample, found in dumps.items():
        for tensor, expected in simulator.trace(kit.input_data(program, sample)):
            for one in found.get(places.get(tensor, ("", 0)), ()):
                node = checks.setdefault(tensor, NodeCheck(places[tensor][0], str(expected.dtype)))
                node.add(expected, _values(one, expected))
    dumped = {node for found in dumps.values() for node, _ in found}
    nodes = {node for node, _ in places.values()}
    if not checks:
        raise ExportError(f"no dump in {dump} is of a node of {kit.model}; found {', '.join(sorted(dumped)[:3])}")
    order = tuple(checks[tensor] for tensor in places if tensor in checks)
    return DumpCheck(len(dumps), order, tuple(sorted(nodes - dumped)), tuple(sorted(dumped - nodes)))


def _by_sample(kit: Kit, path: Path) -> Mapping[str, Mapping[Key, list[Dump]]]:
    """The dumps below `path` by sample, and by node and number of its output."""
    if not path.exists():
        raise ExportError(f"there is no dump {path}")
    result: dict[str, dict[Key, list[Dump]]] = defaultdict(lambda: defaultdict(list))
    for file, match in _dumps(path):
        sample = next((part for part in reversed(file.resolve().parts) if part in kit.samples), None)
        if sample is None:
            raise ExportError(
                f"{file}: no folder on its way has the name of a sample ({kit.samples[0]} to {kit.samples[-1]})"
            )
        shape = tuple(int(size) for size in match["shape"].split("_") if size)
        result[sample][match["node"], int(match["index"])].append(Dump(file, shape, _DTYPES.get(match["dtype"], "")))
    if not result:
        raise ExportError(
            f"{path} holds no dump of a node's output; the names of such files end in "
            "_output_0_shape_1_10_Float32_NHWC.bin or the like"
        )
    return dict(sorted(result.items()))


def _dumps(path: Path) -> Iterator[tuple[Path, re.Match[str]]]:
    for file in sorted(path.rglob("*.bin")) if path.is_dir() else [path]:
        match = _DUMP.fullmatch(file.name)
        if match is not None and not _PACKED.search(match["format"] or ""):
            yield file, match


def _values(dump: Dump, expected: np.ndarray) -> Any:
    """The values in a dump.

    Raises:
        ExportError: they are of another shape or type than `expected`.
    """
    wanted = expected.dtype.newbyteorder("<").str.replace("|", "<")
    size = dump.file.stat().st_size
    if dump.dtype != wanted or dump.shape != expected.shape or size != expected.nbytes:
        raise ExportError(
            f"{dump.file}: it has shape {dump.shape}, type {dump.dtype or 'unknown'} and {size} bytes; the model says "
            f"{expected.shape}, {wanted} and {expected.nbytes}"
        )
    return np.fromfile(dump.file, wanted).reshape(expected.shape)
