"""What MindSpore Lite gets wrong, kernel by kernel, and that the plan and the file avoid it."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from msqkd.errors import ExportError, SimulationError
from msqkd.exporters.device import lite_program
from msqkd.exporters.ms.check import check_program
from msqkd.graph.capture import capture
from msqkd.graph.islands import run_island
from msqkd.integer.program import ActivationType, PadMode, Program, ReduceMode, Step, Tensor, TensorQuant
from msqkd.integer.registry import ARM64, X86
from msqkd.integer.simulator import Simulator
from msqkd.quant.config import QuantConfig, WeightQuantizer
from msqkd.quant.fake_quant import QUANTIZE
from msqkd.quant.placement import make_plan
from msqkd.quant.ptq import calibrate
from msqkd.quant.qat import deployment_graph, quantize_cell
from msqkd.targets import get_target

Q = TensorQuant(np.array([0.05]), np.array([-3]))
FINE = TensorQuant(np.array([0.01]), np.array([-3]))


def program(
    op: str, shape: tuple[int, ...], out: tuple[int, ...], attrs: dict, *others: Tensor, quant: TensorQuant = Q
) -> Program:
    """One int8 step between tensors with parameters Q and `quant`."""
    made = Program("one")
    made.inputs, made.outputs = ["x"], ["y"]
    made.add(Tensor("x", "int8", shape, quant=Q))
    for tensor in others:
        made.add(tensor)
        if tensor.data is None:
            made.inputs.append(tensor.name)
    made.add(Tensor("y", "int8", out, quant=quant))
    made.steps.append(Step("step", op, ["x", *(t.name for t in others)], ["y"], attrs, True, "step"))
    return made


def run(made: Program, *inputs: np.ndarray, machine: str = X86) -> np.ndarray:
    return Simulator(made, machine).run(*inputs)[0]


def real(q: np.ndarray, quant: TensorQuant = Q) -> np.ndarray:
    return (q.astype(np.float64) - quant.zero_point[0]) * quant.scale[0]


def ideal(x: np.ndarray, quant: TensorQuant = Q) -> np.ndarray:
    return np.clip(np.rint(x / quant.scale[0] + quant.zero_point[0]), -128, 127)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).integers(-128, 128, shape).astype(np.int8)


def avoided(net: nn.Cell, shape: tuple[int, ...], defect: str) -> Program:
    """The device program of `net`: it avoids `defect`, its file may be written, and it answers as planned."""
    graph = deployment_graph(capture(net, shape))
    x = np.random.default_rng(6).normal(size=(4, *shape)).astype(np.float32)
    plan = calibrate(graph, make_plan(graph), [x], observer="minmax")
    entry = next(entry for entry in plan.avoided() if entry["name"] == defect)
    assert entry["nodes"]
    assert entry["instead"] == get_target("lite_arm").defects[defect].instead
    made = lite_program(graph, plan)
    check_program(made)
    cell = quantize_cell(graph, plan)
    cell.set_phase(QUANTIZE)
    expected = cell(ms.Tensor(x)).asnumpy()
    scales = [group.qparams().scale for group in plan.groups.values()]
    for machine in (X86, ARM64):
        found = Simulator(made, machine, run_island).run(np.ascontiguousarray(x.transpose(0, 2, 3, 1)))[0]
        assert np.abs(found - expected).max() <= 3 * max(scales)
    return made


class Between(nn.Cell):
    """An operation between two convolutions."""

    def __init__(self, operation: nn.Cell, channels: int = 4) -> None:
        super().__init__()
        self.first, self.operation, self.last = nn.Conv2d(3, channels, 3), operation, nn.Conv2d(channels, 2, 1)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.last(self.operation(self.first(x)))


class Gate(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.HSigmoid()

    def construct(self, x):  # type: ignore[no-untyped-def]
        return x * self.gate(ops.mean(x, (2, 3), True))


class Shifted(nn.Cell):
    def construct(self, x):  # type: ignore[no-untyped-def]
        return x + ops.mean(x, (2, 3), True)


@pytest.mark.parametrize("op", ["AddFusion", "MulFusion"])
def test_a_broadcast_operand_is_read_from_the_first_item(op: str) -> None:
    x, y = noise(2, 3, 3, 4), noise(2, 1, 1, 4)
    made = program(op, (2, 3, 3, 4), (2, 3, 3, 4), {}, Tensor("z", "int8", (2, 1, 1, 4), quant=Q))
    exact = real(x) + real(y) if op == "AddFusion" else real(x) * real(y)
    wrong = np.abs(run(made, x, y) - ideal(exact)) > 1
    assert wrong[1].any()
    assert not wrong[0].any()
    with pytest.raises(ExportError, match="batch"):
        check_program(made)


def test_products_by_channel_are_int8_at_batch_1_and_additions_float() -> None:
    made = avoided(Between(Gate()), (3, 6, 6), "batch_broadcast")
    assert next(step for step in made.steps if step.op == "MulFusion").quantized
    made = avoided(Between(Shifted()), (3, 6, 6), "batch_broadcast")
    assert not next(step for step in made.steps if step.op == "AddFusion").quantized


def test_the_global_mean() -> None:
    axes = Tensor("axes", "int32", (2,), np.array([1, 2], np.int32))
    attrs = {"mode": ReduceMode.MEAN, "keep_dims": False}
    quant = TensorQuant(np.array([0.011]), np.array([-3]))
    made = program("ReduceFusion", (1, 7, 7, 8), (1, 8), attrs, axes, quant=quant)
    x = noise(1, 7, 7, 8)
    off = run(made, x) - ideal(real(x).mean(axis=(1, 2)), quant)
    assert abs(off.mean()) > 0.2, "biased on x86"
    with pytest.raises(SimulationError, match="multiple of 16"):
        run(made, x, machine=ARM64)
    with pytest.raises(ExportError):
        check_program(made)


class Mean(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.dense = nn.Conv2d(3, 6, 3), nn.Dense(6, 4)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.dense(ops.mean(self.conv(x), (2, 3)))


def test_the_global_mean_is_a_depthwise_convolution() -> None:
    made = avoided(Mean(), (3, 7, 7), "global_mean")
    assert "ReduceFusion" not in [step.op for step in made.steps]


def test_pools_wrap_where_parameters_differ() -> None:
    attrs = {"kernel_size": (2, 2), "strides": (2, 2), "pad": (0, 0, 0, 0), "pad_mode": PadMode.VALID, "round_mode": 0}
    x = np.full((1, 4, 4, 8), 100, np.int8)
    for op in ("MaxPoolFusion", "AvgPoolFusion"):
        made = program(op, (1, 4, 4, 8), (1, 2, 2, 8), attrs, quant=FINE)
        assert run(made, x).max() < 127, f"{op} should saturate"
        with pytest.raises(ExportError):
            check_program(made)


def test_pools_share_their_parameters() -> None:
    for pool, defect in ((nn.MaxPool2d(2, 2), "maximum_wraps"), (nn.AvgPool2d(2, 2), "average_wraps")):
        made = avoided(Between(pool), (3, 8, 8), defect)
        step = next(step for step in made.steps if step.op in ("MaxPoolFusion", "AvgPoolFusion"))
        source, result = (made.tensors[name].quant for name in (step.inputs[0], step.outputs[0]))
        assert np.array_equal(source.scale, result.scale)


def test_a_large_average_overflows() -> None:
    attrs = {
        "kernel_size": (12, 12),
        "strides": (1, 1),
        "pad": (0, 0, 0, 0),
        "pad_mode": PadMode.VALID,
        "round_mode": 0,
    }
    made = program("AvgPoolFusion", (1, 12, 12, 8), (1, 1, 1, 8), attrs)
    assert run(made, np.full((1, 12, 12, 8), 120, np.int8)).max() < 0
    with pytest.raises(ExportError):
        check_program(made)
    program_of = avoided(Between(nn.AvgPool2d(12, 1)), (3, 14, 14), "average_overflow")
    assert "AvgPoolFusion" not in [step.op for step in program_of.steps]


@pytest.mark.parametrize(
    ("kind", "defect", "cell"),
    [
        (ActivationType.RELU, "lone_relu", nn.ReLU()),
        (ActivationType.RELU6, "lone_relu6", nn.ReLU6()),
        (ActivationType.SIGMOID, "sigmoid_at_127", nn.Sigmoid()),
    ],
)
def test_lone_activations_are_wrong_and_avoided(kind: ActivationType, defect: str, cell: nn.Cell) -> None:
    x = np.arange(-128, 128, dtype=np.int8).reshape(1, 1, 1, 256)
    quant = {
        ActivationType.RELU: FINE,
        ActivationType.RELU6: TensorQuant(np.array([0.02]), np.array([0])),
        ActivationType.SIGMOID: TensorQuant(np.array([1 / 256]), np.array([-128])),
    }[kind]
    made = program("Activation", x.shape, x.shape, {"activation_type": kind}, quant=quant)
    exact = {
        ActivationType.RELU: lambda v: np.maximum(v, 0),
        ActivationType.RELU6: lambda v: np.clip(v, 0, 6),
        ActivationType.SIGMOID: lambda v: 1 / (1 + np.exp(-v)),
    }[kind](real(x))
    machine = ARM64 if kind == ActivationType.RELU else X86
    assert np.abs(run(made, x, machine=machine) - ideal(exact, quant)).max() > 1
    with pytest.raises(ExportError):
        check_program(made)
    # behind a maximum pool there is no kernel an activation could be computed in
    program_of = avoided(Between(nn.SequentialCell(nn.MaxPool2d(2, 2), cell)), (3, 8, 8), defect)
    lone = [step for step in program_of.steps if step.op == "Activation"]
    if kind == ActivationType.SIGMOID:
        assert [step.quantized for step in lone] == [False]
    else:
        assert not lone
        fused = [step for step in program_of.steps if step.attrs.get("activation_type") == kind]
        assert [(step.op, step.quantized) for step in fused] == [("Conv2DFusion", True)]


def test_grouped_convolutions_take_one_scale() -> None:
    weight = Tensor("w", "int8", (4, 3, 3, 2), noise(4, 3, 3, 2), TensorQuant(np.full(4, 0.01), np.zeros(4, np.int32)))
    attrs = {"kernel_size": (3, 3), "stride": (1, 1), "dilation": (1, 1), "pad_mode": PadMode.SAME, "group": 2}
    with pytest.raises(SimulationError, match="one weight scale a channel"):
        run(program("Conv2DFusion", (1, 5, 5, 4), (1, 5, 5, 4), attrs, weight), noise(1, 5, 5, 4))
    net = Between(nn.Conv2d(4, 4, 3, group=2))
    graph = deployment_graph(capture(net, (3, 8, 8)))
    plan = make_plan(graph, QuantConfig(weight_quantizer=WeightQuantizer(per_channel=True)))
    assert plan.weights["operation"].axis is None
    assert plan.weights["first"].axis == 0
    assert [entry["nodes"] for entry in plan.avoided() if entry["name"] == "grouped_per_channel"] == [["operation"]]


def test_a_padded_pointwise_convolution_pads_with_zero_instead_of_the_zero_point() -> None:
    weight = Tensor("w", "int8", (3, 1, 1, 2), noise(3, 1, 1, 2), TensorQuant(np.array([0.01]), np.array([0])))
    attrs = {"kernel_size": (1, 1), "stride": (1, 1), "dilation": (1, 1), "pad_mode": PadMode.PAD,
             "pad_list": (1, 1, 1, 1), "group": 1}  # fmt: skip
    made = program("Conv2DFusion", (1, 4, 4, 2), (1, 6, 6, 3), attrs, weight)
    corner = run(made, noise(1, 4, 4, 2))[0, 0, 0]
    assert (corner != Q.zero_point[0]).any(), "a padded zero gives zero"
    with pytest.raises(ExportError):
        check_program(made)
    avoided(Between(nn.Conv2d(4, 4, 1, pad_mode="pad", padding=1)), (3, 6, 6), "padded_pointwise")


def test_leaky_relu_is_right_for_zero_point_0_only() -> None:
    x = np.arange(-128, 128, dtype=np.int8).reshape(1, 1, 1, 256)
    for zero, right in ((0, True), (40, False)):
        quant = TensorQuant(np.array([0.05]), np.array([zero]))
        made = program("Activation", x.shape, x.shape, {"activation_type": ActivationType.LEAKY_RELU, "alpha": 0.1})
        for name in ("x", "y"):
            made.tensors[name].quant = quant
        value = real(x, quant)
        exact = ideal(np.where(value > 0, value, 0.1 * value), quant)
        assert (np.abs(run(made, x) - exact).max() <= 1) == right


def test_the_softmax_ignores_its_output_parameters() -> None:
    made = program("Softmax", (2, 8), (2, 8), {"axis": (1,)}, quant=FINE)
    standard = program(
        "Softmax", (2, 8), (2, 8), {"axis": (1,)}, quant=TensorQuant(np.array([1 / 256]), np.array([-128]))
    )
    x = noise(2, 8)
    assert np.array_equal(run(made, x), run(standard, x))
    with pytest.raises(ExportError):
        check_program(made)


def test_a_softmax_over_many_values_is_undefined() -> None:
    made = program(
        "Softmax", (1, 600), (1, 600), {"axis": (1,)}, quant=TensorQuant(np.array([1 / 256]), np.array([-128]))
    )
    with pytest.raises(SimulationError, match="sum up to 512 or more"):
        run(made, np.zeros((1, 600), np.int8))


class Grown(nn.Cell):
    def construct(self, x):  # type: ignore[no-untyped-def]
        return ops.ResizeNearestNeighborV2(align_corners=False, half_pixel_centers=True)(x, (7, 7))


def test_a_nearest_resize_takes_half_pixels_for_whole_ones() -> None:
    attrs = {"format": 1, "method": 1, "new_height": 7, "new_width": 7, "coordinate_transform_mode": 2}
    made = program("Resize", (1, 4, 4, 2), (1, 7, 7, 2), attrs)
    x = noise(1, 4, 4, 2)
    exact = np.clip(np.floor((np.arange(7) + 0.5) * 4 / 7), 0, 3).astype(int)
    assert not np.array_equal(run(made, x), x[:, exact][:, :, exact])
    graph = deployment_graph(capture(Between(Grown()), (3, 4, 4)))
    node = next(node for node in make_plan(graph).nodes if node.op.startswith("Resize"))
    assert (node.precision, node.avoids) == ("float", ("resize_half_pixel",))
