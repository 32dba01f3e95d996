"""`msqkd analyze`: which layers of a run's network quantisation harms most, and what to change in its recipe."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional

import mindspore as ms

from msqkd.analysis.analysis_report import REPORT as REPORT
from msqkd.analysis.analysis_report import write_analysis
from msqkd.analysis.analyze import Analysis, analyze
from msqkd.analysis.diagnosis import Remedy, with_fragment
from msqkd.analysis.refresh import refresh_report
from msqkd.analysis.report import plain
from msqkd.data import Split, subset
from msqkd.environment import versions
from msqkd.errors import ExportError, PlanError, RecipeError
from msqkd.pipeline.build import plan_graph
from msqkd.pipeline.lock import locked
from msqkd.pipeline.objects import Objects
from msqkd.pipeline.rundir import RunDirectory, writable_folder
from msqkd.progress import Reporter
from msqkd.recipe import make_recipe


def analyze_run(
    path: Path,
    output: Optional[Path] = None,
    *,
    samples: int = 1000,
    sensitivity_samples: Optional[int] = None,
    reporter: Optional[Reporter] = None,
) -> dict[str, Any]:
    """Analyse the network of a run: the trained one where the run has got so far, else the calibrated float one.

    ``analysis.json`` and ``analysis.html`` are written; into the folder of a finished run, its report is written again
    with what they say; nothing else in the run's folder changes. The samples are those
    of the training set that come behind the calibration's: no test sample has a say in what is changed.

    Args:
        path: the folder of a run that has been calibrated.
        output: where to write; the run's folder by default.
        samples: to look at, at most.
        sensitivity_samples: of these, so many at most are computed layer by layer; None as in `analyze`.
        reporter: where progress is told.

    Returns:
        The data of ``analysis.json``: `msqkd.analysis.analyze.Analysis.to_dict`, and `name`, `started`, `trained`
        (which network it is), `recipe_sha256`, `versions` and `warnings`.

    Raises:
        FolderError: another process is at work in the run's folder.
        ExportError: no run, one that is not calibrated yet, or an output folder that cannot be written.
        PlanError: no layer is quantised.
        MsqkdError: the data or the network cannot be had any more.
    """
    reporter = reporter or Reporter()
    RunDirectory.begun(path)  # a folder without a run is refused before it is locked
    with locked(path, reporter):
        return _analyzed(path, output, samples, sensitivity_samples, reporter)


def _analyzed(
    path: Path, output: Optional[Path], samples: int, sensitivity_samples: Optional[int], reporter: Reporter
) -> dict[str, Any]:
    started = datetime.now(timezone.utc)
    folder = RunDirectory.begun(path)
    if not folder.done("ptq"):
        done = ", ".join(folder.state["stages"]) or "none"
        raise ExportError(
            f"the run in {path} has no ranges to analyse: the stage ptq, its calibration, is missing (done: {done}); "
            f"run msqkd {folder.state['verb']} again with its recipe"
        )
    recipe = make_recipe(folder.state["recipe"])
    target = writable_folder(output or path)
    trained = folder.done("calibration")
    warnings = []
    if folder.state["verb"] == "run" and not trained:
        warnings.append("the run is not finished: its float network is analysed as it was calibrated without training")
    reporter.stages = 2
    reporter.stage("The network, from the run's folder")
    ms.set_context(mode=ms.GRAPH_MODE)
    objects = Objects(recipe, folder, reporter, train=trained)
    exported = objects.exported()
    for warning in warnings:
        reporter.warn(warning)
    chosen = _samples(objects, samples)
    reporter.stage(f"{len(chosen)} samples of {chosen.name}, layer by layer")
    reference = objects.reference_graph()
    found = analyze(
        exported.graph,
        exported.plan,
        reference,
        chosen,
        base=None if trained else reference,
        metric=objects.metric,
        sensitivity_samples=sensitivity_samples,
        methods=folder.state["verb"] == "calibrate",
        reporter=reporter,
    )
    result = plain(
        {
            **_accepted(found, objects).to_dict(),
            "name": recipe.name,
            "started": started.isoformat(timespec="seconds"),
            "trained": trained,
            "recipe_sha256": folder.state["recipe_sha256"],
            "versions": versions(),
            "warnings": warnings,
        }
    )
    write_analysis(result, target)
    if target.resolve() == path.resolve():
        refresh_report(target)
    reporter.say(f"{target / REPORT}.html")
    return dict(result)


def _samples(objects: Objects, count: int) -> Split:
    """Training samples that are not calibrated on; where none is left, those of the calibration."""
    others = objects.beside_calibration(count)
    return others if others is not None else subset(objects.calibration, count)


def _accepted(found: Analysis, objects: Objects) -> Analysis:
    """The analysis with the remedies that this recipe can take and that change something for this network."""
    plan = plan_graph(objects.recipe, objects.deployed)

    def fits(remedy: Remedy) -> bool:
        try:
            recipe = make_recipe(with_fragment(objects.recipe.to_dict(), remedy.fragment))
            other = plan_graph(recipe, objects.deployed)
        except (RecipeError, PlanError):
            return False
        changed = any(getattr(plan, part) != getattr(other, part) for part in ("weights", "groups", "activations"))
        return changed or "quantization" not in remedy.fragment

    diagnoses = [replace(diagnosis, remedies=tuple(filter(fits, diagnosis.remedies))) for diagnosis in found.diagnoses]
    return replace(found, diagnoses=diagnoses)
