"""Normalisations of int8 tensors; inside they compute in float32."""

from __future__ import annotations

import numpy as np

from msqkd.errors import SimulationError
from msqkd.integer.arithmetic import fma_float32, round_half_away
from msqkd.integer.kernels.parameters import clip_int8, input_params, output_params
from msqkd.integer.registry import Call, kernel

_LAYER_NORM_EPSILON = 1e-5


def normalised_axes(call: Call) -> tuple[int, ...]:
    """The axes a LayerNormFusion step normalises over: those from ``begin_norm_axis`` on.

    Raises:
        SimulationError: the scale and the offset have another shape than those axes.
    """
    x = call.inputs[0].data
    first = int(call.attrs.get("begin_norm_axis", 0))
    first = first if first > 0 else first + x.ndim
    shape = x.shape[first:]
    for index in (1, 2):
        if index >= len(call.inputs) or call.inputs[index].data.size != np.prod(shape, dtype=int):
            found = call.inputs[index].data.shape if index < len(call.inputs) else "nothing"
            raise SimulationError(f"{call.name}: input {index} of a layer norm is {found}; allowed: shape {shape}")
    return tuple(range(first, x.ndim))


@kernel("LayerNormFusion")
def layer_norm(call: Call) -> list[np.ndarray]:
    """``nnacl/int8/layer_norm_int8.c``: the variance as E[x²] − E[x]², sums in float32 in the order of the elements.

    The scale is int8 with parameters; the offset is int32, in the product of the scales of input and scale.
    """
    axes = normalised_axes(call)
    x = call.inputs[0].data
    (scale_in, zero_in), (scale_gamma, zero_gamma) = input_params(call), input_params(call, 1)
    scale_out, zero_out = output_params(call)
    gamma = ((call.inputs[1].data.reshape(-1).astype(np.int64) - zero_gamma) * scale_gamma).astype(np.float32)
    beta = (call.inputs[2].data.reshape(-1) * scale_in * scale_gamma).astype(np.float32)
    rows = x.reshape(*x.shape[: axes[0]], -1)
    real = ((rows.astype(np.int64) - zero_in) * scale_in).astype(np.float32)
    count = np.float32(real.shape[-1])
    # An accumulation adds in order, which a sum does not.
    mean = np.add.accumulate(real, axis=-1)[..., -1:] / count
    square = np.add.accumulate(real * real, axis=-1)[..., -1:] / count
    epsilon = np.float32(call.attrs.get("epsilon", _LAYER_NORM_EPSILON))
    factor = np.float32(1) / np.sqrt(square - mean * mean + epsilon)
    normal = (real - mean) * factor * gamma + beta
    return [clip_int8(round_half_away(normal.astype(np.float64) / scale_out + zero_out)).reshape(x.shape)]


@kernel("BatchNorm")
def batch_norm(call: Call) -> list[np.ndarray]:
    """``batchnorm_int8.cc`` without scale and offset: mean and variance are int8 with parameters of their own."""
    (scale_in, zero_in), (scale_out, zero_out) = input_params(call), output_params(call)
    deviation = _deviation(call, 2, scale_out)
    alpha = (scale_in / deviation).astype(np.float32)
    mean = _real(call, 1) / deviation.astype(np.float64)
    beta = (np.float32(zero_out) - alpha * np.float32(zero_in)).astype(np.float64) - mean
    return [_scaled(call, alpha, beta.astype(np.float32))]


@kernel("FusedBatchNorm")
def fused_batch_norm(call: Call) -> list[np.ndarray]:
    """``batchnorm_int8.cc`` with scale, offset, mean and variance, all int8 with parameters of their own."""
    (scale_in, zero_in), (scale_out, zero_out) = input_params(call), output_params(call)
    (scale_gamma, zero_gamma), (scale_mean, zero_mean) = input_params(call, 1), input_params(call, 3)
    scale_offset, zero_offset = input_params(call, 2)
    gamma = call.inputs[1].data.astype(np.float32) - np.float32(zero_gamma)
    offset = call.inputs[2].data.astype(np.float32) - np.float32(zero_offset)
    mean = call.inputs[3].data.astype(np.float32) - np.float32(zero_mean)
    deviation = _deviation(call, 4, scale_out)
    alpha = np.float32(scale_in * scale_gamma) * gamma / deviation
    shift = np.float32(zero_out) + np.float32(scale_offset / scale_out) * offset - alpha * np.float32(zero_in)
    return [_scaled(call, alpha, shift - np.float32(scale_gamma * scale_mean) * gamma * mean / deviation)]


def _deviation(call: Call, index: int, scale_out: float) -> np.ndarray:
    """The standard deviation in steps of the output, float32 of shape (C,); the variance is input `index`."""
    epsilon = np.float64(np.float32(call.attrs.get("epsilon", 0.0)))
    return (scale_out * np.sqrt(epsilon + _real(call, index))).astype(np.float32)


def _real(call: Call, index: int) -> np.ndarray:
    """What the int8 input `index` stands for, float64."""
    scale, zero = input_params(call, index)
    return scale * (call.inputs[index].data.astype(np.int64) - zero)


def _scaled(call: Call, alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
    return clip_int8(round_half_away(fma_float32(call.inputs[0].data.astype(np.float32), alpha, beta)))
