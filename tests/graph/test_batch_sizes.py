"""Networks that compute with the size of the batch, and literals that hold arrays."""

from __future__ import annotations

from typing import Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from msqkd.graph.capture import capture
from msqkd.graph.cell import to_cell
from msqkd.graph.ir import Graph, Node, TensorType, Value

Network = Callable[..., nn.Cell]
X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)


@pytest.mark.parametrize(
    ("construct", "expected"),
    [
        ("x + ops.arange(x.shape[0]).astype(ms.float32)[:, None]", lambda x: x + np.arange(len(x))[:, None]),
        (
            "x + ops.arange(0, 2 * x.shape[0], 2, dtype=ms.float32)[:, None]",
            lambda x: x + 2 * np.arange(len(x))[:, None],
        ),
        ("x[ops.arange(x.shape[0])]", lambda x: x),
        ("x * float(x.shape[0])", lambda x: x * len(x)),
        ("x * ms.Tensor(x.shape[0], ms.float32)", lambda x: x * len(x)),
        ("x * ms.Tensor(2 * x.shape[0], ms.float32)", lambda x: 2 * x * len(x)),
        ("x * ops.scalar_to_tensor(x.shape[0], ms.float32)", lambda x: x * len(x)),
        ("x + ops.full((x.shape[0], 1), 0.5, dtype=ms.float32)", lambda x: x + 0.5),
        ("x + ops.ones((x.shape[0], 1), x.dtype)", lambda x: x + 1),
        ("x + ops.meshgrid(ops.arange(3), ops.arange(3))[0].astype(ms.float32).sum(0)", lambda x: x + 3 * np.arange(3)),
        ("ops.clamp(x, None, 0.5)", lambda x: np.minimum(x, 0.5)),
        ("x + (x > 0).astype(x.dtype)", lambda x: x + (x > 0)),
    ],
)
def test_any_batch(network: Network, construct: str, expected: Callable[[np.ndarray], np.ndarray]) -> None:
    ms.set_context(mode=ms.GRAPH_MODE)
    cell = to_cell(capture(network(f"return {construct}"), (3,)))
    for size in (4, 3):
        np.testing.assert_allclose(cell(ms.Tensor(X[:size])).asnumpy(), expected(X[:size]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("literal", [(1.0, float("inf")), (np.ones(3, np.float32), np.ones(3, np.float32))])
def test_literals_that_python_cannot_spell(literal: tuple[object, ...]) -> None:
    graph = Graph("Net")
    graph.inputs = [graph.add_value(Value("x", "input", TensorType((-1, 3))))]
    arrays = isinstance(literal[0], np.ndarray)
    name = graph.add_const(literal if arrays else literal[0])
    graph.add_value(Value("y", "node", TensorType((-1, 3))))
    if arrays:
        graph.add_value(Value("sum", "node", TensorType((3,))))
        graph.nodes = [Node("sum", "AddN", [name], ["sum"], functional=False)]
        graph.nodes.append(Node("y", "Add", ["x", "sum"], ["y"]))
    else:
        graph.nodes = [Node("y", "ClampScalar", ["x", graph.add_const(-literal[1]), name], ["y"])]
    graph.outputs = ["y"]
    expected = X + 2 if arrays else np.minimum(X, 1)
    np.testing.assert_allclose(to_cell(graph)(ms.Tensor(X)).asnumpy(), expected, rtol=1e-6)
