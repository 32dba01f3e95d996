"""MindIR in the form of MindSpore 2.0, which all versions of MindSpore Lite's converter read.

Since MindSpore 2.3 a primitive takes as inputs what it had as attributes before, and its kind in the file is
PRIMITIVE_FUNCTION. Converters before that know neither. Later ones, and MindSpore itself, still read the older form:
they leave a primitive of the kind PRIMITIVE as it is. `older_form` writes a ``ModelProto`` in that form:

* settings (the arguments of a primitive class, see `settings_of`) are attributes of the primitive, by their 2.0 names;
* enumerations are the words of 2.0 (``NCHW``, ``SAME``);
* every operation has a primitive of its own: the converter keeps quantization parameters at the primitive, where the
  last of several operations would overwrite those of the others;
* ``Concat`` and ``AddN`` read their operands directly, not through ``MakeTuple``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from msqkd.errors import ExportError
from msqkd.graph.ir import Graph
from msqkd.graph.mindir import attribute_value

IR_VERSION = 1
"""Of files without functional primitives; 2 and 3 are those of MindSpore 2.3 and later."""

DIRECT = ("Concat", "AddN", "Stack")
"""Operations whose sequence of operands is written as inputs of their own."""

_REFERENCE = "REF::"
_FORMATS = {0: "NCHW", 1: "NHWC", 4: "NCDHW"}
_POOL_MODES = {0: "PAD", 1: "SAME", 2: "VALID"}


def older_form(model: Any) -> None:
    """Rewrite a ``ModelProto`` in the form of MindSpore 2.0, in place.

    Raises:
        ExportError: a setting of an operation is computed, or has a value that 2.0 cannot express.
    """
    model.mind_ir_version = IR_VERSION
    _Rewriter(model).run()


@cache
def settings_of(op: str) -> tuple[int, tuple[str, ...]]:
    """Return the number of inputs that MindSpore 2.0 has for a functional primitive, and the names of its settings.

    Derived from the operator definitions of the installed MindSpore: a class is called with the inputs and constructed
    with the settings. (0, ()) stands for a primitive that is not generated from a definition.
    """
    from mindspore.ops.auto_generate import gen_ops_prim

    cls = getattr(gen_ops_prim, op, None)
    if not inspect.isclass(cls):
        return 0, ()
    called = len(inspect.signature(cls.__call__).parameters) - 1
    return called, tuple(inspect.signature(cls.__init__).parameters)[1:]


@dataclass(frozen=True)
class _Conversion:
    """How a setting is written as an attribute of 2.0, and read back.

    Attributes:
        write: the argument of today -> the value of the attribute.
        read: the value of the attribute -> the argument of today.
    """

    write: Callable[[Any], Any]
    read: Callable[[Any], Any]


def _words(words: Mapping[int, str]) -> _Conversion:
    return _Conversion(words.__getitem__, {word: number for number, word in words.items()}.__getitem__)


_PLANE = _Conversion(lambda sizes: (1, 1, *sizes[-2:]), lambda sizes: tuple(sizes[-2:]))
"""Height and width, as sizes of (N, C, H, W)."""

_CONVERSIONS: Mapping[tuple[str, str], _Conversion] = {
    ("AvgPool", "kernel_size"): _PLANE,
    ("AvgPool", "strides"): _PLANE,
    ("AvgPool", "pad_mode"): _words({0: "PAD", 1: "SAME", 2: "VALID"}),
    ("AvgPool", "data_format"): _words({0: "NCHW", 1: "NHWC"}),
    ("BiasAdd", "data_format"): _words({0: "NCHW", 1: "NHWC"}),
}
"""(operation, setting) -> how its value is written where 2.0 has it otherwise than today."""


@dataclass(frozen=True)
class _Older:
    """An operation that 2.0 has by another name, with inputs of today as attributes.

    Attributes:
        settings: names of the inputs and settings of today behind the first input, in order.
        write: their values by name -> name of the operation and attributes of 2.0.
        names: the names `write` gives.
        read: the attributes -> the values by name.
    """

    settings: tuple[str, ...]
    names: tuple[str, ...]
    write: Callable[[dict[str, Any]], tuple[str, dict[str, Any]]]
    read: Callable[[dict[str, Any]], dict[str, Any]]


_HALF_PIXEL, _LINEAR = 2, 0


def _write_bilinear(values: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The converter reads no half pixels from ResizeBilinear: they need the operation it makes of that."""
    if not values["half_pixel_centers"]:
        return "ResizeBilinear", values
    height, width = values["size"]
    return "Resize", {
        "method": _LINEAR, "coordinate_transform_mode": _HALF_PIXEL, "new_height": height, "new_width": width,
        "preserve_aspect_ratio": False, "format": 0,
    }  # fmt: skip


def _read_bilinear(attrs: dict[str, Any]) -> dict[str, Any]:
    if "size" in attrs:
        return attrs
    size = (attrs["new_height"], attrs["new_width"])
    return {"size": size, "align_corners": False, "half_pixel_centers": True}


def _write_round(values: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """2.0 rounds to whole numbers alone."""
    if values["decimals"]:
        raise ExportError(f"a Round has {values['decimals']} decimals, which MindSpore Lite does not know; allowed: 0")
    return "Round", {}


_OLDER: Mapping[str, _Older] = {
    "Round": _Older(("decimals",), ("Round",), _write_round, lambda attrs: {"decimals": 0}),
    "ResizeBilinearV2": _Older(
        ("size", "align_corners", "half_pixel_centers"), ("ResizeBilinear", "Resize"), _write_bilinear, _read_bilinear
    ),
}
"""Operation of today -> what 2.0 has instead."""

_NEWER = {name: op for op, older in _OLDER.items() for name in older.names}

_ADDED: Mapping[str, dict[str, Any]] = {"GeLU": {"approximate": True}}
"""Attributes that say to the converter what the name says to MindSpore."""

_NAMES = {"data_format": ("format", "data_format")}
"""Settings that have other names as attributes, or several."""


class _Rewriter:
    def __init__(self, model: Any) -> None:
        self.model, self.graph = model, model.graph
        self.primitives = {primitive.name: primitive for primitive in model.primitives}
        self.constants = {node.output[0]: node for node in self.graph.node if node.op_type == "Constant"}
        self.made: list[Any] = []

    def run(self) -> None:
        tuples = {node.output[0]: node for node in self.graph.node if self._op(node) == "MakeTuple"}
        for node in self.graph.node:
            if node.op_type.startswith(_REFERENCE):
                if self._op(node) in DIRECT and node.input[0] in tuples:
                    node.input[:] = [*tuples[node.input[0]].input, *node.input[1:]]
                self._own_primitive(node)
        self._drop_unread()

    def _op(self, node: Any) -> str:
        found = self.primitives.get(node.op_type[len(_REFERENCE) :])
        return found.op_type if found is not None else ""

    def _own_primitive(self, node: Any) -> None:
        """Give `node` a primitive that no other operation has, with its settings as attributes."""
        shared = self.primitives[node.op_type[len(_REFERENCE) :]]
        own = type(shared)()
        own.CopyFrom(shared)
        own.name = f"{shared.op_type}:{len(self.made)}"
        own.prim_type = own.PRIMITIVE
        if shared.prim_type == shared.PRIMITIVE_FUNCTION:
            self._move_settings(node, own)
        node.op_type = f"{_REFERENCE}{own.name}"
        self.made.append(own)

    def _move_settings(self, node: Any, own: Any) -> None:
        op, older = own.op_type, _OLDER.get(own.op_type)
        called, names = (1, older.settings) if older is not None else settings_of(op)
        if not called:
            return  # 2.0 has the same inputs, as Cast its data type
        if op in DIRECT:
            called = len(node.input) - len(names)
        values = {name: self._literal(node, op, name, value) for name, value in zip(names, node.input[called:])}
        if older is not None:
            own.op_type, values = older.write(values)
        for name, setting in {**values, **_ADDED.get(op, {})}.items():
            conversion = _CONVERSIONS.get((op, name))
            for attribute_name in _NAMES.get(name, (name,)):
                set_attribute(
                    own.attribute.add(name=attribute_name), conversion.write(setting) if conversion else setting
                )
        del node.input[called:]

    def _literal(self, node: Any, op: str, name: str, value: str) -> Any:
        if value not in self.constants:
            raise ExportError(f"'{node.domain}': {name} of {op} is computed, which MindSpore Lite does not know")
        return attribute_value(self.constants[value].attribute[0])

    def _drop_unread(self) -> None:
        """Take out constants and tuples that nobody reads any more, and replace the list of primitives."""
        read = {name for node in self.graph.node for name in node.input} | {info.name for info in self.graph.output}
        optional = ("MakeTuple", "")
        kept = [node for node in self.graph.node if read.intersection(node.output) or self._kind(node) not in optional]
        names = {node.op_type[len(_REFERENCE) :] for node in kept}
        replace_messages(self.graph.node, kept)
        replace_messages(self.model.primitives, [primitive for primitive in self.made if primitive.name in names])

    def _kind(self, node: Any) -> str:
        return node.op_type[len(_REFERENCE) :].partition(":")[0] if node.op_type.startswith(_REFERENCE) else ""


def set_attribute(attribute: Any, value: Any, within: bool = False) -> None:
    """Write a Python value into an ``AttributeProto``; the items of a tuple (`within`) have fields of their own."""
    if isinstance(value, (tuple, list)):
        attribute.type = attribute.TUPLE if isinstance(value, tuple) else attribute.LIST
        for item in value:
            set_attribute(attribute.values.add(), item, within=True)
        return
    kind, single, repeated = next((entry[1:] for entry in _SCALARS if isinstance(value, entry[0])), ("", "", ""))
    if not kind:
        raise ExportError(f"attribute {attribute.name} is {value!r}; MindSpore 2.0 has numbers, words and tuples only")
    attribute.type = attribute.AttributeType.Value(kind)
    stored = value.encode() if isinstance(value, str) else int(value) if isinstance(value, bool) else value
    if within:
        getattr(attribute, repeated).append(stored)
    else:
        setattr(attribute, single, stored)


_SCALARS = (
    (bool, "BOOL", "i", "ints"), (int, "INT64", "i", "ints"), (float, "FLOAT", "f", "floats"),
    (str, "STRING", "s", "strings"),
)  # fmt: skip
"""Python type -> the attribute's type, its field, and that of an item of a tuple."""


def functional_form(graph: Graph) -> None:
    """Undo `older_form` in a graph that was read from a file: settings become arguments again, in place."""
    for node in graph.nodes:
        if node.functional:
            continue
        older = _OLDER.get(_NEWER.get(node.op, ""))
        if older is not None:
            node.op, node.attrs = _NEWER[node.op], older.read(node.attrs)
        called, names = (1, older.settings) if older is not None else settings_of(node.op)
        if not called:
            continue
        node.functional = True
        if node.op in DIRECT and not node.sequences:
            node.sequences = ((0, len(node.inputs)),)
        for name in names:
            value = node.attrs.pop(_NAMES.get(name, (name,))[0])
            conversion = _CONVERSIONS.get((node.op, name))
            node.inputs.append(graph.add_const(conversion.read(value) if conversion else value, name))
        node.attrs = {}


def replace_messages(field: Any, messages: list[Any]) -> None:
    """Let a repeated field hold `messages`, which may be some of its own."""
    blobs = [message.SerializeToString(deterministic=True) for message in messages]
    del field[:]
    for blob in blobs:
        field.add().ParseFromString(blob)
