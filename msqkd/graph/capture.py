"""`nn.Cell` to Graph: MindSpore's own compiler flattens the network, msqkd reads what it wrote."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Optional, Union

from msqkd.errors import CaptureError
from msqkd.graph.arguments import flatten, is_structured
from msqkd.graph.ir import Graph
from msqkd.graph.mindir import read_model
from msqkd.graph.norms import mark_running
from msqkd.graph.passes.canonicalize import canonicalize
from msqkd.graph.passes.open_batch import BatchError, open_batch
from msqkd.graph.source import branching_lines, load_class
from msqkd.platform import mindspore

Example = Union[Sequence[int], Any]

_TWO_BATCHES = (2, 3)
_DROPOUT = ("Dropout", "DropoutExt", "Dropout2D", "Dropout3D")
_DIAGNOSTICS = "MS_OM_PATH"


def capture(
    net: Any, example: Example, *, dynamic_batch: bool = True, prepare: Optional[Callable[[Graph], None]] = None
) -> Graph:
    """Turn a network into a Graph, in evaluation mode, without changing it.

    Args:
        net: a trained `mindspore.nn.Cell`.
        example: the input: a Tensor, a tuple of Tensors, or the shape (C, H, W) of one float32 sample. Arguments of
            `construct` that have defaults may be left out; a mapping gives arguments by name. An argument may be a
            tuple of Tensors itself: the graph has one input for each.
        dynamic_batch: leave the batch open (-1 in the graph's shapes): dimension 0 of every input that is as large
            there as the first one.
        prepare: is given the graph as the compiler wrote it, before it gets its canonical form.

    Returns:
        The graph, with the network's parameter names and arrays; calling the cell built from it (`to_cell`) gives the
        network's outputs bit for bit.

    Raises:
        CaptureError: the network does not compile for this input, branches on tensor values, changes in place what it
            reads again, drops values in evaluation mode, or has two parameters of one name.
    """
    ms = mindspore()
    if not isinstance(net, ms.nn.Cell):
        raise CaptureError(f"a network is a mindspore.nn.Cell, not {type(net).__name__}")
    _check_names(net)
    if is_structured(example):
        called, inputs = _with_flat_arguments(net, example)
    else:
        called, inputs = net, _inputs(ms, example)
    with _evaluating(net):
        if dynamic_batch:
            graph = _compile_open(ms, net, called, inputs)
        else:
            graph = _compile(ms, net, called, [_like(ms, tensor, tensor.shape) for tensor in inputs])
    if prepare is not None:
        prepare(graph)
    _refuse_dropout(graph)
    canonicalize(graph)
    mark_running(net, graph)
    _take_parameters(net, graph)
    graph.check()
    return graph


def _refuse_dropout(graph: Graph) -> None:
    dropping = next((node for node in graph.nodes if node.op in _DROPOUT), None)
    if dropping is not None:
        raise CaptureError(
            f"{graph.name}: '{dropping.name}' ({dropping.op}) drops values in evaluation mode too; call the function "
            "with training=self.training, or use the cell nn.Dropout"
        )


def _with_flat_arguments(net: Any, example: Example) -> tuple[Any, list[Any]]:
    """A cell of flat arguments that calls `net`, which stays the owner of its parameters."""
    tensors, names, call = flatten(example)
    source = (
        '"""Flat arguments for a network."""\n\nfrom mindspore import nn\n\n\n'
        "class Arguments(nn.Cell):\n"
        f"    def construct(self, {', '.join(names)}):\n"
        f"        return self.msqkd_network({call})\n"
    )
    cell = load_class(source)(auto_prefix=False)
    cell.msqkd_network = net
    return cell, tensors


def _check_names(net: Any) -> None:
    """MindSpore tells parameters apart by their names."""
    places: dict[str, tuple[str, int]] = {}
    for path, parameter in net.parameters_and_names():
        first, known = places.setdefault(parameter.name, (path, id(parameter)))
        if known != id(parameter):
            raise CaptureError(
                f"{type(net).__name__}: the parameters at '{first}' and '{path}' are both called '{parameter.name}'; "
                "give the networks they come from names of their own: part.update_parameters_name('part.')"
            )


def _compile_open(ms: Any, net: Any, called: Any, inputs: list[Any]) -> Graph:
    """Compile with an open batch, or where the network's Python code asks for its size, with two sizes.

    Behind a shape that is computed from the batch, sizes are unknown that are fixed in truth; two sizes tell which.
    """
    open_graph, failure = None, None
    try:
        open_graph = _compile(ms, net, called, _with_batch(ms, inputs, None))
        if _is_settled(open_graph):
            return open_graph
    except CaptureError as error:
        failure = error
    try:
        return open_batch(*(_compile(ms, net, called, _with_batch(ms, inputs, size)) for size in _TWO_BATCHES))
    except BatchError:
        if open_graph is None:
            raise
    except CaptureError:
        if failure is not None:
            raise failure from failure.__cause__
    assert open_graph is not None
    return open_graph


def _is_settled(graph: Graph) -> bool:
    """Whether nothing is unknown but the batch, in front, and nothing is computed from it."""
    kinds = [value.type for value in graph.activations()]
    known = all(-1 not in kind.shape[1:] for kind in kinds if kind is not None)
    return known and all(node.op != "Shape" for node in graph.nodes)


def _compile(ms: Any, net: Any, called: Any, inputs: list[Any]) -> Graph:
    """One compilation of `called` (`net` or a cell around it), read while MindSpore writes it.

    The file never holds the weights, whatever their size.
    """
    name = type(net).__name__
    cells = dict(net.cells_and_names())
    types = {path: type(cell).__name__ for path, cell in cells.items() if path}
    graphs: list[Graph] = []
    own: list[CaptureError] = []

    def read(model: Any) -> None:
        try:
            lines = partial(branching_lines, cells)
            graphs.append(read_model(model, name, types, net.parameters_dict(), lines=lines))
        except CaptureError as error:
            own.append(error)
        del model.graph.parameter[:]

    with (
        tempfile.TemporaryDirectory() as folder,
        _diagnostics(folder),
        _own_compilation(called),
        _own_scopes(net, called),
    ):
        try:
            file = str(Path(folder) / "captured.mindir")
            ms.export(called, *inputs, file_name=file, file_format="MINDIR", custom_func=read)
        except Exception as error:  # MindSpore raises whatever the compiler met
            shown = ", ".join(_shown(tensor) for tensor in inputs)
            raise CaptureError(
                f"{name}: MindSpore cannot compile the network for input shape {shown}: {_reason(error)}"
                f"{_other_types(net)}"
            ) from error
    if own:
        raise own[0]
    return graphs[0]


def _shown(tensor: Any) -> str:
    """A shape as the user thinks of it, with the dtype where it is not the usual one."""
    kind = str(tensor.dtype).lower()
    shape = ", ".join("batch" if size < 0 else str(size) for size in tensor.shape)
    return f"({shape})" + ("" if kind == "float32" else f" of {kind}")


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
def _own_compilation(cell: Any) -> Iterator[None]:
    """Let the compiler see the network as it is now: an earlier export may have been of another state."""
    known = set(cell.compile_cache)
    cell.compile_cache.clear()
    try:
        yield
    finally:
        cell.compile_cache.clear()
        cell.compile_cache.update(known)


@contextmanager
def _own_scopes(net: Any, called: Any) -> Iterator[None]:
    """Let the compiler name each cell's operations after the place of the cell in `net`.

    MindSpore gives a cell its scope where it is first compiled, on its own or as a part of another network, and keeps
    it. The outermost cells have none.
    """
    before = [(cell, cell.get_scope()) for _, cell in net.cells_and_names()]
    scopes = {"": "Default"}
    for path, cell in net.cells_and_names():
        if path:
            parent, _, name = path.rpartition(".")
            scopes[path] = f"{scopes.get(parent, 'Default')}/{name}-{type(cell).__name__}"
        object.__setattr__(cell, "_scope", scopes[path] if path else None)
    object.__setattr__(called, "generate_scope", lambda: None)
    try:
        yield
    finally:
        object.__delattr__(called, "generate_scope")
        for cell, scope in before:
            object.__setattr__(cell, "_scope", scope)


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
    text = " ".join(repr(example).split())
    found = f"a {type(example).__name__} of shape {example.shape}" if hasattr(example, "shape") else text[:80]
    raise CaptureError(
        f"the example input is {found}; give a Tensor, a tuple of Tensors or a sample shape such as (3, 224, 224)"
    )


def sample_shapes(example: Example) -> list[tuple[int, ...]]:
    """The shapes of an example input's samples, without their batch."""
    ms = mindspore()
    inputs = flatten(example)[0] if is_structured(example) else _inputs(ms, example)
    return [tuple(tensor.shape[1:]) for tensor in inputs]


def _with_batch(ms: Any, inputs: list[Any], size: Optional[int]) -> list[Any]:
    """The types of the inputs with another batch; what has no batch stays as it is."""
    batch = inputs[0].shape[:1]
    return [_like(ms, t, (size, *t.shape[1:]) if batch and t.shape[:1] == batch else t.shape) for t in inputs]


def _like(ms: Any, tensor: Any, shape: Sequence[Optional[int]]) -> Any:
    """Only the type of an input matters to the compiler."""
    return ms.Tensor(shape=list(shape), dtype=tensor.dtype) if shape else tensor


def _reason(error: Exception) -> str:
    """The first line of the compiler's message that says something, and the line of the user's code it is about."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not set(line.strip()) <= set("-=")]
    found = lines[0] if lines else type(error).__name__
    library = str(Path(mindspore().__file__).parent)
    frames = [match.groups() for match in re.finditer(r"In file (\S+?\.py):(\d+)", str(error))]
    own = [(file, number) for file, number in frames if not file.startswith(library)]
    return f"{found} (at {own[-1][0]}:{own[-1][1]})" if own else found


def _other_types(net: Any) -> str:
    """A hint where the network is not one of float32, which most inputs are."""
    kinds = [str(parameter.dtype).lower() for parameter in net.get_parameters()]
    others = [kind for kind in kinds if kind != "float32" and kind.startswith(("float", "bfloat", "complex"))]
    if not others:
        return ""
    return (
        f"; {len(others)} of its {len(kinds)} parameters are {others[0]}, and quantisation starts from float32: "
        "parameter.set_dtype(mindspore.float32)"
    )


def _take_parameters(net: Any, graph: Graph) -> None:
    """Make the arrays the graph's own; what may be trained only the network knows."""
    for mine in graph.params.values():
        mine.data = mine.data.copy()
    for path, owned in net.parameters_and_names():
        held = graph.params.get(owned.name) or graph.params.get(path)
        if held is not None:
            held.trainable = bool(owned.requires_grad)
