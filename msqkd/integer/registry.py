"""Kernels by name, and how one is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Callable, Optional

import numpy as np

from msqkd.errors import SimulationError, did_you_mean
from msqkd.integer.program import Tensor, TensorQuant

X86, ARM64 = "x86", "arm64"
MACHINES = (X86, ARM64)
INT8, FLOAT32, ASCEND = "int8", "float32", "ascend"
ONNXRUNTIME = "onnxruntime"


@dataclass(frozen=True)
class Operand:
    """An input of a kernel: the array, and its parameters where it is quantised."""

    data: np.ndarray
    quant: Optional[TensorQuant] = None


@dataclass(frozen=True)
class Call:
    """One call of a kernel.

    Attributes:
        attrs: as in `msqkd.integer.program.Step`; what is absent has the schema's default.
        inputs: the operands, constants among them.
        outputs: dtype and parameters of what is computed; its shape may have been made for another batch.
        machine: ``x86`` or ``arm64``, where the runtime's builds differ.
        per_sample: every item of the batch stands for a run of its own (the program was made for batch 1); where a
            kernel is wrong for batches, it is right then.
        name: what messages call the step.
    """

    attrs: Mapping[str, Any] = field(default_factory=dict)
    inputs: Sequence[Operand] = ()
    outputs: Sequence[Tensor] = ()
    machine: str = X86
    per_sample: bool = False
    name: str = "step"

    @property
    def quant(self) -> TensorQuant:
        """Parameters of the first output."""
        found = self.outputs[0].quant
        if found is None:
            raise SimulationError(f"{self.name}: its output has no quantisation parameters")
        return found


Kernel = Callable[[Call], list[np.ndarray]]
_KERNELS: dict[tuple[str, str], Kernel] = {}


def kernel(*ops: str, kind: str = INT8) -> Callable[[Kernel], Kernel]:
    """Register a function as the kernel of `ops`, for operands of `kind` (int8 or float32), or as another runtime's."""

    def register(function: Kernel) -> Kernel:
        for op in ops:
            assert (op, kind) not in _KERNELS, f"two {kind} kernels for {op}"
            _KERNELS[op, kind] = function
        return function

    return register


def find_kernel(op: str, kind: str, name: str) -> Kernel:
    """The kernel of `op`.

    Raises:
        SimulationError: there is none; begins with `name`.
    """
    import msqkd.integer.ascend
    import msqkd.integer.kernels
    import msqkd.integer.onnxruntime  # noqa: F401  (importing registers them)

    found = _KERNELS.get((op, kind))
    if found is None:
        known = sorted(o for o, k in _KERNELS if k == kind)
        raise SimulationError(
            f"{name}: there is no {kind} kernel for {op}; allowed: {', '.join(known)}{did_you_mean(op, known)}"
        )
    return found
