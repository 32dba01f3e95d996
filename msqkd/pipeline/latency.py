"""`msqkd bench`: how fast a finished run's network is here, float and int8, with onnxruntime."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import numpy as np

from msqkd.analysis.layer_times import LayerTimes
from msqkd.analysis.refresh import refresh_report
from msqkd.bench import bench_layers, bench_onnx, markdown
from msqkd.data import Split, as_tuple
from msqkd.files import write_json, write_text
from msqkd.pipeline.export import Exported
from msqkd.pipeline.lock import locked
from msqkd.pipeline.run import reopen
from msqkd.pipeline.rundir import RunDirectory
from msqkd.progress import Reporter
from msqkd.recipe import make_recipe

REPORT = "bench"
"""Name of the two files written, without their suffixes."""

LAYERS = "bench_layers.json"


def bench_run(
    path: Path,
    *,
    batches: Sequence[int] = (1,),
    threads: int = 1,
    seconds: float = 5.0,
    reporter: Optional[Reporter] = None,
) -> list[dict[str, Any]]:
    """Measure the float and the int8 network of a finished run with onnxruntime.

    ``bench.json`` and ``bench.md`` are written into the run's folder, and its report again, with what they say.

    Args:
        path: the folder of a finished run.
        batches: samples a call, one measurement each.
        threads: threads of one operation.
        seconds: time for each measurement.
        reporter: where progress is told.

    Returns:
        One measurement a batch size, as `msqkd.bench.Comparison.to_dict` gives it.

    Raises:
        FolderError: another process is at work in the folder.
        ExportError: no finished run, or a network that ONNX cannot hold.
        DataError: a number of samples or threads that makes no measurement.
        MissingDependencyError: onnx or onnxruntime is not installed.
    """
    from msqkd.exporters.onnx import export_onnx, export_onnx_float

    reporter = reporter or Reporter()
    found = []
    with _reopened(path, reporter) as (folder, network):
        with tempfile.TemporaryDirectory() as scratch:
            float_file = export_onnx_float(network.graph, Path(scratch) / "float.onnx")
            int8_file = export_onnx(network.graph, network.plan, Path(scratch) / "int8.onnx")
            for size in batches:
                reporter.say(f"batch {size}: {seconds:g} s")
                samples = samples_of(network.test, size)
                measured = bench_onnx(float_file, int8_file, samples, threads=threads, seconds=seconds)
                found.append(measured)
        results = [item.to_dict() for item in found]
        write_json(folder.file(f"{REPORT}.json"), results)
        write_text(folder.file(f"{REPORT}.md"), markdown(found))
        refresh_report(folder.path)
    return results


def bench_run_layers(
    path: Path, *, batch: int = 1, threads: int = 1, seconds: float = 5.0, reporter: Optional[Reporter] = None
) -> LayerTimes:
    """Measure every layer of a finished run with onnxruntime, in float and in int8.

    ``bench_layers.json`` is written into the run's folder: what a search with ``--times`` reads.

    Args:
        path, threads, seconds, reporter: as for `bench_run`.
        batch: samples a call.

    Raises:
        FolderError, ExportError, DataError, MissingDependencyError: as `bench_run`.
    """
    reporter = reporter or Reporter()
    with _reopened(path, reporter) as (folder, network):
        reporter.say(f"layer by layer, batch {batch}: {seconds:g} s")
        samples = samples_of(network.test, batch)
        times = bench_layers(network.graph, network.plan, samples, threads=threads, seconds=seconds)
        write_json(folder.file(LAYERS), times.to_dict())
    return times


@contextmanager
def _reopened(path: Path, reporter: Reporter) -> Iterator[tuple[RunDirectory, Exported]]:
    """Yield the folder of a finished run, which is held meanwhile, and its network."""
    RunDirectory.finished(path)  # a folder without a run is refused before it is locked
    with locked(path, reporter):
        folder = RunDirectory.finished(path)
        yield folder, reopen(folder, make_recipe(folder.state["recipe"]), reporter)


def samples_of(split: Split, size: int) -> tuple[np.ndarray, ...]:
    """So many samples, the first ones again where there are fewer."""
    return as_tuple(split.batch(np.arange(size) % len(split))[0])
