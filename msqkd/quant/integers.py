"""The integers of a quantised layer: int8 weights and the int32 bias that goes with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

import numpy as np

from msqkd.errors import PlanError
from msqkd.graph.ir import Graph
from msqkd.quant.plan import QuantPlan, WeightQuant
from msqkd.quant.qparams import SCALE_FLOOR, QParams

_LARGEST_RATIO = 2.0**30
_SMALLEST_RATIO = 2.0**-30
_BIAS_LIMIT = 2.0**30
_SUMS = ("Conv2D", "Dense")  # operations that add an int32 bias to sums of products of integers
_CLIPS = ("ReLU", "ReLU6")


def int8_weight(
    quant: WeightQuant, weight: np.ndarray, bias: Optional[np.ndarray], input_scale: float, output_scale: float
) -> tuple[np.ndarray, QParams, Optional[np.ndarray]]:
    """The integers of a weight, their parameters, and the int32 bias with scale s_x · s_w.

    A channel all but dead gets a wider scale, so that its bias fits into int32 and its ratio can be represented.

    Args:
        quant: how the weight is quantised.
        weight: float32 (O, ...); `bias`: float32 (O,) or None.
        input_scale, output_scale: s_x and s_y.

    Returns:
        int8 like `weight`, its parameters, int32 (O,) or None.

    Raises:
        PlanError: s_x · s_w / s_y is beyond what a runtime's fixed point can represent.
    """
    qparams = quant.qparams(weight, scale_floor(weight, bias, input_scale, output_scale, quant.axis is None))
    ratio = input_scale * np.asarray(qparams.scale, np.float64) / output_scale
    if (ratio >= _LARGEST_RATIO).any():
        raise PlanError(
            f"{quant.node}: the ratio of scales s_x·s_w/s_y is {float(np.max(ratio)):.3g}, beyond what the runtime can "
            f"represent; allowed: below {_LARGEST_RATIO:g}"
        )
    integers = qparams.quantize(weight).astype(np.int8)
    if bias is None:
        return integers, qparams, None
    return integers, qparams, bias_steps(bias, input_scale, qparams)


def int8_grids(graph: Graph, plan: QuantPlan, requantised: bool = True) -> dict[str, QParams]:
    """The parameters of the weights of int8 layers by node name, in the order of the plan.

    A channel all but dead has a wider scale, as in `int8_weight`.

    Args:
        graph, plan: every range known; `graph` has the weights.
        requantised: whether the runtime requantizes the sums to the output's scale; else it gives them back in float.

    Raises:
        PlanError: a range is missing.
    """
    tails = {node.fused_into: graph.node(node.name) for node in plan.nodes if node.fused_into}
    found: dict[str, QParams] = {}
    for name, quant in plan.with_weight_observers(graph).int8_weights().items():
        node, tail = graph.node(name), tails.get(name)
        weight = quant.held_in(graph)
        if node.op not in _SUMS:
            found[name] = quant.qparams(weight)
            continue
        bias = graph.params[node.inputs[2]].data if len(node.inputs) > 2 else None
        result = node.output if tail is None else tail.output
        output_scale = None
        if requantised and result in plan.activations:
            output_scale = float(plan.group_of(result).qparams().scale)
        input_scale = float(plan.group_of(node.inputs[0]).qparams().scale)
        found[name] = quant.qparams(
            weight, scale_floor(weight, bias, input_scale, output_scale, per_tensor=quant.axis is None)
        )
    return found


def on_grid(graph: Graph, weights: Mapping[str, WeightQuant]) -> None:
    """Round the weights of the named layers to their grid, in place; one that others read too is theirs as it was.

    Clip ratios are known (see `QuantPlan.with_weight_observers`).
    """
    for name, quant in weights.items():
        node = graph.node(name)
        weight = node.inputs[quant.index]
        data = graph.params[weight].data
        if len(graph.consumers(weight)) > 1:
            weight = node.inputs[quant.index] = graph.add_param(graph.unique_value(f"{name}.{weight}"), data)
        graph.params[weight].data = quant.qparams(data).fake_quantize(data)


def round_stored(graph: Graph, plan: QuantPlan) -> Graph:
    """A copy of a deployment graph in which the weights of weight-only and dynamic layers lie on their grid."""
    rounded = graph.copy()
    on_grid(rounded, plan.with_weight_observers(graph).stored_weights())
    return rounded


def round_biases(graph: Graph, plan: QuantPlan) -> Graph:
    """A copy of a deployment graph whose int8 layers have the biases the device adds: whole multiples of s_x · s_w.

    Half a step of a bias moves one value in some hundreds to the next level, which is as much as all other differences
    between float arithmetic and a runtime's together.

    Raises:
        PlanError: a range is missing, or a ratio of scales cannot be represented.
    """
    rounded = graph.copy()
    tails = {node.fused_into: rounded.node(node.name) for node in plan.nodes if node.fused_into}
    for name, quant in plan.with_weight_observers(graph).int8_weights().items():
        node, tail = rounded.node(name), tails.get(name)
        alone = len(node.inputs) == 3 and len(rounded.consumers(node.inputs[2])) == 1
        output = tail.output if tail is not None else node.output
        if not alone or output not in plan.activations or (tail is not None and tail.op not in _CLIPS):
            continue
        bias = rounded.params[node.inputs[2]]
        scales = [float(plan.group_of(value).qparams().scale) for value in (node.inputs[0], output)]
        _, qparams, steps = int8_weight(quant, rounded.params[node.inputs[1]].data, bias.data, *scales)
        assert steps is not None
        bias.data = (steps * _bias_scale(scales[0], qparams)).astype(np.float32)
    return rounded


def _bias_scale(input_scale: float, qparams: QParams) -> np.ndarray:
    return np.asarray(np.float64(input_scale) * np.asarray(qparams.scale, np.float64))


def bias_steps(bias: np.ndarray, input_scale: float, qparams: QParams) -> np.ndarray:
    """A bias (O,) as int32 in steps of s_x · s_w; `qparams` heed `scale_floor`."""
    return np.rint(np.asarray(bias, np.float64) / _bias_scale(input_scale, qparams)).astype(np.int32)


def scale_floor(
    weight: np.ndarray, bias: Optional[np.ndarray], input_scale: float, output_scale: Optional[float], per_tensor: bool
) -> Any:
    """The least scale for which the bias fits into int32 and the ratio of scales can be represented.

    Args:
        weight: (O, ...); `bias`: (O,) or None.
        input_scale: s_x.
        output_scale: s_y; None where the result is not requantised.
        per_tensor: whether the weight has one scale.

    Returns:
        float32, one number or (O,).
    """
    floor = np.full(weight.shape[0], SCALE_FLOOR)
    if output_scale is not None:
        floor = np.maximum(floor, _SMALLEST_RATIO * output_scale / input_scale)
    if bias is not None:
        floor = np.maximum(floor, np.abs(np.asarray(bias, np.float64)) / (input_scale * _BIAS_LIMIT))
    floor = floor.astype(np.float32)
    return floor.max() if per_tensor else floor
