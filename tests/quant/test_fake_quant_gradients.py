"""The fake quantizer of activations against numpy: forward and gradient, for every kind of grid, rule and range."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from msqkd.quant.fake_quant import FOLLOW, QUANTIZE, FakeQuantActivation
from msqkd.quant.learned import LearnedScale
from msqkd.quant.plan import Group

RANGES = {"positive": (0.1, 3.0), "mixed": (-0.4, 1.7), "mostly negative": (-2.3, 0.2), "negative": (-1.9, 0.0)}
GRIDS = list(itertools.product([False, True], [False, True], [2, 4, 8]))  # symmetric, non_negative, bits
SAMPLES = 6


class Weighted(nn.Cell):
    """Sum of a cell's answer, weighted: its gradient is what the cell does to `dout`."""

    def __init__(self, cell: nn.Cell, dout: np.ndarray) -> None:
        super().__init__()
        self.cell, self.dout = cell, ms.Tensor(dout)

    def construct(self, x):  # type: ignore[no-untyped-def]
        out = self.cell(x)
        return (out * self.dout).sum(), out


@pytest.fixture
def pynative() -> Iterator[None]:
    """Nothing to compile: all combinations in a second or two."""
    before = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=before)


class Reference:
    """A grid and what it makes of x, in float64, from the definition."""

    def __init__(self, span: tuple[float, float], symmetric: bool, bits: int) -> None:
        bottom, top = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        lo, hi = min(span[0], 0.0), max(span[1], 0.0)
        if symmetric:
            self.scale, zero = max(-lo, hi) / top, 0
        else:
            self.scale = (hi - lo) / (top - bottom)
            zero = int(np.clip(np.rint(bottom - lo / self.scale), bottom, top))
        self.low, self.high = bottom - zero, top - zero
        self.levels = top if symmetric else 2**bits - 1  # Q_P of arXiv:1902.08153 for signed and for unsigned data

    def samples(self, rng: np.random.Generator, non_negative: bool) -> np.ndarray:
        """Values inside and outside the range, none on a tie or an end, where float32 may decide otherwise."""
        steps = rng.integers(self.low - 3, self.high + 4, (SAMPLES, 30)) + rng.uniform(-0.45, 0.45, (SAMPLES, 30))
        steps[:, :3] *= 2.5
        steps[np.abs(np.abs(steps - np.floor(steps)) - 0.5) < 0.02] += 0.1
        for end in (self.low, self.high):
            steps[np.abs(steps - end) < 0.02] += 0.1
        x = steps * self.scale
        return (np.abs(x) + 1e-3 * self.scale if non_negative else x).astype(np.float32)

    def forward(self, x: np.ndarray) -> np.ndarray:
        return np.clip(np.rint(x / self.scale), self.low, self.high) * self.scale

    def of_x(self, x: np.ndarray, dout: np.ndarray) -> np.ndarray:
        return np.where((x > self.low * self.scale) & (x < self.high * self.scale), dout, 0.0)

    def of_lsq(self, x: np.ndarray, dout: np.ndarray) -> float:
        """Equations 3 and 5 of arXiv:1902.08153."""
        v = x / self.scale
        piece = np.select([v <= self.low, v >= self.high], [self.low, self.high], np.rint(v) - v)
        return float((dout * piece).sum() / np.sqrt(x[0].size * self.levels))

    def of_pact(self, x: np.ndarray, dout: np.ndarray) -> float:
        """Of α (arXiv:1805.06085), and of s where it moves as α / high."""
        return float(dout[x > self.high * self.scale].sum() / self.high) if self.high else 0.0


def group(span: tuple[float, float], symmetric: bool, bits: int, learned: str = "none") -> Group:
    return Group("x", bits, symmetric, "minmax", 99.99, 0, "default", range=span, learned=learned)


def computed(cell: nn.Cell, x: np.ndarray, dout: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """What the cell makes of x, and the gradients of x and of the trained parameter, 0 where there is none."""
    whole = Weighted(cell, dout).set_train()
    trained = ms.ParameterTuple(whole.trainable_params())
    (_, out), found = ms.value_and_grad(whole, 0, trained or None, has_aux=True)(ms.Tensor(x))
    of_x, of_r = (found[0], float(found[1][0].asnumpy()[0])) if trained else (found, 0.0)
    return out.asnumpy(), of_x.asnumpy(), of_r


@pytest.mark.usefixtures("pynative")
@pytest.mark.parametrize("span", RANGES.values(), ids=RANGES)
@pytest.mark.parametrize("rule", ["none", "lsq", "pact"])
def test_forward_and_gradient_are_those_of_numpy(rule: str, span: tuple[float, float]) -> None:
    for symmetric, non_negative, bits in GRIDS:
        place = f"symmetric {symmetric}, non-negative {non_negative}, {bits} bits"
        rng = np.random.default_rng(bits)
        grid = Reference(span, symmetric, bits)
        x = grid.samples(rng, non_negative)
        dout = rng.normal(size=x.shape).astype(np.float32)
        scale = LearnedScale("x") if rule != "none" else None
        cell = FakeQuantActivation(group(span, symmetric, bits, rule), non_negative, learned=scale)
        cell.start(cell)
        cell.phase_of_quant = QUANTIZE
        out, of_x, of_r = computed(cell, x, dout)
        np.testing.assert_allclose(out, grid.forward(x), rtol=1e-5, err_msg=place)
        np.testing.assert_allclose(of_x, grid.of_x(x, dout), err_msg=place)
        of_s = {"none": 0.0, "lsq": grid.of_lsq(x, dout), "pact": grid.of_pact(x, dout)}[rule]
        np.testing.assert_allclose(of_r * grid.scale, of_s, rtol=1e-3, atol=1e-4, err_msg=place)


@pytest.mark.usefixtures("pynative")
@pytest.mark.parametrize("name", ["positive", "mixed", "negative"])
def test_the_same_where_the_range_follows_the_values(name: str) -> None:
    """Values inside the range leave it as it is; then it is fixed, and others are clipped."""
    span = RANGES[name]
    for symmetric, non_negative, bits in GRIDS:
        place = f"symmetric {symmetric}, non-negative {non_negative}, {bits} bits"
        rng = np.random.default_rng(bits)
        grid = Reference(span, symmetric, bits)
        x = grid.samples(rng, non_negative)
        dout = rng.normal(size=x.shape).astype(np.float32)
        inside = np.where((x > span[0]) & (x < span[1]), x, 0).astype(np.float32)
        cell = FakeQuantActivation(group(span, symmetric, bits), non_negative)
        for state in ("inverse", "scale", "low", "high", "slope", "offset"):
            getattr(cell, state).set_data(ms.Tensor(np.float32(1.0)))  # the phase finds them itself
        cell.phase_of_quant = FOLLOW
        out, of_x, _ = computed(cell, inside, dout)
        np.testing.assert_allclose(out, grid.forward(inside), rtol=1e-5, err_msg=place)
        np.testing.assert_allclose(of_x[inside != 0], grid.of_x(inside, dout)[inside != 0], err_msg=place)
        cell.phase_of_quant = QUANTIZE
        out, of_x, _ = computed(cell, x, dout)
        np.testing.assert_allclose(out, grid.forward(x), rtol=1e-5, err_msg=place)
        np.testing.assert_allclose(of_x, grid.of_x(x, dout), err_msg=place)


@pytest.mark.usefixtures("graph_mode")
@pytest.mark.parametrize("rule", ["none", "lsq", "pact"])
def test_a_symmetric_grid_behind_a_relu_as_it_is_compiled(rule: str) -> None:
    """Values between 127 s and 255 s are clipped: no gradient passes, and a wider step would lose less of them."""
    grid = Reference((0.0, 2.54), True, 8)
    x = np.float32([[0.01, 0.5, 2.5, 2.6, 3.3, 5.0, 9.0]])
    dout = -np.ones_like(x)
    scale = LearnedScale("x") if rule != "none" else None
    cell = FakeQuantActivation(group((0.0, 2.54), True, 8, rule), True, learned=scale)
    cell.start(cell)
    cell.phase_of_quant = QUANTIZE
    _, of_x, of_r = computed(cell, x, dout)
    np.testing.assert_array_equal(of_x, [[-1, -1, -1, 0, 0, 0, 0]])
    of_s = {"none": 0.0, "lsq": grid.of_lsq(x, dout), "pact": grid.of_pact(x, dout)}[rule]
    np.testing.assert_allclose(of_r * grid.scale, of_s, rtol=1e-4)
    assert rule == "none" or of_s < 0
