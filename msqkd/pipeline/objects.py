"""What a run works with: network, plan, data, teachers, cells; each made when it is first needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Optional

import mindspore as ms
import numpy as np
from mindspore import nn

from msqkd import parallel
from msqkd.checkpoints import LoadReport, load_checkpoint, read_checkpoint, save_checkpoint
from msqkd.data import DataBundle, Split, as_tuple
from msqkd.errors import ModelError
from msqkd.graph.cell import Hooks, to_cell
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
    random_weights,
)  # fmt: skip
from msqkd.pipeline.export import Exported
from msqkd.pipeline.rundir import RunDirectory
from msqkd.pipeline.teacher_cache import TeacherCache
from msqkd.pipeline.teaching import Teaching
from msqkd.progress import Reporter
from msqkd.quant.algorithms.biases import with_biases
from msqkd.quant.algorithms.split import with_parameters
from msqkd.quant.fake_quant import QUANTIZE
from msqkd.quant.integers import round_biases
from msqkd.quant.plan import QuantPlan
from msqkd.quant.ptq import calibrate, divergence, relative_error
from msqkd.quant.qat import (
    QuantCell,
    deployment_graph,
    needed_before_training,
    quantize_cell,
    with_dropout,
)
from msqkd.quant.schedule import QatSchedule
from msqkd.recipe import Recipe, TrainSection
from msqkd.train.evaluate import input_batches, measured, output_arrays
from msqkd.train.loop import steps_per_epoch
from msqkd.train.metric import Metric, Outputs

# role of a training -> (title, quantised, distilled)
ROLES = {
    "float_ft": ("float, fine-tuned with the same budget", False, False),
    "float_kd": ("float, with the same distillation", False, True),
    "qat": ("quantisation-aware training", True, False),
    "qat_kd": ("quantisation-aware training with distillation", True, True),
}
_NO_SCALES: dict[str, dict[str, Any]] = {"weights": {}, "groups": {}}
_COMPARISONS = {"float": "float_ft", "float_kd": "float_kd", "qat": "qat"}


class Objects:
    """The objects of one run of a recipe.

    Attributes:
        recipe, folder, reporter: of the run.
        main: the role of the training whose network is exported.
        trainings: the roles of all trainings, in order; none where a calibrated float network is exported.
        output_shapes, deployed_outputs: of the network, known once it was captured.
        loaded: what each checkpoint gave its network.
    """

    def __init__(self, recipe: Recipe, folder: RunDirectory, reporter: Reporter, train: bool) -> None:
        self.recipe, self.folder, self.reporter = recipe, folder, reporter
        self.main = "qat_kd" if recipe.distillation is not None else "qat"
        others = [_COMPARISONS[name] for name in recipe.compare if _COMPARISONS[name] != self.main]
        self.trainings = [*others, self.main] if train else []
        self.output_shapes: list[tuple[int, ...]] = []
        self.deployed_outputs: list[int] = []
        self.loaded: dict[str, LoadReport] = {}
        self._dropout_places: list[DropoutPlace] = []

    def variant(self, recipe: Recipe) -> Objects:
        """The same network and data with what another recipe says of quantisation and calibration; without training."""
        other = Objects(recipe, self.folder, self.reporter, train=False)
        for name in ("metric", "bundle", "captured", "deployed"):
            other.__dict__[name] = getattr(self, name)  # where cached_property keeps what it has made
        other.output_shapes, other.deployed_outputs = self.output_shapes, self.deployed_outputs
        return other

    @cached_property
    def metric(self) -> Metric:
        """What the networks are judged by."""
        return metric_of(self.recipe)

    @cached_property
    def bundle(self) -> DataBundle:
        """The data."""
        return load_bundle(self.recipe)

    @cached_property
    def calibration(self) -> Split:
        """The samples ranges are measured on."""
        return calibration_split(self.recipe, self.bundle.train)

    def beside_calibration(self, samples: int) -> Optional[Split]:
        """Training samples that are not calibrated on, drawn likewise, at most so many; None where none is left."""
        if len(self.calibration) == len(self.bundle.train):
            return None
        return calibration_split(self.recipe, self.bundle.train, samples)

    @cached_property
    def captured(self) -> Graph:
        """The float network with its trained weights."""
        recipe = self.recipe
        if self.folder.file("float.ckpt").exists() and (self.folder.done("float") or recipe.pretrain is not None):
            section = recipe.model.model_copy(update={"checkpoint": None})
            net = build_network(section, "model")
            load_checkpoint(net, str(self.folder.file("float.ckpt")))
            graph = capture_network(recipe, net)
        else:
            net, report = load_network(recipe.model, "model")
            if report is not None:
                self.loaded["model"] = report
            graph = capture_network(recipe, net)
            weights = {name: param.data for name, param in graph.params.items()}
            warning = random_weights(recipe.model, weights, "model")
            if warning is not None:
                self.reporter.warn(warning)
        self.check_network(graph)
        return graph

    @cached_property
    def deployed(self) -> Graph:
        """The float network in its deployed form."""
        return deployment_graph(self.captured)

    @cached_property
    def ptq_graph(self) -> Graph:
        """The float network as it is calibrated: every layer has a bias where methods are to change it."""
        return with_biases(self.deployed) if self.recipe.ptq.methods else self.deployed

    def ptq_samples(self) -> Iterator[tuple[np.ndarray, ...]]:
        """The calibration samples, batch by batch."""
        return (as_tuple(batch) for batch in input_batches(self.calibration, self.calibration_batch()))

    def improved(self) -> tuple[Graph, QuantPlan]:
        """The network that was calibrated without training, with what methods made of it."""
        result = self.folder.result("ptq")
        graph = self._with_parameters("ptq.ckpt") if self.recipe.ptq.methods else self.ptq_graph
        ranges = {name: (low, high) for name, (low, high) in result["ranges"].items()}
        return graph, self.plan.with_ranges(ranges).with_scales(**result.get("scales", _NO_SCALES))

    def reference_graph(self) -> Graph:
        """What the exported network is in float: after methods that change what is computed within."""
        methods = self.recipe.ptq.methods and not self.trainings
        return self._with_parameters("ptq_reference.ckpt") if methods else self.deployed

    def _with_parameters(self, file: str) -> Graph:
        return with_parameters(self.ptq_graph, read_checkpoint(str(self.folder.file(file))))

    @cached_property
    def plan(self) -> QuantPlan:
        """The plan, without ranges; its delays are in steps where there is a training."""
        return self.in_steps(plan_graph(self.recipe, self.deployed))

    @property
    def steps_per_epoch(self) -> int:
        """Of the trainings with the settings of ``train``."""
        return steps_per_epoch(self.bundle.train, self.recipe.train.samples_a_step)

    def in_steps(self, plan: QuantPlan) -> QuantPlan:
        """The plan with its delays in steps of the training, if there is one."""
        return plan.in_steps(self.steps_per_epoch) if self.trainings else plan

    @cached_property
    def schedule(self) -> QatSchedule:
        """What of the plan is in force at which step."""
        return qat_schedule(self.recipe, self.steps_per_epoch)

    @cached_property
    def teaching(self) -> Optional[Teaching]:
        """The distillation, where the recipe has one."""
        return Teaching(self.recipe, self.loaded) if self.recipe.distillation is not None else None

    @cached_property
    def teachers(self) -> list[nn.Cell]:
        """The teachers; none without a distillation."""
        return self.teaching.cells(self.captured) if self.teaching is not None else []

    @cached_property
    def teacher_cache(self) -> Optional[TeacherCache]:
        """For the trainings with distillation, if one is still to be done."""
        taught = [role for role in self.trainings if ROLES[role][2]]
        if all(self.folder.done(role) for role in taught):
            return None
        epochs = self.recipe.train.epoch_size * len(taught)
        return TeacherCache(self.recipe, self.bundle.train, epochs, self.folder.path, self.reporter)

    def check_network(self, graph: Graph) -> None:
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
        check_classes(self.bundle, shape[1], self.training_needs_labels)

    @property
    def training_needs_labels(self) -> bool:
        """Whether anything is trained that looks at the labels of the training set."""
        if self.recipe.pretrain is not None or self.teaching is None:
            return True
        return self.teaching.needs_labels or not all(ROLES[role][2] for role in self.trainings)

    def save_graph(self, graph: Graph, name: str) -> None:
        """Write the parameters of a graph as a checkpoint."""
        self.save({key: param.data for key, param in graph.params.items()}, name)

    def save(self, weights: dict[str, np.ndarray], name: str) -> None:
        """Write a checkpoint, which is there for every worker when this ends."""
        if parallel.is_first():
            save_checkpoint(weights, self.folder.file(name))
        parallel.wait()

    def measured(self, network: Any) -> float:
        """The metric of a network with all outputs on the test set."""
        size = self.recipe.data.eval_batch_size
        return measured(network, self.bundle.test, size, self.metric, self.deployed_outputs, together=True)

    def calibration_batch(self) -> int:
        """Samples a batch in calibration."""
        return min(self.recipe.calibration.batch_size, len(self.calibration))

    def calibration_outputs(self, network: Any) -> Outputs:
        """What a network answers to the calibration samples."""
        return output_arrays(network, self.calibration, self.calibration_batch(), self.deployed_outputs)

    def reference(self) -> Outputs:
        """What the trained network is to answer: what its only teacher does, or the float network where there are
        several or that is no pattern for all that is deployed."""
        section = self.recipe.distillation
        taught = section is not None and self.deployed_outputs[0] in section.outputs
        alone = taught and self._is_classifier and len(self.teachers) == 1
        return self.calibration_outputs(self.teachers[0] if alone else to_cell(self.captured))

    @property
    def _is_classifier(self) -> bool:
        return self.metric.is_accuracy and len(self.deployed_outputs) == 1

    def calibration_loss(self, found: Outputs, reference: Outputs) -> float:
        """How far answers to the calibration samples are from those wanted; 0 where they are the same."""
        return divergence(found[0], reference[0]) if self._is_classifier else relative_error(found, reference)

    def calibrate(self, graph: Graph, plan: QuantPlan) -> QuantPlan:
        """The plan with the ranges of the calibration samples."""
        section = self.recipe.calibration
        return self.observe(graph, plan, "calibration", section.observer, section.percentile or 99.99)

    def new_warnings(self, plan: QuantPlan) -> list[str]:
        """The warnings of a calibrated plan that are not those of the plan itself."""
        return [text for text in plan.warnings if text not in self.plan.warnings]

    def observe(
        self, graph: Graph, plan: QuantPlan, title: str, observer: Optional[str], percentile: float
    ) -> QuantPlan:
        """The same with another observer; None takes each group's own."""
        size = self.calibration_batch()
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

    def dropout(self, settings: TrainSection, graph: Graph) -> Sequence[DropoutPlace]:
        """Where the original network drops values in training, if it is to; `graph` is any capture of it."""
        if not settings.dropout:
            return ()
        if not self._dropout_places:
            net = build_network(self.recipe.model.model_copy(update={"checkpoint": None}), "model")
            self._dropout_places = find_dropout(net, example_input(self.recipe), graph)
        return self._dropout_places

    def float_cell(self, graph: Graph, settings: TrainSection, observe: Sequence[str] = ()) -> Any:
        """The float network as it is trained with these settings; the values in `observe` follow its outputs."""
        trained = with_dropout(graph, self.dropout(settings, graph))
        return to_cell(trained, half_precision(trained, settings.amp_level, Hooks(observe=observe)))

    def quantised_cell(self, settings: TrainSection, observe: Sequence[str]) -> QuantCell:
        """The cell to train; where a range is needed before training it is calibrated with the layer's own observer."""
        plan = self.plan
        early = {group.name for group in needed_before_training(plan)}
        if early:
            found = self.observe(self.deployed, plan, "ranges before training", None, 99.99).ranges()
            plan = plan.with_ranges({name: span for name, span in found.items() if name in early})
        dropout, amp_level = self.dropout(settings, self.captured), settings.amp_level
        return quantize_cell(
            self.captured, plan, self.recipe.quantization.batchnorm,
            observe=observe, dropout=dropout, amp_level=amp_level, learn=True, schedule=self.schedule,
        )  # fmt: skip

    def trained_cell(self, role: str) -> QuantCell:
        """The quantised network as a finished training left it."""
        ranges = {name: tuple(span) for name, span in self.folder.result(role)["ranges"].items()}
        plan = self.plan.with_ranges(ranges).with_scales(**self.folder.result(role)["scales"])
        cell = quantize_cell(self.captured, plan, self.recipe.quantization.batchnorm)
        _load_weights(cell, self.folder.file(f"{role}.ckpt"))
        cell.set_phase(QUANTIZE)
        return cell

    def exported(self) -> Exported:
        """The network that is exported, in its deployed form: BatchNorm folded, biases as the device adds them."""
        ranges = self.folder.result("calibration" if self.trainings else "ptq")["ranges"]
        spans = {name: (low, high) for name, (low, high) in ranges.items()}
        if self.trainings:
            trained = self.trained_cell(self.main)
            trained.set_ranges(spans)
            graph, plan = trained.sync()
        else:
            graph, plan = self.improved()
        # The plan as its cell holds it, with the clip ratios it chose for these weights.
        graph, plan = quantize_cell(graph, plan).sync()
        if self.recipe.target == "lite_arm":
            graph = round_biases(graph, plan)
        return Exported(self.recipe, self.captured, graph, plan, self.bundle.test, self.calibration)


def _load_weights(cell: QuantCell, file: Path) -> None:
    """Load the weights a training saved into its quantised cell, leaving the quantisers' ranges alone."""
    stored = read_checkpoint(str(file))
    for parameter in cell.get_parameters():
        if parameter.name in cell.graph.params:
            parameter.set_data(ms.Tensor(stored[parameter.name]))
