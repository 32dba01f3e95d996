"""How fast is the int8 model here? Float and int8 ONNX files, run in turns by onnxruntime in one process.

Turns, because a machine that others use is slower at one moment than at the next, and both files should meet the same
moments; medians and quartiles, because what disturbs a measurement only ever makes it longer.
"""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Optional, Union

import numpy as np

from msqkd.analysis.layer_times import FLOAT_KEY, INT8_KEY, LayerTimes
from msqkd.environment import version_of
from msqkd.errors import DataError
from msqkd.files import PathLike
from msqkd.graph.ir import Graph
from msqkd.platform import cpu_flags
from msqkd.quant.plan import QuantPlan

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

    arrays = _checked(inputs, threads, rounds)
    files = [Path(float_file), Path(int8_file)]
    calls = [_call(file, load_onnx(file, threads), arrays) for file in files]
    rounds = _warmed_up(calls, rounds, seconds)
    times = np.array([_times(calls) for _ in range(rounds)]) * 1e3
    float32, int8 = (_latency(name, file, column) for name, file, column in zip(("float32", "int8"), files, times.T))
    return Comparison(float32, int8, len(arrays[0]), rounds, executed_kernels(files[1]), environment(threads))


_PROFILED = 400_000
"""The kernels a profile may hold, which onnxruntime keeps in memory."""

_SOFT = ("HSigmoid", "LeakyReLU", "ReLU", "ReLU6", "Sigmoid", "Tanh")
"""Activations that onnxruntime computes in the kernel before them."""


def bench_layers(
    graph: Graph,
    plan: QuantPlan,
    inputs: Union[np.ndarray, Sequence[np.ndarray]],
    *,
    threads: int = 1,
    rounds: Optional[int] = None,
    seconds: float = 5.0,
) -> LayerTimes:
    """Measure every layer in the float and in the int8 ONNX file of a network, called in turns.

    A layer's time is that of the kernels it is computed in, with the activation behind it and what quantises its
    values; what belongs to no layer with a weight, pools and additions among it, is the `LayerTimes.rest`.

    Args:
        graph, plan: the deployment graph and its plan, every range known. Its layers are those of `plan.weights`.
        inputs, threads, rounds, seconds: as for `bench_onnx`.

    Raises:
        DataError, ExportError, MissingDependencyError: as `bench_onnx`; or the network cannot be written as ONNX.
    """
    from msqkd.exporters.onnx.profile import Profile
    from msqkd.exporters.onnx.qdq import export_onnx, export_onnx_float, onnx_owners
    from msqkd.exporters.onnx.runtime import onnxruntime_package

    onnxruntime_package()
    arrays = _checked(inputs, threads, rounds)
    layers = layers_of_operations(graph, plan)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        files = [export_onnx_float(graph, scratch / "float.onnx"), export_onnx(graph, plan, scratch / "int8.onnx")]
        profiles = [Profile(file, threads, scratch) for file in files]
        calls = [_call(file, profile.run, arrays) for file, profile in zip(files, profiles)]
        most = max(MIN_ROUNDS, _PROFILED // max(profile.kernels for profile in profiles))
        rounds = min(_warmed_up(calls, rounds, seconds), most)
        for _ in range(rounds):
            _times(calls)
        plans = (QuantPlan(FLOAT_KEY, graph.name), plan)
        found = [profile.times(onnx_owners(graph, one), rounds) for profile, one in zip(profiles, plans)]
    rows: dict[str, dict[str, float]] = {name: {} for name in plan.weights}
    rest: dict[str, float] = {}
    for key, times in zip((FLOAT_KEY, INT8_KEY), found):
        for row in (*rows.values(), rest):
            row[key] = 0.0
        for operation, microseconds in times.items():
            row = rows.get(layers.get(operation, ""), rest)
            row[key] += microseconds / len(arrays[0])
    return LayerTimes(rows, rest)


def layers_of_operations(graph: Graph, plan: QuantPlan) -> dict[str, str]:
    """The layer with a weight that each operation is measured with, where it is: itself, or an activation behind it."""
    found: dict[str, str] = {}
    for node in graph.nodes:
        decision, source = plan.node(node.name), graph.producer(node.inputs[0])
        if node.name in plan.weights:
            found[node.name] = node.name
        elif decision.fused_into in found:
            found[node.name] = found[decision.fused_into]
        elif node.op in _SOFT and source is not None and source.name in found:
            alone = len(graph.consumers(source.output)) == 1 and source.output not in graph.outputs
            found.update({node.name: found[source.name]} if alone else {})
    return found


def times_table(times: LayerTimes) -> str:
    """The times as Markdown: a line a layer, then what belongs to none, and the sum."""
    keys = times.precisions
    sums = {key: sum(row[key] for row in times.layers.values()) + times.rest.get(key, 0.0) for key in keys}
    lines = [
        f"| layer | {' | '.join(f'{key} µs' for key in keys)} |",
        f"|---|{'---:|' * len(keys)}",
        *(
            f"| {name} | {' | '.join(f'{row[key]:.2f}' if key in row else '' for key in keys)} |"
            for name, row in (*times.layers.items(), ("the rest", times.rest), ("all", sums))
        ),
    ]
    return "\n".join(lines) + "\n"


def _checked(
    inputs: Union[np.ndarray, Sequence[np.ndarray]], threads: int, rounds: Optional[int]
) -> Sequence[np.ndarray]:
    arrays = [inputs] if isinstance(inputs, np.ndarray) else list(inputs)
    for name, number in (("threads", threads), ("rounds", rounds)):
        if number is not None and number < 1:
            raise DataError(f"{name} is {number}; allowed: 1 or more")
    if not arrays:
        raise DataError("there is no input to measure with; give one array for each input of the network")
    return arrays


def _warmed_up(calls: Sequence[Callable[[], Any]], rounds: Optional[int], seconds: float) -> int:
    """How often each call is measured: `rounds`, or what fits into the time, after the calls that warm up."""
    for _ in range(WARM_UP - 1):
        _times(calls)
    return rounds or max(MIN_ROUNDS, int(seconds / sum(_times(calls))))


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
