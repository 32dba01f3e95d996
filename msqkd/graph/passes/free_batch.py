"""A graph that was exported for one batch size, opened for any, where its answers show that it may be.

Without the network's code it cannot be compiled for a second size (as `open_batch` has it). Instead the reshapes are
told to fill the batch in, what is concatenated to every sample is repeated, and random batches are computed both ways.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any, Optional

import numpy as np

from msqkd.graph.cell import Hooks, to_cell
from msqkd.graph.ir import Graph, Node, TensorType, Value
from msqkd.graph.passes.open_batch import batch_size
from msqkd.platform import mindspore

_GROUPS = (2, 3)  # the batches tried, in multiples of the exported one; the second tells what grows with them
# float32 sums in another order, relative to the largest value of an output
_ROUNDING = 1e-4


def free_batch(graph: Graph) -> Optional[str]:
    """Open the batch of `graph`, in place: -1 in the shapes of its values.

    Dimension 0 is the batch in every input that is as large there as the first one. A graph whose batch is open
    already gets the sizes that are unknown behind a computed shape.

    Returns:
        None, or why the batch stays as it is; then the graph is unchanged.
    """
    first = graph.shape(graph.inputs[0])
    kinds = [value.type for value in graph.activations() if value.type is not None]
    if not first or (first[0] < 0 and all(-1 not in kind.shape[1:] for kind in kinds)):
        return None
    batch = first[0]
    opened = graph.copy()
    if batch > 0:
        free_shapes(opened, batch)
    try:
        reason = _compare(graph, opened, max(batch, 1))
    except Exception as error:  # MindSpore raises whatever the operation met
        text = str(error).strip().splitlines()
        reason = f"it cannot be computed with another ({text[0] if text else type(error).__name__})"
    if reason is None:
        graph.nodes, graph.values = opened.nodes, opened.values
    return reason if batch > 0 else None


def free_shapes(graph: Graph, batch: int) -> None:
    """Let reshapes, repeated tokens, transposed convolutions and the inputs of `graph` go with any batch, in place."""
    fed = set(graph.inputs)
    for node in list(graph.nodes):
        if fed.intersection(node.inputs):
            if node.op == "Concat" and batch == 1:
                _repeat_parts(graph, node, fed)
            fed.update(node.outputs)
        if node.op == "Reshape" and not node.sequences and graph.values[node.inputs[1]].kind == "const":
            shape = graph.shape(node.output)
            asked = graph.const(node.inputs[1])
            fills = -1 in asked and asked[0] not in (-1, batch)  # the batch is behind another size, and filled in there
            if shape and prod(shape) > 0 and shape[0] % batch == 0 and not fills:
                node.inputs[1] = graph.add_const((-1, *shape[1:]), "shape")
        if node.op == "Conv2DTranspose" and not node.sequences and graph.const(node.inputs[2])[0] == batch:
            sizes = [batch_size(graph), *(graph.add_const(size, "size") for size in graph.const(node.inputs[2])[1:])]
            node.inputs[2:3], node.sequences = sizes, ((2, len(sizes)),)
    for name in graph.inputs:
        value = graph.values[name]
        if value.type is not None and value.type.shape[:1] == (batch,):
            graph.values[name] = replace(value, type=replace(value.type, shape=(-1, *value.type.shape[1:])))


def _repeat_parts(graph: Graph, node: Node, fed: set[str]) -> None:
    """What is the same for every sample, as the class token of a transformer, is repeated for each."""
    for index, name in enumerate(node.inputs):
        shape = graph.shape(name)
        if name in fed or shape[:1] != (1,):
            continue
        sizes = [batch_size(graph), *(graph.add_const(size, "size") for size in shape[1:])]
        kind = TensorType((-1, *shape[1:]), graph.values[name].type.dtype)  # type: ignore[union-attr]
        output = graph.add_value(Value(graph.unique_value(f"{name}_repeated"), "node", kind))
        label = graph.unique_node(".".join(filter(None, (node.cell_path, "repeat"))))
        repeat = Node(label, "BroadcastTo", [name, *sizes], [output], {}, node.cell_path, node.cell_types)
        repeat.sequences = ((1, len(sizes)),)
        graph.nodes.insert(graph.nodes.index(node), repeat)
        node.inputs[index] = output


def _compare(graph: Graph, opened: Graph, batch: int) -> Optional[str]:
    """What tells the answers of `opened` from those of `graph`; without a difference `opened` gets its shapes."""
    outputs = [(node, output) for node in opened.nodes for output in node.outputs if opened.values[output].type]
    # A cell computes the first output of a BatchNorm; the others are for training.
    watched = [v for node, v in outputs if node.op != "Shape" and (node.op != "BatchNorm" or v == node.output)]
    cell, count = to_cell(opened, Hooks(observe=watched)), len(opened.outputs)
    exported = to_cell(graph)
    observed = []
    for groups in _GROUPS:
        arrays = _samples(opened, groups * batch)
        found = _run(cell, arrays)
        observed.append(found[count:])
        for group in range(groups if groups == _GROUPS[0] else 0):
            rows = slice(group * batch, (group + 1) * batch)
            part = [a[rows] if opened.shape(n)[:1] == (-1,) else a for n, a in zip(opened.inputs, arrays)]
            wanted = _run(exported, part)
            if not all(_equal(_group(f, group, groups, w), w) for f, w in zip(found, wanted)):
                return "an answer depends on the other samples of a batch"
    for name, *arrays in zip(watched, *observed):
        value = opened.values[name]
        assert value.type is not None
        shape = tuple(size if size == other else -1 for size, other in zip(*(array.shape for array in arrays)))
        opened.values[name] = replace(value, type=replace(value.type, shape=shape))
    return None


def _group(output: np.ndarray, group: int, groups: int, wanted: np.ndarray) -> np.ndarray:
    """The rows of one group; an output without a batch is the same for all."""
    if output.shape == wanted.shape or not output.ndim:
        return output
    rows = len(output) // groups
    return output[group * rows : (group + 1) * rows]


def _samples(graph: Graph, count: int) -> list[np.ndarray]:
    random = np.random.default_rng(count)
    arrays = []
    for name in graph.inputs:
        kind = graph.values[name].type
        assert kind is not None
        shape = tuple(count if size < 0 else size for size in kind.shape)
        drawn = random.normal(size=shape) if kind.dtype.startswith("float") else random.integers(0, 2, shape)
        arrays.append(drawn.astype(kind.dtype))
    return arrays


def _run(cell: Any, arrays: list[np.ndarray]) -> list[np.ndarray]:
    found = cell(*(mindspore().Tensor(array) for array in arrays))
    return [output.asnumpy() for output in (found if isinstance(found, tuple) else (found,))]


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    if one.shape != other.shape:
        return False
    bound = _ROUNDING * float(np.abs(other.astype(np.float64)).max(initial=0.0))
    return bool(np.allclose(one, other, rtol=0.0, atol=bound, equal_nan=True))
