"""Layers that compute in float16 between others: their float32 inputs, parameters and results are rounded to float16.

What is between (the sums of products) stays float32, as the matrix units of the devices add; training and calibration
see the rounding, and so does whatever is compared with them. A number that float16 has not is an error that names the
layer: on a device it would be infinity.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Optional

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from msqkd.errors import PlanError
from msqkd.graph.cell import Hooks
from msqkd.graph.half import float_inputs, is_float
from msqkd.graph.ir import Graph, Node, TensorType, Value
from msqkd.quant.plan import QuantPlan

LARGEST = float(np.finfo(np.float16).max)
"""The largest float16 number, 65504."""


class FakeHalf(nn.Cell):
    """Rounds to the nearest float16 number (halves to even) and back; the gradient passes straight through."""

    def __init__(self) -> None:
        super().__init__()
        self.cast = ops.Cast()

    def construct(self, x):  # type: ignore[no-untyped-def]
        """Of `x` (float32, any shape) the float16 numbers, as float32; beyond ±65520 infinity."""
        return self.cast(self.cast(x, ms.float16), ms.float32)

    def bprop(self, x, out, dout):  # type: ignore[no-untyped-def]
        """The gradient as it is."""
        return (dout,)


def rounded(x: np.ndarray) -> np.ndarray:
    """What `FakeHalf` makes of an array."""
    with np.errstate(over="ignore"):
        return np.asarray(x, np.float32).astype(np.float16).astype(np.float32)


def with_half(hooks: Hooks, graph: Graph, plan: QuantPlan, deployed: Optional[Graph] = None) -> Hooks:
    """`hooks` with the rounding of the float16 layers of a plan.

    Args:
        hooks: of the quantisers, which see values that are rounded already; weights are quantised first.
        graph: what the cell is built from: the plan's, a part of it, or a form of it that is trained.
        plan: the plan.
        deployed: the plan's own graph, where `graph` is another: its values are rounded.
    """
    names = {node.name for node in plan.half_nodes()}
    if not names:
        return hooks
    cell = FakeHalf()
    inputs = {(node.name, i): cell for node in graph.nodes if node.name in names for i in float_inputs(graph, node)}
    origin = deployed or graph
    results = {
        output: cell
        for node in origin.nodes
        if node.name in names
        for output in node.outputs
        if output in graph.values and is_float(origin, output)
    }
    return replace(hooks, arguments={**hooks.arguments, **inputs}, results={**hooks.results, **results})


def with_casts(graph: Graph, plan: QuantPlan, inside: str = "float32") -> Graph:
    """A copy of a deployment graph in which the float16 layers of a plan stand between ``Cast`` operations.

    Their parameters are stored as float16. The weights of weight-only layers are on their grid, or are computed from
    integers, already.

    Args:
        graph, plan: the network.
        inside: what the layers compute in: ``float32`` gives the numbers of `with_half`, bit for bit; ``float16`` is
            for a device whose kernels are float16.

    Raises:
        PlanError: a parameter is beyond float16.
    """
    result = graph.copy()
    check_parameters(result, plan)
    for name in [node.name for node in plan.half_nodes()]:
        _surround(result, result.node(name), inside)
    result.prune()
    result.check()
    return result


def _surround(graph: Graph, node: Node, inside: str) -> None:
    before: list[Node] = []
    for index in float_inputs(graph, node):
        source = node.inputs[index]
        kind = graph.values[source].type
        if graph.values[source].kind == "const":
            held = rounded(graph.const(source)).astype(inside)
            node.inputs[index] = graph.add_const(held, f"{node.name}.float16")
            continue
        if graph.values[source].kind == "param":
            data = graph.params[source].data
            stored = graph.add_param(graph.unique_value(f"{source}.float16"), data.astype(np.float16), trainable=False)
            kind = TensorType(data.shape)
        else:
            assert kind is not None
            stored = _cast(graph, source, kind, "float16", before)
        node.inputs[index] = stored if inside == "float16" else _cast(graph, stored, kind, inside, before)
    position = graph.nodes.index(node)
    graph.nodes[position:position] = before
    behind: list[Node] = []
    for index, output in enumerate(node.outputs):
        kind = graph.values[output].type
        if kind is None or not is_float(graph, output):
            continue
        raw = graph.add_value(Value(graph.unique_value(f"{output}.raw"), "node", replace(kind, dtype=inside)))
        node.outputs[index] = raw
        half = raw if inside == "float16" else _cast(graph, raw, kind, "float16", behind)
        behind.append(
            Node(graph.unique_node(f"{node.name}.float32"), "Cast", [half, _dtype(graph, "float32")], [output])
        )
    graph.insert_after(node, behind)


def _cast(graph: Graph, source: str, kind: TensorType, dtype: str, steps: list[Node]) -> str:
    """A ``Cast`` to `dtype`, added to `steps`; returns what it gives."""
    output = graph.add_value(Value(graph.unique_value(f"{source}.{dtype}"), "node", replace(kind, dtype=dtype)))
    steps.append(Node(graph.unique_node(f"{output}.cast"), "Cast", [source, _dtype(graph, dtype)], [output]))
    return output


def _dtype(graph: Graph, dtype: str) -> str:
    return graph.add_const(dtype, "dtype")


def check_parameters(graph: Graph, plan: QuantPlan) -> None:
    """Refuse parameters of float16 layers that float16 cannot hold.

    Raises:
        PlanError: names the first such layer.
    """
    for decision in plan.half_nodes():
        for name in graph.param_inputs(graph.node(decision.name)):
            largest = float(np.abs(graph.params[name].data).max(initial=0.0))
            if not largest <= LARGEST:
                raise PlanError(beyond(decision.name, f"its parameter '{name}'", largest, decision.precision))


def watched(graph: Graph, plan: QuantPlan) -> dict[str, str]:
    """The values that float16 layers read and give, and the first such layer of each."""
    found: dict[str, str] = {}
    for decision in plan.half_nodes():
        node = graph.node(decision.name)
        for name in (*graph.tensor_inputs(node), *node.outputs):
            if is_float(graph, name):
                found.setdefault(name, node.name)
    return found


def check_values(layer: str, value: str, seen: np.ndarray, plan: QuantPlan) -> None:
    """Refuse a value of a float16 layer (any shape) that float16 cannot hold.

    Raises:
        PlanError: names the layer.
    """
    largest = float(np.abs(seen).max(initial=0.0))
    if not np.isfinite(rounded(np.asarray(largest))):
        raise PlanError(beyond(layer, f"its value '{value}'", largest, plan.node(layer).precision))


def beyond(layer: str, what: str, largest: float, precision: str) -> str:
    """The sentence about a number that float16 has not."""
    found = f"reaches {largest:.6g}, beyond" if np.isfinite(largest) else "goes beyond"
    return (
        f"{layer}: {what} {found} {LARGEST:g}, the largest float16 number, so the layer "
        f"cannot have precision '{precision}'; give it another by a rule"
    )
