"""What methods of post-training quantisation have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Callable, ClassVar

import numpy as np

from msqkd.graph.ir import Graph
from msqkd.quant.algorithms.biases import put
from msqkd.quant.algorithms.order import FLOAT_STAGE as FLOAT_STAGE
from msqkd.quant.algorithms.order import INTEGER_STAGE as INTEGER_STAGE
from msqkd.quant.plan import QuantPlan


@dataclass
class Work:
    """A network while methods improve it.

    Methods change weights with `deploy` and `rewrite` only, so that `reference` always is the network that `graph`
    approximates.

    Attributes:
        graph: the deployment graph. Parameters keep their dtype. Nodes and values keep their names; every convolution
            and dense layer that can have a bias has one. Shapes stay too, except for channels between layers that a
            method of the float stage copies: that method adapts the parameters, the types of the values, and the
            attributes of operations.
        plan: its plan; from the integer stage on with ranges. Methods of this stage may set scales and clip ratios of
            weights in it (a method replaces it, it is not changed in place).
        samples: gives the unlabelled calibration samples from the first on, a tuple of arrays (N, ...) a batch. Methods
            may stop before the last one, so the order must be random or balanced, never by class.
        seed: of everything drawn.
        progress: told, from time to time, the steps done and how many there are.
        reference: the float network that `graph` approximates, with the same nodes, values and shapes: the network
            that `graph` was at first, with every rewrite since, and without anything that was only deployed.
    """

    graph: Graph
    plan: QuantPlan
    samples: Callable[[], Iterator[tuple[np.ndarray, ...]]]
    seed: int = 0
    progress: Callable[[int, int], None] = field(default=lambda done, total: None)
    reference: Graph = field(init=False)

    def __post_init__(self) -> None:
        self.reference = self.graph.copy()

    def deploy(self, name: str, data: np.ndarray) -> None:
        """Replace the array of a parameter of the deployed network only: a rounded weight, or a corrected bias.

        Args:
            name: of the parameter.
            data: its new values, as many as before.
        """
        put(self.graph, name, data)

    def rewrite(self, change: Callable[[Graph], None]) -> None:
        """Apply a function-preserving rewrite to the deployed network and to the float network.

        Args:
            change: changes the graph that it is given, and leaves what that graph computes as it is.
        """
        for graph in (self.graph, self.reference):
            change(graph)


class Method(ABC):
    """One method; its settings are the fields of the dataclass it is."""

    name: ClassVar[str]
    stage: ClassVar[str]

    @abstractmethod
    def apply(self, work: Work) -> list[str]:
        """Change `work`; returns in words what was done and, by layer name, what could not be done and why."""
