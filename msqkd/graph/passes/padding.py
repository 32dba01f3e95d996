"""Padding with zeros that stands before the operation it is for, as part of that operation.

Int8 runtimes pad inside the kernel; a padding of its own costs a copy of the map, and most have no int8 kernel for it.
"""

from __future__ import annotations

from typing import Any, Optional

import numpy as np

from msqkd.graph.ir import Graph, Node

Sides = tuple[int, int, int, int]
"""Rows above, rows below, columns left, columns right."""


def fold_padding(graph: Graph) -> None:
    """Let convolutions pad what a node in front of them pads with zeros, in place.

    The numbers are those of the padded map; sums may be taken in another order (an ulp-level difference in float).
    """
    producers = {output: node for node in graph.nodes for output in node.outputs}
    for conv in [node for node in graph.nodes if node.op == "Conv2D"]:
        pad = producers.get(conv.inputs[0])
        sides = zero_padding(graph, pad) if pad is not None else None
        if pad is None or sides is None or conv.attrs.get("pad_mode") not in ("valid", "pad"):
            continue
        total = tuple(int(own) + more for own, more in zip(conv.attrs["pad_list"], sides))
        conv.attrs = {**conv.attrs, "mode": 1, "pad_mode": "pad", "pad": total, "pad_list": total}
        conv.inputs[0] = pad.inputs[0]
    graph.prune()


def zero_padding(graph: Graph, node: Node) -> Optional[Sides]:
    """What `node` adds around a map (N, C, H, W), when it adds zeros and nothing else; None for any other node."""
    pairs = _pairs(graph, node)
    if pairs is None or len(graph.shape(node.inputs[0])) != 4:
        return None
    pairs = [(0, 0)] * (4 - len(pairs)) + pairs
    if any(pairs[0]) or any(pairs[1]) or min(min(pair) for pair in pairs) < 0:
        return None
    return (*pairs[2], *pairs[3])


def padded_shape(shape: tuple[int, ...], sides: Sides) -> tuple[int, ...]:
    """The shape of a map (N, C, H, W) with `sides` around it; what is unknown (-1) stays so."""
    top, bottom, left, right = sides
    height, width = (s + more if s > 0 else -1 for s, more in zip(shape[2:], (top + bottom, left + right)))
    return (*shape[:2], height, width)


def _pairs(graph: Graph, node: Node) -> Optional[list[tuple[int, int]]]:
    """(before, after) of the last axes, in order, for a padding with the constant zero."""
    if node.op == "Pad":
        return [(int(first), int(last)) for first, last in node.attrs["paddings"]]
    if node.op != "PadV3" or node.attrs.get("mode") != "constant":
        return None
    amounts, filling = (_literal(graph, name) for name in node.inputs[1:3])
    if amounts is None or (filling is not None and np.any(np.asarray(filling) != 0)):
        return None
    flat = [int(amount) for amount in np.asarray(amounts).reshape(-1)]
    return [(flat[i], flat[i + 1]) for i in range(0, len(flat), 2)][::-1]  # the last axis comes first


def _literal(graph: Graph, name: str) -> Any:
    return graph.const(name) if graph.values[name].kind == "const" else None
