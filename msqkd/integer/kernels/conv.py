"""Convolution in int8: the kernel of Conv2DFusion, with the runtime's choices for 1×1, depthwise and grouped ones.

The output is computed a chunk at a time, so that what lies in between stays in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Callable, Optional

import numpy as np
from numpy.lib.stride_tricks import as_strided

from msqkd.errors import SimulationError
from msqkd.integer.kernels.matmul import (
    EXACT_FLOAT32,
    EXACT_INT32,
    Accumulator,
    integer_bias,
    largest_distance,
    requantiser,
    weight_quant,
    wrap_int32,
)
from msqkd.integer.kernels.parameters import input_params
from msqkd.integer.program import PadMode
from msqkd.integer.registry import ARM64, Call, kernel
from msqkd.targets import limits

_CHUNK_BYTES = 1 << 20
_Pair = tuple[int, int]
Sums = Callable[[np.ndarray], np.ndarray]  # float32 (N, H, W, I), padding included, to integers (N, H', W', O)


@dataclass(frozen=True)
class Window:
    """Where a convolution reads and writes; every pair is (height, width), in elements.

    Attributes:
        kernel, stride, dilation: of the windows.
        before, after: padding at the top and left, and at the bottom and right.
        plane, output: extents of the input and the output.
    """

    kernel: _Pair
    stride: _Pair
    dilation: _Pair
    before: _Pair
    after: _Pair
    plane: _Pair
    output: _Pair

    def numbers(self) -> limits.Windows:
        """The same as the list of limits takes it."""
        pads = (self.before[0], self.after[0], self.before[1], self.after[1])
        return limits.Windows(self.kernel, self.stride, self.dilation, pads, self.plane, self.output)

    def span(self, axis: int, count: int) -> int:
        """How much of the padded input `count` consecutive windows cover."""
        return (count - 1) * self.stride[axis] + (self.kernel[axis] - 1) * self.dilation[axis] + 1


def conv_window(call: Call, plane: _Pair, kernel_size: _Pair) -> Window:
    """The windows of a convolution over an input of extents `plane`.

    SAME ignores ``pad_list`` and puts an odd element at the end; VALID pads by it like PAD, as the runtime does.

    Raises:
        SimulationError: the attributes contradict the weight, or leave no output.
    """
    given = _numbers(call, "kernel_size", *kernel_size)
    if given != [*kernel_size]:
        raise SimulationError(f"{call.name}: kernel_size is {given}; allowed: {[*kernel_size]}, as the weight has it")
    stride, dilation = _pair(_numbers(call, "stride", 1, 1)), _pair(_numbers(call, "dilation", 1, 1))
    reach = [(size - 1) * step + 1 for size, step in zip(kernel_size, dilation)]
    if int(call.attrs.get("pad_mode", PadMode.PAD)) == PadMode.SAME:
        total = [max(0, (-(-n // s) - 1) * s + r - n) for n, s, r in zip(plane, stride, reach)]
        up, left = (t // 2 for t in total)
        down, right = total[0] - up, total[1] - left
    else:
        up, down, left, right = _numbers(call, "pad_list", 0, 0, 0, 0)
    padded = plane[0] + up + down, plane[1] + left + right
    output = (padded[0] - reach[0]) // stride[0] + 1, (padded[1] - reach[1]) // stride[1] + 1
    if min(output) < 1:
        raise SimulationError(f"{call.name}: a window of {tuple(reach)} does not fit the padded input, {padded}")
    return Window(kernel_size, stride, dilation, (up, left), (down, right), plane, output)


def _numbers(call: Call, name: str, *default: int) -> list[int]:
    found = [int(number) for number in call.attrs.get(name) or default]
    if len(found) != len(default):
        raise SimulationError(f"{call.name}: {name} is {found}; allowed: {len(default)} numbers")
    return found


def _pair(numbers: list[int]) -> _Pair:
    height, width = numbers
    return height, width


@kernel("Conv2DFusion")
def conv2d(call: Call) -> list[np.ndarray]:
    """2-D convolution of int8 (N, H, W, I) with a weight (O, KH, KW, I / group) and an int32 bias of O.

    Where the runtime departs from the definition so does this: a 1×1 convolution that is not depthwise pads with the
    int8 value 0 in place of the zero point, and on arm64 some depthwise results round otherwise (`_rounds_up`).

    Raises:
        SimulationError: what the runtime refuses (parameters per channel of the input or output, or of the weight of
            a grouped convolution that is not depthwise; an activation it cannot fuse; operands that do not fit), and
            what it computes from memory it should not read.
    """
    x, w = call.inputs[0].data, call.inputs[1].data
    channels, group = w.shape[0], convolution_group(call)
    place = conv_window(call, (x.shape[1], x.shape[2]), (w.shape[1], w.shape[2]))
    depthwise = limits.is_depthwise(x.shape[3], channels, group)
    quant, (_, x_zero) = weight_quant(call, channels), input_params(call)
    on_arm64 = call.machine == ARM64
    objection = limits.convolution(place.numbers(), x.shape[3], channels, group, quant.per_channel, on_arm64)
    if objection:
        raise SimulationError(f"{call.name}: {objection}")
    padding = -x_zero if place.kernel == (1, 1) and not depthwise else 0
    peak = max(largest_distance(x, x_zero), abs(padding))
    weight = w.astype(np.int16) - quant.zero_point.astype(np.int16).reshape(-1, 1, 1, 1)
    bias = integer_bias(call, channels)
    sums: Sums
    if depthwise:
        sums, elements = DepthwiseSums(place, weight, bias, peak), 4 * channels
    else:
        sums, elements = GroupedSums(place, weight, bias, peak, group), w[0].size + channels
    requantise = requantiser(call, quant)
    upwards = _rounds_up(place, channels) if depthwise and call.machine == ARM64 else None
    requantise_up = requantise if upwards is None else requantiser(call, quant, halves_up=True)
    out = np.empty((x.shape[0], *place.output, channels), np.int8)
    for images, rows in chunks(x.shape[0], place, elements):
        total = sums(padded_input(x[images], x_zero, place, rows, padding))
        out[images, rows] = requantise(total)
        if upwards is not None:
            np.copyto(out[images, rows], requantise_up(total), where=upwards[rows, :, None])
    return [out]


def convolution_group(call: Call) -> int:
    """The number of groups, as the shapes have it."""
    x, w = call.inputs[0].data, call.inputs[1].data
    group = x.shape[3] // w.shape[3]
    given = int(call.attrs.get("group", 0)) or group
    if x.shape[3] % w.shape[3] or w.shape[0] % max(group, 1) or given != group:
        raise SimulationError(
            f"{call.name}: a weight of {w.shape} does not fit an input of {x.shape[3]} channels and group {given}"
        )
    return group


def chunks(batch: int, place: Window, row_elements: int) -> Iterator[tuple[slice, slice]]:
    """Slices of the batch and of the output rows; `row_elements` is what one output element needs in float32."""
    rows, width = place.output
    row_bytes = 4 * row_elements * width
    images, step = max(1, _CHUNK_BYTES // (rows * row_bytes)), min(rows, max(1, _CHUNK_BYTES // row_bytes))
    for image in range(0, batch, images):
        for row in range(0, rows, step):
            yield slice(image, min(image + images, batch)), slice(row, min(row + step, rows))


def padded_input(x: np.ndarray, zero_point: int, place: Window, rows: slice, padding: int) -> np.ndarray:
    """``x − zero_point`` in float32 as far as the output rows read it, with the value `padding` around it."""
    (up, left), (height, width) = place.before, place.plane
    top = rows.start * place.stride[0] - up  # of the first window, in rows of x
    count = place.span(0, rows.stop - rows.start)
    shape = (x.shape[0], count, place.span(1, place.output[1]), x.shape[3])
    first, last, right = max(top, 0), min(top + count, height), min(width, shape[2] - left)
    if (first, last) == (top, top + count) and (left, right) == (0, shape[2]):
        return np.subtract(x[:, first:last, :right], np.float32(zero_point), dtype=np.float32)
    out = np.full(shape, padding, np.float32)
    if first < last and right > 0:
        inner = out[:, first - top : last - top, left : left + right]
        np.subtract(x[:, first:last, :right], np.float32(zero_point), out=inner)
    return out


class GroupedSums:
    """Sums by one matrix product a group, over windows laid out as rows."""

    def __init__(self, place: Window, weight: np.ndarray, bias: np.ndarray, peak: int, group: int) -> None:
        self._place, self._depth = place, weight.shape[3]
        matrix = weight.reshape(len(weight), -1).T
        size = len(weight) // group
        parts = [slice(first, first + size) for first in range(0, len(weight), size)]
        self._accumulators = [Accumulator(matrix[:, part], bias[part], peak) for part in parts]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The sums (n, height, width, O) of padded input (n, rows, columns, I) less its zero point."""
        windows = self._windows(x)
        sums = []
        for number, accumulate in enumerate(self._accumulators):
            first = number * self._depth
            sums.append(accumulate(_as_rows(windows[..., first : first + self._depth])))
        total = sums[0] if len(sums) == 1 else np.concatenate(sums, axis=-1)
        return total.reshape(*windows.shape[:3], -1)

    def _windows(self, x: np.ndarray) -> np.ndarray:
        """A view of `x` of shape (N, H', W', KH, KW, I)."""
        place, (images, high, _, channels) = self._place, x.shape
        rows = (high - place.span(0, 1)) // place.stride[0] + 1
        shape = (images, rows, place.output[1], *place.kernel, channels)
        item, row, column, channel = x.strides
        steps = (place.stride[0] * row, place.stride[1] * column, place.dilation[0] * row, place.dilation[1] * column)
        return as_strided(x, shape, (item, *steps, channel), writeable=False)


def _as_rows(windows: np.ndarray) -> np.ndarray:
    """Each window of (N, H', W', KH, KW, I) as a row of a matrix; no copy where they lie so already."""
    return windows.reshape(-1, int(np.prod(windows.shape[3:])))


class DepthwiseSums:
    """Sums of one channel each: a shifted product for every tap of the kernel."""

    def __init__(self, place: Window, weight: np.ndarray, bias: np.ndarray, peak: int) -> None:
        self._place = place
        bound = peak * int(np.abs(weight).sum(axis=(1, 2), dtype=np.int64).max()) + int(np.abs(bias).max())
        dtype = np.float32 if bound < EXACT_FLOAT32 else np.float64
        self._wraps = bound >= EXACT_INT32
        # Repeated over a row of the output, taps and input are walked in one long loop where the stride is 1.
        across = (place.output[1], len(weight))
        taps = weight[..., 0].transpose(1, 2, 0).astype(dtype)
        self._taps = {at: np.broadcast_to(taps[at], across).copy() for at in np.ndindex(place.kernel)}
        self._bias = np.broadcast_to(bias.astype(dtype), across).copy()

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The sums (n, height, width, O) of padded input (n, rows, columns, O) less its zero point."""
        place = self._place
        rows = (x.shape[1] - place.span(0, 1)) // place.stride[0] + 1
        total = np.empty((x.shape[0], rows, *self._bias.shape), self._bias.dtype)
        total[:] = self._bias
        product = np.empty_like(total)
        for (i, j), tap in self._taps.items():
            top, left = i * place.dilation[0], j * place.dilation[1]
            below, right = top + (rows - 1) * place.stride[0] + 1, left + (place.output[1] - 1) * place.stride[1] + 1
            np.multiply(x[:, top : below : place.stride[0], left : right : place.stride[1]], tap, out=product)
            np.add(total, product, out=total)
        return wrap_int32(total) if self._wraps else total


def _fixed_3x3(place: Window, channels: int) -> bool:
    """Whether arm64 takes its own kernel for a depthwise convolution (``CheckConvDwUse3X3``)."""
    pad = place.before[0]
    whole = tuple(place.span(axis, place.output[axis]) - 2 * pad for axis in (0, 1))
    return (
        place.kernel == (3, 3)
        and place.dilation == (1, 1)
        and place.stride in ((1, 1), (2, 2))
        and place.before in ((0, 0), (1, 1))
        and whole == place.plane
        and min(place.plane) > 1
        and channels % 8 == 0
    )


def _rounds_up(place: Window, channels: int) -> Optional[np.ndarray]:
    """Where arm64 rounds the halves of a depthwise convolution's last shift upwards, bool of the output's extents.

    The assembly (``ConvDw3x3Int8*.S``) corrects the shift's rounding of negative halves only with stride 1, off the
    border, and there not in the last one or two columns of each stretch it computes at once.
    """
    if not _fixed_3x3(place, channels):
        return None
    upwards = np.ones(place.output, bool)
    if place.stride == (2, 2):
        return upwards
    pad, stretch = place.before[0], 30
    start, end = pad, place.output[1] - pad
    if not (channels > 64 or (channels < 64 and place.plane[1] > 150)):
        stretch = max(end - start, 1)
    for first in range(start, end, stretch):
        count = min(stretch, end - first)
        upwards[pad : place.output[0] - pad, first : first + count - (2 - count % 2)] = False
    return upwards
