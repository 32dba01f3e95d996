from __future__ import annotations

from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

import msqkd
from msqkd.exporters.verify import load_portable
from msqkd.graph.capture import capture
from msqkd.graph.cell import to_cell
from msqkd.graph.passes.computed_weights import settle_weights
from msqkd.quant.qat import deployment_graph
from msqkd.train.step import TrainStep, WithLoss

pytestmark = pytest.mark.usefixtures("graph_mode")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 3, 8, 8)).astype(np.float32)
Y = RNG.integers(0, 4, 8).astype(np.int32)


class StandardisedConv(nn.Conv2d):
    """Weight standardisation, as BiT and its kin have it."""

    def construct(self, x: Any) -> Any:
        mean = self.weight.mean((1, 2, 3), keep_dims=True)
        centred = self.weight - mean
        deviation = ops.sqrt((centred * centred).mean((1, 2, 3), keep_dims=True) + 1e-5)
        return self.conv2d(x, centred / deviation)


class Net(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = StandardisedConv(3, 6, 3), nn.ReLU()
        self.head = nn.Dense(6, 4)

    def construct(self, x: Any) -> Any:
        return self.head(self.relu(self.conv(x)).mean((2, 3)))


def test_a_computed_weight_is_quantised_trained_and_deployed(tmp_path: Path) -> None:
    net = Net()
    _, plan = msqkd.plan_network(net, (3, 8, 8))
    assert {node.name: node.precision for node in plan.nodes}["conv.conv2_d"] == "int8"
    assert set(plan.weights) == {"conv.conv2_d", "head"}
    cell = msqkd.prepare_qat(net, (3, 8, 8), msqkd.QuantConfig(act_quant_delay=0), calib_dataset=[X])
    assert "conv.weight" in [p.name for p in cell.trainable_params()]
    step = TrainStep(WithLoss(cell, nn.CrossEntropyLoss()), nn.SGD(cell.trainable_params(), 0.05))
    step.set_train()
    losses = [float(step(ms.Tensor(X), ms.Tensor(Y)).asnumpy()) for _ in range(8)]
    assert losses[-1] < losses[0]
    cell.set_train(False)
    expected = cell(ms.Tensor(X)).asnumpy()
    file = msqkd.export(cell, (3, 8, 8), str(tmp_path / "net"), "MINDIR_PORTABLE")
    np.testing.assert_allclose(load_portable(Path(file))(ms.Tensor(X)).asnumpy(), expected, rtol=0, atol=1e-6)
    assert msqkd.export(cell, (3, 8, 8), str(tmp_path / "net"), "MS")


def test_nothing_else_is_touched() -> None:
    graph = capture(Net(), (3, 8, 8))
    before = [node.name for node in graph.nodes]
    settled = settle_weights(graph)
    assert [node.name for node in graph.nodes] == before
    assert [node.op for node in settled.nodes] == ["Conv2D", "ReLU", "ReduceMean", "Dense"]
    assert settle_weights(settled) is settled
    np.testing.assert_array_equal(to_cell(settled)(ms.Tensor(X)).asnumpy(), to_cell(graph)(ms.Tensor(X)).asnumpy())
    plain = capture(nn.Dense(4, 2), (4,))
    assert settle_weights(plain) is plain
    assert [node.op for node in deployment_graph(plain).nodes] == ["Dense"]
