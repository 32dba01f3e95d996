"""Pooling with padding, which MindSpore spells out, as one node.

``nn.MaxPool2d(3, 2, pad_mode="pad", padding=1)`` is compiled to a three-dimensional pooling between two reshapes, and a
padding with zeros followed by a pooling says the same where nothing is negative. Both become a ``MaxPool`` (or
``AvgPool``) whose attribute ``pad_mode`` is ``PAD``, with what was written as its `body`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Optional

from msqkd.graph.ir import Graph, Node, Value, unique_name
from msqkd.graph.passes.padding import Sides, zero_padding

_NON_NEGATIVE = ("ReLU", "ReLU6", "Sigmoid")
_POOLS = {"MaxPool3DWithArgmax": "MaxPool", "AvgPool3D": "AvgPool"}


def find_padded_pools(graph: Graph) -> int:
    """Replace spelt-out poolings with padding by one node each, in place; returns how many there were.

    A node found has the attributes ``kernel_size`` and ``strides`` (1, 1, height, width), ``pad_mode`` ``PAD``, ``pad``
    (rows above and below, columns left and right), ``ceil_mode``, ``format`` and, for AvgPool, ``count_include_pad``.
    """
    producers = {output: node for node in graph.nodes for output in node.outputs}
    found = 0
    for node in list(graph.nodes):
        run = _spelt_in_3d(graph, producers, node) or _padded_before(graph, producers, node)
        if run is not None:
            _replace(graph, *run)
            found += 1
    if found:
        graph.prune()
    return found


def _spelt_in_3d(
    graph: Graph, producers: dict[str, Node], last: Node
) -> Optional[tuple[str, list[Node], dict[str, Any]]]:
    """(operation, nodes, attributes) for ``Squeeze(pool(ExpandDims(x, 2)), 2)``."""
    pool = producers.get(last.inputs[0]) if last.op == "Squeeze" else None
    first = producers.get(pool.inputs[0]) if pool is not None and pool.op in _POOLS else None
    if pool is None or first is None or first.op != "ExpandDims" or graph.const(first.inputs[1]) != 2:
        return None
    run = [first, pool, last]
    if not _is_alone(graph, run[1:]) or pool.attrs.get("divisor_override"):
        return None
    attrs = pool.attrs
    kernel, strides = (tuple(attrs[name])[-2:] for name in (_kernel_name(pool), "strides"))
    pads = tuple(int(size) for size in attrs.get("pads", ()))
    sides: Sides = (pads[1], pads[1], pads[2], pads[2]) if pads else tuple(attrs["pad_list"])[2:]
    if set(attrs.get("dilation", (1,))) != {1}:
        return None
    found = _attributes(kernel, strides, sides, bool(attrs["ceil_mode"]))
    if pool.op == "AvgPool3D":
        found["count_include_pad"] = bool(attrs["count_include_pad"])
    return _POOLS[pool.op], run, found


def _kernel_name(pool: Node) -> str:
    return "ksize" if "ksize" in pool.attrs else "kernel_size"


def _padded_before(
    graph: Graph, producers: dict[str, Node], pool: Node
) -> Optional[tuple[str, list[Node], dict[str, Any]]]:
    """The same for a maximum over a map without negative numbers that is padded with zeros.

    Every window must hold a number of the map: a zero is then never more than the largest of them.
    """
    pad = producers.get(pool.inputs[0]) if pool.op == "MaxPool" and pool.attrs.get("pad_mode") == "VALID" else None
    source = producers.get(pad.inputs[0]) if pad is not None else None
    if pad is None or source is None or source.op not in _NON_NEGATIVE or not _is_alone(graph, [pad, pool]):
        return None
    sides = zero_padding(graph, pad)
    kernel, strides = (tuple(pool.attrs[name])[-2:] for name in ("kernel_size", "strides"))
    if sides is None or max(sides[:2]) >= kernel[0] or max(sides[2:]) >= kernel[1]:
        return None
    return "MaxPool", [pad, pool], _attributes(kernel, strides, sides, False)


def _attributes(kernel: tuple[int, ...], strides: tuple[int, ...], sides: Sides, ceil_mode: bool) -> dict[str, Any]:
    return {
        "kernel_size": (1, 1, *kernel), "strides": (1, 1, *strides), "pad_mode": "PAD", "pad": tuple(sides),
        "ceil_mode": ceil_mode, "format": "NCHW",
    }  # fmt: skip


def _is_alone(graph: Graph, run: list[Node]) -> bool:
    """Whether nobody else reads what is computed on the way, nor any second output."""
    for node, reader in zip(run, run[1:]):
        if graph.consumers(node.output) != [reader] or any(graph.consumers(name) for name in node.outputs[1:]):
            return False
        if set(node.outputs) & set(graph.outputs):
            return False
    return True


def _replace(graph: Graph, op: str, run: list[Node], attrs: dict[str, Any]) -> None:
    first, last = run[0], run[-1]
    argument = first.inputs[0]
    body = Graph(op)
    body.inputs = [body.add_value(Value(argument, "input", graph.values[argument].type))]
    body.outputs = [last.output]
    for node in run:
        for name in (*node.inputs, *node.outputs):
            if name != argument:
                body.add_value(graph.values[name])
        body.nodes.append(replace(node, inputs=list(node.inputs), outputs=list(node.outputs)))
    taken = {node.name for node in graph.nodes if node not in run}
    main = next(node for node in run if node.op in (op, *_POOLS))
    name = unique_name(main.cell_path or main.name, taken)
    pool = Node(
        name, op, [argument], [last.output], attrs, main.cell_path, main.cell_types, functional=False, body=body
    )
    graph.nodes[graph.nodes.index(last)] = pool
