from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from msqkd.exporters import export
from msqkd.graph.capture import capture
from msqkd.graph.cell import to_cell
from msqkd.quant.algorithms.biases import with_biases
from msqkd.quant.config import QuantConfig
from msqkd.quant.fake_quant import QUANTIZE
from msqkd.quant.placement import make_plan
from msqkd.quant.ptq import calibrate
from msqkd.quant.qat import deployment_graph, quantize_cell

pytestmark = pytest.mark.usefixtures("graph_mode")

X = np.random.default_rng(0).normal(size=(8, 2, 6, 6)).astype(np.float32)


class Net(nn.Cell):
    """A convolution with, one without and one that shares a bias; a transposed one; a dense layer without."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(2, 2, 3, has_bias=bias) for bias in (False, True, True))
        self.third.bias = self.second.bias
        self.up, self.relu, self.flatten = nn.Conv2dTranspose(2, 2, 1), nn.ReLU(), nn.Flatten()
        self.fc = nn.Dense(72, 3, has_bias=False)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.up(self.relu(self.third(self.second(self.relu(self.first(x))))))
        return self.fc(self.flatten(x))


def test_every_layer_gets_a_bias_of_its_own_and_nothing_else_changes(tmp_path: Path) -> None:
    ms.set_seed(1)
    net = Net()
    net.second.bias.set_data(ms.Tensor(np.float32([0.5, -0.25])))
    graph = deployment_graph(capture(net, (2, 6, 6)))
    biased = with_biases(graph)
    wide = [node for node in biased.nodes if node.op in ("Conv2D", "Dense")]
    assert [len(node.inputs) for node in wide] == [3] * 4
    assert len({node.inputs[2] for node in wide}) == 4
    assert wide[0].inputs[2] == "first.bias"
    assert biased.params["first.bias"].data.dtype == np.float32
    for node, expected in zip(wide, ([0, 0], [0.5, -0.25], [0.5, -0.25], [0, 0, 0])):
        np.testing.assert_array_equal(biased.params[node.inputs[2]].data, expected)
    assert [(n.name, n.outputs) for n in biased.nodes] == [(n.name, n.outputs) for n in graph.nodes]
    assert [n.inputs for n in biased.nodes if n.op == "Conv2DTranspose"] == [graph.node("up").inputs]
    np.testing.assert_array_equal(to_cell(biased)(ms.Tensor(X)).asnumpy(), to_cell(graph)(ms.Tensor(X)).asnumpy())
    assert "first.bias" not in graph.params

    plan = make_plan(graph, QuantConfig(act_observer="minmax"))
    again = make_plan(biased, QuantConfig(act_observer="minmax"))
    assert again.to_dict() == plan.to_dict()
    plan = calibrate(biased, plan, [X])
    cell = quantize_cell(biased, plan)
    cell.set_phase(QUANTIZE)
    reference = quantize_cell(graph, plan)
    reference.set_phase(QUANTIZE)
    np.testing.assert_array_equal(cell(ms.Tensor(X)).asnumpy(), reference(ms.Tensor(X)).asnumpy())
    for file_format in ("MS", "MINDIR", "ONNX"):
        assert Path(export(biased, plan, tmp_path / "net", file_format)).stat().st_size > 0


def test_computing_twice_changes_nothing() -> None:
    graph = with_biases(deployment_graph(capture(Net(), (2, 6, 6))))
    again = with_biases(graph)
    assert again.params.keys() == graph.params.keys()
