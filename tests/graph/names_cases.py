"""The names of a network's operations say where they are in it, whatever was compiled before."""

from __future__ import annotations

import itertools
from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from msqkd.graph.capture import capture
from msqkd.quant.qat import deployment_graph

SHAPE = (4, 6, 6)


class Part(nn.Cell):
    """A layer, a cell without parameters and two functions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(4, 4, 3), nn.ReLU()

    def construct(self, x):  # type: ignore[no-untyped-def]
        return ops.abs(self.relu(self.conv(x)) + x)


class Holder(nn.Cell):
    def __init__(self, operation: nn.Cell) -> None:
        super().__init__()
        self.first, self.operation = nn.Conv2d(4, 4, 3), operation

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.operation(self.first(x))


class Other(nn.Cell):
    """Has `first` too, and calls what it holds otherwise."""

    def __init__(self, inner: nn.Cell) -> None:
        super().__init__()
        self.inner, self.first = inner, nn.Conv2d(4, 4, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.first(self.inner(x))


def names(net: nn.Cell, example: Any = SHAPE) -> list[tuple[str, tuple[str, ...]]]:
    return [(node.name, node.cell_types) for node in capture(net, example).nodes]


def sequence() -> nn.SequentialCell:
    return nn.SequentialCell(nn.ReLU(), Part(), nn.SequentialCell(Part()))


OWNERS: dict[str, Callable[[nn.Cell], nn.Cell]] = {
    "alone": lambda cell: cell,
    "holder": Holder,
    "other": Other,
    "deeper": lambda cell: Holder(nn.SequentialCell(cell)),
}


def test_names_do_not_depend_on_what_was_compiled_before() -> None:
    """One cell in several networks: MindSpore keeps the scope it had in the first."""
    expected = {name: names(own(sequence())) for name, own in OWNERS.items()}
    for order in (*itertools.permutations(list(OWNERS), 2), tuple(reversed(OWNERS))):
        shared = sequence()
        for name in order:
            assert names(OWNERS[name](shared)) == expected[name], f"{name} in the order {order}"


def test_blocks_of_one_class_at_different_depths() -> None:
    found = [name for name, _ in names(sequence())]
    assert found == [
        "0",
        *(f"1.{name}" for name in ("conv", "relu", "add", "abs")),
        *(f"2.0.{name}" for name in ("conv", "relu", "add", "abs")),
    ]
    types = dict(names(sequence()))
    assert types["2.0.abs"] == ("SequentialCell", "SequentialCell", "Part")


def test_arguments_by_name_change_no_name() -> None:
    net = Holder(sequence())
    assert names(net, {"x": ms.Tensor(np.zeros((1, *SHAPE), np.float32))}) == names(net)


@pytest.mark.parametrize("outer", [Holder, nn.SequentialCell])
def test_a_network_that_was_trained_inside_another_cell(outer: Callable[..., nn.Cell]) -> None:
    net = outer(Part())
    expected = names(outer(Part()))
    step = nn.TrainOneStepCell(nn.WithLossCell(net, nn.MSELoss()), nn.SGD(net.trainable_params()))
    ms.set_context(mode=ms.GRAPH_MODE)
    x = ms.Tensor(np.zeros((2, *SHAPE), np.float32))
    step(x, x)
    assert names(net) == expected


def test_the_scopes_of_the_network_are_its_own_again() -> None:
    shared = sequence()
    names(Holder(shared))
    before = {path: cell.get_scope() for path, cell in shared.cells_and_names()}
    names(Other(shared))
    assert {path: cell.get_scope() for path, cell in shared.cells_and_names()} == before
    assert "generate_scope" not in vars(shared)


class Gated(nn.Cell):
    """Activation cells of a class that is spelt out, one in front of a layer in a sequence, one behind another."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.act1 = nn.Dense(width, width), nn.GELU(approximate=False)
        self.fc2, self.act2 = nn.Dense(width, width), nn.GELU(approximate=False)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.act2(self.fc2(self.act1(self.fc1(x))))


def deployed(net: nn.Cell) -> list[str]:
    nodes = deployment_graph(capture(net, (4,))).nodes
    assert all(".".join(node.name.split(".")[: len(node.cell_path.split("."))]) == node.cell_path for node in nodes)
    return [node.name for node in nodes]


def test_activation_cells_without_parameters_lie_where_they_are_called() -> None:
    blocks = nn.SequentialCell(Gated(4), Gated(4), nn.Dense(4, 4), nn.GELU(approximate=False))
    layers = ("fc1", "act1", "fc2", "act2")
    assert deployed(blocks) == [f"{block}.{name}" for block in "01" for name in layers] + ["2", "3"]
    plain = nn.SequentialCell(*(cell for _ in range(3) for cell in (nn.Dense(4, 4), nn.LeakyReLU(0.1))))
    assert deployed(plain) == list("012345")


def test_activation_cells_in_front_of_their_layer() -> None:
    first = [nn.SequentialCell(nn.GELU(approximate=False), nn.Dense(4, 4)) for _ in range(3)]
    assert deployed(nn.SequentialCell(*first)) == [f"{block}.{index}" for block in range(3) for index in range(2)]
