"""The one list of what int8 kernels can compute: numbers, and that nobody refuses what the plan has accepted."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from msqkd.api import create_ptq_network, quantize
from msqkd.errors import SimulationError
from msqkd.exporters.device import lite_program
from msqkd.exporters.lite import export_lite
from msqkd.exporters.ms.read import read_ms
from msqkd.exporters.ms.write import write_ms
from msqkd.exporters.verify import load_lite
from msqkd.integer.arithmetic import activation_bounds
from msqkd.integer.program import ActivationType
from msqkd.integer.registry import MACHINES
from msqkd.integer.simulator import Simulator
from msqkd.quant.config import QuantConfig
from msqkd.targets import limits
from msqkd.targets.limits import Windows

pytestmark = pytest.mark.usefixtures("pynative_mode")


# -- numbers -----------------------------------------------------------------------------------------------------------
def windows(size: int, kernel: int, stride: int, dilation: int, before: int, after: int) -> Windows | None:
    """The same windows along both axes; None where there are none."""
    count = (size + before + after - (kernel - 1) * dilation - 1) // stride + 1
    if count < 1:
        return None
    pads = (before, after, before, after)
    return Windows((kernel,) * 2, (stride,) * 2, (dilation,) * 2, pads, (size,) * 2, (count,) * 2)  # type: ignore[arg-type]


GEOMETRIES = [w for g in product((1, 2, 5), (1, 3, 5), (1, 2), (1, 2), (0, 1, 3), (0, 2)) if (w := windows(*g))]


def correlation(x: np.ndarray, taps: np.ndarray, place: Windows) -> np.ndarray:
    """A convolution of one row, spelt out."""
    padded = np.pad(x, place.pads[:2])
    starts = np.arange(place.output[0]) * place.strides[0]
    reach = np.arange(place.kernel[0]) * place.dilations[0]
    return np.asarray(padded[starts[:, None] + reach] @ taps)


def test_a_kernel_without_the_taps_that_read_padding_computes_the_same() -> None:
    random, cut = np.random.default_rng(0), 0
    for place in GEOMETRIES:
        x, taps = random.integers(-9, 9, place.plane[0]), random.integers(-9, 9, place.kernel[0])
        first, last = place.taps(0)
        trimmed = place.trimmed()
        if trimmed == place:
            continue
        cut += 1
        assert trimmed.output == place.output
        np.testing.assert_array_equal(correlation(x, taps, place), correlation(x, taps[first : last + 1], trimmed))
    assert cut > 10


def test_windows_of_padding_alone_are_found() -> None:
    for place in GEOMETRIES:
        ones = correlation(np.ones(place.plane[0], int), np.ones(place.kernel[0], int), place)
        if place.dilations == (1, 1):
            assert (limits.average(place) is None) == bool(ones.all()), place


def test_a_relu6_beyond_32_bits() -> None:
    for scale, zero_point in ((2e-9, 0), (2.9e-9, 127), (6 / 255, -128), (1e-3, 0)):
        fits = 6 / scale + zero_point < 2**31
        assert (limits.relu6(scale, zero_point) is None) == fits
        if fits:
            assert activation_bounds(ActivationType.RELU6, scale, zero_point)[1] == 127
        else:
            with pytest.raises(SimulationError, match="leaves 32 bits"):
                activation_bounds(ActivationType.RELU6, scale, zero_point)


# -- networks ----------------------------------------------------------------------------------------------------------
class Behind(nn.Cell):
    """An operation behind a convolution, and a convolution behind it where it gives a map."""

    def __init__(self, operation: Any, channels: int = 8) -> None:
        super().__init__()
        self.first, self.operation = nn.Conv2d(2, channels, 1, has_bias=True), operation

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.operation(self.first(x))


class PadRows(nn.Cell):
    def construct(self, x):  # type: ignore[no-untyped-def]
        return ops.pad(x.reshape(-1, 8, 12), (1, 2, 0, 1))


class PadVectors(nn.Cell):
    def construct(self, x):  # type: ignore[no-untyped-def]
        return ops.pad(x.reshape(-1, 96), (3, 0))


class Masked(nn.Cell):
    def construct(self, x):  # type: ignore[no-untyped-def]
        return x * (x > 0)


class OneOf(nn.Cell):
    """Parts of which some are read by nobody."""

    def construct(self, x):  # type: ignore[no-untyped-def]
        return ops.concat((ops.split(x, 4, 1)[0], ops.unstack(x, axis=1)[2].expand_dims(1)), 1)


class Largest(nn.Cell):
    """Maxima of what is negative."""

    def construct(self, x):  # type: ignore[no-untyped-def]
        below = -ops.exp(x) - 1.0
        return ops.ReduceMax(True)(below, (2, 3)) + ops.ArgMaxWithValue(1, True)(below)[1]


class Grown(nn.Cell):
    """A map of one channel and 64×64, grown to twice the size before."""

    def __init__(self) -> None:
        super().__init__()
        self.grow = nn.Conv2dTranspose(8, 1, 3, 2)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.grow(x)


def depthwise(kernel: Any, **more: Any) -> nn.Cell:
    return nn.Conv2d(8, 8, kernel, group=8, has_bias=True, **more)


CASES: dict[str, tuple[Any, tuple[int, int], str]] = {
    "unequal dilations": (lambda: depthwise(3, dilation=(1, 2)), (7, 6), "float"),
    "unequal dilations of a row": (lambda: depthwise((1, 3), dilation=(1, 3)), (1, 9), "float"),
    "equal dilations": (lambda: depthwise(3, dilation=(2, 2)), (7, 6), "int8"),
    "unequal dilations of groups": (lambda: nn.Conv2d(8, 8, 3, group=2, dilation=(1, 2)), (7, 6), "int8"),
    "padding beyond a point": (lambda: depthwise(5), (1, 1), "int8"),
    "padding beyond two rows": (lambda: nn.SequentialCell(depthwise(7), nn.ReLU()), (2, 2), "int8"),
    "padding on one side": (lambda: depthwise(3, pad_mode="pad", padding=(3, 0, 0, 2)), (2, 4), "int8"),
    "padding at the end": (lambda: nn.Conv2d(8, 8, 1, pad_mode="pad", padding=(0, 1, 0, 1)), (3, 4), "int8"),
    "averages rounded up": (
        lambda: nn.AvgPool2d(2, 3, "pad", 1, ceil_mode=True, count_include_pad=False), (3, 4), "int8",
    ),
    "maxima rounded up": (lambda: nn.MaxPool2d(2, 3, "pad", 1, ceil_mode=True), (3, 4), "int8"),
    "a padded average": (lambda: nn.AvgPool2d(3, 2, "pad", 1, count_include_pad=False), (5, 4), "int8"),
    "paddings of rows": (PadRows, (3, 4), "int8"),
    "paddings of vectors": (PadVectors, (3, 4), "int8"),
    "parts": (OneOf, (3, 4), "int8"),
    "one channel of 64×64": (Grown, (32, 32), "float"),
    "maxima": (Largest, (3, 4), "float"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_nobody_refuses_what_the_plan_accepts(name: str, tmp_path: Path) -> None:
    make, plane, precision = CASES[name]
    random = np.random.default_rng(0)
    net = Behind(make())
    for parameter in net.get_parameters():
        parameter.set_data(ms.Tensor(random.normal(size=parameter.shape).astype(np.float32)))
    x = random.normal(size=(3, 2, *plane)).astype(np.float32)
    config = QuantConfig(act_observer="minmax").override({"weight.per_channel": True})
    cell = quantize(create_ptq_network(net, config, [x]))
    graph, plan = cell.sync()
    assert plan.nodes[-1].precision == precision
    expected = cell(ms.Tensor(x)).asnumpy()
    step = np.ptp(expected) / 255
    program = read_ms(write_ms(lite_program(graph, plan), tmp_path / "net.ms"))
    for machine in MACHINES:
        found = Simulator(program, machine).run(np.ascontiguousarray(x.transpose(0, 2, 3, 1)))[0]
        assert np.abs(found - expected).max() <= 3.01 * step
    marked = load_lite(export_lite(graph, plan, tmp_path / "net.mindir"))
    assert np.abs(marked(ms.Tensor(x)).asnumpy() - expected).max() <= 2.01 * step


def test_an_operand_that_is_no_float_keeps_an_operation_float() -> None:
    x = np.random.default_rng(1).normal(size=(3, 2, 3, 4)).astype(np.float32)
    graph, plan = quantize(create_ptq_network(Behind(Masked()), QuantConfig(), [x])).sync()
    assert plan.node(graph.nodes[-1].name).precision == "float"


def test_a_relu6_of_a_dead_layer_is_written_as_a_relu(tmp_path: Path) -> None:
    net = Behind(nn.ReLU6())
    for parameter in net.get_parameters():
        parameter.set_data(ms.Tensor(np.full(parameter.shape, 1e-8, np.float32)))
    x = np.ones((2, 2, 3, 4), np.float32)
    graph, plan = quantize(create_ptq_network(net, QuantConfig(act_observer="minmax"), [x])).sync()
    assert float(plan.group_of(graph.outputs[0]).qparams().scale) < 2e-9
    program = lite_program(graph, plan)
    (convolution,) = [step for step in program.steps if step.op == "Conv2DFusion"]
    assert convolution.attrs["activation_type"] == ActivationType.RELU
    found = Simulator(read_ms(write_ms(program, tmp_path / "net.ms"))).run(x.transpose(0, 2, 3, 1).copy())[0]
    np.testing.assert_allclose(found, 3e-8, rtol=0.01)
