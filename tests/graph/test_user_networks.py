"""Code as users write it: captured, built again, compared and trained by a step."""

from __future__ import annotations

import inspect
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from msqkd.errors import CaptureError
from msqkd.graph.capture import capture
from msqkd.graph.cell import read_parameters, to_cell

from .user_networks import IDS, NETWORKS, Defaults, Encoder, Pairs, floats, integers


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
    tripled = tuple(ms.Tensor(np.concatenate([x.asnumpy()] * 3)) for x in inputs)
    for mode, batch in ((ms.PYNATIVE_MODE, inputs), (ms.GRAPH_MODE, tripled)):
        ms.set_context(mode=mode)
        check_equal(net(*batch), cell(*batch))

    before = {name: held.data.copy() for name, held in graph.params.items()}
    step = nn.TrainOneStepCell(MeanSquare(cell), nn.SGD(cell.trainable_params(), 0.01))
    step.set_train(True)
    losses = [float(step(*inputs).asnumpy()) for _ in range(2)]
    assert losses[1] < losses[0]
    cell.set_train(False)
    ms.set_context(mode=ms.PYNATIVE_MODE)
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


def test_dropout_in_evaluation_mode_is_refused() -> None:
    class Always(nn.Cell):
        def construct(self, x: Any) -> Any:
            return ops.dropout(ops.relu(x), p=0.1, training=True) + ops.dropout(x, p=0.1, training=self.training)

    with pytest.raises(CaptureError, match=r"Always: 'dropout' \(Dropout\) drops values in evaluation mode too; call "):
        capture(Always(), (4,))


def test_a_wrong_input_is_told_with_its_dtype_and_the_line() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Encoder(), (IDS[0], IDS[1], integers(2, 2, 5)))
    text = str(caught.value)
    assert "input shape (batch, 6) of int32, (batch, 6) of int32, (batch, 5) of int32: " in text
    assert f"(at {inspect.getfile(Encoder)}:" in text
    assert "\n" not in text


def test_a_network_changed_after_a_capture_is_captured_as_it_is() -> None:
    net = nn.SequentialCell(nn.Dense(4, 4), nn.ReLU())
    first = capture(net, (4,))
    net[1].__class__ = nn.Tanh
    net[1].tanh = ops.Tanh()
    assert [node.op for node in capture(net, (4,)).nodes] == ["Dense", "Tanh"]
    assert [node.op for node in first.nodes] == ["Dense", "ReLU"]
