"""How fast is the int8 model here? Float and int8 ONNX files, run in turns by onnxruntime in one process.

Turns, because a machine that others use is slower at one moment than at the next, and both files should meet the same
moments; medians and quartiles, because what disturbs a measurement only ever makes it longer.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Optional, Union

import numpy as np

from msqkd.environment import version_of
from msqkd.errors import DataError
from msqkd.files import PathLike
from msqkd.platform import cpu_flags

MIN_ROUNDS, WARM_UP = 10, 3
_INT8_INSTRUCTIONS = {
    "amx_int8": "AMX-INT8", "avx512_vnni": "AVX512-VNNI", "avx_vnni": "AVX-VNNI", "i8mm": "I8MM",
    "asimddp": "SDOT/UDOT",
}  # fmt: skip
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Environment:
    """What a latency depends on.

    Attributes:
        cpu: the processor's name.
        int8_instructions: its instructions for int8 products, ``none``, or ``unknown``.
        threads: threads of one operation.
        onnxruntime: its version.
        system: operating system and architecture.
    """

    cpu: str
    int8_instructions: str
    threads: int
    onnxruntime: str
    system: str


@dataclass(frozen=True)
class Latency:
    """Times of one file, in milliseconds a call.

    Attributes:
        name: ``float32`` or ``int8``.
        file: name of the file.
        size: its bytes.
        median, lower, upper: median and quartiles.
    """

    name: str
    file: str
    size: int
    median: float
    lower: float
    upper: float

    @property
    def iqr(self) -> float:
        """The interquartile range in milliseconds."""
        return self.upper - self.lower


@dataclass(frozen=True)
class Comparison:
    """Both files on the same input.

    Attributes:
        float32, int8: their times.
        batch: samples a call.
        rounds: calls of each file.
        kernels: what onnxruntime executes for the int8 file, and how often.
        environment: where it was measured.
    """

    float32: Latency
    int8: Latency
    batch: int
    rounds: int
    kernels: Mapping[str, int]
    environment: Environment

    @property
    def speed_up(self) -> float:
        """How many times faster the int8 file is, by the medians."""
        return self.float32.median / self.int8.median

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data with stable keys."""
        latencies = {item.name: {**asdict(item), "iqr": item.iqr} for item in (self.float32, self.int8)}
        return {
            **latencies,
            "speed_up": self.speed_up,
            "batch": self.batch,
            "rounds": self.rounds,
            "kernels": dict(self.kernels),
            "environment": asdict(self.environment),
        }


def bench_onnx(
    float_file: PathLike,
    int8_file: PathLike,
    inputs: Union[np.ndarray, Sequence[np.ndarray]],
    *,
    threads: int = 1,
    rounds: Optional[int] = None,
    seconds: float = 5.0,
) -> Comparison:
    """Measure two ONNX files of one network on the CPU.

    Args:
        float_file, int8_file: from `msqkd.exporters.onnx`.
        inputs: one batch of each input of the network.
        threads: threads of one operation.
        rounds: calls of each file; as many as fit into `seconds` (10 at least) when not given.
        seconds: time to spend.

    Raises:
        DataError: the numbers of threads or rounds make no measurement, or the files do not take `inputs`.
        ExportError: onnxruntime cannot load a file.
        MissingDependencyError: onnxruntime is not installed.
    """
    from msqkd.exporters.onnx import executed_kernels, load_onnx

    arrays = [inputs] if isinstance(inputs, np.ndarray) else list(inputs)
    for name, number in (("threads", threads), ("rounds", rounds)):
        if number is not None and number < 1:
            raise DataError(f"{name} is {number}; allowed: 1 or more")
    if not arrays:
        raise DataError("there is no input to measure with; give one array for each input of the network")
    files = [Path(float_file), Path(int8_file)]
    calls = [_call(file, load_onnx(file, threads), arrays) for file in files]
    for _ in range(WARM_UP - 1):
        _times(calls)
    if rounds is None:
        rounds = max(MIN_ROUNDS, int(seconds / sum(_times(calls))))
    times = np.array([_times(calls) for _ in range(rounds)]) * 1e3
    float32, int8 = (_latency(name, file, column) for name, file, column in zip(("float32", "int8"), files, times.T))
    return Comparison(float32, int8, len(arrays[0]), rounds, executed_kernels(files[1]), environment(threads))


def _call(file: Path, run: Callable[..., Any], arrays: Sequence[np.ndarray]) -> Callable[[], Any]:
    """`run` on `arrays`, tried once."""
    try:
        run(*arrays)
    except Exception as error:  # onnxruntime's classes have no base of their own
        raise DataError(f"{file.name} does not take the input: {str(error).splitlines()[0]}") from error
    return lambda: run(*arrays)


def _times(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """One turn: the seconds of each call."""
    times = []
    for call in calls:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def _latency(name: str, file: Path, times: np.ndarray) -> Latency:
    lower, median, upper = (float(value) for value in np.percentile(times, (25, 50, 75)))
    return Latency(name, file.name, file.stat().st_size, median, lower, upper)


def environment(threads: int) -> Environment:
    """The facts of this machine."""
    return Environment(
        cpu=_cpu_name(),
        int8_instructions=int8_instructions(cpu_flags()),
        threads=threads,
        onnxruntime=version_of("onnxruntime") or "not installed",
        system=f"{platform.system()} {platform.machine()}",
    )


def int8_instructions(flags: set[str]) -> str:
    """The instructions for int8 products among a CPU's feature flags, by their usual names."""
    found = [name for flag, name in _INT8_INSTRUCTIONS.items() if flag in flags]
    return ", ".join(found) or ("none" if flags else UNKNOWN)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as stream:
            names = [line.split(":", 1)[1].strip() for line in stream if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or UNKNOWN


def markdown(comparisons: Sequence[Comparison]) -> str:
    """A table of measurements, one line each, with the facts of the machine below it."""
    lines = [
        "| batch | threads | float32 ms (IQR) | int8 ms (IQR) | speed-up | float32 MB | int8 MB |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for item in comparisons:
        cells = [
            str(item.batch),
            str(item.environment.threads),
            *(f"{latency.median:.3f} ({latency.iqr:.3f})" for latency in (item.float32, item.int8)),
            f"{item.speed_up:.2f}×",
            *(f"{latency.size / 1e6:.2f}" for latency in (item.float32, item.int8)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    machines = {
        (facts.cpu, facts.int8_instructions, facts.onnxruntime) for facts in (c.environment for c in comparisons)
    }
    for cpu, instructions, version in sorted(machines):
        lines += ["", f"onnxruntime {version} on {cpu}; int8 instructions: {instructions}."]
    return "\n".join(lines) + "\n"
