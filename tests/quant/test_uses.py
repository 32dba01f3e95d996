"""What operations do, as far as their int8 form depends on it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msqkd.graph.ir import Graph, Node, TensorType, Value
from msqkd.integer.program import Program, Step, Tensor, TensorQuant
from msqkd.integer.simulator import Simulator
from msqkd.quant.plan import Group, QuantPlan
from msqkd.quant.uses import paddings, rescale_factor, slice_entries


def graph_of(op: str, *literals: object, attrs: dict | None = None, shape: tuple[int, ...] = (-1, 4, 6)) -> Graph:
    """One node that reads x and literals."""
    graph = Graph("one")
    graph.inputs = [graph.add_value(Value("x", "input", TensorType(shape)))]
    graph.add_value(Value("y", "node", TensorType(shape)))
    graph.nodes = [Node("node", op, ["x", *(graph.add_const(value) for value in literals)], ["y"], attrs or {})]
    graph.outputs = ["y"]
    return graph


def factor(op: str, number: object, first: bool = False) -> float | None:
    graph = graph_of(op, number)
    if first:
        graph.nodes[0].inputs.reverse()
    return rescale_factor(graph, graph.nodes[0])


def test_products_and_quotients_with_a_positive_number_rescale() -> None:
    assert factor("Mul", np.array(0.25, np.float32)) == 0.25
    assert factor("Muls", 3) == 3.0
    assert factor("Mul", np.array(0.5, np.float32), first=True) == 0.5
    assert factor("Div", np.array(8.0, np.float32)) == 0.125
    assert factor("Divs", 4.0) == 0.25


@pytest.mark.parametrize("number", [-1.0, 0.0, np.ones((4, 1), np.float32), float("inf"), None, "text"])
def test_other_operands_do_not(number: object) -> None:
    assert factor("Mul", number) is None


def test_a_number_over_a_value_does_not_rescale() -> None:
    assert factor("Div", np.array(8.0, np.float32), first=True) is None
    assert factor("Div", 0.0) is None


@settings(deadline=None, max_examples=60)
@given(
    low=st.floats(-1e3, 0.0, width=32), high=st.floats(0.0, 1e3, width=32), times=st.floats(2.0**-12, 2.0**12),
)  # fmt: skip
def test_the_runtime_leaves_the_integers_of_a_rescaled_value_alone(low: float, high: float, times: float) -> None:
    source = Group("x", 8, False, "minmax", 100.0, 0, "default")
    follower = Group("y", 8, False, "minmax", 100.0, 0, "default", source="x", factor=times)
    plan = QuantPlan("lite_arm", "net", groups={"x": source, "y": follower}).with_ranges({"x": (low, high)})
    quants = []
    for name in ("x", "y"):
        found = plan.groups[name].qparams()
        quants.append(TensorQuant(found.scale, found.zero_point))
    program = Program("one", ["x"], ["y"])
    program.add(Tensor("x", "int8", (1, 256), quant=quants[0]))
    number = TensorQuant(np.array([times]), np.array([0]))
    program.add(Tensor("c", "int8", (1,), np.ones(1, np.int8), number))
    program.add(Tensor("y", "int8", (1, 256), quant=quants[1]))
    program.steps.append(Step("step", "MulFusion", ["x", "c"], ["y"], {}, True))
    every = np.arange(-128, 128, dtype=np.int8)[None]
    assert np.array_equal(Simulator(program).run(every)[0], every)


@pytest.mark.parametrize(
    ("op", "literals", "attrs", "found"),
    [
        ("Pad", (), {"paddings": ((0, 0), (1, 2), (0, 3))}, [(0, 0), (1, 2), (0, 3)]),
        ("Pad", (), {"paddings": ((0, 0), (0, 0), (-1, 0))}, None),
        ("PadV3", ((0, 3, 1, 2), np.array(0.0)), {"mode": "constant"}, [(0, 0), (1, 2), (0, 3)]),
        ("PadV3", ((0, 3), np.array(1.0)), {"mode": "constant"}, None),
        ("PadV3", ((0, 3),), {"mode": "reflect"}, None),
        ("PadV3", (np.array([2, 0]), np.array(0.0)), {"mode": "constant"}, [(0, 0), (0, 0), (2, 0)]),
    ],
)
def test_paddings_by_axis(op: str, literals: tuple, attrs: dict, found: list | None) -> None:
    graph = graph_of(op, *literals, attrs=attrs)
    assert paddings(graph, graph.nodes[0]) == found


@pytest.mark.parametrize(
    ("literals", "found"),
    [
        (((0, 1), (0, 2), (1, 1), 1, 1, 0, 0, 2), [(None, None, 1, False), (1, 2, 1, True)]),
        (((0, -3), (0, 6), (1, 2), 0, 1, 0, 0, 0), [(0, None, 1, False), (-3, 6, 2, False)]),
        (((0, 3), (0, 0), (1, -1), 1, 3, 0, 0, 0), None),
        (((0,), (1,), (1,), 0, 0, 1, 0, 0), None),
        (((0,), (1,), (1,), 0, 0, 0, 1, 0), None),
    ],
)
def test_slices_by_axis(literals: tuple, found: list | None) -> None:
    graph = graph_of("StridedSlice", *literals)
    assert slice_entries(graph, graph.nodes[0]) == found
