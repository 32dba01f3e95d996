"""A MindIR without the bytes that running it does not need.

Beside its weights a file of `mindspore.export` holds some 180 bytes a node: the name of the value (in its own node
twice, and in every reader), the scope, switches of training, and the type of the result, which MindSpore infers again
when it loads the file. A quantised network has three times the nodes of the float one, for a rounding is five, and in a
small network they weigh more than the weights save.

What stays readable: parameters and inputs keep their names. Every operation that quantisation does not use itself keeps
its place, as ``value/Op`` (``layer1_0_bn1_batchnorm/Conv2D``) in the field that names it in MindSpore's messages, and
the type of its result. The steps of a rounding, the scaling of weights and the compiler's bookkeeping have numbers
only; where they belong is seen from what they read.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from msqkd.exporters.canonical import canonical_model

_REF, _CONSTANT = "REF::", "Constant"
# What quantisation and the compiler add in large numbers; the type of the result is evident from the operands
_PLAIN = frozenset({"Cast", "Depend", "Load", "MakeTuple", "Maximum", "Minimum", "Mul", "Round", "UpdateState"})


def compact_model(model: Any) -> None:
    """Bring a ``ModelProto`` to its canonical form and make it short, in place: the same parameters, operations and
    answers.

    Values are called ``v0``, ``v1``, …, equal constants become one, and of a node only operation, operands and result
    remain, with place and type where the docstring of the module says so.

    Args:
        model: a network without control flow, as `mindspore.export` writes it.
    """
    canonical_model(model)
    graph = model.graph
    primitives = _rename_primitives(model)
    twins = _share_constants(graph)
    names = {node.output[0]: f"v{number}" for number, node in enumerate(graph.node)}
    names.update({name: names[kept] for name, kept in twins.items()})
    for node in graph.node:
        _describe(node)
        if node.op_type.startswith(_REF):
            node.op_type = _REF + primitives[node.op_type[len(_REF) :]]
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names[name] for name in node.output]
        node.ClearField("name")
        node.ClearField("node_attr")
    for output in graph.output:
        output.name = names.get(output.name, output.name)


def _rename_primitives(model: Any) -> dict[str, str]:
    """Name each primitive after its operation, the second of a kind ``Conv2D:1``; returns new names by old ones."""
    seen: Counter[str] = Counter()
    names = {}
    for primitive in model.primitives:
        op = primitive.op_type
        names[primitive.name] = f"{op}:{seen[op]}" if seen[op] else op
        seen[op] += 1
        primitive.name = names[primitive.name]
        primitive.ClearField("instance_name")  # one of the many operations that share it
    return names


def _share_constants(graph: Any) -> dict[str, str]:
    """Remove constants that equal an earlier one; returns the earlier one's name by theirs."""
    first: dict[bytes, str] = {}
    twins: dict[str, str] = {}
    for node in [node for node in graph.node if node.op_type == _CONSTANT]:
        (value,) = node.attribute
        for tensor in value.tensors:
            tensor.ClearField("name")
        name = node.output[0]
        kept = first.setdefault(value.SerializeToString(deterministic=True), name)
        if kept != name:
            twins[name] = kept
            graph.node.remove(node)
    return twins


def _describe(node: Any) -> None:
    """Leave an operation its place, shortened, and its type; a constant or a plain operation has no place."""
    op = node.op_type[len(_REF) :].partition(":")[0] if node.op_type.startswith(_REF) else node.op_type
    if op in _PLAIN:
        node.ClearField("attribute")
    if op in _PLAIN or op == _CONSTANT:
        node.ClearField("domain")
    else:
        variable = node.output[0].partition(":")[2].rpartition(":")[0]
        node.domain = f"{variable}/{op}"
