from __future__ import annotations

from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from msqkd.api import create_ptq_network, export, quantize
from msqkd.errors import ExportError, MsqkdError, PlanError
from msqkd.exporters import export as export_format
from msqkd.exporters.lite import read_marked
from msqkd.exporters.verify import load_lite, load_portable
from msqkd.quant.config import QuantConfig
from msqkd.quant.qat import QuantCell

pytestmark = pytest.mark.usefixtures("pynative_mode")


class Residual(nn.Cell):
    """Every form the exporters rewrite: BatchNorm, addition, pools, a global mean, Flatten, dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.deep = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, group=4)
        self.relu, self.pool, self.flatten = nn.ReLU(), nn.MaxPool2d(2, 2), nn.Flatten()
        self.fc1, self.fc2 = nn.Dense(4, 8), nn.Dense(8, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        x = self.relu(self.deep(self.conv2(x)) + x)
        return self.fc2(self.relu(self.fc1(self.flatten(ops.mean(x, (2, 3), keep_dims=True)))))


X = np.random.default_rng(0).normal(size=(24, 2, 8, 8)).astype(np.float32)


def quantised(net: nn.Cell, x: np.ndarray, per_channel: bool = False, bits: int = 8) -> QuantCell:
    config = QuantConfig(act_observer="minmax").override(
        {"weight.per_channel": per_channel, "weight.quant_dtype": bits}
    )
    return quantize(create_ptq_network(net, config, [x]))


@pytest.fixture(scope="module", params=[False, True], ids=["per_tensor", "per_channel"])
def residual(request: pytest.FixtureRequest) -> QuantCell:
    ms.set_seed(1)
    return quantised(Residual(), X, request.param)


def answers(cell: Any, x: np.ndarray = X) -> np.ndarray:
    return cell(ms.Tensor(x)).asnumpy()


def agreement(found: np.ndarray, wanted: np.ndarray) -> float:
    return float((found.argmax(1) == wanted.argmax(1)).mean())


def proto(file: Path) -> Any:
    from mindspore.train import mind_ir_pb2 as pb

    model = pb.ModelProto()
    model.ParseFromString(file.read_bytes())
    return model


def ops_of(model: Any) -> list[tuple[str, Any]]:
    kinds = {primitive.name: primitive.op_type for primitive in model.primitives}
    return [(kinds.get(node.op_type[len("REF::") :], node.op_type), node) for node in model.graph.node]


def test_portable_answers_as_the_quantised_cell(residual: QuantCell, tmp_path: Path) -> None:
    file = Path(export(residual, X, str(tmp_path / "net"), "MINDIR_PORTABLE"))
    assert file == tmp_path / "net.mindir"
    loaded = load_portable(file)
    np.testing.assert_array_equal(answers(loaded), answers(residual))
    np.testing.assert_array_equal(answers(loaded, X[:5]), answers(residual, X[:5]))


def test_portable_stores_weights_as_int8(residual: QuantCell, tmp_path: Path) -> None:
    model = proto(Path(export(residual, X, str(tmp_path / "net"), "MINDIR_PORTABLE")))
    kinds = {p.ref_key: p.data_type for p in model.graph.parameter}
    weights = [name for name in kinds if name.endswith(".int8")]
    assert len(weights) == 5
    assert {kinds[name] for name in weights} == {3}
    assert all("weight" not in name or name in weights for name in kinds)


def test_size_of_a_larger_network(tmp_path: Path) -> None:
    from msqkd.exporters.portable import write_float
    from msqkd.models import build_model

    cell = quantised(build_model("msqkd", "lenet5", {"in_channels": 1}), np.ones((2, 1, 32, 32), np.float32))
    graph, _ = cell.sync()
    small = Path(export(cell, (1, 32, 32), str(tmp_path / "int8"), "MINDIR_PORTABLE")).stat().st_size
    large = write_float(graph, tmp_path / "float.mindir").stat().st_size
    assert small < 0.4 * large


def test_the_same_network_gives_the_same_bytes(residual: QuantCell, tmp_path: Path) -> None:
    for number, kind in enumerate(("MINDIR", "MINDIR_PORTABLE")):
        one = Path(export(residual, X, str(tmp_path / f"a{number}"), kind)).read_bytes()
        answers(quantised(nn.SequentialCell(nn.Conv2d(2, 2, 3)), X))  # other compilations in between
        assert Path(export(residual, X, str(tmp_path / f"b{number}"), kind)).read_bytes() == one


@pytest.fixture(scope="module")
def marked(residual: QuantCell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    ms.set_context(mode=ms.PYNATIVE_MODE)
    return Path(export(residual, X, str(tmp_path_factory.mktemp("lite") / "net")))


def test_lite_file_holds_nothing_the_converter_stumbles_over(marked: Path) -> None:
    found = {op for op, _ in ops_of(proto(marked))}
    assert found <= {"FakeQuantParam", "Conv2D", "BiasAdd", "ReLU", "Add", "MaxPool", "AvgPool", "Reshape", "Constant"}
    assert not found & {"Load", "UpdateState", "Depend", "MakeTuple", "BatchNorm", "Flatten", "MatMul", "ReduceMean"}


def test_one_marker_a_producer_and_it_is_the_only_user(marked: Path) -> None:
    nodes = ops_of(proto(marked))
    model = proto(marked)
    producer = {node.output[0]: op for op, node in nodes}
    users: dict[str, list[str]] = {}
    for op, node in nodes:
        for name in node.input:
            users.setdefault(name, []).append(op)
    markers = [node for op, node in nodes if op == "FakeQuantParam"]
    for marker in markers:
        source = marker.input[0]
        assert users[source] == ["FakeQuantParam"], "the marker is the only user"
        assert producer.get(source) != "FakeQuantParam", "no two in a row"
        assert source not in {output.name for output in model.graph.output}
    following = {
        op: [users[node.output[0]] for o, node in nodes if o == op and node.output[0] in users] for op, _ in nodes
    }
    assert all(set(u) <= {"ReLU", "FakeQuantParam", "BiasAdd"} for u in following["Conv2D"])
    assert all(u in (["ReLU"], ["FakeQuantParam"]) for u in following["BiasAdd"]), "no marker inside a fused kernel"


def test_every_int8_input_and_output_is_marked(marked: Path) -> None:
    nodes = ops_of(proto(marked))
    model = proto(marked)
    producer = {node.output[0]: op for op, node in nodes}
    outputs = {output.name for output in model.graph.output}
    parameters = {p.name for p in model.graph.parameter}
    for op, node in nodes:
        if op not in ("Conv2D", "Add", "MaxPool", "AvgPool", "Reshape"):
            continue
        tensors = [name for name in node.input if producer.get(name) != "Constant"]
        assert {producer.get(name) for name in tensors} == {"FakeQuantParam"}, f"{op} reads a value without parameters"
        assert not set(tensors) & parameters
    last = [node for _, node in nodes if node.output[0] in outputs]
    assert [producer[node.output[0]] for node in last] == ["Reshape"], "the last convolution is followed by a consumer"


def test_markers_of_weights_and_biases(marked: Path, residual: QuantCell) -> None:
    model = proto(marked)
    shapes = {p.name: list(p.dims) for p in model.graph.parameter}
    primitives = {p.name: p for p in model.primitives}
    lengths = {}
    for op, node in ops_of(model):
        if op == "FakeQuantParam" and node.input[0] in shapes:
            attrs = {a.name: a for a in primitives[node.op_type[len("REF::") :]].attribute}
            scale, zero = attrs["linear_quant_scale"].values, attrs["linear_quant_zero_point"].values
            assert len(scale) == len(zero)
            assert all(item.i == 0 and (not item.ints or set(item.ints) == {0}) for item in zero)
            lengths[node.input[0]] = len(scale)
    graph, plan = residual.sync()
    per_channel = plan.weights["conv1"].axis is not None
    known = {graph.node(name).inputs[1] for name in plan.weights}
    weights = {name for name, shape in shapes.items() if len(shape) == 4}
    assert set(lengths) == weights, "every weight, and no bias"
    assert len(weights) == 6, "the global mean is a depthwise convolution"
    for name, length in lengths.items():
        assert length == (shapes[name][0] if per_channel and name.split(":")[-1] in known else 1), (name, known)


def test_lite_file_read_back_answers_as_the_quantised_cell(marked: Path, residual: QuantCell) -> None:
    found, wanted = answers(load_lite(marked)), answers(residual)
    _, plan = residual.sync()
    step = float(plan.group_of(list(plan.activations)[-1]).qparams().scale)
    assert np.abs(found - wanted).max() <= step * 1.001
    assert agreement(found, wanted) >= 0.95
    graph, values, weights = read_marked(marked)
    assert len(weights) == 6
    assert all(q.qmin == -128 for q in values.values())
    assert {node.op for node in graph.nodes} >= {"Conv2D", "MaxPool", "Reshape"}


@pytest.mark.parametrize("bits", [3, 4])
def test_narrow_weights_travel_on_the_8_bit_grid(tmp_path: Path, bits: int) -> None:
    ms.set_seed(2)
    cell = quantised(Residual(), X, bits=bits)
    for kind, load in (("MINDIR", load_lite), ("MINDIR_PORTABLE", load_portable)):
        file = Path(export(cell, X, str(tmp_path / kind), kind))
        assert agreement(answers(load(file)), answers(cell)) >= 0.95


@pytest.mark.parametrize(
    ("x", "kind", "text"),
    [
        (X, "MINDR", "file_format 'MINDR' is unknown; allowed: MINDIR, MINDIR_PORTABLE"),
        (
            np.ones((1, 3, 8, 8), np.float32),
            "MINDIR",
            "the example input has shape (1, 3, 8, 8); the network takes (N, 2, 8, 8)",
        ),
        ((2, 8, 9), "MINDIR", "the example input has shape"),
        (X[0, 0], "MINDIR", "the example input has shape"),
    ],
)
def test_refusals(residual: QuantCell, tmp_path: Path, x: Any, kind: str, text: str) -> None:
    with pytest.raises(ExportError) as caught:
        export(residual, x, str(tmp_path / "net"), kind)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["MINDIR", "MINDIR_PORTABLE"])
def test_a_place_that_cannot_be_written(residual: QuantCell, tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExportError, match=r"^cannot write .*net.mindir: "):
        export(residual, X, str(tmp_path / "file" / "net"), kind)
    assert [child.name for child in tmp_path.iterdir()] == ["file"]


def test_an_earlier_file_survives_a_failed_export(residual: QuantCell, tmp_path: Path) -> None:
    file = Path(export(residual, X, str(tmp_path / "net")))
    before = file.read_bytes()
    graph, plan = residual.sync()
    with pytest.raises(PlanError, match="has no range yet"):
        export_format(graph, plan.with_ranges(dict.fromkeys(plan.groups, None)), file)  # type: ignore[arg-type]
    assert file.read_bytes() == before
    assert [child.name for child in tmp_path.iterdir()] == ["net.mindir"]


def test_a_network_with_nothing_in_int8(tmp_path: Path) -> None:
    net = nn.SequentialCell(nn.Sigmoid(), nn.Sigmoid())
    with pytest.raises(MsqkdError, match="nothing in the network is int8"):
        export(quantised(net, X), X, str(tmp_path / "net"))
    assert list(tmp_path.iterdir()) == []


class Upward(nn.Cell):
    """A transposed convolution: the size of its result has the batch in it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.skip, self.up = nn.Conv2d(2, 4, 3, 2), nn.Conv2d(2, 2, 1), nn.Conv2dTranspose(4, 2, 2, 2)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return ops.cat((self.up(ops.relu(self.conv(x))), self.skip(x)), 1)


def test_a_transposed_convolution_in_a_lite_file_goes_with_any_batch(tmp_path: Path) -> None:
    cell = quantised(Upward(), X)
    loaded = load_lite(Path(export(cell, X[:1], str(tmp_path / "up"), "MINDIR")))
    assert np.abs(answers(loaded, X[:3]) - answers(cell, X[:3])).max() < 1e-5
