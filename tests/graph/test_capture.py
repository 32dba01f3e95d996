from __future__ import annotations

import os
from pathlib import Path
from typing import Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from msqkd.errors import CaptureError
from msqkd.graph.capture import capture
from msqkd.graph.cell import to_cell
from msqkd.models.lenet5 import LeNet5

from .conftest import randomize

Network = Callable[..., nn.Cell]
CONV = "self.conv = nn.Conv2d(3, 3, 1, has_bias=True)"


def both_modes(net: nn.Cell, cell: nn.Cell, *shapes: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    inputs = [random.normal(size=shape).astype(np.float32) for shape in shapes]
    net.set_train(False)
    for mode in (ms.GRAPH_MODE, ms.PYNATIVE_MODE):
        ms.set_context(mode=mode)
        # the network may write to what it is given
        expected, found = net(*map(ms.Tensor, inputs)), cell(*map(ms.Tensor, inputs))
        expected, found = (r if isinstance(r, tuple) else (r,) for r in (expected, found))
        assert len(expected) == len(found)
        for one, other in zip(expected, found):
            np.testing.assert_array_equal(one.asnumpy(), other.asnumpy())


# -- inputs and outputs -----------------------------------------------------------------------------------------------
def test_an_example_is_a_shape_a_tensor_or_a_tuple_of_tensors() -> None:
    net = LeNet5()
    x = ms.Tensor(np.zeros((2, 1, 32, 32), np.float32))
    sources = [to_cell(capture(net, example)).source for example in ((1, 32, 32), [1, 32, 32], x, (x,))]
    assert len(set(sources)) == 1


@pytest.mark.parametrize("example", [(), (1, -32, 32), "3x32x32", (3, 32.0, 32), None, 32, np.zeros((1, 9, 9))])
def test_another_example_is_refused(example: object) -> None:
    with pytest.raises(CaptureError, match="give a Tensor, a tuple of Tensors or a sample shape") as caught:
        capture(LeNet5(), example)
    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)


def test_only_cells_are_networks() -> None:
    with pytest.raises(CaptureError, match=r"a network is a mindspore\.nn\.Cell, not function"):
        capture(lambda x: x, (3, 4, 4))


def test_several_inputs_and_outputs(network: Network) -> None:
    net = network("y = self.conv(x)\nreturn y + z, (ops.relu(y), z * w)", CONV, "x, z, w")
    shapes = [(2, 3, 4, 4), (2, 3, 4, 4), (2, 3, 1, 1)]
    graph = capture(net, tuple(ms.Tensor(np.zeros(shape, np.float32)) for shape in shapes))
    assert graph.inputs == ["x", "z", "w"]
    assert len(graph.outputs) == 3
    cell = to_cell(graph)
    x, z, w = (ms.Tensor(np.full(shape, 0.5, np.float32)) for shape in shapes)
    first, (second, third) = net(x, z, w)
    for one, other in zip((first, second, third), cell(x, z, w)):
        np.testing.assert_array_equal(one.asnumpy(), other.asnumpy())


def test_integer_inputs_keep_their_type(network: Network) -> None:
    net = network("return self.table(x).mean(1)", "self.table = nn.Embedding(9, 4)")
    graph = capture(net, ms.Tensor(np.zeros((2, 5), np.int32)))
    assert graph.values["x"].type.dtype == "int32"
    x = ms.Tensor(np.arange(15).reshape(3, 5) % 9, ms.int32)
    np.testing.assert_array_equal(net(x).asnumpy(), to_cell(graph)(x).asnumpy())


def test_the_batch_is_open_unless_fixed() -> None:
    net = LeNet5()
    x = ms.Tensor(np.zeros((7, 1, 32, 32), np.float32))
    assert capture(net, x).shape("x") == (-1, 1, 32, 32)
    fixed = capture(net, x, dynamic_batch=False)
    assert fixed.shape("x") == (7, 1, 32, 32)
    assert fixed.shape(fixed.outputs[0]) == (7, 10)


def test_code_that_asks_for_the_batch_size_keeps_the_batch_open(network: Network) -> None:
    net = network(
        "b, c = x.shape[:2]\ny = ops.interpolate(x, size=(8, 8), mode='nearest')\n"
        "return y.reshape(b * c, -1), x.reshape(b, -1)"
    )
    graph = capture(net, (3, 4, 4))
    assert [graph.shape(name) for name in graph.outputs] == [(-1, 64), (-1, 48)]
    both_modes(net, to_cell(graph), (5, 3, 4, 4))


def test_code_that_depends_on_the_batch_needs_a_fixed_one(network: Network) -> None:
    net = network("y = ops.interpolate(x, size=(8, 8), mode='nearest')\nreturn y * (1.0 / x.shape[0])")
    with pytest.raises(CaptureError, match=r"Net: .*depends on the batch size; capture the network with a fixed batch"):
        capture(net, (3, 4, 4))
    x = ms.Tensor(np.zeros((2, 3, 4, 4), np.float32))
    both_modes(net, to_cell(capture(net, x, dynamic_batch=False)), (2, 3, 4, 4))


# -- the network is left as it was ------------------------------------------------------------------------------------
def test_the_training_flags_are_untouched() -> None:
    net = nn.SequentialCell(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(p=0.5), nn.ReLU())
    net.set_train(True)
    net[1].set_train(False)
    before = {path: (cell.training, cell.phase) for path, cell in net.cells_and_names()}
    graph = capture(net, (3, 4, 4))
    assert {path: (cell.training, cell.phase) for path, cell in net.cells_and_names()} == before
    assert "Dropout" not in [node.op for node in graph.nodes]


def test_a_failure_leaves_the_network_and_the_directory_as_they_were(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    net = network("return ops.concat((x, ops.relu(x), 3), 1)")
    monkeypatch.chdir(tmp_path / "empty")
    net.set_train(True)
    with pytest.raises(CaptureError):
        capture(net, (3, 4, 4))
    assert net.training
    assert os.listdir() == []


# -- networks that cannot be captured ---------------------------------------------------------------------------------
def test_a_network_that_does_not_compile_is_told_in_one_sentence() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(LeNet5(), (3, 32, 32))
    text = str(caught.value)
    assert text.startswith("LeNet5: MindSpore cannot compile the network for input shape (batch, 3, 32, 32): ")
    assert "\n" not in text


def test_wrong_number_of_inputs(network: Network) -> None:
    with pytest.raises(CaptureError, match=r"Net: MindSpore cannot compile the network for input shape \(batch, 3\): "):
        capture(network("return x + y", arguments="x, y"), (3,))


@pytest.mark.parametrize(
    "construct",
    ["if x.sum() > 0:\n    x = x * 2\nreturn x", "while x.sum() < 10:\n    x = x + 1\nreturn x"],
    ids=["if", "while"],
)
def test_branching_on_values_names_the_cell(network: Network, construct: str) -> None:
    net = nn.SequentialCell(nn.ReLU(), network(construct))
    place = r"network_\d+_\w+\.py:12\)"
    with pytest.raises(CaptureError, match=r"SequentialCell: .*loops on tensor values \(in cell '1', .*" + place):
        capture(net, (3,))
    with pytest.raises(CaptureError, match=r"Net: .*loops on tensor values \(in its construct, .*" + place):
        capture(network(construct), (3,))


def test_the_type_of_parameters_is_told_where_it_is_the_reason() -> None:
    net = nn.Dense(4, 2)
    for parameter in net.get_parameters():
        parameter.set_dtype(ms.float16)
    said = r"2 of its 2 parameters are float16, and quantisation starts from float32: parameter\.set_dtype\("
    with pytest.raises(CaptureError, match=said):
        capture(net, (4,))


def test_python_control_flow_on_fixed_values_is_fine(network: Network) -> None:
    net = network(
        "for i in range(3):\n    if self.flag and x.shape[1] == 3:\n        x = x * (i + 1.0)\nreturn x",
        "self.flag = True",
    )
    both_modes(net, to_cell(capture(net, (3,))), (2, 3))


def test_a_data_type_numpy_does_not_have(network: Network) -> None:
    net = network("return x + self.bias.astype(ms.float32)", "self.bias = ms.Parameter(ms.Tensor([1.0], ms.bfloat16))")
    with pytest.raises(CaptureError, match="'bias' has data type bfloat16, which is not one of float32, uint8"):
        capture(net, (3,))
    with pytest.raises(CaptureError, match="'x' has data type bfloat16"):
        capture(network("return x + x"), ms.Tensor(np.zeros((1, 3)), ms.bfloat16))


def test_an_unknown_in_place_operation(network: Network) -> None:
    with pytest.raises(CaptureError, match=r"Net: its construct uses the in-place operation InplaceExp; .* knows \+="):
        capture(network("y = x * 2.0\ny.exp_()\nreturn y"), (3,))


# -- in-place operations ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "construct",
    [
        "y = self.conv(x)\nz = ops.relu(y)\ny += x\nreturn y + z",
        "y = self.conv(x)\nz = ops.relu(y).reshape(-1, 3)\ny += 1.5\ny *= y\ny -= x\ny /= 2.0\nreturn y, ops.relu(z)",
        "y = self.conv(x)\ny -= 0.5\ny *= 3.0\nreturn y",
    ],
)
def test_reading_before_an_in_place_change_is_right(network: Network, construct: str) -> None:
    net = network(construct, CONV)
    randomize(net)
    graph = capture(net, (3, 4, 4))
    assert not [node.op for node in graph.nodes if node.op.startswith("Inplace") or node.op == "TensorMove"]
    both_modes(net, to_cell(graph), (2, 3, 4, 4))


@pytest.mark.parametrize(
    "construct",
    [
        "y = self.conv(x)\nw = y\ny += x\nreturn y + ops.relu(w)",
        "y = self.conv(x)\nw = y\ny += x\nreturn y, w",
        "y = self.conv(x)\nw = y\ny += x\nreturn ops.concat((y, w), 1)",
    ],
)
def test_reading_after_an_in_place_change_is_refused(network: Network, construct: str) -> None:
    with pytest.raises(
        CaptureError, match="Net: its construct changes a tensor in place that is read again afterwards"
    ):
        capture(network(construct, CONV), (3, 4, 4))


@pytest.mark.parametrize(
    ("construct", "what"),
    [
        ("x += self.conv(x)\nreturn x", "an input of the network"),
        ("y = self.conv(x)\nb = self.conv.bias\nb += 1\nreturn y + b.sum()", "a parameter"),
    ],
)
def test_changing_an_input_or_a_parameter_in_place_is_refused(network: Network, construct: str, what: str) -> None:
    with pytest.raises(CaptureError, match=f"Net: its construct changes {what} in place; write"):
        capture(network(construct, CONV), (3, 4, 4))


# -- where operations come from ---------------------------------------------------------------------------------------
BLOCK = "self.fc = nn.Dense(4, 4)\nself.norm = nn.LayerNorm((4,))"


def test_functions_before_and_after_the_layers_of_a_block_are_in_that_block(network: Network) -> None:
    blocks = [network("y = self.norm(self.fc(ops.tanh(x)))\nreturn ops.sigmoid(y) + x", BLOCK) for _ in range(4)]
    net = nn.SequentialCell(nn.SequentialCell(*blocks[:2]), nn.SequentialCell(*blocks[2:]))
    graph = capture(net, (4,))
    for path in ("0.0", "0.1", "1.0", "1.1"):
        inside = [node.name for node in graph.nodes if (node.cell_path + ".").startswith(path + ".")]
        assert inside == [f"{path}.{name}" for name in ("tanh", "fc", "norm", "sigmoid", "add")]


def test_one_class_written_once_and_used_in_a_list(network: Network) -> None:
    block = network("return ops.relu(self.fc(x)) + x", BLOCK)
    blocks = [type(block)() for _ in range(5)]
    net = network("for block in self.blocks:\n    x = block(x)\nreturn x", "self.blocks = None")
    net.blocks = nn.CellList(blocks)
    graph = capture(net, (4,))
    for index in range(5):
        inside = [node.name for node in graph.nodes if node.cell_path.startswith(f"blocks.{index}")]
        assert inside == [f"blocks.{index}.{name}" for name in ("fc", "re_lu", "add")]


def test_a_cell_called_twice_gets_numbered_names(network: Network) -> None:
    net = network("return self.relu(self.fc(self.relu(self.fc(x))))", "self.fc = nn.Dense(4, 4)\nself.relu = nn.ReLU()")
    graph = capture(net, (4,))
    assert [node.name for node in graph.nodes] == ["fc", "relu", "fc_1", "relu_1"]
    assert graph.node("fc").inputs[1] == graph.node("fc_1").inputs[1]
    both_modes(net, to_cell(graph), (2, 4))


def test_a_block_called_twice_keeps_its_path(network: Network) -> None:
    block = network("return ops.relu(self.fc(x)) + x", BLOCK)
    net = network("return self.block(self.block(x))", "self.block = None")
    net.block = block
    graph = capture(net, (4,))
    assert {node.cell_path for node in graph.nodes} == {"block", "block.fc"}
    assert len({node.name for node in graph.nodes}) == 6
    both_modes(net, to_cell(graph), (2, 4))


def test_an_identity_is_gone_unless_it_hands_an_input_out(network: Callable[..., nn.Cell]) -> None:
    net = network("return self.same(ops.tanh(self.same(x))) * 2.0, self.same(x)", "self.same = ops.Identity()")
    graph = capture(net, (4,))
    assert [node.op for node in graph.nodes if node.op != "Identity"] == ["Tanh", "Muls"]
    assert [graph.values[name].kind for name in graph.outputs] == ["node", "node"]
    x = ms.Tensor(np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4))
    for one, other in zip(net(x), to_cell(graph)(x)):
        np.testing.assert_array_equal(one.asnumpy(), other.asnumpy())
