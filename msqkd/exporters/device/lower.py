"""A graph and its plan as a program of MindSpore Lite: NHWC, one step a kernel, casts between int8 and float.

The plan says what is int8; how each operation is written is in `int8_steps` and `float_steps`. A value is held in the
layout and type it was computed in; where a step needs another, a Transpose or a QuantDTypeCast is put between, once.

A layout is the order in which a tensor has the axes of its value: that of the graph (empty), that of a map
(N, H, W, C), or one that brings the batch to the front.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import numpy as np

from msqkd.exporters.device.freeze import freeze
from msqkd.exporters.device.shapes import Shape, concrete_shapes
from msqkd.exporters.device.transpositions import keep_transpositions
from msqkd.exporters.lowering import lower_forms, trim_taps
from msqkd.graph.ir import Graph, Node, TensorType, Value, unique_name
from msqkd.graph.islands import cut
from msqkd.graph.passes.batch_statistics import spell_out_statistics
from msqkd.integer.program import ISLAND, Format, Program, Step, Tensor, TensorQuant
from msqkd.quant.config import FLOAT_PRECISION, INT8
from msqkd.quant.integers import on_grid
from msqkd.quant.plan import ActivationQuant, QuantPlan
from msqkd.quant.qparams import QParams

INT8_FILE, WEIGHT_FILE, FLOAT_FILE = "int8", "weight", "float"
NATIVE: tuple[int, ...] = ()
NHWC = (0, 2, 3, 1)
FLOAT = "float32"
_LAYOUT_NAMES = {NATIVE: "_native", NHWC: "_map"}
_PARTS = ("Split", "Unstack")
_INT8_TYPE, _FLOAT_TYPE = 32, 43  # the runtime's numbers of the data types


def lite_program(graph: Graph, plan: QuantPlan, batch: int = 1, kind: str = INT8_FILE) -> Program:
    """The program of MindSpore Lite that computes a deployment graph.

    Args:
        graph, plan: the deployment graph and its plan; for ``int8`` every range known.
        batch: the batch the program is made for.
        kind: ``int8`` (as planned; what the plan has as dynamic is weight-only), ``weight`` (float computation, weights
            stored as int8) or ``float``.

    Raises:
        PlanError: a range is missing.
        ExportError: a scale the runtime cannot represent.
    """
    program = Lowering(graph, plan, batch, kind).run()
    keep_transpositions(program)
    return program


class Lowering:
    """The program in the making; the functions of `int8_steps` and `float_steps` add to it.

    Attributes:
        graph, plan: in the forms the plan chose.
        program: what has been written so far.
        shapes: shape of every value, in the graph's own layout.
    """

    def __init__(self, graph: Graph, plan: QuantPlan, batch: int, kind: str) -> None:
        self.kind = kind
        self.original = set(graph.values)
        self.graph, self.plan = lower_forms(graph, plan) if kind == INT8_FILE else (graph.copy(), plan)
        self.program = Program(graph.name)
        spelled_out = spell_out_statistics(self.graph)
        self.shapes = concrete_shapes(self.graph, batch)
        self.weights = self.plan.with_weight_observers(self.graph).weights if kind != FLOAT_FILE else {}
        freeze(self.graph, self.shapes, self.weights)
        for node in self.graph.nodes:
            if node.op == "Conv2D" and node.inputs[1] in self.graph.params:
                trim_taps(self.graph, node, self.weights)
        self.precision = {node.name: node.precision for node in self.plan.nodes}
        self.precision.update(dict.fromkeys(spelled_out, FLOAT_PRECISION))
        self._plan_unread_parts()
        self.fused = {node.fused_into: node.name for node in self.plan.nodes if node.fused_into}
        self.columns: dict[str, Shape] = {}  # a flattened map, in its own layout -> its (C, H, W)
        self.homes: dict[str, tuple[str, tuple[int, ...]]] = {}  # value -> (dtype, layout) it was computed in
        self.held: dict[tuple[str, str, tuple[int, ...]], str] = {}  # (value, dtype, layout) -> tensor
        self.step_names: set[str] = set()

    def run(self) -> Program:
        """Write every node, and return the program."""
        from msqkd.exporters.device.float_steps import FLOAT_STEPS
        from msqkd.exporters.device.int8_steps import INT8_STEPS

        for name in self.graph.inputs:
            self._input(name)
        skipped = set(self.fused.values()) if self.kind == INT8_FILE else set()
        for node in self.graph.nodes:
            if node.name in skipped:
                continue
            if self.is_int8(node):
                INT8_STEPS[node.op](self, node)
            elif not (node.op in FLOAT_STEPS and FLOAT_STEPS[node.op](self, node)):
                self._island(node)
        for name in self.graph.outputs:
            tensor = self.get(name, FLOAT, NATIVE)
            taken = tensor in self.program.outputs or tensor in self.program.inputs
            constant = self.program.tensors[tensor].data is not None
            self.program.outputs.append(self.copied(name, tensor) if taken or constant else tensor)
        return self.program

    # -- what a step asks -----------------------------------------------------------------------------------------
    def is_int8(self, node: Node) -> bool:
        """Whether `node` is computed in int8; what lowering itself added follows its input."""
        if self.kind != INT8_FILE:
            return False
        return self.precision.get(node.name, INT8) == INT8

    def tail(self, node: Node) -> Optional[Node]:
        """The activation that is computed in the kernel of `node`."""
        name = self.fused.get(node.name) if self.kind == INT8_FILE else None
        return self.graph.node(name) if name is not None else None

    def layout(self, value: str) -> tuple[int, ...]:
        """The layout a value was computed in: NATIVE, NHWC for a map, or one with the batch in front."""
        return self.homes[value][1] if value in self.homes else NATIVE

    def common_layout(self, values: Sequence[str]) -> tuple[int, ...]:
        """The layout in which values of one rank meet: NHWC where one of them is a map, else theirs if it is one."""
        layouts = {self.layout(value) for value in values if value in self.homes}
        if NHWC in layouts:
            return NHWC
        return layouts.pop() if len(layouts) == 1 else NATIVE

    def axis(self, value: str, axis: int, layout: tuple[int, ...]) -> int:
        """Where a tensor in `layout` has the axis of `value`, which may be counted from the end."""
        axis %= len(self.shapes[value])
        return layout.index(axis) if layout else axis

    def dense_weight(self, node: Node) -> np.ndarray:
        """The weight (out, in) of a dense layer, its columns in the order of what it reads."""
        weight = self.graph.params[node.inputs[1]].data
        sizes = self.columns.get(node.inputs[0])
        if sizes is None:
            return weight
        return weight.reshape(-1, *sizes).transpose(NHWC).reshape(weight.shape)

    def stored_weight(self, node: Node, data: np.ndarray, axes: tuple[int, ...] = ()) -> str:
        """The constant of the weight of a float step: int8 with its parameters where it is stored so.

        Args:
            node: whose weight it is.
            data: the weight, in any order of rows and columns.
            axes: which transpose it to the order of the runtime.
        """
        quant = self.weights.get(node.name)
        name = node.inputs[quant.index if quant is not None else 1]
        format = Format.KHWC if data.ndim == 4 else Format.NHWC
        axes = axes or tuple(range(data.ndim))
        if quant is None:
            return self.constant(name, data.transpose(axes), None, format)
        qparams = quant.qparams(data)
        return self.constant(
            name, qparams.quantize(data).astype(np.int8).transpose(axes), tensor_quant(qparams), format
        )

    def quant(self, value: str) -> TensorQuant:
        """Parameters of a quantised value."""
        return tensor_quant(self.plan.group_of(value).qparams())

    def get(self, value: str, dtype: str, layout: Optional[tuple[int, ...]] = None) -> str:
        """The tensor that holds `value` as `dtype` in `layout` (None: as computed); what is missing is added."""
        if value not in self.homes:
            return self._constant_value(value, dtype, layout or NATIVE)
        home_type, home_layout = self.homes[value]
        layout = home_layout if layout is None else layout
        if home_type not in ("int8", FLOAT):
            dtype = home_type  # an index or a mask: there is nothing to quantise
        if (value, dtype, layout) not in self.held:
            if (value, dtype, home_layout) not in self.held:
                self._cast(value, dtype, home_layout)
            if layout != home_layout:
                self._transpose(value, dtype, home_layout, layout)
        return self.held[value, dtype, layout]

    # -- what a step adds -----------------------------------------------------------------------------------------
    def emit(
        self, node: Node, op: str, inputs: Sequence[str], attrs: Optional[dict[str, Any]] = None, *,
        value: str = "", layout: tuple[int, ...] = NATIVE, outputs: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Add the step of `node`; its results are `value` (by default the node's own), or `outputs`, in `layout`."""
        quantized = self.is_int8(node)
        names = []
        for output in outputs or [value or node.output]:
            kind = self.graph.values[output].type
            dtype = kind.dtype if kind is not None else FLOAT
            self.homes[output] = ("int8" if quantized else dtype, layout)
            names.append(self._hold(output, *self.homes[output]))
        self._step(node.name, Step("", op, list(inputs), names, attrs or {}, quantized, node.name))

    def alias(self, node: Node, layout: tuple[int, ...]) -> None:
        """Let the result of `node` be the tensor it reads, which is what it would be in `layout`."""
        tensor = self.get(node.inputs[0], "int8" if self.is_int8(node) else FLOAT)
        dtype = self.program.tensors[tensor].dtype
        self.homes[node.output] = (dtype, layout)
        self.held[node.output, dtype, layout] = tensor

    def between(self, like: str, shape: Sequence[int], hint: str, dtype: str = "") -> str:
        """A value of `shape` on the way to `like`, with its type (or `dtype`) and parameters; returns its name."""
        name, kind = self.graph.unique_value(f"{like}_{hint}"), self.graph.values[like].type
        assert kind is not None
        self.graph.add_value(Value(name, "node", TensorType(tuple(shape), dtype or kind.dtype)))
        self.shapes[name] = tuple(shape)
        if self.kind == INT8_FILE and like in self.plan.activations:
            group = self.plan.activations[like].group
            self.plan.activations[name] = ActivationQuant(name, group, exact=True)
        return name

    def constant(
        self, hint: str, data: np.ndarray, quant: Optional[TensorQuant] = None, format: Format = Format.NHWC
    ) -> str:
        """Add a constant tensor and return its name."""
        name = unique_name(hint, self.program.tensors)
        data = np.ascontiguousarray(data)
        return self.program.add(Tensor(name, str(data.dtype), data.shape, data, quant, format))

    def copied(self, value: str, tensor: str) -> str:
        """A Reshape of a tensor that holds `value` to its own shape: a tensor of its own, which is returned."""
        held = self.program.tensors[tensor]
        name = unique_name(f"{value}_output", self.program.tensors)
        copy = self.program.add(Tensor(name, held.dtype, held.shape, None, held.quant, perm=held.perm))
        sizes = self.constant(f"{name}_shape", np.array(held.shape, np.int32))
        self._step(f"{value}_copy", Step("", "Reshape", [tensor, sizes], [copy], {}))
        return copy

    # -- inside -----------------------------------------------------------------------------------------------------
    def _input(self, name: str) -> None:
        kind = self.graph.values[name].type
        assert kind is not None
        layout = NHWC if len(kind.shape) == 4 and kind.dtype == FLOAT else NATIVE
        self.homes[name] = (kind.dtype, layout)
        self.program.inputs.append(self._hold(name, kind.dtype, layout))
        if name in self.plan.activations and not self.plan.activations[name].edges and self.kind == INT8_FILE:
            self._cast(name, "int8", layout)

    def _hold(self, value: str, dtype: str, layout: tuple[int, ...]) -> str:
        """Register the tensor that holds `value` as `dtype` in `layout`."""
        shape = self.shapes[value]
        if layout:
            shape = tuple(shape[axis] for axis in layout)
        quant = self.quant(value) if dtype == "int8" else None
        own = self.homes[value] == (dtype, layout)
        suffix = "" if own else ("_int8" if dtype == "int8" else "_float") + _LAYOUT_NAMES.get(layout, "_turned")
        name = unique_name(value + suffix, self.program.tensors)
        shown = value if value in self.original else ""
        tensor = Tensor(name, dtype, shape, None, quant, value=shown, perm=inverse(layout))
        self.held[value, dtype, layout] = self.program.add(tensor)
        return name

    def _constant_value(self, value: str, dtype: str, layout: tuple[int, ...]) -> str:
        """A parameter or literal among the operands of a step, as `dtype` in `layout`."""
        if (value, dtype, layout) not in self.held:
            held = self.graph.params.get(value)
            data = np.asarray(self.graph.const(value) if held is None else held.data)
            if layout:
                data = data.transpose(layout)
            quant = None
            if dtype == "int8":
                qparams = self.plan.group_of(value).qparams()
                data, quant = qparams.quantize(data).astype(np.int8), tensor_quant(qparams)
            self.held[value, dtype, layout] = self.constant(value, data, quant)
        return self.held[value, dtype, layout]

    def _step(self, hint: str, step: Step) -> None:
        step.name = unique_name(hint, self.step_names)
        self.step_names.add(step.name)
        self.program.steps.append(step)

    def _cast(self, value: str, dtype: str, layout: tuple[int, ...]) -> None:
        source = self.held[value, self.homes[value][0], layout]
        target = self._hold(value, dtype, layout)
        types = (_FLOAT_TYPE, _INT8_TYPE) if dtype == "int8" else (_INT8_TYPE, _FLOAT_TYPE)
        attrs = {"src_t": types[0], "dst_t": types[1]}
        hint = f"{value}_{'quant' if dtype == 'int8' else 'dequant'}"
        self._step(hint, Step("", "QuantDTypeCast", [source], [target], attrs))

    def _transpose(self, value: str, dtype: str, home: tuple[int, ...], layout: tuple[int, ...]) -> None:
        source, target = self.held[value, dtype, home], self._hold(value, dtype, layout)
        axes = tuple(range(len(self.shapes[value])))
        order = [(home or axes).index(axis) for axis in layout or axes]
        perm = self.constant(f"{value}_perm", np.array(order, np.int32))
        hint = f"{value}_to{_LAYOUT_NAMES.get(layout, '_turned')}"
        self._step(hint, Step("", "Transpose", [source, perm], [target], {}, quantized=dtype == "int8"))

    def _plan_unread_parts(self) -> None:
        """Give the parts of an int8 value that nobody reads its parameters: the kernel computes them all the same."""
        for node in self.graph.nodes:
            group = self.plan.activations.get(node.inputs[0]) if len(node.outputs) > 1 else None
            if node.op in _PARTS and group is not None and self.is_int8(node):
                for output in node.outputs:
                    self.plan.activations.setdefault(output, ActivationQuant(output, group.group, exact=True))

    def _island(self, node: Node) -> None:
        """A step that only MindSpore can compute; sizes it asks of tensors are computed inside it."""
        if node.name in self.weights:
            on_grid(self.graph, {node.name: self.weights[node.name]})
        island = cut(self.graph, [node])
        if island.outputs:
            inputs = [self.get(name, FLOAT, NATIVE) for name in island.inputs]
            self.emit(node, ISLAND, inputs, {"graph": island}, outputs=island.outputs)


def inverse(layout: tuple[int, ...]) -> tuple[int, ...]:
    """The axes that transpose a tensor in `layout` to the layout of the graph; empty where they are alike."""
    return tuple(layout.index(axis) for axis in range(len(layout)))


def tensor_quant(qparams: QParams) -> TensorQuant:
    """Parameters as a file holds them."""
    return TensorQuant(np.atleast_1d(qparams.scale), np.atleast_1d(qparams.zero_point))
