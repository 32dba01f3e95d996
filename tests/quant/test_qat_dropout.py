from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

import msqkd
from msqkd.errors import PlanError
from msqkd.graph.capture import capture
from msqkd.graph.passes.restore_dropout import find_dropout
from msqkd.quant.fake_quant import QUANTIZE
from msqkd.quant.qat import quantize_cell
from msqkd.train.step import TrainStep, WithLoss

pytestmark = pytest.mark.usefixtures("graph_mode")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 3, 8, 8)).astype(np.float32)
Y = RNG.integers(0, 4, 16).astype(np.int32)


class Net(nn.Cell):
    def __init__(self, between: bool = False) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()
        self.between = nn.Dropout(p=0.2) if between else nn.Identity()
        self.drop, self.flatten, self.head = nn.Dropout(p=0.5), nn.Flatten(), nn.Dense(384, 4)

    def construct(self, x: Any) -> Any:
        x = self.relu(self.bn(self.between(self.conv(x))))
        return self.head(self.drop(self.flatten(x)))


@pytest.mark.parametrize("batchnorm", ["fold", "freeze", "live"])
def test_the_cell_drops_in_training_and_deploys_without(batchnorm: str) -> None:
    cell = msqkd.prepare_qat(
        Net(), (3, 8, 8), msqkd.QuantConfig(act_quant_delay=0), batchnorm=batchnorm, dropout=True, calib_dataset=[X]
    )
    cell.set_train(True)
    assert (cell(ms.Tensor(X)).asnumpy() != cell(ms.Tensor(X)).asnumpy()).any()
    step = TrainStep(WithLoss(cell, nn.CrossEntropyLoss()), nn.Momentum(cell.trainable_params(), 0.01, 0.9))
    step.set_train()
    for _ in range(3):
        assert np.isfinite(float(step(ms.Tensor(X), ms.Tensor(Y)).asnumpy()))
    cell.set_train(False)
    cell.set_phase(QUANTIZE)
    graph, plan = cell.sync()
    assert not any(node.op == "TrainingDropout" for node in graph.nodes)
    deployed = quantize_cell(graph, plan)
    deployed.set_phase(QUANTIZE)
    # Folded weights round like the separate ones but for a last bit.
    np.testing.assert_allclose(deployed(ms.Tensor(X)).asnumpy(), cell(ms.Tensor(X)).asnumpy(), atol=0.1)


def test_a_dropout_that_folding_leaves_no_place_for_is_named() -> None:
    net = Net(between=True)
    graph = capture(net, (3, 8, 8))
    places = find_dropout(net, (3, 8, 8), graph)
    plan = msqkd.plan_network(net, (3, 8, 8))[1]
    for batchnorm in ("fold", "freeze", "live"):
        with pytest.raises(PlanError, match="Net: the dropout 'between' has no place in the network that is trained"):
            quantize_cell(graph, plan, batchnorm, dropout=places)
