"""The graph as a runtime's importer wants it: dense layers as 1×1 convolutions, a global mean as an average pool.

Nothing is decided here; the plan says what is int8, and only int8 nodes are rewritten. The plan returned fits the
graph returned.
"""

from __future__ import annotations

from dataclasses import replace

from msqkd.graph.ir import Graph, Node, TensorType, Value
from msqkd.quant.plan import INT8, ActivationQuant, QuantPlan

_VALID, _NCHW = 2, 0  # MindSpore's numbers of the padding mode and the layout, as AvgPool takes them


def lower_for_lite(graph: Graph, plan: QuantPlan) -> tuple[Graph, QuantPlan]:
    """A copy of graph and plan in the forms MindSpore Lite's converter keeps wholly int8."""
    graph, plan = graph.copy(), replace(plan, activations=dict(plan.activations))
    int8 = {node.name for node in plan.nodes if node.precision == INT8}
    for node in list(graph.nodes):
        if node.name not in int8:
            continue
        if node.op == "Dense":
            _dense_to_conv(graph, plan, node)
        elif node.op == "ReduceMean":
            _mean_to_pool(graph, plan, node)
    _join_reshapes(graph, plan)
    graph.prune()
    plan.activations = {name: quant for name, quant in plan.activations.items() if name in graph.values}
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
    node.attrs = {
        "kernel_size": (1, 1), "mode": 1, "out_channel": out_features, "pad_mode": "valid", "pad": (0, 0, 0, 0),
        "stride": (1, 1, 1, 1),
        "dilation": (1, 1, 1, 1), "group": 1, "groups": 1, "format": "NCHW", "pad_list": (0, 0, 0, 0),
        "input_names": ["x", "w"], "output_names": ["output"],
    }  # fmt: skip
    graph.nodes.insert(position, before)
    graph.insert_after(
        tail, [_reshape(graph, plan, mapped, (-1, out_features), f"{node.name}.to_vector", output=final)]
    )


def _mean_to_pool(graph: Graph, plan: QuantPlan, node: Node) -> None:
    """An average pool over the whole plane, and a Reshape where the mean dropped the axes."""
    shape = graph.shape(node.inputs[0])
    final = node.output
    keeps = len(graph.shape(final)) == 4
    window = graph.add_const(tuple(shape[2:]), "window")
    literals = [window, window, graph.add_const(_VALID, "pad_mode"), graph.add_const(_NCHW, "format")]
    node.op, node.attrs, node.inputs = "AvgPool", {}, [node.inputs[0], *literals]
    if keeps:
        return
    pooled = graph.unique_value(f"{final}_map")
    graph.add_value(Value(pooled, "node", TensorType((shape[0], shape[1], 1, 1))))
    node.outputs = [pooled]
    plan.activations[pooled] = replace(plan.activations[final], value=pooled)
    graph.insert_after(node, [_reshape(graph, plan, pooled, (-1, shape[1]), f"{node.name}.to_vector", output=final)])


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
