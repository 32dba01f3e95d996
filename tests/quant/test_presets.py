from __future__ import annotations

import pytest
from mindspore import nn

from msqkd.errors import PlanError
from msqkd.graph.capture import capture
from msqkd.quant.config import Rule
from msqkd.quant.placement import make_plan
from msqkd.quant.presets import PRESETS, preset
from msqkd.quant.qat import deployment_graph


def test_the_presets_have_a_description_each() -> None:
    assert set(PRESETS) == {"cnn", "mobile", "transformer", "detector"}
    assert all(item.description and item.name == name for name, item in PRESETS.items())
    assert all(item.config.weight_quantizer.per_channel for item in PRESETS.values())


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(PlanError, match=r"preset 'transfomer' is unknown; allowed: cnn, .*did you mean 'transformer'"):
        preset("transfomer")


class Mixed(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Dense(6, 6), nn.Dense(6, 6), nn.Dense(6, 3)
        self.norm = nn.LayerNorm((6,))

    def construct(self, x):  # type: ignore[no-untyped-def]
        y = self.first(x)
        return self.last(self.norm(y + self.middle(y)))


def test_rules_that_match_nothing_are_left_out() -> None:
    graph = deployment_graph(capture(Mixed(), (6,)))
    found = preset("transformer")
    kept = [(rule.kind, rule.pattern) for rule in found.rules_for(graph)]
    assert kept == [("position", "first"), ("position", "last"), ("op", "LayerNorm"), ("op", "Add")]
    plan = make_plan(graph, found.config, found.rules_for(graph))
    assert {node.name: node.precision for node in plan.nodes if node.op != "Reshape"} == {
        "first": "float", "middle": "int8", "add": "float", "norm": "float", "last": "float",
    }  # fmt: skip
    assert plan.node("norm").reason == "kept float by rule 'preset transformer, op LayerNorm'"


def test_a_rule_of_a_preset_that_another_overrides_is_no_warning() -> None:
    graph = deployment_graph(capture(Mixed(), (6,)))
    mine = Rule("op", "Add", {"precision": "int8"})
    warnings = make_plan(graph, None, [*preset("transformer").rules_for(graph), mine]).warnings
    assert not any("rule 'preset" in text for text in warnings)


def test_a_preset_can_be_named_where_a_network_is_planned() -> None:
    import msqkd

    net = nn.SequentialCell(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 1))
    _, plan = msqkd.plan_network(net, (2, 6, 6), preset="cnn")
    assert {quant.axis for quant in plan.weights.values()} == {0}
    _, plan = msqkd.plan_network(net, (2, 6, 6), preset="mobile")
    assert {quant.observer for quant in plan.weights.values()} == {"mse"}
    _, plan = msqkd.plan_network(net, (2, 6, 6), msqkd.QuantConfig(), preset="mobile")
    assert {quant.observer for quant in plan.weights.values()} == {"minmax"}, "settings that are given win"
    with pytest.raises(PlanError, match=r"preset 'transfomer' is unknown; .*did you mean 'transformer'"):
        msqkd.plan_network(net, (2, 6, 6), preset="transfomer")
