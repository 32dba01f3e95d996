"""Is the file the network? Every exported file is read back and compared with the fake-quantised network."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any, Callable, Optional

import mindspore as ms
import numpy as np
from mindspore import nn

from msqkd.errors import ExportError
from msqkd.exporters.lite import read_markers
from msqkd.exporters.mindir_form import functional_form
from msqkd.graph.cell import Hooks, to_cell
from msqkd.graph.ir import Graph
from msqkd.graph.mindir import read_mindir
from msqkd.graph.passes.free_batch import free_batch
from msqkd.integer.program import Format, Tensor
from msqkd.integer.registry import ARM64
from msqkd.quant.fake_quant import QUANTIZE, FakeQuantActivation
from msqkd.quant.plan import Group
from msqkd.quant.qparams import QParams
from msqkd.targets import SHARED, Int8Op
from msqkd.targets.lite_arm import LITE_ARM
from msqkd.train.evaluate import filled


def load_portable(file: Path) -> Callable[..., Any]:
    """The portable MindIR as MindSpore runs it."""
    return nn.GraphCell(ms.load(str(file)))


def load_lite(file: Path) -> Callable[..., Any]:
    """Read a marked MindIR as a callable that rounds where the markers say, for batches of any size.

    The file has one batch size. It is opened where random batches show that every sample is computed for itself (see
    `msqkd.graph.passes.free_batch`). Otherwise the samples are computed in batches of the file's own size.

    A value that is computed in float is rounded for its int8 readers alone, as the converter has it.

    Raises:
        ExportError: a weight in the file is not on its grid.
    """
    graph, values, weights, floats = read_markers(file)
    batch = graph.shape(graph.inputs[0])[0]
    for (node, index), qparams in weights.items():
        name = graph.node(node).inputs[index]
        data = graph.params[name].data
        if not np.array_equal(qparams.fake_quantize(data), data):
            raise ExportError(f"{file.name}: weight '{name}' is not on the grid of its marker")
    kept = free_batch(graph)
    int8 = _int8_nodes(graph, values.keys(), floats)
    rounded: dict[str, FakeQuantActivation] = {}
    edges: dict[tuple[str, int], FakeQuantActivation] = {}
    for name, qparams in values.items():
        source, readers = graph.producer(name), graph.consumers(name)
        mixed = name in graph.outputs or any(reader.name not in int8 for reader in readers)
        if mixed and (source is None or source.name not in int8):
            places = [(n.name, i) for n in readers if n.name in int8 for i, read in enumerate(n.inputs) if read == name]
            edges.update(dict.fromkeys(places, _fixed(name, qparams)))
        else:
            rounded[name] = _fixed(name, qparams)
    return _any_batch(to_cell(graph, Hooks(values=rounded, edges=edges)), batch, kept, file)


def load_direct(file: Path) -> Callable[..., Any]:
    """Read a direct MindIR as a callable, for batches of any size as `load_lite` has it."""
    graph = read_mindir(file.read_bytes(), file.stem)
    functional_form(graph)
    batch = graph.shape(graph.inputs[0])[0]
    kept = free_batch(graph)
    return _any_batch(to_cell(graph), batch, kept, file)


def _any_batch(cell: Any, batch: int, kept: Optional[str], file: Path) -> Callable[..., Any]:
    """Return `cell` for batches of any size.

    Args:
        cell: the network.
        batch: the size in the file.
        kept: why the network computes batches of that size only; None where it computes any.
        file: named in the warning.
    """
    if kept is None:
        return cell
    warnings.warn(f"{file.name}: checked in batches of {batch}, the size in the file, since {kept}", stacklevel=3)
    return partial(_in_batches, cell, batch)


def _in_batches(cell: Any, size: int, *inputs: Any) -> Any:
    """Compute any number of samples with a cell for batches of `size`; the last batch is filled up and cut.

    Args:
        cell: the network.
        size: its batch size.
        inputs: Tensors (N, ...); one of another length than the first has no batch and is passed on as it is.

    Returns:
        The output, or a tuple of them, as Tensors with the rows of all samples.
    """
    arrays = [tensor.asnumpy() for tensor in inputs]
    count = len(arrays[0])
    parts: list[list[np.ndarray]] = []
    for start in range(0, count, size):
        rows = slice(start, min(start + size, count))
        fed = [filled(array[rows], size) if len(array) == count else array for array in arrays]
        found = cell(*map(ms.Tensor, fed))
        outputs = [output.asnumpy() for output in (found if isinstance(found, tuple) else (found,))]
        parts.append([output[: len(output) // size * (rows.stop - rows.start)] for output in outputs])
    joined = tuple(ms.Tensor(np.concatenate(column)) for column in zip(*parts))
    return joined if len(joined) > 1 else joined[0]


def _int8_nodes(graph: Graph, marked: Collection[str], floats: Collection[str]) -> set[str]:
    """Return the operations that the converter takes for int8: those with an int8 kernel whose operands all have
    parameters and whose result is not marked as float, and the biases and activations computed in their kernels.
    Operations that only move values hand their parameters on, unless they read a float value past its marker."""
    held = set(marked)
    kernels: dict[str, Int8Op] = {}
    for node in graph.nodes:
        operands = graph.tensor_inputs(node)
        if not operands or any(output in floats for output in node.outputs):
            continue
        support, source = LITE_ARM.ops.get(node.op), graph.producer(node.inputs[0])
        before = kernels.get(source.name) if source is not None and node.inputs[0] not in marked else None
        if before is not None and node.op in ("BiasAdd", *before.activations):
            kernels[node.name] = before
        elif support is None or not held.issuperset(operands):
            continue
        elif support.kind != SHARED or held & set(node.outputs) or not set(floats) & set(operands):
            kernels[node.name] = support
            if support.kind == SHARED:
                held.update(node.outputs)
    return set(kernels)


def _fixed(name: str, qparams: QParams) -> FakeQuantActivation:
    cell = FakeQuantActivation(Group(name, 8, False, "minmax", 100.0, 0, "file"))
    cell.set_qparams(qparams)
    cell.phase_of_quant = QUANTIZE
    return cell


def load_ms(file: Path) -> Callable[..., Any]:
    """A ``.ms`` file as the runtime's kernels compute it, for batches of any size; pictures are (N, C, H, W)."""
    from msqkd.exporters.ms.read import read_ms
    from msqkd.integer.simulator import Simulator

    simulator = Simulator(read_ms(file), machine=ARM64)

    def run(*batch: Any) -> Any:
        program = simulator.program
        arrays = [item.asnumpy() if isinstance(item, ms.Tensor) else np.asarray(item) for item in batch]
        fed = [_channels_last(data, program.tensors[name]) for name, data in zip(program.inputs, arrays)]
        outputs = tuple(map(ms.Tensor, simulator.run(*fed)))  # these have the network's own layout in the file too
        return outputs if len(outputs) > 1 else outputs[0]

    return run


def _channels_last(data: np.ndarray, tensor: Tensor) -> np.ndarray:
    """`data` as the file takes it: pictures with the channels last."""
    is_picture = tensor.format == Format.NHWC and data.ndim == 4
    return np.ascontiguousarray(data.transpose(0, 2, 3, 1) if is_picture else data)
