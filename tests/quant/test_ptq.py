from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import dataset as ds
from mindspore import nn

from msqkd.api import create_ptq_network, plan_network, quantize
from msqkd.errors import DataError, MsqkdError, PlanError
from msqkd.graph.cell import Hooks, to_cell
from msqkd.graph.ir import Graph
from msqkd.quant.algorithms.bias_correction import BiasCorrection
from msqkd.quant.config import QuantConfig
from msqkd.quant.fake_quant import QUANTIZE
from msqkd.quant.observers import Magnitudes
from msqkd.quant.plan import QuantPlan
from msqkd.quant.ptq import batches_of, calibrate, divergence, in_random_order, relative_error
from msqkd.quant.qat import deployment_graph, quantize_cell

pytestmark = pytest.mark.usefixtures("pynative_mode")


class Net(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.pool = nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2, 2)
        self.flatten, self.fc = nn.Flatten(), nn.Dense(3 * 3 * 3, 4)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.fc(self.flatten(self.pool(self.relu(self.conv(x)))))


X = np.random.default_rng(0).normal(size=(60, 1, 6, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def planned() -> tuple[Graph, QuantPlan]:
    ms.set_seed(3)
    graph, plan = plan_network(Net(), (1, 6, 6), QuantConfig(act_observer="minmax"))
    return deployment_graph(graph), plan


def batched(size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(X), size):
        yield X[start : start + size]


def test_minmax_ranges_are_those_of_the_network_with_quantised_weights(planned: tuple[Graph, QuantPlan]) -> None:
    graph, plan = planned
    found = calibrate(graph, plan, [X]).ranges()
    weights = quantize_cell(graph, plan, observe=list(plan.groups))
    values = weights(ms.Tensor(X))[1:]
    assert set(found) == set(plan.groups)
    for name, value in zip(plan.groups, values):
        assert found[name] == (value.asnumpy().min(), value.asnumpy().max())
    plain = to_cell(graph, Hooks(observe=list(plan.groups)))(ms.Tensor(X))[1:]
    assert any(not np.array_equal(a.asnumpy(), b.asnumpy()) for a, b in zip(plain, values))


def test_ranges_do_not_depend_on_the_batch_size(planned: tuple[Graph, QuantPlan]) -> None:
    whole = calibrate(*planned, [X]).ranges()
    for size in (1, 7, 30):
        found = calibrate(*planned, batched(size)).ranges()
        for name, span in whole.items():
            np.testing.assert_allclose(found[name], span, rtol=1e-5, atol=1e-6)


def test_one_batch_at_a_time_is_held(planned: tuple[Graph, QuantPlan]) -> None:
    alive: list[weakref.ref] = []
    most = 0

    def watched() -> Iterator[np.ndarray]:
        nonlocal most
        for _ in range(8):
            batch = X[:10].copy()
            alive.append(weakref.ref(batch))
            yield batch
            del batch
            gc.collect()
            most = max(most, sum(ref() is not None for ref in alive))

    calibrate(*planned, watched())
    assert len(alive) == 8
    assert most <= 1


def test_iterations_end_it_early_and_read_no_further(planned: tuple[Graph, QuantPlan]) -> None:
    done: list[int] = []
    source = batched(10)
    found = calibrate(*planned, source, iterations=2, progress=done.append).ranges()
    assert done == [1, 2]
    assert found == calibrate(*planned, [X[:10], X[10:20]]).ranges()
    np.testing.assert_array_equal(next(source), X[20:30])


@pytest.mark.parametrize("dataset", [[], iter(())])
def test_no_samples(planned: tuple[Graph, QuantPlan], dataset: Any) -> None:
    with pytest.raises(DataError, match="the calibration set has 0 samples; give at least one batch"):
        calibrate(*planned, dataset)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_named(planned: tuple[Graph, QuantPlan], bad: float) -> None:
    graph, plan = planned
    broken = X[:4].copy()
    broken[2, 0, 1, 1] = bad
    with pytest.raises(MsqkdError) as caught:
        calibrate(graph, plan, [broken])
    assert f"value '{graph.inputs[0]}'" in str(caught.value)
    assert "finite" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_observer_overrides_those_of_the_plan(planned: tuple[Graph, QuantPlan]) -> None:
    graph, plan = planned
    whole = calibrate(graph, plan, [X]).ranges()
    inner = calibrate(graph, plan, [X], observer="percentile", percentile=95.0).ranges()
    name = graph.inputs[0]
    assert whole[name][0] < inner[name][0] < 0 < inner[name][1] < whole[name][1]
    assert {g.observer for g in plan.groups.values()} == {"minmax"}
    with pytest.raises(PlanError, match="did you mean 'percentile'"):
        calibrate(graph, plan, [X], observer="percntile")


def test_the_plan_given_is_not_changed(planned: tuple[Graph, QuantPlan]) -> None:
    graph, plan = planned
    calibrate(graph, plan, [X])
    assert plan.ranges() == {}


@pytest.mark.parametrize("kind", ["uint8", "int32", "bool"])
def test_integers_for_a_float_input_are_refused(planned: tuple[Graph, QuantPlan], kind: str) -> None:
    """As a recipe refuses them: pixels that were not normalised would give ranges of another network."""
    graph, plan = planned
    pixels = (np.abs(X) * 50).astype(kind)
    with pytest.raises(DataError, match=f"the array for input 'x' is {kind}, the network takes float32"):
        calibrate(graph, plan, [pixels])
    with pytest.raises(DataError, match=f"is {kind}"):
        quantize(create_ptq_network(Net(), calib_dataset=[pixels], example_input=(1, 6, 6)))
    if kind == "uint8":
        with pytest.raises(DataError, match="the first array of calib_dataset is uint8"):
            create_ptq_network(Net(), calib_dataset=[pixels])


def test_what_an_integer_input_takes() -> None:
    ids = np.random.default_rng(0).integers(0, 9, (4, 3))
    net = nn.SequentialCell(nn.Embedding(9, 4), nn.Flatten(), nn.Dense(12, 2))
    example = (ms.Tensor(ids.astype(np.int32)),)
    ranges = [
        quantize(create_ptq_network(net, calib_dataset=[ids.astype(kind)], example_input=example)).ranges()
        for kind in ("int32", "int64", "uint8")
    ]
    assert ranges[0] == ranges[1] == ranges[2]
    with pytest.raises(DataError, match="is float32, the network takes int32"):
        quantize(create_ptq_network(net, calib_dataset=[ids.astype(np.float32)], example_input=example))


def test_what_a_dataset_may_be() -> None:
    first = X[:2]
    forms: list[Any] = [
        [first],
        [(first, np.zeros(2))],
        [[first, np.zeros(2)]],
        [{"image": first, "label": np.zeros(2)}],
        [ms.Tensor(first)],
        [first.tolist()],
        [first.astype(np.float64)],
        ds.NumpySlicesDataset({"image": first, "label": np.zeros(2)}, shuffle=False).batch(2),
    ]
    for form in forms[:2] + forms[3:5] + forms[6:]:
        ((batch,),) = batches_of(form)
        assert batch.dtype == np.float32
        np.testing.assert_array_equal(batch, first)


def test_ptq_through_the_api() -> None:
    ms.set_seed(3)
    net = Net()
    cell = quantize(create_ptq_network(net, QuantConfig(act_observer="minmax"), [X]))
    net.set_train(False)
    reference = net(ms.Tensor(X)).asnumpy()
    found = cell(ms.Tensor(X)).asnumpy()
    assert 0 < np.abs(found - reference).max() < 0.05 * np.abs(reference).max()
    assert {q.phase_of_quant for q in cell.quantizers.values()} == {QUANTIZE}
    again = quantize(create_ptq_network(cell, calib_dataset=[X[:10]], calib_iteration=1))
    assert again.ranges() != cell.ranges()


def test_ptq_api_refusals() -> None:
    net = Net()
    with pytest.raises(DataError, match="needs calib_dataset"):
        quantize(create_ptq_network(net, example_input=(1, 6, 6)))
    with pytest.raises(DataError, match="needs example_input"):
        create_ptq_network(net)
    with pytest.raises(DataError, match="0 samples"):
        create_ptq_network(net, calib_dataset=[])
    with pytest.raises(PlanError, match="calib_iteration is 0"):
        create_ptq_network(net, calib_dataset=[X], calib_iteration=0)
    cell = quantize(create_ptq_network(net, calib_dataset=[X]))
    with pytest.raises(PlanError, match="already has its quantisation plan"):
        create_ptq_network(cell, QuantConfig())


def test_divergence_is_the_mean_kl_of_the_answers() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(5, 4)), rng.normal(size=(5, 4))
    p, q = (np.exp(v) / np.exp(v).sum(-1, keepdims=True) for v in (other, one))
    assert divergence(one, other) == pytest.approx((p * np.log(p / q)).sum(-1).mean())
    assert divergence(one, one) == 0
    assert np.isfinite(divergence(one * 1e4, other))


def test_a_network_of_several_inputs_takes_the_first_arrays_of_an_item() -> None:
    ids, weight, labels = np.arange(6).reshape(3, 2), np.ones((3, 1)), np.zeros(3)
    ((first, second),) = batches_of([(ids, weight, labels)], 2)
    np.testing.assert_array_equal(first, ids)
    assert (first.dtype, second.dtype) == (ids.dtype, np.float32)
    with pytest.raises(DataError, match="an item of the calibration set has 2 arrays; the network has 3 inputs"):
        list(batches_of([(ids, weight)], 3))


def test_relative_error_is_the_mean_over_outputs() -> None:
    one, other = np.array([3.0, 4.0]), np.array([1.0, 1.0])
    assert relative_error([one * 1.1, other], [one, other]) == pytest.approx(0.05)
    assert relative_error([one], [one * 0]) == 1.0


class Spread(nn.Cell):
    """Some results of the first layer are far larger than the others, in few samples; another is all zeros."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.first, self.dead, self.last = nn.Dense(4, 8), nn.Dense(4, 8), nn.Dense(8, 3)
        self.factor = factor
        self.dead.weight.set_data(ms.Tensor(np.zeros((8, 4), np.float32)))
        self.dead.bias.set_data(ms.Tensor(np.zeros(8, np.float32)))

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.last(self.first(x) + self.dead(x))


@pytest.mark.parametrize("observer", ["minmax", "mse", "percentile"])
@pytest.mark.parametrize(("factor", "warned"), [(1.0, False), (20.0, False), (4000.0, True)])
def test_a_range_far_wider_than_its_values_is_a_warning(observer: str, factor: float, warned: bool) -> None:
    x = np.random.default_rng(1).normal(size=(2000, 4)).astype(np.float32)
    x[77] *= factor  # half a thousandth of the values
    net = Spread(factor)
    plan = plan_network(net, (4,), QuantConfig(act_observer=observer, act_percentile=99.0))[1]
    graph = deployment_graph(plan_network(net, (4,))[0])
    found = calibrate(graph, plan, [x[:700], x[700:]])
    expected = warned and observer != "percentile"  # which leaves the outliers out
    named = [text for text in found.warnings if "first" in text]
    assert bool(named) == expected, found.warnings
    assert not [text for text in found.warnings if "dead" in text]
    assert plan.warnings == [text for text in found.warnings if "its range is" not in text]
    if expected:
        assert "the result of first (Dense): its range is [" in named[0]
        assert "percentile" in named[0]
        assert "precision float" in named[0]
        with pytest.warns(UserWarning, match="the result of first"):
            cell = quantize(create_ptq_network(net, QuantConfig(act_observer=observer), [x], example_input=(4,)))
        assert named[0].split(",")[0] in " ".join(cell.plan.warnings)


def test_magnitudes_are_counted_in_powers_of_two() -> None:
    values = np.random.default_rng(0).standard_t(3, 300_000).astype(np.float32)
    magnitudes = Magnitudes()
    assert magnitudes.quantile(0.5) == 0
    magnitudes.update(np.zeros((3, 4), np.float32))
    assert magnitudes.quantile(0.5) == 0
    for part in np.split(values, 3):
        magnitudes.update(part.reshape(100, -1))
    for share in (0.1, 0.5, 0.99, 0.999):
        exact = np.quantile(np.abs(values), share)
        assert exact * 0.9 <= magnitudes.quantile(share) <= 2.2 * exact


class Sequence(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(20, 4), nn.Dense(4, 4)

    def construct(self, ids, mask):  # type: ignore[no-untyped-def]
        heads = self.fc(self.table(ids)).view(ids.shape[0], ids.shape[1], 2, 2)
        return (heads * mask.astype(ms.float32).view(mask.shape[0], mask.shape[1], 1, 1)).sum((1, 3))


def test_samples_of_another_length_are_refused() -> None:
    long, short = (np.random.default_rng(0).integers(0, 20, (8, n)).astype(np.int32) for n in (16, 8))
    example = tuple(map(ms.Tensor, (long, np.ones_like(long))))

    def prepared(*batches: np.ndarray, methods: Any = ()) -> Any:
        samples = [(batch, np.ones_like(batch)) for batch in batches]
        return create_ptq_network(Sequence(), calib_dataset=samples, example_input=example, methods=methods)

    for methods in ((), [BiasCorrection()]):
        with pytest.raises(DataError, match=r"batch 2 of the calibration set: input 'ids' has shape \(8, 8\); .*N, 16"):
            quantize(prepared(long, short, methods=methods))
    cell = quantize(prepared(long, long[:3]))
    assert cell(*example).shape == (8, 2)
    assert cell(*(value[:3] for value in example)).shape == (3, 2)
    with pytest.raises(DataError, match=r"the batch: input 'ids' has shape \(8, 8\); .*\(N, 16\)"):
        cell(ms.Tensor(short), ms.Tensor(np.ones_like(short)))
    with pytest.raises(DataError, match=r"input 'mask' has shape \(8, 8\)"):
        cell(example[0], ms.Tensor(np.ones_like(short)))
    with pytest.raises(DataError, match=r"input 'ids' has shape \(16,\)"):
        cell(example[0][0], example[1][0])


def test_the_samples_of_methods_come_in_a_random_order() -> None:
    batches = [(np.full((count, 2), start, np.int32) + np.arange(count)[:, None], np.arange(start, start + count))
               for start, count in ((0, 7), (7, 7), (14, 3))]  # fmt: skip
    found = in_random_order(batches, seed=0)
    assert [len(batch[0]) for batch in found] == [7, 7, 3]
    order = np.concatenate([numbers for _, numbers in found])
    assert sorted(order) == list(range(17))
    assert max(order[:7]) >= 7
    np.testing.assert_array_equal(np.concatenate([rows for rows, _ in found])[:, 1], order)
