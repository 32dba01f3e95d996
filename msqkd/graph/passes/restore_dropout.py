"""Dropout of the original network, back in a graph that is trained.

A network is captured in evaluation mode, where dropout is nothing. `find_dropout` captures it once more with a mark at
the place of every dropout cell; `restore_dropout` puts nodes ``TrainingDropout`` at these places of any form of the
graph that has kept its values' names, as the training forms of `msqkd.graph.passes.fold_batchnorm` do::

    places = find_dropout(net, example, graph)
    training = training_graph(graph, "live")
    restore_dropout(training, places)
    cell = to_cell(training)  # random after cell.set_train(True), the same as before after cell.set_train(False)

Attributes of a ``TrainingDropout``: ``rate``, ``mask`` (``element``, ``channel`` or ``sample``) and ``scale`` (whether
what is kept is divided by 1 - rate). It has no parameters and is never exported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any, Optional

import numpy as np
from mindspore import Parameter, Tensor, nn

from msqkd.errors import CaptureError
from msqkd.graph.capture import Example, capture
from msqkd.graph.ir import Graph, Node, Value

DROPOUT = "TrainingDropout"
"""The operation's name."""

_MARK = "msqkd_dropout_mark."
_PATHS = re.compile(r"drop_?path|stochastic_?depth|drop_?connect|drop_?sample", re.IGNORECASE)
_RATES = ("drop_prob", "drop_rate", "drop", "p", "rate", "prob")
_CHANNELS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@dataclass(frozen=True)
class DropoutPlace:
    """Where the network drops what, in training.

    Attributes:
        path: the dropout cell's path in the network.
        rate: the probability of dropping, 0 < rate < 1.
        mask: what is dropped as one: ``element``, ``channel`` or ``sample``.
        scale: whether what is kept is divided by 1 - rate.
        value: name of the value it is applied to.
        output: name of the value it gives.
        readers: (node name, position in its inputs) of everything that reads the result, through later dropouts too.
        results: positions among the graph's outputs that are the result.
    """

    path: str
    rate: float
    mask: str
    scale: bool
    value: str
    output: str
    readers: tuple[tuple[str, int], ...]
    results: tuple[int, ...]


def find_dropout(net: Any, example: Example, graph: Graph, *, dynamic_batch: bool = True) -> list[DropoutPlace]:
    """The places of `graph`, the capture of `net` for `example`, where `net` drops something in training.

    Known are nn.Dropout, nn.Dropout1d to 3d, cells derived from them, and cells named as stochastic depth is
    (``DropPath``, ``StochasticDepth``, ``DropConnect``). Functions (``ops.dropout``) leave no trace in evaluation mode
    and are not found. The network is as before afterwards.

    Raises:
        CaptureError: there is none, a place has no counterpart in `graph`, or a cell's rate is not known.
    """
    cells = _dropout_cells(net)
    if not cells:
        raise CaptureError(
            f"{type(net).__name__}: dropout is asked for, and no cell of it drops anything (known are nn.Dropout, and "
            "cells called DropPath, StochasticDepth or DropConnect, at a rate above 0); train it without dropout"
        )
    elements = {path for path, (_, _, mask, _) in cells.items() if mask == "element"}
    with _marked({path: cell for path, (cell, *_) in cells.items()}):
        marked = capture(net, example, dynamic_batch=dynamic_batch, prepare=partial(_before_reshapes, elements))
    _take_names(marked, graph)
    return _places(marked, {path: settings for path, (_, *settings) in cells.items()})


def restore_dropout(graph: Graph, places: Sequence[DropoutPlace]) -> list[DropoutPlace]:
    """Insert a ``TrainingDropout`` at each of `places`, in place.

    Returns:
        The places this form of the graph has no longer, because another operation has taken them in.
    """
    missing = []
    for place in places:
        nodes = _by_name(graph)
        found = [(nodes[name], name, index) for name, index in place.readers if name in nodes]
        # What reads a value inside an operation that stands for several is that operation, by its one input.
        readers = list(dict.fromkeys((node, index if node.name == name else 0) for node, name, index in found))
        readers = [(node, i) for node, i in readers if i < len(node.inputs) and node.inputs[i] == place.value]
        results = [i for i in place.results if graph.outputs[i] == place.value]
        if place.value not in graph.values or not (readers or results):
            missing.append(place)
            continue
        attrs = {"rate": place.rate, "mask": place.mask, "scale": place.scale}
        graph.add_value(Value(place.output, "node", graph.values[place.value].type))
        types = next((node.cell_types for node, _ in readers), (graph.name,))
        name = graph.unique_node(place.path)
        dropout = Node(name, DROPOUT, [place.value], [place.output], attrs, place.path, types, functional=False)
        graph.insert_after(graph.producer(place.value), [dropout])
        for node, index in readers:
            node.inputs[index] = place.output
        for index in results:
            graph.outputs[index] = place.output
    return missing


def _by_name(graph: Graph) -> dict[str, Node]:
    """Every node by its name, and by those of the operations it stands for."""
    return {part.name: node for node in graph.nodes for part in (*(node.body.nodes if node.body else ()), node)}


def _dropout_cells(net: Any) -> dict[str, tuple[Any, float, str, bool]]:
    """Path to (cell, rate, mask, scale), outermost cells only."""
    found: dict[str, tuple[Any, float, str, bool]] = {}
    for path, cell in net.cells_and_names():
        if any(path.startswith(f"{outer}.") for outer in found):
            continue
        mask = _mask(cell)
        if mask is None:
            continue
        rate = _rate(cell)
        if rate is None:
            raise CaptureError(
                f"{type(net).__name__}: '{path}' ({type(cell).__name__}) drops at a rate that is not known; "
                f"it is looked for in the attributes {', '.join(_RATES)} and keep_prob"
            )
        if rate > 0:
            found[path] = (cell, rate, mask, bool(getattr(cell, "scale_by_keep", True)))
    return found


def _mask(cell: Any) -> Optional[str]:
    if isinstance(cell, nn.Dropout):
        return "element"
    if isinstance(cell, _CHANNELS):
        return "channel"
    has_parameters = next(iter(cell.get_parameters()), None) is not None
    return "sample" if _PATHS.search(type(cell).__name__) and not has_parameters else None


def _rate(cell: Any) -> Optional[float]:
    for _, part in cell.cells_and_names():
        for name in _RATES:
            value = getattr(part, name, None)
            if isinstance(value, (int, float)):
                return float(value)
        keep = getattr(part, "keep_prob", None)
        if isinstance(keep, (int, float)):
            return 1.0 - float(keep)
    return None


class _Marker(nn.Cell):
    """What a dropout cell is for the time of one capture."""

    def construct(self, x: Any) -> Any:
        return x * self.msqkd_mark


@contextmanager
def _marked(cells: dict[str, Any]) -> Iterator[None]:
    """Let each cell multiply by a parameter that tells its path."""
    classes = {path: cell.__class__ for path, cell in cells.items()}
    try:
        for path, cell in cells.items():
            mark = Parameter(Tensor(np.ones((), np.float32)), name=_MARK + path)
            cell.__class__ = _Marker
            cell.insert_param_to_cell("msqkd_mark", mark, check_name_contain_dot=False)
        yield
    finally:
        for path, cell in cells.items():
            cell.__class__ = classes[path]
            cell._params.pop("msqkd_mark", None)


def _mark(node: Node) -> Optional[str]:
    """The path of the dropout that a node of the marked graph stands for."""
    return next((name[len(_MARK) :] for name in node.inputs if name.startswith(_MARK)), None)


def _before_reshapes(elements: set[str], marked: Graph) -> None:
    """Put marks of single elements in front of the reshapes before them, in place: what is dropped is the same, and
    reshapes that are one without the dropout are next to each other."""
    for node in [node for node in marked.nodes if _mark(node) in elements]:
        (index,) = (i for i, name in enumerate(node.inputs) if not name.startswith(_MARK))
        reshape = marked.producer(node.inputs[index])
        while reshape is not None and reshape.op == "Reshape" and marked.consumers(reshape.output) == [node]:
            if reshape.output in marked.outputs:
                break
            source = reshape.inputs[0]
            marked.replace_value(node.output, reshape.output)
            node.inputs[index], reshape.inputs[0] = source, node.output
            marked.values[node.output] = replace(marked.values[node.output], type=marked.values[source].type)
            marked.nodes.remove(node)
            marked.nodes.insert(marked.nodes.index(reshape), node)
            reshape = marked.producer(source)


def _take_names(marked: Graph, graph: Graph) -> None:
    """Give the nodes and values of the marked graph the names they have in `graph`: the compiler numbers what it joins.

    Raises:
        CaptureError: beside the marks they are not the same operations.
    """
    nodes = [node for node in marked.nodes if not _mark(node)]
    pairs = list(zip_longest(nodes, graph.nodes))
    for one, other in pairs:
        if one is None or other is None or (one.op, one.cell_path) != (other.op, other.cell_path):
            place = other or one
            raise CaptureError(
                f"{graph.name}: dropout cannot be put back: it lies inside what is one operation without it, near "
                f"'{place.name}' ({place.op}), or the graph is not the capture of this network; train without dropout"
            )
    names = {old: new for one, other in pairs for old, new in zip(one.outputs, other.outputs) if old != new}
    kept = [node for node in marked.nodes if _mark(node)]
    for number, node in enumerate(kept):  # out of the way of the graph's names
        names[node.output] = f"{node.output}.mark{number}"
    marked.values = {names.get(name, name): replace(v, name=names.get(name, name)) for name, v in marked.values.items()}
    for node in marked.nodes:
        node.inputs = [names.get(name, name) for name in node.inputs]
        node.outputs = [names.get(name, name) for name in node.outputs]
    marked.outputs = [names.get(name, name) for name in marked.outputs]
    for one, other in pairs:
        one.name = other.name


def _places(marked: Graph, settings: dict[str, Any]) -> list[DropoutPlace]:
    places = []
    renamed: dict[str, str] = {}  # a mark's output -> the output of the dropout that takes its place
    for node in marked.nodes:
        path = _mark(node)
        if path is None:
            continue
        value = next(name for name in node.inputs if not name.startswith(_MARK))
        output = marked.unique_value(re.sub(r"\W", "_", path) + "_dropped")
        marked.add_value(Value(output, "node"))
        renamed[node.output] = output
        rate, mask, scale = settings[path]
        value = renamed.get(value, value)
        readers, results = _readers(marked, node), _results(marked, node)
        places.append(DropoutPlace(path, rate, mask, scale, value, output, readers, results))
    return places


def _readers(marked: Graph, mark: Node) -> tuple[tuple[str, int], ...]:
    """Who reads what a mark gives, marks that follow it looked through."""
    found: list[tuple[str, int]] = []
    for node in marked.consumers(mark.output):
        if _mark(node):
            found += _readers(marked, node)
        else:
            found += [(node.name, index) for index, name in enumerate(node.inputs) if name == mark.output]
    return tuple(found)


def _results(marked: Graph, mark: Node) -> tuple[int, ...]:
    followers = [node for node in marked.consumers(mark.output) if _mark(node)]
    own = [index for index, name in enumerate(marked.outputs) if name == mark.output]
    return (*own, *(index for node in followers for index in _results(marked, node)))
