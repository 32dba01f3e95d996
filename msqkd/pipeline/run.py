"""`msqkd run`: the whole chain, stage by stage; a finished stage is not done again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, Literal, Optional

import mindspore as ms
import numpy as np
from mindspore import nn

from msqkd.analysis.layers import layer_table
from msqkd.analysis.report import write_report
from msqkd.checkpoints import LoadReport, load_checkpoint, save_checkpoint
from msqkd.data import DataBundle, Split, as_tuple, subset
from msqkd.distill.step import DistillTrainOneStepCell
from msqkd.errors import ModelError, PlanError
from msqkd.files import write_json
from msqkd.graph.cell import read_parameters, to_cell
from msqkd.graph.ir import Graph
from msqkd.graph.passes.restore_dropout import DropoutPlace, find_dropout
from msqkd.pipeline.build import (
    build_network,
    calibration_split,
    capture_network,
    check_classes,
    check_numbers,
    distill_loss,
    example_input,
    load_bundle,
    load_network,
    metric_of,
    plan_graph,
    training_loss,
    try_loss,
)  # fmt: skip
from msqkd.pipeline.export import Exported, deviation_words, export_files, preflight
from msqkd.pipeline.result import assemble, training_only_rows
from msqkd.pipeline.rundir import RunDirectory
from msqkd.progress import Reporter
from msqkd.quant.config import INT8
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
from msqkd.recipe import Recipe, TrainSection
from msqkd.train.evaluate import input_batches, measured, output_arrays
from msqkd.train.loop import Training, fit, steps_per_epoch
from msqkd.train.metric import Metric, Outputs
from msqkd.train.optimizer import make_optimizer
from msqkd.train.step import TrainStep, WithLoss
from msqkd.user_code import reason_of

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

    Args:
        recipe: what to do.
        output: the folder; created when it does not exist.
        reporter: where progress is told.
        fresh: forget an earlier run in the folder.
        train: False leaves the trainings out and exports the calibrated float network (PTQ).

    Raises:
        MsqkdError: whatever the user can mend.
    """
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_seed(recipe.seed)
    folder = RunDirectory(output, recipe, fresh, verb="run" if train else "calibrate")
    return _Run(recipe, folder, reporter or Reporter(), train).run()


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
        if self.trainings:
            self._calibration()
        self._export()
        return self._report()

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
            steps_per_epoch(self.bundle.train, pretrain.batch_size)
        self._check_plan(plan)
        if self.trainings and self.recipe.train.dropout:
            places = self._dropout(self.recipe.train, captured)
            with_dropout(training_graph(captured, self.recipe.quantization.batchnorm), places)
        preflight(self.recipe, graph, plan)
        self._try_losses(captured)
        if self.trainings and self.recipe.distillation is not None and self.recipe.teacher.source != "self":
            _ = self.other_teacher

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
        untrained = self.folder.result("ptq" if quantised else "float")["accuracy"]
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
            found = self._calibrate(graph, plan).ranges()
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
            net = self._loaded_network("model")
        graph = capture_network(recipe, net)
        self._check_network(graph)
        return graph

    @cached_property
    def deployed(self) -> Graph:
        return deployment_graph(self.captured)

    @cached_property
    def plan(self) -> QuantPlan:
        return plan_graph(self.recipe, self.deployed)

    @cached_property
    def teacher(self) -> Any:
        return to_cell(self.captured) if self.recipe.teacher.source == "self" else self.other_teacher

    def _loaded_network(self, role: Literal["model", "teacher"]) -> Any:
        """The network of a section; what its checkpoint gave it is noted."""
        net, report = load_network(self.recipe.model if role == "model" else self.recipe.teacher, role)
        if report is not None:
            self.loaded[role] = report
        return net

    @cached_property
    def other_teacher(self) -> Any:
        """A teacher that is not the float network itself, found to answer what the student is asked."""
        net = self._loaded_network("teacher")
        sample = [ms.Tensor(array) for array in as_tuple(self.bundle.train.batch(np.arange(1))[0])]
        try:
            found = net(*sample)
        except Exception as error:  # MindSpore raises whatever its compiler met
            shapes = " and ".join(str(tuple(item.shape)) for item in sample)
            raise ModelError(
                f"teacher: it cannot take the student's input of shape {shapes}: {reason_of(error)}"
            ) from error
        outputs = found if isinstance(found, tuple) else (found,)
        assert self.recipe.distillation is not None
        for number in self.recipe.distillation.outputs:
            if number >= len(outputs):
                raise ModelError(
                    f"teacher: it has {len(outputs)} outputs, and no output {number} for distillation.outputs"
                )
            shape, wanted = tuple(outputs[number].shape), self.output_shapes[number]
            wanted = tuple(1 if size < 0 else size for size in wanted[:1]) + wanted[1:]
            if len(shape) != len(wanted) or any(b not in (a, -1) for a, b in zip(shape, wanted)):
                which = "answers have" if number == 0 else f"output {number} has"
                raise ModelError(
                    f"teacher: its {which} shape {shape}, the student's {wanted}; they must have the same classes"
                )
        return net

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
        check_classes(self.bundle, shape[1])

    def _try_losses(self, graph: Graph) -> None:
        """Losses against the labels that may not fit are computed once, before anything is trained."""
        recipe = self.recipe
        sections = {"pretrain": None if self.folder.done("float") else recipe.pretrain}
        sections["train"] = recipe.train if self.trainings else None
        tried: list[Any] = []
        for where, section in sections.items():
            if section is None or (self.metric.is_accuracy and section.loss is None):
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
        train = self.recipe.train
        steps = train.epoch_size * steps_per_epoch(self.bundle.train, train.batch_size)
        delays = [(group.delay, group.name) for group in plan.groups.values()]
        delays += [(quant.delay, f"the input of {quant.node}") for quant in plan.dynamic.values()]
        late = next(((delay, name) for delay, name in delays if delay >= steps), None)
        if late:
            raise PlanError(
                f"quantization.activation.delay is {late[0]} steps, but the training has {steps}: "
                f"'{late[1]}' would never be quantised; choose a smaller delay or more epochs"
            )

    def _save_graph(self, graph: Graph, name: str) -> None:
        save_checkpoint({key: param.data for key, param in graph.params.items()}, self.folder.file(name))

    def _calibration_batch(self) -> int:
        return min(self.recipe.calibration.batch_size, len(self.calibration))

    def _measured(self, network: Any) -> float:
        """The metric of a network with all outputs on the test set."""
        size = self.recipe.data.eval_batch_size
        return measured(network, self.bundle.test, size, self.metric, self.deployed_outputs)

    def _calibration_outputs(self, network: Any) -> Outputs:
        return output_arrays(network, self.calibration, self._calibration_batch(), self.deployed_outputs)

    def _reference(self) -> Outputs:
        """What the trained network is to answer: what its teacher does, or the float network where that is no pattern
        for all that is deployed."""
        section = self.recipe.distillation
        taught = section is not None and self.deployed_outputs[0] in section.outputs
        return self._calibration_outputs(self.teacher if taught and self._is_classifier else to_cell(self.captured))

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
        network = to_cell(with_dropout(graph, self._dropout(settings, graph)))
        step = TrainStep(
            WithLoss(network, training_loss(settings, graph, "pretrain"), len(graph.inputs)),
            self._optimizer(network, settings),
            settings.clip_grad,
        )
        history = self._fit("pretrain", "training from scratch", network, step, settings)
        read_parameters(network, graph)
        self._save_graph(graph, "float.ckpt")
        return history

    def _optimizer(self, network: nn.Cell, settings: TrainSection) -> nn.Optimizer:
        return make_optimizer(network, settings, steps_per_epoch(self.bundle.train, settings.batch_size))

    def _fit(
        self, key: str, title: str, network: Any, step: TrainStep, settings: TrainSection, delay: Optional[int] = None
    ) -> dict[str, Any]:
        training = Training(
            title=title, key=f"{self.recipe.sha()}/{key}", network=network, step=step, settings=settings,
            train=self.bundle.train,
            test=self.bundle.test, seed=self.recipe.seed, state_file=self.folder.file(f"{key}.state.npz"),
            eval_batch_size=self.recipe.data.eval_batch_size, activation_delay=delay,
            metric=self.metric, outputs=self.deployed_outputs,
        )  # fmt: skip
        return fit(training, self.reporter).to_dict()

    def _train(self, role: str) -> dict[str, Any]:
        title, quantised, distilled = _ROLES[role]
        settings = self.recipe.train
        dropout = self._dropout(settings, self.captured)
        network = self._quantised_cell(dropout) if quantised else to_cell(with_dropout(self.captured, dropout))
        optimizer = self._optimizer(network, settings)
        graph, clip = self.captured, settings.clip_grad
        inputs = len(graph.inputs)
        loss = distill_loss(self.recipe, graph) if distilled else None
        if loss is not None:
            step: TrainStep = DistillTrainOneStepCell(network, self.teacher, loss, optimizer, clip, inputs)
        else:
            step = TrainStep(WithLoss(network, training_loss(settings, graph, "train"), inputs), optimizer, clip)
        delay = min((g.delay for g in self.plan.groups.values() if not g.fixed), default=None) if quantised else None
        history = self._fit(role, title, network, step, settings, delay)
        result: dict[str, Any] = {"history": history}
        if quantised:
            network.set_phase(QUANTIZE)
            result["ranges"] = network.ranges()
        result["accuracy"] = self._measured(network)
        weights = {p.name: p.asnumpy() for p in network.get_parameters() if p.name in network.graph.params}
        save_checkpoint(weights, self.folder.file(f"{role}.ckpt"))
        return result

    def _dropout(self, settings: TrainSection, graph: Graph) -> Sequence[DropoutPlace]:
        """Where the original network drops values in training, if it is to; `graph` is any capture of it."""
        if not settings.dropout:
            return ()
        if not self.dropout_places:
            net = build_network(self.recipe.model.model_copy(update={"checkpoint": None}), "model")
            self.dropout_places = find_dropout(net, example_input(self.recipe), graph)
        return self.dropout_places

    def _quantised_cell(self, dropout: Sequence[DropoutPlace]) -> QuantCell:
        """The cell to train; where a range is needed before training it is calibrated with the layer's own observer."""
        plan = self.plan
        early = {group.name for group in needed_before_training(plan)}
        if early:
            found = self._observe(self.deployed, plan, "ranges before training", None, 99.99).ranges()
            plan = plan.with_ranges({name: span for name, span in found.items() if name in early})
        return quantize_cell(self.captured, plan, self.recipe.quantization.batchnorm, dropout=dropout)

    def _trained_cell(self, role: str) -> QuantCell:
        ranges = {name: tuple(span) for name, span in self.folder.result(role)["ranges"].items()}
        cell = quantize_cell(self.captured, self.plan.with_ranges(ranges), self.recipe.quantization.batchnorm)
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
        for state in folder.path.glob("*.state.npz"):
            state.unlink()
        self.reporter.say(f"{folder.file('report.html')}")
        return result


def load_weights(cell: QuantCell, file: Path) -> None:
    """Load the weights a training saved into its quantised cell, leaving the quantisers' ranges alone."""
    from msqkd.checkpoints import read_checkpoint

    stored = read_checkpoint(str(file))
    for parameter in cell.get_parameters():
        if parameter.name in cell.graph.params:
            parameter.set_data(ms.Tensor(stored[parameter.name]))
