"""Portable MindIR: ordinary operations and int8 weights; MindSpore itself loads and runs it, on any device."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Callable

import mindspore as ms
import numpy as np

from msqkd.errors import ExportError
from msqkd.exporters.canonical import canonical
from msqkd.exporters.compact import compact
from msqkd.files import PathLike, replacing
from msqkd.graph.cell import to_cell
from msqkd.graph.ir import Graph, Node, Value
from msqkd.quant.plan import QuantPlan


def export_portable(graph: Graph, plan: QuantPlan, file: PathLike) -> Path:
    """Write the quantised network; weights are stored as int8 and multiplied by their scale when it runs.

    The batch of the inputs is open. Answers are those of the fake-quantised network.

    Raises:
        PlanError: a range is missing.
        ExportError: MindSpore cannot write the file.
    """
    portable = portable_graph(graph, plan)
    cell = to_cell(portable)
    inputs = [_open_batch(portable, name) for name in portable.inputs]
    return write_cell(cell, inputs, file, compact)


def write_cell(cell: Any, inputs: list[Any], file: PathLike, form: Callable[[bytes], bytes] = canonical) -> Path:
    """`mindspore.export` to `file`, atomically, in the given `form`; the bytes depend on the network alone."""
    target = Path(file)
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / "model.mindir"
        try:
            ms.export(cell, *inputs, file_name=str(temporary), file_format="MINDIR")
        except Exception as error:  # MindSpore raises whatever the compiler met
            raise ExportError(
                f"{target.name}: MindSpore cannot export the network: {str(error).splitlines()[0]}"
            ) from error
        if not temporary.exists():
            raise ExportError(f"{target.name}: the network is larger than the 1 GiB a single MindIR file holds")
        try:
            with replacing(target) as place:
                place.write_bytes(form(temporary.read_bytes()))
        except OSError as error:
            raise ExportError(f"cannot write {target}: {error.strerror}") from error
    return target


def _open_batch(graph: Graph, name: str) -> Any:
    kind = graph.values[name].type
    assert kind is not None
    return ms.Tensor(shape=[None if size < 0 else size for size in kind.shape], dtype=getattr(ms, kind.dtype))


def portable_graph(graph: Graph, plan: QuantPlan) -> Graph:
    """The quantised network as a graph of ordinary operations."""
    result = graph.copy()
    for name, quant in plan.with_weight_observers(graph).weights.items():
        _store_int8(result, result.node(name), quant)
    for value, activation in plan.activations.items():
        if not activation.exact:
            _round_activation(result, value, activation.edges, plan)
    result.prune()
    result.check()
    return result


def _emit(graph: Graph, like: str, op: str, inputs: list[str], hint: str) -> Node:
    output = graph.add_value(Value(graph.unique_value(hint), "node", graph.values[like].type))
    return Node(graph.unique_node(hint), op, inputs, [output])


def _store_int8(graph: Graph, node: Node, quant: Any) -> None:
    weight = node.inputs[1]
    qparams = quant.qparams(graph.params[weight].data)
    data = graph.params[weight].data
    stored = graph.add_param(f"{weight}.int8", qparams.quantize(data).astype(np.int8), trainable=False)
    scale = qparams.scale
    if quant.axis is not None:
        scale = scale.reshape([-1 if i == quant.axis else 1 for i in range(data.ndim)])
    cast = _emit(graph, weight, "Cast", [stored, graph.add_const("float32", "dtype")], f"{node.name}.weight_as_float")
    scaled = _emit(
        graph,
        weight,
        "Mul",
        [cast.output, graph.add_const(np.asarray(scale, np.float32), "scale")],
        f"{node.name}.weight",
    )
    position = graph.nodes.index(node)
    graph.nodes[position:position] = [cast, scaled]
    node.inputs[1] = scaled.output


def _round_activation(graph: Graph, value: str, edges: tuple[tuple[str, int], ...], plan: QuantPlan) -> None:
    qparams = plan.group_of(value).qparams()
    scale = np.float32(qparams.scale)
    bounds = (np.float32(qparams.qmin - qparams.zero_point), np.float32(qparams.qmax - qparams.zero_point))
    steps: list[Node] = []
    source = value
    chain = (
        ("Mul", np.float32(1) / scale),
        ("Minimum", bounds[1]),
        ("Maximum", bounds[0]),
        ("Round", None),
        ("Mul", scale),
    )
    for number, (op, operand) in enumerate(chain):
        inputs = [source]
        if op == "Round":
            inputs.append(graph.add_const(0, "decimals"))
        else:
            inputs.append(graph.add_const(np.asarray(operand, np.float32), "c"))
        node = _emit(graph, value, op, inputs, f"{value}_quant{number}")
        steps.append(node)
        source = node.output
    if edges:
        for name, index in edges:
            graph.node(name).inputs[index] = source
    else:
        graph.replace_value(value, source)
    graph.insert_after(graph.producer(value), steps)


def write_float(graph: Graph, file: PathLike) -> Path:
    """Write a graph in float32, its batch open: what the quantised files are compared with."""
    return write_cell(to_cell(graph), [_open_batch(graph, name) for name in graph.inputs], file)
