"""Networks as users write them, small; tests and bench/coverage.py take them from here."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Callable

import mindspore as ms
import numpy as np
from mindspore import nn, ops

Inputs = tuple[Any, ...]


def floats(*shape: int) -> ms.Tensor:
    return ms.Tensor(np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32))


def integers(high: int, *shape: int) -> ms.Tensor:
    return ms.Tensor(np.random.default_rng(high).integers(0, high, shape).astype(np.int32))


class EncoderLayer(nn.Cell):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.depth = heads, width // heads
        self.query, self.key, self.value, self.out = (nn.Dense(width, width) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm((width,)), nn.LayerNorm((width,))
        self.wide, self.narrow = nn.Dense(width, 2 * width), nn.Dense(2 * width, width)
        self.gelu, self.dropout = nn.GELU(approximate=False), nn.Dropout(p=0.1)

    def split(self, x: Any) -> Any:
        return x.view(x.shape[0], x.shape[1], self.heads, self.depth).transpose(0, 2, 1, 3)

    def construct(self, x: Any, mask: Any) -> Any:
        query, key, value = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        scores = ops.matmul(query, key.swapaxes(-1, -2)) / ops.sqrt(ms.Tensor(self.depth, ms.float32)) + mask
        mixed = ops.matmul(self.dropout(ops.softmax(scores, -1)), value)
        x = self.norm1(x + self.dropout(self.out(mixed.transpose(0, 2, 1, 3).reshape(x.shape))))
        return self.norm2(x + self.dropout(self.narrow(self.gelu(self.wide(x)))))


class Encoder(nn.Cell):
    """Ids, mask and types in; a dict out."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions, self.types = nn.Embedding(20, 8), nn.Embedding(6, 8), nn.Embedding(2, 8)
        self.layers = nn.CellList([EncoderLayer(8, 2) for _ in range(2)])
        self.head = nn.Dense(8, 3)
        self.place = ms.Tensor(np.arange(6)[None], ms.int32)

    def construct(self, ids: Any, mask: Any, types: Any) -> Any:
        x = self.words(ids) + self.positions(self.place) + self.types(types)
        bias = (1.0 - mask.astype(ms.float32)).expand_dims(1).expand_dims(1) * -10000.0
        for layer in self.layers:
            x = layer(x, bias)
        return {"logits": self.head(x[:, 0]), "hidden": x}


class Detector(nn.Cell):
    """Two scales, each a pair of boxes and scores, in a Python list."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.SequentialCell(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.SiLU())
        self.deep = nn.SequentialCell(nn.Conv2d(8, 16, 3, 2), nn.BatchNorm2d(16), nn.LeakyReLU(0.1))
        self.heads = nn.CellList([nn.Conv2d(24, 18, 1, has_bias=True), nn.Conv2d(16, 18, 1, has_bias=True)])

    def construct(self, x: Any) -> Any:
        fine = self.stem(x)
        coarse = self.deep(fine)
        joined = ops.cat((fine, ops.interpolate(coarse, size=fine.shape[2:], mode="nearest")), 1)
        found = []
        for head, scale in zip(self.heads, (joined, coarse)):
            batch, _, height, width = scale.shape
            y = head(scale).view(batch, 3, 6, height, width).permute(0, 1, 3, 4, 2)
            found.append((ops.sigmoid(y[..., :2]) * 2 - 0.5, y[..., 2:]))
        return found


class Recurrent(nn.Cell):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.cell, self.head = kind(4, 5, batch_first=True), nn.Dense(5, 3)

    def construct(self, x: Any) -> Any:
        return self.head(self.cell(x)[0][:, -1])


class ClassToken(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.token = ms.Parameter(np.ones((1, 1, 4), np.float32), name="token")
        self.head = nn.Dense(4, 3)

    def construct(self, x: Any) -> Any:
        token = ops.broadcast_to(self.token, (x.shape[0], -1, -1))
        return self.head(ops.concat((token, x), 1)[:, 0] + x.mean(1))


class Windows(nn.Cell):
    """Windows folded into the batch, and a mask as large as the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Dense(3, 3)

    def construct(self, x: Any) -> Any:
        batch, height, width, channels = x.shape
        y = x.view(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5).view(-1, 4, channels)
        y = self.dense(y).view(batch, 2, 2, 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
        return y.reshape(batch, height, width, channels) + ops.ones((batch, 1, 1, channels), ms.float32)


class Defaults(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.loss = nn.Dense(4, 3), nn.CrossEntropyLoss()

    def construct(self, x: Any, label: Any = None, scale: float = 2.0) -> Any:
        y = self.dense(x) * scale
        return y if label is None else (y, self.loss(y, label))


class Pairs(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Dense(4, 3)

    def construct(self, pair: Any, weight: Any) -> Any:
        return self.shared(pair[0]) + self.shared(pair[1]) * weight


class Causal(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.weight = ms.Parameter(np.linspace(-1, 1, 20, dtype=np.float32).reshape(4, 5), name="weight")

    def construct(self, x: Any) -> Any:
        y = ops.matmul(x, self.weight)
        mask = ops.tril(ops.ones((6, 6), ms.float32)) == 0
        scores = ops.masked_fill(ops.bmm(y, y.swapaxes(1, 2)), mask, -float("inf"))
        left, right = ops.chunk(ops.pad(y, (1, 1)), 2, 1)
        return ops.bmm(ops.softmax(scores, -1), y)[:, 0], left * right


class ResidualBlock(nn.Cell):
    """Functional additions, one ReLU cell called three times, and a learned factor used directly."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.scale = ms.Parameter(np.full((1, width, 1, 1), 0.5, np.float32), name="scale")

    def construct(self, x: Any) -> Any:
        y = self.relu(self.norm1(self.first(x)))
        y = self.norm2(self.second(y)) * self.scale
        y += x
        return self.relu(y) + self.relu(x)


class SharedCells(nn.Cell):
    """One block run three times by a counting loop, cells in lists in lists, named cells in a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.SequentialCell(OrderedDict([("conv", nn.Conv2d(3, 4, 3)), ("act", nn.ReLU())]))
        self.block = ResidualBlock(4)
        self.stages = nn.CellList([nn.CellList([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3)]) for _ in range(2)])
        self.repeats = 3
        self.head = nn.Dense(4, 3)

    def construct(self, x: Any) -> Any:
        x = self.stem(x)
        count = 0
        while count < self.repeats:
            x = self.block(x) / (count + 1)
            count += 1
        for stage in self.stages:
            for layer in stage:
                x = ops.relu(layer(x)) + x
        return self.head(x.mean((2, 3)))


class Tied(nn.Cell):
    """A language model: the embedding is the output layer's weight; token ids in."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 8)
        self.mix = nn.Dense(8, 8)
        self.positions = ms.Tensor(np.linspace(-1, 1, 40, dtype=np.float32).reshape(5, 8))

    def construct(self, ids: Any) -> Any:
        x = ops.tanh(self.mix(self.words(ids) + self.positions))
        return ops.matmul(x, self.words.embedding_table.swapaxes(0, 1))


class TwoHeads(nn.Cell):
    """Two layers share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Dense(6, 6), nn.Dense(6, 6)
        self.second.weight = self.first.weight

    def construct(self, x: Any) -> Any:
        return ops.relu(self.second(ops.relu(self.first(x))))


class Sound(nn.Cell):
    """Convolutions over time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.SequentialCell(
            nn.Conv1d(2, 8, 3, stride=2, pad_mode="pad", padding=1, has_bias=True), nn.BatchNorm1d(8), nn.ReLU(),
            nn.Conv1d(8, 8, 3, group=8), nn.ReLU(), nn.Conv1d(8, 4, 1), nn.MaxPool1d(2, 2),
        )  # fmt: skip
        self.head = nn.Dense(4, 3)

    def construct(self, x: Any) -> Any:
        return self.head(self.layers(x).mean(2))


class UNet(nn.Cell):
    """Down, up by a transposed convolution, and the skip joined in front of the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.SequentialCell(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.pool = nn.MaxPool2d(2, 2)
        self.deep = nn.SequentialCell(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.up = nn.Conv2dTranspose(8, 4, 2, 2, has_bias=True)
        self.out = nn.Conv2d(8, 2, 3, has_bias=True)

    def construct(self, x: Any) -> Any:
        fine = self.down(x)
        return self.out(ops.cat((self.up(self.deep(self.pool(fine))), fine), 1))


class Norms(nn.Cell):
    """Normalisations over groups, over instances and over rows; weight standardisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.group = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)
        self.conv2, self.instance = nn.Conv2d(8, 8, 3), nn.GroupNorm(8, 8)
        self.weight = ms.Parameter(np.random.default_rng(0).normal(size=(8, 8, 1, 1)).astype(np.float32), name="weight")
        self.rows = nn.LayerNorm((8,))
        self.head = nn.Dense(8, 3)

    def construct(self, x: Any) -> Any:
        x = ops.relu(self.group(self.conv1(x)))
        x = ops.relu(self.instance(self.conv2(x)))
        mean = self.weight.mean((1, 2, 3), keep_dims=True)
        x = ops.conv2d(x, (self.weight - mean) / ops.sqrt(ops.square(self.weight - mean).mean() + 1e-5))
        return self.head(self.rows(x.mean((2, 3))))


class Pieces(nn.Cell):
    """Split, chunk, stack, unbind, repeat, tile, slices with steps and from the end."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.head = nn.Dense(6, 12), nn.Dense(12, 3)

    def construct(self, x: Any) -> Any:
        y = self.wide(x)
        a, b = ops.split(y, (4, 8), 1)
        c, d = ops.chunk(b, 2, 1)
        rows = ops.unbind(ops.stack((a, c, d), 1), 1)
        y = ops.cat((rows[0] + rows[1], rows[2][:, ::2], rows[2][:, -2:]), 1)
        y = ops.tile(y[:, :3], (1, 2)) + y[:, 1:7]
        return self.head(ops.repeat_interleave(y, 2, 1)) + y[:, 2:-3:1].sum(1, keepdims=True)


class Images(nn.Cell):
    """Reflected borders, pixels shuffled up, pooling to another size than 1, maxima over an axis."""

    def __init__(self) -> None:
        super().__init__()
        self.border = nn.ReflectionPad2d(1)
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, pad_mode="valid"), nn.Conv2d(2, 4, 3)
        self.head = nn.Dense(36, 3)

    def construct(self, x: Any) -> Any:
        x = ops.relu(self.conv1(self.border(x)))
        x = ops.relu(self.conv2(ops.pixel_shuffle(x, 2)))
        x = ops.interpolate(x, size=(6, 6), mode="bilinear", align_corners=False)
        x = ops.adaptive_avg_pool2d(x, (3, 3))
        return self.head(ops.flatten(x, start_dim=1)) + ops.max(x.view(x.shape[0], 12, 3), 1)[0]


class Conditions(nn.Cell):
    """Attention with a mask, conditions on values as selections."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.head = nn.Dense(4, 4), nn.Dense(4, 4), nn.Dense(4, 3)
        self.allowed = ms.Tensor(np.tril(np.ones((5, 5), bool)))

    def construct(self, x: Any) -> Any:
        scores = ops.matmul(self.query(x), ops.transpose(self.key(x), (0, 2, 1)))
        scores = ops.where(self.allowed, scores * 0.5, ops.full_like(scores, -1e4))
        mixed = ops.bmm(ops.softmax(scores, -1), x)
        return self.head(mixed.masked_fill(mixed > 2.0, 2.0).mean(1))


class Expanded(nn.Cell):
    """A class token and a query as large as the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.token = ms.Parameter(np.linspace(-1, 1, 4, dtype=np.float32).reshape(1, 1, 4), name="token")
        self.head = nn.Dense(4, 3)

    def construct(self, x: Any) -> Any:
        token = ops.tile(self.token, (x.shape[0], 1, 1)) + self.token.expand_as(x[:, :1])
        return self.head(ops.cat([token, x], axis=1)[:, 0])


class DropPath(nn.Cell):
    """Stochastic depth, as the networks of mindcv have it."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(p=rate)

    def construct(self, x: Any) -> Any:
        if not self.training:
            return x
        return x * self.dropout(ops.ones((x.shape[0],) + (1,) * (x.ndim - 1), x.dtype))


class Dropped(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.CellList([nn.Dense(4, 4) for _ in range(2)])
        self.paths = nn.CellList([DropPath(0.1 * rate) for rate in range(1, 3)])
        self.dropout, self.head = nn.Dropout(p=0.5), nn.Dense(4, 3)

    def construct(self, x: Any) -> Any:
        for layer, path in zip(self.layers, self.paths):
            x = x + path(ops.gelu(layer(x)))
        return self.head(self.dropout(x))


class Mixed(nn.Cell):
    """A part in float16."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.half, self.last = nn.Dense(4, 8), nn.Dense(8, 8).to_float(ms.float16), nn.Dense(8, 3)

    def construct(self, x: Any) -> Any:
        y = self.half(ops.relu(self.first(x)))
        return self.last(ops.cast(ops.tanh(y.astype(ms.float16)), ms.float32))


class Switches(nn.Cell):
    """Dictionaries between cells, constants in tuples, optional parts, assertions on shapes."""

    def __init__(self, extra: bool = True) -> None:
        super().__init__()
        self.features = nn.CellDict({"a": nn.Dense(4, 4), "b": nn.Dense(4, 4)})
        self.extra = nn.Dense(4, 4) if extra else None
        self.weights = (0.25, 0.75)

    def construct(self, x: Any) -> Any:
        found = {"a": self.features["a"](x), "b": self.features["b"](x)}
        y = found["a"] * self.weights[0] + found["b"] * self.weights[1]
        if self.extra is not None and x.shape[-1] == 4:
            y = y - self.extra(y)
        return {"logits": y, "parts": [found["a"], found["b"]]}


class Odd(nn.Cell):
    """Operations no runtime has in int8."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Dense(6, 6), nn.Dense(6, 3)
        self.steps = ms.Tensor([3, 1, 0], ms.int32)

    def construct(self, x: Any) -> Any:
        y = self.first(x)
        order = ops.argsort(y)
        top, place = ops.topk(y, 3)
        y = ops.cumsum(y, 1) + ops.flip(y, (1,)) + ops.gather_elements(y, 1, order.astype(ms.int32))
        y = ops.erfinv(ops.tanh(y) * 0.9) + ops.log_softmax(y) + ops.sort(y)[0]
        marks = ops.one_hot(place[:, 0], 6, ms.Tensor(1.0), ms.Tensor(0.0)) + ops.arange(0, 6, 1).astype(ms.float32)
        bits = ops.bitwise_and(place.astype(ms.int32), self.steps).astype(ms.float32)
        return self.last(y + marks) + top + bits


IDS: Inputs = (integers(20, 2, 6), integers(2, 2, 6), integers(2, 2, 6))
NETWORKS: dict[str, tuple[Callable[[], nn.Cell], Inputs]] = {
    "encoder": (Encoder, IDS),
    "detector": (Detector, (floats(2, 3, 16, 16),)),
    "lstm": (lambda: Recurrent(nn.LSTM), (floats(2, 3, 4),)),
    "gru": (lambda: Recurrent(nn.GRU), (floats(2, 3, 4),)),
    "class_token": (ClassToken, (floats(2, 5, 4),)),
    "windows": (Windows, (floats(2, 4, 4, 3),)),
    "defaults": (Defaults, (floats(2, 4),)),
    "labels": (Defaults, (floats(2, 4), integers(3, 2))),
    "causal": (Causal, (floats(2, 6, 4),)),
    "shared_cells": (SharedCells, (floats(2, 3, 8, 8),)),
    "tied": (Tied, (integers(12, 2, 5),)),
    "two_heads": (TwoHeads, (floats(2, 6),)),
    "sound": (Sound, (floats(2, 2, 16),)),
    "unet": (UNet, (floats(2, 1, 8, 8),)),
    "norms": (Norms, (floats(2, 3, 6, 6),)),
    "pieces": (Pieces, (floats(2, 6),)),
    "images": (Images, (floats(2, 3, 6, 6),)),
    "conditions": (Conditions, (floats(2, 5, 4),)),
    "expanded": (Expanded, (floats(2, 5, 4),)),
    "dropped": (Dropped, (floats(2, 4),)),
    "mixed": (Mixed, (floats(2, 4),)),
    "switches": (Switches, (floats(2, 4),)),
    "odd": (Odd, (floats(2, 6),)),
}
