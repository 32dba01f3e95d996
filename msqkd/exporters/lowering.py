"""The graph in forms the runtime computes rightly: averages as depthwise convolutions where the plan says so, padded
1×1 kernels embedded into zeros and, for the converter, dense layers as 1×1 convolutions.

Nothing is decided here; the plan says what is int8, and only int8 nodes are rewritten. The plan returned fits the
graph returned.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from msqkd.graph.ir import Graph, Node, TensorType, Value
from msqkd.quant.placement import is_padded_pointwise
from msqkd.quant.plan import INT8, ActivationQuant, QuantPlan, WeightQuant
from msqkd.targets import DEPTHWISE


def lower_for_lite(graph: Graph, plan: QuantPlan) -> tuple[Graph, QuantPlan]:
    """A copy of graph and plan in the forms MindSpore Lite's converter keeps wholly int8."""
    graph, plan = lower_forms(graph, plan)
    for node in list(graph.nodes):
        if node.op == "Dense" and node.name in plan.weights:
            _dense_to_conv(graph, plan, node)
    _join_reshapes(graph, plan)
    plan.activations = {name: quant for name, quant in plan.activations.items() if name in graph.values}
    graph.check()
    return graph, plan


def lower_forms(graph: Graph, plan: QuantPlan) -> tuple[Graph, QuantPlan]:
    """A copy of graph and plan in which every int8 node has the form the plan chose for it."""
    graph = graph.copy()
    plan = replace(plan, activations=dict(plan.activations), weights=dict(plan.weights))
    for decision in plan.nodes:
        if decision.precision != INT8:
            continue
        node = graph.node(decision.name)
        if decision.form == DEPTHWISE:
            _average_to_conv(graph, plan, node, decision.rule)
        elif node.op == "Conv2D" and is_padded_pointwise(graph, node):
            _embed_pointwise(graph, node)
    graph.prune()
    graph.check()
    return graph, plan


def _reshape(graph: Graph, plan: QuantPlan, source: str, shape: tuple[int, ...], hint: str, output: str = "") -> Node:
    batch = graph.shape(source)[0]
    output = output or graph.unique_value(hint)
    graph.add_value(Value(output, "node", TensorType((batch, *shape[1:]))))
    if source in plan.activations:
        plan.activations[output] = ActivationQuant(output, plan.activations[source].group, exact=True)
    return Node(graph.unique_node(hint), "Reshape", [source, graph.add_const(shape, "shape")], [output])


def _dense_to_conv(graph: Graph, plan: QuantPlan, node: Node) -> None:
    """Reshape (N, C) → (N, C, 1, 1), a 1×1 convolution with its activation, and Reshape back."""
    weight = graph.params[node.inputs[1]]
    out_features, features = weight.data.shape
    weight.data = weight.data.reshape(out_features, features, 1, 1)
    graph.values[node.inputs[1]] = Value(node.inputs[1], "param", TensorType(weight.data.shape))
    readers = graph.consumers(node.output)
    fused = len(readers) == 1 and plan.node(readers[0].name).fused_into == node.name
    tail = readers[0] if fused else node
    position = graph.nodes.index(node)
    before = _reshape(graph, plan, node.inputs[0], (-1, features, 1, 1), f"{node.name}.to_map")
    node.inputs[0] = before.output
    final = tail.output
    mapped = graph.unique_value(f"{final}_map")
    batch = graph.shape(final)[0]
    graph.add_value(Value(mapped, "node", TensorType((batch, out_features, 1, 1))))
    if tail is not node:
        graph.values[node.output] = Value(node.output, "node", TensorType((batch, out_features, 1, 1)))
    tail.outputs = [mapped]
    if final in plan.activations:
        plan.activations[mapped] = replace(plan.activations[final], value=mapped)
    node.op, node.functional = "Conv2D", False
    node.attrs = _valid_conv((1, 1), out_features)
    graph.nodes.insert(position, before)
    graph.insert_after(
        tail, [_reshape(graph, plan, mapped, (-1, out_features), f"{node.name}.to_vector", output=final)]
    )


def _average_to_conv(graph: Graph, plan: QuantPlan, node: Node, rule: str) -> None:
    """A depthwise convolution whose weights are all 1 / window, and a Reshape where a mean dropped the axes."""
    shape, final = graph.shape(node.inputs[0]), node.output
    channels = shape[1]
    if node.op == "ReduceMean":
        window, strides = tuple(shape[2:]), (1, 1)
    else:
        window, strides = graph.const(node.inputs[1]), graph.const(node.inputs[2])
    weight = graph.add_param(
        f"{node.name}.weight", np.full((channels, 1, *window), 1 / prod(window), np.float32), trainable=False
    )
    node.op, node.inputs, node.functional = "Conv2D", [node.inputs[0], weight], False
    node.attrs = _valid_conv(window, channels, strides, group=channels)
    plan.weights[node.name] = WeightQuant(node.name, 8, None, "minmax", rule)
    if len(graph.shape(final)) == 4:
        return
    pooled = graph.unique_value(f"{final}_map")
    graph.add_value(Value(pooled, "node", TensorType((shape[0], channels, 1, 1))))
    node.outputs = [pooled]
    plan.activations[pooled] = replace(plan.activations[final], value=pooled)
    graph.insert_after(node, [_reshape(graph, plan, pooled, (-1, channels), f"{node.name}.to_vector", output=final)])


def _embed_pointwise(graph: Graph, node: Node) -> None:
    """A padded 1×1 kernel in the middle of a 3×3 of zeros, with one more row and column of padding on each side."""
    weight = graph.params[node.inputs[1]]
    weight.data = np.pad(weight.data, ((0, 0), (0, 0), (1, 1), (1, 1)))
    graph.values[node.inputs[1]] = Value(node.inputs[1], "param", TensorType(weight.data.shape))
    pads = tuple(p + 1 for p in node.attrs["pad_list"])
    node.attrs = {**node.attrs, "kernel_size": (3, 3), "pad_mode": "pad", "pad": pads, "pad_list": pads}
    node.attrs["dilation"] = (1, 1, 1, 1)


def _valid_conv(
    kernel: tuple[int, ...], out_channels: int, strides: tuple[int, ...] = (1, 1), group: int = 1
) -> dict[str, Any]:
    """Attributes of a convolution that does not pad, as MindSpore records them."""
    return {
        "kernel_size": tuple(kernel), "mode": 1, "out_channel": out_channels, "pad_mode": "valid", "pad": (0, 0, 0, 0),
        "stride": (1, 1, *strides), "dilation": (1, 1, 1, 1), "group": group, "groups": group, "format": "NCHW",
        "pad_list": (0, 0, 0, 0), "input_names": ["x", "w"], "output_names": ["output"],
    }  # fmt: skip


def _join_reshapes(graph: Graph, plan: QuantPlan) -> None:
    """Reshape of a Reshape is one Reshape, or none where it ends in the shape it began with."""
    for node in list(graph.nodes):
        source = graph.producer(node.inputs[0]) if node.op == "Reshape" else None
        if source is None or source.op != "Reshape":
            continue
        origin = source.inputs[0]
        node.inputs[0] = origin
        if graph.shape(origin)[1:] == graph.shape(node.output)[1:] and node.output not in graph.outputs:
            graph.replace_value(node.output, origin)
            graph.nodes.remove(node)
    graph.prune()
