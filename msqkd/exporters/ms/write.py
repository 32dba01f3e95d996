"""A program as a ``.ms`` file, which MindSpore Lite loads as it is: no converter is needed.

What a program says and how the file says it:

* A step with `quantized` is a node of quantType 5 and computes in int8. A ``QuantDTypeCast`` has quantType 0, whatever
  `quantized` says. Any other step is a float node.
* Weight-only int8: a float step (`quantized` False) whose second input is a constant of dtype int8 with parameters, one
  or one an output channel, in ``Conv2DFusion``, ``MatMulFusion`` or ``FullConnection``; or a ``Gather`` whose first
  input is one, with parameters for all or for each row. The node has quantType 4, and
  the runtime turns the weight into float32 when it loads the file (its weight_decoder.cc). This form is written from
  the format's definition; it has not been run on a device.
* Only int8 tensors carry quantisation parameters. Those of an int32 bias are never read by an int8 node, and would have
  a weight-only node take its integer constants for weights; they are left out.
* An int8 tensor is marked as 8 bits wide even if its values need fewer: the runtime unpacks anything narrower, and the
  values here are not packed.
* `Step.layer`, `Tensor.value` and `Tensor.perm` have no place in the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np

from msqkd.errors import ExportError
from msqkd.exporters.ms import layout
from msqkd.exporters.ms.check import check_program
from msqkd.files import PathLike, write_bytes
from msqkd.integer.program import Program, Step, Tensor

_DATA_ALIGNMENT = 16
_STRUCTURE_ESTIMATE = 1 << 16
_LIMIT = 2**31 - 2**24
"""Bytes of constants in one file; FlatBuffers ends at 2 GiB, and the structure needs some of it."""

_SLOT = {
    "bool": "PrependBoolSlot",
    "byte": "PrependInt8Slot",
    "ubyte": "PrependUint8Slot",
    "int": "PrependInt32Slot",
    "uint": "PrependUint32Slot",
    "long": "PrependInt64Slot",
    "float": "PrependFloat32Slot",
    "double": "PrependFloat64Slot",
}
_VECTOR = {"int": np.int32, "uint": np.uint32, "long": np.int64}


def write_ms(program: Program, file: PathLike) -> Path:
    """Write `program` to `file` atomically; nothing is written if the runtime would refuse it or compute it wrongly.

    Raises:
        ExportError: as `msqkd.exporters.ms.check.check_program`, defects of the runtime included.
    """
    check_program(program)
    write_bytes(file, _serialise(program))
    return Path(file)


def ms_bytes(program: Program) -> bytes:
    """The file of a program the runtime loads; equal programs give equal bytes with one release of flatbuffers.

    Constructs the runtime computes wrongly are let through (`write_ms` refuses them too).

    Raises:
        ExportError: as `msqkd.exporters.ms.check.check_program` with ``defects=False``.
    """
    check_program(program, defects=False)
    return bytes(_serialise(program))


def _serialise(program: Program) -> memoryview:
    size = sum(t.data.nbytes for t in program.tensors.values() if t.data is not None)
    if size > _LIMIT:
        raise ExportError(f"the constants of {program.name} have {size} bytes; one .ms file holds at most {_LIMIT}")
    writer = _Writer(size + size // 8 + _STRUCTURE_ESTIMATE)
    return writer.finish(_meta_graph(program))


def _meta_graph(program: Program) -> dict[str, Any]:
    number = {name: index for index, name in enumerate(program.tensors)}
    inputs, outputs = [number[name] for name in program.inputs], [number[name] for name in program.outputs]
    return {
        "name": program.name,
        "version": layout.VERSION,
        "fmkType": layout.FRAMEWORK,
        "inputIndex": inputs,
        "outputIndex": outputs,
        "nodes": [_node(step, program, number) for step in program.steps],
        "allTensors": [_tensor(tensor) for tensor in program.tensors.values()],
        "subGraph": [
            {
                "name": program.name,
                "inputIndices": inputs,
                "outputIndices": outputs,
                "nodeIndices": list(range(len(program.steps))),
                "tensorIndices": list(range(len(program.tensors))),
            }
        ],
    }


def _node(step: Step, program: Program, number: Mapping[str, int]) -> dict[str, Any]:
    return {
        "name": step.name,
        "primitive": {
            "value_type": layout.TAGS[step.op],
            "value": (step.op, layout.clean_attrs(step.op, step.attrs)),
        },
        "inputIndex": [number[name] for name in step.inputs],
        "outputIndex": [number[name] for name in step.outputs],
        "quantType": _quant_type(step, program),
    }


def _quant_type(step: Step, program: Program) -> int:
    if step.op == "QuantDTypeCast":
        return layout.QUANT_NONE
    if step.quantized:
        return layout.QUANT_ALL
    int8 = any(program.tensors[name].dtype == "int8" for name in step.inputs)
    return layout.QUANT_WEIGHT if int8 else layout.QUANT_NONE


def _tensor(tensor: Tensor) -> dict[str, Any]:
    kind = layout.COMPUTED if tensor.data is None else layout.CONSTANT
    values: dict[str, Any] = {
        "nodeType": kind,
        "dataType": layout.DATA_TYPES[tensor.dtype],
        "dims": tensor.shape,
        "format": int(tensor.format),
        "refCount": layout.REFERENCES[kind],
        "name": tensor.name,
    }
    if tensor.data is not None:
        stored = np.dtype(tensor.dtype).newbyteorder("<")
        values["data"] = np.ascontiguousarray(tensor.data, stored).reshape(-1).view(np.uint8)
    if tensor.dtype == "int8" and tensor.quant is not None:
        values["quantParams"] = [
            {"scale": float(scale), "zeroPoint": int(zero_point), "inited": True}
            for scale, zero_point in zip(tensor.quant.scale, tensor.quant.zero_point)
        ]
    return values


class _Writer:
    """Tables of `layout` as FlatBuffers, children first; equal short vectors are stored once."""

    def __init__(self, size: int) -> None:
        self._builder = flatbuffers.Builder(size)
        self._shared: dict[tuple[Any, ...], int] = {}

    def finish(self, meta_graph: Mapping[str, Any]) -> memoryview:
        """The whole file, where it was built: a copy would be as large as the network."""
        self._builder.Finish(self._table("MetaGraph", meta_graph), file_identifier=layout.IDENTIFIER)
        return memoryview(self._builder.Bytes)[self._builder.Head() :]

    def _table(self, name: str, values: Mapping[str, Any]) -> int:
        fields = [field for field in layout.TABLES[name] if field.name in values]
        stored = {f.name: values[f.name] if f.kind in _SLOT else self._child(f.kind, values[f.name]) for f in fields}
        self._builder.StartObject(len(layout.TABLES[name]))
        # Largest first, so that nothing is lost to alignment; the order of one size is that of the slots.
        for field in sorted(fields, key=lambda f: -layout.SIZES.get(f.kind, 4)):
            if field.kind in _SLOT:
                getattr(self._builder, _SLOT[field.kind])(field.slot, stored[field.name], field.default)
            else:
                self._builder.PrependUOffsetTRelativeSlot(field.slot, stored[field.name], 0)
        return int(self._builder.EndObject())

    def _child(self, kind: str, value: Any) -> int:
        if kind == "string":
            return int(self._builder.CreateString(value))
        if kind == "union":
            return self._table(*value)
        if kind == "[ubyte]":
            self._builder.Prep(_DATA_ALIGNMENT, value.size)
            return int(self._builder.CreateNumpyVector(value))
        if not kind.startswith("["):
            return self._table(kind, value)
        return self._vector(kind[1:-1], value)

    def _vector(self, kind: str, values: Sequence[Any]) -> int:
        if kind in _VECTOR:
            key = (kind, *values)
            if key not in self._shared:
                self._shared[key] = int(self._builder.CreateNumpyVector(np.array(values, _VECTOR[kind])))
            return self._shared[key]
        if kind == "QuantParam":
            key = (kind, *((v["scale"], v["zeroPoint"]) for v in values))
            if key not in self._shared:
                self._shared[key] = self._tables(kind, values)
            return self._shared[key]
        return self._tables(kind, values)

    def _tables(self, kind: str, values: Sequence[Mapping[str, Any]]) -> int:
        offsets = [self._table(kind, value) for value in values]
        self._builder.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            self._builder.PrependUOffsetTRelative(offset)
        return int(self._builder.EndVector())
