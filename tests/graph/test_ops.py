"""Any operation the compiler writes can be called again with the same numbers, in both modes."""

from __future__ import annotations

from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from msqkd.graph.capture import capture
from msqkd.graph.cell import to_cell

IMAGE, VECTOR = (2, 4, 7, 8), (3, 6)


class Arithmetic(nn.Cell):
    def construct(self, x: Any) -> Any:
        return (2.0 - x) / 3.0 + 1.5 * x - 0.25 * x**2 + 1.0 / (x * x + 1.0)


class TwoOutputs(nn.Cell):
    def construct(self, x: Any) -> Any:
        first, second = ops.split(x, 2, 1)
        return first * 2.0, second


class Embedded(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)

    def construct(self, x: Any) -> Any:
        return self.table(ops.cast(ops.abs(x), ms.int32))


class Constant(nn.Cell):
    """Adds a tensor that is not a Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = ms.Tensor(np.arange(8, dtype=np.float32))

    def construct(self, x: Any) -> Any:
        return x + self.offset


class MultiHead(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Dense(6, 18)

    def construct(self, x: Any) -> Any:
        q, k, v = self.qkv(x).reshape(-1, 3, 6, 3).transpose(3, 0, 1, 2)
        scores = ops.softmax(ops.matmul(q, k.swapaxes(-1, -2)) * 0.4, axis=-1)
        return ops.matmul(scores, v)


CELLS: dict[str, tuple[Callable[[], nn.Cell], tuple[int, ...]]] = {
    "relu": (nn.ReLU, IMAGE),
    "relu6": (nn.ReLU6, IMAGE),
    "hswish": (nn.HSwish, IMAGE),
    "hsigmoid": (nn.HSigmoid, IMAGE),
    "sigmoid": (nn.Sigmoid, IMAGE),
    "tanh": (nn.Tanh, IMAGE),
    "silu": (nn.SiLU, IMAGE),
    "gelu": (nn.GELU, IMAGE),
    "gelu_exact": (lambda: nn.GELU(approximate=False), IMAGE),
    "elu": (nn.ELU, IMAGE),
    "mish": (nn.Mish, IMAGE),
    "prelu": (lambda: nn.PReLU(4), IMAGE),
    "leaky_relu": (lambda: nn.LeakyReLU(0.1), IMAGE),
    "softmax": (lambda: nn.Softmax(axis=1), IMAGE),
    "log_softmax": (lambda: nn.LogSoftmax(axis=-1), VECTOR),
    "layer_norm": (lambda: nn.LayerNorm((8,)), IMAGE),
    "group_norm": (lambda: nn.GroupNorm(2, 4), IMAGE),
    "split": (TwoOutputs, IMAGE),
    "nn_pad_constant": (lambda: nn.Pad(((0, 0), (1, 2), (0, 0), (3, 0))), IMAGE),
    "nn_pad_symmetric": (lambda: nn.Pad(((0, 0), (0, 0), (1, 2), (2, 1)), mode="SYMMETRIC"), IMAGE),
    "nn_pad_reflect": (lambda: nn.Pad(((0, 0), (0, 0), (1, 2), (2, 1)), mode="REFLECT"), IMAGE),
    "zero_pad": (lambda: nn.ZeroPad2d((1, 0, 2, 1)), IMAGE),
    "constant_pad": (lambda: nn.ConstantPad2d(1, 0.5), IMAGE),
    "reflection_pad": (lambda: nn.ReflectionPad2d(1), IMAGE),
    "upsample": (lambda: nn.Upsample(size=(14, 16), mode="bilinear", align_corners=False), IMAGE),
    "adaptive_avg_pool": (lambda: nn.AdaptiveAvgPool2d((3, 2)), IMAGE),
    "adaptive_avg_pool_global": (lambda: nn.AdaptiveAvgPool2d(1), IMAGE),
    "adaptive_max_pool": (lambda: nn.AdaptiveMaxPool2d((3, 2)), IMAGE),
    "embedding": (lambda: Embedded(), VECTOR),
    "mint_linear": (lambda: ms.mint.nn.Linear(6, 5), VECTOR),
    "dense_no_bias": (lambda: nn.Dense(6, 5, has_bias=False), VECTOR),
    "dense_on_maps": (lambda: nn.Dense(8, 5), IMAGE),
    "dense_with_activation": (lambda: nn.Dense(6, 5, activation="relu"), VECTOR),
    "attention": (MultiHead, VECTOR),
    "arithmetic": (Arithmetic, IMAGE),
    "constant_tensor": (Constant, IMAGE),
    "max_pool": (lambda: nn.MaxPool2d(2, 2), IMAGE),
    "max_pool_same": (lambda: nn.MaxPool2d(3, 2, pad_mode="same"), IMAGE),
    "max_pool_ceil": (lambda: nn.MaxPool2d(3, 2, pad_mode="pad", padding=1, ceil_mode=True), IMAGE),
    "avg_pool": (lambda: nn.AvgPool2d(2, 2), IMAGE),
    "avg_pool_same": (lambda: nn.AvgPool2d(3, 2, pad_mode="same"), IMAGE),
    "avg_pool_ceil": (lambda: nn.AvgPool2d(3, 2, "pad", 1, ceil_mode=True, count_include_pad=False), IMAGE),
    "conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, pad_mode="pad", padding=(1, 0, 2, 1), has_bias=True), IMAGE),
    "conv_same": (lambda: nn.Conv2d(4, 6, 3, stride=2), IMAGE),
    "conv_dilated": (lambda: nn.Conv2d(4, 6, 3, pad_mode="valid", dilation=2), IMAGE),
    "conv_depthwise": (lambda: nn.Conv2d(4, 4, 3, group=4), IMAGE),
    "conv_grouped": (lambda: nn.Conv2d(4, 6, 3, group=2, has_bias=True), IMAGE),
    "conv_1d": (lambda: nn.Conv1d(4, 6, 3, has_bias=True), (2, 4, 9)),
    "conv_transpose": (lambda: nn.Conv2dTranspose(4, 3, 3, stride=2, has_bias=True), IMAGE),
    "batch_norm": (lambda: nn.BatchNorm2d(4), IMAGE),
    "batch_norm_1d": (lambda: nn.BatchNorm1d(6), VECTOR),
    "batch_norm_not_affine": (lambda: nn.BatchNorm2d(4, affine=False), IMAGE),
    "dropout": (lambda: nn.SequentialCell(nn.Dropout(p=0.5), nn.ReLU()), IMAGE),
    "flatten": (nn.Flatten, IMAGE),
    "space_to_depth": (lambda: nn.PixelUnshuffle(2), (2, 4, 8, 8)),
    "pixel_shuffle": (lambda: nn.PixelShuffle(2), IMAGE),
}  # fmt: skip

# Functions of x.
EXPRESSIONS: dict[str, tuple[str, tuple[int, ...]]] = {
    "ops_gelu": ("ops.gelu(x)", IMAGE),
    "softplus": ("ops.softplus(x)", IMAGE),
    "instance_statistics": ("(x - x.mean((2, 3), True)) / ops.sqrt(x.var((2, 3), keepdims=True) + 1e-5)", IMAGE),
    "concat": ("ops.concat((x, x * 2.0, x), axis=1)", IMAGE),
    "cat_list": ("ops.cat([x, ops.relu(x)], -1)", IMAGE),
    "primitive_concat": ("ops.Concat(1)((x, -x))", IMAGE),
    "stack": ("ops.stack((x, x + 1.0), axis=2)", IMAGE),
    "add_n": ("ops.addn((x, x, x * 0.5))", IMAGE),
    "split_sizes": ("ops.split(x, [1, 3], 1)", IMAGE),
    "chunk": ("ops.chunk(x, 2, 1)[1]", IMAGE),
    "primitive_split": ("ops.Split(1, 2)(x)", IMAGE),
    "unstack": ("ops.unstack(x, 1)[2]", IMAGE),
    "top_k": ("ops.topk(x, 2)", VECTOR),
    "argmax": ("ops.argmax(x, 1)", IMAGE),
    "max_values": ("ops.max(x, 1)[0]", IMAGE),
    "transpose": ("ops.transpose(x, (0, 2, 3, 1))", IMAGE),
    "permute": ("x.permute(0, 3, 1, 2)", IMAGE),
    "channel_shuffle": ("x.reshape(-1, 2, 2, 7, 8).swapaxes(1, 2).reshape(-1, 4, 7, 8)", IMAGE),
    "reshape_from_shape": ("x.reshape(x.shape[0], -1)", IMAGE),
    "ops_pad_constant": ('ops.pad(x, (1, 2, 0, 1), mode="constant", value=0.5)', IMAGE),
    "ops_pad_reflect": ('ops.pad(x, (1, 2, 0, 1), mode="reflect")', IMAGE),
    "ops_pad_replicate": ('ops.pad(x, (1, 2, 0, 1), mode="replicate")', IMAGE),
    "resize_nearest": ('ops.interpolate(x, size=(14, 16), mode="nearest")', IMAGE),
    "resize_bilinear": ('ops.interpolate(x, size=(14, 16), mode="bilinear", align_corners=True)', IMAGE),
    "resize_nearest_v1": ("ops.ResizeNearestNeighbor((14, 16))(x)", IMAGE),
    "mean": ("x.mean((2, 3))", IMAGE),
    "reduce_sum": ("ops.sum(x, 1, keepdim=True)", IMAGE),
    "reduce_max": ("ops.amax(x, (2, 3))", IMAGE),
    "norm": ("x / ops.norm(x, dim=1, keepdim=True)", VECTOR),
    "cumsum": ("ops.cumsum(x, 1)", VECTOR),
    "gather": ("ops.gather(x, ms.Tensor([2, 0], ms.int32), 1)", IMAGE),
    "one_hot": ("ops.one_hot(ops.cast(ops.abs(x), ms.int32), 5).astype(ms.float32)", VECTOR),
    "matmul": ("ops.matmul(x, x.swapaxes(-1, -2))", IMAGE),
    "batch_matmul": ("ops.BatchMatMul(transpose_b=True)(x, x)", IMAGE),
    "bmm": ("ops.bmm(x[:, 0], x[:, 1].swapaxes(1, 2))", IMAGE),
    "primitive_matmul": ("ops.MatMul(transpose_b=True)(x, x)", VECTOR),
    "cast": ("x.astype(ms.float16).astype(ms.float32) + ops.cast(x > 0, ms.float32)", IMAGE),
    "to_int_and_back": ("x.to(ms.int32) + 1", IMAGE),
    "integer_scalar": ("x * 2 - 1 + x // 2 + x % 3", IMAGE),
    "power_exp_log": ("ops.exp(-ops.square(x)) + ops.log(ops.abs(x) + 1.0) + ops.pow(ops.abs(x), 0.5)", IMAGE),
    "rsqrt_floor_round": ("ops.rsqrt(x * x + 1.0) + ops.floor(x) - ops.round(x) + ops.ceil(x)", IMAGE),
    "squeeze": ("ops.squeeze(ops.expand_dims(x, 1), 1) + x.unsqueeze(0).squeeze(0)", IMAGE),
    "tile": ("ops.tile(x, (1, 2, 1, 1))", IMAGE),
    "broadcast": ("ops.broadcast_to(x[:, :1], (-1, 4, 7, 8)) * x", IMAGE),
    "repeat": ("ops.repeat_interleave(x, 2, axis=1)", IMAGE),
    "flip": ("ops.flip(x, (3,))", IMAGE),
    "clip": ("ops.clip_by_value(x, -0.5, 0.7)", IMAGE),
    "clamp": ("ops.clamp(x, -0.5, 0.7)", IMAGE),
    "tensor_clamp": ("x.clamp(min=0.1)", IMAGE),
    "where": ("ops.where(x > 0.1, x, x * 0.01)", IMAGE),
    "select": ("ops.select(x > 0.1, x, -x)", IMAGE),
    "masked_fill": ("ops.masked_fill(x, x > 0.5, -1.0)", IMAGE),
    "compare": ("ops.logical_and(x > 0, x < 1).astype(ms.float32) * ops.maximum(x, ops.minimum(x, 0.3))", IMAGE),
    "subsample": ("x[:, :, ::2, ::2]", IMAGE),
    "first_token": ("x[:, 0]", IMAGE),
    "slices": ("x[:, 1:3, ..., 2:-1] + x[:, 1:3, :, :5]", IMAGE),
    "new_axis": ("x[:, None, 1:]", IMAGE),
    "einsum_free_outer": ("ops.mul(x.expand_dims(2), x.expand_dims(1))", VECTOR),
    "ones_like": ("ops.ones_like(x) + ops.zeros_like(x) + ops.ones((8,), ms.float32)", IMAGE),
    "arange": ("x + ops.arange(0, 8, dtype=ms.float32)", IMAGE),
}  # fmt: skip


def as_arrays(result: Any) -> list[np.ndarray]:
    return [item.asnumpy() for item in (result if isinstance(result, (tuple, list)) else (result,))]


def check_equal(net: nn.Cell, shape: tuple[int, ...]) -> nn.Cell:
    """Compare the outputs of `net` and of the cell built from its capture; returns that cell."""
    net.set_train(False)
    x = ms.Tensor(np.random.default_rng(0).normal(size=shape).astype(np.float32))
    captured = to_cell(capture(net, x))
    for mode in (ms.GRAPH_MODE, ms.PYNATIVE_MODE):
        ms.set_context(mode=mode)
        expected, found = as_arrays(net(x)), as_arrays(captured(x))
        assert len(expected) == len(found)
        for one, other in zip(expected, found):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
    return captured


def check_gradient(net: nn.Cell, captured: nn.Cell, shape: tuple[int, ...]) -> None:
    x = ms.Tensor(np.random.default_rng(1).normal(size=shape).astype(np.float32))
    ms.set_context(mode=ms.PYNATIVE_MODE)
    expected, found = (ms.grad(lambda x, cell=cell: ops.tanh(first(cell(x))).sum())(x) for cell in (net, captured))
    np.testing.assert_allclose(found.asnumpy(), expected.asnumpy(), rtol=1e-5, atol=1e-6)


def first(result: Any) -> Any:
    return result[0] if isinstance(result, (tuple, list)) else result


@pytest.mark.parametrize("name", CELLS)
def test_a_captured_layer_gives_the_same_numbers(name: str) -> None:
    make, shape = CELLS[name]
    net = make()
    check_gradient(net, check_equal(net, shape), shape)


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_a_captured_function_gives_the_same_numbers(name: str, network: Callable[[str], nn.Cell]) -> None:
    expression, shape = EXPRESSIONS[name]
    check_equal(network(f"return {expression}"), shape)
