"""Transformers, mobile nets and detectors as device programs: files that may be written, and answers as promised."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from msqkd.exporters.device import FLOAT_FILE, INT8_FILE, lite_program
from msqkd.exporters.lite import export_lite, read_marked
from msqkd.exporters.lowering import lower_forms
from msqkd.exporters.ms.check import check_program
from msqkd.exporters.verify import load_lite
from msqkd.graph.capture import capture
from msqkd.graph.cell import Hooks, to_cell
from msqkd.graph.ir import Graph
from msqkd.graph.islands import run_island
from msqkd.graph.passes.patterns import find_patterns
from msqkd.integer.program import ISLAND, Program
from msqkd.integer.registry import ARM64, X86
from msqkd.integer.simulator import Simulator
from msqkd.quant.config import QuantConfig, WeightQuantizer
from msqkd.quant.fake_quant import QUANTIZE
from msqkd.quant.placement import make_plan
from msqkd.quant.plan import QuantPlan
from msqkd.quant.presets import preset
from msqkd.quant.ptq import calibrate
from msqkd.quant.qat import deployment_graph, quantize_cell

PER_CHANNEL = QuantConfig(weight_quantizer=WeightQuantizer(per_channel=True))
Arrays = list[np.ndarray]


def dense(inputs: int, outputs: int) -> nn.Dense:
    return nn.Dense(inputs, outputs, weight_init="XavierUniform")


class Block(nn.Cell):
    """Self-attention as a vision transformer has it: one layer for all three, taken apart along a new first axis."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.norm, self.qkv, self.out = nn.LayerNorm((width,)), dense(width, 3 * width), dense(width, width)
        self.unstack, self.scores, self.mix = ops.Unstack(0), ops.BatchMatMul(transpose_b=True), ops.BatchMatMul()
        self.second, self.up, self.down = nn.LayerNorm((width,)), dense(width, 2 * width), dense(2 * width, width)
        self.gelu = nn.GELU()

    def construct(self, x):  # type: ignore[no-untyped-def]
        b, n, c = x.shape
        qkv = ops.transpose(ops.reshape(self.qkv(self.norm(x)), (b, n, 3, self.heads, -1)), (2, 0, 3, 1, 4))
        q, k, v = self.unstack(qkv)
        weights = ops.softmax(self.scores(q, k) * self.scale, -1)
        x = x + self.out(ops.reshape(ops.transpose(self.mix(weights, v), (0, 2, 1, 3)), (b, n, c)))
        return x + self.down(self.gelu(self.up(self.second(x))))


class Vision(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.block, self.head = nn.Conv2d(3, 16, 4, 4, "valid"), Block(16, 2), dense(16, 5)
        self.token = ms.Parameter(ms.Tensor(np.linspace(-1, 1, 16, dtype=np.float32).reshape(1, 1, 16)), name="token")

    def construct(self, x):  # type: ignore[no-untyped-def]
        y = self.patches(x)
        b, c = y.shape[:2]
        y = ops.transpose(ops.reshape(y, (b, c, -1)), (0, 2, 1))
        y = ops.concat((ops.broadcast_to(self.token, (b, -1, -1)), y), 1)
        return self.head(self.block(y)[:, 0])


class Encoder(nn.Cell):
    """Identifiers, mask and types, as a text encoder takes them."""

    def __init__(self, width: int = 16, length: int = 6) -> None:
        super().__init__()
        self.words, self.types = nn.Embedding(20, width), nn.Embedding(2, width)
        self.norm, self.query, self.key, self.value = nn.LayerNorm((width,)), *(dense(width, width) for _ in range(3))
        self.last, self.tanh, self.classes = dense(width, width), nn.Tanh(), dense(width, 3)

    def construct(self, ids, mask, types):  # type: ignore[no-untyped-def]
        x = self.norm(self.words(ids) + self.types(types))
        away = (1.0 - ops.cast(mask, ms.float32))[:, None, :] * -10000.0
        scores = ops.matmul(self.query(x), ops.transpose(self.key(x), (0, 2, 1))) / 4.0
        y = self.last(ops.matmul(ops.softmax(scores + away, -1), self.value(x)))
        return y, self.classes(self.tanh(y[:, 0]))


class Detector(nn.Cell):
    """Two heads on two scales."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3, 2)
        self.norm, self.relu, self.pool = nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(5, 1, "same")
        self.side, self.fine, self.coarse = nn.Conv2d(8, 8, 1), nn.Conv2d(16, 12, 1), nn.Conv2d(8, 12, 1)
        self.silu = nn.SiLU()

    def construct(self, x):  # type: ignore[no-untyped-def]
        y = self.silu(self.stem(x))
        z = self.down(y)
        z = self.relu(self.norm(ops.concat((z, self.pool(z)), 1)))
        left, right = ops.split(z, 8, 1)
        z = left + right
        grown = ops.interpolate(self.side(z), scale_factor=2.0, mode="nearest", recompute_scale_factor=True)
        fine = self.fine(ops.concat((y, grown), 1))
        fine = ops.transpose(ops.reshape(fine, (fine.shape[0], 2, 6, 8, 8)), (0, 1, 3, 4, 2))
        return ops.sigmoid(fine), self.coarse(z)


class Shuffled(nn.Cell):
    """Channels shuffled through an axis before the batch, and a gate of a hard sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.dense = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 8, 3), dense(12, 4)
        self.squeeze, self.grow, self.gate, self.relu = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.HSigmoid(), nn.ReLU()

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.first(x)
        b, c, h, w = x.shape
        x = ops.transpose(ops.reshape(x, (b * c // 2, 2, h * w)), (1, 0, 2))
        x = ops.reshape(x, (2, -1, c // 2, h, w))
        y = self.second(x[1])
        y = y * self.gate(self.grow(self.relu(self.squeeze(ops.mean(y, (2, 3), True)))))
        return self.dense(ops.mean(ops.concat((x[0], y), 1), (2, 3)))


def randomised(net: nn.Cell) -> nn.Cell:
    """Normalisations with factors, offsets and statistics that are none of a fresh network's."""
    generator = np.random.default_rng(8)
    for parameter in net.get_parameters():
        if parameter.ndim == 1:
            low, high = (0.6, 1.4) if "gamma" in parameter.name or "variance" in parameter.name else (-0.3, 0.3)
            parameter.set_data(ms.Tensor(generator.uniform(low, high, parameter.shape).astype(np.float32)))
    return net


def samples(name: str) -> Arrays:
    generator = np.random.default_rng(4)
    if name == "Encoder":
        ids, types = generator.integers(0, 20, (3, 6)), generator.integers(0, 2, (3, 6))
        mask = np.arange(6) < np.array([[6], [4], [2]])
        return [array.astype(np.int32) for array in (ids, mask, types)]
    if name == "Normalised":
        return [generator.normal(size=(3, 5, 16)).astype(np.float32)]
    size = {"Vision": 8, "Detector": 16, "Shuffled": 6}[name]
    return [generator.normal(size=(3, 3, size, size)).astype(np.float32)]


@cache
def planned(name: str, style: str = "") -> tuple[Graph, QuantPlan, Arrays]:
    """The deployment graph of a network, its plan with the ranges of the samples, and the samples."""
    ms.set_seed(5)
    arrays = samples(name)
    graph = deployment_graph(capture(randomised(globals()[name]()), tuple(ms.Tensor(array) for array in arrays)))
    if style:
        plan = make_plan(graph, preset(style).config, preset(style).rules_for(graph))
    else:
        plan = make_plan(graph, PER_CHANNEL)
    names = [group.name for group in plan.groups.values()]
    found = outputs(to_cell(graph, Hooks(observe=names)), arrays)[len(graph.outputs) :]
    spans = {group: (float(array.min()), float(array.max())) for group, array in zip(names, found)}
    return graph, plan.with_ranges(spans), arrays


def outputs(cell: nn.Cell, arrays: Arrays) -> Arrays:
    found = cell(*(ms.Tensor(array) for array in arrays))
    return [tensor.asnumpy() for tensor in (found if isinstance(found, tuple) else (found,))]


def simulated(program: Program, arrays: Arrays, machine: str = X86) -> Arrays:
    held = [np.ascontiguousarray(array.transpose(0, 2, 3, 1)) if array.ndim == 4 else array for array in arrays]
    return Simulator(program, machine, run_island).run(*held)


def fake_quantised(graph: Graph, plan: QuantPlan, arrays: Arrays) -> Arrays:
    cell = quantize_cell(graph, plan)
    cell.set_phase(QUANTIZE)
    return outputs(cell, arrays)


@pytest.mark.parametrize(
    ("name", "style", "share"),
    [
        ("Vision", "", 0.85), ("Vision", "transformer", 0.5), ("Encoder", "", 0.5), ("Encoder", "transformer", 0.4),
        ("Detector", "detector", 0.85), ("Shuffled", "mobile", 1.0),
    ],
)  # fmt: skip
def test_a_family_on_the_device(name: str, style: str, share: float) -> None:
    graph, plan, arrays = planned(name, style)
    assert plan.int8_share() >= share
    program = lite_program(graph, plan)
    check_program(program)
    assert ISLAND not in [step.op for step in program.steps]
    expected, exact = fake_quantised(graph, plan, arrays), outputs(to_cell(graph), arrays)
    for machine in (X86, ARM64):
        for found, wanted, real in zip(simulated(program, arrays, machine), expected, exact):
            step = np.abs(real).max() / 127
            assert np.abs(found - wanted).max() <= 4 * step
            assert np.abs(found - wanted).mean() <= step
    floats = lite_program(graph, plan, kind=FLOAT_FILE)
    check_program(floats)
    for found, real in zip(simulated(floats, arrays), exact):
        np.testing.assert_allclose(found, real, rtol=1e-3, atol=1e-5)


def test_a_program_for_one_is_a_program_for_each() -> None:
    """The batch stands in front of every tensor, wherever the network has it."""
    for name in ("Vision", "Shuffled"):
        graph, plan, arrays = planned(name)
        program = lite_program(graph, plan)
        each = [simulated(program, [array[i : i + 1] for array in arrays])[0] for i in range(3)]
        assert np.array_equal(simulated(program, arrays)[0], np.concatenate(each))
        together = lite_program(graph, plan, batch=3)
        if name == "Vision":
            check_program(together)
            assert np.array_equal(simulated(together, arrays)[0], np.concatenate(each))


def test_what_stands_on_its_own_is_a_depthwise_convolution_with_its_activation() -> None:
    graph, plan, _ = planned("Detector")
    steps = {step.layer: step for step in lite_program(graph, plan).steps if step.op == "Conv2DFusion"}
    norm = steps["norm"]
    assert (norm.attrs["group"], norm.attrs["kernel_size"], int(norm.attrs["activation_type"])) == (16, (1, 1), 1)


def test_a_hard_sigmoid_in_a_kernel_has_the_same_integers_as_the_kernel_without() -> None:
    graph, plan, _ = planned("Shuffled")
    program = lite_program(graph, plan)
    step = next(step for step in program.steps if step.layer == "grow")
    weight = graph.params["grow.weight"].data
    integers = plan.weights["grow"].qparams(weight).quantize(weight)
    assert np.array_equal(program.tensors[step.inputs[1]].data, integers.transpose(0, 2, 3, 1))
    quant = program.tensors[step.outputs[0]].quant
    assert (float(quant.scale[0]), int(quant.zero_point[0])) == (pytest.approx(1 / 255), -128)


def test_maps_of_a_last_axis_need_no_transpose() -> None:
    class Last(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.LayerNorm((8,)), nn.Conv2d(8, 4, 1)

        def construct(self, x):  # type: ignore[no-untyped-def]
            y = ops.transpose(self.first(x), (0, 2, 3, 1))
            return self.last(ops.transpose(self.norm(y), (0, 3, 1, 2)))

    graph = deployment_graph(capture(Last(), (3, 6, 6)))
    plan = make_plan(graph)
    plan = plan.with_ranges(dict.fromkeys(plan.groups, (-3.0, 3.0)))
    kinds = Counter(step.op for step in lite_program(graph, plan).steps)
    assert kinds["Transpose"] == 1, "the one that gives the output in the layout of the network"


def test_forms_that_become_convolutions_compute_the_network() -> None:
    graph, plan, arrays = planned("Detector")
    lowered, _ = lower_forms(graph, plan)
    for found, wanted in zip(outputs(to_cell(lowered), arrays), outputs(to_cell(graph), arrays)):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


class Spelt(nn.Cell):
    """Activations and poolings the way many networks write them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3)
        self.leaky, self.gelu = nn.LeakyReLU(0.1), nn.GELU(approximate=False)
        self.pool = nn.MaxPool2d(3, 2, pad_mode="pad", padding=1)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.pool(self.leaky(self.first(x)))
        x = self.gelu(self.second(x))
        x = self.third(x)
        return ops.clamp(x + 3.0, 0.0, 6.0) / 6.0


def test_what_a_network_spells_out_is_written_as_one_step() -> None:
    ms.set_seed(2)
    graph = deployment_graph(capture(Spelt(), (3, 9, 9)))
    find_patterns(graph)
    plan = make_plan(graph, PER_CHANNEL)
    assert next(node for node in plan.nodes if node.op == "HSigmoid").form == "hard sigmoid"
    arrays = [np.random.default_rng(3).normal(size=(2, 3, 9, 9)).astype(np.float32)]
    plan = calibrate(graph, plan, arrays, observer="minmax")
    for kind, steps in ((INT8_FILE, 3.01), (FLOAT_FILE, 0.01)):
        program = lite_program(graph, plan, kind=kind)
        check_program(program)
        wanted = fake_quantised(graph, plan, arrays)[0] if kind == INT8_FILE else outputs(to_cell(graph), arrays)[0]
        assert np.abs(simulated(program, arrays)[0] - wanted).max() <= steps / 255


def test_the_marked_file_of_a_gated_network_answers_as_promised(tmp_path: Path) -> None:
    graph, plan, arrays = planned("Shuffled")
    file = export_lite(graph, plan, tmp_path / "marked.mindir", batch_size=3)
    found, expected = outputs(load_lite(file), arrays)[0], fake_quantised(graph, plan, arrays)[0]
    assert np.abs(found - expected).max() <= 2.01 * float(plan.group_of(graph.outputs[0]).qparams().scale)


def test_normalizations_are_int8_in_the_marked_file(tmp_path: Path) -> None:
    graph, plan, _ = planned("Vision")
    file = export_lite(graph, plan, tmp_path / "marked.mindir")
    marked, values, weights = read_marked(file)
    norms = [node for node in marked.nodes if node.op == "LayerNorm"]
    assert norms
    planned_int8 = [node.name for node in plan.nodes if node.op == "LayerNorm" and node.precision == "int8"]
    found = [node for node in norms if (node.name, 1) in weights]
    assert len(found) == len(planned_int8) > 0
    assert all(node.inputs[0] in values and node.output in values for node in found)
    assert any(node.output in values for node in marked.nodes if node.op == "Softmax")


class Normalised(nn.Cell):
    """Normalised sums with wide factors in a few channels, and a number between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.down, self.last = dense(16, 16), dense(16, 32), dense(32, 16), dense(16, 4)
        self.norm, self.relu, self.head = nn.LayerNorm((16,)), nn.ReLU(), dense(4, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.first(x)
        x = self.norm(self.down(self.relu(self.up(x))) + x)
        x = self.relu(self.last(x))
        return self.head(x * 0.125), x


@pytest.mark.parametrize("name", ["Vision", "Encoder", "Detector", "Shuffled", "Normalised"])
def test_the_marked_file_is_the_network_of_the_plan(name: str, tmp_path: Path) -> None:
    graph, plan, arrays = planned(name)
    file = export_lite(graph, plan, tmp_path / "marked.mindir", batch_size=3)
    for found, expected in zip(outputs(load_lite(file), arrays), fake_quantised(graph, plan, arrays)):
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_product_with_a_number_is_int8_in_the_marked_file(tmp_path: Path) -> None:
    graph, plan, _ = planned("Vision")
    file = export_lite(graph, plan, tmp_path / "marked.mindir")
    marked, values, weights = read_marked(file)
    scaled = [node for node in marked.nodes if node.op == "Mul" and (node.name, 1) in weights]
    assert scaled
    for node in scaled:
        factor = marked.params[node.inputs[1]].data
        assert factor.shape == (1,)
        assert float(weights[node.name, 1].scale) == factor[0], "the integer of the number is 1"
        assert node.output in values
