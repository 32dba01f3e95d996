"""FakeQuantParam markers, and what keeps MindSpore Lite's converter from reading more into them than the plan says.

The converter computes an operation in int8 where its inputs and its output have a marker. A ``Depend`` between an
operation that is planned float and its marker keeps it float: the readers of the value get the parameters, the
operation does not. The converter deletes it once it has read the markers.

A convolution or addition takes the parameters of its result from what reads it, once its bias and activation are in its
kernel. At an output nobody reads it: there the operation has a marker of its own, with the attribute `TWIN`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from mindspore import nn

from msqkd.exporters.mindir_form import replace_messages, set_attribute
from msqkd.graph.ir import unique_name
from msqkd.quant.qparams import QParams

MARKER = "FakeQuantParam"
_REFERENCE = "REF::"

BEHIND_FLOAT = "behind_float"
"""Attribute of a marker behind a value that is computed in float."""

TWIN = "twin"
"""Attribute of a marker that repeats the one behind the bias or activation of its operation."""

_IN_KERNEL = ("BiasAdd", "ReLU", "ReLU6")


SEVERAL = ("LayerNorm",)
"""Operations with several results, the first of which alone has a reader."""


class Marker(nn.Cell):
    """The marker of a value or weight.

    Args:
        qparams: its parameters.
        behind_float: whether the value is computed in float.
    """

    def __init__(self, qparams: QParams, behind_float: bool = False) -> None:
        super().__init__()
        from mindspore.common.dtype import QuantDtype
        from mindspore.ops.operations._quant_ops import FakeQuantParam

        scale = [float(s) for s in np.atleast_1d(qparams.scale)]
        zero_point = [int(z) for z in np.atleast_1d(qparams.zero_point)]
        self.mark = FakeQuantParam.linear_quant_param(QuantDtype.INT8, scale, zero_point, len(scale) > 1)
        if behind_float:
            self.mark.add_prim_attr(BEHIND_FLOAT, True)

    def construct(self, x):  # type: ignore[no-untyped-def]
        """Mark `x`."""
        return self.mark(x)


def guard_markers(model: Any) -> None:
    """Put a ``Depend`` or a twin where a ``ModelProto`` with markers needs one, in place.

    Every node has a primitive of its own.
    """
    _Guard(model).run()


def mark_tuples(model: Any) -> None:
    """Put the markers of the results of `SEVERAL` before the TupleGetItem, in place: of an operation the converter
    looks at the direct readers alone."""
    _exchange(model, "TupleGetItem", MARKER)


def mark_items(model: Any) -> None:
    """Undo `mark_tuples`, in place."""
    _exchange(model, MARKER, "TupleGetItem")


def _exchange(model: Any, before: str, behind: str) -> None:
    """Let two operations change places that follow an operation of `SEVERAL`."""
    primitives = {primitive.name: primitive.op_type for primitive in model.primitives}
    nodes = list(model.graph.node)
    ops = [primitives.get(node.op_type.removeprefix(_REFERENCE), "") for node in nodes]
    places = {node.output[0]: place for place, node in enumerate(nodes)}
    for place in range(len(nodes)):
        first = places.get(nodes[place].input[0]) if ops[place] == behind else None
        root = places.get(nodes[first].input[0]) if first is not None and ops[first] == before else None
        if first is not None and root is not None and ops[root] in SEVERAL:
            one, other = (type(nodes[place])() for _ in range(2))
            one.CopyFrom(nodes[place])
            other.CopyFrom(nodes[first])
            one.input[0], other.input[0] = nodes[first].input[0], nodes[first].output[0]
            one.output[:], other.output[:] = nodes[first].output, nodes[place].output
            nodes[first], nodes[place] = one, other
    replace_messages(model.graph.node, nodes)


_MOVES = (
    "Reshape", "Transpose", "Slice", "StridedSlice", "Squeeze", "ExpandDims", "Concat", "Stack", "Gather", "MaxPool",
    "Pad", "ResizeNearestNeighbor",
)  # fmt: skip
"""Operations that the converter takes for int8 where what they read has parameters."""


class _Guard:
    def __init__(self, model: Any) -> None:
        self.model = model
        self.primitives = {primitive.name: primitive for primitive in model.primitives}
        self.producers = {node.output[0]: node for node in model.graph.node}
        self.twins: dict[str, Any] = {}
        self.marked = {node.input[0] for node in model.graph.node if self._op(node) == MARKER}
        self.unmarked: dict[str, str] = {}  # what a marker behind a float operation gives -> what it reads

    def run(self) -> None:
        """Rewrite the nodes."""
        outputs = {info.name for info in self.model.graph.output}
        tuples = [node for node in self.model.graph.node if self._op(node) == "MakeTuple"]
        outputs.update(name for node in reversed(tuples) if node.output[0] in outputs for name in node.input)
        nodes: list[Any] = []
        for node in self.model.graph.node:
            if self._op(node) != MARKER:
                self._past_markers(node)
                nodes += [*self._before_product(node), node]
                continue
            primitive = self._primitive(node)
            if any(attribute.name == BEHIND_FLOAT for attribute in primitive.attribute):
                source = node.input[0]
                self.unmarked[node.output[0]] = source
                nodes.append(self._added("Depend", node, [source, source], f"{source}_depend"))
                node.input[0] = nodes[-1].output[0]
            kept = [item for item in primitive.attribute if item.name != "kwargs"]
            replace_messages(primitive.attribute, kept)
            nodes.append(node)
            if node.output[0] in outputs:
                self._twin(node)
        replace_messages(self.model.graph.node, [item for node in nodes for item in (node, *self._behind(node))])

    def _past_markers(self, node: Any) -> None:
        """Let a float operation that only moves values read a float value without its marker: the converter would
        take it for int8, and what it gives would be rounded."""
        if self._op(node) in _MOVES and node.output[0] not in self.marked:
            for index, name in enumerate(node.input):
                node.input[index] = self.unmarked.get(name, name)

    def _before_product(self, node: Any) -> list[Any]:
        """Return a Depend between a marker and a float dense layer, which reads it from now on.

        With parameters at its input the converter would not take the bias into the product.
        """
        source = self.producers.get(node.input[0]) if node.input else None
        weight = self.producers.get(node.input[1]) if len(node.input) > 1 else source
        if self._op(node) != "MatMul" or source is None or self._op(source) != MARKER or weight is not None:
            return []
        name = f"{node.output[0]}_source"
        depend = self._added("Depend", source, [source.output[0], source.output[0]], name)
        node.input[0] = name
        return [depend]

    def _primitive(self, node: Any) -> Any:
        return self.primitives.get(node.op_type[len(_REFERENCE) :])

    def _op(self, node: Any) -> str:
        primitive = self._primitive(node)
        return primitive.op_type if primitive is not None else ""

    def _added(self, op: str, like: Any, source: list[str], output: str) -> Any:
        """Make a node with a primitive of its own and the type of the node `like`."""
        name = unique_name(op, self.primitives)
        self.primitives[name] = primitive = self.model.primitives.add(name=name, op_type=op)
        primitive.prim_type = primitive.PRIMITIVE
        node = type(like)()
        node.CopyFrom(like)
        node.name, node.op_type = output, f"{_REFERENCE}{name}"
        node.input[:], node.output[:] = source, [output]
        return node

    def _twin(self, marker: Any) -> None:
        """Repeat `marker` behind the operation whose bias or activation it stands behind."""
        last = self.producers.get(marker.input[0])
        root = last
        while root is not None and self._op(root) in _IN_KERNEL:
            root = self.producers.get(root.input[0])
        if root is None or root is last or self._op(root) not in ("Conv2D", "Add"):
            return
        twin = self._added(MARKER, marker, [f"{root.output[0]}_twin"], root.output[0])
        primitive = self._primitive(twin)
        primitive.attribute.extend(self._primitive(marker).attribute)
        set_attribute(primitive.attribute.add(name=TWIN), True)
        root.output[0] = twin.input[0]
        self.twins[root.output[0]] = twin

    def _behind(self, node: Any) -> list[Any]:
        twin = self.twins.get(node.output[0])
        return [twin] if twin is not None else []
