from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn
from networks import copied, error, images, randomized, work_of

from msqkd.errors import PlanError
from msqkd.graph.ir import Graph
from msqkd.quant.algorithms import rounding
from msqkd.quant.algorithms.base import Work
from msqkd.quant.algorithms.reconstruct import Reconstruct, blocks
from msqkd.quant.algorithms.rounding import roundable
from msqkd.quant.algorithms.stream import activation_cell

pytestmark = pytest.mark.usefixtures("graph_mode")


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, pad_mode="pad", has_bias=True)


class Block(nn.Cell):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2, self.relu = conv(inputs, outputs, stride), conv(outputs, outputs), nn.ReLU()
        same = inputs == outputs
        self.down = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride=stride, has_bias=True)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.relu(self.conv2(self.relu(self.conv1(x))) + self.down(x))


class Net(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = conv(2, 4), nn.ReLU()
        self.layer = nn.SequentialCell(Block(4, 4, 1), Block(4, 4, 1), Block(4, 6, 2))
        self.flatten, self.fc = nn.Flatten(), nn.Dense(6 * 3 * 3, 5)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.fc(self.flatten(self.layer(self.relu(self.conv(x)))))


class Small(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.SequentialCell(Block(4, 4, 1), Block(4, 4, 1))

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.layer(x)


class Made(rounding._Trainer):
    """Tells for which parts a training was compiled."""

    parts: ClassVar[list[str]] = []

    def __init__(self, work: Work, piece: Graph, part: rounding.Part, *more: Any) -> None:
        self.parts.append(part.name)
        super().__init__(work, piece, part, *more)


X = images(48, 2, 6, 6)
SMALL_X = images(96, 4, 6, 6)


@cache
def calibrated() -> Work:
    return work_of(randomized(Small(), 1), SMALL_X)


def small() -> Work:
    return copied(calibrated())


@pytest.fixture(scope="module")
def trained() -> tuple[Work, list[str]]:
    ms.set_context(mode=ms.GRAPH_MODE)
    work = small()
    return work, Reconstruct(iterations=300, lr=0.03).apply(work)


def test_blocks_are_those_between_a_split_and_a_sum() -> None:
    work = work_of(randomized(Net()), X)
    parts = blocks(work.graph, work.plan, roundable(work)[0])
    assert [(part.name, part.layers) for part in parts] == [
        ("conv", ["conv"]),
        ("layer.0", ["layer.0.conv1", "layer.0.conv2"]),
        ("layer.1", ["layer.1.conv1", "layer.1.conv2"]),
        ("layer.2", ["layer.2.conv1", "layer.2.conv2", "layer.2.down"]),
        ("fc", ["fc"]),
    ]
    for before, part in zip(parts, parts[1:4]):
        assert part.inputs == before.outputs
        assert part.nodes[-1].op == "ReLU"
        assert {node.op for node in part.nodes} == {"Conv2D", "ReLU", "Add"}


class Nested(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.outer, self.far = (nn.Dense(4, 4) for _ in range(4))

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.first(x)
        y = self.inner(x) + x
        return self.far(self.outer(y) + x) + x.mean(-1, keep_dims=True)


def test_of_nested_blocks_the_smaller_one_is_taken() -> None:
    work = work_of(randomized(Nested()), np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32))
    parts = blocks(work.graph, work.plan, roundable(work)[0])
    assert [part.layers for part in parts] == [["first"], ["inner"], ["outer"], ["far"]]
    assert [len(part.nodes) for part in parts] == [1, 2, 1, 1]


def test_weights_are_on_the_grid_of_their_scales_and_outputs_come_closer(trained: tuple[Work, list[str]]) -> None:
    work, told = trained
    for name, quant in work.plan.weights.items():
        weight = work.graph.params[work.graph.node(name).inputs[1]].data
        assert quant.scale is not None, name
        found = quant.qparams(weight).quantize(weight)
        np.testing.assert_array_equal(quant.qparams(weight).dequantize(found), weight)
        exact = np.clip(work.reference.params[work.graph.node(name).inputs[1]].data.T / quant.scale, -3, 3).T
        assert np.abs(found - exact).max() <= 1
    nearest, fresh = small(), images(64, 4, 6, 6, seed=9)
    assert error(work, SMALL_X) < 0.5 * error(nearest, SMALL_X)
    assert error(work, fresh) < 0.6 * error(nearest, fresh)
    assert told[0].startswith("roundings of 2 of 2 parts trained on 72 samples, judged on 24 others, which")


def test_scales_inside_blocks_are_trained_and_the_range_goes_with_them(trained: tuple[Work, list[str]]) -> None:
    work, _ = trained
    before = small().plan
    moved = [name for name, group in work.plan.groups.items() if group.scale is not None]
    inner = work.graph.consumers(work.graph.node("layer.0.conv1").output)[0].output
    assert work.plan.activations[inner].group in moved
    assert work.plan.activations[work.graph.inputs[0]].group not in moved
    for name, group in work.plan.groups.items():
        old, new = before.groups[name].qparams(), group.qparams()
        assert new.zero_point == old.zero_point
        if name in moved:
            assert new.scale != old.scale
            np.testing.assert_allclose(group.range, [float(new.lo), float(new.hi)], rtol=1e-6)
        else:
            assert (group.range, new.scale) == (before.groups[name].range, old.scale)


def test_blocks_that_look_alike_share_a_compilation_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "_Trainer", Made)
    Made.parts.clear()
    shared, apart = small(), small()
    Reconstruct(iterations=8, lr=0.2).apply(shared)
    assert Made.parts == ["layer.0"]
    monkeypatch.setattr(rounding, "_signature", lambda work, piece, part, whole: part.name)
    Reconstruct(iterations=8, lr=0.2).apply(apart)
    assert Made.parts == ["layer.0", "layer.0", "layer.1"]
    assert any((param.data != shared.reference.params[name].data).any() for name, param in shared.graph.params.items())
    for name, param in shared.graph.params.items():
        np.testing.assert_array_equal(apart.graph.params[name].data, param.data)
    assert apart.plan.ranges() == shared.plan.ranges()


class Activated(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.relu = nn.Dense(6, 6), nn.ReLU()

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.relu(self.fc(x))


def test_drop_and_seed_act() -> None:
    x = np.random.default_rng(0).normal(size=(256, 6)).astype(np.float32)
    found = []
    for drop, seed in ((0.5, 0), (0.5, 0), (0.5, 1), (0.0, 0)):
        work = work_of(randomized(Activated()), x)
        work.seed = seed
        Reconstruct(iterations=200, lr=0.05, drop=drop).apply(work)
        found.append([group.scale for group in work.plan.groups.values() if group.scale is not None])
    assert found[0]
    assert found[0] == found[1]
    assert found[0] != found[2]
    assert found[0] != found[3]


def test_a_share_of_values_is_dropped_in_training_alone() -> None:
    work = work_of(randomized(Activated()), np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32))
    value = work.graph.outputs[0]
    cell = rounding._Dropped(activation_cell(work.graph, work.plan, value), "value", 0.25)
    x = np.abs(np.random.default_rng(0).normal(size=(64, 50))).astype(np.float32)
    exact = work.plan.group_of(value).qparams().fake_quantize(x)
    np.testing.assert_array_equal(cell.set_train(False)(ms.Tensor(x)).asnumpy(), exact)
    cell.set_train(True)
    first, second = (cell(ms.Tensor(x)).asnumpy() for _ in range(2))
    assert ((first == exact) | (first == x)).all()
    assert abs((first != exact).mean() - 0.25) < 0.03
    assert (first != second).any()


@pytest.mark.parametrize("drop", [-0.1, 1.0])
def test_settings_out_of_range_are_refused(drop: float) -> None:
    with pytest.raises(PlanError, match=r"reconstruct.drop is .*allowed: 0 to below 1"):
        replace(Reconstruct(), drop=drop)
