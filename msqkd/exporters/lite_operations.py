"""A network in operations that MindSpore 2.0 has, and with it every version of MindSpore Lite's converter.

Newer operations become older ones that compute the same: numbers are tensors, ``StridedSlice`` without steps is
``Slice``, ``SiLU`` is a product with a sigmoid, a standard deviation is spelled out. `RULES` has one entry an
operation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, Optional

import numpy as np

from msqkd.graph.ir import Graph, Node, TensorType, Value
from msqkd.quant.plan import ActivationQuant, QuantPlan
from msqkd.quant.uses import axes_of, is_tanh_gelu, paddings, resize_flags, slice_entries
from msqkd.targets.limits import PAD_RANK, maximum

Shape = tuple[int, ...]


class Rewriter:
    """Operations that take the place of one node.

    Attributes:
        graph: the graph the node is in.
        node: the node.
        plan: has the parameters of values.
        shapes: shape of every value, the batch closed.
        made: the operations so far.
    """

    def __init__(self, graph: Graph, node: Node, plan: QuantPlan, shapes: dict[str, Shape]) -> None:
        self.graph, self.node, self.plan, self.shapes = graph, node, plan, shapes
        self.made: list[Node] = []

    @property
    def source(self) -> str:
        """The first input of the node."""
        return self.node.inputs[0]

    def literal(self, index: int) -> Any:
        """Return the literal that is input `index` of the node, or None where that input is computed or absent."""
        return self.graph.const(self.node.inputs[index]) if index < len(self.node.inputs) else None

    def tensor(self, number: Any) -> str:
        """Register a constant of at least one dimension, in the dtype of the first input that is computed."""
        kinds = [self.graph.values[name].type for name in self.graph.tensor_inputs(self.node)]
        dtype = kinds[0].dtype if kinds and kinds[0] is not None else "float32"
        return self.graph.add_const(np.atleast_1d(np.asarray(number, dtype)), f"{self.node.output}_number")

    def add(self, op: str, *operands: Any, shape: Sequence[int], attrs: Optional[dict[str, Any]] = None) -> str:
        """Append an operation and return the name of its result, which has the parameters of what `op` moves.

        Args:
            op: name of the primitive; one with `attrs` is not functional.
            operands: names of values, or literals.
            shape: of the result.
            attrs: attributes of the primitive.
        """
        names = [item if isinstance(item, str) else self.graph.add_const(item) for item in operands]
        output = self.graph.unique_value(f"{self.node.output}_part")
        self.graph.add_value(Value(output, "node", TensorType(tuple(shape))))
        self.shapes[output] = tuple(shape)
        if op in _MOVES and names[0] in self.plan.activations:
            self.plan.activations[output] = ActivationQuant(output, self.plan.activations[names[0]].group, exact=True)
        taken = {node.name for node in self.made}
        name = self.graph.unique_node(f"{self.node.name}.{op.lower()}")
        while name in taken:
            name += "_"
        self.made.append(
            Node(name, op, names, [output], attrs or {}, self.node.cell_path, self.node.cell_types, attrs is None)
        )
        return output

    def cut(self, begin: Shape, size: Shape) -> str:
        """Append a Slice of the first input and return the name of its result; an axis taken whole is left open."""
        whole = self.shapes[self.source]
        open_sizes = tuple(-1 if part == axis else part for part, axis in zip(size, whole))
        return self.add("Slice", self.source, begin, open_sizes, shape=size)

    def give(self, output: str) -> None:
        """Let the result of the last operation be `output`, one of the node's."""
        last = self.made[-1]
        del self.graph.values[last.output]
        self.plan.activations.pop(last.output, None)
        last.outputs = [output]

    def finish(self) -> None:
        """Put the operations in place of the node; the last gives its result, where no other was named."""
        last, at = self.made[-1], self.graph.nodes.index(self.node)
        if last.output not in self.node.outputs:
            self.give(self.node.output)
        last.name = self.node.name
        self.graph.nodes[at : at + 1] = self.made


_MOVES = ("Reshape", "Transpose", "Slice")
_BIAS = 2  # the place of a bias among the inputs of a layer
Rule = Callable[[Rewriter], None]
"""Rewrites the node, or changes it in place and leaves `made` empty."""


def to_known_operations(graph: Graph, plan: QuantPlan, shapes: dict[str, Shape]) -> None:
    """Rewrite the operations of `RULES`, in place.

    Args:
        graph: the network in the forms of `msqkd.exporters.lowering.lower_for_lite`.
        plan: its activations get those of new values.
        shapes: shape of every value, the batch closed; those of new values are added.
    """
    _spell_out(graph, shapes)
    for node in list(graph.nodes):
        rule = RULES.get(node.op)
        if rule is not None:
            rewriter = Rewriter(graph, node, plan, shapes)
            rule(rewriter)
            if rewriter.made:
                rewriter.finish()
    graph.prune()
    graph.check()


def _spell_out(graph: Graph, shapes: dict[str, Shape]) -> None:
    """Replace a node that was found in what a network spells out by what was written, unless MindSpore 2.0 has it."""
    for node in list(graph.nodes):
        if node.body is None:
            continue
        if node.op in _AS_ONE:
            node.body = None
            continue
        names = {node.body.inputs[0]: node.inputs[0], node.body.outputs[0]: node.output}
        made: list[Node] = []
        for part in node.body.nodes:
            for name in (*part.inputs, *part.outputs):
                if name not in names:
                    names[name] = graph.unique_value(name)
                    graph.add_value(replace(node.body.values[name], name=names[name]))
                    shapes[names[name]] = shapes[node.output]
            inputs, outputs = ([names[name] for name in side] for side in (part.inputs, part.outputs))
            name = node.name if part is node.body.nodes[-1] else f"{node.name}.{len(made)}"
            made.append(replace(part, name=name, inputs=inputs, outputs=outputs))
        at = graph.nodes.index(node)
        graph.nodes[at : at + 1] = made


_AS_ONE = ("SiLU", "GeLU", "HSwish", "HSigmoid")
"""Spelt-out operations that the rules below, or MindSpore 2.0 itself, know as one."""


# -- arithmetic --------------------------------------------------------------------------------------------------------
def _with_tensors(op: str) -> Rule:
    """An operation of two operands, numbers among them as tensors."""

    def rule(at: Rewriter) -> None:
        at.node.op, at.node.attrs, at.node.functional = op, {}, True
        for index, name in enumerate(at.node.inputs[:2]):
            value = at.graph.values[name]
            if value.kind == "const" and (not isinstance(value.const, np.ndarray) or value.const.ndim == 0):
                at.node.inputs[index] = at.tensor(value.const)

    return rule


def _sum_of_two(at: Rewriter) -> None:
    """A sum with a constant behind a layer as a difference: the converter would take the constant for the bias of the
    layer, though an activation lies between."""
    _with_tensors("Add")(at)
    fixed = [name for name in at.node.inputs if at.graph.values[name].kind in ("const", "param")]
    kind = at.graph.values[at.node.output].type
    is_float = kind is not None and kind.dtype == "float32"
    if len(fixed) == 1 and is_float and fixed[0] not in at.plan.activations and _behind_layer(at):
        value = at.graph.values[fixed[0]]
        data = at.graph.params[value.name].data if value.kind == "param" else value.const
        tensors = [name for name in at.node.inputs if name != fixed[0]]
        at.node.op, at.node.inputs = "Sub", [*tensors, at.tensor(-np.asarray(data))]


def _behind_layer(at: Rewriter) -> bool:
    """Return True if the computed operand comes out of a layer, by way of its bias and activation."""
    producers = {output: node for node in at.graph.nodes for output in node.outputs}
    before = producers.get(at.graph.tensor_inputs(at.node)[0])
    while before is not None and before.op in ("BiasAdd", "ReLU", "ReLU6"):
        before = producers.get(before.inputs[0])
    return before is not None and before.op in ("Conv2D", "Conv2DTranspose", "Dense", "MatMul", "BatchMatMul")


def _squared_difference(at: Rewriter) -> None:
    shape = at.shapes[at.node.output]
    apart = at.add("Sub", *at.node.inputs[:2], shape=shape)
    at.add("Mul", apart, apart, shape=shape)


def _sum(at: Rewriter) -> None:
    total, *others = at.node.inputs
    for name in others:
        total = at.add("Add", total, name, shape=at.shapes[at.node.output])


def _against(op: str, number: float, first: bool = False) -> Rule:
    """An operation of the input and a number, which is the first operand where `first` says so."""

    def rule(at: Rewriter) -> None:
        operands = [at.source, at.tensor(number)]
        at.add(op, *(operands[::-1] if first else operands), shape=at.shapes[at.node.output])

    return rule


def _product(at: Rewriter) -> None:
    """A product by the name that says whether there is a batch; the rows of a batch by one matrix are one matrix."""
    (*batch, rows, depth), other, shape = at.shapes[at.source], at.shapes[at.node.inputs[1]], at.shapes[at.node.output]
    if len(other) == 2 and batch:
        many = (prod(batch) * rows, depth)
        flat = at.add("Reshape", at.source, (-1, depth), shape=many)
        found = at.add("MatMul", flat, at.node.inputs[1], False, False, shape=(many[0], other[1]))
        if at.node.output in at.plan.activations:
            at.plan.activations[found] = replace(at.plan.activations[at.node.output], value=found)
        at.add("Reshape", found, _open(shape), shape=shape)
    else:
        at.node.op = "BatchMatMul" if len(shape) > 2 else "MatMul"
        at.node.inputs = [*at.node.inputs[:2], at.graph.add_const(False), at.graph.add_const(False)]


def _dense(at: Rewriter) -> None:
    """A product of matrices and a sum, of which the converter makes one step; a BiasAdd it leaves alone, and the sum
    is rounded once more."""
    weight = at.node.inputs[1]
    *rows, depth = at.shapes[at.source]
    (features, _), shape = at.shapes[weight], at.shapes[at.node.output]
    flat = (prod(rows), features)
    value = at.source if len(rows) == 1 else at.add("Reshape", at.source, (-1, depth), shape=(flat[0], depth))
    value = at.add("MatMul", value, weight, False, True, shape=flat)
    if len(at.node.inputs) > _BIAS:
        value = at.add("Add", value, at.node.inputs[_BIAS], shape=flat)
    if len(rows) != 1:
        at.add("Reshape", value, _open(shape), shape=shape)


def _power(at: Rewriter) -> None:
    exponent = 2.0 if at.node.op == "Square" else at.literal(1)
    if exponent is not None and np.size(exponent) == 1:
        at.add("Pow", at.source, at.tensor(np.reshape(exponent, ())), shape=at.shapes[at.node.output])


def _clamp(at: Rewriter) -> None:
    value, shape = at.source, at.shapes[at.node.output]
    for op, index in (("Maximum", 1), ("Minimum", 2)):
        if at.literal(index) is not None:
            value = at.add(op, value, at.tensor(at.literal(index)), shape=shape)


# -- activations -------------------------------------------------------------------------------------------------------
def _silu(at: Rewriter) -> None:
    """The converter makes one activation of a sigmoid and a product, and drops SiLU itself."""
    shape = at.shapes[at.node.output]
    at.add("Mul", at.source, at.add("Sigmoid", at.source, shape=shape), shape=shape)


def _gelu(at: Rewriter) -> None:
    if is_tanh_gelu(at.graph, at.node):
        at.node.op, at.node.inputs, at.node.functional, at.node.attrs = "GeLU", [at.source], True, {}
        return
    shape = at.shapes[at.node.output]
    share = at.add("Erf", at.add("Div", at.source, at.tensor(np.sqrt(2.0)), shape=shape), shape=shape)
    grown = at.add("Add", share, at.tensor(1.0), shape=shape)
    at.add("Mul", at.add("Mul", at.source, grown, shape=shape), at.tensor(0.5), shape=shape)


# -- parts, sizes and places -------------------------------------------------------------------------------------------
def _slice(at: Rewriter) -> None:
    """A block is a Slice, and a Reshape where it drops an axis; a grid stays a StridedSlice."""
    entries = slice_entries(at.graph, at.node)
    if entries is None:
        return
    shape = at.shapes[at.source]
    spans = [slice(begin, end, step).indices(size) for (begin, end, step, _), size in zip(entries, shape)]
    spans = [(first, first + 1, 1) if entry[3] else span for entry, span in zip(entries, spans) for first in span[:1]]
    spans += [(0, size, 1) for size in shape[len(spans) :]]
    if any(step != 1 or first >= last for first, last, step in spans):
        return
    size = tuple(last - first for first, last, _ in spans)
    part = at.cut(tuple(first for first, _, _ in spans), size)
    if size != at.shapes[at.node.output]:
        at.add("Reshape", part, _open(at.shapes[at.node.output]), shape=at.shapes[at.node.output])


def _open(shape: Shape) -> Shape:
    """The target of a Reshape to `shape` for any batch."""
    return (-1, *shape[1:]) if shape else shape


def _parts(at: Rewriter) -> None:
    """The converter reads no parameters of the results of a Split: every part is a Slice of its own."""
    drops, shape, start = at.node.op == "Unstack", at.shapes[at.source], 0
    axis = int(at.node.attrs["axis"] if drops else at.literal(1)) % len(shape)
    for output in at.node.outputs:
        begin, size = [0] * len(shape), list(shape)
        begin[axis], size[axis] = start, 1 if drops else at.shapes[output][axis]
        start += size[axis]
        at.cut(tuple(begin), tuple(size))
        if drops:
            at.add("Reshape", at.made[-1].output, _open(at.shapes[output]), shape=at.shapes[output])
        at.give(output)


def _pad(at: Rewriter) -> None:
    """With four axes at least: the int8 kernel corrupts memory with fewer."""
    pairs = paddings(at.graph, at.node)
    if pairs is None:
        return
    source, shape, result = at.source, at.shapes[at.source], at.shapes[at.node.output]
    missing = PAD_RANK - len(shape)
    if missing <= 0:
        at.add("Pad", source, shape=result, attrs={"paddings": tuple(map(tuple, pairs))})
        return
    first, *others = map(tuple, pairs)
    wider = [(*sizes[:1], *[1] * missing, *sizes[1:]) for sizes in (shape, result)]
    source = at.add("Reshape", source, _open(wider[0]), shape=wider[0])
    padded = at.add("Pad", source, shape=wider[1], attrs={"paddings": (first, *[(0, 0)] * missing, *others)})
    if at.node.output in at.plan.activations:
        at.plan.activations[padded] = replace(at.plan.activations[at.node.output], value=padded)
    at.add("Reshape", padded, _open(result), shape=result)


def _channels_first(at: Rewriter) -> None:
    """Channels from the last place to the second, with height and width as one axis: joined with the transposition
    that the converter adds, four axes would lose the layout that a convolution asks for."""
    shape = at.shapes[at.source]
    perm = at.literal(1)
    if len(shape) != 4 or perm is None or tuple(int(axis) % 4 for axis in perm) != (0, 3, 1, 2):
        return
    batch, height, width, channels = shape
    rows = at.add("Reshape", at.source, (-1, height * width, channels), shape=(batch, height * width, channels))
    turned = at.add("Transpose", rows, (0, 2, 1), shape=(batch, channels, height * width))
    shape = at.shapes[at.node.output]
    whole = at.add("Reshape", turned, (-1, channels, height, width), shape=shape)
    at.add("Slice", whole, (0, 0, 0, 0), (-1, -1, -1, -1), shape=shape)


def _nearest(at: Rewriter) -> None:
    aligned, half_pixel = resize_flags(at.graph, at.node)
    size = at.shapes[at.node.output][2:]
    if not half_pixel:
        at.add("ResizeNearestNeighbor", at.source, size, aligned, False, shape=at.shapes[at.node.output])


def _transposed(at: Rewriter) -> None:
    """With a bias, without which the converter fails: it looks for one where it has taken the shape of the result."""
    readers = at.graph.consumers(at.node.output)
    if len(readers) == 1 and readers[0].op == "BiasAdd":
        return
    shape = at.shapes[at.node.output]
    whole = at.add("Conv2DTranspose", *at.node.inputs, shape=shape, attrs=at.node.attrs)
    at.made[-1].sequences = at.node.sequences
    zeros = at.graph.unique_value(f"{at.node.name}.zeros")
    at.graph.add_param(zeros, np.zeros(shape[1], np.float32), trainable=False)
    at.add("BiasAdd", whole, zeros, 0, shape=shape)


def _normalise(at: Rewriter) -> None:
    """A factor and an offset a channel."""
    params = [at.graph.params.get(name) for name in at.node.inputs[1:5]]
    if any(param is None for param in params):
        return
    gamma, beta, mean, variance = (param.data.astype(np.float64) for param in params if param is not None)
    shape, factor = at.shapes[at.source], gamma / np.sqrt(variance + float(at.literal(6)))
    plane = (-1, *(1 for _ in shape[2:]))
    scaled = at.add("Mul", at.source, at.tensor(factor.reshape(plane)), shape=shape)
    at.add("Add", scaled, at.tensor((beta - mean * factor).reshape(plane)), shape=shape)
    at.node.outputs = at.node.outputs[:1]


def _prelu(at: Rewriter) -> None:
    """The positive part, and the slope times the negative one."""
    shape, slope = at.shapes[at.source], at.graph.params.get(at.node.inputs[1])
    if slope is None:
        return
    sizes = (-1, *(1 for _ in shape[2:])) if slope.data.size > 1 else (1,)
    below = at.add("Minimum", at.source, at.tensor(0.0), shape=shape)
    bent = at.add("Mul", below, at.tensor(slope.data.reshape(sizes)), shape=shape)
    at.add("Add", at.add("Maximum", at.source, at.tensor(0.0), shape=shape), bent, shape=shape)


def _elu(at: Rewriter) -> None:
    """x above 0, alpha · (exp(x) - 1) below."""
    shape = at.shapes[at.source]
    power = at.add("Exp", at.add("Minimum", at.source, at.tensor(0.0), shape=shape), shape=shape)
    below = at.add("Add", power, at.tensor(-1.0), shape=shape)
    bent = at.add("Mul", below, at.tensor(at.literal(1)), shape=shape)
    at.add("Add", at.add("Maximum", at.source, at.tensor(0.0), shape=shape), bent, shape=shape)


def _softplus(at: Rewriter) -> None:
    """max(x, 0) + log(1 + exp(-|x|)); Mish is x times the tanh of it."""
    shape = at.shapes[at.source]
    fallen = at.add(
        "Exp", at.add("Mul", at.add("Abs", at.source, shape=shape), at.tensor(-1.0), shape=shape), shape=shape
    )
    tail = at.add("Log", at.add("Add", fallen, at.tensor(1.0), shape=shape), shape=shape)
    whole = at.add("Add", at.add("Maximum", at.source, at.tensor(0.0), shape=shape), tail, shape=shape)
    if at.node.op == "Mish":
        at.add("Mul", at.source, at.add("Tanh", whole, shape=shape), shape=shape)


def _broadcast(at: Rewriter) -> None:
    """A sum with zeros of the shape asked for."""
    shape = at.shapes[at.node.output]
    kept = 1 if at.shapes[at.source][:1] == shape[:1] else shape[0]
    at.add("Add", at.source, at.tensor(np.zeros((kept, *shape[1:]))), shape=shape)


def _tile(at: Rewriter) -> None:
    """A Concat of the value with itself for every axis along which it is repeated."""
    times, shape, value = at.literal(1), list(at.shapes[at.source]), at.source
    if not isinstance(times, tuple) or len(times) != len(shape):
        return
    for axis, count in enumerate(times):
        if count > 1:
            shape[axis] *= count
            value = at.add("Concat", *[value] * count, axis, shape=shape)
            at.made[-1].sequences = ((0, count),)


# -- means and norms ---------------------------------------------------------------------------------------------------
def _reduced(at: Rewriter, op: str, value: str, axes: Sequence[int], keep: bool = True) -> str:
    """A reduction of a value that has the shape of the node's input.

    A maximum is the negative of the minimum of the negative (see `msqkd.targets.limits.maximum`); of a map the
    converter moves the axes.
    """
    shape = at.shapes[at.source]
    left = [1 if axis in axes else size for axis, size in enumerate(shape) if keep or axis not in axes]
    if op == "ReduceMax" and (len(shape) == 4 or maximum(len(shape), axes) is not None):
        turned = at.add("Mul", value, at.tensor(-1.0), shape=shape)
        least = _reduced(at, "ReduceMin", turned, axes, keep)
        return at.add("Mul", least, at.tensor(-1.0), shape=left)
    return at.add(op, value, tuple(axes), keep, *([False] if op == "ReduceSum" else []), shape=left)


def _extreme(op: str) -> Rule:
    """The largest or smallest value along an axis, where nobody asks for its place."""

    def rule(at: Rewriter) -> None:
        axis, keep = int(at.literal(1)) % len(at.shapes[at.source]), bool(at.literal(2))
        value = at.node.outputs[1]
        if not at.graph.consumers(at.node.output) and at.node.output not in at.graph.outputs:
            _reduced(at, op, at.source, [axis], keep)
            at.give(value)

    return rule


def _largest(at: Rewriter) -> None:
    keep = bool(at.literal(2))
    _reduced(at, "ReduceMax", at.source, axes_of(at.graph, at.node, 1), keep)


def _named_axes(at: Rewriter) -> None:
    """Axes counted from the front, all of them named: int8 kernels do not know axes from the end."""
    at.node.inputs[1] = at.graph.add_const(tuple(axes_of(at.graph, at.node, 1)), "axes")


def _axis_of_result(at: Rewriter) -> None:
    """An axis, the last input, counted from the front of the result."""
    axis = at.graph.const(at.node.inputs[-1])
    if isinstance(axis, int):
        at.node.inputs[-1] = at.graph.add_const(axis % len(at.shapes[at.node.output]), "axis")


def _deviation(at: Rewriter) -> None:
    """The square root of the mean square of what is left without the mean, or of the sum divided by n - 1."""
    shape, axes = at.shapes[at.source], axes_of(at.graph, at.node, 1)
    unbiased, keep = bool(at.literal(2)), bool(at.literal(3))
    count = prod(shape[axis] for axis in axes)
    if count == 1 or any(at.graph.consumers(name) for name in at.node.outputs[1:]):
        return
    apart = at.add("Sub", at.source, _reduced(at, "ReduceMean", at.source, axes), shape=shape)
    variance = _reduced(at, "ReduceMean", at.add("Mul", apart, apart, shape=shape), axes, keep)
    left = at.shapes[variance]
    if unbiased:
        variance = at.add("Mul", variance, at.tensor(count / (count - 1)), shape=left)
    at.add("Sqrt", variance, shape=left)


def _log_softmax(at: Rewriter) -> None:
    shape, axes = at.shapes[at.source], axes_of(at.graph, at.node, 1)
    apart = at.add("Sub", at.source, _reduced(at, "ReduceMax", at.source, axes), shape=shape)
    total = _reduced(at, "ReduceSum", at.add("Exp", apart, shape=shape), axes)
    at.add("Sub", apart, at.add("Log", total, shape=at.shapes[total]), shape=shape)


RULES: Mapping[str, Rule] = {
    **{op: _with_tensors(op) for op in ("Sub", "Mul", "Div", "Maximum", "Minimum")},
    **dict.fromkeys(("Add", "Adds"), _sum_of_two),
    "Subs": _with_tensors("Sub"),
    "Muls": _with_tensors("Mul"),
    "Divs": _with_tensors("Div"),
    "RealDiv": _with_tensors("Div"),
    "SquaredDifference": _squared_difference,
    "AddN": _sum,
    "MatMulExt": _product,
    "Dense": _dense,
    "Neg": _against("Mul", -1.0),
    "Reciprocal": _against("Div", 1.0, first=True),
    "Pow": _power,
    "PowTensorScalar": _power,
    "Square": _power,
    "ClampScalar": _clamp,
    "SiLU": _silu,
    "GeLU": _gelu,
    "GeluExt": _gelu,
    "StridedSlice": _slice,
    "Transpose": _channels_first,
    "Split": _parts,
    "Unstack": _parts,
    "Pad": _pad,
    "PadV3": _pad,
    "ResizeNearestNeighborV2": _nearest,
    "Conv2DTranspose": _transposed,
    "BatchNorm": _normalise,
    "PReLU": _prelu,
    "Elu": _elu,
    "Softplus": _softplus,
    "Mish": _softplus,
    "BroadcastTo": _broadcast,
    "Tile": _tile,
    "ReduceMax": _largest,
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMin", "ReduceProd", "Softmax"), _named_axes),
    **dict.fromkeys(("Concat", "ExpandDims"), _axis_of_result),
    "ArgMaxWithValue": _extreme("ReduceMax"),
    "ArgMinWithValue": _extreme("ReduceMin"),
    "ReduceStd": _deviation,
    "LogSoftmax": _log_softmax,
}
"""Operation -> how it is written; what is not here is written as it is."""
