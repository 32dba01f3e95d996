"""Quantised networks as files; one module a format."""

from __future__ import annotations

from pathlib import Path
from typing import Callable, Optional

from msqkd.errors import ExportError, did_you_mean
from msqkd.files import PathLike
from msqkd.graph.ir import Graph
from msqkd.quant.plan import QuantPlan

LITE, PORTABLE = "lite_mindir", "portable_mindir"
_FORMATS = {"MINDIR": LITE, "MINDIR_PORTABLE": PORTABLE, LITE: LITE, PORTABLE: PORTABLE}


def export(
    graph: Graph,
    plan: QuantPlan,
    file_name: PathLike,
    file_format: str = "MINDIR",
    example_shape: Optional[tuple[int, ...]] = None,
) -> Path:
    """Write a deployment graph with its plan; returns the file's path.

    Args:
        graph, plan: every range known.
        file_name: with or without ``.mindir``.
        file_format: ``MINDIR`` (alias lite_mindir) or ``MINDIR_PORTABLE`` (alias portable_mindir).
        example_shape: the shape of a sample or batch, checked against the network's input.

    Raises:
        ExportError: unknown format, wrong input shape, or a file that cannot be written.
    """
    from msqkd.exporters.lite import export_lite
    from msqkd.exporters.portable import export_portable

    if file_format not in _FORMATS:
        raise ExportError(
            f"file_format '{file_format}' is unknown; allowed: {', '.join(_FORMATS)}"
            f"{did_you_mean(file_format, _FORMATS)}"
        )
    if example_shape is not None:
        _check_shape(graph, example_shape)
    writers: dict[str, Callable[..., Path]] = {LITE: export_lite, PORTABLE: export_portable}
    path = Path(file_name)
    path = path if path.suffix == ".mindir" else path.with_name(path.name + ".mindir")
    return writers[_FORMATS[file_format]](graph, plan, path)


def _check_shape(graph: Graph, shape: tuple[int, ...]) -> None:
    sample = graph.shape(graph.inputs[0])[1:]
    if tuple(shape) != sample and tuple(shape[1:]) != sample:
        raise ExportError(
            f"the example input has shape {tuple(shape)}; the network takes (N, {', '.join(map(str, sample))})"
        )
