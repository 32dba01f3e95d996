"""Small networks for `bench/converter.py`, one for each operation or pattern that the converter rewrites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import nn, ops

PICTURE = (3, 16, 16)
NETWORKS: dict[str, tuple[Callable[[], nn.Cell], tuple[Any, ...]]] = {}
"""Name -> (constructor, shape of a sample, or those of several inputs)."""


def network(cls: Any) -> Any:
    """Register a class by its name; `shape` is that of a sample."""
    NETWORKS[cls.__name__] = (cls, getattr(cls, "shape", PICTURE))
    return cls


def conv(channels: int, out: int, kernel: int = 3, stride: int = 1, **settings: Any) -> nn.Conv2d:
    settings = {"has_bias": True, "pad_mode": "same", **settings}
    return nn.Conv2d(channels, out, kernel, stride, **settings)


class Between(nn.Cell):
    """A convolution with ReLU, the part under test (8 channels in, `out` channels out), and a convolution."""

    out = 8

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu, self.tail = conv(3, 8), nn.ReLU(), conv(self.out, 6)
        self.parts()

    def parts(self) -> None:
        """Add the cells of the part."""

    def part(self, x):  # type: ignore[no-untyped-def]
        """Compute the part."""
        return x

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.tail(self.part(self.relu(self.stem(x))))


@network
class Chain(Between):
    pass


@network
class AverageSame(Between):
    def parts(self):  # type: ignore[no-untyped-def]
        self.pool = nn.AvgPool2d(3, 2, "same")

    def part(self, x):  # type: ignore[no-untyped-def]
        return self.pool(x)


@network
class AverageValid(Between):
    def parts(self):  # type: ignore[no-untyped-def]
        self.pool = nn.AvgPool2d(2, 2)

    def part(self, x):  # type: ignore[no-untyped-def]
        return self.pool(x)


@network
class MaxPadded(Between):
    def parts(self):  # type: ignore[no-untyped-def]
        self.pool = nn.MaxPool2d(3, 2, "pad", 1)

    def part(self, x):  # type: ignore[no-untyped-def]
        return self.pool(x)


@network
class MaxSame(Between):
    def parts(self):  # type: ignore[no-untyped-def]
        self.pool = nn.MaxPool2d(3, 2, "same")

    def part(self, x):  # type: ignore[no-untyped-def]
        return self.pool(x)


@network
class Nearest(Between):
    def part(self, x):  # type: ignore[no-untyped-def]
        return ops.interpolate(x, size=(32, 32), mode="nearest")


@network
class NearestResize(Between):
    def parts(self):  # type: ignore[no-untyped-def]
        self.resize = ops.ResizeNearestNeighbor((24, 24))

    def part(self, x):  # type: ignore[no-untyped-def]
        return self.resize(x)


@network
class Bilinear(Between):
    def part(self, x):  # type: ignore[no-untyped-def]
        return ops.interpolate(x, size=(32, 32), mode="bilinear")


@network
class BilinearAligned(Between):
    def part(self, x):  # type: ignore[no-untyped-def]
        return ops.interpolate(x, size=(31, 29), mode="bilinear", align_corners=True)


@network
class Transposed(Between):
    def parts(self):  # type: ignore[no-untyped-def]
        self.up = nn.Conv2dTranspose(8, 8, 2, 2, has_bias=True)

    def part(self, x):  # type: ignore[no-untyped-def]
        return self.up(x)


@network
class TransposedPadded(Between):
    def parts(self):  # type: ignore[no-untyped-def]
        self.up = nn.Conv2dTranspose(8, 8, 4, 2, "pad", 1)

    def part(self, x):  # type: ignore[no-untyped-def]
        return self.up(x)


@network
class TransposedSame(Between):
    def parts(self):  # type: ignore[no-untyped-def]
        self.up = nn.Conv2dTranspose(8, 8, 3, 2, "same")

    def part(self, x):  # type: ignore[no-untyped-def]
        return self.up(x)


@network
class ScalarMul(Between):
    def part(self, x):  # type: ignore[no-untyped-def]
        return x * 0.3


@network
class ScalarAdd(Between):
    def part(self, x):  # type: ignore[no-untyped-def]
        return x + 0.3


@network
class ScalarSub(Between):
    def part(self, x):  # type: ignore[no-untyped-def]
        return 1.0 - x


@network
class ScalarDiv(Between):
    def part(self, x):  # type: ignore[no-untyped-def]
        return x / 3


@network
class ScalarUnder(Between):
    def part(self, x):  # type: ignore[no-untyped-def]
        return 2.0 / (x + 1.0)


@network
class Normalised(Between):
    def part(self, x):  # type: ignore[no-untyped-def]
        return (x * 2.0 - 1.0) / 0.5


@network
class ScaledInput(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.SequentialCell(conv(3, 8), nn.ReLU(), conv(8, 4))

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.net((x - 0.5) / 0.25)


@network
class Padded(Between):
    def part(self, x):  # type: ignore[no-untyped-def]
        return ops.pad(x, (1, 2, 3, 0))


@network
class PaddedCell(Between):
    def parts(self):  # type: ignore[no-untyped-def]
        self.pad = nn.Pad(((0, 0), (0, 2), (1, 1), (2, 2)))
        self.tail = conv(10, 4)

    def part(self, x):  # type: ignore[no-untyped-def]
        return self.pad(x)


@network
class SplitChannels(Between):
    def part(self, x):  # type: ignore[no-untyped-def]
        one, other = ops.split(x, 4, 1)
        return ops.cat((other, one), 1)


@network
class Chunks(Between):
    def part(self, x):  # type: ignore[no-untyped-def]
        parts = ops.chunk(x, 4, 1)
        return ops.cat((parts[3], parts[1], parts[0], parts[2]), 1)


@network
class GatherChannels(Between):
    def part(self, x):  # type: ignore[no-untyped-def]
        return ops.gather(x, ms.Tensor([3, 1, 0, 2, 7, 5, 4, 6], ms.int32), 1)


@network
class Slices(Between):
    def part(self, x):  # type: ignore[no-untyped-def]
        return ops.cat((x[:, :4, 1:13, 2:14], x[:, 4:, 4:, :12]), 1)


@network
class StridedSlices(Between):
    out = 32

    def part(self, x):  # type: ignore[no-untyped-def]
        return ops.cat((x[:, :, ::2, ::2], x[:, :, 1::2, ::2], x[:, :, ::2, 1::2], x[:, :, 1::2, 1::2]), 1)


@network
class SliceDrops(Between):
    def parts(self):  # type: ignore[no-untyped-def]
        self.tail = nn.Dense(8, 5)

    def part(self, x):  # type: ignore[no-untyped-def]
        return x[:, :, 0, 0]


@network
class MeanPlane(Between):
    def parts(self):  # type: ignore[no-untyped-def]
        self.tail = nn.Dense(8, 5)

    def part(self, x):  # type: ignore[no-untyped-def]
        return x.mean((2, 3))


@network
class MeanChannels(Between):
    out = 1

    def part(self, x):  # type: ignore[no-untyped-def]
        return x.mean(1, keep_dims=True)


@network
class MeanRows(Between):
    def part(self, x):  # type: ignore[no-untyped-def]
        return x * x.mean(3, keep_dims=True)


@network
class MeanLast(Between):
    def parts(self):  # type: ignore[no-untyped-def]
        self.tail = nn.Dense(16, 5)

    def part(self, x):  # type: ignore[no-untyped-def]
        return x.mean(-1).reshape(-1, 128)[:, :16]


@network
class MaxPlane(Between):
    def parts(self):  # type: ignore[no-untyped-def]
        self.tail = nn.Dense(8, 5)

    def part(self, x):  # type: ignore[no-untyped-def]
        return x.max((2, 3))


@network
class MaxNegative(Between):
    """The largest of values that are all negative."""

    def parts(self):  # type: ignore[no-untyped-def]
        self.tail = nn.Dense(8, 5)

    def part(self, x):  # type: ignore[no-untyped-def]
        return (x * -1.0 - 0.5).max((2, 3))


@network
class SoftmaxHead(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu, self.head, self.softmax = conv(3, 8, stride=2), nn.ReLU(), nn.Dense(512, 10), nn.Softmax()

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.softmax(self.head(self.relu(self.stem(x)).reshape(-1, 512)))


def _activation(name: str, cell: Callable[[], nn.Cell]) -> None:
    def parts(self):  # type: ignore[no-untyped-def]
        self.act = cell()

    def part(self, x):  # type: ignore[no-untyped-def]
        return self.act(self.scale(x))

    def scaled(self):  # type: ignore[no-untyped-def]
        parts(self)
        self.scale = conv(8, 8)

    NETWORKS[name] = (type(name, (Between,), {"parts": scaled, "part": part}), PICTURE)


_activation("Silu", nn.SiLU)
_activation("GeluTanh", nn.GELU)
_activation("GeluErf", lambda: nn.GELU(approximate=False))
_activation("HardSwish", nn.HSwish)
_activation("HardSigmoid", nn.HSigmoid)
_activation("SigmoidAct", nn.Sigmoid)
_activation("TanhAct", nn.Tanh)
_activation("Leaky", lambda: nn.LeakyReLU(0.1))
_activation("Relu6", nn.ReLU6)
_activation("EluAct", nn.ELU)
_activation("PRelu", lambda: nn.PReLU(8))
_activation("MishAct", nn.Mish)


@network
class Gate(Between):
    """Squeeze and excitation."""

    def parts(self):  # type: ignore[no-untyped-def]
        self.squeeze, self.excite, self.sigmoid = conv(8, 4, 1), conv(4, 8, 1), nn.Sigmoid()

    def part(self, x):  # type: ignore[no-untyped-def]
        gate = self.excite(self.relu(self.squeeze(x.mean((2, 3), keep_dims=True))))
        return x * self.sigmoid(gate)


@network
class HardGate(Between):
    def parts(self):  # type: ignore[no-untyped-def]
        self.squeeze, self.excite, self.sigmoid = conv(8, 4, 1), conv(4, 8, 1), nn.HSigmoid()

    def part(self, x):  # type: ignore[no-untyped-def]
        gate = self.excite(self.relu(self.squeeze(x.mean((2, 3), keep_dims=True))))
        return x * self.sigmoid(gate)


@network
class SigmoidProduct(Between):
    """A planned-float sigmoid between two marked values."""

    def parts(self):  # type: ignore[no-untyped-def]
        self.a, self.b, self.sigmoid = conv(8, 8), conv(8, 8), nn.Sigmoid()

    def part(self, x):  # type: ignore[no-untyped-def]
        return self.a(x) * self.sigmoid(self.b(x))


@network
class SiluWritten(Between):
    def parts(self):  # type: ignore[no-untyped-def]
        self.a, self.sigmoid = conv(8, 8), nn.Sigmoid()

    def part(self, x):  # type: ignore[no-untyped-def]
        x = self.a(x)
        return x * self.sigmoid(x)


@network
class Residual(Between):
    def parts(self):  # type: ignore[no-untyped-def]
        self.a, self.b = conv(8, 8), conv(8, 8)

    def part(self, x):  # type: ignore[no-untyped-def]
        return self.relu(x + self.b(self.relu(self.a(x))))


@network
class PointwisePairs(Between):
    def parts(self):  # type: ignore[no-untyped-def]
        self.a, self.b, self.c = conv(8, 8, 1), conv(8, 12, 1), conv(12, 8, 1, pad_mode="valid")

    def part(self, x):  # type: ignore[no-untyped-def]
        return self.c(self.b(self.a(x)))


@network
class PointwiseShared(Between):
    """A pointwise convolution that is applied twice."""

    def parts(self):  # type: ignore[no-untyped-def]
        self.a = conv(8, 8, 1)

    def part(self, x):  # type: ignore[no-untyped-def]
        return self.a(self.a(x))


@network
class PadBeforeConv(Between):
    """A Pad in front of a convolution without padding of its own."""

    def parts(self):  # type: ignore[no-untyped-def]
        self.pad, self.tail = nn.Pad(((0, 0), (0, 0), (1, 1), (1, 1))), conv(8, 6, pad_mode="valid")

    def part(self, x):  # type: ignore[no-untyped-def]
        return self.pad(x)


@network
class NormAfterConcat(Between):
    """A BatchNorm that follows no convolution."""

    out = 16

    def parts(self):  # type: ignore[no-untyped-def]
        self.a, self.norm = conv(8, 8), nn.BatchNorm2d(16)

    def part(self, x):  # type: ignore[no-untyped-def]
        return self.relu(self.norm(ops.cat((x, self.a(x)), 1)))


@network
class NormFirst(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.net = nn.BatchNorm2d(3), nn.SequentialCell(conv(3, 8), nn.ReLU(), conv(8, 4))

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.net(self.norm(x))


@network
class ScaleParameter(Between):
    """A product and a sum with a parameter a channel, as layer scale has them."""

    def parts(self):  # type: ignore[no-untyped-def]
        self.a = conv(8, 8)
        self.gamma = ms.Parameter(np.linspace(0.1, 1, 8).astype(np.float32).reshape(8, 1, 1), name="gamma")
        self.beta = ms.Parameter(np.linspace(-1, 1, 8).astype(np.float32).reshape(8, 1, 1), name="beta")

    def part(self, x):  # type: ignore[no-untyped-def]
        return x + (self.a(x) * self.gamma + self.beta)


@network
class SquaredPart(Between):
    def part(self, x):  # type: ignore[no-untyped-def]
        return x * x


@network
class Reductions(Between):
    def part(self, x):  # type: ignore[no-untyped-def]
        return x - x.mean(1, keep_dims=True) + ops.ReduceSum(True)(x, (2,)) * 0.1


@network
class ReluTwice(Between):
    def part(self, x):  # type: ignore[no-untyped-def]
        return ops.relu6(self.relu(x))


@network
class AddRelu6(Between):
    def parts(self):  # type: ignore[no-untyped-def]
        self.a = conv(8, 8)

    def part(self, x):  # type: ignore[no-untyped-def]
        return ops.relu6(self.a(x) + x)


@network
class ConcatRelu(Between):
    out = 16

    def parts(self):  # type: ignore[no-untyped-def]
        self.a, self.b = conv(8, 8), conv(8, 8)

    def part(self, x):  # type: ignore[no-untyped-def]
        return self.relu(ops.cat((self.a(x), self.b(x)), 1))


@network
class ReluConcat(Between):
    out = 16

    def parts(self):  # type: ignore[no-untyped-def]
        self.a, self.b = conv(8, 8), conv(8, 8)

    def part(self, x):  # type: ignore[no-untyped-def]
        return ops.cat((self.relu(self.a(x)), self.relu(self.b(x))), 1)


@network
class ConcatConcat(Between):
    out = 24

    def parts(self):  # type: ignore[no-untyped-def]
        self.a, self.b = conv(8, 8), conv(8, 8)

    def part(self, x):  # type: ignore[no-untyped-def]
        return ops.cat((ops.cat((x, self.a(x)), 1), self.b(x)), 1)


@network
class Shuffle(Between):
    """Channels of two branches, mixed."""

    def parts(self):  # type: ignore[no-untyped-def]
        self.a = conv(4, 4)

    def part(self, x):  # type: ignore[no-untyped-def]
        n, c, h, w = x.shape
        left, right = x[:, : c // 2], x[:, c // 2 :]
        x = ops.cat((left, self.relu(self.a(right))), 1)
        x = x.reshape(n, 2, c // 2, h, w).transpose(0, 2, 1, 3, 4)
        return x.reshape(n, c, h, w)


@network
class ShuffleTwice(Between):
    def parts(self):  # type: ignore[no-untyped-def]
        self.a, self.b = conv(4, 4), conv(4, 4)

    def mixed(self, x, cell):  # type: ignore[no-untyped-def]
        n, c, h, w = x.shape
        x = ops.cat((x[:, : c // 2], self.relu(cell(x[:, c // 2 :]))), 1)
        return x.reshape(n, 2, c // 2, h, w).transpose(0, 2, 1, 3, 4).reshape(n, c, h, w)

    def part(self, x):  # type: ignore[no-untyped-def]
        return self.mixed(self.mixed(x, self.a), self.b)


@network
class ShuffleSquare(nn.Cell):
    """A transposition of (1, 2, 2, H, W) whose result has the shape of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu, self.tail = conv(3, 4), nn.ReLU(), conv(4, 4)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.relu(self.stem(x))
        x = x.reshape(-1, 2, 2, 16, 16).transpose(0, 2, 1, 3, 4).reshape(-1, 4, 16, 16)
        return self.tail(x)


@network
class FlattenCube(nn.Cell):
    """A map of 8 × 8 × 8 that is flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu, self.head = conv(3, 8, stride=2), nn.ReLU(), nn.Dense(512, 10)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.head(self.relu(self.stem(x)).reshape(-1, 512))


@network
class TransposeInput(nn.Cell):
    """A transposition whose result has the shape of its input, before any other."""

    shape = (12, 12)

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Dense(144, 10)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.head(x.transpose(0, 2, 1).reshape(-1, 144))


@network
class TransposeCube(nn.Cell):
    """A map of 8 × 8 × 8 in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu, self.tail = conv(3, 8, stride=2), nn.ReLU(), conv(8, 4)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.tail(self.relu(self.stem(x)).transpose(0, 3, 1, 2))


@network
class PixelShuffle(Between):
    def parts(self):  # type: ignore[no-untyped-def]
        self.a, self.mix = conv(8, 32), nn.PixelShuffle(2)

    def part(self, x):  # type: ignore[no-untyped-def]
        return self.mix(self.a(x))


@network
class ChannelsLast(Between):
    """A transposition to the front and back around a dense layer."""

    def parts(self):  # type: ignore[no-untyped-def]
        self.dense = nn.Dense(8, 8)

    def part(self, x):  # type: ignore[no-untyped-def]
        return self.dense(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


@network
class Squeezes(Between):
    def parts(self):  # type: ignore[no-untyped-def]
        self.pool, self.tail = nn.AvgPool2d(8, 8), nn.Dense(32, 4)

    def part(self, x):  # type: ignore[no-untyped-def]
        return ops.squeeze(ops.expand_dims(self.pool(x), 1), 1).reshape(-1, 32)


@network
class TwoOutputs(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu, self.a, self.b = conv(3, 8), nn.ReLU(), conv(8, 4), conv(8, 2, stride=2)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.relu(self.stem(x))
        return self.a(x), self.b(x)


@network
class Mlp(nn.Cell):
    shape = (20,)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.SequentialCell(nn.Dense(20, 32), nn.ReLU(), nn.Dense(32, 16), nn.Dense(16, 4))

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.net(x)


@network
class LeNet(nn.Cell):
    shape = (1, 32, 32)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.SequentialCell(
            conv(1, 6, 5, pad_mode="valid"), nn.ReLU(), nn.MaxPool2d(2, 2), conv(6, 16, 5, pad_mode="valid"), nn.ReLU(),
            nn.MaxPool2d(2, 2), nn.Flatten(), nn.Dense(400, 120), nn.ReLU(), nn.Dense(120, 84), nn.ReLU(),
            nn.Dense(84, 10),
        )  # fmt: skip

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.net(x)


@network
class Conv1d(nn.Cell):
    shape = (6, 32)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.relu, self.b = nn.Conv1d(6, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.b(self.relu(self.a(x)))


@network
class Tokens(nn.Cell):
    """Layer normalization and a feed-forward part over tokens."""

    shape = (6, 16)

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.gelu, self.down = nn.LayerNorm((16,)), nn.Dense(16, 32), nn.GELU(), nn.Dense(32, 16)
        self.head = nn.Dense(16, 4)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = x + self.down(self.gelu(self.up(self.norm(x))))
        return self.head(x.mean(1))


@network
class Attention(nn.Cell):
    shape = (6, 16)

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out, self.softmax = (
            nn.LayerNorm((16,)),
            nn.Dense(16, 48),
            nn.Dense(16, 16),
            nn.Softmax(),
        )
        self.inner, self.head = nn.Dense(16, 16), nn.Dense(16, 4)

    def construct(self, x):  # type: ignore[no-untyped-def]
        n = x.shape[0]
        x = self.inner(x)
        qkv = self.qkv(self.norm(x)).reshape(n, 6, 3, 2, 8).transpose(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        weights = self.softmax(ops.matmul(q, k.transpose(0, 1, 3, 2)) * 0.35)
        y = ops.matmul(weights, v).transpose(0, 2, 1, 3).reshape(n, 6, 16)
        return self.head((x + self.out(y)).mean(1))


@network
class Multihead(nn.Cell):
    """Attention as MindSpore has it."""

    shape = (6, 16)

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.attention = nn.Dense(16, 16), nn.MultiheadAttention(16, 4, batch_first=True)
        self.norm, self.head = nn.LayerNorm((16,)), nn.Dense(16, 4)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.inner(x)
        return self.head(self.norm(x + self.attention(x, x, x)[0]))


@network
class VisionBlock(nn.Cell):
    """Patches, a class token, positions, a block and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = conv(3, 16, 4, 4, pad_mode="valid"), nn.Dense(16, 5)
        self.token = ms.Parameter(np.zeros((1, 1, 16), np.float32), name="token")
        self.places = ms.Parameter(np.zeros((1, 17, 16), np.float32), name="places")
        self.first, self.second, self.last = nn.LayerNorm((16,)), nn.LayerNorm((16,)), nn.LayerNorm((16,))
        self.qkv, self.out, self.up, self.down = nn.Dense(16, 48), nn.Dense(16, 16), nn.Dense(16, 32), nn.Dense(32, 16)
        self.gelu, self.unstack, self.softmax = nn.GELU(approximate=False), ops.Unstack(0), nn.Softmax()

    def construct(self, x):  # type: ignore[no-untyped-def]
        n = x.shape[0]
        x = self.patches(x).reshape(n, 16, 16).transpose(0, 2, 1)
        x = ops.cat((ops.broadcast_to(self.token, (n, 1, 16)), x), 1) + self.places
        qkv = self.qkv(self.first(x)).reshape(n, 17, 3, 2, 8).transpose(2, 0, 3, 1, 4)
        q, k, v = self.unstack(qkv)
        weights = self.softmax(ops.BatchMatMul(transpose_b=True)(q, k) * 0.35)
        x = x + self.out(ops.matmul(weights, v).transpose(0, 2, 1, 3).reshape(n, 17, 16))
        x = x + self.down(self.gelu(self.up(self.second(x))))
        return self.head(self.last(x)[:, 0])


@network
class Language(nn.Cell):
    """Embeddings of words, places and kinds, a normalization, an encoder layer, and a pooled first token."""

    shape = (7,)

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.kinds = nn.Embedding(20, 16), nn.Embedding(7, 16), nn.Embedding(2, 16)
        self.norm, self.layer = (
            nn.LayerNorm((16,)),
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0),
        )
        self.pool, self.tanh, self.head = nn.Dense(16, 16), nn.Tanh(), nn.Dense(16, 3)
        self.order, self.zeros = ms.Tensor(np.arange(7)[None], ms.int32), ms.Tensor(np.zeros((1, 7)), ms.int32)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.norm(self.words(x) + self.places(self.order) + self.kinds(self.zeros))
        return self.head(self.tanh(self.pool(self.layer(x)[:, 0])))


@network
class PaddedRows(nn.Cell):
    """Zeros around rows, in three dimensions."""

    shape = (6, 8)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.relu, self.b = nn.Dense(8, 8), nn.ReLU(), nn.Dense(10, 4)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.b(ops.pad(self.relu(self.a(x)), (1, 1, 2, 0)))


@network
class Products(nn.Cell):
    shape = (4, 8)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Dense(8, 8), nn.Dense(8, 8)

    def construct(self, x):  # type: ignore[no-untyped-def]
        a, b = self.a(x), self.b(x)
        return ops.BatchMatMul(transpose_b=True)(a, b)


@network
class Encoder(nn.Cell):
    shape = (6, 16)

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), nn.Dense(16, 4)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.head(self.layer(x))


@network
class Recurrent(nn.Cell):
    shape = (5, 8)

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 12, batch_first=True), nn.Dense(12, 4)

    def construct(self, x):  # type: ignore[no-untyped-def]
        y, _ = self.lstm(x)
        return self.head(y[:, -1])


@network
class Gru(nn.Cell):
    shape = (5, 8)

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(8, 12, batch_first=True), nn.Dense(12, 4)

    def construct(self, x):  # type: ignore[no-untyped-def]
        y, _ = self.gru(x)
        return self.head(y[:, -1])


@network
class Embedded(nn.Cell):
    """Tokens by number; the shape is that of a sample of int32."""

    shape = (7,)

    def __init__(self) -> None:
        super().__init__()
        self.table, self.dense, self.relu, self.head = nn.Embedding(20, 8), nn.Dense(8, 16), nn.ReLU(), nn.Dense(16, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.head(self.relu(self.dense(self.table(x))).mean(1))


@network
class Grouped(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.SequentialCell(
            conv(3, 8), nn.ReLU(), conv(8, 8, group=8), nn.ReLU6(), conv(8, 16, 1), conv(16, 16, group=4), nn.ReLU(),
            conv(16, 4, 1),
        )  # fmt: skip

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.net(x)


@network
class Bottlenecks(nn.Cell):
    """Pairs of pointwise convolutions, with a hard swish between depthwise ones."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.SequentialCell(
            conv(3, 16, 3, 2), nn.ReLU(), conv(16, 16, 1), conv(16, 48, 1), nn.ReLU(), conv(48, 48, group=48),
            nn.HSwish(), conv(48, 24, 1), conv(24, 40, 1), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Dense(40, 10)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.head(self.net(x).mean((2, 3)))


# -- as users write them -----------------------------------------------------------------------------------------------
@network
class TwoInputs(nn.Cell):
    """A picture, and numbers that go into its head."""

    shape = ((3, 16, 16), (5,))

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu, self.side, self.head = conv(3, 8, 3, 2), nn.ReLU(), nn.Dense(5, 8), nn.Dense(16, 4)

    def construct(self, x, y):  # type: ignore[no-untyped-def]
        return self.head(ops.cat((self.relu(self.stem(x)).mean((2, 3)), self.relu(self.side(y))), 1))


@network
class Siamese(nn.Cell):
    """One encoder for two pictures."""

    shape = ((3, 16, 16), (3, 16, 16))

    def __init__(self) -> None:
        super().__init__()
        self.a, self.relu, self.b, self.head = conv(3, 8, 3, 2), nn.ReLU(), conv(8, 8, 3, 2), nn.Dense(8, 4)

    def encode(self, x):  # type: ignore[no-untyped-def]
        return self.head(self.relu(self.b(self.relu(self.a(x)))).mean((2, 3)))

    def construct(self, x, y):  # type: ignore[no-untyped-def]
        return ops.abs(self.encode(x) - self.encode(y)).sum(1)


@network
class Unet(nn.Cell):
    """Down, up by a transposed convolution, and over a bridge."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.relu, self.pool, self.deep = conv(3, 8), nn.ReLU(), nn.MaxPool2d(2, 2), conv(8, 16)
        self.up = nn.Conv2dTranspose(16, 8, 2, 2, pad_mode="valid", has_bias=True)
        self.join, self.head = conv(16, 8), conv(8, 2, 1)

    def construct(self, x):  # type: ignore[no-untyped-def]
        left = self.relu(self.down(x))
        x = self.up(self.relu(self.deep(self.pool(left))))
        return ops.sigmoid(self.head(self.relu(self.join(ops.cat((left, x), 1)))))


@network
class Pyramid(nn.Cell):
    """Two levels with nearest upsampling, and a head of boxes for each."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.relu = conv(3, 8, 3, 2), conv(8, 16, 3, 2), nn.ReLU()
        self.lateral, self.top, self.head = conv(8, 8, 1), conv(16, 8, 1), conv(8, 14)

    def boxes(self, x):  # type: ignore[no-untyped-def]
        n, _, h, w = x.shape
        x = self.head(x).reshape(n, 2, 7, h, w).transpose(0, 1, 3, 4, 2).reshape(n, -1, 7)
        return ops.cat((ops.sigmoid(x[..., :2]), ops.exp(x[..., 2:4] * 0.1), ops.sigmoid(x[..., 4:])), -1)

    def construct(self, x):  # type: ignore[no-untyped-def]
        one = self.relu(self.one(x))
        two = self.top(self.relu(self.two(one)))
        large = self.lateral(one) + ops.interpolate(two, size=(8, 8), mode="nearest")
        return ops.cat((self.boxes(large), self.boxes(two)), 1)


@network
class FastDetector(nn.Cell):
    """Shuffled blocks, pools of several sizes, depthwise heads of 5 × 5, joined outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu, self.mix = conv(3, 8, 3, 2), nn.ReLU(), conv(8, 8, 1)
        self.narrow = nn.SequentialCell(conv(4, 4, 1), nn.ReLU(), conv(4, 4, 3, group=4), conv(4, 4, 1), nn.ReLU())
        self.fifth, self.third = nn.MaxPool2d(5, 1, "same"), nn.MaxPool2d(3, 1, "same")
        self.join = conv(24, 12, 1)
        self.box = nn.SequentialCell(conv(12, 12, 5, group=12), nn.ReLU(), conv(12, 4, 1))
        self.score = nn.SequentialCell(conv(12, 12, 5, group=12), nn.ReLU(), conv(12, 1, 1), nn.Sigmoid())
        self.kind, self.softmax = nn.SequentialCell(conv(12, 12, 5, group=12), conv(12, 6, 1)), nn.Softmax(1)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.relu(self.stem(x))
        n, c, h, w = x.shape
        x = ops.cat((x[:, ::2], self.narrow(x[:, 1::2])), 1)
        x = x.reshape(n, 2, c // 2, h, w).transpose(0, 2, 1, 3, 4).reshape(n, c, h, w)
        x = self.relu(self.mix(x))
        x = self.relu(self.join(ops.cat((x, self.third(x), self.fifth(x)), 1)))
        return ops.cat((self.score(x), ops.tanh(self.box(x)), self.softmax(self.kind(x))), 1)


@network
class ConvNext(nn.Cell):
    """A depthwise 7 × 7, a normalization over the channels, GELU, and a scale a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise, self.norm = (
            conv(3, 8, 4, 4, pad_mode="valid"),
            conv(8, 8, 7, group=8),
            nn.LayerNorm((8,)),
        )
        self.up, self.gelu, self.down, self.head = nn.Dense(8, 32), nn.GELU(), nn.Dense(32, 8), nn.Dense(8, 4)
        self.last = nn.LayerNorm((8,))
        self.gamma = ms.Parameter(np.linspace(0.1, 1, 8).astype(np.float32), name="gamma")

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.stem(x)
        y = self.norm(self.depthwise(x).transpose(0, 2, 3, 1))
        y = self.gamma * self.down(self.gelu(self.up(y)))
        return self.head(self.last((x + y.transpose(0, 3, 1, 2)).mean((2, 3))))


@network
class ReadOutputs(nn.Cell):
    """Outputs that later layers read, one of them given twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.relu, self.b, self.c = conv(3, 8, 3, 2), nn.ReLU(), conv(8, 4, 3, 2), nn.Dense(4, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.relu(self.a(x))
        y = self.b(x)
        logits = self.c(y.mean((2, 3)))
        return logits, x, y, ops.softmax(logits)


@network
class Temporal(nn.Cell):
    """Dilated convolutions of a sequence, with residual sums."""

    shape = (6, 32)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(6, 8, 3, has_bias=True), nn.Conv1d(8, 8, 3, dilation=2, has_bias=True)
        self.c, self.relu, self.head = nn.Conv1d(8, 8, 1, has_bias=True), nn.ReLU(), nn.Dense(8, 4)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.relu(self.a(x))
        x = self.relu(x + self.c(self.relu(self.b(x))))
        return self.head(x.mean(2))


@network
class SuperResolution(nn.Cell):
    """A pixel shuffle and the picture upsampled."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.relu, self.b, self.c = conv(3, 8), nn.PReLU(8), conv(8, 8), conv(8, 12)
        self.mix = nn.PixelShuffle(2)

    def construct(self, x):  # type: ignore[no-untyped-def]
        y = self.relu(self.a(x))
        y = self.mix(self.c(y + self.b(y)))
        return y + ops.interpolate(x, size=(32, 32), mode="bilinear", align_corners=False)


@network
class Ghost(nn.Cell):
    """Half of the channels computed from the other half, with a hard gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu, self.first, self.cheap = (
            conv(3, 8, 3, 2),
            nn.ReLU(),
            conv(8, 8, 1),
            conv(8, 8, 3, group=8),
        )
        self.down, self.up, self.gate = conv(16, 4, 1), conv(4, 16, 1), nn.HSigmoid()
        self.last, self.swish, self.head = conv(16, 8, 1), nn.HSwish(), nn.Dense(8, 5)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.relu(self.first(self.relu(self.stem(x))))
        x = ops.cat((x, self.relu(self.cheap(x))), 1)
        x = x * self.gate(self.up(self.relu(self.down(x.mean((2, 3), keep_dims=True)))))
        return self.head(self.swish(self.last(x)).mean((2, 3)))


@network
class Autoencoder(nn.Cell):
    shape = (1, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.relu, self.b = conv(1, 8, 3, 2), nn.ReLU(), conv(8, 4, 3, 2)
        self.code, self.back = nn.Dense(64, 10), nn.Dense(10, 64)
        self.c = nn.Conv2dTranspose(4, 8, 3, 2, has_bias=True)
        self.d = nn.Conv2dTranspose(8, 1, 3, 2, has_bias=True)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.relu(self.b(self.relu(self.a(x)))).reshape(-1, 64)
        x = self.relu(self.back(self.code(x))).reshape(-1, 4, 4, 4)
        return ops.sigmoid(self.d(self.relu(self.c(x))))


@network
class Masked(nn.Cell):
    """Tokens by number, and a mask of those that count."""

    shape = ((7,), (7,))

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.q, self.k, self.v = (
            nn.Embedding(20, 16), nn.LayerNorm((16,)), nn.Dense(16, 16), nn.Dense(16, 16), nn.Dense(16, 16),
        )  # fmt: skip
        self.out, self.head = nn.Dense(16, 16), nn.Dense(16, 3)

    def construct(self, x, mask):  # type: ignore[no-untyped-def]
        x = self.norm(self.table(x))
        weight = mask.astype(ms.float32)
        scores = ops.matmul(self.q(x), self.k(x).transpose(0, 2, 1)) * 0.25 + (1.0 - weight.expand_dims(1)) * -1e4
        x = x + self.out(ops.matmul(ops.softmax(scores, -1), self.v(x)))
        x = x * weight.expand_dims(2)
        return self.head(x.sum(1) / (weight.sum(1, keepdims=True) + 1e-3))


@network
class FloatPath(nn.Cell):
    """A float value that an int8 sum reads, and a float layer behind a transposition."""

    shape = (9, 16)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.sigmoid = nn.Dense(16, 16), nn.Sigmoid()
        self.last = nn.Dense(16, 5)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.sigmoid(self.first(x))
        y = ops.exp(x.transpose(0, 2, 1) * -1.5).transpose(0, 2, 1)
        return self.last(x + self.first(x)) + y.mean(2, keep_dims=True)


@network
class FlattenedSum(nn.Cell):
    """A residual sum with its activation that is flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu, self.a, self.head = conv(3, 6, 3, 2), nn.ReLU(), conv(6, 6), nn.Dense(384, 5)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.relu(self.stem(x))
        return self.head(self.relu(self.a(x) + x).reshape(-1, 384))


@network
class Keywords(nn.Cell):
    """A spectrogram through depthwise separable blocks."""

    shape = (1, 25, 10)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.SequentialCell(
            nn.Conv2d(1, 16, (10, 4), (2, 2), pad_mode="same"), nn.BatchNorm2d(16), nn.ReLU(),
            conv(16, 16, 3, group=16), nn.BatchNorm2d(16), nn.ReLU(), conv(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.AvgPool2d((13, 5)), nn.Flatten(), nn.Dense(16, 12),
        )  # fmt: skip

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.net(x)


INTEGERS = {"Embedded": 20, "Language": 20, "Masked": 20}
"""Networks whose inputs are whole numbers, below a number: the first input, and 0 or 1 behind it."""
