"""Runs a program with the kernels of the runtime it was made for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Callable, Optional

import numpy as np

from msqkd.errors import SimulationError
from msqkd.integer.program import ISLAND, Program, Step, Tensor
from msqkd.integer.registry import FLOAT32, INT8, MACHINES, ONNXRUNTIME, X86, Call, Kernel, Operand, find_kernel

_ITEMS = 2  # of a batch by which a program is tried
RunIsland = Callable[[Any, Sequence[np.ndarray]], Sequence[np.ndarray]]


class Simulator:
    """Executes a program, step by step, as its runtime would.

    A program made for batch 1 takes batches of any size: every item is then computed as a run of its own; in `trace`
    only where `takes_batches`. One made for a larger batch takes that batch only.

    Args:
        program: what to run.
        machine: ``x86`` or ``arm64``, where the builds of the runtime differ.
        run_island: computes a float island (its graph, its inputs) where the program has one.
        kind: which set of kernels integers are computed with: ``int8`` (MindSpore Lite), ``ascend`` or ``onnxruntime``.

    Raises:
        SimulationError: a step has no kernel, or `machine` is unknown.
    """

    def __init__(
        self, program: Program, machine: str = X86, run_island: Optional[RunIsland] = None, kind: str = INT8
    ) -> None:
        if machine not in MACHINES:
            raise SimulationError(f"machine '{machine}' is unknown; allowed: {', '.join(MACHINES)}")
        self.program, self.machine, self.run_island = program, machine, run_island
        self._stored = _float_constants(program)
        self._kernels: dict[str, Kernel] = {}
        for step in program.steps:
            if step.op != ISLAND:
                self._kernels[step.name] = find_kernel(step.op, self._kind(step, kind), step.name)
            elif run_island is None:
                raise SimulationError(f"{step.name}: it is computed in float, and nothing is given that can")
        self._last_use = _last_uses(program)

    def _kind(self, step: Step, kind: str) -> str:
        """The set of kernels `step` is in; a cast is in that of the integers, whose rounding it has."""
        if step.quantized or (step.op == "QuantDTypeCast" and kind == ONNXRUNTIME):
            return kind
        first = step.inputs[0]
        computed_int8 = self.program.tensors[first].dtype == "int8" and (step.name, first) not in self._stored
        return INT8 if computed_int8 else FLOAT32

    def run(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """The outputs for `inputs`, arrays shaped as the program's inputs but for the batch.

        Raises:
            SimulationError: an input of another shape or dtype, or a value the runtime cannot compute.
        """
        if self.program.batch == 1 and len(inputs) and len(inputs[0]) > 1 and not self.takes_batches:
            rows = [self.run(*(data[row : row + 1] for data in inputs)) for row in range(len(inputs[0]))]
            return [np.concatenate(parts) for parts in zip(*rows)]
        kept = dict.fromkeys(self.program.outputs)
        found = {name: data for name, data in self.trace(*inputs) if name in kept}
        return [found[name] for name in self.program.outputs]

    @cached_property
    def takes_batches(self) -> bool:
        """True if the steps of a program for batch 1 compute every item of a batch as they compute it alone.

        They do where the batch leads in every tensor. Elsewhere, as behind a transposition that puts time first, random
        items tell.
        """
        computed = [tensor.shape for tensor in self.program.tensors.values() if tensor.data is None]
        if all(shape[:1] in ((1,), ()) for shape in computed):
            return True
        random = np.random.default_rng(0)
        fed = []
        for tensor in (self.program.tensors[name] for name in self.program.inputs):
            shape = (_ITEMS, *tensor.shape[1:])
            drawn = random.normal(size=shape) if tensor.dtype.startswith("float") else random.integers(0, 2, shape)
            fed.append(drawn.astype(tensor.dtype))

        def outputs(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
            found = {name: data for name, data in self.trace(*arrays) if name in self.program.outputs}
            return [found[name] for name in self.program.outputs]

        alone = [outputs([array[item : item + 1] for array in fed]) for item in range(_ITEMS)]
        try:
            together = outputs(fed)
        except SimulationError:
            return False
        return all(
            one.shape == other.shape and np.allclose(one, other, rtol=1e-5, atol=1e-6)
            for one, other in zip(together, (np.concatenate(parts) for parts in zip(*alone)))
        )

    def trace(self, *inputs: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor that is fed or computed, by name, in the order of computation."""
        program = self.program
        values: dict[str, np.ndarray] = {}
        for name, data in zip(program.inputs, self._checked(inputs)):
            values[name] = data
            yield name, data
        for number, step in enumerate(program.steps):
            for name, data in zip(step.outputs, self._compute(step, values)):
                values[name] = data
                yield name, data
            for name in self._last_use[number]:
                values.pop(name, None)

    def _checked(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        program = self.program
        if len(inputs) != len(program.inputs):
            raise SimulationError(f"{program.name} takes {len(program.inputs)} inputs, found {len(inputs)}")
        checked = []
        for name, data in zip(program.inputs, inputs):
            tensor = program.tensors[name]
            fits = data.shape[1:] == tensor.shape[1:] and (program.batch == 1 or data.shape[0] == program.batch)
            if not fits or str(data.dtype) != tensor.dtype:
                raise SimulationError(
                    f"{program.name}: input '{name}' has shape {data.shape} and dtype {data.dtype}; allowed: "
                    f"{tensor.shape} ({'any batch, ' if program.batch == 1 else ''}{tensor.dtype})"
                )
            checked.append(data)
        return checked

    def _compute(self, step: Step, values: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
        tensors = self.program.tensors
        if step.op == ISLAND:
            return self._island(step, [values[name] for name in step.inputs])
        operands = [self._operand(step, tensors[name], values) for name in step.inputs]
        outputs = [tensors[name] for name in step.outputs]
        call = Call(step.attrs, operands, outputs, self.machine, self.program.batch == 1, step.name)
        try:
            return self._kernels[step.name](call)
        except (ValueError, IndexError) as error:  # attributes or shapes that do not fit, as in a foreign file
            raise SimulationError(f"{step.name} ({step.op}) cannot be computed: {error}") from error

    def _island(self, step: Step, arrays: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        """What MindSpore computes; sample by sample where the batch of 1 is one of the numbers inside."""
        assert self.run_island is not None
        graph, tensors = step.attrs["graph"], self.program.tensors
        led = [tensors[name].shape[:1] == (1,) for name in step.inputs]
        batch = max((len(array) for array, leads in zip(arrays, led) if leads), default=1)
        found = self.run_island(graph, arrays)
        single = [tensors[name].shape[:1] == (1,) for name in step.outputs]
        if batch == 1 or not any(lone and len(array) != batch for lone, array in zip(single, found)):
            return found
        runs = [
            self.run_island(graph, [array[i : i + 1] if leads else array for array, leads in zip(arrays, led)])
            for i in range(batch)
        ]
        return [np.concatenate(parts) for parts in zip(*runs)]

    def _operand(self, step: Step, tensor: Tensor, values: Mapping[str, np.ndarray]) -> Operand:
        if (step.name, tensor.name) in self._stored:
            return Operand(self._stored[step.name, tensor.name])
        return Operand(values[tensor.name] if tensor.data is None else tensor.data, tensor.quant)


def _float_constants(program: Program) -> dict[tuple[str, str], np.ndarray]:
    """By (step, tensor), the weights stored as int8 but computed with in float, as the runtime unpacks them."""
    found = {}
    for step in program.steps:
        for name in step.inputs if not step.quantized and step.op != "QuantDTypeCast" else ():
            tensor = program.tensors[name]
            if tensor.data is not None and tensor.dtype == "int8" and tensor.quant is not None:
                # Channels lead in every weight but that of a product with a matrix that is not transposed.
                last = step.op == "MatMulFusion" and not step.attrs.get("transpose_b", False)
                shape = [1] * tensor.data.ndim
                shape[-1 if last else 0] = -1
                scale, zero = (array.reshape(shape) for array in (tensor.quant.scale, tensor.quant.zero_point))
                found[step.name, name] = ((tensor.data.astype(np.int32) - zero) * scale).astype(np.float32)
    return found


def _last_uses(program: Program) -> list[list[str]]:
    """For every step, the tensors nobody reads after it."""
    last: dict[str, int] = {}
    for number, step in enumerate(program.steps):
        for name in (*step.inputs, *step.outputs):
            last[name] = number
    uses: list[list[str]] = [[] for _ in program.steps]
    for name, number in last.items():
        if name not in program.outputs:
            uses[number].append(name)
    return uses
