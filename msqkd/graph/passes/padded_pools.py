"""Pooling with padding, which MindSpore spells out, as one node.

``nn.MaxPool2d(3, 2, pad_mode="pad", padding=1)`` is compiled to a three-dimensional pooling between two reshapes,
``ops.max_pool2d`` to one that also says where the largest values are, and a padding with zeros followed by a pooling
says the same where nothing is negative. All become a ``MaxPool`` (or ``AvgPool``) whose attribute ``pad_mode`` is
``PAD``, with what was written as its `body`. An average that counts the zeros is what runtimes have no kernel for: it
becomes a ``Pad`` and an ``AvgPool`` that does not pad.
"""

from __future__ import annotations

from typing import Any, Optional

from msqkd.graph.ir import Graph, Node, TensorType, Value, unique_name
from msqkd.graph.passes.padding import Sides, padded_shape, zero_padding

NON_NEGATIVE = ("ReLU", "ReLU6", "Sigmoid", "HSigmoid")
"""Operations whose results are never below zero."""

_POOLS = {"MaxPool3DWithArgmax": "MaxPool", "AvgPool3D": "AvgPool"}
_WITH_PLACES = "MaxPoolWithArgmaxV2"  # as ops.max_pool2d is compiled: a second output says where the largest are
_VALID, _NCHW = 2, 0  # MindSpore's numbers, as AvgPool takes them


def find_padded_pools(graph: Graph) -> int:
    """Replace spelt-out poolings with padding by one node each (or two, see above), in place; returns how many there
    were.

    A node found has the attributes ``kernel_size`` and ``strides`` (1, 1, height, width), ``pad_mode`` ``PAD``, ``pad``
    (rows above and below, columns left and right), ``ceil_mode``, ``format`` and, for AvgPool, ``count_include_pad``.
    """
    producers = {output: node for node in graph.nodes for output in node.outputs}
    found = 0
    for node in list(graph.nodes):
        run = (
            _spelt_in_3d(graph, producers, node) or _with_places(graph, node) or _padded_before(graph, producers, node)
        )
        if run is None:
            continue
        op, nodes, attrs = run
        if attrs.get("count_include_pad") and any(attrs["pad"]) and _ends_fit(graph, nodes[0].inputs[0], attrs):
            _split(graph, nodes, attrs)
        else:
            _replace(graph, op, nodes, attrs)
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
    attrs = _recorded(pool)
    if not _is_alone(graph, run[1:]) or pool.attrs.get("divisor_override") or attrs is None:
        return None
    if pool.op == "AvgPool3D":
        attrs["count_include_pad"] = bool(pool.attrs["count_include_pad"])
    return _POOLS[pool.op], run, attrs


def _with_places(graph: Graph, pool: Node) -> Optional[tuple[str, list[Node], dict[str, Any]]]:
    """The same for a maximum that also says where it was, when nobody asks."""
    if pool.op != _WITH_PLACES or any(graph.consumers(name) or name in graph.outputs for name in pool.outputs[1:]):
        return None
    attrs = _recorded(pool)
    return None if attrs is None else ("MaxPool", [pool], attrs)


def _recorded(pool: Node) -> Optional[dict[str, Any]]:
    """The attributes of a pooling in two dimensions, from those its spelling has for three; None where it dilates."""
    attrs = pool.attrs
    if set(attrs.get("dilation", (1,))) != {1}:
        return None
    kernel = attrs["ksize"] if "ksize" in attrs else attrs["kernel_size"]
    pads = tuple(int(size) for size in attrs.get("pads", ()))
    sides: Sides = (pads[-2], pads[-2], pads[-1], pads[-1]) if pads else tuple(attrs["pad_list"])[2:]
    return _attributes(tuple(kernel)[-2:], tuple(attrs["strides"])[-2:], sides, bool(attrs["ceil_mode"]))


def _padded_before(
    graph: Graph, producers: dict[str, Node], pool: Node
) -> Optional[tuple[str, list[Node], dict[str, Any]]]:
    """The same for a maximum over a map without negative numbers that is padded with zeros.

    Every window must hold a number of the map: a zero is then never more than the largest of them.
    """
    pad = producers.get(pool.inputs[0]) if pool.op == "MaxPool" and pool.attrs.get("pad_mode") == "VALID" else None
    source = producers.get(pad.inputs[0]) if pad is not None else None
    if pad is None or source is None or source.op not in NON_NEGATIVE or not _is_alone(graph, [pad, pool]):
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


def _ends_fit(graph: Graph, value: str, attrs: dict[str, Any]) -> bool:
    """Whether rounding the number of windows up or down is the same."""
    sizes = padded_shape(graph.shape(value), attrs["pad"])[2:]
    windows = zip(sizes, attrs["kernel_size"][2:], attrs["strides"][2:])
    return not attrs["ceil_mode"] or all(size > 0 and (size - kernel) % step == 0 for size, kernel, step in windows)


def _split(graph: Graph, run: list[Node], attrs: dict[str, Any]) -> None:
    """The zeros around the map, and an average over windows of the larger one."""
    argument, result, main = run[0].inputs[0], run[-1].output, run[1]
    top, bottom, left, right = attrs["pad"]
    kind = graph.values[argument].type
    if kind is not None:
        kind = TensorType(padded_shape(kind.shape, attrs["pad"]), kind.dtype)
    graph.nodes.remove(main)  # what stands before it may have other readers
    name = unique_name(main.cell_path or main.name, {node.name for node in graph.nodes if node is not run[-1]})
    padded = graph.add_value(Value(graph.unique_value(f"{result}_padded"), "node", kind))
    paddings = {"paddings": ((0, 0), (0, 0), (top, bottom), (left, right))}
    pad = Node(f"{name}.pad", "Pad", [argument], [padded], paddings, main.cell_path, main.cell_types, functional=False)
    literals = (("kernel_size", attrs["kernel_size"][2:]), ("strides", attrs["strides"][2:]), ("pad_mode", _VALID))
    names = [graph.add_const(literal, hint) for hint, literal in (*literals, ("format", _NCHW))]
    pool = Node(name, "AvgPool", [padded, *names], [result], {}, main.cell_path, main.cell_types)
    pad.name = unique_name(pad.name, {node.name for node in graph.nodes})
    at = graph.nodes.index(run[-1])
    graph.nodes[at : at + 1] = [pad, pool]


def _replace(graph: Graph, op: str, run: list[Node], attrs: dict[str, Any]) -> None:
    first, last = run[0], run[-1]
    argument = first.inputs[0]
    body = graph.body_of(op, run, argument)
    taken = {node.name for node in graph.nodes if node not in run}
    main = next(node for node in run if node.op in (op, _WITH_PLACES, *_POOLS))
    name = unique_name(main.cell_path or main.name, taken)
    pool = Node(
        name, op, [argument], [last.output], attrs, main.cell_path, main.cell_types, functional=False, body=body
    )
    graph.nodes[graph.nodes.index(last)] = pool
