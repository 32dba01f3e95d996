"""Layers that store integers and compute in float: in the settings, the plan and the trained network."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import nn, ops

from msqkd.api import create_ptq_network, prepare_qat, quantize
from msqkd.errors import PlanError
from msqkd.graph.capture import capture
from msqkd.graph.ir import Graph
from msqkd.quant.config import FLOAT, QuantConfig, Rule, WeightQuantizer
from msqkd.quant.fake_quant import OFF, QUANTIZE, FakeQuantDynamic
from msqkd.quant.placement import make_plan
from msqkd.quant.plan import DynamicQuant, QuantPlan
from msqkd.quant.qat import deployment_graph, quantize_cell

pytestmark = pytest.mark.usefixtures("pynative_mode")

PER_CHANNEL = WeightQuantizer(per_channel=True)


class Words(nn.Cell):
    """An embedding, dense layers and a product with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.wide, self.relu, self.narrow = nn.Embedding(9, 6), nn.Dense(6, 8), nn.ReLU(), nn.Dense(8, 6)
        self.out = ms.Parameter(np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32), name="out")

    def construct(self, ids):  # type: ignore[no-untyped-def]
        return ops.matmul(self.narrow(self.relu(self.wide(self.table(ids)))), self.out)


class Recurrent(nn.Cell):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.cell, self.head = kind(4, 5, batch_first=True), nn.Dense(5, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.head(self.cell(x)[0][:, -1])


class Mixed(nn.Cell):
    """Convolutions, and a dense layer whose weight is the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.second = nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)
        self.head = nn.Dense(4, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.head(ops.mean(self.second(self.relu(self.first(x))), (2, 3)))


IDS = np.random.default_rng(1).integers(0, 9, (4, 5)).astype(np.int32)
IMAGES = np.random.default_rng(2).normal(size=(4, 2, 6, 6)).astype(np.float32)


def planned(net: nn.Cell, example: object, config: QuantConfig | None = None, *rules: Rule) -> tuple[Graph, QuantPlan]:
    graph = deployment_graph(capture(net, example))
    return graph, make_plan(graph, config, rules)


def words(config: QuantConfig | None = None, *rules: Rule) -> tuple[Graph, QuantPlan]:
    return planned(Words(), (ms.Tensor(IDS),), config, *rules)


def precisions(plan: QuantPlan) -> dict[str, str]:
    return {node.name: node.precision for node in plan.nodes}


def rule(kind: str, pattern: str, precision: str) -> Rule:
    return Rule(kind, pattern, {"precision": precision})


# -- settings ----------------------------------------------------------------------------------------------------------
def test_float_is_said_in_two_spellings_and_kept_in_one() -> None:
    assert QuantConfig(act_quant_dtype=None) == QuantConfig(precision="float")
    assert QuantConfig().override({"act_quant_dtype": None}) == QuantConfig().override(FLOAT)
    stored = QuantConfig(precision="weight-only")
    assert stored.override({"act_quant_dtype": None}).is_float
    assert stored.override({"act_quant_dtype": 4}).precision == "weight-only"
    back = QuantConfig(act_quant_dtype=None).override({"act_quant_dtype": 4})
    assert (back.precision, back.act_bits) == ("int8", 4)
    assert QuantConfig(act_quant_dtype=None).override({"precision": "dynamic"}).act_bits == 8
    assert (stored.act_bits, stored.is_float) == (None, False)
    for precision in ("weight-only", "dynamic", "float"):
        config = QuantConfig(precision=precision)
        assert QuantConfig().override(config.as_changes()) == config


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"precision": "weight_only"}, "QuantConfig.precision is 'weight_only'; allowed: int8, weight-only, dynamic, "),
        ({"precision": 4}, "QuantConfig.precision is 4; allowed"),
        ({"precision": "dynamic", "act_quant_dtype": None}, "precision is 'dynamic'; leave one of them out"),
        ({"act_quant_dtype": "int16"}, "QuantConfig.act_quant_dtype is 16 bits; allowed only with precision 'dynamic'"),
        ({"precision": "dynamic", "act_quant_dtype": 12}, "act_quant_dtype is 12; allowed: mindspore.int8, 'int2' … "),
    ],
)
def test_bad_precisions_are_one_sentence(settings: dict[str, object], text: str) -> None:
    with pytest.raises(PlanError) as caught:
        QuantConfig(**settings)  # type: ignore[arg-type]
    assert text in str(caught.value)


# -- plan --------------------------------------------------------------------------------------------------------------
def test_every_weight_is_stored_and_nothing_is_int8() -> None:
    _graph, plan = words(QuantConfig(PER_CHANNEL, precision="weight-only"))
    found = precisions(plan)
    weighted = {"table": (0, 0), "wide": (1, 0), "narrow": (1, 0), "mat_mul": (1, 1)}
    assert {name for name, precision in found.items() if precision == "weight-only"} == set(weighted)
    assert {name: (quant.index, quant.axis) for name, quant in plan.weights.items()} == weighted
    assert set(found.values()) == {"weight-only", "float"}
    assert all(node.reason for node in plan.nodes)
    assert not plan.activations
    assert not plan.groups
    assert plan.int8_share() == 0
    assert (plan.stored_weights(), plan.int8_weights()) == (plan.weights, {})
    assert plan.node("relu").reason.endswith("it has no weight to store")


def test_dynamic_layers_and_those_that_are_less() -> None:
    _, plan = words(QuantConfig(precision="dynamic", act_symmetric=True, act_quant_delay=5))
    assert precisions(plan)["table"] == "weight-only"
    assert set(plan.dynamic) == {"wide", "narrow", "mat_mul"}
    assert plan.dynamic["wide"] == DynamicQuant("wide", 8, True, 5, "default")
    assert "only dense layers and products" in plan.node("table").reason
    assert any("(first table, Gather) are weight-only instead" in text for text in plan.warnings)
    assert any(text.startswith("dynamic (3 of the operations, first wide)") for text in plan.warnings)
    assert plan.to_dict()["dynamic"][0]["node"] == "wide"


@pytest.mark.parametrize("by", [("path", "table"), ("op", "Gather"), ("type", "Embedding")])
def test_an_embedding_is_stored_where_asked_in_an_int8_network(by: tuple[str, str]) -> None:
    _, plain = words()
    assert precisions(plain)["table"] == "float"
    assert "table" not in plain.weights
    _, plan = words(None, rule(*by, "weight-only"))
    assert precisions(plan)["table"] == "weight-only"
    assert {name: found for name, found in precisions(plan).items() if name != "table"} == {
        name: found for name, found in precisions(plain).items() if name != "table"
    }
    assert list(plan.stored_weights()) == ["table"]
    assert plan.int8_weights()
    assert not any("changes nothing" in text for text in plan.warnings)


def test_a_stored_layer_between_int8_ones_reads_and_gives_their_grids() -> None:
    graph, plan = planned(Mixed(), IMAGES.shape[1:], None, rule("path", "second", "weight-only"))
    assert precisions(plan)["second"] == "weight-only"
    assert precisions(plan)["first"] == "int8"
    node = graph.node("second")
    assert plan.activations[node.inputs[0]].edges == ()
    assert plan.activations[node.output].group == node.output, "the mean behind it reads it in int8"
    assert not any("every value around" in text for text in plan.warnings), "its marker keeps it float"


def test_recurrent_layers() -> None:
    example = (3, 4)
    _, lstm = planned(Recurrent(nn.LSTM), example, None, rule("path", "cell", "weight-only"))
    assert set(lstm.stored_weights()) == {"cell.rnn", "cell.rnn_1"}
    assert all(lstm.weights[name].index == 0 for name in lstm.stored_weights())
    graph, gru = planned(Recurrent(nn.GRU), example, None, rule("path", "mat_mul*", "dynamic"))
    assert len(gru.dynamic) == 6
    assert {graph.node(name).inputs[1] for name in gru.dynamic} == {"cell.weight_ih_l0", "cell.weight_hh_l0"}


@pytest.mark.parametrize(
    ("precision", "pattern", "text"),
    [
        ("dynamic", "Conv2D", "first (Conv2D) cannot have precision 'dynamic': only dense layers and products"),
        (
            "weight-only",
            "ReLU",
            "relu (ReLU) cannot have precision 'weight-only': it has no parameter as weight; allowed",
        ),
        ("dynamic", "ReLU", "relu (ReLU) cannot have precision 'dynamic': it has no parameter as weight"),
    ],
)
def test_a_rule_that_gets_nothing_is_refused(precision: str, pattern: str, text: str) -> None:
    with pytest.raises(PlanError) as caught:
        planned(Mixed(), IMAGES.shape[1:], None, rule("op", pattern, precision))
    assert f"rule 'op: {pattern}'" in str(caught.value)
    assert text in str(caught.value)


def test_the_later_rule_wins_and_an_overridden_one_is_told() -> None:
    _, plan = words(None, rule("path", "wide", "weight-only"), rule("path", "wid*", "int8"))
    assert precisions(plan)["wide"] == "int8"
    assert any("rule 'path: wide' changes nothing" in text for text in plan.warnings)
    assert not any("rule 'path: wid*' changes nothing" in text for text in plan.warnings)
    _, plan = words(None, rule("op", "Dense", "dynamic"), rule("path", "wide", "int8"))
    assert (precisions(plan)["wide"], precisions(plan)["narrow"]) == ("int8", "dynamic")


# -- the dynamic quantiser ---------------------------------------------------------------------------------------------
def by_hand(x: np.ndarray, bits: int, symmetric: bool) -> np.ndarray:
    """Row by row, in float64 but for the scale."""
    result = np.empty_like(x)
    for index in np.ndindex(x.shape[:-1]):
        low, high = min(float(x[index].min()), 0.0), max(float(x[index].max()), 0.0)
        levels = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
        scale = np.float32(max(np.float32((max(-low, high) if symmetric else high - low) / levels), 2.0**-63))
        zero = 0 if symmetric else np.rint(-(2 ** (bits - 1)) - low / scale)
        q = np.clip(np.rint(x[index].astype(np.float64) / scale) + zero, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        result[index] = (q - zero) * scale
    return result


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_rows_are_quantised_by_their_own_range(bits: int, symmetric: bool) -> None:
    rng = np.random.default_rng(bits)
    x = (rng.normal(size=(3, 5, 16)) * 10.0 ** rng.integers(-6, 6, (3, 5, 1))).astype(np.float32)
    x[0, 0], x[0, 1], x[0, 2] = 0.0, np.abs(x[0, 1]), -np.abs(x[0, 2])
    cell = FakeQuantDynamic(DynamicQuant("layer", bits, symmetric, 0, "default"))
    np.testing.assert_array_equal(cell(ms.Tensor(x)).asnumpy(), x)
    cell.phase_of_quant = QUANTIZE
    cell.compile_cache.clear()
    found = cell(ms.Tensor(x)).asnumpy()
    expected = by_hand(x, bits, symmetric)
    span = x.max(-1, keepdims=True).clip(0) - x.min(-1, keepdims=True).clip(None, 0)
    # A tie may fall either way between float32 and float64, by one step and in few places.
    assert np.mean(~np.isclose(found, expected, rtol=1e-5, atol=0)) <= 0.02
    assert (np.abs(found - expected) <= 1.01 * span * (2 if symmetric else 1) / (2**bits - 2)).all()
    assert not found[0, 0].any()
    for row in found.reshape(-1, 16):
        assert len(np.unique(row)) <= 2**bits
    alone = cell(ms.Tensor(x[1:2])).asnumpy()
    np.testing.assert_array_equal(alone, found[1:2], "an answer depends on the rest of the batch")


WIDE = {symmetric: FakeQuantDynamic(DynamicQuant("layer", 16, symmetric, 0, "default")) for symmetric in (False, True)}


@settings(deadline=None, max_examples=60)
@given(st.booleans(), st.lists(st.floats(-(2.0**40), 2.0**40, width=32), min_size=8, max_size=8), st.integers(-60, 60))
def test_sixteen_bits_are_exact_in_float32(symmetric: bool, row: list[float], exponent: int) -> None:
    """Rounding by a large number is that of `np.rint` for steps of 16 bits too, and no step is beyond its integer."""
    x = np.ldexp(np.asarray([row], np.float32), exponent)
    cell = WIDE[symmetric]
    cell.phase_of_quant = QUANTIZE
    found = cell(ms.Tensor(x)).asnumpy()
    low, high = np.minimum(x.min(), np.float32(0)), np.maximum(x.max(), np.float32(0))
    span = np.maximum(-low, high) if symmetric else high - low
    scale = np.maximum(span / np.float32(32767 if symmetric else 65535), np.float32(2.0**-63))
    inverse = np.float32(1) / scale
    bottom = np.float32(-32768) if symmetric else np.rint(low * inverse)
    top = np.float32(32767) if symmetric else bottom + np.float32(65535)
    steps = np.clip(np.rint(x * inverse), bottom, top)
    np.testing.assert_array_equal(found, steps * scale)
    integers = steps.astype(np.int64) - (0 if symmetric else int(bottom) + 32768)
    assert integers.min() >= -32768
    assert integers.max() <= 32767
    assert np.abs(found - x).max() <= 0.51 * scale + np.abs(x).max() * 2.0**-23


def test_the_gradient_passes_straight_through() -> None:
    cell = FakeQuantDynamic(DynamicQuant("layer", 4, False, 0, "default"))
    cell.phase_of_quant = QUANTIZE
    x = ms.Tensor(np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32))

    def weighted(value):  # type: ignore[no-untyped-def]
        return (cell(value) * 3.0).sum()

    gradient = ms.grad(weighted)(x)
    np.testing.assert_array_equal(gradient.asnumpy(), np.full((2, 8), 3.0, np.float32))


# -- training and calibration ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("precision", ["weight-only", "dynamic"])
def test_training_with_stored_weights(precision: str) -> None:
    config = QuantConfig(WeightQuantizer("int4", per_channel=True), act_quant_delay=2, precision=precision)
    student = prepare_qat(Words(), (ms.Tensor(IDS),), config)

    class Loss(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.network = student

        def construct(self, ids):  # type: ignore[no-untyped-def]
            return ops.square(self.network(ids) - 1.0).mean()

    step = nn.TrainOneStepCell(Loss(), nn.SGD(student.trainable_params(), 0.05))
    losses = [float(step(ms.Tensor(IDS)).asnumpy()) for _ in range(4)]
    assert losses[-1] < losses[0]
    before = [cell.phase_of_quant for cell in student.dynamic_quantizers.values()]
    assert student.set_step(1) is False
    assert set(before) <= {OFF}
    assert student.set_step(2) is (precision == "dynamic")
    graph, plan = student.sync()
    fresh = quantize_cell(graph, plan)
    fresh.set_phase(QUANTIZE)
    np.testing.assert_array_equal(student(ms.Tensor(IDS)).asnumpy(), fresh(ms.Tensor(IDS)).asnumpy())
    levels = plan.weights["wide"].qparams(graph.params["wide.weight"].data).quantize(graph.params["wide.weight"].data)
    assert np.abs(levels).max() == 7


def test_calibration_needs_no_range_where_nothing_is_int8() -> None:
    cell = quantize(create_ptq_network(Mixed(), QuantConfig(precision="weight-only"), [IMAGES]))
    graph, plan = cell.sync()
    assert not plan.ranges()
    assert len(plan.weights) == 3
    by_weight = deployment_graph(graph)
    for name, quant in plan.weights.items():
        weight = by_weight.params[by_weight.node(name).inputs[1]]
        weight.data = quant.qparams(weight.data).fake_quantize(weight.data)
    from msqkd.graph.cell import to_cell

    expected = to_cell(by_weight)(ms.Tensor(IMAGES)).asnumpy()
    np.testing.assert_array_equal(cell(ms.Tensor(IMAGES)).asnumpy(), expected)


def test_biases_of_stored_layers_are_left_alone() -> None:
    """Between int8 values too: the device adds them in float."""
    cell = quantize(create_ptq_network(Mixed(), None, [IMAGES], rules=[rule("path", "head", "weight-only")]))
    graph, plan = cell.sync()
    bias = np.linspace(-1, 1, 3, dtype=np.float32)
    graph.params["head.bias"].data = bias
    from msqkd.quant.integers import round_biases

    np.testing.assert_array_equal(round_biases(graph, plan).params["head.bias"].data, bias)
