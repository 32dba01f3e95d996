"""Layers in float16 between others: in the settings, the plan, the network, the files and on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import nn, ops

from msqkd.analysis.analyze import analyze
from msqkd.analysis.layers import layer_table
from msqkd.analysis.parity import compare_execution
from msqkd.analysis.sensitivity import SwitchedNetwork
from msqkd.api import create_ptq_network, export, prepare_qat, quantize
from msqkd.data import ArraySplit
from msqkd.errors import ExportError, PlanError
from msqkd.exporters.ascend.quantised import export_ascend
from msqkd.exporters.portable import export_portable
from msqkd.exporters.verify import load_portable
from msqkd.graph.capture import capture
from msqkd.graph.cell import Hooks, to_cell
from msqkd.graph.half import half_precision
from msqkd.graph.mindir import read_mindir
from msqkd.quant.config import QuantConfig, Rule
from msqkd.quant.fake_quant import QUANTIZE
from msqkd.quant.half import LARGEST, FakeHalf, rounded, with_casts, with_half
from msqkd.quant.placement import make_plan
from msqkd.quant.qat import QuantCell, deployment_graph, quantize_cell

pytestmark = pytest.mark.usefixtures("graph_mode")

X = np.random.default_rng(0).normal(size=(6, 2, 6, 6)).astype(np.float32)


class Net(nn.Cell):
    """A value that two layers read, a bias from BatchNorm, a shortcut and a product with a number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn, self.relu = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.left, self.right, self.head = nn.Conv2d(4, 4, 3, has_bias=True), nn.Conv2d(4, 4, 1), nn.Dense(4, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.relu(self.bn(self.first(x)))
        return self.head(ops.mean((self.left(x) + self.right(x)) * 0.3, (2, 3)))


def rule(pattern: str, precision: str, kind: str = "path", **more: Any) -> Rule:
    return Rule(kind, pattern, {"precision": precision, **more})


def network(*rules: Rule, net: type = Net, target: str = "ascend") -> QuantCell:
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_seed(3)
    cell = quantize(create_ptq_network(net(), QuantConfig(act_observer="minmax"), [X], rules=rules, target=target))
    cell.set_phase(QUANTIZE)
    return cell


def answers(cell: Any) -> np.ndarray:
    return np.asarray(cell(ms.Tensor(X)).asnumpy())


# -- the arithmetic ----------------------------------------------------------------------------------------------------
HALF = FakeHalf()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=8, max_size=8))
def test_the_cell_rounds_as_numpy_and_to_the_nearest(numbers: list[float]) -> None:
    x = np.asarray(numbers, np.float32)
    found = HALF(ms.Tensor(x)).asnumpy()
    np.testing.assert_array_equal(found, rounded(x))
    np.testing.assert_array_equal(np.signbit(found), np.signbit(x))
    inside = np.abs(x) <= LARGEST
    # Half a unit in the last of 11 digits, or of the smallest number there is.
    assert (np.abs(found[inside] - x[inside]) <= np.maximum(np.abs(x[inside]) * 2.0**-11, 2.0**-25)).all()
    assert np.isinf(found[np.abs(x) >= 65520]).all()


def test_the_gradient_passes() -> None:
    x = ms.Tensor(np.array([1e-9, 1.0001, -3e4], np.float32))
    np.testing.assert_array_equal(ms.grad(FakeHalf())(x).asnumpy(), np.ones(3, np.float32))


def by_hand(graph: Any, x: np.ndarray, halved: set[str]) -> np.ndarray:
    """`Net` in float64 with rounding where it is asked for."""

    def half(name: str, value: np.ndarray) -> np.ndarray:
        return rounded(value).astype(np.float64) if name in halved else np.asarray(value, np.float64)

    def layer(name: str, x: np.ndarray, product: Any) -> np.ndarray:
        node = graph.node(name)
        w, *b = (half(name, graph.params[p].data) for p in node.inputs[1:])
        y = product(half(name, x), w)
        return half(name, y + (b[0].reshape(-1, *[1] * (y.ndim - 2)) if b else 0))

    def conv(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        k = w.shape[2] // 2
        padded = np.pad(x, ((0, 0), (0, 0), (k, k), (k, k)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, w.shape[2:], (2, 3))
        return np.einsum("nchwij,ocij->nohw", windows, w)

    x = np.maximum(layer("first", x, conv), 0)
    x = (layer("left", x, conv) + layer("right", x, conv)) * np.float32(0.3)
    return layer("head", x.mean((2, 3)), lambda x, w: x @ w.T)


def test_a_network_of_float16_layers_is_that_of_a_computation_by_hand() -> None:
    names = ("first", "left", "right", "head")
    cell = network(*(rule(name, "float16") for name in names))
    graph, plan = cell.sync()
    assert [node.name for node in plan.half_nodes()] == list(names)
    assert not plan.weights
    assert not plan.groups
    found, expected = answers(cell), by_hand(graph, X, set(names))
    # The order of sums may move a result to the next float16 number, and the head rounds once more.
    np.testing.assert_allclose(found, expected, rtol=2.0**-9, atol=2.0**-11)
    np.testing.assert_array_equal(found, rounded(found))
    plain = by_hand(graph, X, set())
    assert np.abs(found - plain).max() > 1e-6
    assert np.mean(found == expected.astype(np.float32)) > 0.5


# -- the plan ----------------------------------------------------------------------------------------------------------
def test_what_is_placed_in_float16() -> None:
    graph = deployment_graph(capture(Net(), X.shape[1:]))
    rules = [rule("left", "float16"), rule("head", "weight-only-float16"), rule("Add", "float16", "op")]
    plan = make_plan(graph, None, rules, "ascend")
    found = {node.name: node.precision for node in plan.nodes}
    assert (found["first"], found["left"], found["right"]) == ("int8", "float16", "int8")
    assert (found["head"], found["add"]) == ("weight-only-float16", "float16")
    assert set(plan.weights) == {"first", "right", "head"}
    assert set(plan.stored_weights()) == {"head"}
    relu = graph.node("left").inputs[0]
    assert plan.activations[relu].edges == (("right", 0),), "the float16 layer reads the value itself"
    assert any("float16 numbers on the grid" in text for text in plan.warnings)


@pytest.mark.parametrize(
    ("target", "pattern", "precision", "text"),
    [
        ("lite_arm", "Conv2D", "float16", "first (Conv2D) cannot have precision 'float16' on lite_arm: MindSpore "),
        ("lite_arm", "Dense", "weight-only-float16", "allowed: int8, weight-only, dynamic, float"),
        ("ascend", "ReLU", "weight-only-float16", "relu (ReLU) cannot have precision 'weight-only-float16': it has no"),
        ("ascend", "ArgMaxWithValue", "float16", "(ArgMaxWithValue) cannot have precision 'float16': msqkd has no "),
    ],
)
def test_what_cannot_be_in_float16(target: str, pattern: str, precision: str, text: str) -> None:
    class Odd(Net):
        def construct(self, x):  # type: ignore[no-untyped-def]
            return ops.ArgMaxWithValue(1)(Net.construct(self, x))[1]

    graph = deployment_graph(capture(Odd(), X.shape[1:]))
    with pytest.raises(PlanError) as caught:
        make_plan(graph, None, [rule(pattern, precision, "op")], target)
    assert f"rule 'op: {pattern}'" in str(caught.value)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_as_a_default_it_is_refused_too_and_act_quant_dtype_says_float() -> None:
    graph = deployment_graph(capture(Net(), X.shape[1:]))
    with pytest.raises(PlanError, match="rule 'default': first"):
        make_plan(graph, QuantConfig(precision="float16"))
    with pytest.raises(PlanError, match="precision is 'float16'; leave one of them out"):
        QuantConfig(precision="float16", act_quant_dtype=None)
    plan = make_plan(graph, QuantConfig(precision="float16"), target="ascend")
    assert {node.precision for node in plan.nodes} == {"float16"}


# -- beyond its numbers ------------------------------------------------------------------------------------------------
def test_a_weight_beyond_float16_names_its_layer() -> None:
    class Large(Net):
        def __init__(self) -> None:
            super().__init__()
            self.left.weight.set_data(self.left.weight * 0 + 7e4)

    with pytest.raises(PlanError, match=r"^left: its parameter 'left.weight' reaches 70000, beyond 65504"):
        network(rule("left", "float16"), net=Large)
    assert network(rule("right", "float16"), net=Large)


@pytest.mark.parametrize(("name", "text"), [("left", "goes beyond 65504"), ("head", "head: its value ")])
def test_a_value_beyond_float16_names_its_layer(name: str, text: str) -> None:
    class Large(Net):
        def __init__(self) -> None:
            super().__init__()
            self.left.weight.set_data(ops.ones_like(self.left.weight) * 6e4)

    with pytest.raises(PlanError) as caught:
        network(rule(name, "float16"), net=Large)
    assert text in str(caught.value)
    assert f"{name}: its value" in str(caught.value)
    assert "\n" not in str(caught.value)


# -- files and devices -------------------------------------------------------------------------------------------------
MIXED = (rule("left", "float16"), rule("head", "weight-only-float16"), rule("add", "float16"))


def test_the_portable_file_answers_bit_for_bit_and_stores_float16(tmp_path: Path) -> None:
    cell = network(*MIXED)
    graph, plan = cell.sync()
    file = export_portable(graph, plan, tmp_path / "net.mindir")
    np.testing.assert_array_equal(np.asarray(load_portable(file)(ms.Tensor(X)).asnumpy()), answers(cell))
    held = {name: held.data.dtype.name for name, held in read_mindir(file.read_bytes(), "back").params.items()}
    assert held["left.weight.float16"] == held["left.bias.float16"] == held["head.bias.float16"] == "float16"
    assert held["head.weight.int8"] == "int8"
    assert not any(name.startswith("left") and kind == "float32" for name, kind in held.items())


def test_the_device_computes_what_was_promised() -> None:
    cell = network(*MIXED)
    graph, plan = cell.sync()
    parity = compare_execution(graph, plan, [X])
    by_value = {value.layer: value for value in parity.values if value.scale is None}
    assert by_value["left"].relative_error is not None
    assert by_value["left"].relative_error < 2.0**-10  # the sums before it have another order
    assert parity.agreement["integer_fake_quantised"] == 100.0


def test_the_file_for_ascend_computes_in_float16(tmp_path: Path) -> None:
    graph, plan = network(*MIXED).sync()
    from mindspore.train import mind_ir_pb2 as pb

    model = pb.ModelProto()
    model.ParseFromString(export_ascend(graph, plan, tmp_path / "net.mindir").read_bytes())
    primitives = {f"REF::{primitive.name}": primitive.op_type for primitive in model.primitives}
    kinds = {
        (primitives[node.op_type], pb.TensorProto.DataType.Name(attribute.tensors[0].data_type))
        for node in model.graph.node
        for attribute in node.attribute
        if attribute.name == "shape" and attribute.tensors and node.op_type in primitives
    }
    assert {("Conv2D", "FLOAT16"), ("Conv2D", "INT32"), ("MatMul", "FLOAT16"), ("Add", "FLOAT16")} <= kinds
    assert ("Cast", "FLOAT") in kinds
    held = {item.name: pb.TensorProto.DataType.Name(item.data_type) for item in model.graph.parameter}
    assert {kind for name, kind in held.items() if "left.weight" in name} == {"FLOAT16"}, held


def test_formats_that_cannot_hold_it_say_so(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"left \(Conv2D\) has precision 'float16', which onnx does not hold"):
        export(network(*MIXED), X, str(tmp_path / "net"), "ONNX")
    assert not list(tmp_path.iterdir())


# -- training and analysis ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("batchnorm", ["fold", "live"])
def test_training_sees_the_rounding(batchnorm: str) -> None:
    rules = (rule("first", "float16"), rule("left", "float16"), rule("head", "weight-only-float16"))
    config = QuantConfig(act_quant_delay=1)
    cell = prepare_qat(Net(), X.shape[1:], config, rules=rules, target="ascend", batchnorm=batchnorm)
    assert "quant" in cell.source

    class Loss(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.network = cell

        def construct(self, x):  # type: ignore[no-untyped-def]
            return ops.square(self.network(x) - 1.0).mean()

    step = nn.TrainOneStepCell(Loss(), nn.SGD(cell.trainable_params(), 0.05))
    step.set_train()
    losses = [float(step(ms.Tensor(X)).asnumpy()) for _ in range(4)]
    assert losses[-1] < losses[0]
    cell.set_train(False)
    cell.set_step(1)
    found = answers(cell)
    np.testing.assert_array_equal(found, rounded(found))
    if batchnorm == "fold":
        graph, plan = cell.sync()
        fresh = quantize_cell(graph, plan)
        fresh.set_phase(QUANTIZE)
        np.testing.assert_array_equal(answers(fresh), found)


def test_mixed_precision_of_a_training_leaves_the_layers_alone() -> None:
    graph, plan = network(*MIXED).sync()
    own = with_half(Hooks(), graph, plan)
    hooks = half_precision(graph, "O3", own)
    assert all(hooks.arguments[place] is cell for place, cell in own.arguments.items())
    assert all(hooks.results[value] is cell for value, cell in own.results.items())
    assert ("first", 0) in hooks.arguments
    cell = to_cell(graph, hooks)
    cell.set_train()
    assert np.isfinite(answers(cell)).all()


def test_layers_are_switched_one_by_one_and_have_a_row() -> None:
    cell = network(*MIXED)
    graph, plan = cell.sync()
    switched = SwitchedNetwork(graph, plan)
    assert {"left", "head", "add"} <= set(switched.names)
    plain = np.asarray(to_cell(graph)(ms.Tensor(X)).asnumpy())
    np.testing.assert_array_equal(switched(ms.Tensor(X))[0][0].asnumpy(), plain)
    switched.turn(["left"])
    assert 0 < np.abs(switched(ms.Tensor(X))[0][0].asnumpy() - plain).max() < 1e-2
    switched.turn(switched.names)
    np.testing.assert_array_equal(switched(ms.Tensor(X))[0][0].asnumpy(), answers(cell))
    rows = {row["name"]: row for row in layer_table(graph, plan, graph, [X])}
    assert rows["left"]["activation"] is None
    assert rows["left"]["sqnr_db"] > 20


def test_a_float16_layer_is_analysed_as_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msqkd.analysis.diagnosis.NEGLIGIBLE", {"kl": -1.0, "relative error": -1.0})
    monkeypatch.setattr("msqkd.analysis.diagnosis.HARM", 0.0)
    graph, plan = network(*MIXED).sync()
    found = analyze(graph, plan, graph, ArraySplit(X, None, [], name="x"))
    rows = {row["name"]: row for row in found.to_dict()["layers"]}
    assert rows["left"]["sqnr_db"] > 40 > rows["first"]["sqnr_db"]
    assert {diagnosis.layer for diagnosis in found.diagnoses} & {"left", "head", "add"}


def test_the_graph_with_casts_is_the_cell_with_rounding() -> None:
    graph, plan = network(rule("left", "float16"), rule("right", "float")).sync()
    found = to_cell(with_casts(graph, plan))(ms.Tensor(X)).asnumpy()
    expected = to_cell(graph, with_half(Hooks(), graph, plan))(ms.Tensor(X)).asnumpy()
    np.testing.assert_array_equal(found, expected)
