"""A ``.ms`` file as a program: the reverse of `msqkd.exporters.ms.write`.

Nothing in the file is trusted: every offset is held to the buffer before it is followed. What MindSpore Lite may write
and a program cannot express (control flow, packed or compressed weights, other kinds of number, unknown dimensions) is
refused.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, Union

import numpy as np

from msqkd.errors import ExportError
from msqkd.exporters.ms import layout
from msqkd.exporters.ms.check import check_structure
from msqkd.files import PathLike
from msqkd.graph.ir import unique_name
from msqkd.integer.program import Format, Program, Step, Tensor, TensorQuant

_SCALARS = {
    "bool": "<B", "byte": "<b", "ubyte": "<B", "int": "<i", "uint": "<I", "long": "<q", "float": "<f", "double": "<d",
}  # fmt: skip
_NUMPY = {"int": "<i4", "uint": "<u4", "long": "<i8", "float": "<f4", "ubyte": "<u1"}
_HEADER = 8
_OPS = {tag: op for op, tag in layout.TAGS.items()}
_DTYPES = {code: dtype for dtype, code in layout.DATA_TYPES.items()}


def read_ms(source: Union[bytes, PathLike]) -> Program:
    """The program in a ``.ms`` file.

    `Step.layer`, `Tensor.value` and `Tensor.perm` are empty, attributes with the schema's default absent. A weight-only
    node comes back as a float step with an int8 weight.

    Args:
        source: the file, or its bytes.

    Raises:
        ExportError: the file cannot be read, is truncated or damaged, is no MindSpore Lite model, or holds what a
            program cannot express; begins with the file's name.
    """
    if isinstance(source, bytes):
        return _read(source, "the model")
    try:
        data = Path(source).read_bytes()
    except OSError as error:
        raise ExportError(f"{source} cannot be read: {error.strerror or error}") from None
    return _read(data, str(source))


def _read(data: bytes, name: str) -> Program:
    try:
        program = _program(_Buffer(data).root())
        check_structure(program)
    except ExportError as error:
        raise ExportError(f"{name} {error}" if isinstance(error, _FileError) else f"{name}: {error}") from None
    return program


class _FileError(ExportError):
    """What is wrong with the file as a whole; the sentence goes on from its name."""


class _Buffer:
    """Tables of `layout` out of bytes, as dictionaries of the fields that are present."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def root(self) -> dict[str, Any]:
        if len(self._data) < _HEADER:
            raise _FileError(f"is truncated: it has {len(self._data)} bytes")
        identifier = self._data[4:_HEADER]
        if identifier != layout.IDENTIFIER:
            raise _FileError(
                f"is not a MindSpore Lite model: its identifier is {identifier!r}; allowed: {layout.IDENTIFIER!r}"
            )
        return self._table(self._follow(0), "MetaGraph")

    def _unpack(self, code: str, position: int) -> Any:
        self._within(position, struct.calcsize(code))
        return struct.unpack_from(code, self._data, position)[0]

    def _within(self, position: int, size: int) -> None:
        if position < 0 or position + size > len(self._data):
            raise _FileError(
                f"is truncated or damaged: it has {len(self._data)} bytes and refers to byte {position + size - 1}"
            )

    def _follow(self, position: int) -> int:
        return position + int(self._unpack("<I", position))

    def _table(self, position: int, name: str) -> dict[str, Any]:
        start = position - self._unpack("<i", position)
        size, extent = self._unpack("<H", start), self._unpack("<H", start + 2)
        if size < 4 or size % 2 or extent < 4:
            raise _FileError(f"is damaged: the table {name} at byte {position} has an impossible size")
        self._within(start, size)
        self._within(position, extent)
        offsets = struct.unpack_from(f"<{size // 2 - 2}H", self._data, start + 4)
        fields = layout.TABLES[name]
        if name in layout.TAGS and any(offsets[len(fields) :]):
            raise _FileError(f"is of a later version: {name} has an attribute that is not known here")
        values: dict[str, Any] = {}
        for field, offset in zip(fields, offsets):
            if not offset or field.kind == "skip":
                continue
            if not 4 <= offset <= extent - layout.SIZES.get(field.kind, 4):
                raise _FileError(f"is damaged: the field {field.name} lies outside its table {name}")
            values[field.name] = self._value(field.kind, position + offset, values)
        return values

    def _value(self, kind: str, position: int, values: dict[str, Any]) -> Any:
        if kind in _SCALARS:
            value = self._unpack(_SCALARS[kind], position)
            return bool(value) if kind == "bool" else value
        target = self._follow(position)
        if kind == "string":
            return self._string(target)
        if kind == "union":
            return self._union(target, values)
        if not kind.startswith("["):
            return self._table(target, kind)
        return self._vector(target, kind[1:-1])

    def _union(self, target: int, values: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        tag = values.get("value_type", 0)
        if tag not in _OPS:
            raise _FileError(f"holds the primitive number {tag}; allowed: {', '.join(layout.TAGS)}")
        return _OPS[tag], self._table(target, _OPS[tag])

    def _string(self, position: int) -> str:
        count = self._unpack("<I", position)
        self._within(position + 4, count)
        try:
            return self._data[position + 4 : position + 4 + count].decode("utf-8")
        except UnicodeDecodeError:
            raise _FileError(f"is damaged: the name at byte {position} is no UTF-8") from None

    def _vector(self, position: int, kind: str) -> Any:
        count = self._unpack("<I", position)
        if kind in _NUMPY:
            dtype = np.dtype(_NUMPY[kind])
            self._within(position + 4, count * dtype.itemsize)
            found = np.frombuffer(self._data, dtype, count, position + 4)
            return found if kind == "ubyte" else found.tolist()
        self._within(position + 4, 4 * count)
        return [self._table(self._follow(position + 4 + 4 * i), kind) for i in range(count)]


def _program(graph: dict[str, Any]) -> Program:
    parts = graph.get("subGraph", [])
    if len(parts) > 1:
        raise _FileError(f"has {len(parts)} subgraphs; allowed is 1")
    tensors = [_tensor(values) for values in graph.get("allTensors", [])]
    names = _distinct([tensor.name for tensor in tensors])
    nodes = graph.get("nodes", [])
    titles = _distinct([node.get("name", "") for node in nodes])
    order = parts[0].get("nodeIndices", []) if parts else range(len(nodes))
    program = Program(
        graph.get("name", ""),
        inputs=_pick(names, graph.get("inputIndex", []), "tensors"),
        outputs=_pick(names, graph.get("outputIndex", []), "tensors"),
        steps=[_step(node, title, names) for node, title in _pick(list(zip(nodes, titles)), order, "nodes")],
    )
    for tensor, name in zip(tensors, names):
        tensor.name = name
        program.add(tensor)
    return program


def _distinct(names: Sequence[str]) -> list[str]:
    """Number the names that occur twice, as in files of the vendor's converter: the runtime goes by index."""
    found: dict[str, None] = {}
    for name in names:
        found[unique_name(name, found)] = None
    return list(found)


def _pick(items: Sequence[Any], indices: Sequence[int], what: str) -> list[Any]:
    for index in indices:
        if index >= len(items):
            raise _FileError(f"is damaged: it refers to number {index} of {len(items)} {what}")
    return [items[index] for index in indices]


def _step(node: dict[str, Any], name: str, names: Sequence[str]) -> Step:
    op, attrs = node.get("primitive", {}).get("value", (None, {}))
    if op is None:
        raise ExportError(f"the node {name!r} has no primitive")
    quant_type = node.get("quantType", layout.QUANT_NONE)
    if quant_type not in layout.INT8_QUANT_TYPES + layout.FLOAT_QUANT_TYPES:
        allowed = sorted(layout.INT8_QUANT_TYPES + layout.FLOAT_QUANT_TYPES)
        raise ExportError(f"the node {name!r} has quantType {quant_type}; allowed: {allowed}")
    try:
        cleaned = layout.clean_attrs(op, attrs)
    except ValueError as error:
        raise ExportError(f"the node {name!r}: {error}") from None
    return Step(
        name,
        op,
        inputs=_pick(names, node.get("inputIndex", []), "tensors"),
        outputs=_pick(names, node.get("outputIndex", []), "tensors"),
        attrs=cleaned,
        quantized=quant_type in layout.INT8_QUANT_TYPES and op != "QuantDTypeCast",
    )


def _tensor(values: dict[str, Any]) -> Tensor:
    name, code = values.get("name", ""), values.get("dataType", 0)
    if code not in _DTYPES:
        allowed = ", ".join(f"{number} ({dtype})" for number, dtype in sorted(_DTYPES.items()))
        _refuse(name, f"is of data type {code}; allowed: {allowed}")
    for field in ("quantClusters", "externalData", "enableHuffmanCode", "weightQuantCompressType"):
        if values.get(field):
            _refuse(name, f"holds its values in a form that is not read ({field})")
    shape = tuple(values.get("dims", []))
    if len(shape) > layout.MAX_RANK:
        _refuse(name, f"has {len(shape)} dimensions; allowed are {layout.MAX_RANK}")
    if any(size < 0 for size in shape):
        _refuse(name, f"has the shape {shape}; allowed are fixed sizes")
    formats = {int(f): f for f in Format}
    if values.get("format", 0) not in formats:
        _refuse(name, f"has format {values['format']}; allowed: {', '.join(f'{f.value} ({f.name})' for f in Format)}")
    tensor = Tensor(name, _DTYPES[code], shape, format=formats[values.get("format", 0)])
    tensor.quant = _quant(name, values.get("quantParams", []))
    tensor.data = _data(tensor, values.get("data"))
    return tensor


def _data(tensor: Tensor, data: Any) -> Any:
    dtype = np.dtype(tensor.dtype)
    wanted = math.prod(tensor.shape) * dtype.itemsize
    if data is None or (not data.size and wanted):
        return None
    if tensor.dtype == "int8" and tensor.quant is not None and tensor.quant.bits != 8:
        _refuse(tensor.name, f"has weights of {tensor.quant.bits} bits packed together; allowed are 8 bits")
    if data.size != wanted:
        _refuse(tensor.name, f"has {data.size} bytes of values where its shape {tensor.shape} needs {wanted}")
    return data.view(dtype.newbyteorder("<")).astype(dtype).reshape(tensor.shape)


def _quant(name: str, params: Sequence[dict[str, Any]]) -> Any:
    if not params:
        return None
    for field, default in (("varCorr", 1.0), ("meanCorr", 0.0)):
        if any(values.get(field, default) != default for values in params):
            _refuse(name, f"has a correction of its weights ({field}) that is not read")
    bits = {values.get("numBits", 8) for values in params}
    if len(bits) > 1:
        _refuse(name, f"has parameters of {sorted(bits)} bits; allowed is one number")
    return TensorQuant(
        np.array([values.get("scale", 1.0) for values in params]),
        np.array([values.get("zeroPoint", 0) for values in params]),
        bits.pop(),
    )


def _refuse(name: str, reason: str) -> NoReturn:
    raise ExportError(f"tensor {name!r} {reason}")
