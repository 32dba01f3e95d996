"""How long onnxruntime takes for each operation of the network, by its own profiler."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from msqkd.exporters.onnx.runtime import open_session
from msqkd.exporters.onnx.writer import onnx_package
from msqkd.files import PathLike

_SUFFIX = "_kernel_time"
_MADE = re.compile(r"(_nchwc|_token_\d+)+$")  # what onnxruntime appends to the names of operations it replaces


class Profile:
    """A session that is watched.

    Args:
        file: the ONNX file.
        threads: threads of one operation.
        scratch: an existing folder for onnxruntime's own files.

    Attributes:
        kernels: how many a call executes.

    Raises:
        MissingDependencyError, ExportError: as `open_session`.
    """

    def __init__(self, file: PathLike, threads: int, scratch: Path) -> None:
        name = Path(file).stem
        optimized = scratch / f"{name}.optimized.onnx"
        self._session = open_session(file, threads, optimized, scratch / name)
        self._inputs = [item.name for item in self._session.get_inputs()]
        nodes = onnx_package().load(str(optimized)).graph.node
        self._outputs = {node.name: list(node.output) for node in nodes}
        self.kernels = max(len(nodes), 1)

    def run(self, *inputs: np.ndarray) -> None:
        """One call."""
        self._session.run(None, dict(zip(self._inputs, inputs)))

    def times(self, owners: Mapping[str, str], rounds: int) -> dict[str, float]:
        """Microseconds a call by operation of the network, the sum of its kernels; ends the session.

        Of each kernel it is the mean of the middle half of the calls: what disturbs a measurement counts as little as
        in a median, and the profiler's clock, which counts whole microseconds, shows parts of them.

        Args:
            owners: from `onnx_owners`. Kernels that onnxruntime has added, to change the layout of values, are those of
                the operation ``""``.
            rounds: how many calls count, the last ones.
        """
        events = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        kernels: dict[str, list[float]] = {}
        for call in _calls(events)[-rounds:]:
            for name, duration in call.items():
                kernels.setdefault(name, []).append(duration)
        total: dict[str, float] = {}
        for name, durations in kernels.items():
            owner = self._owner(name, owners)
            total[owner] = total.get(owner, 0.0) + middle_mean(durations)
        return total

    def _owner(self, kernel: str, owners: Mapping[str, str]) -> str:
        names = [kernel, *self._outputs.get(kernel, ())]
        candidates = [form for name in names for form in (name, _MADE.sub("", name))]
        return next((owners[name] for name in candidates if name in owners), "")


def middle_mean(values: Sequence[float]) -> float:
    """The mean of what lies between the quartiles (all where there are fewer than four)."""
    ordered = np.sort(np.asarray(values, np.float64))
    cut = len(ordered) // 4
    return float(ordered[cut : len(ordered) - cut].mean())


def _calls(events: Sequence[Mapping[str, Any]]) -> list[Counter[str]]:
    """The microseconds of every kernel, call by call."""
    calls: list[Counter[str]] = []
    current: Counter[str] = Counter()
    for event in events:
        name = event.get("name", "")
        if event.get("cat") == "Node" and name.endswith(_SUFFIX):
            current[name[: -len(_SUFFIX)]] += event["dur"]
        elif name == "model_run":
            calls.append(current)
            current = Counter()
    return calls
