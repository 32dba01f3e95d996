"""Weights of few distinct integers in the portable file: the same answers from fewer bytes."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import nn

from msqkd.api import create_ptq_network, quantize
from msqkd.exporters.packing import Packing, digits, pack, packings, padded
from msqkd.exporters.portable import export_portable, portable_graph
from msqkd.exporters.verify import load_portable
from msqkd.graph.cell import to_cell
from msqkd.graph.ir import Graph
from msqkd.graph.mindir import read_mindir
from msqkd.quant.algorithms.cluster import Cluster
from msqkd.quant.config import QuantConfig, WeightQuantizer
from msqkd.quant.plan import QuantPlan
from msqkd.quant.qat import QuantCell

RNG = np.random.default_rng(0)


# -- bytes -------------------------------------------------------------------------------------------------------------
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_packed_numbers_come_back(data: st.DataObject) -> None:
    width = data.draw(st.sampled_from([1, 2, 4]))
    codebook = np.array(sorted(data.draw(st.sets(st.integers(-128, 127), min_size=1, max_size=2**width))))
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    integers = np.random.default_rng(data.draw(st.integers(0, 99))).choice(codebook, shape).astype(np.int8)
    packing = Packing(width, codebook)
    packed = pack(integers, packing)
    assert packed.dtype == np.uint8
    assert packed.shape == (-(-integers.size * width // 8),)
    found = padded(codebook, width)[digits(width)][packed].reshape(-1)[: integers.size].reshape(shape)
    np.testing.assert_array_equal(found, integers)


def test_the_first_number_is_in_the_lowest_bits() -> None:
    assert pack(np.array([5, 9, 9]), Packing(1, np.array([5, 9]))).tolist() == [0b110]
    assert pack(np.array([-3, 5, 9, 0]), Packing(2, np.array([-3, 0, 5, 9]))).tolist() == [0b01_11_10_00]
    assert pack(np.array([0, 15, 1]), Packing(4, np.arange(16))).tolist() == [0xF0, 0x01]
    assert digits(4)[0xF0].tolist() == [0, 15]
    assert digits(1).shape == (256, 8)


def weight(values: int, size: int, first: int = 0) -> np.ndarray:
    return (np.arange(size) % values + first).astype(np.int8)


def test_what_pays_is_packed_in_the_narrowest_way() -> None:
    found = packings({
        "two": weight(2, 9000), "three": weight(3, 9000), "five": weight(5, 9000), "sixteen": weight(16, 9000),
        "seventeen": weight(17, 9000), "small": weight(2, 600),
    })  # fmt: skip
    assert {name: packing.width for name, packing in found.items()} == {"two": 1, "three": 2, "five": 4, "sixteen": 4}
    assert found["two"].suffix == "uint1x8"
    # One layer that would not pay for the table of digits with what it saves
    assert packings({"alone": weight(2, 2500)}) == {}
    assert list(packings({"one": weight(2, 2500), "other": weight(2, 2500)})) == ["one", "other"]


def test_layers_share_a_codebook_that_holds_their_integers() -> None:
    found = packings({
        "part": weight(7, 9000, -3), "whole": weight(16, 9000, -8), "other": weight(16, 9000, 4), "few": weight(3, 9000)
    })  # fmt: skip
    assert found["part"].codebook is found["whole"].codebook
    assert found["other"].codebook is not found["whole"].codebook
    assert found["few"].codebook.tolist() == [0, 1, 2]


# -- files -------------------------------------------------------------------------------------------------------------
INPUTS = RNG.normal(size=(4, 6, 8, 8)).astype(np.float32)


class Net(nn.Cell):
    """Weights worth packing, one of an odd size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu = nn.Conv2d(6, 59, 3), nn.ReLU()
        self.second, self.third = nn.Conv2d(59, 17, 3), nn.Conv2d(17, 45, 3)
        self.flatten, self.fc = nn.Flatten(), nn.Dense(45 * 64, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.relu(self.third(self.relu(self.second(self.relu(self.first(x))))))
        return self.fc(self.flatten(x))


@lru_cache
def clustered(clusters: int, shared: bool = False, bits: int = 8) -> QuantCell:
    ms.set_seed(0)
    config = QuantConfig(WeightQuantizer(bits, per_channel=True), act_observer="minmax")
    return quantize(create_ptq_network(Net(), config, [INPUTS], methods=[Cluster(clusters, shared)]))


LAYERS = ("first", "second", "third", "fc")


def answers(cell: object) -> np.ndarray:
    return cell(ms.Tensor(INPUTS)).asnumpy()  # type: ignore[operator]


def as_bytes(graph: Graph, plan: QuantPlan, file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file with one byte a weight."""
    with monkeypatch.context() as patch:
        patch.setattr("msqkd.exporters.portable.packings", lambda weights: {})
        return export_portable(graph, plan, file)


@pytest.mark.usefixtures("pynative_mode")
@pytest.mark.parametrize(("clusters", "width"), [(4, 2), (16, 4)])
def test_clustered_weights_answer_the_same_from_fewer_bytes(
    clusters: int, width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = clustered(clusters)
    graph, plan = cell.sync()
    file = export_portable(graph, plan, tmp_path / "packed.mindir")
    whole = as_bytes(graph, plan, tmp_path / "whole.mindir", monkeypatch)
    params = portable_graph(graph, plan).params
    held = [params[f"{name}.weight.uint{width}x{8 // width}"].data.size for name in LAYERS]
    weights = sum(quant.held_in(graph).size for quant in plan.weights.values())
    assert sum(held) < weights * width / 8 + len(LAYERS)
    tables = 256 * 8 // width
    assert whole.stat().st_size - file.stat().st_size > weights * (8 - width) / 8 - tables - 640 * len(LAYERS)
    expected = answers(load_portable(whole))
    np.testing.assert_array_equal(answers(load_portable(file)), expected)
    np.testing.assert_array_equal(answers(cell), expected)
    if clusters == 16:
        np.testing.assert_array_equal(answers(to_cell(read_mindir(file.read_bytes(), "back"))), expected)


@pytest.mark.usefixtures("pynative_mode")
def test_a_shared_codebook_is_in_the_file_once(tmp_path: Path) -> None:
    books, sizes = {}, {}
    for shared in (False, True):
        graph, plan = clustered(16, shared).sync()
        names = portable_graph(graph, plan).params
        books[shared] = [name for name in names if name.startswith("codebook")]
        assert sum(name.startswith("digits") for name in names) == 1
        sizes[shared] = export_portable(graph, plan, tmp_path / f"{shared}.mindir").stat().st_size
    assert len(books[False]) == 4
    assert books[True] == ["codebook.uint4"]
    assert sizes[True] < sizes[False] - 3 * 64


@pytest.mark.usefixtures("pynative_mode")
def test_fewer_bits_are_stored_as_clusters_are() -> None:
    graph, plan = clustered(16, bits=4).sync()
    assert all(quant.scale is None for quant in plan.weights.values()), "15 integers: nothing to cluster"
    names = portable_graph(graph, plan).params
    assert "second.weight.uint4x2" in names
    assert [name for name in names if name.startswith("codebook")] == ["codebook.uint4"]


@pytest.mark.usefixtures("pynative_mode")
def test_a_weight_that_two_layers_read_is_held_once() -> None:
    class Tied(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Dense(64, 64), nn.Dense(64, 64)
            self.second.weight = self.first.weight

        def construct(self, x):  # type: ignore[no-untyped-def]
            return self.second(self.first(x))

    ms.set_seed(0)
    inputs = RNG.normal(size=(4, 64)).astype(np.float32)
    cell = quantize(create_ptq_network(Tied(), QuantConfig(WeightQuantizer(4)), [inputs]))
    graph, plan = cell.sync()
    assert [name for name in portable_graph(graph, plan).params if "uint4x2" in name] == ["first.weight.uint4x2"]
