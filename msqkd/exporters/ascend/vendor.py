"""The vendor's way to an Ascend NPU: a float MindIR that `converter_lite` quantises with calibration samples."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Union

import numpy as np

from msqkd.errors import ExportError
from msqkd.exporters.converter import ACTIVATION_METHODS, command, ptq_config, write_calibration_bins
from msqkd.exporters.mindir_file import fixed_inputs, write_cell
from msqkd.files import PathLike, write_text
from msqkd.graph.cell import to_cell
from msqkd.graph.ir import Graph
from msqkd.quant.integers import on_grid
from msqkd.quant.plan import QuantPlan

Samples = Union[np.ndarray, Mapping[str, np.ndarray]]
_MODEL, _CONFIG, _SCRIPT, _OUTPUT = "float.mindir", "converter.cfg", "convert.sh", "ascend_int8"


@dataclass(frozen=True)
class AscendFloat:
    """What `export_ascend_float` wrote.

    Attributes:
        model: the float MindIR.
        config: the converter's configuration file.
        calibration: the calibration files of each input, by its name.
        script: a shell script that runs `command` in its own folder.
        command: the converter's command line, with paths relative to the folder.
    """

    model: Path
    config: Path
    calibration: dict[str, list[Path]]
    script: Path
    command: list[str]


def export_ascend_float(
    graph: Graph, plan: QuantPlan, folder: PathLike, samples: Samples, method: str = ACTIVATION_METHODS[0]
) -> AscendFloat:
    """Write all that ``converter_lite --optimize=ascend_oriented`` needs to quantise the network itself.

    The weights of int8 layers lie on their grid, so that the converter finds the trained integers again where they
    have 8 bits and no clip ratio. What is int8 and in which range the converter decides: Conv2D and MatMul, activations
    asymmetric; neither rules nor ranges of the plan reach it. The batch is 1.

    Args:
        graph, plan: the deployment graph (BatchNorm folded) and its plan.
        folder: where to; it can be moved as a whole.
        samples: calibration samples as the network takes them, (N, ...) float32; by input name where it has several.
        method: how the converter finds ranges: ``MAX_MIN``, ``KL`` or ``REMOVAL_OUTLIER``.

    Raises:
        PlanError: a weight cannot be quantised.
        ExportError: the samples do not fit the network, a value is not allowed, or a file cannot be written.
    """
    folder = Path(folder)
    arrays = _by_input(graph, samples)
    folders = {name: f"calibration/{name}" for name in arrays}
    config = ptq_config(
        calibration=folders,
        calibrate_size=len(next(iter(arrays.values()))),
        activation_quant_method=method,
        per_channel=any(quant.axis is not None for quant in plan.weights.values()),
        target_device="ASCEND",
    )
    calibration = {
        name: write_calibration_bins(array, folder / folders[name], layout="NCHW") for name, array in arrays.items()
    }
    graph = graph.copy()
    on_grid(graph, plan.with_weight_observers(graph).weights)
    cell = to_cell(graph)
    model = write_cell(cell, fixed_inputs(graph, 1), folder / _MODEL)
    words = command(_MODEL, _OUTPUT, _CONFIG, ascend=True)
    text = f'#!/bin/sh\n# Run where converter_lite is installed.\ncd "$(dirname "$0")" && exec {shlex.join(words)}\n'
    try:
        write_text(folder / _CONFIG, config)
        write_text(folder / _SCRIPT, text)
    except OSError as error:
        raise ExportError(f"cannot write into {folder}: {error.strerror}") from error
    return AscendFloat(model, folder / _CONFIG, calibration, folder / _SCRIPT, words)


def _by_input(graph: Graph, samples: Samples) -> dict[str, np.ndarray]:
    """The samples of every input, by name.

    Raises:
        ExportError: an input is missing, unknown, or of another shape; or their numbers differ.
    """
    given = dict(samples) if isinstance(samples, Mapping) else {graph.inputs[0]: samples}
    if set(given) != set(graph.inputs):
        raise ExportError(
            f"calibration samples are given for {', '.join(given)}; the network takes {', '.join(graph.inputs)}"
        )
    arrays = {name: np.asarray(given[name]) for name in graph.inputs}
    for name, array in arrays.items():
        kind = graph.values[name].type
        assert kind is not None
        if kind.dtype != "float32" or array.shape[1:] != kind.shape[1:]:
            raise ExportError(
                f"input '{name}': the calibration samples have shape {array.shape}; the network takes "
                f"(N, {', '.join(map(str, kind.shape[1:]))}) {kind.dtype}, and calibration files hold float32 only"
            )
    if len({len(array) for array in arrays.values()}) != 1:
        counts = ", ".join(f"{name} {len(array)}" for name, array in arrays.items())
        raise ExportError(f"the inputs have different numbers of calibration samples: {counts}")
    return arrays
