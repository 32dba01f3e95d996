"""Whether a batch has the sizes a captured network was captured for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msqkd.errors import DataError
from msqkd.graph.ir import Graph


def check_shapes(graph: Graph, batch: Sequence[Any], where: str) -> None:
    """Refuse a batch whose samples have other shapes than the network takes.

    A captured network has the sizes of its example in its reshapes: of samples of another length it would silently
    take the numbers of two for one.

    Args:
        graph: the network.
        batch: arrays or Tensors, one for each input.
        where: what the message calls the batch.

    Raises:
        DataError: an array has other sizes, the batch apart.
    """
    for name, array in zip(graph.inputs, batch):
        wanted, found = graph.shape(name), tuple(array.shape)
        if len(found) != len(wanted) or any(size not in (-1, other) for size, other in zip(wanted, found)):
            needed = ", ".join("N" if size == -1 else str(size) for size in wanted)
            raise DataError(
                f"{where}: input '{name}' has shape {found}; the network was captured for ({needed}): bring all "
                "samples to this size (pad or cut them), or capture the network with an example of the other size"
            )
