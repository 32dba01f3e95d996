"""MindIR (the protobuf that `mindspore.export` writes) to Graph.

The compiler has already flattened every cell, method and operator overload. What is left to undo is its bookkeeping:
``Load``, ``UpdateState`` and ``Depend`` order side effects (a network in evaluation has none but in-place operations),
``MakeTuple`` and ``TupleGetItem`` wrap sequences of inputs and multiple outputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Callable, Optional

import numpy as np

from msqkd.errors import CaptureError
from msqkd.graph.ir import Graph, Node, TensorType, Value, unique_name
from msqkd.graph.leaf_scopes import repair_leaves

# TensorProto.DataType -> numpy
_DTYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 10: "float16",
    11: "float64", 12: "uint32", 13: "uint64", 17: "float64",
}  # fmt: skip
# In-place operations write their first operand; where nobody reads it afterwards they are the plain ones.
_INPLACE = {
    "InplaceAddExt": "AddExt", "InplaceAddsExt": "AddScalar",
    "InplaceSubExt": "SubExt", "InplaceSubScalar": "SubScalar",
    "InplaceMul": "Mul", "InplaceMuls": "Muls", "InplaceDiv": "Div", "InplaceDivs": "Divs",
}  # fmt: skip
# Operations that hand their first input on: they order side effects, or copy because an in-place operation follows.
_PASS_THROUGH = ("Load", "Depend", "TensorMove")
_MAKE_SEQUENCE, _GET_ITEM = ("MakeTuple", "make_list"), ("TupleGetItem", "list_getitem")
_SKIP_SCOPE = ("Default", "Gradients", "recompute_Default")


def read_mindir(data: bytes, name: str, types: Optional[dict[str, str]] = None) -> Graph:
    """Parse a serialised MindIR into a Graph.

    Args:
        data: the protobuf bytes.
        name: class name of the network (the root of every `cell_types`).
        types: cell path to class name of the original network, where it is at hand; corrects scopes.

    Raises:
        CaptureError: the graph has control flow on values or something else that cannot be flattened.
    """
    from mindspore.train import mind_ir_pb2 as pb

    model = pb.ModelProto()
    model.ParseFromString(data)
    return read_model(model, name, types)


def read_model(
    model: Any,
    name: str,
    types: Optional[dict[str, str]] = None,
    parameters: Optional[Mapping[str, Any]] = None,
    outer: str = "",
    lines: Optional[Callable[[str], str]] = None,
) -> Graph:
    """A parsed MindIR as a Graph.

    Args:
        model: the ``ModelProto``.
        name: class name of the network (the root of every `cell_types`).
        types: cell path to class name of the original network, where it is at hand; corrects scopes.
        parameters: name to Parameter, for a model that does not hold the weights itself; the graph's arrays may be
            views of theirs.
        outer: what is taken off the front of the scopes (see `outer_scope`).
        lines: where in the source the cell of a path branches, for the message.

    Raises:
        CaptureError: the graph has control flow on values or something else that cannot be flattened.
    """
    if model.functions:
        path = _branching_cell(model, outer)
        place = f"in cell '{path}'" if path else "in its construct"
        line = lines(path) if lines is not None else ""
        raise CaptureError(
            f"{name}: the network branches or loops on tensor values ({place}{', ' * bool(line)}{line}); such control "
            "flow cannot be quantised: decide with Python values fixed at construction, or use ops.select / masks"
        )
    return _Reader(model, name, types or {}, parameters, outer).read()


def input_types(model: Any) -> list[TensorType]:
    """The types of the inputs of a parsed MindIR."""
    return [_tensor_type(info.tensor[0]) for info in model.graph.input]


def network_class(model: Any) -> str:
    """The class name of the exported network; empty where the file does not say (msqkd's own files)."""
    found = re.match(r"\d.*_([^\W_]+)_construct_\d+$", model.graph.name)
    return found[1] if found else ""


def scope_types(model: Any, name: str) -> dict[str, str]:
    """Cell path to class name, for the cells that the scopes of a MindIR tell of."""
    outer = outer_scope(model, name)
    types: dict[str, str] = {}
    for node in model.graph.node:
        path, kinds = _scope(node.domain, outer)
        types.update(zip(_prefixes(path), kinds))
    return types


def outer_scope(model: Any, name: str) -> str:
    """What the scopes of all cells begin with where the network `name` was first compiled inside another cell."""
    cells = [node.domain.rpartition("/")[0] + "/" for node in model.graph.node]
    scopes = [scope for scope in cells if "-" in scope]
    inner = f"-{name}/"
    # A sequence of sequences looks the same, and is the network itself.
    if name == "SequentialCell" or not scopes or not all(inner in scope for scope in scopes):
        return ""
    outer = {scope[: scope.index(inner) + len(inner)] for scope in scopes}
    return outer.pop() if len(outer) == 1 else ""


class _Reader:
    def __init__(
        self, model: Any, name: str, types: dict[str, str], parameters: Optional[Mapping[str, Any]], outer: str
    ) -> None:
        self.proto = model.graph
        self.outer = outer
        self.parameters = parameters
        self.graph = Graph(name)
        self.types = types
        self.primitives = {primitive.name: primitive for primitive in model.primitives}
        self.alias: dict[str, str] = {}  # proto name -> value name
        self.tuples: dict[str, list[str]] = {}  # proto name of a tuple -> proto names of its elements
        self.monads: set[str] = set()
        self.overwritten: dict[str, str] = {}  # proto name of a value written in place -> where

    def read(self) -> Graph:
        graph, proto = self.graph, self.proto
        names = [tensor.ref_key or _short(tensor.name) for tensor in proto.parameter]
        for info in proto.input:
            name = unique_name(_short(info.name), {*names, *graph.values})
            _known_dtype(info.tensor[0], name)
            graph.add_value(Value(name, "input", _tensor_type(info.tensor[0])))
            graph.inputs.append(name)
            self.alias[info.name] = name
        for name, tensor in zip(names, proto.parameter):
            self.alias[tensor.name] = graph.add_param(name, self._weight(tensor, name))
        for node in proto.node:
            self._node(node)
        for info in proto.output:
            self._check_fresh(info.name)
            graph.outputs += self._values(info.name)
        repair_leaves(graph, self.types, _containers(self.types))
        _repair_scopes(graph, self.types)
        _name_nodes(graph, self.types)
        graph.prune()
        graph.check()
        return graph

    def _weight(self, tensor: Any, name: str) -> np.ndarray:
        if self.parameters is None:
            return _array(tensor)
        _known_dtype(tensor, name)
        if name not in self.parameters:
            raise CaptureError(
                f"{self.graph.name}: parameter '{name}' belongs to no cell of the network; make its cell an attribute "
                "of another (those in a plain list, tuple or dict it does not see: use nn.CellList or nn.CellDict)"
            )
        return self.parameters[name].asnumpy()

    def _values(self, proto_name: str) -> list[str]:
        """The values behind a proto name, nested tuples flattened."""
        if proto_name in self.tuples:
            return [value for element in self.tuples[proto_name] for value in self._values(element)]
        return [self.alias[proto_name]]

    def _node(self, proto: Any) -> None:
        out = proto.output[0]
        if proto.op_type == "Constant":
            self._constant(out, attribute_value(proto.attribute[0]))
            return
        if not proto.op_type.startswith("REF::"):
            raise CaptureError(f"{self.graph.name}: node {proto.name} ({proto.op_type}) is not a primitive operation")
        primitive = self.primitives[proto.op_type[len("REF::") :]]
        op = primitive.op_type
        if op == "UpdateState":
            self.monads.add(out)
            return
        inputs = [name for name in proto.input if name not in self.monads]
        if op in _PASS_THROUGH:
            self._pass_through(out, proto.input[0], copy=op != "Depend")
        elif op in _MAKE_SEQUENCE:
            self.tuples[out] = inputs
        elif op in _GET_ITEM:
            self._element(out, inputs[0], int(self.graph.const(self.alias[inputs[1]])))
        else:
            self._operation(proto, primitive, inputs)

    def _constant(self, out: str, value: Any) -> None:
        if value is _MONAD:
            self.monads.add(out)
        elif isinstance(value, (tuple, list)) and _holds_array(value):
            # A sequence of tensors, which an operation takes as one argument.
            self.tuples[out] = [f"{out}[{index}]" for index in range(len(value))]
            for name, item in zip(self.tuples[out], value):
                self._constant(name, item)
        else:
            self.alias[out] = self.graph.add_const(value, _constant_name(out))

    def _pass_through(self, out: str, source: str, copy: bool) -> None:
        if source in self.monads:
            self.monads.add(out)
            return
        if copy:
            self._check_fresh(source)
        elif source in self.overwritten:
            self.overwritten[out] = self.overwritten[source]
        if source in self.tuples:
            self.tuples[out] = self.tuples[source]
        else:
            self.alias[out] = self.alias[source]

    def _element(self, out: str, source: str, index: int) -> None:
        element = self.tuples[source][index]
        if element in self.tuples:
            self.tuples[out] = self.tuples[element]
        else:
            self.alias[out] = self.alias[element]

    def _operation(self, proto: Any, primitive: Any, inputs: list[str]) -> None:
        op, out = primitive.op_type, proto.output[0]
        path, types = _scope(proto.domain, self.outer)
        names, sequences = self._arguments(inputs)
        kinds = _output_types(proto)
        hint = re.sub(r"\W+", "_", f"{path or 'net'}_{op}").lower()
        outputs = [self.graph.unique_value(hint)]
        outputs += [f"{outputs[0]}_out{i}" for i in range(1, len(kinds))]
        for value, kind in zip(outputs, kinds):
            self.graph.add_value(Value(value, "node", kind))
        attrs = {a.name: attribute_value(a) for a in primitive.attribute}
        if op.startswith("Inplace"):
            op, attrs = self._out_of_place(op, path, inputs[0]), {}
        functional = primitive.prim_type != 1
        types = (self.graph.name, *types)
        node = Node(out, op, names, outputs, attrs, path, types, functional, sequences, _gives_tuple(proto))
        self.graph.nodes.append(node)
        if node.unpack:
            self.tuples[out] = [f"{out}[{index}]" for index in range(len(outputs))]
            self.alias.update(zip(self.tuples[out], outputs))
        else:
            self.alias[out] = outputs[0]

    def _arguments(self, inputs: list[str]) -> tuple[list[str], tuple[tuple[int, int], ...]]:
        """Value names and the runs among them that are one argument; a tuple of literals is one literal."""
        names: list[str] = []
        sequences: list[tuple[int, int]] = []
        for name in inputs:
            self._check_fresh(name)
            values = self._values(name)
            if name not in self.tuples:
                names += values
            elif all(self._is_literal(value) for value in values):
                names.append(self.graph.add_const(tuple(self.graph.const(value) for value in values), "c_tuple"))
            else:
                sequences.append((len(names), len(values)))
                names += values
        return names, tuple(sequences)

    def _is_literal(self, value: str) -> bool:
        return self.graph.values[value].kind == "const" and not isinstance(self.graph.const(value), np.ndarray)

    def _check_fresh(self, name: str) -> None:
        for element in self.tuples.get(name, ()):
            self._check_fresh(element)
        if name in self.overwritten:
            raise CaptureError(
                f"{self.graph.name}: {self.overwritten[name]} changes a tensor in place that is read again afterwards; "
                "write `y = y + ...` instead of `y += ...`"
            )

    def _out_of_place(self, op: str, path: str, operand: str) -> str:
        """The plain twin of an in-place operation, after which nobody may read `operand`."""
        place = f"'{path}'" if path else "its construct"
        if op not in _INPLACE:
            raise CaptureError(
                f"{self.graph.name}: {place} uses the in-place operation {op}; "
                "of those that change a tensor in place, msqkd knows +=, -=, *= and /="
            )
        kind = self.graph.values[self.alias[operand]].kind
        if kind != "node":
            what = {"input": "an input of the network", "param": "a parameter", "const": "a constant"}[kind]
            raise CaptureError(
                f"{self.graph.name}: {place} changes {what} in place; write `y = x + ...` instead of `x += ...`"
            )
        self.overwritten[operand] = place
        return _INPLACE[op]


def _holds_array(value: Any) -> bool:
    """Return True for an array, and for a sequence with an array anywhere in it."""
    return any(map(_holds_array, value)) if isinstance(value, (tuple, list)) else isinstance(value, np.ndarray)


class _Monad:
    pass


_MONAD = _Monad()


def attribute_value(attr: Any) -> Any:
    """The Python value of an AttributeProto (recursively for tuples)."""
    kind = attr.AttributeType.Name(attr.type)
    if kind in ("TUPLE", "LIST"):
        items = [attribute_value(item) for item in attr.values]
        return tuple(items) if kind == "TUPLE" else items
    if kind in ("UMONAD", "IOMONAD"):
        return _MONAD
    if kind == "NONE":
        return None
    if kind == "STRING":
        return (attr.strings[0] if attr.strings else attr.s).decode("utf-8")
    if kind == "BOOL":
        return bool(attr.ints[0] if attr.ints else attr.i)
    if kind.startswith(("INT", "UINT")):
        return int(attr.ints[0] if attr.ints else attr.i)
    if kind == "FLOAT":
        # The file stores a float32; its shortest decimal is what the source said (1e-05, not 9.999999747378752e-06).
        return float(str(np.float32(attr.floats[0] if attr.floats else attr.f)))
    if kind == "DOUBLE":
        return float(attr.doubles[0] if attr.doubles else attr.d)
    if kind == "TENSORS":
        return _array(attr.tensors[0])
    if kind == "TENSOR":
        return _array(attr.t)
    return _Opaque(kind)


class _Opaque:
    """An attribute no consumer needs (a type, a symbol); kept only so that it is seen when printed."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __repr__(self) -> str:
        return f"<MindIR attribute of type {self.kind}>"


def _array(tensor: Any) -> np.ndarray:
    dtype = _known_dtype(tensor, tensor.ref_key or tensor.name)
    return np.frombuffer(tensor.raw_data, dtype=dtype).reshape(tuple(tensor.dims)).copy()


def _known_dtype(tensor: Any, name: str) -> str:
    dtype = _DTYPES.get(tensor.data_type)
    if dtype is None:
        kind = tensor.DataType.Name(tensor.data_type).lower()
        known = ", ".join(dict.fromkeys(_DTYPES.values()))
        raise CaptureError(f"'{name}' has data type {kind}, which is not one of {known}")
    return dtype


def _tensor_type(tensor: Any) -> TensorType:
    return TensorType(tuple(int(d) for d in tensor.dims), _DTYPES.get(tensor.data_type, "unknown"))


def _output_types(proto: Any) -> list[Optional[TensorType]]:
    shape = _shape_attribute(proto)
    if shape is None:
        return [None]
    entries = list(shape.values) or [shape]
    return [_tensor_type(entry.tensors[0]) if entry.tensors else None for entry in entries]


def _gives_tuple(proto: Any) -> bool:
    shape = _shape_attribute(proto)
    return shape is not None and bool(shape.values)


def _shape_attribute(proto: Any) -> Any:
    return next((attr for attr in proto.attribute if attr.name == "shape"), None)


def _short(name: str) -> str:
    return name.rsplit(":", 1)[-1] if not name.rsplit(":", 1)[-1].isdigit() else name.rsplit(":", 2)[-2]


def _constant_name(proto_name: str) -> str:
    """``c_`` and the name in the source, without the compiler's numbers (they differ from one run to the next)."""
    hint = re.sub(r"_\d+$", "", re.sub(r"\W", "", _short(proto_name)))
    return "c" if hint in ("", "CNode", "ValueNode", "Parameter") else f"c_{hint}"


def _scope(domain: str, outer: str = "") -> tuple[str, tuple[str, ...]]:
    """``Default/layer1-SequentialCell/0-Bottleneck/Conv2D-op3`` -> (``layer1.0``, (SequentialCell, Bottleneck))."""
    parts = domain.removeprefix(outer).split("/")[:-1]
    while parts and parts[0] in _SKIP_SCOPE:
        parts = parts[1:]
    pairs = [part.rsplit("-", 1) for part in parts if "-" in part]
    return ".".join(p[0] for p in pairs), tuple(p[1] for p in pairs)


def _repair_scopes(graph: Graph, types: dict[str, str]) -> None:
    """Give functional operations of a repeated block their own block back.

    The compiler parses the code of equal blocks once, so the `x + y` of the eighth block can say "block 5". Layers do
    know their place. An operation whose neighbours lie in another block of the same class, one that began only after
    the recorded one had ended, is moved there; what a block computes before its first layer goes by its readers, the
    rest by its producers.
    """
    containers = _containers(types)
    fixed = {id(n) for n in graph.nodes if graph.param_inputs(n) or (n.cell_path and n.cell_path not in containers)}
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for index, node in enumerate(graph.nodes):
        if id(node) in fixed:
            for prefix in _prefixes(node.cell_path):
                first.setdefault(prefix, index)
                last[prefix] = index
    place = {id(node): index for index, node in enumerate(graph.nodes)}
    producers = {output: node for node in graph.nodes for output in node.outputs}
    readers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    opening: dict[
        tuple[str, str], bool
    ] = {}  # whether the first such operation of a block comes before the block's first layer
    for node in graph.nodes:
        opening.setdefault((node.cell_path, node.op), place[id(node)] < first.get(node.cell_path, 0))
    early = {id(node) for node in graph.nodes if opening[node.cell_path, node.op]}

    def move(node: Node, neighbour: Optional[Node]) -> bool:
        if neighbour is None or (neighbour.cell_path + ".").startswith(node.cell_path + "."):
            return neighbour is not None
        parts, others = _prefixes(node.cell_path), _prefixes(neighbour.cell_path)
        level = [(depth, depth) for depth in range(min(len(parts), len(others)), 0, -1)]
        # The same block may also lie deeper or less deep in the network.
        across = [(i, j) for j in range(len(others), 0, -1) for i in range(len(parts), 0, -1) if i != j]
        for depth, other_depth in (*level, *across):
            mine, other = parts[depth - 1], others[other_depth - 1]
            path = other + node.cell_path[len(mine) :]
            same_class = (
                node.cell_types[: depth + 1] == neighbour.cell_types[: depth + 1]
                if depth == other_depth
                else node.cell_types[depth] == neighbour.cell_types[other_depth]
            )
            alike = same_class and types.get(path) == node.cell_types[-1]
            if mine != other and alike and first.get(other, -1) > last.get(mine, len(graph.nodes)):
                node.cell_path = path
                node.cell_types = (*neighbour.cell_types[: other_depth + 1], *node.cell_types[depth + 1 :])
                return True
        return False

    movable = [node for node in graph.nodes if node.cell_path and id(node) not in fixed]
    settled: set[int] = set()
    for node in movable:
        sources = [producers[name] for name in node.inputs if name in producers]
        if id(node) not in early and move(node, max(sources, key=lambda n: place[id(n)], default=None)):
            settled.add(id(node))
    for node in reversed(movable):
        if id(node) not in settled:
            move(node, next((n for output in node.outputs for n in readers.get(output, ())), None))


def _containers(types: dict[str, str]) -> set[str]:
    """The paths of cells that have cells inside."""
    return {prefix for path in types for prefix in _prefixes(path)[:-1]}


def _prefixes(path: str) -> list[str]:
    parts = path.split(".") if path else []
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _name_nodes(graph: Graph, types: dict[str, str]) -> None:
    """Name a layer's main operation after its cell, every other after the cell and the operation.

    The main operation of a layer is the first that has parameters, or its only one.
    """
    containers = _containers(types)
    main: dict[str, str] = {}  # path of a layer -> the operation that gets its name
    kinds: dict[str, set[str]] = {}
    for node in graph.nodes:
        if node.cell_path and node.cell_path not in containers:
            kinds.setdefault(node.cell_path, set()).add(node.op)
            if graph.param_inputs(node):
                main.setdefault(node.cell_path, node.op)
    for path, ops in kinds.items():
        if len(ops) == 1:
            main.setdefault(path, *ops)
    taken: set[str] = set()
    for node in graph.nodes:
        alone = main.get(node.cell_path) == node.op
        base = node.cell_path if alone else ".".join(filter(None, (node.cell_path, _snake(node.op))))
        node.name = unique_name(base, taken)
        taken.add(node.name)


def _snake(op: str) -> str:
    op = op.removesuffix("Ext")  # MindSpore's newer form of an operation; a reader does not care
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", op).lower()


def _branching_cell(model: Any, outer: str) -> str:
    """The path of the cell in which the compiler found a choice between functions."""
    operations = {primitive.name: primitive.op_type for primitive in model.primitives}
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    chosen = [node for node in nodes if operations.get(node.op_type.removeprefix("REF::")) in ("Switch", "SwitchLayer")]
    paths = [_scope(node.domain, outer)[0] for node in chosen or nodes if node.domain]
    return next(filter(None, paths), "")
