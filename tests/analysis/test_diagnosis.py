from __future__ import annotations

from dataclasses import replace
from typing import Any, Callable, Optional

import mindspore as ms
import numpy as np
import pytest
import yaml
from broken_layers import BATCH, Mixed, X, prepared, samples, with_range_cut, with_spread_channels, with_weight_bits

from msqkd.analysis import diagnosis
from msqkd.analysis.diagnosis import Diagnosis, diagnose, with_fragment
from msqkd.analysis.fragments import rule_of
from msqkd.analysis.sensitivity import KL, Probe, SwitchedNetwork, layers_of, measured_sensitivity
from msqkd.analysis.statistics import value_statistics, weight_statistics
from msqkd.api import plan_network
from msqkd.graph.ir import Graph, Node
from msqkd.pipeline.build import quant_settings
from msqkd.quant.algorithms.base import Work
from msqkd.quant.algorithms.split import Split
from msqkd.quant.config import FLOAT, QuantConfig, Rule
from msqkd.quant.placement import make_plan
from msqkd.quant.plan import QuantPlan
from msqkd.quant.ptq import calibrate
from msqkd.quant.qat import deployment_graph
from msqkd.quant.rules import RuleBook
from msqkd.recipe import Recipe, make_recipe
from msqkd.train.metric import ACCURACY

pytestmark = pytest.mark.usefixtures("graph_mode")

RECIPE = {
    "apiversion": "msqkd/v1",
    "name": "broken",
    "model": {"source": "python", "target": "nets.py:Net", "input_shape": [2, 6, 6], "checkpoint": "net.ckpt"},
    "data": {"name": "arrays", "root": "data.npz"},
    "calibration": {"observer": "percentile", "percentile": 99.9},
    "quantization": {
        "weight": {"per_channel": True},
        "rules": [{"match": {"op": "Conv2D"}, "weight": {"observer": "minmax"}}],
    },
}


def examined(graph: Graph, plan: QuantPlan, equalised: Optional[Callable[[], Graph]] = None) -> list[Diagnosis]:
    network = SwitchedNetwork(graph, plan)
    found = measured_sensitivity(network, samples(), BATCH, ACCURACY, KL)
    values = value_statistics(lambda *x: network(*x)[1], network.values, [X])
    probe = Probe(network, samples(), BATCH, KL)
    return diagnose(graph, probe, found, values, weight_statistics(graph, network.plan), equalised)


def recipe_of(found: Diagnosis, number: int = 0) -> Recipe:
    """The recipe with one of the remedies, which a recipe must accept."""
    return make_recipe(with_fragment(RECIPE, yaml.safe_load(found.remedies[number].yaml)))


def decibel(exact: np.ndarray, rounded: np.ndarray) -> float:
    exact = exact.astype(np.float64)
    return float(10 * np.log10(np.square(exact).sum() / np.square(exact - rounded).sum()))


def weight_sqnr(graph: Graph, plan: QuantPlan, node: str) -> float:
    array = graph.params[graph.node(node).inputs[1]].data
    return decibel(array, plan.weights[node].qparams(array).fake_quantize(array))


def planned(graph: Graph, recipe: Recipe) -> QuantPlan:
    """The plan by a recipe, calibrated by it."""
    default, rules = quant_settings(recipe)
    section = recipe.calibration
    plan = make_plan(graph, default, rules, recipe.target)
    return calibrate(graph, plan, [X], observer=section.observer, percentile=section.percentile or 99.99)


def test_two_bit_weights_are_named_and_more_bits_are_what_helps() -> None:
    graph, plan = prepared()
    broken = with_weight_bits(plan, "left", 2)
    first = examined(graph, broken)[0]
    assert (first.layer, first.rank) == ("left", 1)
    assert any("2 bits" in cause for cause in first.causes)
    best = first.remedies[0]
    assert best.fragment["quantization"]["rules"][0]["weight"] == {"bits": 8}
    fixed = planned(graph, recipe_of(first))
    gained = weight_sqnr(graph, fixed, "left") - weight_sqnr(graph, broken, "left")
    assert best.gain_db == pytest.approx(gained, abs=0.5)
    assert f"{best.gain_db:.1f} dB" in best.text


def test_a_range_that_is_too_narrow_is_named_and_calibration_widens_it() -> None:
    graph, plan = prepared()
    stem = next(layer.value for layer in layers_of(graph, plan) if layer.name == "stem")
    first = examined(graph, with_range_cut(plan, stem, 0.1))[0]
    assert first.layer == "stem"
    assert "outside its range" in first.causes[0]
    assert first.remedies[0].gain_db > 10
    recipe = recipe_of(first)
    assert recipe.calibration.observer in ("minmax", "mse", "percentile")
    assert planned(graph, recipe).groups[stem].range[1] > 0.7 * plan.groups[stem].range[1]


def test_channels_of_unlike_weights_want_a_scale_each() -> None:
    _, plan = prepared(per_channel=False)
    graph = with_spread_channels(30)
    broken = with_weight_bits(calibrate(graph, plan, [X]), "left", 4)
    first = examined(graph, broken, lambda: prepared(per_channel=False)[0])[0]
    assert first.layer == "left"
    assert any("differ by" in cause for cause in first.causes)
    number = next(i for i, remedy in enumerate(first.remedies) if "per channel" in remedy.text)
    assert 0 < first.remedies[number].loss < 0.5 * float(first.harm.split(" of ")[1].split(",")[0])
    per_tensor = with_fragment(RECIPE, {"quantization": {"weight": {"per_channel": False}}})
    recipe = make_recipe(with_fragment(per_tensor, first.remedies[number].fragment))
    assert recipe.quantization.rules[-1].weight.per_channel is True
    fixed = planned(graph, recipe)
    assert [name for name, quant in fixed.weights.items() if quant.axis == 0] == ["left"]
    gained = weight_sqnr(graph, with_weight_bits(fixed, "left", 4), "left") - weight_sqnr(graph, broken, "left")
    assert first.remedies[number].gain_db == pytest.approx(gained, abs=0.1)
    evened = next(remedy for remedy in first.remedies if "equalisation" in remedy.text)
    assert evened.fragment == {"ptq": {"methods": ["equalize"]}}
    before = {"ptq": {"methods": ["adaround"]}}
    assert make_recipe(with_fragment({**RECIPE, **before}, evened.fragment)).ptq.methods == ["equalize", "adaround"]
    # As in the network whose channels nobody has spread, with the same weight in 4 bits and all else float.
    even = prepared(per_channel=False)[0]
    network = SwitchedNetwork(even, with_weight_bits(calibrate(even, plan, [X]), "left", 4))
    name = even.node("left").inputs[1]
    rounded = with_weight_bits(plan, "left", 4).weights["left"].qparams(even.params[name].data)
    own = Probe(network, samples(), BATCH, KL).loss(
        {"left"}, weights={"left": rounded.fake_quantize(even.params[name].data)}
    )
    assert evened.loss == pytest.approx(own, rel=0.5)


def test_few_large_weights_want_their_channels_split() -> None:
    graph, plan = prepared(per_channel=False)
    graph = graph.copy()
    name = graph.node("right").inputs[1]
    weight = graph.params[name].data.copy()
    weight[2, 5, 1, 1] = 8 * np.abs(weight).max()
    graph.params[name].data = weight
    broken = with_weight_bits(calibrate(graph, plan, [X]), "right", 5)
    first = examined(graph, broken, lambda: graph)[0]
    assert first.layer == "right"
    cure = next(remedy for remedy in first.remedies if "splitting" in remedy.text)
    assert cure.fragment == {"ptq": {"methods": ["split"], "split": {"ratio": 0.02}}}
    before = {"ptq": {"methods": ["equalize", "bias_correction"]}}
    methods = make_recipe(with_fragment({**RECIPE, **before}, cure.fragment)).ptq.methods
    assert methods == ["equalize", "split", "bias_correction"]
    # As in the network that is split.
    work = Work(graph.copy(), broken, lambda: iter([(X,)]))
    Split(ratio=0.02).apply(work)
    found = measured_sensitivity(SwitchedNetwork(work.graph, broken), samples(), BATCH, ACCURACY, KL)
    assert cure.loss == pytest.approx(next(row.only_loss for row in found.layers if row.name == "right"), rel=0.05)
    assert not any("splitting" in remedy.text for remedy in examined(graph, broken)[0].remedies)


def test_outliers_in_a_channel_are_counted_and_calibration_leaves_them_out() -> None:
    graph, plan = prepared()
    graph = graph.copy()
    # One channel of the stem's output is far wider than the others, in few places, and nobody listens to it.
    weight, bias = graph.node("stem").inputs[1:3]
    rows = graph.params[weight].data.copy()
    rows[3] = 0
    rows[3, 0, 0, 0] = 600.0
    graph.params[weight].data = rows
    graph.params[bias].data = graph.params[bias].data.copy()
    graph.params[bias].data[3] = -600 * (X[:, 0, :5, :5].max() - 0.3)
    for reader in ("left", "fc"):
        name = graph.node(reader).inputs[1]
        graph.params[name].data = graph.params[name].data.copy()
        graph.params[name].data[:, 3] = 0
    plan = calibrate(graph, plan, [X])
    stem = next(layer.value for layer in layers_of(graph, plan) if layer.name == "stem")
    found = {item.layer: item for item in examined(graph, plan)}
    assert "stem" in found
    assert any("outliers in 1 of 8 channels (3)" in cause for cause in found["stem"].causes), found["stem"].causes
    remedy = found["stem"].remedies[0]
    assert remedy.fragment["calibration"]["observer"] in ("percentile", "mse")
    spans = planned(graph, recipe_of(found["stem"])).groups[stem]
    assert spans.range[1] < 0.5 * plan.groups[stem].range[1]


@pytest.mark.parametrize("bits", [4])
def test_narrow_activations_want_more_bits(bits: int) -> None:
    graph, plan = prepared()
    stem = next(layer.value for layer in layers_of(graph, plan) if layer.name == "stem")
    groups = {**plan.groups, stem: replace(plan.groups[stem], bits=bits)}
    first = examined(graph, replace(plan, groups=groups))[0]
    assert first.layer == "stem"
    wanted: Optional[Any] = None
    for number, remedy in enumerate(first.remedies):
        if "rules" in remedy.fragment.get("quantization", {}) and remedy.gain_db:
            wanted = recipe_of(first, number).quantization.rules[-1]
    assert wanted.activation.bits == 8
    assert wanted.match.path == "stem"


def test_every_fragment_fits_a_recipe_and_float_comes_last_with_what_it_saves() -> None:
    graph, plan = prepared()
    found = examined(graph, with_weight_bits(plan, "fc", 2))
    assert found[0].layer == "fc"
    for item in found:
        for number in range(len(item.remedies)):
            recipe_of(item, number)
        assert yaml.safe_load(yaml.safe_dump(item.to_dict()))["layer"] == item.layer
    last = found[0].remedies[-1]
    assert last.fragment == {"quantization": {"rules": [{"match": {"path": "fc"}, "precision": "float"}]}}
    rules = quant_settings(recipe_of(found[0], -1))[1]
    assert make_plan(graph, None, rules).node("fc").precision == "float"


def test_a_fragment_comes_after_the_rules_there_are_and_changes_no_recipe_in_place() -> None:
    fragment = {"quantization": {"rules": [{"match": {"path": "fc"}, "precision": "float"}]}, "seed": 3}
    before = yaml.safe_dump(RECIPE)
    found = with_fragment(RECIPE, fragment)
    assert [rule["match"] for rule in found["quantization"]["rules"]] == [{"op": "Conv2D"}, {"path": "fc"}]
    assert found["seed"] == 3
    assert yaml.safe_dump(RECIPE) == before


def test_a_name_with_wildcards_is_matched_as_it_is() -> None:
    node = Node("blocks[0]/Add*", "Add", [], [])
    rule = rule_of(node.name, precision="float")["quantization"]["rules"][0]
    graph = Graph("Net")
    graph.nodes = [node, Node("blocks0/Add2", "Add", [], [])]
    made = Rule("path", rule["match"]["path"], FLOAT)
    assert RuleBook(graph, QuantConfig(), [made]).matched(made) == ["blocks[0]/Add*"]


@pytest.mark.parametrize("target", ["lite_arm", "ascend"])
def test_a_rule_reaches_the_layer_whose_settings_a_value_has(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("HARM", 0.0), ("NEGLIGIBLE", {"relative error": 0.0}), ("MOST", 99)):
        monkeypatch.setattr(diagnosis, name, value)
    ms.set_seed(7)
    config = QuantConfig(act_quant_dtype="int4")
    captured, plan = plan_network(Mixed(), (2, 6, 6), config, target=target)
    graph = deployment_graph(captured)
    network = SwitchedNetwork(graph, calibrate(graph, plan, [X], observer="minmax"))
    metric = replace(ACCURACY, function=lambda outputs, labels: 0.0)
    kind = "relative error"
    found = measured_sensitivity(network, samples(), BATCH, metric, kind)
    values = value_statistics(lambda *x: network(*x)[1], network.values, [X])
    probe = Probe(network, samples(), BATCH, kind)
    offered = 0
    layers = {layer.name: layer for layer in network.layers}
    for item in diagnose(graph, probe, found, values, weight_statistics(graph, network.plan)):
        for remedy in item.remedies:
            rules = remedy.fragment.get("quantization", {}).get("rules", [])
            if not rules or "activation" not in rules[0]:
                continue
            rule = Rule("path", rules[0]["match"]["path"], {"act_quant_dtype": rules[0]["activation"]["bits"]})
            other = make_plan(graph, config, [rule], target)
            assert {other.group_of(value).bits for value in layers[item.layer].values} == {8}, item.layer
            offered += 1
    assert offered >= 3
