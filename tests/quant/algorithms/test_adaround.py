from __future__ import annotations

from itertools import product
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn
from networks import error, images, randomized, work_of

from msqkd.errors import PlanError
from msqkd.graph.ir import Graph
from msqkd.quant.algorithms import rounding
from msqkd.quant.algorithms.adaround import AdaRound
from msqkd.quant.algorithms.base import Work
from msqkd.quant.algorithms.stream import Stream
from msqkd.quant.config import Rule
from msqkd.quant.integers import int8_weight

pytestmark = pytest.mark.usefixtures("graph_mode")


class Net(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1, pad_mode="pad", has_bias=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, pad_mode="pad", has_bias=True)
        self.relu, self.flatten, self.fc = nn.ReLU(), nn.Flatten(), nn.Dense(4 * 6 * 6, 5)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.fc(self.flatten(self.relu(self.conv2(self.relu(self.conv1(x))))))


class Twins(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(2, 2, 3, padding=1, pad_mode="pad", has_bias=True) for _ in range(2))
        self.relu, self.flatten, self.fc = nn.ReLU(), nn.Flatten(), nn.Dense(2 * 6 * 6, 5)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.fc(self.flatten(self.relu(self.conv2(self.relu(self.conv1(x))))))


X = images(48, 2, 6, 6)


def integers(work: Work) -> dict[str, np.ndarray]:
    found = {}
    for name, quant in work.plan.weights.items():
        weight = work.graph.params[work.graph.node(name).inputs[quant.index]].data
        found[name] = quant.qparams(weight).quantize(weight)
    return found


@pytest.fixture(scope="module")
def trained() -> tuple[Work, list[str]]:
    ms.set_context(mode=ms.GRAPH_MODE)
    work = work_of(randomized(Net()), X)
    return work, AdaRound(iterations=150, lr=0.05).apply(work)


def test_ordinary_rounding_gives_the_trained_integers(trained: tuple[Work, list[str]]) -> None:
    work, _ = trained
    nearest = integers(work_of(randomized(Net()), X))
    for name, quant in work.plan.weights.items():
        weight = work.graph.params[work.graph.node(name).inputs[1]].data
        assert quant.scale is not None
        qparams = quant.qparams(weight)
        found = qparams.quantize(weight)
        assert weight.dtype == np.float32
        np.testing.assert_array_equal(qparams.dequantize(found), weight)
        bias = work.graph.params[work.graph.node(name).inputs[2]].data
        np.testing.assert_array_equal(int8_weight(quant, weight, bias, 0.02, 0.05)[0], found)
        assert np.abs(found).max() == 3
        assert np.abs(found - nearest[name]).max() == 1, "some are rounded to the other side, none beyond it"
        exact = np.clip(work.reference.params[work.graph.node(name).inputs[1]].data.T / quant.scale, -3, 3).T
        assert np.abs(found - exact).max() <= 1


def test_outputs_come_closer_than_with_nearest_roundings(trained: tuple[Work, list[str]]) -> None:
    work, told = trained
    nearest = work_of(randomized(Net()), X)
    fresh = images(64, 2, 6, 6, seed=9)
    assert error(work, X) < 0.5 * error(nearest, X)
    assert error(work, fresh) < 0.6 * error(nearest, fresh)
    assert told[0].startswith("roundings of 3 of 3 parts trained on 36 samples, judged on 12 others, which")


def test_layers_that_look_alike_share_a_compilation_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    class Counted(rounding._Trainer):
        def __init__(self, work: Work, piece: Graph, part: rounding.Part, *more: Any) -> None:
            made.append(part.name)
            super().__init__(work, piece, part, *more)

    monkeypatch.setattr(rounding, "_Trainer", Counted)
    shared, apart = (work_of(randomized(Twins()), X) for _ in range(2))
    AdaRound(iterations=15, lr=0.2).apply(shared)
    assert made == ["conv1", "fc"]
    monkeypatch.setattr(rounding, "_signature", lambda work, piece, part, whole: part.name)
    AdaRound(iterations=15, lr=0.2).apply(apart)
    assert made[2:] == ["conv1", "conv2", "fc"]
    changed = [name for name, quant in shared.plan.weights.items() if quant.scale is not None]
    assert "conv2" in changed
    for name, found in integers(shared).items():
        np.testing.assert_array_equal(found, integers(apart)[name])


class Dense(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Dense(8, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.fc(x)


@pytest.mark.parametrize("bits", [3, 8])
def test_roundings_of_a_small_layer_are_all_but_the_best_of_all(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best for the samples that are trained on, so these decide too."""
    monkeypatch.setattr(rounding, "_held_out", lambda samples, seed: (np.arange(samples), np.arange(samples)))
    random = np.random.default_rng(2)
    x = (random.normal(size=(64, 8)) @ random.normal(size=(8, 8)) + 1).astype(np.float32)
    work = work_of(randomized(Dense()), x, bits)
    scale = work.plan.weights["fc"].qparams(work.graph.params["fc.weight"].data).scale[:, None]
    weight = work.reference.params["fc.weight"].data
    arriving = np.concatenate(Stream(work.graph, work.samples(), work.plan).arriving(work.graph.node("fc"), 0))
    target = x @ weight.T
    top = 2 ** (bits - 1) - 1
    best, nearest = 0.0, 0.0
    for channel, row in enumerate(weight):
        floor = np.floor(row / scale[channel])
        choices = np.clip(floor + np.array(list(product((0, 1), repeat=8))), -top, top) * scale[channel]
        best += np.square(arriving @ choices.T - target[:, [channel]]).mean(0).min()
        rounded = np.clip(np.rint(row / scale[channel]), -top, top) * scale[channel]
        nearest += np.square(arriving @ rounded - target[:, channel]).mean()
    AdaRound(iterations=400, lr=0.03).apply(work)
    found = np.square(arriving @ work.graph.params["fc.weight"].data.T - target).mean(0).sum()
    assert best * 0.999 <= found < best + 0.5 * (nearest - best)


def test_layers_that_only_store_integers_are_rounded_too() -> None:
    rules = [Rule("op", "Dense", {"precision": "dynamic"})]
    x = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32) @ np.random.default_rng(1).normal(size=(8, 8))
    x = x.astype(np.float32)
    work, nearest = (work_of(randomized(Dense()), x, 4, rules=rules) for _ in range(2))
    assert work.plan.dynamic
    AdaRound(iterations=200, lr=0.05).apply(work)
    assert work.plan.weights["fc"].scale is not None
    assert error(work, x) < 0.7 * error(nearest, x)


def test_where_training_finds_nothing_better_the_nearest_rounding_stays() -> None:
    work = work_of(randomized(Dense()), np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32))
    before = work.graph.params["fc.weight"].data
    told = AdaRound(iterations=1).apply(work)
    assert told[1] == "fc: rounded to the nearest, training found nothing better"
    assert work.graph.params["fc.weight"].data is before
    assert work.plan.weights["fc"].scale is None


def trained_only(monkeypatch: pytest.MonkeyPatch, indices: np.ndarray) -> None:
    """Hold out all other samples."""
    others = np.setdiff1d(np.arange(48), indices)
    monkeypatch.setattr(rounding, "_held_out", lambda samples, seed: (indices, others))


def test_samples_that_were_not_trained_on_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kinds of samples, which want a weight rounded to opposite sides."""
    x = np.zeros((48, 8), np.float32)
    x[:24, :2], x[24:, :2] = [1, 1], [1, -1]
    x *= np.random.default_rng(0).uniform(0.5, 1, (48, 1)).astype(np.float32)
    net = Dense()
    weight = np.tile([3, -3, 0, 0, 0, 0, 0, 0], (3, 1)).astype(np.float32)
    weight[:, :2] += [0.4, 0.4]
    weight[:, 7] = 7
    net.fc.weight.set_data(ms.Tensor(weight / 7))
    for alike in (True, False):
        work = work_of(net, x, 4)
        trained_only(monkeypatch, np.arange(0, 48, 2) if alike else np.arange(24))
        told = AdaRound(iterations=200, lr=0.05).apply(work)
        before, after = (error(found, x) for found in (work_of(net, x, 4), work))
        assert after <= before * (1 + 1e-6)
        if not alike:
            assert told[1:] == ["fc: rounded to the nearest, training found nothing better"]
            assert work.plan.weights["fc"].scale is None


def test_which_samples_are_held_out() -> None:
    counts = {samples: len(rounding._held_out(samples, 0)[1]) for samples in (4, 60, 200, 800, 10_000)}
    assert counts == {4: 1, 60: 15, 200: 32, 800: 100, 10_000: 512}
    trained, judged = rounding._held_out(100, 3)
    assert sorted([*trained, *judged]) == list(range(100))
    assert not np.array_equal(judged, rounding._held_out(100, 4)[1])
    told = AdaRound(iterations=5).apply(work_of(randomized(Net()), images(3, 2, 6, 6)))
    assert "trained on 3 samples, judged on the same" in told[0]


@pytest.mark.parametrize(
    "settings",
    [{"iterations": 0}, {"batch_size": 0}, {"lr": 0}, {"warmup": 1.0}, {"beta": (2, 20)}, {"reg": -1}],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(PlanError, match=f"adaround.{next(iter(settings))} is .*allowed"):
        AdaRound(**settings)  # type: ignore[arg-type]
