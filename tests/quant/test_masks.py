"""Additive attention masks are computed in float, from where they meet the scores to the softmax."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, nn, ops

from msqkd.api import create_ptq_network, plan_network, quantize
from msqkd.graph.cell import to_cell
from msqkd.quant.config import QuantConfig, WeightQuantizer

pytestmark = pytest.mark.usefixtures("pynative_mode")

RANDOM = np.random.default_rng(3)
X = RANDOM.normal(size=(4, 6, 8)).astype(np.float32)
ROW = (np.arange(6)[None] < np.array([[6], [4], [2], [1]])).astype(np.float32)
WHOLE = np.repeat(ROW[:, None], 6, 1)
CAUSAL = np.tril(np.ones((6, 6), np.float32))
CONFIG = QuantConfig(WeightQuantizer(per_channel=True), act_observer="minmax")


class Attention(nn.Cell):
    """One head; `masked` puts the mask into the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Dense(8, 8) for _ in range(4))

    def construct(self, x, mask):  # type: ignore[no-untyped-def]
        scores = self.masked(ops.matmul(self.q(x), self.k(x).swapaxes(1, 2)), mask)
        return self.out(ops.matmul(ops.softmax(scores, -1), self.v(x)))


class Computed(Attention):
    def masked(self, scores, mask):  # type: ignore[no-untyped-def]
        return scores * 0.35 + (1.0 - mask) * -10000.0


class Subtracted(Attention):
    def masked(self, scores, mask):  # type: ignore[no-untyped-def]
        return scores * 0.35 - (1.0 - mask) * 65504.0


class Given(Attention):
    def masked(self, scores, mask):  # type: ignore[no-untyped-def]
        return scores * 0.35 + mask


class Chosen(Attention):
    def masked(self, scores, mask):  # type: ignore[no-untyped-def]
        return scores + ops.select(mask > 0.5, ops.zeros_like(mask), ops.full_like(mask, -1e9))


class Scaled(Attention):
    def masked(self, scores, mask):  # type: ignore[no-untyped-def]
        return ((scores + (1.0 - mask) * -1e6) * 0.35).reshape(scores.shape)


class Added(Attention):
    """Two masks, and a bias that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.position = Parameter(ms.Tensor(RANDOM.normal(size=(1, 6, 6)).astype(np.float32)))

    def masked(self, scores, mask):  # type: ignore[no-untyped-def]
        return scores * 0.35 + self.position + (1.0 - mask) * -10000.0 + mask


class Constant(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.causal = ms.Tensor((1 - CAUSAL) * -1e9)

    def masked(self, scores, mask):  # type: ignore[no-untyped-def]
        return (scores + self.causal) * 0.35 + mask


class Held(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.causal = Parameter(ms.Tensor(np.repeat((1 - CAUSAL)[None] * -3e4, 4, 0)), requires_grad=False)

    def masked(self, scores, mask):  # type: ignore[no-untyped-def]
        return ops.tile(self.causal, (1, 1, 1)) + scores * 0.35 + 0.0 * mask


def filled(net: nn.Cell) -> nn.Cell:
    random = np.random.default_rng(9)
    for parameter in net.get_parameters():
        if parameter.requires_grad:
            spread = np.sqrt(max(1, int(np.prod(parameter.shape[1:]))))
            parameter.set_data(ms.Tensor((random.normal(size=parameter.shape) / spread).astype(np.float32)))
    return net.set_train(False)


MASKS = {Given: (1 - WHOLE) * np.float32(-10000), Constant: np.zeros_like(WHOLE)}


@pytest.mark.parametrize("kind", [Computed, Subtracted, Given, Chosen, Scaled, Added, Constant, Held])
def test_scores_survive_a_mask(kind: type[Attention]) -> None:
    net, mask = filled(kind()), MASKS.get(kind, WHOLE).astype(np.float32)
    example = (ms.Tensor(X), ms.Tensor(mask))
    expected = net(*example).asnumpy()
    cell = quantize(create_ptq_network(net, CONFIG, [(X, mask)], example_input=example))
    found = cell(*example).asnumpy()
    assert 10 * np.log10(np.square(expected).sum() / np.square(found - expected).sum()) > 25
    for target in ("lite_arm", "ascend"):
        graph, plan = plan_network(net, example, CONFIG, target=target)
        softmax = next(node for node in plan.nodes if node.op == "Softmax")
        assert "attention mask" in softmax.reason
        assert softmax.precision == "float"
        sums = [node for node in plan.nodes if node.op in ("Add", "Sub") and "attention mask" in node.reason]
        assert sums, "where it meets the scores"
        assert not {graph.node(node.name).output for node in sums} & set(plan.activations)
    assert all(cell.plan.node(node.name).precision == "int8" for node in cell.plan.nodes if node.op == "BatchMatMul")


class Biased(Attention):
    """A bias of positions is learned and small; a limit is no mask."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Dense(8, 6)

    def masked(self, scores, mask):  # type: ignore[no-untyped-def]
        return ops.minimum(scores * 0.35 + self.bias(mask), ms.Tensor(1e4, ms.float32))


def test_other_sums_before_a_softmax_stay_int8() -> None:
    example = (ms.Tensor(X), ms.Tensor(X))
    _, plan = plan_network(filled(Biased()), example, CONFIG)
    assert not [node for node in plan.nodes if "attention mask" in node.reason]
    assert next(node for node in plan.nodes if node.op == "Add").precision == "int8"


class Residual(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Dense(8, 8), nn.Dense(8, 8)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return ops.softmax(self.last(self.first(x) + x), -1)


def test_a_sum_with_the_input_that_a_layer_reads_stays_int8() -> None:
    graph, plan = plan_network(filled(Residual()), X[:, 0].shape[1:], CONFIG)
    assert next(node for node in plan.nodes if node.op == "Add").precision == "int8"
    assert to_cell(graph)(ms.Tensor(X[:, 0])).shape == (4, 8)
