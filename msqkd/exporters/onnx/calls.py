"""One operation of the graph on its way into an ONNX model: what a function of the operator table works with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Callable, Optional, Union

import numpy as np

from msqkd.errors import ExportError
from msqkd.exporters import WAY_OUT
from msqkd.exporters.onnx.writer import ModelWriter
from msqkd.graph.ir import Graph, Node

_RANKS = {"b": 0, "i": 1, "u": 1, "f": 2}
"""Kinds of numpy dtypes, in the order of MindSpore's type promotion."""


@dataclass
class Call:
    """A node, the ONNX names of what it reads and computes, and the model it is written to.

    Arguments are counted as the primitive counts them: a sequence, such as the tensors of a ``Concat``, is one.

    Attributes:
        graph, node, writer: as they are called.
        inputs: ONNX names by position in `node.inputs`; empty where that is a literal.
        outputs: ONNX names of the results, before they are quantised.
        rounding: quantises a value with the parameters of the node's output; None where that stays float.
    """

    graph: Graph
    node: Node
    writer: ModelWriter
    inputs: Sequence[str]
    outputs: Sequence[str]
    rounding: Optional[Callable[[str], str]] = None

    def emit(self, op: str, *inputs: str, **attrs: Any) -> None:
        """Write the operation that gives the node's results."""
        self.writer.node(op, inputs, self.outputs, self.node.name, **attrs)

    def step(self, op: str, *inputs: str, **attrs: Any) -> str:
        """Write an operation on the way to the results; returns the name of what it gives."""
        output = self.writer.unique(f"{self.node.output}.{op}")
        self.writer.node(op, inputs, [output], f"{self.node.name}.{op}", **attrs)
        return output

    def rounded(self, name: str) -> str:
        """`name` on the grid of the node's output, so that a quantised step is one in int8; as it is in float."""
        return name if self.rounding is None else self.rounding(name)

    def tensor(self, argument: int) -> str:
        """The ONNX name of a tensor argument; a literal becomes an initialiser."""
        (position,) = self._positions(argument)
        return self._tensor(position)

    def tensors(self, argument: int) -> list[str]:
        """The ONNX names of a sequence of tensors."""
        return [self._tensor(position) for position in self._positions(argument)]

    def literal(self, argument: int) -> Any:
        """The value of a literal argument.

        Raises:
            ExportError: it is computed.
        """
        names = [self.node.inputs[position] for position in self._positions(argument)]
        if any(self.graph.values[name].kind != "const" for name in names):
            raise self.refusal(f"argument {argument} is computed; allowed: a literal")
        values = tuple(self.graph.const(name) for name in names)
        return values[0] if isinstance(self.node.arguments()[argument], int) else values

    def number(self, value: float, like: int = 0) -> str:
        """The name of a constant with the dtype of tensor argument `like`."""
        return self.writer.constant(np.asarray(value, self.dtype(like)), "number")

    def elements(self, argument: int) -> list[Union[int, str]]:
        """A tuple of sizes, item by item: a number, or the name of a tensor of one element that is computed."""
        items: list[Union[int, str]] = []
        for position in self._positions(argument):
            value = self.graph.values[self.node.inputs[position]]
            if value.kind != "const":
                items.append(self.inputs[position])
            else:
                items += [int(size) for size in np.atleast_1d(value.const)]
        return items

    def sizes(self, items: Sequence[Union[int, str]]) -> str:
        """The name of a 1-D int64 tensor made of `items`, as `elements` gives them."""
        if all(isinstance(item, int) for item in items):
            return self.constant(items)
        parts = [item if isinstance(item, str) else self.constant(item) for item in items]
        return parts[0] if len(parts) == 1 else self.step("Concat", *parts, axis=0)

    def constant(self, values: Any) -> str:
        """The name of a 1-D int64 constant."""
        return self.writer.constant(np.asarray(values, np.int64).reshape(-1), "sizes")

    def shape(self, argument: int) -> tuple[int, ...]:
        """The shape of a tensor argument, -1 where it is unknown."""
        return self.graph.shape(self.node.inputs[self._positions(argument)[0]])

    def dtype(self, argument: int) -> str:
        """The dtype of a tensor argument, or where that is a bare number, of the first tensor."""
        names = [self.node.inputs[self._positions(argument)[0]], *self.node.inputs]
        kinds = [self.graph.values[name].type for name in names]
        return next(kind.dtype for kind in kinds if kind is not None)

    def operand(self, argument: int, dtype: str) -> str:
        """The ONNX name of a tensor argument as `dtype`: ONNX converts no operand by itself, as MindSpore does."""
        (position,) = self._positions(argument)
        value = self.graph.values[self.node.inputs[position]]
        if value.kind == "const" and isinstance(value.const, (bool, int, float, np.ndarray)):
            return self.writer.constant(np.asarray(value.const, dtype), "number")
        name = self._tensor(position)
        same = value.type is None or value.type.dtype == dtype
        return name if same else self.step("Cast", name, to=self.writer.element(dtype))

    def common_dtype(self, *arguments: int) -> str:
        """The dtype to which MindSpore promotes tensor arguments of different dtypes.

        Floating point wins over integers, and integers over bool. A Python number counts only if it is of a higher
        kind than every tensor.
        """
        kinds, numbers = [], []
        for argument in arguments:
            value = self.graph.values[self.node.inputs[self._positions(argument)[0]]]
            if value.type is not None:
                kinds.append(np.dtype(value.type.dtype))
            else:
                numbers.append(np.dtype({bool: "bool", int: "int64"}.get(type(value.const), "float32")))
        highest = max((_RANKS[kind.kind] for kind in kinds), default=-1)
        above = [number for number in numbers if _RANKS[number.kind] > highest]
        return str(np.result_type(*(above or [kind for kind in kinds if _RANKS[kind.kind] == highest])))

    def result_dtype(self) -> str:
        """The dtype of the first result.

        Raises:
            ExportError: it is not known.
        """
        kind = self.graph.values[self.node.output].type
        if kind is None:
            raise self.refusal("the data type of its result is not known")
        return kind.dtype

    def output_shape(self) -> tuple[int, ...]:
        """The shape of the first result, -1 where it is unknown."""
        return self.graph.shape(self.node.output)

    def attribute(self, name: str) -> Any:
        """A recorded attribute of the primitive.

        Raises:
            ExportError: it was not recorded.
        """
        if name not in self.node.attrs:
            raise self.refusal(f"its attribute '{name}' is not known")
        return self.node.attrs[name]

    def refusal(self, why: str) -> ExportError:
        """The error that says why this node cannot be written."""
        return ExportError(
            f"{self.graph.name}: '{self.node.name}' ({self.node.op}) cannot be written as ONNX: {why}; {WAY_OUT}"
        )

    def _positions(self, argument: int) -> list[int]:
        arguments = self.node.arguments()
        if argument >= len(arguments):
            raise self.refusal(f"argument {argument} is missing")
        item = arguments[argument]
        return [item] if isinstance(item, int) else list(item)

    def _tensor(self, position: int) -> str:
        if self.inputs[position]:
            return self.inputs[position]
        const = self.graph.const(self.node.inputs[position])
        if isinstance(const, np.ndarray):
            return self.writer.constant(const, "constant")
        if isinstance(const, (bool, int, float)):
            return self.writer.constant(np.asarray(const, self.dtype(0)), "number")
        raise self.refusal(f"input {position} is {const!r}; allowed: a tensor or a number")
