"""Code as users write it: captured, built again, compared and trained by a step."""

from __future__ import annotations

from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from msqkd.errors import CaptureError
from msqkd.graph.capture import capture
from msqkd.graph.cell import read_parameters, to_cell

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
}


def flat(result: Any) -> list[np.ndarray]:
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, (tuple, list)):
        return [array for item in result for array in flat(item)]
    return [result.asnumpy()]


def check_equal(expected: Any, found: Any) -> None:
    pairs = list(zip(flat(expected), flat(found)))
    assert len(pairs) == len(flat(expected)) == len(flat(found))
    for one, other in pairs:
        np.testing.assert_array_equal(one, other)


class MeanSquare(nn.Cell):
    """A loss of whatever a network gives; its cell is trained as a part, under another name."""

    def __init__(self, network: nn.Cell) -> None:
        super().__init__()
        self.network = network

    def construct(self, *inputs: Any) -> Any:
        result = self.network(*inputs)
        first = result[0] if isinstance(result, tuple) else result
        return ops.square(first - 1.0).mean()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_captured_trained_and_built_again(name: str) -> None:
    make, inputs = NETWORKS[name]
    net = make()
    net.set_train(False)
    graph = capture(net, inputs)
    assert all(graph.shape(value)[0] == -1 for value in graph.inputs)
    cell = to_cell(graph)
    for mode in (ms.GRAPH_MODE, ms.PYNATIVE_MODE):
        ms.set_context(mode=mode)
        check_equal(net(*inputs), cell(*inputs))
    ms.set_context(mode=ms.GRAPH_MODE)
    tripled = tuple(ms.Tensor(np.concatenate([x.asnumpy()] * 3)) for x in inputs)
    check_equal(net(*tripled), cell(*tripled))

    before = {name: held.data.copy() for name, held in graph.params.items()}
    step = nn.TrainOneStepCell(MeanSquare(cell), nn.SGD(cell.trainable_params(), 0.01))
    step.set_train(True)
    losses = [float(step(*inputs).asnumpy()) for _ in range(2)]
    assert losses[1] < losses[0]
    cell.set_train(False)
    read_parameters(cell, graph)
    assert any((held.data != before[name]).any() for name, held in graph.params.items())
    check_equal(cell(*inputs), to_cell(graph)(*inputs))


def test_arguments_by_name_and_tuples_of_tensors() -> None:
    net, (a, b, c) = Pairs(), (floats(2, 4), floats(2, 4) * 2.0, floats(2, 1))
    for example in ({"weight": c, "pair": (a, b)}, ((a, b), c)):
        graph = capture(net, example)
        assert len(graph.inputs) == 3
        assert [node.name for node in graph.nodes if node.op == "Dense"] == ["shared", "shared_1"]
        inputs = (c, a, b) if isinstance(example, dict) else (a, b, c)
        check_equal(net((a, b), c), to_cell(graph)(*inputs))
    graph = capture(Defaults(), {"x": a, "label": integers(3, 2)})
    assert (graph.inputs, len(graph.outputs)) == (["x", "label"], 2)
    with pytest.raises(CaptureError, match="the example input 'x' is a int; give a Tensor"):
        capture(Defaults(), {"x": 3})


def test_an_input_without_a_batch_stays_as_it_is() -> None:
    class Masked(nn.Cell):
        def construct(self, x: Any, mask: Any) -> Any:
            return ops.softmax(ops.bmm(x, x.swapaxes(1, 2)) + mask, -1)

    graph = capture(Masked(), (floats(2, 5, 4), floats(5, 5)))
    assert [graph.shape(name) for name in graph.inputs] == [(-1, 5, 4), (5, 5)]


def test_every_size_but_the_batch_is_known() -> None:
    for make, inputs in (NETWORKS["class_token"], NETWORKS["windows"]):
        graph = capture(make(), inputs)
        kinds = [value.type for value in graph.activations() if value.type is not None]
        assert all(-1 not in kind.shape[1:] for kind in kinds)


def test_parameters_of_one_name_are_refused() -> None:
    class Twins(nn.Cell):
        def __init__(self) -> None:
            super().__init__(auto_prefix=False)
            self.teacher, self.student = nn.Dense(4, 4), nn.Dense(4, 4)

        def construct(self, x: Any) -> Any:
            return self.teacher(x) + self.student(x)

    with pytest.raises(
        CaptureError,
        match=r"Twins: the parameters at 'teacher\.weight' and 'student\.weight' are both called 'weight'; ",
    ):
        capture(Twins(), (4,))


def test_cells_in_a_plain_tuple_are_refused() -> None:
    class Hidden(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.layers = (nn.Dense(4, 4), nn.Tanh())

        def construct(self, x: Any) -> Any:
            return self.layers[1](self.layers[0](x))

    with pytest.raises(CaptureError, match=r"Hidden: parameter '\w+' belongs to no cell .* use nn\.CellList"):
        capture(Hidden(), (4,))


def test_a_wrong_input_is_told_with_its_dtype_and_the_line() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Encoder(), (IDS[0], IDS[1], integers(2, 2, 5)))
    text = str(caught.value)
    assert "input shape (batch, 6) of int32, (batch, 6) of int32, (batch, 5) of int32: " in text
    assert f"(at {__file__}:" in text
    assert "\n" not in text


def test_a_network_changed_after_a_capture_is_captured_as_it_is() -> None:
    net = nn.SequentialCell(nn.Dense(4, 4), nn.ReLU())
    first = capture(net, (4,))
    net[1].__class__ = nn.Tanh
    net[1].tanh = ops.Tanh()
    assert [node.op for node in capture(net, (4,)).nodes] == ["Dense", "Tanh"]
    assert [node.op for node in first.nodes] == ["Dense", "ReLU"]
