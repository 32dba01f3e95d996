"""Activation functions that a network spells out, found by their values.

``x * (1 + erf(x / sqrt(2))) / 2``, ``maximum(x, 0.1 * x)``, ``x * relu6(x + 3) / 6`` and their many spellings become
one node, by the name of MindSpore's primitive. A run of elementwise operations on one value is such a function when it
agrees with it on a grid: no spelling has to be foreseen.

The node keeps what was written as its `body`, which the built cell computes: no bit of the float network changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Callable, NamedTuple, Optional

import numpy as np

from msqkd.graph.ir import Graph, Node, unique_name

_DEPTH = 8  # operations from the result back to the argument
_TOLERANCE = 2e-6  # of the largest value on the grid: float32 literals such as 1.4142135 for the root of 2 pass
_GRID = np.linspace(-8.0, 8.0, 257)
_ROOTS = ("Mul", "Muls", "Div", "Divs", "RealDiv", "Maximum")

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


_EVALUATE: dict[str, Callable[..., np.ndarray]] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Muls": np.multiply, "Div": np.divide, "Divs": np.divide,
    "RealDiv": np.divide, "Maximum": np.maximum, "Minimum": np.minimum, "Neg": np.negative, "Square": np.square,
    "Pow": np.power, "PowTensorScalar": np.power, "Tanh": np.tanh, "Erf": _erf, "Sigmoid": _sigmoid, "Exp": np.exp,
    "ReLU": lambda x: np.maximum(x, 0.0), "ReLU6": lambda x: np.clip(x, 0.0, 6.0),
    "ClampScalar": lambda x, low, high: np.clip(x, low, high),
}  # fmt: skip


class _Known(NamedTuple):
    op: str
    attrs: dict[str, Any]
    function: Callable[[np.ndarray], np.ndarray]


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


_KNOWN = (
    _Known("GeluExt", {"approximate": "none"}, lambda x: 0.5 * x * (1.0 + _erf(x / math.sqrt(2.0)))),
    _Known("GeLU", {}, _gelu_tanh),
    _Known("SiLU", {}, lambda x: x * _sigmoid(x)),
    _Known("HSwish", {}, lambda x: x * np.clip(x + 3.0, 0.0, 6.0) / 6.0),
    _Known("HSigmoid", {}, lambda x: np.clip(x + 3.0, 0.0, 6.0) / 6.0),
)


def find_activations(graph: Graph) -> int:
    """Replace spelt-out activation functions by one node each, in place; returns how many there were.

    Found are GELU (``GeluExt`` with approximate ``none`` for the form with erf, ``GeLU`` for that with tanh), ``SiLU``,
    ``HSwish``, ``HSigmoid`` and ``LeakyReLU`` (attribute ``alpha``, 0 < alpha < 1). A node found reads its argument
    alone, gives the value of the last operation, and has the operations it stands for as its `body`.
    """
    found = 0
    producers = {output: node for node in graph.nodes for output in node.outputs}
    readers: dict[str, set[int]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            readers.setdefault(name, set()).add(id(node))
    gone: set[int] = set()
    for root in reversed(list(graph.nodes)):
        if root.op not in _ROOTS or id(root) in gone or not _is_float(graph, root.output):
            continue
        for argument in _arguments(graph, producers, root):
            run = _run(graph, producers, root, argument)
            if run is None or not _is_closed(graph, readers, run, root):
                continue
            known = _recognise(graph, run, argument)
            if known is not None:
                _replace(graph, root, run, argument, known)
                gone.update(id(node) for node in run)
                found += 1
                break
    if found:
        graph.prune()
    return found


def _is_float(graph: Graph, value: str) -> bool:
    kind = graph.values[value].type
    return kind is not None and kind.dtype == "float32"


def _arguments(graph: Graph, producers: Mapping[str, Node], root: Node) -> Iterator[str]:
    """The activations `root` is computed from, nearest first."""
    seen: set[str] = set()
    front = [root]
    for _ in range(_DEPTH):
        names = [name for node in front for name in graph.tensor_inputs(node) if name not in seen]
        for name in dict.fromkeys(names):
            seen.add(name)
            yield name
        front = [producers[n] for n in dict.fromkeys(names) if n in producers and producers[n].op in _EVALUATE]


def _run(graph: Graph, producers: Mapping[str, Node], root: Node, argument: str) -> Optional[list[Node]]:
    """The nodes from `argument` to `root` in order of computation, when nothing but literals joins in."""
    run: list[Node] = []

    def collect(node: Node, depth: int) -> bool:
        if node in run:
            return True
        if depth > _DEPTH or node.op not in _EVALUATE:
            return False
        for name in node.inputs:
            if name == argument or (graph.values[name].kind == "const" and np.size(graph.const(name)) == 1):
                continue
            producer = producers.get(name)
            if producer is None or not collect(producer, depth + 1):
                return False
        run.append(node)
        return True

    return run if collect(root, 1) and len(run) > 1 else None


def _is_closed(graph: Graph, readers: Mapping[str, set[int]], run: list[Node], root: Node) -> bool:
    """Whether nobody outside reads what is computed on the way."""
    inside = {id(node) for node in run}
    inner = [node.output for node in run if node is not root]
    return all(readers.get(name, set()) <= inside and name not in graph.outputs for name in inner)


def _recognise(graph: Graph, run: list[Node], argument: str) -> Optional[_Known]:
    values: dict[str, Any] = {argument: _GRID}
    with np.errstate(all="ignore"):
        for node in run:
            operands = [
                values[name] if name in values else np.float64(np.reshape(graph.const(name), ()))
                for name in node.inputs
            ]
            values[node.output] = _EVALUATE[node.op](*operands)
    result = values[run[-1].output]
    slope = -float(np.interp(-1.0, _GRID, result))
    candidates = list(_KNOWN)
    if 0.0 < slope < 1.0:
        alpha = float(str(np.float32(slope)))
        candidates.append(_Known("LeakyReLU", {"alpha": alpha}, lambda x: np.where(x > 0, x, alpha * x)))
    for known in candidates:
        if np.allclose(result, known.function(_GRID), rtol=0.0, atol=_TOLERANCE * np.abs(_GRID).max()):
            return known
    return None


def _replace(graph: Graph, root: Node, run: list[Node], argument: str, known: _Known) -> None:
    body = graph.body_of(known.op, run, argument)
    outside = {node.name for node in graph.nodes if node not in run}
    paths = {node.cell_path for node in run}
    path = root.cell_path
    around = all(path == other or path.startswith(f"{other}.") for other in paths if other)
    own = path and around and not any(node.cell_path == path for node in graph.nodes if node not in run)
    name = path if own else ".".join(filter(None, (path, known.op.lower())))
    node = Node(
        unique_name(name, outside),
        known.op,
        [argument],
        root.outputs,
        dict(known.attrs),
        path,
        root.cell_types,
        body=body,
    )
    graph.nodes[graph.nodes.index(root)] = node
    for other in run[:-1]:
        graph.nodes.remove(other)
