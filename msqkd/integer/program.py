"""A network in the terms of the runtime that executes it: one step a kernel, tensors laid out as the kernels read them.

One form serves four: the lowering makes it from a graph and its plan, the simulator executes it, the ``.ms`` writer
writes it, and the ``.ms`` reader gives it back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Optional

import numpy as np

ISLAND = "Island"
"""A step that no kernel of the runtime computes: ``attrs["graph"]`` is a float `msqkd.graph.ir.Graph` of one node or
more, whose inputs and outputs are those of the step, in order. It can be simulated, but not written as ``.ms``."""


class PadMode(IntEnum):
    """How a convolution or pool pads, as numbered by the runtime."""

    PAD = 0
    SAME = 1
    VALID = 2


class ActivationType(IntEnum):
    """Activation functions, as numbered by the runtime."""

    NONE = 0
    RELU = 1
    SIGMOID = 2
    RELU6 = 3
    LEAKY_RELU = 5
    TANH = 10
    HSWISH = 12
    HSIGMOID = 13
    SWISH = 18
    GELU = 19


class ReduceMode(IntEnum):
    """Reductions, as numbered by the runtime."""

    MEAN = 0
    MAX = 1
    MIN = 2
    PROD = 3
    SUM = 4
    SUM_SQUARE = 5


class Format(IntEnum):
    """Layout of a tensor, as numbered by the runtime."""

    NCHW = 0
    NHWC = 1
    KHWC = 7


@dataclass(frozen=True, eq=False)
class TensorQuant:
    """Quantisation parameters as a model file holds them.

    Attributes:
        scale: float64 of shape (1,), or (C,) for a weight with one scale an output channel.
        zero_point: int32, shaped like `scale`.
        bits: width of the stored integers.
    """

    scale: np.ndarray
    zero_point: np.ndarray
    bits: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", np.atleast_1d(np.asarray(self.scale, np.float64)))
        object.__setattr__(self, "zero_point", np.atleast_1d(np.asarray(self.zero_point, np.int32)))

    @property
    def per_channel(self) -> bool:
        """Whether there is more than one scale."""
        return self.scale.size > 1


@dataclass
class Tensor:
    """One tensor of a program.

    Attributes:
        name: unique in the program.
        dtype: numpy name: ``int8``, ``int32``, ``int64`` or ``float32``.
        shape: with the batch the program was made for; convolution weights are (O, H, W, I / group).
        data: the values of a constant, None for what is fed or computed.
        quant: parameters of an int8 tensor or an int32 bias.
        format: ``NHWC`` for activations of any rank, ``KHWC`` for convolution weights.
        value: the graph value this tensor stands for, if any.
        perm: the axes that transpose this tensor to that value's layout; empty where they are alike.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Optional[np.ndarray] = None
    quant: Optional[TensorQuant] = None
    format: Format = Format.NHWC
    value: str = ""
    perm: tuple[int, ...] = ()


@dataclass
class Step:
    """One kernel call.

    Attributes:
        name: unique in the program.
        op: the runtime's name of the primitive (``Conv2DFusion``), or ISLAND.
        inputs, outputs: names of tensors.
        attrs: attributes under the names of the runtime's schema (``kernel_size``, ``pad_mode`` ...), enumerations as
            numbers; what is absent has the schema's default.
        quantized: whether the step computes in int8.
        layer: the node of the graph the step computes, or belongs to.
    """

    name: str
    op: str
    inputs: list[str]
    outputs: list[str]
    attrs: dict[str, Any] = field(default_factory=dict)
    quantized: bool = False
    layer: str = ""


@dataclass
class Program:
    """Steps in execution order, and every tensor they read or write by name."""

    name: str
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def add(self, tensor: Tensor) -> str:
        """Register `tensor` and return its name."""
        assert tensor.name not in self.tensors, f"two tensors are called {tensor.name}"
        self.tensors[tensor.name] = tensor
        return tensor.name

    @property
    def batch(self) -> int:
        """The batch the program was made for."""
        return self.tensors[self.inputs[0]].shape[0]
