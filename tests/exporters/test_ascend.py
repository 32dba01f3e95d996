from __future__ import annotations

import configparser
import shlex
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from msqkd.api import create_ptq_network, quantize
from msqkd.errors import ExportError, PlanError
from msqkd.exporters.ascend.program import ascend_program
from msqkd.exporters.ascend.quantised import export_ascend
from msqkd.exporters.ascend.vendor import export_ascend_float
from msqkd.graph.ir import Graph
from msqkd.graph.islands import run_island
from msqkd.graph.mindir import read_mindir
from msqkd.integer.program import ISLAND, Program
from msqkd.integer.registry import ASCEND, Call, Operand, find_kernel
from msqkd.integer.simulator import Simulator
from msqkd.quant.config import FLOAT, QuantConfig, Rule
from msqkd.quant.fake_quant import QUANTIZE
from msqkd.quant.plan import QuantPlan
from msqkd.quant.qat import quantize_cell

pytestmark = pytest.mark.usefixtures("pynative_mode")


class Net(nn.Cell):
    """A value two convolutions read, biases and none, strides, groups, a shortcut, a fused and a lone ReLU, dense."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 4, 3, stride=2), nn.BatchNorm2d(4)
        self.conv2, self.deep = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, stride=2, group=8, has_bias=True)
        self.short, self.odd = nn.Conv2d(4, 8, 1, stride=2), nn.Conv2d(8, 8, 3, pad_mode="pad", padding=2, dilation=2)
        self.relu, self.pool, self.flatten = nn.ReLU(), nn.MaxPool2d(2, 2), nn.Flatten()
        self.fc1, self.fc2 = nn.Dense(8, 8), nn.Dense(8, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        x = self.relu(self.deep(self.conv2(x)) + self.short(x))
        x = self.flatten(ops.mean(self.odd(x), (2, 3), keep_dims=True))
        return self.fc2(self.relu(self.fc1(x)))


LAYERS = ("conv1", "conv2", "deep", "short", "odd", "fc1", "fc2")
X = np.random.default_rng(0).normal(size=(24, 2, 15, 15)).astype(np.float32)


def planned(per_channel: bool = True, rules: tuple[Rule, ...] = (), **changes: Any) -> tuple[Graph, QuantPlan]:
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_seed(1)
    np.random.seed(1)
    config = QuantConfig(act_observer="minmax", **changes).override({"weight.per_channel": per_channel})
    return quantize(create_ptq_network(Net(), config, [X], rules=rules, target="ascend")).sync()


@pytest.fixture(scope="module", params=[False, True], ids=["per_tensor", "per_channel"])
def net(request: pytest.FixtureRequest) -> tuple[Graph, QuantPlan]:
    return planned(request.param)


@pytest.fixture
def fresh() -> tuple[Graph, QuantPlan]:
    """One that a test may spoil."""
    return planned()


class File:
    """The protobuf read independently: nodes as (op, attributes, inputs, output, dtype); parameters as arrays."""

    DTYPES = {1: np.float32, 3: np.int8, 6: np.int32, 7: np.int64, 13: np.uint64}  # noqa: RUF012

    def __init__(self, file: Path) -> None:
        from mindspore.train import mind_ir_pb2 as pb

        model = pb.ModelProto()
        model.ParseFromString(file.read_bytes())
        primitives = {f"REF::{p.name}": p for p in model.primitives}
        self.params = {
            p.name: np.frombuffer(p.raw_data, self.DTYPES[p.data_type]).reshape(tuple(p.dims))
            for p in model.graph.parameter
        }
        self.input, self.output = model.graph.input[0].name, model.graph.output[0].name
        self.shape = tuple(model.graph.input[0].tensor[0].dims)
        self.consts: dict[str, Any] = {}
        self.nodes: list[tuple[str, dict[str, Any], list[str], str, Any]] = []
        for node in model.graph.node:
            if node.op_type == "Constant":
                self.consts[node.output[0]] = self._value(node.attribute[0])
                continue
            primitive = primitives[node.op_type]
            attrs = {a.name: self._value(a) for a in primitive.attribute}
            shape = next(a for a in node.attribute if a.name == "shape")
            dtype = self.DTYPES[shape.tensors[0].data_type]
            self.nodes.append((primitive.op_type, attrs, list(node.input), node.output[0], dtype))
        self.model = model

    def _value(self, a: Any) -> Any:
        kind = a.AttributeType.Name(a.type)
        if kind in ("TUPLE", "LIST"):
            return tuple(self._value(item) for item in a.values)
        if kind == "TENSORS":
            return self.DTYPES[a.tensors[0].data_type]
        if kind == "BOOL":
            return bool(a.ints[0] if a.ints else a.i)
        if kind == "INT64":
            return a.ints[0] if a.ints else a.i
        return {"FLOAT": lambda: a.f, "STRING": lambda: (a.strings[0] if a.strings else a.s).decode()}[kind]()

    def ops(self) -> list[str]:
        return [node[0] for node in self.nodes]

    def layers(self) -> dict[str, list[Any]]:
        """(Quant, Conv2D, Dequant) of each layer, by the name of its weight."""
        producer = {node[3]: node for node in self.nodes}
        found = {}
        for node in self.nodes:
            if node[0] == "Dequant":
                convolution = producer[node[2][0]]
                name = convolution[2][1].split(":")[-1].replace(".weight.int8", "")
                found[name] = [producer[convolution[2][0]], convolution, node]
        return found

    def run(self, x: np.ndarray) -> np.ndarray:
        """The answers for `x`, operation by operation."""
        values: dict[str, Any] = {**self.params, **self.consts, self.input: x}
        for op, attrs, inputs, output, dtype in self.nodes:
            operands = [values[name] for name in inputs]
            if op in ("Quant", "Conv2D", "Dequant"):
                plain = {**attrs, "dtype": "float32"}
                (values[output],) = find_kernel(op, ASCEND, op)(Call(plain, [Operand(o) for o in operands]))
            else:
                values[output] = self.plain(op, operands)
            assert values[output].dtype == dtype
        return values[self.output]

    @staticmethod
    def plain(op: str, operands: list[Any]) -> np.ndarray:
        x = operands[0]
        if op == "MaxPool":
            return x.reshape(*x.shape[:2], x.shape[2] // 2, 2, x.shape[3] // 2, 2).max(axis=(3, 5))
        if op == "Reshape":
            return x.reshape(-1, *operands[1][1:])
        plain = {
            "ReLU": lambda: np.maximum(x, 0),
            "Add": lambda: x + operands[1],
            "ReduceMean": lambda: x.mean(axis=operands[1], keepdims=True),
        }
        return plain[op]()


@pytest.fixture(scope="module")
def written(net: tuple[Graph, QuantPlan], tmp_path_factory: pytest.TempPathFactory) -> File:
    ms.set_context(mode=ms.GRAPH_MODE)
    return File(export_ascend(*net, tmp_path_factory.mktemp("ascend") / "net.mindir"))


def test_convolutions_and_dense_layers_are_int8_the_rest_is_float(net: tuple[Graph, QuantPlan]) -> None:
    graph, plan = net
    assert {n.name for n in plan.nodes if n.precision == "int8" and n.fused_into is None} == set(LAYERS)
    assert {n.op for n in plan.nodes if n.fused_into} == {"ReLU"}
    assert {n.op for n in plan.nodes if n.precision == "float"} == {"MaxPool", "Add", "ReLU", "ReduceMean", "Reshape"}
    assert set(plan.activations) == {graph.node(name).inputs[0] for name in LAYERS}, "only what they read is quantised"
    assert all(group.qparams().zero_point == 0 for group in plan.groups.values())


def test_every_layer_is_quant_convolution_dequant(written: File) -> None:
    assert set(written.layers()) == set(LAYERS)
    for quant, convolution, dequant in written.layers().values():
        assert [quant[0], convolution[0], dequant[0]] == ["Quant", "Conv2D", "Dequant"]
        assert [quant[4], convolution[4], dequant[4]] == [np.int8, np.int32, np.float32]
    assert set(written.ops()) == {
        "Quant", "Conv2D", "Dequant", "MaxPool", "Add", "ReLU", "ReduceMean", "Reshape"
    }, "no BatchNorm, no BiasAdd, no Cast, no bookkeeping"  # fmt: skip
    assert written.ops().count("ReLU") == 1, "the others are computed by Dequant"
    assert written.shape == (1, 2, 15, 15)


def test_a_value_is_quantised_once(written: File) -> None:
    sources = [node[2][0] for node in written.nodes if node[0] == "Quant"]
    assert len(sources) == len(set(sources)) == len(LAYERS) - 1
    layers = written.layers()
    assert layers["conv2"][0][3] == layers["short"][0][3]


def test_attributes_of_quant(written: File, net: tuple[Graph, QuantPlan]) -> None:
    graph, plan = net
    for name, (quant, _, _) in written.layers().items():
        scale = np.float32(plan.group_of(graph.node(name).inputs[0]).qparams().scale)
        assert quant[1] == {
            "scale": float(np.float32(1) / scale),
            "offset": 0.0,
            "sqrt_mode": False,
            "round_mode": "Round",
            "dst_type": np.int8,
        }


def scales(graph: Graph, plan: QuantPlan, name: str) -> tuple[float, np.ndarray]:
    node = graph.node(name)
    weight = plan.weights[name].qparams(graph.params[node.inputs[1]].data)
    return float(plan.group_of(node.inputs[0]).qparams().scale), np.atleast_1d(weight.scale).astype(np.float64)


def test_weights_and_geometry_of_convolutions(written: File, net: tuple[Graph, QuantPlan]) -> None:
    graph, plan = net
    for name, (_, convolution, _) in written.layers().items():
        node = graph.node(name)
        floats = graph.params[node.inputs[1]].data
        weight = written.params[convolution[2][1]]
        assert weight.dtype == np.int8
        expected = plan.weights[name].qparams(floats).quantize(floats)
        assert np.abs(expected).max() <= 127
        np.testing.assert_array_equal(weight.reshape(expected.shape), expected)
        if node.op == "Conv2D":
            for attr in ("stride", "dilation", "pad_list", "group", "format"):
                assert convolution[1][attr] == node.attrs[attr]
        else:
            assert weight.shape == (*floats.shape, 1, 1)
            assert (convolution[1]["pad_list"], convolution[1]["format"]) == ((0, 0, 0, 0), "NCHW")


def test_biases_are_int32_in_steps_of_the_sum(written: File, net: tuple[Graph, QuantPlan]) -> None:
    graph, plan = net
    with_bias = set()
    for name, (_, convolution, _) in written.layers().items():
        node = graph.node(name)
        assert len(convolution[2]) == len(node.inputs)
        if len(node.inputs) == 3:
            with_bias.add(name)
            bias = written.params[convolution[2][2]]
            input_scale, weight_scale = scales(graph, plan, name)
            steps = graph.params[node.inputs[2]].data.astype(np.float64) / (input_scale * weight_scale)
            assert bias.dtype == np.int32
            assert np.abs(bias - steps).max() <= 0.5
    assert with_bias == {"conv1", "deep", "fc1", "fc2"}


def test_deq_scales_are_float32_bits_in_the_lower_half(written: File, net: tuple[Graph, QuantPlan]) -> None:
    graph, plan = net
    for name, (_, _, dequant) in written.layers().items():
        packed = written.params[dequant[2][1]]
        assert packed.dtype == np.uint64
        input_scale, weight_scale = scales(graph, plan, name)
        assert packed.shape == weight_scale.shape
        assert len(packed) in (1, graph.shape(graph.node(name).inputs[1])[0])
        decoded = [struct.unpack("<f", struct.pack("<Q", int(bits))[:4])[0] for bits in packed]
        assert [struct.pack("<Q", int(bits))[4:] for bits in packed] == [bytes(4)] * len(packed)
        assert decoded == [float(np.float32(input_scale * scale)) for scale in weight_scale]
        relu = name in ("conv1", "fc1")
        assert dequant[1] == {"sqrt_mode": False, "relu_flag": relu, "dtype": np.float32}
        assert dequant[2][1].endswith(f"{name}.deq_scale")


def test_mindspore_reads_the_file_back(net: tuple[Graph, QuantPlan], tmp_path: Path) -> None:
    file = export_ascend(*net, tmp_path / "net.mindir", batch_size=4)
    assert ms.load(str(file)) is not None
    assert File(file).shape == (4, 2, 15, 15)


def test_the_same_network_gives_the_same_bytes(net: tuple[Graph, QuantPlan], tmp_path: Path) -> None:
    one = export_ascend(*net, tmp_path / "one.mindir").read_bytes()
    run_island(net[0], [X])  # another compilation in between
    assert export_ascend(*net, tmp_path / "two.mindir").read_bytes() == one


def simulated(graph: Graph, plan: QuantPlan) -> tuple[Program, dict[str, np.ndarray]]:
    program = ascend_program(graph, plan)
    simulator = Simulator(program, run_island=run_island, kind=ASCEND)
    return program, dict(simulator.trace(X))


def test_the_file_and_the_program_are_one_network(net: tuple[Graph, QuantPlan], written: File) -> None:
    program, values = simulated(*net)
    # The mean alone may be summed in another order.
    np.testing.assert_allclose(written.run(X), values[program.outputs[0]], rtol=1e-5, atol=1e-6)


def test_the_program_agrees_with_the_fake_quantised_network(net: tuple[Graph, QuantPlan]) -> None:
    graph, plan = net
    program, values = simulated(graph, plan)
    cell = quantize_cell(graph, plan, observe=list(plan.groups))
    cell.set_phase(QUANTIZE)
    logits, *raw = (tensor.asnumpy() for tensor in cell(ms.Tensor(X)))
    levels = {t.value: values[t.name] for t in program.tensors.values() if t.dtype == "int8" and t.data is None}
    assert set(levels) == set(plan.groups)
    for name, value in zip(plan.groups, raw):
        trained = plan.groups[name].qparams().quantize(value)
        assert np.abs(trained - levels[name]).max() <= 1, name
    np.testing.assert_array_equal(levels[graph.inputs[0]], plan.groups[graph.inputs[0]].qparams().quantize(X))
    answers = values[program.outputs[0]]
    step = scales(graph, plan, "fc2")
    assert np.abs(answers - logits).max() <= 8 * 127 * step[0] * step[1].max(), "one level of each input of fc2"
    assert (answers.argmax(1) == logits.argmax(1)).mean() >= 0.95


def test_the_program_has_its_parameters_and_places(net: tuple[Graph, QuantPlan]) -> None:
    graph, plan = net
    program = ascend_program(graph, plan)
    steps = [step for step in program.steps if step.op != ISLAND]
    assert {step.op for step in steps} == {"Quant", "Conv2D", "Dense", "Dequant"}
    assert {step.layer for step in program.steps} <= {node.name for node in graph.nodes}
    assert [step.op for step in steps if step.layer == "fc1"] == ["Quant", "Dense", "Dequant"]
    quants = [step for step in steps if step.op == "Quant"]
    assert len(quants) == len(LAYERS) - 1, "two layers read one value"
    assert {step.attrs["scale"] for step in quants} == {
        float(np.float32(1) / plan.group_of(graph.node(name).inputs[0]).qparams().scale) for name in LAYERS
    }
    assert program.tensors["conv1.weight_int8"].quant.per_channel == (plan.weights["conv1"].axis is not None)  # type: ignore[union-attr]
    assert program.tensors["conv1.bias_int32"].quant.bits == 32  # type: ignore[union-attr]
    floats = [t for t in program.tensors.values() if t.dtype == "float32"]
    assert all(t.value == t.name and t.quant is None for t in floats)
    assert program.tensors[graph.inputs[0]].shape == (1, 2, 15, 15)


def test_a_layer_kept_float_is_written_in_float(tmp_path: Path) -> None:
    graph, plan = planned(rules=(Rule("path", "deep", FLOAT),))
    file = File(export_ascend(graph, plan, tmp_path / "net.mindir"))
    assert set(file.layers()) == set(LAYERS) - {"deep"}
    assert [node[4] for node in file.nodes if node[0] == "BiasAdd"] == [np.float32]
    assert ("Conv2D", np.float32) in {(node[0], node[4]) for node in file.nodes}
    program, values = simulated(graph, plan)
    cell = quantize_cell(graph, plan)
    cell.set_phase(QUANTIZE)
    assert (values[program.outputs[0]].argmax(1) == cell(ms.Tensor(X)).asnumpy().argmax(1)).mean() >= 0.95


def refused(graph: Graph, plan: QuantPlan, folder: Path, text: str, error: type[Exception] = ExportError) -> None:
    for write in (lambda: export_ascend(graph, plan, folder / "net.mindir"), lambda: ascend_program(graph, plan)):
        with pytest.raises(error, match=text) as caught:
            write()
        assert "\n" not in str(caught.value)
    assert list(folder.iterdir()) == []


class Wide(nn.Cell):
    """More products in one sum than 32 bits hold at their largest."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Dense(140_000, 1, weight_init="ones")

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.fc(x)


@pytest.mark.parametrize("weight", [1e-13, 1e-30, 0.0])
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_channel_all_but_dead_keeps_its_bias(weight: float, per_channel: bool, tmp_path: Path) -> None:
    graph, plan = planned(per_channel)
    for name in ("deep", "fc2"):
        graph.params[graph.node(name).inputs[1]].data[1] = weight
        graph.params[graph.node(name).inputs[2]].data[1] = 0.75
    program, values = simulated(graph, plan)
    cell = quantize_cell(graph, plan)
    cell.set_phase(QUANTIZE)
    expected = cell(ms.Tensor(X)).asnumpy()
    step = scales(graph, plan, "fc2")
    np.testing.assert_allclose(values[program.outputs[0]][:, 1], 0.75, rtol=1e-4)
    assert np.abs(values[program.outputs[0]] - expected).max() <= 8 * 127 * step[0] * step[1].max()
    written = File(export_ascend(graph, plan, tmp_path / "net.mindir"))
    np.testing.assert_allclose(written.run(X), values[program.outputs[0]], rtol=1e-5, atol=1e-6)


def test_a_sum_beyond_32_bits(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(1, 140_000)).astype(np.float32)
    config = QuantConfig(act_observer="minmax")
    graph, plan = quantize(create_ptq_network(Wide(), config, [x], target="ascend")).sync()
    refused(graph, plan, tmp_path, "^fc: the integer sum of channel 0 can reach")


def test_asymmetric_activations(tmp_path: Path) -> None:
    graph, plan = planned(act_symmetric=False)
    refused(graph, plan, tmp_path, r"^conv1: its input 'x' has zero point -?\d+; Ascend pads with 0")


def test_a_missing_range(fresh: tuple[Graph, QuantPlan], tmp_path: Path) -> None:
    graph, plan = fresh
    groups = {name: replace(group, range=None) for name, group in plan.groups.items()}
    refused(graph, replace(plan, groups=groups), tmp_path, "has no range yet", PlanError)


def test_a_plan_for_another_target(fresh: tuple[Graph, QuantPlan], tmp_path: Path) -> None:
    graph, plan = fresh
    refused(graph, replace(plan, target="lite_arm"), tmp_path, "made for the target 'lite_arm'; allowed: 'ascend'")


def test_nothing_in_int8(tmp_path: Path) -> None:
    graph, plan = planned(rules=tuple(Rule("path", name, FLOAT) for name in LAYERS))
    with pytest.raises(ExportError, match=r"^net.mindir: nothing in the network is int8"):
        export_ascend(graph, plan, tmp_path / "net.mindir")


def test_a_place_that_cannot_be_written(net: tuple[Graph, QuantPlan], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExportError, match=r"^cannot write .*net.mindir: "):
        export_ascend(*net, tmp_path / "file" / "net.mindir")
    with pytest.raises(ExportError, match=r"^cannot write into "):
        export_ascend_float(*net, tmp_path / "file" / "folder", X)
    assert [child.name for child in tmp_path.iterdir()] == ["file"]


def test_float_network_for_the_converter(net: tuple[Graph, QuantPlan], tmp_path: Path) -> None:
    graph, plan = net
    made = export_ascend_float(graph, plan, tmp_path / "route", X, "KL")
    floats = read_mindir(made.model.read_bytes(), "float")
    assert floats.inputs == list(made.calibration) == graph.inputs
    assert floats.shape(floats.inputs[0]) == (1, 2, 15, 15)
    ops_found = {node.op for node in floats.nodes}
    assert not ops_found & {"BatchNorm", "FakeQuantParam", "Quant"}
    for name, quant in plan.weights.items():
        weight = graph.node(name).inputs[1]
        qparams = quant.qparams(graph.params[weight].data)
        np.testing.assert_array_equal(floats.params[weight].data, qparams.fake_quantize(graph.params[weight].data))
        again = qparams.quantize(floats.params[weight].data)
        np.testing.assert_array_equal(again, qparams.quantize(graph.params[weight].data))
    assert floats.params["fc2.bias"].data.tolist() == graph.params["fc2.bias"].data.tolist()


def test_calibration_and_configuration_fit_the_float_network(net: tuple[Graph, QuantPlan], tmp_path: Path) -> None:
    graph, plan = net
    made = export_ascend_float(graph, plan, tmp_path, X)
    (files,) = made.calibration.values()
    assert len(files) == len(X)
    for file, sample in zip(files, X):
        np.testing.assert_array_equal(np.fromfile(file, "<f4").reshape(sample.shape), sample)
    parser = configparser.ConfigParser()
    parser.read(made.config)
    assert dict(parser["full_quant_param"]) == {
        "activation_quant_method": "MAX_MIN",
        "per_channel": str(plan.weights["conv1"].axis is not None).lower(),
        "target_device": "ASCEND",
    }
    assert dict(parser["data_preprocess_param"]) == {
        "calibrate_path": "x:calibration/x",
        "calibrate_size": "24",
        "input_type": "BIN",
    }
    assert files[0].parent == tmp_path / "calibration" / "x", "the path of the configuration, seen from the folder"
    *_, run = made.script.read_text().splitlines()
    assert shlex.split(run)[-len(made.command) :] == made.command
    assert made.command == [
        "converter_lite",
        "--fmk=MINDIR",
        f"--modelFile={made.model.name}",
        "--outputFile=ascend_int8",
        f"--configFile={made.config.name}",
        "--optimize=ascend_oriented",
    ]


@pytest.mark.parametrize(
    ("samples", "method", "text"),
    [
        (X[:, :1], "KL", r"input 'x': the calibration samples have shape \(24, 1, 15, 15\); .* \(N, 2, 15, 15\)"),
        ({"y": X}, "KL", "samples are given for y; the network takes x"),
        (X, "MINMAX", "activation_quant_method is 'MINMAX'; allowed: MAX_MIN, KL, REMOVAL_OUTLIER"),
        (X[:0], "KL", "calibrate_size is 0"),
        (np.full_like(X, np.nan), "KL", "are not finite"),
    ],
)
def test_samples_that_do_not_fit(
    net: tuple[Graph, QuantPlan], tmp_path: Path, samples: Any, method: str, text: str
) -> None:
    with pytest.raises(ExportError, match=text):
        export_ascend_float(*net, tmp_path, samples, method)
    assert list(tmp_path.iterdir()) == []


class Sized(nn.Cell):
    """Reads the size of its input as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Dense(3, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.fc(x) * x.shape[0]


def test_numbers_are_no_tensors_of_a_program() -> None:
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    network = create_ptq_network(Sized(), QuantConfig(act_observer="minmax"), [x], target="ascend")
    graph, plan = quantize(network).sync()
    assert "Shape" in {node.op for node in graph.nodes}
    program = ascend_program(graph, plan)
    assert [step.op for step in program.steps] == ["Quant", "Dense", "Dequant", ISLAND]
    (answers,) = Simulator(program, run_island=run_island, kind=ASCEND).run(x)
    expected = 4 * (x @ graph.params["fc.weight"].data.T + graph.params["fc.bias"].data)
    assert np.abs(answers - expected).max() < 0.05 * np.abs(expected).max()


class Tied(nn.Cell):
    """One weight for a dense layer and for a product of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Dense(3, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.fc(x), ops.tanh(self.fc.weight)


def test_a_weight_others_read_too_stays_theirs(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    config = QuantConfig(act_observer="minmax").override({"weight.quant_dtype": 3})
    graph, plan = quantize(create_ptq_network(Tied(), config, [x], target="ascend")).sync()
    floats = read_mindir(export_ascend_float(graph, plan, tmp_path, x).model.read_bytes(), "float")
    dense, tanh = (next(n for n in floats.nodes if n.op == op) for op in ("MatMul", "Tanh"))
    original = graph.params["fc.weight"].data
    np.testing.assert_array_equal(floats.params[tanh.inputs[0]].data, original)
    assert len(np.unique(floats.params[dense.inputs[1]].data)) <= 7 < len(np.unique(original))
