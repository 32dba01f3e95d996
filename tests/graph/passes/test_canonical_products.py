from __future__ import annotations

from typing import Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from msqkd.graph.capture import capture
from msqkd.graph.cell import to_cell
from msqkd.graph.passes.fold_batchnorm import fold_batchnorm

Network = Callable[..., nn.Cell]
WEIGHTS = (
    "self.v = ms.Parameter(np.linspace(-1, 1, 20, dtype=np.float32).reshape(5, 4), name='v')\n"
    "self.w = ms.Parameter(np.linspace(-1, 1, 20, dtype=np.float32).reshape(4, 5), name='w')"
)
X = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)


@pytest.mark.parametrize(
    ("expression", "operations"),
    [
        ("ops.matmul(x, self.v.T)", ["Reshape", "Dense", "Reshape"]),
        ("ops.dense(x, self.v)", ["Reshape", "Dense", "Reshape"]),
        ("x @ self.w", ["Reshape", "MatMul", "Reshape"]),
        ("ops.matmul(x[:, 0], self.w)", ["StridedSlice", "MatMul"]),
        ("ops.matmul(x, x.swapaxes(1, 2))", ["Transpose", "BatchMatMul"]),
    ],
)
def test_products_are_those_that_runtimes_have(network: Network, expression: str, operations: list[str]) -> None:
    net = network(f"return {expression}", WEIGHTS)
    graph = capture(net, ms.Tensor(X))
    assert [node.op for node in graph.nodes] == operations
    np.testing.assert_array_equal(to_cell(graph)(ms.Tensor(X)).asnumpy(), net(ms.Tensor(X)).asnumpy())


def test_a_convolution_over_one_dimension_folds_its_batch_norm(network: Network) -> None:
    net = network(
        "return ops.relu(self.norm(self.conv(x)))", "self.conv = nn.Conv1d(3, 6, 3)\nself.norm = nn.BatchNorm1d(6)"
    )
    net.norm.moving_mean.set_data(ms.Tensor(np.arange(6), ms.float32))
    graph = capture(net, ms.Tensor(X))
    assert [node.op for node in graph.nodes] == ["ExpandDims", "Conv2D", "BatchNorm", "Reshape", "ReLU"]
    expected = net.set_train(False)(ms.Tensor(X)).asnumpy()
    np.testing.assert_array_equal(to_cell(graph)(ms.Tensor(X)).asnumpy(), expected)
    folded = fold_batchnorm(graph)
    assert [node.op for node in folded.nodes] == ["ExpandDims", "Conv2D", "Reshape", "ReLU"]
    np.testing.assert_allclose(to_cell(folded)(ms.Tensor(X)).asnumpy(), expected, rtol=1e-5, atol=1e-6)
