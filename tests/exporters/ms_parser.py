"""An independent reader of ``.ms`` files, for tests: `struct` and the slot numbers of the format, nothing of msqkd.

Reading holds every offset and alignment to the buffer; `check_int8_file` holds the contents to what the runtime needs.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any, Optional

INT8, INT32, INT64, FLOAT32 = 32, 34, 35, 43
ITEM_SIZES = {INT8: 1, INT32: 4, INT64: 8, FLOAT32: 4}
NHWC, KHWC = 1, 7
ACTIVATION, ADD, AVG_POOL, CONV, MATMUL, MAX_POOL, CAST, REDUCE = 2, 5, 17, 35, 89, 92, 113, 118
WEIGHTED = (CONV, MATMUL)


class Table:
    """A FlatBuffers table at `position` of `data`."""

    def __init__(self, data: bytes, position: int) -> None:
        self.data, self.position = data, position
        assert position % 4 == 0
        assert 0 < position <= len(data) - 4
        self.vtable = position - struct.unpack_from("<i", data, position)[0]
        assert self.vtable % 2 == 0
        assert 0 <= self.vtable <= len(data) - 4
        self.size, self.extent = struct.unpack_from("<HH", data, self.vtable)
        assert self.vtable + self.size <= len(data)
        assert position + self.extent <= len(data)

    def place(self, slot: int) -> int:
        at = 4 + 2 * slot
        offset = struct.unpack_from("<H", self.data, self.vtable + at)[0] if at < self.size else 0
        assert offset < self.extent
        return self.position + offset if offset else 0

    def scalar(self, slot: int, code: str, default: Any = 0) -> Any:
        place = self.place(slot)
        assert place % struct.calcsize("<" + code) == 0
        return struct.unpack_from("<" + code, self.data, place)[0] if place else default

    def follow(self, slot: int) -> int:
        place = self.place(slot)
        assert place % 4 == 0
        return place + struct.unpack_from("<I", self.data, place)[0] if place else 0

    def string(self, slot: int) -> str:
        place = self.follow(slot)
        if not place:
            return ""
        count = struct.unpack_from("<I", self.data, place)[0]
        assert self.data[place + 4 + count] == 0
        return self.data[place + 4 : place + 4 + count].decode()

    def span(self, slot: int, size: int) -> tuple[int, int]:
        """Where the items of a vector begin, and how many there are; (0, 0) where it is absent."""
        place = self.follow(slot)
        if not place:
            return 0, 0
        assert place % 4 == 0
        count = struct.unpack_from("<I", self.data, place)[0]
        assert (place + 4) % size == 0
        assert place + 4 + size * count <= len(self.data)
        return place + 4, count

    def numbers(self, slot: int, code: str) -> list[int]:
        start, count = self.span(slot, struct.calcsize("<" + code))
        return list(struct.unpack_from(f"<{count}{code}", self.data, start)) if start else []

    def tables(self, slot: int) -> list[Table]:
        start, count = self.span(slot, 4)
        places = [start + 4 * i for i in range(count)]
        return [Table(self.data, place + struct.unpack_from("<I", self.data, place)[0]) for place in places]

    def table(self, slot: int) -> Table:
        return Table(self.data, self.follow(slot))


@dataclass
class Tensor:
    """A tensor: `quant` holds (scale, zero point, bits, inited) for every channel, `data` is None if computed."""

    name: str
    kind: int
    data_type: int
    dims: list[int]
    format: int
    references: int
    data: Optional[bytes]
    data_at: int
    quant: list[tuple[float, int, int, bool]]
    table: Table


@dataclass
class Node:
    """A node: its primitive's union tag and table, and the numbers of its tensors; `union` is the table between."""

    name: str
    tag: int
    primitive: Table
    inputs: list[int]
    outputs: list[int]
    quant_type: int
    device: int
    union: Table
    table: Table


@dataclass
class Model:
    """A file."""

    name: str
    version: str
    framework: int
    inputs: list[int]
    outputs: list[int]
    nodes: list[Node]
    tensors: list[Tensor]
    subgraphs: list[Table]

    def node(self, name: str) -> Node:
        return next(node for node in self.nodes if node.name == name)

    def tensor(self, name: str) -> Tensor:
        return next(tensor for tensor in self.tensors if tensor.name == name)


def parse(data: bytes) -> Model:
    assert data[4:8] == b"MSL2"
    root = Table(data, struct.unpack_from("<I", data, 0)[0])
    return Model(
        name=root.string(0),
        version=root.string(1),
        framework=root.scalar(2, "i"),
        inputs=root.numbers(3, "I"),
        outputs=root.numbers(4, "I"),
        nodes=[_node(table) for table in root.tables(6)],
        tensors=[_tensor(table) for table in root.tables(7)],
        subgraphs=root.tables(8),
    )


def _node(table: Table) -> Node:
    union = table.table(2)
    return Node(
        name=table.string(0),
        tag=union.scalar(0, "B"),
        primitive=union.table(1),
        inputs=table.numbers(3, "I"),
        outputs=table.numbers(4, "I"),
        quant_type=table.scalar(5, "i"),
        device=table.scalar(6, "i", -1),
        union=union,
        table=table,
    )


def _tensor(table: Table) -> Tensor:
    start, count = table.span(6, 1)
    return Tensor(
        name=table.string(9),
        kind=table.scalar(0, "i"),
        data_type=table.scalar(1, "i"),
        dims=table.numbers(2, "i"),
        format=table.scalar(3, "i"),
        references=table.scalar(4, "i"),
        data=table.data[start : start + count] if start else None,
        data_at=start,
        quant=[
            (q.scalar(0, "d", 1.0), q.scalar(1, "i"), q.scalar(5, "i", 8), bool(q.scalar(6, "B")))
            for q in table.tables(7)
        ],
        table=table,
    )


def check_int8_file(data: bytes) -> Model:
    """Everything the runtime needs of a file with int8 nodes."""
    model = parse(data)
    assert (model.version, model.framework) == ("MindSpore Lite 2.7.0", 3)
    (graph,) = model.subgraphs
    assert graph.numbers(1, "I") == model.inputs
    assert graph.numbers(2, "I") == model.outputs
    assert graph.numbers(3, "I") == list(range(len(model.nodes)))
    assert graph.numbers(4, "I") == list(range(len(model.tensors)))
    assert len({node.name for node in model.nodes}) == len(model.nodes)
    assert len({tensor.name for tensor in model.tensors}) == len(model.tensors)
    for tensor in model.tensors:
        _check_tensor(tensor)
    ready = set(model.inputs) | {i for i, tensor in enumerate(model.tensors) if tensor.data is not None}
    for node in model.nodes:
        assert ready.issuperset(node.inputs)
        assert ready.isdisjoint(node.outputs)
        ready.update(node.outputs)
        _check_node(node, [model.tensors[i] for i in node.inputs], [model.tensors[i] for i in node.outputs])
    assert ready.issuperset(model.outputs)
    return model


def _check_tensor(tensor: Tensor) -> None:
    assert tensor.format in (NHWC, KHWC)
    if tensor.data is None:
        assert (tensor.kind, tensor.references, tensor.format) == (2, 1, NHWC)
        assert len(tensor.quant) == (tensor.data_type == INT8)
    else:
        assert (tensor.kind, tensor.references) == (0, 999)
        assert len(tensor.data) == math.prod(tensor.dims) * ITEM_SIZES[tensor.data_type]
        assert tensor.data_at % 16 == 0
    if tensor.data_type == INT8:
        assert tensor.quant
    else:
        assert not tensor.quant
    for scale, zero_point, bits, inited in tensor.quant:
        assert scale > 0
        assert -128 <= zero_point <= 127
        assert (bits, inited) == (8, True)


def _check_node(node: Node, inputs: list[Tensor], outputs: list[Tensor]) -> None:
    assert node.device == -1
    if node.tag == CAST:
        assert node.quant_type == 0
        assert node.primitive.scalar(0, "q") == inputs[0].data_type
        assert node.primitive.scalar(1, "q") == outputs[0].data_type
        return
    int8 = node.quant_type == 5
    assert int8 or node.quant_type in (0, 4)
    for tensor in [*outputs, *(t for t in inputs if t.data is None)]:
        assert (tensor.data_type == INT8) == int8
    weights = [t for t in inputs if t.data is not None and t.data_type == INT8]
    assert bool(weights) == (node.quant_type == 4) or int8
    if node.tag in WEIGHTED:
        _check_weighted(node, inputs, outputs[0], int8)
    if node.tag == CONV:
        _check_conv(node, inputs, outputs[0])
    if node.tag in (AVG_POOL, MAX_POOL):
        assert (node.primitive.scalar(4, "b"), node.primitive.scalar(5, "i")) == (0, NHWC)
        assert inputs[0].quant == outputs[0].quant
    if node.tag == REDUCE:
        assert inputs[1].data_type == INT32


def _check_weighted(node: Node, inputs: list[Tensor], output: Tensor, int8: bool) -> None:
    weight, outs = inputs[1], output.dims[-1]
    if weight.data_type == INT8:
        assert len(weight.quant) in (1, outs)
    if len(inputs) == 3:
        assert inputs[2].data_type == (INT32 if int8 else FLOAT32)
        assert inputs[2].dims == [outs]
    if node.tag == MATMUL and weight.data is not None:
        transposed = node.primitive.scalar(1, "B")
        assert weight.dims[-2 if transposed else -1] == outs
        assert weight.format == NHWC


def _check_conv(node: Node, inputs: list[Tensor], output: Tensor) -> None:
    primitive, weight = node.primitive, inputs[1]
    channels, outs = inputs[0].dims[-1], output.dims[-1]
    group = primitive.scalar(7, "q")
    assert weight.format == KHWC
    assert weight.dims == [outs, *primitive.numbers(1, "q"), channels // group]
    assert primitive.scalar(0, "i") == NHWC
    assert primitive.scalar(6, "q") == 1
    assert (primitive.scalar(8, "q"), primitive.scalar(9, "q")) == (channels, outs)
    assert len(primitive.numbers(2, "q")) == len(primitive.numbers(3, "q")) == 2
    assert primitive.scalar(10, "b") in (0, 1, 3)
    pads = primitive.numbers(5, "q")
    assert primitive.scalar(4, "b") != 2 or not any(pads)
    assert group in (1, channels) or len(weight.quant) <= 1
