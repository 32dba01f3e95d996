"""Networks before their ranges are known, and what they lose when they are quantised."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import nn

from msqkd.graph.capture import capture
from msqkd.graph.cell import to_cell
from msqkd.graph.ir import Graph
from msqkd.quant.algorithms.base import Work
from msqkd.quant.algorithms.biases import with_biases
from msqkd.quant.config import QuantConfig, WeightQuantizer
from msqkd.quant.fake_quant import QUANTIZE
from msqkd.quant.placement import make_plan
from msqkd.quant.ptq import calibrate
from msqkd.quant.qat import deployment_graph, quantize_cell


class Chain(nn.Cell):
    def __init__(self, *parts: nn.Cell) -> None:
        super().__init__()
        self.parts = nn.SequentialCell(*parts)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.parts(x)


def conv(*args: Any, **kwargs: Any) -> nn.Cell:
    return nn.Conv2d(*args, has_bias=True, **kwargs)


def float_work(net: nn.Cell, x: np.ndarray, per_channel: bool = False, bits: int = 8) -> Work:
    """A network in the float stage, with the samples `x` in batches of 16."""
    graph = with_biases(deployment_graph(capture(net, x.shape[1:])))
    config = QuantConfig(
        weight_quantizer=WeightQuantizer(bits, per_channel=per_channel, observer="minmax"), act_observer="minmax"
    )

    def samples() -> Iterator[tuple[np.ndarray, ...]]:
        for start in range(0, len(x), 16):
            yield (x[start : start + 16],)

    return Work(graph, make_plan(graph, config), samples)


def answer(graph: Graph, x: np.ndarray) -> Any:
    """What the float network gives."""
    return to_cell(graph)(ms.Tensor(x)).asnumpy()


def quantized(work: Work, x: np.ndarray) -> Any:
    """What the network gives once it is calibrated on its samples and quantised."""
    plan = calibrate(work.graph, work.plan, work.samples())
    cell = quantize_cell(work.graph, plan)
    cell.set_phase(QUANTIZE)
    return cell(ms.Tensor(x)).asnumpy()


def decibels(found: np.ndarray, exact: np.ndarray) -> float:
    """Signal to noise."""
    return float(10 * np.log10(np.square(exact).mean() / np.square(found - exact).mean()))
