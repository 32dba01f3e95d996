from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from mindspore import nn, ops

from msqkd.errors import PlanError
from msqkd.graph.capture import capture
from msqkd.graph.ir import Graph
from msqkd.quant.config import FLOAT, QuantConfig, Rule
from msqkd.quant.qat import deployment_graph
from msqkd.quant.rules import RuleBook


class Block(nn.Cell):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3)
        self.conv2 = nn.Conv2d(channels, channels, 3)
        self.relu = nn.ReLU()

    def construct(self, x):  # type: ignore[no-untyped-def]
        y = self.relu(self.conv1(x))
        return self.relu(self.conv2(y) + x)


class Net(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.layer1 = nn.SequentialCell(Block(4), Block(4))
        self.head = nn.Dense(4, 2)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.head(ops.mean(self.layer1(self.stem(x)), (2, 3)))


@pytest.fixture(scope="module")
def graph() -> Graph:
    return deployment_graph(capture(Net(), (3, 8, 8)))


def bits(graph: Graph, rules: Sequence[Rule]) -> dict[str, int]:
    """Weight bits of every convolution and dense layer."""
    book = RuleBook(graph, QuantConfig(), rules)
    return {n.name: book.settings(n)[0].weight_quantizer.bits for n in graph.nodes if n.op in ("Conv2D", "Dense")}


def to(value: int) -> dict[str, int]:
    return {"weight.quant_dtype": value}


CONVS = ["stem", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2"]


@pytest.mark.parametrize(
    ("rule", "matched"),
    [
        (Rule("path", "layer1.0.conv1", to(4)), ["layer1.0.conv1"]),
        (Rule("path", "layer1.*.conv2", to(4)), ["layer1.0.conv2", "layer1.1.conv2"]),
        (Rule("path", r"re:layer1\.[01]\.conv1", to(4)), ["layer1.0.conv1", "layer1.1.conv1"]),
        (Rule("path", "layer1.1", to(4)), ["layer1.1.conv1", "layer1.1.conv2"]),
        (Rule("path", "layer1", to(4)), CONVS[1:]),
        (Rule("type", "Block", to(4)), CONVS[1:]),
        (Rule("type", "Dense", to(4)), ["head"]),
        (Rule("type", "Net", to(4)), [*CONVS, "head"]),
        (Rule("op", "Conv2D", to(4)), CONVS),
        (Rule("position", "first", to(4)), ["stem"]),
        (Rule("position", "last", to(4)), ["head"]),
    ],
)
def test_what_a_rule_matches(graph: Graph, rule: Rule, matched: list[str]) -> None:
    found = bits(graph, [rule])
    assert sorted(name for name, value in found.items() if value == 4) == sorted(matched)
    assert {value for name, value in found.items() if name not in matched} <= {8}


def test_exact_path_does_not_match_by_prefix_or_suffix(graph: Graph) -> None:
    for pattern in ("conv1", "layer", "layer1.0.conv", "re:conv1"):
        with pytest.raises(PlanError, match="matches nothing"):
            RuleBook(graph, QuantConfig(), [Rule("path", pattern, to(4))])


def test_path_beats_type_beats_op_beats_default_in_any_order(graph: Graph) -> None:
    rules = [
        Rule("path", "layer1.0.conv1", to(2)),
        Rule("type", "Block", to(3)),
        Rule("op", "Conv2D", to(4)),
    ]
    for ordered in (rules, rules[::-1]):
        found = bits(graph, ordered)
        assert found["layer1.0.conv1"] == 2
        assert found["layer1.0.conv2"] == 3
        assert found["stem"] == 4
        assert found["head"] == 8


def test_within_a_level_the_later_rule_wins(graph: Graph) -> None:
    exact, glob = Rule("path", "layer1.0.conv1", to(2)), Rule("path", "layer1.*", to(5))
    assert bits(graph, [exact, glob])["layer1.0.conv1"] == 5
    assert bits(graph, [glob, exact])["layer1.0.conv1"] == 2


def test_partial_overrides_merge_and_the_last_word_is_recorded(graph: Graph) -> None:
    rules = [
        Rule("op", "Conv2D", {"weight.per_channel": True, "act_observer": "kl"}),
        Rule("path", "stem", {"act_observer": "mse"}),
    ]
    book = RuleBook(graph, QuantConfig(), rules)
    config, rule = book.settings(graph.node("stem"))
    assert (config.weight_quantizer.per_channel, config.act_observer, rule) == (True, "mse", "path: stem")
    assert book.settings(graph.node("head"))[1] == "default"


def test_a_rule_that_matches_nothing_lists_near_misses(graph: Graph) -> None:
    with pytest.raises(
        PlanError, match=r"'path: layer1.0.convl' matches nothing in Net; near misses: .*layer1.0.conv1"
    ):
        RuleBook(graph, QuantConfig(), [Rule("path", "layer1.0.convl", FLOAT)])
    with pytest.raises(PlanError, match="near misses: Block"):
        RuleBook(graph, QuantConfig(), [Rule("type", "Blok", FLOAT)])
    with pytest.raises(PlanError, match="near misses: Conv2D"):
        RuleBook(graph, QuantConfig(), [Rule("op", "Conv2d", FLOAT)])


def test_broken_rules_are_refused(graph: Graph) -> None:
    with pytest.raises(PlanError, match="is not a regular expression"):
        RuleBook(graph, QuantConfig(), [Rule("path", "re:(", FLOAT)])
    with pytest.raises(PlanError, match="is of kind 'layer'; allowed: op, type, path, position"):
        RuleBook(graph, QuantConfig(), [Rule("layer", "stem", FLOAT)])
    with pytest.raises(PlanError, match="near misses: first, last"):
        RuleBook(graph, QuantConfig(), [Rule("position", "middle", FLOAT)])


def test_position_counts_layers_with_learnt_weights_only() -> None:
    from msqkd.models import build_model

    graph = deployment_graph(capture(build_model("msqkd", "resnet20", {}), (3, 32, 32)))
    assert "Conv2D" in {n.op for n in graph.nodes if n.attrs.get("role") == "identity"}
    book = RuleBook(graph, QuantConfig(), [Rule("position", "first", to(4)), Rule("position", "last", to(3))])
    chosen = {n.name: book.settings(n)[0].weight_quantizer.bits for n in graph.nodes}
    assert [name for name, value in chosen.items() if value == 4] == ["conv1"]
    assert [name for name, value in chosen.items() if value == 3] == ["linear"]
    assert np.unique(list(chosen.values())).tolist() == [3, 4, 8]
