"""Is the file the network? Every exported file is read back and compared with the fake-quantised network."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import mindspore as ms
import numpy as np
from mindspore import nn

from msqkd.errors import ExportError
from msqkd.exporters.lite import read_marked
from msqkd.graph.cell import Hooks, to_cell
from msqkd.integer.program import Format
from msqkd.integer.registry import ARM64
from msqkd.quant.fake_quant import QUANTIZE, FakeQuantActivation
from msqkd.quant.plan import Group
from msqkd.quant.qparams import QParams
from msqkd.train.evaluate import agreement


def load_portable(file: Path) -> Callable[[Any], Any]:
    """The portable MindIR as MindSpore runs it."""
    return nn.GraphCell(ms.load(str(file)))


def load_lite(file: Path) -> Any:
    """The marked MindIR as a cell that rounds where the markers say, for batches of any size.

    Raises:
        ExportError: a weight in the file is not on its grid.
    """
    graph, values, weights = read_marked(file)
    for (node, index), qparams in weights.items():
        name = graph.node(node).inputs[index]
        data = graph.params[name].data
        if not np.array_equal(qparams.fake_quantize(data), data):
            raise ExportError(f"{file.name}: weight '{name}' is not on the grid of its marker")
    hooks = Hooks(values={name: _fixed(name, qparams) for name, qparams in values.items()})
    return to_cell(graph, hooks)


def _fixed(name: str, qparams: QParams) -> FakeQuantActivation:
    cell = FakeQuantActivation(Group(name, 8, False, "minmax", 100.0, 0, "file"))
    cell.set_qparams(qparams)
    cell.phase_of_quant = QUANTIZE
    return cell


def load_ms(file: Path) -> Callable[[Any], Any]:
    """A ``.ms`` file as the runtime's kernels compute it, for batches of any size."""
    from msqkd.exporters.ms.read import read_ms
    from msqkd.integer.simulator import Simulator

    simulator = Simulator(read_ms(file), machine=ARM64)

    def run(batch: Any) -> Any:
        data = batch.asnumpy() if isinstance(batch, ms.Tensor) else np.asarray(batch)
        tensor = simulator.program.tensors[simulator.program.inputs[0]]
        if tensor.format == Format.NHWC and data.ndim == 4:
            data = data.transpose(0, 2, 3, 1)
        return ms.Tensor(simulator.run(np.ascontiguousarray(data))[0])

    return run


def compare(answers: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Largest absolute difference of two sets of logits, and the share (percent) of equal top-1 answers."""
    return {
        "max_abs_diff": float(np.abs(answers - reference).max()),
        "agreement": agreement(answers, reference),
    }
