"""Losses between named layers, from the names to a training that is interrupted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from msqkd.api import plan_network
from msqkd.distill.layers import Feature, Links, link_features
from msqkd.distill.losses import DistillLoss
from msqkd.distill.schedule import Schedule
from msqkd.distill.step import DistillTrainOneStepCell, Learners
from msqkd.errors import PlanError
from msqkd.graph.capture import capture
from msqkd.graph.cell import Hooks, to_cell
from msqkd.graph.ir import Graph
from msqkd.quant.config import QuantConfig
from msqkd.quant.qat import quantize_cell
from msqkd.train.state import History, load_state, save_state

pytestmark = pytest.mark.usefixtures("graph_mode")


class Block(nn.Cell):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(channels, channels, 3), nn.BatchNorm2d(channels), nn.ReLU()

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.relu(self.bn(self.conv(x)) + x)


class Gelu(nn.Cell):
    def construct(self, x):  # type: ignore[no-untyped-def]
        return 0.5 * x * (1.0 + ops.erf(x / 1.4142135))


class Halves(nn.Cell):
    def construct(self, x):  # type: ignore[no-untyped-def]
        return ops.split(x, 2, 1)


class Net(nn.Cell):
    def __init__(self, channels: int = 4, stride: int = 1) -> None:
        super().__init__()
        self.stem, self.block, self.tail = nn.Conv2d(1, channels, 3, stride), Block(channels), nn.Dense(channels, 4)
        self.act, self.halves, self.fc = Gelu(), Halves(), nn.Dense(4, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        y = self.tail(ops.mean(self.block(self.stem(x)), (2, 3)))
        one, other = self.halves(self.act(y))
        return self.fc(ops.concat((other, one), 1))


RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 1, 8, 8)).astype(np.float32)
Y = RNG.integers(0, 3, 6).astype(np.int32)


def network(seed: int, channels: int = 4, stride: int = 1) -> Net:
    net = Net(channels, stride)
    rng = np.random.default_rng(seed)
    for parameter in net.get_parameters():
        positive = parameter.name.endswith(("variance", "gamma"))
        data = rng.uniform(0.5, 1.5, parameter.shape) if positive else rng.normal(0, 0.5, parameter.shape)
        parameter.set_data(ms.Tensor(data.astype(np.float32)))
    return net


@pytest.fixture(scope="module")
def graphs() -> tuple[Graph, Graph]:
    """A student, and a teacher that is wider and looks at a quarter of the positions."""
    ms.set_context(mode=ms.GRAPH_MODE)
    return capture(network(1), (1, 8, 8)), capture(network(2, 6, 2), (1, 8, 8))


def linked(graphs: tuple[Graph, Graph], *features: Feature) -> Links:
    return link_features(features, graphs[0], [graphs[1]], seed=5)


def seen(graph: Graph, value: str) -> np.ndarray:
    return to_cell(graph, Hooks(observe=[value]))(ms.Tensor(X))[-1].asnumpy().astype(np.float64)


@pytest.mark.parametrize(
    ("name", "gives"),
    [
        ("block", "block.relu"),
        ("block.relu", "block.relu"),
        ("stem", "stem"),
        ("block.bn", "block.bn"),
        ("block.conv", "block.bn"),  # folded: one operation on the device
        ("fc", "fc"),
    ],
)
def test_the_value_of_a_layer(graphs: tuple[Graph, Graph], name: str, gives: str) -> None:
    links = linked(graphs, Feature(name, name, "similarity"))
    for graph, values in zip(graphs, (links.student, links.teachers[0])):
        assert values == (graph.node(gives).output,)


def test_the_inside_of_what_is_one_operation_on_the_device_means_its_result(graphs: tuple[Graph, Graph]) -> None:
    erf = next(node for node in graphs[0].nodes if node.op == "Erf")
    (value,) = linked(graphs, Feature(erf.name, "tail", "similarity")).student
    y = seen(graphs[0], graphs[0].node("tail").output)
    expected = 0.5 * y * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
    np.testing.assert_allclose(seen(graphs[0], value), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("feature", "said"),
    [
        (
            ("blok", "block"),
            r"distillation.features\[0\].student: the student, Net, has no layer 'blok'; near misses: ",
        ),
        (("block", "block.rlu"), r"distillation.features\[0\].teacher: the teacher, Net, .*'block.rlu'; .*block.relu"),
        (("halves", "fc"), "'halves' has several results in the student; name an operation that reads the one meant"),
        (("zzzz", "fc"), "has no layer 'zzzz'; for instance stem"),
        (("block", "fc"), r"\(N, 4, 8, 8\) in the student, \(N, 3\) in the teacher; mse compares"),
    ],
)
def test_layers_that_do_not_exist_or_do_not_fit(graphs: tuple[Graph, Graph], feature: Any, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        linked(graphs, Feature(*feature))


class Mlp(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Dense(4, 8), Gelu(), nn.Dense(8, 4)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return x + self.down(self.act(self.up(x)))


def test_a_cell_whose_operations_the_compiler_has_in_another_one() -> None:
    """The activation of the second is said to be that of the first, which is equal code."""
    graph = capture(nn.SequentialCell(nn.Dense(5, 4), Mlp(), Mlp()), (5,))
    assert len({node.cell_path for node in graph.nodes if node.op == "Erf"}) == 1
    features = [Feature(name, "0", "similarity") for name in ("1", "1.act", "1.down", "2.act", "2.down")]
    wanted = [graph.node(name).inputs[0] for name in ("2.up", "1.down")]
    wanted += [graph.node("1.down").output, graph.node("2.down").inputs[0], graph.node("2.down").output]
    assert list(link_features(features, graph, [graph]).student) == wanted
    last = graph.producer(graph.outputs[0])
    assert last is not None
    said = rf"whether '{last.name}' belongs to '2' in the student; name the operation meant, '2.down' or '{last.name}'"
    with pytest.raises(PlanError, match=said):
        link_features([Feature("2", "0", "similarity")], graph, [graph])
    assert link_features([Feature(last.name, "0", "similarity")], graph, [graph]).student == tuple(graph.outputs)


def test_which_teacher(graphs: tuple[Graph, Graph]) -> None:
    features = [Feature("block", "block", "similarity", of=1), Feature("fc", "fc", of=0), Feature("fc", "fc", of=1)]
    links = link_features(features, graphs[0], [graphs[0], graphs[1]])
    assert [len(values) for values in links.teachers] == [1, 2]
    with pytest.raises(PlanError, match=r"features\[0\].student"):
        link_features([Feature("no", "no", of=1)], graphs[0], [None, graphs[1]])
    with pytest.raises(PlanError, match=r"features\[0\].of: found 0, allowed: \[1\]"):
        link_features([Feature("fc", "fc")], graphs[0], [None, graphs[1]])


FEATURES = (Feature("block", "block", "mse", 0.5), Feature("stem", "stem", "attention", 2.0))
ADAPTER = "distill.features.0.loss.adapter.weight"
STEPS = 3


class Lesson:
    """A student with features, and a schedule."""

    def __init__(self, graphs: tuple[Graph, Graph], balance: str, quantised: bool) -> None:
        links = linked(graphs, *FEATURES)
        self.student: Any = to_cell(graphs[0], Hooks(observe=links.student))
        if quantised:
            source, plan = plan_network(network(1), (1, 8, 8), QuantConfig(act_quant_delay=100))
            self.student = quantize_cell(source, plan, observe=links.student)
        teacher = to_cell(graphs[1], Hooks(observe=links.teachers[0]))
        alpha = Schedule("linear", 0.8, 0.4, STEPS)
        self.loss = DistillLoss(alpha=alpha, temperature=2.0, features=links.losses, balance=balance)
        optimizer = nn.Momentum(Learners(self.student, self.loss).trainable_params(), 0.02, 0.9)
        self.step = DistillTrainOneStepCell(self.student, teacher, self.loss, optimizer)
        self.step.set_train()

    def steps(self, count: int) -> list[float]:
        return [float(self.step(ms.Tensor(X), ms.Tensor(Y)).asnumpy()) for _ in range(count)]

    def everything(self) -> dict[str, np.ndarray]:
        return {p.name: p.asnumpy().copy() for p in (*self.step.get_parameters(), *self.loss.get_parameters())}


def attention(values: np.ndarray) -> np.ndarray:
    rows = (values**2).sum(1).reshape(len(values), -1)
    return rows / np.linalg.norm(rows, axis=1)[:, None]


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def test_a_quantised_student_sees_the_layers_of_its_teacher(graphs: tuple[Graph, Graph]) -> None:
    lesson = Lesson(graphs, "none", True)
    links = linked(graphs, *FEATURES)
    lesson.student.set_train(False)
    logits, block, stem = (item.asnumpy().astype(np.float64) for item in lesson.student(ms.Tensor(X)))
    np.testing.assert_allclose(block, seen(graphs[0], links.student[0]), rtol=0.1, atol=0.1)  # weights are rounded
    lesson.step.set_train()

    def pooled(values: np.ndarray) -> np.ndarray:
        return values.reshape(6, 4, 4, 2, 4, 2).mean((3, 5))

    before = lesson.everything()
    adapted = np.einsum("oc,nchw->nohw", before[ADAPTER][:, :, 0, 0].astype(np.float64), pooled(block))
    taught, looked_at = (seen(graphs[1], value) for value in links.teachers[0])
    answer = to_cell(graphs[1])(ms.Tensor(X)).asnumpy().astype(np.float64)
    p, q = softmax(answer / 2), softmax(logits / 2)
    expected = 0.8 * 4 * (p * np.log(p / q)).sum(-1).mean() - 0.2 * np.log(softmax(logits)[np.arange(6), Y]).mean()
    expected += 0.5 * ((adapted - taught) ** 2).mean()
    expected += 2.0 * ((attention(pooled(stem)) - attention(looked_at)) ** 2).sum(1).mean()
    losses = lesson.steps(2)
    assert losses[0] == pytest.approx(float(expected), rel=1e-4)
    assert losses[1] < losses[0]
    assert np.abs(lesson.everything()[ADAPTER] - before[ADAPTER]).max() > 0, "the adapter is trained too"
    graph, _ = lesson.student.sync()
    assert not [name for name in graph.params if "distill" in name]
    assert len(graph.outputs) == 1


def test_an_interrupted_lesson_ends_equal_to_the_bit(graphs: tuple[Graph, Graph], tmp_path: Path) -> None:
    whole = Lesson(graphs, "running", False)
    losses = whole.steps(STEPS)
    assert float(whole.loss.balance.count.asnumpy()) == STEPS, "the sizes of the terms are counted once a step"
    first = Lesson(graphs, "running", False)
    told = first.steps(2)
    save_state(first.step, first.student, History(), "key", tmp_path / "state.npz")
    second = Lesson(graphs, "running", False)
    load_state(second.step, second.student, "key", tmp_path / "state.npz")
    told += second.steps(STEPS - 2)
    assert told == losses
    expected, found = whole.everything(), second.everything()
    assert found.keys() == expected.keys()
    assert {ADAPTER, f"moments.{ADAPTER}", "distill.balance.sizes", "distill.alpha"} <= found.keys()
    for name, data in found.items():
        np.testing.assert_array_equal(data, expected[name], err_msg=name)
