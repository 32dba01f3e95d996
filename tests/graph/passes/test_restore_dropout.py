from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from msqkd.errors import CaptureError
from msqkd.graph.capture import capture
from msqkd.graph.cell import to_cell
from msqkd.graph.passes.fold_batchnorm import fold_batchnorm
from msqkd.graph.passes.patterns import find_patterns
from msqkd.graph.passes.restore_dropout import find_dropout, restore_dropout

X = ms.Tensor(np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32) + 3.0)


class DropPath(nn.Cell):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(p=drop_prob)

    def construct(self, x: Any) -> Any:
        if not self.training:
            return x
        return x * self.dropout(ops.ones((x.shape[0],) + (1,) * (x.ndim - 1), ms.float32))


class Block(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.SequentialCell(nn.Dense(8, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.path, self.drop, self.none = DropPath(0.5), nn.Dropout(p=0.25), nn.Dropout(p=0.0)

    def construct(self, x: Any) -> Any:
        y = x + self.path(self.layer(x))
        return self.none(self.drop(y)) * 2.0 + y


class Chain(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.one, self.two = nn.Dense(8, 8), nn.Dropout(p=0.5), nn.Dropout(p=0.25)

    def construct(self, x: Any) -> Any:
        return self.two(self.one(self.dense(x))) + self.one(x), self.two(x)


def test_places_name_the_values_and_their_readers() -> None:
    net = Block()
    path, drop = find_dropout(net, X, capture(net, X))
    assert (path.path, path.rate, path.mask, path.readers) == ("path", 0.5, "sample", (("add", 1),))
    assert (drop.path, drop.rate, drop.mask, drop.readers) == ("drop", 0.25, "element", (("muls", 0),))


@pytest.mark.parametrize("mode", [ms.GRAPH_MODE, ms.PYNATIVE_MODE], ids=["graph", "pynative"])
@pytest.mark.parametrize("batchnorm", ["fold", "freeze", "live"])
def test_the_cell_drops_in_training_only(batchnorm: str, mode: int) -> None:
    net = Block()
    graph = capture(net, X)
    places = find_dropout(net, X, graph)
    training = fold_batchnorm(graph, batchnorm)
    plain = to_cell(training.copy())
    assert restore_dropout(training, places) == []
    training.check()
    cell = to_cell(training)
    ms.set_context(mode=mode)
    np.testing.assert_array_equal(cell(X).asnumpy(), plain(X).asnumpy())
    cell.set_train(True)
    first, second = cell(X).asnumpy(), cell(X).asnumpy()
    assert (first != second).any()


def test_dropouts_in_a_row_and_at_an_output() -> None:
    net = Chain()
    graph = capture(net, X)
    before = [node.name for node in graph.nodes]
    assert restore_dropout(graph, find_dropout(net, X, graph)) == []
    graph.check()
    assert [node.name for node in graph.nodes if node.op != "TrainingDropout"] == before
    assert sum(node.op == "TrainingDropout" for node in graph.nodes) == 4
    row = graph.producer(graph.node("add").inputs[0])
    assert row is not None
    assert (row.cell_path, graph.producer(row.inputs[0]).cell_path) == ("two", "one")
    cell = to_cell(graph)
    cell.set_train(True)
    np.testing.assert_allclose((cell(X)[1].asnumpy() == 0).mean(), 0.25, atol=0.1)


def test_the_network_is_as_before() -> None:
    net = Block()
    graph = capture(net, X)
    net.set_train(True)
    before = {path: (type(cell), cell.training) for path, cell in net.cells_and_names()}
    names = [parameter.name for parameter in net.get_parameters()]
    find_dropout(net, X, graph)
    assert {path: (type(cell), cell.training) for path, cell in net.cells_and_names()} == before
    assert [parameter.name for parameter in net.get_parameters()] == names
    assert [node.name for node in capture(net, X).nodes] == [node.name for node in graph.nodes]


def test_places_of_another_form_are_given_back() -> None:
    net = Block()
    graph = capture(net, X)
    places = find_dropout(net, X, graph)
    other = capture(nn.Dense(8, 8), X)
    assert restore_dropout(other, places) == places
    assert [node.op for node in other.nodes] == ["Dense"]


class Swish(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.drop = nn.Dense(8, 8), nn.Dropout(p=0.5)

    def construct(self, x: Any) -> Any:
        x = self.dense(x)
        y = self.drop(x)
        return y * ops.sigmoid(y) + x


def test_a_place_before_a_function_that_is_spelt_out() -> None:
    net = Swish()
    graph = capture(net, X)
    places = find_dropout(net, X, graph)
    find_patterns(graph)
    assert restore_dropout(graph, places) == []
    graph.check()
    assert [node.op for node in graph.nodes] == ["Dense", "TrainingDropout", "SiLU", "Add"]
    assert graph.nodes[2].inputs == graph.nodes[1].outputs
    np.testing.assert_array_equal(to_cell(graph)(X).asnumpy(), net.set_train(False)(X).asnumpy())


class Tokens(nn.Cell):
    """Dropout between an embedding and a layer, and between two layers: reshapes around it are one without it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.drop = nn.Embedding(9, 4), nn.Dropout(p=0.5)
        self.dense, self.last, self.head = nn.Dense(4, 4), nn.Dropout(p=0.25), nn.Dense(4, 2)

    def construct(self, ids: Any) -> Any:
        return self.head(self.last(self.dense(self.drop(self.embedding(ids)))))


def test_dropout_between_layers_over_tokens() -> None:
    net, ids = Tokens(), ms.Tensor(np.zeros((2, 5), np.int32))
    graph = capture(net, ids)
    places = find_dropout(net, ids, graph)
    assert [(place.path, graph.producer(place.value).name) for place in places] == [  # type: ignore[union-attr]
        ("drop", "embedding"), ("last", "dense"),
    ]  # fmt: skip
    assert restore_dropout(graph, places) == []
    cell = to_cell(graph)
    np.testing.assert_array_equal(cell(ids).asnumpy(), net.set_train(False)(ids).asnumpy())
    cell.set_train(True)
    assert (cell(ids).asnumpy() != cell(ids).asnumpy()).any()


def test_a_graph_of_another_network_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"Dense: dropout cannot be put back: .* not the capture of this network"):
        find_dropout(Block(), X, capture(nn.Dense(8, 8), X))


def test_a_rate_nobody_knows_is_refused() -> None:
    class StochasticDepth(nn.Cell):
        def construct(self, x: Any) -> Any:
            return x

    net = nn.SequentialCell(nn.Dense(8, 8), StochasticDepth())
    with pytest.raises(CaptureError, match=r"Cell: '1' \(StochasticDepth\) drops at a rate that is not known"):
        find_dropout(net, X, capture(net, X))


def test_a_network_without_dropout_is_refused() -> None:
    net = nn.Dense(8, 8)
    with pytest.raises(CaptureError, match="Dense: dropout is asked for, and no cell of it drops anything"):
        find_dropout(net, X, capture(net, X))
