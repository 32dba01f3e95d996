"""What MindSpore Lite's int8 kernels can compute, in numbers: one list for all who ask.

Placement keeps an operation float where the list has an objection, or writes it in a form that has none; the writer of
``.ms`` files and the simulator refuse it. Each function takes the geometry or the parameters of one operation, and
returns why the runtime cannot compute it, as a clause; None where it can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Optional

Pair = tuple[int, int]

AVERAGE_WINDOW = 128
"""The largest window of an average pool whose int8 values sum up in int16 without an overflow."""

SOFTMAX_ROW = 511
"""The most values along the axis of a softmax whose sum is defined."""

MEAN_PLANE = 2**16
"""The most elements of a mean that is written as a depthwise convolution."""

PAD_RANK = 4
"""The least dimensions of what PadFusion takes in int8."""


@dataclass(frozen=True)
class Windows:
    """The windows of a convolution or pool; pairs are (height, width).

    Attributes:
        kernel, strides, dilations: of the windows.
        pads: rows above and below, columns left and right.
        plane: extents of the input.
        output: extents of the result.
    """

    kernel: Pair
    strides: Pair
    dilations: Pair
    pads: tuple[int, int, int, int]
    plane: Pair
    output: Pair

    def padded_same(self) -> Windows:
        """With the padding of the mode SAME, an odd element at the end."""
        pads: list[int] = []
        for axis in (0, 1):
            reach = (self.kernel[axis] - 1) * self.dilations[axis] + 1
            count = -(-self.plane[axis] // self.strides[axis])
            total = max((count - 1) * self.strides[axis] + reach - self.plane[axis], 0)
            pads += [total // 2, total - total // 2]
        return replace(self, pads=tuple(pads))  # type: ignore[arg-type]

    def taps(self, axis: int) -> Pair:
        """The first and the last tap along `axis` that ever reads the input; (0, kernel - 1) where none does."""
        read = [
            tap
            for tap in range(self.kernel[axis])
            for place in range(self.output[axis])
            if 0 <= place * self.strides[axis] - self.pads[2 * axis] + tap * self.dilations[axis] < self.plane[axis]
        ]
        return (min(read), max(read)) if read else (0, self.kernel[axis] - 1)

    def trimmed(self) -> Windows:
        """The windows without the rows and columns of taps at their ends that read nothing but padding."""
        (top, bottom), (left, right) = self.taps(0), self.taps(1)
        rows, columns = self.kernel
        down, across = self.dilations
        cut = (top * down, (rows - 1 - bottom) * down, left * across, (columns - 1 - right) * across)
        pads = tuple(pad - gone for pad, gone in zip(self.pads, cut))
        if min(pads) < 0:
            return self
        return replace(self, kernel=(bottom - top + 1, right - left + 1), pads=pads)  # type: ignore[arg-type]

    def pads_beyond_input(self) -> bool:
        """Whether one side is padded by more than the input has rows or columns."""
        return max(self.pads[:2]) > self.plane[0] or max(self.pads[2:]) > self.plane[1]


def is_depthwise(channels: int, outs: int, group: int) -> bool:
    """Whether the runtime takes its depthwise kernel."""
    return group == channels == outs and group > 1


def convolution(
    windows: Windows, channels: int, outs: int, group: int, per_channel: bool, arm64: bool = True
) -> Optional[str]:
    """Of an int8 convolution with one weight scale, or one an output channel (`per_channel`), on `arm64` or not."""
    if is_depthwise(channels, outs, group):
        if windows.dilations[0] != windows.dilations[1]:
            # conv_depthwise_int8.c steps over the rows by the dilation of the columns.
            return (
                f"the runtime reads the wrong rows for a depthwise convolution dilated by {windows.dilations}; "
                "allowed: equal dilations"
            )
        if arm64 and windows.pads_beyond_input():
            return (
                f"the runtime crashes on arm64 for a depthwise convolution that pads {windows.plane} by "
                f"{windows.pads}; allowed: on each side as much as the input has"
            )
        return None
    if group > 1 and per_channel:
        return (
            f"its weight has a scale for each channel and {group} groups; the runtime refuses one weight scale a "
            "channel in a grouped convolution that is not depthwise: quantise the weight per tensor"
        )
    top, bottom, left, right = windows.pads
    if windows.kernel == (1, 1) == windows.strides and not (top or left) and (bottom or right):
        # convolution_1x1_int8.cc takes such an input for one without padding.
        return "the runtime reads beyond the input of a 1x1 convolution padded only at the end; allowed: no padding"
    return None


def average(windows: Windows) -> Optional[str]:
    """Of an average pool over the elements of each window that lie in the plane, in float too."""
    for axis in (0, 1):
        last = (windows.output[axis] - 1) * windows.strides[axis] - windows.pads[2 * axis]
        if windows.pads[2 * axis] >= windows.kernel[axis] or last >= windows.plane[axis]:
            return "a window of the average pool lies in the padding alone; allowed: windows that reach the input"
    return None


def pad(rank: int) -> Optional[str]:
    """Of an int8 PadFusion of so many dimensions."""
    if rank >= PAD_RANK:
        return None
    return f"the runtime writes beyond its buffers where it pads {rank} dimensions in int8; allowed: {PAD_RANK} or more"


def transposed_convolution(outs: int, output: Sequence[int]) -> Optional[str]:
    """Of a float transposed convolution with so many output channels and a result of (height, width)."""
    if outs > 1 or prod(output) < 64 * 64:
        return None
    return (
        f"the runtime's transposed convolution with one output channel is wrong for {tuple(output)} on x86; allowed: "
        "less than 64×64 positions, or several channels"
    )


def maximum(rank: int, axes: Sequence[int]) -> Optional[str]:
    """Of a float maximum over `axes` (counted from 0) of a tensor of `rank` dimensions."""
    if list(axes) == [rank - 1]:
        return None
    return (
        f"the runtime's maximum over the axes {list(axes)} of {rank} dimensions begins with the smallest positive "
        "number, and gives that where all values are negative; allowed: the last axis, or the negative of a minimum"
    )


def relu6(scale: float, zero_point: int) -> Optional[str]:
    """Of a ReLU6 whose output has these parameters."""
    if 6 / scale + zero_point < 2**31:
        return None
    return (
        f"6 has the integer {6 / scale + zero_point:.3g} at the scale {scale:.3g} of its output, which leaves 32 bits; "
        "allowed: a scale above 2.8e-09, or ReLU"
    )
