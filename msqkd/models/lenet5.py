"""LeNet-5 with ReLU and max pooling.

Source: Y. LeCun et al., Gradient-Based Learning Applied to Document Recognition (1998).
"""

from __future__ import annotations

from mindspore import Tensor, nn
from mindspore.common.initializer import HeNormal


class LeNet5(nn.Cell):
    """Two 5x5 convolutions with pooling and three dense layers: (N, in_channels, 32, 32) to logits (N, num_classes)."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 6, 5, pad_mode="valid", has_bias=True, weight_init=HeNormal())
        self.conv2 = nn.Conv2d(6, 16, 5, pad_mode="valid", has_bias=True, weight_init=HeNormal())
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(kernel_size=2, stride=2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Dense(16 * 5 * 5, 120, weight_init=HeNormal())
        self.fc2 = nn.Dense(120, 84, weight_init=HeNormal())
        self.fc3 = nn.Dense(84, num_classes)

    def construct(self, x: Tensor) -> Tensor:
        """Logits, float32 (N, num_classes), of images float32 (N, in_channels, 32, 32)."""
        x = self.pool(self.relu(self.conv1(x)))
        x = self.pool(self.relu(self.conv2(x)))
        x = self.flatten(x)
        x = self.relu(self.fc1(x))
        x = self.relu(self.fc2(x))
        return self.fc3(x)
