"""The graph in forms the runtime computes rightly: averages, normalisations and stand-alone activations as depthwise
convolutions where the plan says so, hard sigmoids in the kernels before them, padded 1×1 kernels embedded into zeros
and, for the converter, dense layers as 1×1 convolutions.

Nothing is decided here; the plan says what is int8, and only int8 nodes are rewritten. The plan returned fits the
graph returned.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from msqkd.exporters.lite_pools import write_padded_pools
from msqkd.graph.ir import Graph, Node, TensorType, Value
from msqkd.graph.passes.batch_statistics import spell_out_statistics
from msqkd.quant.config import INT8
from msqkd.quant.plan import ActivationQuant, NodePlan, QuantPlan, WeightQuant
from msqkd.quant.uses import conv_windows, is_padded_pointwise, pooling_of, rescale_factor
from msqkd.targets import DEPTHWISE, HARD_SIGMOID, RESCALED
from msqkd.targets.limits import is_depthwise, relu6

_IMPORTED = ("HSwish",)
"""Operations found in what a network spells out that have an int8 kernel, and that the converter knows as one."""


def lower_for_lite(graph: Graph, plan: QuantPlan) -> tuple[Graph, QuantPlan]:
    """A copy of graph and plan in the forms MindSpore Lite's converter keeps int8."""
    graph, plan = lower_forms(graph, plan)
    _rescale_by_weight(graph, plan)
    spell_out_statistics(graph)
    write_padded_pools(graph, plan)
    for node in graph.nodes:
        if node.op in _IMPORTED:
            node.body = None
    int8 = plan.int8_weights()
    for node in list(graph.nodes):
        if node.op == "Dense" and node.name in int8:
            _dense_to_conv(graph, plan, node)
    _join_reshapes(graph, plan)
    plan.activations = {name: quant for name, quant in plan.activations.items() if name in graph.values}
    graph.check()
    return graph, plan


def lower_forms(graph: Graph, plan: QuantPlan) -> tuple[Graph, QuantPlan]:
    """A copy of graph and plan in which every int8 node has the form the plan chose for it."""
    graph = graph.copy()
    plan = replace(plan, nodes=list(plan.nodes), activations=dict(plan.activations), weights=dict(plan.weights))
    nodes = {node.name: node for node in graph.nodes}
    for decision in list(plan.nodes):
        if decision.precision != INT8:
            continue
        node = nodes[decision.name]
        if decision.form == DEPTHWISE:
            _DEPTHWISE_FORMS.get(node.op, _average_to_conv)(graph, plan, node, decision)
        elif decision.form == HARD_SIGMOID:
            _into_kernel_before(graph, plan, node)
        elif node.op == "Conv2D" and is_padded_pointwise(graph, node):
            _embed_pointwise(graph, node)
        if node.op == "Conv2D" and node.name in plan.weights:
            trim_taps(graph, node, plan.weights)
        if node.op == "ReLU6" and _never_clips(plan, node):
            node.op, node.attrs = "ReLU", {}
    graph.prune()
    graph.check()
    return graph, plan


def _rescale_by_weight(graph: Graph, plan: QuantPlan) -> None:
    """Write an int8 product with a number as one with a weight of one element: the integer 1 in steps of the number."""
    for decision in plan.nodes:
        if decision.precision != INT8 or decision.form != RESCALED:
            continue
        node = graph.node(decision.name)
        factor = rescale_factor(graph, node)
        assert factor is not None
        number = graph.add_param(
            graph.unique_value(f"{node.name}.factor"), np.array([factor], np.float32), trainable=False
        )
        node.op, node.inputs, node.attrs = "Mul", [graph.tensor_inputs(node)[0], number], {}
        plan.weights[node.name] = WeightQuant(
            node.name, 8, None, "minmax", decision.rule, scale=np.asarray(factor, np.float32)
        )


def _reshape(
    graph: Graph, plan: QuantPlan, source: str, shape: tuple[int, ...], rows: int, hint: str, output: str = ""
) -> Node:
    """A Reshape to `shape`, whose first size is open and is `rows` in truth (-1 where it is not known)."""
    output = output or graph.unique_value(hint)
    graph.add_value(Value(output, "node", TensorType((rows, *shape[1:]))))
    if source in plan.activations:
        plan.activations[output] = ActivationQuant(output, plan.activations[source].group, exact=True)
    return Node(graph.unique_node(hint), "Reshape", [source, graph.add_const(shape, "shape")], [output])


def _dense_to_conv(graph: Graph, plan: QuantPlan, node: Node) -> None:
    """Reshape (..., C) → (N, C, 1, 1), a 1×1 convolution with its activation, and Reshape back."""
    if any(reader.name not in plan.int8_weights() for reader in graph.consumers(node.inputs[1])):
        own_weight(graph, node)  # an embedding reads it too, say, in the shape it has
    weight = graph.params[node.inputs[1]]
    out_features = weight.data.shape[0]
    features = weight.data.size // out_features
    leading = graph.shape(node.output)[:-1]
    rows = -1 if min(leading) < 0 else prod(leading)
    weight.data = weight.data.reshape(out_features, features, 1, 1)
    graph.values[node.inputs[1]] = Value(node.inputs[1], "param", TensorType(weight.data.shape))
    readers = graph.consumers(node.output)
    fused = len(readers) == 1 and plan.node(readers[0].name).fused_into == node.name
    tail = readers[0] if fused else node
    position = graph.nodes.index(node)
    before = _reshape(graph, plan, node.inputs[0], (-1, features, 1, 1), rows, f"{node.name}.to_map")
    node.inputs[0] = before.output
    final = tail.output
    mapped = graph.unique_value(f"{final}_map")
    graph.add_value(Value(mapped, "node", TensorType((rows, out_features, 1, 1))))
    if tail is not node:
        graph.values[node.output] = Value(node.output, "node", TensorType((rows, out_features, 1, 1)))
    tail.outputs = [mapped]
    if final in plan.activations:
        plan.activations[mapped] = replace(plan.activations[final], value=mapped)
    node.op, node.functional = "Conv2D", False
    node.attrs = _valid_conv((1, 1), out_features)
    graph.nodes.insert(position, before)
    sizes = (-1, *leading[1:], out_features)
    graph.insert_after(tail, [_reshape(graph, plan, mapped, sizes, leading[0], f"{node.name}.to_vector", output=final)])


def own_weight(graph: Graph, node: Node, index: int = 1) -> None:
    """Let input `index` of `node` be a parameter of its own with the numbers of the one it shares with others."""
    weight = node.inputs[index]
    held = graph.params[weight]
    node.inputs[index] = graph.add_param(graph.unique_value(f"{weight}.{node.name}"), held.data, held.trainable)


def trim_taps(graph: Graph, node: Node, weights: dict[str, WeightQuant]) -> None:
    """Leave out the outer taps of a depthwise kernel where they read nothing but padding, in place.

    The runtime crashes on arm64 where such a convolution pads by more than its input has; without these taps it
    computes the same. The weight keeps its scale.
    """
    windows, data = conv_windows(graph, node), graph.params[node.inputs[1]].data
    group = int(node.attrs.get("group", 1))
    if windows is None or not is_depthwise(data.shape[1] * group, data.shape[0], group):
        return
    if not windows.pads_beyond_input() or windows.trimmed() == windows:
        return
    (top, bottom), (left, right) = windows.taps(0), windows.taps(1)
    if node.name in weights:
        quant = weights[node.name].settled(data)
        weights[node.name] = replace(quant, scale=quant.qparams(data).scale)
    kept = data[:, :, top : bottom + 1, left : right + 1]
    node.inputs[1] = graph.add_param(graph.unique_value(f"{node.name}.taps"), kept, trainable=False)
    pads = windows.trimmed().pads
    node.attrs = {**node.attrs, "kernel_size": kept.shape[2:], "pad_mode": "pad", "pad": pads, "pad_list": pads}


def _never_clips(plan: QuantPlan, node: Node) -> bool:
    """Whether the range of a ReLU6 ends so far below 6 that the runtime has no integer for it."""
    qparams = plan.group_of(node.output).qparams()
    return relu6(float(qparams.scale), int(qparams.zero_point)) is not None


def _average_to_conv(graph: Graph, plan: QuantPlan, node: Node, decision: NodePlan) -> None:
    """A depthwise convolution whose weights are all 1 / window, and a Reshape where a mean dropped the axes."""
    shape, final = graph.shape(node.inputs[0]), node.output
    channels = shape[1]
    if node.op == "AvgPool":
        window, strides = pooling_of(graph, node)[:2]
    else:
        window, strides = tuple(shape[2:]), (1, 1)
    kernel = np.full((channels, 1, *window), 1 / prod(window), np.float32)
    _to_depthwise(graph, plan, node, kernel, strides)
    plan.weights[node.name] = WeightQuant(node.name, 8, None, "minmax", decision.rule)
    if len(graph.shape(final)) == 4:
        return
    pooled = graph.unique_value(f"{final}_map")
    graph.add_value(Value(pooled, "node", TensorType((shape[0], channels, 1, 1))))
    node.outputs = [pooled]
    plan.activations[pooled] = replace(plan.activations[final], value=pooled)
    graph.insert_after(
        node, [_reshape(graph, plan, pooled, (-1, channels), shape[0], f"{node.name}.to_vector", output=final)]
    )


def _norm_to_conv(graph: Graph, plan: QuantPlan, node: Node, decision: NodePlan) -> None:
    """A factor and an offset a channel: one weight a channel is exactly on the grid of its own scale."""
    gamma, beta, mean, variance = (graph.params[name].data.astype(np.float64) for name in node.inputs[1:5])
    factor = gamma / np.sqrt(variance + float(graph.const(node.inputs[6])))
    _to_depthwise(graph, plan, node, factor.astype(np.float32).reshape(-1, 1, 1, 1))
    offset = (beta - mean * factor).astype(np.float32)
    node.inputs.append(graph.add_param(graph.unique_value(f"{node.name}.offset"), offset, trainable=False))
    node.outputs = node.outputs[:1]
    plan.weights[node.name] = WeightQuant(node.name, 8, 0, "minmax", decision.rule)


def _activation_to_conv(graph: Graph, plan: QuantPlan, node: Node, decision: NodePlan) -> None:
    """A stand-alone activation as a convolution with the weight 1, in whose kernel it is computed."""
    source = node.inputs[0]
    copied = graph.add_value(Value(graph.unique_value(f"{node.name}.copy"), "node", graph.values[source].type))
    conv = Node(node.name, "Conv2D", [source], [copied], {}, node.cell_path, node.cell_types)
    graph.nodes.insert(graph.nodes.index(node), conv)
    node.name = graph.unique_node(f"{conv.name}.activation")
    node.inputs = [copied, *node.inputs[1:]]
    _to_depthwise(graph, plan, conv, np.ones((graph.shape(source)[1], 1, 1, 1), np.float32))
    plan.weights[conv.name] = WeightQuant(conv.name, 8, None, "minmax", decision.rule)
    plan.nodes.append(replace(decision, name=node.name, fused_into=conv.name, form=None))


_DEPTHWISE_FORMS = {"BatchNorm": _norm_to_conv, "ReLU": _activation_to_conv, "ReLU6": _activation_to_conv}
"""How operations other than averages become depthwise convolutions."""


def _to_depthwise(
    graph: Graph, plan: QuantPlan, node: Node, kernel: np.ndarray, strides: tuple[int, ...] = (1, 1)
) -> None:
    """Make `node` a convolution of its first input with `kernel` (C, 1, H, W)."""
    weight = graph.add_param(graph.unique_value(f"{node.name}.weight"), kernel, trainable=False)
    channels = kernel.shape[0]
    node.op, node.inputs, node.functional, node.body = "Conv2D", [node.inputs[0], weight], False, None
    node.attrs = _valid_conv(kernel.shape[2:], channels, strides, group=channels)


def _into_kernel_before(graph: Graph, plan: QuantPlan, node: Node) -> None:
    """clip((x + 3) / 6, 0, 1) as a ReLU of another convolution: the lower clip is the ReLU, the upper one the end of
    int8, as the range of the result is 0 to 1."""
    head = graph.producer(node.inputs[0])
    assert head is not None
    weight = graph.params[head.inputs[1]].data
    channels = weight.shape[0]
    offset = graph.params[head.inputs[2]].data if len(head.inputs) > 2 else np.zeros(channels, np.float32)
    offset = np.broadcast_to((offset + np.float32(3)) / np.float32(6), (channels,))
    names = [f"{head.name}.sixth_weight", f"{head.name}.sixth_bias"]
    arrays = [weight / np.float32(6), offset]
    if head.name in plan.weights:
        plan.weights[head.name] = plan.weights[head.name].divided(6)
    head.inputs[1:] = [
        graph.add_param(graph.unique_value(name), array.astype(np.float32), trainable=False)
        for name, array in zip(names, arrays)
    ]
    node.op, node.attrs, node.functional, node.body = "ReLU", {}, True, None


def _embed_pointwise(graph: Graph, node: Node) -> None:
    """A padded 1×1 kernel in the middle of a 3×3 of zeros, with one more row and column of padding on each side."""
    if len(graph.consumers(node.inputs[1])) > 1:
        own_weight(graph, node)
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
