"""Small networks, captured, planned and calibrated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import nn

from msqkd.api import plan_network
from msqkd.quant.algorithms.base import Work
from msqkd.quant.algorithms.stream import Stream
from msqkd.quant.config import QuantConfig, Rule, WeightQuantizer
from msqkd.quant.ptq import calibrate
from msqkd.quant.qat import deployment_graph


def randomized(net: nn.Cell, seed: int = 0) -> nn.Cell:
    """Weights with some large values, as trained ones have, and biases."""
    random = np.random.default_rng(seed)
    for parameter in net.get_parameters():
        shape = parameter.shape
        spread = random.standard_t(4, shape) if len(shape) > 1 else random.normal(size=shape) * 2
        fan_in = np.prod(shape[1:]) if len(shape) > 1 else 10
        parameter.set_data(ms.Tensor((spread / np.sqrt(fan_in)).astype(np.float32)))
    return net


def images(count: int, *shape: int, seed: int = 1) -> np.ndarray:
    """Smooth random images, whose pixels and channels go together, as those of photographs do."""
    random = np.random.default_rng(seed)
    low = random.normal(size=(count, shape[0], 3, 3))
    up = np.repeat(np.repeat(low, -(-shape[1] // 3), axis=2), -(-shape[2] // 3), axis=3)[:, :, : shape[1], : shape[2]]
    common = random.normal(size=(count, 1, 1, 1))
    return (up + common + 0.3 * random.normal(size=up.shape)).astype(np.float32)


def work_of(
    net: nn.Cell, x: np.ndarray, bits: int = 3, *, per_channel: bool = True, rules: Sequence[Rule] = (), **more: Any
) -> Work:
    """A network in the integer stage: weights of so many bits, calibrated on `x`."""
    weights = WeightQuantizer(bits, per_channel=per_channel, **more)
    config = QuantConfig(weight_quantizer=weights, act_observer="minmax")
    captured, plan = plan_network(net, x.shape[1:], config, rules)
    graph = deployment_graph(captured)

    def samples() -> Iterator[tuple[np.ndarray, ...]]:
        for start in range(0, len(x), 16):
            yield (x[start : start + 16],)

    return Work(graph, calibrate(graph, plan, [x]), samples)


def copied(work: Work) -> Work:
    """The same network for another test to improve."""
    twin = Work(work.graph.copy(), work.plan, work.samples)
    twin.reference = work.reference.copy()
    return twin


def error(work: Work, x: np.ndarray, value: str | None = None) -> float:
    """The mean squared difference of a value (the output) between the quantised and the reference network."""
    name = value or work.graph.outputs[0]
    found = [
        stream.values(name)[0] for stream in (Stream(work.graph, [(x,)], work.plan), Stream(work.reference, [(x,)]))
    ]
    return float(np.square(found[0] - found[1]).mean())
