"""The calls a Python user makes: record settings on cells, prepare, calibrate, export."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any, Optional, Union

import numpy as np
from mindspore import Tensor, nn

from msqkd.errors import CaptureError, DataError, ExportError, PlanError, did_you_mean
from msqkd.exporters import export as _export_formats
from msqkd.files import PathLike
from msqkd.graph.batches import check_shapes
from msqkd.graph.capture import capture, sample_shapes
from msqkd.graph.gradients import untrainable
from msqkd.graph.ir import Graph
from msqkd.graph.load import load_mindir
from msqkd.graph.passes.fold_batchnorm import BATCHNORM_MODES
from msqkd.graph.passes.restore_dropout import find_dropout
from msqkd.quant.algorithms.base import Method
from msqkd.quant.algorithms.methods import improve
from msqkd.quant.config import QuantConfig, Rule
from msqkd.quant.fake_quant import QUANTIZE
from msqkd.quant.integers import round_biases
from msqkd.quant.placement import make_plan
from msqkd.quant.plan import QuantPlan
from msqkd.quant.presets import preset as find_preset
from msqkd.quant.ptq import (
    CALIBRATION_OBSERVER,
    Batches,
    batches_of,
    calibrate,
    in_random_order,
    keep_trained,
    samples_of,
)
from msqkd.quant.qat import QuantCell, deployment_graph, needed_before_training, quantize_cell, training_graph
from msqkd.quant.schedule import DIRECT, QatSchedule

_CONFIG = "_msqkd_quant_config"

Network = Union[nn.Cell, PathLike]
"""A network, or the path of a MindIR file that holds one."""
_PATHS = (str, os.PathLike)


def QuantizationAwareTraining(cell: nn.Cell, quant_config: Optional[QuantConfig] = None) -> nn.Cell:  # noqa: N802
    """Record how `cell`, a network or a part of one, is to be quantised; returns the cell itself, unchanged.

    A setting on an inner cell takes the place of one on a cell around it. `prepare_qat` reads the records.

    Raises:
        PlanError: `quant_config` is not a QuantConfig.
    """
    config = QuantConfig() if quant_config is None else quant_config
    if not isinstance(config, QuantConfig):
        raise PlanError(f"quant_config is a {type(config).__name__}; allowed: a QuantConfig")
    object.__setattr__(cell, _CONFIG, config)
    return cell


def recorded_rules(net: Network) -> tuple[QuantConfig, list[Rule]]:
    """The default settings and the path rules that `QuantizationAwareTraining` recorded on `net` and its cells.

    Without any record the whole net has the default settings; with records on sub-cells alone, the rest of the net has
    them too. On a MindIR file nothing can be recorded.
    """
    if isinstance(net, _PATHS):
        return QuantConfig(), []
    default = getattr(net, _CONFIG, None) or QuantConfig()
    rules = [
        Rule("path", path, config.as_changes(), f"QuantizationAwareTraining({path})")
        for path, cell in net.cells_and_names()
        if path and (config := getattr(cell, _CONFIG, None)) is not None
    ]
    return default, rules


def plan_network(
    net: Network,
    example_input: Any = None,
    config: Optional[QuantConfig] = None,
    rules: Sequence[Rule] = (),
    target: str = "lite_arm",
    preset: Optional[str] = None,
) -> tuple[Graph, QuantPlan]:
    """Capture `net` and decide how each layer is computed on `target`; nothing is trained or changed.

    Args:
        net: the float network, or the path of a MindIR file (see `msqkd.graph.load.load_mindir`).
        example_input: a Tensor, a tuple of Tensors, or a sample shape (C, H, W); not needed for a file.
        config: default settings; those recorded on the net when not given.
        rules: rules beside those recorded on cells.
        target: the runtime.
        preset: ``cnn``, ``mobile``, ``transformer`` or ``detector`` (see `msqkd.quant.presets`): its settings stand in
            for those not given, its rules come before all others.

    Returns:
        The captured graph and its plan.

    Raises:
        CaptureError: the network cannot be captured, the file not be read, or the example is not what it takes.
        PlanError: an input has another floating type than float32, the preset is unknown, or a rule matches nothing.
    """
    graph = _graph_of(net, example_input)
    _check_types(graph)
    deployed = deployment_graph(graph)
    default, recorded = recorded_rules(net)
    if preset is not None:
        family = find_preset(preset)
        default = getattr(net, _CONFIG, None) or family.config
        recorded = [*family.rules_for(deployed), *recorded]
    return graph, make_plan(deployed, config or default, [*recorded, *rules], target)


def _check_types(graph: Graph) -> None:
    """Refuse what no sample could be fed to: samples are read as float32, integers or booleans."""
    for name in graph.inputs:
        kind = graph.values[name].type
        if kind is not None and kind.dtype.startswith("float") and kind.dtype != "float32":
            raise PlanError(
                f"{graph.name}: its input '{name}' is {kind.dtype}; allowed: float32, integers and booleans; give a "
                f"float32 example, and where parameters are {kind.dtype} convert them first, with "
                "parameter.set_dtype(mindspore.float32)"
            )


def _graph_of(net: Network, example_input: Any) -> Graph:
    if not isinstance(net, _PATHS):
        return capture(net, example_input)
    graph = load_mindir(net)
    if example_input is not None:
        found = sample_shapes(example_input)
        needed = [graph.shape(name)[1:] for name in graph.inputs]
        if found != needed:
            raise CaptureError(f"{net}: the example input has samples of shape {found}, the network takes {needed}")
    return graph


def prepare_qat(
    net: Network,
    example_input: Any = None,
    config: Optional[QuantConfig] = None,
    *,
    rules: Sequence[Rule] = (),
    batchnorm: str = "fold",
    target: str = "lite_arm",
    preset: Optional[str] = None,
    dropout: bool = False,
    calib_dataset: Optional[Batches] = None,
    schedule: QatSchedule = DIRECT,
) -> QuantCell:
    """The trainable quantised cell of `net`, with the settings recorded by `QuantizationAwareTraining`.

    Args:
        net: the float network, or the path of a MindIR file; it is not changed.
        example_input: a Tensor, a tuple of Tensors, or a sample shape (C, H, W); not needed for a file.
        config: default settings; those recorded on the net when not given.
        rules: rules beside those recorded on cells.
        batchnorm: ``fold``, ``freeze`` or ``live`` (see `msqkd.graph.passes.fold_batchnorm`).
        target, preset: as in `plan_network`.
        dropout: in training mode, drop what the network's own dropout cells would (see
            `msqkd.graph.passes.restore_dropout`).
        calib_dataset: unlabelled batches; needed where activations are quantised from the first step, or by an
            observer that cannot watch while training (percentile, kl, mse).
        schedule: what of it is in force at which step (`msqkd.quant.schedule`).

    Raises:
        PlanError: a rule matches nothing, ranges are needed and `calib_dataset` is not given, the backend cannot
            compute the gradient of an operation, or a dropout has no place in the form that is trained (a MindIR file
            has none at all).
    """
    if dropout and isinstance(net, _PATHS):
        raise PlanError(f"dropout: {net} was exported without it; give the network's cell")
    graph, plan = plan_network(net, example_input, config, rules, target, preset)
    places = find_dropout(net, example_input, graph) if dropout else []
    if batchnorm not in BATCHNORM_MODES:
        raise PlanError(
            f"batchnorm is '{batchnorm}'; allowed: {', '.join(BATCHNORM_MODES)}"
            f"{did_you_mean(batchnorm, BATCHNORM_MODES)}"
        )
    reason = untrainable(training_graph(graph, batchnorm))
    if reason is not None:
        raise PlanError(reason)
    early = needed_before_training(plan)
    if calib_dataset is not None:
        plan = calibrate(deployment_graph(graph), plan, calib_dataset)
    elif early:
        why = (
            "act_quant_delay is 0"
            if early[0].delay == 0
            else f"the observer '{early[0].observer}' cannot watch while training"
        )
        raise PlanError(
            f"value '{early[0].name}' needs a range before training ({why}): give calib_dataset, or set act_quant_delay"
        )
    return quantize_cell(graph, plan, batchnorm, dropout=places, learn=True, schedule=schedule)


class PTQNetwork:
    """A network on its way through calibration; `quantize` completes it."""

    def __init__(
        self,
        graph: Graph,
        plan: QuantPlan,
        dataset: Optional[Batches],
        iterations: Optional[int],
        methods: Sequence[Method] = (),
        observer: Optional[str] = None,
    ) -> None:
        self.graph, self.plan, self.dataset, self.iterations = graph, plan, dataset, iterations
        self.methods, self.observer = tuple(methods), observer


def create_ptq_network(
    network: Network,
    config: Optional[QuantConfig] = None,
    calib_dataset: Optional[Batches] = None,
    calib_iteration: Optional[int] = None,
    *,
    example_input: Any = None,
    rules: Sequence[Rule] = (),
    target: str = "lite_arm",
    preset: Optional[str] = None,
    methods: Sequence[Method] = (),
) -> PTQNetwork:
    """Prepare a float network, or one trained by `prepare_qat`, for calibration.

    Args:
        network: a float cell, the path of a MindIR file, or a QuantCell whose ranges are to be found anew. Its weights
            are not touched, and scales that were trained (LSQ, PACT) keep their values. The ranges of a cell from
            `prepare_qat` are found with the observer a recipe calibrates with: percentile 99.99.
        config: default settings; recorded ones or the QuantCell's own when not given, and where nothing is recorded
            those of `preset` or of `QuantConfig`, with the observer a recipe calibrates with (a moving average suits
            training, where it has many steps).
        calib_dataset: batches; may be given to `quantize` instead. Of a batch that is a tuple the network takes the
            first arrays, as many as it has inputs; labels behind them are not read.
        calib_iteration: how many batches are used, from the first on (all by default). The set is read in its own
            order: shuffle a set that is sorted by class before you take a part of it.
        example_input: a Tensor, a tuple of Tensors (needed where the network has several inputs) or a sample shape; by
            default the first array of `calib_dataset`.
        rules, target, preset: as in `plan_network`; not for a QuantCell, which has its plan.
        methods: what is done to the weights so that less is lost (see `msqkd.quant.algorithms`), in order, for instance
            ``[Equalize(), AdaRound(iterations=500), BiasCorrection()]``; not for a QuantCell, whose weights are
            trained. All samples are then in memory at once.

    Raises:
        PlanError: a QuantCell is given together with other settings.
        DataError: neither `example_input` nor data that could stand for it (uint8 cannot).
    """
    if calib_iteration is not None and calib_iteration < 1:
        raise PlanError(f"calib_iteration is {calib_iteration}; allowed: 1 or more")
    if isinstance(network, QuantCell):
        if config is not None or rules or preset is not None or methods:
            raise PlanError(
                "the network already has its quantisation plan; leave out config, rules, preset and methods, or give "
                "the float network"
            )
        graph, plan = network.sync()
        observer = CALIBRATION_OBSERVER if network.is_trainable else None
        return PTQNetwork(graph, plan, calib_dataset, calib_iteration, observer=observer)
    if example_input is None and not isinstance(network, _PATHS):
        if calib_dataset is None:
            raise DataError("create_ptq_network needs example_input, or calib_dataset to take its shape from")
        stream = batches_of(calib_dataset)
        first = next(stream, None)
        if first is None:
            raise DataError("the calibration set has 0 samples; give at least one batch")
        if first[0].dtype == np.uint8:
            raise DataError(
                "the first array of calib_dataset is uint8, and networks seldom take that; convert the samples as for "
                "inference, for instance to float32 (image / 255 - mean) / std, or give example_input"
            )
        if iter(calib_dataset) is calib_dataset:  # read once: the batch looked at must not be lost
            calib_dataset = chain([first], stream)
        example_input = Tensor(first[0])
    if config is None and getattr(network, _CONFIG, None) is None:
        config = replace(find_preset(preset).config if preset else QuantConfig(), act_observer=CALIBRATION_OBSERVER)
    graph, plan = plan_network(network, example_input, config, rules, target, preset)
    return PTQNetwork(deployment_graph(graph), plan, calib_dataset, calib_iteration, methods)


def quantize(ptq_net: PTQNetwork, calib_dataset: Optional[Batches] = None) -> QuantCell:
    """Find every range on the calibration samples and return the quantised cell, in evaluation mode.

    A range that is far too wide for its values is a warning of Python's, and of the cell's plan.

    Raises:
        DataError: no samples, or samples of another shape than the network takes.
    """
    dataset = calib_dataset if calib_dataset is not None else ptq_net.dataset
    if dataset is None:
        raise DataError("quantize needs calib_dataset: none was given here or to create_ptq_network")
    graph, plan = ptq_net.graph, ptq_net.plan
    if ptq_net.methods:
        held = list(islice(samples_of(dataset, graph), ptq_net.iterations))
        if not held:
            raise DataError("the calibration set has 0 samples; give at least one batch")
        for number, batch in enumerate(held, start=1):
            check_shapes(graph, batch, f"batch {number} of the calibration set")
        held = in_random_order(held, seed=0)
        found = improve(graph, plan, ptq_net.methods, lambda: iter(held), lambda g, p: calibrate(g, p, held))
        graph, plan = found.graph, found.plan
    else:
        calibrated = calibrate(graph, plan, dataset, iterations=ptq_net.iterations, observer=ptq_net.observer)
        plan = keep_trained(plan, calibrated)
    for text in plan.warnings[len(ptq_net.plan.warnings) :]:
        warnings.warn(text, stacklevel=2)
    cell = quantize_cell(round_biases(graph, plan), plan)
    cell.set_phase(QUANTIZE)
    return cell


def export(quantized_net: QuantCell, x: Any, file_name: str, file_format: str = "MINDIR") -> str:
    """Write a quantised network to a file; returns its path.

    Args:
        quantized_net: from `quantize` or `prepare_qat`, with every range known.
        x: an example input (Tensor, array or sample shape), checked against the network's input; a tuple of Tensors or
            arrays where it has several.
        file_name: with or without the format's suffix.
        file_format: ``MINDIR`` (float weights with FakeQuantParam markers, for MindSpore Lite's converter),
            ``MINDIR_PORTABLE`` (int8 weights and ordinary operations; MindSpore loads and runs it), ``MINDIR_DIRECT``
            (float weights and ordinary operations, for MindSpore Lite's MindIR loader), ``MS`` (int8, for MindSpore
            Lite on the device, without its converter), ``MS_WEIGHT`` (the same with float computation), ``MS_FLOAT``,
            ``MINDIR_ASCEND`` or ``ONNX``.

    Raises:
        ExportError: an unknown format, an input of another shape, or a network that cannot be written.
        PlanError: a range is missing.
    """
    if not isinstance(quantized_net, QuantCell):
        raise ExportError(
            f"export takes a quantised network, found a {type(quantized_net).__name__}; make one with prepare_qat, or "
            "create_ptq_network and quantize"
        )
    graph, plan = quantized_net.sync()
    several = isinstance(x, (tuple, list)) and len(x) > 0 and all(hasattr(item, "shape") for item in x)
    shapes = [_shape_of(item) for item in (x if several else (x,))]
    return str(_export_formats(graph, plan, file_name, file_format, example_shapes=shapes))


def _shape_of(example: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in (example.shape if hasattr(example, "shape") else np.asarray(example).tolist()))
