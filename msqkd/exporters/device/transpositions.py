"""Transpositions that the runtime would drop, in another form.

When it loads a file, the runtime drops a transposition whose result has the shape of what it reads and goes into one
Reshape alone (`DeleteRedundantTrans`), although it moves values: of a map of 8 × 8 × 8, say, or of a square matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from msqkd.graph.ir import unique_name
from msqkd.integer.program import Program, Step, Tensor

_MOST_AXES = 6
"""Of a tensor that the runtime transposes."""


def keep_transpositions(program: Program) -> None:
    """Give every transposition that would be dropped one more axis of one element, in place.

    The Reshape behind it does not care, and the two shapes differ: the axis is the second before and the last after.
    """
    readers: dict[str, list[Step]] = {}
    for step in program.steps:
        for name in step.inputs:
            readers.setdefault(name, []).append(step)
    steps: list[Step] = []
    for step in program.steps:
        if step.op == "Transpose" and _would_be_dropped(program, step, readers.get(step.outputs[0], [])):
            steps.append(_widen(program, step))
        steps.append(step)
    program.steps = steps


def _would_be_dropped(program: Program, step: Step, readers: Sequence[Step]) -> bool:
    source, result, perm = (program.tensors[name] for name in (step.inputs[0], step.outputs[0], step.inputs[1]))
    if len(readers) != 1 or readers[0].op != "Reshape" or result.name in program.outputs or perm.data is None:
        return False
    moved = [axis for axis in perm.data.tolist() if source.shape[axis] > 1]
    return source.shape == result.shape and moved != sorted(moved) and len(source.shape) < _MOST_AXES


def _widen(program: Program, step: Step) -> Step:
    """Let a transposition have an axis of one element that changes places; returns the Reshape that gives it."""
    source, result, perm = (program.tensors[name] for name in (step.inputs[0], step.outputs[0], step.inputs[1]))
    assert perm.data is not None
    wider = _tensor(program, f"{source.name}_wider", source, (*source.shape[:1], 1, *source.shape[1:]))
    sizes = _constant(program, f"{wider.name}_shape", wider.shape)
    axes = _constant(program, f"{perm.name}_wider", [*(axis + (axis > 0) for axis in perm.data.tolist()), 1])
    turned = _tensor(program, f"{result.name}_wider", result, (*result.shape, 1))
    reader = next(other for other in program.steps if result.name in other.inputs)
    reader.inputs = [turned.name if name == result.name else name for name in reader.inputs]
    name = unique_name(f"{step.name}_wider", {other.name for other in program.steps})
    before = Step(name, "Reshape", [source.name, sizes], [wider.name], {}, step.quantized, step.layer)
    step.inputs, step.outputs = [wider.name, axes], [turned.name]
    del program.tensors[result.name]
    if not any(perm.name in other.inputs for other in program.steps):
        del program.tensors[perm.name]
    return before


def _tensor(program: Program, hint: str, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    name = unique_name(hint, program.tensors)
    return program.tensors[program.add(Tensor(name, like.dtype, shape, None, like.quant))]


def _constant(program: Program, hint: str, numbers: Sequence[int]) -> str:
    data = np.array(numbers, np.int32)
    return program.add(Tensor(unique_name(hint, program.tensors), "int32", data.shape, data))
