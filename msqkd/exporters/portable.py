"""Portable MindIR: ordinary operations and int8 weights; MindSpore itself loads and runs it, on any device.

Larger weights of at most four bits are packed, two in a byte: of 2m numbers the byte i holds 16 · a + b + 8, where a is
number i and b number m + i. Both are got back by a division by 16 and a rounding down, exactly, in float32.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any, Optional

import mindspore as ms
import numpy as np

from msqkd.exporters.compact import compact_model
from msqkd.exporters.mindir_file import write_cell
from msqkd.files import PathLike
from msqkd.graph.cell import to_cell
from msqkd.graph.ir import Graph, Node, TensorType, Value
from msqkd.quant.plan import DynamicQuant, QuantPlan, WeightQuant
from msqkd.quant.qparams import SCALE_FLOOR, quant_limits

_PACKED_BITS = 4
_NIBBLE = 16
_WORTH_PACKING = 2048  # numbers; unpacking fewer takes more bytes of operations than packing saves


def export_portable(graph: Graph, plan: QuantPlan, file: PathLike) -> Path:
    """Write the quantised network; weights are stored as int8, or two in a byte, and multiplied by their scale when it
    runs.

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
    for name, quant in plan.with_weight_observers(graph).weights.items():
        _store_weight(result, result.node(name), quant)
    for name, dynamic in plan.dynamic.items():
        _round_rows(result, result.node(name), dynamic)
    for value, activation in plan.activations.items():
        if not activation.exact:
            _round_activation(result, value, activation.edges, plan)
    result.prune()
    result.check()
    return result


def pack(integers: np.ndarray) -> np.ndarray:
    """Integers from -8 to 7, of any shape, two in an int8: of shape (ceil(size / 2),)."""
    flat = integers.reshape(-1).astype(np.int32)
    high, low = np.split(np.pad(flat, (0, flat.size % 2)), 2)
    return (_NIBBLE * high + low + _NIBBLE // 2).astype(np.int8)


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

    def put_before(self, node: Node) -> None:
        """Into the graph."""
        position = self.graph.nodes.index(node)
        self.graph.nodes[position:position] = self.nodes


def _store_weight(graph: Graph, node: Node, quant: WeightQuant) -> None:
    weight = node.inputs[quant.index]
    data = graph.params[weight].data
    qparams = quant.qparams(data)
    integers = qparams.quantize(data).astype(np.int8)
    packed = quant.bits <= _PACKED_BITS and data.size >= _WORTH_PACKING
    array = pack(integers) if packed else integers
    stored = _stored(graph, f"{weight}.int4x2" if packed else f"{weight}.int8", array)
    scale = np.asarray(qparams.scale, np.float32)
    if quant.axis is not None:
        scale = scale.reshape([-1 if i == quant.axis else 1 for i in range(data.ndim)])
    steps = _Steps(graph, f"{node.name}.weight")
    numbers = steps.add("Cast", stored, graph.add_const("float32", "dtype"), kind=TensorType(array.shape))
    if packed:
        numbers = _unpacked(steps, numbers, data.shape)
    node.inputs[quant.index] = steps.add("Mul", numbers, graph.add_const(scale, "scale"), kind=TensorType(data.shape))
    steps.put_before(node)


def _stored(graph: Graph, name: str, array: np.ndarray) -> str:
    """The name of a parameter that holds `array`: layers that share a weight and its integers share it too."""
    held = graph.params.get(name)
    if held is not None and not np.array_equal(held.data, array):
        name = graph.unique_value(name)
    return graph.add_param(name, array, trainable=False)


def _unpacked(steps: _Steps, numbers: str, shape: tuple[int, ...]) -> str:
    """The integers that `pack` put into `numbers`, in `shape`."""
    size = prod(shape)
    half = TensorType((-(-size // 2),))
    high = steps.add("Floor", steps.add("Mul", numbers, 1.0 / _NIBBLE, kind=half), kind=half)
    rest = steps.add("Sub", numbers, steps.add("Mul", high, float(_NIBBLE), kind=half), kind=half)
    low = steps.add("Sub", rest, float(_NIBBLE // 2), kind=half)
    flat = steps.add("Concat", high, low, 0, kind=TensorType((2 * half.shape[0],)))
    steps.nodes[-1].sequences = ((0, 2),)
    if size % 2:
        flat = steps.add("Slice", flat, (0,), (size,), kind=TensorType((size,)))
    return steps.add("Reshape", flat, shape, kind=TensorType(shape))


def _round_rows(graph: Graph, node: Node, quant: DynamicQuant) -> None:
    """The rounding of `msqkd.quant.fake_quant.FakeQuantDynamic`, operation for operation."""
    x = node.inputs[0]
    bottom_end, top_end = (float(end) for end in quant_limits(quant.bits))
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
