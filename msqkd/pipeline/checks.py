"""What must be refused is refused before anything is computed."""

from __future__ import annotations

from functools import partial
from typing import Any

import mindspore as ms
import numpy as np

from msqkd.errors import ModelError, PlanError
from msqkd.graph.gradients import untrainable
from msqkd.graph.ir import Graph
from msqkd.pipeline.build import (
    plan_recipe,
    training_loss,
    try_loss,
)  # fmt: skip
from msqkd.pipeline.conversion import AUTO, OFF, chosen_converter
from msqkd.pipeline.export import preflight
from msqkd.pipeline.objects import ROLES, Objects
from msqkd.quant.plan import QuantPlan
from msqkd.quant.qat import (
    deployment_graph,
    training_graph,
    with_dropout,
)
from msqkd.recipe import TrainSection
from msqkd.train.loop import steps_per_epoch
from msqkd.train.optimizer import check_decay
from msqkd.words import percent


def check_run(objects: Objects) -> tuple[Graph, Graph, QuantPlan]:
    """Refuse now what would fail after hours of training.

    Returns:
        The captured network with the weights of now, its deployed form, and the plan.

    Raises:
        MsqkdError: whatever the user can mend.
    """
    _ = objects.metric
    pretrain = objects.recipe.pretrain
    if pretrain is None or objects.folder.done("float"):
        captured, graph, plan = objects.captured, objects.deployed, objects.plan
    else:
        captured, plan = plan_recipe(objects.recipe)
        objects.check_network(captured)
        graph = deployment_graph(captured)
        steps_per_epoch(objects.bundle.train, pretrain.samples_a_step)
    _check_plan(objects, plan)
    if objects.trainings and objects.recipe.train.dropout:
        places = objects.dropout(objects.recipe.train, captured)
        with_dropout(training_graph(captured, objects.recipe.quantization.batchnorm), places)
    if objects.recipe.verify.converter not in (AUTO, OFF):
        chosen_converter(objects.recipe.verify.converter)
    preflight(objects.recipe, graph, plan)
    _check_trainings(objects, captured)
    _check_gradients(objects, captured)
    _try_losses(objects, captured)
    if objects.trainings and objects.teaching is not None:
        objects.teaching.check(captured, objects.bundle.train.batch(np.arange(1))[0])
    if objects.teacher_cache is not None:
        objects.teacher_cache.decide(captured)
    return captured, graph, plan


def _sections(objects: Objects) -> dict[str, TrainSection]:
    """The settings of the trainings still to be done, by their keys."""
    pretrain = None if objects.folder.done("float") else objects.recipe.pretrain
    sections = {"pretrain": pretrain, "train": objects.recipe.train if objects.trainings else None}
    return {where: section for where, section in sections.items() if section is not None}


def _check_trainings(objects: Objects, graph: Graph) -> None:
    names = [name for name, parameter in graph.params.items() if parameter.trainable]
    for where, section in _sections(objects).items():
        check_decay(section, names, where)
        if section.amp_level != "O0" and ms.get_context("device_target") == "CPU":
            text = f"{where}.amp_level: {section.amp_level} computes in float16, which saves no time on CPU"
            objects.reporter.warn(text)


def _check_gradients(objects: Objects, captured: Graph) -> None:
    """Refuse a training whose backward pass the backend cannot compute.

    Raises:
        ModelError: names the operation and a form that can be trained.
    """
    mode = objects.recipe.quantization.batchnorm
    for where, section in _sections(objects).items():
        quantised = where == "train" and all(ROLES[role][1] for role in objects.trainings)
        reason = untrainable(training_graph(captured, mode) if quantised else captured, section.amp_level)
        if reason is not None:
            raise ModelError(f"{where}: {reason}")


def _try_losses(objects: Objects, graph: Graph) -> None:
    """Losses against the labels that may not fit are computed once, before anything is trained."""
    recipe, teaching = objects.recipe, objects.teaching
    fits = objects.metric.is_accuracy and len(objects.output_shapes[0]) == 2  # labels are numbers of its classes then
    tried: list[Any] = []
    for where, section in _sections(objects).items():
        if fits and section.loss is None:
            continue
        named = recipe.distillation is not None and recipe.distillation.hard_loss != "train_loss"
        unused = where == "train" and section.loss is None and named and objects.trainings == [objects.main]
        if not unused and (section.loss, section.loss_args) not in tried:
            what = f"'{section.loss}'" if section.loss is not None else "the cross-entropy of the first output"
            make = partial(training_loss, section, graph, where)
            try_loss(make, graph, objects.bundle.train, f"{where}.loss: {what}")
            tried.append((section.loss, section.loss_args))
    if teaching is not None and objects.trainings and not fits:
        hard = teaching.named_hard_loss()
        if hard is not None:
            place = "distillation.hard_loss: the cross-entropy of the first output"
            try_loss(lambda: hard, graph, objects.bundle.train, place)


def _check_plan(objects: Objects, plan: QuantPlan) -> None:
    if not plan.weights and not plan.half_nodes():
        share = f"int8 share {percent(plan.int8_share())}"
        raise PlanError(f"no layer of {plan.network} can be quantised on {objects.recipe.target} ({share})")
    if not objects.trainings:
        return
    plan = objects.in_steps(plan)
    steps = objects.recipe.train.epoch_size * objects.steps_per_epoch
    late = next(((delay, name) for delay, name in plan.delays() if delay >= steps), None)
    if late:
        raise PlanError(
            f"quantization.activation.delay is {late[0]} steps, but the training has {steps}: "
            f"'{late[1]}' would never be quantised; choose a smaller delay or more epochs"
        )
    if objects.schedule.last_change() >= steps:
        raise PlanError(
            f"quantization.schedule changes something at step {objects.schedule.last_change()}, counted from 0, but "
            f"the training has {steps}; choose shorter intervals or more epochs"
        )
