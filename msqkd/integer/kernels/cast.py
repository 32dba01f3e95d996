"""Casts between float32 and int8: the kernel of QuantDTypeCast."""

from __future__ import annotations

import numpy as np

from msqkd.errors import SimulationError
from msqkd.integer.arithmetic import INT8_MAX, INT8_MIN, fma_float32, round_half_away
from msqkd.integer.kernels.parameters import input_params, output_params
from msqkd.integer.registry import ARM64, FLOAT32, INT8, Call, kernel

_DTYPES = {32: INT8, 43: FLOAT32}  # TypeId of the runtime
_VECTOR = 16  # values arm64 casts at once
_INT32_LIMIT = 2.0**31


@kernel("QuantDTypeCast", kind=INT8)
@kernel("QuantDTypeCast", kind=FLOAT32)
def cast(call: Call) -> list[np.ndarray]:
    """float32 to int8, int8 to float32, or int8 to int8 of other parameters, by way of float32.

    Raises:
        SimulationError: other dtypes, attributes that contradict them, or one scale a channel.
    """
    x, target = call.inputs[0].data, call.outputs[0].dtype
    for name, dtype in (("src_t", str(x.dtype)), ("dst_t", target)):
        given = _DTYPES.get(int(call.attrs[name])) if name in call.attrs else dtype
        if given != dtype or dtype not in _DTYPES.values():
            allowed = ", ".join(f"{number} ({known})" for number, known in _DTYPES.items())
            raise SimulationError(
                f"{call.name}: {name} is {call.attrs.get(name)} and the tensor {dtype}; allowed: {allowed}"
            )
    real = x if x.dtype == np.float32 else _dequantise(call)
    return [_quantise(call, real) if target == INT8 else real]


def _dequantise(call: Call) -> np.ndarray:
    """``(q − zero_point) · scale``, the product in float32; a float output may say with which parameters."""
    output = call.outputs[0]
    given = output.dtype == FLOAT32 and output.quant is not None
    scale, zero_point = output_params(call) if given else input_params(call)
    return (call.inputs[0].data.astype(np.float32) - np.float32(zero_point)) * np.float32(scale)


def _quantise(call: Call, x: np.ndarray) -> np.ndarray:
    """``round(x · (1 / scale) + zero_point)`` clipped to int8 (``quant_dtype_cast_int8.c``).

    The reciprocal is a float32; product and sum are rounded once, but on arm64 twice for the values left over when 16
    are cast at a time.  What leaves int32 becomes -128 on x86, NaN too; arm64 saturates, and makes NaN 0.
    """
    scale, zero_point = output_params(call)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        inverse, zero = np.float32(1) / np.float32(scale), np.float32(zero_point)
        value = fma_float32(x, inverse, zero)
        if call.machine == ARM64:
            runs = len(x) if call.per_sample else 1
            rest = x.size // runs // _VECTOR * _VECTOR
            value.reshape(runs, -1)[:, rest:] = x.reshape(runs, -1)[:, rest:] * inverse + zero
        rounded = round_half_away(value)
        clipped = np.nan_to_num(np.clip(rounded, INT8_MIN, INT8_MAX))
        if call.machine != ARM64:
            clipped[np.isnan(rounded) | ((rounded >= _INT32_LIMIT) & (x != np.inf))] = INT8_MIN
    return clipped.astype(np.int8)
