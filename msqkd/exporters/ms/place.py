"""One step with its tensors, as the checks look at it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from msqkd.errors import ExportError
from msqkd.exporters import WAY_OUT
from msqkd.exporters.ms import layout
from msqkd.integer.program import ISLAND, Program, Step, Tensor, TensorQuant


class Place:
    """A step of a program, its input and output tensors in order, and the sentence for what is wrong with it."""

    def __init__(self, program: Program, step: Step) -> None:
        self.step, self.op, self.quantized = step, step.op, step.quantized
        self.inputs = [program.tensors[name] for name in step.inputs]
        self.outputs = [program.tensors[name] for name in step.outputs]

    @property
    def output(self) -> Tensor:
        """The first output."""
        return self.outputs[0]

    def attr(self, name: str) -> Any:
        """The attribute, or what its absence stands for."""
        value = self.step.attrs.get(name)
        return layout.default(self.op, name) if value is None else value

    def numbers(self, name: str) -> tuple[int, ...]:
        """The attribute as a tuple of whole numbers; empty where it is absent."""
        return tuple(int(item) for item in self.attr(name) or ())

    def constant(self, index: int) -> np.ndarray:
        """The values of input `index`, flattened; refused where it is computed."""
        data = self.inputs[index].data
        if data is None:
            self.refuse(f"its input {index} ({self.inputs[index].name!r}) is computed; the runtime needs a constant")
        return data.reshape(-1)

    def refuse(self, reason: str) -> NoReturn:
        """Raise ExportError: the step, its primitive, the reason, and the format that has no such limit."""
        raise ExportError(f"{title(self.step)}: {reason}; {WAY_OUT}")


def title(step: Step) -> str:
    """How messages name a step: by its layer where it has one, and by the primitive unless MindSpore computes it."""
    place = f"layer {step.layer!r}" if step.layer else f"step {step.name!r}"
    return place if step.op == ISLAND else f"{place} ({step.op})"


def quant(tensor: Tensor) -> TensorQuant:
    """The parameters of an int8 tensor, which the structure check has seen."""
    assert tensor.quant is not None, f"{tensor.name} has no parameters"
    return tensor.quant


def scale(tensor: Tensor) -> float:
    """The scale of an activation."""
    return float(quant(tensor).scale[0])


def same_quant(first: Tensor, second: Tensor) -> bool:
    """Whether two int8 activations have the same parameters."""
    a, b = quant(first), quant(second)
    return bool(np.array_equal(a.scale, b.scale) and np.array_equal(a.zero_point, b.zero_point))


def axis_of(place: Place, axis: int, rank: int) -> int:
    """`axis` counted from the front; refused where a tensor of that rank has no such axis."""
    if not -rank <= axis < rank:
        place.refuse(f"axis is {axis}; allowed is {-rank} to {rank - 1}")
    return axis % rank


def listed(values: Sequence[int]) -> str:
    """Numbers as a shape is written."""
    return "(" + ", ".join(str(value) for value in values) + ")"
