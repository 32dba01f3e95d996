from __future__ import annotations

from functools import cache
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from msqkd.api import plan_network
from msqkd.distill.losses import DistillLoss
from msqkd.distill.step import DistillTrainOneStepCell
from msqkd.graph.capture import capture
from msqkd.graph.cell import to_cell
from msqkd.graph.ir import Graph
from msqkd.quant.config import QuantConfig
from msqkd.quant.fake_quant import OBSERVE, QUANTIZE
from msqkd.quant.plan import QuantPlan
from msqkd.quant.qat import QuantCell, quantize_cell

pytestmark = pytest.mark.usefixtures("graph_mode")


class Net(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.fc = nn.Dense(4, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.fc(ops.mean(self.relu(self.bn(self.conv(x))), (2, 3)))


RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 1, 6, 6)).astype(np.float32)
Y = RNG.integers(0, 3, 8).astype(np.int32)


def network(seed: int) -> Net:
    net = Net()
    rng = np.random.default_rng(seed)
    for parameter in net.get_parameters():
        parameter.set_data(ms.Tensor(rng.uniform(0.2, 1.5, parameter.shape).astype(np.float32) * rng.choice([-1, 1])))
    net.fc.weight.set_data(ms.Tensor(rng.normal(0, 4, (3, 4)).astype(np.float32)))
    net.bn.moving_variance.set_data(ms.Tensor(rng.uniform(0.5, 2, 4).astype(np.float32)))
    return net


def logits(cell: nn.Cell, training: bool = False) -> np.ndarray:
    cell.set_train(training)
    return cell(ms.Tensor(X)).asnumpy()


def kl(student: np.ndarray, teacher: np.ndarray, t: float) -> float:
    p, q = (
        np.exp(v / t) / np.exp(v / t).sum(-1, keepdims=True)
        for v in (teacher.astype(np.float64), student.astype(np.float64))
    )
    return float(t * t * (p * np.log(p / q)).sum(-1).mean())


def step_of(student: nn.Cell, teacher: nn.Cell, rate: float = 0.05, alpha: float = 1.0) -> DistillTrainOneStepCell:
    optimizer = nn.Momentum(student.trainable_params(), rate, 0.9)
    step = DistillTrainOneStepCell(student, teacher, DistillLoss("cross_entropy", "kl", alpha, 4.0), optimizer)
    step.set_train()
    return step


def state(cell: nn.Cell) -> dict[str, np.ndarray]:
    return {p.name: p.asnumpy().copy() for p in cell.get_parameters()}


@cache
def captured_network(seed: int) -> Graph:
    return capture(network(seed), (1, 6, 6))


def as_cell(seed: int) -> nn.Cell:
    return to_cell(captured_network(seed))


@pytest.mark.parametrize("captured", [False, True])
def test_the_teacher_is_really_the_teacher(captured: bool) -> None:
    """Both networks have the same parameter names and other values."""
    ms.set_context(mode=ms.GRAPH_MODE if captured else ms.PYNATIVE_MODE)
    student, teacher = network(1), network(2)
    wanted = kl(logits(network(1), training=True), logits(teacher), 4.0)
    assert wanted > 0.5, "they answer differently"
    pair = (as_cell(1), as_cell(2)) if captured else (student, teacher)
    loss = step_of(*pair)(ms.Tensor(X), ms.Tensor(Y))
    assert float(loss.asnumpy()) == pytest.approx(wanted, rel=1e-4)


def test_the_student_learns_and_the_teacher_does_not_change() -> None:
    student, teacher = as_cell(1), as_cell(2)
    before, held = state(student), state(teacher)
    step = step_of(student, teacher)
    losses = [float(step(ms.Tensor(X), ms.Tensor(Y)).asnumpy()) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    for name, data in state(teacher).items():
        np.testing.assert_array_equal(data, held[name])
    changed = {name for name, data in state(student).items() if not np.array_equal(data, before[name])}
    assert {"conv.weight", "bn.gamma", "bn.moving_mean", "fc.bias"} <= changed


@pytest.mark.parametrize("mode", [ms.GRAPH_MODE, ms.PYNATIVE_MODE])
def test_parameters_keep_their_names(mode: int) -> None:
    """Checkpoints are found by name; the running statistics of BatchNorm are among them."""
    ms.set_context(mode=mode)
    student, teacher = quantised(1, 1), network(2)
    names = list(state(student)), list(state(teacher))
    step = step_of(student, teacher)
    optimizer = [p.name for p in step.optimizer.get_parameters()]
    for _ in range(3):
        step(ms.Tensor(X), ms.Tensor(Y))
    assert (list(state(student)), list(state(teacher))) == names
    assert [p.name for p in step.optimizer.get_parameters()] == optimizer


@pytest.mark.parametrize("mode_of_teacher", [True, False])
def test_the_teacher_is_left_as_it_is_found(mode_of_teacher: bool) -> None:
    """It answers in evaluation mode all the same, and its statistics stand still."""
    student, teacher = network(1), network(2)
    wanted = kl(logits(network(1), training=True), logits(teacher), 4.0)
    teacher.set_train(mode_of_teacher)

    def flags() -> list[Any]:
        cells = [(cell.training, cell.requires_grad, cell.phase) for _, cell in teacher.cells_and_names()]
        return [*cells, *((p.name, p.requires_grad, p.asnumpy().tolist()) for p in teacher.get_parameters())]

    before = flags()
    step = step_of(student, teacher)
    for mode in (False, True):
        step.set_train(mode)
        assert {cell.training for _, cell in student.cells_and_names()} == {mode}
    assert float(step(ms.Tensor(X), ms.Tensor(Y)).asnumpy()) == pytest.approx(wanted, rel=1e-4)
    step(ms.Tensor(X), ms.Tensor(Y))
    assert flags() == before


def test_a_frozen_teacher_needs_no_freezing() -> None:
    """The optimiser holds the student's parameters alone; gradients of the teacher are never asked for."""
    student, teacher = network(1), network(2)
    step = step_of(student, teacher)
    own = {id(p) for p in teacher.get_parameters()}
    assert not [p for p in step.weights if id(p) in own]


@cache
def planned(seed: int, delay: int) -> tuple[Graph, QuantPlan]:
    return plan_network(network(seed), (1, 6, 6), QuantConfig(act_quant_delay=delay))


def quantised(seed: int, delay: int) -> QuantCell:
    return quantize_cell(*planned(seed, delay))


def test_a_quantised_student_learns_from_a_float_teacher() -> None:
    student, teacher = quantised(1, 3), as_cell(2)
    wanted = kl(logits(quantised(1, 3)), logits(as_cell(2)), 4.0)
    step = step_of(student, teacher)
    losses = [float(step(ms.Tensor(X), ms.Tensor(Y)).asnumpy()) for _ in range(40)]
    assert losses[0] == pytest.approx(wanted, rel=1e-3)
    assert losses[-1] < 0.5 * losses[0]
    assert {q.phase_of_quant for q in student.group_quantizers().values()} == {QUANTIZE}


def test_a_quantised_teacher_keeps_its_phase_and_ranges() -> None:
    ms.set_context(mode=ms.PYNATIVE_MODE)
    teacher = quantised(2, 5)
    teacher.set_ranges(dict.fromkeys(teacher.plan.groups, (-3.0, 3.0)))
    teacher.set_phase(QUANTIZE)
    reference, ranges = logits(teacher), teacher.ranges()
    student = quantised(1, 5)
    loss = step_of(student, teacher)(ms.Tensor(X), ms.Tensor(Y))
    assert {q.phase_of_quant for q in student.group_quantizers().values()} == {OBSERVE}
    assert {q.phase_of_quant for q in teacher.quantizers.values()} == {QUANTIZE}
    assert teacher.ranges() == ranges
    assert float(loss.asnumpy()) == pytest.approx(kl(logits(quantised(1, 5)), reference, 4.0), rel=1e-3)


def test_large_gradients_are_clipped() -> None:
    ms.set_context(mode=ms.PYNATIVE_MODE)
    moved = []
    for clip in (None, 1e-3):
        student = as_cell(1)
        before = state(student)
        optimizer = nn.SGD(student.trainable_params(), 1.0)
        step = DistillTrainOneStepCell(student, as_cell(2), DistillLoss(), optimizer, clip)
        step.set_train()
        step(ms.Tensor(X), ms.Tensor(Y))
        names = {p.name for p in student.trainable_params()}
        moved.append(np.sqrt(sum(((state(student)[n] - before[n]) ** 2).sum() for n in names)))
    assert moved[1] == pytest.approx(1e-3, rel=1e-3)
    assert moved[0] > 10 * moved[1]
