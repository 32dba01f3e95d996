"""`nn.Cell` to Graph: MindSpore's own compiler flattens the network, msqkd reads what it wrote."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Union

from msqkd.errors import CaptureError
from msqkd.graph.ir import Graph
from msqkd.graph.mindir import read_mindir
from msqkd.graph.passes.canonicalize import canonicalize
from msqkd.platform import mindspore

Example = Union[Sequence[int], Any]


def capture(net: Any, example: Example, *, dynamic_batch: bool = True) -> Graph:
    """Turn a network into a Graph, in evaluation mode, without changing it.

    Args:
        net: a trained `mindspore.nn.Cell`.
        example: the input: a Tensor, a tuple of Tensors, or the shape (C, H, W) of one float32 sample.
        dynamic_batch: leave dimension 0 of every input open (-1 in the graph's shapes).

    Returns:
        The graph, with the network's parameter names and arrays; calling the cell built from it (`to_cell`) gives the network's
        outputs bit for bit.

    Raises:
        CaptureError: the network does not compile for this input, or branches on tensor values.
    """
    ms = mindspore()
    name = type(net).__name__
    inputs = _inputs(ms, example, dynamic_batch)
    training = {path: cell.training for path, cell in net.cells_and_names()}
    types = {path: type(cell).__name__ for path, cell in net.cells_and_names() if path}
    net.set_train(False)
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "captured.mindir"
            ms.export(net, *inputs, file_name=str(file), file_format="MINDIR")
            if not file.exists():
                raise CaptureError(f"{name}: the network is larger than the 1 GiB a single MindIR file holds")
            data = file.read_bytes()
    except CaptureError:
        raise
    except Exception as error:  # MindSpore raises whatever the compiler met
        shapes = ", ".join(str(tuple(i.shape)) for i in inputs)
        raise CaptureError(f"{name}: MindSpore cannot compile the network for input shape {shapes}: {_reason(error)}") from error
    finally:
        for path, cell in net.cells_and_names():
            cell.training = training[path]
    graph = read_mindir(data, name, types)
    _take_parameters(net, graph)
    canonicalize(graph)
    graph.check()
    return graph


def _inputs(ms: Any, example: Example, dynamic_batch: bool) -> list[Any]:
    if isinstance(example, ms.Tensor):
        tensors = [example]
    elif len(example) and all(isinstance(item, ms.Tensor) for item in example):
        tensors = list(example)
    elif len(example) and all(isinstance(item, int) for item in example):
        tensors = [ms.Tensor(shape=(1, *example), dtype=ms.float32, init=ms.common.initializer.Zero()).init_data()]
    else:
        raise CaptureError(f"the example input is {example!r}; give a Tensor, a tuple of Tensors or a sample shape such as (3, 224, 224)")
    if not dynamic_batch:
        return tensors
    return [ms.Tensor(shape=[None, *t.shape[1:]], dtype=t.dtype) if t.ndim else t for t in tensors]


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not set(line.strip()) <= set("-=")]
    return lines[0] if lines else type(error).__name__


def _take_parameters(net: Any, graph: Graph) -> None:
    """The exported file holds copies of the weights; what may be trained only the network knows."""
    for name, parameter in net.parameters_and_names():
        held = graph.params.get(parameter.name) or graph.params.get(name)
        if held is not None:
            held.trainable = bool(parameter.requires_grad)
