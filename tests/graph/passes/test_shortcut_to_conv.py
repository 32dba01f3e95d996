from __future__ import annotations

from typing import Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from msqkd.graph.capture import capture
from msqkd.graph.cell import to_cell
from msqkd.graph.passes.shortcut_to_conv import shortcut_to_conv
from msqkd.models.cifar_resnet import resnet20

Network = Callable[..., nn.Cell]


def test_the_shortcuts_of_a_resnet_become_fixed_convolutions() -> None:
    graph = capture(resnet20(), (3, 32, 32))
    twin = graph.copy()
    shortcut_to_conv(twin)
    twin.check()
    assert not {"Pad", "PadV3", "StridedSlice"}.intersection(node.op for node in twin.nodes)
    for stage, channels in ((2, 16), (3, 32)):
        node = twin.node(f"layer{stage}.0.shortcut.pad.shortcut")
        held = twin.params[node.inputs[1]]
        assert not held.trainable
        assert held.data.shape == (2 * channels, channels, 1, 1)
        assert held.data.sum() == channels
    x = ms.Tensor(np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32))
    np.testing.assert_array_equal(to_cell(graph)(x).asnumpy(), to_cell(twin)(x).asnumpy())


@pytest.mark.parametrize(
    ("construct", "size"),
    [
        ("return ops.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 3))", 8),
        ("return ops.pad(x[:, :, ::3, ::3], (0, 0, 0, 0, 0, 1))", 8),
        ("return ops.pad(x[:, :, 0:7:2, 0:7:2], (0, 0, 0, 0, 1, 0))", 7),
    ],
)
def test_functional_shortcuts(network: Network, construct: str, size: int) -> None:
    net = network(construct)
    graph = capture(net, (3, size, size))
    shortcut_to_conv(graph)
    graph.check()
    assert [node.op for node in graph.nodes] == ["Conv2D"]
    x = ms.Tensor(np.random.default_rng(0).normal(size=(2, 3, size, size)).astype(np.float32))
    np.testing.assert_array_equal(net(x).asnumpy(), to_cell(graph)(x).asnumpy())


@pytest.mark.parametrize(
    "construct",
    [
        "return ops.pad(x[:, :, 1::2, ::2], (0, 0, 0, 0, 2, 3))",  # begins at the second row
        "return ops.pad(x[:, :, ::2, ::3], (0, 0, 0, 0, 2, 3))",  # two strides
        "return ops.pad(x[:, ::2, ::2, ::2], (0, 0, 0, 0, 2, 3))",  # every second channel
        "return ops.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 3), value=1.0)",  # ones, not zeros
        "return ops.pad(x[:, :, ::2, ::2], (1, 0, 0, 0, 2, 3))",  # a column, too
        "y = x[:, :, ::2, ::2]\nreturn ops.pad(y, (0, 0, 0, 0, 2, 3)), y",  # read elsewhere
        "return ops.pad(ops.relu(x), (0, 0, 0, 0, 2, 3))",  # no slice
    ],
)
def test_what_is_no_shortcut_stays(network: Network, construct: str) -> None:
    graph = capture(network(construct), (3, 8, 8))
    before = [node.op for node in graph.nodes]
    shortcut_to_conv(graph)
    assert [node.op for node in graph.nodes] == before
