"""Primitives from their recorded form: any operation MindSpore can export can be called again."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any, Optional

from msqkd.graph.ir import Graph, Node


@lru_cache(maxsize=None)
def _functional_class(op: str) -> Optional[type]:
    """The generated class of a functional primitive, whose attributes are trailing arguments."""
    from mindspore.ops.auto_generate import gen_ops_prim

    cls = getattr(gen_ops_prim, op, None)
    return cls if inspect.isclass(cls) else None


def primitive(graph: Graph, node: Node) -> tuple[Any, list[str]]:
    """The primitive of `node`, ready to be called, and the names of the inputs to call it with.

    A functional primitive records its attributes as trailing literal arguments; they are set on the instance and are not passed.
    Any other is rebuilt from its recorded attributes.
    """
    from mindspore import ops

    cls = _functional_class(node.op) if node.functional else None
    if cls is not None:
        called = list(inspect.signature(cls.__call__).parameters)[1:]
        settings = list(inspect.signature(cls.__init__).parameters)[1:]
        literals = [graph.const(name) for name in node.inputs[len(called) :]]
        instance = cls(**{s: p.default for s, p in zip(settings, _parameters(cls)) if p.default is not inspect.Parameter.empty})
        for name, value in zip(settings, literals):
            instance._set_prim_arg(name, value)  # the literal is the encoded form, past the argument's own handler
        return instance, node.inputs[: len(called)]
    instance = ops.Primitive(node.op)
    for name, value in node.attrs.items():
        if name not in ("input_names", "output_names"):
            # MindSpore writes the attribute `data_format` out as `format`; its gradients need the first spelling back.
            instance.add_prim_attr("data_format" if name == "format" else name, value)
    inputs, outputs = node.attrs.get("input_names"), node.attrs.get("output_names")
    if inputs and outputs:
        instance.init_prim_io_names(inputs=list(inputs), outputs=list(outputs))
    return instance, list(node.inputs)


def _parameters(cls: type) -> list[inspect.Parameter]:
    return list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]
