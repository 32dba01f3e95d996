"""Portable MindIR: ordinary operations and int8 weights; MindSpore itself loads and runs it, on any device.

Weights with at most 16 distinct integers, be it for their few bits or because they were clustered, are packed where
that takes fewer bytes: indices of a codebook, two to eight in a byte (`msqkd.exporters.packing`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import mindspore as ms
import numpy as np

from msqkd.exporters.compact import compact_model
from msqkd.exporters.mindir_file import write_cell
from msqkd.exporters.packing import Packing, digits, pack, packings, padded
from msqkd.files import PathLike
from msqkd.graph.cell import to_cell
from msqkd.graph.ir import Graph, Node, TensorType, Value
from msqkd.quant.half import with_casts
from msqkd.quant.plan import DynamicQuant, QuantPlan, WeightQuant
from msqkd.quant.qparams import SCALE_FLOOR


def export_portable(graph: Graph, plan: QuantPlan, file: PathLike) -> Path:
    """Write the quantised network; weights are stored as int8, or packed, and multiplied by their scale when it runs.

    The batch of the inputs is open. Answers are those of the fake-quantised network.

    Raises:
        PlanError: a range is missing.
        ExportError: MindSpore cannot write the file.
    """
    portable = portable_graph(graph, plan)
    cell = to_cell(portable, shared=True)
    inputs = [_open_batch(portable, name) for name in portable.inputs]
    return write_cell(cell, inputs, file, compact_model)


def _open_batch(graph: Graph, name: str) -> Any:
    kind = graph.values[name].type
    assert kind is not None
    return ms.Tensor(shape=[None if size < 0 else size for size in kind.shape], dtype=getattr(ms, kind.dtype))


def portable_graph(graph: Graph, plan: QuantPlan) -> Graph:
    """The quantised network as a graph of ordinary operations."""
    result = graph.copy()
    _store_weights(result, plan.with_weight_observers(graph).weights)
    result = with_casts(result, plan)
    for name, dynamic in plan.dynamic.items():
        _round_rows(result, result.node(name), dynamic)
    for value, activation in plan.activations.items():
        if not activation.exact:
            _round_activation(result, value, activation.edges, plan)
    result.prune()
    result.check()
    return result


def _emit(graph: Graph, kind: Optional[TensorType], op: str, inputs: list[str], hint: str) -> Node:
    output = graph.add_value(Value(graph.unique_value(hint), "node", kind))
    return Node(graph.unique_node(hint), op, inputs, [output])


class _Steps:
    """Operations to be put before a node, and the constants they read."""

    def __init__(self, graph: Graph, hint: str) -> None:
        self.graph, self.hint = graph, hint
        self.nodes: list[Node] = []

    def add(self, op: str, *operands: Any, kind: TensorType) -> str:
        """An operation; operands are names of values, or literals. Returns the name of what it gives."""
        names = [item if isinstance(item, str) else self.literal(item) for item in operands]
        node = _emit(self.graph, kind, op, names, f"{self.hint}{len(self.nodes)}")
        self.nodes.append(node)
        return node.output

    def literal(self, item: Any) -> str:
        """The name of a literal; numbers with a fraction become 0-d tensors."""
        return self.graph.add_const(np.asarray(item, np.float32) if isinstance(item, (float, np.floating)) else item)

    def dtype(self, name: str) -> str:
        """The name of a dtype as a literal, which Cast takes."""
        return self.graph.add_const(name, "dtype")

    def put_before(self, node: Node) -> None:
        """Into the graph."""
        position = self.graph.nodes.index(node)
        self.graph.nodes[position:position] = self.nodes


def _store_weights(graph: Graph, weights: Mapping[str, WeightQuant]) -> None:
    """Let every node of `weights` read its weight as integers · scale, from a parameter that holds the integers."""
    qparams = {name: quant.qparams(quant.held_in(graph)) for name, quant in weights.items()}
    integers = {name: qparams[name].quantize(quant.held_in(graph)).astype(np.int8) for name, quant in weights.items()}
    packed = packings(integers)
    rows = _rows_of_bytes(graph, packed)
    for name, quant in weights.items():
        node, data = graph.node(name), integers[name]
        weight = node.inputs[quant.index]
        steps = _Steps(graph, f"{name}.weight")
        if name in packed:
            numbers = _unpacked(steps, weight, data, packed[name], rows[name])
        else:
            stored = _stored(graph, f"{weight}.int8", data)
            numbers = steps.add("Cast", stored, steps.dtype("float32"), kind=TensorType(data.shape))
        scale = np.asarray(qparams[name].scale, np.float32)
        if quant.axis is not None:
            scale = scale.reshape([-1 if i == quant.axis else 1 for i in range(data.ndim)])
        scaled = steps.add("Mul", numbers, graph.add_const(scale, "scale"), kind=TensorType(data.shape))
        node.inputs[quant.index] = scaled
        steps.put_before(node)


def _rows_of_bytes(graph: Graph, packed: Mapping[str, Packing]) -> dict[str, str]:
    """By node, the value that holds the integers in every byte of its weight, float32 (256, per byte); computed first,
    once for each codebook."""
    steps = _Steps(graph, "packed")
    indices: dict[int, str] = {}
    rows: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, packing in packed.items():
        width, key = packing.width, id(packing.codebook)
        table = digits(width)
        if width not in indices:
            stored = _stored(graph, f"digits.uint{width}", table)
            kind = TensorType(table.shape, "int32")
            indices[width] = steps.add("Cast", stored, steps.dtype("int32"), kind=kind)
        if key not in rows:
            codebook = _stored(graph, f"codebook.uint{width}", padded(packing.codebook, width))
            rows[key] = steps.add("Gather", codebook, indices[width], 0, 0, kind=TensorType(table.shape))
        found[name] = rows[key]
    if packed:
        steps.put_before(graph.nodes[0])
    return found


def _unpacked(steps: _Steps, weight: str, integers: np.ndarray, packing: Packing, rows: str) -> str:
    """The integers as float32, of a parameter that holds them packed."""
    array = pack(integers, packing)
    stored = _stored(steps.graph, f"{weight}.{packing.suffix}", array)
    places = steps.add("Cast", stored, steps.dtype("int32"), kind=TensorType(array.shape, "int32"))
    numbers = steps.add("Gather", rows, places, 0, 0, kind=TensorType((array.size, packing.per_byte)))
    if integers.size % packing.per_byte:
        numbers = steps.add("Reshape", numbers, (-1,), kind=TensorType((array.size * packing.per_byte,)))
        numbers = steps.add("Slice", numbers, (0,), (integers.size,), kind=TensorType((integers.size,)))
    return steps.add("Reshape", numbers, integers.shape, kind=TensorType(integers.shape))


def _stored(graph: Graph, name: str, array: np.ndarray) -> str:
    """The name of a parameter that holds `array`: layers that share a weight and its integers share it too."""
    held = graph.params.get(name)
    if held is not None and not np.array_equal(held.data, array):
        name = graph.unique_value(name)
    return graph.add_param(name, array, trainable=False)


def _round_rows(graph: Graph, node: Node, quant: DynamicQuant) -> None:
    """The rounding of `msqkd.quant.fake_quant.FakeQuantDynamic`, operation for operation."""
    x = node.inputs[0]
    bottom_end, top_end = (float(end) for end in quant.limits)
    steps = _Steps(graph, f"{node.name}.rows")

    whole = TensorType(graph.shape(x))
    row = TensorType((*whole.shape[:-1], 1))

    def add(op: str, *operands: Any, kind: TensorType = row) -> str:
        return steps.add(op, *operands, kind=kind)

    low = add("Minimum", add("ReduceMin", x, -1, True), 0.0)
    high = add("Maximum", add("ReduceMax", x, -1, True), 0.0)
    span = add("Maximum", add("Neg", low), high) if quant.symmetric else add("Sub", high, low)
    levels = top_end if quant.symmetric else top_end - bottom_end
    scale = add("Maximum", add("Div", span, levels), SCALE_FLOOR)
    inverse = add("Div", 1.0, scale)
    if quant.symmetric:
        bottom, top = steps.literal(bottom_end), steps.literal(top_end)
    else:
        bottom = add("Round", add("Mul", low, inverse), 0)
        top = add("Add", bottom, levels)
    rounded = add("Round", add("Mul", x, inverse, kind=whole), 0, kind=whole)
    clipped = add("Minimum", add("Maximum", rounded, bottom, kind=whole), top, kind=whole)
    node.inputs[0] = add("Mul", clipped, scale, kind=whole)
    steps.put_before(node)


def _round_activation(graph: Graph, value: str, edges: tuple[tuple[str, int], ...], plan: QuantPlan) -> None:
    qparams = plan.group_of(value).qparams()
    scale = np.float32(qparams.scale)
    bounds = (np.float32(qparams.qmin - qparams.zero_point), np.float32(qparams.qmax - qparams.zero_point))
    steps: list[Node] = []
    source = value
    chain = (
        ("Mul", np.float32(1) / scale),
        ("Minimum", bounds[1]),
        ("Maximum", bounds[0]),
        ("Round", None),
        ("Mul", scale),
    )
    for number, (op, operand) in enumerate(chain):
        inputs = [source]
        if op == "Round":
            inputs.append(graph.add_const(0, "decimals"))
        else:
            inputs.append(graph.add_const(np.asarray(operand, np.float32), "c"))
        node = _emit(graph, graph.values[value].type, op, inputs, f"{value}_quant{number}")
        steps.append(node)
        source = node.output
    if edges:
        for name, index in edges:
            graph.node(name).inputs[index] = source
    else:
        graph.replace_value(value, source)
    graph.insert_after(graph.producer(value), steps)


def write_float(graph: Graph, file: PathLike) -> Path:
    """Write a graph in float32, its batch open: what the quantised files are compared with."""
    return write_cell(to_cell(graph, shared=True), [_open_batch(graph, name) for name in graph.inputs], file)
