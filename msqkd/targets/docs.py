"""Writes docs/targets.md from the data: ``python -m msqkd.targets.docs > docs/targets.md``."""

from __future__ import annotations

from collections.abc import Iterator

from msqkd.targets import DEPTHWISE, FREE, RESCALED, SHARED, SHARED_ROUNDED, TARGETS, WEIGHTED, Int8Op, Target

_KINDS = {
    WEIGHTED: "a weight, an int32 bias, and an output with parameters of its own",
    FREE: "inputs and output have parameters of their own",
    SHARED: "the output has the input's parameters, nothing is rounded",
    RESCALED: "the output has the input's integers, and its scale times the number",
    SHARED_ROUNDED: "the output has the input's parameters and is rounded to them",
}

_INTRODUCTION = """\
# What each target computes in int8

Written from the data in `msqkd/targets/` by `python -m msqkd.targets.docs`. Operations that are not listed stay float;
`msqkd plan RECIPE` says so, for every operation of a network, before anything runs.
"""


def page() -> str:
    """The page, as Markdown."""
    lines = [_INTRODUCTION]
    for target in TARGETS.values():
        lines += _target(target)
    return "\n".join(lines)


def _target(target: Target) -> Iterator[str]:
    yield f"## {target.name}\n"
    yield f"{target.description}. Activations are {'symmetric' if target.act_symmetric else 'asymmetric'} by default.\n"
    yield _float16(target)
    yield "| operation | kernel | how | with |"
    yield "|---|---|---|---|"
    for op, support in target.ops.items():
        yield _row(op, support)
    if target.rescaling is not None:
        yield _row(f"{', '.join(target.rescaled)} with a positive number", target.rescaling)
    yield ""
    if target.float_reasons or target.float_defects:
        yield "Kept float on purpose:\n"
        yield "| operation | why |"
        yield "|---|---|"
        for op in dict.fromkeys([*target.float_reasons, *target.float_defects]):
            name = target.float_defects.get(op)
            parts = [target.float_reasons.get(op), target.defects[name].what if name else None]
            yield f"| {op} | {'; '.join(part for part in parts if part)} |"
        yield ""
    if target.defects:
        yield "What the runtime gets wrong or refuses, and what is done instead:\n"
        yield "| name | what | instead |"
        yield "|---|---|---|"
        for defect in target.defects.values():
            yield f"| {defect.name} | {defect.what} | {defect.instead} |"
        yield ""


def _float16(target: Target) -> str:
    if target.float16_layers:
        return "A layer can compute in float16 between others (`precision: float16`, `weight-only-float16`).\n"
    return f"No single layer can compute in float16: {target.float16_reason}.\n"


def _row(op: str, support: Int8Op) -> str:
    how = "only its inputs are int8, the result is float" if support.float_output else _KINDS[support.kind]
    if support.fixed_range is not None:
        how = f"the output has the range {support.fixed_range[0]:g} to {support.fixed_range[1]:g}"
    return f"| {op} | {support.kernel} | {how} | {'; '.join(_conditions(support))} |"


def _conditions(support: Int8Op) -> Iterator[str]:
    if support.activations:
        yield f"{' or '.join(support.activations)} in the same kernel"
    if support.operands:
        yield f"{support.operands} computed operands"
    if support.same_shape:
        yield "operands of one shape"
    if support.sample_broadcast:
        yield "operands of one shape, or (N, C, H, W) and (N, C, 1, 1)"
    if support.global_spatial:
        yield "over the whole height and width"
    if support.limited:
        yield "depthwise: equal dilations"
    if support.maps_only:
        yield "feature maps (N, C, H, W)"
    if support.follows:
        yield "only where its input is computed in int8"
    if support.joins:
        yield "only where a neighbour is int8"
    if support.max_row is not None:
        yield f"rows of at most {support.max_row} values"
    if support.asymmetric:
        yield "neither aligned corners nor half pixels"
    if support.per_tensor:
        yield "its factors as int8 with one scale"
    if support.form == DEPTHWISE:
        yield "written as a depthwise convolution"
    if support.max_rank is not None:
        yield f"input of at most {support.max_rank} dimensions"
    if support.large_window == DEPTHWISE:
        yield f"above {support.max_window} elements written as a depthwise convolution"


if __name__ == "__main__":
    print(page(), end="")
