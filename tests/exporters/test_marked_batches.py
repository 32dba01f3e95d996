"""The marked MindIR, which is made for one batch size, read back for any."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from msqkd.analysis.parity import compare_execution
from msqkd.api import create_ptq_network, export, quantize
from msqkd.exporters.verify import load_lite, load_ms
from msqkd.quant.config import QuantConfig
from msqkd.quant.qat import QuantCell

pytestmark = pytest.mark.usefixtures("pynative_mode")
X = np.random.default_rng(0).normal(size=(3, 6, 8)).astype(np.float32)


class Attention(nn.Cell):
    """Computes with the batch behind another axis."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.fc = nn.MultiheadAttention(8, 2, batch_first=True), nn.Dense(8, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.fc(self.attention(x, x, x)[0])


class Token(nn.Cell):
    """Puts a token that is repeated for every sample in front of it."""

    def __init__(self) -> None:
        super().__init__()
        self.token = ms.Parameter(ms.Tensor(np.linspace(-1, 1, 8, dtype=np.float32).reshape(1, 1, 8)), name="token")
        self.up, self.down = nn.Dense(8, 8), nn.Dense(8, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        token = ops.tile(self.token, (x.shape[0], 1, 1))
        return self.down(ops.concat((token, self.up(x)), 1))


class Mixed(nn.Cell):
    """Gives a sample another answer in another batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Dense(8, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.fc(ops.sigmoid(x) * (x.mean(0, keep_dims=True) + 2.0))


@cache
def quantised(make: type) -> QuantCell:
    net = make()
    random = np.random.default_rng(3)
    for parameter in net.get_parameters():
        parameter.set_data(ms.Tensor((random.normal(size=parameter.shape) * 0.4).astype(np.float32)))
    return quantize(create_ptq_network(net.set_train(False), QuantConfig(act_observer="minmax"), [X]))


@pytest.mark.parametrize("make", [Attention, Token])
def test_every_sample_is_computed_as_the_network_does(make: type, tmp_path: Path) -> None:
    cell = quantised(make)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_lite(Path(export(cell, (6, 8), str(tmp_path / "net"), "MINDIR")))
    for batch in (1, 3):
        expected = cell(ms.Tensor(X[:batch])).asnumpy()
        np.testing.assert_allclose(found(ms.Tensor(X[:batch])).asnumpy(), expected, atol=1e-5)


def test_a_batch_that_cannot_be_opened_stays(tmp_path: Path) -> None:
    cell = quantised(Mixed)
    with pytest.warns(UserWarning, match="checked in batches of 1"):
        found = load_lite(Path(export(cell, (6, 8), str(tmp_path / "net"), "MINDIR")))
    expected = np.concatenate([cell(ms.Tensor(X[row : row + 1])).asnumpy() for row in range(3)])
    np.testing.assert_allclose(found(ms.Tensor(X)).asnumpy(), expected, atol=1e-5)


def test_a_ms_file_computes_every_sample_as_alone(tmp_path: Path) -> None:
    found = load_ms(Path(export(quantised(Attention), (6, 8), str(tmp_path / "net"), "MS")))
    alone = np.concatenate([found(ms.Tensor(X[row : row + 1])).asnumpy() for row in range(3)])
    np.testing.assert_array_equal(found(ms.Tensor(X)).asnumpy(), alone)


def test_the_comparison_of_executions_computes_such_samples_alone() -> None:
    graph, plan = quantised(Attention).sync()
    together = compare_execution(graph, plan, [X])
    alone = compare_execution(graph, plan, [X[row : row + 1] for row in range(3)])
    assert together.samples == alone.samples == 3
    assert [(item.value, item.histogram) for item in together.values] == [
        (item.value, item.histogram) for item in alone.values
    ]
