from __future__ import annotations

from dataclasses import replace
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from broken_layers import BATCH, Mixed, X, prepared, samples, with_range_cut, with_weight_bits

from msqkd.analysis.sensitivity import KL, SwitchedNetwork, layers_of, loss_kind, measured_sensitivity, output_loss
from msqkd.api import plan_network
from msqkd.graph.cell import to_cell
from msqkd.quant.config import Rule
from msqkd.quant.fake_quant import QUANTIZE
from msqkd.quant.ptq import calibrate, divergence, relative_error
from msqkd.quant.qat import deployment_graph, quantize_cell
from msqkd.train.metric import ACCURACY

pytestmark = pytest.mark.usefixtures("graph_mode")


@pytest.fixture(scope="module")
def network() -> SwitchedNetwork:
    return SwitchedNetwork(*prepared())


def outputs(network: SwitchedNetwork, x: np.ndarray = X[:BATCH]) -> np.ndarray:
    return network(ms.Tensor(x))[0][0].asnumpy()


def test_layers_own_their_weight_and_the_values_they_begin() -> None:
    graph, plan = prepared()
    found = {layer.name: (layer.op, layer.weights, len(layer.values)) for layer in layers_of(graph, plan)}
    inputs = graph.inputs[0]
    assert list(found)[:3] == [inputs, "stem", "left"]
    assert found["stem"] == ("Conv2D", ["stem"], 1)
    assert found[inputs] == ("input", [], 1)
    rounded = [name for name, quant in plan.activations.items() if not quant.exact]
    assert sum(count for _, _, count in found.values()) == len(rounded)
    assert {name for _, weights, _ in found.values() for name in weights} == set(plan.weights)


def test_with_all_layers_on_it_is_the_fake_quantised_network_and_with_none_the_float_one(
    network: SwitchedNetwork,
) -> None:
    graph, plan = prepared()
    x = ms.Tensor(X[:BATCH])
    cell = quantize_cell(graph, plan)
    cell.set_phase(QUANTIZE)
    network.turn(network.names)
    np.testing.assert_array_equal(outputs(network), cell(x).asnumpy())
    network.turn(())
    np.testing.assert_array_equal(outputs(network), to_cell(graph)(x).asnumpy())


def test_one_layer_on_is_a_network_with_that_weight_and_that_value_rounded(network: SwitchedNetwork) -> None:
    graph, plan = prepared()
    layer = next(layer for layer in network.layers if layer.name == "fc")
    network.turn({"fc"})
    found = outputs(network)
    network.turn(())
    alone = graph.copy()
    weight = graph.node("fc").inputs[1]
    held = graph.params[weight].data
    alone.params[weight].data = plan.weights["fc"].qparams(held).fake_quantize(held)
    exact = to_cell(alone)(ms.Tensor(X[:BATCH])).asnumpy()
    rounded = plan.group_of(layer.value).qparams().fake_quantize(exact)
    np.testing.assert_array_equal(found, rounded)
    assert np.array_equal(graph.params[weight].data, held)


@pytest.fixture(scope="module")
def measured(network: SwitchedNetwork) -> object:
    return measured_sensitivity(network, samples(), BATCH, ACCURACY, KL)


def test_each_layer_is_measured_alone_and_left_out(network: SwitchedNetwork, measured: object) -> None:
    graph, plan = prepared()
    assert [row.name for row in measured.layers] == network.names
    reference = to_cell(graph)(ms.Tensor(X)).asnumpy()
    cell = quantize_cell(graph, plan)
    cell.set_phase(QUANTIZE)
    assert measured.quantised_loss == pytest.approx(divergence(cell(ms.Tensor(X)).asnumpy(), reference), rel=1e-6)
    network.turn({"left"})
    only = np.concatenate([outputs(network, part) for part in (X[:BATCH], X[BATCH:])])
    network.turn(set(network.names) - {"left"})
    without = np.concatenate([outputs(network, part) for part in (X[:BATCH], X[BATCH:])])
    network.turn(())
    row = next(row for row in measured.layers if row.name == "left")
    assert row.only_loss == pytest.approx(divergence(only, reference), rel=1e-6)
    assert row.float_loss == pytest.approx(divergence(without, reference), rel=1e-6)
    assert row.only_metric == pytest.approx(ACCURACY((only,), samples().labels, ""))
    assert all(30 < row.sqnr_db < 70 and row.cosine > 0.999 for row in measured.layers)


def test_the_error_of_a_layer_is_its_own(network: SwitchedNetwork, measured: object) -> None:
    """The same numbers by numpy: the value with the float network before it, its weight and itself rounded."""
    _, plan = prepared()
    row, layer = next((r, w) for r, w in zip(measured.layers, network.layers) if r.name == network.layers[0].name)
    rounded = plan.group_of(layer.value).qparams().fake_quantize(X)
    noise = np.square(X.astype(np.float64) - rounded).sum()
    assert row.sqnr_db == pytest.approx(10 * np.log10(np.square(X.astype(np.float64)).sum() / noise), abs=1e-3)
    cosine = (X * rounded).sum(dtype=np.float64) / np.linalg.norm(X) / np.linalg.norm(rounded)
    assert row.cosine == pytest.approx(cosine, abs=1e-6)


def test_a_layer_that_is_broken_comes_first() -> None:
    graph, plan = prepared()
    ranked = measured_sensitivity(
        SwitchedNetwork(graph, with_weight_bits(plan, "left", 2)), samples(), BATCH, ACCURACY, KL
    ).ranked()
    assert ranked[0].name == "left"
    assert ranked[0].sqnr_db < 15 < ranked[1].sqnr_db
    stem = next(layer.value for layer in layers_of(graph, plan) if layer.name == "stem")
    cut = with_range_cut(plan, stem, 0.1)
    ranked = measured_sensitivity(SwitchedNetwork(graph, cut), samples(), BATCH, ACCURACY, KL).ranked()
    assert ranked[0].name == "stem"


def test_a_corrected_bias_and_a_rounded_weight_belong_to_the_quantised_layer() -> None:
    """Where a method has changed the parameters, a layer that is float has those from before."""
    base, plan = prepared()
    changed = base.copy()
    name, bias = (base.node("left").inputs[i] for i in (1, 2))
    changed.params[name].data = changed.params[name].data * np.float32(1.1)
    changed.params[bias].data = changed.params[bias].data + np.float32(0.5)
    network = SwitchedNetwork(changed, plan, base)
    x = ms.Tensor(X[:BATCH])
    np.testing.assert_array_equal(outputs(network), to_cell(base)(x).asnumpy())
    network.turn(network.names)
    cell = quantize_cell(changed, plan)
    cell.set_phase(QUANTIZE)
    np.testing.assert_array_equal(outputs(network), cell(x).asnumpy())
    network.turn(())
    np.testing.assert_array_equal(outputs(network), to_cell(base)(x).asnumpy())


def test_networks_that_are_no_classifiers_are_judged_by_their_relative_error() -> None:
    graph, _ = prepared()
    assert loss_kind(graph, ACCURACY) == "kl"
    assert loss_kind(graph, replace(ACCURACY, function=lambda a, b: 0.0)) == "relative error"
    one, other = np.eye(3), np.ones((3, 3))
    assert output_loss((one,), (other,), "relative error") == relative_error((one,), (other,))
    assert output_loss((one,), (other,), "kl") == divergence(one, other)


CASES = {
    "lite_arm": ({}, ()),
    "ascend": ({"target": "ascend"}, ()),
    "stored": (
        {},
        (Rule("path", "tokens", {"precision": "dynamic"}), Rule("path", "fc", {"precision": "weight-only"})),
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_whatever_is_quantised_is_switched(case: str) -> None:
    options, rules = CASES[case]
    ms.set_seed(7)
    captured, plan = plan_network(Mixed(), (2, 6, 6), rules=rules, **options)
    graph = deployment_graph(captured)
    network = SwitchedNetwork(graph, calibrate(graph, plan, [X]))
    rounded = [name for name, quant in plan.activations.items() if not quant.exact]
    assert sum(len(layer.values) for layer in network.layers) == len(rounded)
    assert {name for layer in network.layers for name in layer.dynamic} == set(plan.dynamic)
    cell = quantize_cell(graph, network.plan)
    cell.set_phase(QUANTIZE)
    x = ms.Tensor(X[:BATCH])
    for names, wanted in ((network.names, cell), ((), to_cell(graph))):
        network.turn(names)
        for found, exact in zip(network(x)[0], wanted(x)):
            np.testing.assert_array_equal(found.asnumpy(), exact.asnumpy())
    found = measured_sensitivity(
        network, samples(), BATCH, replace(ACCURACY, function=mean), loss_kind(graph, ACCURACY)
    )
    assert found.loss == "relative error"
    assert all(row.only_loss > 0 and row.sqnr_db > 20 for row in found.layers)


def mean(outputs: Any, labels: np.ndarray) -> float:
    return float(outputs[0].mean())
