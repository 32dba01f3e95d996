"""The calls a Python user makes: record settings on cells, prepare, calibrate, export."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, Optional

import numpy as np
from mindspore import nn

from msqkd.errors import DataError, ExportError, PlanError, did_you_mean
from msqkd.exporters import export as _export_formats
from msqkd.graph.capture import capture
from msqkd.graph.ir import Graph
from msqkd.graph.passes.fold_batchnorm import BATCHNORM_MODES
from msqkd.quant.config import QuantConfig, Rule
from msqkd.quant.fake_quant import IN_GRAPH_OBSERVERS, QUANTIZE
from msqkd.quant.integers import round_biases
from msqkd.quant.placement import make_plan
from msqkd.quant.plan import QuantPlan
from msqkd.quant.presets import preset as find_preset
from msqkd.quant.ptq import Batches, batches_of, calibrate
from msqkd.quant.qat import QuantCell, deployment_graph, quantize_cell

_CONFIG = "_msqkd_quant_config"


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


def recorded_rules(net: nn.Cell) -> tuple[QuantConfig, list[Rule]]:
    """The default settings and the path rules that `QuantizationAwareTraining` recorded on `net` and its cells.

    Without any record the whole net has the default settings; with records on sub-cells alone, the rest of the net has
    them too.
    """
    default = getattr(net, _CONFIG, None) or QuantConfig()
    rules = [
        Rule("path", path, config.as_changes(), f"QuantizationAwareTraining({path})")
        for path, cell in net.cells_and_names()
        if path and (config := getattr(cell, _CONFIG, None)) is not None
    ]
    return default, rules


def plan_network(
    net: nn.Cell,
    example_input: Any,
    config: Optional[QuantConfig] = None,
    rules: Sequence[Rule] = (),
    target: str = "lite_arm",
    preset: Optional[str] = None,
) -> tuple[Graph, QuantPlan]:
    """Capture `net` and decide how each layer is computed on `target`; nothing is trained or changed.

    Args:
        net: the float network.
        example_input: a Tensor, a tuple of Tensors, or a sample shape (C, H, W).
        config: default settings; those recorded on the net when not given.
        rules: rules beside those recorded on cells.
        target: the runtime.
        preset: ``cnn``, ``mobile``, ``transformer`` or ``detector`` (see `msqkd.quant.presets`): its settings stand in
            for those not given, its rules come before all others.

    Returns:
        The captured graph and its plan.

    Raises:
        PlanError: the preset is unknown, or a rule matches nothing.
    """
    graph = capture(net, example_input)
    deployed = deployment_graph(graph)
    default, recorded = recorded_rules(net)
    if preset is not None:
        family = find_preset(preset)
        default = getattr(net, _CONFIG, None) or family.config
        recorded = [*family.rules_for(deployed), *recorded]
    return graph, make_plan(deployed, config or default, [*recorded, *rules], target)


def prepare_qat(
    net: nn.Cell,
    example_input: Any,
    config: Optional[QuantConfig] = None,
    *,
    rules: Sequence[Rule] = (),
    batchnorm: str = "fold",
    target: str = "lite_arm",
    preset: Optional[str] = None,
    calib_dataset: Optional[Batches] = None,
) -> QuantCell:
    """The trainable quantised cell of `net`, with the settings recorded by `QuantizationAwareTraining`.

    Args:
        net: the float network; it is not changed.
        example_input: a Tensor, a tuple of Tensors, or a sample shape (C, H, W).
        config: default settings; those recorded on the net when not given.
        rules: rules beside those recorded on cells.
        batchnorm: ``fold``, ``freeze`` or ``live`` (see `msqkd.graph.passes.fold_batchnorm`).
        target, preset: as in `plan_network`.
        calib_dataset: unlabelled batches; needed where activations are quantised from the first step, or by an
            observer that cannot watch while training (percentile, kl, mse).

    Raises:
        PlanError: a rule matches nothing, or ranges are needed and `calib_dataset` is not given.
    """
    graph, plan = plan_network(net, example_input, config, rules, target, preset)
    if batchnorm not in BATCHNORM_MODES:
        raise PlanError(
            f"batchnorm is '{batchnorm}'; allowed: {', '.join(BATCHNORM_MODES)}"
            f"{did_you_mean(batchnorm, BATCHNORM_MODES)}"
        )
    early = [g for g in plan.groups.values() if g.delay == 0 or g.observer not in IN_GRAPH_OBSERVERS]
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
    return quantize_cell(graph, plan, batchnorm)


class PTQNetwork:
    """A network on its way through calibration; `quantize` completes it."""

    def __init__(self, graph: Graph, plan: QuantPlan, dataset: Optional[Batches], iterations: Optional[int]) -> None:
        self.graph, self.plan, self.dataset, self.iterations = graph, plan, dataset, iterations


def create_ptq_network(
    network: nn.Cell,
    config: Optional[QuantConfig] = None,
    calib_dataset: Optional[Batches] = None,
    calib_iteration: Optional[int] = None,
    *,
    example_input: Any = None,
    rules: Sequence[Rule] = (),
    target: str = "lite_arm",
    preset: Optional[str] = None,
) -> PTQNetwork:
    """Prepare a float network, or one trained by `prepare_qat`, for calibration.

    Args:
        network: a float cell, or a QuantCell whose ranges are to be found anew (its weights are not touched).
        config: default settings; recorded ones or the QuantCell's own when not given.
        calib_dataset: unlabelled batches; may be given to `quantize` instead.
        calib_iteration: how many batches are used (all by default).
        example_input: Tensor or sample shape; by default the first batch of `calib_dataset`.
        rules, target, preset: as in `plan_network`; not for a QuantCell, which has its plan.

    Raises:
        PlanError: a QuantCell is given together with other settings.
        DataError: neither `example_input` nor data that could stand for it.
    """
    if calib_iteration is not None and calib_iteration < 1:
        raise PlanError(f"calib_iteration is {calib_iteration}; allowed: 1 or more")
    if isinstance(network, QuantCell):
        if config is not None or rules or preset is not None:
            raise PlanError(
                "the network already has its quantisation plan; leave out config, rules and preset, or give the float "
                "network"
            )
        graph, plan = network.sync()
        return PTQNetwork(graph, plan, calib_dataset, calib_iteration)
    if example_input is None:
        if calib_dataset is None:
            raise DataError("create_ptq_network needs example_input, or calib_dataset to take its shape from")
        stream = batches_of(calib_dataset)
        first = next(stream, None)
        if first is None:
            raise DataError("the calibration set has 0 samples; give at least one batch")
        if iter(calib_dataset) is calib_dataset:  # read once: the batch looked at must not be lost
            calib_dataset = chain([first], stream)
        example_input = tuple(int(n) for n in first.shape[1:])
    graph, plan = plan_network(network, example_input, config, rules, target, preset)
    return PTQNetwork(deployment_graph(graph), plan, calib_dataset, calib_iteration)


def quantize(ptq_net: PTQNetwork, calib_dataset: Optional[Batches] = None) -> QuantCell:
    """Find every range on the calibration samples and return the quantised cell, in evaluation mode.

    Raises:
        DataError: no samples.
    """
    dataset = calib_dataset if calib_dataset is not None else ptq_net.dataset
    if dataset is None:
        raise DataError("quantize needs calib_dataset: none was given here or to create_ptq_network")
    plan = calibrate(ptq_net.graph, ptq_net.plan, dataset, iterations=ptq_net.iterations)
    cell = quantize_cell(round_biases(ptq_net.graph, plan), plan)
    cell.set_phase(QUANTIZE)
    return cell


def export(quantized_net: QuantCell, x: Any, file_name: str, file_format: str = "MINDIR") -> str:
    """Write a quantised network to a file; returns its path.

    Args:
        quantized_net: from `quantize` or `prepare_qat`, with every range known.
        x: an example input (Tensor, array or sample shape), checked against the network's input.
        file_name: with or without the format's suffix.
        file_format: ``MINDIR`` (float weights with FakeQuantParam markers, for MindSpore Lite's converter),
            ``MINDIR_PORTABLE`` (int8 weights and ordinary operations; MindSpore loads and runs it), ``MS`` (int8, for
            MindSpore Lite on the device, without its converter), ``MS_WEIGHT`` (the same with float computation),
            ``MS_FLOAT``, ``MINDIR_ASCEND`` or ``ONNX``.

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
    shape = tuple(int(n) for n in (x.shape if hasattr(x, "shape") else np.asarray(x).tolist()))
    return str(_export_formats(graph, plan, file_name, file_format, example_shape=shape))
