"""`nn.Cell` to Graph: MindSpore's own compiler flattens the network, msqkd reads what it wrote."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional, Union

from msqkd.errors import CaptureError
from msqkd.graph.ir import Graph
from msqkd.graph.mindir import read_mindir
from msqkd.graph.passes.canonicalize import canonicalize
from msqkd.graph.passes.open_batch import open_batch
from msqkd.platform import mindspore

Example = Union[Sequence[int], Any]

_TWO_BATCHES = (2, 3)
_DIAGNOSTICS = "MS_OM_PATH"


def capture(net: Any, example: Example, *, dynamic_batch: bool = True) -> Graph:
    """Turn a network into a Graph, in evaluation mode, without changing it.

    Args:
        net: a trained `mindspore.nn.Cell`.
        example: the input: a Tensor, a tuple of Tensors, or the shape (C, H, W) of one float32 sample.
        dynamic_batch: leave dimension 0 of every input open (-1 in the graph's shapes).

    Returns:
        The graph, with the network's parameter names and arrays; calling the cell built from it (`to_cell`) gives the
        network's outputs bit for bit.

    Raises:
        CaptureError: the network does not compile for this input, branches on tensor values, or changes in place what
            it reads again.
    """
    ms = mindspore()
    if not isinstance(net, ms.nn.Cell):
        raise CaptureError(f"a network is a mindspore.nn.Cell, not {type(net).__name__}")
    inputs = _inputs(ms, example)
    with _evaluating(net):
        if dynamic_batch:
            graph = _compile_open(ms, net, inputs)
        else:
            graph = _compile(ms, net, [_like(ms, tensor, tensor.shape) for tensor in inputs])
    _take_parameters(net, graph)
    canonicalize(graph)
    graph.check()
    return graph


def _compile_open(ms: Any, net: Any, inputs: list[Any]) -> Graph:
    """Compile with an open batch, or where the network's Python code asks for its size, with two sizes."""
    try:
        return _compile(ms, net, [_with_batch(ms, tensor, None) for tensor in inputs])
    except CaptureError as error:
        try:
            pair = [_compile(ms, net, [_with_batch(ms, tensor, size) for tensor in inputs]) for size in _TWO_BATCHES]
        except CaptureError:
            raise error from error.__cause__
        return open_batch(*pair)


def _compile(ms: Any, net: Any, inputs: list[Any]) -> Graph:
    name = type(net).__name__
    types = {path: type(cell).__name__ for path, cell in net.cells_and_names() if path}
    with tempfile.TemporaryDirectory() as folder, _diagnostics(folder):
        file = Path(folder) / "captured.mindir"
        try:
            ms.export(net, *inputs, file_name=str(file), file_format="MINDIR")
        except Exception as error:  # MindSpore raises whatever the compiler met
            shapes = ", ".join(f"({', '.join('batch' if s < 0 else str(s) for s in i.shape)})" for i in inputs)
            raise CaptureError(
                f"{name}: MindSpore cannot compile the network for input shape {shapes}: {_reason(error)}"
            ) from error
        if not file.exists():
            raise CaptureError(f"{name}: the network is larger than the 1 GiB a single MindIR file holds")
        return read_mindir(file.read_bytes(), name, types)


@contextmanager
def _diagnostics(folder: str) -> Iterator[None]:
    """Let the compiler write what it says about a failure into `folder`, not into the user's working directory."""
    chosen = os.environ.get(_DIAGNOSTICS)
    os.environ.setdefault(_DIAGNOSTICS, folder)
    try:
        yield
    finally:
        if chosen is None:
            del os.environ[_DIAGNOSTICS]


@contextmanager
def _evaluating(net: Any) -> Iterator[None]:
    """Evaluation mode; every cell's own mode comes back at the end."""
    before = [(cell, cell.training, cell.phase) for _, cell in net.cells_and_names()]
    net.set_train(False)
    try:
        yield
    finally:
        for cell, training, phase in before:
            cell.add_flags(training=training)
            cell.phase = phase


def _inputs(ms: Any, example: Example) -> list[Any]:
    if isinstance(example, ms.Tensor):
        return [example]
    items = list(example) if isinstance(example, (tuple, list)) else []
    if items and all(isinstance(item, ms.Tensor) for item in items):
        return items
    if items and all(isinstance(item, int) and item > 0 for item in items):
        return [ms.Tensor(shape=(1, *items), dtype=ms.float32, init=ms.common.initializer.Zero())]
    raise CaptureError(
        f"the example input is {example!r}; give a Tensor, a tuple of Tensors or a sample shape such as (3, 224, 224)"
    )


def _with_batch(ms: Any, tensor: Any, size: Optional[int]) -> Any:
    return _like(ms, tensor, (size, *tensor.shape[1:]) if tensor.ndim else ())


def _like(ms: Any, tensor: Any, shape: Sequence[Optional[int]]) -> Any:
    """Only the type of an input matters to the compiler."""
    return ms.Tensor(shape=list(shape), dtype=tensor.dtype) if shape else tensor


def _reason(error: Exception) -> str:
    """The first line of the compiler's message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not set(line.strip()) <= set("-=")]
    return lines[0] if lines else type(error).__name__


def _take_parameters(net: Any, graph: Graph) -> None:
    """The exported file holds copies of the weights; what may be trained only the network knows."""
    for name, parameter in net.parameters_and_names():
        held = graph.params.get(parameter.name) or graph.params.get(name)
        if held is not None:
            held.trainable = bool(parameter.requires_grad)
