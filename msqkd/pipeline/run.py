"""`msqkd run`: the whole chain, stage by stage; a finished stage is not done again."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Optional

import mindspore as ms

from msqkd import parallel
from msqkd.analysis.collapse import collapse_words, has_batchnorm
from msqkd.analysis.refresh import completed
from msqkd.analysis.report import write_report
from msqkd.errors import MsqkdError
from msqkd.exporters import LITE
from msqkd.files import write_json
from msqkd.graph.ir import Graph
from msqkd.pipeline.conversion import STAGE as CONVERTER_STAGE
from msqkd.pipeline.conversion import chosen_converter, conversion_words, convert_exported, converted_before
from msqkd.pipeline.export import Exported, deviation_words, export_files, failures, why
from msqkd.pipeline.objects import ROLES, Objects
from msqkd.pipeline.ptq import quantised_without_training
from msqkd.pipeline.ranking import quantised_metric
from msqkd.pipeline.rehearsal import rehearse
from msqkd.pipeline.result import assemble, layer_parts, training_only_rows
from msqkd.pipeline.rundir import RunDirectory
from msqkd.pipeline.stages import Stages
from msqkd.pipeline.trainings import train
from msqkd.progress import Reporter
from msqkd.quant.algorithms.methods import Improved
from msqkd.quant.config import INT8
from msqkd.quant.fake_quant import QUANTIZE
from msqkd.quant.plan import QuantPlan
from msqkd.quant.ptq import keep_trained
from msqkd.recipe import Recipe
from msqkd.words import percent


def run_recipe(
    recipe: Recipe, output: Path, reporter: Optional[Reporter] = None, fresh: bool = False, *, train: bool = True
) -> dict[str, Any]:
    """Run a recipe into a folder and return the report's data.

    Everything is kept in the folder: run again after an interruption, it goes on where it stopped, with the same
    result.

    In a process that msrun started, all workers train together, and the first does the rest alone: for the others this
    ends with the last training and returns an empty dictionary.

    Args:
        recipe: what to do.
        output: the folder; created when it does not exist.
        reporter: where progress is told.
        fresh: forget an earlier run in the folder.
        train: False leaves the trainings out and exports the calibrated float network (PTQ).

    Raises:
        MsqkdError: whatever the user can mend.
    """
    begun = _begun(recipe, output, reporter, fresh, train)
    with begun.folder:
        return begun.run()


def train_recipe(
    recipe: Recipe, output: Path, reporter: Optional[Reporter] = None, fresh: bool = False
) -> dict[str, Any]:
    """Do the trainings of a recipe alone, the float one included, and return what they reached.

    `run_recipe` in the same folder goes on from there and trains nothing again.

    Args:
        recipe, output, reporter, fresh: as for `run_recipe`.

    Returns:
        ``name``, ``recipe_sha256``, ``seed``, ``metric``, ``accuracy`` (float, then each training), ``checkpoints``
        (file by training) and ``training`` (history by training). Empty for all workers but the first.

    Raises:
        MsqkdError: whatever the user can mend.
    """
    begun = _begun(recipe, output, reporter, fresh, True)
    with begun.folder:
        return begun.train()


def _begun(recipe: Recipe, output: Path, reporter: Optional[Reporter], fresh: bool, train: bool) -> _Run:
    parallel.join()
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_seed(recipe.seed)
    if parallel.is_first():
        folder = RunDirectory(output, recipe, fresh, verb="run" if train else "calibrate")
        parallel.from_first(folder.state)
        return _Run(Objects(recipe, folder, reporter or Reporter(), train))
    folder = RunDirectory.of_other_worker(output, parallel.from_first(None))
    return _Run(Objects(recipe, folder, Reporter(quiet=True), train))


def reopen(folder: RunDirectory, recipe: Recipe, reporter: Reporter) -> Exported:
    """The network a finished run exported, made again from the run's folder, and its data.

    Args:
        folder: from `RunDirectory.finished`.
        recipe: the run's, which may differ in `verify`.
        reporter: where progress is told.

    Raises:
        MsqkdError: the data or the network cannot be had any more.
    """
    ms.set_context(mode=ms.GRAPH_MODE)
    return Objects(recipe, folder, reporter, train=folder.state["verb"] == "run").exported()


class _Run(Stages):
    def run(self) -> dict[str, Any]:
        found = self.begin(5 + (len(self.objects.trainings) + 1 if self.objects.trainings else 0))
        self._rehearse(*found)
        self.float_network()
        self._plan_stage()
        self._ptq()
        for role in self.objects.trainings:
            self._training_stage(role)
        if not parallel.is_first():
            return {}
        parallel.go_on_alone()
        if self.objects.trainings:
            self._calibration()
        self._export()
        self._convert()
        return self._report()

    def train(self) -> dict[str, Any]:
        """The trainings alone."""
        self._rehearse(*self.begin(2 + len(self.objects.trainings)))
        self.float_network()
        self._plan_stage()
        for role in self.objects.trainings:
            self._training_stage(role)
        return self._trained() if parallel.is_first() else {}

    def _rehearse(self, captured: Graph, deployed: Graph, plan: QuantPlan) -> None:
        """Try the export while nothing is paid for; of use as long as the stage before it is to be done."""
        if not self.folder.done("calibration" if self.objects.trainings else "ptq"):
            rehearse(self.objects, captured, deployed, plan)

    def _plan_stage(self) -> None:
        def work() -> dict[str, Any]:
            rows = training_only_rows(self.objects.captured)
            if parallel.is_first():
                write_json(self.folder.file("plan.json"), {**self.objects.plan.to_dict(), "training_only": rows})
            return {"int8_share": self.objects.plan.int8_share(), "distillation": self._taught()}

        self.stage(
            "plan",
            f"Plan for {self.recipe.target}",
            work,
            lambda r: f"{percent(r['int8_share'])} of the operations run in int8",
        )
        for node in self.objects.plan.nodes:
            if node.precision != INT8:
                self.reporter.say(f"{node.precision}: {node.name} ({node.op}): {node.reason}")
        left_out = self.objects.captured.training_only()
        if left_out:
            self.reporter.say(f"trained only, not deployed: {', '.join(node.name for node in left_out)}")
        for warning in self.objects.plan.warnings:
            self.reporter.warn(warning)
        for text in self._taught():
            self.reporter.say(f"distillation: {text}")

    def _taught(self) -> list[str]:
        """What the soft loss compares, one sentence an output; nothing without distillation."""
        teaching = self.objects.teaching if self.objects.trainings else None
        return [] if teaching is None else teaching.words(self.objects.captured)

    def _ptq(self) -> None:
        def work() -> dict[str, Any]:
            found = quantised_without_training(self.objects)
            told = self._keep(found) if found.told else {}
            return {
                "accuracy": quantised_metric(self.objects, found, self.objects.bundle.test),
                "ranges": found.plan.ranges(),
                "samples": len(self.objects.calibration),
                "observer": self.recipe.calibration.observer,
                "warnings": self.objects.new_warnings(found.plan),
                **told,
            }

        result = self.stage(
            "ptq",
            "Calibration of the float network (PTQ)",
            work,
            lambda r: f"PTQ {self.objects.metric.words(r['accuracy'])}",
        )
        for warning in result.get("warnings", ()):  # a folder of an earlier version has none
            self.warnings.append(warning)
            self.reporter.warn(warning)

    def _keep(self, found: Improved) -> dict[str, Any]:
        """Save what methods made of the network; returns the scales, and what the methods have to say."""
        self.objects.save_graph(found.graph, "ptq.ckpt")
        self.objects.save_graph(found.reference, "ptq_reference.ckpt")
        for name, words in found.told.items():
            for text in words:
                self.reporter.say(f"{name}: {text}")
        return {"methods": found.told, "scales": found.plan.scales()}

    def _training_stage(self, role: str) -> None:
        title, quantised, _ = ROLES[role]
        result = self.stage(
            role,
            title[0].upper() + title[1:],
            lambda: train(self.objects, role),
            lambda r: self.objects.metric.words(r["accuracy"]),
        )
        before = "ptq" if quantised and self.folder.done("ptq") else "float"
        untrained = self.folder.result(before)["accuracy"]
        if self.objects.metric.is_collapse(untrained, result["accuracy"]):
            scale = self.objects.metric.scale
            folds = quantised and has_batchnorm(self.objects.captured)
            self.warnings.append(
                f"{title}: {scale.words(result['accuracy'])} after training, {scale.show(untrained)} before: "
                f"{collapse_words(result['history'], self.recipe, folds)}"
            )
            self.reporter.warn(self.warnings[-1])

    def _calibration(self) -> None:
        """Re-range the trained network; keep the ranges that answer more like the teacher, or the float network."""

        def work() -> dict[str, Any]:
            cell = self.objects.trained_cell(self.objects.main)
            graph, plan = cell.sync()
            reference = self.objects.reference()
            found = keep_trained(plan, self.objects.calibrate(graph, plan)).ranges()
            candidates = {"trained": plan.ranges(), "calibrated": found}
            loss = {}
            for name, ranges in candidates.items():
                cell.set_ranges(ranges)
                cell.set_phase(QUANTIZE)
                loss[name] = self.objects.calibration_loss(self.objects.calibration_outputs(cell), reference)
            kept = min(loss, key=lambda name: loss[name])
            observer = self.recipe.calibration.observer
            return {
                "kept": kept,
                "loss": loss,
                "ranges": candidates[kept],
                "samples": len(self.objects.calibration),
                "observer": observer,
            }

        def tell(result: dict[str, Any]) -> str:
            loss = result["loss"]
            losses = f"trained {loss['trained']:.3g}, calibrated {loss['calibrated']:.3g}"
            return f"kept the {result['kept']} ranges (calibration loss: {losses})"

        self.stage("calibration", "Calibration of the trained network", work, tell)

    def _export(self) -> None:
        """Write the files, and compare what the device will compute with what training promised.

        What failed in an earlier run of the folder is tried again.
        """
        before = self.folder.result("export") if self.folder.done("export") else None
        if before is not None and failures(before["verified"], before["parity"]):
            self.folder.forget("export")
        result = self.stage(
            "export",
            "Export and verification",
            lambda: export_files(self.objects.exported(), self.folder, self.reporter, before),
            lambda r: f"exported {self.objects.metric.words(r['accuracy'])}, files {', '.join(r['files'])}",
        )
        parity = result["parity"]
        for name, reason in failures(result["verified"], {}).items():
            self.warnings.append(f"{name} failed: {reason}")
        if parity["exceeded"]:
            self.warnings.append(deviation_words(parity))
            self.reporter.warn(self.warnings[-1])
        else:
            self.reporter.say(deviation_words(parity))

    def _convert(self) -> None:
        """Let the vendor's converter make its file of the marked MindIR, and compare it with ours.

        The file is not kept: `msqkd convert` does that. A converter that fails takes nothing from the run: its reason
        is a warning.
        """
        entry = self.folder.result("export")["verified"].get(LITE) or {}
        if not entry.get("file") or entry.get("failed"):
            return
        try:
            converter = chosen_converter(self.recipe.verify.converter)
            if converter is None:
                return
            if not converted_before(self.folder, converter):
                self.reporter.say(f"the vendor's converter: {converter}")
                with tempfile.TemporaryDirectory() as place:
                    found = convert_exported(self.objects.exported(), self.folder, converter, Path(place))
                self.folder.finish(CONVERTER_STAGE, found)
            found = self.folder.result(CONVERTER_STAGE)
        except MsqkdError as error:
            found = {"compared": False, "file": None, "reason": str(error)}
        if found.get("as_planned"):
            self.reporter.say(conversion_words(found))
        else:
            self.warnings.append(conversion_words(found))
            self.reporter.warn(self.warnings[-1])

    def _trained(self) -> dict[str, Any]:
        """What `train_recipe` returns."""
        results = {role: self.folder.result(role) for role in ("float", *self.objects.trainings)}
        self._forget_states()
        return {
            "name": self.recipe.name,
            "recipe_sha256": self.recipe.sha(),
            "seed": self.recipe.seed,
            "metric": self.objects.metric.to_dict(),
            "accuracy": {role: result["accuracy"] for role, result in results.items()},
            "checkpoints": {role: f"{role}.ckpt" for role in results},
            "training": {role: result["history"] for role, result in results.items() if result["history"]},
        }

    def _forget_states(self) -> None:
        """Every training is done: what would continue it is of no more use."""
        for pattern in ("*.state.npz", "*.state.*.npz", "teacher*.logits.*"):
            for state in self.folder.path.glob(pattern):
                state.unlink()

    def _layers(self, network: Exported) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The parts of the report about layers; empty where trained values do not allow them, since the rest counts."""
        try:
            return layer_parts(network.graph, network.plan, self.objects.reference_graph(), network.test)
        except Exception as error:
            self.warnings.append(f"the report lacks its layers: {why(error)}")
            self.reporter.warn(self.warnings[-1])
            return [], []

    def _report(self) -> dict[str, Any]:
        self.reporter.stage("Report")
        folder, recipe = self.folder, self.recipe
        network = self.objects.exported()
        layers, shown = self._layers(network)
        counts = {
            "train": len(self.objects.bundle.train),
            "test": len(self.objects.bundle.test),
            "calibration": len(self.objects.calibration),
        }
        result = assemble(
            recipe,
            folder.state["stages"],
            network.plan,
            layers,
            shown,
            {"name": self.objects.bundle.name, **counts},
            self.started,
            self.warnings,
            training_only_rows(self.objects.captured),
        )
        result = completed(result, folder.path)
        write_report(result, folder.path)
        self._forget_states()
        self.reporter.say(f"{folder.file('report.html')}")
        return result
