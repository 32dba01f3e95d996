import numpy as np
from mindspore import Tensor

from msqkd.models.lenet5 import LeNet5


def test_shapes_and_parameter_count() -> None:
    net = LeNet5(num_classes=7, in_channels=3)
    assert net(Tensor(np.zeros((2, 3, 32, 32), np.float32))).shape == (2, 7)
    # The paper's sizes: 6 and 16 maps of 5x5, then 400-120-84-7.
    expected = (3 * 25 + 1) * 6 + (6 * 25 + 1) * 16 + 401 * 120 + 121 * 84 + 85 * 7
    assert sum(parameter.size for parameter in net.get_parameters()) == expected


def test_names() -> None:
    names = [name for name, _ in LeNet5().parameters_and_names()]
    assert names == [
        f"{layer}.{part}" for layer in ("conv1", "conv2", "fc1", "fc2", "fc3") for part in ("weight", "bias")
    ]
