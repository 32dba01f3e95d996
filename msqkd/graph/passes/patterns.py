"""Every rewrite that finds, in what a network spells out, an operation that runtimes have as one."""

from __future__ import annotations

from msqkd.graph.ir import Graph
from msqkd.graph.passes.activations import find_activations
from msqkd.graph.passes.padded_pools import find_padded_pools
from msqkd.graph.passes.padding import fold_padding


def find_patterns(graph: Graph) -> None:
    """Activation functions, poolings with padding, and paddings that belong to a convolution, in place.

    Names of values between layers stay; so a plan made on one form of a network fits the others when all have been
    through here. The cell built from the graph gives the same bits, convolutions that took a padding in excepted.
    """
    find_activations(graph)
    find_padded_pools(graph)
    fold_padding(graph)
