from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from msqkd.errors import PlanError
from msqkd.graph.capture import capture
from msqkd.graph.ir import Graph
from msqkd.quant.config import QuantConfig, Rule, WeightQuantizer
from msqkd.quant.fake_quant import QUANTIZE, FakeQuantActivation, FakeQuantWeight
from msqkd.quant.learned import LEAST, LearnedScale, lsq_start
from msqkd.quant.placement import make_plan
from msqkd.quant.plan import Group, QuantPlan, WeightQuant
from msqkd.quant.qat import QuantCell, deployment_graph, quantize_cell
from msqkd.recipe import TrainSection
from msqkd.train.optimizer import make_optimizer
from msqkd.train.step import TrainStep, WithLoss

GROUP = Group("x", 4, False, "ema", 99.99, 0, "default", range=(-0.7, 1.1), learned="lsq")
RNG = np.random.default_rng(0)


@pytest.fixture(params=[ms.GRAPH_MODE, ms.PYNATIVE_MODE], ids=["graph", "pynative"])
def mode(request: pytest.FixtureRequest) -> Iterator[int]:
    before = ms.get_context("mode")
    ms.set_context(mode=request.param)
    yield request.param
    ms.set_context(mode=before)


class Weighted(nn.Cell):
    """Sum of a cell's answer, weighted: its gradient is what the cell does to `dout`."""

    def __init__(self, cell: nn.Cell, dout: np.ndarray) -> None:
        super().__init__()
        self.cell, self.dout = cell, ms.Tensor(dout)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return (self.cell(x) * self.dout).sum()


def gradients(cell: nn.Cell, scale: LearnedScale, x: np.ndarray, dout: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Those of x and of the trained parameter."""
    whole = Weighted(cell, dout).set_train()
    found = ms.grad(whole, 0, ms.ParameterTuple([scale.relative]))(ms.Tensor(x))
    return found[0].asnumpy(), found[1][0].asnumpy()


def lsq_by_the_paper(
    x: np.ndarray,
    s: np.ndarray,
    low: float,
    high: float,
    dout: np.ndarray,
    count: int,
    axes: tuple[int, ...],
    levels: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of x and s by equations 3 to 5 of arXiv:1902.08153, element by element; `levels` is Q_P, else high."""
    v = x.astype(np.float64) / s
    piece = np.where(v <= low, low, np.where(v >= high, high, np.rint(v) - v))
    inside = (v > low) & (v < high)
    return dout * inside, (dout * piece).sum(axes, keepdims=True) / np.sqrt(count * (levels or high))


def activation(learned: str = "lsq", non_negative: bool = False, **settings: object) -> FakeQuantActivation:
    cell = FakeQuantActivation(replace(GROUP, learned=learned, **settings), non_negative, learned=LearnedScale("x"))
    cell.start(cell)
    cell.phase_of_quant = QUANTIZE
    return cell


@pytest.mark.parametrize("symmetric", [False, True])
def test_lsq_of_an_activation_is_that_of_the_paper(mode: int, symmetric: bool) -> None:
    cell = activation(symmetric=symmetric)
    qparams = cell.qparams()
    low, high = (float(end - qparams.zero_point) for end in (qparams.qmin, qparams.qmax))
    x = RNG.uniform(-1.5, 2, (3, 4, 5)).astype(np.float32)
    dout = RNG.normal(size=x.shape).astype(np.float32)
    np.testing.assert_array_equal(cell(ms.Tensor(x)).asnumpy(), qparams.fake_quantize(x))
    dx, dr = gradients(cell, cell.learned, x, dout)
    s = float(qparams.scale)
    levels = 7 if symmetric else 15  # of signed and of unsigned data, whatever the zero point
    wanted_dx, ds = lsq_by_the_paper(x, np.float64(s), low, high, dout, 20, (0, 1, 2), levels)
    np.testing.assert_allclose(dx, wanted_dx, rtol=1e-6)
    np.testing.assert_allclose(dr, ds.item() / s, rtol=1e-4)


def test_lsq_of_a_non_negative_activation(mode: int) -> None:
    cell = activation(non_negative=True, range=(0.0, 2.0))
    x = np.abs(RNG.normal(size=(2, 50))).astype(np.float32) + 1e-3
    dout = RNG.normal(size=x.shape).astype(np.float32)
    dx, dr = gradients(cell, cell.learned, x, dout)
    s = np.float64(cell.learned.value())
    wanted_dx, ds = lsq_by_the_paper(x, s, 0, 15, dout, 50, (0, 1))
    np.testing.assert_allclose(dx, wanted_dx, rtol=1e-6)
    np.testing.assert_allclose(dr, ds.item() / s, rtol=1e-4)


def test_pact_is_that_of_the_paper(mode: int) -> None:
    """dα is the sum of the gradient over what lies above the clip, and the step size is α over the levels."""
    cell = activation("pact", non_negative=True, range=(0.0, 2.0))
    x = np.float32([[0.1, 0.9, 1.99, 2.01, 3.0, 50.0]])
    dout = np.float32([[1, 2, 4, 8, 16, 32]])
    dx, dr = gradients(cell, cell.learned, x, dout)
    np.testing.assert_array_equal(dx, [[1, 2, 4, 0, 0, 0]])
    scale = np.float64(cell.learned.value())
    assert scale == pytest.approx(2 / 15)
    d_alpha = 8 + 16 + 32
    # α = 15 s: a descent of rate η moves α by η · dα where it moves s by η · dα / 15.
    assert dr * scale == pytest.approx(d_alpha / 15, rel=1e-5)


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("bits", [2, 8])
def test_lsq_of_a_weight_is_that_of_the_paper(mode: int, axis: int | None, bits: int) -> None:
    w = RNG.normal(size=(5, 3, 2, 2)).astype(np.float32)
    dout = RNG.normal(size=w.shape).astype(np.float32)
    cell = FakeQuantWeight(WeightQuant("conv", bits, axis, "minmax", "default", learned="lsq"), w.shape, learn=True)
    cell.start(w)
    top = 2 ** (bits - 1) - 1
    axes = (0, 1, 2, 3) if axis is None else (1, 2, 3)
    count = 60 if axis is None else 12
    start = 2 * np.abs(w).mean(axes, keepdims=True) / np.sqrt(top)
    np.testing.assert_allclose(cell.learned.value().reshape(start.shape), start, rtol=1e-6)
    s = cell.learned.value().reshape(start.shape).astype(np.float64)
    quantized = np.clip(np.rint(w / s), -top, top) * s
    np.testing.assert_allclose(cell(ms.Tensor(w)).asnumpy(), quantized, rtol=1e-6)
    dw, dr = gradients(cell, cell.learned, w, dout)
    wanted_dw, ds = lsq_by_the_paper(w, s, -top, top, dout, count, axes)
    np.testing.assert_allclose(dw, wanted_dw, rtol=1e-6)
    np.testing.assert_allclose(dr.reshape(ds.shape), ds / s, rtol=2e-4, atol=1e-5)


def test_gradient_descent_moves_the_step_size_as_it_would_itself(mode: int) -> None:
    scale = LearnedScale("w")
    scale.start(np.float32(0.02), 4)
    ds, rate = 0.7, 0.003

    class Loss(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.scale = scale

        def construct(self, x):  # type: ignore[no-untyped-def]
            return self.scale() * x

    loss = Loss()
    gradient = ms.grad(loss, None, ms.ParameterTuple(loss.trainable_params()))(ms.Tensor(np.float32(ds)))
    nn.SGD(loss.trainable_params(), rate)(gradient)
    assert scale.value() == pytest.approx(0.02 - rate * ds, rel=1e-5)


def test_a_step_size_stays_positive() -> None:
    scale = LearnedScale("w", 2)
    scale.start(np.float32([0.5, 2.0]), 4)
    scale.relative.set_data(ms.Tensor(np.float32([-3.0, 0.25])))
    np.testing.assert_array_equal(scale.value(), np.float32([0.5 * LEAST, 0.5]))
    np.testing.assert_array_equal(scale().asnumpy(), scale.value())


def test_a_step_size_at_its_floor_comes_back(mode: int) -> None:
    """Steps that would make it negative leave it at the floor, and the momentum they had does not hold it there."""
    scale = LearnedScale("w")
    scale.start(np.float32(0.004), 8)

    class Loss(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.scale = scale

        def construct(self, x):  # type: ignore[no-untyped-def]
            return self.scale() * x

    loss = Loss().set_train()
    weights = ms.ParameterTuple(loss.trainable_params())
    descent = ms.value_and_grad(loss, None, weights)
    optimizer = nn.Momentum(loss.trainable_params(), 0.005, 0.9)

    def run(slope: float, steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            _, gradient = descent(ms.Tensor(np.float32(slope)))
            optimizer(gradient)
            found.append(float(scale.value()))
        return found

    assert run(1.0, 1) == [pytest.approx(0.004 * LEAST)], "one step takes s below zero"
    assert run(1.0, 5)[-1] == pytest.approx(0.004 * LEAST)
    assert run(-0.1, 15)[-1] > 2 * 0.004 * LEAST


def test_the_gradient_scale_does_not_depend_on_the_zero_point() -> None:
    x = RNG.normal(size=(4, 25)).astype(np.float32) * 1e-3
    found = []
    for low, high in [(-1.5, 0.0), (-1.4, 0.1), (-0.75, 0.75), (0.0, 1.5)]:
        cell = activation(range=(low, high))
        inside = np.clip(x, low + 1e-6, high - 1e-6)
        rounding = np.rint(inside / 0.1) - inside / 0.1  # what s is to change for, with a gradient of 1 a value
        dr = gradients(cell, cell.learned, inside, np.sign(rounding).astype(np.float32))[1]
        found.append(float(dr[0]) * 0.1 / np.abs(rounding).sum())
    np.testing.assert_allclose(found, 1 / np.sqrt(25 * 15), rtol=1e-2)


def test_starting_anew_keeps_what_the_optimiser_knows() -> None:
    scale = LearnedScale("w")
    scale.start(np.float32(0.5), 8)
    scale.relative.set_data(ms.Tensor(np.float32([1.25])))
    scale.start(np.float32(3.0), 4)
    assert (scale.relative.asnumpy(), scale.value(), scale.started()) == (1.25, 3.0, 4)


def test_a_channel_of_zeros_has_a_step_size() -> None:
    w = np.zeros((2, 4), np.float32)
    w[1] = 1
    assert lsq_start(w, 4, 0).tolist() == [2.0**-7, pytest.approx(2 / np.sqrt(7))]


class Net(nn.Cell):
    """conv, BatchNorm, ReLU, conv, addition, pool, mean, dense: groups of several values among them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, has_bias=True), nn.Conv2d(4, 4, 3)
        self.bn, self.relu, self.pool = nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2, 2)
        self.head = nn.Dense(4, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.relu(self.bn(self.conv1(x)))
        x = self.pool(self.conv2(x) + x)
        return self.head(ops.mean(x, (2, 3)))


X = RNG.normal(size=(16, 1, 8, 8)).astype(np.float32)
Y = RNG.integers(0, 3, 16).astype(np.int32)
LSQ4 = QuantConfig(
    WeightQuantizer(4, per_channel=True, learned="lsq"), act_quant_dtype=4, act_quant_delay=1, act_learned="lsq"
)


def planned(config: QuantConfig, rules: tuple[Rule, ...] = (), target: str = "lite_arm") -> tuple[Graph, QuantPlan]:
    ms.set_seed(3)
    graph = capture(Net(), (1, 8, 8))
    return graph, make_plan(deployment_graph(graph), config, rules, target)


def step_over(cell: QuantCell, rate: float = 0.05) -> TrainStep:
    step = TrainStep(WithLoss(cell, nn.CrossEntropyLoss()), nn.Momentum(cell.trainable_params(), rate, 0.9))
    step.set_train()
    return step


@pytest.mark.usefixtures("graph_mode")
@pytest.mark.parametrize(("batchnorm", "target"), [("freeze", "ascend"), ("live", "lite_arm")])
def test_trained_step_sizes_are_those_of_the_plan(batchnorm: str, target: str) -> None:
    graph, plan = planned(
        LSQ4, (Rule("position", "first", {"weight.quant_dtype": 8, "weight.per_channel": False}),), target
    )
    cell = quantize_cell(graph, plan, batchnorm, learn=True)
    starts = {name: scale.copy() for name, scale in cell.scales()["weights"].items()}
    step = step_over(cell)
    for _ in range(4):
        step(ms.Tensor(X), ms.Tensor(Y))
    cell.set_train(False)
    found = cell(ms.Tensor(X)).asnumpy()
    deployed, after = cell.sync()
    scales = cell.scales()["weights"]
    assert set(scales) == set(plan.weights)
    for name, quant in after.weights.items():
        assert not np.array_equal(scales[name], starts[name]), f"{name} was not trained"
        weight = deployed.params[deployed.node(name).inputs[1]].data
        np.testing.assert_array_equal(quant.qparams(weight).scale, scales[name])
    for name, group in after.groups.items():
        if not group.fixed:
            head = cell.quantizers[name]
            trained = np.float32(head.learned.value() * np.float32(group.factor))
            assert group.qparams().scale == trained
            assert (group.qparams().qmin - group.qparams().zero_point) == float(head.low.asnumpy())
    again = quantize_cell(deployed, after)
    again.set_phase(QUANTIZE)
    assert not any(parameter.name.endswith(".learned.relative") for parameter in again.get_parameters())
    np.testing.assert_allclose(again(ms.Tensor(X)).asnumpy(), found, rtol=1e-4, atol=1e-5)
    assert after.to_dict()["weights"][0]["scale"] == pytest.approx(float(scales["conv1"]))


@pytest.mark.usefixtures("graph_mode")
def test_an_activation_starts_from_what_was_observed() -> None:
    graph, plan = planned(LSQ4)
    cell = quantize_cell(graph, plan, learn=True)
    step = step_over(cell, rate=1e-12)
    quantizer = cell.group_quantizers()[graph.inputs[0]]
    step(ms.Tensor(X), ms.Tensor(Y))
    assert quantizer.learned.started() == 0
    step(ms.Tensor(X), ms.Tensor(Y))
    low, high = float(X.min()), float(X.max())
    assert quantizer.learned.value() == pytest.approx((high - low) / 15, rel=1e-6)
    assert quantizer.range() == pytest.approx((low, high), abs=(high - low) / 15)


@pytest.mark.usefixtures("graph_mode")
def test_pact_is_for_what_is_never_negative() -> None:
    _, plan = planned(QuantConfig(act_learned="pact"))
    learned = {name: group.learned for name, group in plan.groups.items()}
    relu = next(node.name for node in plan.nodes if node.op == "ReLU")
    assert "pact" in learned.values()
    assert learned["x"] == "none", f"{relu} alone is clipped"


@pytest.mark.usefixtures("graph_mode")
def test_without_training_scales_come_from_the_weight() -> None:
    graph, plan = planned(LSQ4)
    cell = quantize_cell(deployment_graph(graph), plan)
    assert cell.scales() == {"weights": {}, "groups": {}}


@pytest.mark.usefixtures("graph_mode")
def test_layers_that_differ_in_punctuation_only_have_step_sizes_of_their_own() -> None:
    class Twins(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.a_0 = nn.SequentialCell(nn.Dense(4, 5)), nn.Dense(5, 3)

        def construct(self, x):  # type: ignore[no-untyped-def]
            return self.a_0(self.a(x))

    graph = capture(Twins(), (4,))
    plan = make_plan(deployment_graph(graph), LSQ4, [Rule("path", "a.0", {"weight.quant_dtype": 2})])
    scales = quantize_cell(graph, plan, learn=True).scales()["weights"]
    for name, bits in (("a.0", 2), ("a_0", 4)):
        wanted = 2 * np.abs(graph.params[f"{name}.weight"].data).mean(1) / np.sqrt(2 ** (bits - 1) - 1)
        np.testing.assert_allclose(scales[name], wanted, rtol=1e-6)


def test_a_smaller_weight_has_a_smaller_scale() -> None:
    quant = WeightQuant("conv", 4, 0, "minmax", "default", scale=np.float32([0.5, 3.0]))
    w = RNG.normal(size=(2, 9)).astype(np.float32)
    np.testing.assert_array_equal(quant.divided(4).qparams(w / 4).quantize(w / 4), quant.qparams(w).quantize(w))
    assert quant.qparams(w, min_scale=np.float32([1.0, 1.0])).scale.tolist() == [1.0, 3.0]
    untrained = replace(quant, scale=None)
    assert untrained.divided(4) is untrained


def test_bad_settings_are_refused() -> None:
    with pytest.raises(PlanError, match=r"WeightQuantizer.learned is 'lsk'; allowed: none, lsq; did you mean 'lsq'"):
        WeightQuantizer(learned="lsk")
    with pytest.raises(PlanError, match=r"QuantConfig.act_learned is 'step'; allowed: none, lsq, pact"):
        QuantConfig(act_learned="step")
    with pytest.raises(PlanError, match="give one of them"):
        QuantConfig(act_quant_delay=3, act_quant_delay_epochs=1)


def test_the_ends_of_pact_have_a_regularisation_of_their_own() -> None:
    """λ · α is added to the gradient of α: without any other gradient α shrinks by lr · λ of itself a step."""
    net = nn.Dense(2, 2)
    net.clip, net.scale = LearnedScale("clip", decay=0.5), LearnedScale("scale")
    for scale in (net.clip, net.scale):
        scale.start(np.float32(4.0), 8)
    for decay in (0.0, 0.1):
        settings = TrainSection(opt="sgd", momentum=0.0, lr=0.1, scheduler="constant", weight_decay=decay)
        before = float(net.clip.value())
        optimizer = make_optimizer(net, settings, 10)
        optimizer(tuple(ops.zeros_like(parameter) for parameter in net.trainable_params()))
        assert float(net.clip.value()) == pytest.approx(before * (1 - 0.1 * 0.5), rel=1e-6)
