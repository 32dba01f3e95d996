"""`msqkd verify`: what the device will answer, on the test set, for a run that is finished."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional

from msqkd.analysis.refresh import refresh_report
from msqkd.analysis.report import VERIFY_API_VERSION, write_report
from msqkd.data import draw
from msqkd.environment import versions
from msqkd.errors import SimulationError
from msqkd.exporters import MS
from msqkd.integer.registry import MACHINES
from msqkd.pipeline.export import check_integers, deviation_words, split_parity
from msqkd.pipeline.lock import locked
from msqkd.pipeline.run import reopen
from msqkd.pipeline.rundir import RunDirectory, writable_folder
from msqkd.progress import Reporter
from msqkd.recipe import Recipe, make_recipe

REPORT = "verify"
"""Name of the two files written, without their suffixes."""


def verify_run(
    path: Path,
    output: Optional[Path] = None,
    *,
    samples: Optional[int] = None,
    machine: Optional[str] = None,
    reporter: Optional[Reporter] = None,
) -> dict[str, Any]:
    """Check a run's files, and compare the float, fake-quantised and integer execution of its network on the test set.

    ``verify.json`` and ``verify.html`` are written; into the run's folder, its report is written again where it lacks
    what the device reaches on the whole test set; nothing else there changes.

    Args:
        path: the folder of a finished run.
        output: where to write; the run's folder by default.
        samples: test samples to compute, at most; the recipe's `verify.samples` by default.
        machine: ``x86`` or ``arm64``; the recipe's `verify.machine` by default.
        reporter: where progress is told.

    Returns:
        The data of ``verify.json``: `parity` as in a run's report, with `split` ``test``; `export` (the files) and
        `sha256`; and under `verified` whether the device deviates by no more than the recipe's bound.

    Raises:
        FolderError: another process is at work in the run's folder.
        ExportError: no finished run, an exported file that is not the recorded one, a ``.ms`` file that does not
            compute as its network, or an output folder that cannot be written.
        SimulationError: `machine` is unknown, or the run's target has but one.
        MsqkdError: the data or the network cannot be had any more.
    """
    reporter = reporter or Reporter()
    RunDirectory.finished(path)  # a folder without a run is refused before it is locked
    with locked(path, reporter):
        return _verified(path, output, samples, machine, reporter)


def _verified(
    path: Path, output: Optional[Path], samples: Optional[int], machine: Optional[str], reporter: Reporter
) -> dict[str, Any]:
    started, begin = datetime.now(timezone.utc), time.monotonic()
    folder = RunDirectory.finished(path)
    recipe = _recipe(folder, machine)
    reporter.stages = 3
    reporter.stage("Checksums of the exported files")
    checksums = folder.check_exports()
    reporter.say(f"{', '.join(checksums)}: as they were exported")
    target = writable_folder(output or path)
    reporter.stage("The network, from the run's folder")
    network = reopen(folder, recipe, reporter)
    files: dict[str, dict[str, Any]] = {
        form: {key: entry[key] for key in ("file", "failed") if key in entry}
        for form, entry in folder.result("export")["verified"].items()
    }
    if files.get(MS, {}).get("file"):
        files[MS].update(check_integers(folder.file(files[MS]["file"]), network))
        reporter.say(f"{files[MS]['file']}: all {files[MS]['compared_values']:,} values of a batch as simulated")
    count = samples or recipe.verify.samples
    test = draw(network.test, count, recipe.seed) if count else network.test
    reporter.stage(f"Float, fake-quantised and integer execution of {len(test)} test samples")
    parity = split_parity(network, test, "test", recipe.verify.machine, reporter)
    result = {
        "apiversion": VERIFY_API_VERSION,
        "name": recipe.name,
        "target": recipe.target,
        "started": started.isoformat(timespec="seconds"),
        "seconds": time.monotonic() - begin,
        "verified": not parity["exceeded"],
        "recipe_sha256": folder.state["recipe_sha256"],
        "versions": versions(),
        "metric": parity["metric"],
        "parity": parity,
        "avoided": network.plan.avoided(),
        "export": files,
        "sha256": checksums,
        "warnings": [deviation_words(parity)] if parity["exceeded"] else [],
    }
    write_report(result, target, REPORT)
    if target.resolve() == path.resolve():
        refresh_report(target)
    reporter.say(f"{target / REPORT}.html")
    return result


def _recipe(folder: RunDirectory, machine: Optional[str]) -> Recipe:
    recipe = make_recipe(folder.state["recipe"])
    if machine is None:
        return recipe
    if machine not in MACHINES:
        raise SimulationError(f"machine '{machine}' is unknown; allowed: {', '.join(MACHINES)}")
    if recipe.verify.machine is None:
        raise SimulationError(f"machine '{machine}' was given, but the target {recipe.target} has one arithmetic only")
    verify = recipe.verify.model_copy(update={"machine": machine})
    return recipe.model_copy(update={"verify": verify})
