from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from msqkd.quant.fake_quant import OBSERVE, OFF, QUANTIZE, FakeQuantActivation, FakeQuantWeight
from msqkd.quant.plan import Group, WeightQuant
from msqkd.quant.qparams import activation_qparams, weight_clip_ratio, weight_qparams


class Weighted(nn.Cell):
    """Sum of a cell's answer, weighted: its gradient is what the cell does to `dout`."""

    def __init__(self, cell: nn.Cell, dout: np.ndarray) -> None:
        super().__init__()
        self.cell, self.dout = cell, ms.Tensor(dout)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return (self.cell(x) * self.dout).sum()


def gradient_of(cell: nn.Cell, x: np.ndarray, dout: np.ndarray) -> np.ndarray:
    return ms.grad(Weighted(cell, dout).set_train(cell.training))(ms.Tensor(x)).asnumpy()


GROUP = Group("x", 8, False, "ema", 99.99, 0, "default")


@pytest.fixture(params=[ms.GRAPH_MODE, ms.PYNATIVE_MODE], ids=["graph", "pynative"])
def mode(request: pytest.FixtureRequest) -> Iterator[int]:
    before = ms.get_context("mode")
    ms.set_context(mode=request.param)
    yield request.param
    ms.set_context(mode=before)


def quantizer(low: float, high: float, non_negative: bool = False, **settings: object) -> FakeQuantActivation:
    cell = FakeQuantActivation(replace(GROUP, range=(low, high), **settings), non_negative)
    cell.phase_of_quant = QUANTIZE
    return cell


def samples(low: float, high: float) -> np.ndarray:
    """Values inside and outside a range, the ends and ties of the grid among them."""
    scale = np.float32(max(high - low, 1e-3) / 255)
    rng = np.random.default_rng(0)
    spread = rng.uniform(1.5 * low - 0.1, 1.5 * high + 0.1, 500)
    ties = (np.arange(-260, 260) + 0.5) * scale
    return np.concatenate([spread, ties, [low, high, 0.0, -0.0, 1e6, -1e6]]).astype(np.float32)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_activation_equals_numpy_bit_for_bit(mode: int, bits: int, symmetric: bool) -> None:
    for low, high in [(-1.0, 3.0)] if bits not in (4, 8) else [(-1.0, 3.0), (-2.7, 0.3), (0.0, 5.5), (0.1, 0.2)]:
        cell = quantizer(low, high, bits=bits, symmetric=symmetric)
        x = samples(low, high)
        expected = replace(GROUP, range=(low, high), bits=bits, symmetric=symmetric).qparams().fake_quantize(x)
        np.testing.assert_array_equal(cell(ms.Tensor(x)).asnumpy(), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_non_negative_activation_equals_numpy(mode: int, bits: int) -> None:
    x = np.abs(samples(0.0, 6.0))
    cell = quantizer(0.0, 6.0, non_negative=True, bits=bits)
    np.testing.assert_array_equal(cell(ms.Tensor(x)).asnumpy(), activation_qparams(0.0, 6.0, bits).fake_quantize(x))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("axis", [None, 0])
def test_weight_equals_numpy_bit_for_bit(mode: int, bits: int, axis: int | None) -> None:
    w = np.random.default_rng(bits).normal(size=(5, 3, 3, 3)).astype(np.float32)
    w[2] = 0.0  # a dead channel
    w[3] *= 1e-20
    cell = FakeQuantWeight(WeightQuant("conv", bits, axis, "minmax", "default"), w.shape)
    np.testing.assert_array_equal(cell(ms.Tensor(w)).asnumpy(), weight_qparams(w, bits, axis).fake_quantize(w))


@pytest.mark.parametrize("axis", [None, 0])
def test_clipped_weight_equals_numpy_bit_for_bit(mode: int, axis: int | None) -> None:
    w = np.random.default_rng(1).standard_t(3, size=(4, 50)).astype(np.float32)
    ratio = weight_clip_ratio(w, 4, axis)
    assert (ratio < 1).any()
    cell = FakeQuantWeight(WeightQuant("fc", 4, axis, "mse", "default", ratio), w.shape)
    expected = weight_qparams(w, 4, axis, clip_ratio=ratio).fake_quantize(w)
    np.testing.assert_array_equal(cell(ms.Tensor(w)).asnumpy(), expected)


def test_weight_scale_follows_the_weight(mode: int) -> None:
    w = np.float32([[1.0, -0.3], [0.2, 0.1]])
    cell = FakeQuantWeight(WeightQuant("fc", 8, None, "minmax", "default"), w.shape)
    for factor in (1.0, 10.0):
        scaled = np.float32(w * factor)
        np.testing.assert_array_equal(
            cell(ms.Tensor(scaled)).asnumpy(), weight_qparams(scaled, 8).fake_quantize(scaled)
        )


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradient_passes_inside_the_range_and_stops_outside(mode: int, symmetric: bool) -> None:
    cell = quantizer(-1.0, 3.0, symmetric=symmetric)
    q = activation_qparams(-1.0, 3.0, 8, symmetric)
    low, high = float(q.lo), float(q.hi)
    x = np.float32([low - 1, low - 0.05, low + 0.05, -0.1, 0.0, 0.5, high - 0.05, high + 0.05, high + 9])
    dout = np.arange(1, x.size + 1, dtype=np.float32)
    gradient = gradient_of(cell, x, dout)
    np.testing.assert_array_equal(gradient, np.where((x > low) & (x < high), dout, 0))


def test_gradient_of_a_non_negative_activation(mode: int) -> None:
    cell = quantizer(0.0, 2.0, non_negative=True)
    x = np.float32([0.01, 1.0, 1.99, 2.01, 50.0])
    gradient = gradient_of(cell, x, np.ones_like(x))
    np.testing.assert_array_equal(gradient, [1, 1, 1, 0, 0])


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_gradient_of_a_weight_is_straight_through(mode: int, ratio: float) -> None:
    w = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    cell = FakeQuantWeight(WeightQuant("fc", 4, 0, "mse", "default", np.full(3, ratio, np.float32)), w.shape)
    dout = np.random.default_rng(1).normal(size=w.shape).astype(np.float32)
    gradient = gradient_of(cell, w, dout)
    np.testing.assert_array_equal(gradient, dout)


def observing(observer: str) -> FakeQuantActivation:
    cell = FakeQuantActivation(replace(GROUP, observer=observer))
    cell.phase_of_quant = OBSERVE
    cell.set_train()
    return cell


BATCHES = [np.random.default_rng(i).normal(i, 1 + i, size=(4, 5)).astype(np.float32) for i in range(4)]


def test_minmax_is_the_running_minimum_and_maximum(mode: int) -> None:
    cell = observing("minmax")
    for count, batch in enumerate(BATCHES, start=1):
        np.testing.assert_array_equal(cell(ms.Tensor(batch)).asnumpy(), batch)
        seen = np.concatenate(BATCHES[:count])
        assert cell.range() == (seen.min(), seen.max())


def test_ema_equals_numpy(mode: int) -> None:
    cell = observing("ema")
    expected: np.ndarray | None = None
    for batch in BATCHES:
        cell(ms.Tensor(batch))
        ends = np.float32([batch.min(), batch.max()])
        expected = ends if expected is None else 0.9 * expected + 0.1 * ends
        np.testing.assert_allclose(cell.range(), expected, rtol=1e-6)


@pytest.mark.parametrize("observer", ["ema", "minmax"])
def test_a_batch_that_is_not_finite_leaves_the_range_alone(mode: int, observer: str) -> None:
    cell = observing(observer)
    broken = BATCHES[0].copy()
    broken[0, 0] = np.nan
    cell(ms.Tensor(broken))
    assert cell.range() is None, "nothing sound was seen yet"
    cell(ms.Tensor(BATCHES[1]))
    before = cell.range()
    for bad in (np.nan, np.inf, -np.inf):
        broken[0, 0] = bad
        cell(ms.Tensor(broken))
        assert cell.range() == before


def test_nothing_is_observed_in_evaluation_or_when_off(mode: int) -> None:
    cell = observing("minmax")
    cell.set_train(False)
    cell(ms.Tensor(BATCHES[0]))
    assert cell.range() is None
    cell.set_train()
    cell.phase_of_quant = OFF
    cell.compile_cache.clear()
    np.testing.assert_array_equal(cell(ms.Tensor(BATCHES[0])).asnumpy(), BATCHES[0])
    assert cell.range() is None


def test_the_observer_passes_gradients_through(mode: int) -> None:
    cell = observing("ema")
    gradient = gradient_of(cell, BATCHES[0], np.full_like(BATCHES[0], 3.0))
    np.testing.assert_array_equal(gradient, np.full(BATCHES[0].shape, 3.0))


def test_a_new_range_changes_what_a_compiled_cell_computes() -> None:
    ms.set_context(mode=ms.GRAPH_MODE)
    cell = quantizer(-1.0, 1.0)
    x = samples(-4.0, 4.0)
    cell(ms.Tensor(x))
    cell.set_range(-4.0, 4.0)
    np.testing.assert_array_equal(cell(ms.Tensor(x)).asnumpy(), activation_qparams(-4.0, 4.0).fake_quantize(x))


def test_state_is_not_trained() -> None:
    class Holder(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.quant = quantizer(-1.0, 1.0)
            self.fc = nn.Dense(2, 2)

        def construct(self, x):  # type: ignore[no-untyped-def]
            return self.quant(self.fc(x))

    assert {p.name for p in Holder().trainable_params()} == {"fc.weight", "fc.bias"}
    assert ops.is_tensor(Holder()(ms.Tensor(np.ones((1, 2), np.float32))))
