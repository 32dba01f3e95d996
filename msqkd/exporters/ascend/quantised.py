"""MindIR for Ascend NPUs that is quantised already: ``Quant``, ``Conv2D`` on int8 and ``Dequant``.

``Quant`` and ``Dequant`` are GE's AscendQuant and AscendDequant. A layer reads

    q = Quant(x){scale = 1/s_x, offset 0} → Conv2D(q, int8 weight, int32 bias) → Dequant(·, deq_scale){relu_flag}

where deq_scale holds the float32 bits of s_x · s_w in the lower half of uint64, and everything between layers is
float32; layers planned in float16 stand between two ``Cast``. Activations are symmetric, so that the zeros with which
Conv2D pads stand for 0. GE's Conv2D takes the bias as its third input; MindSpore's compiler knows none and writes a
``BiasAdd``, whose operand is moved afterwards.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import mindspore as ms
from mindspore import nn, ops
from mindspore.ops.operations import _inner_ops

from msqkd.errors import ExportError
from msqkd.exporters.ascend.layers import AscendLayer, ascend_layers
from msqkd.exporters.lite import strip_bookkeeping
from msqkd.exporters.mindir_file import fixed_inputs, write_cell
from msqkd.files import PathLike, write_bytes
from msqkd.graph.cell import Hooks, to_cell
from msqkd.graph.ir import Graph, Node, TensorType, Value
from msqkd.quant.half import with_casts
from msqkd.quant.integers import round_stored
from msqkd.quant.plan import QuantPlan


class Dequant(_inner_ops.Dequant):
    """MindSpore's primitive of this name; its own type inference says float16 whatever `dtype` asks for."""

    def infer_dtype(self, x_type: Any, deq_scale_type: Any) -> Any:
        """What the attribute says."""
        return self.dtype


class _QuantCell(nn.Cell):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.quant = _inner_ops.Quant(scale, 0.0, False, "Round")

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.quant(x)


class _DequantCell(nn.Cell):
    def __init__(self, layer: AscendLayer) -> None:
        super().__init__()
        self.layer = layer.node
        self.scale = ms.Parameter(ms.Tensor(layer.deq_scale), requires_grad=False)
        self.dequant = Dequant(False, bool(layer.relu), ms.float32)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.dequant(x, self.scale)


def export_ascend(graph: Graph, plan: QuantPlan, file: PathLike, batch_size: int = 1) -> Path:
    """Write the network with int8 weights and int32 biases for ``converter_lite --optimize=ascend_oriented``.

    Args:
        graph, plan: the deployment graph and its plan for the target ``ascend``, every range known.
        file: where to.
        batch_size: the fixed batch of the inputs.

    Raises:
        PlanError: a range is missing.
        ExportError: nothing is int8, a layer has something the NPU cannot represent (see `ascend_layers`), or the file
            cannot be written.
    """
    layers = ascend_layers(graph, plan)
    if not layers:
        raise ExportError(f"{Path(file).name}: nothing in the network is int8 on the target; there is nothing to write")
    graph, hooks = _with_integers(with_casts(round_stored(graph, plan), plan, "float16"), layers)
    inputs = fixed_inputs(graph, batch_size)
    cell = to_cell(graph, hooks)
    for dequant in hooks.values.values():
        dequant.scale.name = f"{dequant.layer}.deq_scale"  # what the cell calls it says nothing to a reader
    with tempfile.TemporaryDirectory() as folder:
        raw = write_cell(cell, inputs, Path(folder) / "ascend.mindir").read_bytes()
    # A second time, for what the additions of biases alone have read.
    data = strip_bookkeeping(_biases_into_convolutions(strip_bookkeeping(raw)))
    try:
        write_bytes(file, data)
    except OSError as error:
        raise ExportError(f"cannot write {file}: {error.strerror}") from error
    return Path(file)


def _with_integers(graph: Graph, layers: dict[str, AscendLayer]) -> tuple[Graph, Hooks]:
    """A copy of the graph with integer parameters, and the cells that turn float into integers and back."""
    graph, hooks = graph.copy(), Hooks(values={}, edges={})
    for layer in layers.values():
        node = graph.node(layer.node)
        if layer.relu:
            graph.replace_value(layer.result, node.output)
            graph.nodes.remove(graph.node(layer.relu))
        weight = layer.weight
        if node.op == "Dense":
            weight = weight[:, :, None, None]
            _dense_to_conv(graph, node, layer)
        node.inputs[1] = graph.add_param(graph.unique_value(f"{node.inputs[1]}.int8"), weight, trainable=False)
        if layer.bias is not None:
            bias = graph.unique_value(f"{node.inputs[2]}.int32")
            node.inputs[2] = graph.add_param(bias, layer.bias, trainable=False)
        # Of equal operations on a value that several layers read, the compiler keeps one.
        hooks.edges[node.name, 0] = _QuantCell(layer.quant_scale)  # type: ignore[index]
        hooks.values[node.output] = _DequantCell(layer)  # type: ignore[index]
    graph.prune()
    graph.check()
    return graph, hooks


def _dense_to_conv(graph: Graph, node: Node, layer: AscendLayer) -> None:
    """Reshape (N, K) → (N, K, 1, 1), a 1×1 convolution, and Reshape back to (N, Cout)."""
    features_out, features_in = layer.weight.shape
    final = node.output
    plane = _reshape(graph, node.inputs[0], graph.unique_value(f"{node.name}_plane"), (features_in, 1, 1), node)
    sums = graph.unique_value(f"{node.name}_sums")
    graph.add_value(Value(sums, "node", TensorType((graph.shape(final)[0], features_out, 1, 1))))
    node.op, node.functional, node.attrs = "Conv2D", False, dict(ops.Conv2D(features_out, 1).attrs)
    node.inputs[0], node.outputs = plane.output, [sums]
    graph.nodes.insert(graph.nodes.index(node), plane)
    graph.insert_after(node, [_reshape(graph, sums, final, (features_out,), node)])


def _reshape(graph: Graph, source: str, output: str, sample: tuple[int, ...], owner: Node) -> Node:
    """A Reshape that belongs to the layer `owner`."""
    graph.add_value(Value(output, "node", TensorType((graph.shape(source)[0], *sample))))
    shape = graph.add_const((-1, *sample), "shape")
    name = graph.unique_node(f"{owner.name}.reshape")
    return Node(name, "Reshape", [source, shape], [output], {}, owner.cell_path, owner.cell_types)


def _biases_into_convolutions(data: bytes) -> bytes:
    """Make the operand of every ``BiasAdd`` on the int32 sums of a ``Conv2D`` that convolution's third input."""
    from mindspore.train import mind_ir_pb2 as pb

    model = pb.ModelProto()
    model.ParseFromString(data)
    kinds = {f"REF::{primitive.name}": primitive.op_type for primitive in model.primitives}
    sums: dict[str, Any] = {}
    alias: dict[str, str] = {}
    for node in model.graph.node:
        node.input[:] = [alias.get(name, name) for name in node.input]
        op = kinds.get(node.op_type)
        if op == "Conv2D" and _dtype(node) == pb.TensorProto.INT32:
            sums[node.output[0]] = node
        elif op == "BiasAdd" and node.input[0] in sums:
            alias[node.output[0]] = node.input[0]
            sums[node.input[0]].input.append(node.input[1])
    return bytes(model.SerializeToString(deterministic=True))


def _dtype(node: Any) -> int:
    """The data type of what a node of the protobuf computes."""
    shape = next(attribute for attribute in node.attribute if attribute.name == "shape")
    return int(shape.tensors[0].data_type)
