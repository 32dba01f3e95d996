from __future__ import annotations

from typing import Any, Optional

import numpy as np
import pytest

from msqkd.graph.ir import Graph, Node, TensorType, Value
from msqkd.quant.algorithms.channels import Channels, Moments, moved


def graph_of(op: str, shape: tuple[int, ...], result: tuple[int, ...], *literals: Any) -> tuple[Graph, Node]:
    graph = Graph("net")
    graph.inputs = [graph.add_value(Value("x", "input", TensorType((-1, *shape[1:]))))]
    names = [graph.add_const(literal) for literal in literals]
    output = graph.add_value(Value("y", "node", TensorType((-1, *result[1:]))))
    node = Node("node", op, ["x", *names], [output])
    graph.nodes, graph.outputs = [node], [output]
    return graph, node


X = np.arange(3 * 4 * 6 * 5).reshape(3, 4, 6, 5)
MAPS = Channels(1, 4)

SLICE = ("StridedSlice", X[:, :, 0], ((0, 0, 0), (0, 0, 1), (1, 1, 1), 3, 3, 0, 0, 4))


@pytest.mark.parametrize(
    ("op", "result", "literals", "channels", "expected"),
    [
        ("Reshape", X.reshape(3, -1), (), MAPS, Channels(1, 4, 30)),
        ("Reshape", X.reshape(3, 4, -1), (), MAPS, MAPS),
        ("Reshape", X.reshape(3, 8, 15), (), MAPS, Channels(1, 4, 2)),
        ("Reshape", X.reshape(3, 5, 24), (), MAPS, None),
        ("Reshape", X.reshape(3, 24, 5), (), Channels(2, 6), None),
        ("Reshape", X.reshape(-1, 5), (), Channels(3, 5), Channels(1, 5)),
        ("ExpandDims", X[:, :, None], (), MAPS, MAPS),
        ("Transpose", X.transpose(0, 2, 3, 1), ((0, 2, 3, 1),), MAPS, Channels(3, 4)),
        (SLICE[0], SLICE[1], SLICE[2], MAPS, MAPS),
        (SLICE[0], SLICE[1], SLICE[2], Channels(3, 5), Channels(2, 5)),
        (SLICE[0], SLICE[1], SLICE[2], Channels(2, 6), None),
        ("StridedSlice", X[:, 1:], ((0, 1), (0, 4), (1, 1), 1, 1, 0, 0, 0), MAPS, None),
        ("Softmax", X, (), MAPS, None),
    ],
)
def test_where_channels_are_behind(
    op: str, result: np.ndarray, literals: tuple[Any, ...], channels: Channels, expected: Optional[Channels]
) -> None:
    graph, node = graph_of(op, X.shape, result.shape, *literals)
    found = moved(graph, node, channels)
    assert found == expected
    if found is not None:  # every element is still one of its own channel
        before, after = channels.rows(X), found.rows(result)
        assert all(np.isin(behind, ahead).all() for behind, ahead in zip(after, before))


def test_moments_of_batches_are_those_of_all() -> None:
    values = (np.random.default_rng(0).normal(size=(20, 6, 4)) * 1e-3 + 1000).astype(np.float32)
    channels = Channels(1, 3, repeat=2)
    moments = Moments(channels)
    for part in (values[:3], values[3:11], values[11:]):
        moments.update(part)
    rows = values.astype(np.float64).reshape(20, 3, 8).transpose(1, 0, 2).reshape(3, -1)
    np.testing.assert_allclose(moments.mean, rows.mean(1), rtol=1e-12)
    np.testing.assert_allclose(moments.deviation, rows.std(1), rtol=1e-6)
    np.testing.assert_array_equal(moments.low, rows.min(1))
    np.testing.assert_array_equal(moments.reach, np.abs(rows).max(1))
