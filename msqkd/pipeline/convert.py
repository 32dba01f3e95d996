"""`msqkd convert`: the vendor's converter on the marked MindIR of a run, or on a file alone."""

from __future__ import annotations

import tempfile
import time
import warnings
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional

import mindspore as ms
import numpy as np

from msqkd.analysis.refresh import CONVERT, refresh_report
from msqkd.deploy.converter_run import compared, convert, convert_and_compare, feed, top1_agreement
from msqkd.deploy.nodes import layers, marked_agreement
from msqkd.deploy.vendor_runtime import TIME_LIMIT
from msqkd.errors import CaptureError, ExportError
from msqkd.exporters.lite import Marked, read_markers
from msqkd.exporters.ms.read import read_ms
from msqkd.exporters.verify import load_lite
from msqkd.files import sha256, write_json
from msqkd.graph.ir import Graph
from msqkd.integer.registry import ARM64
from msqkd.integer.simulator import Simulator
from msqkd.pipeline.conversion import (
    API_VERSION,
    AUTO,
    SAMPLES,
    conversion_words,
    convert_exported,
    needed_converter,
)
from msqkd.pipeline.lock import locked
from msqkd.pipeline.run import reopen
from msqkd.pipeline.rundir import RunDirectory, writable_folder
from msqkd.progress import Reporter
from msqkd.recipe import make_recipe


def convert_run(
    path: Path,
    converter: str = AUTO,
    output: Optional[Path] = None,
    *,
    samples: int = SAMPLES,
    limit: float = TIME_LIMIT,
    reporter: Optional[Reporter] = None,
) -> dict[str, Any]:
    """Run the vendor's converter on the marked MindIR of a finished run, and compare its file with our own.

    ``NAME_converter.ms`` and ``convert.json`` are written; into the run's folder, its report is written again with the
    comparison.

    Args:
        path: the folder of a finished run.
        converter: a path (see `msqkd.deploy.converter_run.find_converter`), or ``auto``.
        output: where to write; the run's folder by default.
        samples: calibration samples that both files compute, at most.
        limit: seconds after which the converter is ended.
        reporter: where progress is told.

    Returns:
        The data of ``convert.json`` (see `convert_exported`).

    Raises:
        FolderError: another process is at work in the run's folder.
        ExportError: no finished run, one of another target, an exported file that is not the recorded one, or a
            converter that makes no file.
        MissingDependencyError: there is no converter, or it is for another processor.
        MsqkdError: the data or the network cannot be had any more.
    """
    reporter = reporter or Reporter()
    recipe = make_recipe(RunDirectory.finished(path).state["recipe"])
    if recipe.target != "lite_arm":
        raise ExportError(f"{path} is a run for target {recipe.target}; files for the converter are for lite_arm")
    program = needed_converter(converter)
    with locked(path, reporter):
        folder = RunDirectory.finished(path)
        folder.check_exports()
        target = writable_folder(output or path)
        network = reopen(folder, recipe, reporter)
        result = convert_exported(network, folder, program, target, samples, limit)
        write_json(target / CONVERT, result)
        if target.resolve() == path.resolve():
            refresh_report(target)
    return _told(result, reporter)


def convert_file(
    file: Path,
    converter: str = AUTO,
    output: Optional[Path] = None,
    *,
    samples: int = SAMPLES,
    limit: float = TIME_LIMIT,
    reporter: Optional[Reporter] = None,
) -> dict[str, Any]:
    """Run the vendor's converter on a marked MindIR alone, with random samples in the range of its inputs.

    Its file is compared with the ``.ms`` file beside the MindIR (``NAME.ms``, or ``NAME_ms.ms`` for
    ``NAME_lite.mindir``), and where there is none with what the markers say.

    Args:
        file: the marked MindIR.
        output: folder for ``NAME_converter.ms`` and ``convert.json``; that of the file by default.
        converter, samples, limit, reporter: as for `convert_run`.

    Returns:
        The data of ``convert.json``; `reference` is ``ms`` or ``markers``.

    Raises:
        ExportError: no marked MindIR, or a converter that makes no file.
        MissingDependencyError: there is no converter, or it is for another processor.
    """
    begin, started = time.monotonic(), datetime.now(timezone.utc)
    marked = _read(file)
    program = needed_converter(converter)
    target = writable_folder(output or file.parent)
    batch = _random_inputs(marked, samples)
    name = file.stem.removesuffix("_lite")
    ours = next((path for path in (file.with_suffix(".ms"), file.with_name(f"{name}_ms.ms")) if path.is_file()), None)
    place = target / f"{name}_converter"
    if ours is not None:
        found = {"reference": "ms", **convert_and_compare(program, file, ours, place, [batch], limit=limit)}
    else:
        with tempfile.TemporaryDirectory() as folder:
            made = convert(program, file, place, Path(folder), limit=limit)
        found = {"reference": "markers", "file": made.name, "converter": str(program)}
        found |= {"compared": True, **_against_markers(file, marked, made, batch)}
    result = {
        "apiversion": API_VERSION,
        "name": name,
        "target": "lite_arm",
        "started": started.isoformat(timespec="seconds"),
        "seconds": time.monotonic() - begin,
        "marked_sha256": sha256(file),
        **found,
    }
    write_json(target / CONVERT, result)
    return _told(result, reporter or Reporter())


def _told(result: dict[str, Any], reporter: Reporter) -> dict[str, Any]:
    """Say what was found.

    Raises:
        ExportError: there is no file.
    """
    if result["file"] is None:
        raise ExportError(result["reason"])
    (reporter.say if result.get("as_planned") else reporter.warn)(conversion_words(result))
    return result


def _read(file: Path) -> Marked:
    if not file.is_file():
        raise ExportError(f"{file} is not there; give the folder of a finished run, or a marked MindIR")
    try:
        marked = read_markers(file)
    except (CaptureError, OSError, ValueError, KeyError, IndexError) as error:
        raise ExportError(f"{file} cannot be read as MindIR: {error}") from error
    except Exception as error:  # what protobuf raises has no type of its own here
        raise ExportError(f"{file} is no MindIR: {error}") from error
    if not marked.values:
        raise ExportError(f"{file} holds no FakeQuantParam markers; export it in the format lite_mindir")
    return marked


def _random_inputs(marked: Marked, count: int) -> tuple[np.ndarray, ...]:
    """Return values all over the range of each input; whole numbers are places in the tables that read them."""
    rng, arrays = np.random.default_rng(0), []
    for name in marked.graph.inputs:
        kind = marked.graph.values[name].type
        assert kind is not None
        shape = (count, *kind.shape[1:])
        if not kind.dtype.startswith("float"):
            arrays.append(rng.integers(0, _rows_read(marked.graph, name), shape).astype(kind.dtype))
        elif name in marked.values:
            qparams = marked.values[name]
            integers = rng.integers(qparams.qmin, qparams.qmax + 1, shape) + rng.uniform(-0.5, 0.5, shape)
            arrays.append(((integers - int(qparams.zero_point)) * float(qparams.scale)).astype(np.float32))
        else:
            arrays.append(rng.normal(size=shape).astype(np.float32))
    return tuple(arrays)


def _rows_read(graph: Graph, name: str) -> int:
    """Return the rows of the smallest table that `name` is a place in; 2 where there is none, as of a mask."""
    tables = [node.inputs[0] for node in graph.nodes if node.op == "Gather" and node.inputs[1] == name]
    return min((graph.shape(table)[0] for table in tables if table in graph.params), default=2)


def _against_markers(file: Path, marked: Marked, made: Path, batch: tuple[np.ndarray, ...]) -> dict[str, Any]:
    """Compare a converter's file with the markers: parameters, and the outputs of fake quantization."""
    program = read_ms(made)
    found = Simulator(program, ARM64).run(*feed(program, batch))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = load_lite(file)(*map(ms.Tensor, batch))
    outputs = [item.asnumpy() for item in (expected if isinstance(expected, tuple) else (expected,))]
    weights = {place: (marked.graph.params[_weight(marked, place)].data, q) for place, q in marked.weights.items()}
    parameters = marked_agreement(marked.values.values(), weights, program)
    return {
        **compared(outputs, found).to_dict(),
        "agreement": top1_agreement(outputs[0], found[0]),
        "as_planned": not parameters.missing,
        "parameters": parameters.to_dict(),
        "runtime": None,
        "nodes": [vars(layer) for layer in layers(program)],
    }


def _weight(marked: Marked, place: tuple[str, int]) -> str:
    return marked.graph.node(place[0]).inputs[place[1]]
