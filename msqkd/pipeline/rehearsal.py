"""Everything that comes after the training, done before it: on a copy of the network, with two samples."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Callable

import mindspore as ms
import numpy as np

from msqkd import parallel
from msqkd.analysis.report import write_report
from msqkd.data import subset
from msqkd.errors import ExportError
from msqkd.exporters import FORMATS
from msqkd.graph.ir import Graph
from msqkd.pipeline.export import Exported, Files, calibration_parity, guessed_plan, impossible, why
from msqkd.pipeline.objects import Objects
from msqkd.pipeline.result import assemble, layer_parts, training_only_rows
from msqkd.pipeline.rundir import writable_folder
from msqkd.progress import Reporter
from msqkd.quant.algorithms.biases import with_biases
from msqkd.quant.integers import round_biases
from msqkd.quant.plan import QuantPlan
from msqkd.train.metric import Metric

_SAMPLES = 2
_STATES = 2  # copies of the weights that a training keeps at least: its checkpoint and its state
_SPARE = 1 << 20  # bytes of reports and records


def rehearse(objects: Objects, captured: Graph, deployed: Graph, plan: QuantPlan) -> None:
    """Write every file, read it back, compute it, compare the device and build the report, before any training.

    The network has its weights of now and guessed ranges, and two samples are computed, operation by operation without
    a compilation. The bounds of the comparison are not applied: they are about trained values. What is left to fail
    after the training follows from trained values or from the disk.

    Args:
        objects: of the run.
        captured, deployed, plan: its network before the training, and the plan.

    Raises:
        ExportError: a step fails, or the output folder cannot hold the files.
        MsqkdError: the network or the data cannot be had.
    """
    objects.reporter.say(f"rehearsal of the export with {_SAMPLES} samples: every format, the device, the report")
    reason = None
    if parallel.is_first():
        try:
            with tempfile.TemporaryDirectory(prefix="msqkd_rehearsal_") as scratch, _without_compilation():
                if objects.recipe.ptq.methods and not objects.trainings:
                    deployed = with_biases(deployed)
                if objects.recipe.target == "lite_arm":
                    deployed = round_biases(deployed, guessed_plan(plan))
                test, calibration = (subset(split, _SAMPLES) for split in (objects.bundle.test, objects.calibration))
                judge = _judge(objects.metric)
                network = Exported(objects.recipe, captured, deployed, guessed_plan(plan), test, calibration, judge)
                _check_space(objects, network, _rehearsed(objects, network, Path(scratch)))
        except Exception as error:
            if parallel.size() == 1:
                raise
            reason = why(error)  # for the workers that wait
    reason = parallel.from_first(reason)
    if reason is not None:
        raise ExportError(reason)


@contextmanager
def _without_compilation() -> Iterator[None]:
    mode = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        with np.errstate(all="ignore"):  # guessed ranges give odd numbers
            yield
    finally:
        ms.set_context(mode=mode)


def _rehearsed(objects: Objects, network: Exported, scratch: Path) -> int:
    """Do all of it; returns the bytes that were written."""
    recipe = network.recipe
    writer = Files(network, scratch.joinpath)
    verified: dict[str, Any] = {}
    file = _step("the float network cannot be written", writer.write_float)
    sizes = {"float": file.stat().st_size}
    for name in recipe.export.formats:
        form = FORMATS[name]
        try:
            file = writer.write(form)
            found = writer.examine(form, file)
        except Exception as error:
            raise impossible(recipe, form, error) from error
        found.pop("failed", None)  # about guessed numbers
        sizes[name] = file.stat().st_size
        verified[name] = {"file": file.name, **found}
    parity = _step("the device cannot be compared", lambda: calibration_parity(network, Reporter(quiet=True)))
    exported = {
        "accuracy": 0.0, "integer_accuracy": None, "sizes": sizes, "sha256": {}, "verified": verified,
        "parity": parity, "seconds": 0.0,
    }  # fmt: skip
    _step("the report cannot be written", lambda: _report(network, objects, exported, scratch))
    return sum(sizes.values())


def _judge(metric: Metric) -> Metric:
    """Return accuracy as it is, and a stand-in for another metric, which may not be defined for two samples."""
    return metric if metric.is_accuracy else replace(metric, function=lambda outputs, labels: 0.0)


def _report(network: Exported, objects: Objects, exported: dict[str, Any], scratch: Path) -> None:
    layers, shown = layer_parts(network.graph, network.plan, network.graph, network.test)
    # Charts take most of the time: a row of each kind stands for the others.
    layers = _one_of_each(layers, lambda row: (row["weight"] is None, row["activation"] is None))
    parity = exported["parity"]
    values = _one_of_each(parity["values"], lambda value: value["scale"] is None)
    exported = {**exported, "parity": {**parity, "values": values}}
    stage = {"accuracy": 0.0, "history": None, "samples": _SAMPLES, "observer": "guessed", "seconds": 0.0}
    stages = {"plan": {"seconds": 0.0}, "float": stage, "ptq": stage, "export": exported}
    rows = training_only_rows(network.captured)
    data = {"name": objects.bundle.name, "train": 0, "test": _SAMPLES, "calibration": _SAMPLES}
    started = datetime.now(timezone.utc)
    write_report(assemble(objects.recipe, stages, network.plan, layers, shown[:1], data, started, [], rows), scratch)


def _one_of_each(rows: list[dict[str, Any]], kind: Callable[[dict[str, Any]], Any]) -> list[dict[str, Any]]:
    """Return the first row of every kind."""
    return list({kind(row): row for row in reversed(rows)}.values())


def _step(what: str, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as error:
        raise ExportError(f"{what}: {why(error)}") from error


def _check_space(objects: Objects, network: Exported, size: int) -> None:
    """Refuse a disk that cannot hold what the run is to write; `size` is that of the exported files."""
    folder = objects.folder.path
    writable_folder(folder)
    trainings = len(objects.trainings) + (objects.recipe.pretrain is not None) + 1
    weights = sum(param.data.nbytes for param in network.captured.params.values())
    needed = size + trainings * _STATES * weights + _SPARE
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ExportError(
            f"output folder {folder} is on a disk with {free / 1e6:.0f} MB left, and the run may write "
            f"{needed / 1e6:.0f} MB; make room, or choose another with --output"
        )
