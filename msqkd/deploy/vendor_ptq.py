"""The vendor's own post-training quantisation for a CPU, as the baseline: all that `converter_lite` takes for it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msqkd.exporters.converter import command, ptq_config, write_calibration_bins
from msqkd.exporters.lite import export_float
from msqkd.files import PathLike, write_text
from msqkd.graph.ir import Graph

OUTPUT = "vendor_ptq"
"""Name of the file that the script has the converter write, without its suffix."""

_MODEL, _CONFIG, _SCRIPT, _README = "float.mindir", "converter.cfg", "convert.sh", "README.txt"

_TEXT = """\
The vendor's own post-training quantisation, as the baseline
============================================================

float.mindir     the float network, BatchNorm folded, batch 1
calibration/     {count} samples the network was calibrated with, float32, NHWC, one file a sample
converter.cfg    the converter's configuration
convert.sh       runs it, where converter_lite is on the PATH: sh convert.sh

The command, in this folder:

  {command}

With it the converter quantises convolutions and products of matrices for a CPU. Additions, pools and means stay float.
"""


@dataclass(frozen=True)
class VendorPtq:
    """What `write_vendor_ptq` wrote: the float MindIR, the configuration file, and the folder both are in."""

    folder: Path
    model: Path
    config: Path


def write_vendor_ptq(graph: Graph, samples: Any, folder: PathLike, per_channel: bool) -> VendorPtq:
    """Write the float network, calibration files, the converter's configuration and its command line.

    Args:
        graph: the float network with one input, BatchNorm folded.
        samples: float32 (N, ...) as the network takes them.
        folder: where to; it can be moved as a whole.
        per_channel: one weight scale an output channel.

    Raises:
        ExportError: a file cannot be written, or the samples are not finite.
    """
    folder, name = Path(folder), graph.inputs[0]
    bins = f"calibration/{name}"
    config = ptq_config(calibration={name: bins}, calibrate_size=len(samples), per_channel=per_channel)
    write_calibration_bins(samples, folder / bins, "NHWC")
    model = export_float(graph, folder / _MODEL)
    line = shlex.join(command(_MODEL, OUTPUT, _CONFIG))
    write_text(folder / _CONFIG, config)
    write_text(folder / _SCRIPT, f'#!/bin/sh\n# Needs converter_lite.\ncd "$(dirname "$0")" && exec {line}\n')
    (folder / _SCRIPT).chmod(0o755)
    write_text(folder / _README, _TEXT.format(count=len(samples), command=line))
    return VendorPtq(folder, model, folder / _CONFIG)
