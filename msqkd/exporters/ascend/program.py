"""A planned network as the steps an Ascend NPU computes, for the simulator."""

from __future__ import annotations

from typing import Any, Optional

import numpy as np

from msqkd.exporters.ascend.layers import AscendLayer, ascend_layers
from msqkd.graph.ir import Graph, Node, unique_name
from msqkd.graph.islands import cut, is_tensor
from msqkd.integer.program import ISLAND, Format, Program, Step, Tensor, TensorQuant
from msqkd.quant.half import with_casts
from msqkd.quant.integers import round_stored
from msqkd.quant.plan import QuantPlan

_CONV_ATTRS = ("stride", "dilation", "pad_list", "group")


def ascend_program(graph: Graph, plan: QuantPlan, batch: int = 1) -> Program:
    """The steps ``Quant``, ``Conv2D`` or ``Dense``, and ``Dequant`` of every int8 layer, and an island a float node.

    A value that layers read in int8 is quantised once. It has two tensors then, both with its name as their `value`:
    the float one, as it is computed, and the int8 one, which has parameters.

    Args:
        graph, plan: the deployment graph and its plan for the target ``ascend``, every range known.
        batch: what sizes the graph leaves open are given as; the simulator takes any batch where it is 1.

    Raises:
        PlanError: a range is missing.
        ExportError: a layer has something the NPU cannot represent; see `ascend_layers`.
    """
    computed = with_casts(round_stored(graph, plan), plan)
    return _Builder(computed, ascend_layers(graph, plan), batch).build()


class _Builder:
    def __init__(self, graph: Graph, layers: dict[str, AscendLayer], batch: int) -> None:
        self.graph, self.layers, self.batch = graph, layers, batch
        self.program = Program(graph.name, list(graph.inputs), list(graph.outputs))
        self.quantised: dict[str, str] = {}  # value -> its int8 tensor

    def build(self) -> Program:
        fused = {layer.relu for layer in self.layers.values()}
        for name in self.graph.inputs:
            self._value(name)
        for node in self.graph.nodes:
            if node.name in self.layers:
                self._layer(node, self.layers[node.name])
            elif node.name not in fused and is_tensor(self.graph, node.output):
                self._island(node)
        return self.program

    def _value(self, name: str) -> str:
        """The float tensor of a value."""
        kind = self.graph.values[name].type
        assert kind is not None
        return self.program.add(Tensor(name, kind.dtype, self._shape(name), format=Format.NCHW, value=name))

    def _extra(self, hint: str, dtype: str, shape: tuple[int, ...], **more: Any) -> str:
        """A tensor that is no value of the graph."""
        name = unique_name(hint, {**self.graph.values, **self.program.tensors})
        return self.program.add(Tensor(name, dtype, shape, format=Format.NCHW, **more))

    def _const(self, hint: str, data: np.ndarray, quant: Optional[TensorQuant] = None) -> str:
        return self._extra(hint, str(data.dtype), data.shape, data=data, quant=quant)

    def _shape(self, value: str) -> tuple[int, ...]:
        return tuple(self.batch if size < 0 else size for size in self.graph.shape(value))

    def _layer(self, node: Node, layer: AscendLayer) -> None:
        inputs = [self._quant(node, layer)]
        inputs.append(self._const(f"{node.name}.weight_int8", layer.weight, _symmetric(layer.weight_scale)))
        if layer.bias is not None:
            inputs.append(self._const(f"{node.name}.bias_int32", layer.bias, _symmetric(layer.scale, bits=32)))
        total = self._extra(f"{node.name}.sum", "int32", self._shape(node.output))
        attrs = {name: node.attrs[name] for name in _CONV_ATTRS} if node.op == "Conv2D" else {}
        self._step(node, node.name, node.op, inputs, total, attrs)
        scale = self._const(f"{node.name}.deq_scale", layer.deq_scale)
        attrs = {"sqrt_mode": False, "relu_flag": bool(layer.relu), "dtype": "float32"}
        self._step(node, f"{node.name}.dequant", "Dequant", [total, scale], self._value(layer.result), attrs)

    def _quant(self, node: Node, layer: AscendLayer) -> str:
        """The int8 tensor of the layer's input, computed by the first layer that reads it."""
        source = layer.source
        if source not in self.quantised:
            output = self._extra(
                f"{source}.int8", "int8", self._shape(source), quant=_symmetric(layer.input_scale), value=source
            )
            attrs = {"scale": layer.quant_scale, "offset": 0.0, "sqrt_mode": False, "round_mode": "Round"}
            self._step(node, f"{node.name}.quant", "Quant", [source], output, attrs)
            self.quantised[source] = output
        return self.quantised[source]

    def _step(self, node: Node, name: str, op: str, inputs: list[str], output: str, attrs: dict[str, Any]) -> None:
        self.program.steps.append(Step(name, op, inputs, [output], attrs, quantized=True, layer=node.name))

    def _island(self, node: Node) -> None:
        island = cut(self.graph, [node])
        outputs = [self._value(name) for name in island.outputs]
        step = Step(node.name, ISLAND, list(island.inputs), outputs, {"graph": island}, layer=node.name)
        self.program.steps.append(step)


def _symmetric(scale: Any, bits: int = 8) -> TensorQuant:
    return TensorQuant(scale, np.zeros(np.shape(scale)), bits)
