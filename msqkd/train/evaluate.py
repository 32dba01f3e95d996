"""Outputs of a network on a split, and what a metric says of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Callable, Optional

import mindspore as ms
import numpy as np

from msqkd import parallel
from msqkd.data import Arrays, Split, as_tuple, subset
from msqkd.errors import ModelError
from msqkd.train.metric import ACCURACY, Metric, Outputs

Progress = Callable[[int], None]


def input_batches(split: Split, batch_size: int) -> Iterator[Arrays]:
    """The samples in order, without augmentation, as arrays (n, C, H, W), or tuples of arrays (n, ...)."""
    for start in range(0, len(split), batch_size):
        yield split.batch(np.arange(start, min(start + batch_size, len(split))))[0]


def filled(array: np.ndarray, size: int) -> np.ndarray:
    """`array` with its last sample repeated up to `size` samples."""
    missing = size - len(array)
    return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) if missing else array


def output_arrays(
    network: Callable[..., Any],
    split: Split,
    batch_size: int,
    chosen: Optional[Sequence[int]] = None,
    progress: Optional[Progress] = None,
) -> Outputs:
    """The network's outputs for every sample, in evaluation mode, in the samples' order.

    Every batch has `batch_size` samples (the last is filled up and cut), so that one compilation serves. An output may
    have several rows a sample, as (N * T, classes) has.

    Args:
        network: a cell, or a function of Tensors that gives a Tensor or a tuple of them.
        split: the samples.
        batch_size: samples a batch, at most.
        chosen: numbers of the outputs wanted; all by default.
        progress: called with the number of samples done.

    Raises:
        ModelError: the number of an output's rows is no multiple of that of the samples.
    """
    if hasattr(network, "set_train"):
        network.set_train(False)
    batch_size = min(batch_size, len(split))
    parts: list[list[np.ndarray]] = []
    done = 0
    for batch in input_batches(split, batch_size):
        arrays = as_tuple(batch)
        count = len(arrays[0])
        found = network(*(ms.Tensor(filled(array, batch_size)) for array in arrays))
        outputs = found if isinstance(found, tuple) else (found,)
        wanted = range(len(outputs)) if chosen is None else chosen
        parts.append([_rows_of(outputs[index].asnumpy(), index, count, batch_size) for index in wanted])
        done += count
        if progress is not None:
            progress(done)
    return tuple(np.concatenate(column) for column in zip(*parts))


def _rows_of(output: np.ndarray, index: int, count: int, size: int) -> np.ndarray:
    """The rows of an output that the first `count` of `size` samples gave."""
    if output.ndim == 0 or len(output) % size:
        raise ModelError(f"output {index} has shape {output.shape} for {size} samples; each needs as many rows")
    return output[: len(output) // size * count]


def measured(
    network: Callable[..., Any],
    split: Split,
    batch_size: int,
    metric: Metric = ACCURACY,
    chosen: Optional[Sequence[int]] = None,
    *,
    together: bool = False,
) -> float:
    """What `metric` says of the outputs `chosen` (all by default) on a labelled split.

    With `together` every worker of a training computes a part of the outputs, and all get the same answer.

    Raises:
        DataError: no labels, or no finite number.
        ModelError: as `output_arrays`.
    """
    outputs = (_outputs_together if together else output_arrays)(network, split, batch_size, chosen)
    return metric(outputs, split.labels, split.name)


def _outputs_together(
    network: Callable[..., Any], split: Split, batch_size: int, chosen: Optional[Sequence[int]]
) -> Outputs:
    """`output_arrays` of a split that is divided among the workers; the last begin again at its start."""
    workers, count = parallel.size(), len(split)
    if workers == 1:
        return output_arrays(network, split, batch_size, chosen)
    each = -(-count // workers)
    own = np.arange(parallel.rank() * each, (parallel.rank() + 1) * each) % count
    found = (parallel.gather_rows(array) for array in output_arrays(network, subset(split, own), batch_size, chosen))
    return tuple(array[: len(array) // (each * workers) * count] for array in found)


def agreement(one: np.ndarray, other: np.ndarray) -> float:
    """Share of samples, in percent, for which two sets of logits name the same class."""
    return float((one.argmax(-1) == other.argmax(-1)).mean() * 100.0)
