"""Whole networks: captured, built again and trained, they are the network they came from."""

from __future__ import annotations

from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from msqkd.checkpoints import load_checkpoint, save_checkpoint
from msqkd.graph.capture import capture
from msqkd.graph.cell import read_parameters, to_cell
from msqkd.graph.ir import Graph
from msqkd.models.cifar_resnet import CifarResNet, resnet20, resnet110
from msqkd.models.lenet5 import LeNet5

from .conftest import losses, randomize

MODES = pytest.mark.parametrize("mode", [ms.GRAPH_MODE, ms.PYNATIVE_MODE], ids=["graph", "pynative"])


def mindcv_model(name: str) -> nn.Cell:
    pytest.importorskip("mindcv")
    from mindcv.models import create_model

    return create_model(name, num_classes=10)


def images(shape: tuple[int, ...], batch: int) -> ms.Tensor:
    return ms.Tensor(np.random.default_rng(batch).normal(size=(batch, *shape)).astype(np.float32))


def resnet8() -> nn.Cell:
    """One block a stage: every kind of block that the deeper ones have."""
    return CifarResNet(1)


NETWORKS: dict[str, tuple[Callable[[], nn.Cell], tuple[int, ...]]] = {
    "lenet5": (LeNet5, (1, 32, 32)),
    "resnet20": (resnet20, (3, 32, 32)),
    "resnet50": (lambda: mindcv_model("resnet50"), (3, 64, 64)),
    "mobilenet_v2_100": (lambda: mindcv_model("mobilenet_v2_100"), (3, 64, 64)),
}


@pytest.fixture(scope="module", params=NETWORKS)
def captured(request: pytest.FixtureRequest) -> tuple[nn.Cell, Graph, tuple[int, ...]]:
    make, shape = NETWORKS[request.param]
    net = make()
    randomize(net)
    return net, capture(net, shape), shape


Captured = tuple[nn.Cell, Graph, tuple[int, ...]]


@MODES
def test_the_outputs_are_bit_equal_for_any_batch(captured: Captured, mode: int) -> None:
    net, graph, shape = captured
    cell = to_cell(graph)
    ms.set_context(mode=mode)
    net.set_train(False)
    for batch in (1, 3) if mode == ms.PYNATIVE_MODE else (3,):  # a compilation for each takes seconds
        x = images(shape, batch)
        np.testing.assert_array_equal(net(x).asnumpy(), cell(x).asnumpy())


def test_parameters_keep_their_names_and_load_both_ways(captured: Captured, tmp_path: Any) -> None:
    net, graph, _ = captured
    cell = to_cell(graph)
    names = [p.name for p in net.get_parameters()]
    assert sorted(p.name for p in cell.get_parameters()) == sorted(names)
    assert {p.name: p.requires_grad for p in cell.get_parameters()} == {
        p.name: p.requires_grad for p in net.get_parameters()
    }

    randomize(net, seed=5)
    file = tmp_path / "net.ckpt"
    ms.save_checkpoint(net, str(file))
    load_checkpoint(cell, file)
    for parameter in cell.get_parameters():
        np.testing.assert_array_equal(parameter.asnumpy(), net.parameters_dict()[parameter.name].asnumpy())

    randomize(cell, seed=6)
    twin = graph.copy()
    read_parameters(cell, twin)
    save_checkpoint({name: p.data for name, p in twin.params.items()}, file)
    load_checkpoint(net, file)
    for parameter in net.get_parameters():
        np.testing.assert_array_equal(parameter.asnumpy(), cell.parameters_dict()[parameter.name].asnumpy())


def test_nodes_keep_the_path_and_classes_of_their_cells(captured: Captured) -> None:
    net, graph, _ = captured
    types = {path: type(cell).__name__ for path, cell in net.cells_and_names()}
    for node in graph.nodes:
        parts = node.cell_path.split(".") if node.cell_path else []
        prefixes = [".".join(parts[:i]) for i in range(len(parts) + 1)]
        assert node.cell_types == tuple(types[prefix] for prefix in prefixes), node.name
        for name in graph.param_inputs(node):
            assert name.rsplit(".", 1)[0] == node.cell_path
    convolutions = {path for path, cell in net.cells_and_names() if isinstance(cell, nn.Conv2d)}
    assert {node.name for node in graph.nodes if node.op == "Conv2D"} == convolutions


def test_capture_is_deterministic(captured: Captured) -> None:
    net, graph, shape = captured
    again = capture(net, shape)
    assert to_cell(again).source == to_cell(graph).source
    assert list(again.params) == list(graph.params)


@MODES
@pytest.mark.parametrize("make", [LeNet5, resnet8], ids=["lenet5", "resnet8"])
def test_training_gives_the_losses_of_the_network(make: Callable[[], nn.Cell], mode: int) -> None:
    net = make()
    randomize(net)
    shape = (1, 32, 32) if make is LeNet5 else (3, 32, 32)
    cell = to_cell(capture(net, shape))
    x, y = images(shape, 4), ms.Tensor([1, 2, 3, 4], ms.int32)
    found = losses(cell, x, y, mode)
    # MindSpore 2.10 cannot differentiate `x[:, :, ::2, ::2]` in PYNATIVE_MODE on CPU; what is captured trains there.
    expected = losses(net, x, y, ms.GRAPH_MODE if make is resnet8 else mode)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert len(set(found)) == 3
    for parameter in cell.get_parameters():
        if parameter.name.endswith("moving_mean"):
            theirs = net.parameters_dict()[parameter.name].asnumpy()
            np.testing.assert_allclose(parameter.asnumpy(), theirs, rtol=1e-4, atol=1e-6)


def test_a_deep_network_has_every_operation_in_its_block() -> None:
    graph = capture(resnet110(), (3, 32, 32))
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(18)]
    for block in blocks:
        nodes = [node for node in graph.nodes if (node.cell_path + ".").startswith(block + ".")]
        assert [n.name for n in nodes if n.op == "Add"] == [f"{block}.add"]
        assert sum(n.op == "ReLU" for n in nodes) == 2
        assert sum(n.op == "StridedSlice" for n in nodes) == (block in ("layer2.0", "layer3.0"))


def test_adds_of_mindcv_blocks_are_in_their_blocks() -> None:
    graph = capture(mindcv_model("mobilenet_v2_100"), (3, 64, 64))
    adds = [node for node in graph.nodes if node.op == "Add"]
    assert len(adds) == 10
    for node in adds:
        sources = [graph.producer(name) for name in node.inputs]
        assert any(s is not None and s.cell_path.startswith(node.cell_path + ".") for s in sources), node.name


def test_frozen_parameters_stay_frozen() -> None:
    net = LeNet5()
    net.conv1.weight.requires_grad = False
    cell = to_cell(capture(net, (1, 32, 32)))
    assert {p.name for p in net.trainable_params()} == {p.name for p in cell.trainable_params()}
