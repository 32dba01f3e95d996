import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from msqkd.models.cifar_resnet import (
    BasicBlock,
    CifarResNet,
    SubsampleShortcut,
    resnet20,
    resnet32,
    resnet44,
    resnet56,
    resnet110,
)


@pytest.mark.parametrize(
    ("factory", "layers", "parameters"),
    # Table 6 of the paper gives 0.27, 0.46, 0.66, 0.85 and 1.7 million.
    [
        (resnet20, 20, 269722),
        (resnet32, 32, 464154),
        (resnet44, 44, 658586),
        (resnet56, 56, 853018),
        (resnet110, 110, 1727962),
    ],
)
def test_depth_and_size(factory, layers: int, parameters: int) -> None:
    net = factory()
    cells = [cell for _, cell in net.cells_and_names()]
    assert sum(isinstance(cell, (nn.Conv2d, nn.Dense)) for cell in cells) == layers
    assert sum(parameter.size for parameter in net.trainable_params()) == parameters


def test_names_are_those_of_the_pytorch_networks() -> None:
    names = {name for name, _ in resnet20().parameters_and_names()}
    block = {"conv1.weight", "conv2.weight"}
    block |= {f"bn{i}.{part}" for i in (1, 2) for part in ("gamma", "beta", "moving_mean", "moving_variance")}
    expected = {name for name in block if "2" not in name} | {"linear.weight", "linear.bias"}
    expected |= {f"layer{stage}.{index}.{name}" for stage in (1, 2, 3) for index in (0, 1, 2) for name in block}
    assert names == expected


def test_shortcut_subsamples_and_pads_evenly() -> None:
    x = np.random.default_rng(0).normal(size=(2, 4, 5, 6)).astype(np.float32)
    y = SubsampleShortcut(4, 8)(Tensor(x)).asnumpy()
    assert y.shape == (2, 8, 3, 3)
    np.testing.assert_array_equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any()
    assert not y[:, 6:].any()


def test_block_adds_its_input() -> None:
    block = BasicBlock(4, 4, 1).set_train(False)
    block.bn2.gamma.set_data(Tensor(np.zeros(4, np.float32)))
    x = np.random.default_rng(0).normal(size=(2, 4, 6, 6)).astype(np.float32)
    np.testing.assert_allclose(block(Tensor(x)).asnumpy(), np.maximum(x, 0), atol=1e-6)


@pytest.fixture
def graph_mode():
    """The gradient of x[:, :, ::2, ::2] fails in PYNATIVE_MODE of MindSpore 2.10 on CPU; training is in GRAPH_MODE."""
    before = ms.get_context("mode")
    ms.set_context(mode=ms.GRAPH_MODE)
    yield
    ms.set_context(mode=before)


def test_every_weight_has_a_gradient(graph_mode: None) -> None:
    net = CifarResNet(1, num_classes=5, in_channels=1).set_train()
    x = Tensor(np.random.default_rng(0).normal(size=(2, 1, 16, 16)).astype(np.float32))
    labels = Tensor(np.array([1, 4], np.int32))
    weights = net.trainable_params()
    gradients = ms.grad(nn.WithLossCell(net, nn.CrossEntropyLoss()), None, weights)(x, labels)
    assert net(x).shape == (2, 5)
    reached = [parameter.name for parameter, gradient in zip(weights, gradients) if gradient.asnumpy().any()]
    assert reached == [parameter.name for parameter in weights]
