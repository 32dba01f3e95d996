"""Pools with padding of their own, in forms that MindIR and MindSpore Lite's converter know.

MindIR's pools have the modes SAME and VALID, and the converter knows none of the operations in three dimensions that
MindSpore writes instead. Which form a pool has says `msqkd.quant.uses.padded_pool_form`; each gives the same numbers,
in float and in int8, where all it adds has the parameters of what it reads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from msqkd.graph.ir import Graph, Node, TensorType, Value
from msqkd.graph.passes.padding import padded_shape
from msqkd.quant.plan import QuantPlan
from msqkd.quant.uses import POOL_MODES, SAME_FORM, ZEROS_FORM, Pooling, padded_pool_form, pooling_of


def write_padded_pools(graph: Graph, plan: QuantPlan) -> None:
    """Give every pool that pads, and has a form, that form; `graph` and the activations of `plan` change in place."""
    for node in [node for node in graph.nodes if node.op in ("MaxPool", "AvgPool")]:
        pool = pooling_of(graph, node)
        form = padded_pool_form(graph, node) if pool.mode == "PAD" else None
        if form is None:
            continue
        node.body = None
        if form == SAME_FORM:
            node.attrs = _attrs(pool.kernel, pool.strides, "SAME")
        elif form == ZEROS_FORM:
            _zeros_before(graph, plan, node, pool)
        else:
            _choice_behind(graph, plan, node, pool)
        if node.op == "AvgPool":
            _as_arguments(graph, node)


def _attrs(kernel: tuple[int, ...], strides: tuple[int, ...], mode: str) -> dict[str, Any]:
    """As MindSpore records them."""
    return {
        "kernel_size": (1, 1, *kernel), "strides": (1, 1, *strides), "pad_mode": mode, "format": "NCHW",
        "input_names": ["x"], "output_names": ["output"],
    }  # fmt: skip


def _zeros_before(graph: Graph, plan: QuantPlan, node: Node, pool: Pooling) -> None:
    top, bottom, left, right = pool.sides
    source = node.inputs[0]
    padded = _between(graph, source, "padded", padded_shape(graph.shape(source), (top, bottom, left, right)))
    pairs = ((0, 0), (0, 0), (top, bottom), (left, right))
    pad = Node(graph.unique_node(f"{node.name}.pad"), "Pad", [source], [padded], {"paddings": pairs}, functional=False)
    graph.nodes.insert(graph.nodes.index(node), pad)
    node.inputs, node.attrs = [padded], _attrs(pool.kernel, pool.strides, "VALID")
    if node.output in plan.activations:
        plan.activations[padded] = replace(plan.activations[node.output], value=padded, exact=True)


def _choice_behind(graph: Graph, plan: QuantPlan, node: Node, pool: Pooling) -> None:
    """The pool at every place, and a maximum over one element at every so many of them."""
    final = node.output
    everywhere = _between(graph, final, "everywhere", graph.shape(node.inputs[0]))
    node.outputs, node.attrs = [everywhere], _attrs(pool.kernel, (1, 1), "SAME")
    name = graph.unique_node(f"{node.name}.choice")
    choice = Node(name, "MaxPool", [everywhere], [final], _attrs((1, 1), pool.strides, "VALID"), functional=False)
    graph.insert_after(node, [choice])
    if final in plan.activations:
        plan.activations[everywhere] = replace(plan.activations[final], value=everywhere)
        plan.activations[final] = replace(plan.activations[final], exact=True)


def _between(graph: Graph, like: str, hint: str, shape: tuple[int, ...]) -> str:
    return graph.add_value(Value(graph.unique_value(f"{like}_{hint}"), "node", TensorType(shape)))


def _as_arguments(graph: Graph, node: Node) -> None:
    """AvgPool takes as arguments what MaxPool has as attributes."""
    attrs, node.attrs, node.functional = node.attrs, {}, True
    mode = next(number for number, name in POOL_MODES.items() if name == attrs["pad_mode"])
    literals = (attrs["kernel_size"][2:], attrs["strides"][2:], mode, 0)
    node.inputs = [node.inputs[0], *(graph.add_const(literal, "pooling") for literal in literals)]
