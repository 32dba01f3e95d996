"""The trainings of a run."""

from __future__ import annotations

from typing import Any, Optional

import mindspore as ms
from mindspore import nn

from msqkd import parallel
from msqkd.data import Split
from msqkd.distill.layers import Links
from msqkd.distill.step import DistillTrainOneStepCell, Learners, Teachers
from msqkd.graph.cell import read_parameters
from msqkd.pipeline.build import (
    build_network,
    capture_network,
    training_loss,
)  # fmt: skip
from msqkd.pipeline.objects import ROLES, Objects
from msqkd.quant.fake_quant import QUANTIZE
from msqkd.recipe import TrainSection
from msqkd.train.ema import AveragingOptimizer
from msqkd.train.loop import Training, fit, steps_per_epoch
from msqkd.train.optimizer import make_optimizer
from msqkd.train.step import LossScale, TrainStep, WithLoss


def pretrain(objects: Objects) -> dict[str, Any]:
    """Train the float network from scratch and save it; returns its history."""
    settings = objects.recipe.pretrain
    assert settings is not None
    section = objects.recipe.model
    ms.set_seed(objects.recipe.seed)
    graph = capture_network(objects.recipe, build_network(section, "model"))
    objects.check_network(graph)
    network = objects.float_cell(graph, settings)
    step = TrainStep(
        WithLoss(network, training_loss(settings, graph, "pretrain"), len(graph.inputs)),
        _optimizer(objects, network, settings, network),
        **_step_options(settings),
    )
    history = _fit(objects, "pretrain", "training from scratch", network, step, settings)
    read_parameters(network, graph)
    objects.save_graph(graph, "float.ckpt")
    return history


def train(objects: Objects, role: str) -> dict[str, Any]:
    """Do the training of a role and save its weights; returns history, ranges, scales and the metric."""
    title, quantised, distilled = ROLES[role]
    settings = objects.recipe.train
    graph = objects.captured
    inputs, options = len(graph.inputs), _step_options(settings)
    teaching = objects.teaching if distilled else None
    links = teaching.links(graph) if teaching is not None else Links()
    train = objects.bundle.train
    if quantised:
        network = objects.quantised_cell(settings, links.student)
    else:
        network = objects.float_cell(graph, settings, links.student)
    if teaching is not None:
        steps = settings.epoch_size * steps_per_epoch(objects.bundle.train, settings.samples_a_step)
        loss = teaching.loss(graph, links, steps)
        optimizer = _optimizer(objects, Learners(network, loss), settings, network)
        teachers: Teachers = objects.teachers if loss.several else objects.teachers[0]
        if objects.teacher_cache is not None and objects.teacher_cache.used:
            train, teachers = objects.teacher_cache.split(objects.teachers), objects.teacher_cache.teachers
        step: TrainStep = DistillTrainOneStepCell(network, teachers, loss, optimizer, inputs=inputs, **options)
    else:
        optimizer = _optimizer(objects, network, settings, network)
        step = TrainStep(WithLoss(network, training_loss(settings, graph, "train"), inputs), optimizer, **options)
    delay = min((g.delay for g in objects.plan.groups.values() if not g.fixed), default=None) if quantised else None
    settled = max([objects.schedule.last_change(), *(step for step, _ in objects.plan.delays())]) if quantised else 0
    history = _fit(objects, role, title, network, step, settings, delay, train, settled)
    result: dict[str, Any] = {"history": history}
    if quantised:
        network.set_phase(QUANTIZE)
        result["ranges"] = network.ranges()
        scales = network.scales().items()
        result["scales"] = {kind: {name: s.tolist() for name, s in found.items()} for kind, found in scales}
    result["accuracy"] = objects.measured(network)
    weights = {p.name: p.asnumpy() for p in network.get_parameters() if p.name in network.graph.params}
    objects.save(weights, f"{role}.ckpt")
    return result


def _optimizer(objects: Objects, learners: nn.Cell, settings: TrainSection, network: nn.Cell) -> Any:
    """Over what `learners` train, with an average of the network's weights where one is wanted."""
    optimizer = make_optimizer(learners, settings, steps_per_epoch(objects.bundle.train, settings.samples_a_step))
    return optimizer if settings.ema is None else AveragingOptimizer(optimizer, network, settings.ema)


def _fit(
    objects: Objects,
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
        title=title, key=f"{objects.recipe.sha()}/{key}{workers}", network=network, step=step, settings=settings,
        train=objects.bundle.train if train is None else train,
        test=objects.bundle.test, seed=objects.recipe.seed, state_file=objects.folder.file(f"{key}.state.npz"),
        eval_batch_size=objects.recipe.data.eval_batch_size, activation_delay=delay,
        metric=objects.metric, outputs=objects.deployed_outputs, settled=settled,
    )  # fmt: skip
    return fit(training, objects.reporter).to_dict()


def _step_options(settings: TrainSection) -> dict[str, Any]:
    """What of a training's settings its step takes."""
    scale = LossScale.of(settings.loss_scale)
    return {"clip_grad": settings.clip_grad, "accumulate": settings.accumulate, "loss_scale": scale}
