"""ONNX with QuantizeLinear and DequantizeLinear (QDQ): float operations between int8 values, which a runtime joins into
int8 kernels.

Where the plan quantises a value stands a pair of QuantizeLinear and DequantizeLinear with the plan's scale and zero
point; weights are int8 initialisers, and biases of quantised layers int32 ones with the scale s_x · s_w, which is what
onnxruntime's kernels add. Scale and zero point of a group are stored once and read by every value of the group.

Activations are stored as uint8, the plan's integers plus 128, which stand for the same numbers: the fast kernels of x86
multiply unsigned by signed. onnxruntime 1.31 converts signed activations to that form only where a value has one reader
(a ResNet-20 then computes half of its layers in float and is slower than the float model), and where it is told to take
them as they are, its kernels are plain loops, five times slower than float. For runtimes that want the plan's own
integers there is ``int8``.

A runtime makes an int8 kernel of a layer only where QuantizeLinear follows it at once, or behind an activation that the
saturation of the quantiser makes superfluous. Where neither holds (a symmetric ReLU, fewer than 8 bits) a second pair
stands between them: activations are monotone, so rounding before and again behind gives the integers of rounding once.
A float layer with a weight never reads a DequantizeLinear: between DequantizeLinear and QuantizeLinear onnxruntime
(1.22 and later, at every level of optimization) gives the float weight of a convolution or dense layer one int8 scale
per tensor. Such a layer reads the integers by Cast, Sub and Mul, which give the same numbers.

Weights of weight-only layers are int8 initialisers too, cast and multiplied by their scale before a float kernel reads
them: of a DequantizeLinear before a product onnxruntime 1.31 makes one that quantises the other operand too. The inputs
of dynamic layers are rounded row by row with ordinary operations, and multiplied in float: DynamicQuantizeLinear has
one range for a whole batch, so that a sample's answer would depend on the others.

A hard sigmoid in the kernel of the layer before it is that layer with a sixth of its weights and of its bias plus 3,
saturated to 0 and 1 by the quantiser.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from msqkd.errors import ExportError, did_you_mean
from msqkd.exporters import FORMATS, ONNX, check_precisions
from msqkd.exporters.onnx.calls import Call
from msqkd.exporters.onnx.table import find, supported
from msqkd.exporters.onnx.writer import ModelWriter, write_model
from msqkd.files import PathLike
from msqkd.graph.ir import Graph, Node
from msqkd.graph.passes.batch_statistics import spell_out_statistics
from msqkd.graph.passes.computed_weights import computed_from_constants, replace_constants
from msqkd.quant.config import INT8
from msqkd.quant.integers import bias_steps, on_grid, scale_floor
from msqkd.quant.plan import QuantPlan
from msqkd.quant.qparams import MAX_BITS, SCALE_FLOOR, QParams, quant_limits
from msqkd.quant.uses import STORABLE

UINT8 = "uint8"
_OFFSETS = {UINT8: 128, "int8": 0}  # what is added to the plan's integers
_MOVES = (
    "ExpandDims", "Flatten", "Gather", "Identity", "MaxPool", "Pad", "PadV3", "Reshape", "ResizeNearestNeighbor",
    "ResizeNearestNeighborV2", "Split", "Squeeze", "StridedSlice", "Transpose", "Unstack",
)  # fmt: skip
_SUMS = ("Conv2D", "Dense")  # operations that add their bias to sums of products of integers
_ONE = np.asarray(1.0)
_ENDS = {"ReLU": np.asarray(np.inf), "ReLU6": np.asarray(6.0)}  # where fused activations end upwards


def export_onnx(graph: Graph, plan: QuantPlan, file: PathLike, activations: str = UINT8) -> Path:
    """Write a deployment graph and its plan as an ONNX QDQ model; the batch of the inputs is open.

    Args:
        graph, plan: every range known.
        file: where to.
        activations: how their integers are stored: ``uint8`` (fast on x86 and ARM) or ``int8`` (the plan's own).

    Raises:
        PlanError: a range is missing.
        ExportError: an operation cannot be written, the file cannot, the plan has layers in float16, or `activations`
            is unknown.
        MissingDependencyError: the package onnx is not installed.
    """
    return write_model(onnx_model(graph, plan, activations), file)


def export_onnx_float(graph: Graph, file: PathLike) -> Path:
    """Write a deployment graph in float32: what the quantised model is compared with. Raises as `export_onnx`."""
    return export_onnx(graph, QuantPlan("float", graph.name), file)


def onnx_model(graph: Graph, plan: QuantPlan, activations: str = UINT8) -> Any:
    """The ModelProto that `export_onnx` writes, not yet checked. Raises as it does."""
    return _export(graph, plan, activations).run()


def onnx_owners(graph: Graph, plan: QuantPlan) -> dict[str, str]:
    """The operation of the graph that each operation and value of its ONNX model is part of, by their names there.

    What quantises a value is part of the operation that computes it, or of the first that reads it in int8 where it is
    computed in float. Raises as `export_onnx`.
    """
    export = _export(graph, plan, UINT8)
    export.run()
    return export.writer.owners


def _export(graph: Graph, plan: QuantPlan, activations: str) -> _Export:
    if activations not in _OFFSETS:
        raise ExportError(
            f"activations are '{activations}'; allowed: {', '.join(_OFFSETS)}{did_you_mean(activations, _OFFSETS)}"
        )
    check_precisions(FORMATS[ONNX], plan)
    graph = graph.copy()
    spell_out_statistics(graph)
    _compute_unknown_constants(graph, plan)
    return _Export(graph, plan, activations)


def _compute_unknown_constants(graph: Graph, plan: QuantPlan) -> None:
    """Replace constants that are computed by operations ONNX lacks by parameters, in place."""
    constant, known = computed_from_constants(graph), supported()
    needed = {name for node in constant if node.op not in known for name in node.outputs}
    nodes: list[Node] = []
    for node in reversed(constant):
        if needed.intersection(node.outputs):
            nodes.insert(0, node)
            needed.update(node.inputs)
    if not nodes:
        return
    weights = plan.with_weight_observers(graph).weights
    on_grid(graph, {node.name: weights[node.name] for node in nodes if node.name in weights})
    replace_constants(graph, nodes)
    for node in nodes:
        for name in node.outputs:
            activation = plan.activations.get(name)
            if name in graph.params and activation is not None and not activation.edges:
                graph.params[name].data = plan.group_of(name).qparams().fake_quantize(graph.params[name].data)
    graph.prune()


class _Export:
    def __init__(self, graph: Graph, plan: QuantPlan, activations: str) -> None:
        self.graph, self.plan, self.activations = graph, plan, activations
        self.writer = ModelWriter(graph.name, graph.values)
        self.weights = plan.with_weight_observers(graph).weights
        self.qparams = {name: group.qparams() for name, group in plan.groups.items()}
        self.int8 = {node.name for node in plan.nodes if node.precision == INT8}
        self.fused = {node.fused_into: graph.node(node.name) for node in plan.nodes if node.fused_into}
        self.sixths = {name for name, tail in self.fused.items() if name is not None and self._is_sixth(name, tail)}
        self.read = {name for node in graph.nodes for name in node.inputs}.union(graph.outputs)
        self.names: dict[str, str] = {}  # value of the graph -> what its readers read
        self.edges: dict[tuple[str, int], str] = {}  # (node, input) -> what is read there instead
        self.integers: dict[str, tuple[str, str]] = {}  # what DequantizeLinear gives -> (integers, value)
        self.plain: dict[str, str] = {}  # what DequantizeLinear gives -> the same numbers without one
        self.exposed = self._exposed()
        self.outputs: set[str] = set()

    def run(self) -> Any:
        for name in self.graph.inputs:
            kind = self.graph.values[name].type
            assert kind is not None
            self.writer.input(name, kind)
            self._computed(name, name)
        for node in self.graph.nodes:
            self._node(node)
        self.writer.owner = ""
        return self.writer.model([self._output(name) for name in self.graph.outputs])

    # -- operations -----------------------------------------------------------------------------------------------
    def _node(self, node: Node) -> None:
        if node.name in {self.fused[name].name for name in self.sixths}:
            node = replace(node, op="ReLU")  # its upper end is the quantiser's
        self.writer.owner = node.name
        emit = find(self.graph, node)
        operands = [self._operand(node, index) for index in range(len(node.inputs))]
        raw = [self._raw_name(output) for output in node.outputs]
        rounding = partial(self._round, node.output) if self._always_rounded(node.output) else None
        emit(Call(self.graph, node, self.writer, operands, raw, rounding))
        for output, name in zip(node.outputs, raw):
            if output in self.read:
                self._computed(output, self._guarded(node, output, name) if node.name in self.int8 else name)

    def _operand(self, node: Node, index: int) -> str:
        name = node.inputs[index]
        kind = self.graph.values[name].kind
        if kind == "const":
            return ""
        if kind != "param":
            source = self.edges.get((node.name, index), self.names[name])
            if node.name in self.exposed:
                source = self._without_dequantize(source)
            return self._round_rows(node, source) if index == 0 and node.name in self.plan.dynamic else source
        if node.name in self.weights and index == self.weights[node.name].index:
            return self._weight(node)
        if index == 2 and self._has_integer_bias(node):
            return self._bias(node)
        return self._constant(name)

    # -- values ---------------------------------------------------------------------------------------------------
    def _raw_name(self, value: str) -> str:
        """What an operation calls its result: where every reader wants it rounded, the rounded one has its name."""
        return self.writer.unique(f"{value}.raw") if self._always_rounded(value) else value

    def _always_rounded(self, value: str) -> bool:
        activation = self.plan.activations.get(value)
        return activation is not None and not activation.edges

    def _computed(self, value: str, raw: str) -> None:
        """Register a value that is there as `raw`, and quantise it where the plan does."""
        activation = self.plan.activations.get(value)
        self.names[value] = raw
        if activation is None:
            return
        self.writer.owner = self._quantised_for(value)
        qparams = self._parameters(value)
        if not _is_full(qparams):
            ends = [
                self.writer.derived(f"{activation.group}.{name}", end)
                for name, end in (("low", qparams.lo), ("high", qparams.hi))
            ]
            clipped = self.writer.unique(f"{value}.clipped")
            self.writer.node("Clip", [raw, *ends], [clipped], f"{value}.Clip")
            raw = clipped
        if activation.edges:
            self.edges.update(dict.fromkeys(activation.edges, self._round(value, raw)))
        elif value in self.graph.inputs:
            self.names[value] = self._round(value, raw)
        else:
            self.names[value] = self._round(value, raw, output=value)

    def _quantised_for(self, value: str) -> str:
        """The operation that wants `value` in int8."""
        source = self.graph.producer(value)
        if source is not None and source.name in self.int8:
            return source.name
        readers = (node.name for node in self.graph.consumers(value) if node.name in self.int8)
        return next(readers, "" if source is None else source.name)

    def _round(self, value: str, raw: str, output: str = "") -> str:
        """QuantizeLinear and DequantizeLinear of `raw` with the parameters of `value`; returns the result's name."""
        parameters = self._stored(value)
        quantised = self.writer.unique(f"{value}.quantised")
        output = output or self.writer.unique(f"{value}.rounded")
        self.writer.node("QuantizeLinear", [raw, *parameters], [quantised], f"{value}.QuantizeLinear")
        self.writer.node("DequantizeLinear", [quantised, *parameters], [output], f"{value}.DequantizeLinear")
        self.integers[output] = (quantised, value)
        return output

    def _exposed(self) -> set[str]:
        """The float operations whose weight onnxruntime would quantize if they read a DequantizeLinear: layers with a
        weight, and the moves before them, behind which onnxruntime puts a DequantizeLinear that it finds in front."""
        found: set[str] = set()
        for node in reversed(self.graph.nodes):
            if node.name in self.int8:
                continue
            readers = self.graph.consumers(node.output)
            moves = node.op in _MOVES and any(reader.name in found for reader in readers)
            if moves or (node.op in STORABLE and any(name in self.graph.params for name in node.inputs)):
                found.add(node.name)
        return found

    def _without_dequantize(self, source: str) -> str:
        """The numbers that a DequantizeLinear gives as `source`, computed by ordinary operations; returns their name.

        Other sources are returned as they are.
        """
        if source not in self.integers:
            return source
        if source not in self.plain:
            quantised, value = self.integers[source]
            parameters = self._parameters(value)
            group = self.plan.activations[value].group
            offset = np.asarray(parameters.zero_point + _OFFSETS[self.activations], np.float32)
            steps = {
                "Cast": ([quantised], {"to": self.writer.element("float32")}),
                "Sub": ([self.writer.derived(f"{group}.offset", offset)], {}),
                "Mul": ([self.writer.derived(f"{group}.scale", parameters.scale)], {}),
            }
            name = ""
            for op, (operands, attrs) in steps.items():
                operands = [*([name] if name else []), *operands]
                name = self.writer.unique(f"{value}.plain.{op}")
                self.writer.node(op, operands, [name], f"{value}.plain.{op}", **attrs)
            self.plain[source] = name
        return self.plain[source]

    def _guarded(self, node: Node, value: str, raw: str) -> str:
        """`raw` rounded at once where what stands before its quantiser would keep the layer out of int8."""
        tail = self.fused.get(node.name)
        if tail is None:
            clipped = self._always_rounded(value) and not _is_full(self._parameters(value))
            return self._round(value, raw) if clipped and node not in self.fused.values() else raw
        if node.name in self.sixths or tail.op not in _ENDS or not self._always_rounded(tail.output):
            return raw
        return raw if self._saturates(tail.output, _ENDS[tail.op]) else self._round(tail.output, raw)

    def _saturates(self, value: str, end: np.ndarray) -> bool:
        """Whether the quantiser of `value` cuts it off at 0 and at `end`, as int8 does."""
        qparams = self._parameters(value)
        return bool(_is_full(qparams) and qparams.zero_point == qparams.qmin and qparams.quantize(end) == qparams.qmax)

    def _is_sixth(self, head: str, tail: Node) -> bool:
        """Whether a layer with a bias can be written together with the hard sigmoid behind it."""
        layer = self.graph.node(head)
        fits = tail.op == "HSigmoid" and self._has_integer_bias(layer)
        return fits and self._always_rounded(tail.output) and self._saturates(tail.output, _ONE)

    def _parameters(self, value: str) -> QParams:
        return self.qparams[self.plan.activations[value].group]

    def _stored(self, value: str) -> list[str]:
        """The names of scale and zero point of `value`."""
        group = self.plan.activations[value].group
        qparams = self.qparams[group]
        zero_point = (qparams.zero_point + _OFFSETS[self.activations]).astype(self.activations)
        return [
            self.writer.derived(f"{group}.scale", qparams.scale),
            self.writer.derived(f"{group}.zero_point", zero_point),
        ]

    def _output(self, value: str) -> tuple[str, str]:
        """Name and dtype of an output of the model; its name is that of one computed value and of no other output."""
        kind = self.graph.values[value].type
        if kind is None:
            raise ExportError(f"{self.graph.name}: its output '{value}' is not a tensor; allowed: tensors")
        name = self.names[value] if value in self.names else self._constant(value)
        if name in self.outputs or (name == value and self.graph.values[value].kind != "node"):
            source, name = name, self.writer.unique(f"{value}.output")
            self.writer.node("Identity", [source], [name], name)
        self.outputs.add(name)
        return name, kind.dtype

    def _constant(self, value: str) -> str:
        held = self.graph.params.get(value)
        return self.writer.parameter(value, self.graph.const(value) if held is None else held.data)

    def _round_rows(self, node: Node, raw: str) -> str:
        """The rounding of `msqkd.quant.fake_quant.FakeQuantDynamic`; returns the result's name."""
        quant = self.plan.dynamic[node.name]
        bottom_end, top_end = quant.limits

        def number(value: float) -> str:
            return self.writer.constant(np.asarray(value, np.float32), "number")

        def step(op: str, *inputs: str, **attrs: Any) -> str:
            output = self.writer.unique(f"{node.name}.rows.{op}")
            self.writer.node(op, inputs, [output], f"{node.name}.rows.{op}", **attrs)
            return output

        last = self.writer.constant(np.asarray([-1], np.int64), "axes")
        low = step("Min", step("ReduceMin", raw, last, keepdims=1), number(0.0))
        high = step("Max", step("ReduceMax", raw, last, keepdims=1), number(0.0))
        span = step("Max", step("Neg", low), high) if quant.symmetric else step("Sub", high, low)
        levels = number(top_end if quant.symmetric else top_end - bottom_end)
        scale = step("Max", step("Div", span, levels), number(SCALE_FLOOR))
        inverse = step("Div", number(1.0), scale)
        if quant.symmetric:
            bottom, top = number(bottom_end), number(top_end)
        else:
            bottom = step("Round", step("Mul", low, inverse))
            top = step("Add", bottom, levels)
        steps = step("Min", step("Max", step("Round", step("Mul", raw, inverse)), bottom), top)
        return step("Mul", steps, scale)

    # -- weights --------------------------------------------------------------------------------------------------
    def _weight(self, node: Node) -> str:
        qparams = self._weight_parameters(node)
        data = self.graph.params[node.inputs[self.weights[node.name].index]].data
        integers = self.writer.derived(f"{node.name}.weight.int8", qparams.quantize(data).astype(np.int8))
        if node.name not in self.int8:
            return self._scaled_weight(node, integers, qparams, data.ndim)
        names = [
            integers,
            self.writer.derived(f"{node.name}.weight.scale", self._weight_scale(node, qparams)),
            self.writer.derived(f"{node.name}.weight.zero_point", qparams.zero_point.astype(np.int8)),
        ]
        return self._dequantize(node, "weight", names, qparams)

    def _scaled_weight(self, node: Node, integers: str, qparams: QParams, rank: int) -> str:
        """A stored weight as float32, by a Cast and a product, which no runtime takes for a part of an int8 kernel."""
        shape = [-1 if axis == qparams.axis else 1 for axis in range(rank)] if qparams.axis is not None else []
        scale = self.writer.derived(f"{node.name}.weight.scale", qparams.scale.reshape(shape))
        numbers, output = (self.writer.unique(f"{node.name}.weight.{what}") for what in ("numbers", "float"))
        self.writer.node("Cast", [integers], [numbers], f"{node.name}.weight.Cast", to=self.writer.element("float32"))
        self.writer.node("Mul", [numbers, scale], [output], f"{node.name}.weight.Mul")
        return output

    def _bias(self, node: Node) -> str:
        qparams = self._weight_parameters(node)
        stored = bias_steps(self._bias_data(node), float(self._input_scale(node)), qparams)
        names = [
            self.writer.derived(f"{node.name}.bias.int32", stored),
            self.writer.derived(f"{node.name}.bias.scale", self._input_scale(node) * self._weight_scale(node, qparams)),
        ]
        return self._dequantize(node, "bias", names, qparams)

    def _has_integer_bias(self, node: Node) -> bool:
        return node.name in self.weights and node.name in self.int8 and node.op in _SUMS and len(node.inputs) == 3

    def _bias_data(self, node: Node) -> np.ndarray:
        """In float64 (C,), in units in which the weights are whole."""
        bias = self.graph.params[node.inputs[2]].data.astype(np.float64)
        return bias + 3 if node.name in self.sixths else bias

    def _weight_parameters(self, node: Node) -> QParams:
        """Those of the plan; a channel all but dead has a wider scale, so that its int32 bias does not overflow."""
        quant = self.weights[node.name]
        weight = self.graph.params[node.inputs[quant.index]].data
        if not self._has_integer_bias(node):
            return quant.qparams(weight)
        tail = self.fused.get(node.name)
        result = self.plan.activations.get(node.output if tail is None else tail.output)
        output_scale = None if result is None else float(self.qparams[result.group].scale)
        source_scale, per_tensor = float(self._input_scale(node)), quant.axis is None
        return quant.qparams(weight, scale_floor(weight, self._bias_data(node), source_scale, output_scale, per_tensor))

    def _weight_scale(self, node: Node, qparams: QParams) -> np.ndarray:
        return qparams.scale / np.float32(6) if node.name in self.sixths else qparams.scale

    def _input_scale(self, node: Node) -> np.float32:
        return np.float32(self._parameters(node.inputs[0]).scale)

    def _dequantize(self, node: Node, what: str, inputs: list[str], qparams: QParams) -> str:
        output = self.writer.unique(f"{node.name}.{what}.float")
        axis = {} if qparams.axis is None else {"axis": qparams.axis}
        self.writer.node("DequantizeLinear", inputs, [output], f"{node.name}.{what}.DequantizeLinear", **axis)
        return output


def _is_full(qparams: QParams) -> bool:
    """Whether the quantiser saturates where int8 does."""
    return (qparams.qmin, qparams.qmax) == quant_limits(MAX_BITS)
