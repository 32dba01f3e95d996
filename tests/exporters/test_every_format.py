"""Every format on one network with what is easily lost: dead channels, shared weights, literals, several outputs."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops
from mindspore.train import mind_ir_pb2

from msqkd.api import create_ptq_network, export, quantize
from msqkd.exporters import ASCEND, FORMATS, MS_FLOAT, MS_WEIGHT, PORTABLE
from msqkd.exporters.ascend.program import ascend_program
from msqkd.graph.cell import to_cell
from msqkd.graph.islands import run_island
from msqkd.integer import registry
from msqkd.integer.simulator import Simulator
from msqkd.quant.config import QuantConfig
from msqkd.quant.fake_quant import OFF, QUANTIZE
from msqkd.quant.qat import QuantCell, quantize_cell

pytestmark = pytest.mark.usefixtures("pynative_mode")

CASES = [(target, name) for name, form in FORMATS.items() for target in form.targets]
X = np.random.default_rng(0).normal(size=(7, 3, 8, 6)).astype(np.float32)
DEAD = 2


class Net(nn.Cell):
    """Two outputs, one of them twice, and the input itself; one convolution at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.shared = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, has_bias=True)
        self.relu, self.relu6, self.head, self.divide = nn.ReLU(), nn.ReLU6(), nn.Dense(8, 4), ops.Div()

    def construct(self, x):  # type: ignore[no-untyped-def]
        y = self.relu(self.norm(self.first(x)))
        y = self.relu6(self.shared(y)) + self.shared(y * 0.5)
        z = self.head(ops.mean(self.divide(y, 2), (2, 3)))
        return z, y, z, x


@cache
def calibrated(target: str, per_channel: bool) -> QuantCell:
    """The quantised network; the BatchNorm and the shared convolution have a channel that is all but dead."""
    random, net = np.random.default_rng(1), Net()
    for parameter in net.get_parameters():
        data = random.normal(size=parameter.shape) / np.sqrt(np.prod(parameter.shape[1:]))
        if "gamma" in parameter.name or "variance" in parameter.name:
            data = random.uniform(0.5, 1.5, parameter.shape)
        if parameter.name in ("norm.gamma", "shared.weight"):
            data[DEAD] = 1e-13
        parameter.set_data(ms.Tensor(data.astype(np.float32)))
    net.set_train(False)
    config = QuantConfig(act_observer="minmax").override({"weight.per_channel": per_channel})
    return quantize(create_ptq_network(net, config, [X], target=target))


def arrays(outputs: Any) -> list[np.ndarray]:
    return [np.asarray(o.asnumpy() if isinstance(o, ms.Tensor) else o) for o in outputs]


def expected(cell: QuantCell, name: str) -> list[np.ndarray]:
    """The outputs of the network that a file of the format holds."""
    graph, plan = cell.sync()
    if name == MS_FLOAT:
        return arrays(to_cell(graph)(ms.Tensor(X)))
    own = quantize_cell(graph, plan)
    own.set_phase(OFF if name == MS_WEIGHT else QUANTIZE)
    return arrays(own(ms.Tensor(X)))


def read_back(name: str, file: Path, cell: QuantCell) -> list[np.ndarray]:
    load = FORMATS[name].load
    if load is not None:
        return arrays(load(file)(ms.Tensor(X)))
    # Only a device runs the file for Ascend: its integers are those of the program that is simulated.
    program = ascend_program(*cell.sync())
    model = mind_ir_pb2.ModelProto()
    model.ParseFromString(file.read_bytes())
    held = {parameter.raw_data for parameter in model.graph.parameter}
    assert {t.data.tobytes() for t in program.tensors.values() if t.data is not None and t.dtype == "int8"} <= held
    return Simulator(program, run_island=run_island, kind=registry.ASCEND).run(X)


@pytest.mark.parametrize("per_channel", [False, True], ids=["per_tensor", "per_channel"])
@pytest.mark.parametrize(("target", "name"), CASES)
def test_every_format_is_the_network_it_holds(target: str, name: str, per_channel: bool, tmp_path: Path) -> None:
    cell = calibrated(target, per_channel)
    file = Path(export(cell, X[:1], str(tmp_path / "net"), FORMATS[name].alias))
    wanted, found = expected(cell, name), read_back(name, file, cell)
    assert [array.shape for array in found] == [array.shape for array in wanted]
    np.testing.assert_array_equal(found[3], X)
    np.testing.assert_array_equal(found[0], found[2])
    exact = not FORMATS[name].int8 or name == PORTABLE
    for one, other in zip(found, wanted):
        steps = 0.02 if exact else 3.01 if name != ASCEND else 6.01  # of the 255 of an int8 value
        assert np.abs(one - other).max() <= steps * np.ptp(other) / 255
    assert np.abs(wanted[1][:, DEAD]).min() > 0.05, "the channel lives by its bias"
