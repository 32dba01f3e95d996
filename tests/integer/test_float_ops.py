"""The float32 kernels against plain numpy and the mathematics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msqkd.errors import SimulationError
from msqkd.integer.kernels import float_ops
from msqkd.integer.program import ActivationType, PadMode, ReduceMode, Tensor
from msqkd.integer.registry import FLOAT32, Call, Operand, find_kernel


def run_all(op: str, *inputs: np.ndarray, shape: Sequence[int] = (), dtype: str = "float32", outputs: int = 1,
            per_sample: bool = False, **attrs: Any) -> list[np.ndarray]:  # fmt: skip
    tensors = [Tensor(f"y{i}", dtype, tuple(shape)) for i in range(outputs)]
    call = Call(attrs, [Operand(data) for data in inputs], tensors, per_sample=per_sample, name="step")
    found = find_kernel(op, FLOAT32, "step")(call)
    assert [str(array.dtype) for array in found] == [dtype] * len(found)
    return found


def run(op: str, *inputs: np.ndarray, **settings_: Any) -> np.ndarray:
    return run_all(op, *inputs, **settings_)[0]


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ints(*values: Any) -> np.ndarray:
    return np.array(values, np.int32)


def close(found: np.ndarray, expected: Any, tolerance: float = 2e-5) -> None:
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


# --- convolutions and products


def reference_convolution(
    x: np.ndarray, weight: np.ndarray, strides: list[int], dilation: list[int], pads: list[int], group: int
) -> np.ndarray:
    up, down, left, right = pads
    x = np.pad(x.astype(np.float64), ((0, 0), (up, down), (left, right), (0, 0)))
    outputs, rows, columns, channels = weight.shape
    height = (x.shape[1] - (rows - 1) * dilation[0] - 1) // strides[0] + 1
    width = (x.shape[2] - (columns - 1) * dilation[1] - 1) // strides[1] + 1
    y = np.zeros((x.shape[0], height, width, outputs))
    for o in range(outputs):
        first = o // (outputs // group) * channels
        for i in range(height):
            for j in range(width):
                window = x[
                    :,
                    i * strides[0] : i * strides[0] + (rows - 1) * dilation[0] + 1 : dilation[0],
                    j * strides[1] : j * strides[1] + (columns - 1) * dilation[1] + 1 : dilation[1],
                    first : first + channels,
                ]
                y[:, i, j, o] = (window * weight[o]).sum(axis=(1, 2, 3))
    return y


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.lists(st.integers(0, 2), min_size=4, max_size=4),
    st.sampled_from([(1, 4, 5), (2, 4, 6), (4, 4, 4), (4, 4, 8)]),
    st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_convolution(
    kernel: tuple[int, int],
    strides: tuple[int, int],
    dilation: tuple[int, int],
    pads: list[int],
    channels: tuple[int, int, int],
    seed: int,
) -> None:
    group, inputs, outputs = channels
    x, weight = normal(seed, 2, 7, 6, inputs), normal(seed + 1, outputs, *kernel, inputs // group)
    bias = normal(seed + 2, outputs)
    attrs = {"stride": list(strides), "dilation": list(dilation), "pad_mode": int(PadMode.PAD), "pad_list": pads}
    y = run("Conv2DFusion", x, weight, bias, group=group, activation_type=int(ActivationType.RELU), **attrs)
    expected = reference_convolution(x, weight, list(strides), list(dilation), pads, group) + bias
    close(y, np.maximum(expected, 0), 1e-4)


def test_same_padding_puts_the_odd_row_at_the_bottom() -> None:
    x, weight = normal(0, 1, 6, 7, 2), normal(1, 3, 3, 3, 2)
    y = run("Conv2DFusion", x, weight, stride=[2, 2], pad_mode=int(PadMode.SAME))
    close(y, reference_convolution(x, weight, [2, 2], [1, 1], [0, 1, 1, 1], 1))


@pytest.mark.parametrize("limit", [1, 700, 5000])
def test_a_convolution_in_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    x, weight = normal(0, 3, 5, 4, 3), normal(1, 2, 3, 3, 3)
    whole = run("Conv2DFusion", x, weight)
    monkeypatch.setattr(float_ops, "_CHUNK_BYTES", limit)
    close(run("Conv2DFusion", x, weight), whole, 1e-6)


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SimulationError, match=r"weights \(3, 1, 1, 4\) in 2 groups do not fit the input"):
        run("Conv2DFusion", normal(0, 1, 2, 2, 4), normal(1, 3, 1, 1, 4), group=2)


@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
def test_matrix_product(transpose_a: bool, transpose_b: bool) -> None:
    a = normal(0, 2, 5, 4) if transpose_a else normal(0, 2, 4, 5)
    b = normal(1, 2, 3, 5) if transpose_b else normal(1, 2, 5, 3)
    bias = normal(2, 3)
    y = run("MatMulFusion", a, b, bias, transpose_a=transpose_a, transpose_b=transpose_b, activation_type=3)
    product = (a.swapaxes(1, 2) if transpose_a else a) @ (b.swapaxes(1, 2) if transpose_b else b)
    close(y, np.clip(product + bias, 0, 6))


def test_full_connection_flattens_from_its_axis() -> None:
    x, weight = normal(0, 2, 3, 2, 4), normal(1, 5, 24)
    close(run("FullConnection", x, weight, use_axis=True, axis=1), x.reshape(2, 24) @ weight.T)
    close(run("FullConnection", x, weight[:, :8], use_axis=True, axis=2), x.reshape(2, 3, 8) @ weight[:, :8].T)


# --- elementwise

FUNCTIONS = {
    ActivationType.RELU: lambda x: max(x, 0),
    ActivationType.RELU6: lambda x: min(max(x, 0), 6),
    ActivationType.SIGMOID: lambda x: 1 / (1 + math.exp(-x)),
    ActivationType.LEAKY_RELU: lambda x: x if x > 0 else 0.1 * x,
    ActivationType.TANH: math.tanh,
    ActivationType.HSWISH: lambda x: x * min(max(x + 3, 0), 6) / 6,
    ActivationType.HSIGMOID: lambda x: min(max(x + 3, 0), 6) / 6,
    ActivationType.SWISH: lambda x: x / (1 + math.exp(-x)),
    ActivationType.GELU: lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
}


@pytest.mark.parametrize("kind", list(FUNCTIONS), ids=lambda kind: kind.name)
def test_activation(kind: ActivationType) -> None:
    x = np.linspace(-12, 12, 997, dtype=np.float32)
    y = run("Activation", x, activation_type=int(kind), alpha=0.1)
    close(y, [FUNCTIONS[kind](float(value)) for value in x], 1e-6)


def test_gelu_with_tanh() -> None:
    x = np.linspace(-5, 5, 101, dtype=np.float32)
    exact, approximate = (run("Activation", x, activation_type=19, approximate=flag) for flag in (False, True))
    assert 1e-5 < np.abs(exact - approximate).max() < 1e-3


def test_a_sigmoid_of_large_numbers_does_not_warn() -> None:
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        assert run("Activation", np.array([-1e4, 1e4], np.float32), activation_type=2).tolist() == [0, 1]


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(SimulationError, match=r"its activation is 4; allowed: 0 \(NONE\), 1 \(RELU\)"):
        run("Activation", normal(0, 2), activation_type=4)


@given(st.floats(-8, 8))
@settings(max_examples=300, deadline=None)
def test_erf_is_accurate(x: float) -> None:
    assert abs(float(float_ops.erf(np.array(x))) - math.erf(x)) < 2e-8


@pytest.mark.parametrize(
    ("op", "function"),
    [("AddFusion", np.add), ("SubFusion", np.subtract), ("MulFusion", np.multiply), ("DivFusion", np.divide)],
)
def test_arithmetic_broadcasts_and_activates(op: str, function: Any) -> None:
    a, b = normal(0, 2, 3, 4, 5), normal(1, 2, 1, 1, 5) + 3
    close(run(op, a, b), function(a, b))
    close(run(op, a, b[0, 0, 0], activation_type=1), np.maximum(function(a, b[0, 0, 0]), 0))


@pytest.mark.parametrize(("op", "function"), [("Maximum", np.maximum), ("Minimum", np.minimum)])
def test_the_larger_and_the_smaller_of_two(op: str, function: Any) -> None:
    a, b = normal(0, 2, 3, 4), normal(1, 4)
    close(run(op, a, b), function(a, b))
    close(run(op, a, np.array([0.3], np.float32)), function(a, np.float32(0.3)))


def test_functions_of_one_number() -> None:
    x = np.abs(normal(0, 4, 5)) + 0.1
    close(run("Sqrt", x), np.sqrt(x))
    close(run("Rsqrt", x), 1 / np.sqrt(x))
    close(run("Erf", x), np.vectorize(math.erf)(x), 1e-6)
    close(run("Abs", -x), x)
    close(run("Log", x), np.log(x))
    close(run("ExpFusion", x), np.exp(x))
    close(run("ExpFusion", x, base=2.0, scale=0.5, shift=1.0), 2 ** (0.5 * x + 1))
    close(run("PowFusion", x, np.array([2.5], np.float32)), x**2.5)
    close(run("PowFusion", x, np.array(2.0, np.float32), scale=3.0, shift=1.0), (3 * x + 1) ** 2)


def test_cast_takes_the_dtype_of_the_output() -> None:
    x = np.array([1.7, -2.2], np.float32)
    assert run("Cast", x, dtype="int32").tolist() == [1, -2]
    assert run("Cast", ints(3, 4), dtype="float32").tolist() == [3.0, 4.0]


# --- pools, reductions, normalisations


def test_pools_of_a_padded_plane() -> None:
    x = normal(0, 2, 5, 5, 3)
    attrs = {"kernel_size": [3, 3], "strides": [2, 2], "pad_mode": 0, "pad": [1, 1, 1, 1]}
    largest, average = run("MaxPoolFusion", x, **attrs), run("AvgPoolFusion", x, **attrs)
    for i in range(3):
        for j in range(3):
            window = x[:, max(2 * i - 1, 0) : 2 * i + 2, max(2 * j - 1, 0) : 2 * j + 2]
            close(largest[:, i, j], window.max(axis=(1, 2)))
            close(average[:, i, j], window.mean(axis=(1, 2)))
    close(run("AvgPoolFusion", x, **{"global": True}, activation_type=1), np.maximum(x.mean((1, 2), keepdims=True), 0))


def sum_of_squares(x: np.ndarray, axis: tuple[int, ...], keepdims: bool) -> np.ndarray:
    return np.sum(x * x, axis, keepdims=keepdims)


REDUCTIONS = {
    ReduceMode.MEAN: np.mean,
    ReduceMode.MAX: np.max,
    ReduceMode.MIN: np.min,
    ReduceMode.PROD: np.prod,
    ReduceMode.SUM: np.sum,
    ReduceMode.SUM_SQUARE: sum_of_squares,
}


@pytest.mark.parametrize("mode", list(REDUCTIONS), ids=lambda mode: mode.name)
@pytest.mark.parametrize("keep", [True, False])
def test_reductions(mode: ReduceMode, keep: bool) -> None:
    x = normal(0, 2, 3, 4, 5)
    y = run("ReduceFusion", x, ints(1, -2), mode=int(mode), keep_dims=keep)
    close(y, REDUCTIONS[mode](x, axis=(1, 2), keepdims=keep))


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(SimulationError, match="its reduction is 8; allowed: 0 … 5"):
        run("ReduceFusion", normal(0, 2, 3), ints(1), mode=8)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_softmax(axis: int) -> None:
    x = normal(0, 4, 5, 6) * 30
    exponentials = np.exp(x.astype(np.float64) - x.max(axis=axis, keepdims=True))
    close(run("Softmax", x, axis=[axis]), exponentials / exponentials.sum(axis=axis, keepdims=True))


@pytest.mark.parametrize("first", [1, 2, -1])
def test_layer_norm(first: int) -> None:
    x = normal(0, 3, 4, 5) * 2 + 1
    gamma, beta = normal(1, *x.shape[first:]), normal(2, *x.shape[first:])
    axes = tuple(range(first % 3, 3))
    y = run("LayerNormFusion", x, gamma, beta, begin_norm_axis=first, begin_params_axis=first, epsilon=1e-3)
    expected = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-3) * gamma + beta
    close(y, expected)


# --- movers


def test_movers() -> None:
    x = normal(0, 2, 3, 4)
    np.testing.assert_array_equal(run("Reshape", x, ints(2, -1), shape=(2, 12)), x.reshape(2, 12))
    np.testing.assert_array_equal(run("Transpose", x, ints(0, 2, 1)), x.swapaxes(1, 2))
    np.testing.assert_array_equal(run("Unsqueeze", x, axis=[1], shape=(2, 1, 3, 4)), x[:, None])
    np.testing.assert_array_equal(run("Squeeze", x[:, :1], axis=[1], shape=(2, 4)), x[:, 0])
    np.testing.assert_array_equal(run("Concat", x, x[:, :1], axis=1), np.concatenate([x, x[:, :1]], 1))
    np.testing.assert_array_equal(run("PadFusion", x, ints(0, 0, 1, 0, 0, 2), constant_value=0.5),
                                  np.pad(x, ((0, 0), (1, 0), (0, 2)), constant_values=0.5))  # fmt: skip
    np.testing.assert_array_equal(run("SliceFusion", x, ints(1), ints(2), axes=[1]), x[:, 1:3])
    np.testing.assert_array_equal(run("StridedSlice", x, ints(0, 2), ints(2, 0), ints(1, -1)), x[:, 2:0:-1])
    np.testing.assert_array_equal(run("Gather", x, ints(2, 0), ints(1)), x[:, [2, 0]])
    for part, expected in zip(run_all("Split", x, axis=2, outputs=2), (x[..., :2], x[..., 2:])):
        np.testing.assert_array_equal(part, expected)
    for part, expected in zip(run_all("Split", x, axis=1, size_splits=[2, -1], outputs=2), (x[:, :2], x[:, 2:])):
        np.testing.assert_array_equal(part, expected)


# --- resizes


def resized(x: np.ndarray, height: int, width: int, **attrs: Any) -> np.ndarray:
    return run("Resize", x, shape=(x.shape[0], height, width, x.shape[3]), **attrs)


@pytest.mark.parametrize("transform", [0, 1, 2])
def test_bilinear(transform: int) -> None:
    x = normal(0, 1, 4, 5, 2)
    y = resized(x, 7, 9, coordinate_transform_mode=transform)
    for i in range(7):
        for j in range(9):
            spots = []
            for at, size, new in ((i, 4, 7), (j, 5, 9)):
                spot = (at * size / new, at * (size - 1) / (new - 1), (at + 0.5) * size / new - 0.5)[transform]
                spots.append(min(max(spot, 0), size - 1))
            # Along each axis the weights of a triangle around the spot.
            rows, columns = (np.maximum(1 - np.abs(np.arange(size) - spot), 0) for size, spot in zip((4, 5), spots))
            close(y[0, i, j], np.einsum("r,s,rsc->c", rows, columns, x[0]))


@pytest.mark.parametrize("transform", [0, 1])
def test_nearest(transform: int) -> None:
    x = normal(0, 2, 2, 3, 2)
    rows, columns = ([0, 0, 1], [0, 0, 1, 2]) if transform == 0 else ([0, 1, 1], [0, 1, 1, 2])
    np.testing.assert_array_equal(
        resized(x, 3, 4, method=1, coordinate_transform_mode=transform), x[:, rows][:, :, columns]
    )


def test_resizes_that_are_refused() -> None:
    with pytest.raises(SimulationError, match="its method is 1 with the coordinates 2; allowed"):
        resized(normal(0, 1, 2, 2, 1), 4, 4, method=1, coordinate_transform_mode=2)
    with pytest.raises(SimulationError, match=r"a resize reads \(N, H, W, C\), found 3 dimensions"):
        run("Resize", normal(0, 2, 2, 1), shape=(4, 4, 1))
