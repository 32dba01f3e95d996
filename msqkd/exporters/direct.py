"""Direct MindIR: MindSpore Lite loads it as it is, with ``Model.build_from_file(file, ModelType.MINDIR)``.

The network is that of the portable file, ordinary operations that round, written as a float network is. So weights are
float32 on their grids: the loader has no kernel that casts an int8 weight.
"""

from __future__ import annotations

from pathlib import Path

from msqkd.errors import ExportError
from msqkd.exporters import WAY_OUT
from msqkd.exporters.lite import export_float
from msqkd.exporters.portable import portable_graph
from msqkd.files import PathLike
from msqkd.graph.ir import Graph
from msqkd.quant.plan import QuantPlan

_OTHERWISE = ("LSTM",)
"""Operations that the runtime of 2.0.0 computes otherwise than MindSpore."""


def export_direct(graph: Graph, plan: QuantPlan, file: PathLike) -> Path:
    """Write the quantized network for MindSpore Lite without its converter; return the path.

    The outputs are those of the fake-quantized network.

    Args:
        graph, plan: the deployment graph and its plan, every range known.
        file: where to; its batch is 1.

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
    return export_float(portable_graph(graph, plan), file)
