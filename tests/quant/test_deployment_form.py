from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from msqkd.exporters import export
from msqkd.graph.capture import capture
from msqkd.graph.cell import to_cell
from msqkd.graph.ir import Graph
from msqkd.quant.placement import make_plan
from msqkd.quant.ptq import calibrate
from msqkd.quant.qat import deployment_graph, quantize_cell, training_graph

pytestmark = pytest.mark.usefixtures("graph_mode")
X = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)


class Chain(nn.Cell):
    """Three BatchNorms behind one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 6, 3), nn.ReLU()
        self.norm1, self.norm2, self.norm3 = nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.BatchNorm2d(6)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.relu(self.norm3(self.norm2(self.norm1(self.conv(x)))))


class Auxiliary(nn.Cell):
    """A head that is trained only reads the convolution in front of its BatchNorm, and the parts of an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)
        self.sigmoid, self.last = nn.Sigmoid(), nn.Conv2d(6, 2, 1)

    def construct(self, x):  # type: ignore[no-untyped-def]
        y = self.conv(x)
        z = self.norm(y)
        gate = self.sigmoid(z)
        return self.last(z * gate), self.head(y) + gate.mean()


def randomized(net: nn.Cell) -> nn.Cell:
    random = np.random.default_rng(3)
    for parameter in net.get_parameters():
        positive = parameter.name.endswith(("variance", "gamma"))
        data = random.uniform(0.5, 1.5, parameter.shape) if positive else random.normal(size=parameter.shape) * 0.3
        parameter.set_data(ms.Tensor(data.astype(np.float32)))
    return net.set_train(False)


def captured(net: nn.Cell) -> Graph:
    graph = capture(randomized(net), (3, 8, 8))
    if len(graph.outputs) > 1:
        graph.deployed = (0,)
    return graph


NETWORKS = pytest.mark.parametrize("make", [Chain, Auxiliary])


@NETWORKS
def test_a_deployment_form_is_rewritten_no_further(make: type) -> None:
    deployed = deployment_graph(captured(make()))
    for again in (deployment_graph(deployed), deployment_graph(deployed.copy()), training_graph(deployed, "live")):
        assert [(node.name, node.op, node.inputs) for node in again.nodes] == [
            (node.name, node.op, node.inputs) for node in deployed.nodes
        ]


@NETWORKS
@pytest.mark.parametrize("batchnorm", ["fold", "freeze", "live"])
def test_the_calibrated_cell_is_the_planned_network(make: type, batchnorm: str) -> None:
    net = make()
    graph = captured(net)
    deployed = deployment_graph(graph)
    plan = calibrate(deployed, make_plan(deployed), [X])
    names = [node.name for node in plan.nodes]
    for source in (graph, deployed):
        cell = quantize_cell(source, plan, batchnorm)
        assert [node.name for node in cell.sync()[0].nodes] == names
    expected = net(ms.Tensor(X))
    expected = (expected[0] if isinstance(expected, tuple) else expected).asnumpy()
    np.testing.assert_allclose(to_cell(deployed)(ms.Tensor(X)).asnumpy(), expected, atol=1e-4)


@NETWORKS
@pytest.mark.parametrize("form", ["MINDIR", "MINDIR_PORTABLE", "MS", "ONNX"])
def test_it_is_written(make: type, form: str, tmp_path: object) -> None:
    deployed = deployment_graph(captured(make()))
    plan = calibrate(deployed, make_plan(deployed), [X])
    graph, plan = quantize_cell(deployed, plan).sync()
    assert export(graph, plan, f"{tmp_path}/net", form).is_file()
