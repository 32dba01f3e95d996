"""Which ONNX operations compute an operation of the graph: a function for each, registered by the primitive's name."""

from __future__ import annotations

import importlib
from typing import Callable

from msqkd.errors import ExportError
from msqkd.exporters import WAY_OUT
from msqkd.exporters.onnx.calls import Call
from msqkd.graph.ir import Graph, Node

Emit = Callable[[Call], None]

_HOMES = ("elementwise", "layers", "reductions", "shapes", "slices")
_TABLE: dict[str, Emit] = {}


def writes(*ops: str) -> Callable[[Emit], Emit]:
    """Register a function as the one that writes `ops`."""

    def register(function: Emit) -> Emit:
        for op in ops:
            assert op not in _TABLE, f"two functions write {op}"
            _TABLE[op] = function
        return function

    return register


def supported() -> list[str]:
    """The operations that can be written, sorted."""
    for home in _HOMES:
        importlib.import_module(f"msqkd.exporters.onnx.{home}")  # registers them
    return sorted(_TABLE)


def find(graph: Graph, node: Node) -> Emit:
    """The function that writes `node`.

    Raises:
        ExportError: there is none.
    """
    if node.op not in supported():
        raise ExportError(
            f"{graph.name}: '{node.name}' ({node.op}) cannot be written as ONNX; docs/formats.md lists what can be; "
            f"{WAY_OUT}"
        )
    return _TABLE[node.op]
