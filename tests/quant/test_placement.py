from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from msqkd.errors import PlanError
from msqkd.graph.capture import capture
from msqkd.graph.ir import Graph
from msqkd.quant.config import FLOAT, QuantConfig, Rule
from msqkd.quant.placement import make_plan
from msqkd.quant.plan import QuantPlan
from msqkd.quant.qat import deployment_graph


class Net(nn.Cell):
    """Cells by name, and a function of (net, x)."""

    def __init__(self, **cells: nn.Cell) -> None:
        super().__init__()
        for name, cell in cells.items():
            setattr(self, name, cell)


def conv(cin: int = 4, cout: int = 4, **options: object) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, 3, **options)


def planned(
    net: nn.Cell, shape: Sequence[int] = (4, 8, 8), rules: Sequence[Rule] = (), config: QuantConfig | None = None
) -> tuple[Graph, QuantPlan]:
    graph = deployment_graph(capture(net, tuple(shape)))
    plan = make_plan(graph, config, rules)
    assert [node.name for node in plan.nodes] == [node.name for node in graph.nodes], "the plan accounts for every node"
    assert all(node.reason for node in plan.nodes)
    for node in plan.nodes:
        if node.precision == "int8" and node.fused_into is None and node.op in ("Conv2D", "Dense", "Add", "Concat"):
            for name in graph.tensor_inputs(graph.node(node.name)):
                assert name in plan.activations, f"int8 {node.name} reads {name}, which nobody quantises"
    return graph, plan


def verdicts(plan: QuantPlan) -> dict[str, str]:
    return {node.name: node.precision for node in plan.nodes}


def name_of(plan: QuantPlan, op: str) -> str:
    """The first operation of a kind: MindSpore may leave out the path of a cell without parameters, once a process has
    compiled hundreds of networks."""
    return next(node.name for node in plan.nodes if node.op == op)


def value_of(graph: Graph, node: str) -> str:
    return graph.node(node).output


class Residual(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = conv(), conv(), conv()
        self.relu = nn.ReLU()

    def construct(self, x):  # type: ignore[no-untyped-def]
        left = self.relu(self.first(x))
        return self.third(self.relu(self.second(left) + left))


def test_a_residual_addition_has_quantised_operands_and_result() -> None:
    graph, plan = planned(Residual())
    assert set(verdicts(plan).values()) == {"int8"}
    add = graph.node("add")
    left, right = add.inputs[:2]
    result = next(n for n in plan.nodes if n.fused_into == "add").name
    names = [left, right, value_of(graph, result)]
    groups = [plan.activations[name].group for name in names]
    assert len(set(groups)) == 3, "each has parameters of its own"
    assert add.output not in plan.activations, "an addition and its ReLU are one kernel: nothing is rounded between"
    assert not any(plan.activations[name].edges for name in names)


def test_relu_is_computed_in_the_kernel_before_it() -> None:
    graph, plan = planned(Residual())
    fused = {node.name: node.fused_into for node in plan.nodes if node.fused_into}
    assert fused == {"relu": "first", "relu_1": "add"}
    assert value_of(graph, "first") not in plan.activations
    assert value_of(graph, "relu") in plan.groups


class SharedConv(nn.Cell):
    """A convolution read by a ReLU and by somebody else."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(), conv()
        self.relu = nn.ReLU()

    def construct(self, x):  # type: ignore[no-untyped-def]
        y = self.first(x)
        return self.second(self.relu(y)) + y


def test_relu_of_a_value_with_other_readers_is_not_fused() -> None:
    graph, plan = planned(SharedConv())
    node = plan.node("relu")
    assert (node.fused_into, node.precision, node.form, node.avoids) == (None, "int8", "depthwise", ("lone_relu",))
    assert value_of(graph, "first") in plan.groups


class Pools(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.dense = conv(), conv(), nn.Dense(4 * 2 * 2, 3)
        self.maximum, self.average = nn.MaxPool2d(2, 2), nn.AvgPool2d(2, 2)

    def construct(self, x):  # type: ignore[no-untyped-def]
        y = self.average(self.second(self.maximum(self.first(x))))
        return self.dense(ops.reshape(y, (-1, 16)))


def test_pools_and_reshapes_share_the_parameters_of_their_input() -> None:
    graph, plan = planned(Pools())
    assert set(verdicts(plan).values()) == {"int8"}
    first, second = value_of(graph, "first"), value_of(graph, "second")
    quant = {name: plan.activations[value_of(graph, name)] for name in ("maximum", "average", "reshape")}
    assert (quant["maximum"].group, quant["maximum"].exact) == (first, True)
    assert (quant["average"].group, quant["average"].exact) == (second, False), "an average is rounded again"
    assert (quant["reshape"].group, quant["reshape"].exact) == (second, True)
    assert set(plan.groups) == {graph.inputs[0], first, second, value_of(graph, "dense")}


class Head(nn.Cell):
    def __init__(self, axes: tuple[int, ...] = (2, 3)) -> None:
        super().__init__()
        self.first, self.dense = conv(), nn.Dense(4, 3)
        self.axes = axes

    def construct(self, x):  # type: ignore[no-untyped-def]
        y = ops.mean(self.first(x), self.axes)
        return self.dense(y) if len(self.axes) == 2 else y


def test_global_mean_has_parameters_of_its_own_and_a_form_that_is_right() -> None:
    graph, plan = planned(Head())
    node = plan.node(_mean(plan))
    quant = plan.activations[value_of(graph, node.name)]
    assert (quant.group, quant.exact) == (quant.value, False)
    assert (node.form, node.avoids) == ("depthwise", ("global_mean",))
    assert [(entry["name"], entry["nodes"]) for entry in plan.avoided()] == [("global_mean", [node.name])]


def _mean(plan: QuantPlan) -> str:
    return next(node.name for node in plan.nodes if "Mean" in node.op)


class BigPool(nn.Cell):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.first, self.pool, self.second = conv(), nn.AvgPool2d(12, 1, **options), conv()

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.second(self.pool(self.first(x)))


def test_large_average_pool_is_written_as_a_depthwise_convolution() -> None:
    _, plan = planned(BigPool(), (4, 16, 16))
    node = plan.node("pool")
    assert (node.precision, node.form, node.avoids) == ("int8", "depthwise", ("average_overflow",))


def test_large_average_pool_that_pads_stays_float() -> None:
    _, plan = planned(BigPool(pad_mode="same"), (4, 16, 16))
    node = plan.node("pool")
    assert node.precision == "float"
    assert "144 elements" in node.reason
    assert node.avoids == ("average_overflow",)


def test_a_mean_over_other_axes_stays_float() -> None:
    _, plan = planned(Head((1,)))
    assert plan.node(_mean(plan)).precision == "float"
    assert "whole height and width" in plan.node(_mean(plan)).reason


class Between(nn.Cell):
    """convolution, max pool, an operation, convolution."""

    def __init__(self, operation: Callable) -> None:
        super().__init__()
        self.first, self.second, self.pool = conv(), conv(), nn.MaxPool2d(2, 2)
        self.operation = operation

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.second(self.operation(self.pool(self.first(x))))


class Gate(nn.Cell):
    """A product with something made of the same value."""

    def __init__(self, gate: Callable) -> None:
        super().__init__()
        self.gate = gate

    def construct(self, x):  # type: ignore[no-untyped-def]
        return x * self.gate(x)


class Squeeze(nn.Cell):
    def __init__(self, axes: tuple[int, ...] = (2, 3)) -> None:
        super().__init__()
        self.axes, self.gate = axes, nn.HSigmoid()

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.gate(ops.mean(x, self.axes, True))


@pytest.mark.parametrize(
    ("gate", "precision", "avoids"),
    [
        (nn.HSigmoid(), "int8", ()),
        (Squeeze(), "int8", ("batch_broadcast",)),
        (Squeeze((1,)), "float", ()),
    ],
)
def test_products_of_one_shape_or_by_channel_are_int8(gate: Callable, precision: str, avoids: tuple[str, ...]) -> None:
    _, plan = planned(Between(Gate(gate)))
    node = next(node for node in plan.nodes if node.op == "Mul")
    assert (node.precision, node.avoids) == (precision, avoids)


@pytest.mark.parametrize(
    ("cell", "op", "why"),
    [
        (nn.Sigmoid(), "Sigmoid", "largest input"),
        (nn.HSigmoid(), "HSigmoid", "follows no int8 convolution"),
    ],
)
def test_operations_without_a_sound_kernel_stay_float_with_a_reason(cell: nn.Cell, op: str, why: str) -> None:
    graph, plan = planned(Between(cell))
    node = next(node for node in plan.nodes if node.op == op)
    assert node.precision == "float"
    assert why in node.reason
    assert plan.node("second").precision == "int8"
    assert graph.node("second").inputs[0] in plan.groups, "its float input is quantised where the convolution reads it"


def test_a_float_rule_keeps_a_layer_and_its_relu_float() -> None:
    graph, plan = planned(Residual(), rules=[Rule("path", "first", FLOAT)])
    assert plan.node("first").precision == "float"
    assert plan.node("first").reason == "kept float by rule 'path: first'"
    assert plan.node("relu").precision == "float", "its kernel is gone"
    assert "first" not in plan.weights
    assert graph.inputs[0] not in plan.activations, "nobody reads the input in int8"


def test_a_float_rule_on_the_relu_alone_unfuses_it() -> None:
    graph, plan = planned(Residual(), rules=[Rule("path", "relu_1", FLOAT)])
    assert plan.node("relu_1").precision == "float"
    assert value_of(graph, "add") in plan.groups


class Forked(nn.Cell):
    """A float value read by an int8 convolution and by a float operation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(), conv()
        self.sigmoid, self.tanh = nn.Sigmoid(), nn.HSigmoid()

    def construct(self, x):  # type: ignore[no-untyped-def]
        y = self.sigmoid(self.first(x))
        return self.second(y), self.tanh(y)


def test_a_float_value_with_int8_and_float_readers_is_quantised_on_the_int8_edges() -> None:
    graph, plan = planned(Forked())
    value = value_of(graph, "sigmoid")
    assert plan.activations[value].edges == (("second", 0),)
    assert plan.activations[value_of(graph, "first")].edges == (), "computed in int8: every reader sees it quantised"


def test_pools_between_float_operations_stay_float() -> None:
    class Floats(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.pool, self.tanh, self.sigmoid = conv(), nn.MaxPool2d(2, 2), nn.Sigmoid(), nn.Sigmoid()

        def construct(self, x):  # type: ignore[no-untyped-def]
            return self.sigmoid(self.pool(self.tanh(self.first(x))))

    _, plan = planned(Floats())
    assert (plan.node("pool").precision, plan.node("pool").reason) == ("float", "no neighbour runs in int8")


def test_a_chain_of_pools_reaches_its_int8_neighbour_from_every_branch() -> None:
    class Chain(nn.Cell):
        """tanh → pool a → (pool b → convolution, pool c → tanh)"""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.MaxPool2d(2, 1), nn.MaxPool2d(2, 1), nn.MaxPool2d(3, 1)
            self.first, self.tanh = conv(), nn.HSigmoid()

        def construct(self, x):  # type: ignore[no-untyped-def]
            y = self.a(self.tanh(x))
            one = self.first(self.b(y))
            return one, self.tanh(self.c(y))

    _, plan = planned(Chain())
    assert {name: verdicts(plan)[name] for name in "abc"} == {"a": "int8", "b": "int8", "c": "int8"}


def test_broadcast_addition_stays_float() -> None:
    class Wide(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = conv(), conv()

        def construct(self, x):  # type: ignore[no-untyped-def]
            y = self.first(x)
            return self.second(y + ops.mean(y, (2, 3), keep_dims=True))

    _, plan = planned(Wide())
    node = next(node for node in plan.nodes if node.op == "Add")
    assert node.precision == "float"
    assert "first item only" in node.reason
    assert node.avoids == ("batch_broadcast",)


def test_concat_reads_and_gives_int8() -> None:
    class Joined(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = conv(), conv(), conv(8, 4)

        def construct(self, x):  # type: ignore[no-untyped-def]
            return self.third(ops.concat((self.first(x), self.second(x)), 1))

    graph, plan = planned(Joined())
    assert set(verdicts(plan).values()) == {"int8"}
    assert set(plan.groups) == {graph.inputs[0], *(node.output for node in graph.nodes)}


def test_concat_between_float_operations_stays_float() -> None:
    class Joined(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.sigmoid = conv(), nn.Sigmoid()

        def construct(self, x):  # type: ignore[no-untyped-def]
            y = self.sigmoid(self.first(x))
            return self.sigmoid(ops.concat((y, self.sigmoid(y)), 1))

    _, plan = planned(Joined())
    assert plan.node(_node_of(plan, "Concat")).reason == "no neighbour runs in int8"


@pytest.mark.parametrize(("group", "axis", "warned"), [(1, 0, False), (2, None, True), (4, 0, False)])
def test_per_channel_weights_of_grouped_convolutions(group: int, axis: int | None, warned: bool) -> None:
    config = QuantConfig().override({"weight.per_channel": True})
    net = nn.SequentialCell(conv(group=group), conv())
    _, plan = planned(net, config=config)
    assert plan.weights["0"].axis == axis
    assert plan.weights["1"].axis == 0
    assert any("grouped convolution" in text for text in plan.warnings) == warned


def test_activation_bits_the_kernels_do_not_clamp_to_are_told_once_a_layer() -> None:
    _, plan = planned(Residual(), config=QuantConfig(act_quant_dtype=4))
    assert {group.bits for group in plan.groups.values()} == {4}
    assert any("clamps activations to 8 bits; 4-bit" in text for text in plan.warnings)
    assert len(plan.warnings) == len(set(plan.warnings))


def test_settings_reach_weights_and_groups_with_their_rule() -> None:
    rule = Rule(
        "path",
        "second",
        {"weight.quant_dtype": 4, "act_quant_delay": 9, "act_observer": "kl", "act_symmetric": True},
        "mine",
    )
    graph, plan = planned(Residual(), rules=[rule])
    weight, group = plan.weights["second"], plan.groups[value_of(graph, "second")]
    assert (weight.bits, weight.rule) == (4, "mine")
    assert (group.delay, group.observer, group.symmetric, group.rule) == (9, "kl", True, "mine")
    assert plan.groups[value_of(graph, "relu")].delay == 0


def test_batchnorm_of_a_float_value_stays_float() -> None:
    class Alone(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.first = nn.BatchNorm2d(4), conv()

        def construct(self, x):  # type: ignore[no-untyped-def]
            return self.first(self.norm(x))

    _, plan = planned(Alone())
    assert plan.node("norm").precision == "float"
    assert plan.node("norm").reason == "its input is computed in float"


def test_batchnorm_and_relu_of_int8_values_are_depthwise_convolutions() -> None:
    net = nn.SequentialCell(conv(), nn.MaxPool2d(2, 2), nn.BatchNorm2d(4), nn.ReLU(), conv())
    graph, plan = planned(net)
    assert set(verdicts(plan).values()) == {"int8"}
    assert (plan.node("2").form, plan.node(name_of(plan, "ReLU")).fused_into) == ("depthwise", "2")
    assert value_of(graph, "2") not in plan.activations, "its ReLU is in its kernel"


def test_an_activation_falls_to_float_with_the_normalisation_it_was_fused_into() -> None:
    _, plan = planned(nn.SequentialCell(nn.BatchNorm2d(4), nn.ReLU(), conv()))
    relu = name_of(plan, "ReLU")
    assert verdicts(plan) == {"0": "float", relu: "float", "2": "int8"}
    assert plan.node(relu).fused_into is None


def test_a_hard_sigmoid_behind_a_layer_has_its_kernel_and_a_fixed_range() -> None:
    graph, plan = planned(nn.SequentialCell(conv(), nn.HSigmoid(), conv()))
    name = name_of(plan, "HSigmoid")
    node, group = plan.node(name), plan.groups[value_of(graph, name)]
    assert (node.fused_into, node.form) == ("0", "hard sigmoid")
    assert (group.range, group.fixed, group.delay) == ((0.0, 1.0), True, 0)
    assert plan.with_ranges({group.name: (-9.0, 9.0)}).groups[group.name].range == (0.0, 1.0)
    _, plan = planned(nn.SequentialCell(conv(), nn.HSigmoid(), conv()), config=QuantConfig(act_quant_dtype=4))
    assert plan.node(name_of(plan, "HSigmoid")).precision == "float", "the clip at 1 is that of 8 bits"


class Attention(nn.Cell):
    """Products of two computed values, a scale, a softmax and a normalisation."""

    def __init__(self, scale: float = 0.5, axis: int = -1) -> None:
        super().__init__()
        self.scale, self.axis = scale, axis
        self.first, self.norm, self.last = nn.Dense(6, 6), nn.LayerNorm((6,)), nn.Dense(6, 6)

    def construct(self, x):  # type: ignore[no-untyped-def]
        y = self.norm(self.first(x))
        weights = ops.softmax(ops.BatchMatMul(transpose_b=True)(y, y) * self.scale, self.axis)
        return self.last(ops.BatchMatMul()(weights, y))


def _node_of(plan: QuantPlan, *ops_: str) -> str:
    return next(node.name for node in plan.nodes if node.op in ops_)


def test_attention_is_int8_with_a_softmax_of_fixed_range() -> None:
    graph, plan = planned(Attention(), (5, 6))
    assert set(verdicts(plan).values()) == {"int8"}
    softmax = plan.groups[value_of(graph, _node_of(plan, "Softmax"))].qparams()
    assert (float(softmax.scale), int(softmax.zero_point)) == (1 / 256, -128)
    assert plan.node(_node_of(plan, "Softmax")).avoids == ("softmax_parameters",)
    norm = plan.weights[_node_of(plan, "LayerNorm")]
    assert (norm.bits, norm.axis) == (8, None)
    assert not any("LayerNorm" in text for text in plan.warnings)


class NormRead(nn.Cell):
    """A normalisation between two dense layers, whose values go to `how` as well."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.norm, self.last = how, nn.Dense(6, 6), nn.LayerNorm((6,)), nn.Dense(6, 6)

    def construct(self, x):  # type: ignore[no-untyped-def]
        y = self.norm(self.first(x))
        if self.how == "mean":
            return self.last(y) + y.mean(1, keep_dims=True)
        if self.how == "output":
            return self.last(y), y
        return self.last(y)


@pytest.mark.parametrize("how", ["dense", "mean", "output"])
def test_a_normalisation_is_int8_whatever_reads_it(how: str) -> None:
    graph, plan = planned(NormRead(how), (5, 6))
    norm = plan.node(_node_of(plan, "LayerNorm"))
    assert norm.precision == plan.node("last").precision == "int8"
    assert norm.name in plan.weights
    assert plan.activations[graph.node("norm").output].edges == ()


def test_a_product_with_a_number_changes_the_scale_alone() -> None:
    graph, plan = planned(Attention(0.3), (5, 6))
    value = value_of(graph, _node_of(plan, "Mul", "Muls"))
    source = graph.tensor_inputs(graph.node(_node_of(plan, "Mul", "Muls")))[0]
    group = plan.groups[value]
    assert plan.activations[value].exact
    assert (group.source, group.factor) == (source, pytest.approx(0.3))
    assert value not in plan.ranges()
    known = plan.with_ranges({source: (-2.0, 4.0), value: (-100.0, 100.0)})
    one, other = known.groups[source].qparams(), known.groups[value].qparams()
    assert other.zero_point == one.zero_point
    assert other.scale == np.float32(one.scale * np.float32(group.factor))


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_a_product_with_a_number_that_is_not_positive_stays_float(scale: float) -> None:
    _, plan = planned(Attention(scale), (5, 6))
    assert plan.node(_node_of(plan, "Mul", "Muls")).precision == "float"


def test_a_long_softmax_stays_float() -> None:
    _, plan = planned(Attention(), (512, 6))
    node = plan.node(_node_of(plan, "Softmax"))
    assert (node.precision, node.avoids) == ("float", ("softmax_sum",))
    assert "512 values, allowed are 511" in node.reason


def test_parts_of_a_value_share_its_parameters() -> None:
    class Parts(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = conv(), conv()

        def construct(self, x):  # type: ignore[no-untyped-def]
            left, right = ops.split(ops.pad(self.first(x), (1, 1, 1, 1)), 2, 1)
            grown = ops.interpolate(
                ops.concat((right, left), 1)[:, :, 1:5, ::2], scale_factor=2.0, recompute_scale_factor=True
            )
            return self.second(ops.gather(grown, ms.Tensor([3, 0, 1, 2]), 1))

    graph, plan = planned(Parts())
    assert set(verdicts(plan).values()) == {"int8"}
    shared = {quant.group for quant in plan.activations.values() if quant.exact}
    joined = value_of(graph, _node_of(plan, "Concat"))
    assert shared == {value_of(graph, "first"), joined}, "a concatenation of two has parameters of its own"


def test_a_parameter_that_is_moved_stays_float() -> None:
    class Moved(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.first = conv()
            self.table = ms.Parameter(ms.numpy.ones((4, 4)), name="table")

        def construct(self, x):  # type: ignore[no-untyped-def]
            return self.first(x) + ops.reshape(self.table, (1, 4, 2, 2))

    _, plan = planned(Moved(), (4, 2, 2))
    assert plan.node(_node_of(plan, "Reshape")).reason == "it reads nothing that is computed"


def test_unknown_target() -> None:
    graph = deployment_graph(capture(Residual(), (4, 8, 8)))
    with pytest.raises(PlanError, match="did you mean 'lite_arm'"):
        make_plan(graph, target="lite_amr")


def test_plan_as_data_has_stable_keys() -> None:
    _, plan = planned(Residual())
    data = plan.to_dict()
    assert set(data) == {
        "target",
        "network",
        "int8_share",
        "nodes",
        "weights",
        "activations",
        "groups",
        "dynamic",
        "avoided",
        "warnings",
    }
    assert {"name", "op", "precision", "reason", "rule", "fused_into"} <= set(data["nodes"][0])
    assert data["int8_share"] == 1.0


def test_cifar_resnet_is_wholly_int8() -> None:
    from msqkd.models import build_model

    _, plan = planned(build_model("msqkd", "resnet20", {}), (3, 32, 32))
    assert set(verdicts(plan).values()) == {"int8"}
    assert sum(node.op == "Add" for node in plan.nodes) == 9
    assert len(plan.weights) == 19 + 2 + 1


@pytest.mark.skipif(importlib.util.find_spec("mindcv") is None, reason="mindcv is not installed")
def test_mindcv_resnet50_is_wholly_int8() -> None:
    import mindcv

    ms.set_context(mode=ms.GRAPH_MODE)
    _, plan = planned(mindcv.create_model("resnet50"), (3, 224, 224))
    assert set(verdicts(plan).values()) == {"int8"}
    ops_of = [node.op for node in plan.nodes]
    assert (ops_of.count("Conv2D"), ops_of.count("Dense"), ops_of.count("Add")) == (53, 1, 16)
    assert sum(node.fused_into is not None for node in plan.nodes) == 49
    assert plan.int8_share() == 1.0


def test_a_float_layer_between_quantised_values_needs_no_warning() -> None:
    """Every file keeps it float, that for the converter too."""
    _graph, plan = planned(Residual(), rules=[Rule("path", "second", FLOAT)])
    assert plan.node("second").precision == "float"
    assert plan.warnings == []


def test_a_setting_is_ascribed_to_the_rule_that_made_it() -> None:
    rules = [
        Rule("path", "second", FLOAT, "makes it float"),
        Rule("path", "second", {"weight.quant_dtype": 4}, "narrows its weight"),
    ]
    _graph, plan = planned(Residual(), rules=rules)
    assert plan.node("second").reason == "kept float by rule 'makes it float'"
    assert any("'narrows its weight' changes nothing" in warning for warning in plan.warnings)
    assert not any("'makes it float' changes nothing" in warning for warning in plan.warnings)


def test_a_rule_on_what_has_no_parameters_of_its_own_is_warned_of() -> None:
    for changes in ({"act_quant_dtype": 4}, {"weight.quant_dtype": 4}):
        _graph, plan = planned(Residual(), rules=[Rule("op", "ReLU", changes, "mine")])
        assert any("'mine' changes nothing" in warning for warning in plan.warnings)


class Reshaped(nn.Cell):
    """Asks its input for the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Dense(2 * 6 * 6, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.fc(self.relu(self.conv(x)).reshape(x.shape[0], -1))


def test_integers_such_as_shapes_are_not_quantised() -> None:
    graph, plan = planned(Reshaped(), (1, 6, 6))
    for value in plan.activations:
        assert graph.values[value].type.dtype == "float32"
