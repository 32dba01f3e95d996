"""MindIR for MindSpore Lite's converter: float weights on the int8 grid, and a FakeQuantParam marker behind every
quantised value.

The converter reads the markers as quantisation parameters and deletes them. Its rules (measured on converter_lite
2.7): one marker a producer and it is the producer's only user; no two markers in a row; none between a convolution and
its fused activation; none on a bias. `mindspore.export` also writes bookkeeping (Load, UpdateState, Depend) that would
give parameters a second user: it is taken out here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np

from msqkd.errors import ExportError
from msqkd.exporters.canonical import canonical_model, on_bytes
from msqkd.exporters.device.freeze import freeze
from msqkd.exporters.device.shapes import concrete_shapes
from msqkd.exporters.lite_fusions import keep_transpositions, prevent_fusions
from msqkd.exporters.lite_markers import BEHIND_FLOAT, MARKER, TWIN, Marker, guard_markers, mark_items, mark_tuples
from msqkd.exporters.lite_operations import to_known_operations
from msqkd.exporters.lite_pools import write_padded_pools
from msqkd.exporters.lowering import lower_for_lite, own_weight
from msqkd.exporters.mindir_file import fixed_inputs, write_cell
from msqkd.exporters.mindir_form import functional_form, older_form
from msqkd.files import PathLike
from msqkd.graph.cell import Hooks, to_cell
from msqkd.graph.ir import Graph
from msqkd.graph.mindir import read_mindir, read_model
from msqkd.graph.passes.batch_statistics import spell_out_statistics
from msqkd.quant.config import INT8
from msqkd.quant.integers import int8_grids, round_stored
from msqkd.quant.plan import QuantPlan
from msqkd.quant.qparams import QParams, quant_limits
from msqkd.targets.lite_arm import LITE_ARM

_BOOKKEEPING = ("Load", "UpdateState", "Depend")


def export_lite(graph: Graph, plan: QuantPlan, file: PathLike, batch_size: int = 1) -> Path:
    """Write the network with its quantisation parameters for ``converter_lite --fmk=MINDIR``; no configuration file is
    needed.

    Args:
        graph, plan: the deployment graph and its plan, every range known.
        file: where to.
        batch_size: the fixed batch of the inputs (the converter's int8 graphs have static shapes).

    Raises:
        PlanError: a range is missing.
        ExportError: the file breaks one of the converter's rules, or cannot be written.
    """
    lowered, plan = lower_for_lite(round_stored(graph, plan), plan)
    shapes = concrete_shapes(lowered, batch_size)
    freeze(lowered, shapes, {})  # stored weights are rounded already
    left = {node.name for node in lowered.nodes}
    plan.weights = {name: quant for name, quant in plan.weights.items() if name in left}
    to_known_operations(lowered, plan, shapes)
    prevent_fusions(lowered, plan, shapes)
    plan.activations = {name: quant for name, quant in plan.activations.items() if name in lowered.values}
    hooks = Hooks(values={}, edges={})
    float_nodes = {node.name for node in plan.nodes if node.precision != INT8}
    grids = {(name, plan.weights[name].index): qparams for name, qparams in int8_grids(lowered, plan).items()}
    grids.update(_constant_operands(lowered, plan))
    _separate_weights(lowered, grids)
    stored = {lowered.node(name).inputs[index]: qparams for (name, index), qparams in grids.items()}
    for edge, qparams in grids.items():
        hooks.edges[edge] = Marker(qparams)  # type: ignore[index]
    floats = {output for node in lowered.nodes if node.name in float_nodes for output in node.outputs}
    for value, activation in plan.activations.items():
        if lowered.values[value].kind == "param":
            continue  # its readers have the markers
        if activation.exact and value in lowered.outputs and not lowered.consumers(value):
            continue  # a marker must feed a consumer; a reshape hands its input's parameters on
        marker = Marker(plan.group_of(value).qparams(), value in floats)
        hooks.values[value] = marker  # type: ignore[index]
    cell = to_cell(lowered, hooks, shared=True)

    def form(model: Any) -> None:
        canonical_model(model)
        strip_model(model)
        older_form(model)
        guard_markers(model)
        _check_markers(read_model(model, Path(file).name, parameters=cell.parameters_dict()))
        mark_tuples(model)

    return write_cell(
        cell, fixed_inputs(lowered, batch_size), file, form, lambda name, data: _on_grid(stored.get(name), data)
    )


def export_float(graph: Graph, file: PathLike) -> Path:
    """Write a network that computes in float, for MindSpore Lite's converter or its MindIR loader: batch 1, no markers.

    Args:
        graph: the network, BatchNorm folded.
        file: where to.

    Raises:
        ExportError: a setting of an operation is computed, or the file cannot be written.
    """
    graph, plan = graph.copy(), QuantPlan(LITE_ARM.name, graph.name)
    spell_out_statistics(graph)
    write_padded_pools(graph, plan)
    shapes = concrete_shapes(graph, 1)
    freeze(graph, shapes, {})
    to_known_operations(graph, plan, shapes)
    keep_transpositions(graph, plan, shapes)

    def form(model: Any) -> None:
        canonical_model(model)
        strip_model(model)
        older_form(model)

    return write_cell(to_cell(graph, shared=True), fixed_inputs(graph, 1), file, form)


def _constant_operands(graph: Graph, plan: QuantPlan) -> dict[tuple[str, int], QParams]:
    """Return the parameters of operands that were computed from constants alone, by (node, input)."""
    found = {}
    for value, activation in plan.activations.items():
        if value in graph.params:
            places = [
                (node.name, index) for node in graph.nodes for index, name in enumerate(node.inputs) if name == value
            ]
            for edge in activation.edges or places:
                found[edge] = plan.group_of(value).qparams()
    return found


def _separate_weights(graph: Graph, grids: Mapping[tuple[str, int], QParams]) -> None:
    """Where a weight has several readers that do not all want it on one grid, give each int8 layer one of its own, in
    place: a marker must be the only user of what it marks."""
    for (name, index), qparams in grids.items():
        node = graph.node(name)
        weight = node.inputs[index]
        uses = [(n.name, i) for n in graph.consumers(weight) for i, read in enumerate(n.inputs) if read == weight]
        if not all(use in grids and _equal(grids[use], qparams) for use in uses):
            own_weight(graph, node, index)


def _equal(one: QParams, other: QParams) -> bool:
    same = np.array_equal(one.scale, other.scale) and np.array_equal(one.zero_point, other.zero_point)
    return one.axis == other.axis and same


def _on_grid(qparams: Optional[QParams], data: np.ndarray) -> np.ndarray:
    return data if qparams is None else qparams.fake_quantize(data)


def strip_bookkeeping(data: bytes) -> bytes:
    """A serialised MindIR without bookkeeping (see `strip_model`)."""
    return on_bytes(data, strip_model)


def strip_model(model: Any) -> None:
    """Take Load, UpdateState, Depend and the tuples only they read out of a ``ModelProto``; parameters are read
    directly."""
    kinds = {primitive.name: primitive.op_type for primitive in model.primitives}
    alias: dict[str, str] = {}
    kept = []
    for node in model.graph.node:
        op = _op(node, kinds)
        if op in ("Load", "Depend"):
            alias[node.output[0]] = alias.get(node.input[0], node.input[0])
        elif op not in _BOOKKEEPING and not _is_monad(node):
            for index, name in enumerate(node.input):
                node.input[index] = alias.get(name, name)
            kept.append(node)
    for output in model.graph.output:
        output.name = alias.get(output.name, output.name)
    used = {output.name for output in model.graph.output}
    needed = []
    for node in reversed(kept):
        if used.intersection(node.output):
            needed.append(node)
            used.update(node.input)
    kept_bytes = [node.SerializeToString() for node in reversed(needed)]
    del model.graph.node[:]
    for blob in kept_bytes:
        model.graph.node.add().ParseFromString(blob)
    live = {node.op_type[len("REF::") :] for node in model.graph.node if node.op_type.startswith("REF::")}
    primitives = [p.SerializeToString() for p in model.primitives if p.name in live]
    del model.primitives[:]
    for blob in primitives:
        model.primitives.add().ParseFromString(blob)


def _op(node: Any, kinds: dict[str, str]) -> str:
    return kinds[node.op_type[len("REF::") :]] if node.op_type.startswith("REF::") else node.op_type


def _is_monad(node: Any) -> bool:
    return node.op_type == "Constant" and any("MONAD" in a.AttributeType.Name(a.type) for a in node.attribute)


def _check_markers(graph: Graph) -> None:
    """Hold what is to be written against the converter's rules."""
    name = graph.name
    markers = [node for node in graph.nodes if node.op == MARKER]
    if not markers:
        raise ExportError(f"{name}: nothing in the network is int8 on the target; there are no parameters to write")
    for marker in markers:
        source = marker.inputs[0]
        producer = graph.producer(source)
        if producer is not None and producer.op == MARKER:
            raise ExportError(f"{name}: two markers follow each other behind '{producer.inputs[0]}'")
        alone = len(graph.consumers(source)) == 1 and source not in graph.outputs
        if not alone and not marker.attrs.get(BEHIND_FLOAT):  # a Depend lies between these
            raise ExportError(f"{name}: the marker behind '{source}' is not its only user")


class Marked(NamedTuple):
    """A marked MindIR without its markers.

    Attributes:
        graph: the network.
        values: parameters by value name.
        weights: parameters of weights by (node, input).
        floats: the marked values that are computed in float.
    """

    graph: Graph
    values: dict[str, QParams]
    weights: dict[tuple[str, int], QParams]
    floats: set[str]


def read_marked(file: PathLike) -> tuple[Graph, dict[str, QParams], dict[tuple[str, int], QParams]]:
    """Return the graph, values and weights of `read_markers`."""
    return read_markers(file)[:3]


def read_markers(file: PathLike) -> Marked:
    """Read a file of `export_lite` back, as the converter does."""
    graph = read_mindir(on_bytes(Path(file).read_bytes(), mark_items), Path(file).stem)
    functional_form(graph)
    values: dict[str, QParams] = {}
    weights: dict[tuple[str, int], QParams] = {}
    floats: set[str] = set()
    for marker in [node for node in graph.nodes if node.op == MARKER]:
        source = marker.inputs[0]
        weight = graph.values[source].kind == "param"
        if marker.attrs.get(TWIN):
            pass
        elif weight:
            for node in graph.consumers(marker.output):
                weights[(node.name, node.inputs.index(marker.output))] = _parameters(marker.attrs, axis=0)
        else:
            values[source] = _parameters(marker.attrs, axis=None)
            if marker.attrs.get(BEHIND_FLOAT):
                floats.add(source)
        graph.replace_value(marker.output, source)
        graph.nodes.remove(marker)
    graph.prune()
    return Marked(graph, values, weights, floats)


def _parameters(attrs: dict[str, Any], axis: Optional[int]) -> QParams:
    scale = np.float32(attrs["linear_quant_scale"])
    zero_point = np.int32(attrs["linear_quant_zero_point"])
    low, high = quant_limits(8, narrow=scale.size > 1)
    if axis is None or scale.size == 1:
        return QParams(scale.reshape(()), zero_point.reshape(()), low, high)
    return QParams(scale, zero_point, low, high, axis)
