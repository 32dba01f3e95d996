"""Max and average pooling of int8 NHWC planes, as ``nnacl/int8/pooling_int8.c`` computes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import DTypeLike

from msqkd.errors import SimulationError
from msqkd.integer.arithmetic import round_half_away
from msqkd.integer.kernels.parameters import input_params, output_params, plane_of, tabulated
from msqkd.integer.program import PadMode
from msqkd.integer.registry import ARM64, Call, kernel
from msqkd.targets import limits

_EPSILON = float(np.finfo(np.float32).eps)
_CEIL = 1  # RoundMode

Pair = tuple[int, int]


@dataclass(frozen=True)
class Windows:
    """The windows a kernel slides over a plane; every pair is (height, width).

    Attributes:
        kernel: extent of a window.
        strides: from one window to the next.
        before: padding above and to the left.
        output: how many windows there are.
    """

    kernel: Pair
    strides: Pair
    before: Pair
    output: Pair

    def numbers(self, plane: Pair) -> limits.Windows:
        """The same as the list of limits takes it; what is padded at the end follows from the number of windows."""
        pads = (self.before[0], 0, self.before[1], 0)
        return limits.Windows(self.kernel, self.strides, (1, 1), pads, plane, self.output)

    def counts(self, plane: Pair) -> np.ndarray:
        """How many elements of the plane each window covers, int64 of shape (output height, output width, 1)."""
        along = []
        for axis in (0, 1):
            start = np.arange(self.output[axis]) * self.strides[axis] - self.before[axis]
            along.append(np.minimum(self.kernel[axis], plane[axis] - start) - np.maximum(0, -start))
        rows, columns = (np.maximum(count, 0) for count in along)
        return (rows[:, None] * columns)[:, :, None]


def place_windows(
    plane: Pair, kernel: Pair, strides: Pair, pads: tuple[int, int, int, int], mode: int, ceil: bool = False
) -> Windows:
    """Where the runtime puts the windows (``nnacl/infer/pooling_infer.c``, ``conv2d_infer.c``).

    Args:
        plane: height and width of the input.
        kernel: extent of a window, dilation included.
        strides: from one window to the next.
        pads: up, down, left, right; SAME ignores them, VALID does not.
        mode: a `PadMode`.
        ceil: whether a last, partly covered window counts; SAME ignores it.
    """
    before, output = [], []
    for axis in (0, 1):
        size, extent, stride = plane[axis], kernel[axis], strides[axis]
        if mode == PadMode.SAME:
            count = -(-size // stride)
            first = max((count - 1) * stride + extent - size, 0) // 2
        else:
            first, last = pads[2 * axis], pads[2 * axis + 1]
            space = size + first + last - extent
            count = max((-(-space // stride) if ceil else space // stride) + 1, 1)
        before.append(first)
        output.append(count)
    return Windows(kernel, strides, cast(Pair, tuple(before)), cast(Pair, tuple(output)))


def pool_windows(call: Call) -> Windows:
    """The windows of a pooling step.

    Raises:
        SimulationError: the input is not of four dimensions, or a global pool is padded.
    """
    attrs, x = call.attrs, call.inputs[0].data
    if x.ndim != 4:
        raise SimulationError(f"{call.name}: a pool reads (N, H, W, C), found {x.ndim} dimensions")
    plane = plane_of(x)
    pads, mode = four(call, "pad"), attrs.get("pad_mode", PadMode.PAD)
    if attrs.get("global", False):
        if mode == PadMode.SAME or any(pads):
            raise SimulationError(f"{call.name}: a global pool is padded; allowed: no padding")
        return Windows(plane, plane, (0, 0), (1, 1))
    ceil = attrs.get("round_mode", 0) == _CEIL
    return place_windows(plane, pair(call, "kernel_size"), pair(call, "strides"), pads, mode, ceil)


def pair(call: Call, name: str, default: Sequence[int] = ()) -> Pair:
    """The attribute `name`: an extent along height and one along width, at least 1."""
    values = call.attrs.get(name) or default
    if len(values) != 2 or min(values) < 1:
        raise SimulationError(f"{call.name}: {name} is {list(values)}; allowed: two positive numbers")
    return int(values[0]), int(values[1])


def four(call: Call, name: str) -> tuple[int, int, int, int]:
    """The attribute `name`: the padding up, down, left and right; without it there is none."""
    values = call.attrs.get(name) or (0, 0, 0, 0)
    if len(values) != 4 or min(values) < 0:
        raise SimulationError(f"{call.name}: {name} is {list(values)}; allowed: four numbers not below 0")
    up, down, left, right = (int(value) for value in values)
    return up, down, left, right


def padded(x: np.ndarray, windows: Windows, fill: float) -> np.ndarray:
    """`x` (N, H, W, C) with `fill` around it, as far as the windows reach."""
    widths = [(0, 0)]
    for axis in (0, 1):
        reach = (windows.output[axis] - 1) * windows.strides[axis] + windows.kernel[axis]
        widths.append((windows.before[axis], max(reach - windows.before[axis] - x.shape[axis + 1], 0)))
    widths.append((0, 0))
    return np.pad(x, widths, constant_values=fill) if any(map(any, widths)) else x


def reduce_windows(x: np.ndarray, windows: Windows, combine: np.ufunc, fill: float, dtype: DTypeLike) -> np.ndarray:
    """`combine` the elements of every window, first along the rows, then along the columns.

    Args:
        x: (N, H, W, C).
        windows: where they are.
        combine: associative, such as ``np.maximum`` or ``np.add``.
        fill: stands for what lies outside the plane.
        dtype: of the result and of the arithmetic (integers wrap).

    Returns:
        (N, output height, output width, C) of `dtype`.
    """
    x = padded(x, windows, fill)
    for axis in (1, 0):
        stride, count = windows.strides[axis], windows.output[axis]
        part = [slice(None)] * 4
        result: np.ndarray = np.empty(0)
        for offset in range(windows.kernel[axis]):
            part[axis + 1] = slice(offset, offset + (count - 1) * stride + 1, stride)
            view = x[tuple(part)]
            result = combine(result, view, out=result) if offset else view.astype(dtype)
        x = result
    return x


@kernel("MaxPoolFusion")
def max_pool(call: Call) -> list[np.ndarray]:
    """Maximum of the windows; with other parameters at the output a rescaled maximum that wraps around int8.

    A fused activation is ignored, as by the runtime.
    """
    (scale_in, zero_in), (scale_out, zero_out) = input_params(call), output_params(call)
    result = reduce_windows(call.inputs[0].data, pool_windows(call), np.maximum, -128, np.int8)
    difference = abs(np.float32(scale_in) - np.float32(scale_out))
    if difference < _EPSILON and zero_in == zero_out:
        return [result]
    return [tabulated(result, lambda q: _rescaled(q, scale_in, zero_in, scale_out, zero_out))]


@kernel("AvgPoolFusion")
def average_pool(call: Call) -> list[np.ndarray]:
    """Average of the elements of each window that lie in the plane.

    It is rounded to a whole number in the scale of the input before it is rescaled. The sum is held in 16 bits: of
    more than 128 elements it may overflow. Out of range results wrap, but saturate on arm64 in the first
    ``C // 8 · 8`` channels. A fused activation is ignored, as by the runtime.

    Raises:
        SimulationError: a window covers nothing but padding.
    """
    x, windows = call.inputs[0].data, pool_windows(call)
    _refuse_empty(call, windows)
    count = windows.counts(plane_of(x))
    total = reduce_windows(x, windows, np.add, 0, np.int16)
    whole = x.shape[3] // 8 * 8
    average = np.concatenate([_eightfold(total[..., :whole], count), _remaining(total[..., whole:], count)], axis=-1)
    result = _rescaled(average, *input_params(call), *output_params(call))
    if call.machine == ARM64:
        result[..., :whole] = np.clip(result[..., :whole].astype(np.int16), -128, 127)
    return [result.astype(np.int8)]


def _refuse_empty(call: Call, windows: Windows) -> None:
    objection = limits.average(windows.numbers(plane_of(call.inputs[0].data)))
    if objection:
        raise SimulationError(f"{call.name}: {objection}")


def _eightfold(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Averages by integer division, halves upwards; `total` int16, also that of an overflow."""
    shifted = (total + 128 * count).astype(np.int16) + count // 2
    return np.sign(shifted) * (np.abs(shifted) // count) - 128


def _remaining(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Averages by float32 division."""
    return round_half_away(total.astype(np.float32) / count.astype(np.float32) + np.float32(128)).astype(np.int64) - 128


def _rescaled(q: np.ndarray, scale_in: float, zero_in: int, scale_out: float, zero_out: int) -> np.ndarray:
    """`q` in the output's parameters, int64, not yet brought into int8."""
    ratio = np.float64(np.float32(scale_in) / np.float32(scale_out))
    return round_half_away((q - zero_in) * ratio).astype(np.int64) + zero_out
