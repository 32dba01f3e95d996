"""Several workers train one network: who is who, and what they tell each other.

Workers are started by MindSpore's ``msrun`` and joined by `join`; without it there is one worker, and nothing here
costs anything. Training is data-parallel: every worker has the whole network and computes its part of each batch.

AllReduce on CPU adds float32 only, AllGather moves any 32-bit word: what is not a sum is gathered.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from msqkd.errors import TrainingError

_ROLE, _SCHEDULER = "MS_ROLE", "MS_SCHED"
_DATA_PARALLEL = "data_parallel"
# MindSpore's own limit on CPU is 30 seconds, less than one worker may need for its evaluation or compilation.
_TIMEOUT = ("MS_CPU_COMM_OP_TIMEOUT", "1800")
_LEAST_BYTES = 1024


def join() -> None:
    """Take the place msrun has given this process; a process that msrun did not start stays alone.

    In msrun's scheduler process, which runs the same command, this returns never: it ends with the workers.

    Raises:
        TrainingError: the other workers cannot be reached.
    """
    if _ROLE not in os.environ or size() > 1:
        return
    from mindspore.communication import GlobalComm, get_group_size, init

    os.environ.setdefault(*_TIMEOUT)
    try:
        if not GlobalComm.INITED:  # else this worker has gone on alone for a while
            init()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(f"another worker cannot be reached or has stopped ({reason}); its log says why") from error
    if os.environ[_ROLE] == _SCHEDULER:
        raise SystemExit(0)
    workers = get_group_size()
    if workers > 1:
        ms.set_auto_parallel_context(parallel_mode=_DATA_PARALLEL, gradients_mean=True, device_num=workers)


def size() -> int:
    """The number of workers, 1 where data-parallel training was not begun."""
    if ms.get_auto_parallel_context("parallel_mode") != _DATA_PARALLEL:
        return 1
    return int(ms.get_auto_parallel_context("device_num"))


def rank() -> int:
    """The number of this worker, from 0."""
    if size() == 1:
        return 0
    from mindspore.communication import get_rank

    return int(get_rank())


def go_on_alone() -> None:
    """From here on the worker that calls this is the only one."""
    if size() > 1:
        ms.reset_auto_parallel_context()
        _cells.clear()


def is_first() -> bool:
    """Whether this worker is the one that writes, prints and reports."""
    return rank() == 0


def share_of_batch(indices: np.ndarray, parts: int = 1) -> np.ndarray:
    """This worker's samples of the batch of all workers.

    The batch is `parts` batches, one after the other, each of which the workers divide in order: together,
    part by part, they compute what one worker with the whole batch would.

    Args:
        indices: (workers · parts · n,).
        parts: batches whose gradients are accumulated.

    Returns:
        Of shape (parts · n,).
    """
    return indices.reshape(parts, size(), -1)[:, rank()].reshape(-1)


class Mean(nn.Cell):
    """The mean over all workers of a float32 Tensor; for compiled code."""

    def __init__(self) -> None:
        super().__init__()
        self.workers = float(size())
        self.sum = ops.AllReduce()

    def construct(self, x):  # type: ignore[no-untyped-def]
        """A Tensor of the shape of `x`."""
        return self.sum(x) / self.workers


class Means(nn.Cell):
    """The means over all workers of several float32 Tensors, in one message; for compiled code.

    On CPU every message costs milliseconds.

    Args:
        shapes: of the Tensors, in order.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.mean = Mean()
        self.shapes = tuple(shapes)
        self.sizes = [math.prod(shape) for shape in self.shapes]

    def construct(self, tensors):  # type: ignore[no-untyped-def]
        """A tuple of Tensors; returns one."""
        flat = ()
        for tensor in tensors:
            flat = (*flat, tensor.reshape(-1))
        means = ()
        for part, shape in zip(ops.split(self.mean(ops.concat(flat)), self.sizes), self.shapes):
            means = (*means, part.reshape(shape))
        return means


class Extremes(nn.Cell):
    """The least and the largest over all workers of two 0-d float32 Tensors; for compiled code."""

    def __init__(self) -> None:
        super().__init__()
        self.gather = ops.AllGather()
        self.least, self.largest, self.sum = ops.ReduceMin(), ops.ReduceMax(), ops.ReduceSum()

    def construct(self, low, high):  # type: ignore[no-untyped-def]
        """Two 0-d Tensors; not finite where a worker has something that is not."""
        spans = self.gather(ops.stack((low, high))).reshape(-1, 2)
        spoilt = self.sum(spans) * 0.0  # a comparison may pass over a NaN
        return self.least(spans[:, 0]) + spoilt, self.largest(spans[:, 1]) + spoilt


class _Gather(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.gather = ops.AllGather()

    def construct(self, words):  # type: ignore[no-untyped-def]
        return self.gather(words)


class _Broadcast(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.broadcast = ops.Broadcast(0)

    def construct(self, words):  # type: ignore[no-untyped-def]
        return self.broadcast((words,))[0]


_cells: dict[type, nn.Cell] = {}


def _exchange(kind: type, words: np.ndarray) -> np.ndarray:
    """Hand int32 (n,) to the cell of a kind: a compilation is kept for each n, so these are few."""
    if kind not in _cells:
        _cells[kind] = kind()
    try:
        return np.asarray(_cells[kind](ms.Tensor(words)).asnumpy())
    except RuntimeError as error:
        raise TrainingError("another worker has stopped; its log says why") from error


def _words(data: bytes, length: int) -> np.ndarray:
    """Bytes as int32 words, filled up to `length` bytes, which are made a power of two."""
    padded = max(_LEAST_BYTES, 1 << (max(length, 1) - 1).bit_length())
    return np.frombuffer(data + bytes(padded - len(data)), np.int32)


def gathered(number: int) -> list[int]:
    """An integer of every worker, in their order."""
    if size() == 1:
        return [number]
    return [int(item) for item in _exchange(_Gather, np.array([number], np.int32))]


def gather_rows(array: np.ndarray) -> np.ndarray:
    """The rows all workers have, in their order, every worker's as many: (n, …) to (workers · n, …)."""
    if size() == 1:
        return array
    data = array.tobytes()
    words = _exchange(_Gather, _words(data, len(data))).reshape(size(), -1)
    rows = [np.frombuffer(row.tobytes()[: len(data)], array.dtype).reshape(array.shape) for row in words]
    return np.concatenate(rows)


def from_first(value: Any) -> Any:
    """What worker 0 has, for all: JSON-able data.

    Every worker must come here, as often as the others.
    """
    if size() == 1:
        return value
    data = json.dumps(value).encode() if is_first() else b""
    length = max(gathered(len(data)))
    words = _exchange(_Broadcast, _words(data, length))
    return json.loads(words.tobytes()[:length])


def share_parameters(parameters: Sequence[Any]) -> None:
    """Give every worker the values worker 0 has."""
    if size() == 1:
        return
    arrays = [parameter.asnumpy() for parameter in parameters]
    data = b"".join(array.tobytes() for array in arrays)
    held = _exchange(_Broadcast, _words(data, len(data))).tobytes()
    place = 0
    for parameter, array in zip(parameters, arrays):
        values = np.frombuffer(held[place : place + array.nbytes], array.dtype).reshape(array.shape)
        parameter.set_data(ms.Tensor(values.copy()))
        place += array.nbytes


def any_worker(flag: bool) -> bool:
    """Whether `flag` is true for one worker at least."""
    return any(gathered(int(flag)))


def wait() -> None:
    """Go on when every worker is here."""
    any_worker(False)
