"""Quantised networks as files; one module a format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional

from msqkd.errors import ExportError, did_you_mean
from msqkd.files import PathLike
from msqkd.graph.ir import Graph
from msqkd.graph.norms import batch_dependence
from msqkd.quant.plan import QuantPlan

LITE, PORTABLE, ASCEND, ONNX = "lite_mindir", "portable_mindir", "ascend_mindir", "onnx"
DIRECT = "direct_mindir"
MS, MS_WEIGHT, MS_FLOAT = "ms", "ms_weight", "ms_float"
WAY_OUT = f"the format {PORTABLE} holds any operation in any form"
"""The end of a sentence that says what a format cannot hold."""


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        name: as recipes call it.
        alias: as `msqkd.export` calls it.
        suffix: of the file.
        description: one line for people.
        targets: names of the targets whose plans can be written so.
        write: (graph, plan, path) -> path.
        load: path -> a callable from a batch of each input to the outputs; None where only the device can run it.
        int8: whether the file computes in int8 as the plan says.
        check: (graph, plan) -> None; raises the ExportError that `write` would, where a format does not hold every
            operation.
        float16: whether it holds layers that compute in float16.
        wide: whether it rounds the inputs of dynamic layers, so that these may have 16 bits.
        single: whether the file is made for batch 1.
    """

    name: str
    alias: str
    suffix: str
    description: str
    targets: tuple[str, ...]
    write: Callable[[Graph, QuantPlan, Path], Path]
    load: Optional[Callable[[Path], Callable[..., Any]]] = None
    int8: bool = True
    check: Optional[Callable[[Graph, QuantPlan], None]] = None
    float16: bool = False
    wide: bool = False
    single: bool = False


def _write_lite(graph: Graph, plan: QuantPlan, path: Path) -> Path:
    from msqkd.exporters.lite import export_lite

    return export_lite(graph, plan, path)


def _load_lite(path: Path) -> Any:
    from msqkd.exporters.verify import load_lite

    return load_lite(path)


def _write_portable(graph: Graph, plan: QuantPlan, path: Path) -> Path:
    from msqkd.exporters.portable import export_portable

    return export_portable(graph, plan, path)


def _load_portable(path: Path) -> Any:
    from msqkd.exporters.verify import load_portable

    return load_portable(path)


def _write_direct(graph: Graph, plan: QuantPlan, path: Path) -> Path:
    from msqkd.exporters.direct import export_direct

    return export_direct(graph, plan, path)


def _load_direct(path: Path) -> Any:
    from msqkd.exporters.verify import load_direct

    return load_direct(path)


def _write_ascend(graph: Graph, plan: QuantPlan, path: Path) -> Path:
    from msqkd.exporters.ascend.quantised import export_ascend

    return export_ascend(graph, plan, path)


def _write_onnx(graph: Graph, plan: QuantPlan, path: Path) -> Path:
    from msqkd.exporters.onnx.qdq import export_onnx

    return export_onnx(graph, plan, path)


def _check_onnx(graph: Graph, plan: QuantPlan) -> None:
    from msqkd.exporters.onnx.qdq import onnx_model

    onnx_model(graph, plan)


def _load_onnx(path: Path) -> Any:
    from msqkd.exporters.onnx.runtime import load_onnx

    return load_onnx(path)


def _ms_writer(kind: str) -> Callable[[Graph, QuantPlan, Path], Path]:
    def write(graph: Graph, plan: QuantPlan, path: Path) -> Path:
        from msqkd.exporters.device import lite_program
        from msqkd.exporters.ms.write import write_ms

        return write_ms(lite_program(graph, plan, kind=kind), path)

    return write


def _ms_check(kind: str) -> Callable[[Graph, QuantPlan], None]:
    def check(graph: Graph, plan: QuantPlan) -> None:
        from msqkd.exporters.device import lite_program
        from msqkd.exporters.ms.check import check_program

        check_program(lite_program(graph, plan, kind=kind))

    return check


def _load_ms(path: Path) -> Any:
    from msqkd.exporters.verify import load_ms

    return load_ms(path)


_FORMATS = (
    Format(
        LITE, "MINDIR", ".mindir", "for MindSpore Lite's converter: float weights with FakeQuantParam markers",
        ("lite_arm",), _write_lite, _load_lite, single=True,
    ),
    Format(
        PORTABLE, "MINDIR_PORTABLE", ".mindir", "for any MindSpore: int8 weights and ordinary operations",
        ("lite_arm", "ascend"), _write_portable, _load_portable, float16=True, wide=True,
    ),
    Format(
        DIRECT, "MINDIR_DIRECT", ".mindir", "for MindSpore Lite's MindIR loader, without its converter: float weights "
        "and ordinary operations", ("lite_arm", "ascend"), _write_direct, _load_direct, wide=True, single=True,
    ),
    Format(
        MS, "MS", ".ms", "for MindSpore Lite on the device, without its converter: int8 throughout", ("lite_arm",),
        _ms_writer("int8"), _load_ms, check=_ms_check("int8"), single=True,
    ),
    Format(
        MS_WEIGHT, "MS_WEIGHT", ".ms", "for MindSpore Lite on the device: weights stored as int8, float computation",
        ("lite_arm",), _ms_writer("weight"), _load_ms, int8=False, check=_ms_check("weight"), single=True,
    ),
    Format(
        MS_FLOAT, "MS_FLOAT", ".ms", "for MindSpore Lite on the device: float32, for comparison", ("lite_arm",),
        _ms_writer("float"), _load_ms, int8=False, check=_ms_check("float"), single=True,
    ),
    Format(
        ASCEND, "MINDIR_ASCEND", ".mindir", "for Ascend NPUs: Quant and Dequant around int8 convolutions", ("ascend",),
        _write_ascend, float16=True, single=True,
    ),
    Format(
        ONNX, "ONNX", ".onnx", "for onnxruntime on x86 and ARM servers: QuantizeLinear and DequantizeLinear",
        ("lite_arm", "ascend"), _write_onnx, _load_onnx, check=_check_onnx, wide=True,
    ),
)  # fmt: skip

FORMATS: Mapping[str, Format] = {item.name: item for item in _FORMATS}
"""Every kind of file, by the name recipes use."""

_BY_ANY_NAME = {name: item for item in _FORMATS for name in (item.alias, item.name)}


def export(
    graph: Graph,
    plan: QuantPlan,
    file_name: PathLike,
    file_format: str = "MINDIR",
    example_shapes: Optional[Sequence[tuple[int, ...]]] = None,
) -> Path:
    """Write a deployment graph with its plan; returns the file's path.

    Args:
        graph, plan: every range known.
        file_name: with or without the format's suffix.
        file_format: a name or alias in FORMATS.
        example_shapes: the shape of a sample or batch of each input, checked against the network's inputs.

    Raises:
        ExportError: unknown format, one that is not for the plan's target, wrong input shape, or a file that cannot be
            written.
        PlanError: a range is missing.
    """
    found = _BY_ANY_NAME.get(file_format)
    if found is None:
        allowed = [item.alias for item in _FORMATS]
        raise ExportError(
            f"file_format '{file_format}' is unknown; allowed: {', '.join(allowed)}"
            f"{did_you_mean(file_format, _BY_ANY_NAME)}"
        )
    if plan.target not in found.targets:
        raise ExportError(
            f"file_format '{file_format}' is for target {' or '.join(found.targets)}; the plan is for {plan.target}"
        )
    check_precisions(found, plan)
    if example_shapes is not None:
        _check_shapes(graph, example_shapes)
    path = Path(file_name)
    path = path if path.suffix == found.suffix else path.with_name(path.name + found.suffix)
    return found.write(graph, plan, path)


def check_precisions(form: Format, plan: QuantPlan) -> None:
    """Refuse a format that cannot hold layers as a plan has them.

    Raises:
        ExportError: names the first.
    """
    half = plan.half_nodes()
    if half and not form.float16:
        raise ExportError(
            f"{half[0].name} ({half[0].op}) has precision '{half[0].precision}', which {form.name} does not hold; "
            f"allowed: {', '.join(name for name, item in FORMATS.items() if item.float16)}"
        )
    wide = plan.wide_inputs()
    if wide and not form.wide:
        raise ExportError(
            f"{wide[0].node} has inputs of {wide[0].bits} bits, which {form.name} does not hold; "
            f"allowed: {', '.join(name for name, item in FORMATS.items() if item.wide)}"
        )


def check_batch(form: Format, graph: Graph) -> None:
    """Refuse a format for batch 1 where the predictions of the network depend on the batch.

    Raises:
        ExportError: names the first layer that makes them depend on it.
    """
    found = batch_dependence(graph) if form.single else None
    if found is not None:
        node, how = found
        raise ExportError(
            f"{node.name} ({node.op}) {how}, and a file for batch 1 would not give the measured predictions; let the "
            "network compute every sample by itself (BatchNorm: leave use_batch_statistics at its default)"
        )


def _check_shapes(graph: Graph, shapes: Sequence[tuple[int, ...]]) -> None:
    if len(shapes) != len(graph.inputs):
        takes = ", ".join(graph.inputs)
        raise ExportError(f"{len(shapes)} example inputs are given; the network takes {len(graph.inputs)} ({takes})")
    for name, shape in zip(graph.inputs, shapes):
        sample = graph.shape(name)[1:]
        if tuple(shape) != sample and tuple(shape[1:]) != sample:
            place = "the example input" if len(shapes) == 1 else f"the example input '{name}'"
            raise ExportError(f"{place} has shape {tuple(shape)}; the network takes (N, {', '.join(map(str, sample))})")
