"""Dropout as the built cell has it: random in training mode, nothing in evaluation.

MindSpore's own dropout draws from a generator inside the kernel, which nothing can save: a training that is interrupted
and goes on would see other masks. Here a mask is a function of a counter, which is a parameter and saved with the
others, as in counter-based generators (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011).
"""

from __future__ import annotations

import zlib
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from msqkd import parallel

MASKS = {"element": None, "channel": 2, "sample": 1}
"""What is dropped as one: how many leading dimensions have a random number of their own; None for all."""

# The finaliser of MurmurHash3 (Austin Appleby, public domain) without its last step, which only moves low bits.
_MIX = ((16, -2048144789), (13, -1028477387))
_STEP = -1640531527  # 2^32 over the golden ratio: steps far apart for the hash


class CountedDropout(nn.Cell):
    """Drops elements, whole channels or whole samples (stochastic depth, Huang et al., arXiv:1603.09382).

    Each call in training mode has another mask; the masks follow from `name`, MindSpore's global seed and the number of
    calls so far, which is the parameter ``<name>.dropout_calls``.

    Args:
        name: of the node, unique in the network.
        rate: the probability with which one is dropped, 0 < rate < 1.
        mask: ``element``, ``channel`` or ``sample``.
        scale: divide what is kept by 1 - rate, so that the mean stays.
    """

    def __init__(self, name: str, rate: float, mask: str, scale: bool = True) -> None:
        super().__init__()
        self.leading = MASKS[mask]
        self.factor = 1.0 / (1.0 - rate) if scale else 1.0
        seed = zlib.crc32(f"{name}/{ms.get_seed() or 0}".encode())
        self.seed = _int32(seed)
        self.threshold = _int32(round(rate * 2**32) - 2**31)
        self.step = _int32(_STEP)
        self.shifts = [(_int32(bits), _int32((1 << (32 - bits)) - 1), _int32(factor)) for bits, factor in _MIX]
        self.rank = parallel.rank()
        self.calls = ms.Parameter(_int32(0), name=f"{name}.dropout_calls", requires_grad=False)

    def construct(self, x: Any) -> Any:
        """`x` of any rank and float dtype; the same shape comes back."""
        if not self.training:
            return x
        call = ops.assign_add(self.calls, 1)
        shape = x.shape if self.leading is None else x.shape[: self.leading]
        keep = self.keep(shape, call, self.rank * shape[0]).reshape(shape + (1,) * (x.ndim - len(shape)))
        return x * (keep.astype(x.dtype) * self.factor)

    def keep(self, shape: Any, call: Any, before: Any = 0) -> Any:
        """Whether each of `shape` is kept at a call, after `before` rows of other workers: bool (rows, columns)."""
        rows, columns = shape[0], prod_of(shape[1:])
        first = (ops.arange(0, rows, dtype=ms.int32) + before) * columns
        bits = first.reshape(-1, 1) + ops.arange(0, columns, dtype=ms.int32).reshape(1, -1)
        bits = bits + (call * self.step + self.seed)
        for shift, mask, factor in self.shifts:
            # The mask makes the shift of a signed number a logical one.
            bits = ops.bitwise_xor(bits, ops.bitwise_and(ops.bitwise_right_shift(bits, shift), mask)) * factor
        return bits >= self.threshold


def prod_of(sizes: Any) -> int:
    """The product of sizes."""
    result = 1
    for size in sizes:
        result = result * size
    return result


def _int32(number: int) -> Any:
    """A scalar Tensor of the number modulo 2^32."""
    return ms.Tensor(np.array(number % 2**32, np.uint32).view(np.int32))
