from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from msqkd.errors import PlanError
from msqkd.graph.capture import capture
from msqkd.graph.ir import Graph
from msqkd.quant.config import QuantConfig, Rule, WeightQuantizer
from msqkd.quant.fake_quant import FOLLOW, OBSERVE, QUANTIZE, FakeQuantWeight
from msqkd.quant.placement import make_plan
from msqkd.quant.plan import QuantPlan, WeightQuant
from msqkd.quant.qat import QuantCell, deployment_graph, quantize_cell
from msqkd.quant.qparams import activation_qparams, weight_qparams
from msqkd.quant.schedule import BitStage, QatSchedule
from msqkd.train.state import History, load_state, save_state
from msqkd.train.step import TrainStep, WithLoss


class Net(nn.Cell):
    """conv, BatchNorm, ReLU, pool (of the same group), conv, mean, dense."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)
        self.bn, self.relu, self.pool = nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2, 2)
        self.head = nn.Dense(4, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.pool(self.relu(self.bn(self.conv1(x))))
        return self.head(ops.mean(self.relu(self.conv2(x)), (2, 3)))


class Small(nn.Cell):
    """As `Net` with one convolution: a schedule compiles its step a dozen times."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.head = nn.Conv2d(1, 4, 3), nn.Dense(4, 3)
        self.bn, self.relu, self.pool = nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2, 2)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.head(ops.mean(self.pool(self.relu(self.bn(self.conv1(x)))), (2, 3)))


class Sum(nn.Cell):
    def __init__(self, cell: nn.Cell) -> None:
        super().__init__()
        self.cell = cell

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.cell(x).sum()


RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 1, 8, 8)).astype(np.float32)
Y = RNG.integers(0, 3, 16).astype(np.int32)


def planned(config: QuantConfig, *rules: Rule, net: type[nn.Cell] = Net) -> tuple[Graph, QuantPlan]:
    ms.set_seed(3)
    graph = capture(net(), (1, 8, 8))
    return graph, make_plan(deployment_graph(graph), config, rules)


def step_over(cell: QuantCell, rate: float = 0.02) -> TrainStep:
    step = TrainStep(WithLoss(cell, nn.CrossEntropyLoss()), nn.Momentum(cell.trainable_params(), rate, 0.9))
    step.set_train()
    return step


def run(step: TrainStep, steps: int, after: Callable[[], None] = lambda: None) -> None:
    """Train so many steps; `after` is called after each."""
    for _ in range(steps):
        number = step.steps_done
        step(ms.Tensor(X * (1 + 0.2 * number)), ms.Tensor(np.roll(Y, number)))
        after()


def answers(cell: QuantCell) -> np.ndarray:
    cell.set_train(False)
    return cell(ms.Tensor(X)).asnumpy()


def test_layers_are_quantised_from_the_front_part_by_part() -> None:
    graph, plan = planned(QuantConfig(act_quant_delay=1), Rule("path", "head", {"act_quant_delay": 5}))
    for order in ("front", "back"):
        cell = quantize_cell(graph, plan, schedule=QatSchedule(stages=3, interval=2, order=order))
        seen = {}
        for step in range(6):
            cell.set_ranges(dict.fromkeys(plan.groups, (-1.0, 1.0)))
            cell.set_step(step)
            seen[step] = (
                [cell.weight_quantizers[name].phase_of_quant == QUANTIZE for name in ("conv1", "conv2", "head")],
                [q.phase_of_quant == QUANTIZE for q in cell.group_quantizers().values()],
            )
        on = [seen[step][0] for step in (0, 1, 2, 3, 4)]
        front = [[True, False, False]] * 2 + [[True, True, False]] * 2 + [[True, True, True]]
        assert on == (front if order == "front" else [stage[::-1] for stage in front])
        if order == "front":  # x, relu of conv1, relu of conv2, mean, head
            names = list(cell.group_quantizers())
            assert (names[0], len(names)) == ("x", 5)
            assert [sum(seen[step][1]) for step in range(6)] == [0, 2, 4, 4, 4, 5]


@pytest.mark.usefixtures("pynative_mode")
def test_a_layer_that_is_not_quantised_yet_is_float() -> None:
    graph, plan = planned(QuantConfig(WeightQuantizer(2), act_quant_delay=99))
    late = quantize_cell(graph, plan, schedule=QatSchedule(stages=3, interval=10))
    alone = quantize_cell(graph, replace(plan, weights={"conv1": plan.weights["conv1"]}))
    np.testing.assert_array_equal(answers(late), answers(alone))
    late.set_step(10)
    assert np.abs(answers(late) - answers(alone)).max() > 1e-3


@pytest.mark.usefixtures("graph_mode")
def test_bits_fall_from_stage_to_stage() -> None:
    """A stage says the least bits: what is planned with more keeps them; the compiled step sees each change."""
    rule = Rule("position", "first", {"weight.quant_dtype": 8, "act_quant_dtype": 8})
    config = QuantConfig(WeightQuantizer(3), act_quant_dtype=3)
    graph, plan = planned(config, rule)
    ranges = dict.fromkeys(plan.groups, (-3.0, 3.0))
    stages = (BitStage(0, 6, 8), BitStage(2, 4, 5), BitStage(3, 3, 3))
    cell = quantize_cell(graph, plan.with_ranges(ranges), schedule=QatSchedule(bits=stages))
    for step, (weight, act) in enumerate([(6, 8), (6, 8), (4, 5), (3, 3)]):
        cell.set_step(step)
        other = QuantConfig(WeightQuantizer(weight), act_quant_dtype=act)
        same = quantize_cell(graph, planned(other, rule)[1].with_ranges(ranges))
        np.testing.assert_array_equal(answers(cell), answers(same), err_msg=f"step {step}")
    cell.set_step(0)
    cell.set_phase(QUANTIZE)
    np.testing.assert_array_equal(answers(cell), answers(same), err_msg="what is deployed has the planned bits")


def resumed_equals_whole(
    tmp_path: Path, graph: Graph, plan: QuantPlan, batchnorm: str, schedule: QatSchedule, steps: int, at: list[int],
    watch: Callable[[QuantCell], None] = lambda cell: None,
) -> QuantCell:  # fmt: skip
    """Train `steps` steps at once, and with a new process' cells after those of `at`; returns the first cell, which
    `watch` is given after each step."""

    def fresh() -> tuple[QuantCell, TrainStep]:
        cell = quantize_cell(graph, plan, batchnorm, learn=True, schedule=schedule)
        return cell, step_over(cell)

    whole, step = fresh()
    run(step, steps, lambda: watch(whole))
    cell, other = fresh()
    for first, last in itertools.pairwise([0, *at, steps]):
        if first:
            save_state(other, cell, History(), "key", tmp_path / "state.npz")
            cell, other = fresh()
            load_state(other, cell, "key", tmp_path / "state.npz")
        run(other, last - first)
    for one, two in zip(whole.get_parameters(), cell.get_parameters()):
        np.testing.assert_array_equal(one.asnumpy(), two.asnumpy(), err_msg=one.name)
    return whole


@pytest.mark.usefixtures("pynative_mode")
def test_a_resumed_schedule_ends_with_the_same_bits(tmp_path: Path) -> None:
    config = QuantConfig(WeightQuantizer(4, True, learned="lsq"), 4, act_quant_delay=1, act_learned="lsq")
    graph, plan = planned(config, net=Small)
    schedule = QatSchedule(stages=2, interval=2, bits=(BitStage(0, 8, 8), BitStage(4, 4, 4)), noise=0.5)
    cell = resumed_equals_whole(tmp_path, graph, plan, "fold", schedule, 6, [1, 3])
    assert {c.learned.started() for c in cell.weight_quantizers.values()} == {4}
    assert {c.learned.started() for c in cell.group_quantizers().values()} == {4}
    assert all(int(c.noise.calls.asnumpy()) >= 4 for c in cell.weight_quantizers.values())


@pytest.mark.usefixtures("graph_mode")
def test_ranges_and_batchnorm_follow_until_they_are_frozen(tmp_path: Path) -> None:
    graph, plan = planned(QuantConfig(act_quant_delay=1, act_observer="minmax"), net=Small)
    schedule = QatSchedule(freeze_ranges=3, freeze_batchnorm=4)
    phases, means = [], []

    def watch(cell: QuantCell) -> None:
        moving = next(p for p in cell.get_parameters() if p.name.endswith("moving_mean"))
        phases.append(cell.group_quantizers()[graph.inputs[0]].phase_of_quant)
        means.append(moving.asnumpy().copy())
        for quantizer in cell.quantizers.values():
            if phases[-1] == OBSERVE:
                continue
            head = cell.quantizers[quantizer.group.name]
            found = activation_qparams(*head.range(), 8, False)
            assert float(quantizer.scale.asnumpy()) == pytest.approx(float(found.scale), rel=1e-6)
            assert float(quantizer.low.asnumpy()) == found.qmin - found.zero_point

    cell = resumed_equals_whole(tmp_path, graph, plan, "live", schedule, 6, [2, 5], watch)
    low, high = cell.ranges()[graph.inputs[0]]
    assert (low, high) == pytest.approx((X.min() * 1.4, X.max() * 1.4)), "of step 2, the last before the freeze"
    assert phases == [OBSERVE, FOLLOW, FOLLOW, QUANTIZE, QUANTIZE, QUANTIZE]
    assert not np.array_equal(means[2], means[3])
    assert np.array_equal(means[3], means[5]), "statistics stand still"


@pytest.mark.usefixtures("pynative_mode")
def test_noise_quantises_a_share_of_the_weight_anew_in_each_step() -> None:
    w = RNG.normal(size=(40, 50)).astype(np.float32)
    ms.set_seed(1)
    cells = [FakeQuantWeight(WeightQuant("fc", 3, 0, "minmax", "d"), w.shape, noise=0.3) for _ in range(2)]
    quantized = weight_qparams(w, 3, 0).fake_quantize(w)
    seen = []
    for cell in cells:
        cell.set_train()
        chosen = []
        for _ in range(3):
            found = cell(ms.Tensor(w)).asnumpy()
            assert np.all((found == quantized) | (found == w))
            chosen.append(found == quantized)
        seen.append(chosen)
        cell.set_train(False)
        np.testing.assert_array_equal(cell(ms.Tensor(w)).asnumpy(), quantized)
    np.testing.assert_array_equal(seen[0], seen[1])
    shares = [part.mean() for part in seen[0]]
    assert all(abs(share - 0.3) < 0.04 for share in shares), shares
    assert not np.array_equal(seen[0][0], seen[0][1])
    cell.set_train()
    gradient = ms.grad(Sum(cell))(ms.Tensor(w)).asnumpy()
    np.testing.assert_array_equal(gradient, np.ones_like(w))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": 3}, "interval of 1 step or more"),
        ({"order": "middle"}, "allowed: front, back"),
        ({"noise": 1.0}, "above 0 and below 1"),
        ({"bits": (BitStage(3, 8, 8),)}, "the first stage begins at 0"),
        ({"bits": (BitStage(0, 8, 8), BitStage(0, 4, 4))}, "rising order"),
        ({"bits": (BitStage(0, 4, 8), BitStage(5, 6, 8))}, "can only fall"),
        ({"bits": (BitStage(0, 9, 8),)}, "from 2 to 8"),
    ],
)
def test_schedules_that_cannot_be(settings: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        QatSchedule(**settings)


def test_a_delay_in_epochs_needs_the_steps_of_one() -> None:
    graph, plan = planned(QuantConfig(act_quant_delay_epochs=2), Rule("path", "head", {"act_quant_delay": 3}))
    with pytest.raises(PlanError, match="is 2 epochs, and how many steps those are is not known"):
        quantize_cell(graph, plan, learn=True)
    delays = {group.delay for group in plan.in_steps(7).groups.values()}
    assert delays == {14, 3}
    assert quantize_cell(graph, plan.in_steps(7), learn=True).group_quantizers()["x"].phase_of_quant == OBSERVE
