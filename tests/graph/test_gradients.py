from __future__ import annotations

from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from msqkd.graph.capture import capture
from msqkd.graph.cell import to_cell
from msqkd.graph.gradients import gradient_error, untrainable

Network = Callable[..., nn.Cell]
X = np.random.default_rng(0).normal(size=(2, 4, 8, 8)).astype(np.float32)
INIT = "self.scale = ms.Parameter(ms.Tensor(np.ones((4, 8, 8), np.float32)), name='scale')"


class Weighted(nn.Cell):
    """The sum of a network's output times constants."""

    def __init__(self, net: Any, weights: np.ndarray) -> None:
        super().__init__()
        self.net, self.weights = net, ms.Tensor(weights)

    def construct(self, x: Any) -> Any:
        return (self.net(x) * self.weights).sum()


@pytest.mark.parametrize(
    "index",
    ["[:, ::2]", "[:, :, ::2]", "[:, :, ::2, ::2]", "[..., ::3]", "[..., 1::2, :]", "[:, :, :, ::-1]",
     "[:, :, 5:1:-2]", "[:, 1::2, ::3]", "[:, ::2, 3]", "[:, 1:3]"],
)  # fmt: skip
def test_slices_with_steps_are_trained_rightly(network: Network, index: str) -> None:
    ms.set_context(mode=ms.GRAPH_MODE)
    graph = capture(network(f"return (x * self.scale){index}", INIT), (4, 8, 8))
    assert untrainable(graph) is None
    cell = to_cell(graph)
    taken = eval(f"x{index}", {"x": X})
    np.testing.assert_array_equal(cell(ms.Tensor(X)).asnumpy(), taken)
    weights = np.random.default_rng(1).normal(size=taken.shape).astype(np.float32)
    expected = np.zeros_like(X)
    eval(f"x{index}", {"x": expected})[...] = weights
    cell.set_train(True)
    found = ops.grad(Weighted(cell, weights))(ms.Tensor(X)).asnumpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("construct", "named"),
    [
        ("ops.channel_shuffle(x * self.scale, 2)", "'channel_shuffle' (ChannelShuffle)"),
        ("(x * self.scale)[::2]", "'strided_slice' (StridedSlice)"),
        ("ops.cumsum(x * self.scale, 1)", ""),
        ("ops.channel_shuffle(x, 2) * self.scale", ""),
    ],
    ids=["no_gradient", "step_along_the_batch", "tried", "before_the_weights"],
)
def test_what_cannot_be_trained_is_named(network: Network, construct: str, named: str) -> None:
    ms.set_context(mode=ms.GRAPH_MODE)
    found = untrainable(capture(network(f"return {construct}", INIT), (4, 8, 8)))
    assert (found is None) == (not named)
    assert named in (found or "")


def test_a_loss_without_a_gradient(network: Network) -> None:
    ms.set_context(mode=ms.GRAPH_MODE)
    tensor = ms.Tensor(X)
    assert gradient_error(network("return x.sum()"), [tensor], [0]) is None
    assert gradient_error(network("return ops.channel_shuffle(x, 2).sum()"), [tensor], [0]) is not None
