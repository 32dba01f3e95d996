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
from msqkd.quant.config import QuantConfig
from msqkd.quant.fake_quant import QUANTIZE
from msqkd.quant.plan import QuantPlan
from msqkd.quant.ptq import batches_of, calibrate, divergence, relative_error
from msqkd.quant.qat import deployment_graph, quantize_cell

pytestmark = pytest.mark.usefixtures("graph_mode")


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
