"""A MindIR file alone is the network it was exported from."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any, Callable, Optional

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops
from mindspore.train import mind_ir_pb2 as pb

from msqkd.api import create_ptq_network, export, plan_network, prepare_qat, quantize
from msqkd.errors import CaptureError, PlanError
from msqkd.exporters.portable import write_float
from msqkd.graph.capture import capture
from msqkd.graph.cell import to_cell
from msqkd.graph.load import load_mindir, mindir_inputs
from msqkd.quant.config import QuantConfig, Rule
from msqkd.quant.qat import deployment_graph

from .conftest import randomize

IMAGE, TOKENS = (3, 8, 8), (5, 8)


class Block(nn.Cell):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3)
        self.bn, self.relu = nn.BatchNorm2d(channels), nn.ReLU()

    def construct(self, x):  # type: ignore[no-untyped-def]
        y = self.relu(self.bn(self.conv(x)))
        return self.relu(y + x)


class Residual(nn.Cell):
    """As residual networks are: a stem, a sequence of blocks, a mean and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU()
        self.layer1 = nn.SequentialCell(Block(4), Block(4), nn.SequentialCell(OrderedDict(last=Block(4))))
        self.fc = nn.Dense(4, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.fc(ops.mean(self.layer1(self.relu(self.stem(x))), (2, 3)))


class Attention(nn.Cell):
    """Its code takes the batch size and a token for every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.token = ms.Parameter(ms.Tensor(np.full((1, 1, 8), 0.3), ms.float32), name="token")
        self.qkv, self.norm, self.head = nn.Dense(8, 24), nn.LayerNorm((8,)), nn.Dense(8, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = ops.concat((ops.tile(self.token, (x.shape[0], 1, 1)), x), 1)
        batch, tokens, size = x.shape
        x = x.swapaxes(1, 2).reshape(batch, size, -1).swapaxes(1, 2)
        query, key, value = ops.unstack(self.qkv(self.norm(x)).reshape(batch, tokens, 3, size).transpose(2, 0, 1, 3))
        weights = ops.softmax(ops.matmul(query, key.swapaxes(1, 2)), -1)
        return self.head((x + ops.matmul(weights, value))[:, 0])


class Mixing(nn.Cell):
    """An answer depends on the other samples of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Dense(8, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.fc(x - ops.mean(x, 0, True))


def exported(net: nn.Cell, folder: Path, *shape: Optional[int]) -> Path:
    net.set_train(False)
    file = folder / "net.mindir"
    ms.export(net, ms.Tensor(shape=list(shape), dtype=ms.float32), file_name=str(file), file_format="MINDIR")
    return file


def made(kind: Callable[[], nn.Cell]) -> nn.Cell:
    net = kind()
    randomize(net)
    return net


@pytest.mark.parametrize("batch", [1, 4, None])
def test_a_file_gives_the_graph_of_its_network(batch: Optional[int], tmp_path: Path) -> None:
    net = made(Residual)
    file = exported(net, tmp_path, batch, *IMAGE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = load_mindir(file)
    expected = capture(net, IMAGE)
    assert [(n.name, n.op, n.cell_path, n.cell_types) for n in found.nodes] == [
        (n.name, n.op, n.cell_path, n.cell_types) for n in expected.nodes
    ]
    assert [found.shape(v.name) for v in found.activations()] == [
        expected.shape(v.name) for v in expected.activations()
    ]
    assert {name: p.trainable for name, p in found.params.items()} == {
        name: p.trainable for name, p in expected.params.items()
    }
    x = ms.Tensor(np.random.default_rng(0).normal(size=(3, *IMAGE)).astype(np.float32))
    np.testing.assert_array_equal(to_cell(found)(x).asnumpy(), net(x).asnumpy())
    kind = mindir_inputs(file)[0]
    assert (kind.shape[1:], kind.dtype) == (IMAGE, "float32")


def test_rules_by_path_and_class_work_as_on_the_network(tmp_path: Path) -> None:
    net = made(Residual)
    rules = [Rule("path", "layer1.1.*", {"weight.quant_dtype": 4}), Rule("type", "Block", {"weight.per_channel": True})]
    config = QuantConfig(act_quant_delay=3)
    _, expected = plan_network(net, IMAGE, config, rules)
    _, found = plan_network(exported(net, tmp_path, 1, *IMAGE), config=config, rules=rules)
    assert found.to_dict() == expected.to_dict()


@pytest.mark.parametrize("batch", [1, None])
def test_a_transformer_is_opened(batch: Optional[int], tmp_path: Path) -> None:
    net = made(Attention)
    graph = load_mindir(exported(net, tmp_path, batch, *TOKENS))
    x = ms.Tensor(np.random.default_rng(0).normal(size=(3, *TOKENS)).astype(np.float32))
    np.testing.assert_allclose(to_cell(graph)(x).asnumpy(), net(x).asnumpy(), atol=1e-6)
    assert {graph.shape(node.output)[0] for node in graph.nodes if node.op == "Dense"} == {-1}
    assert all(graph.shape(node.output).count(-1) <= 1 for node in graph.nodes), "nothing else is unknown"


def test_a_batch_that_cannot_be_opened_stays_and_is_told(tmp_path: Path) -> None:
    file = exported(made(Mixing), tmp_path, 2, 8)
    said = r"net\.mindir: the batch stays 2, .*depends on the other samples.*; to open it, export the network with mind"
    with pytest.warns(UserWarning, match=said):
        graph = load_mindir(file)
    assert graph.shape(graph.inputs[0]) == (2, 8)
    with pytest.raises(CaptureError, match=said):
        load_mindir(file, fixed_batch=False)


def test_a_network_exported_after_training_has_its_own_paths(tmp_path: Path) -> None:
    net = made(Residual)
    expected = [node.name for node in capture(net, IMAGE).nodes]
    net = made(Residual)
    step = nn.TrainOneStepCell(nn.WithLossCell(net, nn.CrossEntropyLoss()), nn.SGD(net.trainable_params()))
    ms.set_context(mode=ms.GRAPH_MODE)
    step(ms.Tensor(np.zeros((2, *IMAGE), np.float32)), ms.Tensor(np.zeros(2, np.int32)))
    assert [node.name for node in load_mindir(exported(net, tmp_path, 1, *IMAGE)).nodes] == expected


def test_a_file_written_by_msqkd_has_the_paths_of_its_parameters(tmp_path: Path) -> None:
    net = made(Residual)
    graph = deployment_graph(capture(net, IMAGE))
    found = load_mindir(write_float(graph, tmp_path / "float.mindir"))
    layers = {node.name: node.op for node in graph.nodes if node.op in ("Conv2D", "Dense")}
    assert {node.name: node.op for node in found.nodes if node.op in ("Conv2D", "Dense")} == layers
    assert found.node("layer1.0.conv").cell_types[-1] == "Conv2d"
    x = ms.Tensor(np.random.default_rng(0).normal(size=(3, *IMAGE)).astype(np.float32))
    np.testing.assert_array_equal(to_cell(found)(x).asnumpy(), to_cell(graph)(x).asnumpy())


def test_calibration_and_training_from_a_path(tmp_path: Path) -> None:
    file = exported(made(Residual), tmp_path, 1, *IMAGE)
    data = [np.random.default_rng(i).normal(size=(4, *IMAGE)).astype(np.float32) for i in range(2)]
    quantised = quantize(create_ptq_network(str(file), calib_dataset=data))
    again = quantize(create_ptq_network(made(Residual), calib_dataset=data))
    x = ms.Tensor(data[0])
    np.testing.assert_array_equal(quantised(x).asnumpy(), again(x).asnumpy())
    portable = export(quantised, data[0], str(tmp_path / "q"), "MINDIR_PORTABLE")
    lite = export(quantised, data[0], str(tmp_path / "lite"), "MINDIR")
    for made_file in (portable, lite):
        with pytest.raises(CaptureError, match=r"is quantised already: .*; give the MindIR of the float network"):
            load_mindir(made_file)
    cell = prepare_qat(file, config=QuantConfig(act_quant_delay=1))
    assert [p.name for p in cell.trainable_params() if "moving" in p.name] == []
    with pytest.raises(PlanError, match=r"dropout: .*net\.mindir was exported without it"):
        prepare_qat(file, dropout=True)
    with pytest.raises(
        CaptureError, match=r"the example input has samples of shape \[\(3, 9, 9\)\], the network takes"
    ):
        plan_network(file, (3, 9, 9))


# -- files that are refused -------------------------------------------------------------------------------------------
def changed(file: Path, change: Callable[[Any], None]) -> Path:
    model = pb.ModelProto()
    model.ParseFromString(file.read_bytes())
    change(model)
    file.write_bytes(model.SerializeToString())
    return file


def refused(file: Path, said: str) -> None:
    with pytest.raises(CaptureError, match=said) as caught:
        load_mindir(file)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


def test_files_that_are_no_mindir(tmp_path: Path) -> None:
    file = exported(nn.Dense(8, 3), tmp_path, 1, 8)
    whole = file.read_bytes()
    refused(tmp_path / "net.mindri", r"ends with \.mindir$")
    refused(tmp_path / "nett.mindir", r"does not exist; did you mean 'net\.mindir'\?")
    refused(tmp_path / "net.ckpt", r"ends with \.mindir; a checkpoint holds weights without their network")
    refused(tmp_path / "net.ms", "is made for a device and cannot be quantised")
    (tmp_path / "dir.mindir").mkdir()
    refused(tmp_path / "dir.mindir", "is a folder")
    for content in (b"", b"text" * 50, whole[:-40], whole[: len(whole) // 2]):
        file.write_bytes(content)
        refused(file, "is damaged")


def test_an_encrypted_file(tmp_path: Path) -> None:
    file = tmp_path / "net.mindir"
    net, x = nn.Dense(8, 3), ms.Tensor(np.zeros((1, 8), np.float32))
    ms.export(net, x, file_name=str(file), file_format="MINDIR", enc_key=b"0123456789ABCDEF", enc_mode="AES-GCM")
    refused(file, "is encrypted; export the network without enc_key")


def test_weights_in_other_files(tmp_path: Path) -> None:
    def split(model: Any) -> None:
        model.graph.parameter[0].external_data.location = "net_variables/data_0"

    refused(
        changed(exported(nn.Dense(8, 3), tmp_path, 1, 8), split), r"weights in other files \(net_variables/data_0\)"
    )


def test_missing_weights(tmp_path: Path) -> None:
    def empty(model: Any) -> None:
        model.graph.parameter[0].raw_data = b""

    refused(changed(exported(nn.Dense(8, 3), tmp_path, 1, 8), empty), "is damaged: its parts do not fit together")


def test_a_network_in_training_mode(tmp_path: Path) -> None:
    net = nn.SequentialCell(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, use_batch_statistics=True))
    refused(exported(net, tmp_path, 2, *IMAGE), r"in training mode: '1' \(BatchNorm\) normalises by each batch; leave")


def test_a_training_step(tmp_path: Path) -> None:
    net = nn.Dense(8, 3)
    loss = nn.WithLossCell(net, nn.MSELoss())
    step = nn.TrainOneStepCell(loss, nn.Momentum(net.trainable_params(), 0.1, 0.9))
    x, y = ms.Tensor(np.zeros((2, 8), np.float32)), ms.Tensor(np.zeros((2, 3), np.float32))
    ms.export(step, x, y, file_name=str(tmp_path / "net.mindir"), file_format="MINDIR")
    with pytest.raises(CaptureError, match=r"holds a training step \(ApplyMomentum"):
        load_mindir(tmp_path / "net.mindir")


def test_sizes_that_are_open_beside_the_batch(tmp_path: Path) -> None:
    file = exported(nn.Conv2d(3, 4, 3), tmp_path, None, 3, None, None)
    refused(file, r"input 'x' has the shape \(-1, 3, -1, -1\); only the batch, in front, may be open")


class Branching(nn.Cell):
    def construct(self, x):  # type: ignore[no-untyped-def]
        if x.sum() > 0:
            x = x * 2
        return x


def test_control_flow_names_the_cell(tmp_path: Path) -> None:
    file = exported(nn.SequentialCell(nn.Dense(8, 3), Branching()), tmp_path, 1, 8)
    with pytest.raises(CaptureError, match=r"SequentialCell: the network branches .* \(in cell '1'\)"):
        load_mindir(file)
