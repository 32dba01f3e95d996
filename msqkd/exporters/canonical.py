"""One network, one file: a MindIR without what differs from one process to the next."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

_GRAPH = "network"
_NUMBERED = re.compile(r"\b(CNode|ValueNode)_\d+")


def on_bytes(data: bytes, form: Callable[[Any], None]) -> bytes:
    """A serialised MindIR with `form` applied to its ``ModelProto``."""
    from mindspore.train import mind_ir_pb2 as pb

    model = pb.ModelProto()
    model.ParseFromString(data)
    form(model)
    return bytes(model.SerializeToString(deterministic=True))


def canonical_model(model: Any) -> None:
    """Give one network always the same ``ModelProto``, in place.

    The compiler names the graph and its values by counters that depend on what else the process has compiled, lists
    primitives in the order of a hash table, and writes the time of the export: all of it is replaced by what the
    network alone decides.
    """
    graph, prefix = model.graph, model.graph.name + ":"
    numbers: dict[str, str] = {}

    def renumbered(match: Any) -> str:
        return numbers.setdefault(match.group(), f"{match.group(1)}_{len(numbers)}")

    def stable(name: str) -> str:
        if name.startswith(prefix):
            name = f"{_GRAPH}:{name[len(prefix) :]}"
        return _NUMBERED.sub(renumbered, name)

    for entry in (*graph.input, *graph.parameter, *graph.output):
        entry.name = stable(entry.name)
    for node in graph.node:
        node.input[:] = [stable(name) for name in node.input]
        node.output[:] = [stable(name) for name in node.output]
        node.name = stable(node.name)
    for attribute in graph.attribute:
        if attribute.name == "compile_phase":
            attribute.s = b"export.mindir"
    graph.name = _GRAPH
    primitives = sorted(model.primitives, key=lambda p: (int(p.name.rsplit(":", 1)[-1]), p.name))
    blobs = [p.SerializeToString(deterministic=True) for p in primitives]
    del model.primitives[:]
    for blob in blobs:
        model.primitives.add().ParseFromString(blob)
