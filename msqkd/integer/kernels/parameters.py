"""What most kernels ask of their call: scales and zero points, axes, and tables for functions of one int8 value."""

from __future__ import annotations

from typing import Callable, Optional

import numpy as np

from msqkd.errors import SimulationError
from msqkd.integer.program import TensorQuant
from msqkd.integer.registry import Call


def input_params(call: Call, index: int = 0) -> tuple[float, int]:
    """Scale and zero point of operand `index`.

    Raises:
        SimulationError: it has none, or one a channel.
    """
    return _per_tensor(call.inputs[index].quant, f"{call.name}: input {index}")


def output_params(call: Call, index: int = 0) -> tuple[float, int]:
    """Scale and zero point of output `index`.

    Raises:
        SimulationError: it has none, or one a channel.
    """
    return _per_tensor(call.outputs[index].quant, f"{call.name}: output {index}")


def _per_tensor(quant: Optional[TensorQuant], place: str) -> tuple[float, int]:
    if quant is None or quant.per_channel:
        found = "no quantisation parameters" if quant is None else f"{quant.scale.size} scales"
        raise SimulationError(f"{place} has {found}; allowed: one scale and zero point for the tensor")
    return float(quant.scale[0]), int(quant.zero_point[0])


def constant(call: Call, index: int, what: str) -> np.ndarray:
    """Operand `index`, a list of whole numbers such as axes or a permutation, as int64 of one dimension.

    Raises:
        SimulationError: the step has no such operand, or it does not hold integers.
    """
    if index >= len(call.inputs):
        raise SimulationError(f"{call.name}: its {what} are missing; allowed: an int32 constant as input {index}")
    data = call.inputs[index].data
    if not np.issubdtype(data.dtype, np.integer):
        raise SimulationError(f"{call.name}: its {what} have dtype {data.dtype}; allowed: int32")
    return data.astype(np.int64).reshape(-1)


def plane_of(x: np.ndarray) -> tuple[int, int]:
    """Height and width of an array (N, H, W, C)."""
    return x.shape[1], x.shape[2]


def tabulated(x: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`function` of every value of `x`, computed once for each of the 256 int8 values.

    Args:
        x: int8, any shape.
        function: takes int64 -128 … 127 and gives as many integers; what leaves int8 wraps, as a C cast does.

    Returns:
        int8, shaped like `x`.
    """
    table = function(np.arange(-128, 128)).astype(np.int64).astype(np.int8)
    return np.roll(table, 128)[x.view(np.uint8)]


def clip_int8(x: np.ndarray) -> np.ndarray:
    """Integers or whole floats, saturated to int8."""
    return np.clip(x, -128, 127).astype(np.int8)
