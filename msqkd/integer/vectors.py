"""Recorded vectors: what a device answered, replayed through the simulator.

``python -m msqkd.integer.vectors PATH...`` replays files or folders of them, prints every case in which a value
differs, and exits with 1 if one differs by more than the case allows.

A vector is a ``.npz`` file of one kernel call: the arrays fed and found, and ``meta``, a JSON string::

    {"case": "add_relu", "op": "AddFusion", "attrs": {"activationType": 1}, "tolerance_lsb": 0, "note": "",
     "inputs": [{"key": "input_0", "const": false, "dtype": "int8", "shape": [1, 4, 4, 8],
                 "scale": [0.05], "zero_point": [3]}, ...],
     "outputs": [{"key": "output", "dtype": "int8", "shape": [1, 4, 4, 8], "scale": [0.1], "zero_point": [-128]}]}

``key`` names the array; attributes are those of the runtime's schema, in camelCase or snake_case; ``scale`` and
``zero_point`` are null where a tensor is not quantised. ``KEY_arm64`` holds an output that arm64 answers differently.

Two more forms: a pack of many calls, whose ``meta`` is a list and whose arrays are called ``CASE/KEY``; and a network,
whose ``meta`` has ``net`` and ``nodes`` in the order of execution, with arrays ``input`` and ``output`` and, for every
node, ``out__NODE``, ``w__NODE`` and ``b__NODE``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np

from msqkd.errors import MsqkdError, SimulationError
from msqkd.integer.kernels.reduce import UndefinedResultError
from msqkd.integer.program import Tensor, TensorQuant
from msqkd.integer.registry import ARM64, FLOAT32, INT8, MACHINES, X86, Call, Operand, find_kernel

NETWORK = "NETWORK"
_FLOAT32_TYPE, _INT8_TYPE = 43, 32  # of the runtime's DataType
# What reading an archive raises that is damaged, or that holds something else.
_DAMAGES = (
    OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip

Meta = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Recorded:
    """A tensor of a recorded call.

    Attributes:
        name: of the array, or of the tensor in a network.
        data: what was fed, or found.
        quant: its parameters, None if it has none.
        arm64: what was found on arm64, where that differs.
    """

    name: str
    data: np.ndarray
    quant: Optional[TensorQuant] = None
    arm64: Optional[np.ndarray] = None

    def on(self, machine: str) -> np.ndarray:
        """What was found on `machine`."""
        return self.arm64 if machine == ARM64 and self.arm64 is not None else self.data


@dataclass(frozen=True, eq=False)
class Vector:
    """A recorded call, or a network of them.

    Attributes:
        case: its name.
        op: the primitive, or NETWORK.
        attrs: under the names of the runtime's schema.
        inputs: the operands in order, constants among them; of a network, what it is fed.
        outputs: what was found.
        tolerance: by how much a value may differ on x86; on arm64 none may.
        steps: the calls of a network, which are linked by the names of their tensors.
    """

    case: str
    op: str
    attrs: Mapping[str, Any]
    inputs: tuple[Recorded, ...]
    outputs: tuple[Recorded, ...]
    tolerance: int = 0
    steps: tuple[Vector, ...] = ()


@dataclass(frozen=True)
class Result:
    """How a replay compares with what was recorded.

    Attributes:
        case, op: of the vector.
        values: how many were compared.
        differing: how many differ.
        max_difference: the largest difference.
        tolerance: the largest difference allowed.
        undefined: why the runtime's own result is undefined; nothing is compared then.
    """

    case: str
    op: str
    values: int
    differing: int
    max_difference: float
    tolerance: int
    undefined: str = ""

    @property
    def passed(self) -> bool:
        """Whether no value differs by more than is allowed."""
        return self.max_difference <= self.tolerance


def load(path: Union[str, Path]) -> list[Vector]:
    """The vectors of a file; of a network one a node, each fed with what was recorded, and the network as a whole.

    Raises:
        SimulationError: the file is missing, is no file of vectors, or lacks an array that its ``meta`` names.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        meta = json.loads(str(arrays["meta"]))
        if isinstance(meta, list):
            return [_single(one, arrays, f"{one['case']}/") for one in meta]
        return _network(meta, arrays) if "nodes" in meta else [_single(meta, arrays, "")]
    except _DAMAGES as error:
        reason = f"{type(error).__name__}: {error}"
        raise SimulationError(f"{path} is not a file of recorded vectors ({reason})") from error


def _single(meta: Meta, arrays: Mapping[str, np.ndarray], prefix: str) -> Vector:
    def recorded(entry: Meta) -> Recorded:
        key = prefix + entry["key"]
        quant = _quant(entry["scale"], entry["zero_point"], entry.get("numBits", 8))
        return Recorded(entry["key"], arrays[key], quant, arrays.get(f"{key}_arm64"))

    inputs, outputs = (tuple(map(recorded, meta[side])) for side in ("inputs", "outputs"))
    return Vector(meta["case"], meta["op"], _snake(meta["attrs"]), inputs, outputs, int(meta.get("tolerance_lsb", 0)))


def _quant(scale: Any, zero_point: Any, bits: int = 8) -> Optional[TensorQuant]:
    return None if scale is None else TensorQuant(scale, zero_point, bits)


def _snake(attrs: Meta) -> dict[str, Any]:
    """Attributes under their snake_case names; ``global_`` loses the underscore that Python's keyword forced on it."""
    return {re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().rstrip("_"): value for name, value in attrs.items()}


def _network(meta: Meta, arrays: Mapping[str, np.ndarray]) -> list[Vector]:
    """The nodes of a network as vectors, then the network."""
    fed = Recorded(meta["nodes"][0]["inputs"][0], arrays["input"])
    found = {fed.name: fed}
    steps: list[Vector] = []
    for node in meta["nodes"]:
        output = _node_output(node, arrays)
        inputs = [found[name] for name in node["inputs"]] + _node_constants(node, arrays)
        attrs = _snake(node.get("attrs") or {})
        if node["op"] == "QuantDTypeCast":
            types = (_INT8_TYPE, _FLOAT32_TYPE) if output.quant is None else (_FLOAT32_TYPE, _INT8_TYPE)
            attrs = dict(zip(("src_t", "dst_t"), types))
            if output.quant is not None:
                found[node["inputs"][0]] = output  # the nodes read the cast tensor under the name of the float one
        steps.append(Vector(f"{meta['net']}/{node['name']}", node["op"], attrs, tuple(inputs), (output,)))
        found[node["output"]] = output
    last = steps[-1].outputs
    return [*steps, Vector(meta["net"], NETWORK, {}, (fed,), last, 0, tuple(steps))]


def _node_output(node: Meta, arrays: Mapping[str, np.ndarray]) -> Recorded:
    quant = _quant(node.get("scale"), node.get("zero_point"))
    key = "output" if quant is None else f"out__{node['name']}"
    return Recorded(node["output"], arrays[key], quant, arrays.get(f"{key}_arm64"))


def _node_constants(node: Meta, arrays: Mapping[str, np.ndarray]) -> list[Recorded]:
    """Weight and bias, the axes of a reduction, the shape of a reshape."""
    constants = []
    for prefix, scale in (("w__", "weight_scale"), ("b__", "bias_scale")):
        key = prefix + node["name"]
        if key in arrays:
            scales = np.asarray(node[scale], np.float64)
            constants.append(Recorded(key, arrays[key], TensorQuant(scales, np.zeros(scales.shape, np.int32))))
    if node.get("axes") is not None:
        constants.append(Recorded("axes", np.array(node["axes"], np.int32)))
    if node["op"] == "Reshape":
        constants.append(Recorded("shape", np.array(node["shape"], np.int32)))
    return constants


def replay(vector: Vector, machine: str = X86) -> Result:
    """Compute `vector` and compare; a network is fed once, and every tensor on the way compared.

    Args:
        vector: what was recorded.
        machine: ``x86`` or ``arm64``: which of the runtime's builds to compute and to compare with.

    Raises:
        SimulationError: there is no kernel for a step, or it refuses.
    """
    tolerance = 0 if machine == ARM64 else vector.tolerance
    values: dict[str, np.ndarray] = {}
    compared, differing, largest = 0, 0, 0.0
    for step in vector.steps or (vector,):
        try:
            answers = _compute(step, values, machine)
        except UndefinedResultError as error:
            return Result(vector.case, vector.op, 0, 0, 0.0, tolerance, str(error))
        for slot, answer in zip(step.outputs, answers):
            expected = slot.on(machine)
            distance = _distance(answer, expected)
            compared += expected.size
            differing += int(np.count_nonzero(distance))
            largest = max(largest, float(distance.max(initial=0)))
            if vector.steps:
                values[slot.name] = answer
    return Result(vector.case, vector.op, compared, differing, largest, tolerance)


def _compute(step: Vector, values: Mapping[str, np.ndarray], machine: str) -> list[np.ndarray]:
    """The outputs of one call, fed with `values` by name, or with what was recorded where there is none."""
    operands = [Operand(values.get(slot.name, slot.data), slot.quant) for slot in step.inputs]
    outputs = [Tensor(slot.name, str(slot.data.dtype), slot.data.shape, quant=slot.quant) for slot in step.outputs]
    kind = INT8 if operands[0].data.dtype == np.int8 else FLOAT32
    answers = find_kernel(step.op, kind, step.case)(Call(step.attrs, operands, outputs, machine, name=step.case))
    if [answer.shape for answer in answers] != [slot.data.shape for slot in step.outputs]:
        raise SimulationError(
            f"{step.case}: computed {[answer.shape for answer in answers]}; "
            f"recorded: {[slot.data.shape for slot in step.outputs]}"
        )
    return answers


def _distance(answer: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Absolute differences, float64; equal infinities are 0 apart, and what is no number is infinitely far."""
    with np.errstate(invalid="ignore"):
        distance = np.abs(answer.astype(np.float64) - expected.astype(np.float64))
    distance[answer == expected] = 0.0
    return np.nan_to_num(distance, nan=np.inf, posinf=np.inf)


def _files(paths: Iterable[Union[str, Path]]) -> Iterator[Path]:
    for path in map(Path, paths):
        found = sorted(path.glob("*.npz")) if path.is_dir() else [path]
        if not found:
            raise SimulationError(f"the folder {path} holds no .npz file")
        yield from found


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Replay the files given on the command line; 0 if nothing differs, 1 if something does, 2 for unusable input."""
    parser = argparse.ArgumentParser(
        prog="python -m msqkd.integer.vectors", description="Replay recorded vectors through the simulator."
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a .npz file, or a folder of them")
    parser.add_argument("--machine", choices=MACHINES, default=X86, help="where they were recorded [x86]")
    options = parser.parse_args(arguments)
    try:
        results = [replay(vector, options.machine) for path in _files(options.paths) for vector in load(path)]
    except MsqkdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _print_table(results)
    return 0 if all(result.passed for result in results) else 1


def _print_table(results: Sequence[Result]) -> None:
    shown = [result for result in results if result.differing or result.undefined]
    width = max([len(result.case) for result in shown], default=0)
    for result in shown:
        found = f"{result.differing} of {result.values} values differ, by {result.max_difference:g} at most"
        verdict = "allowed" if result.passed else "MISMATCH"
        print(f"{result.case:{width}}  {result.undefined or f'{found} ({verdict})'}")
    failed, undefined = sum(not result.passed for result in results), sum(bool(result.undefined) for result in results)
    total = sum(result.values for result in results)
    print(f"{len(results)} cases, {total} values: {failed} with a mismatch, {undefined} undefined")


if __name__ == "__main__":
    sys.exit(main())
