"""Random networks of the blocks that users write: convolution, residual sum, concat, attention, and so on."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

CLASSES = 5
KINDS = (
    "conv", "conv", "depthwise", "grouped", "residual", "residual", "concat", "dense_block", "maxpool", "avgpool",
    "squeeze", "attention", "shuffle", "slices", "shared", "dead", "scalars", "upsample", "double_norm", "average_same",
)  # fmt: skip
ACTIVATIONS = ("relu", "relu", "relu", "relu6", "hswish", "leaky", "silu", "sigmoid", "gelu", "tanh", "none")


def random_network(rng: np.random.Generator) -> tuple[Any, list[str], tuple[int, int, int]]:
    """Return a random network, the kinds of its blocks, and its sample shape (C, H, W)."""
    height, width = int(rng.choice([8, 12])), int(rng.choice([8, 10, 12]))
    channels = int(rng.choice([4, 6, 8]))
    kinds = [str(kind) for kind in rng.choice(KINDS, size=int(rng.integers(2, 6)))]
    blocks = [nn.SequentialCell([nn.Conv2d(3, channels, 3, has_bias=bool(rng.integers(2))), nn.ReLU()])]
    size = (height, width)
    for kind in kinds:
        block, channels, size = make_block(kind, channels, size, rng)
        blocks.append(block)
    two_outputs = bool(rng.integers(4) == 0)

    class Net(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.SequentialCell(blocks)
            self.fc = nn.Dense(channels, CLASSES)
            if two_outputs:
                self.side = nn.Conv2d(channels, 2, 1, has_bias=True)

        def construct(self, x: Any) -> Any:
            x = self.blocks(x)
            logits = self.fc(ops.mean(x, (2, 3)))
            if two_outputs:
                return logits, self.side(x)
            return logits

    return Net(), kinds + (["two_outputs"] if two_outputs else []), (3, height, width)


def activation(rng: np.random.Generator) -> Any:
    """Return a random activation cell."""
    kinds = {
        "relu": nn.ReLU, "relu6": nn.ReLU6, "hswish": nn.HSwish, "leaky": nn.LeakyReLU, "silu": nn.SiLU,
        "sigmoid": nn.Sigmoid, "gelu": nn.GELU, "tanh": nn.Tanh, "none": nn.Identity,
    }  # fmt: skip
    return kinds[str(rng.choice(ACTIVATIONS))]()


def make_block(
    kind: str, channels: int, size: tuple[int, int], rng: np.random.Generator
) -> tuple[Any, int, tuple[int, int]]:
    """Return a block of a kind, with its channels and the size of its maps."""
    if kind in ("maxpool", "avgpool") and min(size) >= 4:
        make = nn.MaxPool2d if kind == "maxpool" else nn.AvgPool2d
        return make(2, 2), channels, (size[0] // 2, size[1] // 2)
    if kind == "average_same":
        return nn.AvgPool2d(3, 1, pad_mode="same"), channels, size
    if kind in ("concat", "dense_block"):
        wider = channels + 4 if kind == "dense_block" else 2 * (channels // 2 + 2)
        return Concat(kind, channels, rng), wider, size
    if kind == "upsample" and max(size) <= 8:
        return Upsample(channels, size), channels, (2 * size[0], 2 * size[1])
    cells = {
        "residual": Residual, "squeeze": Squeeze, "attention": Attention, "shuffle": Shuffle, "slices": Slices,
        "shared": Shared, "scalars": Scalars, "dead": Dead, "double_norm": DoubleNorm,
    }  # fmt: skip
    if kind in cells:
        return cells[kind](channels, rng), channels, size
    return _conv(kind, channels, size, rng)


def _conv(kind: str, channels: int, size: tuple[int, int], rng: np.random.Generator) -> Any:
    out = channels if kind == "depthwise" else int(rng.choice([4, 6, 8, 10]))
    group = channels if kind == "depthwise" else 2 if kind == "grouped" and channels % 2 == 0 else 1
    kernel, stride = int(rng.choice([1, 3, 3, 5])), int(rng.choice([1, 1, 2])) if min(size) >= 4 else 1
    dilation = int(rng.choice([1, 1, 2])) if stride == 1 else 1
    parts = [
        nn.Conv2d(
            channels, out, kernel, stride, group=group, dilation=dilation, has_bias=bool(rng.integers(2)),
            pad_mode="pad", padding=dilation * (kernel // 2),
        )
    ]  # fmt: skip
    parts += [nn.BatchNorm2d(out)] if rng.integers(3) else []
    parts += [activation(rng)]
    return nn.SequentialCell(parts), out, tuple((n + stride - 1) // stride for n in size)


def randomize(net: Any, rng: np.random.Generator) -> None:
    """Give parameters the statistics of a trained network; the channels of a "dead" block are silent."""
    for parameter in net.get_parameters():
        name, shape = parameter.name, parameter.shape
        if "moving_variance" in name:
            value = rng.uniform(0.5, 2, shape)
        elif "moving_mean" in name:
            value = rng.normal(size=shape) * 0.3
        elif "gamma" in name:
            value = rng.uniform(0.5, 1.5, shape)
        elif "beta" in name or "bias" in name:
            value = rng.normal(size=shape) * 0.2
        else:
            value = rng.normal(size=shape) / np.sqrt(max(1, int(np.prod(shape[1:]))))
        if "dead" in name and ("gamma" in name or "beta" in name or "moving_mean" in name):
            value[0] = 0.0
        if "dead" in name and "moving_variance" in name:
            value[0] = 1e-12
        parameter.set_data(ms.Tensor(value.astype(np.float32)))
    net.set_train(False)


class Residual(nn.Cell):
    def __init__(self, channels: int, rng: np.random.Generator) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)
        self.act, self.last = activation(rng), nn.ReLU() if rng.integers(2) else nn.Identity()

    def construct(self, x: Any) -> Any:
        return self.last(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))) + x)


class Concat(nn.Cell):
    def __init__(self, kind: str, channels: int, rng: np.random.Generator) -> None:
        super().__init__()
        half = channels // 2 + 2
        self.keeps = kind == "dense_block"
        self.one = nn.Conv2d(channels, 4 if self.keeps else half, 3)
        self.other = nn.Conv2d(channels, half, 1)
        self.act = activation(rng)

    def construct(self, x: Any) -> Any:
        other = x if self.keeps else self.act(self.other(x))
        return ops.cat((other, self.act(self.one(x))), 1)


class Squeeze(nn.Cell):
    def __init__(self, channels: int, rng: np.random.Generator) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 2, 1, has_bias=True), nn.Conv2d(2, channels, 1, has_bias=True)
        self.relu, self.gate = nn.ReLU(), nn.HSigmoid() if rng.integers(2) else nn.Sigmoid()

    def construct(self, x: Any) -> Any:
        return x * self.gate(self.up(self.relu(self.down(ops.mean(x, (2, 3), True)))))


class Attention(nn.Cell):
    def __init__(self, channels: int, rng: np.random.Generator) -> None:
        super().__init__()
        self.channels = channels
        self.norm = nn.LayerNorm((channels,))
        self.q, self.k = nn.Dense(channels, channels), nn.Dense(channels, channels)
        self.v, self.proj = nn.Dense(channels, channels), nn.Dense(channels, channels)

    def construct(self, x: Any) -> Any:
        n, c, h, w = x.shape
        tokens = x.reshape(n, c, h * w).transpose(0, 2, 1)
        y = self.norm(tokens)
        scores = ops.matmul(self.q(y), self.k(y).transpose(0, 2, 1)) * (self.channels**-0.5)
        y = tokens + self.proj(ops.matmul(ops.softmax(scores, -1), self.v(y)))
        return y.transpose(0, 2, 1).reshape(n, c, h, w)


class Shuffle(nn.Cell):
    def __init__(self, channels: int, rng: np.random.Generator) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1, group=2)

    def construct(self, x: Any) -> Any:
        n, c, h, w = x.shape
        x = self.conv(x).reshape(n, 2, c // 2, h, w)
        return x.transpose(0, 2, 1, 3, 4).reshape(n, c, h, w)


class Slices(nn.Cell):
    def __init__(self, channels: int, rng: np.random.Generator) -> None:
        super().__init__()
        self.half = channels // 2
        self.conv = nn.Conv2d(channels - self.half, channels - self.half, 3)
        self.act = activation(rng)

    def construct(self, x: Any) -> Any:
        return ops.cat((x[:, : self.half], self.act(self.conv(x[:, self.half :]))), 1)


class Shared(nn.Cell):
    def __init__(self, channels: int, rng: np.random.Generator) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(channels, channels, 3), nn.BatchNorm2d(channels), nn.ReLU()

    def construct(self, x: Any) -> Any:
        return self.relu(self.bn(self.conv(self.relu(self.conv(x)))))


class Scalars(nn.Cell):
    def __init__(self, channels: int, rng: np.random.Generator) -> None:
        super().__init__()
        self.scale = Parameter(Tensor(np.ones((1, channels, 1, 1), np.float32)), name="scale")
        self.conv = nn.Conv2d(channels, channels, 1)

    def construct(self, x: Any) -> Any:
        return (self.conv(x * 0.5 + 1.0) * self.scale - 0.25) / 2.0


class Dead(nn.Cell):
    def __init__(self, channels: int, rng: np.random.Generator) -> None:
        super().__init__()
        self.conv, self.dead, self.relu = nn.Conv2d(channels, channels, 3), nn.BatchNorm2d(channels), nn.ReLU()

    def construct(self, x: Any) -> Any:
        return self.relu(self.dead(self.conv(x)))


class DoubleNorm(nn.Cell):
    def __init__(self, channels: int, rng: np.random.Generator) -> None:
        super().__init__()
        self.conv, self.bn1 = nn.Conv2d(channels, channels, 3), nn.BatchNorm2d(channels)
        self.bn2, self.act = nn.BatchNorm2d(channels), activation(rng)

    def construct(self, x: Any) -> Any:
        return self.act(self.bn2(self.bn1(self.conv(x))))


class Upsample(nn.Cell):
    def __init__(self, channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = (2 * size[0], 2 * size[1])
        self.conv = nn.Conv2d(channels, channels, 1)

    def construct(self, x: Any) -> Any:
        return self.conv(ops.ResizeNearestNeighbor(self.size)(x))


# -- tokens ------------------------------------------------------------------------------------------------------------
TOKEN_KINDS = (
    "dense", "dense", "feed_forward", "feed_forward", "self_attention", "self_attention", "mixer", "gate", "pad",
    "slices", "norm", "average", "scaled",
)  # fmt: skip


def random_tokens(rng: np.random.Generator) -> tuple[Any, list[str], tuple[int, int]]:
    """Return a random network of tokens, the kinds of its blocks, and its sample shape (tokens, channels)."""
    length, channels = int(rng.choice([4, 6, 7, 9])), int(rng.choice([8, 12, 16]))
    kinds = [str(kind) for kind in rng.choice(TOKEN_KINDS, size=int(rng.integers(2, 5)))]
    last = str(rng.choice(["mean", "first", "all", "max"]))
    shape, inner = (length, channels), bool(rng.integers(2))
    blocks: list[Any] = [nn.SequentialCell([nn.Dense(channels, channels), activation(rng)])]
    for kind in kinds:
        block, length = _token_block(kind, length, channels, rng)
        blocks.append(block)

    class Net(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.head = nn.SequentialCell(blocks), nn.Dense(channels, CLASSES)
            self.norm = nn.LayerNorm((channels,)) if inner else nn.Identity()

        def construct(self, x: Any) -> Any:
            x = self.norm(self.blocks(x))
            if last == "mean":
                x = x.mean(1)
            elif last == "first":
                x = x[:, 0]
            elif last == "max":
                x = x.max(1)
            return self.head(x)

    return Net(), [*kinds, last], shape


def _token_block(kind: str, length: int, channels: int, rng: np.random.Generator) -> tuple[Any, int]:
    """Return a block of a kind, and the number of tokens it gives."""
    if kind == "pad":
        return TokenPad(), length + 2
    if kind == "average" and length % 2 == 0:
        return TokenAverage(), length // 2
    cells = {
        "feed_forward": FeedForward, "self_attention": SelfAttention, "gate": TokenGate, "slices": TokenSlices,
        "scaled": TokenScale,
    }  # fmt: skip
    if kind in cells:
        return cells[kind](channels, rng), length
    if kind == "mixer":
        return Mixer(length, rng), length
    if kind == "norm":
        return nn.LayerNorm((channels,)), length
    return nn.SequentialCell([nn.Dense(channels, channels), activation(rng)]), length


class FeedForward(nn.Cell):
    def __init__(self, channels: int, rng: np.random.Generator) -> None:
        super().__init__()
        self.before = bool(rng.integers(2))
        self.norm, self.act = nn.LayerNorm((channels,)), activation(rng)
        self.up, self.down = nn.Dense(channels, 2 * channels), nn.Dense(2 * channels, channels)

    def construct(self, x: Any) -> Any:
        if self.before:
            return x + self.down(self.act(self.up(self.norm(x))))
        return self.norm(x + self.down(self.act(self.up(x))))


class SelfAttention(nn.Cell):
    def __init__(self, channels: int, rng: np.random.Generator) -> None:
        super().__init__()
        self.heads, self.width, self.divides = 2, channels // 2, bool(rng.integers(2))
        self.norm, self.qkv, self.out = (
            nn.LayerNorm((channels,)), nn.Dense(channels, 3 * channels), nn.Dense(channels, channels),
        )  # fmt: skip

    def construct(self, x: Any) -> Any:
        n, t, c = x.shape
        qkv = self.qkv(self.norm(x)).reshape(n, t, 3, self.heads, self.width).transpose(2, 0, 3, 1, 4)
        scores = ops.matmul(qkv[0], qkv[1].transpose(0, 1, 3, 2))
        scores = scores / self.width**0.5 if self.divides else scores * self.width**-0.5
        y = ops.matmul(ops.softmax(scores, -1), qkv[2]).transpose(0, 2, 1, 3).reshape(n, t, c)
        return x + self.out(y)


class Mixer(nn.Cell):
    """A dense layer over the tokens."""

    def __init__(self, length: int, rng: np.random.Generator) -> None:
        super().__init__()
        self.dense, self.act = nn.Dense(length, length), activation(rng)

    def construct(self, x: Any) -> Any:
        return x + self.act(self.dense(x.transpose(0, 2, 1))).transpose(0, 2, 1)


class TokenGate(nn.Cell):
    def __init__(self, channels: int, rng: np.random.Generator) -> None:
        super().__init__()
        self.value, self.gate = nn.Dense(channels, channels), nn.Dense(channels, channels)
        self.act = nn.Sigmoid() if rng.integers(2) else nn.SiLU()

    def construct(self, x: Any) -> Any:
        return self.value(x) * self.act(self.gate(x))


class TokenPad(nn.Cell):
    def construct(self, x: Any) -> Any:
        return ops.pad(x, (0, 0, 1, 1))


class TokenAverage(nn.Cell):
    """The mean of two tokens in a row."""

    def construct(self, x: Any) -> Any:
        n, t, c = x.shape
        return x.reshape(n, t // 2, 2, c).mean(2)


class TokenSlices(nn.Cell):
    def __init__(self, channels: int, rng: np.random.Generator) -> None:
        super().__init__()
        self.half = channels // 2
        self.dense, self.act = nn.Dense(self.half, self.half), activation(rng)

    def construct(self, x: Any) -> Any:
        return ops.cat((x[..., self.half :], self.act(self.dense(x[..., : self.half]))), -1)


class TokenScale(nn.Cell):
    """A factor and an offset a channel, and numbers."""

    def __init__(self, channels: int, rng: np.random.Generator) -> None:
        super().__init__()
        self.scale = Parameter(Tensor(np.ones((channels,), np.float32)), name="scale")
        self.dense = nn.Dense(channels, channels)

    def construct(self, x: Any) -> Any:
        return self.dense(x * 0.5) * self.scale + 0.25
