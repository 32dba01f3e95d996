"""What rounding does to a weight or a value by itself, and the histograms a report keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from broken_layers import BATCH, X, prepared, with_weight_bits

from msqkd.analysis.distributions import PERCENTILE, SHOWN, add_outliers, distributions, own_sqnr
from msqkd.analysis.layers import layer_table
from msqkd.analysis.statistics import Distribution, weight_statistics
from msqkd.graph.ir import Graph
from msqkd.quant.plan import QuantPlan

pytestmark = pytest.mark.usefixtures("graph_mode")


def decibel(exact: np.ndarray, rounded: np.ndarray) -> float:
    exact, rounded = exact.astype(np.float64), rounded.astype(np.float64)
    return float(10 * np.log10((exact**2).sum() / ((exact - rounded) ** 2).sum()))


def narrow() -> tuple[Graph, QuantPlan]:
    """A weight of 2 bits, and an input range that clips."""
    graph, plan = prepared()
    plan = with_weight_bits(plan, "left", 2)
    name = graph.inputs[0]
    group = plan.groups[name]
    return graph, replace(plan, groups={**plan.groups, name: replace(group, range=(-1.0, 1.0))})


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    graph, plan = narrow()
    values: dict[str, Distribution] = {}
    layers = layer_table(graph, plan, graph, [X[:BATCH], X[BATCH:]], values)
    weights = weight_statistics(graph, plan)
    add_outliers(layers, values, weights)
    return {"layers": layers, "values": values, "weights": weights, "graph": graph, "plan": plan}


def test_a_weight_and_an_input_lose_by_themselves_what_numpy_says(found: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in found["layers"]}
    data = found["graph"].params[found["graph"].node("left").inputs[1]].data
    scale = np.abs(data).max((1, 2, 3), keepdims=True)  # 2 bits hold -1, 0, 1
    rounded = np.clip(np.rint(data / scale), -1, 1) * scale
    weight = rows["left"]["weight"]
    assert weight["sqnr_db"] == pytest.approx(decibel(data, rounded), abs=1e-3)
    assert weight["count"] == data.size
    assert weight["sqnr_db"] < 12 < rows["right"]["weight"]["sqnr_db"]
    name = found["graph"].inputs[0]
    activation = rows[name]["activation"]
    low, high, step = activation["lo"], activation["hi"], activation["scale"]
    kept = np.clip(np.rint(X / step) * step, low, high)
    assert activation["sqnr_db"] == pytest.approx(decibel(X, kept), abs=1e-2)
    beyond = np.abs(X - np.clip(X, low, high)) > step / 2
    assert activation["outside"] == pytest.approx(beyond.mean(), abs=1e-3)
    assert activation["outside"] > 0.3
    usual = np.percentile(np.abs(X), PERCENTILE, method="higher")
    assert activation["max_over_percentile"] == pytest.approx(np.abs(X).max() / usual, rel=0.02)
    assert rows["fc"]["activation"]["outside"] == 0


def test_a_weight_that_a_method_rounded_is_held_against_what_it_was() -> None:
    graph, plan = prepared()
    plan = with_weight_bits(plan, "left", 2)
    rounded = graph.copy()
    data = plan.weights["left"].held_in(graph)
    plan.weights["left"] = replace(plan.weights["left"], scale=np.abs(data).max((1, 2, 3)).tolist())
    held = plan.weights["left"].qparams(data).fake_quantize(data)
    rounded.params[graph.node("left").inputs[1]].data = held
    row = next(row for row in layer_table(rounded, plan, graph, [X[:BATCH]]) if row["name"] == "left")
    assert row["weight"]["sqnr_db"] == pytest.approx(decibel(data, held), abs=1e-6)


def test_histograms_are_whole_and_know_what_is_representable(found: dict[str, Any]) -> None:
    kept = distributions(found["layers"], found["values"], found["weights"])
    assert 2 <= len(kept) <= SHOWN
    name = found["graph"].inputs[0]
    first = next(item for item in kept if item["layer"] == name)
    histogram = first["activation"]["histogram"]
    assert first["weight"] is None
    assert sum(histogram["counts"]) == X.size == first["activation"]["count"]
    assert (histogram["lo"], histogram["hi"]) == (float(X.min()), float(X.max()))
    assert first["activation"]["span"] == pytest.approx([-1.0, 1.0], abs=0.02)
    left = next(item for item in kept if item["layer"] == "left")
    data = found["graph"].params[found["graph"].node("left").inputs[1]].data
    assert left["weight"]["span"] == pytest.approx([-np.abs(data).max(), np.abs(data).max()], rel=1e-6)


def test_the_layers_that_lose_most_are_kept_in_the_order_of_the_network() -> None:
    def row(name: str, built_up: float, own: float) -> dict[str, Any]:
        activation = {"lo": 0.0, "hi": 1.0, "sqnr_db": own}
        return {"name": name, "op": "Conv2D", "value": name, "sqnr_db": built_up, "weight": None,
                "activation": activation}  # fmt: skip

    layers = [row(f"l{i}", 50.0 - i, 30.0 + i) for i in range(9)]
    seen = Distribution()
    seen.update(np.arange(8, dtype=np.float32))
    kept = distributions(layers, {f"l{i}": seen for i in range(9)}, {})
    assert [item["layer"] for item in kept] == ["l0", "l1", "l2", "l3", "l4", "l8"]  # l8: most noise built up
    assert own_sqnr({"weight": {"sqnr_db": 9.0}, "activation": {"sqnr_db": None}}) == 9.0
    assert own_sqnr({"weight": None}) is None
