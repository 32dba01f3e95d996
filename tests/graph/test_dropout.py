from __future__ import annotations

import zlib
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import nn

from msqkd.graph.dropout import CountedDropout


def kept(shape: tuple[int, ...], call: int, name: str, rate: float) -> np.ndarray:
    """The mask, computed in numpy's unsigned integers."""
    bits = np.arange(np.prod(shape), dtype=np.uint32)
    with np.errstate(over="ignore"):
        bits = bits + np.uint32(call) * np.uint32(0x9E3779B9)
        bits = bits + np.uint32(zlib.crc32(f"{name}/{ms.get_seed() or 0}".encode()))
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(factor)
    return (bits.view(np.int32) >= round(rate * 2**32) - 2**31).reshape(shape)


def ones(*shape: int) -> Any:
    return ms.Tensor(np.ones(shape, np.float32))


@pytest.mark.parametrize("mode", [ms.GRAPH_MODE, ms.PYNATIVE_MODE], ids=["graph", "pynative"])
def test_the_masks_are_those_of_the_counter(mode: int) -> None:
    ms.set_context(mode=mode)
    cell = CountedDropout("block.drop", 0.3, "element")
    cell.set_train(True)
    for call in (1, 2):
        y = cell(ones(4, 5, 3)).asnumpy()
        np.testing.assert_array_equal(y != 0, kept((4, 5, 3), call, "block.drop", 0.3))
        np.testing.assert_allclose(y[y != 0], 1 / 0.7, rtol=1e-6)
    cell.set_train(False)
    np.testing.assert_array_equal(cell(ones(4, 5, 3)).asnumpy(), 1)
    assert int(cell.calls.asnumpy()) == 2


@given(rate=st.floats(0.05, 0.95), call=st.integers(1, 10**6), name=st.text("abc.", min_size=1))
@settings(max_examples=50, deadline=None)
def test_masks_look_random(rate: float, call: int, name: str) -> None:
    """Within five standard errors: the share kept, neighbours, and the mask of the next call."""
    mask, following = (kept((200, 200), c, name, rate).astype(float) for c in (call, call + 1))
    assert abs(mask.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / mask.size)
    flat = mask.ravel()
    for other in (np.roll(flat, 1), mask.T.ravel(), following.ravel()):
        assert abs(np.corrcoef(flat, other)[0, 1]) < 5 / np.sqrt(flat.size) + 0.02


@pytest.mark.parametrize(("mask", "leading"), [("sample", 1), ("channel", 2)])
def test_a_mask_drops_wholes_and_keeps_the_mean(mask: str, leading: int) -> None:
    cell = CountedDropout("d", 0.25, mask)
    cell.set_train(True)
    y = cell(ones(40, 30, 2, 2)).asnumpy().reshape(*(40, 30)[:leading], -1)
    assert ((y == y[..., :1]).all(-1)).all()
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    unscaled = CountedDropout("d", 0.25, mask, scale=False)
    unscaled.set_train(True)
    assert set(np.unique(unscaled(ones(40, 30)).asnumpy())) <= {np.float32(0), np.float32(1)}


def test_a_training_that_goes_on_sees_the_same_masks() -> None:
    """The counter is a parameter: what a checkpoint holds decides the next mask."""

    def network() -> Any:
        cell = nn.SequentialCell(
            nn.Dense(8, 8, weight_init="ones", has_bias=False), CountedDropout("d", 0.5, "element")
        )
        cell.set_train(True)
        return cell

    whole, continued = network(), network()
    expected = [whole(ones(4, 8)).asnumpy() for _ in range(4)][2:]
    for _ in range(2):
        continued(ones(4, 8))
    resumed = network()
    saved = {p.name: p.asnumpy() for p in continued.get_parameters()}
    for parameter in resumed.get_parameters():
        parameter.set_data(ms.Tensor(saved[parameter.name]))
    for answer in expected:
        np.testing.assert_array_equal(resumed(ones(4, 8)).asnumpy(), answer)
