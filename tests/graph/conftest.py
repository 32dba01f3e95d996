from __future__ import annotations

import importlib.util
import sys
import textwrap
from pathlib import Path
from typing import Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

HEADER = "import mindspore as ms\nimport numpy as np\nfrom mindspore import mint, nn, ops\n\n\n"


@pytest.fixture
def network(tmp_path: Path) -> Callable[..., nn.Cell]:
    """Makes a network from the source of its `construct`: MindSpore's compiler reads methods from files only."""

    def make(construct: str, init: str = "pass", arguments: str = "x") -> nn.Cell:
        name = f"network_{len(list(tmp_path.glob('network_*.py')))}_{tmp_path.name}"
        body = textwrap.indent(textwrap.dedent(construct).strip(), " " * 8)
        layers = textwrap.indent(textwrap.dedent(init).strip(), " " * 8)
        source = (
            f"class Net(nn.Cell):\n    def __init__(self):\n        super().__init__()\n{layers}\n\n"
            f"    def construct(self, {arguments}):\n{body}\n"
        )
        file = tmp_path / f"{name}.py"
        file.write_text(HEADER + source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module.Net()

    return make


def randomize(net: nn.Cell, seed: int = 0) -> None:
    """Give every parameter, BatchNorm statistics among them, values that a forgotten one would show."""
    random = np.random.default_rng(seed)
    for parameter in net.get_parameters():
        shape = parameter.shape
        if parameter.name.endswith(("moving_variance", "gamma")):
            data = random.uniform(0.5, 1.5, shape)
        else:
            data = random.normal(0, 1 / np.sqrt(max(np.prod(shape[1:]), 1) if len(shape) > 1 else 10), shape)
        parameter.set_data(ms.Tensor(data.astype(np.float32)))


def losses(net: nn.Cell, x: ms.Tensor, y: ms.Tensor, mode: int, steps: int = 3) -> list[float]:
    """The loss of each training step, by TrainOneStepCell."""
    ms.set_context(mode=mode)
    optimizer = nn.Momentum(net.trainable_params(), 0.02, 0.9)
    step = nn.TrainOneStepCell(nn.WithLossCell(net, nn.CrossEntropyLoss()), optimizer)
    step.set_train(True)
    return [float(step(x, y).asnumpy()) for _ in range(steps)]
