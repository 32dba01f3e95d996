"""The nodes of two ``.ms`` files of one network, and whether their int8 ones compute with the same numbers.

The two are written by different programs: layers have other names, a dense layer is a 1×1 convolution in one of them,
a flattened map has its columns in another order. What counts is compared, and what only moves values is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np

from msqkd.integer.program import Program, Step, TensorQuant
from msqkd.quant.qparams import QParams

CAST = "QuantDTypeCast"
_MOVES = (
    "Transpose", "Reshape", "Squeeze", "Unsqueeze", "ExpandDims", "Flatten", "Split", "SliceFusion", "StridedSlice",
    "Stack", "Unstack", "Cast",
)  # fmt: skip
_ALIKE = {"MatMulFusion": "Conv2DFusion", "SubFusion": "AddFusion"}
"""A dense layer is a 1×1 convolution in the file for the converter, a sum with a constant a difference."""

_WITH_BIAS = ("Conv2DFusion", "Conv2dTransposeFusion", "MatMulFusion", "LayerNormFusion")
_BIAS = 2  # the place of a bias among the inputs

_MAY_BE_ADDED = {"Concat", "PadFusion"}
"""In the file for the converter some maps are flattened by halves, and some pools pad by a step of their own."""


@dataclass(frozen=True)
class Layer:
    """A node of a ``.ms`` file: its name, its operation, and whether it computes in int8."""

    name: str
    op: str
    int8: bool


def layers(program: Program) -> tuple[Layer, ...]:
    """Return the nodes of a program, casts between int8 and float aside."""
    return tuple(Layer(step.name, step.op, step.quantized) for step in program.steps if step.op != CAST)


@dataclass(frozen=True)
class Agreement:
    """How the int8 nodes of two files that compute, and do not only move values, agree.

    Attributes:
        of: how many there are in the first.
        missing: names of those in the first that have no equal in the second.
        added: names of those in the second that have no equal in the first.
        same_operations: whether the two have the same int8 operations, as often.
    """

    of: int
    missing: tuple[str, ...]
    added: tuple[str, ...]
    same_operations: bool

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data with stable keys."""
        return {"of": self.of, "equal": self.of - len(self.missing), "missing": [*self.missing], "added": [*self.added]}


def agreement(ours: Program, theirs: Program) -> Agreement:
    """Compare the int8 nodes of two programs: operations, parameters of results, weights with their scales, biases."""
    found = [_signatures(program) for program in (ours, theirs)]
    counts = [Counter(signature for _, signature in pairs) for pairs in found]
    operations = [Counter(signature[0] for _, signature in pairs) for pairs in found]
    left = [counts[0] - counts[1], counts[1] - counts[0]]
    names = []
    for pairs, missing in zip(found, left):
        names.append(tuple(_take(pairs, missing)))
    added = operations[1] - operations[0]
    same = not operations[0] - operations[1] and set(added) <= _MAY_BE_ADDED
    return Agreement(len(found[0]), names[0], names[1], same)


def marked_agreement(
    values: Iterable[QParams], weights: Mapping[tuple[str, int], tuple[np.ndarray, QParams]], program: Program
) -> Agreement:
    """Compare the parameters of markers with those in a converter's file.

    Args:
        values: of the marked values.
        weights: the marked weights with their parameters, by node and input.
        program: the converter's file.
    """
    held = [tensor for tensor in program.tensors.values() if tensor.quant is not None]
    found = {_numbers(tensor.quant) for tensor in held if tensor.data is None}
    constants = {
        _constant(tensor.data, tensor.quant)
        for tensor in held
        if tensor.data is not None and tensor.quant is not None and tensor.data.dtype == np.int8
    }
    wanted = [(f"{node}, input {index}", _marked(data, qparams)) for (node, index), (data, qparams) in weights.items()]
    missing = [name for name, signature in wanted if signature not in constants]
    pairs = [TensorQuant(qparams.scale, qparams.zero_point) for qparams in values]
    missing += [f"scale {quant.scale[0]:.6g}" for quant in pairs if _numbers(quant) not in found]
    return Agreement(len(wanted) + len(pairs), tuple(missing), (), not missing)


def _marked(data: np.ndarray, qparams: QParams) -> Any:
    return _constant(qparams.quantize(data).astype(np.int8), TensorQuant(qparams.scale, qparams.zero_point))


def _take(pairs: list[tuple[str, Any]], missing: Counter[Any]) -> list[str]:
    """Return the names of the last steps with the signatures in `missing`, as many as are counted there."""
    names = []
    for name, signature in reversed(pairs):
        if missing[signature] > 0:
            missing[signature] -= 1
            names.append(name)
    return names[::-1]


def _signatures(program: Program) -> list[tuple[str, Any]]:
    computed = [step for step in program.steps if step.quantized and step.op not in (*_MOVES, CAST)]
    return [(step.name, _signature(program, step)) for step in computed]


def _signature(program: Program, step: Step) -> Any:
    result = program.tensors[step.outputs[0]]
    held = [program.tensors[name] for name in step.inputs]
    stored = [(tensor.data, tensor.quant) for tensor in held if tensor.data is not None and tensor.dtype == "int8"]
    if step.op in _WITH_BIAS:
        stored += [(tensor.data, None) for tensor in held[_BIAS : _BIAS + 1] if tensor.data is not None]
    constants = [_constant(data, quant) for data, quant in stored]
    return (_ALIKE.get(step.op, step.op), _numbers(result.quant), tuple(constants))


def _constant(data: Any, quant: Optional[TensorQuant]) -> Any:
    """The integers of every row in ascending order: the columns behind a flattened map follow its layout."""
    rows = np.sort(data.reshape(data.shape[0] if data.ndim > 1 else 1, -1), axis=1)
    return (data.size, np.ascontiguousarray(rows, np.int32).tobytes(), _numbers(quant))


def _numbers(quant: Optional[TensorQuant]) -> Any:
    """Scales in float32, and zero points; a scale that is the same in all channels counts once."""
    if quant is None:
        return None
    scale, zero_point = quant.scale.astype(np.float32), quant.zero_point
    if np.all(scale == scale[0]) and np.all(zero_point == zero_point[0]):
        scale, zero_point = scale[:1], zero_point[:1]
    return (scale.tobytes(), zero_point.astype(np.int32).tobytes())
