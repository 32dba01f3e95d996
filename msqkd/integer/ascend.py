"""What an Ascend NPU computes: float to int8, integer convolution, and back to float.

The operations are GE's ``AscendQuant``, ``Conv2D`` on int8 and ``AscendDequant``, named as MindSpore's primitives. The
arithmetic is read off their definitions; none of it was compared with a device.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from msqkd.errors import SimulationError, did_you_mean
from msqkd.integer.registry import ASCEND, Call, kernel

_ROUNDINGS = {"Round": np.rint, "Floor": np.floor, "Ceil": np.ceil, "Trunc": np.trunc}
_FLOATS = {"float32": np.float32, "float16": np.float16}
_LARGEST_PRODUCT = 128 * 128
_EXACT_IN_FLOAT32 = 2**24
_INT32 = np.iinfo(np.int32)
_COLUMNS = 1 << 24
"""How many elements the unfolded input of a convolution may have at a time; 64 MiB in float32."""


@kernel("Quant", kind=ASCEND)
def quant(call: Call) -> list[np.ndarray]:
    """float32 or float16 of any shape to int8: ``saturate(round(x · scale + offset))``.

    Attributes are those of MindSpore's ``Quant``: ``scale`` (the reciprocal of the step) and ``offset``, numbers;
    ``sqrt_mode`` (multiply by the scale twice); ``round_mode``, of which ``Round`` is half to even. Each operation
    rounds to float32.

    Raises:
        SimulationError: a value is NaN, or an attribute is not allowed.
    """
    x = call.inputs[0].data.astype(np.float32)
    scale = np.float32(call.attrs["scale"])
    rounded = _choice(call, "round_mode", _ROUNDINGS, "Round")
    with np.errstate(over="ignore", invalid="ignore"):
        steps = x * scale
        if call.attrs.get("sqrt_mode", False):
            steps *= scale
        steps = rounded(steps + np.float32(call.attrs["offset"]))
    if np.isnan(steps).any():
        raise SimulationError(f"{call.name}: {int(np.isnan(steps).sum())} of {steps.size} values are NaN")
    return [np.clip(steps, -128, 127).astype(np.int8)]


@kernel("Conv2D", kind=ASCEND)
def conv2d(call: Call) -> list[np.ndarray]:
    """Convolution of int8 (N, C, H, W) with int8 (O, C / group, kh, kw), plus int32 (O,) where there is a bias.

    Attributes are those of MindSpore's ``Conv2D``: ``stride`` and ``dilation`` (the last two numbers count),
    ``pad_list`` (top, bottom, left, right; zeros are padded) and ``group``. The result is exact int32 (N, O, H', W').

    Raises:
        SimulationError: a sum does not fit 32 bits.
    """
    x, weight = call.inputs[0].data, call.inputs[1].data
    top, bottom, left, right = call.attrs.get("pad_list", (0, 0, 0, 0))
    stride = tuple(call.attrs.get("stride", (1, 1)))[-2:]
    dilation = tuple(call.attrs.get("dilation", (1, 1)))[-2:]
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    windows = _windows(padded, weight.shape[2:], stride, dilation)
    group = int(call.attrs.get("group", 1))
    kernels = weight.reshape(group, weight.shape[0] // group, -1)
    total = np.empty((x.shape[0], weight.shape[0], *windows.shape[2:4]), np.int64)
    items = max(1, _COLUMNS // max(1, windows[:1].size))
    for start in range(0, x.shape[0], items):
        total[start : start + items] = _grouped_product(windows[start : start + items], kernels)
    return [_with_bias(call, total)]


@kernel("Dense", kind=ASCEND)
def dense(call: Call) -> list[np.ndarray]:
    """Product of int8 (N, K) and the transpose of int8 (O, K), plus int32 (O,) where there is a bias: int32 (N, O).

    The 1×1 convolution as which a dense layer is written gives the same.

    Raises:
        SimulationError: a sum does not fit 32 bits.
    """
    x, weight = call.inputs[0].data, call.inputs[1].data
    return [_with_bias(call, _product(x, weight.T))]


@kernel("Dequant", kind=ASCEND)
def dequant(call: Call) -> list[np.ndarray]:
    """int32 (N, C, ...) times one scale, or one a channel: ``float32(x) · deq_scale`` in float32, then ReLU.

    The second input is uint64, (1,) or (C,): the lower 32 bits are those of a float32, the upper ones 0. Attributes
    are those of MindSpore's ``Dequant``: ``sqrt_mode`` (multiply by the scale twice), ``relu_flag``, and ``dtype``,
    ``float32`` or ``float16``, to which the result is rounded.

    Raises:
        SimulationError: a scale has upper bits, or an attribute is not allowed.
    """
    x, packed = call.inputs[0].data, call.inputs[1].data
    if (packed >> np.uint64(32)).any():
        raise SimulationError(f"{call.name}: deq_scale has bits above the lower 32; allowed is a float32 there alone")
    dtype = _choice(call, "dtype", _FLOATS, "float16")
    scale = unpack_scale(packed).reshape(-1, *(1,) * (x.ndim - 2))
    with np.errstate(over="ignore", under="ignore"):
        y = x.astype(np.float32) * scale
        if call.attrs.get("sqrt_mode", False):
            y *= scale
        if call.attrs.get("relu_flag", False):
            y = np.maximum(y, np.float32(0))
        return [y.astype(dtype)]


def pack_scale(scale: np.ndarray) -> np.ndarray:
    """float32 scales as ``Dequant`` takes them: their bits in the lower half of uint64, shaped like `scale`."""
    return np.ascontiguousarray(scale, np.float32).view(np.uint32).astype(np.uint64)


def unpack_scale(packed: np.ndarray) -> np.ndarray:
    """The float32 scales in the lower halves of uint64, shaped like `packed`."""
    return packed.astype(np.uint32).view(np.float32)


def _choice(call: Call, name: str, allowed: dict[str, Any], default: str) -> Any:
    found = str(call.attrs.get(name, default))
    if found not in allowed:
        raise SimulationError(
            f"{call.name}: {name} is '{found}'; allowed: {', '.join(allowed)}{did_you_mean(found, allowed)}"
        )
    return allowed[found]


def _windows(
    x: np.ndarray, kernel_size: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> np.ndarray:
    """A view (N, C, H', W', kh, kw) of the padded (N, C, H, W)."""
    for axis, (size, step) in enumerate(zip(kernel_size, dilation), start=2):
        x = np.lib.stride_tricks.sliding_window_view(x, (size - 1) * step + 1, axis=axis)
    return x[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]


def _grouped_product(windows: np.ndarray, kernels: np.ndarray) -> np.ndarray:
    """Windows (N, C, H', W', kh, kw) times kernels (G, O / G, K), exact: (N, O, H', W')."""
    n, _, height, width = windows.shape[:4]
    group, _, depth = kernels.shape
    columns = windows.transpose(0, 1, 4, 5, 2, 3).reshape(n, group, depth, height * width)
    return _product(kernels, columns).reshape(n, -1, height, width)


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The matrix product of int8 arrays (batched as by ``@``), exact.

    Floating point is exact as long as no partial sum leaves its significand, and BLAS is far faster than integers.
    """
    fits = a.shape[-1] * _LARGEST_PRODUCT <= _EXACT_IN_FLOAT32
    dtype = np.float32 if fits else np.float64
    return np.asarray(a.astype(dtype) @ b.astype(dtype))


def _with_bias(call: Call, total: np.ndarray) -> np.ndarray:
    """Exact sums (N, O, ...) and the int32 bias (O,), the third input where there is one, as int32."""
    exact = total.astype(np.int64)
    if len(call.inputs) > 2:
        exact += call.inputs[2].data.astype(np.int64).reshape(-1, *(1,) * (total.ndim - 2))
    if exact.size and (exact.max() > _INT32.max or exact.min() < _INT32.min):
        raise SimulationError(f"{call.name}: a sum of {np.abs(exact).max()} does not fit 32 bits")
    return exact.astype(np.int32)
