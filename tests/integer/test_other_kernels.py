"""The int8 kernels without weights, against slow references written from the definitions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msqkd.errors import SimulationError
from msqkd.integer.kernels.reduce import UndefinedResultError
from msqkd.integer.program import ActivationType, PadMode, ReduceMode, Tensor, TensorQuant
from msqkd.integer.registry import ARM64, FLOAT32, INT8, X86, Call, Operand, find_kernel

F32 = np.float32
Params = tuple[float, int]
SAME: Params = (0.1, 0)


def run(
    op: str,
    x: np.ndarray,
    *constants: np.ndarray,
    params: Params = SAME,
    out: Params = SAME,
    shape: Sequence[int] = (),
    outputs: Optional[Sequence[Params]] = None,
    machine: str = X86,
    per_sample: bool = False,
    **attrs: Any,
) -> Any:
    """The output (or outputs) of the int8 kernel of `op`; constants are not quantised."""
    tensors = [
        Tensor(f"y{i}", "int8", tuple(shape), quant=TensorQuant(np.array([scale]), np.array([zero])))
        for i, (scale, zero) in enumerate(outputs or [out])
    ]
    operands = [Operand(x, quant(params)), *(Operand(data) for data in constants)]
    found = find_kernel(op, INT8, op)(Call(attrs, operands, tensors, machine, per_sample, "step"))
    assert all(array.dtype == np.int8 for array in found)
    return found if outputs else found[0]


def quant(params: Params) -> TensorQuant:
    return TensorQuant(np.array([params[0]]), np.array([params[1]]))


def int8(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-128, 128, shape).astype(np.int8)


def ints(*values: Any) -> np.ndarray:
    return np.array(values, np.int32)


def c_round(x: float) -> int:
    return math.floor(abs(x) + 0.5) * (1 if x >= 0 else -1)


def clip(x: float) -> int:
    return int(max(-128, min(127, x)))


def wrap(x: int, bits: int = 8) -> int:
    return (x + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)


def c_divide(a: int, b: int) -> int:
    return abs(a) // b * (1 if a >= 0 else -1)


def high(a: int, b: int, bits: int = 31) -> int:
    product = a * b
    return c_divide(product + ((1 << bits - 1) if product >= 0 else 1 - (1 << bits - 1)), 1 << bits)


def divide(x: int, exponent: int) -> int:
    mask = (1 << exponent) - 1
    return (x >> exponent) + ((x & mask) > (mask >> 1) + (x < 0))


def multiplier(real: float) -> tuple[int, int, int]:
    """Multiplier, left shift, right shift."""
    fraction, exponent = math.frexp(real)
    q = math.floor(fraction * 2**31 + 0.5)
    if q == 2**31:
        q, exponent = q // 2, exponent + 1
    return q, max(exponent, 0), max(-exponent, 0)


def scaled(x: int, real: float, preshift: int = 0) -> int:
    q, left, right = multiplier(real)
    return divide(high(wrap(x << (left + preshift), 32), q), right + preshift)


scales = st.floats(0.004, 0.2)
zeros = st.integers(-128, 127)
seeds = st.integers(0, 2**32 - 1)
params_pairs = st.tuples(st.tuples(scales, zeros), st.tuples(scales, zeros))


# --- pools


@st.composite
def pools(draw: st.DrawFn) -> dict[str, Any]:
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    attrs = {
        "kernel_size": list(kernel),
        "strides": [draw(st.integers(1, 3)), draw(st.integers(1, 3))],
        "pad_mode": draw(st.sampled_from([PadMode.PAD, PadMode.SAME, PadMode.VALID])),
        "pad": [draw(st.integers(0, (kernel[i // 2] - 1) // 2)) for i in range(4)],
        "round_mode": draw(st.sampled_from([0, 1])),
    }
    return attrs


def pool_cells(attrs: dict[str, Any], height: int, width: int) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """The elements of the plane that each window covers."""
    spans = []
    for axis, size in enumerate((height, width)):
        kernel, stride = attrs["kernel_size"][axis], attrs["strides"][axis]
        before, after = attrs["pad"][2 * axis], attrs["pad"][2 * axis + 1]
        if attrs["pad_mode"] == PadMode.SAME:
            count = math.ceil(size / stride)
            before = max((count - 1) * stride + kernel - size, 0) // 2
        else:
            rounding = math.ceil if attrs["round_mode"] else math.floor
            count = max(rounding((size + before + after - kernel) / stride) + 1, 1)
        spans.append(
            [
                [p for p in range(i * stride - before, i * stride - before + kernel) if 0 <= p < size]
                for i in range(count)
            ]
        )
    return {
        (i, j): [(r, c) for r in rows for c in columns]
        for i, rows in enumerate(spans[0])
        for j, columns in enumerate(spans[1])
    }


def pooled(x: np.ndarray, attrs: dict[str, Any], value: Any) -> np.ndarray:
    cells = pool_cells(attrs, x.shape[1], x.shape[2])
    height, width = max(i for i, _ in cells) + 1, max(j for _, j in cells) + 1
    y = np.zeros((x.shape[0], height, width, x.shape[3]), np.int64)
    for (i, j), members in cells.items():
        for n in range(x.shape[0]):
            for c in range(x.shape[3]):
                y[n, i, j, c] = value([int(x[n, r, s, c]) for r, s in members], c)
    return y


@given(pools(), params_pairs, st.booleans(), seeds)
@settings(max_examples=60, deadline=None)
def test_max_pool(attrs: dict[str, Any], params: tuple[Params, Params], same: bool, seed: int) -> None:
    (scale_in, zero_in), (scale_out, zero_out) = params if not same else (params[0], params[0])
    ratio = float(F32(scale_in) / F32(scale_out))

    def value(members: list[int], _: int) -> int:
        largest = max(members, default=-128)
        return largest if same else wrap(c_round((largest - zero_in) * ratio) + zero_out)

    x = int8(seed, 2, 5, 6, 3)
    y = run("MaxPoolFusion", x, params=(scale_in, zero_in), out=(scale_out, zero_out), **attrs)
    np.testing.assert_array_equal(y, pooled(x, attrs, value))


@given(pools(), params_pairs, st.sampled_from([X86, ARM64]), st.sampled_from([3, 8, 11]), seeds)
@settings(max_examples=60, deadline=None)
def test_average_pool(
    attrs: dict[str, Any], params: tuple[Params, Params], machine: str, channels: int, seed: int
) -> None:
    (scale_in, zero_in), (scale_out, zero_out) = params
    if not all(pool_cells(attrs, 5, 6).values()):
        with pytest.raises(SimulationError, match="lies in the padding alone"):
            run("AvgPoolFusion", int8(seed, 1, 5, 6, channels), **attrs)
        return
    ratio = float(F32(scale_in) / F32(scale_out))

    def value(members: list[int], channel: int) -> int:
        total, count, eightfold = sum(members), len(members), channel < channels // 8 * 8
        if eightfold:
            average = c_divide(total + 128 * count + count // 2, count) - 128
        else:
            average = c_round(float(F32(total) / F32(count) + F32(128))) - 128
        result = c_round((average - zero_in) * ratio) + zero_out
        return clip(result) if eightfold and machine == ARM64 else wrap(result)

    x = int8(seed, 2, 5, 6, channels)
    y = run("AvgPoolFusion", x, params=params[0], out=params[1], machine=machine, **attrs)
    np.testing.assert_array_equal(y, pooled(x, attrs, value))


def test_the_sum_of_an_average_pool_overflows_beyond_128_elements() -> None:
    x = np.full((1, 12, 12, 9), 127, np.int8)
    y = run("AvgPoolFusion", x, kernel_size=[12, 12], strides=[1, 1], pad_mode=PadMode.VALID)
    overflown = wrap(144 * 127 + 128 * 144, 16)
    assert y[0, 0, 0].tolist() == [wrap(c_divide(overflown + 72, 144) - 128)] * 8 + [127]


def test_a_global_pool_covers_the_plane_whatever_the_kernel() -> None:
    x = int8(0, 2, 5, 4, 3)
    y = run("MaxPoolFusion", x, **{"global": True}, kernel_size=[2, 2], strides=[2, 2])
    np.testing.assert_array_equal(y, x.max(axis=(1, 2), keepdims=True))
    with pytest.raises(SimulationError, match="a global pool is padded"):
        run("MaxPoolFusion", x, **{"global": True}, pad=[1, 0, 0, 0])


@pytest.mark.parametrize("attrs", [{}, {"kernel_size": [2, 2], "strides": [0, 1]}])
def test_a_pool_needs_a_kernel_and_strides(attrs: dict[str, Any]) -> None:
    with pytest.raises(SimulationError, match="allowed: two positive numbers"):
        run("MaxPoolFusion", int8(0, 1, 4, 4, 1), **attrs)


# --- reductions


def reference_reduce(x: np.ndarray, mode: ReduceMode, axes: list[int], params: tuple[Params, Params]) -> np.ndarray:
    (scale_in, zero_in), (scale_out, zero_out) = params
    ratio = scale_in / scale_out
    y = x.astype(object)
    for number, axis in enumerate(axes):
        last = number == len(axes) - 1

        def one(members: np.ndarray, last: bool = last) -> int:
            values = [int(m) - zero_in for m in members]
            if mode == ReduceMode.MEAN:
                result = scaled(sum(values), 1 / len(values))
            else:
                result = {ReduceMode.MAX: max, ReduceMode.MIN: min, ReduceMode.SUM: sum}[mode](values)
            if not last:
                return result + zero_in
            return clip(scaled(result, ratio, 20 if mode == ReduceMode.MIN else 0) + zero_out)

        y = np.expand_dims(np.apply_along_axis(one, axis, y), axis)
    return y.astype(np.int64)


@given(
    st.sampled_from([ReduceMode.MEAN, ReduceMode.MAX, ReduceMode.MIN, ReduceMode.SUM]),
    st.sampled_from([[3], [1], [0], [-3, -2], [2, -3], [3, 1], [1, 2, 3], [0, 3], [-1]]),
    params_pairs,
    st.booleans(),
    seeds,
)
@settings(max_examples=80, deadline=None)
def test_reductions_axis_by_axis(
    mode: ReduceMode, axes: list[int], params: tuple[Params, Params], keep: bool, seed: int
) -> None:
    x = int8(seed, 2, 3, 4, 5)
    y = run("ReduceFusion", x, ints(*axes), params=params[0], out=params[1], mode=int(mode), keep_dims=keep)
    expected = reference_reduce(x, mode, axes, params)
    np.testing.assert_array_equal(y, expected if keep else np.squeeze(expected, tuple(a % 4 for a in axes)))


@given(params_pairs, st.sampled_from([[1, 2], [2, 1]]), st.booleans(), seeds)
@settings(max_examples=40, deadline=None)
def test_the_mean_of_a_plane_truncates_its_bias(
    params: tuple[Params, Params], axes: list[int], keep: bool, seed: int
) -> None:
    (scale_in, zero_in), (scale_out, zero_out) = params
    x = int8(seed, 2, 4, 4, 8)
    bias = int(zero_out - zero_in * scale_in / scale_out)
    total = x.sum(axis=(1, 2), dtype=np.int64)
    expected = [[clip(scaled(int(t), scale_in / (scale_out * 16)) + bias) for t in row] for row in total]
    for machine in (X86, ARM64):
        y = run("ReduceFusion", x, ints(*axes), params=params[0], out=params[1], keep_dims=keep, machine=machine)
        assert y.shape == ((2, 1, 1, 8) if keep else (2, 8))
        np.testing.assert_array_equal(y.reshape(2, 8), expected)


def test_where_the_mean_of_a_plane_is_undefined() -> None:
    plane = ints(1, 2)
    with pytest.raises(UndefinedResultError, match="on arm64 the mean of a 7x7 plane is undefined"):
        run("ReduceFusion", int8(0, 1, 7, 7, 8), plane, machine=ARM64)
    odd = int8(0, 3, 4, 4, 6)
    with pytest.raises(UndefinedResultError, match="6 channels is undefined for a batch of 3"):
        run("ReduceFusion", odd, plane)
    alone = [run("ReduceFusion", odd[i : i + 1], plane) for i in range(3)]
    np.testing.assert_array_equal(run("ReduceFusion", odd, plane, per_sample=True), np.concatenate(alone))
    with pytest.raises(UndefinedResultError, match=r"takes the axes \[3, 0\] for \[1, 2\]"):
        run("ReduceFusion", odd, ints(3, 0))


@pytest.mark.parametrize(
    ("constants", "attrs", "message"),
    [
        ([ints(1)], {"mode": 3}, r"its int8 reduction is 3; allowed: 0 \(mean\)"),
        ([ints(1)], {"mode": 6}, "its int8 reduction is 6"),
        ([ints(4)], {}, r"its axes are \[4\]; allowed: some of -4 … 3"),
        ([ints()], {}, r"its axes are \[\]"),
        ([], {}, "its axes are missing"),
        ([np.ones(1, F32)], {}, "its axes have dtype float32"),
        ([ints(1)], {"reduce_to_end": True}, "reduce_to_end is set"),
        ([ints(1)], {"coeff": 0.5}, "its coefficient is 0.5"),
    ],
)
def test_reductions_that_are_refused(constants: list[np.ndarray], attrs: dict[str, Any], message: str) -> None:
    with pytest.raises(SimulationError, match=message):
        run("ReduceFusion", int8(0, 1, 4, 4, 4), *constants, **attrs)


# --- activations

EVERY = np.arange(-128, 128).astype(np.int8)


def every(kind: ActivationType, params: tuple[Params, Params], machine: str = X86, **attrs: Any) -> list[int]:
    """The activation of -128 … 127."""
    return run(
        "Activation", EVERY, params=params[0], out=params[1], machine=machine, activation_type=int(kind), **attrs
    ).tolist()


@given(params_pairs, st.sampled_from([X86, ARM64]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_relu_and_relu6(params: tuple[Params, Params], machine: str, six: bool) -> None:
    (scale_in, zero_in), (scale_out, zero_out) = params
    q, left, right = multiplier(float(F32(scale_in) / F32(scale_out)))
    bound = c_round(float(F32(6) / F32(scale_out) + F32(zero_out))) if six else (127 if machine == X86 else 255)
    expected = [
        zero_out if x <= zero_in else wrap(min(divide(high(x - zero_in, q) << left, right) + zero_out, bound))
        for x in range(-128, 128)
    ]
    assert every(ActivationType.RELU6 if six else ActivationType.RELU, params, machine) == expected


@given(params_pairs)
@settings(max_examples=60, deadline=None)
def test_hard_swish(params: tuple[Params, Params]) -> None:
    (scale_in, zero_in), (scale_out, zero_out) = params

    def short(real: float) -> tuple[int, int]:
        q, left, right = multiplier(float(F32(real)))
        return min((q + 2**15) >> 16, 2**15 - 1), left - right

    output, output_exponent = short(scale_in / 128 / scale_out)
    relu6, exponent = short(scale_in / 128 / (3 / 32768))

    def saturated(x: int) -> int:
        return max(-(2**15), min(2**15 - 1, x))

    def one(x: int) -> int:
        fine = (x - zero_in) * 128
        gate = saturated(fine << (exponent - 1)) if exponent > 0 else fine
        gate = high(gate, relu6, 15)
        gate = saturated(gate << 1) if exponent > 0 else divide(gate, -exponent)
        product = high((gate + 2**15) >> 1, high(fine, output, 15), 15)
        return clip(divide(product, -output_exponent) + zero_out)

    assert every(ActivationType.HSWISH, params) == [one(x) for x in range(-128, 128)]


def test_a_hard_swish_whose_output_scale_is_far_too_small_is_refused() -> None:
    with pytest.raises(SimulationError, match="of a hard swish are too far apart"):
        every(ActivationType.HSWISH, ((1.0, 0), (0.001, 0)))


def near(values: list[int], exact: list[float]) -> None:
    """Each value is the nearest integer, clipped, unless that hangs on the last bits of float32."""
    for value, real in zip(values, exact):
        if abs(abs(real - math.floor(real)) - 0.5) > 1e-3:
            assert value == clip(c_round(real)), (value, real)
        else:
            assert abs(value - max(-128.0, min(127.0, real))) < 0.51


@given(params_pairs)
@settings(max_examples=40, deadline=None)
def test_sigmoid_but_for_127(params: tuple[Params, Params]) -> None:
    (scale_in, zero_in), (scale_out, zero_out) = params
    values = every(ActivationType.SIGMOID, params)
    near(values[:-1], [1 / (1 + math.exp(-scale_in * (x - zero_in))) / scale_out + zero_out for x in range(-128, 127)])
    assert values[-1] == 0


@given(params_pairs)
@settings(max_examples=40, deadline=None)
def test_tanh(params: tuple[Params, Params]) -> None:
    (scale_in, zero_in), (scale_out, zero_out) = params
    values = every(ActivationType.TANH, params)
    for x, value in zip(range(-128, 128), values):
        real = math.tanh(scale_in * (x - zero_in)) / scale_out + zero_out
        assert abs(value - max(-128.0, min(127.0, real))) <= 0.5 + 1e-4 / scale_out + 1e-6


@given(params_pairs, st.floats(0.01, 0.9))
@settings(max_examples=40, deadline=None)
def test_leaky_relu_slopes_the_stored_value(params: tuple[Params, Params], alpha: float) -> None:
    (scale_in, zero_in), (scale_out, zero_out) = params
    values = every(ActivationType.LEAKY_RELU, params, alpha=alpha)
    # round(q · ratio − zero · ratio) + zero_out: the zero point of the output is added after the rounding
    exact = [((x * alpha if x <= 0 else x) - zero_in) * scale_in / scale_out for x in range(-128, 128)]
    for value, real in zip(values, exact):
        if abs(abs(real - math.floor(real)) - 0.5) > 1e-3:
            assert value == clip(c_round(real) + zero_out)


def test_an_activation_without_int8_kernel_is_refused() -> None:
    with pytest.raises(SimulationError, match=r"its int8 activation is 19; allowed: 1 \(RELU\)"):
        every(ActivationType.GELU, (SAME, SAME))


# --- softmax and normalisations


@given(scales, st.sampled_from([0, 1, 2, -1]), seeds)
@settings(max_examples=40, deadline=None)
def test_softmax_is_close_to_the_real_one(scale: float, axis: int, seed: int) -> None:
    x = int8(seed, 3, 7, 5)
    y = run("Softmax", x, params=(scale, 11), out=(0.3, 5), axis=[axis])
    exponentials = np.exp(scale * x.astype(np.float64))
    real = np.minimum(exponentials / exponentials.sum(axis=axis, keepdims=True) * 256 - 128, 127)
    assert np.abs(y - real).max() < 0.6


def scalar_softmax(row: list[int], scale: float) -> list[int]:
    """The definition with plain integers."""

    def left(x: int, shift: int) -> int:
        return max(-(2**31), min(2**31 - 1, x << shift))

    def exp(a: int) -> int:
        if a == 0:
            return 2**31 - 1
        modulus = (a & (2**24 - 1)) - 2**24
        x = left(modulus, 5) + 2**28
        square = high(x, x)
        cube, fourth = high(square, x), high(square, square)
        tail = divide(high(divide(fourth, 2) + cube, 715827883) + square, 1)
        result = 1895147668 + high(1895147668, x + tail)
        for bit, power in enumerate((0.25, 0.5, 1, 2, 4, 8, 16), start=24):
            if (modulus - a) >> bit & 1:
                result = high(result, c_round(math.exp(-power) * 2**31))
        return result

    q, shift, _ = multiplier(min(float(F32(scale)) * 2**26, 2.0**31 - 1))
    exponentials = [exp(high(wrap((value - max(row)) << shift, 32), q)) for value in row]
    total = sum(divide(e, 12) for e in exponentials)
    zeros = 32 - total.bit_length()
    half = ((total << zeros) - 2**31 + 2**31) // 2
    x = 1515870810 + high(half, -1010580540)
    for _ in range(3):
        x += left(high(x, 2**29 - high(half, x)), 2)
    reciprocal = left(x, 1)
    return [clip(divide(high(reciprocal, e), 12 - zeros + 23) - 128) for e in exponentials]


@given(scales, seeds, st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_softmax_by_plain_integers(scale: float, seed: int, count: int) -> None:
    x = int8(seed, 2, count)
    y = run("Softmax", x, params=(scale, -3), axis=[-1])
    assert y.tolist() == [scalar_softmax(row, scale) for row in x.tolist()]


@pytest.mark.parametrize("axis", [[-2], [2], [0, 1]])
def test_an_axis_the_runtime_fails_on_is_refused(axis: list[int]) -> None:
    with pytest.raises(SimulationError, match=r"its axis is .*; allowed: one of -1 … 1"):
        run("Softmax", int8(0, 2, 3), axis=axis)


def test_a_flat_softmax_over_512_values_is_undefined() -> None:
    with pytest.raises(SimulationError, match="over 512 values sum up to 512 or more"):
        run("Softmax", np.zeros((1, 512), np.int8), axis=[-1])
    assert run("Softmax", np.zeros((1, 511), np.int8), axis=[-1]).tolist() == [[-127] * 511]


@given(params_pairs, st.sampled_from([1, 2, -1]), seeds)
@settings(max_examples=40, deadline=None)
def test_layer_norm_is_close_to_the_real_one(params: tuple[Params, Params], first: int, seed: int) -> None:
    (scale_in, zero_in), (scale_out, zero_out) = params
    x = int8(seed, 3, 4, 8)
    shape = x.shape[first:]
    gamma, beta = int8(seed + 1, *shape), np.random.default_rng(seed).integers(-3000, 3000, shape).astype(np.int32)
    operands = [Operand(x, quant(params[0])), Operand(gamma, quant((0.01, 7))), Operand(beta)]
    call = Call({"begin_norm_axis": first}, operands, [Tensor("y", "int8", x.shape, quant=quant(params[1]))])
    (y,) = find_kernel("LayerNormFusion", INT8, "step")(call)
    real = (x.astype(np.float64) - zero_in) * scale_in
    axes = tuple(range(first % 3, 3))
    centred = real - real.mean(axis=axes, keepdims=True)
    normal = centred / np.sqrt(np.square(centred).mean(axis=axes, keepdims=True) + 1e-5)
    answer = normal * (gamma.astype(np.float64) - 7) * 0.01 + beta * scale_in * 0.01
    answer = np.clip(answer / scale_out + zero_out, -128, 127)
    assert np.abs(y - answer).max() < 0.51 + 0.001 / scale_out


def test_a_layer_norm_without_its_constants_is_refused() -> None:
    with pytest.raises(SimulationError, match=r"input 1 of a layer norm is nothing; allowed: shape \(4,\)"):
        run("LayerNormFusion", int8(0, 2, 4), begin_norm_axis=1)


@pytest.mark.parametrize("fused", [True, False])
def test_batch_norm_is_close_to_the_real_one(fused: bool) -> None:
    rng = np.random.default_rng(4)
    x, params, out = int8(0, 2, 3, 3, 6), (0.03, 5), (0.02, -9)
    names = {"gamma": (0.01, 3), "beta": (0.02, -1), "mean": (0.015, 2), "variance": (0.01, -128)}
    stored = {name: rng.integers(-120, 128, 6).astype(np.int8) for name in names}
    used = list(names) if fused else ["mean", "variance"]
    operands = [Operand(x, quant(params)), *(Operand(stored[name], quant(names[name])) for name in used)]
    call = Call({"epsilon": 1e-3}, operands, [Tensor("y", "int8", x.shape, quant=quant(out))])
    (y,) = find_kernel("FusedBatchNorm" if fused else "BatchNorm", INT8, "step")(call)
    real = {name: (stored[name].astype(np.float64) - zero) * scale for name, (scale, zero) in names.items()}
    normal = ((x.astype(np.float64) - 5) * 0.03 - real["mean"]) / np.sqrt(real["variance"] + 1e-3)
    answer = normal * real["gamma"] + real["beta"] if fused else normal
    assert np.abs(y - np.clip(answer / 0.02 - 9, -128, 127)).max() < 0.51


# --- movers


def rescaled(x: np.ndarray, params: Params, out: Params) -> np.ndarray:
    """What a kernel that rescales on the way gives; an int64 of -999 where it hangs on the last bits of float32."""
    real = (x.astype(np.float64) - params[1]) * params[0] / out[0]
    tie = np.abs(np.abs(real - np.floor(real)) - 0.5) < 1e-3
    nearest = np.sign(real) * np.floor(np.abs(real) + 0.5)
    return np.where(tie, -999, np.clip(nearest + out[1], -128, 127)).astype(np.int64)


def agree(y: np.ndarray, expected: np.ndarray) -> None:
    decided = expected != -999
    np.testing.assert_array_equal(y[decided], expected[decided])


@given(params_pairs, seeds)
@settings(max_examples=40, deadline=None)
def test_movers_that_rescale(params: tuple[Params, Params], seed: int) -> None:
    x = int8(seed, 2, 4, 1, 6)
    source, target = params
    expected = rescaled(x, source, target)
    agree(run("Reshape", x, params=source, out=target, shape=(2, 24)), expected.reshape(2, 24))
    agree(run("Squeeze", x, params=source, out=target, shape=(2, 4, 6)), expected.reshape(2, 4, 6))
    agree(run("Gather", x, ints(3, 0), ints(1), params=source, out=target), expected[:, [3, 0]])
    parts = run("Split", x, params=source, outputs=[target, source], axis=-1, size_splits=[2, 4], output_num=2)
    agree(parts[0], expected[..., :2])
    np.testing.assert_array_equal(parts[1], x[..., 2:])


@given(params_pairs, seeds)
@settings(max_examples=40, deadline=None)
def test_slice_rescales_by_a_shifted_multiplication(params: tuple[Params, Params], seed: int) -> None:
    (scale_in, zero_in), (scale_out, zero_out) = params
    x = int8(seed, 2, 4, 6)
    ratio = float(F32(scale_in) / F32(scale_out))
    y = run("SliceFusion", x, ints(1, 2), ints(2, -1), params=params[0], out=params[1], axes=[1, -1])
    expected = [clip(scaled(int(q) - zero_in, ratio, 20) + zero_out) for q in x[:, 1:3, 2:].reshape(-1)]
    assert y.reshape(-1).tolist() == (x[:, 1:3, 2:].reshape(-1).tolist() if params[0] == params[1] else expected)


@given(params_pairs, st.sampled_from([0, 1, -1]), seeds)
@settings(max_examples=40, deadline=None)
def test_concat_rescales_each_operand(params: tuple[Params, Params], axis: int, seed: int) -> None:
    a, b = int8(seed, 2, 3, 4), int8(seed + 1, 2, 3, 4)
    operands = [Operand(a, quant(params[0])), Operand(b, quant(params[1]))]
    call = Call({"axis": axis}, operands, [Tensor("y", "int8", (), quant=quant(params[1]))])
    (y,) = find_kernel("Concat", INT8, "step")(call)
    agree(y, np.concatenate([rescaled(a, *params), b.astype(np.int64)], axis))


def test_movers_that_copy() -> None:
    x, target = int8(0, 2, 3, 4), (0.7, 9)
    np.testing.assert_array_equal(run("Transpose", x, ints(2, 0, 1), out=target), x.transpose(2, 0, 1))
    np.testing.assert_array_equal(run("Unsqueeze", x, out=target, shape=(2, 3, 1, 4)), x[:, :, None])
    np.testing.assert_array_equal(run("ExpandDims", x, ints(1), out=target, shape=(2, 1, 3, 4)), x[:, None])
    np.testing.assert_array_equal(run("StridedSlice", x, ints(0, 1), ints(2, 3), out=target), x[:, 1:3])


@pytest.mark.parametrize(
    ("begin", "end", "strides", "masks", "index"),
    [
        ((0, 2), (2, 0), (1, -1), {}, np.s_[0:2, 2:0:-1]),
        ((1, 1), (1, 1), (1, 1), {"begin_mask": 1, "end_mask": 3}, np.s_[:, 1:]),
        ((0, -1), (0, 9), (1, 1), {"ellipsis_mask": 1}, np.s_[..., -1:9]),
        ((0, 1, 0), (0, 2, 2), (1, 1, 1), {"new_axis_mask": 1}, np.s_[None, 1:2, 0:2]),
        ((0, 1), (2, 2), (1, 1), {"shrink_axis_mask": 2}, np.s_[0:2, 1]),
    ],
)
def test_strided_slice_reads_its_masks(
    begin: tuple[int, ...], end: tuple[int, ...], strides: tuple[int, ...], masks: dict[str, int], index: Any
) -> None:
    x = int8(1, 2, 3, 4)
    y = run("StridedSlice", x, ints(*begin), ints(*end), ints(*strides), **masks)
    np.testing.assert_array_equal(y, x[index])


@pytest.mark.parametrize(("mode", "name"), [(0, "constant"), (1, "reflect"), (2, "symmetric")])
def test_pad(mode: int, name: str) -> None:
    x, widths = int8(2, 1, 4, 5, 2), ((0, 0), (2, 1), (0, 3), (1, 0))
    y = run("PadFusion", x, ints(*widths), params=(0.1, 4), out=(0.1, 4), padding_mode=mode, constant_value=0.76)
    extra = {"constant_values": 12} if name == "constant" else {}
    np.testing.assert_array_equal(y, np.pad(x, widths, mode=name, **extra))  # type: ignore[call-overload]


def test_shapes_written_for_one_item_serve_a_batch() -> None:
    x = int8(3, 5, 2, 3, 4)
    np.testing.assert_array_equal(run("Reshape", x, shape=(1, 24), per_sample=True), x.reshape(5, 24))
    np.testing.assert_array_equal(run("Squeeze", x[:, :1], shape=(1, 3, 4), per_sample=True), x[:, 0])
    np.testing.assert_array_equal(run("SliceFusion", x, ints(0, 1, 0, 0), ints(1, 1, 3, 4), per_sample=True), x[:, 1:2])
    np.testing.assert_array_equal(run("StridedSlice", x, ints(0, 1), ints(1, 2), per_sample=True), x[:, 1:2])
    operands = [Operand(x[:1, :1], quant(SAME)), Operand(x, quant(SAME))]
    call = Call({"axis": 1}, operands, [Tensor("y", "int8", (1, 3, 3, 4), quant=quant(SAME))], per_sample=True)
    (y,) = find_kernel("Concat", INT8, "step")(call)
    np.testing.assert_array_equal(y, np.concatenate([np.repeat(x[:1, :1], 5, 0), x], 1))


@pytest.mark.parametrize(
    ("op", "constants", "attrs", "message"),
    [
        ("Reshape", [], {"shape": (1, 7)}, r"\(2, 3, 4\) cannot take the shape \(1, 7\)"),
        ("Transpose", [ints(0, 1)], {}, r"its permutation is \[0, 1\]; allowed: each of 0 … 2 once"),
        ("Split", [], {"axis": 1, "size_splits": [1, 1]}, r"it splits 3 elements into \[1, 1\]"),
        ("Split", [], {"axis": 3}, "its axis is 3; allowed: -3 … 2"),
        ("PadFusion", [ints(1, 1)], {}, r"its paddings are \[1, 1\]"),
        ("PadFusion", [ints(0, 0, 3, 0, 0, 0)], {"padding_mode": 1}, "mirror more than the input"),
        ("PadFusion", [ints(0, 0, 1, 0, 0, 0)], {"out": (0.2, 0)}, "other parameters at its output"),
        ("SliceFusion", [ints(0, 1), ints(2, 3)], {}, "it takes 1 to 4 of the 3 along axis 1"),
        ("SliceFusion", [ints(0), ints(2, 3)], {}, "1 begins, 2 sizes and 1 axes do not match"),
        ("StridedSlice", [ints(0), ints(1, 2)], {}, "1 begins, 2 ends"),
        ("StridedSlice", [ints(0), ints(1), ints(0), ints(1)], {}, "has 5 inputs; allowed: 3 or 4"),
        ("PadFusion", [ints(0, 0, 1, 0, 0, 0), np.ones(1, F32)], {}, "its value is an operand"),
        ("StridedSlice", [ints(5), ints(6)], {"shrink_axis_mask": 1}, "its slice does not fit"),
        ("Gather", [ints(3), ints(1)], {}, "it takes the elements 3 … 3; allowed: 0 … 2"),
    ],
)
def test_movers_that_do_not_fit(op: str, constants: list[np.ndarray], attrs: dict[str, Any], message: str) -> None:
    with pytest.raises(SimulationError, match=message):
        run(op, int8(0, 2, 3, 4), *constants, **attrs)


def test_parameters_that_are_missing_or_one_a_channel_are_named() -> None:
    output = [Tensor("y", "int8", (2, 2), quant=quant(SAME))]
    call = Call({}, [Operand(int8(0, 2, 2))], output, name="flat")
    with pytest.raises(SimulationError, match="flat: input 0 has no quantisation parameters; allowed: one scale"):
        find_kernel("Reshape", INT8, "flat")(call)
    many = TensorQuant(np.array([0.1, 0.2]), np.array([0, 0]))
    with pytest.raises(SimulationError, match="flat: input 0 has 2 scales"):
        find_kernel("Reshape", INT8, "flat")(Call({}, [Operand(int8(0, 2, 2), many)], output, name="flat"))


# --- resizes


def resized(x: np.ndarray, height: int, width: int, **settings: Any) -> np.ndarray:
    return run("Resize", x, shape=(x.shape[0], height, width, x.shape[3]), **settings)


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([0, 1, 2]), seeds)
@settings(max_examples=40, deadline=None)
def test_nearest_neighbour(height: int, width: int, transform: int, seed: int) -> None:
    x = int8(seed, 2, 4, 5, 3)

    def source(i: int, size: int, new: int) -> int:
        return ((size - 1) * i + (new - 1) // 2) // (new - 1) if transform == 1 and new > 1 else size * i // new

    rows, columns = ([source(i, size, new) for i in range(new)] for size, new in ((4, height), (5, width)))
    y = resized(x, height, width, method=1, coordinate_transform_mode=transform)
    np.testing.assert_array_equal(y, x[:, rows][:, :, columns])


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([0, 1]), seeds)
@settings(max_examples=40, deadline=None)
def test_bilinear_in_fixed_point(height: int, width: int, transform: int, seed: int) -> None:
    x = int8(seed, 1, 4, 5, 2)

    def source(i: int, size: int, new: int) -> tuple[int, int, int]:
        parts, steps = (size - 1, new - 1) if transform == 1 and new > 1 else (size, new)
        position = i * ((1024 * parts + steps // 2) // steps)
        return position // 1024, min(position // 1024 + 1, size - 1), position % 1024

    y = resized(x, height, width, coordinate_transform_mode=transform)
    for i in range(height):
        for j in range(width):
            top, bottom, down = source(i, 4, height)
            left, right, beside = source(j, 5, width)
            for c in range(2):
                value = (
                    (1024 - down) * ((1024 - beside) * int(x[0, top, left, c]) + beside * int(x[0, top, right, c]))
                    + down * ((1024 - beside) * int(x[0, bottom, left, c]) + beside * int(x[0, bottom, right, c]))
                )  # fmt: skip
                assert y[0, i, j, c] == c_divide(value + 2**19, 2**20)


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([X86, ARM64]), seeds)
@settings(max_examples=30, deadline=None)
def test_bilinear_in_float_truncates(height: int, width: int, machine: str, seed: int) -> None:
    x = int8(seed, 1, 4, 5, 6)
    y = resized(x, height, width, params=(0.1, 3), out=(0.1, 3), machine=machine)
    rows, columns = np.arange(height) * 4 / height, np.arange(width) * 5 / width
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            top, left = int(row), int(column)
            down, beside = row - top, column - left
            bottom, right = min(top + 1, 3), min(left + 1, 4)
            plane = x[0].astype(np.float64)
            value = (1 - down) * ((1 - beside) * plane[top, left] + beside * plane[top, right])
            value += down * ((1 - beside) * plane[bottom, left] + beside * plane[bottom, right])
            whole = np.abs(value - np.round(value)) < 1e-3
            np.testing.assert_array_equal(y[0, i, j][~whole], np.trunc(value)[~whole])


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"method": 2}, "its method is 2; allowed: 0"),
        ({"method": 1, "out": (0.2, 0)}, "other parameters at its output"),
        ({"preserve_aspect_ratio": True}, "preserve_aspect_ratio is set"),
    ],
)
def test_resizes_that_are_refused(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(SimulationError, match=message):
        resized(int8(0, 1, 4, 4, 1), 8, 8, **settings_)


def test_a_fixed_point_resize_that_reads_beyond_its_input_is_refused() -> None:
    with pytest.raises(SimulationError, match="resizing 3 to 211 reads beyond the input"):
        resized(int8(0, 1, 3, 3, 1), 211, 3)


def test_movers_are_one_function_for_integers_and_floats() -> None:
    for op in ("Transpose", "StridedSlice", "Unsqueeze", "ExpandDims"):
        assert find_kernel(op, INT8, op) is find_kernel(op, FLOAT32, op)
