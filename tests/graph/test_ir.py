from __future__ import annotations

import numpy as np
import pytest

from msqkd.graph.ir import Graph, Node, TensorType, Value


@pytest.fixture
def graph() -> Graph:
    """y = relu(dense(x)); out = y + x."""
    graph = Graph("Net")
    graph.inputs = [graph.add_value(Value("x", "input", TensorType((-1, 4))))]
    graph.add_param("fc.weight", np.ones((4, 4), np.float32))
    for name in ("a", "y", "out"):
        graph.add_value(Value(name, "node", TensorType((-1, 4))))
    graph.nodes = [
        Node("fc", "Dense", ["x", "fc.weight"], ["a"], cell_path="fc"),
        Node("relu", "ReLU", ["a"], ["y"]),
        Node("add", "Add", ["y", "x"], ["out"]),
    ]
    graph.outputs = ["out"]
    return graph


def test_producers_and_consumers(graph: Graph) -> None:
    assert graph.producer("a") is graph.node("fc")
    assert graph.producer("x") is None
    assert [node.name for node in graph.consumers("x")] == ["fc", "add"]
    assert graph.tensor_inputs(graph.node("fc")) == ["x"]
    assert graph.param_inputs(graph.node("fc")) == ["fc.weight"]
    assert [value.name for value in graph.activations()] == ["x", "a", "y", "out"]
    with pytest.raises(KeyError):
        graph.node("fc2")


def test_lookups_follow_changes(graph: Graph) -> None:
    relu = graph.node("relu")
    graph.nodes.remove(relu)
    graph.replace_value("y", "a")
    assert graph.producer("y") is None
    assert graph.consumers("a") == [graph.node("add")]
    graph.node("fc").outputs = ["y"]
    assert graph.producer("y") is graph.node("fc")


def test_replace_value_reaches_the_outputs_unless_told_otherwise(graph: Graph) -> None:
    graph.replace_value("out", "y", outputs=False)
    assert graph.outputs == ["out"]
    graph.replace_value("out", "y")
    assert graph.outputs == ["y"]


def test_insert_after_keeps_the_order(graph: Graph) -> None:
    graph.insert_after(graph.node("fc"), [Node("one", "Neg", ["a"], ["b"]), Node("two", "Neg", ["b"], ["c"])])
    graph.insert_after(None, [Node("zero", "Neg", ["x"], ["d"])])
    assert [node.name for node in graph.nodes] == ["zero", "fc", "one", "two", "relu", "add"]


def test_prune_drops_what_nobody_reads(graph: Graph) -> None:
    graph.add_param("unused", np.zeros(1, np.float32))
    graph.outputs = ["a"]
    graph.prune()
    assert [node.name for node in graph.nodes] == ["fc"]
    assert set(graph.values) == {"x", "fc.weight", "a"}
    assert set(graph.params) == {"fc.weight"}


def test_an_input_nobody_reads_is_kept(graph: Graph) -> None:
    graph.inputs.append(graph.add_value(Value("mask", "input", TensorType((-1,)))))
    graph.prune()
    assert "mask" in graph.values


def test_a_copy_is_independent(graph: Graph) -> None:
    twin = graph.copy()
    twin.node("relu").inputs[0] = "x"
    twin.params["fc.weight"].data = np.zeros((4, 4), np.float32)
    twin.nodes.pop()
    assert graph.node("relu").inputs == ["a"]
    assert graph.params["fc.weight"].data.all()
    assert len(graph.nodes) == 3


def test_equal_looking_nodes_are_different_nodes(graph: Graph) -> None:
    one, two = (Node("n", "Neg", ["x"], ["b"]) for _ in range(2))
    graph.nodes += [one, two]
    graph.nodes.remove(two)
    assert graph.nodes[-1] is one


def test_check_finds_broken_graphs(graph: Graph) -> None:
    graph.check()
    graph.nodes.reverse()
    with pytest.raises(AssertionError, match="add reads \\['y'\\] before they are computed"):
        graph.check()
    graph.nodes.reverse()
    graph.node("relu").name = "fc"
    with pytest.raises(AssertionError, match="two nodes are called fc"):
        graph.check()


def test_unique_names(graph: Graph) -> None:
    assert graph.unique_value("z") == "z"
    assert graph.unique_value("x") == "x_1"
    assert graph.unique_node("relu") == "relu_1"
    assert graph.add_const(3, "x") == "x_1"
    assert graph.const("x_1") == 3
    assert graph.shape("x_1") == ()
    assert graph.shape(graph.add_const(np.zeros((2, 3)))) == (2, 3)


@pytest.mark.parametrize(
    ("inputs", "sequences", "arguments"),
    [
        ("abc", (), [0, 1, 2]),
        ("abc", ((0, 2),), [(0, 1), 2]),
        ("abcd", ((0, 1), (2, 2)), [(0,), 1, (2, 3)]),
        ("ab", ((1, 0),), [0, (), 1]),
        ("a", ((1, 0),), [0, ()]),
    ],
)
def test_arguments_of_a_node(inputs: str, sequences: tuple[tuple[int, int], ...], arguments: list[object]) -> None:
    assert Node("n", "Concat", list(inputs), ["y"], sequences=sequences).arguments() == arguments
