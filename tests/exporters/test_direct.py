"""The MindIR that MindSpore Lite loads without its converter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops
from mindspore.train import mind_ir_pb2

from msqkd.api import create_ptq_network, export, quantize
from msqkd.deploy.vendor_runtime import run_ms, vendor_python
from msqkd.errors import ExportError
from msqkd.exporters.verify import load_direct
from msqkd.quant.config import QuantConfig, Rule, WeightQuantizer

pytestmark = pytest.mark.usefixtures("pynative_mode")

X = np.random.default_rng(0).normal(size=(7, 3, 9, 8)).astype(np.float32)


class Net(nn.Cell):
    """A padded pool, a SiLU, a LayerNorm, a shared convolution and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, has_bias=True), nn.Dense(8, 4)
        self.pool, self.norm, self.silu = nn.MaxPool2d(3, 2, pad_mode="pad", padding=1), nn.LayerNorm((8,)), nn.SiLU()

    def construct(self, x):  # type: ignore[no-untyped-def]
        y = self.pool(self.silu(self.first(x)))
        y = self.shared(y) + self.shared(y * 0.5)
        return self.head(self.norm(ops.mean(y, (2, 3)))), y


def made(config: QuantConfig, tmp_path: Path, rules: Any = (), target: str = "lite_arm") -> tuple[Path, nn.Cell]:
    ms.set_seed(3)
    cell = quantize(create_ptq_network(Net(), config, [X], rules=rules, target=target))
    return Path(export(cell, (3, 9, 8), tmp_path / "net", "MINDIR_DIRECT")), cell


def outputs(cell: Any, x: np.ndarray) -> list[np.ndarray]:
    return [output.asnumpy() for output in cell(ms.Tensor(x))]


CONFIGS = {
    "per channel": QuantConfig(WeightQuantizer(per_channel=True)),
    "per tensor, symmetric": QuantConfig(act_symmetric=True),
    "4 bits": QuantConfig(WeightQuantizer("int4", per_channel=True)),
    "weight-only": QuantConfig(WeightQuantizer("int4", per_channel=True), precision="weight-only"),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("target", ["lite_arm", "ascend"])
def test_the_file_gives_the_outputs_of_the_quantized_network(name: str, target: str, tmp_path: Path) -> None:
    file, cell = made(CONFIGS[name], tmp_path, target=target)
    for batch in (1, 7):
        for found, expected in zip(outputs(load_direct(file), X[:batch]), outputs(cell, X[:batch])):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_dynamic_layers_round_their_rows(tmp_path: Path) -> None:
    file, cell = made(CONFIGS["per channel"], tmp_path, [Rule("path", "head", {"precision": "dynamic"})])
    for found, expected in zip(outputs(load_direct(file), X), outputs(cell, X)):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


class Recurrent(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 5, batch_first=True), nn.Dense(5, 2)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.head(self.lstm(x)[0])


def test_a_layer_that_the_runtime_computes_otherwise_is_refused(tmp_path: Path) -> None:
    cell = quantize(create_ptq_network(Recurrent(), QuantConfig(), [np.ones((2, 4, 6), np.float32)]))
    with pytest.raises(ExportError, match="LSTM"):
        export(cell, (4, 6), tmp_path / "net", "MINDIR_DIRECT")
    assert not list(tmp_path.iterdir())


def test_the_form_is_that_of_mindspore_2_0(tmp_path: Path) -> None:
    model = mind_ir_pb2.ModelProto()
    model.ParseFromString(made(CONFIGS["4 bits"], tmp_path)[0].read_bytes())
    assert model.mind_ir_version == 1
    kinds = {primitive.name: primitive for primitive in model.primitives}
    nodes = [node for node in model.graph.node if node.op_type.startswith("REF::")]
    assert all(kinds[node.op_type[5:]].prim_type == primitive_form() for node in nodes)
    rounds = [node for node in nodes if kinds[node.op_type[5:]].op_type == "Round"]
    assert rounds
    assert all(len(node.input) == 1 for node in rounds)
    tensor = mind_ir_pb2.TensorProto
    assert {parameter.data_type for parameter in model.graph.parameter} == {tensor.FLOAT}
    assert next(iter(model.graph.input[0].tensor[0].dims)) == 1


def primitive_form() -> int:
    return int(mind_ir_pb2.PrimitiveProto.PRIMITIVE)


@pytest.mark.skipif(vendor_python() is None, reason="needs MindSpore Lite's package (MSLITE_HOME)")
def test_mindspore_lite_loads_and_computes_it(tmp_path: Path) -> None:
    python = vendor_python()
    assert python is not None
    file, cell = made(CONFIGS["per channel"], tmp_path)
    _, plan = cell.sync()
    found = run_ms(python, file, [X[:3, None]])
    for index, expected in enumerate(outputs(cell, X[:3])):
        step = float(plan.group_of(cell.graph.outputs[index]).qparams().scale)
        # The runtime may sum floats in another order, which moves single values to the next level.
        difference = np.abs(found[index].reshape(expected.shape) - expected)
        assert difference.max() <= 1.001 * step
        assert (difference > 0).mean() <= 0.02
