"""The method `cluster`: its codebooks are the best there are, and what the network loses is made up for."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from mindspore import nn, ops
from networks import images, randomized, work_of

from msqkd.api import plan_network
from msqkd.errors import PlanError
from msqkd.quant.algorithms.adaround import AdaRound
from msqkd.quant.algorithms.base import Work
from msqkd.quant.algorithms.bias_correction import BiasCorrection
from msqkd.quant.algorithms.cluster import Cluster, best_codebook, moments_of, nearest
from msqkd.quant.algorithms.methods import improve
from msqkd.quant.algorithms.stream import Stream
from msqkd.quant.algorithms.weight_ranges import SequentialMSE
from msqkd.quant.config import QuantConfig, Rule, WeightQuantizer
from msqkd.quant.ptq import calibrate
from msqkd.quant.qat import deployment_graph


def cost(u: np.ndarray, a: np.ndarray, codebook: np.ndarray) -> float:
    return float((a * np.square(u[:, None] - np.asarray(codebook)).min(axis=1)).sum())


# -- the codebook ------------------------------------------------------------------------------------------------------
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_other_choice_of_integers_is_better(data: st.DataObject) -> None:
    top = data.draw(st.integers(1, 4))
    size = data.draw(st.integers(1, 10))
    # Multiples of ¼, also beyond the grid: bounds between clusters are met exactly
    u = data.draw(arrays(np.int64, size, elements=st.integers(-5 * top, 5 * top))) / 4
    a = data.draw(arrays(np.int64, size, elements=st.integers(1, 9))) / 4
    clusters = data.draw(st.integers(2, 2 * top + 1))
    codebook = best_codebook(moments_of(u, a, top), clusters)
    least = min(cost(u, a, np.array(choice)) for choice in combinations(range(-top, top + 1), clusters))
    assert cost(u, a, codebook) == pytest.approx(least, abs=1e-9)
    assert (np.diff(codebook) > 0).all()
    assert codebook.dtype == np.int32
    found = nearest(u, codebook)
    assert float((a * np.square(u - found)).sum()) == pytest.approx(least, abs=1e-9)
    assert set(found) <= set(codebook)


def lloyd(u: np.ndarray, a: np.ndarray, clusters: int, random: np.random.Generator) -> np.ndarray:
    """Integers that k-means ends at from a random start."""
    centres = np.sort(random.choice(np.arange(-127, 128), clusters, replace=False)).astype(float)
    for _ in range(100):
        owner = np.abs(u[:, None] - centres).argmin(axis=1)
        mass = np.bincount(owner, a, clusters)
        moved = np.where(mass > 0, np.bincount(owner, a * u, clusters) / np.maximum(mass, 1e-30), centres)
        if np.array_equal(np.rint(moved), np.rint(centres)):
            break
        centres = np.sort(moved)
    return np.rint(centres)


@pytest.mark.parametrize("clusters", [2, 5, 16])
def test_it_is_never_worse_than_k_means_from_many_starts(clusters: int) -> None:
    random = np.random.default_rng(clusters)
    u = np.clip(random.standard_t(3, 600) * 25, -127, 127)
    a = random.choice([0.01, 0.3, 4.0], 600)
    least = cost(u, a, best_codebook(moments_of(u, a, 127), clusters))
    tries = [cost(u, a, lloyd(u, a, clusters, random)) for _ in range(40)]
    assert least <= min(tries) + 1e-9
    assert least < np.median(tries), "k-means stops at worse ones too"


def test_as_many_clusters_as_integers_round_to_the_nearest() -> None:
    u = np.random.default_rng(0).normal(size=300) * 3
    np.testing.assert_array_equal(best_codebook(moments_of(u, np.ones_like(u), 7), 15), np.arange(-7, 8))
    np.testing.assert_array_equal(nearest(u, np.arange(-7, 8)), np.clip(np.rint(u), -7, 7))


# -- the method --------------------------------------------------------------------------------------------------------
class Net(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, stride=2, pad_mode="same", has_bias=True)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, pad_mode="pad", has_bias=True)
        self.relu, self.flatten, self.fc = nn.ReLU(), nn.Flatten(), nn.Dense(6 * 4 * 4, 5)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.fc(self.flatten(self.relu(self.conv2(self.relu(self.conv1(x))))))


X = images(32, 2, 8, 8)
LAYERS = ("conv1", "conv2", "fc")


def integers(work: Work, name: str) -> np.ndarray:
    """What the plan makes of the weight of a layer, which is on the grid already."""
    quant = work.plan.weights[name]
    data = quant.held_in(work.graph)
    qparams = quant.qparams(data)
    np.testing.assert_array_equal(qparams.fake_quantize(data), data)
    return qparams.quantize(data)


def float_error(work: Work, name: str) -> float:
    quant = work.plan.weights[name]
    exact = quant.held_in(work.reference).astype(np.float64)
    return float(np.square(quant.held_in(work.graph) - exact).sum() / np.square(exact).sum())


@pytest.mark.usefixtures("pynative_mode")
@pytest.mark.parametrize("per_channel", [True, False])
def test_every_layer_takes_its_best_integers(per_channel: bool) -> None:
    work = work_of(randomized(Net()), X, 8, per_channel=per_channel)
    scales = {name: quant.qparams(quant.held_in(work.graph)).scale for name, quant in work.plan.weights.items()}
    (told,) = Cluster(5).apply(work)
    assert told.startswith("weights of 3 layers take at most 5 integers each, before ")
    assert "indices of 3 bits and codebooks they take 3." in told
    for name in LAYERS:
        found, quant = integers(work, name), work.plan.weights[name]
        np.testing.assert_array_equal(quant.scale, scales[name])
        assert np.unique(found).size == 5
        exact = quant.held_in(work.reference).astype(np.float64)
        scale = np.broadcast_to(scales[name].reshape(-1, *[1] * (exact.ndim - 1)), exact.shape).astype(np.float64)
        u, a = (exact / scale).reshape(-1), np.square(scale).reshape(-1)
        reached = float(np.square(exact - scale * found).sum())
        random = np.random.default_rng(0)
        assert reached <= min(cost(u, a, lloyd(u, a, 5, random)) for _ in range(10)) * (1 + 1e-9)


@pytest.mark.usefixtures("pynative_mode")
def test_more_clusters_lose_less_and_all_of_them_nothing() -> None:
    errors = []
    for clusters in (2, 4, 16, 128):
        work = work_of(randomized(Net()), X, 8)
        Cluster(clusters).apply(work)
        errors.append([float_error(work, name) for name in LAYERS])
    assert (np.diff(errors, axis=0) <= 0).all()
    few = work_of(randomized(Net()), X, 4)
    before = {name: param.data for name, param in few.graph.params.items()}
    told = Cluster(16).apply(few)
    assert told[0] == "no weight has more integers than clusters: nothing to do"
    assert told[1] == "conv1: left as it is, its integers are 15 already"
    assert all(few.graph.params[name].data is data for name, data in before.items())


@pytest.mark.usefixtures("pynative_mode")
def test_one_codebook_for_all_layers_of_as_many_bits() -> None:
    rules = [Rule("path", "conv1", {"weight.quant_dtype": 6})]
    own, shared = (work_of(randomized(Net()), X, 8, rules=rules) for _ in range(2))
    Cluster(4).apply(own)
    (told,) = Cluster(4, shared=True).apply(shared)
    assert "take at most 4 integers in all of as many bits (2 codebooks), before" in told
    assert np.unique(np.concatenate([integers(shared, name).reshape(-1) for name in ("conv2", "fc")])).size == 4
    assert not np.array_equal(np.unique(integers(shared, "conv1")), np.unique(integers(shared, "fc")))
    assert float_error(shared, "conv1") == float_error(own, "conv1"), "the only one of its bits"
    # Neither layer is worse off than its own best, and together they are no worse than with the codebook of either.
    both = {name: float_error(shared, name) for name in ("conv2", "fc")}
    for name, reached in both.items():
        assert reached >= float_error(own, name)
    for name in both:
        book, total = np.unique(integers(own, name)), 0.0
        for other in both:
            quant = shared.plan.weights[other]
            exact = quant.held_in(shared.reference).astype(np.float64)
            scale = quant.scale.reshape(-1, *[1] * (exact.ndim - 1)).astype(np.float64)
            total += float(np.square(exact - scale * nearest(exact / scale, book)).sum() / np.square(exact).sum())
        assert sum(both.values()) <= total * (1 + 1e-9)


@pytest.mark.usefixtures("pynative_mode")
@pytest.mark.parametrize("kind", ["empirical", "analytic"])
def test_a_correction_of_biases_takes_out_what_it_leaves_in_the_mean(kind: str) -> None:
    clustered, corrected, unaware = (work_of(randomized(Net()), X, 8) for _ in range(3))
    for work in (clustered, corrected, unaware):
        Cluster(3).apply(work)
    # Compared with the clustered weights in float, there is nothing to take out.
    unaware.reference = unaware.graph.copy()
    for work in (corrected, unaware):
        BiasCorrection(kind).apply(work)
    unaware.reference = corrected.reference
    before, after, left = (mean_errors(work) for work in (clustered, corrected, unaware))
    for name in LAYERS if kind == "empirical" else ("conv1",):
        assert after[name] < 0.05 * before[name]
        assert left[name] > 0.5 * before[name]


def mean_errors(work: Work) -> dict[str, float]:
    """The squared errors of the layers' mean outputs, with weights alone quantised."""
    plan = replace(work.plan, activations={})
    streams = (Stream(work.graph, [(X,)], plan), Stream(work.reference, [(X,)]))
    values = [work.graph.node(name).output for name in LAYERS]
    errors = {}
    for stream in streams:
        stream.wanted = set(values)
        stream.compute(values)
    for name, value in zip(LAYERS, values):
        found, exact = (stream.held[0][value].mean(0) for stream in streams)
        errors[name] = float(np.square((found - exact).reshape(len(exact), -1).mean(1)).sum())
    return errors


@pytest.mark.usefixtures("pynative_mode")
def test_it_takes_the_ranges_that_were_searched_before() -> None:
    work = work_of(randomized(Net()), X, 8)
    start = work.graph.copy()

    def ranges(graph, plan):  # type: ignore[no-untyped-def]
        return calibrate(graph, plan, [X])

    methods = [SequentialMSE(candidates=5), Cluster(4), BiasCorrection()]
    found = improve(start, work.plan, methods, work.samples, ranges)
    assert list(found.told) == ["weight_ranges", "cluster", "bias_correction"]
    SequentialMSE(candidates=5).apply(work)
    for name, quant in found.plan.weights.items():
        searched = work.plan.weights[name]
        np.testing.assert_array_equal(quant.scale, searched.qparams(searched.held_in(work.graph)).scale)
        assert np.unique(quant.qparams(quant.held_in(found.graph)).quantize(quant.held_in(found.graph))).size == 4
    with pytest.raises(PlanError, match="'adaround' and 'cluster' choose the same integers; keep one"):
        improve(start, work.plan, [AdaRound(), Cluster()], work.samples, ranges)


class Tied(nn.Cell):
    """Two layers with one weight, a product that reads another's as it is, and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 8)
        self.first, self.second, self.third = nn.Dense(8, 8), nn.Dense(8, 8), nn.Dense(8, 8)
        self.second.weight = self.first.weight

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.third(self.second(self.first(self.table(x)))) + ops.mean(self.third.weight)


@pytest.mark.usefixtures("pynative_mode")
def test_a_shared_weight_is_clustered_once_and_one_that_is_read_in_float_stays() -> None:
    ids = np.random.default_rng(0).integers(0, 30, (4, 5)).astype(np.int32)
    config = QuantConfig(WeightQuantizer(8, per_channel=True), precision="weight-only")
    captured, plan = plan_network(randomized(Tied()), (ms.Tensor(ids),), config)
    graph = deployment_graph(captured)
    work = Work(graph.copy(), plan, lambda: iter([(ids,)]))
    told = Cluster(6).apply(work)
    assert told[1:] == ["third: left as it is, its weight is also read as it is, in float"]
    assert told[0].startswith("weights of 3 layers take at most 6 integers each")
    for name in ("table", "first", "second"):
        assert np.unique(integers(work, name)).size == 6
    np.testing.assert_array_equal(work.plan.weights["first"].scale, work.plan.weights["second"].scale)
    assert work.plan.weights["third"].scale is None
    # Not where the two readers have scales of their own
    other = Work(graph.copy(), plan, lambda: iter([(ids,)]))
    other.plan.weights["second"] = replace(plan.weights["second"], scale=np.full(8, 0.01, np.float32))
    assert "first, second: left as it is, they quantise one weight by different scales" in Cluster(6).apply(other)


@pytest.mark.parametrize("clusters", [1, 129])
def test_settings_out_of_range_are_refused(clusters: int) -> None:
    with pytest.raises(PlanError, match=f"cluster.clusters is {clusters}; allowed: 2 to 128"):
        Cluster(clusters)
