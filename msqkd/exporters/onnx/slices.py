"""StridedSlice, the form of every ``x[...]``: Slice, and Squeeze and Unsqueeze where axes vanish or appear."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Union

from msqkd.exporters.onnx.calls import Call
from msqkd.exporters.onnx.table import writes

FAR = 2**62
"""Beyond any size: ONNX clamps it to the end of the axis."""

Item = Union[int, str]


@dataclass
class _Cut:
    """What a StridedSlice does, axis by axis: pieces taken, axes that vanish, axes that appear (in the result)."""

    axes: list[int] = field(default_factory=list)
    starts: list[Item] = field(default_factory=list)
    ends: list[Item] = field(default_factory=list)
    steps: list[Item] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    added: list[int] = field(default_factory=list)

    def take(self, axis: int, start: Item, end: Item, step: int) -> None:
        self.axes.append(axis)
        self.starts.append(start)
        self.ends.append(end)
        self.steps.append(step)


@writes("StridedSlice")
def _strided_slice(call: Call) -> None:
    cut = _read(call)
    chain: list[tuple[str, list[str]]] = []
    if cut.axes:
        bounds = [call.sizes(cut.starts), call.sizes(cut.ends), call.constant(cut.axes), call.sizes(cut.steps)]
        chain.append(("Slice", bounds))
    if cut.dropped:
        chain.append(("Squeeze", [call.constant(cut.dropped)]))
    if cut.added:
        chain.append(("Unsqueeze", [call.constant(cut.added)]))
    *before, (op, operands) = chain or [("Identity", [])]
    x = call.tensor(0)
    for earlier, its_operands in before:
        x = call.step(earlier, x, *its_operands)
    call.emit(op, x, *operands)


def _read(call: Call) -> _Cut:
    """The masks name entries of begin, end and strides by their bits."""
    begin, end, strides = (call.elements(argument) for argument in (1, 2, 3))
    open_start, open_end, ellipsis, new_axis, single = (int(call.literal(argument)) for argument in (4, 5, 6, 7, 8))
    cut, axis, position = _Cut(), 0, 0  # the axis of the input and that of the result
    for index, (start, stop, step) in enumerate(zip(begin, end, strides)):
        bit = 1 << index
        if not isinstance(step, int):
            raise call.refusal("its strides are computed; allowed: literals")
        if ellipsis & bit:
            later = sum(not new_axis & (1 << i) for i in range(index + 1, len(begin)))
            skipped = len(call.shape(0)) - axis - later
            axis, position = axis + skipped, position + skipped
        elif new_axis & bit:
            cut.added.append(position)
            position += 1
        elif single & bit:
            if not isinstance(start, int):
                raise call.refusal("it takes a computed index; allowed: a literal")
            cut.take(axis, start, start + 1 or FAR, 1)
            cut.dropped.append(axis)
            axis += 1
        else:
            first = (0 if step > 0 else FAR) if open_start & bit else start
            last = (FAR if step > 0 else -FAR) if open_end & bit else stop
            if (first, last, step) != (0, FAR, 1):
                cut.take(axis, first, last, step)
            axis, position = axis + 1, position + 1
    return cut
