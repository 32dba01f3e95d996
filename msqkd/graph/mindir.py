"""MindIR (the protobuf that `mindspore.export` writes) to Graph.

The compiler has already flattened every cell, method and operator overload. What is left to undo is its bookkeeping: ``Load``,
``UpdateState`` and ``Depend`` order side effects (a network in evaluation has none but in-place additions), ``MakeTuple`` and
``TupleGetItem`` wrap multiple outputs.
"""

from __future__ import annotations

import re
from typing import Any, Optional

import numpy as np

from msqkd.errors import CaptureError
from msqkd.graph.ir import Graph, Node, TensorType, Value

# TensorProto.DataType -> numpy
_DTYPES = {1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 17: "float64"}  # fmt: skip
# MindSpore's in-place additions write their first operand; without other readers they are plain additions.
_INPLACE = {"InplaceAddExt": "AddExt", "InplaceSubExt": "SubExt", "InplaceMul": "Mul", "InplaceDiv": "Div"}
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
    if model.functions:
        raise CaptureError(
            f"{name}: the network branches or loops on tensor values ({_where(model)}); such control flow cannot be quantised: "
            "decide with Python values fixed at construction, or use ops.select / masks"
        )
    return _Reader(model, name, types or {}).read()


class _Reader:
    def __init__(self, model: Any, name: str, types: dict[str, str]) -> None:
        self.proto = model.graph
        self.graph = Graph(name)
        self.types = types
        self.primitives = {primitive.name: primitive for primitive in model.primitives}
        self.alias: dict[str, str] = {}  # proto name -> value name
        self.tuples: dict[str, list[str]] = {}  # proto name of a MakeTuple -> proto names of its elements
        self.monads: set[str] = set()

    def read(self) -> Graph:
        graph, proto = self.graph, self.proto
        for info in proto.input:
            name = graph.unique_value(_short(info.name))
            graph.add_value(Value(name, "input", _tensor_type(info.tensor[0])))
            graph.inputs.append(name)
            self.alias[info.name] = name
        for tensor in proto.parameter:
            self.alias[tensor.name] = graph.add_param(tensor.ref_key or _short(tensor.name), _array(tensor))
        for node in proto.node:
            self._node(node)
        for info in proto.output:
            for element in self.tuples.get(info.name, [info.name]):
                graph.outputs.append(self._value(element))
        _repair_scopes(graph, self.types)
        _name_nodes(graph, self.types)
        graph.prune()
        graph.check()
        return graph

    def _value(self, proto_name: str) -> str:
        return self.alias[proto_name]

    def _node(self, proto: Any) -> None:
        out = proto.output[0]
        if proto.op_type == "Constant":
            value = _attribute(proto.attribute[0])
            if value is _MONAD:
                self.monads.add(out)
            else:
                hint = re.sub(r"\W", "", _short(out)) or "const"
                self.alias[out] = self.graph.add_const(value, "c_" + hint)
            return
        if not proto.op_type.startswith("REF::"):
            raise CaptureError(f"{self.graph.name}: node {proto.name} of kind {proto.op_type} is not a primitive operation")
        primitive = self.primitives[proto.op_type[len("REF::") :]]
        op = primitive.op_type
        if op == "UpdateState":
            self.monads.add(out)
            return
        if op in ("Load", "Depend"):
            self._pass_through(proto)
            return
        if op == "MakeTuple":
            self.tuples[out] = [name for name in proto.input if name not in self.monads]
            return
        inputs = [name for name in proto.input if name not in self.monads]
        if op == "TupleGetItem":
            index = self.graph.const(self._value(inputs[1]))
            self.alias[out] = self._element(inputs[0], int(index))
            return
        self._operation(proto, primitive, inputs)

    def _pass_through(self, proto: Any) -> None:
        source, out = proto.input[0], proto.output[0]
        if source in self.tuples:
            self.tuples[out] = self.tuples[source]
        elif source in self.monads:
            self.monads.add(out)
        else:
            self.alias[out] = self._value(source)

    def _element(self, source: str, index: int) -> str:
        if source in self.tuples:
            return self._value(self.tuples[source][index])
        node = self.graph.producer(self._value(source))
        assert node is not None
        return node.outputs[index]

    def _operation(self, proto: Any, primitive: Any, inputs: list[str]) -> None:
        op, out = primitive.op_type, proto.output[0]
        path, types = _scope(proto.domain)
        names: list[str] = []
        for name in inputs:
            if name in self.tuples:  # an operation on a sequence, such as Concat
                names.extend(self._value(element) for element in self.tuples[name])
            else:
                names.append(self._value(name))
        shapes = _output_types(proto)
        hint = re.sub(r"\W+", "_", f"{path or 'net'}_{op}").lower()
        outputs = [self.graph.unique_value(hint)]
        outputs += [f"{outputs[0]}_{i}" for i in range(1, len(shapes))]
        for value, kind in zip(outputs, shapes):
            self.graph.add_value(Value(value, "node", kind))
        functional = primitive.prim_type != 1
        attrs = {a.name: _attribute(a) for a in primitive.attribute}
        if op in _INPLACE:
            self._check_inplace(proto, names[0])
            op, attrs = _INPLACE[op], {}
        if op == "AddExt" and len(names) == 3 and self.graph.const(names[2]) == 1:
            op, names = "Add", names[:2]
        self.graph.nodes.append(Node(out, op, names, outputs, attrs, path, (self.graph.name, *types), functional))
        self.alias[out] = outputs[0]

    def _check_inplace(self, proto: Any, operand: str) -> None:
        kind = self.graph.values[operand].kind
        if kind != "node":
            raise CaptureError(
                f"{self.graph.name}: '{_scope(proto.domain)[0] or 'the network'}' adds in place (+=) to a network {kind}; "
                "write `y = x + ...` instead of `x += ...`"
            )


class _Monad:
    pass


_MONAD = _Monad()


def _attribute(attr: Any) -> Any:
    """The Python value of an AttributeProto (recursively for tuples)."""
    kind = attr.AttributeType.Name(attr.type)
    if kind in ("TUPLE", "LIST"):
        items = [_attribute(item) for item in attr.values]
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
    dtype = _DTYPES.get(tensor.data_type)
    if dtype is None:
        raise CaptureError(f"parameter {tensor.ref_key or tensor.name} has a data type msqkd cannot hold (code {tensor.data_type})")
    return np.frombuffer(tensor.raw_data, dtype=dtype).reshape(tuple(tensor.dims)).copy()


def _tensor_type(tensor: Any) -> TensorType:
    return TensorType(tuple(int(d) for d in tensor.dims), _DTYPES.get(tensor.data_type, "unknown"))


def _output_types(proto: Any) -> list[Optional[TensorType]]:
    for attr in proto.attribute:
        if attr.name == "shape":
            entries = list(attr.values) or [attr]
            return [_tensor_type(entry.tensors[0]) if entry.tensors else None for entry in entries]
    return [None]


def _short(name: str) -> str:
    return name.rsplit(":", 1)[-1] if not name.rsplit(":", 1)[-1].isdigit() else name.rsplit(":", 2)[-2]


def _scope(domain: str) -> tuple[str, tuple[str, ...]]:
    """``Default/layer1-SequentialCell/0-Bottleneck/Conv2D-op3`` -> (``layer1.0``, (SequentialCell, Bottleneck))."""
    parts = domain.split("/")[:-1]
    while parts and parts[0] in _SKIP_SCOPE:
        parts = parts[1:]
    pairs = [part.rsplit("-", 1) for part in parts if "-" in part]
    return ".".join(p[0] for p in pairs), tuple(p[1] for p in pairs)


def _repair_scopes(graph: Graph, types: dict[str, str]) -> None:
    """Give functional operations of a repeated block their own block back.

    The compiler parses the code of equal operator calls once, so `x + y` in the fifth and the eighth block can both say "block 5". An
    operation is moved to the block of its producer when that block has the same class, and began only after the recorded one ended.
    """
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for index, node in enumerate(graph.nodes):
        if graph.param_inputs(node) or not _is_container(node.cell_path, types):
            for prefix in _prefixes(node.cell_path):
                first.setdefault(prefix, index)
                last[prefix] = index
    producers = {output: (i, node) for i, node in enumerate(graph.nodes) for output in node.outputs}
    for node in graph.nodes:
        if graph.param_inputs(node) or not node.cell_path:
            continue
        found = [producers[name] for name in node.inputs if name in producers]
        if not found:
            continue
        source = max(found, key=lambda pair: pair[0])[1]
        depth = node.cell_path.count(".") + 1
        candidate = ".".join(source.cell_path.split(".")[:depth])
        same = source.cell_types[: depth + 1] == node.cell_types
        if same and candidate != node.cell_path and first.get(candidate, -1) > last.get(node.cell_path, len(graph.nodes)):
            node.cell_path = candidate


def _is_container(path: str, types: dict[str, str]) -> bool:
    return any(other.startswith(path + ".") for other in types) if path else True


def _prefixes(path: str) -> list[str]:
    parts = path.split(".") if path else []
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _name_nodes(graph: Graph, types: dict[str, str]) -> None:
    """Name a leaf cell's main operation after the cell, every other after the cell and the operation."""
    taken: set[str] = set()
    for node in graph.nodes:
        leaf = bool(node.cell_path) and not _is_container(node.cell_path, types)
        base = node.cell_path if leaf else ".".join(filter(None, (node.cell_path, _snake(node.op))))
        if leaf and node.op in ("BiasAdd",):
            base = f"{node.cell_path}.bias_add"
        name, number = base, 1
        while name in taken:
            name = f"{base}_{number}"
            number += 1
        node.name = name
        taken.add(name)


def _snake(op: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", op).lower()


def _where(model: Any) -> str:
    scopes = sorted({_scope(node.domain)[0] for f in model.functions for node in f.node if node.domain} - {""})
    return f"in cell '{scopes[0]}'" if scopes else "in its construct"
