"""MindIR files whose weights are written one after the other."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from msqkd import QuantConfig, create_ptq_network, quantize
from msqkd.errors import ExportError
from msqkd.exporters.lite import export_lite, read_marked
from msqkd.exporters.mindir_file import write_cell, write_model
from msqkd.graph.capture import capture
from msqkd.graph.cell import to_cell


class Tied(nn.Cell):
    """An embedding and an output layer with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(12, 8), nn.Dense(8, 8)

    def construct(self, ids: Any) -> Any:
        x = ops.relu(self.mix(self.words(ids)))
        return ops.matmul(x, self.words.embedding_table.swapaxes(0, 1))


class Twice(nn.Cell):
    """One weight of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Dense(6, 6), nn.Dense(6, 6)
        self.second.weight = self.first.weight

    def construct(self, x: Any) -> Any:
        return self.second(ops.relu(self.first(x)))


def test_the_bytes_are_those_of_the_protobuf_library() -> None:
    from mindspore.train import mind_ir_pb2 as pb

    def model(filled: bool) -> Any:
        made = pb.ModelProto(ir_version="1", producer_name="p", little_endian=True)
        made.graph.name = "g"
        made.graph.node.add(op_type="REF::Add", input=["a", "b"], output=["c"])
        made.graph.output.add(name="c")
        for name, array in arrays.items():
            entry = made.graph.parameter.add(name=name, dims=array.shape, data_type=1, ref_key=name)
            if filled:
                entry.raw_data = array.tobytes()
        made.primitives.add(name="Add", op_type="Add")
        made.graph.bprop_hash = "h"
        return made

    arrays = {"a": np.arange(200, dtype=np.float32), "b": np.zeros((0, 3), np.float32), "c": np.ones((), np.float32)}
    stream = io.BytesIO()
    held = list(arrays.values())
    write_model(model(False), [array.nbytes for array in held], lambda index: held[index].tobytes(), stream)
    found = pb.ModelProto()
    found.ParseFromString(stream.getvalue())
    assert [entry.raw_data for entry in found.graph.parameter] == [array.tobytes() for array in held]
    expected = model(True)
    expected.graph.parameter[1].ClearField("raw_data")  # nothing is written for nothing
    assert stream.getvalue() == expected.SerializeToString(deterministic=True)


def test_what_is_stored_may_differ_from_what_the_cell_holds(tmp_path: Path) -> None:
    cell = to_cell(capture(nn.SequentialCell(nn.Dense(4, 3)), (4,)))
    x = ms.Tensor(np.ones((2, 4), np.float32))
    file = write_cell(
        cell, [x], tmp_path / "net.mindir", store=lambda name, array: array * 2 if "bias" in name else array
    )
    expected = cell(x).asnumpy() + cell.parameters_dict()["0.bias"].asnumpy()
    np.testing.assert_allclose(nn.GraphCell(ms.load(str(file)))(x).asnumpy(), expected, rtol=1e-6)


def test_a_failure_leaves_no_file(tmp_path: Path) -> None:
    cell = to_cell(capture(nn.SequentialCell(nn.Dense(4, 3)), (4,)))
    x = ms.Tensor(np.ones((2, 4), np.float32))

    def form(model: Any) -> None:
        raise ExportError("a rule is broken")

    def store(name: str, array: np.ndarray) -> np.ndarray:
        raise OSError(28, "No space left on device")

    with pytest.raises(ExportError, match=r"^a rule is broken$"):
        write_cell(cell, [x], tmp_path / "net.mindir", form)
    with pytest.raises(ExportError, match=r"cannot write .*net\.mindir: No space left on device"):
        write_cell(cell, [x], tmp_path / "net.mindir", store=store)
    with pytest.raises(ExportError, match=r"net\.mindir: MindSpore cannot export the network: "):
        write_cell(cell, [ms.Tensor(np.ones((2, 5), np.float32))], tmp_path / "net.mindir")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("make", "weights"), [(Tied, 3), (Twice, 1)], ids=["tied", "twice"])
def test_a_weight_with_several_readers(make: Callable[[], nn.Cell], weights: int, tmp_path: Path) -> None:
    x = np.random.default_rng(0)
    data = x.integers(0, 12, (4, 5)).astype(np.int32) if make is Tied else x.normal(size=(4, 6)).astype(np.float32)
    net = make()
    cell = quantize(create_ptq_network(net, QuantConfig(act_observer="minmax"), [data], example_input=ms.Tensor(data)))
    graph, plan = cell.sync()
    read, _, marked = read_marked(export_lite(graph, plan, tmp_path / "net.mindir"))
    matrices = {name: held.data for name, held in read.params.items() if held.data.ndim > 1}
    assert len(matrices) == weights
    assert all(qparams.fake_quantize(d).shape == d.shape for d, qparams in zip(matrices.values(), marked.values()))
    if make is Tied:  # the embedding is what it was
        np.testing.assert_array_equal(matrices["words.embedding_table"], net.words.embedding_table.asnumpy())
