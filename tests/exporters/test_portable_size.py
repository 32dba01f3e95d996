"""The portable file is a quarter of the float one, and says the same as before it was made short."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from msqkd.api import create_ptq_network, quantize
from msqkd.exporters.canonical import canonical_model, on_bytes
from msqkd.exporters.compact import compact_model
from msqkd.exporters.mindir_file import write_cell
from msqkd.exporters.portable import export_portable, portable_graph, write_float
from msqkd.exporters.verify import load_portable
from msqkd.graph.capture import capture
from msqkd.graph.cell import to_cell
from msqkd.graph.mindir import read_mindir
from msqkd.models import build_model
from msqkd.quant.config import QuantConfig
from msqkd.quant.qat import QuantCell

pytestmark = pytest.mark.usefixtures("graph_mode")

COLOUR = (3, 32, 32)


class Branches(nn.Cell):
    """What the exporter also uses itself (Mul), several results (split), sequences, BatchNorm that cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.bn = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(8)
        self.relu, self.sigmoid, self.gate = nn.ReLU(), nn.Sigmoid(), nn.Conv2d(8, 8, 1)

    def construct(self, x):  # type: ignore[no-untyped-def]
        left, right = ops.split(x, 4, axis=1)
        x = self.relu(ops.concat((self.conv1(left), self.conv2(right)), axis=1))
        x = self.bn(x * self.sigmoid(self.gate(ops.mean(x, (2, 3), keep_dims=True))))
        return x.mean((2, 3)), x.max((2, 3))


@dataclass
class Case:
    """A quantised network and its portable file in both forms."""

    net: nn.Cell
    cell: QuantCell
    shape: tuple[int, ...]
    long: Path
    short: Path

    def batch(self, size: int) -> Any:
        return ms.Tensor(images(size, self.shape))


def images(size: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(size).normal(size=(size, *shape)).astype(np.float32)


def quantised(net: nn.Cell, shape: tuple[int, ...], per_channel: bool = False) -> QuantCell:
    config = QuantConfig(act_observer="minmax").override({"weight.per_channel": per_channel})
    return quantize(create_ptq_network(net, config, [images(2, shape)]))


def written(net: nn.Cell, shape: tuple[int, ...], folder: Path, per_channel: bool = False) -> Case:
    cell = quantised(net, shape, per_channel)
    graph, plan = cell.sync()
    batch = ms.Tensor(shape=[None, *shape], dtype=ms.float32)
    long = write_cell(to_cell(portable_graph(graph, plan)), [batch], folder / "long.mindir")
    return Case(net, cell, shape, long, export_portable(graph, plan, folder / "short.mindir"))


@pytest.fixture(scope="module", params=["resnet20", "resnet20_per_channel", "branches"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    mode = ms.get_context("mode")
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_seed(1)
    net, shape = (
        (Branches(), (8, 6, 6)) if request.param == "branches" else (build_model("msqkd", "resnet20", {}), COLOUR)
    )
    yield written(net, shape, tmp_path_factory.mktemp(request.param), request.param.endswith("per_channel"))
    ms.set_context(mode=mode)


def proto(data: bytes) -> Any:
    from mindspore.train import mind_ir_pb2 as pb

    model = pb.ModelProto()
    model.ParseFromString(data)
    return model


def op_of(node: Any) -> str:
    return node.op_type.removeprefix("REF::").partition(":")[0]


def answers(cell: Any, x: Any) -> list[np.ndarray]:
    result = cell(x)
    return [item.asnumpy() for item in (result if isinstance(result, tuple) else (result,))]


def assert_same(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted):
        np.testing.assert_array_equal(one, other)


def test_resnet20_is_a_quarter(case: Case, tmp_path: Path) -> None:
    if case.shape != COLOUR:
        pytest.skip("a tiny network is more graph than weights")
    large = write_float(capture(case.net, case.shape), tmp_path / "float.mindir").stat().st_size
    assert case.short.stat().st_size <= 0.27 * large


def test_resnet50_is_a_quarter(tmp_path: Path) -> None:
    pytest.importorskip("mindcv")
    net = build_model("mindcv", "resnet50", {})
    large = write_float(capture(net, (3, 64, 64)), tmp_path / "float.mindir").stat().st_size
    graph, plan = quantised(net, (3, 64, 64)).sync()
    int8 = [node.op for node in plan.nodes if node.precision == "int8"]
    assert (int8.count("Conv2D"), int8.count("Add"), len(int8)) == (53, 16, len(plan.nodes)), "as the README says"
    assert export_portable(graph, plan, tmp_path / "int8.mindir").stat().st_size <= 0.26 * large


@pytest.mark.parametrize("mode", [ms.GRAPH_MODE, ms.PYNATIVE_MODE], ids=["graph", "pynative"])
def test_short_and_long_form_answer_alike(case: Case, mode: int) -> None:
    ms.set_context(mode=mode)
    short, long = load_portable(case.short), load_portable(case.long)
    for size in (1, 3, 4):
        x = case.batch(size)
        assert_same(answers(short, x), answers(long, x))


def test_answers_are_those_of_the_quantised_cell(case: Case) -> None:
    short = load_portable(case.short)
    for size in (1, 5):
        assert_same(answers(short, case.batch(size)), answers(case.cell, case.batch(size)))


def test_parameters_and_inputs_are_untouched(case: Case) -> None:
    short, long = (proto(file.read_bytes()).graph for file in (case.short, case.long))
    assert list(short.parameter) == list(long.parameter)
    assert list(short.input) == list(long.input)
    assert [list(output.tensor) for output in short.output] == [list(output.tensor) for output in long.output]


def test_operations_are_the_same_and_in_order(case: Case) -> None:
    short, long = (proto(file.read_bytes()).graph.node for file in (case.short, case.long))
    assert [op_of(n) for n in short if op_of(n) != "Constant"] == [op_of(n) for n in long if op_of(n) != "Constant"]


def test_layers_keep_place_and_type(case: Case) -> None:
    nodes = proto(case.short.read_bytes()).graph.node
    layers = [node for node in nodes if op_of(node) in ("Conv2D", "BiasAdd", "ReLU", "MatMul", "Add", "Concat")]
    assert layers
    assert all(node.attribute[0].name == "shape" for node in layers)
    places = [node.domain for node in layers]
    assert len(set(places)) == len(places)
    assert "relu_relu/ReLU" in places
    assert all(node.domain.endswith("/" + op_of(node)) for node in layers)


def test_nothing_is_said_twice(case: Case) -> None:
    model = proto(case.short.read_bytes())
    constants = [node.attribute[0].SerializeToString() for node in model.graph.node if node.op_type == "Constant"]
    assert len(set(constants)) == len(constants)
    names = [name for node in model.graph.node for name in node.output]
    names += [primitive.name for primitive in model.primitives]
    names += [entry.name for entry in (*model.graph.input, *model.graph.parameter)]
    assert len(set(names)) == len(names), "MindSpore looks values, primitives and parameters up in one table"


def test_the_reader_of_captured_networks_reads_it(case: Case) -> None:
    graph = read_mindir(case.short.read_bytes(), "read_back")
    assert_same(answers(to_cell(graph), case.batch(3)), answers(load_portable(case.short), case.batch(3)))


def test_the_float_file_is_not_shortened(case: Case, tmp_path: Path) -> None:
    data = write_float(capture(case.net, case.shape), tmp_path / "float.mindir").read_bytes()
    assert on_bytes(data, canonical_model) == data
    assert len(on_bytes(data, compact_model)) < len(data)


_SCRIPT = """
import sys
from pathlib import Path
import mindspore as ms
from mindspore import nn
sys.path.insert(0, str(Path(sys.argv[1]).parent))
from test_portable_size import Branches, quantised
from msqkd.exporters.portable import export_portable
from msqkd.platform import leave_quietly
ms.set_context(mode=ms.GRAPH_MODE)
if sys.argv[3] == "later":
    ms.export(nn.Conv2d(2, 2, 3), ms.Tensor(shape=[None, 2, 4, 4], dtype=ms.float32), file_name=sys.argv[2],
              file_format="MINDIR")
ms.set_seed(3)
export_portable(*quantised(Branches(), (8, 6, 6)).sync(), sys.argv[2])
leave_quietly()
"""


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    files = []
    for seed, history in (("1", "fresh"), ("2", "later")):
        files.append(tmp_path / f"{history}.mindir")
        subprocess.run(
            [sys.executable, "-c", _SCRIPT, __file__, str(files[-1]), history],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        )
    first, second = (file.read_bytes() for file in files)
    assert first == second
