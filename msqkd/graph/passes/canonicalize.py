"""Bring a captured graph to the few forms the rest of msqkd knows.

* Convolution followed by ``BiasAdd`` becomes ``Conv2D(x, weight, bias)``.
* A matrix product with a parameter as ``nn.Dense`` writes it becomes ``Dense(x, weight, bias)``, weight of shape
  (out, in).
* An addition or subtraction of "alpha times" with alpha = 1 is a plain one, and so is one (or a comparison, or a mask)
  with a number: the special operations lack CPU kernels in PYNATIVE_MODE.
* A shape that is computed from nothing but the batch size is a literal.
* ``MeanExt`` and ``SumExt`` of float32, as `mindspore.mint` has them, are ``ReduceMean`` and ``ReduceSum``.
* ``Flatten`` becomes ``Reshape`` (int8 runtimes have no Flatten).
* ``ops.matmul`` and ``@`` become what they compute: ``BatchMatMul``, ``MatMul``, or ``Dense`` where the second operand
  is the transpose of a parameter; a layer over more than two dimensions is one over rows, between two reshapes.
* An argument that the compiler has turned into a number is the word again by which the operation is called.
* A size that was made a tensor and a number again, as in ``ops.arange(x.shape[0])``, is the size itself.
* ``Identity`` is gone, but where it makes an input of the network an output.
* A reshape of a reshape is one, and none where it gives the shape it came from: ``nn.Conv1d`` is then a convolution
  with its BatchNorm beside it.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from msqkd.graph.ir import Graph, Node
from msqkd.graph.ops import dtype_name
from msqkd.graph.passes.products import products
from msqkd.graph.passes.reshapes import merge_reshapes

_WITH_ALPHA = {"AddExt": "Add", "SubExt": "Sub", "AddScalar": "Add", "SubScalar": "Sub"}
_WITH_NUMBER = {
    "LessScalar": "Less", "GreaterEqualScalar": "GreaterEqual",
    "FloorDivScalar": "FloorDiv", "RemainderTensorScalar": "FloorMod", "MaskedFillScalar": "MaskedFill",
}  # fmt: skip
_REDUCTIONS = {"MeanExt": "ReduceMean", "SumExt": "ReduceSum"}
# Operation to the place of such an argument and its words.
_WORDS = {
    "GeluExt": (1, {0: "none", 1: "tanh"}),
    "DivMod": (2, {1: "trunc", 2: "floor"}), "DivMods": (2, {1: "trunc", 2: "floor"}),
}  # fmt: skip


def canonicalize(graph: Graph) -> None:
    """Apply every canonical form, in place."""
    _drop_identities(graph)
    _drop_round_trips(graph)
    products(graph)
    for node in graph.nodes:
        if node.op == "MatMul" and _is_dense(graph, node):
            node.op, node.inputs = "Dense", node.inputs[:2]
        elif node.op in _WITH_ALPHA and (len(node.inputs) == 2 or graph.const(node.inputs[2]) == 1):
            node.op, node.inputs, node.attrs = _WITH_ALPHA[node.op], node.inputs[:2], {}
        elif node.op in _WITH_NUMBER:
            node.op, node.attrs = _WITH_NUMBER[node.op], {}
        elif node.op in _WORDS:
            _say_in_words(graph, node)
        elif node.op in _REDUCTIONS:
            _to_reduction(graph, node)
        elif node.op == "Flatten":
            _flatten_to_reshape(graph, node)
        elif node.op == "Reshape" and node.sequences:
            _close_shape(graph, node)
    _merge_biases(graph)
    merge_reshapes(graph)
    graph.prune()


def _drop_identities(graph: Graph) -> None:
    for node in [node for node in graph.nodes if node.op == "Identity"]:
        source = node.inputs[0]
        if graph.values[source].kind == "node" or node.output not in graph.outputs:
            graph.replace_value(node.output, source)
            graph.nodes.remove(node)


def _drop_round_trips(graph: Graph) -> None:
    """Let the readers of a ``TensorToScalar`` behind a ``ScalarToTensor`` of a size read the size."""
    for node in [node for node in graph.nodes if node.op == "TensorToScalar"]:
        source = graph.producer(node.inputs[0])
        if (
            source is not None
            and source.op == "ScalarToTensor"
            and "int" in dtype_name(graph, source, source.inputs[1])
        ):
            graph.replace_value(node.output, source.inputs[0])
            graph.nodes.remove(node)


def _say_in_words(graph: Graph, node: Node) -> None:
    index, words = _WORDS[node.op]
    if len(node.inputs) > index and graph.const(node.inputs[index]) in words:
        node.inputs[index] = graph.add_const(words[graph.const(node.inputs[index])], "word")


def _to_reduction(graph: Graph, node: Node) -> None:
    x, axis, keep, dtype = node.inputs
    kind = graph.values[x].type
    literal = graph.values[axis].kind == graph.values[dtype].kind == "const"
    if kind is None or kind.dtype != "float32" or not literal or graph.const(dtype) is not None:
        return
    axis = graph.add_const((), "axis") if graph.const(axis) is None else axis
    skip = [graph.add_const(False, "skip_mode")] if node.op == "SumExt" else []
    node.op, node.inputs, node.attrs = _REDUCTIONS[node.op], [x, axis, keep, *skip], {}


def _is_dense(graph: Graph, node: Node) -> bool:
    x, weight, transpose_a, transpose_b = node.inputs[:4]
    is_weight = graph.values[weight].kind == "param" and graph.values[x].kind != "param"
    return is_weight and not graph.const(transpose_a) and bool(graph.const(transpose_b))


def _flatten_to_reshape(graph: Graph, node: Node) -> None:
    sample = graph.shape(node.inputs[0])[1:]
    if all(size > 0 for size in sample):
        node.op, node.attrs = "Reshape", {}
        node.inputs = [node.inputs[0], graph.add_const((-1, prod(sample)), "shape")]


def _close_shape(graph: Graph, node: Node) -> None:
    """Where only the batch of a shape is computed, as in ``x.reshape(x.shape[0], -1)``, the shape is a literal."""
    source, batch, *sizes = node.inputs
    shape = graph.shape(source)
    sample = shape[1:]
    if any(graph.values[name].kind != "const" for name in sizes) or min(sample, default=1) < 1:
        return
    literals = [int(graph.const(name)) for name in sizes]
    if -1 in literals:
        producer = graph.producer(batch)
        own = (
            producer is not None and producer.op == "Shape" and (producer.inputs[0], producer.output) == (source, batch)
        )
        rest = -prod(literals)
        if not own or rest < 1 or prod(sample) % rest:
            return
        literals[literals.index(-1)] = prod(sample) // rest
    node.inputs, node.sequences = [source, graph.add_const((-1, *literals), "shape")], ()
    kind = graph.values[node.output].type
    if kind is not None:
        graph.values[node.output] = replace(graph.values[node.output], type=replace(kind, shape=(-1, *literals)))


def _merge_biases(graph: Graph) -> None:
    producers = {output: node for node in graph.nodes for output in node.outputs}
    for node in list(graph.nodes):
        if node.op != "BiasAdd" or graph.values[node.inputs[1]].kind != "param":
            continue
        source = producers.get(node.inputs[0])
        mergeable = source is not None and source.op in ("Conv2D", "Dense") and len(source.inputs) == 2
        if (
            source is None
            or not mergeable
            or source.output in graph.outputs
            or graph.consumers(source.output) != [node]
        ):
            continue
        source.inputs.append(node.inputs[1])
        source.outputs = node.outputs
        graph.nodes.remove(node)
