from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Optional

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from msqkd.analysis import parity
from msqkd.analysis.parity import BINS, Device, Parity, compare_execution, differing_values, integer_outputs
from msqkd.errors import DataError, SimulationError
from msqkd.exporters.device import lite_program
from msqkd.graph.capture import capture
from msqkd.graph.ir import Graph
from msqkd.graph.islands import run_island
from msqkd.integer.program import ISLAND, Program, TensorQuant
from msqkd.integer.simulator import Simulator
from msqkd.quant.bounds import Bounds
from msqkd.quant.config import QuantConfig, WeightQuantizer
from msqkd.quant.fake_quant import QUANTIZE
from msqkd.quant.placement import make_plan
from msqkd.quant.plan import QuantPlan
from msqkd.quant.ptq import calibrate
from msqkd.quant.qat import deployment_graph, quantize_cell
from msqkd.train.metric import Metric

SHAPE = (3, 8, 8)
LABELS = np.arange(10) % 4


class Tiny(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.bn = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, has_bias=True), nn.BatchNorm2d(8)
        self.relu, self.fc = nn.ReLU(), nn.Dense(8, 4)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.relu(self.bn(self.conv1(x)))
        return self.fc(ops.mean(self.conv2(x), (2, 3)))


class Tokens(nn.Cell):
    """A dense layer over every row of every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head, self.relu = nn.Dense(64, 8), nn.Dense(24, 4), nn.ReLU()

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.head(self.relu(self.fc(x.reshape(-1, 64))).reshape(-1, 24))


class Floating(Tiny):
    def construct(self, x):  # type: ignore[no-untyped-def]
        x = ops.sin(ops.sin(self.relu(self.conv1(x))))
        return self.fc(ops.mean(self.conv2(x), (2, 3)))


def samples(count: int = 10, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, *SHAPE)).astype(np.float32)


def planned(net: nn.Cell, target: str = "lite_arm") -> tuple[Graph, QuantPlan]:
    rng = np.random.default_rng(0)
    for param in net.get_parameters():
        if param.name.endswith(("weight", "bias")):
            deviation = 1 / np.sqrt(max(np.prod(param.shape[1:]), 10))
            param.set_data(ms.Tensor(rng.normal(0, deviation, param.shape), ms.float32))
    graph = deployment_graph(capture(net, SHAPE))
    return graph, calibrate(graph, make_plan(graph, target=target), [samples(32, seed=0)])


@pytest.fixture(scope="module", autouse=True)
def _graph_mode() -> Iterator[None]:
    mode = ms.get_context("mode")
    ms.set_context(mode=ms.GRAPH_MODE)
    yield
    ms.set_context(mode=mode)


@pytest.fixture(scope="module")
def tiny() -> tuple[Graph, QuantPlan]:
    return planned(Tiny())


@pytest.fixture(scope="module")
def found(tiny: tuple[Graph, QuantPlan]) -> Parity:
    return compare_execution(*tiny, [samples(10)], labels=LABELS)


def test_every_layer_is_within_one_step(found: Parity) -> None:
    assert [value.layer for value in found.values] == ["x", "conv1", "conv2", "reduce_mean", "fc"]
    assert found.values[0].op == "input"
    assert all(value.max_lsb is not None and value.max_lsb <= 1 for value in found.values)
    assert found.first_beyond(1) is None
    for value in found.values:
        assert sum(value.histogram) == value.count
        assert value.scale is not None
        assert value.scale > 0
        assert value.sqnr_db["integer"] == pytest.approx(value.sqnr_db["fake_quantised"], abs=1)
    assert found.values[0].equal == 1.0
    assert found.values[0].sqnr_db["integer_fake_quantised"] is None, "there is no difference, so no noise"
    assert found.values[0].count == 10 * np.prod(SHAPE)


def test_what_is_counted_is_what_the_executions_give(tiny: tuple[Graph, QuantPlan], found: Parity) -> None:
    graph, plan = tiny
    cell = quantize_cell(graph, plan)
    cell.set_phase(QUANTIZE)
    promised = cell(ms.Tensor(samples(10))).asnumpy()
    integer = integer_outputs(Device(graph, plan), [samples(10)])[0]
    last = found.values[-1]
    steps = np.rint((integer - promised) / last.scale).astype(int)
    counts = np.bincount(np.clip(steps, -3, 3).ravel() + 3, minlength=len(BINS))
    assert last.histogram == tuple(counts.tolist())
    assert last.max_lsb == np.abs(steps).max()
    noise = np.square(np.float64(promised) - integer).sum()
    if noise:
        expected = 10 * np.log10(np.square(np.float64(promised)).sum() / noise)
        assert last.sqnr_db["integer_fake_quantised"] == pytest.approx(expected, abs=1e-6)
    assert found.correct is not None
    assert found.correct["integer"] == (integer.argmax(-1) == LABELS).sum()
    assert found.correct["fake_quantised"] == (promised.argmax(-1) == LABELS).sum()
    assert found.agreeing["integer_fake_quantised"] == (integer.argmax(-1) == promised.argmax(-1)).sum()


def test_batches_do_not_matter(tiny: tuple[Graph, QuantPlan], found: Parity) -> None:
    seen: list[int] = []
    parts = [samples(10)[:4], samples(10)[4:8], samples(10)[8:]]
    other = compare_execution(*tiny, parts, labels=LABELS, progress=seen.append)
    assert seen == [4, 8, 10]
    assert other.correct == found.correct
    assert other.agreeing == found.agreeing
    assert [value.histogram for value in other.values] == [value.histogram for value in found.values]
    for one, two in zip(other.values, found.values):
        assert one.sqnr_db["integer"] == pytest.approx(two.sqnr_db["integer"])


def test_rows_of_a_sample_stay_with_it() -> None:
    graph, plan = planned(Tokens())
    whole = compare_execution(graph, plan, [samples(10)])
    parts = compare_execution(graph, plan, [samples(10)[:6], samples(10)[6:]])
    assert [value.histogram for value in parts.values] == [value.histogram for value in whole.values]
    assert whole.values[1].count == 10 * 3 * 64
    assert max(value.max_lsb or 0 for value in whole.values) <= 1


def test_a_scale_that_is_not_the_planned_one_is_found_where_it_is(
    tiny: tuple[Graph, QuantPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = parity.device_program

    def broken(graph: Graph, plan: QuantPlan) -> tuple[Program, str]:
        program, kind = real(graph, plan)
        step = next(step for step in program.steps if step.layer == "conv2")
        tensor = program.tensors[step.outputs[0]]
        assert tensor.quant is not None
        tensor.quant = TensorQuant(tensor.quant.scale * 1.5, tensor.quant.zero_point)
        return program, kind

    monkeypatch.setattr(parity, "device_program", broken)
    result = compare_execution(*tiny, [samples(4)])
    first = result.first_beyond(1)
    assert first is not None
    assert (first.layer, first.op) == ("conv2", "Conv2D")
    assert first.max_lsb is not None
    assert first.max_lsb > 3
    assert first.histogram[0] + first.histogram[-1] > 0
    data = result.to_dict(0.1)
    assert data["first_beyond_one"] == {
        "layer": "conv2", "op": "Conv2D", "value": first.value, "max_lsb": first.max_lsb,
    }  # fmt: skip


def test_what_is_computed_in_float_has_a_relative_error(tiny: tuple[Graph, QuantPlan]) -> None:
    graph, plan = planned(Floating())
    program, _ = parity.device_program(graph, plan)
    assert ISLAND in {step.op for step in program.steps}
    values = {value.layer: value for value in compare_execution(graph, plan, [samples(6)]).values}
    sine = values["sin"]  # the second one is quantised for the convolution behind it
    assert (sine.scale, sine.max_lsb, sine.equal, sine.histogram) == (None, None, None, ())
    assert sine.relative_error is not None
    assert 0 <= sine.relative_error < 0.1
    assert values["conv2"].max_lsb is not None


def test_ascend_computes_its_layers_in_int8_and_the_rest_in_float() -> None:
    graph, plan = planned(Tiny(), target="ascend")
    result = compare_execution(graph, plan, [samples(6)])
    assert result.machine is None
    kinds = {value.value: value.scale is not None for value in result.values}
    assert sum(kinds.values()) == 3, "the inputs of the two convolutions and of the dense layer"
    assert not kinds[graph.outputs[0]]
    assert max(value.max_lsb for value in result.values if value.max_lsb is not None) <= 1
    assert result.agreement["integer_fake_quantised"] == 100


def test_without_samples_or_enough_labels_there_is_nothing_to_say(tiny: tuple[Graph, QuantPlan]) -> None:
    with pytest.raises(DataError, match="0 samples"):
        compare_execution(*tiny, [])
    with pytest.raises(DataError, match="0 samples"):
        integer_outputs(Device(*tiny), [])
    with pytest.raises(DataError, match="4 samples and 3 labels"):
        compare_execution(*tiny, [samples(4)], labels=np.zeros(3, np.int32))
    with pytest.raises(SimulationError, match="machine 'mips' is unknown; allowed: x86, arm64"):
        compare_execution(*tiny, [samples(4)], machine="mips")


def test_a_program_with_another_weight_gives_other_values(tiny: tuple[Graph, QuantPlan]) -> None:
    one, other = lite_program(*tiny), lite_program(*tiny)
    different, total = differing_values(one, other, [samples(2)])
    assert different == 0
    computed = Simulator(one, run_island=run_island).trace(samples(2).transpose(0, 2, 3, 1))
    assert total == sum(data.size for _, data in computed)
    weight = next(t for t in other.tensors.values() if t.dtype == "int8" and t.data is not None)
    assert weight.data is not None
    weight.data = -weight.data
    assert differing_values(one, other, [samples(2)])[0] > 0


def test_a_batch_is_as_large_as_memory_allows(tiny: tuple[Graph, QuantPlan], monkeypatch: pytest.MonkeyPatch) -> None:
    graph, _ = tiny
    assert parity.batch_size(graph, 64) == 64
    monkeypatch.setattr(parity, "_BATCH_BYTES", 3 * 8 * 64 * (3 + 8 * 6))
    assert 1 < parity.batch_size(graph, 64) < 64
    monkeypatch.setattr(parity, "_BATCH_BYTES", 1)
    assert parity.batch_size(graph, 64) == 1


def made(samples: int, integer: int, fake: int, same: Optional[int] = None, labels: bool = True) -> Parity:
    agreeing = dict.fromkeys(parity.PAIRS, samples if same is None else same)
    correct = {"float": fake, "fake_quantised": fake, "integer": integer}
    return Parity("lite_arm", "x86", samples, correct if labels else None, agreeing, ())


@pytest.mark.parametrize(
    ("case", "samples_off", "points", "exceeds"),
    [
        (made(1000, 900, 900), 0, 0.0, False),
        (made(1000, 904, 900, same=996), 4, 0.4, False),  # four close calls that fell one way
        (made(1000, 905, 900, same=995), 5, 0.5, True),
        (made(1000, 895, 900, same=995), 5, 0.5, True),
        (made(10_000, 9010, 9000, same=9990), 10, 0.1, False),
        (made(10_000, 9013, 9000, same=9925), 13, 0.13, False),
        (made(10_000, 8980, 9000, same=9925), 20, 0.2, True),
        (made(20, 17, 20, same=17), 3, 15.0, False),  # a few samples say nothing about tenths of points
        (made(20, 15, 20, same=15), 5, 25.0, True),
        (made(1000, 900, 900, same=990), 0, 0.0, False),  # as many right answers gained as lost
        (made(1000, 900, 900, same=990, labels=False), 10, 1.0, True),
    ],
)
def test_the_bound_is_on_points_beyond_chance(case: Parity, samples_off: int, points: float, exceeds: bool) -> None:
    assert case.deviating_samples == samples_off
    assert case.deviation == pytest.approx(points)
    assert case.exceeds(0.1) is exceeds
    data = case.to_dict(0.1)
    assert (data["exceeded"], data["max_deviation"]) == (exceeds, 0.1)
    assert (data["accuracy"]["integer"] is None) is (case.correct is None)


def test_a_device_that_changes_most_predictions_does_not_pass_by_chance() -> None:
    wrong = made(1000, 861, 900, same=600)  # 3.9 points are less than two standard errors of 400 changes
    assert wrong.exceeds(0.1)
    assert "40.00 % changed predictions" in wrong.to_dict(0.1)["excess"][0]
    assert not wrong.exceeds(Bounds(max_changed=100.0))
    assert made(1000, 900, 900, same=600).exceeds(0.1), "as many right answers gained as lost"


def test_a_bound_of_0_accepts_no_difference() -> None:
    assert made(1000, 901, 900, same=999).exceeds(0.0)
    assert not made(1000, 900, 900, same=990).exceeds(0.0)


def test_the_data_can_be_written_as_json(found: Parity) -> None:
    data: dict[str, Any] = json.loads(json.dumps(found.to_dict(0.1), allow_nan=False))
    assert list(data) == [
        "target", "machine", "samples", "metric", "accuracy", "agreement", "outputs", "deviation", "deviating_samples",
        "max_deviation", "bounds", "exceeded", "excess", "first_difference", "first_beyond_one", "values",
    ]  # fmt: skip
    assert data["bounds"]["max_deviation"] == data["max_deviation"] == 0.1
    assert list(data["outputs"]) == list(parity.PAIRS)
    assert list(data["values"][0]["histogram"]) == list(BINS)
    bare = replace(found.values[0], histogram=(), max_lsb=None, scale=None).to_dict()
    assert bare["histogram"] is None


class Embedding(nn.Cell):
    """No classes: a vector of directions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, has_bias=True), nn.Dense(8, 16)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.fc(ops.mean(ops.relu(self.conv(x)), (2, 3)))


@pytest.mark.parametrize("bits", [8, 4])
def test_outputs_that_are_no_classes_have_bounds_of_their_own(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = planned(Embedding())[0]
    config = QuantConfig(WeightQuantizer(bits, per_channel=True), bits)
    plan = calibrate(graph, make_plan(graph, config), [samples(32, seed=0)])
    metric = Metric("nothing", lambda outputs, labels: 0.0)  # a metric that sees no difference

    def compared() -> Parity:
        return compare_execution(graph, plan, [samples(6), samples(4, seed=2)], LABELS, metric=metric)

    right = compared()
    assert right.excess(Bounds()) == []
    cell = quantize_cell(graph, plan)
    cell.set_phase(QUANTIZE)
    inputs = np.concatenate([samples(6), samples(4, seed=2)])
    fake, integer = cell(ms.Tensor(inputs)).asnumpy(), integer_outputs(Device(graph, plan), [inputs])[0]
    error = np.sqrt(np.square(integer - fake).mean() / np.square(fake).mean())
    assert right.distances["integer_fake_quantised"].relative_error == pytest.approx(error, rel=1e-4)
    real = parity.device_program

    def broken(graph: Graph, plan: QuantPlan) -> tuple[Program, str]:
        program, kind = real(graph, plan)
        step = next(step for step in program.steps if step.layer == "fc")
        for name in step.inputs[1:]:
            tensor = program.tensors[name]
            assert tensor.data is not None
            tensor.data = np.roll(tensor.data, 1, axis=0)
        return program, kind

    monkeypatch.setattr(parity, "device_program", broken)
    wrong = compared()
    assert wrong.deviation == 0
    assert {text.split()[0] for text in wrong.excess(Bounds())} == {"relative", "cosine"}
    assert wrong.to_dict(0.1)["exceeded"] is True


class Rows(nn.Cell):
    """Several rows a sample: its values inside have 3 N rows, and so has its output."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.relu, self.two = nn.Dense(4, 6), nn.ReLU(), nn.Dense(6, 2)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.two(self.relu(self.one(x.reshape(-1, 4))))


def test_a_last_part_of_a_batch_is_cut_by_samples_and_judged_by_any_metric() -> None:
    data = np.random.default_rng(3).normal(size=(7, 3, 4)).astype(np.float32)
    graph = deployment_graph(capture(Rows(), ms.Tensor(data[:1])))
    plan = calibrate(graph, make_plan(graph), [data])
    labels = np.zeros((7, 3, 2), np.float32)
    seen: list[tuple[int, ...]] = []

    def size(outputs: np.ndarray, given: np.ndarray) -> float:
        seen.append((len(outputs), len(given)))
        return float(np.abs(outputs).mean())

    metric = Metric("size", size)
    whole = compare_execution(graph, plan, [data], labels, metric=metric)
    parts = compare_execution(graph, plan, [data[:5], data[5:]], labels, metric=metric)
    assert seen == [(21, 7)] * 6, "21 rows of 7 samples, in three executions, twice"
    assert [value.count for value in parts.values] == [value.count for value in whole.values]
    assert [value.histogram for value in parts.values] == [value.histogram for value in whole.values]
    assert parts.measured == pytest.approx(whole.measured)
    assert parts.measured is not None
    deviation = abs(parts.measured["integer"] - parts.measured["fake_quantised"])
    assert (parts.correct, parts.deviating_samples, parts.deviation) == (None, None, deviation)
    assert parts.exceeds(deviation / 2) == (deviation > 0)
    assert not parts.exceeds(deviation)
