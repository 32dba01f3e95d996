"""`msqkd run`: the whole chain, stage by stage; a finished stage is not done again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, Optional

import mindspore as ms
import numpy as np
from mindspore import nn

from msqkd import parallel
from msqkd.analysis.layers import layer_table
from msqkd.analysis.report import write_report
from msqkd.checkpoints import LoadReport, load_checkpoint, save_checkpoint
from msqkd.data import DataBundle, Split, subset
from msqkd.distill.layers import Links
from msqkd.distill.step import DistillTrainOneStepCell, Learners, Teachers
from msqkd.errors import ModelError, PlanError
from msqkd.files import write_json
from msqkd.graph.cell import Hooks, read_parameters, to_cell
from msqkd.graph.half import half_precision
from msqkd.graph.ir import Graph
from msqkd.graph.passes.restore_dropout import DropoutPlace, find_dropout
from msqkd.pipeline.build import (
    build_network,
    calibration_split,
    capture_network,
    check_classes,
    check_numbers,
    example_input,
    load_bundle,
    load_network,
    metric_of,
    plan_graph,
    qat_schedule,
    training_loss,
    try_loss,
)  # fmt: skip
from msqkd.pipeline.export import Exported, deviation_words, export_files, preflight
from msqkd.pipeline.result import assemble, training_only_rows
from msqkd.pipeline.rundir import RunDirectory
from msqkd.pipeline.teacher_cache import TeacherCache
from msqkd.pipeline.teaching import Teaching
from msqkd.progress import Reporter
from msqkd.quant.config import INT8, NONE
from msqkd.quant.fake_quant import QUANTIZE
from msqkd.quant.integers import round_biases
from msqkd.quant.plan import QuantPlan
from msqkd.quant.ptq import calibrate, divergence, relative_error
from msqkd.quant.qat import (
    QuantCell,
    deployment_graph,
    needed_before_training,
    quantize_cell,
    training_graph,
    with_dropout,
)
from msqkd.quant.schedule import QatSchedule
from msqkd.recipe import Recipe, TrainSection
from msqkd.train.ema import AveragingOptimizer
from msqkd.train.evaluate import input_batches, measured, output_arrays
from msqkd.train.loop import Training, fit, steps_per_epoch
from msqkd.train.metric import Metric, Outputs
from msqkd.train.optimizer import check_decay, make_optimizer
from msqkd.train.step import LossScale, TrainStep, WithLoss

_SQNR_SAMPLES = 256

# role of a training -> (title, quantised, distilled)
_ROLES = {
    "float_ft": ("float, fine-tuned with the same budget", False, False),
    "float_kd": ("float, with the same distillation", False, True),
    "qat": ("quantisation-aware training", True, False),
    "qat_kd": ("quantisation-aware training with distillation", True, True),
}
_COMPARISONS = {"float": "float_ft", "float_kd": "float_kd", "qat": "qat"}


def plan_recipe(recipe: Recipe) -> tuple[Graph, QuantPlan]:
    """Capture the recipe's network and plan it; needs neither data nor weights.

    Raises:
        MsqkdError: the network cannot be built or captured, or a rule does not fit.
    """
    args = {key: value for key, value in recipe.model.args.items() if key != "pretrained"}
    section = recipe.model.model_copy(update={"checkpoint": None, "args": args})
    net = build_network(section, "model")
    graph = capture_network(recipe, net)
    return graph, plan_graph(recipe, deployment_graph(graph))


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
        return _Run(recipe, folder, reporter or Reporter(), train)
    folder = RunDirectory.of_other_worker(output, parallel.from_first(None))
    return _Run(recipe, folder, Reporter(quiet=True), train)


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
    return _Run(recipe, folder, reporter, train=folder.state["verb"] == "run").exported()


def _delays(plan: QuantPlan) -> list[tuple[int, str]]:
    """The step from which each activation is quantised, and what it is called; `plan` has its delays in steps."""
    delays = [(group.delay, group.name) for group in plan.groups.values()]
    return [*delays, *((quant.delay, f"the input of {quant.node}") for quant in plan.dynamic.values())]


class _Run:
    def __init__(self, recipe: Recipe, folder: RunDirectory, reporter: Reporter, train: bool) -> None:
        self.recipe, self.folder, self.reporter = recipe, folder, reporter
        main = "qat_kd" if recipe.distillation is not None else "qat"
        self.main = main
        self.output_shapes: list[tuple[int, ...]] = []
        self.deployed_outputs: list[int] = []
        self.warnings: list[str] = []
        self.loaded: dict[str, LoadReport] = {}
        self.dropout_places: list[DropoutPlace] = []
        others = [_COMPARISONS[name] for name in recipe.compare if _COMPARISONS[name] != main]
        self.trainings = [*others, main] if train else []
        self.started = datetime.now(timezone.utc)

    # -- the stages -----------------------------------------------------------------------------------------------
    def run(self) -> dict[str, Any]:
        self.reporter.stages = 5 + (len(self.trainings) + 1 if self.trainings else 0)
        for warning in self.recipe.warnings():
            self.reporter.warn(warning)
        self._preflight()
        self._float_network()
        self._plan_stage()
        self._ptq()
        for role in self.trainings:
            self._training_stage(role)
        if not parallel.is_first():
            return {}
        parallel.go_on_alone()
        if self.trainings:
            self._calibration()
        self._export()
        return self._report()

    def train(self) -> dict[str, Any]:
        """The trainings alone."""
        self.reporter.stages = 2 + len(self.trainings)
        for warning in self.recipe.warnings():
            self.reporter.warn(warning)
        self._preflight()
        self._float_network()
        self._plan_stage()
        for role in self.trainings:
            self._training_stage(role)
        return self._trained() if parallel.is_first() else {}

    def _preflight(self) -> None:
        """What must be refused is refused now, not after hours of training."""
        _ = self.metric
        pretrain = self.recipe.pretrain
        if pretrain is None or self.folder.done("float"):
            captured, graph, plan = self.captured, self.deployed, self.plan
        else:
            captured, plan = plan_recipe(self.recipe)
            self._check_network(captured)
            graph = deployment_graph(captured)
            steps_per_epoch(self.bundle.train, pretrain.samples_a_step)
        self._check_plan(plan)
        if self.trainings and self.recipe.train.dropout:
            places = self._dropout(self.recipe.train, captured)
            with_dropout(training_graph(captured, self.recipe.quantization.batchnorm), places)
        preflight(self.recipe, graph, plan)
        self._check_trainings(captured)
        self._try_losses(captured)
        if self.trainings and self.teaching is not None:
            self.teaching.check(captured, self.bundle.train.batch(np.arange(1))[0])
        if self.teacher_cache is not None:
            self.teacher_cache.decide(captured)

    def _stage(self, name: str, title: str, work: Callable[[], Any], tell: Callable[[Any], str]) -> Any:
        self.reporter.stage(title)
        if self.folder.done(name):
            result = self.folder.result(name)
            self.reporter.say(f"{tell(result)} (done before)")
            return result
        begin = time.monotonic()
        result = work()
        if isinstance(result, dict):
            result.setdefault("seconds", time.monotonic() - begin)
        result = parallel.from_first(result)
        self.folder.finish(name, result)
        self.reporter.say(tell(result))
        return result

    def _float_network(self) -> None:
        self.reporter.say(self.bundle.describe())

        def work() -> dict[str, Any]:
            history = self._pretrain() if self.recipe.pretrain is not None else None
            graph = self.captured
            if history is None:
                self._save_graph(graph, "float.ckpt")
            for name, report in self.loaded.items():
                self.reporter.say(f"{name}: {report.words()}")
            loaded = {name: report.to_dict() for name, report in self.loaded.items()}
            return {"accuracy": self._measured(to_cell(graph)), "history": history, "checkpoints": loaded}

        title = "Float network: training from scratch" if self.recipe.pretrain else "Float network"
        self._stage("float", title, work, lambda r: f"float {self.metric.words(r['accuracy'])}")

    def _plan_stage(self) -> None:
        def work() -> dict[str, Any]:
            rows = training_only_rows(self.captured)
            if parallel.is_first():
                write_json(self.folder.file("plan.json"), {**self.plan.to_dict(), "training_only": rows})
            return {"int8_share": self.plan.int8_share()}

        self._stage(
            "plan",
            f"Plan for {self.recipe.target}",
            work,
            lambda r: f"{r['int8_share']:.0%} of the operations run in int8",
        )
        for node in self.plan.nodes:
            if node.precision != INT8:
                self.reporter.say(f"{node.precision}: {node.name} ({node.op}): {node.reason}")
        left_out = self.captured.training_only()
        if left_out:
            self.reporter.say(f"trained only, not deployed: {', '.join(node.name for node in left_out)}")
        for warning in self.plan.warnings:
            self.reporter.warn(warning)

    def _ptq(self) -> None:
        def work() -> dict[str, Any]:
            plan = self._calibrate(self.deployed, self.plan)
            cell = quantize_cell(self.deployed, plan)
            cell.set_phase(QUANTIZE)
            found = measured(cell, self.bundle.test, self.recipe.data.eval_batch_size, self.metric)
            return {
                "accuracy": found,
                "ranges": plan.ranges(),
                "samples": len(self.calibration),
                "observer": self.recipe.calibration.observer,
            }

        self._stage(
            "ptq",
            "Calibration of the float network (PTQ)",
            work,
            lambda r: f"PTQ {self.metric.words(r['accuracy'])}",
        )

    def _training_stage(self, role: str) -> None:
        title, quantised, _ = _ROLES[role]
        result = self._stage(
            role,
            title[0].upper() + title[1:],
            lambda: self._train(role),
            lambda r: self.metric.words(r["accuracy"]),
        )
        before = "ptq" if quantised and self.folder.done("ptq") else "float"
        untrained = self.folder.result(before)["accuracy"]
        if self.metric.is_collapse(untrained, result["accuracy"]):
            scale = self.metric.scale
            self.warnings.append(
                f"{title}: {scale.words(result['accuracy'])} after training, {scale.show(untrained)} before: "
                "the training diverged; lower train.lr, "
                "or set quantization.batchnorm: freeze, which takes a larger one than folded weights do"
            )
            self.reporter.warn(self.warnings[-1])

    def _calibration(self) -> None:
        """Re-range the trained network; keep the ranges that answer more like the teacher, or the float network."""

        def work() -> dict[str, Any]:
            cell = self._trained_cell(self.main)
            graph, plan = cell.sync()
            reference = self._reference()
            # A step size that was trained is not measured anew: the weights have grown together with it.
            trained = {name: span for name, span in plan.ranges().items() if plan.groups[name].learned != NONE}
            found = {**self._calibrate(graph, plan).ranges(), **trained}
            candidates = {"trained": plan.ranges(), "calibrated": found}
            loss = {}
            for name, ranges in candidates.items():
                cell.set_ranges(ranges)
                cell.set_phase(QUANTIZE)
                loss[name] = self._calibration_loss(self._calibration_outputs(cell), reference)
            kept = min(loss, key=lambda name: loss[name])
            observer = self.recipe.calibration.observer
            return {
                "kept": kept,
                "loss": loss,
                "ranges": candidates[kept],
                "samples": len(self.calibration),
                "observer": observer,
            }

        def tell(result: dict[str, Any]) -> str:
            loss = result["loss"]
            losses = f"trained {loss['trained']:.3g}, calibrated {loss['calibrated']:.3g}"
            return f"kept the {result['kept']} ranges (calibration loss: {losses})"

        self._stage("calibration", "Calibration of the trained network", work, tell)

    def _export(self) -> None:
        """Write the files, and compare what the device will compute with what training promised."""
        result = self._stage(
            "export",
            "Export and verification",
            lambda: export_files(self.exported(), self.folder, self.reporter),
            lambda r: f"exported {self.metric.words(r['accuracy'])}, files {', '.join(r['files'])}",
        )
        parity = result["parity"]
        if parity["exceeded"]:
            self.warnings.append(deviation_words(parity))
            self.reporter.warn(self.warnings[-1])
        else:
            self.reporter.say(deviation_words(parity))

    # -- objects, made when first needed ------------------------------------------------------------------------------
    @cached_property
    def metric(self) -> Metric:
        return metric_of(self.recipe)

    @cached_property
    def bundle(self) -> DataBundle:
        return load_bundle(self.recipe)

    @cached_property
    def calibration(self) -> Split:
        return calibration_split(self.recipe, self.bundle.train)

    @cached_property
    def captured(self) -> Graph:
        """The float network with its trained weights."""
        recipe = self.recipe
        if self.folder.file("float.ckpt").exists() and (self.folder.done("float") or recipe.pretrain is not None):
            section = recipe.model.model_copy(update={"checkpoint": None})
            net = build_network(section, "model")
            load_checkpoint(net, str(self.folder.file("float.ckpt")))
        else:
            net, report = load_network(recipe.model, "model")
            if report is not None:
                self.loaded["model"] = report
        graph = capture_network(recipe, net)
        self._check_network(graph)
        return graph

    @cached_property
    def deployed(self) -> Graph:
        return deployment_graph(self.captured)

    @cached_property
    def plan(self) -> QuantPlan:
        return self._in_steps(plan_graph(self.recipe, self.deployed))

    @property
    def _steps_per_epoch(self) -> int:
        return steps_per_epoch(self.bundle.train, self.recipe.train.samples_a_step)

    def _in_steps(self, plan: QuantPlan) -> QuantPlan:
        """The plan with its delays in steps of the training, if there is one."""
        return plan.in_steps(self._steps_per_epoch) if self.trainings else plan

    @cached_property
    def schedule(self) -> QatSchedule:
        return qat_schedule(self.recipe, self._steps_per_epoch)

    @cached_property
    def teaching(self) -> Optional[Teaching]:
        return Teaching(self.recipe, self.loaded) if self.recipe.distillation is not None else None

    @cached_property
    def teachers(self) -> list[nn.Cell]:
        return self.teaching.cells(self.captured) if self.teaching is not None else []

    @cached_property
    def teacher_cache(self) -> Optional[TeacherCache]:
        """For the trainings with distillation, if one is still to be done."""
        taught = [role for role in self.trainings if _ROLES[role][2]]
        if all(self.folder.done(role) for role in taught):
            return None
        epochs = self.recipe.train.epoch_size * len(taught)
        return TeacherCache(self.recipe, self.bundle.train, epochs, self.folder.path, self.reporter)

    # -- work -----------------------------------------------------------------------------------------------------
    def _check_network(self, graph: Graph) -> None:
        """Its outputs are what loss and metric need, and the data fits them."""
        self.output_shapes = [graph.shape(name) for name in graph.outputs]
        for number, shape in enumerate(self.output_shapes):
            if shape[:1] != (-1,):
                raise ModelError(
                    f"{graph.name}: output {number} has shape {shape}, which does not begin with the batch; every "
                    "output needs a row for each sample"
                )
        if self.recipe.distillation is not None:
            check_numbers(self.recipe.distillation.outputs, graph, "distillation.outputs")
        self.deployed_outputs = list(graph.deployed or range(len(graph.outputs)))
        if not self.metric.is_accuracy:
            return
        shape = self.output_shapes[self.deployed_outputs[0]]
        if len(shape) != 2:
            raise ModelError(
                f"{graph.name}: output {self.deployed_outputs[0]} has shape {shape}; top-1 accuracy is for classifiers "
                "(N, classes); name another metric with evaluation.metric, and a loss with train.loss"
            )
        check_classes(self.bundle, shape[1], self._training_needs_labels)

    @property
    def _training_needs_labels(self) -> bool:
        """Whether anything is trained that looks at the labels of the training set."""
        if self.recipe.pretrain is not None or self.teaching is None:
            return True
        return self.teaching.needs_labels or not all(_ROLES[role][2] for role in self.trainings)

    def _sections(self) -> dict[str, TrainSection]:
        """The settings of the trainings still to be done, by their keys."""
        pretrain = None if self.folder.done("float") else self.recipe.pretrain
        sections = {"pretrain": pretrain, "train": self.recipe.train if self.trainings else None}
        return {where: section for where, section in sections.items() if section is not None}

    def _check_trainings(self, graph: Graph) -> None:
        names = [name for name, parameter in graph.params.items() if parameter.trainable]
        for where, section in self._sections().items():
            check_decay(section, names, where)
            if section.amp_level != "O0" and ms.get_context("device_target") == "CPU":
                text = f"{where}.amp_level: {section.amp_level} computes in float16, which saves no time on CPU"
                self.reporter.warn(text)

    def _try_losses(self, graph: Graph) -> None:
        """Losses against the labels that may not fit are computed once, before anything is trained."""
        recipe = self.recipe
        tried: list[Any] = []
        for where, section in self._sections().items():
            if self.metric.is_accuracy and section.loss is None:
                continue
            named = recipe.distillation is not None and recipe.distillation.hard_loss != "train_loss"
            unused = where == "train" and section.loss is None and named and self.trainings == [self.main]
            if not unused and (section.loss, section.loss_args) not in tried:
                try_loss(section, graph, self.bundle.train, where)
                tried.append((section.loss, section.loss_args))

    def _check_plan(self, plan: QuantPlan) -> None:
        if not plan.weights:
            share = f"int8 share {plan.int8_share():.0%}"
            raise PlanError(f"no layer of {plan.network} can be quantised on {self.recipe.target} ({share})")
        if not self.trainings:
            return
        plan = self._in_steps(plan)
        steps = self.recipe.train.epoch_size * self._steps_per_epoch
        late = next(((delay, name) for delay, name in _delays(plan) if delay >= steps), None)
        if late:
            raise PlanError(
                f"quantization.activation.delay is {late[0]} steps, but the training has {steps}: "
                f"'{late[1]}' would never be quantised; choose a smaller delay or more epochs"
            )
        if self.schedule.last_change() >= steps:
            raise PlanError(
                f"quantization.schedule changes something at step {self.schedule.last_change()}, counted from 0, but "
                f"the training has {steps}; choose shorter intervals or more epochs"
            )

    def _save_graph(self, graph: Graph, name: str) -> None:
        self._save({key: param.data for key, param in graph.params.items()}, name)

    def _save(self, weights: dict[str, np.ndarray], name: str) -> None:
        """Write a checkpoint, which is there for every worker when this ends."""
        if parallel.is_first():
            save_checkpoint(weights, self.folder.file(name))
        parallel.wait()

    def _calibration_batch(self) -> int:
        return min(self.recipe.calibration.batch_size, len(self.calibration))

    def _measured(self, network: Any) -> float:
        """The metric of a network with all outputs on the test set."""
        size = self.recipe.data.eval_batch_size
        return measured(network, self.bundle.test, size, self.metric, self.deployed_outputs, together=True)

    def _calibration_outputs(self, network: Any) -> Outputs:
        return output_arrays(network, self.calibration, self._calibration_batch(), self.deployed_outputs)

    def _reference(self) -> Outputs:
        """What the trained network is to answer: what its only teacher does, or the float network where there are
        several or that is no pattern for all that is deployed."""
        section = self.recipe.distillation
        taught = section is not None and self.deployed_outputs[0] in section.outputs
        alone = taught and self._is_classifier and len(self.teachers) == 1
        return self._calibration_outputs(self.teachers[0] if alone else to_cell(self.captured))

    @property
    def _is_classifier(self) -> bool:
        return self.metric.is_accuracy and len(self.deployed_outputs) == 1

    def _calibration_loss(self, found: Outputs, reference: Outputs) -> float:
        return divergence(found[0], reference[0]) if self._is_classifier else relative_error(found, reference)

    def _calibrate(self, graph: Graph, plan: QuantPlan) -> QuantPlan:
        section = self.recipe.calibration
        return self._observe(graph, plan, "calibration", section.observer, section.percentile or 99.99)

    def _observe(
        self, graph: Graph, plan: QuantPlan, title: str, observer: Optional[str], percentile: float
    ) -> QuantPlan:
        size = self._calibration_batch()
        total = -(-len(self.calibration) // size)
        with self.reporter.task(title, total) as task:
            return calibrate(
                graph,
                plan,
                input_batches(self.calibration, size),
                observer=observer,
                percentile=percentile,
                progress=task.update,
            )

    def _pretrain(self) -> dict[str, Any]:
        settings = self.recipe.pretrain
        assert settings is not None
        section = self.recipe.model
        ms.set_seed(self.recipe.seed)
        graph = capture_network(self.recipe, build_network(section, "model"))
        self._check_network(graph)
        network = self._float_cell(graph, settings)
        step = TrainStep(
            WithLoss(network, training_loss(settings, graph, "pretrain"), len(graph.inputs)),
            self._optimizer(network, settings, network),
            **_step_options(settings),
        )
        history = self._fit("pretrain", "training from scratch", network, step, settings)
        read_parameters(network, graph)
        self._save_graph(graph, "float.ckpt")
        return history

    def _optimizer(self, learners: nn.Cell, settings: TrainSection, network: nn.Cell) -> Any:
        """Over what `learners` train, with an average of the network's weights where one is wanted."""
        optimizer = make_optimizer(learners, settings, steps_per_epoch(self.bundle.train, settings.samples_a_step))
        return optimizer if settings.ema is None else AveragingOptimizer(optimizer, network, settings.ema)

    def _fit(
        self,
        key: str,
        title: str,
        network: Any,
        step: TrainStep,
        settings: TrainSection,
        delay: Optional[int] = None,
        train: Optional[Split] = None,
        settled: int = 0,
    ) -> dict[str, Any]:
        workers = f"/{parallel.size()} workers" if parallel.size() > 1 else ""  # their number decides what a step is
        training = Training(
            title=title, key=f"{self.recipe.sha()}/{key}{workers}", network=network, step=step, settings=settings,
            train=self.bundle.train if train is None else train,
            test=self.bundle.test, seed=self.recipe.seed, state_file=self.folder.file(f"{key}.state.npz"),
            eval_batch_size=self.recipe.data.eval_batch_size, activation_delay=delay,
            metric=self.metric, outputs=self.deployed_outputs, settled=settled,
        )  # fmt: skip
        return fit(training, self.reporter).to_dict()

    def _train(self, role: str) -> dict[str, Any]:
        title, quantised, distilled = _ROLES[role]
        settings = self.recipe.train
        graph = self.captured
        inputs, options = len(graph.inputs), _step_options(settings)
        teaching = self.teaching if distilled else None
        links = teaching.links(graph) if teaching is not None else Links()
        train = self.bundle.train
        if quantised:
            network = self._quantised_cell(settings, links.student)
        else:
            network = self._float_cell(graph, settings, links.student)
        if teaching is not None:
            steps = settings.epoch_size * steps_per_epoch(self.bundle.train, settings.samples_a_step)
            loss = teaching.loss(graph, links, steps)
            optimizer = self._optimizer(Learners(network, loss), settings, network)
            teachers: Teachers = self.teachers if loss.several else self.teachers[0]
            if self.teacher_cache is not None and self.teacher_cache.used:
                train, teachers = self.teacher_cache.split(self.teachers), self.teacher_cache.teachers
            step: TrainStep = DistillTrainOneStepCell(network, teachers, loss, optimizer, inputs=inputs, **options)
        else:
            optimizer = self._optimizer(network, settings, network)
            step = TrainStep(WithLoss(network, training_loss(settings, graph, "train"), inputs), optimizer, **options)
        delay = min((g.delay for g in self.plan.groups.values() if not g.fixed), default=None) if quantised else None
        settled = max(self.schedule.last_change(), *(step for step, _ in _delays(self.plan))) if quantised else 0
        history = self._fit(role, title, network, step, settings, delay, train, settled)
        result: dict[str, Any] = {"history": history}
        if quantised:
            network.set_phase(QUANTIZE)
            result["ranges"] = network.ranges()
            scales = network.scales().items()
            result["scales"] = {kind: {name: s.tolist() for name, s in found.items()} for kind, found in scales}
        result["accuracy"] = self._measured(network)
        weights = {p.name: p.asnumpy() for p in network.get_parameters() if p.name in network.graph.params}
        self._save(weights, f"{role}.ckpt")
        return result

    def _dropout(self, settings: TrainSection, graph: Graph) -> Sequence[DropoutPlace]:
        """Where the original network drops values in training, if it is to; `graph` is any capture of it."""
        if not settings.dropout:
            return ()
        if not self.dropout_places:
            net = build_network(self.recipe.model.model_copy(update={"checkpoint": None}), "model")
            self.dropout_places = find_dropout(net, example_input(self.recipe), graph)
        return self.dropout_places

    def _float_cell(self, graph: Graph, settings: TrainSection, observe: Sequence[str] = ()) -> Any:
        trained = with_dropout(graph, self._dropout(settings, graph))
        return to_cell(trained, half_precision(trained, settings.amp_level, Hooks(observe=observe)))

    def _quantised_cell(self, settings: TrainSection, observe: Sequence[str]) -> QuantCell:
        """The cell to train; where a range is needed before training it is calibrated with the layer's own observer."""
        plan = self.plan
        early = {group.name for group in needed_before_training(plan)}
        if early:
            found = self._observe(self.deployed, plan, "ranges before training", None, 99.99).ranges()
            plan = plan.with_ranges({name: span for name, span in found.items() if name in early})
        dropout, amp_level = self._dropout(settings, self.captured), settings.amp_level
        return quantize_cell(
            self.captured, plan, self.recipe.quantization.batchnorm,
            observe=observe, dropout=dropout, amp_level=amp_level, learn=True, schedule=self.schedule,
        )  # fmt: skip

    def _trained_cell(self, role: str) -> QuantCell:
        ranges = {name: tuple(span) for name, span in self.folder.result(role)["ranges"].items()}
        plan = self.plan.with_ranges(ranges).with_scales(**self.folder.result(role)["scales"])
        cell = quantize_cell(self.captured, plan, self.recipe.quantization.batchnorm)
        load_weights(cell, self.folder.file(f"{role}.ckpt"))
        cell.set_phase(QUANTIZE)
        return cell

    def exported(self) -> Exported:
        """The network that is exported, in its deployed form: BatchNorm folded, biases as the device adds them."""
        ranges = self.folder.result("calibration" if self.trainings else "ptq")["ranges"]
        spans = {name: (low, high) for name, (low, high) in ranges.items()}
        if self.trainings:
            trained = self._trained_cell(self.main)
            trained.set_ranges(spans)
            graph, plan = trained.sync()
        else:
            graph, plan = self.deployed, self.plan.with_ranges(spans)
        # The plan as its cell holds it, with the clip ratios it chose for these weights.
        graph, plan = quantize_cell(graph, plan).sync()
        if self.recipe.target == "lite_arm":
            graph = round_biases(graph, plan)
        return Exported(self.recipe, self.captured, graph, plan, self.bundle.test, self.calibration)

    def _trained(self) -> dict[str, Any]:
        """What `train_recipe` returns."""
        results = {role: self.folder.result(role) for role in ("float", *self.trainings)}
        self._forget_states()
        return {
            "name": self.recipe.name,
            "recipe_sha256": self.recipe.sha(),
            "seed": self.recipe.seed,
            "metric": self.metric.to_dict(),
            "accuracy": {role: result["accuracy"] for role, result in results.items()},
            "checkpoints": {role: f"{role}.ckpt" for role in results},
            "training": {role: result["history"] for role, result in results.items() if result["history"]},
        }

    def _forget_states(self) -> None:
        """Every training is done: what would continue it is of no more use."""
        for pattern in ("*.state.npz", "*.state.*.npz", "teacher*.logits.*"):
            for state in self.folder.path.glob(pattern):
                state.unlink()

    # -- the report -----------------------------------------------------------------------------------------------
    def _report(self) -> dict[str, Any]:
        self.reporter.stage("Report")
        folder, recipe = self.folder, self.recipe
        network = self.exported()
        graph, plan = network.graph, network.plan
        samples = subset(self.bundle.test, min(_SQNR_SAMPLES, len(self.bundle.test)))
        layers = layer_table(graph, plan, self.deployed, input_batches(samples, min(64, len(samples))))
        counts = {"train": len(self.bundle.train), "test": len(self.bundle.test), "calibration": len(self.calibration)}
        result = assemble(
            recipe,
            folder.state["stages"],
            plan,
            layers,
            {"name": self.bundle.name, **counts},
            self.started,
            self.warnings,
            training_only_rows(self.captured),
        )
        write_report(result, folder.path)
        self._forget_states()
        self.reporter.say(f"{folder.file('report.html')}")
        return result


def _step_options(settings: TrainSection) -> dict[str, Any]:
    """What of a training's settings its step takes."""
    scale = LossScale.of(settings.loss_scale)
    return {"clip_grad": settings.clip_grad, "accumulate": settings.accumulate, "loss_scale": scale}


def load_weights(cell: QuantCell, file: Path) -> None:
    """Load the weights a training saved into its quantised cell, leaving the quantisers' ranges alone."""
    from msqkd.checkpoints import read_checkpoint

    stored = read_checkpoint(str(file))
    for parameter in cell.get_parameters():
        if parameter.name in cell.graph.params:
            parameter.set_data(ms.Tensor(stored[parameter.name]))
