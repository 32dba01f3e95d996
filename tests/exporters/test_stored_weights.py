"""Weight-only and dynamic layers in every kind of file, and on the device."""

from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from msqkd.analysis.layers import layer_table
from msqkd.analysis.parity import Device, compare_execution, differing_values
from msqkd.api import create_ptq_network, export, quantize
from msqkd.errors import ExportError
from msqkd.exporters.ascend.program import ascend_program
from msqkd.exporters.ascend.quantised import export_ascend
from msqkd.exporters.device import lite_program
from msqkd.exporters.lite import export_lite, read_marked
from msqkd.exporters.ms.read import read_ms
from msqkd.exporters.ms.write import ms_bytes, write_ms
from msqkd.exporters.onnx.qdq import export_onnx
from msqkd.exporters.portable import export_portable, portable_graph
from msqkd.exporters.verify import load_lite, load_portable
from msqkd.graph.capture import capture
from msqkd.graph.cell import to_cell
from msqkd.integer.program import Format, Tensor, TensorQuant
from msqkd.integer.simulator import Simulator
from msqkd.quant.config import QuantConfig, Rule, WeightQuantizer
from msqkd.quant.fake_quant import OFF, QUANTIZE
from msqkd.quant.placement import make_plan
from msqkd.quant.qat import QuantCell, deployment_graph, quantize_cell

pytestmark = pytest.mark.usefixtures("pynative_mode")

RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 30, (4, 5)).astype(np.int32)
IMAGES = RNG.normal(size=(4, 2, 6, 6)).astype(np.float32)
SERIES = RNG.normal(size=(4, 3, 4)).astype(np.float32)


class Encoder(nn.Cell):
    """An embedding, attention of one head, a tied output and an odd number of weights in each."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(31, 9), nn.LayerNorm((9,))
        self.query, self.key, self.value = nn.Dense(9, 9), nn.Dense(9, 9), nn.Dense(9, 9)
        self.wide, self.gelu, self.narrow = nn.Dense(9, 21), nn.GELU(approximate=False), nn.Dense(21, 9)

    def construct(self, ids):  # type: ignore[no-untyped-def]
        x = self.table(ids)
        scores = ops.bmm(self.query(x), self.key(x).swapaxes(1, 2))
        x = self.norm(x + ops.bmm(ops.softmax(scores, -1), self.value(x)))
        x = x + self.narrow(self.gelu(self.wide(x)))
        return ops.matmul(x[:, 0], self.table.embedding_table.swapaxes(0, 1))


class Rows(nn.Cell):
    """Dense layers on rows, and a product with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.second = nn.Dense(4, 7), nn.ReLU(), nn.Dense(7, 5)
        self.last = ms.Parameter(np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32), name="last")

    def construct(self, x):  # type: ignore[no-untyped-def]
        return ops.matmul(self.second(self.relu(self.first(x))), self.last)


class Images(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.second = nn.Conv2d(2, 4, 3, has_bias=True), nn.ReLU(), nn.Conv2d(4, 4, 3)
        self.head = nn.Dense(4, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.head(ops.mean(self.second(self.relu(self.first(x))), (2, 3)))


class Recurrent(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(4, 5, batch_first=True), nn.Dense(5, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.head(self.cell(x)[0][:, -1])


class Up(nn.Cell):
    """A transposed convolution, which has no form in .ms: MindSpore computes it between the device's kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2dTranspose(2, 3, 3), nn.Conv2d(3, 2, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.down(self.up(x))


def rule(kind: str, pattern: str, precision: str, **changes: object) -> Rule:
    return Rule(kind, pattern, {"precision": precision, **changes})


def calibrated(net: nn.Cell, inputs: np.ndarray, config: QuantConfig | None = None, *rules: Rule) -> QuantCell:
    ms.set_seed(0)
    return quantize(create_ptq_network(net, config, [inputs], example_input=(ms.Tensor(inputs),), rules=rules))


def stored(bits: int = 8, precision: str = "weight-only", per_channel: bool = True, **others: object) -> QuantConfig:
    return QuantConfig(WeightQuantizer(bits, per_channel), precision=precision, **others)  # type: ignore[arg-type]


def answers(cell: object, inputs: np.ndarray) -> np.ndarray:
    return cell(ms.Tensor(inputs)).asnumpy()  # type: ignore[operator]


# -- portable ----------------------------------------------------------------------------------------------------------
NETWORKS = {
    "encoder": (Encoder, IDS, stored(4)),
    "dynamic": (Rows, SERIES, stored(8, "dynamic")),
    "dynamic_symmetric": (Rows, SERIES, stored(4, "dynamic", False, act_symmetric=True, act_quant_dtype=6)),
    "dynamic_16": (Rows, SERIES, stored(8, "dynamic", act_quant_dtype=16)),
    "images": (Images, IMAGES, stored(3)),
    "recurrent": (Recurrent, SERIES, stored(8)),
    "up": (Up, IMAGES, stored(8)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_portable_file_answers_as_the_fake_quantised_network(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cost in ("_LAYER_BYTES", "_ROW_BYTES"):
        monkeypatch.setattr(f"msqkd.exporters.packing.{cost}", 0)
    make, inputs, config = NETWORKS[name]
    cell = calibrated(make(), inputs, config)
    graph, plan = cell.sync()
    assert plan.stored_weights()
    assert not plan.activations
    file = export_portable(graph, plan, tmp_path / "net.mindir")
    run = load_portable(file)
    for batch in (inputs, inputs[:1]):
        np.testing.assert_array_equal(answers(run, batch), answers(cell, batch))
    names = portable_graph(graph, plan).params
    packed = config.weight_quantizer.bits <= 4
    assert any(key.endswith(".uint4x2" if packed else ".int8") for key in names)


def test_four_bits_take_half_of_eight(tmp_path: Path) -> None:
    net = nn.SequentialCell(nn.Dense(128, 257), nn.ReLU(), nn.Dense(257, 64))
    graph = deployment_graph(capture(net, (128,)))
    inputs = RNG.normal(size=(3, 128)).astype(np.float32)
    sizes = {}
    for bits in (8, 4):
        plan = make_plan(graph, stored(bits))
        file = export_portable(graph, plan, tmp_path / f"{bits}.mindir")
        sizes[bits] = file.stat().st_size
        cell = quantize_cell(graph, plan)
        np.testing.assert_array_equal(answers(load_portable(file), inputs), answers(cell, inputs))
    weights = 128 * 257 + 257 * 64
    assert weights < sizes[8] < weights + 4500
    assert sizes[4] < sizes[8] - weights / 2 + 1500


def test_weights_of_int8_layers_are_packed_too() -> None:
    cell = calibrated(nn.SequentialCell(nn.Dense(64, 64), nn.Dense(64, 3)), RNG.normal(size=(4, 64)).astype(np.float32),
                      QuantConfig(WeightQuantizer(4)))  # fmt: skip
    graph, plan = cell.sync()
    assert plan.int8_weights()
    assert not plan.stored_weights()
    names = portable_graph(graph, plan).params
    assert {"0.weight.uint4x2", "1.weight.int8"} <= set(names), "a small weight is not worth the operations"


# -- .ms ---------------------------------------------------------------------------------------------------------------
def test_stored_layers_in_an_int8_file(tmp_path: Path) -> None:
    rules = [rule("path", "first", "weight-only", **{"weight.per_channel": True}), rule("op", "Dense", "dynamic")]
    cell = calibrated(Images(), IMAGES, None, *rules)
    graph, plan = cell.sync()
    assert list(plan.int8_weights()) == ["second"]
    assert set(plan.stored_weights()) == {"first", "head"}
    program = lite_program(graph, plan)
    steps = {step.layer: step for step in program.steps if step.op in ("Conv2DFusion", "MatMulFusion")}
    assert [steps[name].quantized for name in ("first", "second", "head")] == [False, True, False]
    for name, scales in (("first", 4), ("head", 1)):
        weight = program.tensors[steps[name].inputs[1]]
        quant = plan.with_weight_observers(graph).weights[name]
        assert weight.dtype == "int8"
        assert weight.quant is not None
        assert weight.quant.scale.size == scales
        expected = quant.qparams(graph.params[f"{name}.weight"].data).quantize(graph.params[f"{name}.weight"].data)
        expected = expected.transpose(0, 2, 3, 1) if name == "first" else expected
        np.testing.assert_array_equal(weight.data, expected)
    back = read_ms(write_ms(program, tmp_path / "net.ms"))
    assert differing_values(program, back, [IMAGES])[0] == 0
    parity = compare_execution(graph, plan, [IMAGES])
    found = {value.layer: value for value in parity.values}
    assert found["first"].histogram == () or found["first"].max_lsb == 0, "a float layer gives what was promised"
    assert found["second"].max_lsb is not None
    assert found["second"].max_lsb <= 1


def test_the_device_computes_stored_layers_in_float(tmp_path: Path) -> None:
    cell = calibrated(Encoder(), IDS, stored(4, "dynamic"))
    graph, plan = cell.sync()
    cell.set_phase(OFF)  # the device has no kernel that quantises an input at each call
    expected = answers(cell, IDS)
    np.testing.assert_allclose(Device(graph, plan)(IDS)[0], expected, rtol=1e-4, atol=1e-6)
    program = lite_program(graph, plan)
    (gather,) = [step for step in program.steps if step.op == "Gather" and step.layer == "table"]
    table = program.tensors[gather.inputs[0]]
    assert table.dtype == "int8"
    assert table.quant is not None
    assert table.quant.scale.size == 31
    back = read_ms(write_ms(program, tmp_path / "net.ms"))
    assert differing_values(program, back, [IDS])[0] == 0


def test_what_is_folded_or_left_to_mindspore_has_its_stored_weights() -> None:
    for make, inputs in ((Recurrent, SERIES), (Up, IMAGES)):
        cell = calibrated(make(), inputs, stored(2))
        graph, plan = cell.sync()
        expected = answers(cell, inputs)[:1]
        np.testing.assert_allclose(Device(graph, plan)(inputs[:1])[0], expected, rtol=1e-4, atol=1e-6)
        assert np.abs(answers(to_cell(graph), inputs)[:1] - expected).max() > 1e-3


class Positions(nn.Cell):
    """Words, and positions whose ids are known: as a constant, as a part of one, and through a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.kinds = nn.Embedding(31, 9), nn.Embedding(12, 9), nn.Embedding(2, 9)
        self.ids, self.project, self.head = ms.Tensor(np.arange(12)[None], ms.int32), nn.Dense(9, 9), nn.Dense(9, 5)

    def construct(self, ids):  # type: ignore[no-untyped-def]
        places = self.project(self.places(self.ids[:, :5])) + self.kinds(ops.zeros((1, 5), ms.int32))
        return self.head(self.words(ids) + places)


@pytest.mark.parametrize("kind", ["int8", "weight"])
def test_tables_read_at_known_places_have_their_stored_weights(kind: str) -> None:
    cell = calibrated(Positions(), IDS, stored(2))
    graph, plan = cell.sync()
    assert len(plan.stored_weights()) == 5
    expected = answers(cell, IDS)
    found = Simulator(lite_program(graph, plan, kind=kind)).run(IDS)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert np.abs(answers(to_cell(graph), IDS) - expected).max() > 1e-3


def test_what_is_computed_from_parameters_alone_is_not_planned_int8() -> None:
    graph = deployment_graph(capture(Positions(), (ms.Tensor(IDS),)))
    plan = make_plan(graph)
    assert (plan.node("project").precision, plan.node("head").precision) == ("float", "int8")


def test_a_table_with_scales_that_do_not_fit_is_refused() -> None:
    graph = deployment_graph(capture(Encoder(), (ms.Tensor(IDS),)))
    program = lite_program(graph, make_plan(graph, stored(8)))
    (gather,) = [step for step in program.steps if step.op == "Gather" and step.layer == "table"]
    table = program.tensors[gather.inputs[0]]
    assert table.data is not None
    ms_bytes(program)
    wrong = TensorQuant(np.ones(9), np.zeros(9))
    program.tensors[table.name] = Tensor(table.name, "int8", table.shape, table.data, wrong, Format.NHWC)
    with pytest.raises(ExportError, match=r"layer 'table' \(Gather\): its table has 9 scales .*; allowed is 1 or"):
        ms_bytes(program)


# -- other files -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("file_format", ["MS", "MINDIR", "MS_WEIGHT"])
def test_files_that_do_not_round_inputs_refuse_16_bits(file_format: str, tmp_path: Path) -> None:
    cell = calibrated(Rows(), SERIES, stored(8, "dynamic", act_quant_dtype=16))
    with pytest.raises(ExportError, match=r"^first has inputs of 16 bits, which .* does not hold; allowed: portable_"):
        export(cell, SERIES, str(tmp_path / "net"), file_format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["encoder", "dynamic", "dynamic_symmetric", "dynamic_16", "images"])
def test_onnx_answers_as_the_fake_quantised_network(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from msqkd.exporters.onnx.runtime import load_onnx

    make, inputs, config = NETWORKS[name]
    cell = calibrated(make(), inputs, config)
    graph, plan = cell.sync()
    found, expected = load_onnx(export_onnx(graph, plan, tmp_path / "net.onnx"))(inputs), answers(cell, inputs)
    # A sum in another order may move a rounding by a step.
    tolerance = 2e-2 if plan.dynamic else 1e-4
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())


def test_the_file_for_the_converter_has_no_marker_on_stored_weights(tmp_path: Path) -> None:
    cell = calibrated(Images(), IMAGES, None, rule("path", "first", "weight-only"))
    graph, plan = cell.sync()
    file = export_lite(graph, plan, tmp_path / "net.mindir")
    written, _, markers = read_marked(file)
    assert len(markers) == 3, "the second convolution, the mean as one, and the dense layer"
    quant = plan.weights["first"]
    rounded = quant.qparams(graph.params["first.weight"].data).fake_quantize(graph.params["first.weight"].data)
    np.testing.assert_array_equal(written.params["first.weight"].data, rounded)
    np.testing.assert_allclose(answers(load_lite(file), IMAGES), answers(cell, IMAGES), atol=1e-6)
    with pytest.raises(ExportError, match="nothing in the network is int8"):
        export_lite(graph, make_plan(graph, stored()), tmp_path / "none.mindir")
    assert not (tmp_path / "none.mindir").exists()


def test_stored_layers_on_ascend(tmp_path: Path) -> None:
    cell = calibrated_for_ascend()
    graph, plan = cell.sync()
    program = ascend_program(graph, plan)
    assert {step.layer for step in program.steps if step.quantized} == {"first", "second"}
    np.testing.assert_allclose(Device(graph, plan)(IMAGES)[0], answers(cell, IMAGES), atol=2e-3)
    assert export_ascend(graph, plan, tmp_path / "net.mindir").stat().st_size


def calibrated_for_ascend() -> QuantCell:
    ms.set_seed(0)
    rules = [rule("path", "head", "weight-only", **{"weight.quant_dtype": 2})]
    return quantize(create_ptq_network(Images(), None, [IMAGES], rules=rules, target="ascend"))


# -- report ------------------------------------------------------------------------------------------------------------
def test_the_table_of_layers_shows_stored_ones() -> None:
    cell = calibrated(Images(), IMAGES, None, rule("path", "head", "weight-only", **{"weight.quant_dtype": 4}))
    graph, plan = cell.sync()
    rows = {row["name"]: row for row in layer_table(graph, plan, graph, [IMAGES])}
    assert rows["head"]["weight"]["bits"] == 4
    assert rows["head"]["activation"] is None
    assert rows["head"]["sqnr_db"] > 5
    assert rows["first"]["activation"]["bits"] == 8
    wholly = layer_table(graph, make_plan(graph, stored()), graph, [IMAGES])
    assert [row["name"] for row in wholly] == ["first", "second", "head"]


def test_phases_turn_the_rounding_of_rows_on_and_off() -> None:
    cell = calibrated(Rows(), SERIES, stored(8, "dynamic"))
    rounded = answers(cell, SERIES)
    assert cell.set_phase(OFF) is True
    assert cell.set_phase(OFF) is False
    assert np.abs(answers(cell, SERIES) - rounded).max() > 0
    assert cell.set_phase(QUANTIZE) is True
    np.testing.assert_array_equal(answers(cell, SERIES), rounded)
