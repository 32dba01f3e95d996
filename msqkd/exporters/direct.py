"""Direct MindIR: MindSpore Lite loads it as it is, with ``Model.build_from_file(file, ModelType.MINDIR)``.

The network is that of the portable file, ordinary operations that round, in the form of MindSpore 2.0 (see
`msqkd.exporters.mindir_form`). Weights are float32 on their grids: the loader has no kernel that casts an int8 weight.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np

from msqkd.errors import ExportError
from msqkd.exporters import WAY_OUT
from msqkd.exporters.canonical import canonical_model
from msqkd.exporters.device.freeze import freeze
from msqkd.exporters.device.shapes import concrete_shapes
from msqkd.exporters.lite import strip_model
from msqkd.exporters.lite_fusions import prevent_fusions
from msqkd.exporters.lite_operations import to_known_operations
from msqkd.exporters.lite_pools import write_padded_pools
from msqkd.exporters.mindir_file import write_cell
from msqkd.exporters.mindir_form import older_form
from msqkd.exporters.portable import portable_graph
from msqkd.files import PathLike
from msqkd.graph.cell import to_cell
from msqkd.graph.ir import Graph
from msqkd.graph.passes.batch_statistics import spell_out_statistics
from msqkd.quant.plan import QuantPlan

_OTHERWISE = ("LSTM",)
"""Operations that the runtime of 2.0.0 computes otherwise than MindSpore."""


def export_direct(graph: Graph, plan: QuantPlan, file: PathLike, batch_size: int = 1) -> Path:
    """Write the quantized network for MindSpore Lite without its converter; return the path.

    The outputs are those of the fake-quantized network.

    Args:
        graph, plan: the deployment graph and its plan, every range known.
        file: where to.
        batch_size: the fixed batch of the inputs.

    Raises:
        PlanError: a range is missing.
        ExportError: MindSpore cannot write the file, MindSpore 2.0 cannot express an operation, or MindSpore Lite
            computes one otherwise.
    """
    for node in graph.nodes:
        if node.op in _OTHERWISE:
            raise ExportError(
                f"layer '{node.name}': MindSpore Lite computes {node.op} of a MindIR otherwise than MindSpore; "
                f"{WAY_OUT}"
            )
    direct, nothing = portable_graph(graph, plan), QuantPlan(plan.target, plan.network)
    spell_out_statistics(direct)
    write_padded_pools(direct, nothing)
    shapes = concrete_shapes(direct, batch_size)
    freeze(direct, shapes, {})  # rounds and scales the stored weights
    to_known_operations(direct, nothing, shapes)
    prevent_fusions(direct, nothing, shapes)
    direct.check()
    inputs = []
    for name in direct.inputs:
        kind = direct.values[name].type
        assert kind is not None
        inputs.append(ms.Tensor(np.zeros((batch_size, *kind.shape[1:]), kind.dtype)))

    def form(model: Any) -> None:
        canonical_model(model)
        strip_model(model)
        older_form(model)

    return write_cell(to_cell(direct, shared=True), inputs, file, form)
