"""Graph to a trainable `nn.Cell`, by writing the source of its `construct`.

MindSpore compiles source, so the cell is generated as text a reader can follow: one line an operation, each with the
layer it came from. Parameters keep their original names: checkpoints of the original network load into the cell and
back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np

from msqkd.graph.ir import Graph, Node, identifier_of, unique_name
from msqkd.graph.norms import BATCH, RUNNING, statistics_of
from msqkd.graph.ops import Argument, computed_settings, dtype_arguments, dtype_name, primitive, scalar_type
from msqkd.graph.source import load_class
from msqkd.graph.steps import gathers_of
from msqkd.platform import mindspore

# Arithmetic on the sizes of a tensor, which are Python numbers where `construct` is run by Python
_SCALAR_OPERATORS = {
    "ScalarAdd": "+", "ScalarSub": "-", "ScalarMul": "*", "ScalarDiv": "/", "ScalarFloorDiv": "//", "ScalarMod": "%",
}  # fmt: skip


@dataclass
class Hooks:
    """Cells to call at places of the graph; how quantisation enters without the graph knowing of it.

    Attributes:
        values: value name -> cell applied to the value where it is computed (every reader gets the result).
        edges: (node name, input index) -> cell applied to that one input.
        observe: names of values returned beside the outputs, as they are before the cell of `values` is applied.
        arguments: (node name, input index) -> cell applied to that input last, after the cell of `edges`.
        results: value name -> cell applied to the value first, before it is observed or quantised.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    edges: Mapping[tuple[str, int], Any] = field(default_factory=dict)
    observe: Sequence[str] = ()
    arguments: Mapping[tuple[str, int], Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)


def to_cell(graph: Graph, hooks: Optional[Hooks] = None, base: Optional[type] = None, *, shared: bool = False) -> Any:
    """Build an `nn.Cell` (a subclass of `base`, where given) that computes `graph`.

    The cell works in GRAPH_MODE and PYNATIVE_MODE and can be trained (BatchNorm follows `set_train`; with
    `batchnorm_frozen` set, before a compilation, its statistics stand still). It carries its
    `graph` and its `source`. With `hooks.observe` it returns a tuple: the outputs, then the observed values.

    Its parameters are copies of the graph's arrays, or with `shared` those arrays themselves, for a cell that is only
    written or run.

    Raises:
        CaptureError: the graph has a data type msqkd does not know.
    """
    writer = _Writer(graph, hooks or Hooks(), shared)
    source = writer.write(base)
    cell = load_class(source)()
    for name, value in writer.attributes.items():
        setattr(cell, name, value)
    cell.graph, cell.batchnorm_frozen = graph, False
    cell.source = source
    cell.parameter_names = {attribute: name for (kind, name), attribute in writer.names.items() if kind == "param"}
    cell.set_train(False)
    return cell


def read_parameters(cell: Any, graph: Graph) -> None:
    """Copy the current parameter values of a cell made by `to_cell` back into `graph.params` (those it knows).

    Trained as part of another cell, a cell has its parameters renamed by MindSpore; here they keep their names.
    """
    for attribute, name in cell.parameter_names.items():
        parameter, held = getattr(cell, attribute), graph.params.get(name)
        if held is not None:
            held.data = parameter.asnumpy().copy()


class _Writer:
    def __init__(self, graph: Graph, hooks: Hooks, shared: bool) -> None:
        self.graph, self.hooks, self.shared, self.ms = graph, hooks, shared, mindspore()
        self.attributes: dict[str, Any] = {}
        self.taken: set[str] = set()  # identifiers of the body and attributes of the class
        self.names: dict[tuple[str, str], str] = {}  # (kind of thing, its name in the graph) -> identifier
        self.node_names: dict[str, str] = {}  # node -> identifier
        self.lines: list[str] = []

    def write(self, base: Optional[type]) -> str:
        from mindspore import nn

        graph = self.graph
        parent = base or nn.Cell
        own = {"graph", "source", "parameter_names", "batchnorm_frozen", "gen_ops_prim"}
        self.taken = {"self", *dir(parent), *getattr(parent, "__annotations__", ()), *vars(nn.Cell()), *own}
        arguments = [self._local(name) for name in graph.inputs]
        observed: dict[str, str] = {}
        for name in graph.inputs:
            self._produced(name, observed)
        for node in graph.nodes:
            self._node(node)
            for output in node.outputs:
                self._produced(output, observed)
        results = [self._read(name) for name in graph.outputs] + [observed[name] for name in self.hooks.observe]
        body = "\n".join(f"        {line}" for line in self.lines)
        return (
            f'"""{graph.name}, generated by msqkd from the captured graph."""\n\n'
            f"from {parent.__module__} import {parent.__qualname__} as Base\n"
            "from mindspore.ops.auto_generate import gen_ops_prim\n\n\n"
            f"class {identifier_of(graph.name)}(Base):\n"
            f"    def construct(self, {', '.join(arguments)}):\n"
            f"{body}\n"
            f"        return {', '.join(results)}\n"
        )

    def _produced(self, name: str, observed: dict[str, str]) -> None:
        result = self.hooks.results.get(name)
        if result is not None:
            local = self._local(name)
            self.lines.append(f"{local} = self.{self._attribute('result', local, result)}({local})")
        if name in self.hooks.observe:
            raw = self._local(name)
            if name in self.hooks.values:
                raw = self._identifier("raw", f"{name}_raw")
                self.lines.append(f"{raw} = {self._local(name)}")
            observed[name] = raw
        cell = self.hooks.values.get(name)
        if cell is not None:
            local = self._local(name)
            self.lines.append(f"{local} = self.{self._attribute('quant', local, cell)}({local})")

    def _node(self, node: Node) -> None:
        kinds = "/".join(node.cell_types)
        self.lines.append(f"# {node.name}" + (f" ({kinds})" if kinds else ""))
        dtypes = dtype_arguments(self.graph, node)
        args = [
            self._dtype(node, name) if index in dtypes else self._argument(node, index)
            for index, name in enumerate(node.inputs)
        ]
        target = self._local(node.output)
        if node.op in ("Conv2D", "Dense"):
            self._linear(node, target, args)
            return
        if node.op == "BatchNorm":
            self._batch_norm(node, target, args)
            return
        if node.op in ("Cast", "ScalarToTensor"):
            instance = self._attribute("op", node.name, getattr(self.ms.ops, node.op)())
            self.lines.append(f"{target} = self.{instance}({args[0]}, {self._dtype(node, node.inputs[1])})")
            return
        if node.op == "ScalarCast":
            self.lines.append(f"{target} = {scalar_type(self.graph, node).__name__}({args[0]})")
            return
        if node.op in _SCALAR_OPERATORS:
            self.lines.append(f"{target} = {args[0]} {_SCALAR_OPERATORS[node.op]} {args[1]}")
            return
        if node.op == "StridedSlice" and self._with_gathers(node, target, args):
            return
        targets = ", ".join(self._local(output) for output in node.outputs)
        if node.unpack and len(node.outputs) == 1:
            targets += ","
        self.lines.append(f"{targets} = {self._call(node, args)}")

    def _call(self, node: Node, args: list[str]) -> str:
        def texts(arguments: Sequence[Argument]) -> str:
            found = [args[item] if isinstance(item, int) else _tuple([args[i] for i in item]) for item in arguments]
            return ", ".join(found)

        if node.op == "TrainingDropout":
            from msqkd.graph.dropout import CountedDropout

            dropout = CountedDropout(node.name, **node.attrs)
            return f"self.{self._attribute('op', node.name, dropout)}({args[0]})"
        if node.body is not None:
            return f"self.{self._attribute('op', node.name, to_cell(node.body))}({args[0]})"
        computed = computed_settings(self.graph, node)
        if computed is not None:
            operands, settings = computed
            return f"gen_ops_prim.{node.op}({texts(settings)})({texts(operands)})"
        instance, called = primitive(self.graph, node)
        return f"self.{self._attribute('op', node.name, instance)}({texts(called)})"

    def _linear(self, node: Node, target: str, args: list[str]) -> None:
        from mindspore import ops

        if node.op == "Conv2D":
            instance, _ = primitive(self.graph, node)
        else:
            instance = ops.MatMul(transpose_b=True)
        attribute = self._attribute("op", node.name, instance)
        self.lines.append(f"{target} = self.{attribute}({args[0]}, {args[1]})")
        if len(args) == 3:
            bias_add = self._attribute("bias", node.name, ops.BiasAdd())
            self.lines.append(f"{target} = self.{bias_add}({target}, {args[2]})")

    def _with_gathers(self, node: Node, target: str, args: list[str]) -> bool:
        """Write a slice whose gradient needs another form in training (see `msqkd.graph.steps`)."""
        from mindspore import ops

        found = gathers_of(self.graph, node)
        if found is None:
            return False
        gathers, (begin, end, strides, *masks) = found
        text = args[0]
        for axis, positions in gathers:
            held = self._attribute(f"positions{axis}", node.name, self.ms.Tensor(positions))
            text = f"self.{self._attribute('gather', node.name, ops.Gather())}({text}, self.{held}, {axis})"
        rest = self._attribute("rest", node.name, ops.StridedSlice(*masks))
        self.lines += [
            "if self.training:",
            f"    {target} = self.{rest}({text}, {begin!r}, {end!r}, {strides!r})",
            "else:",
            f"    {target} = {self._call(node, args)}",
        ]
        return True

    def _dtype(self, node: Node, value: str) -> str:
        name = dtype_name(self.graph, node, value)
        dtype = getattr(self.ms, "bool_" if name == "bool" else name)
        return "self." + self._attribute("dtype", node.name, dtype)

    def _batch_norm(self, node: Node, target: str, args: list[str]) -> None:
        from mindspore import ops

        epsilon, momentum = (self.graph.const(name) for name in node.inputs[6:8])
        mode, operands = statistics_of(self.graph, node), ", ".join(args[:5])
        # With momentum 0 the moving statistics stay as they are: an evaluation changes nothing.
        still = ops.BatchNorm(True, epsilon, 0.0) if mode == BATCH else ops.BatchNorm(False, epsilon, momentum)
        infer = f"{target} = self.{self._attribute('infer', node.name, still)}({operands})[0]"
        if mode == RUNNING:
            self.lines.append(infer)
            return
        train = self._attribute("train", node.name, ops.BatchNorm(True, epsilon, momentum))
        self.lines += [
            "if self.training and not self.batchnorm_frozen:",
            f"    {target} = self.{train}({operands})[0]",
            "else:",
            f"    {infer}",
        ]

    def _argument(self, node: Node, index: int) -> str:
        text = self._read(node.inputs[index])
        for kind, cells in (("quant", self.hooks.edges), ("argument", self.hooks.arguments)):
            cell = cells.get((node.name, index))
            if cell is not None:
                hint = f"{kind}_{self._node_identifier(node.name)}_input{index}"
                text = f"self.{self._attribute(f'{kind} of input {index}', node.name, cell, hint)}({text})"
        return text

    def _read(self, name: str) -> str:
        value = self.graph.values[name]
        if value.kind == "param":
            return "self." + self._parameter(name)
        if value.kind == "const":
            return self._literal(name, value.const)
        return self._local(name)

    def _parameter(self, name: str) -> str:
        if ("param", name) not in self.names:
            held = self.graph.params[name]
            data = held.data if self.shared else held.data.copy()
            # MindSpore takes the array as it is where nobody else holds the tensor, which an option would already do.
            parameter = self.ms.Parameter(self.ms.Tensor.from_numpy(data))
            parameter.name, parameter.requires_grad = name, held.trainable
            self.attributes[self._identifier("param", name)] = parameter
        return self._identifier("param", name)

    def _literal(self, name: str, const: Any) -> str:
        """Source text where Python's spelling reads back as the same, else an attribute."""
        if _reads_back(const):
            return repr(const)
        if ("const", name) not in self.names:
            self.attributes[self._identifier("const", name)] = self._with_tensors(const)
        return "self." + self._identifier("const", name)

    def _with_tensors(self, const: Any) -> Any:
        """Convert the arrays in a literal to Tensors."""
        if isinstance(const, np.ndarray):
            return self.ms.Tensor(const)
        return type(const)(map(self._with_tensors, const)) if isinstance(const, (tuple, list)) else const

    def _attribute(self, kind: str, name: str, value: Any, hint: str = "") -> str:
        """The attribute that holds something of the node or value `name`, called ``kind_name`` or as `hint` says."""
        identifier = self._identifier(f"attribute {kind}", name, hint or identifier_of(f"{kind}_{name}"))
        self.attributes[identifier] = value
        return identifier

    def _node_identifier(self, name: str) -> str:
        """The one identifier of a node, as a part of others."""
        if name not in self.node_names:
            self.node_names[name] = unique_name(identifier_of(name), self.node_names.values())
        return self.node_names[name]

    def _local(self, value: str) -> str:
        return self._identifier("local", value)

    def _identifier(self, kind: str, name: str, hint: str = "") -> str:
        """The one identifier of a thing of the graph, made from `hint` or its name.

        Things that differ in kind or in any letter of the name stay apart, whatever becomes of their punctuation.
        """
        if (kind, name) not in self.names:
            identifier = unique_name(hint or identifier_of(name), self.taken)
            self.taken.add(identifier)
            self.names[kind, name] = identifier
        return self.names[kind, name]


def _reads_back(const: Any) -> bool:
    """Return True if Python reads ``repr(const)`` back as the same value."""
    if isinstance(const, (tuple, list)):
        return all(map(_reads_back, const))
    if isinstance(const, float):
        return math.isfinite(const)
    return const is None or isinstance(const, (bool, int, str))


def _tuple(items: list[str]) -> str:
    return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
