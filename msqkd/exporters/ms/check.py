"""What a program must be before it is a file MindSpore Lite loads and computes as meant.

Three kinds of rule: the structure of any program (here), what the runtime refuses (`rules`) and what it takes but
computes wrongly (`defects`).
"""

from __future__ import annotations

import numpy as np

from msqkd.errors import ExportError, did_you_mean
from msqkd.exporters import WAY_OUT
from msqkd.exporters.ms import layout
from msqkd.exporters.ms.defects import check_defects
from msqkd.exporters.ms.place import Place, title
from msqkd.exporters.ms.rules import check_rules
from msqkd.integer.program import ISLAND, Program, Step, Tensor


def check_program(program: Program, defects: bool = True) -> None:
    """Refuse a program the runtime would refuse, and one it would compute wrongly.

    Args:
        program: with every tensor known.
        defects: whether to refuse what the runtime takes but computes wrongly, on x86 or on arm64, too.

    Raises:
        ExportError: names the layer (or the step, or the tensor), what was found and what is allowed.
    """
    check_structure(program)
    for step in program.steps:
        place = Place(program, step)
        check_rules(place)
        if defects:
            check_defects(place)


def check_structure(program: Program) -> None:
    """Refuse what is not a program: names, order, shapes, attributes and parameters that do not fit together.

    Raises:
        ExportError: as `check_program`.
    """
    for name in ("inputs", "outputs", "steps"):
        if not getattr(program, name):
            raise ExportError(f"the program {program.name!r} has no {name}")
    for step in program.steps:
        _check_known(step)
    for key, tensor in program.tensors.items():
        if key != tensor.name or not key:
            raise ExportError(f"the tensor {tensor.name!r} is registered as {key!r}; allowed is its own name")
        _check_tensor(tensor)
    _check_order(program)
    names: set[str] = set()
    for step in program.steps:
        if not step.name or step.name in names:
            raise ExportError(f"{title(step)}: its name {step.name!r} is empty or used twice")
        names.add(step.name)
        _check_attributes(step)


def _check_tensor(tensor: Tensor) -> None:
    where = f"tensor {tensor.name!r}"
    if tensor.dtype not in layout.DATA_TYPES:
        raise ExportError(f"{where} has dtype {tensor.dtype}; allowed: {', '.join(layout.DATA_TYPES)}; {WAY_OUT}")
    if len(tensor.shape) > layout.MAX_RANK:
        raise ExportError(f"{where} has {len(tensor.shape)} dimensions; allowed are {layout.MAX_RANK}")
    if any(not 0 <= size < 2**31 for size in tensor.shape):
        raise ExportError(f"{where} has shape {tensor.shape}; allowed are sizes from 0 to {2**31 - 1}")
    if tensor.data is not None and (tensor.data.shape != tuple(tensor.shape) or tensor.data.dtype != tensor.dtype):
        raise ExportError(
            f"{where} is {tensor.dtype}{tuple(tensor.shape)} and its values are "
            f"{tensor.data.dtype}{tensor.data.shape}; they have to agree"
        )
    if tensor.dtype == "int8":
        _check_quant(tensor, where)


def _check_quant(tensor: Tensor, where: str) -> None:
    found = tensor.quant
    if found is None:
        raise ExportError(f"{where} is int8 and has no quantisation parameters")
    if found.scale.ndim != 1 or not found.scale.size or found.scale.shape != found.zero_point.shape:
        raise ExportError(
            f"{where} has scales of shape {found.scale.shape} and zero points of shape {found.zero_point.shape}; "
            "allowed are two lists of the same length"
        )
    with np.errstate(over="ignore", under="ignore"):
        single = found.scale.astype(np.float32)
    if not (np.isfinite(single) & (single > 0)).all():
        raise ExportError(f"{where} has a scale that is not a positive float32")
    if (np.abs(found.zero_point + 0.5) > 128).any():
        raise ExportError(f"{where} has a zero point outside -128 to 127")
    if found.per_channel and tensor.data is None:
        raise ExportError(f"{where} has {found.scale.size} scales; the runtime takes one for what is computed")


def _check_order(program: Program) -> None:
    tensors = program.tensors
    ready = {name for name, tensor in tensors.items() if tensor.data is not None}
    for name in program.inputs:
        if name not in tensors or name in ready:
            raise ExportError(f"the input {name!r} of the program is unknown, a constant, or named twice")
        ready.add(name)
    computed: set[str] = set()
    for step in program.steps:
        for name in step.inputs:
            if name not in tensors:
                raise ExportError(f"{title(step)}: its input {name!r} is not a tensor of the program")
            if name not in ready:
                raise ExportError(f"{title(step)}: it reads {name!r} before it is computed")
        for name in step.outputs:
            if name not in tensors or name in ready:
                raise ExportError(
                    f"{title(step)}: its output {name!r} is unknown, an input or constant, or computed twice"
                )
            ready.add(name)
            computed.add(name)
    if len(set(program.outputs)) < len(program.outputs):
        twice = next(name for name in program.outputs if program.outputs.count(name) > 1)
        raise ExportError(f"the output {twice!r} of the program is named twice; allowed: tensors that differ")
    for name in program.outputs:
        if name not in computed:
            raise ExportError(f"the output {name!r} of the program is computed by no step")


def _check_known(step: Step) -> None:
    if step.op == ISLAND:
        ops = ", ".join(dict.fromkeys(node.op for node in step.attrs["graph"].nodes))
        raise ExportError(
            f"{title(step)}: {ops} cannot be written as .ms; docs/formats.md lists what can be; {WAY_OUT}"
        )
    if step.op not in layout.TAGS:
        raise ExportError(f"{title(step)}: {step.op} is no primitive of a .ms file{did_you_mean(step.op, layout.TAGS)}")
    if not step.inputs or not step.outputs:
        raise ExportError(f"{title(step)}: it has {len(step.inputs)} inputs and {len(step.outputs)} outputs")


def _check_attributes(step: Step) -> None:
    try:
        layout.clean_attrs(step.op, step.attrs)
    except ValueError as error:
        raise ExportError(f"{title(step)}: {error}") from None
