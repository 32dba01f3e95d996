"""Gradients that the backend lacks: found before a training, by computing that of one operation at a time.

Operations whose gradient is known to exist cost nothing. The others get the values they see in the network, for a batch
of two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Optional

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from msqkd.graph.cell import Hooks, to_cell
from msqkd.graph.half import half_precision, is_float
from msqkd.graph.ir import Graph, Node, Value
from msqkd.graph.islands import cut, is_tensor
from msqkd.graph.steps import has_gradient
from msqkd.platform import without_kernel

KNOWN = frozenset({
    "Abs", "AdaptiveAvgPool2D", "AdaptiveMaxPool2D", "Add", "AddExt", "Adds", "ArgMaxWithValue", "AvgPool",
    "BatchMatMul", "BatchNorm", "BiasAdd", "BroadcastTo", "Cast", "ClampScalar", "Concat", "Conv2D", "Dense", "Div",
    "Divs", "Elu", "Erf", "Exp", "ExpandDims", "Gather", "GeLU", "GroupNorm", "HSigmoid", "HSwish", "LayerNorm", "Log",
    "LogSoftmax", "MaskedFill", "MatMul", "MatMulExt", "MaxPool", "Maximum", "Minimum", "Mish", "Mul", "Muls", "Neg",
    "PReLU", "Pad", "PadV3", "Pow", "ReLU", "ReLU6", "RealDiv", "Reciprocal", "ReduceMax", "ReduceMean", "ReduceMin",
    "ReduceSum", "Reshape", "ResizeBilinearV2", "Rsqrt", "Select", "Shape", "SiLU", "Sigmoid", "Softmax", "Softplus",
    "Split", "Sqrt", "Square", "Squeeze", "Stack", "StridedSlice", "Sub", "SubExt", "Subs", "Tanh", "Tile",
    "TrainingDropout", "Transpose", "Unstack",
})  # fmt: skip
"""Operations that are known to have a gradient on CPU; any other one is tried before a training."""

_BATCH = 2
_INSTEAD = {
    "ChannelShuffle": "write it as x.reshape(n, groups, c // groups, h, w).swapaxes(1, 2).reshape(n, c, h, w)",
}
"""Forms that compute the same and have a gradient."""


def untrainable(graph: Graph, level: str = "O0") -> Optional[str]:
    """Find an operation that a training needs the gradient of, and that the backend cannot compute it for.

    Args:
        graph: a network as it is trained.
        level: how much of it computes in float16 (see `msqkd.graph.half`).

    Returns:
        None, or a sentence that names the operation, the reason, and a form that can be trained.
    """
    reached = list(_reached(graph))
    for node in reached:
        if node.op == "StridedSlice" and not has_gradient(graph, node):
            reason = "MindSpore computes the gradient of a slice with such steps wrongly"
            return _sentence(graph, node, reason, "take the values with ops.gather and literal positions")
    nodes = list(_tried(graph, reached))
    if not nodes:
        return None
    wanted = dict.fromkeys(
        name
        for node in nodes
        for name in cut(graph, [node]).inputs
        if graph.values[name].kind == "node" and is_tensor(graph, name)
    )
    seen = dict(
        zip(wanted, _run(to_cell(graph, Hooks(observe=list(wanted)), shared=True), graph)[len(graph.outputs) :])
    )
    seen.update(zip(graph.inputs, _samples(graph)))
    for node in nodes:
        failure = _failure(graph, node, seen, level)
        if failure is not None:
            return _sentence(graph, node, failure, _INSTEAD.get(node.op, "write it with other operations"))
    return None


def _sentence(graph: Graph, node: Node, reason: str, cure: str) -> str:
    return (
        f"{graph.name}: '{node.name}' ({node.op}) cannot be trained on {ms.get_context('device_target')}: {reason}; "
        f"{cure}, or quantize without training (msqkd calibrate)"
    )


def gradient_error(cell: Any, arguments: Sequence[Any], positions: Sequence[int]) -> Optional[Exception]:
    """Compute the gradient of a cell with respect to the arguments at `positions`; returns what MindSpore raises."""
    try:
        for gradient in _Gradient(cell, positions)(*arguments):
            gradient.asnumpy()  # what fails in a kernel is seen here
    except Exception as error:  # MindSpore raises whatever the operation met
        return error
    return None


class _Gradient(nn.Cell):
    def __init__(self, cell: Any, positions: Sequence[int]) -> None:
        super().__init__()
        self.cell = cell
        self.gradient = ops.grad(cell, tuple(positions))

    def construct(self, *arguments):  # type: ignore[no-untyped-def]
        return self.gradient(*arguments)


def _reached(graph: Graph) -> Iterator[Node]:
    """The nodes between trained parameters and outputs."""
    reached = {name for name, param in graph.params.items() if param.trainable}
    for node in graph.nodes:
        if reached.intersection(node.inputs):
            reached.update(name for name in node.outputs if is_float(graph, name))
            yield node


def _tried(graph: Graph, reached: Sequence[Node]) -> Iterator[Node]:
    """The nodes of `reached` whose gradient is to be computed, one of each kind."""
    kinds: set[str] = set()
    for node in reached:
        parts = node.body.nodes if node.body is not None else [node]
        if all(part.op in KNOWN for part in parts):
            continue
        literals = [graph.const(name) if graph.values[name].kind == "const" else None for name in node.inputs]
        ranks = [len(graph.shape(name)) for name in node.inputs]
        kind = repr((node.op, sorted(node.attrs.items(), key=lambda item: item[0]), literals, ranks))
        if kind not in kinds and any(is_float(graph, name) for name in node.outputs):
            kinds.add(kind)
            yield node


def _failure(graph: Graph, node: Node, seen: dict[str, np.ndarray], level: str) -> Optional[str]:
    """Return the reason why the gradient of a node cannot be computed."""
    piece = cut(graph, [node])
    piece.outputs = [name for name in piece.outputs if is_float(piece, name)]
    arrays = [seen[name] for name in piece.inputs]
    for name in list(piece.params):  # their gradients are wanted as well
        arrays.append(piece.params.pop(name).data)
        piece.values[name] = Value(name, "input", piece.values[name].type)
        piece.inputs.append(name)
    positions = [index for index, array in enumerate(arrays) if array.dtype == np.float32]
    if not positions or not piece.outputs:
        return None
    cell = to_cell(piece, half_precision(piece, level, Hooks()))
    cell.set_train(True)
    tensors = [ms.Tensor(array) for array in arrays]
    try:
        cell(*tensors)
    except Exception:  # a forward pass that fails is no matter of the gradient
        return None
    error = gradient_error(cell, tensors, positions)
    if error is None:
        return None
    kernel = without_kernel(error) if isinstance(error, RuntimeError) else None
    if kernel is not None:
        return f"MindSpore has no kernel for {kernel}, its gradient"
    lines = [line.strip() for line in str(error).splitlines() if set(line.strip()) - set("-=")]
    return f"MindSpore cannot compute its gradient ({lines[0] if lines else type(error).__name__})"


def _samples(graph: Graph) -> list[np.ndarray]:
    """Random inputs for a batch of two; integers are 0."""
    random = np.random.default_rng(0)
    arrays = []
    for name in graph.inputs:
        kind = graph.values[name].type
        assert kind is not None
        shape = tuple(_BATCH if size < 0 else size for size in kind.shape)
        drawn = random.normal(size=shape) if kind.dtype.startswith("float") else np.zeros(shape)
        arrays.append(drawn.astype(kind.dtype))
    return arrays


def _run(cell: Any, graph: Graph) -> list[np.ndarray]:
    found = cell(*map(ms.Tensor, _samples(graph)))
    return [tensor.asnumpy() for tensor in (found if isinstance(found, tuple) else (found,))]
