"""What networks spell out, from the plan to every kind of file."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from msqkd.api import create_ptq_network, export, plan_network, quantize
from msqkd.exporters.lite import read_marked
from msqkd.exporters.verify import load_lite, load_ms, load_portable
from msqkd.integer.program import ActivationType
from msqkd.quant.config import QuantConfig
from msqkd.quant.qat import QuantCell

pytestmark = pytest.mark.usefixtures("pynative_mode")
X = np.random.default_rng(0).normal(size=(4, 3, 10, 10)).astype(np.float32)


class Net(nn.Cell):
    """Two convolutions with something in between."""

    def __init__(self, middle: nn.Cell) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Dense(8, 4)
        self.middle = middle

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.head(ops.mean(self.second(self.middle(self.first(x))), (2, 3)))


class Silu(nn.Cell):
    def construct(self, x):  # type: ignore[no-untyped-def]
        return x * ops.sigmoid(x)


class HardSwish(nn.Cell):
    def construct(self, x):  # type: ignore[no-untyped-def]
        return ops.relu6(x + 3.0) / 6.0 * x


class Leaky(nn.Cell):
    def construct(self, x):  # type: ignore[no-untyped-def]
        return ops.leaky_relu(x, 0.1)


class Padded(nn.Cell):
    """Zeros around a map without negative numbers, before a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.pad, self.pool = nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(3, 2)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.pool(self.pad(ops.relu(x)))


def largest(*sizes: Any, **options: Any) -> nn.Cell:
    return nn.MaxPool2d(*sizes, pad_mode="pad", padding=1, **options)


def average(**options: Any) -> nn.Cell:
    return nn.AvgPool2d(3, 2, pad_mode="pad", padding=1, **options)


# What stands in the middle: its operations, whether they are int8, and their forms in the file for the converter.
MIDDLES: dict[str, tuple[Callable[[], nn.Cell], list[str], bool, list[str]]] = {
    "silu": (Silu, ["SiLU"], False, ["Sigmoid", "Mul"]),
    "hswish": (HardSwish, ["HSwish"], True, ["HSwish"]),
    "leaky": (Leaky, ["LeakyReLU"], False, ["Mul", "Maximum"]),
    "gelu": (lambda: nn.GELU(approximate=False), ["GeluExt"], False, ["Div", "Erf", "Add", "Mul", "Mul"]),
    "largest": (lambda: largest(3, 2), ["MaxPool"], True, ["MaxPool", "MaxPool"]),
    "largest, every place": (lambda: largest(3, 1), ["MaxPool"], True, ["MaxPool"]),
    "largest of no negative": (Padded, ["ReLU", "MaxPool"], True, ["ReLU", "Pad", "MaxPool"]),
    "average": (lambda: average(), ["Pad", "AvgPool"], True, ["Pad", "AvgPool"]),
    "average inside": (lambda: average(count_include_pad=False), ["AvgPool"], True, ["AvgPool", "MaxPool"]),
}


@cache
def quantised(name: str, target: str = "lite_arm") -> tuple[nn.Cell, QuantCell]:
    ms.set_context(mode=ms.PYNATIVE_MODE)
    ms.set_seed(1)
    net = Net(MIDDLES[name][0]())
    return net, quantize(create_ptq_network(net, QuantConfig(act_observer="minmax"), [X], target=target))


def answers(run: Any, x: np.ndarray = X) -> np.ndarray:
    found = run(ms.Tensor(x))
    return found.asnumpy() if isinstance(found, ms.Tensor) else found


@pytest.mark.parametrize("name", MIDDLES)
def test_every_file_answers_as_the_quantised_cell(name: str, tmp_path: Path) -> None:
    _, wanted_ops, int8, forms = MIDDLES[name]
    net, cell = quantised(name)
    graph, plan = cell.sync()
    middle = [node for node in plan.nodes if node.name.split(".")[0] == "middle"]
    assert [(node.op, node.precision == "int8") for node in middle] == [(op, int8) for op in wanted_ops]
    assert all(node.reason for node in middle)
    assert plan.warnings == []
    expected = answers(cell)
    step = float(plan.group_of(graph.outputs[0]).qparams().scale)
    assert np.abs(expected - answers(net)).max() < 0.02
    portable = export(cell, X, str(tmp_path / "portable"), "MINDIR_PORTABLE")
    np.testing.assert_array_equal(answers(load_portable(Path(portable))), expected)
    marked = Path(export(cell, X, str(tmp_path / "marked"), "MINDIR"))
    assert np.abs(answers(load_lite(marked)) - expected).max() <= 1.01 * step
    read = [node.op for node in read_marked(marked)[0].nodes]
    first, second, *_ = (index for index, op in enumerate(read) if op == "Conv2D")
    assert read[first + 1 : second] == forms
    program = Path(export(cell, X, str(tmp_path / "device"), "MS"))
    assert np.abs(answers(load_ms(program)) - expected).max() <= 2.01 * step
    floating = Path(export(cell, X, str(tmp_path / "float"), "MS_FLOAT"))
    np.testing.assert_allclose(answers(load_ms(floating)), answers(net), atol=1e-3)


@pytest.mark.parametrize(
    ("name", "target"),
    [*((name, "lite_arm") for name in MIDDLES), *((name, "ascend") for name in ("hswish", "largest", "average"))],
)
def test_onnxruntime_answers_as_the_quantised_cell(name: str, target: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from msqkd.exporters.onnx import load_onnx

    _, cell = quantised(name, target)
    _, plan = cell.sync()
    run = load_onnx(export(cell, X, str(tmp_path / "net"), "ONNX"))
    step = max(float(group.qparams().scale) for group in plan.groups.values())
    assert np.abs(answers(run) - answers(cell)).max() <= 1.01 * step
    if target == "ascend":
        export(cell, X, str(tmp_path / "ascend"), "MINDIR_ASCEND")
        portable = export(cell, X, str(tmp_path / "portable"), "MINDIR_PORTABLE")
        np.testing.assert_array_equal(answers(load_portable(Path(portable))), answers(cell))


def test_a_hard_swish_is_one_kernel_of_the_device(tmp_path: Path) -> None:
    from msqkd.exporters.ms.read import read_ms

    program = read_ms(Path(export(quantised("hswish")[1], X, str(tmp_path / "net"), "MS")))
    kernels = [step.attrs.get("activation_type") for step in program.steps if step.op == "Activation"]
    assert kernels == [ActivationType.HSWISH]


@pytest.mark.parametrize("middle", [largest(2, 2), largest(3, 2, ceil_mode=True), average(ceil_mode=True)])
def test_a_padding_that_the_converter_does_not_know_is_told(middle: nn.Cell) -> None:
    _, plan = plan_network(Net(middle), X.shape[1:])
    assert any("pads in a way that MindSpore Lite's converter does not know" in text for text in plan.warnings)
    _, plan = plan_network(Net(middle), X.shape[1:], target="ascend")
    assert plan.warnings == []


class Arithmetic(nn.Cell):
    """Float operations between int8 layers, none of which is left to MindSpore."""

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = ops.log(ops.abs(ops.maximum(x, 0.3 * x + 0.1)) + 1.0) + ops.minimum(x, 1.0)
        x = x + ops.mean(x, 1, keep_dims=True).broadcast_to((-1, 8, 10, 10))
        return ops.tile(ops.clamp(x, -1.5, None), (1, 1, 2, 1)) + ops.clamp(x[:, :, :1], -0.5, 2.0)


def test_common_float_operations_are_steps_of_the_device(tmp_path: Path) -> None:
    ms.set_seed(2)
    net = Net(Arithmetic())
    cell = quantize(create_ptq_network(net, QuantConfig(act_observer="minmax"), [X]))
    graph, plan = cell.sync()
    step = float(plan.group_of(graph.outputs[0]).qparams().scale)
    for kind, expected, tolerance in (("MS", cell, 3.01 * step), ("MS_FLOAT", net, 1e-3)):
        run = load_ms(Path(export(cell, X, str(tmp_path / kind), kind)))
        for batch in (X, X[:1]):
            assert np.abs(answers(run, batch) - answers(expected, batch)).max() <= tolerance
