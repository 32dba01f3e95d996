"""Keeps the passes of MindSpore Lite's converter and runtime off a quantized network.

The passes know nothing of quantization parameters: what they merge has integers that nobody calibrated. Each function
here writes a network so that one of them does not fire, and computes the same.
"""

from __future__ import annotations

from math import prod
from typing import Any

from msqkd.graph.ir import Graph, Node, TensorType, Value
from msqkd.quant.plan import ActivationQuant, QuantPlan

Shape = tuple[int, ...]
_MOST_AXES = 6  # of a tensor that the runtime transposes
_OTHER = {"valid": "same", "same": "valid", "pad": "valid"}


def prevent_fusions(graph: Graph, plan: QuantPlan, shapes: dict[str, Shape]) -> None:
    """Apply every function of this module, in place.

    Args:
        graph: the network in operations the converter knows.
        plan: its activations get those of new values.
        shapes: shape of every value, the batch closed; those of new values are added.
    """
    keep_pointwise_apart(graph)
    let_sums_clip(graph, plan)
    keep_transpositions(graph, plan, shapes)


def keep_pointwise_apart(graph: Graph) -> None:
    """Give a 1×1 convolution another padding mode than the 1×1 convolution it follows (conv_conv_fusion).

    Without padding, all modes mean the same for a kernel of one element.
    """
    producers = {output: node for node in graph.nodes for output in node.outputs}
    for node in graph.nodes:
        before = producers.get(node.inputs[0]) if node.inputs else None
        in_a_row = before is not None and _is_pointwise(graph, node) and _is_pointwise(graph, before)
        if before is not None and in_a_row and _mode(node.attrs) == _mode(before.attrs):
            node.attrs = {**node.attrs, "pad_mode": _OTHER[_mode(node.attrs)]}


def _is_pointwise(graph: Graph, node: Node) -> bool:
    return node.op == "Conv2D" and graph.shape(node.inputs[1])[2:] == (1, 1) and not any(node.attrs["pad_list"])


def _mode(attrs: dict[str, Any]) -> str:
    return str(attrs["pad_mode"]).lower()


def let_sums_clip(graph: Graph, plan: QuantPlan) -> None:
    """Leave out the ReLU behind a sum that a Reshape reads, where the integers of the result begin at zero.

    The converter turns the map between the two, and neither joins them nor finds the parameters of the sum. The kernel
    of the sum clips at the least integer, which is zero then.
    """
    for node in [node for node in graph.nodes if node.op == "Add"]:
        readers = graph.consumers(node.output)
        if len(readers) != 1 or readers[0].op != "ReLU" or node.output in graph.outputs:
            continue
        result = readers[0].output
        if result not in plan.activations or all(reader.op != "Reshape" for reader in graph.consumers(result)):
            continue
        qparams = plan.group_of(result).qparams()
        if int(qparams.zero_point) == qparams.qmin and all(n in plan.activations for n in graph.tensor_inputs(node)):
            graph.nodes.remove(readers[0])
            plan.nodes = [decision for decision in plan.nodes if decision.name != readers[0].name]
            del graph.values[node.output]
            node.outputs = [result]


def keep_transpositions(graph: Graph, plan: QuantPlan, shapes: dict[str, Shape]) -> None:
    """Let no transposition in front of a Reshape give the shape it reads (DeleteRedundantTrans of the runtime).

    The runtime drops such a transposition although it moves values. One of (N, 2, 2, H, W) gets an axis of one element
    that changes places: the Reshape does not care. The converter itself transposes a map with as many channels as rows
    and columns: the Reshape becomes one of either half of the channels.
    """
    producers = {output: node for node in graph.nodes for output in node.outputs}
    for node in [node for node in graph.nodes if node.op == "Reshape"]:
        before = producers.get(node.inputs[0])
        if before is not None and before.op == "Transpose":
            _with_loose_axis(graph, plan, shapes, before)
    for node in [node for node in graph.nodes if node.op == "Reshape"]:
        shape = shapes[node.inputs[0]]
        if len(shape) == 4 and shape[1] > 1 and len(set(shape[1:])) == 1:
            _flatten_by_halves(graph, plan, shapes, node)


def _with_loose_axis(graph: Graph, plan: QuantPlan, shapes: dict[str, Shape], node: Node) -> None:
    """Let a transposition that a Reshape alone reads, and whose result has the shape of its input, have another."""
    source, result = node.inputs[0], node.output
    shape, alone = shapes[source], len(graph.consumers(result)) == 1 and result not in graph.outputs
    perm = [int(axis) % len(shape) for axis in graph.const(node.inputs[1])]
    if not alone or shapes[result] != shape or perm == sorted(perm) or perm[0] != 0 or len(shape) >= _MOST_AXES:
        return
    wider = _between(graph, plan, shapes, source, (shape[0], 1, *shape[1:]))
    target = graph.add_const((-1, 1, *shape[1:]), "shape")
    graph.nodes.insert(
        graph.nodes.index(node), Node(graph.unique_node(f"{node.name}.wider"), "Reshape", [source, target], [wider])
    )
    first, *others = [axis + 1 for axis in perm[1:]]
    node.inputs = [wider, graph.add_const((0, first, 1, *others), "perm")]
    kind = graph.values[result].type
    assert kind is not None
    shapes[result] = (shape[0], shape[perm[1]], 1, *(shape[axis] for axis in perm[2:]))
    graph.values[result] = Value(result, "node", TensorType(shapes[result], kind.dtype))


def _flatten_by_halves(graph: Graph, plan: QuantPlan, shapes: dict[str, Shape], node: Node) -> None:
    """Let a Reshape read the values of its map in a row, joined of those of either half of the channels."""
    source = node.inputs[0]
    batch, channels, *plane = shapes[source]

    def add(op: str, inputs: list[str], shape: Shape, sequences: tuple[tuple[int, int], ...] = ()) -> str:
        output = _between(graph, plan, shapes, source, shape)
        name = graph.unique_node(f"{node.name}.{op.lower()}")
        graph.nodes.insert(graph.nodes.index(node), Node(name, op, inputs, [output], sequences=sequences))
        return output

    rows = []
    for begin, size in ((0, channels // 2), (channels // 2, channels - channels // 2)):
        cut = [graph.add_const(bound) for bound in ((0, begin, 0, 0), (-1, size, -1, -1))]
        half = add("Slice", [source, *cut], (batch, size, *plane))
        row = (size * prod(plane),)
        rows.append(add("Reshape", [half, graph.add_const((-1, *row))], (batch, *row)))
    node.inputs[0] = add("Concat", [*rows, graph.add_const(1)], (batch, channels * prod(plane)), ((0, 2),))


def _between(graph: Graph, plan: QuantPlan, shapes: dict[str, Shape], source: str, shape: Shape) -> str:
    """Register a value with the dtype and the parameters of `source` and return its name."""
    kind = graph.values[source].type
    assert kind is not None
    output = graph.add_value(Value(graph.unique_value(f"{source}_moved"), "node", TensorType(shape, kind.dtype)))
    shapes[output] = shape
    if source in plan.activations:
        plan.activations[output] = ActivationQuant(output, plan.activations[source].group, exact=True)
    return output
