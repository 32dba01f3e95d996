"""Primitives from their recorded form: any operation MindSpore can export can be called again."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, Optional, Union

from msqkd.errors import CaptureError
from msqkd.graph.ir import Graph, Node

Argument = Union[int, tuple[int, ...]]

# The numbers MindSpore's compiler writes for dtypes given as arguments
_DTYPE_NUMBERS = {
    30: "bool", 32: "int8", 33: "int16", 34: "int32", 35: "int64", 37: "uint8", 38: "uint16", 39: "uint32",
    40: "uint64", 42: "float16", 43: "float32", 44: "float64",
}  # fmt: skip


def dtype_name(graph: Graph, node: Node, value: str) -> str:
    """Return the name of a dtype that `node` reads as the literal `value`.

    Raises:
        CaptureError: msqkd does not know its number.
    """
    wanted = graph.const(value)
    name = wanted if isinstance(wanted, str) else _DTYPE_NUMBERS.get(wanted)
    if name is None:
        raise CaptureError(f"{graph.name}: '{node.name}' casts to a data type msqkd does not know (number {wanted})")
    return name


def scalar_type(graph: Graph, node: Node) -> type:
    """Return the Python type that a ``ScalarCast`` gives."""
    name = dtype_name(graph, node, node.inputs[1])
    return bool if name == "bool" else float if name.startswith("float") else int


@cache
def _functional_class(op: str) -> Optional[type]:
    """The generated class of a functional primitive, whose attributes are trailing arguments."""
    from mindspore.ops.auto_generate import gen_ops_prim

    cls = getattr(gen_ops_prim, op, None)
    return cls if inspect.isclass(cls) else None


def computed_settings(graph: Graph, node: Node) -> Optional[tuple[list[Argument], list[Argument]]]:
    """For a primitive with a setting that is computed, as a target shape from the batch: (called with, settings).

    None where every setting is a literal, which `primitive` sets.
    """
    cls = _functional_class(node.op) if node.functional else None
    if cls is None:
        return None
    called = len(inspect.signature(cls.__call__).parameters) - 1
    arguments = node.arguments()
    flat = [i for item in arguments[called:] for i in ((item,) if isinstance(item, int) else item)]
    literal = all(graph.values[node.inputs[index]].kind == "const" for index in flat)
    return None if literal else (arguments[:called], arguments[called:])


def dtype_arguments(graph: Graph, node: Node) -> frozenset[int]:
    """Positions in `node.inputs` of literals that number a dtype which the primitive is called with."""
    cls = _functional_class(node.op) if node.functional else None
    if cls is None:
        return frozenset()
    names = list(inspect.signature(cls.__call__).parameters)[1:]
    pairs = [(name, index) for name, index in zip(names, node.arguments()) if isinstance(index, int)]
    return frozenset(i for name, i in pairs if name == "dtype" and isinstance(graph.const(node.inputs[i]), int))


def primitive(graph: Graph, node: Node) -> tuple[Any, list[Argument]]:
    """The primitive of `node`, ready to be called, and what to call it with (as `Node.arguments`).

    A functional primitive records its attributes as trailing literal arguments; they are set on the instance and are
    not passed. Any other is rebuilt from its recorded attributes.
    """
    from mindspore import ops

    arguments = node.arguments()
    cls = _functional_class(node.op) if node.functional else None
    if cls is not None:
        called = len(inspect.signature(cls.__call__).parameters) - 1
        settings = list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]
        literals = {s.name: graph.const(node.inputs[index]) for s, index in zip(settings, arguments[called:])}  # type: ignore[index]
        instance = cls(**{s.name: literals[s.name] if s.default is s.empty else s.default for s in settings})
        for name, value in literals.items():
            instance._set_prim_arg(name, value)  # the literal is the encoded form, past the argument's own handler
        return instance, arguments[:called]
    instance = ops.Primitive(node.op)
    for name, value in node.attrs.items():
        if name not in ("input_names", "output_names"):
            # MindSpore writes the attribute `data_format` out as `format`; its gradients need the first spelling back.
            instance.add_prim_attr("data_format" if name == "format" else name, value)
    inputs, outputs = node.attrs.get("input_names"), node.attrs.get("output_names")
    if inputs and outputs:
        instance.init_prim_io_names(inputs=list(inputs), outputs=list(outputs))
    return instance, arguments
