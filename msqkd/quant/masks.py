"""Additive attention masks: sums that reach −10,000 or beyond on their way into a softmax.

One scale for the scores and the mask gives steps of 40 and more: every score becomes the same integer, and attention a
mean. What carries the mask is therefore computed in float, from where it meets the scores to the softmax.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from msqkd.graph.ir import Graph, Node

LEAST = 1e4
"""The magnitude from which a number masks."""

_SOFTMAXES = frozenset({"Softmax", "SoftmaxV2", "LogSoftmax", "Exp"})
_SUMS = frozenset({"Add", "AddExt", "Adds", "Sub", "SubExt", "Subs", "InplaceAddExt", "InplaceSubExt", "BiasAdd"})
_CHOICES = {"Select": (1, 2), "MaskedFill": (0, 2)}
"""The inputs that such an operation chooses its results from."""
_ELEMENTWISE = _SUMS | {"Mul", "Muls", "Div", "Divs", "RealDiv", "Neg", "Cast"}
_JOINS = frozenset({"Concat", "Stack", "Maximum", "Minimum"})
_MOVES = frozenset({
    "BroadcastTo", "Contiguous", "ExpandDims", "ExpandDimsView", "Expand", "Flatten", "Gather", "Identity", "Reshape",
    "Split", "Squeeze", "StridedSlice", "Tile", "Transpose", "TransposeView", "TupleGetItem", "Unsqueeze", "View",
})  # fmt: skip


def masked_nodes(graph: Graph) -> dict[str, str]:
    """Find the operations that carry an additive attention mask into a softmax, the softmax included.

    A value carries a mask if a literal or parameter of magnitude 10,000 or more enters it by arithmetic or by choice,
    or if it is a sum with a value that no weight has part in: the network's inputs may hold anything, and a mask is one
    or is made from one. From there on the mask goes along with arithmetic and with what moves values.

    Returns:
        The reason to compute in float, by the name of the operation.
    """
    given = _given(graph)
    carried: set[str] = set()
    for node in graph.nodes:
        data, tensors = list(_data(node)), graph.tensor_inputs(node)
        meets = node.op in _SUMS and len(tensors) > 1 and any(name in given for name in tensors)
        if data and (meets or any(name in carried or _is_large(graph, node, name) for name in data)):
            carried.update(node.outputs)
    ends: dict[str, str] = {}
    found: dict[str, str] = {}
    for node in reversed(graph.nodes):
        if node.op in _SOFTMAXES:
            end, passed, carriers = node.name, node.inputs[:1], node.inputs[:1]
        else:
            end = next((ends[name] for name in node.outputs if name in ends), "")
            passed, carriers = list(_data(node)), node.outputs
        if not end:
            continue
        ends.update(dict.fromkeys(passed, end))
        if any(name in carried for name in carriers):
            found[node.name] = (
                f"it carries an attention mask into {end}: one scale for the mask, which may reach -10000 and beyond, "
                "and the scores would make all scores equal"
            )
    return found


def _data(node: Node) -> Iterator[str]:
    """The inputs whose values, or arithmetic with them, the results are; none for what masks do not pass."""
    if node.body is not None:
        return
    if node.op in _CHOICES:
        yield from (node.inputs[index] for index in _CHOICES[node.op] if index < len(node.inputs))
    elif node.op in _ELEMENTWISE:
        yield from node.inputs[:2]
    elif node.op in _JOINS:
        yield from node.inputs
    elif node.op in _MOVES:
        yield node.inputs[0]


def _is_large(graph: Graph, node: Node, name: str) -> bool:
    """Whether a literal or parameter masks where `node` reads it; a bound that a minimum or maximum sets does not."""
    value = graph.values[name]
    if node.op in _JOINS or value.kind not in ("const", "param"):
        return False
    held = graph.params[name].data if value.kind == "param" else value.const
    if isinstance(held, (str, bytes, type(None))):
        return False
    numbers = np.asarray(held)
    if numbers.dtype.kind not in "iuf" or not numbers.size:
        return False
    return bool((np.abs(numbers.astype(np.float64)) >= LEAST).any())


def _given(graph: Graph) -> set[str]:
    """The values that are computed from the network's inputs without any parameter."""
    found = set(graph.inputs)
    for node in graph.nodes:
        tensors = graph.tensor_inputs(node)
        if tensors and not graph.param_inputs(node) and node.body is None and found.issuperset(tensors):
            found.update(node.outputs)
    return found
