"""Accuracy and answers of a network on a split."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Callable, Optional

import mindspore as ms
import numpy as np

from msqkd.data import Split


def input_batches(split: Split, batch_size: int) -> Iterator[np.ndarray]:
    """The samples in order, without augmentation, as arrays (n, C, H, W)."""
    for start in range(0, len(split), batch_size):
        yield split.batch(np.arange(start, min(start + batch_size, len(split))))[0]


def answers(
    network: Callable[..., Any], split: Split, batch_size: int, progress: Optional[Callable[[int], None]] = None
) -> np.ndarray:
    """The network's first output for every sample, in evaluation mode: logits (N, classes).

    Every batch has `batch_size` samples (the last is filled up and cut), so that one compilation serves.
    """
    if hasattr(network, "set_train"):
        network.set_train(False)
    batch_size = min(batch_size, len(split))
    parts: list[np.ndarray] = []
    for batch in input_batches(split, batch_size):
        count = len(batch)
        if count < batch_size:
            batch = np.concatenate([batch, np.repeat(batch[-1:], batch_size - count, axis=0)])
        output = network(ms.Tensor(batch))
        output = output[0] if isinstance(output, tuple) else output
        parts.append(output.asnumpy()[:count])
        if progress is not None:
            progress(sum(len(p) for p in parts))
    return np.concatenate(parts)


def accuracy_of(logits: np.ndarray, labels: np.ndarray) -> float:
    """Top-1 accuracy in percent."""
    return float((logits.argmax(-1) == labels).mean() * 100.0)


def accuracy(network: Callable[..., Any], split: Split, batch_size: int) -> float:
    """Top-1 accuracy of the network on a labelled split, in percent."""
    assert split.labels is not None
    return accuracy_of(answers(network, split, batch_size), split.labels)


def agreement(one: np.ndarray, other: np.ndarray) -> float:
    """Share of samples, in percent, for which two sets of logits name the same class."""
    return float((one.argmax(-1) == other.argmax(-1)).mean() * 100.0)
