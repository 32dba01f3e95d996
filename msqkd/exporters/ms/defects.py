"""What the runtime takes in int8 and computes wrongly, on x86, on arm64, or with several threads.

Each defect was recorded on the 2.7 runtime; the simulator reproduces it, and a file that is to be deployed avoids it:
another form of the same computation, or float.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Callable

import numpy as np

from msqkd.exporters.ms.place import Place, listed, quant, same_quant, scale
from msqkd.exporters.ms.rules import NEAREST, hold
from msqkd.integer.program import ActivationType, PadMode, ReduceMode
from msqkd.targets import limits

_MEAN_STRIDE = 16
"""The arm64 kernel of a mean over a plane takes this many values at a time and reads past the end otherwise."""


def check_defects(place: Place) -> None:
    """Refuse an int8 step the runtime would compute wrongly.

    Raises:
        ExportError: names the layer, what the runtime would do and what is allowed.
    """
    if place.quantized and place.op in _DEFECTS:
        _DEFECTS[place.op](place)


def _conv(place: Place) -> None:
    _valid_padding(place, "pad_list")
    padded = place.attr("pad_mode") == PadMode.PAD and any(place.numbers("pad_list"))
    if padded and place.numbers("kernel_size") == (1, 1):
        place.refuse("the runtime pads a 1×1 convolution with the integer 0 instead of the zero point; pad before it")


def _valid_padding(place: Place, name: str) -> None:
    if place.attr("pad_mode") == PadMode.VALID and any(place.numbers(name)):
        place.refuse(f"{name} is {list(place.numbers(name))}, and the runtime pads by it even in VALID; allowed: zeros")


def _ignored_activation(place: Place) -> None:
    if place.attr("activation_type") != ActivationType.NONE:
        place.refuse("the runtime ignores its activation; allowed is NONE, with a step of its own for the activation")


def _pool(place: Place) -> None:
    _valid_padding(place, "pad")
    _ignored_activation(place)
    if not same_quant(place.inputs[0], place.output):
        place.refuse("with different parameters before and after it, the result wraps; allowed are the same parameters")


def _average_pool(place: Place) -> None:
    _pool(place)
    window = place.inputs[0].shape[1:3] if place.attr("global") else place.numbers("kernel_size")
    if math.prod(window) > limits.AVERAGE_WINDOW:
        place.refuse(
            f"the sum of its window {listed(window)} overflows; allowed are windows of {limits.AVERAGE_WINDOW} values"
        )


def _activation(place: Place) -> None:
    kind = place.attr("activation_type")
    if kind == ActivationType.RELU:
        place.refuse("a RELU of its own loses the last bit and wraps on arm64; fuse it, or compute it in float")
    if kind == ActivationType.SIGMOID:
        place.refuse("SIGMOID gives 0 for the largest input; compute it in float")
    if kind == ActivationType.LEAKY_RELU:
        place.refuse("LEAKY_RELU scales the stored integers, zero point included; compute it in float")
    top = math.floor(6 / scale(place.output) + 0.5) + int(quant(place.output).zero_point[0])
    if kind == ActivationType.RELU6 and top > 127:
        place.refuse("a RELU6 of its own wraps where its output ends below 6; fuse it, or compute it in float")


def _reduce(place: Place) -> None:
    """The mean over the plane of a 4-D input, its axes given as 1 and 2, has a kernel of its own."""
    shape = place.inputs[0].shape
    fast = len(shape) == 4 and set(place.constant(1).tolist()) == {1, 2} and place.attr("mode") == ReduceMode.MEAN
    if not fast:
        return
    if shape[1] * shape[2] % _MEAN_STRIDE:
        place.refuse(
            f"the mean over {shape[1]}×{shape[2]} positions is wrong on arm64, where their number has to be a multiple "
            f"of {_MEAN_STRIDE}; use an average pool or a depthwise convolution"
        )
    if shape[0] > 1 and shape[3] % 4:
        place.refuse(
            f"for a batch of {shape[0]} the mean over a plane reads wrong values unless the channels ({shape[3]}) are "
            "a multiple of 4; use batch 1 or an average pool"
        )


def _add(place: Place) -> None:
    out = place.output.shape
    for tensor in place.inputs:
        if math.prod(tensor.shape) != 1 and not _repeats_whole(tensor.shape, out):
            place.refuse(
                f"{tensor.name!r} of shape {listed(tensor.shape)} is repeated wrongly over {listed(out)}: the runtime "
                "reads the first of its rows only; use batch 1, or float"
            )


def _repeats_whole(shape: Sequence[int], out: Sequence[int]) -> bool:
    """Whether repeating the whole operand gives the output: its dimensions are 1 up to a point, then the output's."""
    padded = [1] * (len(out) - len(shape)) + list(shape)
    start = next((i for i, size in enumerate(padded) if size != 1), len(padded))
    return padded[start:] == list(out[start:])


def _mul(place: Place) -> None:
    _ignored_activation(place)
    out = place.output.shape
    vector = (out[0], 1, 1, out[-1])
    if len(out) == 4 and out[0] > 1 and tuple(out) != vector and any(tuple(t.shape) == vector for t in place.inputs):
        place.refuse(
            f"an operand of shape {listed(vector)} is repeated wrongly over {listed(out)}: the runtime reads the first "
            "of its rows only; use batch 1, or float"
        )


def _div(place: Place) -> None:
    place.refuse("an int8 division leaves values unwritten when several threads run it; compute it in float")


def _softmax(place: Place) -> None:
    found = quant(place.output)
    if found.scale.tolist() != [1 / 256] or found.zero_point.tolist() != [-128]:
        place.refuse(
            f"its output has scale {found.scale[0]:.6g} and zero point {found.zero_point[0]}; whatever is stated, the "
            "runtime gives 1/256 and -128"
        )


def _move(place: Place) -> None:
    if not same_quant(place.inputs[0], place.output):
        place.refuse("it copies values as they are; allowed are the same parameters before and after it")


def _pad(place: Place) -> None:
    hold(place, limits.pad(len(place.inputs[0].shape)))


def _resize(place: Place) -> None:
    if place.attr("coordinate_transform_mode") not in (0, 1):
        place.refuse("the runtime ignores half-pixel coordinates in int8; allowed: asymmetric (0), aligned corners (1)")
    _move(place)
    if place.attr("method") != NEAREST and np.any(quant(place.inputs[0]).zero_point):
        place.refuse(
            "linear interpolation is rounded towards zero, and differently on each machine, unless the zero point "
            "is 0; compute it in float"
        )


_DEFECTS: dict[str, Callable[[Place], None]] = {
    "Conv2DFusion": _conv,
    "MaxPoolFusion": _pool,
    "AvgPoolFusion": _average_pool,
    "Activation": _activation,
    "ReduceFusion": _reduce,
    "AddFusion": _add,
    "SubFusion": _ignored_activation,
    "MulFusion": _mul,
    "DivFusion": _div,
    "Softmax": _softmax,
    "PadFusion": _pad,
    "Transpose": _move,
    "Squeeze": _move,
    "Unsqueeze": _move,
    "ExpandDims": _move,
    "SliceFusion": _move,
    "StridedSlice": _move,
    "Gather": _move,
    "Resize": _resize,
}
