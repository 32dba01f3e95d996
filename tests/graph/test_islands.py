from __future__ import annotations

import gc
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from msqkd.graph import islands
from msqkd.graph.capture import capture
from msqkd.graph.ir import Graph
from msqkd.graph.islands import cut, is_tensor, run_island

pytestmark = pytest.mark.usefixtures("graph_mode")


class Branches(nn.Cell):
    """A sum of two halves, sizes asked of the input, a layer norm with outputs nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Dense(6, 6), nn.LayerNorm((6,))

    def construct(self, x):  # type: ignore[no-untyped-def]
        y = self.norm(self.fc(x))
        left, right = ops.split(y, 3, 1)
        return (left + right) * x.shape[0], y


X = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def graph() -> Graph:
    ms.set_context(mode=ms.GRAPH_MODE)
    return capture(Branches(), (6,))


def whole(graph: Graph) -> list[np.ndarray]:
    return run_island(graph, [X])


def test_an_island_a_node_gives_the_whole(graph: Graph) -> None:
    values: dict[str, np.ndarray] = {graph.inputs[0]: X}
    for node in graph.nodes:
        if not is_tensor(graph, node.output):
            continue
        island = cut(graph, [node])
        assert all(is_tensor(graph, name) for name in (*island.inputs, *island.outputs))
        values.update(zip(island.outputs, run_island(island, [values[name] for name in island.inputs])))
    for name, expected in zip(graph.outputs, whole(graph)):
        np.testing.assert_array_equal(values[name], expected)


def test_numbers_are_computed_where_they_are_read(graph: Graph) -> None:
    scaled = graph.producer(graph.outputs[0])
    assert scaled is not None
    assert any(not is_tensor(graph, name) for name in scaled.inputs if graph.values[name].kind == "node")
    island = cut(graph, [scaled])
    assert graph.inputs[0] in island.inputs, "the size is that of the network's input"
    assert {node.op for node in island.nodes} == {"Shape", scaled.op}


def test_outputs_are_what_others_read(graph: Graph) -> None:
    norm, split = graph.node("norm"), next(node for node in graph.nodes if node.op == "Split")
    assert len(norm.outputs) > 1
    assert cut(graph, [norm]).outputs == [norm.output], "its statistics are read by nobody"
    together = cut(graph, [split, norm])
    assert together.outputs == [norm.output, *split.outputs], "in the order of computation, network outputs too"
    assert together.inputs == [graph.node("fc").output]
    assert set(together.params) == {"norm.gamma", "norm.beta"}


def test_all_nodes_are_the_network(graph: Graph) -> None:
    island = cut(graph, graph.nodes)
    assert (island.inputs, sorted(island.outputs)) == (graph.inputs, sorted(graph.outputs))
    found = dict(zip(island.outputs, run_island(island, [X])))
    for name, expected in zip(graph.outputs, whole(graph)):
        np.testing.assert_array_equal(found[name], expected)


def test_the_cell_is_built_once_and_goes_with_its_graph(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []
    original = islands.to_cell
    monkeypatch.setattr(islands, "to_cell", lambda *args, **options: built.append(1) or original(*args, **options))
    island = cut(graph, [graph.node("fc")])
    before = len(islands._CELLS)
    for _ in range(3):
        run_island(island, [X])
    assert (len(built), len(islands._CELLS)) == (1, before + 1)
    del island
    gc.collect()
    assert len(islands._CELLS) <= before
