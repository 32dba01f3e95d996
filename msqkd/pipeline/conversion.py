"""The vendor's converter at the end of a run: its file against the run's own, and what is kept of the comparison."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional

from msqkd.analysis.parity import batch_size
from msqkd.data import draw
from msqkd.deploy.converter_run import PROGRAM, convert_and_compare, converter_at_hand, find_converter
from msqkd.deploy.vendor_runtime import HOME_VARIABLE, TIME_LIMIT
from msqkd.errors import MissingDependencyError
from msqkd.exporters import FORMATS, LITE, MS, export
from msqkd.files import sha256
from msqkd.pipeline.export import Exported
from msqkd.pipeline.rundir import RunDirectory
from msqkd.train.evaluate import input_batches
from msqkd.words import of_hundred

API_VERSION = "msqkd/convert/v1"
AUTO, OFF = "auto", "off"
"""In place of a converter: the one that is found, and none."""

STAGE = "converter"
"""Name of the stage of a run that keeps what was found."""

SAMPLES = 16
"""Samples that both files compute, unless another number is asked for."""


def chosen_converter(setting: str) -> Optional[Path]:
    """Return the converter that a setting (a path, ``auto`` or ``off``) stands for; None where there is to be none.

    Raises:
        MissingDependencyError: there is none at the path, or it is for another processor.
        ExportError: a wheel cannot be set up.
    """
    if setting == OFF:
        return None
    return converter_at_hand() if setting == AUTO else find_converter(setting)


def needed_converter(setting: str) -> Path:
    """Return the converter that a setting stands for, which must be there.

    Raises:
        MissingDependencyError: there is none.
        ExportError: a wheel cannot be set up.
    """
    found = chosen_converter(setting)
    if found is None:
        raise MissingDependencyError(
            f"there is no converter: {HOME_VARIABLE} names no environment with mindspore-lite, and {PROGRAM} is not on "
            "the PATH; give one with --converter, or set the package up with msqkd runtime install"
        )
    return found


def convert_exported(
    network: Exported,
    folder: RunDirectory,
    converter: Path,
    output: Path,
    samples: int = SAMPLES,
    limit: float = TIME_LIMIT,
) -> dict[str, Any]:
    """Convert the marked MindIR of a run, and compare the file with its ``.ms`` on calibration samples.

    What the run has not exported is written for the comparison. The converter's file is ``NAME_converter.ms``.

    Args:
        network: what the run exported.
        folder: of the run.
        converter: from `chosen_converter`.
        output: folder for the converter's file.
        samples: how many are computed, at most.
        limit: seconds after which the converter is ended.

    Returns:
        What `convert_and_compare` returns, and of which file it is: the data of ``convert.json``.

    Raises:
        ExportError: the marked MindIR or the ``.ms`` file cannot be written.
    """
    begin, started = time.monotonic(), datetime.now(timezone.utc)
    split = draw(network.calibration, samples, network.recipe.seed)
    size = batch_size(network.graph, min(network.recipe.data.eval_batch_size, len(split)))
    with tempfile.TemporaryDirectory() as place:
        marked, ours = (_file(network, folder, name, Path(place)) for name in (LITE, MS))
        found = convert_and_compare(
            converter, marked, ours, output / f"{network.recipe.name}_converter", input_batches(split, size),
            limit=limit,
        )  # fmt: skip
        checksum = sha256(marked)
    return {
        "apiversion": API_VERSION,
        "name": network.recipe.name,
        "target": network.plan.target,
        "started": started.isoformat(timespec="seconds"),
        "seconds": time.monotonic() - begin,
        "recipe_sha256": network.recipe.sha(),
        "marked_sha256": checksum,
        **found,
    }


def _file(network: Exported, folder: RunDirectory, name: str, place: Path) -> Path:
    """Return the run's file in a format, or one that is written into `place`."""
    entry = folder.result("export")["verified"].get(name) or {}
    if entry.get("file") and not entry.get("failed"):
        return folder.file(entry["file"])
    return export(network.graph, network.plan, place / network.recipe.name, FORMATS[name].name)


def converted_before(folder: RunDirectory, converter: Path) -> bool:
    """Whether the run's marked MindIR, as it is now, was converted by this converter and compared."""
    if not folder.done(STAGE):
        return False
    exported, held = folder.result("export"), folder.result(STAGE)
    marked = exported["sha256"].get((exported["verified"].get(LITE) or {}).get("file"))
    same = held.get("marked_sha256") == marked and held.get("converter") == str(converter)
    return same and bool(held.get("compared"))


def conversion_words(found: Mapping[str, Any]) -> str:
    """Say in a sentence how the converter's file compares with ours."""
    if not found.get("compared"):
        what = f"{found['file']} cannot be compared" if found.get("file") else "the vendor's converter made no file"
        return f"{what}: {found.get('reason')}"
    parameters, runtime, nodes = found["parameters"], found.get("runtime"), found["nodes"]
    text = (
        f"{found['file']}: int8 in {sum(node['int8'] for node in nodes)} of its {len(nodes)} nodes, "
        f"{parameters['equal']} of {parameters['of']} as planned; on {found['samples']} samples "
        f"{of_hundred(found['equal_outputs'])} % of the output values are equal (simulated)"
    )
    return text if runtime is None else f"{text}, {of_hundred(runtime['equal_outputs'])} % in the vendor's runtime"
