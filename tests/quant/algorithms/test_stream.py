from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn
from networks import images, randomized, work_of

from msqkd.errors import DataError
from msqkd.graph.cell import to_cell
from msqkd.quant.algorithms.stream import Stream, samples_that_fit
from msqkd.quant.config import Rule
from msqkd.quant.fake_quant import QUANTIZE
from msqkd.quant.qat import quantize_cell

pytestmark = pytest.mark.usefixtures("pynative_mode")


class Net(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 3, 3, has_bias=True), nn.Conv2d(3, 3, 3, has_bias=True)
        self.relu, self.pool, self.flatten = nn.ReLU(), nn.MaxPool2d(2, 2), nn.Flatten()
        self.middle, self.fc = nn.Dense(3 * 3 * 3, 6), nn.Dense(6, 4)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.relu(self.conv1(x))
        x = self.pool(self.relu(self.conv2(x)) + x)
        return self.fc(self.relu(self.middle(self.flatten(x))))


X = images(40, 2, 6, 6)
RULES = {
    "all int8": [],
    "one float, one dynamic": [
        Rule("path", "conv2", {"precision": "float"}),
        Rule("path", "fc", {"precision": "dynamic"}),
    ],
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_values_are_those_of_the_whole_network_bit_for_bit(rules: list[Rule]) -> None:
    work = work_of(randomized(Net()), X, rules=rules, observer="mse")
    whole = quantize_cell(work.graph, work.plan)
    whole.set_phase(QUANTIZE)
    batches = list(work.samples())
    stream = Stream(work.graph, batches, work.plan)
    for name in ("conv1", "conv2", "middle", "fc"):  # piece by piece
        stream.arriving(work.graph.node(name), 0)
    exact, plain = Stream(work.graph, batches), to_cell(work.graph)
    (output,) = work.graph.outputs
    for (batch,), found, other in zip(batches, stream.values(output), exact.values(output)):
        np.testing.assert_array_equal(found, whole(ms.Tensor(batch)).asnumpy())
        np.testing.assert_array_equal(other, plain(ms.Tensor(batch)).asnumpy())


def test_what_arrives_is_on_the_grid_of_the_place_that_reads_it() -> None:
    work = work_of(randomized(Net()), X, rules=RULES["one float, one dynamic"])
    stream = Stream(work.graph, work.samples(), work.plan)
    middle, last = work.graph.node("middle"), work.graph.node("fc")
    x = np.concatenate(stream.arriving(middle, 0))
    np.testing.assert_array_equal(work.plan.group_of(middle.inputs[0]).qparams().fake_quantize(x), x)
    raw = np.concatenate(stream.values(last.inputs[0]))
    rows = np.concatenate(stream.arriving(last, 0))
    assert (rows != raw).any()
    assert max(len(np.unique(row)) for row in rows) <= 6
    np.testing.assert_allclose(rows, raw, atol=float(raw.max()) / 127)


def test_only_what_is_needed_later_or_wanted_is_held() -> None:
    work = work_of(randomized(Net()), X)
    stream = Stream(work.graph, work.samples(), work.plan)
    first, second, last = (work.graph.node(name) for name in ("conv1", "conv2", "fc"))
    stream.wanted = {second.inputs[0]}
    stream.arriving(second, 0)
    assert set(stream.held[0]) == {second.inputs[0]}, "the input of the network has no reader left"
    stream.arriving(last, 0)
    assert set(stream.held[0]) == {second.inputs[0], last.inputs[0]}
    assert [node.name for node in stream.left] == ["fc"]
    assert first.inputs[0] not in stream.held[0]


def test_as_many_samples_are_taken_as_fit() -> None:
    work = work_of(randomized(Net()), X)
    # A sample's largest sum of values held: conv2's result, that of its ReLU, and the other operand of the sum.
    most = 4 * 3 * 3 * 6 * 6
    found = samples_that_fit(work.graph, work.samples, memory=20 * most)
    assert [len(batch[0]) for batch in found] == [16, 4]
    np.testing.assert_array_equal(np.concatenate([batch[0] for batch in found]), X[:20])
    assert sum(len(batch[0]) for batch in samples_that_fit(work.graph, work.samples)) == 40
    assert sum(len(batch[0]) for batch in samples_that_fit(work.graph, work.samples, memory=1)) == 1
    with pytest.raises(DataError, match="0 samples"):
        samples_that_fit(work.graph, lambda: iter(()))
