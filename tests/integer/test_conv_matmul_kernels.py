from __future__ import annotations

from typing import Any, Optional

import numpy as np
import plain_integers as plain
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_integers import call, params

from msqkd.errors import SimulationError
from msqkd.integer.kernels import conv
from msqkd.integer.kernels.conv import conv2d
from msqkd.integer.kernels.matmul import Accumulator, full_connection, matmul
from msqkd.integer.program import ActivationType, PadMode, TensorQuant
from msqkd.integer.registry import Call

RELU, RELU6 = ActivationType.RELU, ActivationType.RELU6


def requantised(
    sums: np.ndarray,
    x: TensorQuant,
    w: TensorQuant,
    y: TensorQuant,
    activation: int = 0,
    up: Optional[np.ndarray] = None,
) -> np.ndarray:
    """int8 of int64 sums, channels last; `up` says where the last shift rounds halves upwards."""
    zero = int(y.zero_point[0])
    ratio = (np.float32(x.scale[0]) * w.scale.astype(np.float32)).astype(np.float64) / np.float64(
        np.float32(y.scale[0])
    )
    factors = [plain.multiplier_of(float(value)) for value in np.broadcast_to(ratio, sums.shape[-1:])]
    low, high = plain.bounds(activation, y)
    up = np.zeros(sums.shape[:-1], bool) if up is None else np.broadcast_to(up, sums.shape[:-1])
    out = np.empty(sums.shape, np.int8)
    for index, value in np.ndenumerate(sums):
        scaled = plain.scaled(plain.wrap(int(value)), *factors[index[-1]], bool(up[index[:-1]]))
        out[index] = plain.clip(plain.wrap(scaled + zero), low, high)
    return out


def correlate(
    x: np.ndarray, w: np.ndarray, stride: tuple[int, int], dilation: tuple[int, int], group: int
) -> np.ndarray:
    """Sums of products of int64 (N, H, W, I), padding included, and (O, KH, KW, I / group): one window at a time."""
    reach = [(w.shape[1] - 1) * dilation[0] + 1, (w.shape[2] - 1) * dilation[1] + 1]
    rows, columns = ((x.shape[1 + i] - reach[i]) // stride[i] + 1 for i in (0, 1))
    out = np.zeros((len(x), rows, columns, len(w)), np.int64)
    depth, size = w.shape[3], len(w) // group
    for row in range(rows):
        for column in range(columns):
            top, left = row * stride[0], column * stride[1]
            seen = x[:, top : top + reach[0] : dilation[0], left : left + reach[1] : dilation[1]]
            for g in range(group):
                part, maps = seen[..., g * depth : (g + 1) * depth], slice(g * size, (g + 1) * size)
                out[:, row, column, maps] = np.einsum("nijc,oijc->no", part, w[maps])
    return out


def reference(
    given: Call, pads: tuple[int, int, int, int], fill: int = 0, up: Optional[np.ndarray] = None
) -> np.ndarray:
    """What a convolution should give, with the padding [up, down, left, right] of values `fill` less the zero point."""
    (x, x_quant), (w, w_quant) = ((operand.data.astype(np.int64), operand.quant) for operand in given.inputs[:2])
    x, w = x - x_quant.zero_point[0], w - w_quant.zero_point.reshape(-1, 1, 1, 1)
    x = np.pad(x, ((0, 0), pads[:2], pads[2:], (0, 0)), constant_values=fill)
    attrs = given.attrs
    one = (1, 1)
    sums = correlate(x, w, attrs.get("stride", one), attrs.get("dilation", one), attrs.get("group", 1))
    if len(given.inputs) > 2:
        sums = sums + given.inputs[2].data
    return requantised(sums, x_quant, w_quant, given.quant, attrs.get("activation_type", 0), up)


def convolution(seed: int, x_shape: tuple[int, ...], w_shape: tuple[int, ...], **options: Any) -> Call:
    """A call with random operands; a third of the outputs saturate."""
    rng = np.random.default_rng(seed)
    per_channel, w_zero = options.pop("per_channel", True), options.pop("w_zero", 0)
    bias, machine = options.pop("bias", True), options.pop("machine", "x86")
    x = rng.integers(-128, 128, x_shape, dtype=np.int8)
    w = rng.integers(-127, 128, w_shape, dtype=np.int8)
    w_quant = params(rng.uniform(0.002, 0.01, w_shape[0] if per_channel else 1), w_zero)
    spread = np.sqrt(np.prod(w_shape[1:]) * 5400.0 * 5400.0)
    y_quant = params(0.02 * 0.006 * spread / rng.uniform(40, 110), int(rng.integers(-128, 128)))
    inputs: list[tuple[np.ndarray, Optional[TensorQuant]]] = [
        (x, params(0.02, int(rng.integers(-128, 128)))),
        (w, w_quant),
    ]
    if bias:
        inputs.append((rng.integers(-20000, 20000, w_shape[0]).astype(np.int32), None))
    return call(inputs, y_quant, machine=machine, **options)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_convolution_is_the_sum_of_products(data: st.DataObject) -> None:
    draw = data.draw
    group, depth = draw(st.sampled_from([(1, 1), (1, 3), (1, 5), (2, 2), (3, 1), (6, 1)]))
    kernel_size = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    pads = (0, 0, 0, 0) if kernel_size == (1, 1) else tuple(draw(st.lists(st.integers(0, 3), min_size=4, max_size=4)))
    depthwise = draw(st.booleans()) and depth == 1
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    maps = group if depthwise else group * draw(st.integers(1, 3))
    if maps == group and depth == 1:
        dilation = (dilation[0], dilation[0])
    plane = tuple((kernel_size[i] - 1) * dilation[i] + draw(st.integers(1, 5)) for i in (0, 1))
    given_call = convolution(
        draw(st.integers(0, 2**32 - 1)),
        (draw(st.integers(1, 3)), *plane, group * depth),
        (maps, *kernel_size, depth),
        stride=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        dilation=dilation,
        pad_mode=PadMode.PAD,
        pad_list=list(pads),
        group=group,
        activation_type=draw(st.sampled_from([0, RELU, RELU6])),
        per_channel=draw(st.booleans()) and (group == 1 or (maps == group and depth == 1)),
        w_zero=draw(st.sampled_from([0, 0, 7, -30])),
        bias=draw(st.booleans()),
    )
    assert np.array_equal(conv2d(given_call)[0], reference(given_call, pads))


@pytest.mark.parametrize(
    ("plane", "stride", "pads"),
    [
        ((5, 6), (1, 1), (1, 1, 1, 1)),
        ((5, 6), (2, 2), (1, 1, 0, 1)),
        ((7, 4), (3, 1), (1, 1, 1, 1)),
        ((2, 9), (4, 4), (0, 1, 1, 1)),
    ],
)
def test_same_padding_puts_the_odd_element_at_the_end(
    plane: tuple[int, int], stride: tuple[int, int], pads: tuple[int, int, int, int]
) -> None:
    given_call = convolution(
        1, (2, *plane, 3), (4, 3, 3, 3), stride=stride, pad_mode=PadMode.SAME, pad_list=[9, 9, 9, 9], kernel_size=[3, 3]
    )
    found = conv2d(given_call)[0]
    assert found.shape[1:3] == (-(-plane[0] // stride[0]), -(-plane[1] // stride[1]))
    assert np.array_equal(found, reference(given_call, pads))


def test_valid_padding_is_explicit_padding() -> None:
    given_call = convolution(2, (1, 5, 5, 3), (4, 3, 3, 3), pad_mode=PadMode.VALID, pad_list=[1, 0, 0, 2])
    assert np.array_equal(conv2d(given_call)[0], reference(given_call, (1, 0, 0, 2)))
    plain_valid = convolution(2, (1, 5, 5, 3), (4, 3, 3, 3), pad_mode=PadMode.VALID)
    assert conv2d(plain_valid)[0].shape == (1, 3, 3, 4)


@pytest.mark.parametrize("group", [1, 2])
def test_a_pointwise_convolution_pads_with_the_value_0(group: int) -> None:
    options = {"pad_list": [1, 2, 0, 1], "group": group, "per_channel": group == 1, "stride": (1, 2)}
    given_call = convolution(3, (2, 4, 5, 4), (6, 1, 1, 4 // group), **options)
    zero_point = int(given_call.inputs[0].quant.zero_point[0])
    assert zero_point != 0
    assert np.array_equal(conv2d(given_call)[0], reference(given_call, (1, 2, 0, 1), fill=-zero_point))


def test_a_pointwise_depthwise_convolution_pads_with_the_zero_point() -> None:
    given_call = convolution(3, (2, 4, 5, 4), (4, 1, 1, 1), pad_list=[1, 1, 1, 1], group=4)
    assert np.array_equal(conv2d(given_call)[0], reference(given_call, (1, 1, 1, 1)))


@pytest.mark.parametrize(("shape", "group"), [((6, 3, 3, 5), 1), ((6, 3, 3, 1), 6), ((6, 3, 3, 2), 3)])
def test_the_result_does_not_depend_on_the_chunks(
    shape: tuple[int, ...], group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_call = convolution(
        4, (5, 9, 8, shape[3] * group), shape, stride=(2, 1), pad_list=[2, 1, 1, 1], group=group, per_channel=group != 3
    )
    whole = conv2d(given_call)[0]
    for limit in (1, 3000, 20000):
        monkeypatch.setattr(conv, "_CHUNK_BYTES", limit)
        assert np.array_equal(conv2d(given_call)[0], whole)


def test_sums_beyond_24_bits_are_exact() -> None:
    """All products of one sign, and each odd: float32 would lose bits of the sum."""
    x = np.full((1, 3, 3, 300), 127, np.int8)
    w = np.full((2, 3, 3, 300), 127, np.int8)
    w[1] = -127
    bias = np.array([1, -3], np.int32)
    given_call = call([(x, params(0.01, -128)), (w, params(0.01)), (bias, None)], params(1e4, 3))
    sums = reference(given_call, (0, 0, 0, 0))
    assert abs(255 * 127 * 2700) > 2**26
    assert np.array_equal(conv2d(given_call)[0], sums)


@pytest.mark.parametrize("group", [1, 4])
def test_sums_beyond_32_bits_wrap(group: int) -> None:
    rng = np.random.default_rng(5)
    x = rng.integers(100, 128, (1, 4, 4, 4), dtype=np.int8)
    w = rng.integers(100, 128, (4, 3, 3, 4 // group), dtype=np.int8)
    bias = np.array([2**31 - 1000, -(2**31), 5, 2**31 - 10**6], np.int32)
    given_call = call([(x, params(0.01, -128)), (w, params(0.01)), (bias, None)], params(2e3, 3), group=group)
    assert np.array_equal(conv2d(given_call)[0], reference(given_call, (0, 0, 0, 0)))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 700), st.integers(1, 3), st.integers(1, 255))
def test_accumulator_is_exact(seed: int, depth: int, columns: int, peak: int) -> None:
    rng = np.random.default_rng(seed)
    left = rng.choice([-peak, peak, peak - 1], (3, depth))
    matrix = rng.choice([-255, 255, 254], (depth, columns)).astype(np.int16)
    bias = rng.integers(-(2**31), 2**31, columns) * int(rng.integers(0, 2))
    expected = left @ matrix.astype(np.int64) + bias
    found = Accumulator(matrix, bias, peak)(left.astype(np.float32))
    assert found.astype(np.int64).tolist() == [[plain.wrap(value) for value in row] for row in expected.tolist()]


def halved(x_shape: tuple[int, ...], machine: str, stride: int, pad: int) -> Call:
    """A depthwise convolution whose requantisation divides by 8, with many negative halves."""
    rng = np.random.default_rng(6)
    channels = x_shape[3]
    x = rng.integers(-20, 21, x_shape, dtype=np.int8)
    w = rng.integers(-3, 4, (channels, 3, 3, 1), dtype=np.int8)
    inputs = [(x, params(0.5, 0)), (w, params(np.full(channels, 0.5)))]
    return call(inputs, params(2.0, 5), machine=machine, group=channels, stride=(stride, stride), pad_list=[pad] * 4)


def corrected(x_shape: tuple[int, ...], pad: int, widths: list[int]) -> np.ndarray:
    """Where arm64 rounds halves up with stride 1: all but the even beginning of each stretch of columns."""
    rows, columns = x_shape[1] - 2 + 2 * pad, x_shape[2] - 2 + 2 * pad
    up = np.ones((rows, columns), bool)
    start = pad
    for width in widths:
        keep = width - 1 if width % 2 else width - 2
        up[pad : rows - pad, start : start + keep] = False
        start += width
    assert start == columns - pad
    return up


@pytest.mark.parametrize(
    ("x_shape", "pad", "widths"),
    [
        ((2, 6, 8, 8), 1, [6]),
        ((1, 5, 9, 16), 1, [7]),
        ((1, 2, 3, 8), 1, [1]),
        ((1, 6, 7, 8), 0, [5]),
        ((1, 4, 68, 64), 1, [66]),
        ((1, 4, 68, 72), 1, [30, 30, 6]),
        ((1, 3, 152, 8), 1, [30, 30, 30, 30, 30]),
        ((1, 3, 35, 8), 1, [33]),
    ],
)
def test_arm64_rounds_some_depthwise_halves_up(x_shape: tuple[int, ...], pad: int, widths: list[int]) -> None:
    pads = (pad, pad, pad, pad)
    x86, arm64 = halved(x_shape, "x86", 1, pad), halved(x_shape, "arm64", 1, pad)
    expected = reference(arm64, pads, up=corrected(x_shape, pad, widths))
    assert np.array_equal(conv2d(arm64)[0], expected)
    assert np.array_equal(conv2d(x86)[0], reference(x86, pads))
    assert not np.array_equal(conv2d(x86)[0], expected)


def test_arm64_rounds_all_depthwise_halves_up_with_stride_2() -> None:
    given_call = halved((2, 7, 9, 8), "arm64", 2, 1)
    assert np.array_equal(conv2d(given_call)[0], reference(given_call, (1, 1, 1, 1), up=np.array(True)))


@pytest.mark.parametrize(
    ("x_shape", "stride", "pad"),
    [((1, 6, 6, 12), 1, 1), ((1, 6, 6, 8), 2, 1), ((1, 7, 7, 8), 3, 1), ((1, 7, 7, 8), 1, 2)],
)
def test_other_depthwise_convolutions_are_alike_on_arm64(x_shape: tuple[int, ...], stride: int, pad: int) -> None:
    x86, arm64 = halved(x_shape, "x86", stride, pad), halved(x_shape, "arm64", stride, pad)
    assert np.array_equal(conv2d(x86)[0], conv2d(arm64)[0])


@pytest.mark.parametrize(
    ("w_shape", "options", "message"),
    [
        (
            (4, 3, 3, 2),
            {"group": 2, "per_channel": True},
            "refuses one weight scale a channel in a grouped convolution",
        ),
        ((4, 3, 3, 4), {"activation_type": ActivationType.SIGMOID}, "activation_type is 2; allowed: 0"),
        ((4, 3, 3, 4), {"kernel_size": [3, 5]}, r"kernel_size is \[3, 5\]; allowed: \[3, 3\]"),
        ((4, 3, 3, 4), {"stride": [1]}, "stride is .*; allowed: 2 numbers"),
        ((4, 3, 3, 3), {}, "does not fit an input of 4 channels"),
        ((4, 3, 3, 4), {"group": 2}, "does not fit an input of 4 channels and group 2"),
        ((4, 9, 9, 4), {}, "does not fit the padded input"),
        ((4, 1, 1, 4), {"pad_list": [0, 1, 0, 0]}, "reads beyond the input of a 1x1 convolution"),
        ((4, 3, 3, 1), {"dilation": [1, 2], "group": 4}, "reads the wrong rows"),
    ],
)
def test_what_the_runtime_cannot_do_is_refused(w_shape: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(SimulationError, match=r"^step: .*" + message):
        conv2d(convolution(7, (1, 6, 6, 4), w_shape, **options))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_wrong_parameters_are_refused(number: int) -> None:
    quants = [params(0.1), params(0.1), params(0.1)]
    quants[number] = params([0.1, 0.2, 0.3])
    x, w = np.zeros((1, 2, 2, 2), np.int8), np.zeros((2, 1, 1, 2), np.int8)
    with pytest.raises(SimulationError, match=r"^step: .*3 scales"):
        conv2d(call([(x, quants[0]), (w, quants[1])], quants[2]))


@pytest.mark.parametrize("bias", [np.zeros(2, np.float32), np.zeros(3, np.int32)])
def test_a_wrong_bias_is_refused(bias: np.ndarray) -> None:
    x, w = np.zeros((1, 2), np.int8), np.zeros((2, 2), np.int8)
    with pytest.raises(SimulationError, match=r"^step: its bias is .*; allowed: int32 of 2"):
        matmul(call([(x, params(0.1)), (w, params(0.1)), (bias, None)], params(0.1)))


def product(x: np.ndarray, w: np.ndarray, given: Call) -> np.ndarray:
    """The reference for matrices laid out as they are multiplied."""
    x_quant, w_quant = (operand.quant for operand in given.inputs[:2])
    sums = np.matmul(x.astype(np.int64) - x_quant.zero_point[0], w.astype(np.int64) - w_quant.zero_point)
    if len(given.inputs) > 2:
        sums = sums + given.inputs[2].data
    return requantised(sums, x_quant, w_quant, given.quant, given.attrs.get("activation_type", 0))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_matrix_products(data: st.DataObject) -> None:
    draw = data.draw
    batch = draw(st.sampled_from([(), (3,), (2, 3)]))
    shared = draw(st.booleans())
    rows, depth, columns = draw(st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 5)))
    transpose_a, transpose_b, with_bias = draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.integers(-128, 128, (*batch, rows, depth), dtype=np.int8)
    w = rng.integers(-128, 128, (*(() if shared else batch), depth, columns), dtype=np.int8)
    w_quant = params(
        rng.uniform(0.001, 0.01, columns if shared and draw(st.booleans()) else 1), draw(st.sampled_from([0, 11]))
    )
    inputs: list[tuple[np.ndarray, Optional[TensorQuant]]] = [
        (x.swapaxes(-1, -2).copy() if transpose_a else x, params(0.02, int(rng.integers(-128, 128)))),
        (w.swapaxes(-1, -2).copy() if transpose_b else w, w_quant),
    ]
    if with_bias:
        inputs.append((rng.integers(-9000, 9000, columns).astype(np.int32), None))
    activation = draw(st.sampled_from([0, RELU, RELU6]))
    given_call = call(
        inputs, params(0.05, -20), transpose_a=transpose_a, transpose_b=transpose_b, activation_type=activation
    )
    assert np.array_equal(matmul(given_call)[0], product(x, w, given_call))


@pytest.mark.parametrize(
    ("shape", "attrs", "expected"),
    [
        ((3, 24), {}, (3, 5)),
        ((3, 24), {"use_axis": True, "axis": 1}, (3, 5)),
        ((3, 2, 3, 4), {"use_axis": True, "axis": 1}, (3, 5)),
        ((3, 2, 24), {"use_axis": True, "axis": 2}, (3, 2, 5)),
        ((3, 2, 24), {}, (6, 5)),
    ],
)
def test_dense_layers_flatten_their_input(
    shape: tuple[int, ...], attrs: dict[str, Any], expected: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(8)
    x, w = rng.integers(-128, 128, shape, dtype=np.int8), rng.integers(-128, 128, (5, 24), dtype=np.int8)
    bias = rng.integers(-9000, 9000, 5).astype(np.int32)
    inputs = [(x, params(0.02, 4)), (w, params(rng.uniform(0.001, 0.01, 5))), (bias, None)]
    given_call = call(inputs, params(0.2, -20), activation_type=RELU, has_bias=True, **attrs)
    found = full_connection(given_call)[0]
    assert found.shape == expected
    assert np.array_equal(found.reshape(-1, 5), product(x.reshape(-1, 24), w.T, given_call))


@pytest.mark.parametrize("function", [matmul, full_connection])
def test_inner_sizes_that_differ_are_refused(function: Any) -> None:
    x, w = np.zeros((3, 4), np.int8), np.zeros((5, 5), np.int8)
    with pytest.raises(SimulationError, match=r"^step: it multiplies .* whose inner sizes differ"):
        function(call([(x, params(0.1)), (w, params(0.1))], params(0.1)))


def test_a_ratio_the_runtime_cannot_represent_is_refused() -> None:
    x = np.zeros((2, 2), np.int8)
    with pytest.raises(SimulationError, match=r"^step: the ratio of scales 1e-12 cannot be represented"):
        matmul(call([(x, params(1e-6)), (x, params(1e-6))], params(1.0)))
    with pytest.raises(SimulationError, match=r"^step: the ratio of scales inf"):
        matmul(call([(x, params(0.1)), (x, params(0.1))], params(1e-60)))
