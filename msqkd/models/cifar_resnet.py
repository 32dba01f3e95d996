"""The residual networks for 32x32 images, with shortcuts that have no parameters.

Source: K. He et al., Deep Residual Learning for Image Recognition (2016), section 4.2, option A. Parameter names are
those of the usual PyTorch implementation, so that its checkpoints load.
"""

from __future__ import annotations

from functools import partial

from mindspore import Tensor, nn, ops
from mindspore.common.initializer import HeNormal


def _conv3x3(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(
        in_channels,
        out_channels,
        3,
        stride=stride,
        pad_mode="pad",
        padding=1,
        has_bias=False,
        weight_init=HeNormal(mode="fan_out", nonlinearity="relu"),
    )


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-5, momentum=0.9)


class SubsampleShortcut(nn.Cell):
    """Every second row and column, with channels of zeros added evenly before and after."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        before = (out_channels - in_channels) // 2
        after = out_channels - in_channels - before
        self.pad = nn.Pad(((0, 0), (before, after), (0, 0), (0, 0)))

    def construct(self, x: Tensor) -> Tensor:
        """(N, in, H, W) to (N, out, H / 2, W / 2), rounded up."""
        return self.pad(x[:, :, ::2, ::2])


class BasicBlock(nn.Cell):
    """Two 3x3 convolutions and the shortcut around them."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, out_channels, stride)
        self.bn1 = _batch_norm(out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels, 1)
        self.bn2 = _batch_norm(out_channels)
        self.relu = nn.ReLU()
        self.shortcut = nn.Identity() if stride == 1 else SubsampleShortcut(in_channels, out_channels)

    def construct(self, x: Tensor) -> Tensor:
        """(N, in, H, W) to (N, out, H / stride, W / stride)."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + self.shortcut(x))


class CifarResNet(nn.Cell):
    """6 * blocks + 2 layers in three stages of 16, 32 and 64 channels: (N, in_channels, 32, 32) to (N, num_classes)."""

    def __init__(self, blocks: int, num_classes: int = 10, in_channels: int = 3) -> None:
        """`blocks` of each stage: 3 for ResNet-20, 18 for ResNet-110."""
        super().__init__()
        self.conv1 = _conv3x3(in_channels, 16, 1)
        self.bn1 = _batch_norm(16)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Dense(64, num_classes)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.SequentialCell:
        first = BasicBlock(in_channels, out_channels, stride)
        return nn.SequentialCell(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))

    def construct(self, x: Tensor) -> Tensor:
        """Logits, float32 (N, num_classes), of images float32 (N, in_channels, 32, 32)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = ops.mean(x, (2, 3))
        return self.linear(x)


resnet20 = partial(CifarResNet, 3)
resnet32 = partial(CifarResNet, 5)
resnet44 = partial(CifarResNet, 7)
resnet56 = partial(CifarResNet, 9)
resnet110 = partial(CifarResNet, 18)
